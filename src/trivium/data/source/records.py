"""Rows: a piece of a source's bytes becomes documents, and refusals that say why.

Runs in worker processes, so it imports nothing heavy. Where the bytes come from is `blocks.py`'s business, what
becomes of the texts is `encode.py`'s. Imported by those two and by `inspect.py`.
"""

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from trivium.data.chat.formats import Layout

UTF8_BOM = b"\xef\xbb\xbf"
LINE_END = re.compile(rb"\n")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
MAX_DETAIL_CHARS = 160

Format = Literal["json", "line", "paragraph", "file"]


class Reason(StrEnum):
    """Why a row is refused; few and short, so that they can be counted."""

    NOT_UTF8 = "not UTF-8"
    UTF16 = "UTF-16, not UTF-8"
    NUL = "NUL byte"
    SURROGATE = "lone surrogate"
    NOT_JSON = "not JSON"
    CUT_OFF = "JSON cut off"
    TWO_VALUES = "more than one value on the line"
    TOO_DEEP = "JSON nested too deeply"
    NOT_OBJECT = "not a JSON object"
    NO_FIELD = "field missing"
    NULL = "field is null"
    WRONG_TYPE = "field is not text"
    EMPTY = "empty"
    TOO_LONG = "too long"

    # Of conversations: the record.
    MEDIA = "holds images, audio or video"
    MESSAGES_NOT_LIST = "messages are not a list"
    NO_MESSAGES = "no messages"
    PROMPT_NOT_TEXT = "prompt is not text"
    ANSWER_NOT_TEXT = "answer is not text"
    SYSTEM_NOT_TEXT = "system prompt is not text"
    HISTORY_NOT_PAIRS = "history is not pairs of texts"
    TOOLS_NOT_LIST = "tools are not a list"
    TOOL_NOT_OBJECT = "tool is not an object"
    TOOL_UNNAMED = "tool without a name"
    # Of conversations: one message.
    MESSAGE_NOT_OBJECT = "message is not an object"
    NO_ROLE = "message without a role"
    UNKNOWN_ROLE = "unknown role"
    NO_CONTENT = "message without content"
    CONTENT_NULL = "content is null"
    CONTENT_NOT_TEXT = "content is not text"
    PART_NOT_TEXT = "part of the content is not text"
    EMPTY_QUESTION = "empty user turn"
    EMPTY_ANSWER = "empty answer"
    REASONING_NOT_TEXT = "reasoning is not text"
    REASONING_MISPLACED = "reasoning outside an answer"
    CALLS_NOT_LIST = "tool calls are not a list"
    CALL_NOT_OBJECT = "tool call is not an object"
    CALL_NOT_JSON = "tool call is not JSON"
    CALL_UNNAMED = "tool call without a name"
    CALL_MISPLACED = "tool call outside an answer"
    ARGUMENTS_NOT_OBJECT = "tool arguments are not a JSON object"
    NOT_FINITE = "number is not finite"
    TRAIN_NOT_BOOL = "train is not true or false"
    WEIGHT_NOT_NUMBER = "weight is not a number"
    WEIGHT_NOT_FINITE = "weight is not finite"
    WEIGHT_NEGATIVE = "weight is negative"
    WEIGHT_TOO_BIG = "weight is too big"
    WEIGHT_TOO_SMALL = "weight is too small"
    TRAIN_AND_WEIGHT = "both train and weight"
    TRAIN_MISPLACED = "only answers can be trained"
    # Of conversations: the turns together.
    TWO_SYSTEMS = "two system turns"
    SYSTEM_LATE = "system turn is not first"
    TWO_ANSWERS = "two answers in a row"
    RESULT_ALONE = "tool result without a tool call"
    NO_ANSWER = "no assistant turn"
    UNTRAINED = "no answer has a weight"
    NOTHING_ASKED = "nothing before the answer"
    # Of conversations: the tokens.
    CONTROL_TOKEN = "control token in the text"
    TEMPLATE = "refused by the chat template"
    LONGER_THAN_SEQ_LEN = "longer than seq_len"


class Piece(NamedTuple):
    """Whole rows of one file as raw bytes, cut by the reader."""

    file: str
    """Name for messages: the path below the source."""
    format: Format
    first_line: int
    """Number of the first line (or record), from 1."""
    data: bytes
    refusal: Reason | None = None
    """Set when the reader already knows that no row of this piece can be used."""
    layout: "Layout | None" = None
    """How the file's records say what they hold; None where one field of theirs is the text."""


