"""Talk to a model: a conversation through its chat template, or a text that it goes on with, streamed.

Generation is transformers' own. A conversation can be saved as a row that trains as it is. Reading lines and printing
is the command line's business, which is the only one to import this file.
"""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from trivium.engine.sample import choice_of_tokens
from trivium.errors import ConfigError
from trivium.use.answers import EvalPrompt, prompt_text, split_reasoning
from trivium.use.load import Loaded


@dataclass
class Writer:
    """Lets a model write, piece by piece.

    Attributes:
        loaded: the model.
        max_new_tokens: where it stops at the latest.
        temperature: 0 takes the likeliest token each time.
        is_whole: whether the last text came to its end: a stop token, not the limit and not an interruption.
    """

    loaded: Loaded
    max_new_tokens: int
    temperature: float
    is_whole: bool = False

    def write(self, prompt: str) -> Generator[str]:
        """Pieces of what follows a prompt, as they come; leaving early ends the generation."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Left(StoppingCriteria):
            """Stops when nobody reads any more."""

            is_set = False

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
                return torch.full((len(input_ids),), self.is_set, device=input_ids.device)

        left, network, tokenizer = Left(), self.loaded.network, self.loaded.tokenizer
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {
            **inputs,
            **choice_of_tokens(self.temperature),
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": self.loaded.stop_ids,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([left]),
        }
        outcome: list[Any] = []

        def generate() -> None:
            try:
                outcome.append(network.generate(**arguments))
            except Exception as error:
                outcome.append(error)
                streamer.end()

        self.is_whole = False
        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.is_set = True
            thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        self.is_whole = int(outcome[0][0, -1]) in self.loaded.stop_ids


@dataclass
class Dialogue:
    """A conversation with a model, turn by turn.

    Attributes:
        writer: what answers.
        system: the system prompt; empty for none.
        thinking: whether the template asks for reasoning; None leaves it to the template.
        turns: what was said, as chat messages; an answer that was cut off carries `train: false`.
    """

    writer: Writer
    system: str = ""
    thinking: bool | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system prompt and all turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> Generator[str]:
        """Say something; pieces of the answer as they come."""
        self.turns.append({"role": "user", "content": text})
        yield from self._answer()

    def retry(self) -> Generator[str]:
        """Another answer instead of the last one.

        Raises: ConfigError when nothing was said yet.
        """
        while self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise ConfigError("Nothing was said yet, so there is nothing to answer again.")
        yield from self._answer()

    def _answer(self) -> Generator[str]:
        """Pieces of an answer, which becomes a turn whole or not; leaving early leaves what came until then."""
        question = EvalPrompt([{k: v for k, v in turn.items() if k != "train"} for turn in self.messages])
        prompt = prompt_text(self.writer.loaded.tokenizer, question, as_chat=True, thinking=self.thinking)
        pieces: list[str] = []
        try:
            with closing(self.writer.write(prompt)) as written:
                for piece in written:
                    pieces.append(piece)
                    yield piece
        finally:
            reasoning, answer = split_reasoning("".join(pieces))
            turn = {"role": "assistant", "content": answer}
            if reasoning:
                turn["reasoning_content"] = reasoning
            self.turns.append(turn if self.writer.is_whole and answer else turn | {"train": False})

    def save(self, path: Path) -> None:
        """Append the conversation to a file as a row that trains as it is; what was cut off stands there untrained.

        Raises: ConfigError when no answer came to its end.
        """
        if all("train" in turn for turn in self.turns if turn["role"] == "assistant"):
            raise ConfigError("No answer came to its end, so there is nothing to learn from. Ask, or try /retry.")
        kept: list[dict[str, Any]] = []
        for turn in self.messages:
            if turn["role"] == "assistant" and not turn["content"].strip():
                kept.pop()  # a question that got no answer
            else:
                kept.append(turn)
        if kept[-1]["role"] == "user":
            kept.pop()
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": kept}, ensure_ascii=False) + "\n")
