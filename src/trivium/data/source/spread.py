"""Blocks from places spread evenly over a corpus that is too large to be read through.

A plain file is read from anywhere, at the next record border, and a Parquet file from any record. Of a compressed file
and of a JSON list, which can only be read from the start, the beginning is taken.
"""

import gzip
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from trivium.data.source.blocks import START, Position, SourceBlock, SourceFile, file_kind, is_list
from trivium.data.source.corpus import COMPRESSED_SUFFIXES, FileCorpus
from trivium.data.source.records import BLANK_LINES, LINE_END, Reading

NUM_PLACES = 32
PROBE_BYTES = 1 << 20


def plain_bytes(file: SourceFile) -> int:
    """About how large a file is decompressed: by the beginning of it, or for Parquet by what its footer says."""
    size = file.path.stat().st_size
    if file_kind(file.path) == "parquet":
        footer = parquet_footer(file.path)
        return max(size, sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups)))
    if file.path.suffix not in COMPRESSED_SUFFIXES:
        return size
    with file.path.open("rb") as raw:
        plain = len(_decompressed(file.path, raw).read(PROBE_BYTES))
        return round(size * plain / max(1, raw.tell()))


def _decompressed(path: Path, raw: Any) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def parquet_footer(path: Path) -> Any:
    """Record counts and sizes of a Parquet file, without its content."""
    from pyarrow import parquet

    return parquet.read_metadata(path)


def spread_blocks(corpus: FileCorpus, sizes: list[int], most_bytes: int) -> Iterator[SourceBlock]:
    """Blocks of about `most_bytes` together, from places spread evenly over files of these `plain_bytes`."""
    ends = list(accumulate(sizes))
    starts: Counter[Position] = Counter()
    for number in range(NUM_PLACES):
        place = ends[-1] * number // NUM_PLACES
        index = next(index for index, end in enumerate(ends) if place < end)
        starts[
            _enter(corpus.files[index], index, place - (ends[index] - sizes[index]), sizes[index], corpus.reading)
        ] += 1
    for start, count in sorted(starts.items()):
        # A block ends with the read that fills it, so it may be up to twice as large as asked for.
        yield from islice(corpus.blocks(start, most_bytes * count // NUM_PLACES // 2), 1)


def _enter(file: SourceFile, index: int, offset: int, size: int, reading: Reading) -> Position:
    """Where the first whole record after a place begins; the start of a file that can only be read from there."""
    kind = file_kind(file.path)
    if kind == "parquet":
        record = parquet_footer(file.path).num_rows * offset // size
        return Position(index, record, record + 1)
    is_whole = kind == "text" and reading.documents == "file"
    if not offset or is_whole or file.path.suffix in COMPRESSED_SUFFIXES or (kind == "json" and is_list(file.path)):
        return START._replace(file=index)
    border = BLANK_LINES if kind == "text" and reading.documents == "paragraph" else LINE_END
    with file.path.open("rb") as stream:
        stream.seek(offset)
        match = border.search(stream.read(PROBE_BYTES))
    # Its line number is unknown, and never shown for these records.
    return START._replace(file=index) if match is None else Position(index, offset + match.end(), 2)
