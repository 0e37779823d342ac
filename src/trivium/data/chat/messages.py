"""Turns: one message of a file, however it is spelt, becomes one `Turn`, or the row is refused with the reason.

What a record looks like around its messages is `formats.py`'s business, and what a turn looks like to a model the chat
template's. Runs in worker processes and imports nothing heavy. Imported by `formats.py`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from trivium.data.source.records import Reason, RowError, json_type

Role = Literal["system", "user", "assistant", "tool"]

FUNCTION_CALL = "function_call"
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    FUNCTION_CALL: FUNCTION_CALL,
}
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
FULL_WEIGHT = 100
MAX_WEIGHT = 255
MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    """As the OpenAI API has them, arguments as an object: {type: function, function: {name, arguments}}."""
    weight: int = 0
    """Hundredths by which the loss of its tokens counts; 0 for all that is not learnt."""

    @property
    def thinks(self) -> bool:
        """Whether it reasons before it answers, in a field of its own or inside the content."""
        if self.reasoning is not None:
            return True
        before, tag, _ = self.content.partition("</think>")
        return bool(tag and before.replace("<think>", "", 1).strip())

    def message(self) -> dict[str, Any]:
        """The turn as `apply_chat_template` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True)
class Spelling:
    """How the messages of a file name things."""

    role: str | None = None
    """The field with the role; None for `role` or `from`, whichever a message has."""
    content: str | None = None
    """The field with the content; None for `content` or `value`."""
    roles: Mapping[str, str] | None = None
    """The file's own names of roles -> ours; the usual names are known without."""


def parse_message(message: object, number: int, spelling: Spelling) -> Turn:
    """Read one message; `number` is its place in the conversation, from 1.

    Raises: RowError.
    """
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RowError(Reason.MESSAGE_NOT_OBJECT, f"{where} is {json_type(message)}")
    role = _role(message, where, spelling)
    if role == FUNCTION_CALL:
        return _called_turn(message, where, spelling)
    calls = _tool_calls(message, where)
    if calls and role != "assistant":
        raise RowError(Reason.CALL_MISPLACED, f"{where} is of {role}")
    content = _content(message, where, spelling, may_be_null=bool(calls))
    if role == "user" and not content.strip():
        raise RowError(Reason.EMPTY_QUESTION, where)
    if role == "assistant" and not content.strip() and not calls:
        raise RowError(Reason.EMPTY_ANSWER, where)
    reasoning = _reasoning(message, where)
    if reasoning is not None and role != "assistant":
        raise RowError(Reason.REASONING_MISPLACED, f"{where} is of {role}")
    return Turn(role, content, reasoning, calls, _weight(message, role, where))


def _role(message: dict[str, Any], where: str, spelling: Spelling) -> Any:
    field = _field(message, spelling.role, ROLE_FIELDS)
    if field is None or message[field] is None:
        raise RowError(Reason.NO_ROLE, f"{where} has {', '.join(map(repr, list(message)[:8])) or 'no fields'}")
    name = message[field]
    role = {**ROLES, **(spelling.roles or {})}.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(Reason.UNKNOWN_ROLE, f"{where} is of {name!r}; say what it is with roles")
    return role


def _field(message: dict[str, Any], given: str | None, usual: tuple[str, ...]) -> str | None:
    return next((name for name in ([given] if given else usual) if name in message), None)


def _content(message: dict[str, Any], where: str, spelling: Spelling, may_be_null: bool) -> str:
    field = _field(message, spelling.content, CONTENT_FIELDS)
    if field is None or message[field] is None:
        if may_be_null:
            return ""
        if field is None:
            raise RowError(Reason.NO_CONTENT, f"{where} has {', '.join(map(repr, list(message)[:8]))}")
        raise RowError(Reason.CONTENT_NULL, where)
    content = message[field]
    if isinstance(content, list):
        # Parts are joined as vLLM joins them for templates that take text.
        # Source: vllm.entrypoints.chat_utils._parse_chat_message_content_parts.
        content = "\n".join(_part(part, where) for part in content)
    return checked_text(content, Reason.CONTENT_NOT_TEXT, where)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = repr(part.get("type")) if isinstance(part, dict) else json_type(part)
    raise RowError(Reason.PART_NOT_TEXT, f"{where} has a part that is {found}")


