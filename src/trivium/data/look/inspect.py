"""What is in a store or in a source: first documents, lengths, shares, refused rows. Looks only, changes nothing.

A source is encoded as a build would encode it when a tokenizer is given, and else shown as it reads. Printing is
`cli/data.py`'s business, which is the only one to import this file.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trivium.config.run import Data, Source
from trivium.data.chat.formats import Conversation, Document, content_of
from trivium.data.chat.samples import ChatEncoder
from trivium.data.look.show import Shown, as_samples, as_spans, as_text
from trivium.data.source.corpus import Corpus, NoHashes, find_corpus
from trivium.data.source.records import Piece, Reject, Row, RowError, parse_piece
from trivium.data.store.build import ConversationSettings, chat_reading
from trivium.data.store.encode import RejectedRow, Tally, encode_blocks
from trivium.data.store.megatron import CHUNK_ITEMS, Store
from trivium.data.store.publish import REASONING_FILE, describe_lengths, round_lengths
from trivium.data.tokenizer import document_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_REJECTS_OF_A_REASON = 3
COUNTS = {
    "rows": "num_rows",
    "kept": "num_kept",
    "split": "num_split_rows",
    "rejected": "num_rejected",
    "conversations": "num_conversations",
    "dropped_turns": "num_dropped_turns",
    "cut_turns": "num_cut_turns",
    "lost_reasoning_turns": "num_lost_reasoning_turns",
    "control_token_rows": "num_control_rows",
}
"""Names in a store's report.json -> names in a tally."""


@dataclass(frozen=True)
class Look:
    """How to look at a source."""

    tokenizer: "PreTrainedTokenizerFast | None"
    """Without one, rows are shown as they read."""
    conversations: ConversationSettings
    num_shown: int
    """Rows to show."""


@dataclass
class Inspection:
    """One store, or one source as it lies in its files."""

    name: str
    unit: str
    """What lengths count: `tokens`, or `bytes` of text in a source without a tokenizer."""
    num_documents: int = 0
    """Documents, and samples of conversations."""
    size: int = 0
    """Sum of the lengths."""
    share: float = 0.0
    """Of the size of everything inspected together that counts in the same unit."""
    num_supervised: int | None = None
    """Tokens that carry loss; None where all of them do, and where bytes are counted."""
    num_reasoning: int = 0
    """Documents with a reasoned answer."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Smallest, quantiles, mean and largest."""
    histogram: list[tuple[int, int]] = field(default_factory=list)
    """(power of two, documents at least that long and less than twice as long)."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of the rows and their turns, see `COUNTS`; empty for a store without a report."""
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    rejects: dict[str, list[str]] = field(default_factory=dict)
    """The first few refused rows of each reason: file, line, reason."""
    documents: list[Shown] = field(default_factory=list)
    """The first few documents or conversations."""

    def note_rejects(self, rows: Iterable[RejectedRow]) -> None:
        """Keep the first few of each reason."""
        for row in rows:
            shown = self.rejects.setdefault(row.reason, [])
            if len(shown) < MAX_REJECTS_OF_A_REASON:
                shown.append(f"{row.file}:{row.line}: {row.reason} {row.detail}".rstrip())


def inspect_all(sources: Sequence[Source], look: Look) -> list[Inspection]:
    """Look into sources, of which a path may be a store (a folder or a prefix), and compare their sizes.

    Raises: ConfigError or BadData when one of them cannot be read, or a template gives answers no right labels.
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
        spans = as_spans(ids, store.weights(document), look.tokenizer)
        inspection.documents.append(Shown(f"document {document}", spans, len(ids)))
    if (path / REASONING_FILE).exists():
        inspection.num_reasoning = int(np.load(path / REASONING_FILE, allow_pickle=False).sum())
    if (path / "report.json").exists():
        report = json.loads((path / "report.json").read_text())
        inspection.counts = {name: report[name] for name in COUNTS if name in report}
        inspection.rejected_by_reason = report["rejected_by_reason"]
        with (path / "rejects.jsonl").open() as rejects:
            inspection.note_rejects(RejectedRow(**json.loads(line)) for line in rejects)
    return inspection


def _num_supervised(store: Store) -> int | None:
    """Tokens that carry loss; nothing predicts a document's first one."""
    if store.mask is None:
        return None
    return sum(int(np.count_nonzero(store.mask.tokens(document)[1:])) for document in range(len(store)))


