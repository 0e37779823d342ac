"""Blocks: the files of a source become blocks of whole records, read in order from any position in constant memory.

The parent process of a build reads raw bytes here and cuts them at record borders; workers decode and parse them.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from trivium.data.chat.layout import RecordLayout
from trivium.data.rejects import Reason
from trivium.data.source.records import (
    BLANK_LINES,
    JSON_DECODER,
    LINE_END,
    Piece,
    PieceFormat,
    Reading,
    end_of_blank_lines,
    is_too_long,
    read_objects,
)
from trivium.errors import BadData, ConfigError

BLOCK_BYTES = 1 << 19
PIECE_OVERHEAD_BYTES = 256
PARQUET_BATCH_RECORDS = 64
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
EXPECTED_FILES = (
    "Expected .txt, .md, .jsonl, .json (a list, or one object per line) or .parquet, plain or as .gz or .zst"
)
JSON_SPACE = re.compile(r"[ \t\r\n]*")
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Position(NamedTuple):
    """The next record to read: file number, byte of the decompressed text (record of a table), and line, from 1."""

    file: int = 0
    offset: int = 0
    line: int = 1


START = Position()


class SourceBlock(NamedTuple):
    """Work for one worker: pieces of one or more files, and where the record after them begins."""

    pieces: tuple[Piece, ...]
    after: Position


class SourceFile(NamedTuple):
    """A file to read, and the name it has in messages and hashes."""

    path: Path
    name: str
    layout: RecordLayout | None = None
    """Where its records hold what; None where one field of theirs, or the file, is the text."""


def list_files(root: Path) -> list[SourceFile]:
    """The readable files of a file or folder, sorted by name, links followed once.

    Hidden files and files of other kinds in a folder are skipped.
    Raises: ConfigError when there is nothing there to read, BadData when a folder may not be opened.
    """
    if root.is_file():
        if file_kind(root) is None:
            raise ConfigError(f"{root}: a {root.suffix or 'nameless'} file cannot be read. {EXPECTED_FILES}.")
        return [SourceFile(root, root.name)]
    if not root.is_dir():
        raise ConfigError(
            f"{root}: no such file or folder. Check the path of the source; it is relative to where the command runs."
        )
    found: list[SourceFile] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in visited else []
        if real in visited:
            continue
        visited.add(real)
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and file_kind(path) and path.is_file():
                found.append(SourceFile(path, path.relative_to(root).as_posix()))
    if not found:
        raise ConfigError(f"{root}: the folder holds nothing to read. {EXPECTED_FILES}.")
    return sorted(found, key=lambda file: file.name)


def _refuse_folder(error: OSError) -> None:
    raise BadData(
        f"{error.filename}: the folder cannot be opened ({error.strerror}). Give read permission or leave it out."
    )


def file_kind(path: Path) -> str | None:
    """`text`, `json` or `parquet` by the file's name, None for other files."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind != "parquet" else None
    return KINDS.get(path.suffix)


def read_blocks(
    files: list[SourceFile], reading: Reading, start: Position = START, block_bytes: int = BLOCK_BYTES
) -> Iterator[SourceBlock]:
    """Yield blocks of about `block_bytes` (more only for a longer record) from `start` to the end of the last file.

    Raises: BadData when a file cannot be read or is not what its name says.
    """
    pieces: list[Piece] = []
    num_bytes = 0
    for index in range(start.file, len(files)):
        begin = start if index == start.file else Position(index)
        for piece, after in _read_file(files[index], reading, begin, block_bytes):
            pieces.append(piece)
            num_bytes += len(piece.data) + PIECE_OVERHEAD_BYTES
            if num_bytes >= block_bytes:
                yield SourceBlock(tuple(pieces), after)
                pieces, num_bytes = [], 0
    if pieces:
        yield SourceBlock(tuple(pieces), Position(len(files)))


def _read_file(
    file: SourceFile, reading: Reading, start: Position, block_bytes: int
) -> Iterator[tuple[Piece, Position]]:
    kind = file_kind(file.path)
    with _file_errors(file.path):
        if kind == "parquet":
            yield from _read_parquet(file, reading, start, block_bytes)
        elif kind == "json" and is_list(file.path):
            yield from _read_list(file, reading, start, block_bytes)
        elif kind == "text" and reading.documents == "file":
            yield from _read_whole(file, reading, start)
        else:
            form = cast(PieceFormat, "json" if kind == "json" else reading.documents)
            border = BLANK_LINES if form == "paragraph" else LINE_END
            with open_decompressed(file.path) as stream:
                refusal = _whole_file_refusal(file)
                layout = file.layout if kind == "json" else None
                _skip(stream, start.offset)
                for first_line, data, too_long, after in _cut_records(stream, border, reading, start, block_bytes):
                    reason = Reason.TOO_LONG if too_long else refusal
                    yield Piece(file.name, form, first_line, data, reason, layout), after


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise BadData(
            f"{path}: cannot be read to its end ({error.__class__.__name__}: {error}). "
            "Expected a whole, readable file of the kind its name says; restore it or leave it out."
        ) from error


