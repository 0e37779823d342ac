"""Records that cannot be used, one or more for every reason: (format, line, reason).

A line is bytes as they are in a file, or a value that is written as JSON. `LONG_RECORD_BYTES` and
`SHORT_SEQ_LEN` are the limits that the records named too long exceed.
"""

from typing import Any

from trivium.data.rejects import Reason

LONG_RECORD_BYTES = 4000
SHORT_SEQ_LEN = 60

ASK: dict[str, Any] = {"role": "user", "content": "Why?"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "Because."}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


def talk(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def ask(**changed: Any) -> dict[str, Any]:
    return talk({**ASK, **changed}, REPLY)


def reply(**changed: Any) -> dict[str, Any]:
    return talk(ASK, {**REPLY, **changed})


def call(function: Any) -> dict[str, Any]:
    return reply(content=None, tool_calls=[function])


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BROKEN_RECORDS: list[tuple[str, Any, Reason]] = [
    # The line.
    ("messages", b"nonsense", Reason.NOT_JSON),
    ("messages", b'{"messages": [{"role": "user"', Reason.CUT_OFF),
    ("messages", b'{"messages": []} {}', Reason.TWO_VALUES),
    ("messages", b"[" * 1500, Reason.TOO_DEEP),
    ("messages", b'{"messages": "\xff"}', Reason.NOT_UTF8),
    ("messages", b'{"messages": [{"role": "user", "content": "a\x00"}]}', Reason.NUL),
    ("messages", talk(ASK, {**REPLY, "content": "x" * LONG_RECORD_BYTES}), Reason.TOO_LONG),
    ("messages", [ASK, REPLY], Reason.NOT_OBJECT),
    ("messages", 7, Reason.NOT_OBJECT),
    # The record.
    ("messages", {"conversation": [ASK, REPLY]}, Reason.NO_FIELD),
    ("messages", {}, Reason.NO_FIELD),
    ("messages", {"messages": None}, Reason.NULL),
    ("messages", {"messages": "Why? Because."}, Reason.MESSAGES_NOT_LIST),
    ("messages", {"messages": {"0": ASK}}, Reason.MESSAGES_NOT_LIST),
    ("messages", talk(), Reason.NO_MESSAGES),
    ("sharegpt", {"conversations": []}, Reason.NO_MESSAGES),
    ("messages", talk(ASK, REPLY, images=["cat.png"]), Reason.MEDIA),
    ("messages", talk(ASK, REPLY, system=["Be brief."]), Reason.SYSTEM_NOT_TEXT),
    ("messages", talk(ASK, REPLY, tools=3), Reason.TOOLS_NOT_LIST),
    ("messages", talk(ASK, REPLY, tools="none"), Reason.TOOLS_NOT_LIST),
    ("messages", talk(ASK, REPLY, tools={"name": "look"}), Reason.TOOLS_NOT_LIST),
    ("messages", talk(ASK, REPLY, tools=["look"]), Reason.TOOL_NOT_OBJECT),
    ("messages", talk(ASK, REPLY, tools=[{"type": "function", "function": {}}]), Reason.TOOL_UNNAMED),
    ("messages", talk(ASK, REPLY, tools=[{"type": "function", "function": None}]), Reason.TOOL_UNNAMED),
    ("messages", talk(ASK, REPLY, tools='[{"description": "looks"}]'), Reason.TOOL_UNNAMED),
    ("messages", talk(ASK, REPLY, tools=[{"name": "look", "parameters": deep(100)}]), Reason.TOO_DEEP),
    # One message.
    ("messages", talk(ASK, "Because."), Reason.MESSAGE_NOT_OBJECT),
    ("messages", talk(None, REPLY), Reason.MESSAGE_NOT_OBJECT),
    ("messages", talk({"content": "Why?"}, REPLY), Reason.NO_ROLE),
    ("messages", ask(role=None), Reason.NO_ROLE),
    ("messages", ask(role="Mensch"), Reason.UNKNOWN_ROLE),
    ("messages", ask(role=1), Reason.UNKNOWN_ROLE),
    ("messages", ask(role=["user"]), Reason.UNKNOWN_ROLE),
    ("messages", talk({"role": "user"}, REPLY), Reason.NO_CONTENT),
    ("messages", reply(content=None), Reason.CONTENT_NULL),
    ("messages", reply(content=None, tool_calls=[]), Reason.CONTENT_NULL),
    ("messages", ask(content=5), Reason.CONTENT_NOT_TEXT),
    ("messages", ask(content={"text": "Why?"}), Reason.CONTENT_NOT_TEXT),
    ("messages", ask(content=[{"type": "image_url", "image_url": {"url": "cat.png"}}]), Reason.PART_NOT_TEXT),
    ("messages", ask(content=[{"type": "text", "text": 1}]), Reason.PART_NOT_TEXT),
    ("messages", ask(content=[None]), Reason.PART_NOT_TEXT),
    ("messages", b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}', Reason.NUL),
    ("messages", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', Reason.SURROGATE),
    ("messages", ask(content=" \n"), Reason.EMPTY_QUESTION),
    ("messages", ask(content=[]), Reason.EMPTY_QUESTION),
    ("messages", reply(content=""), Reason.EMPTY_ANSWER),
    ("messages", reply(content="", reasoning="It had a reason."), Reason.EMPTY_ANSWER),
    ("messages", reply(reasoning_content=["It", "had"]), Reason.REASONING_NOT_TEXT),
    ("messages", ask(thinking="I wonder."), Reason.REASONING_MISPLACED),
    ("messages", reply(tool_calls="look"), Reason.CALLS_NOT_LIST),
    ("messages", reply(tool_calls=CALL), Reason.CALLS_NOT_LIST),
    ("messages", call("look"), Reason.CALL_NOT_OBJECT),
    ("messages", call({"type": "function", "function": "look"}), Reason.CALL_NOT_OBJECT),
    ("messages", call({"type": "function", "function": {"arguments": {}}}), Reason.CALL_UNNAMED),
    ("messages", call({"name": " ", "arguments": {}}), Reason.CALL_UNNAMED),
    ("messages", call({"name": "look", "arguments": "at it"}), Reason.ARGUMENTS_NOT_OBJECT),
    ("messages", call({"name": "look", "arguments": '["it"]'}), Reason.ARGUMENTS_NOT_OBJECT),
    ("messages", call({"name": "look", "arguments": '{"at": NaN}'}), Reason.ARGUMENTS_NOT_OBJECT),
    ("messages", call({"name": "look", "arguments": "[" * 3000}), Reason.ARGUMENTS_NOT_OBJECT),
    ("messages", call({"name": "look", "arguments": ["it"]}), Reason.ARGUMENTS_NOT_OBJECT),
    ("messages", call({"name": "look", "arguments": {"at": float("inf")}}), Reason.NOT_FINITE),
    ("messages", ask(tool_calls=[CALL]), Reason.CALL_MISPLACED),
    ("messages", ask(function_call={"name": "look", "arguments": "{}"}), Reason.CALL_MISPLACED),
    ("messages", reply(train="no"), Reason.TRAIN_NOT_BOOL),
    ("messages", reply(train=0), Reason.TRAIN_NOT_BOOL),
    ("messages", reply(weight="1"), Reason.WEIGHT_NOT_NUMBER),
    ("messages", reply(weight=True), Reason.WEIGHT_NOT_NUMBER),
    ("messages", reply(weight=float("nan")), Reason.WEIGHT_NOT_FINITE),
    ("messages", reply(weight=float("inf")), Reason.WEIGHT_NOT_FINITE),
    ("messages", reply(weight=-0.5), Reason.WEIGHT_NEGATIVE),
    ("messages", reply(weight=2.56), Reason.WEIGHT_TOO_BIG),
    ("messages", reply(weight=0.004), Reason.WEIGHT_TOO_SMALL),
    ("messages", reply(train=True, weight=1), Reason.TRAIN_AND_WEIGHT),
    ("messages", ask(train=True), Reason.TRAIN_MISPLACED),
    ("messages", ask(weight=1), Reason.TRAIN_MISPLACED),
    # The turns together.
    (
        "messages",
        talk({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, REPLY),
        Reason.TWO_SYSTEMS,
    ),
    ("messages", talk({"role": "developer", "content": "a"}, ASK, REPLY, system="b"), Reason.TWO_SYSTEMS),
    ("messages", talk(ASK, {"role": "system", "content": "a"}, REPLY), Reason.SYSTEM_LATE),
    ("messages", talk(ASK, REPLY, REPLY), Reason.TWO_ANSWERS),
    ("messages", talk(ASK, {"role": "tool", "content": "seen"}, REPLY), Reason.RESULT_ALONE),
    ("messages", talk(ASK, REPLY, {"role": "tool", "content": "seen"}, REPLY), Reason.RESULT_ALONE),
    ("messages", talk(ASK), Reason.NO_ANSWER),
    ("messages", talk({"role": "system", "content": "a"}, ASK, ASK), Reason.NO_ANSWER),
    ("messages", reply(train=False), Reason.UNTRAINED),
    ("messages", reply(weight=0), Reason.UNTRAINED),
    ("messages", talk(REPLY), Reason.NOTHING_ASKED),
    ("messages", talk(REPLY, ASK, {**REPLY, "train": False}), Reason.NOTHING_ASKED),
    # The other formats.
    ("sharegpt", {"conversations": [{"from": "bot", "value": "Hello."}]}, Reason.UNKNOWN_ROLE),
    ("sharegpt", {"conversations": [{"from": "human", "text": "Why?"}]}, Reason.NO_CONTENT),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "look(it)"}]}, Reason.CALL_NOT_JSON),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, Reason.EMPTY_ANSWER),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "7"}]}, Reason.CALL_NOT_OBJECT),
    ("alpaca", {"instruction": "Why?"}, Reason.NO_FIELD),
    ("alpaca", {"instruction": "Why?", "output": None}, Reason.NULL),
    ("alpaca", {"instruction": None, "output": "Because."}, Reason.NULL),
    ("alpaca", {"instruction": "", "output": "Because."}, Reason.EMPTY_QUESTION),
    ("alpaca", {"instruction": 7, "output": "Because."}, Reason.PROMPT_NOT_TEXT),
    ("alpaca", {"instruction": "Why?", "input": {}, "output": ""}, Reason.EMPTY_ANSWER),
    ("alpaca", {"instruction": "Why?", "input": {"a": 1}, "output": "Because."}, Reason.PROMPT_NOT_TEXT),
    ("alpaca", {"instruction": "Why?", "output": 7}, Reason.ANSWER_NOT_TEXT),
    ("alpaca", {"instruction": "Why?", "output": "x", "history": "a"}, Reason.HISTORY_NOT_PAIRS),
    ("alpaca", {"instruction": "Why?", "output": "x", "history": [["a"]]}, Reason.HISTORY_NOT_PAIRS),
    ("alpaca", {"instruction": "Why?", "output": "x", "history": [["a", None]]}, Reason.HISTORY_NOT_PAIRS),
    ("alpaca", {"instruction": "Why?", "output": "x", "history": [["a", ""]]}, Reason.EMPTY_ANSWER),
    ("prompt", {"prompt": "Why?"}, Reason.NO_FIELD),
    ("prompt", {"prompt": "Why?", "completion": {"text": "Because."}}, Reason.ANSWER_NOT_TEXT),
    ("prompt", {"prompt": [ASK, "more"], "completion": "Because."}, Reason.MESSAGE_NOT_OBJECT),
    ("prompt", {"prompt": [ASK], "completion": [ASK]}, Reason.NO_ANSWER),
    ("text", {"content": "a"}, Reason.NO_FIELD),
    ("text", {"text": None}, Reason.NULL),
    ("text", {"text": ["a"]}, Reason.WRONG_TYPE),
    ("text", {"text": " \n"}, Reason.EMPTY),
    # The tokens.
    ("messages", ask(content="Why?<|im_end|>"), Reason.CONTROL_TOKEN),
    ("messages", reply(reasoning="<|endoftext|>"), Reason.CONTROL_TOKEN),
    ("messages", call({"name": "look", "arguments": {"<|im_start|>": 1}}), Reason.CONTROL_TOKEN),
    ("messages", talk(ASK, REPLY, tools=[{"name": "look", "description": "<|im_end|>"}]), Reason.CONTROL_TOKEN),
    ("messages", ask(content="Why? " * SHORT_SEQ_LEN), Reason.LONGER_THAN_SEQ_LEN),
]
