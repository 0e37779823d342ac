"""Messages: parse one message of a record, in any supported format, into a `Turn`, or reject the record with a reason.

Worker processes import this module, so it stays free of heavy imports.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from trivium.data.chat.layout import FUNCTION_CALL, RecordLayout
from trivium.data.columns import FULL_WEIGHT
from trivium.data.rejects import Reason, RecordError, json_type

Role = Literal["system", "user", "assistant", "tool"]

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
MAX_WEIGHT = 255
MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    """In the OpenAI format, but with arguments as an object: {type: function, function: {name, arguments}}."""
    weight: int = 0
    """Loss weight of its tokens, in hundredths; 0 for no loss."""

    @property
    def thinks(self) -> bool:
        """Whether it contains reasoning, in a separate field or in the content."""
        if self.reasoning is not None:
            return True
        before, tag, _ = self.content.partition("</think>")
        return bool(tag and before.replace("<think>", "", 1).strip())

    def message(self) -> dict[str, Any]:
        """The message in the form that `apply_chat_template` takes."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


def parse_message(message: object, number: int, layout: RecordLayout) -> Turn:
    """Parse one message; `number` is its position in the conversation, from 1.

    Raises: RecordError.
    """
    where = f"message {number}"
    if not isinstance(message, dict):
        raise RecordError(Reason.MESSAGE_NOT_OBJECT, f"{where} is {json_type(message)}")
    role = _role(message, where, layout)
    if role == FUNCTION_CALL:
        return _function_call(message, where, layout)
    calls = _tool_calls(message, where)
    if calls and role != "assistant":
        raise RecordError(Reason.CALL_MISPLACED, f"{where} is of {role}")
    content = _content(message, where, layout, may_be_null=bool(calls))
    if role == "user" and not content.strip():
        raise RecordError(Reason.EMPTY_QUESTION, where)
    if role == "assistant" and not content.strip() and not calls:
        raise RecordError(Reason.EMPTY_ANSWER, where)
    reasoning = _reasoning(message, where)
    if reasoning is not None and role != "assistant":
        raise RecordError(Reason.REASONING_MISPLACED, f"{where} is of {role}")
    return Turn(role, content, reasoning, calls, _weight(message, role, where))


def _role(message: dict[str, Any], where: str, layout: RecordLayout) -> Any:
    field = _field(message, layout.fields.get("role"), ROLE_FIELDS)
    if field is None or message[field] is None:
        raise RecordError(Reason.NO_ROLE, f"{where} has {', '.join(map(repr, list(message)[:8])) or 'no fields'}")
    name = message[field]
    role = {**ROLES, **layout.roles}.get(name) if isinstance(name, str) else None
    if role is None:
        raise RecordError(Reason.UNKNOWN_ROLE, f"{where} is of {name!r}; define it with roles")
    return role


def _field(message: dict[str, Any], given: str | None, usual: tuple[str, ...]) -> str | None:
    return next((name for name in ([given] if given else usual) if name in message), None)


def _content(message: dict[str, Any], where: str, layout: RecordLayout, may_be_null: bool) -> str:
    field = _field(message, layout.fields.get("content"), CONTENT_FIELDS)
    if field is None or message[field] is None:
        if may_be_null:
            return ""
        if field is None:
            raise RecordError(Reason.NO_CONTENT, f"{where} has {', '.join(map(repr, list(message)[:8]))}")
        raise RecordError(Reason.CONTENT_NULL, where)
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
    raise RecordError(Reason.PART_NOT_TEXT, f"{where} has a part that is {found}")


def _reasoning(message: dict[str, Any], where: str) -> str | None:
    values = (message.get(name) for name in REASONING_FIELDS)
    value = next((value for value in values if value is not None), None)
    text = "" if value is None else checked_text(value, Reason.REASONING_NOT_TEXT, where)
    return text if text.strip() else None


