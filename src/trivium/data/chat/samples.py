"""Samples: encode a conversation as token ids and loss weights, and verify that prompts equal those of serving.

Before every supervised answer, a sample has exactly the ids of `apply_chat_template(history,
add_generation_prompt=True)`; the answer is encoded separately, as a model generates it. If the template renders earlier
messages differently later (Qwen3 drops their reasoning), the conversation becomes several samples.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from trivium.data.chat.formats import Conversation
from trivium.data.chat.template import Renderer, describe_template
from trivium.data.columns import FULL_WEIGHT
from trivium.data.rejects import Reason, RecordError
from trivium.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Overlong = Literal["drop", "split", "truncate"]


@dataclass(frozen=True)
class ConversationSettings:
    """How conversations become samples."""

    seq_len: int
    """Maximum tokens of a sample."""
    overlong: Overlong = "drop"
    """What to do with answers that do not fit; see `config.Data.overlong`."""
    all_tokens: bool = False
    """Whether all tokens are supervised rather than the answers only."""


@dataclass(frozen=True)
class AnswerSpan:
    """A supervised answer: tokens [start, stop) of a sample, ending with the end-of-turn token."""

    turn: int
    start: int
    stop: int
    thinking: bool | None
    """The `enable_thinking` of its prompt; None if the template has no switch."""


@dataclass(frozen=True)
class ChatSample:
    """A sample of a conversation."""

    ids: np.ndarray
    """[tokens] int32."""
    weights: np.ndarray
    """[tokens] uint8, loss weight of each token as a label, in hundredths."""
    has_reasoning: bool
    answers: tuple[AnswerSpan, ...]


@dataclass(frozen=True)
class Encoded:
    """The samples of a conversation, and a record of what is missing from them."""

    samples: list[ChatSample]
    dropped_turns: int = 0
    """Answers left out: too long, or not preceded by a message."""
    cut_turns: int = 0
    """Truncated answers."""
    split: bool = False
    """Whether the start of the history was dropped before some answer to make it fit."""
    lost_reasoning_turns: int = 0
    """Answers whose reasoning the template leaves out."""
    has_control_text: bool = False
    """Whether a prompt contains the text of a token like <think>, which is encoded as the token, as in serving."""


class _PromptAnswer(NamedTuple):
    """Token ids of one answer and its prompt."""

    prompt_ids: list[int]
    answer_ids: list[int]
    thinking: bool | None
    has_reasoning: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass
class _Growing:
    """A sample that later answers may extend."""

    ids: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    has_reasoning: bool = False
    answers: list[AnswerSpan] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    """Prompt of each answer, as sent by serving."""

    def extend(self, part: _PromptAnswer, turn: int, weight: int) -> None:
        start = len(part.prompt_ids)
        self.ids = self.ids + part.prompt_ids[len(self.ids) :] + part.answer_ids
        self.weights += [0] * (start - len(self.weights)) + [weight] * len(part.answer_ids)
        self.has_reasoning |= part.has_reasoning
        self.answers.append(AnswerSpan(turn, start, len(self.ids), part.thinking))
        self.prompts.append(part.prompt_ids)

    def sample(self) -> ChatSample:
        return ChatSample(
            np.array(self.ids, dtype=np.int32),
            np.array(self.weights, dtype=np.uint8),
            self.has_reasoning,
            tuple(self.answers),
        )


class ChatEncoder:
    """Encodes conversations as samples; see `ConversationSettings` for the arguments.

    With `all_tokens`, samples may be longer than `seq_len` and are cut like documents.

    Raises: ConfigError or BadData when the tokenizer's chat template is not usable for training.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", seq_len: int, overlong: Overlong = "drop", all_tokens: bool = False
    ) -> None:
        self.template = describe_template(tokenizer)
        self._renderer = Renderer(tokenizer)
        self._seq_len = seq_len
        self._overlong = overlong
        self._all_tokens = all_tokens
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        self._control = _any_of({token.content for token in added} - special)

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode one conversation.

        Raises: RecordError when it has no usable answer, BadData when a prompt differs from what serving sends.
        """
        has_control_text = self._check_control_tokens(conversation)
        if self._all_tokens:
            return Encoded([self._whole(conversation)], has_control_text=has_control_text)
        growing: list[_Growing] = []
        first = num_dropped = num_cut = num_lost = 0
        for index, turn in enumerate(conversation.turns):
            if not turn.weight:
                continue
            part, first = self._fitting_part(conversation, first, index)
            cut = None if part is None else self._cut(part)
            if part is None or cut is None:
                num_dropped += 1
                continue
            num_cut += cut is not part
            num_lost += turn.reasoning is not None and not part.has_reasoning
            if not growing or cut.prompt_ids[: len(growing[-1].ids)] != growing[-1].ids:
                growing.append(_Growing())
            growing[-1].extend(cut, index, turn.weight)
        if not growing:
            raise RecordError(Reason.LONGER_THAN_SEQ_LEN, f"no answer fits in {self._seq_len:,} tokens")
        self._prove(growing)
        samples = [sample.sample() for sample in growing]
        return Encoded(samples, num_dropped, num_cut, first > 0, num_lost, has_control_text)

    def _check_control_tokens(self, conversation: Conversation) -> bool:
        """Whether a prompt contains the text of a token that is not special; raises RecordError for a special one."""
        for index, turn in enumerate(conversation.turns):
            text = json.dumps(turn.message(), ensure_ascii=False)
            if match := self._special.search(text):
                raise RecordError(Reason.CONTROL_TOKEN, f"{match[0]} in turn {index + 1} ({turn.role})")
        tools = json.dumps(conversation.tools, ensure_ascii=False)
        if match := self._special.search(tools):
            raise RecordError(Reason.CONTROL_TOKEN, f"{match[0]} in the tools")
        read = [turn.content for turn in conversation.turns if turn.role != "assistant"]
        return any(self._control.search(text) for text in (*read, tools))

    def _whole(self, conversation: Conversation) -> ChatSample:
        ids = self._renderer.whole_ids(conversation.turns, conversation.tools)
        weights = np.full(len(ids), FULL_WEIGHT, dtype=np.uint8)
        has_reasoning = any(turn.thinks for turn in conversation.turns if turn.role == "assistant")
        return ChatSample(np.array(ids, dtype=np.int32), weights, has_reasoning, ())

    def _fitting_part(self, conversation: Conversation, first: int, index: int) -> tuple[_PromptAnswer | None, int]:
        """Answer `index` with the history from turn `first`, or with overlong=split, from a later user turn that fits.

        Also returns the first turn of that history. It never moves back, so that later answers extend the sample.
        """
        turns = conversation.turns
        if index == 0:
            return None, first
        part = self._part(conversation, first, index)
        if self._overlong != "split" or part.num_tokens <= self._seq_len:
            return part, first
        for start in range(first + 1, index):
            if turns[start].role == "user" and any(turn.role != "system" for turn in turns[first:start]):
                later = self._part(conversation, start, index)
                if later.num_tokens <= self._seq_len:
                    return later, start
        return None, first

    def _cut(self, part: _PromptAnswer) -> _PromptAnswer | None:
        """The part, truncated if allowed; None if not even one token and the end of turn fit."""
        if part.num_tokens <= self._seq_len:
            return part
        room = self._seq_len - len(part.prompt_ids) - 1
        if self._overlong != "truncate" or room < 1:
            return None
        return part._replace(answer_ids=[*part.answer_ids[:room], self.template.end_of_turn_id])

    def _part(self, conversation: Conversation, first: int, index: int) -> _PromptAnswer:
        """Answer `index` with the prompt of the turns from `first`, plus the system turn if there is one."""
        turn, history, where = conversation.turns[index], conversation.turns[first:index], f"turn {index + 1}"
        if first and conversation.turns[0].role == "system":
            history = (conversation.turns[0], *history)
        rest, thinking = self._renderer.continuation(history, turn, conversation.tools, where)
        end = rest.rfind(self.template.end_of_turn)
        if end < 0:
            raise BadData(
                f"{where}: the chat template ends it with {rest[-40:]!r} instead of {self.template.end_of_turn}. "
                "Expected every answer to end with the token that stops generation. Use the model's own chat template, "
                "or correct this one."
            )
        answer = rest[: end + len(self.template.end_of_turn)]
        return _PromptAnswer(
            self._renderer.prompt_ids(history, conversation.tools, thinking),
            self._renderer.answer_ids(answer, where),
            thinking,
            has_reasoning=turn.thinks and (turn.reasoning or "").strip() in answer,
        )

    def _prove(self, growing: Sequence[_Growing]) -> None:
        """Raises: BadData when a sample differs from the prompt that serving sends before one of its answers."""
        for sample in growing:
            for answer, prompt_ids in zip(sample.answers, sample.prompts, strict=True):
                if sample.ids[: answer.start] != prompt_ids:
                    raise self._renderer.mismatch(prompt_ids, sample.ids[: answer.start], f"turn {answer.turn + 1}")


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