def _reasoning(message: dict[str, Any], where: str) -> str | None:
    values = (message.get(name) for name in REASONING_FIELDS)
    value = next((value for value in values if value is not None), None)
    text = "" if value is None else checked_text(value, Reason.REASONING_NOT_TEXT, where)
    return text if text.strip() else None


def _weight(message: dict[str, Any], role: Role, where: str) -> int:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and weight is not None:
        raise RowError(Reason.TRAIN_AND_WEIGHT, where)
    if train is not None and not isinstance(train, bool):
        raise RowError(Reason.TRAIN_NOT_BOOL, f"{where}: {train!r}")
    hundredths = (FULL_WEIGHT if train else 0) if weight is None else _hundredths(weight, where)
    if role == "assistant":
        return FULL_WEIGHT if train is None and weight is None else hundredths
    if hundredths:
        raise RowError(Reason.TRAIN_MISPLACED, f"{where} is of {role}")
    return 0


def _hundredths(weight: object, where: str) -> int:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RowError(Reason.WEIGHT_NOT_NUMBER, f"{where}: {weight!r}")
    if not math.isfinite(weight):
        raise RowError(Reason.WEIGHT_NOT_FINITE, f"{where}: {weight}")
    if weight < 0:
        raise RowError(Reason.WEIGHT_NEGATIVE, f"{where}: {weight}")
    if weight > MAX_WEIGHT / 100:
        raise RowError(Reason.WEIGHT_TOO_BIG, f"{where}: {weight}, and {MAX_WEIGHT / 100} is the most")
    if 0 < weight < 0.005:
        raise RowError(Reason.WEIGHT_TOO_SMALL, f"{where}: {weight}, and 0.01 is the least but 0")
    return round(weight * 100)


def _tool_calls(message: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    calls, single = message.get("tool_calls"), message.get(FUNCTION_CALL)
    if calls is None:
        calls = [] if single is None else [single]
    if not isinstance(calls, list):
        raise RowError(Reason.CALLS_NOT_LIST, f"{where}: {json_type(calls)}")
    return tuple(_tool_call(call, where) for call in calls)


def _called_turn(message: dict[str, Any], where: str, spelling: Spelling) -> Turn:
    """An answer that is nothing but calls, written as JSON where its text would be."""
    text = _content(message, where, spelling, may_be_null=False)
    try:
        calls = load_json(text)
    except ValueError as error:
        raise RowError(Reason.CALL_NOT_JSON, f"{where}: {error}") from None
    calls = tuple(_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls]))
    if not calls:
        raise RowError(Reason.EMPTY_ANSWER, where)
    return Turn("assistant", "", _reasoning(message, where), calls, _weight(message, "assistant", where))


def _tool_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowError(Reason.CALL_NOT_OBJECT, f"{where}: {json_type(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(Reason.CALL_UNNAMED, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = load_json(arguments)
        except ValueError as error:
            raise RowError(Reason.ARGUMENTS_NOT_OBJECT, f"{where}, {name!r}: {error}") from None
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise RowError(Reason.ARGUMENTS_NOT_OBJECT, f"{where}, {name!r}: {json_type(arguments)}")
    checked = {"type": "function", "function": {"name": name, "arguments": arguments}}
    check_json(checked, where)
    return checked


def checked_text(value: object, reason: Reason, where: str) -> str:
    """The value, once it is known to be text that has UTF-8 and no NUL; `reason` is for what is no text.

    Raises: RowError.
    """
    if not isinstance(value, str):
        raise RowError(reason, f"{where}: {json_type(value)}")
    if "\0" in value:
        raise RowError(Reason.NUL, f"{where}, at character {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            Reason.SURROGATE, f"{where}: U+{ord(value[error.start]):04X} at character {error.start}"
        ) from None
    return value


def check_json(value: object, where: str, depth: int = 0) -> None:
    """Walk what a template will write out as JSON.

    Raises: RowError for what has no JSON, no UTF-8, or no end.
    """
    if depth > MAX_JSON_DEPTH:
        raise RowError(Reason.TOO_DEEP, where)
    if isinstance(value, str):
        checked_text(value, Reason.CONTENT_NOT_TEXT, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(Reason.NOT_FINITE, f"{where}: {value}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_json(key, where, depth + 1)
            check_json(inner, where, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, where, depth + 1)


def load_json(text: str) -> Any:
    """Decode JSON that stands inside a text; NaN and the infinities are none.

    Raises: ValueError, also for what is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
