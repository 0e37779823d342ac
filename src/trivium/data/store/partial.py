"""Partial stores: append-only files of an unfinished build, and a journal of how much of them is complete.

Samples are appended to `documents.bin` (tokens), `lengths.bin` (int32), `hashes.bin` (128 bits each) and one file per
column, rejects to `rejects.jsonl`. After a kill, the next build truncates the files to the last journal entry and
continues from there. `publish.py` turns the finished files into a store and separates the held-out documents, which
needs the smallest and the largest of all hashes.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from trivium.data.columns import Column
from trivium.data.source.blocks import Position
from trivium.data.store.encode import HASH_BYTES, EncodedBlock
from trivium.data.store.tally import Tally
from trivium.files import atomic_write

DOCUMENTS, LENGTHS, HASHES, REJECTS = "documents.bin", "lengths.bin", "hashes.bin", "rejects.jsonl"
JOURNAL = "journal.json"
JOURNAL_EVERY_BLOCKS = 32
GROUP_DOCUMENTS = 1 << 16
GROUP_TOKENS = 1 << 22


class SampleGroup(NamedTuple):
    """Consecutive samples of a partial store."""

    tokens: np.ndarray
    """[sum(lengths)]."""
    lengths: np.ndarray
    """[samples] int32."""
    hashes: np.ndarray
    """[samples, 2] big-endian uint64, the high half first."""
    columns: dict[str, np.ndarray]
    """Values of each column, [sum(lengths)] or [samples]."""


class Partial:
    """The files of one unfinished store. The caller holds a lock, so only one process writes them."""

    def __init__(self, folder: Path, dtype: np.dtype, columns: Sequence[Column]) -> None:
        """Open or create the folder, and truncate its files to the sizes in the journal."""
        self.folder = folder
        self.dtype = dtype
        self.columns = tuple(columns)
        self.position = Position()
        self.tally = Tally()
        self._blocks_since_journal = 0
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict.fromkeys((DOCUMENTS, LENGTHS, HASHES, REJECTS, *map(_column_file, self.columns)), 0)
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
        """Append a block; commits every 32 blocks."""
        self._files[DOCUMENTS].write(np.ascontiguousarray(block.tokens).data)
        self._files[LENGTHS].write(block.lengths.astype("<i4").data)
        self._files[HASHES].write(block.hashes)
        for column in self.columns:
            self._files[_column_file(column)].write(block.columns[column.name].data)
        for reject in block.rejects:
            self._files[REJECTS].write(json.dumps(reject._asdict()).encode() + b"\n")
        self.tally.add(block.tally)
        self.position = block.after
        self._blocks_since_journal += 1
        if self._blocks_since_journal == JOURNAL_EVERY_BLOCKS:
            self.commit()

    def commit(self) -> None:
        """Flush all files to disk, then record their sizes in the journal."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        journal = {"position": self.position, "tally": vars(self.tally), "sizes": sizes}
        atomic_write(self.folder / JOURNAL, json.dumps(journal))
        self._blocks_since_journal = 0

    def groups(self) -> Iterator[SampleGroup]:
        """Yield all samples, at most about 4M tokens or one longer document at a time."""
        with ExitStack() as stack:
            files = {name: stack.enter_context((self.folder / name).open("rb")) for name in self._files}

            def read(name: str, dtype: np.dtype | str, count: int) -> np.ndarray:
                return np.frombuffer(files[name].read(count * np.dtype(dtype).itemsize), dtype)

            while len(lengths := read(LENGTHS, "<i4", GROUP_DOCUMENTS)):
                for start, stop in _groups(lengths):
                    num_tokens = int(lengths[start:stop].sum(dtype=np.int64))
                    num_samples = stop - start
                    sizes = {"token": num_tokens, "document": num_samples}
                    yield SampleGroup(
                        read(DOCUMENTS, self.dtype, num_tokens),
                        lengths[start:stop],
                        read(HASHES, ">u8", num_samples * HASH_BYTES // 8).reshape(-1, 2),
                        {one.name: read(_column_file(one), one.dtype, sizes[one.per]) for one in self.columns},
                    )

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _column_file(column: Column) -> str:
    return f"{column.name}.col"


def _open_at(path: Path, size: int) -> BinaryIO:
    """Truncate to `size` bytes and open for appending."""
    path.touch()
    assert path.stat().st_size >= size, f"{path} is shorter than its journal says"
    os.truncate(path, size)
    return path.open("ab")


def _groups(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents with at most `GROUP_TOKENS` together, or one longer document."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + GROUP_TOKENS, side="right")))
        yield start, stop
        start = stop
