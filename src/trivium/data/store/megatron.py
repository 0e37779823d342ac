"""Token stores in Megatron's indexed dataset format, written in constant memory and read through a memory map.

`PREFIX.bin` holds the concatenated tokens of all documents; `PREFIX.idx` is the index, in little-endian numbers:
    9 bytes  "MMIDIDX\\0\\0"
    uint64   version, 1
    uint8    code of the token dtype
    uint64   number of sequences S
    uint64   number of document indices D (documents + 1)
    int32    [S] tokens of each sequence
    int64    [S] byte offset of each sequence
    int64    [D] first sequence of each document, then S
Attention does not cross the sequences of one document.

Trivium adds columns: `PREFIX.columns.json` declares them, and `PREFIX.NAME.col` holds the values of one, in the order
of the tokens or documents. Stores written by Megatron have none.

Source: megatron/core/datasets/indexed_dataset.py of https://github.com/NVIDIA/Megatron-LM
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trivium.data.columns import Column
from trivium.errors import BadData
from trivium.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]*")
COLUMN_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")
CHUNK_ITEMS = 1 << 20
FINGERPRINT_PROBES = 1024
FINGERPRINT_PROBE_BYTES = 4096


class StoreWriter:
    """Writes a store document by document, in constant memory.

    The index starts with the counts, so the lengths are kept in temporary files until `close` writes it.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, columns: Sequence[Column] = ()) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.columns = tuple(columns)
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self._open = ExitStack()
        self._bin = self._file(_file(prefix, ".bin"))
        self._lengths = self._file(_file(prefix, ".lengths"))
        self._counts = self._file(_file(prefix, ".counts"))
        self._columns = {column.name: self._file(_column_file(prefix, column.name)) for column in columns}
        self._data = {Path(file.name).name: file for file in (self._bin, *self._columns.values())}
        self._digests = {name: hashlib.sha256() for name in self._data}

    def _file(self, path: Path) -> BinaryIO:
        return self._open.enter_context(path.open("w+b"))

    def add(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        columns: Mapping[str, np.ndarray] | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: [sum(lengths)] of the store's dtype.
            lengths: [sequences] tokens of each sequence.
            columns: values of each declared column, [tokens] or [documents].
            counts: [documents] sequences of each document; None if each has one.
        """
        counts = np.ones(len(lengths), np.int32) if counts is None else counts
        assert tokens.dtype == self.dtype and int(lengths.sum()) == len(tokens) and int(counts.sum()) == len(lengths)
        self._write(self._bin, tokens)
        for column in self.columns:
            values = (columns or {})[column.name]
            assert values.dtype == column.dtype and len(values) == len(tokens if column.per == "token" else counts)
            self._write(self._columns[column.name], values)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._counts.write(counts.astype("<i4").tobytes())
        self.num_documents += len(counts)
        self.num_sequences += len(lengths)
        self.num_tokens += len(tokens)

    def _write(self, file: BinaryIO, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if len(values) else b""
        self._digests[Path(file.name).name].update(data)
        file.write(data)

    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of the .bin and column files so far, by file name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def close(self) -> None:
        """Write the index and flush all files to disk."""
        with _file(self.prefix, ".idx").open("wb") as index:
            (code,) = (code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
            index.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index)
            _write_starts(self._lengths, index, self.dtype.itemsize)
            total = _write_starts(self._counts, index, 1)
            index.write(total.to_bytes(8, "little"))
            _sync(index)
        if self.columns:
            declared = [column._asdict() for column in self.columns]
            atomic_write(_file(self.prefix, ".columns.json"), json.dumps(declared) + "\n")
        for file in self._data.values():
            _sync(file)
        self._open.close()
        for suffix in (".lengths", ".counts"):
            _file(self.prefix, suffix).unlink()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._bin.closed:
            self.close()
        self._open.close()


def _write_starts(sizes: BinaryIO, index: BinaryIO, scale: int) -> int:
    """Write the int64 start of each item, times `scale`, from a file of int32 sizes; return the sum of the sizes."""
    sizes.seek(0)
    start = 0
    while chunk := sizes.read(4 * CHUNK_ITEMS):
        ends = start + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64)
        index.write((np.concatenate([[start], ends[:-1]]) * scale).astype("<i8").tobytes())
        start = int(ends[-1])
    return start


class Store:
    """A token store on disk, memory-mapped: one of Trivium's or any Megatron indexed dataset."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`: a folder with tokens.bin and tokens.idx, or the common prefix of a .bin and an .idx.

        Raises: BadData when a file is missing, truncated or inconsistent.
        """
        self.prefix = _prefix_of(path)
        self._index_path, self.bin_path = _file(self.prefix, ".idx"), _file(self.prefix, ".bin")
        for file in (self._index_path, self.bin_path):
            if not file.is_file():
                raise BadData(
                    f"{file}: no such file. Expected a store's folder, or the common prefix of a .bin and an .idx file."
                )
        self._map_index()
        self.num_tokens = self._check_index()
        """Tokens of all documents."""
        self._tokens = np.memmap(self.bin_path, self.dtype, "r") if self.num_tokens else np.empty(0, self.dtype)
        self.lengths = self._document_lengths()
        """Tokens of each document, int [documents]."""
        self.columns = read_columns(self.prefix)
        """Columns stored next to the tokens."""
        self._columns = {column.name: self._map_column(column) for column in self.columns}

    def _map_column(self, column: Column) -> np.ndarray:
        path = _column_file(self.prefix, column.name)
        num_values = self.num_tokens if column.per == "token" else len(self)
        found = path.stat().st_size if path.is_file() else None
        if found != num_values * np.dtype(column.dtype).itemsize:
            raise BadData(
                f"{path} is missing or has the wrong size ({found or 0:,} bytes). Expected {num_values:,} values of "
                f"{column.dtype}, one per {column.per} of {self._index_path}; copy or build the store again."
            )
        return np.memmap(path, column.dtype, "r") if num_values else np.empty(0, column.dtype)

    def _map_index(self) -> None:
        """Check the header and memory-map the arrays after it."""
        with self._index_path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._broken(f"is truncated or does not start with Megatron's {MAGIC!r} (found {header[:9]!r})")
        _, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if version != VERSION or code not in DTYPE_CODES:
            raise self._broken(
                f"has version {version} and token dtype {code}; expected version {VERSION} and an integer dtype"
            )
        self.dtype = np.dtype(DTYPE_CODES[code])
        expected, found = HEADER.size + 12 * num_sequences + 8 * num_borders, self._index_path.stat().st_size
        if found != expected:
            raise self._broken(f"has {found:,} bytes; its header implies {expected:,}")
        if num_borders == 0:
            raise self._broken("has no document borders")
        index = self._index = np.memmap(self._index_path, np.uint8, "r")
        pointers_at = HEADER.size + 4 * num_sequences
        borders_at = pointers_at + 8 * num_sequences
        self._sequence_lengths = index[HEADER.size : pointers_at].view("<i4")
        self._pointers = index[pointers_at:borders_at].view("<i8")
        self._borders = index[borders_at:].view("<i8")

    def _check_index(self) -> int:
        """Count the tokens, and check that sequences fill the .bin without gaps and that borders rise from 0 to S."""
        end, num_sequences = 0, len(self._sequence_lengths)
        for first in range(0, num_sequences, CHUNK_ITEMS):
            lengths = self._sequence_lengths[first : first + CHUNK_ITEMS].astype(np.int64)
            starts = end + np.concatenate([[0], np.cumsum(lengths)])
            if (lengths < 0).any() or (
                starts[:-1] * self.dtype.itemsize != self._pointers[first : first + CHUNK_ITEMS]
            ).any():
                raise self._broken("has gaps or overlaps between its sequences")
            end = int(starts[-1])
        borders = self._borders
        rising = all(
            (np.diff(borders[first : first + CHUNK_ITEMS + 1]) >= 0).all()
            for first in range(0, len(borders), CHUNK_ITEMS)
        )
        if borders[0] != 0 or borders[-1] != num_sequences or not rising:
            raise self._broken(f"has document borders that do not rise from 0 to {num_sequences:,} (its sequences)")
        expected, found = end * self.dtype.itemsize, self.bin_path.stat().st_size
        if found != expected:
            raise BadData(
                f"{self.bin_path} has {found:,} bytes, but its .idx implies {expected:,}. Expected the same size; "
                "copy or build the store again."
            )
        return end

    def _document_lengths(self) -> np.ndarray:
        num_documents = len(self._borders) - 1
        if len(self._sequence_lengths) == num_documents and (np.diff(self._borders) == 1).all():
            return self._sequence_lengths  # one sequence per document, so no copy is needed
        ends = np.concatenate([[0], np.cumsum(self._sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self._borders])

    def _broken(self, found: str) -> BadData:
        return BadData(
            f"{self._index_path} {found}. Expected a complete Megatron index; copy or build the store again."
        )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._borders) - 1

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document in the store's dtype, not copied; `stop` defaults to its end.

        Raises: IndexError when the document or the range does not exist.
        """
        first, last = self._range(document, start, stop)
        return self._tokens[first:last]

    def _range(self, document: int, start: int, stop: int | None) -> tuple[int, int]:
        """Position of tokens [start, stop) of a document in the whole store."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start} to {stop} of document {document}, which has {length}")
        sequence = int(self._borders[document])
        first = int(self._pointers[sequence]) // self.dtype.itemsize if length else 0
        return first + start, first + stop

    def column(self, name: str, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values for tokens [start, stop) of a document, not copied; for a per-document column its one value, [1].

        Raises: KeyError when the store has no such column, IndexError when the document or the range does not exist.
        """
        values, (column,) = self._columns[name], (column for column in self.columns if column.name == name)
        first, last = self._range(document, start, stop)
        return values[first:last] if column.per == "token" else values[document : document + 1]

    def values(self, name: str) -> np.ndarray:
        """All values of a column, [num_tokens] or [documents], memory-mapped."""
        return self._columns[name]

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        """Positions inside (start, stop) at which another sequence of the document begins."""
        first, last = int(self._borders[document]), int(self._borders[document + 1])
        if last - first <= 1:
            return []
        ends = np.cumsum(self._sequence_lengths[first:last], dtype=np.int64)[:-1]
        return np.unique(ends[(ends > start) & (ends < stop)]).tolist()

    def found_among(self, ids: Sequence[int]) -> list[int]:
        """Which of the ids occur in the store; reads all of its tokens in constant memory."""
        wanted, found = np.asarray(ids), set[int]()
        for first in range(0, self.num_tokens, CHUNK_ITEMS):
            chunk = self._tokens[first : first + CHUNK_ITEMS]
            found.update(np.unique(chunk[np.isin(chunk, wanted)]).tolist())
        return sorted(found)

    def largest_token(self) -> int:
        """The largest id in the store, -1 if it is empty; reads all of its tokens in constant memory."""
        chunks = range(0, self.num_tokens, CHUNK_ITEMS)
        return max((int(self._tokens[first : first + CHUNK_ITEMS].max()) for first in chunks), default=-1)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the index and of 1,024 evenly spaced pages of the tokens and each column.

        Fast at any size, but it does not cover every token; the manifest's hashes do.
        """
        digest = hashlib.sha256(self._index.data)
        _probe(self.bin_path, digest)
        for column in self.columns:
            digest.update(repr(tuple(column)).encode())
            _probe(_column_file(self.prefix, column.name), digest)
        return digest.hexdigest()


def _probe(path: Path, digest: "hashlib._Hash") -> None:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        for probe in range(FINGERPRINT_PROBES):
            file.seek(max(0, num_bytes - FINGERPRINT_PROBE_BYTES) * probe // (FINGERPRINT_PROBES - 1))
            digest.update(file.read(FINGERPRINT_PROBE_BYTES))


class Selection:
    """A subset of a store's documents, read like a `Store`; the mixture treats it as a source.

    `documents`: int, the chosen document numbers, in order.
    """

    def __init__(self, store: Store, documents: np.ndarray) -> None:
        self.store = store
        self.documents = documents
        self.lengths = np.asarray(store.lengths)[documents]
        self.columns = store.columns

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """See `Store.tokens`."""
        return self.store.tokens(int(self.documents[document]), start, stop)

    def column(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        """See `Store.column`."""
        return self.store.column(name, int(self.documents[document]), start, stop)

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        """See `Store.sequence_starts`."""
        return self.store.sequence_starts(int(self.documents[document]), start, stop)


def read_columns(path: Path) -> tuple[Column, ...]:
    """Read the column declarations of the store at `path` without opening it.

    Raises: BadData when they are invalid.
    """
    declaration = _file(_prefix_of(path), ".columns.json")
    if not declaration.is_file():
        return ()
    try:
        columns = tuple(Column(**one) for one in json.loads(declaration.read_bytes()))
    except (ValueError, TypeError):
        columns = ()
    names = {column.name for column in columns if column.dtype in COLUMN_DTYPES and column.per in ("token", "document")}
    if not columns or len(names) != len(columns) or not all(COLUMN_NAME.fullmatch(name) for name in names):
        raise BadData(
            f"{declaration} is invalid. Expected a list of columns with different names, each with a dtype of "
            f"{', '.join(COLUMN_DTYPES)} and per: token or document; copy or build the store again."
        )
    return columns


def _column_file(prefix: Path, name: str) -> Path:
    return _file(prefix, f".{name}.col")


def _prefix_of(path: Path) -> Path:
    return path / "tokens" if path.is_dir() else path


def _file(prefix: Path, suffix: str) -> Path:
    """Append a suffix; unlike `with_suffix`, a dot in the prefix stays part of its name."""
    return prefix.with_name(prefix.name + suffix)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
