"""What a model reads of documents and conversations: text in spans of one loss weight, and the proof of each answer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trivium.data.chat.formats import Conversation, Document
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ChatEncoder, ChatSample, Encoded
from trivium.data.store.tally import describe_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class TextSpan:
    """Text whose tokens have one loss weight."""

    text: str
    weight: int | None = None
    """Hundredths; None where all tokens count alike."""


@dataclass
class AnswerProof:
    """A supervised answer: up to it its sample is, id for id, the prompt that serving sends."""

    turn: int
    """Number of the answer's turn, from 1."""
    prompt_tokens: int
    answer_tokens: int
    thinking: bool | None
    """The `enable_thinking` that serving sends; None where the template has no such switch."""


@dataclass
class Shown:
    """A document, a conversation, or a sample of one."""

    name: str
    spans: list[TextSpan]
    num_tokens: int | None = None
    """None without a tokenizer."""
    proofs: list[AnswerProof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was split, dropped or cut, and why."""


def as_text(content: Conversation | Document) -> list[TextSpan]:
    """A document's text, or a line for each turn of a conversation, without a template."""
    if isinstance(content, Document):
        return [TextSpan(content.text)]
    return [TextSpan(_turn_text(turn), turn.weight) for turn in content.turns]


def _turn_text(turn: Turn) -> str:
    reasoning = f"(reasons: {turn.reasoning}) " if turn.reasoning else ""
    calls = "".join(f" (calls: {json.dumps(call, ensure_ascii=False)})" for call in turn.tool_calls)
    return f"{turn.role}: {reasoning}{turn.content}{calls}\n"


def as_samples(
    where: str, conversation: Conversation, encoder: ChatEncoder, tokenizer: "PreTrainedTokenizerFast"
) -> list[Shown]:
    """The samples that a conversation becomes, each answer proven by the encoder.

    Raises: RecordError when it gives none, BadData when an answer does not continue what serving sends.
    """
    encoded = encoder.encode(conversation)
    num_samples = len(encoded.samples)
    shown = [
        Shown(
            where if num_samples == 1 else f"{where}, sample {number} of {num_samples}",
            as_spans(sample.ids, sample.weights, tokenizer),
            len(sample.ids),
            _proofs(sample),
        )
        for number, sample in enumerate(encoded.samples, start=1)
    ]
    shown[0].notes = list(_notes(encoded))
    return shown


def _proofs(sample: ChatSample) -> list[AnswerProof]:
    return [
        AnswerProof(answer.turn + 1, answer.start, answer.stop - answer.start, answer.thinking)
        for answer in sample.answers
    ]


def _notes(encoded: Encoded) -> Iterator[str]:
    if encoded.split:
        yield "a later answer's history begins at a later user turn, so that it fits"
    elif len(encoded.samples) > 1:
        yield f"{len(encoded.samples)} samples, since the template shows earlier turns differently later"
    yield from describe_notes(vars(encoded) | {"control_token_records": encoded.has_control_text})


def as_spans(
    ids: np.ndarray, weights: np.ndarray | None, tokenizer: "PreTrainedTokenizerFast | None"
) -> list[TextSpan]:
    """Tokens as text, or as numbers without a tokenizer, cut where the weight changes.

    Args:
        ids: [tokens] int.
        weights: [tokens] uint8, hundredths; None where all tokens count alike.
        tokenizer: what decodes them.
    """
    borders = [] if weights is None else (np.flatnonzero(np.diff(weights)) + 1).tolist()
    spans = []
    for first, last in zip([0, *borders], [*borders, len(ids)], strict=True):
        part = ids[first:last].tolist()
        text = str(tokenizer.decode(part)) if tokenizer else " ".join(map(str, part))
        spans.append(TextSpan(text, None if weights is None or not part else int(weights[first])))
    return spans
