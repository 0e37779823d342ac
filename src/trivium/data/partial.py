"""A store under construction: files that only grow, and a journal that says how far they can be trusted.

All documents go, in order, to `documents.bin` (tokens), `lengths.bin` (int32 each) and `hashes.bin` (128 bits each),
refused rows to `rejects.jsonl`. A kill at any instant loses what came after the last journal entry: the next build
cuts the files back to it and goes on. What becomes of them at the end is `publish.py`'s business, the only other
file beside `build.py` that imports this one.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from trivium.data.blocks import Position
from trivium.data.encode import HASH_BYTES, EncodedBlock
from trivium.files import atomic_write

DOCUMENTS, LENGTHS, HASHES, REJECTS = "documents.bin", "lengths.bin", "hashes.bin", "rejects.jsonl"
JOURNAL = "journal.json"
JOURNAL_EVERY_BLOCKS = 32
GROUP_DOCUMENTS = 1 << 16
GROUP_TOKENS = 1 << 22


@dataclass
class Tally:
    """What has been read so far."""

    num_documents: int = 0
    num_tokens: int = 0
    num_text_bytes: int = 0
    num_control_rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rejected = Counter(self.rejected)  # a plain dict when read back from JSON

    @property
    def num_rejected(self) -> int:
        """Rows that became no document."""
        return self.rejected.total()

    @property
    def num_rows(self) -> int:
        """All rows: documents and refused ones."""
        return self.num_documents + self.num_rejected

    @property
    def reject_share(self) -> float:
        """Refused rows among all rows; 0 when there are none."""
        return self.num_rejected / self.num_rows if self.num_rows else 0.0


class Partial:
    """The growing files of one unfinished store; one process at a time, which the build's lock sees to."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        """Open or begin the folder, and cut its files back to what the journal vouches for."""
        self.folder = folder
        self.dtype = dtype
        self.position = Position()
        self.tally = Tally()
        self._blocks_since_journal = 0
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict.fromkeys((DOCUMENTS, LENGTHS, HASHES, REJECTS), 0)
        if (folder / JOURNAL).exists():
            journal = json.loads((folder / JOURNAL).read_text())
            self.position = Position(*journal["position"])
            self.tally = Tally(**journal["tally"])
            sizes = journal["sizes"]
        self._files = {name: _open_at(folder / name, size) for name, size in sizes.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.tell() for file in self._files.values())

    def append(self, block: EncodedBlock) -> None:
        """Add a block; every so often, make all so far durable."""
        self._files[DOCUMENTS].write(np.ascontiguousarray(block.tokens).data)
        self._files[LENGTHS].write(block.lengths.astype("<i4").data)
        self._files[HASHES].write(block.hashes)
        for row in block.rejected:
            self._files[REJECTS].write(json.dumps(row._asdict()).encode() + b"\n")
        self.tally.num_documents += len(block.lengths)
        self.tally.num_tokens += len(block.tokens)
        self.tally.num_text_bytes += block.num_text_bytes
        self.tally.num_control_rows += block.num_control_rows
        self.tally.rejected.update(row.reason for row in block.rejected)
        self.position = block.after
        self._blocks_since_journal += 1
        if self._blocks_since_journal == JOURNAL_EVERY_BLOCKS:
            self.commit()

    def commit(self) -> None:
        """Make everything so far durable, then say so in the journal."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        journal = {"position": self.position, "tally": vars(self.tally), "sizes": sizes}
        atomic_write(self.folder / JOURNAL, json.dumps(journal))
        self._blocks_since_journal = 0

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Read back all documents in groups: tokens [sum(lengths)], lengths [documents], hashes [documents, 2].

        A hash is two big-endian uint64, the high one first. At most about 4M tokens, or one longer document, at a time.
        """
        with (
            (self.folder / DOCUMENTS).open("rb") as tokens,
            (self.folder / LENGTHS).open("rb") as lengths_file,
            (self.folder / HASHES).open("rb") as hashes_file,
        ):
            while chunk := lengths_file.read(4 * GROUP_DOCUMENTS):
                lengths = np.frombuffer(chunk, "<i4")
                hashes = np.frombuffer(hashes_file.read(HASH_BYTES * len(lengths)), ">u8").reshape(-1, 2)
                for start, stop in _groups(lengths):
                    num_bytes = int(lengths[start:stop].sum(dtype=np.int64)) * self.dtype.itemsize
                    yield np.frombuffer(tokens.read(num_bytes), self.dtype), lengths[start:stop], hashes[start:stop]

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first `size` bytes; what lies beyond them is cut off."""
    path.touch()
    assert path.stat().st_size >= size, f"{path} is shorter than its journal says"
    os.truncate(path, size)
    return path.open("ab")


def _groups(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents that hold at most `GROUP_TOKENS` together, or one longer document."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + GROUP_TOKENS, side="right")))
        yield start, stop
        start = stop