def open_decompressed(path: Path) -> BinaryIO:
    """Open a plain, gzip or zstd file as a stream of its plain bytes."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _whole_file_refusal(file: SourceFile) -> Reason | None:
    """Why none of a file's records can be used, by its first bytes; None when they may."""
    with open_decompressed(file.path) as stream:
        return Reason.UTF16 if stream.read(2) in UTF16_BOMS else None


def is_list(path: Path) -> bool:
    """Whether a .json file is one list, and not an object per line."""
    with open_decompressed(path) as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_list(
    file: SourceFile, reading: Reading, start: Position, block_bytes: int
) -> Iterator[tuple[Piece, Position]]:
    """The entries of one JSON list as JSON lines; a line number is an entry's number."""
    entries = islice(_list_entries(file.path, block_bytes), start.offset, None)
    for data, first_entry, next_entry in json_pieces(entries, None, start.offset, block_bytes):
        yield (
            Piece(file.name, "json", first_entry + 1, data, None, file.layout),
            Position(start.file, next_entry, next_entry + 1),
        )


def _list_entries(path: Path, block_bytes: int) -> Iterator[Any]:
    """Decode one entry after the other; never more than a block and an entry is held.

    Raises: BadData where the list breaks off or holds what is not JSON, since the next entry cannot be found.
    """
    # A byte that is not UTF-8 becomes a lone surrogate, for which only its own record is rejected.
    with open_decompressed(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape") as stream:
        buffer = stream.read(block_bytes)
        place, number = buffer.index("[") + 1, 0
        while True:
            begin = _past_blanks(buffer, place)
            mark = buffer[begin : begin + 1]
            if mark == "]":
                return
            if number and mark == ",":
                begin = _past_blanks(buffer, begin + 1)
            elif number and mark:
                break
            try:
                entry, stop = JSON_DECODER.raw_decode(buffer, begin)
            except (json.JSONDecodeError, RecursionError):
                entry, stop = None, len(buffer)
            if stop == len(buffer):  # also a number may go on beyond the end of what was read
                more = stream.read(max(block_bytes, len(buffer)))
                if not more:
                    break
                buffer += more
                continue
            yield entry
            number, place = number + 1, stop
            if place > block_bytes:
                buffer, place = buffer[place:], 0
    raise BadData(
        f"{path}: is a JSON list that breaks off or is not JSON after entry {number:,}. Restore the file, or turn it "
        "into one object per line (jq -c '.[]'), where a broken record does not affect the others."
    )


def _past_blanks(text: str, place: int) -> int:
    match = JSON_SPACE.match(text, place)
    return match.end() if match else place


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    if num_bytes and stream.seekable():
        stream.seek(num_bytes)
        return
    while num_bytes and (passed := stream.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(passed)


def _cut_records(
    stream: BinaryIO, border: re.Pattern[bytes], reading: Reading, start: Position, block_bytes: int
) -> Iterator[tuple[int, bytes, bool, Position]]:
    """Yield (first line, whole records, too long, position after); a record that is too long comes as a stand-in."""
    buffer, offset, line = b"", start.offset, start.line
    at_end = False
    while not at_end:
        chunk = stream.read(block_bytes)
        at_end = not chunk
        buffer += chunk
        stop = len(buffer) if at_end else _last_border(buffer, border)
        if stop:
            offset, first_line, line = offset + stop, line, line + buffer.count(b"\n", 0, stop)
            yield first_line, buffer[:stop], False, Position(start.file, offset, line)
            buffer = buffer[stop:]
        elif is_too_long(buffer, reading.max_record_bytes):
            first_line = line + buffer.count(b"\n", 0, end_of_blank_lines(buffer, 0, len(buffer)))
            buffer, num_bytes, num_lines = _skip_record(stream, border, buffer, block_bytes)
            offset, line = offset + num_bytes, line + num_lines
            yield first_line, b"too long", True, Position(start.file, offset, line)


def _last_border(buffer: bytes, border: re.Pattern[bytes]) -> int:
    """Where the last complete record of the buffer ends, 0 when none does."""
    if border is LINE_END:
        return buffer.rfind(b"\n") + 1
    stop = 0
    for match in border.finditer(buffer):
        stop = match.end()
    return stop


def _skip_record(
    stream: BinaryIO, border: re.Pattern[bytes], buffer: bytes, block_bytes: int
) -> tuple[bytes, int, int]:
    """Read past the record that fills the buffer; give what was read beyond it, and the bytes and lines passed."""
    num_bytes = num_lines = 0
    while (match := border.search(buffer)) is None:
        blanks = buffer.rstrip(b" \t\r")
        kept = buffer[len(blanks) - 1 :] if blanks.endswith(b"\n") else b""  # may be the first half of a border
        num_bytes += len(buffer) - len(kept)
        num_lines += buffer.count(b"\n") - kept.count(b"\n")
        chunk = stream.read(block_bytes)
        if not chunk:
            return b"", num_bytes + len(kept), num_lines + kept.count(b"\n")
        buffer = kept + chunk
    stop = match.end()
    return buffer[stop:], num_bytes + stop, num_lines + buffer.count(b"\n", 0, stop)


def _read_whole(file: SourceFile, reading: Reading, start: Position) -> Iterator[tuple[Piece, Position]]:
    """The file as one record."""
    if start.offset:
        return
    with open_decompressed(file.path) as stream:
        data = stream.read(reading.max_record_bytes + 1)
    refusal = Reason.UTF16 if data.startswith(UTF16_BOMS) else None
    if len(data) > reading.max_record_bytes:
        data, refusal = b"too long", Reason.TOO_LONG
    yield Piece(file.name, "file", 1, data, refusal), Position(start.file, 1, 2)


def _read_parquet(
    file: SourceFile, reading: Reading, start: Position, block_bytes: int
) -> Iterator[tuple[Piece, Position]]:
    """The records of a table as JSON lines; a line number is a record number."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if file.layout is None and reading.field not in names:
                raise BadData(
                    f"{file.path}: has no column {reading.field!r}; it has {', '.join(names)}. Name one as the field."
                )
            field = reading.field if file.layout is None else None
            records = _parquet_records(table, [reading.field] if field else names, start.offset)
            for data, first, after in json_pieces(records, field, start.offset, block_bytes):
                piece = Piece(file.name, "json", first + 1, data, None, file.layout)
                yield piece, Position(start.file, after, after + 1)
    except pyarrow.ArrowException as error:
        raise BadData(f"{file.path}: is not a readable Parquet file ({error}). Restore it or leave it out.") from error


def _parquet_records(table: Any, columns: list[str], first_record: int) -> Iterator[dict[str, object]]:
    import pyarrow

    first_group, group_first = 0, 0
    while (
        first_group < table.num_row_groups
        and group_first + table.metadata.row_group(first_group).num_rows <= first_record
    ):
        group_first += table.metadata.row_group(first_group).num_rows
        first_group += 1
    groups = range(first_group, table.num_row_groups)
    for batch in table.iter_batches(PARQUET_BATCH_RECORDS, row_groups=groups, columns=columns, use_threads=False):
        values = []
        for column in batch.columns:
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())  # bytes, so that one bad value does not hide the others
            values.append(column[max(0, first_record - group_first) :].to_pylist())
        group_first += batch.num_rows
        for record in zip(*values, strict=True):
            yield dict(zip(batch.schema.names, record, strict=True))


def json_pieces(
    records: Iterator[Any], field: str | None, first_record: int, block_bytes: int
) -> Iterator[tuple[bytes, int, int]]:
    """Yield records as (JSON lines of about `block_bytes`, number of the first record, number after the last).

    With a `field` they are cut down to it.
    """
    lines: list[bytes] = []
    num_bytes, number = 0, first_record
    for number, record in enumerate(records, start=first_record + 1):
        lines.append(_json_line(record, field))
        num_bytes += len(lines[-1])
        if num_bytes >= block_bytes:
            yield b"".join(lines), number - len(lines), number
            lines, num_bytes = [], 0
    if lines:
        yield b"".join(lines), number - len(lines), number


def _json_line(record: Any, field: str | None) -> bytes:
    """One record as a line of JSON, cut down to `field`; one without that field keeps its field names."""
    if field is not None:
        record = {field: record[field]} if field in record else dict.fromkeys(record)
    if isinstance(record, dict):
        for name, value in record.items():
            if isinstance(value, bytes):
                try:
                    record = {**record, name: value.decode("utf-8")}
                except UnicodeDecodeError:
                    return value.replace(b"\n", b" ") + b"\n"  # the worker rejects these bytes
    encoded = json.dumps(record, ensure_ascii=False, default=lambda other: {"type": type(other).__name__}) + "\n"
    try:
        return encoded.encode("utf-8")
    except UnicodeEncodeError:
        return encoded.encode("utf-8", errors="surrogatepass")


def first_records(file: SourceFile, reading: Reading, count: int) -> list[dict[str, Any]]:
    """The first few records of a file of JSON or a table; those that are not JSON objects are left out."""
    all_fields = file._replace(layout=RecordLayout("messages"))
    pieces = (piece for block in read_blocks([all_fields], reading, block_bytes=1 << 16) for piece in block.pieces)
    return list(islice(read_objects(pieces, reading.max_record_bytes), count))