class Row(NamedTuple):
    """A document, or a record whose meaning `formats.py` knows."""

    line: int
    text: str
    utf8: bytes
    record: dict[str, Any] | None = None
    """Set where the file has a layout; `text` is empty then, and `utf8` the row as it lies in the file."""


class Reject(NamedTuple):
    """A row that cannot be used."""

    line: int
    reason: Reason
    detail: str


class RowError(Exception):
    """A row cannot be used: the reason, and what was found."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:MAX_DETAIL_CHARS]


def parse_piece(piece: Piece, field: str, max_row_bytes: int) -> Iterator[Row | Reject]:
    """Yield every row of a piece in order, as a document or as a refusal; blank lines between rows are no rows."""
    for line, raw in _split(piece):
        try:
            if piece.refusal is not None:
                raise RowError(piece.refusal)
            if is_too_long(raw, max_row_bytes):
                raise RowError(Reason.TOO_LONG)
            text = _decode(raw)
            if piece.layout is not None:
                yield Row(line, "", raw, json_object(text))
                continue
            text = _json_field(text, field) if piece.format == "json" else _plain_text(text, piece.format)
            yield Row(line, text, _checked_utf8(text))
        except RowError as error:
            yield Reject(line, error.reason, error.detail)


def is_too_long(raw: bytes, max_row_bytes: int) -> bool:
    """Whether a row is over the limit as it lies in the file, blanks around it aside.

    The reader asks the same of the beginning of a row, and refuses it without ever holding the whole.
    """
    return len(raw) > max_row_bytes and len(raw.strip()) > max_row_bytes


def _split(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, raw row)."""
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


def _decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(Reason.NOT_UTF8, f"byte 0x{raw[error.start]:02x} at {error.start}") from None
    if "\0" in text:
        raise RowError(Reason.NUL, f"at character {text.index(chr(0))}")
    return text


def _plain_text(text: str, form: Format) -> str:
    """Windows line ends are the file's, not the text's."""
    text = text.replace("\r\n", "\n")
    return text.rstrip("\r") if form == "line" else text


MAX_DIGITS = 4000


def _read_int(digits: str) -> int | float:
    """A whole number; Python refuses to read one of more than 4,300 digits, and nobody means one."""
    return int(digits) if len(digits) < MAX_DIGITS else float(digits)


JSON_DECODER = json.JSONDecoder(parse_int=_read_int)


def json_object(text: str) -> dict[str, Any]:
    """One JSON object.

    Raises: RowError when the text is something else.
    """
    try:
        value = JSON_DECODER.decode(text)
    except RecursionError:
        raise RowError(Reason.TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise _json_error(error, text) from None
    if not isinstance(value, dict):
        raise RowError(Reason.NOT_OBJECT, f"found {json_type(value)}")
    return value


def _json_field(text: str, field: str) -> str:
    """The text in one field of one JSON object."""
    value = json_object(text)
    if field not in value:
        raise RowError(Reason.NO_FIELD, f"no {field!r}; it has {', '.join(map(repr, list(value)[:8])) or 'no fields'}")
    content = value[field]
    if content is None:
        raise RowError(Reason.NULL, repr(field))
    if not isinstance(content, str):
        raise RowError(Reason.WRONG_TYPE, f"{field!r} is {json_type(content)}")
    return content


def _json_error(error: json.JSONDecodeError, text: str) -> RowError:
    if error.msg == "Extra data":
        return RowError(Reason.TWO_VALUES, f"the second begins at column {error.colno}")
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return RowError(Reason.CUT_OFF, f"after {len(text)} characters")
    return RowError(Reason.NOT_JSON, f"{error.msg} at column {error.colno}")


def json_type(value: object) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _checked_utf8(text: str) -> bytes:
    """The text's UTF-8, once it is known to be one a model can learn from."""
    if "\0" in text:
        raise RowError(Reason.NUL, f"at character {text.index(chr(0))}")
    if not text or text.isspace():
        raise RowError(Reason.EMPTY)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(Reason.SURROGATE, f"U+{ord(text[error.start]):04X} at character {error.start}") from None
