"""Blocks: read the files of a source as blocks of whole records, in order, from any position, in constant memory.

The main process of a build reads raw bytes and cuts them at record borders; worker processes decode and parse them.
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
from trivium.files import require_regular

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
    """Position of a record: file number, decompressed byte offset (in lists and tables: record number), line from 1."""

    file: int = 0
    offset: int = 0
    line: int = 1


START = Position()


class SourceBlock(NamedTuple):
    """A unit of work: pieces of one or more files, and the position after them."""

    pieces: tuple[Piece, ...]
    after: Position


class SourceFile(NamedTuple):
    """A file of a source; `name`, relative to the source, is used in messages and hashes."""

    path: Path
    name: str
    layout: RecordLayout | None = None
    """See `Piece.layout`."""


def list_files(root: Path) -> list[SourceFile]:
    """The supported files of a file or folder, sorted by name; symbolic links inside a folder are followed.

    Hidden and unsupported files in a folder are skipped.
    Raises: ConfigError when there is no supported file or one is not a regular file, BadData when a folder cannot be
        opened, or a link is broken or leads out of it.
    """
    require_regular(root)
    if root.is_file():
        if file_kind(root) is None:
            raise ConfigError(f"{root}: file type {root.suffix or '(none)'} is not supported. {EXPECTED_FILES}.")
        return [SourceFile(root, root.name)]
    if not root.is_dir():
        raise ConfigError(
            f"{root}: no such file or folder. Check the path; relative paths start at the current directory."
        )
    found: list[SourceFile] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in visited else []
        if real in visited:
            continue
        require_inside(Path(folder), root)
        visited.add(real)
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and file_kind(path):
                require_regular(path)
                require_inside(path, root)
                if not path.exists():
                    raise BadData(
                        f"{path}: is a link to {os.readlink(path)}, which is not there. Expected a file. Restore it, "
                        "or remove the link."
                    )
                found.append(SourceFile(path, path.relative_to(root).as_posix()))
    if not found:
        raise ConfigError(f"{root}: the folder has no supported files. {EXPECTED_FILES}.")
    return sorted(found, key=lambda file: file.name)


def require_inside(path: Path, root: Path) -> None:
    """Raise BadData for a link in the folder `root` that leads out of it: a data set must not name any file it likes.

    In the Hub's cache, the files of `snapshots/REVISION` are links into the `blobs` folder next to `snapshots`.
    """
    home, target = root.resolve(), path.resolve()
    snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    if not any(target.is_relative_to(folder) for folder in homes):
        raise BadData(
            f"{path}: is a link to {target}, outside of {root}. Expected links within the folder, since a downloaded "
            "data set could name any file of this machine. If you want that data, name it as a source of its own, or "
            "copy it into the folder."
        )


def _refuse_folder(error: OSError) -> None:
    raise BadData(
        f"{error.filename}: the folder cannot be opened ({error.strerror}). Grant read permission or remove it."
    )


def file_kind(path: Path) -> str | None:
    """`text`, `json` or `parquet` by the file's suffix, None for other files."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind != "parquet" else None
    return KINDS.get(path.suffix)


def read_blocks(
    files: list[SourceFile], reading: Reading, start: Position = START, block_bytes: int = BLOCK_BYTES
) -> Iterator[SourceBlock]:
    """Yield blocks of about `block_bytes` (more if a record is longer) from `start` to the end of the last file.

    Raises: BadData when a file cannot be read or its content does not match its suffix.
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
                refusal = Reason.UTF16 if stream.read(2) in UTF16_BOMS else None
            layout = file.layout if kind == "json" else None
            with open_decompressed(file.path) as stream:
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
            f"{path} cannot be read to the end ({error.__class__.__name__}: {error}). Expected a complete, readable "
            "file whose content matches its suffix; restore or remove it."
        ) from error


def open_decompressed(path: Path) -> BinaryIO:
    """Open a plain, gzip or zstd file as a stream of decompressed bytes."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def is_list(path: Path) -> bool:
    """Whether a .json file is one list rather than one object per line."""
    with open_decompressed(path) as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_list(
    file: SourceFile, reading: Reading, start: Position, block_bytes: int
) -> Iterator[tuple[Piece, Position]]:
    """The entries of a JSON list as JSON lines; line numbers are entry numbers."""
    entries = islice(_list_entries(file.path, block_bytes), start.offset, None)
    return json_pieces(entries, file.name, file.layout, None, start, block_bytes)


