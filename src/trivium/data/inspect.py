"""What is in a store or in a source: first documents, lengths, shares, refused rows. Looks only, changes nothing.

Printing is `cli/data.py`'s business, which is the only one to import this file.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trivium.config import Data, Source
from trivium.data.corpus import Corpus, open_corpus
from trivium.data.publish import describe_lengths, round_lengths
from trivium.data.rows import Row, parse_piece
from trivium.data.store import CHUNK_ITEMS, Store

MAX_REJECTS_SHOWN = 5
Decode = Callable[[Sequence[int]], str]


@dataclass
class Inspection:
    """One store, or one source as it lies in its files."""

    name: str
    unit: str
    """What lengths count: `tokens` in a store, `bytes` of text in a source."""
    num_documents: int = 0
    size: int = 0
    """Sum of the lengths."""
    share: float = 0.0
    """Of the size of everything inspected together that counts in the same unit."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Smallest, quantiles, mean and largest."""
    histogram: list[tuple[int, int]] = field(default_factory=list)
    """(power of two, documents at least that long and less than twice as long)."""
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    rejects: list[str] = field(default_factory=list)
    """The first few refused rows: file, line, reason."""
    documents: list[str] = field(default_factory=list)
    """The first few documents: decoded tokens (ids without a tokenizer), or texts."""


def inspect_all(
    paths: Sequence[Path], field_name: str, documents: str, num_shown: int, decode: Decode | None
) -> list[Inspection]:
    """Look into stores (a folder or a prefix) and sources (a file or folder of text), and compare their sizes.

    Raises: ConfigError or BadData when one of them cannot be read.
    """
    found = []
    for path in paths:
        if (path / "tokens.idx").exists() or path.with_name(f"{path.name}.idx").exists():
            found.append(_inspect_store(path, num_shown, decode))
        else:
            source = Source.model_validate({"path": str(path), "field": field_name, "documents": documents})
            found.append(_inspect_source(source, num_shown))
    totals: Counter[str] = Counter()
    for one in found:
        totals[one.unit] += one.size
    for one in found:
        one.share = one.size / max(1, totals[one.unit])
    return found


def _inspect_store(path: Path, num_shown: int, decode: Decode | None) -> Inspection:
    store = Store(path)
    inspection = Inspection(str(path), "tokens")
    chunks = (store.lengths[first : first + CHUNK_ITEMS] for first in range(0, len(store), CHUNK_ITEMS))
    _describe(inspection, chunks)
    for document in range(min(num_shown, len(store))):
        ids = store.tokens(document).tolist()
        inspection.documents.append(decode(ids) if decode else " ".join(map(str, ids)))
    if (path / "report.json").exists():
        inspection.rejected_by_reason = json.loads((path / "report.json").read_text())["rejected_by_reason"]
        with (path / "rejects.jsonl").open() as rejects:
            for line in itertools.islice(rejects, MAX_REJECTS_SHOWN):
                inspection.rejects.append("{file}:{line}: {reason} {detail}".format(**json.loads(line)).rstrip())
    return inspection


def _inspect_source(source: Source, num_shown: int) -> Inspection:
    inspection = Inspection(str(source.path), "bytes")
    with tempfile.TemporaryDirectory() as hashes_dir:  # nothing is built, so nothing is remembered
        corpus = open_corpus(source, Data.model_fields["max_document_mib"].default, Path(hashes_dir))
    _describe(inspection, _read_rows(corpus, inspection, num_shown))
    return inspection


def _read_rows(corpus: Corpus, inspection: Inspection, num_shown: int) -> Iterator[np.ndarray]:
    """Yield the lengths of each block's documents, and note what else is to be shown of its rows."""
    rejected = inspection.rejected_by_reason
    for block in corpus.blocks():
        lengths = []
        for piece in block.pieces:
            for row in parse_piece(piece, corpus.reading.field, corpus.reading.max_row_bytes):
                if isinstance(row, Row):
                    lengths.append(len(row.utf8))
                    if len(inspection.documents) < num_shown:
                        inspection.documents.append(row.text)
                else:
                    rejected[row.reason.value] = rejected.get(row.reason.value, 0) + 1
                    if len(inspection.rejects) < MAX_REJECTS_SHOWN:
                        inspection.rejects.append(f"{piece.file}:{row.line}: {row.reason} {row.detail}".rstrip())
        yield np.array(lengths, dtype=np.int64)


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
