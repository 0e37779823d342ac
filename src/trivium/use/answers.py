"""Answers a file of prompts with greedy decoding, and scores the answers: exact match, valid JSON, stop rate."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trivium.errors import BadData, ConfigError
from trivium.use.load import Loaded

BATCH_SIZE = 32
END_OF_REASONING = "</think>"
PROMPT_FORMAT = (
    'Each line must be {"prompt": "...", "answer": "..."} or {"messages": [...]}, whose last assistant message is the '
    "expected answer; answers are optional. A .txt file has one prompt per line."
)


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt and its expected answer.

    Attributes:
        turns: chat messages; the last one is from the user or a tool.
        answer: the expected answer without reasoning; may be None.
        tools: functions for the chat template.
    """

    turns: list[dict[str, Any]]
    answer: str | None = None
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """The contents of the messages joined by newlines: the prompt for a model without a chat template."""
        return "\n".join(str(turn.get("content") or "") for turn in self.turns)

    @property
    def wants_json(self) -> bool:
        """Whether the expected answer is a JSON object or list."""
        return self.answer is not None and is_json(self.answer)


@dataclass(frozen=True)
class ModelAnswer:
    """A model's answer.

    Attributes:
        text: the answer without its reasoning.
        reasoning: the text before the end of reasoning; may be empty.
        stopped: whether it ended with a stop token.
        num_tokens: number of tokens, including the stop token.
    """

    text: str
    reasoning: str
    stopped: bool
    num_tokens: int


@dataclass(frozen=True)
class Scores:
    """Scores of a set of answers, from 0 to 1; None if no prompt has such an expected answer.

    Attributes:
        num_questions: number of answers.
        exact_match: share of answers that equal the expected one, ignoring surrounding whitespace.
        json_valid: share of valid JSON among the answers that should be a JSON object or list.
        stop_rate: share of answers that ended with a stop token.
    """

    num_questions: int
    exact_match: float | None
    json_valid: float | None
    stop_rate: float


