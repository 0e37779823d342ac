"""Rejects: records that cannot be used, each with a reason.

Worker processes import this module, so it stays free of heavy imports.
"""

from enum import StrEnum
from typing import NamedTuple

MAX_DETAIL_CHARS = 160


class Reason(StrEnum):
    """Why a record is rejected; reports count rejects by reason."""

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
    MEDIA = "contains images, audio or video"
    MESSAGES_NOT_LIST = "messages are not a list"
    NO_MESSAGES = "no messages"
    PROMPT_NOT_TEXT = "prompt is not text"
    ANSWER_NOT_TEXT = "answer is not text"
    SYSTEM_NOT_TEXT = "system prompt is not text"
    HISTORY_NOT_PAIRS = "history is not a list of text pairs"
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
    WEIGHT_TOO_BIG = "weight is too large"
    WEIGHT_TOO_SMALL = "weight is too small"
    TRAIN_AND_WEIGHT = "both train and weight"
    TRAIN_MISPLACED = "train or weight outside an answer"
    # Of conversations: the turns together.
    TWO_SYSTEMS = "two system turns"
    SYSTEM_LATE = "system turn is not first"
    TWO_ANSWERS = "two answers in a row"
    RESULT_ALONE = "tool result without a tool call"
    NO_ANSWER = "no assistant turn"
    UNTRAINED = "all answers have train: false or weight 0"
    NOTHING_ASKED = "nothing before the answer"
    # Of conversations: the tokens.
    CONTROL_TOKEN = "special token in the text"
    TEMPLATE = "rejected by the chat template"
    LONGER_THAN_SEQ_LEN = "longer than seq_len"


class RecordError(Exception):
    """A record cannot be used; `detail` says what was found."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:MAX_DETAIL_CHARS]


class Reject(NamedTuple):
    """A rejected record, one line of rejects.jsonl."""

    file: str
    line: int
    reason: str
    detail: str

    @classmethod
    def of(cls, error: RecordError, file: str, line: int) -> "Reject":
        """The reject for an error in a record."""
        return cls(file, line, error.reason.value, error.detail)


def json_type(value: object) -> str:
    """Name of a JSON value's type for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), "null")
