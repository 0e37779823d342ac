"""Records: the bytes of a source become documents and conversations, or rejects that say why.

`read_records` is the one loop over the records of a source: building, counting, inspecting and tokenizer training all
read through it. Runs in worker processes, so it imports nothing heavy.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trivium.data.chat.formats import Conversation, Document, parse
from trivium.data.chat.layout import RecordLayout
from trivium.data.rejects import Reason, RecordError, Reject, json_type

UTF8_BOM = b"\xef\xbb\xbf"
LINE_END = re.compile(rb"\n")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")

PieceFormat = Literal["json", "line", "paragraph", "file"]


@dataclass(frozen=True)
class Reading:
    """How files are read; part of a store's name."""

    field: str
    """The JSON field or Parquet column with the text of a document."""
    documents: str
    """What one document of a plain text file is: `file`, `paragraph` or `line`."""
    max_record_bytes: int


class Piece(NamedTuple):
    """Whole records of one file as raw bytes, cut by the reader."""

    file: str
    """Name for messages: the path below the source."""
    format: PieceFormat
    first_line: int
    """Number of the first line (of a list or table: the first record), from 1."""
    data: bytes
    refusal: Reason | None = None
    """Set when the reader already knows that no record of this piece can be used."""
    layout: RecordLayout | None = None
    """Where the file's records hold what; None where one field of theirs is the text."""


class DataRecord(NamedTuple):
    """One entry of a data file."""

    file: str
    line: int
    num_bytes: int
    """UTF-8 bytes: of a document's text, or of a conversation's record as it is in the file; 0 for a reject."""
    content: Document | Conversation | Reject


def read_records(pieces: Iterable[Piece], reading: Reading) -> Iterator[DataRecord]:
    """Yield every record of the pieces in order; blank lines between records are skipped."""
    for piece in pieces:
        for line, raw in _split(piece):
            try:
                text = _decode(piece, raw, reading.max_record_bytes)
                if piece.layout is not None:
                    record = DataRecord(piece.file, line, len(raw), parse(json_object(text), piece.layout))
                else:
                    text = _json_field(text, reading.field) if piece.format == "json" else _plain(text, piece.format)
                    record = DataRecord(piece.file, line, _num_utf8_bytes(text), Document(text))
            except RecordError as error:
                record = DataRecord(piece.file, line, 0, Reject.of(error, piece.file, line))
            yield record


def read_objects(pieces: Iterable[Piece], max_record_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of pieces of JSON as they are; records that are not objects are left out."""
    for piece in pieces:
        for _, raw in _split(piece):
            try:
                value = json_object(_decode(piece, raw, max_record_bytes))
            except RecordError:
                continue
            yield value


def is_too_long(raw: bytes, max_record_bytes: int) -> bool:
    """Whether a record is over the limit as it is in the file, whitespace around it not counted.

    The reader checks the beginning of a record the same way, so that it never holds the whole of one that is too long.
    """
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
        first = end_of_blank_lines(data, start, stop)  # a cut may have left some in front
        if paragraph := data[first:stop].rstrip():
            yield line + data.count(b"\n", start, first), paragraph
        line += data.count(b"\n", start, stop)
        start = stop


def end_of_blank_lines(data: bytes, start: int, stop: int) -> int:
    """Where the first line with something on it begins."""
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


def _plain(text: str, form: PieceFormat) -> str:
    """Without Windows line ends, which belong to the file and not to the text."""
    text = text.replace("\r\n", "\n")
    return text.rstrip("\r") if form == "line" else text


MAX_DIGITS = 4000


def _read_int(digits: str) -> int | float:
    """A whole number; a float where it is longer than the 4,300 digits that Python converts."""
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


JSON_DECODER = json.JSONDecoder(parse_int=_read_int)


def json_object(text: str) -> dict[str, Any]:
    """One JSON object.

    Raises: RecordError when the text is something else.
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


def _json_field(text: str, field: str) -> str:
    """The text in one field of one JSON object."""
    value = json_object(text)
    if field not in value:
        raise RecordError(
            Reason.NO_FIELD, f"no {field!r}; it has {', '.join(map(repr, list(value)[:8])) or 'no fields'}"
        )
    content = value[field]
    if content is None:
        raise RecordError(Reason.NULL, repr(field))
    if not isinstance(content, str):
        raise RecordError(Reason.WRONG_TYPE, f"{field!r} is {json_type(content)}")
    return content


def _json_error(error: json.JSONDecodeError, text: str) -> RecordError:
    if error.msg == "Extra data":
        return RecordError(Reason.TWO_VALUES, f"the second begins at column {error.colno}")
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return RecordError(Reason.CUT_OFF, f"after {len(text)} characters")
    return RecordError(Reason.NOT_JSON, f"{error.msg} at column {error.colno}")


def _num_utf8_bytes(text: str) -> int:
    """The size of a document's text. Raises: RecordError when it is not text that a model can be trained on."""
    if "\0" in text:
        raise RecordError(Reason.NUL, f"at character {text.index(chr(0))}")
    if not text or text.isspace():
        raise RecordError(Reason.EMPTY)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RecordError(Reason.SURROGATE, f"U+{ord(text[error.start]):04X} at character {error.start}") from None