def _inspect_source(source: Source, look: Look) -> Inspection:
    corpus = find_corpus(source, Data.model_fields["max_document_mib"].default, NoHashes())
    inspection, tally = Inspection(corpus.name, "bytes" if look.tokenizer is None else "tokens"), Tally()
    _describe(inspection, (_read if look.tokenizer is None else _encode)(corpus, look, inspection, tally))
    inspection.num_supervised = tally.num_supervised_tokens if look.tokenizer and tally.num_conversations else None
    inspection.num_reasoning = tally.num_reasoning_documents
    inspection.counts = {name: getattr(tally, attribute) for name, attribute in COUNTS.items()}
    inspection.rejected_by_reason = dict(tally.rejected.most_common())
    inspection.documents = list(_first_rows(corpus, look))
    return inspection


def _encode(corpus: Corpus, look: Look, inspection: Inspection, tally: Tally) -> Iterator[np.ndarray]:
    """Yield the lengths of each block's samples, all as a build would make them."""
    assert look.tokenizer is not None
    chat = chat_reading(corpus, look.tokenizer, look.conversations)
    for block in encode_blocks(corpus.blocks(), document_encoding(look.tokenizer), corpus.reading, chat, workers=1):
        tally.add(block.tally)
        inspection.note_rejects(block.rejected)
        yield block.lengths


def _read(corpus: Corpus, _look: Look, inspection: Inspection, tally: Tally) -> Iterator[np.ndarray]:
    """Yield the lengths of each block's texts; of these rows a tokenizer and its template may refuse some more."""
    for block in corpus.blocks():
        lengths = []
        for piece, row in _rows(block.pieces, corpus):
            try:
                content = content_of(row, piece.layout)
            except RowError as error:
                tally.rejected[error.reason.value] += 1
                inspection.note_rejects([RejectedRow(piece.file, row.line, error.reason.value, error.detail)])
                continue
            tally.num_documents += 1
            if isinstance(content, Conversation):
                tally.num_conversations += 1
                tally.num_reasoning_documents += any(turn.weight and turn.thinks for turn in content.turns)
            lengths.append(sum(len(span.text.encode("utf-8", "surrogatepass")) for span in as_text(content)))
        yield np.array(lengths, dtype=np.int64)


def _first_rows(corpus: Corpus, look: Look) -> Iterator[Shown]:
    """The first usable rows: a document, the turns of a conversation, or with a tokenizer its samples."""
    encoder = None
    if look.tokenizer is not None and corpus.has_conversations:
        encoder = ChatEncoder(look.tokenizer, **asdict(look.conversations))
    num_left = look.num_shown
    for piece, row in _rows(itertools.chain.from_iterable(block.pieces for block in corpus.blocks()), corpus):
        if not num_left:
            return
        where = f"{piece.file}:{row.line}"
        with suppress(RowError):
            content = content_of(row, piece.layout)
            if encoder is None or look.tokenizer is None or isinstance(content, Document):
                yield Shown(where, as_text(content))
            else:
                yield from as_samples(where, content, encoder, look.tokenizer)
            num_left -= 1


def _rows(pieces: Iterable[Piece], corpus: Corpus) -> Iterator[tuple[Piece, Row | Reject]]:
    for piece in pieces:
        for row in parse_piece(piece, corpus.reading.field, corpus.reading.max_row_bytes):
            yield piece, row


def _describe(inspection: Inspection, chunks: Iterator[np.ndarray]) -> None:
    """Count documents and lengths, a chunk of lengths at a time."""
    counts: Counter[int] = Counter()
    for lengths in chunks:
        inspection.num_documents += len(lengths)
        inspection.size += int(lengths.sum(dtype=np.int64))
        counts.update(round_lengths(lengths).tolist())
    if counts:
        inspection.lengths = describe_lengths(counts)
        powers: Counter[int] = Counter()
        for length, count in counts.items():
            powers[1 << max(0, length.bit_length() - 1)] += count
        inspection.histogram = sorted(powers.items())
