"""Records: parse the raw bytes of a source into documents and conversations, or rejects with a reason.

Building, surveying, inspecting and tokenizer training all use `read_records`. Worker processes import this module, so
it stays free of heavy imports.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trivium.data.chat.formats import Conversation, Document, parse, parse_document
from trivium.data.chat.layout import RecordLayout
from trivium.data.rejects import Reason, RecordError, Reject, json_type

UTF8_BOM = b"\xef\xbb\xbf"
LINE_END = re.compile(rb"\n")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
MAX_DIGITS = 4000

PieceFormat = Literal["json", "line", "paragraph", "file"]


@dataclass(frozen=True)
class Reading:
    """How files are read; part of the hash in a store's name."""

    field: str
    """JSON field or Parquet column with the text of a document."""
    documents: str
    """Unit of a plain text file that is one document: `file`, `paragraph` or `line`."""
    max_record_bytes: int


class Piece(NamedTuple):
    """Consecutive whole records of one file, as raw bytes."""

    file: str
    """Name for messages, relative to the source."""
    format: PieceFormat
    first_line: int
    """Number of the first line, or of the first record of a list or table, from 1."""
    data: bytes
    refusal: Reason | None = None
    """Reason to reject all records of the piece, if the reader found one."""
    layout: RecordLayout | None = None
    """Layout of the file's records; None if they are plain text or have their text in `Reading.field`."""


class DataRecord(NamedTuple):
    """One entry of a data file."""

    file: str
    line: int
    num_bytes: int
    """UTF-8 bytes of a document's text or of a conversation's raw record; 0 for a reject."""
    content: Document | Conversation | Reject


def read_records(pieces: Iterable[Piece], reading: Reading) -> Iterator[DataRecord]:
    """Yield every record of the pieces in order; blank lines between records are skipped."""
    for piece in pieces:
        for line, raw in _split(piece):
            try:
                content = _parse(piece, _decode(piece, raw, reading.max_record_bytes), reading.field)
                num_bytes = len(content.text.encode() if isinstance(content, Document) else raw)
                record = DataRecord(piece.file, line, num_bytes, content)
            except RecordError as error:
                record = DataRecord(piece.file, line, 0, Reject.of(error, piece.file, line))
            yield record


def _parse(piece: Piece, text: str, field: str) -> Document | Conversation:
    if piece.layout is not None:
        return parse(json_object(text), piece.layout)
    if piece.format == "json":
        return parse_document(json_object(text), field)
    text = text.replace("\r\n", "\n")
    text = text.rstrip("\r") if piece.format == "line" else text
    if not text or text.isspace():
        raise RecordError(Reason.EMPTY)
    return Document(text)


def read_objects(pieces: Iterable[Piece], max_record_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of JSON pieces; other records are skipped."""
    for piece in pieces:
        for _, raw in _split(piece):
            with suppress(RecordError):
                yield json_object(_decode(piece, raw, max_record_bytes))


def is_too_long(raw: bytes, max_record_bytes: int) -> bool:
    """Whether a record without surrounding whitespace exceeds the limit; `raw` may be only its beginning."""
    return len(raw) > max_record_bytes and len(raw.strip()) > max_record_bytes


def _split(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, raw record)."""
    data, line = piece.data, piece.first_line
    if line == 1:
        data = data.removeprefix(UTF8_BOM)
    if piece.format == "file":
        yield line, data
    elif piece.format == "paragraph":
        yield from _paragraphs(data, line)
    else:
        for number, raw in enumerate(data.split(b"\n"), start=line):
            if raw and not raw.isspace():
                yield number, raw


def _paragraphs(data: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    start = 0
    for border in [*BLANK_LINES.finditer(data), None]:
        stop = border.end() if border else len(data)
        first = end_of_blank_lines(data, start, stop)  # a piece may start with blank lines
        if paragraph := data[first:stop].rstrip():
            yield line + data.count(b"\n", start, first), paragraph
        line += data.count(b"\n", start, stop)
        start = stop


def end_of_blank_lines(data: bytes, start: int, stop: int) -> int:
    """Start of the first line that is not blank."""
    match = LEADING_BLANK_LINES.match(data, start, stop)
    return match.end() if match else start


def _decode(piece: Piece, raw: bytes, max_record_bytes: int) -> str:
    if piece.refusal is not None:
        raise RecordError(piece.refusal)
    if is_too_long(raw, max_record_bytes):
        raise RecordError(Reason.TOO_LONG)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(Reason.NOT_UTF8, f"byte 0x{raw[error.start]:02x} at {error.start}") from None
    if "\0" in text:
        raise RecordError(Reason.NUL, f"at character {text.index(chr(0))}")
    return text


def _read_int(digits: str) -> int | float:
    """Integers beyond the 4,300 digits that Python converts become floats."""
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


JSON_DECODER = json.JSONDecoder(parse_int=_read_int)


def json_object(text: str) -> dict[str, Any]:
    """Decode a JSON object.

    Raises: RecordError when the text is anything else.
    """
    try:
        value = JSON_DECODER.decode(text)
    except RecursionError:
        raise RecordError(Reason.TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise _json_error(error, text) from None
    if not isinstance(value, dict):
        raise RecordError(Reason.NOT_OBJECT, f"found {json_type(value)}")
    return value


def _json_error(error: json.JSONDecodeError, text: str) -> RecordError:
    if error.msg == "Extra data":
        return RecordError(Reason.TWO_VALUES, f"the second begins at column {error.colno}")
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return RecordError(Reason.CUT_OFF, f"after {len(text)} characters")
    return RecordError(Reason.NOT_JSON, f"{error.msg} at column {error.colno}")
