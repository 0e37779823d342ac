"""Token stores: Megatron's indexed format, written in constant memory and read through a memory map.

`PREFIX.bin` holds the tokens of all documents end to end; `PREFIX.idx` says where each begins:
    9 bytes  "MMIDIDX\\0\\0"
    uint64   version, 1
    uint8    code of the token type
    uint64   number of sequences S
    uint64   number of document indices D (documents + 1)
    int32    [S] tokens of each sequence
    int64    [S] byte at which each begins
    int64    [D] sequence at which each document begins, S last
Numbers are little-endian. Trivium writes one sequence a document and reads any number.

Where not every token carries the same loss, a second pair `PREFIX_mask` of the same lengths holds the loss weight of
each token as a label, uint8 in hundredths: 0 carries none, 100 is the plain one.

Does not know what a token means. Everybody above `data` may import this file.
Source: megatron/core/datasets/indexed_dataset.py of https://github.com/NVIDIA/Megatron-LM
"""

import hashlib
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from trivium.errors import BadData

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK_ITEMS = 1 << 20
FINGERPRINT_PROBES = 1024
FINGERPRINT_PROBE_BYTES = 4096


class StoreWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, document by document; memory does not grow with the store.

    Lengths wait in `PREFIX.lengths` until `close` turns them into the index, since that begins with their number.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self._digest = hashlib.sha256()
        self._bin: BinaryIO = _file(prefix, ".bin").open("wb")
        self._lengths: BinaryIO = _file(prefix, ".lengths").open("w+b")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` [sum(lengths)] end to end, of the store's dtype, and `lengths` [documents]."""
        assert tokens.dtype == self.dtype and int(lengths.sum()) == len(tokens)
        data = np.ascontiguousarray(tokens).data.cast("B") if len(tokens) else b""
        self._digest.update(data)
        self._bin.write(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the .bin so far, taken of the bytes on their way out."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Write the index and make both files durable."""
        self._lengths.flush()
        with _file(self.prefix, ".idx").open("wb") as index:
            (code,) = (code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
            index.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index)
            self._write_pointers(index)
            for first in range(0, self.num_documents + 1, CHUNK_ITEMS):
                last = min(first + CHUNK_ITEMS, self.num_documents + 1)
                index.write(np.arange(first, last, dtype="<i8").tobytes())
            _sync(index)
        _sync(self._bin)
        self._bin.close()
        self._lengths.close()
        _file(self.prefix, ".lengths").unlink()

    def _write_pointers(self, index: BinaryIO) -> None:
        self._lengths.seek(0)
        start = 0
        while chunk := self._lengths.read(4 * CHUNK_ITEMS):
            ends = start + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64)
            index.write((np.concatenate([[start], ends[:-1]]) * self.dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1])

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._bin.closed:
            self.close()
        self._bin.close()
        self._lengths.close()


class Store:
    """A store on disk, checked once and then read through the page cache: Trivium's own or any Megatron prefix."""

    def __init__(self, path: Path) -> None:
        """Open `path`: a folder with tokens.bin and tokens.idx, or the common prefix of a .bin and an .idx.

        Raises: BadData when a file is missing, cut short, or says what cannot be.
        """
        self.prefix = _prefix_of(path)
        self._index_path, self._bin_path = _file(self.prefix, ".idx"), _file(self.prefix, ".bin")
        for file in (self._index_path, self._bin_path):
            if not file.is_file():
                raise BadData(
                    f"{file}: no such file. Expected a store's folder, or the common prefix of a .bin and an .idx."
                )
        num_sequences, num_borders = self._read_header()
        self._map_index(num_sequences, num_borders)
        self.num_tokens = self._check_index()
        """Tokens of all documents."""
        self._tokens = np.memmap(self._bin_path, self.dtype, "r") if self.num_tokens else np.empty(0, self.dtype)
        self.lengths = self._document_lengths()
        """Tokens of each document, int [documents]."""
        self.mask = self._open_mask()
        """The loss weights as a store of their own; None where every token counts alike."""

    def _open_mask(self) -> "Store | None":
        if not has_mask(self.prefix):
            return None
        prefix = mask_prefix(self.prefix)
        mask = Store(prefix)
        if mask.dtype != np.uint8 or not np.array_equal(mask.lengths, self.lengths):
            raise BadData(
                f"{prefix}.idx: does not hold one byte for each token of {self._index_path}. The two do not belong "
                "together; copy or build the store again."
            )
        return mask

    def _read_header(self) -> tuple[int, int]:
        with self._index_path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._broken(f"begins with {header[:9]!r} and not with Megatron's {MAGIC!r}, or is cut short")
        _, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if version != VERSION or code not in DTYPE_CODES:
            raise self._broken(
                f"has version {version} and token type {code}; expected version {VERSION} and whole-number tokens"
            )
        self.dtype = np.dtype(DTYPE_CODES[code])
        expected, found = HEADER.size + 12 * num_sequences + 8 * num_borders, self._index_path.stat().st_size
        if found != expected:
            raise self._broken(f"has {found:,} bytes; its header promises {expected:,}")
        if num_borders == 0:
            raise self._broken("has no document borders")
        return num_sequences, num_borders

    def _map_index(self, num_sequences: int, num_borders: int) -> None:
        index = self._index = np.memmap(self._index_path, np.uint8, "r")
        pointers_at = HEADER.size + 4 * num_sequences
        borders_at = pointers_at + 8 * num_sequences
        self._sequence_lengths = index[HEADER.size : pointers_at].view("<i4")
        self._pointers = index[pointers_at:borders_at].view("<i8")
        self._borders = index[borders_at:].view("<i8")

    def _check_index(self) -> int:
        """Count the tokens. Sequences must lie end to end from byte 0 to the end of the .bin, borders rise to S."""
        end, num_sequences = 0, len(self._sequence_lengths)
        for first in range(0, num_sequences, CHUNK_ITEMS):
            lengths = self._sequence_lengths[first : first + CHUNK_ITEMS].astype(np.int64)
            starts = end + np.concatenate([[0], np.cumsum(lengths)])
            if (lengths < 0).any() or (
                starts[:-1] * self.dtype.itemsize != self._pointers[first : first + CHUNK_ITEMS]
            ).any():
                raise self._broken("does not lay its sequences end to end")
            end = int(starts[-1])
        borders = self._borders
        rising = all(
            (np.diff(borders[first : first + CHUNK_ITEMS + 1]) >= 0).all()
            for first in range(0, len(borders), CHUNK_ITEMS)
        )
        if borders[0] != 0 or borders[-1] != num_sequences or not rising:
            raise self._broken(f"has document borders that do not rise from 0 to its {num_sequences:,} sequences")
        expected, found = end * self.dtype.itemsize, self._bin_path.stat().st_size
        if found != expected:
            raise BadData(
                f"{self._bin_path}: has {found:,} bytes and its .idx promises {expected:,}. The two do not belong "
                "together, or a copy was cut short; copy or build the store again."
            )
        return end

    def _document_lengths(self) -> np.ndarray:
        num_documents = len(self._borders) - 1
        if len(self._sequence_lengths) == num_documents and (np.diff(self._borders) == 1).all():
            return self._sequence_lengths  # one sequence a document, as Trivium writes: nothing to add up
        ends = np.concatenate([[0], np.cumsum(self._sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self._borders])

    def _broken(self, found: str) -> BadData:
        return BadData(f"{self._index_path}: {found}. Expected a whole Megatron index; copy or build the store again.")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._borders) - 1

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, of the store's dtype and without a copy; no `stop` means its end.

        Raises: IndexError when the document or the range does not exist.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start} to {stop} of document {document}, which has {length}")
        sequence = int(self._borders[document])
        first = int(self._pointers[sequence]) // self.dtype.itemsize if length else 0
        return self._tokens[first + start : first + stop]

    def weights(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Loss weights, uint8 in hundredths, of tokens [start, stop) as labels; None where every token counts alike."""
        return None if self.mask is None else self.mask.tokens(document, start, stop)

    def found_among(self, ids: Sequence[int]) -> list[int]:
        """Which of the ids occur in the store; reads all of it, once, in constant memory."""
        wanted, found = np.asarray(ids), set[int]()
        for first in range(0, self.num_tokens, CHUNK_ITEMS):
            chunk = self._tokens[first : first + CHUNK_ITEMS]
            found.update(np.unique(chunk[np.isin(chunk, wanted)]).tolist())
        return sorted(found)

    def largest_token(self) -> int:
        """The largest id in the store, -1 when it is empty; reads all of it, once, in constant memory."""
        chunks = range(0, self.num_tokens, CHUNK_ITEMS)
        return max((int(self._tokens[first : first + CHUNK_ITEMS].max()) for first in chunks), default=-1)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the whole index and of 1,024 evenly spaced pages of the tokens.

        Tells stores apart in an instant, whatever their size; it does not prove every token. The manifest's hashes do.
        """
        digest = hashlib.sha256(self._index.data)
        if self.mask is not None:
            digest.update(self.mask.fingerprint.encode())
        num_bytes = self.num_tokens * self.dtype.itemsize
        with self._bin_path.open("rb") as file:
            for probe in range(FINGERPRINT_PROBES):
                file.seek(max(0, num_bytes - FINGERPRINT_PROBE_BYTES) * probe // (FINGERPRINT_PROBES - 1))
                digest.update(file.read(FINGERPRINT_PROBE_BYTES))
        return digest.hexdigest()


class Selection:
    """Some documents of a store, numbered anew: what a share of its own is asked for."""

    def __init__(self, store: Store, documents: np.ndarray) -> None:
        """`documents`: int, which ones, in order."""
        self.store = store
        self.documents = documents
        self.lengths = np.asarray(store.lengths)[documents]
        """Tokens of each document, int [documents]."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """See `Store.tokens`."""
        return self.store.tokens(int(self.documents[document]), start, stop)

    def weights(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """See `Store.weights`."""
        return self.store.weights(int(self.documents[document]), start, stop)


def mask_prefix(prefix: Path) -> Path:
    """Where the loss weights of the store at `prefix` lie."""
    return prefix.with_name(f"{prefix.name}_mask")


def has_mask(path: Path) -> bool:
    """Whether the store at `path`, see `Store`, has loss weights; does not open it."""
    return _file(mask_prefix(_prefix_of(path)), ".idx").is_file()


def _prefix_of(path: Path) -> Path:
    return path / "tokens" if path.is_dir() else path


def _file(prefix: Path, suffix: str) -> Path:
    """`prefix` with a suffix added; a dot in the prefix is part of its name."""
    return prefix.with_name(prefix.name + suffix)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