def read_questions(path: Path) -> list[EvalPrompt]:
    """The prompts of a .jsonl or .txt file.

    Raises: ConfigError when the file does not exist, BadData that names the first line that cannot be used.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. {PROMPT_FORMAT}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(
                EvalPrompt([_turn("user", line.strip())]) if path.suffix == ".txt" else question_of(json.loads(line))
            )
        except ValueError as error:
            raise BadData(f"{path}:{number}: {error}. {PROMPT_FORMAT}") from None
    if not questions:
        raise BadData(f"{path} contains no prompts. {PROMPT_FORMAT}")
    return questions


def question_of(record: object) -> EvalPrompt:
    """The prompt in one record of a file of prompts.

    Raises: ValueError that says what is wrong with the record.
    """
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__} instead of an object")
    if "messages" in record:
        turns = record["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
            raise ValueError("messages is not a list of objects with a role")
        answer, asked = None, turns
        if turns and turns[-1]["role"] == "assistant":
            answer, asked = turns[-1].get("content"), turns[:-1]
        if not asked or asked[-1]["role"] not in ("user", "tool"):
            raise ValueError("messages must end with a user message, optionally followed by an assistant message")
        return EvalPrompt(asked, split_reasoning(answer)[1] if isinstance(answer, str) else None, record.get("tools"))
    prompt, answer, system = record.get("prompt"), record.get("answer"), record.get("system")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt is missing or empty")
    if not isinstance(answer, str | None) or not isinstance(system, str | None):
        raise ValueError("answer and system must be text or absent")
    return EvalPrompt([*([_turn("system", system)] if system else []), _turn("user", prompt)], answer)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def prompt_text(tokenizer: Any, question: EvalPrompt, as_chat: bool, thinking: bool | None) -> str:
    """The text that a model gets: the messages in its chat template with the generation prompt, or as plain text.

    `thinking` is the template's `enable_thinking`; None leaves it to the template.

    Raises: BadData when the template cannot render the turns.
    """
    if not as_chat:
        return question.text
    from jinja2 import TemplateError

    switch = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            question.turns, tools=question.tools, tokenize=False, add_generation_prompt=True, **switch
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise BadData(
            f"The chat template cannot render these messages: {error}. Found {json.dumps(question.turns)[:200]}; "
            "expected roles and content that the template supports."
        ) from error


@torch.inference_mode()
def answers(
    loaded: Loaded,
    questions: Sequence[EvalPrompt],
    *,
    as_chat: bool | None = None,
    stop_ids: Sequence[int] | None = None,
    max_new_tokens: int = 256,
    thinking: bool = False,
    every: Callable[[int, int], None] = lambda done, total: None,
) -> list[ModelAnswer]:
    """A model's greedy answer to each prompt, in the order of the prompts.

    Args:
        loaded: the model.
        questions: the prompts.
        as_chat: whether to use the chat template; by default, if the model is a chat model.
        stop_ids: the tokens that end an answer; by default the model's own.
        max_new_tokens: maximum tokens of an answer.
        thinking: the template's `enable_thinking`.
        every: called with (answers so far, number of prompts).

    Raises: ConfigError when `as_chat` is set and there is no chat template.
    """
    tokenizer = loaded.tokenizer
    as_chat = loaded.converses if as_chat is None else as_chat
    if as_chat and loaded.template is None:
        raise ConfigError(
            f"The tokenizer of {loaded.place.folder} has no usable chat template. Use the tokenizer of the model's "
            "chat version."
        )
    stops = list(loaded.stop_ids if stop_ids is None else stop_ids)
    texts = [prompt_text(tokenizer, question, as_chat, thinking) for question in questions]
    prompts = tokenizer(texts, add_special_tokens=not as_chat).input_ids if texts else []
    given: dict[int, ModelAnswer] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        outputs = generate(loaded, [prompts[index] for index in batch], stops, max_new_tokens)
        for index, ids in zip(batch, outputs, strict=True):
            stopped = bool(ids) and ids[-1] in stops
            text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
            reasoning, text = split_reasoning(text)
            given[index] = ModelAnswer(text, reasoning, stopped, len(ids))
        every(len(given), len(questions))
    return [given[index] for index in range(len(prompts))]


def generate(
    loaded: Loaded, prompts: Sequence[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """The greedy continuation of each prompt, up to and including its stop token if it has one.

    Shorter prompts are left-padded, with an attention mask.
    """
    from transformers import GenerationConfig

    tensors = [torch.tensor(ids, device=loaded.network.device) for ids in prompts]
    inputs = pad_sequence(tensors, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(ids) for ids in tensors], batch_first=True, padding_side="left")
    # All settings are given, so that penalties and temperatures in generation_config.json have no effect.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )
    outputs = loaded.network.generate(input_ids=inputs, attention_mask=mask, generation_config=greedy)
    for ids in outputs[:, inputs.shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(ids) if token in stop_ids), len(ids))
        yield ids[:end]


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a model's output; the answer is empty if the reasoning is unfinished."""
    before, mark, after = text.partition(END_OF_REASONING)
    if mark or before.lstrip().startswith("<think>"):
        return before.split("<think>")[-1].strip("\n"), after.lstrip("\n")
    return "", text


def score(questions: Sequence[EvalPrompt], given: Sequence[ModelAnswer]) -> Scores:
    """Score the answers."""
    pairs = list(zip(questions, given, strict=True))
    return Scores(
        num_questions=len(pairs),
        exact_match=_share(matches(q, a) for q, a in pairs if q.answer is not None),
        json_valid=_share(is_json(a.text) for q, a in pairs if q.wants_json),
        stop_rate=_share(a.stopped for _, a in pairs) or 0.0,
    )


def matches(question: EvalPrompt, answer: ModelAnswer) -> bool:
    """Whether the answer equals the expected one, ignoring surrounding whitespace."""
    return question.answer is not None and answer.text.strip() == question.answer.strip()


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list and nothing else."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _share(outcomes: Iterable[bool]) -> float | None:
    found = list(outcomes)
    return sum(found) / len(found) if found else None
