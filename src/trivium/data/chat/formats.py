"""Formats: parse a record into a `Conversation` or a `Document`, or reject it with a reason.

Supports OpenAI messages, ShareGPT, Alpaca, prompt with completion, and plain text, with the field names of the file's
`RecordLayout`. Worker processes import this module, so it stays free of heavy imports.
"""

from dataclasses import dataclass
from typing import Any

from trivium.data.chat.layout import RecordLayout
from trivium.data.chat.messages import Turn, check_json, checked_text, load_json, parse_message
from trivium.data.columns import FULL_WEIGHT
from trivium.data.rejects import Reason, RecordError, json_type

MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Conversation:
    """Messages in a valid order, ending with an answer, and the tools that the model may call."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """In the OpenAI format: {type: function, function: {name, description, parameters}}."""

    def messages(self) -> list[dict[str, Any]]:
        """The messages in the form that `apply_chat_template` takes."""
        return [turn.message() for turn in self.turns]


@dataclass(frozen=True)
class Document:
    """A text to train on without a chat template."""

    text: str


def parse(record: object, layout: RecordLayout) -> Conversation | Document:
    """Parse one record.

    Raises: RecordError with the reason when it cannot be used.
    """
    if not isinstance(record, dict):
        raise RecordError(Reason.NOT_OBJECT, f"found {json_type(record)}")
    if layout.format == "text":
        return parse_document(record, layout.text_field)
    for name in MEDIA_FIELDS:
        if record.get(name):
            raise RecordError(Reason.MEDIA, repr(name))
    turns = _from_list(record, layout) if layout.format in ("messages", "sharegpt") else _from_pair(record, layout)
    if (system := _optional(record, layout, "system")) is not None:
        turns.insert(0, Turn("system", checked_text(system, Reason.SYSTEM_NOT_TEXT, "system")))
    _check_order(turns)
    num_turns = max(index for index, turn in enumerate(turns, start=1) if turn.role == "assistant")
    return Conversation(tuple(turns[:num_turns]), _tools(record, layout))


def parse_document(record: dict[str, Any], name: str) -> Document:
    """The text in one field of a record.

    Raises: RecordError with the reason when it cannot be used.
    """
    if name not in record:
        raise _missing(record, name)
    if record[name] is None:
        raise RecordError(Reason.NULL, repr(name))
    text = checked_text(record[name], Reason.WRONG_TYPE, repr(name))
    if not text or text.isspace():
        raise RecordError(Reason.EMPTY)
    return Document(text)


def _missing(record: dict[str, Any], name: str) -> RecordError:
    return RecordError(Reason.NO_FIELD, f"no {name!r}; it has {', '.join(map(repr, list(record)[:8])) or 'no fields'}")


def _required(record: dict[str, Any], layout: RecordLayout, name: str) -> Any:
    found = layout.find(name, record)
    if found is None:
        raise _missing(record, " or ".join(layout.names(name)) or name)
    if record[found] is None:
        raise RecordError(Reason.NULL, repr(found))
    return record[found]


def _optional(record: dict[str, Any], layout: RecordLayout, name: str) -> Any:
    """Value of the field that holds `name`; None if it is missing or empty."""
    found = layout.find(name, record)
    return (record[found] if found is not None else None) or None


def _messages(messages: list[Any], layout: RecordLayout) -> list[Turn]:
    return [parse_message(message, number, layout) for number, message in enumerate(messages, start=1)]


def _from_list(record: dict[str, Any], layout: RecordLayout) -> list[Turn]:
    messages = _required(record, layout, "messages")
    if not isinstance(messages, list):
        raise RecordError(Reason.MESSAGES_NOT_LIST, json_type(messages))
    if not messages:
        raise RecordError(Reason.NO_MESSAGES)
    return _messages(messages, layout)


def _from_pair(record: dict[str, Any], layout: RecordLayout) -> list[Turn]:
    """Messages of the history, the question and the answer; the last two may be texts or lists of messages."""
    turns = _history(record, layout)
    prompt, extra = _optional(record, layout, "prompt"), _optional(record, layout, "input")
    if prompt is None and extra is None:
        prompt = _required(record, layout, "prompt")
    answer = _required(record, layout, "answer")
    if isinstance(prompt, list):
        turns += _messages(prompt, layout)
        prompt = None
    parts = [checked_text(part, Reason.PROMPT_NOT_TEXT, "prompt") for part in (prompt, extra) if part is not None]
    question = "\n".join(part for part in parts if part)
    if question.strip():
        turns.append(Turn("user", question))
    elif not turns:
        raise RecordError(Reason.EMPTY_QUESTION)
    if isinstance(answer, list):
        return turns + _messages(answer, layout)
    text = checked_text(answer, Reason.ANSWER_NOT_TEXT, "answer")
    if not text.strip():
        raise RecordError(Reason.EMPTY_ANSWER)
    return [*turns, Turn("assistant", text, weight=FULL_WEIGHT)]


def _history(record: dict[str, Any], layout: RecordLayout) -> list[Turn]:
    history = _optional(record, layout, "history") or []
    if not isinstance(history, list):
        raise RecordError(Reason.HISTORY_NOT_PAIRS, json_type(history))
    turns = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(Reason.HISTORY_NOT_PAIRS, f"entry {number}")
        question, answer = (checked_text(text, Reason.HISTORY_NOT_PAIRS, f"entry {number}") for text in pair)
        if not question.strip():
            raise RecordError(Reason.EMPTY_QUESTION, f"history, entry {number}")
        if not answer.strip():
            raise RecordError(Reason.EMPTY_ANSWER, f"history, entry {number}")
        turns += [Turn("user", question), Turn("assistant", answer, weight=FULL_WEIGHT)]
    return turns


def _tools(record: dict[str, Any], layout: RecordLayout) -> tuple[dict[str, Any], ...]:
    tools = _optional(record, layout, "tools")
    if isinstance(tools, str):
        try:
            tools = load_json(tools) if tools.strip() else None
        except ValueError as error:
            raise RecordError(Reason.TOOLS_NOT_LIST, str(error)) from None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise RecordError(Reason.TOOLS_NOT_LIST, json_type(tools))
    return tuple(_tool(tool, f"tool {number}") for number, tool in enumerate(tools, start=1))


def _tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RecordError(Reason.TOOL_NOT_OBJECT, f"{where} is {json_type(tool)}")
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    function = wrapped["function"]
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RecordError(Reason.TOOL_UNNAMED, where)
    check_json(wrapped, where)
    return wrapped


def _check_order(turns: list[Turn]) -> None:
    """Raises: RecordError when the roles are in an order that serving never produces, or no answer is trained on."""
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for index, turn in enumerate(turns):
        before = turns[index - 1] if index else None
        if turn.role == "system" and before is not None:
            reason = Reason.TWO_SYSTEMS if turns[0].role == "system" else Reason.SYSTEM_LATE
            raise RecordError(reason, f"turn {index + 1}")
        if turn.role == "assistant" and before is not None and before.role == "assistant":
            raise RecordError(Reason.TWO_ANSWERS, f"turns {index} and {index + 1}")
        if turn.role == "tool" and not (before and (before.tool_calls or before.role == "tool")):
            raise RecordError(Reason.RESULT_ALONE, f"turn {index + 1}")
    if not answers:
        raise RecordError(Reason.NO_ANSWER)
    if not any(turns[index].weight for index in answers):
        raise RecordError(Reason.UNTRAINED)
    if not any(turns[index].weight for index in answers if index > 0):
        raise RecordError(Reason.NOTHING_ASKED)
