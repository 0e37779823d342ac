"""Sample blocks evenly from a corpus that is too large to read completely.

Plain files are sampled at any record border and Parquet files at any record. Compressed files and JSON lists can only
be read from the start, so their beginning is used.
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
    """Estimate a file's decompressed size from its beginning, or from the footer of a Parquet file."""
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
    """Metadata of a Parquet file: record counts and sizes."""
    from pyarrow import parquet

    return parquet.read_metadata(path)


def spread_blocks(corpus: FileCorpus, sizes: list[int], most_bytes: int) -> Iterator[SourceBlock]:
    """Yield blocks of about `most_bytes` in total, spread evenly over the files; `sizes` are their `plain_bytes`."""
    ends = list(accumulate(sizes))
    starts: Counter[Position] = Counter()
    for number in range(NUM_PLACES):
        place = ends[-1] * number // NUM_PLACES
        index = next(index for index, end in enumerate(ends) if place < end)
        offset = place - (ends[index] - sizes[index])
        starts[_enter(corpus.files[index], index, offset, sizes[index], corpus.reading)] += 1
    for start, count in sorted(starts.items()):
        # Half the size, since a block ends with the read that fills it and may be up to twice as large.
        yield from islice(corpus.blocks(start, most_bytes * count // NUM_PLACES // 2), 1)


def _enter(file: SourceFile, index: int, offset: int, size: int, reading: Reading) -> Position:
    """Position of the first whole record after `offset`, or the start of a file that can only be read from there."""
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
    # The line number is unknown, and callers do not use it.
    return START._replace(file=index) if match is None else Position(index, offset + match.end(), 2)
