"""A store under construction: files that only grow, and a journal that says how far they can be trusted.

All samples go, in order, to `documents.bin` (tokens), `weights.bin` (a byte a token), `lengths.bin` (int32 each),
`hashes.bin` (128 bits each) and `reasoning.bin` (a byte each), refused rows to `rejects.jsonl`. A kill at any instant
loses what came after the last journal entry: the next build cuts the files back to it and goes on. What becomes of them
at the end is `publish.py`'s business, the only other file beside `build.py` that imports this one.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from trivium.data.source.blocks import Position
from trivium.data.store.encode import HASH_BYTES, EncodedBlock, Tally
from trivium.files import atomic_write

DOCUMENTS, WEIGHTS, LENGTHS, HASHES = "documents.bin", "weights.bin", "lengths.bin", "hashes.bin"
REASONING, REJECTS = "reasoning.bin", "rejects.jsonl"
JOURNAL = "journal.json"
JOURNAL_EVERY_BLOCKS = 32
GROUP_DOCUMENTS = 1 << 16
GROUP_TOKENS = 1 << 22


class Group(NamedTuple):
    """Some of a partial store's samples, read back."""

    tokens: np.ndarray
    """[sum(lengths)]."""
    weights: np.ndarray | None
    """[sum(lengths)] uint8, hundredths; None where every token counts alike."""
    lengths: np.ndarray
    """[samples] int32."""
    hashes: np.ndarray
    """[samples, 2] big-endian uint64, the high one first."""
    reasoning: np.ndarray
    """[samples] uint8."""


class Partial:
    """The growing files of one unfinished store; one process at a time, which the build's lock sees to."""

    def __init__(self, folder: Path, dtype: np.dtype, has_weights: bool) -> None:
        """Open or begin the folder, and cut its files back to what the journal vouches for.

        Without `has_weights` every token counts alike, and no weights are kept.
        """
        self.folder = folder
        self.dtype = dtype
        self.has_weights = has_weights
        self.position = Position()
        self.tally = Tally()
        self._blocks_since_journal = 0
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict.fromkeys((DOCUMENTS, WEIGHTS, LENGTHS, HASHES, REASONING, REJECTS), 0)
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
        if self.has_weights:
            self._files[WEIGHTS].write(block.weights.data)
        self._files[LENGTHS].write(block.lengths.astype("<i4").data)
        self._files[HASHES].write(block.hashes)
        self._files[REASONING].write(block.reasoning.data)
        for row in block.rejected:
            self._files[REJECTS].write(json.dumps(row._asdict()).encode() + b"\n")
        self.tally.add(block.tally)
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

    def groups(self) -> Iterator[Group]:
        """Read back all samples; at most about 4M tokens, or one longer document, at a time."""
        with ExitStack() as stack:
            tokens, weights, lengths_file, hashes_file, reasoning_file = (
                stack.enter_context((self.folder / name).open("rb"))
                for name in (DOCUMENTS, WEIGHTS, LENGTHS, HASHES, REASONING)
            )
            while chunk := lengths_file.read(4 * GROUP_DOCUMENTS):
                lengths = np.frombuffer(chunk, "<i4")
                hashes = np.frombuffer(hashes_file.read(HASH_BYTES * len(lengths)), ">u8").reshape(-1, 2)
                reasoning = np.frombuffer(reasoning_file.read(len(lengths)), np.uint8)
                for start, stop in _groups(lengths):
                    num_tokens = int(lengths[start:stop].sum(dtype=np.int64))
                    yield Group(
                        np.frombuffer(tokens.read(num_tokens * self.dtype.itemsize), self.dtype),
                        np.frombuffer(weights.read(num_tokens), np.uint8) if self.has_weights else None,
                        lengths[start:stop],
                        hashes[start:stop],
                        reasoning[start:stop],
                    )

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
