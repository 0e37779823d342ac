"""Formats: conversations in every format, broken records with their reasons, and no record lost."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.broken_records import BROKEN_RECORDS, LONG_RECORD_BYTES, SHORT_SEQ_LEN
from trivium.config.inputs import Source
from trivium.data.chat.formats import Conversation, Document, parse
from trivium.data.chat.layout import RecordLayout, detect, from_dataset_info
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ChatEncoder
from trivium.data.rejects import Reason, RecordError, Reject
from trivium.data.source.records import Piece, Reading, read_records
from trivium.data.tokenizer import load_tokenizer, train_tokenizer
from trivium.errors import BadData, ConfigError

SYSTEM = Turn("system", "Be brief.")
ASK = Turn("user", "How warm\nis it in Oslo?")
REPLY = Turn("assistant", "Four degrees.", weight=100)
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"place": "Oslo", "digits": 1}}}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}

READING = Reading("text", "file", LONG_RECORD_BYTES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte")
    train_tokenizer(iter(["a"]), "byte", 259, folder)
    return ChatEncoder(load_tokenizer(folder), SHORT_SEQ_LEN)


def outcome(line, layout, encoder):
    """The reason one line of a file is rejected for; None when it is kept."""
    (record,) = read_records([Piece("f", "json", 1, line, None, layout)], READING)
    if isinstance(record.content, Reject):
        return record.content.reason
    try:
        if isinstance(record.content, Conversation):
            assert encoder.encode(record.content).samples
        return None
    except RecordError as error:
        return error.reason


@pytest.mark.parametrize(("form", "line", "reason"), BROKEN_RECORDS)
def test_parse_rejects_broken_records_with_the_reason(form, line, reason, encoder):
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    assert outcome(data, RecordLayout(form), encoder) == reason


def test_broken_records_cover_every_reason():
    readers_own = {Reason.UTF16}  # of a file, not of a record
    templates_own = {Reason.TEMPLATE}  # tests/data/test_chat.py
    assert {reason for _, _, reason in BROKEN_RECORDS} == set(Reason) - readers_own - templates_own
    assert len(set(Reason)) >= 36


def both(role_field, content_field, *pairs, **more):
    return [{role_field: role, content_field: content, **more} for role, content in pairs]


SPOKEN = [("system", "Be brief."), ("user", "How warm\nis it in Oslo?"), ("assistant", "Four degrees.")]
SHARED = [("system", "Be brief."), ("human", "How warm\nis it in Oslo?"), ("gpt", "Four degrees.")]


@pytest.mark.parametrize(
    ("record", "form", "fields", "roles"),
    [
        ({"messages": both("role", "content", *SPOKEN)}, "messages", {}, {}),
        ({"messages": both("role", "content", *SPOKEN[1:]), "system": "Be brief."}, "messages", {}, {}),
        ({"messages": both("role", "content", *SPOKEN, train=None, tool_calls=None)}, "messages", {}, {}),
        ({"messages": both("role", "content", *SPOKEN, ("user", "Thanks."))}, "messages", {}, {}),
        ({"conversations": both("from", "value", *SHARED)}, "sharegpt", {}, {}),
        ({"conversations": both("role", "content", *SPOKEN)}, "sharegpt", {}, {}),
        ({"conversations": both("from", "value", *SHARED[1:]), "system": "Be brief."}, "sharegpt", {}, {}),
        (
            {"instruction": "How warm\nis it in Oslo?", "output": "Four degrees.", "system": "Be brief."},
            "alpaca",
            {},
            {},
        ),
        (
            {"instruction": "How warm", "input": "is it in Oslo?", "output": "Four degrees.", "system": "Be brief."},
            "alpaca",
            {},
            {},
        ),
        (
            {"prompt": both("role", "content", *SPOKEN[:2]), "completion": both("role", "content", SPOKEN[2])},
            "prompt",
            {},
            {},
        ),
        (
            {"prompt": "How warm\nis it in Oslo?", "response": "Four degrees.", "system": "Be brief."},
            "prompt",
            {},
            {},
        ),
        (
            {"q": "How warm\nis it in Oslo?", "a": "Four degrees.", "s": "Be brief.", "text": "unused"},
            "alpaca",
            {"prompt": "q", "answer": "a", "system": "s"},
            {},
        ),
        (
            {"talk": both("who", "what", *SPOKEN[:1], ("Mensch", SPOKEN[1][1]), ("KI", SPOKEN[2][1]))},
            "messages",
            {"messages": "talk", "role": "who", "content": "what"},
            {"Mensch": "user", "KI": "assistant"},
        ),
    ],
)
def test_parse_reads_one_conversation_in_every_format(record, form, fields, roles):
    layout = detect([{"broken": 1}, record, record], RecordLayout("auto", fields, roles), "a.jsonl")
    assert layout == RecordLayout(form, fields, roles)
    assert json.loads(json.dumps(asdict(layout))) == asdict(layout)
    assert parse(record, layout) == Conversation((SYSTEM, ASK, REPLY))


def message_of_calls(**changed):
    return [
        {"role": "user", "content": ASK.content},
        {"role": "assistant", "content": None, "tool_calls": [CALL], **changed},
        {"role": "tool", "content": "4.0"},
        {"role": "assistant", "content": "Four degrees."},
    ]


CALLED_VALUE = json.dumps({"name": "warmth", "arguments": json.dumps(CALL["function"]["arguments"])})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": message_of_calls(), "tools": [TOOL]},
        {"messages": message_of_calls(), "tools": json.dumps([TOOL["function"]])},
        {"messages": message_of_calls(content="", tool_calls=[{"id": "7", **CALL}]), "tools": [TOOL["function"]]},
        {"messages": message_of_calls(tool_calls=[json.loads(CALLED_VALUE)]), "tools": [TOOL]},
        {"messages": message_of_calls(tool_calls=None, function_call=json.loads(CALLED_VALUE)), "tools": [TOOL]},
        {
            "conversations": both(
                "from",
                "value",
                ("human", ASK.content),
                ("function_call", CALLED_VALUE),
                ("observation", "4.0"),
                ("gpt", "Four degrees."),
            ),
            "tools": json.dumps([TOOL]),
        },
    ],
)
def test_parse_reads_tools_and_calls_in_every_format(record):
    called = Turn("assistant", "", tool_calls=(CALL,), weight=100)
    expected = Conversation((ASK, called, Turn("tool", "4.0"), REPLY), (TOOL,))
    found = parse(record, detect([record], RecordLayout("auto"), "a.jsonl"))
    assert found == expected
    assert found.messages()[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train": False}, Turn("assistant", "a", weight=0)),
        ({"train": True}, Turn("assistant", "a", weight=100)),
        ({"weight": 0}, Turn("assistant", "a", weight=0)),
        ({"weight": 0.333}, Turn("assistant", "a", weight=33)),
        ({"weight": 2.55}, Turn("assistant", "a", weight=255)),
        ({"reasoning": "So."}, Turn("assistant", "a", "So.", weight=100)),
        ({"thinking": "So.", "reasoning_content": None}, Turn("assistant", "a", "So.", weight=100)),
        ({"reasoning_content": " \n"}, Turn("assistant", "a", weight=100)),
        ({"content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]}, Turn("assistant", "a\nb\nc", weight=100)),
        ({"content": " a\n"}, Turn("assistant", " a\n", weight=100)),
        (
            {"tool_calls": [{"name": "look", "arguments": ""}]},
            Turn(
                "assistant",
                "a",
                tool_calls=({"type": "function", "function": {"name": "look", "arguments": {}}},),
                weight=100,
            ),
        ),
    ],
)
def test_parse_reads_train_weight_and_reasoning(changed, expected):
    record = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "a", **changed},
            {"role": "ipython" if "tool_calls" in changed else "user", "content": "y"},
            {"role": "assistant", "content": "b"},
        ]
    }
    found = parse(record, RecordLayout("messages"))
    assert found.turns[1] == expected
    assert found.turns[1].thinks == (expected.reasoning is not None)


def test_thinks_finds_reasoning_inside_the_content():
    assert Turn("assistant", "<think>\nSo.\n</think>\n\na").thinks
    assert not Turn("assistant", "<think>\n\n</think>\n\na").thinks


def test_parse_supervises_the_history():
    record = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    turns = [
        Turn("user", "a"),
        Turn("assistant", "b", weight=100),
        Turn("user", "c"),
        Turn("assistant", "d", weight=100),
    ]
    assert parse(record, RecordLayout("alpaca")) == Conversation(tuple(turns))


def test_parse_reads_plain_text_as_a_document():
    layout = detect([{"text": "a"}, {"text": "b", "id": 1}], RecordLayout("auto"), "a.jsonl")
    assert parse({"text": "a"}, layout) == Document("a")
    assert detect([{"body": "a"}], RecordLayout("auto", text_field="body"), "a.jsonl").format == "text"
    record = {"text": "a", "messages": [{"role": "user", "content": "x"}]}
    assert detect([record], RecordLayout("auto"), "a.jsonl").format == "messages"


def test_detect_refuses_no_or_two_matching_formats():
    with pytest.raises(BadData, match=r"a\.jsonl: .*'question', 'reply'.*fields`, for example"):
        detect([{"question": "a", "reply": "b"}], RecordLayout("auto"), "a.jsonl")
    with pytest.raises(BadData, match=r"\(none\)"):
        detect([7], RecordLayout("auto"), "a.jsonl")
    with pytest.raises(BadData, match="`format` to text, alpaca or prompt"):
        detect([{"instruction": "a", "output": "b", "text": "a b"}], RecordLayout("auto"), "a.jsonl")


DATASET_INFO = {
    "plain": {"file_name": "rows/plain.json"},
    "columns": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}},
    "talks": {
        "hf_hub_url": "someone/talks",
        "ms_hub_url": "other/talks",
        "subset": "short",
        "split": "test",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "first"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "I", "assistant_tag": "you"},
    },
    "usual": {"file_name": "b.jsonl", "formatting": "sharegpt", "ranking": False},
    "openai": {"file_name": "c.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
    "texts": {"file_name": "d.jsonl", "columns": {"prompt": "body"}},
    "preferences": {"file_name": "a.json", "ranking": True},
    "pictures": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "misspelt": {"file_name": "a.json", "colums": {"prompt": "q"}},
    "mistagged": {"file_name": "a.json", "formatting": "sharegpt", "tags": {"role": "who"}},
    "some": {"file_name": "a.json", "num_samples": 10},
    "elsewhere": {"ms_hub_url": "other/talks"},
    "strange": {"file_name": "a.json", "formatting": "chatml"},
}


@pytest.fixture
def info(tmp_path):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(DATASET_INFO))
    return path


def described(info, name):
    return from_dataset_info(Source(path=str(info), dataset=name))


def test_dataset_info_of_questions(info):
    source, layout = described(info, "plain")
    assert (source.path, source.hub, source.dataset) == (str(info.parent / "rows/plain.json"), None, None)
    record = {"instruction": "a", "input": "b", "output": "c", "system": "not named, so not read"}
    assert parse(record, layout) == Conversation((Turn("user", "a\nb"), Turn("assistant", "c", weight=100)))
    _, layout = described(info.parent, "columns")
    record = {"q": "a", "input": "not named, so not read", "a": "c"}
    assert parse(record, layout) == Conversation((Turn("user", "a"), Turn("assistant", "c", weight=100)))
    source, layout = described(info, "texts")
    assert (source.format, source.field, layout) == ("text", "body", None)


def test_dataset_info_of_conversations(info):
    source, layout = described(info, "talks")
    assert (source.path, source.hub, source.subset, source.split) == (None, "someone/talks", "short", "test")
    record = {"first": "Be brief.", "talk": both("who", "what", ("I", ASK.content), ("you", REPLY.content))}
    assert parse(record, layout) == Conversation((SYSTEM, ASK, REPLY))
    _, layout = described(info, "usual")
    assert parse({"conversations": both("from", "value", *SHARED)}, layout) == Conversation((SYSTEM, ASK, REPLY))
    _, layout = described(info, "openai")
    assert parse({"messages": both("role", "content", *SPOKEN)}, layout) == Conversation((SYSTEM, ASK, REPLY))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", "has no dataset 'nowhere'"),
        ("preferences", "key ranking is not supported"),
        ("pictures", "column images is not supported"),
        ("misspelt", "key colums is not supported"),
        ("mistagged", "tag role is not supported"),
        ("some", "key num_samples is not supported"),
        ("elsewhere", "neither file_name nor hf_hub_url"),
        ("strange", "formatting is 'chatml'"),
    ],
)
def test_dataset_info_with_unsupported_settings_is_refused(info, name, expected):
    with pytest.raises(ConfigError, match=expected):
        described(info, name)


def test_dataset_info_that_cannot_be_read_is_refused(info):
    for content in ("[1]", "{", '{"plain": 7}'):
        info.write_text(content)
        with pytest.raises(ConfigError):
            described(info, "plain")
    with pytest.raises(ConfigError, match="cannot be read"):
        described(info.parent / "nowhere.json", "plain")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
ODD = st.sampled_from(["a", "", None, 1, True, [], {}, '{"a": 1}', "\ud800", [{"text": "b"}], {"name": "f"}]) | JSON
ROLE = st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool", "function_call", "Mensch", None])
CALLS = st.lists(st.fixed_dictionaries({}, optional={"name": ODD, "arguments": ODD, "function": ODD}) | ODD, max_size=2)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": st.sampled_from(["Why?", "Because."]) | ODD},
    optional={"tool_calls": CALLS | ODD, "train": ODD, "weight": ODD, "reasoning": ODD, "function_call": ODD},
)
MESSAGES = st.lists(MESSAGE | ODD, max_size=5) | ODD
RECORD = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations", "prompt", "completion"), MESSAGES),
        **dict.fromkeys(("instruction", "input", "output", "system", "history", "tools", "text"), ODD),
    },
)
FORMATS = ["messages", "sharegpt", "alpaca", "prompt", "text"]


@settings(max_examples=250)
@given(record=RECORD | JSON, form=st.sampled_from(FORMATS))
def test_parse_keeps_or_rejects_any_record(encoder, record, form):
    try:
        content = parse(record, RecordLayout(form))
    except RecordError:
        return
    if isinstance(content, Conversation):
        assert content.turns[-1].role == "assistant" and any(turn.weight for turn in content.turns)
        try:
            assert encoder.encode(content).samples
        except RecordError as error:
            assert error.reason in (Reason.LONGER_THAN_SEQ_LEN, Reason.CONTROL_TOKEN)


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()
LINE = RECORD.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20) | st.just(GOOD)


@settings(max_examples=100)
@given(st.lists(LINE, max_size=8))
def test_read_records_keeps_or_rejects_any_line(encoder, lines):
    lines = [GOOD, *(line.replace(b"\n", b"") for line in lines)]
    layout, num_kept, num_refused = RecordLayout("messages"), 0, 0
    for record in read_records([Piece("f", "json", 1, b"\n".join(lines), None, layout)], READING):
        rejected = isinstance(record.content, Reject)
        found = record.content.reason if rejected else outcome(lines[record.line - 1], layout, encoder)
        num_kept += found is None
        num_refused += found is not None
    assert num_kept >= lines.count(GOOD)
    assert num_kept + num_refused == sum(1 for line in lines if line and not line.isspace())


def test_worker_processes_import_nothing_heavy_for_formats():
    heavy = "{'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    script = f"import sys, trivium.data.chat.formats; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", script], check=True)
