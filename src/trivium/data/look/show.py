"""Show documents and conversations as spans of text with their loss weights, and verify each answer's prompt."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trivium.data.chat.formats import Conversation, Document
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ChatEncoder
from trivium.data.store.tally import describe_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class TextSpan:
    """Text whose tokens have the same loss weight."""

    text: str
    weight: int | None = None
    """In hundredths; None if all tokens have full weight."""


@dataclass
class AnswerProof:
    """A supervised answer whose prompt equals, token for token, the prompt that serving sends."""

    turn: int
    """Number of the message, from 1."""
    prompt_tokens: int
    answer_tokens: int
    thinking: bool | None
    """The `enable_thinking` of the prompt; None if the template has no switch."""


@dataclass
class Shown:
    """A document, a conversation, or a sample of one."""

    name: str
    spans: list[TextSpan]
    num_tokens: int | None = None
    """None without a tokenizer."""
    proofs: list[AnswerProof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks on split, dropped or cut content."""


def as_text(content: Conversation | Document) -> list[TextSpan]:
    """A document's text, or a line per message of a conversation, without a chat template."""
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
    """The samples of a conversation, with an `AnswerProof` for each answer.

    Raises: RecordError when there are none, BadData when a prompt differs from what serving sends.
    """
    encoded = encoder.encode(conversation)
    num_samples = len(encoded.samples)
    shown = []
    for number, sample in enumerate(encoded.samples, start=1):
        name = where if num_samples == 1 else f"{where}, sample {number} of {num_samples}"
        proofs = [AnswerProof(one.turn + 1, one.start, one.stop - one.start, one.thinking) for one in sample.answers]
        shown.append(Shown(name, as_spans(sample.ids, sample.weights, tokenizer), len(sample.ids), proofs))
    notes = describe_notes(vars(encoded) | {"control_token_records": encoded.has_control_text})
    if encoded.split:
        notes.insert(0, "the beginning of the history was dropped so that later answers fit")
    elif num_samples > 1:
        notes.insert(
            0, f"{num_samples} samples, since the template renders earlier messages differently in later prompts"
        )
    shown[0].notes = notes
    return shown


def as_spans(
    ids: np.ndarray, weights: np.ndarray | None, tokenizer: "PreTrainedTokenizerFast | None"
) -> list[TextSpan]:
    """Tokens as text, or as numbers without a tokenizer, in spans of equal weight.

    `ids`: [tokens] int. `weights`: [tokens] uint8 in hundredths; None if all tokens have full weight.
    """
    borders = [] if weights is None else (np.flatnonzero(np.diff(weights)) + 1).tolist()
    spans = []
    for first, last in zip([0, *borders], [*borders, len(ids)], strict=True):
        part = ids[first:last].tolist()
        text = str(tokenizer.decode(part)) if tokenizer else " ".join(map(str, part))
        spans.append(TextSpan(text, None if weights is None or not part else int(weights[first])))
    return spans
