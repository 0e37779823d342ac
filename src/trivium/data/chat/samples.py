"""Samples: a conversation becomes samples of token ids, each answer proven to continue exactly what serving sends.

The model's own chat template decides everything; nothing here knows a model. For every answer that is trained on, the
prompt is what `apply_chat_template(history, add_generation_prompt=True)` gives, and the answer is encoded by itself, as
a model writes it. Templates that show an earlier turn differently later (Qwen3 drops its reasoning) make one
conversation several samples.
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
    """How conversations become samples; documents are not affected."""

    seq_len: int
    """Tokens of the longest sample."""
    overlong: Overlong = "drop"
    """What to do with longer ones; see `config.Data.overlong`."""
    all_tokens: bool = False
    """Every token is supervised, not the assistant's alone."""


@dataclass(frozen=True)
class AnswerSpan:
    """A supervised answer inside a sample: its tokens are [start, stop), the end-of-turn token the last of them."""

    turn: int
    start: int
    stop: int
    thinking: bool | None
    """The `enable_thinking` of the prompt that it continues; None where the template has no such switch."""


@dataclass(frozen=True)
class ChatSample:
    """Token ids with their loss weights, made from one conversation."""

    ids: np.ndarray
    """[tokens] int32."""
    weights: np.ndarray
    """[tokens] uint8, hundredths: the loss weight of each token as a label."""
    has_reasoning: bool
    answers: tuple[AnswerSpan, ...]


@dataclass(frozen=True)
class Encoded:
    """The samples of a conversation, and what was left out of them."""

    samples: list[ChatSample]
    dropped_turns: int = 0
    """Answers left out: too long, or nothing before them that they could answer."""
    cut_turns: int = 0
    """Answers that lost their end."""
    split: bool = False
    """Whether a turn's history begins later than the conversation, so that it fits."""
    lost_reasoning_turns: int = 0
    """Answers whose reasoning the template does not show."""
    has_control_text: bool = False
    """Whether what the model reads spells out a token like <think>; serving would encode it as that token, too."""


class _PromptAnswer(NamedTuple):
    """One answer and the prompt it continues."""

    prompt_ids: list[int]
    answer_ids: list[int]
    thinking: bool | None
    has_reasoning: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass
class _Growing:
    """A sample that later answers may still extend."""

    ids: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    has_reasoning: bool = False
    answers: list[AnswerSpan] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    """What serving sends for each answer."""

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
    """Turns conversations into samples.

    Args:
        tokenizer: a loaded Hugging Face tokenizer with a chat template.
        seq_len: tokens of the longest sample.
        overlong: what to do with a turn that does not fit; see `config.Data.overlong`.
        all_tokens: every token is supervised, not the answers alone; such a sample is a document and may be longer.

    Raises: ConfigError without a usable chat template, BadData when the simplest answer does not continue its prompt.
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

        Raises: RecordError when it gives no sample, BadData when an answer does not continue what serving sends.
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
            raise RecordError(Reason.LONGER_THAN_SEQ_LEN, f"no answer fits into {self._seq_len:,} tokens")
        self._prove(growing)
        samples = [sample.sample() for sample in growing]
        return Encoded(samples, num_dropped, num_cut, first > 0, num_lost, has_control_text)

    def _check_control_tokens(self, conversation: Conversation) -> bool:
        """Whether the text spells out a token that is not special; one that is special rejects the record."""
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
        """The answer of turn `index` after the history from turn `first` on, or, to split, from a later user turn on.

        Gives the turn that the history begins with, too. It never moves back, so that later answers extend the sample.
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
        """The part as it fits, None when it does not; an end of turn and one token before it always stay."""
        if part.num_tokens <= self._seq_len:
            return part
        room = self._seq_len - len(part.prompt_ids) - 1
        if self._overlong != "truncate" or room < 1:
            return None
        return part._replace(answer_ids=[*part.answer_ids[:room], self.template.end_of_turn_id])

    def _part(self, conversation: Conversation, first: int, index: int) -> _PromptAnswer:
        """The answer of turn `index`, and the prompt of the turns from `first` on, with the system turn always."""
        turn, history, where = conversation.turns[index], conversation.turns[first:index], f"turn {index + 1}"
        if first and conversation.turns[0].role == "system":
            history = (conversation.turns[0], *history)
        rest, thinking = self._renderer.continuation(history, turn, conversation.tools, where)
        end = rest.rfind(self.template.end_of_turn)
        if end < 0:
            raise BadData(
                f"{where}: the chat template ends it with {rest[-40:]!r} and not with {self.template.end_of_turn}. "
                "Expected the same end for every answer, since the model learns to stop by it. Use the model's own "
                "template, or correct this one."
            )
        answer = rest[: end + len(self.template.end_of_turn)]
        return _PromptAnswer(
            self._renderer.prompt_ids(history, conversation.tools, thinking),
            self._renderer.answer_ids(answer, where),
            thinking,
            has_reasoning=turn.thinks and (turn.reasoning or "").strip() in answer,
        )

    def _prove(self, growing: Sequence[_Growing]) -> None:
        """The token proof: up to each answer a sample is, id for id, what serving sends.

        Raises: BadData.
        """
        for sample in growing:
            for answer, prompt_ids in zip(sample.answers, sample.prompts, strict=True):
                if sample.ids[: answer.start] != prompt_ids:
                    raise self._renderer.mismatch(prompt_ids, sample.ids[: answer.start], f"turn {answer.turn + 1}")


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