def _weight(message: dict[str, Any], role: Role, where: str) -> int:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and weight is not None:
        raise RecordError(Reason.TRAIN_AND_WEIGHT, where)
    if train is not None and not isinstance(train, bool):
        raise RecordError(Reason.TRAIN_NOT_BOOL, f"{where}: {train!r}")
    hundredths = (FULL_WEIGHT if train else 0) if weight is None else _hundredths(weight, where)
    if role == "assistant":
        return FULL_WEIGHT if train is None and weight is None else hundredths
    if hundredths:
        raise RecordError(Reason.TRAIN_MISPLACED, f"{where} is of {role}")
    return 0


def _hundredths(weight: object, where: str) -> int:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecordError(Reason.WEIGHT_NOT_NUMBER, f"{where}: {weight!r}")
    if not math.isfinite(weight):
        raise RecordError(Reason.WEIGHT_NOT_FINITE, f"{where}: {weight}")
    if weight < 0:
        raise RecordError(Reason.WEIGHT_NEGATIVE, f"{where}: {weight}")
    if weight > MAX_WEIGHT / 100:
        raise RecordError(Reason.WEIGHT_TOO_BIG, f"{where}: {weight}; the maximum is {MAX_WEIGHT / 100}")
    if 0 < weight < 0.005:
        raise RecordError(Reason.WEIGHT_TOO_SMALL, f"{where}: {weight}; use 0 or at least 0.01")
    return round(weight * 100)


def _tool_calls(message: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    calls, single = message.get("tool_calls"), message.get(FUNCTION_CALL)
    if calls is None:
        calls = [] if single is None else [single]
    if not isinstance(calls, list):
        raise RecordError(Reason.CALLS_NOT_LIST, f"{where}: {json_type(calls)}")
    return tuple(_tool_call(call, where) for call in calls)


def _function_call(message: dict[str, Any], where: str, layout: RecordLayout) -> Turn:
    """An answer with only tool calls, which are the content of the message as JSON."""
    text = _content(message, where, layout, may_be_null=False)
    try:
        calls = load_json(text)
    except ValueError as error:
        raise RecordError(Reason.CALL_NOT_JSON, f"{where}: {error}") from None
    calls = tuple(_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls]))
    if not calls:
        raise RecordError(Reason.EMPTY_ANSWER, where)
    return Turn("assistant", "", _reasoning(message, where), calls, _weight(message, "assistant", where))


def _tool_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RecordError(Reason.CALL_NOT_OBJECT, f"{where}: {json_type(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RecordError(Reason.CALL_UNNAMED, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = load_json(arguments)
        except ValueError as error:
            raise RecordError(Reason.ARGUMENTS_NOT_OBJECT, f"{where}, {name!r}: {error}") from None
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise RecordError(Reason.ARGUMENTS_NOT_OBJECT, f"{where}, {name!r}: {json_type(arguments)}")
    checked = {"type": "function", "function": {"name": name, "arguments": arguments}}
    check_json(checked, where)
    return checked


def checked_text(value: object, reason: Reason, where: str) -> str:
    """Return the value if it is text with a UTF-8 encoding and without NUL.

    Raises: RecordError, with `reason` if the value is not text.
    """
    if not isinstance(value, str):
        raise RecordError(reason, f"{where}: {json_type(value)}")
    if "\0" in value:
        raise RecordError(Reason.NUL, f"{where}, at character {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            Reason.SURROGATE, f"{where}: U+{ord(value[error.start]):04X} at character {error.start}"
        ) from None
    return value


def check_json(value: object, where: str, depth: int = 0) -> None:
    """Check a value that the chat template renders as JSON.

    Raises: RecordError when it has no JSON or UTF-8 encoding, or is nested too deeply.
    """
    if depth > MAX_JSON_DEPTH:
        raise RecordError(Reason.TOO_DEEP, where)
    if isinstance(value, str):
        checked_text(value, Reason.CONTENT_NOT_TEXT, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(Reason.NOT_FINITE, f"{where}: {value}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_json(key, where, depth + 1)
            check_json(inner, where, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, where, depth + 1)


def load_json(text: str) -> Any:
    """Decode strict JSON: NaN and infinities are not allowed.

    Raises: ValueError, also for JSON that is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
