"""Chats with a model through its chat template, or completes texts, with streamed output."""

import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trivium.engine.sample import choice_of_tokens
from trivium.errors import ConfigError
from trivium.use.answers import EvalPrompt, prompt_text, split_reasoning
from trivium.use.load import Loaded


@dataclass
class Writer:
    """Streams text from a model.

    Attributes:
        loaded: the model.
        max_new_tokens: maximum tokens of a text.
        temperature: 0 is greedy.
        is_whole: whether the last text ended with a stop token, not at the limit or by interruption.
    """

    loaded: Loaded
    max_new_tokens: int
    temperature: float
    is_whole: bool = False

    def write(self, prompt: str) -> Generator[str]:
        """Yield the continuation of a prompt in pieces; closing the generator stops the generation."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Cancelled(StoppingCriteria):
            """Stops the generation when the generator is closed."""

            is_set = False

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
                return torch.full((len(input_ids),), self.is_set, device=input_ids.device)

        cancelled, network, tokenizer = Cancelled(), self.loaded.network, self.loaded.tokenizer
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {
            **inputs,
            **choice_of_tokens(self.temperature),
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": self.loaded.stop_ids,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([cancelled]),
        }
        self.is_whole = False
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(network.generate, **arguments)
            future.add_done_callback(lambda done: streamer.end() if done.exception() else None)
            try:
                yield from streamer
            finally:
                cancelled.is_set = True
        self.is_whole = int(future.result()[0, -1]) in self.loaded.stop_ids


@dataclass
class Dialogue:
    """A conversation with a model.

    Attributes:
        writer: the model that answers.
        system: the system prompt; may be empty.
        thinking: the template's `enable_thinking`; None leaves it to the template.
        turns: the chat messages so far; an answer that was cut off has `train: false`.
    """

    writer: Writer
    system: str = ""
    thinking: bool | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system prompt and all messages."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> Generator[str]:
        """Send a user message, and yield the answer in pieces."""
        self.turns.append({"role": "user", "content": text})
        yield from self._answer()

    def retry(self) -> Generator[str]:
        """Replace the last answer.

        Raises: ConfigError when there is no message.
        """
        while self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise ConfigError("There is no message to answer again. Type a message first.")
        yield from self._answer()

    def _answer(self) -> Generator[str]:
        """Yield the answer in pieces; it becomes a message even if it is incomplete."""
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
        """Append the conversation to a file as a training record; answers that were cut off are not supervised.

        Raises: ConfigError when no answer is complete.
        """
        if all("train" in turn for turn in self.turns if turn["role"] == "assistant"):
            raise ConfigError("No answer is complete, so there is nothing to save. Type a message, or use /retry.")
        kept: list[dict[str, Any]] = []
        for turn in self.messages:
            if turn["role"] == "assistant" and not turn["content"].strip():
                kept.pop()  # a question without an answer
            else:
                kept.append(turn)
        if kept[-1]["role"] == "user":
            kept.pop()
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": kept}, ensure_ascii=False) + "\n")
