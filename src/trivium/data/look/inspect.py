"""Inspect stores and sources: first documents, lengths, shares and rejects.

With a tokenizer, sources are encoded like in a build; without one, their text is shown.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trivium.config.inputs import Data, Source
from trivium.data.chat.formats import Document
from trivium.data.chat.samples import ChatEncoder, ConversationSettings
from trivium.data.columns import LOSS_WEIGHTS, REASONING, loss_weights
from trivium.data.look.show import Shown, as_samples, as_spans, as_text
from trivium.data.rejects import RecordError, Reject
from trivium.data.source.corpus import Corpus, NoHashes, find_corpus
from trivium.data.source.records import read_records
from trivium.data.store.build import chat_reading
from trivium.data.store.encode import encode_blocks
from trivium.data.store.megatron import CHUNK_ITEMS, Store
from trivium.data.store.publish import Lengths
from trivium.data.store.tally import COUNTS, Tally
from trivium.data.tokenizer import document_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_REJECTS_OF_A_REASON = 3


@dataclass(frozen=True)
class Look:
    """Options of an inspection."""

    tokenizer: "PreTrainedTokenizerFast | None"
    conversations: ConversationSettings
    num_shown: int
    """Records to show."""


@dataclass
class Inspection:
    """The contents of one store or source."""

    name: str
    unit: str
    """Unit of the lengths: `tokens`, or `bytes` of text for a source without a tokenizer."""
    num_documents: int = 0
    """Documents and samples of conversations."""
    size: int = 0
    """Sum of the lengths."""
    share: float = 0.0
    """Share of the size of everything inspected in the same unit."""
    num_supervised: int | None = None
    """Supervised tokens; None if all are, or if lengths are in bytes."""
    num_reasoning: int = 0
    """Documents with reasoning in an answer."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Minimum, quantiles, maximum and mean."""
    histogram: list[tuple[int, int]] = field(default_factory=list)
    """(power of two, documents at least that long and less than twice as long)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Counts of records, see `COUNTS`; empty for a store without a report."""
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    rejects: dict[str, list[str]] = field(default_factory=dict)
    """The first rejects of each reason, with file and line."""
    documents: list[Shown] = field(default_factory=list)
    """The first documents or conversations."""

    def note_rejects(self, rejects: Iterable[Reject]) -> None:
        """Keep the first rejects of each reason."""
        for one in rejects:
            shown = self.rejects.setdefault(one.reason, [])
            if len(shown) < MAX_REJECTS_OF_A_REASON:
                shown.append(f"{one.file}:{one.line}: {one.reason} {one.detail}".rstrip())


def inspect_all(sources: Sequence[Source], look: Look) -> list[Inspection]:
    """Inspect sources and compare their sizes; the path of a source may be a store (a folder or a prefix).

    Raises: ConfigError or BadData when one of them cannot be read, or the chat template is not usable for training.
    """
    found = []
    for source in sources:
        store = None if source.path is None else Path(source.path).expanduser()
        if store and ((store / "tokens.idx").exists() or store.with_name(f"{store.name}.idx").exists()):
            found.append(_inspect_store(store, look))
        else:
            found.append(_inspect_source(source, look))
    totals: Counter[str] = Counter()
    for one in found:
        totals[one.unit] += one.size
    for one in found:
        one.share = one.size / max(1, totals[one.unit])
    return found


def _inspect_store(path: Path, look: Look) -> Inspection:
    store = Store(path)
    inspection = Inspection(str(path), "tokens", num_supervised=_num_supervised(store))
    _describe(inspection, (store.lengths[at : at + CHUNK_ITEMS] for at in range(0, len(store), CHUNK_ITEMS)))
    for document in range(min(look.num_shown, len(store))):
        ids = store.tokens(document)
        spans = as_spans(ids, loss_weights(store, document, 0, len(ids)), look.tokenizer)
        inspection.documents.append(Shown(f"document {document}", spans, len(ids)))
    if REASONING in store.columns:
        inspection.num_reasoning = int(store.values(REASONING.name).sum())
    if (path / "report.json").exists():
        report = json.loads((path / "report.json").read_text())
        inspection.counts = {name: report[name] for name in COUNTS if name in report}
        inspection.rejected_by_reason = report["rejected_by_reason"]
        with (path / "rejects.jsonl").open() as rejects:
            inspection.note_rejects(Reject(**json.loads(line)) for line in rejects)
    return inspection