def _list_entries(path: Path, block_bytes: int) -> Iterator[Any]:
    """Decode entries one by one, with at most a block and an entry in memory.

    Raises: BadData where the list is cut off or invalid, since the next entry cannot be found.
    """
    # Invalid UTF-8 becomes a lone surrogate, which rejects only its own record.
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
            if stop == len(buffer):  # even a complete number may continue after the end of the buffer
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
        f"{path}: the JSON list is cut off or invalid after entry {number:,}. Restore the file, or store one object "
        "per line (.jsonl), where a broken record does not affect the others."
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
    """Yield (first line, whole records, too long, position after); a too long record is replaced by a placeholder."""
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
    """End of the last complete record in the buffer, 0 if there is none."""
    if border is LINE_END:
        return buffer.rfind(b"\n") + 1
    stop = 0
    for match in border.finditer(buffer):
        stop = match.end()
    return stop


def _skip_record(
    stream: BinaryIO, border: re.Pattern[bytes], buffer: bytes, block_bytes: int
) -> tuple[bytes, int, int]:
    """Skip the record at the start of the buffer; return the bytes read after it, and the bytes and lines skipped."""
    num_bytes = num_lines = 0
    while (match := border.search(buffer)) is None:
        blanks = buffer.rstrip(b" \t\r")
        kept = buffer[len(blanks) - 1 :] if blanks.endswith(b"\n") else b""  # possibly the first half of a border
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
    """The records of a table as JSON lines; line numbers are record numbers."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if file.layout is None and reading.field not in names:
                raise BadData(f"{file.path} has no column {reading.field!r}. Set `field` to one of {', '.join(names)}.")
            field = reading.field if file.layout is None else None
            records = _parquet_records(table, [reading.field] if field else names, start.offset)
            yield from json_pieces(records, file.name, file.layout, field, start, block_bytes)
    except pyarrow.ArrowException as error:
        raise BadData(f"{file.path} is not a valid Parquet file ({error}). Restore or remove it.") from error


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
                column = column.cast(pyarrow.large_binary())  # so that invalid UTF-8 rejects only its own record
            values.append(column[max(0, first_record - group_first) :].to_pylist())
        group_first += batch.num_rows
        for record in zip(*values, strict=True):
            yield dict(zip(batch.schema.names, record, strict=True))


def json_pieces(
    records: Iterator[Any],
    name: str,
    layout: RecordLayout | None,
    field: str | None,
    start: Position,
    block_bytes: int,
) -> Iterator[tuple[Piece, Position]]:
    """Yield records as pieces of about `block_bytes` of JSON lines, each with the position after it.

    `start` is the position of the first record. With a `field`, other fields are dropped.
    """
    number, lines = start.offset, (_json_line(record, field) for record in records)
    while taken := _take(lines, block_bytes):
        piece = Piece(name, "json", number + 1, b"".join(taken), None, layout)
        number += len(taken)
        yield piece, Position(start.file, number, number + 1)


def _take(lines: Iterator[bytes], most_bytes: int) -> list[bytes]:
    taken, num_bytes = [], 0
    while num_bytes < most_bytes and (line := next(lines, None)):
        taken.append(line)
        num_bytes += len(line)
    return taken


def _json_line(record: Any, field: str | None) -> bytes:
    """One record as a line of JSON with only `field`, or without it, its field names for the message of the reject."""
    if field is not None:
        record = {field: record[field]} if field in record else dict.fromkeys(record)
    if isinstance(record, dict):
        for name, value in record.items():
            if isinstance(value, bytes):
                try:
                    record = {**record, name: value.decode("utf-8")}
                except UnicodeDecodeError:
                    return value.replace(b"\n", b" ") + b"\n"  # workers reject this as not UTF-8
    encoded = json.dumps(record, ensure_ascii=False, default=lambda other: {"type": type(other).__name__}) + "\n"
    try:
        return encoded.encode("utf-8")
    except UnicodeEncodeError:
        return encoded.encode("utf-8", errors="surrogatepass")


def first_records(file: SourceFile, reading: Reading, count: int) -> list[dict[str, Any]]:
    """The first records of a JSON or Parquet file that are objects."""
    all_fields = file._replace(layout=RecordLayout("messages"))
    pieces = (piece for block in read_blocks([all_fields], reading, block_bytes=1 << 16) for piece in block.pieces)
    return list(islice(read_objects(pieces, reading.max_record_bytes), count))