def _num_supervised(store: Store) -> int | None:
    """Supervised tokens, without the first token of each document, which is never predicted."""
    if LOSS_WEIGHTS not in store.columns:
        return None
    weights = (store.column(LOSS_WEIGHTS.name, document) for document in range(len(store)))
    return sum(int(np.count_nonzero(one[1:])) for one in weights)


def _inspect_source(source: Source, look: Look) -> Inspection:
    corpus = find_corpus(source, Data.model_fields["max_document_mib"].default, NoHashes())
    inspection, tally = Inspection(corpus.name, "bytes" if look.tokenizer is None else "tokens"), Tally()
    _describe(inspection, (_read if look.tokenizer is None else _encode)(corpus, look, inspection, tally))
    inspection.num_supervised = tally.supervised_tokens if look.tokenizer and tally.conversations else None
    inspection.num_reasoning = tally.reasoning_documents
    inspection.counts = tally.counts()
    inspection.rejected_by_reason = dict(tally.rejected_by_reason.most_common())
    inspection.documents = list(_first_records(corpus, look))
    return inspection


def _encode(corpus: Corpus, look: Look, inspection: Inspection, tally: Tally) -> Iterator[np.ndarray]:
    """Yield the lengths of each block's samples, encoded like in a build."""
    assert look.tokenizer is not None
    chat = chat_reading(corpus, look.tokenizer, look.conversations)
    for block in encode_blocks(corpus.blocks(), document_encoding(look.tokenizer), corpus.reading, chat, workers=1):
        tally.add(block.tally)
        inspection.note_rejects(block.rejects)
        yield block.lengths


def _read(corpus: Corpus, _look: Look, inspection: Inspection, tally: Tally) -> Iterator[np.ndarray]:
    """Yield the text lengths of each block; encoding with a chat template may reject more of these records."""
    for block in corpus.blocks():
        lengths = []
        for record in read_records(block.pieces, corpus.reading):
            content = record.content
            tally.add_record(content)
            if isinstance(content, Reject):
                inspection.note_rejects([content])
            else:
                lengths.append(sum(len(span.text.encode("utf-8", "surrogatepass")) for span in as_text(content)))
        yield np.array(lengths, dtype=np.int64)


def _first_records(corpus: Corpus, look: Look) -> Iterator[Shown]:
    """The first usable records: documents and conversations, or with a tokenizer the samples of conversations."""
    encoder = None
    if look.tokenizer is not None and corpus.has_conversations:
        encoder = ChatEncoder(look.tokenizer, **asdict(look.conversations))
    num_left = look.num_shown
    pieces = (piece for block in corpus.blocks() for piece in block.pieces)
    for record in read_records(pieces, corpus.reading) if num_left else ():
        where, content = f"{record.file}:{record.line}", record.content
        if isinstance(content, Reject):
            continue
        with suppress(RecordError):
            if encoder is None or look.tokenizer is None or isinstance(content, Document):
                yield Shown(where, as_text(content))
            else:
                yield from as_samples(where, content, encoder, look.tokenizer)
            num_left -= 1
        if not num_left:
            return


def _describe(inspection: Inspection, chunks: Iterator[np.ndarray]) -> None:
    """Set the counts and length statistics from chunks of lengths."""
    found = Lengths()
    for lengths in chunks:
        inspection.num_documents += len(lengths)
        found.add(lengths)
    inspection.size += found.total
    if found.counts:
        inspection.lengths = found.describe()
        powers: Counter[int] = Counter()
        for length, count in found.counts.items():
            powers[1 << max(0, length.bit_length() - 1)] += count
        inspection.histogram = sorted(powers.items())
