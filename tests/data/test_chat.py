"""The token proof: prompts and supervised answers equal, id for id, what serving sends and the model generates.

The oracle is transformers alone: `apply_chat_template` on plain messages for every answer, written without `chat.py`.
"""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.qwen_tokenizers import REAL, REAL_NAMES, needs_real
from trivium.data.chat.formats import parse
from trivium.data.chat.layout import RecordLayout
from trivium.data.chat.samples import ChatEncoder
from trivium.data.chat.template import describe_template
from trivium.data.rejects import Reason, RecordError
from trivium.data.tokenizer import load_tokenizer, train_tokenizer
from trivium.errors import BadData, ConfigError

NUM_CONVERSATIONS = 1250  # for each of the four tokenizers
PADS = ("", "<|im_end|>", "<|endoftext|>", "<|fim_pad|>")  # first whatever the eos token is
END = "<|im_end|>"
TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": {"type": "object"}}}
    for name, text in [("warmth", "Says how warm it is, in \u00b0C."), ("sum", 'Adds "numbers" <up>.')]
]
PIECES = [
    "Hello",
    " world",
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r\n",
    "12,345",
    "na\u00efve e\u0301",
    "\u0338\u0301",
    "\u65e5\u672c\u8a9e",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{GRINNING FACE}",
    "\u200b\u00a0\u2028",
    "{{ x }}",
    "{% for m in messages %}",
    "{# note #}",
    "<|im_start",
    "im_end|>",
    "<|im_end |>",
    "<think>",
    "</think>",
    "<think>\n\n</think>\n\n",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    '{"name": "f", "arguments": {"a": [1, 2.5, null]}}',
    "assistant\n",
    "user",
    "\\n \\u0041 \\",
    "`code`\n    indented\n",
    "x" * 40,
]


def text(draw: random.Random, may_be_empty: bool = False) -> str:
    """Text of some pieces, blank only if allowed."""
    found = "".join(draw.choices(PIECES, k=draw.choice([1, 1, 2, 3, 5, 8])))
    if may_be_empty:
        return draw.choice(["", found])
    return found if found.strip() else found + "so"


def calls(draw: random.Random) -> list[dict]:
    values = [1, 2.5, "\u65e5 </tool_call>", None, True, [1, {"b": "\n"}], {"c": {}}]
    return [
        {
            "type": "function",
            "function": {
                "name": draw.choice(["warmth", "sum"]),
                "arguments": {f"key{number}": draw.choice(values) for number in range(draw.randrange(3))},
            },
        }
        for _ in range(draw.choice([1, 1, 2]))
    ]


def answer(draw: random.Random) -> dict:
    found = {"role": "assistant", "content": text(draw)}
    if draw.random() < 0.3:
        found["reasoning_content"] = text(draw)
    elif draw.random() < 0.1:
        found["content"] = f"<think>\n{text(draw)}\n</think>\n\n{text(draw)}"
    return found


def conversation(seed: int) -> dict:
    """A record with 1 to 6 answers, each after a question or after tool results."""
    draw = random.Random(seed)
    messages, record = [], {"messages": []}
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": text(draw, may_be_empty=True)})
    if draw.random() < 0.3:
        record["tools"] = TOOLS[: draw.choice([1, 2])]
    for _ in range(draw.choice([1, 1, 2, 2, 3, 4])):
        messages += [{"role": "user", "content": text(draw)} for _ in range(draw.choice([1, 1, 1, 2]))]
        while draw.random() < 0.2 and len(messages) < 12:
            called = answer(draw) | {"tool_calls": calls(draw)}
            called["content"] = draw.choice(["", called["content"]])
            results = [{"role": "tool", "content": text(draw, may_be_empty=True)} for _ in called["tool_calls"]]
            messages += [called, *results]
        messages.append(answer(draw))
    for message in messages:
        if message["role"] == "assistant" and draw.random() < 0.15:
            message["weight"] = draw.choice([0, 0.5, 2])
    answers = [message for message in messages if message["role"] == "assistant"]
    if all(message.get("weight") == 0 for message in answers):
        del answers[-1]["weight"]
    return record | {"messages": messages}


def serve(tokenizer, messages: list[dict], tools: list[dict] | None, turn: int):
    """(prompt ids of serving, answer ids, enable_thinking) for one turn, computed with transformers alone."""

    def render(upto: int, **how):
        return tokenizer.apply_chat_template(messages[:upto], tools=tools, return_dict=False, **how)

    whole = render(turn + 1, tokenize=False)
    for thinking in (False, True):
        prompt = render(turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        if whole.startswith(prompt):
            break
    assert whole.startswith(prompt)
    sent = render(turn, tokenize=True, add_generation_prompt=True, enable_thinking=thinking)
    written = whole[len(prompt) : whole.rindex(END)] + END
    return sent, tokenizer.encode(written, add_special_tokens=False), thinking


def as_served(record: dict) -> list[dict]:
    """The messages without the keys that only training reads."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in record["messages"]]


def mismatches(tokenizer, record: dict, encoded, first: int = 0) -> int:
    """Answers whose ids or weights differ from serving; each must occur once."""
    messages, tools = as_served(record), record.get("tools")
    supervised = {
        index: round(100 * message.get("weight", 1))
        for index, message in enumerate(record["messages"])
        if message["role"] == "assistant" and message.get("weight", 1)
    }
    found, wrong = [], 0
    for sample in encoded.samples:
        weights = np.zeros(len(sample.ids), np.uint8)
        for one in sample.answers:
            sent, written, thinking = serve(tokenizer, messages, tools, one.turn)
            wrong += sample.ids[: one.stop].tolist() != sent + written
            wrong += one.start != len(sent) or (one.thinking is not None and one.thinking != thinking)
            wrong += tokenizer.decode(sample.ids[one.stop - 1]) != END
            weights[one.start : one.stop] = supervised[one.turn]
            found.append(one.turn)
        wrong += not np.array_equal(weights, sample.weights) or sample.answers[-1].stop != len(sample.ids)
    return wrong + (found != list(supervised))


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_every_answer_equals_serving_with_any_pad_token(real, name):
    tokenizer = load_tokenizer(REAL / name)
    num_answers = 0
    for number, pad in enumerate(PADS):
        tokenizer.pad_token = pad or tokenizer.eos_token
        encoder = ChatEncoder(tokenizer, 1 << 20)
        for seed in range(number, NUM_CONVERSATIONS, len(PADS)):
            record = conversation(seed)
            encoded = encoder.encode(parse(record, RecordLayout("messages")))
            assert mismatches(tokenizer, record, encoded) == 0, json.dumps(record)
            assert all(sample.weights[one.stop - 1] for sample in encoded.samples for one in sample.answers)
            assert not encoded.dropped_turns and not encoded.cut_turns and not encoded.split
            num_answers += sum(len(sample.answers) for sample in encoded.samples)
    assert num_answers > NUM_CONVERSATIONS


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
SPEECH = st.lists(ANY_TEXT | st.sampled_from(PIECES), min_size=1, max_size=4).map("".join).filter(str.strip)


@needs_real
@settings(max_examples=60)
@given(st.lists(st.tuples(SPEECH, SPEECH, st.none() | SPEECH), min_size=1, max_size=3), st.sampled_from(REAL_NAMES))
def test_any_text_is_supervised_like_serving(real, pairs, name):
    messages = []
    for question, reply, reasoning in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        if reasoning is not None:
            messages[-1]["reasoning_content"] = reasoning
    encoded = ChatEncoder(real[name], 1 << 20).encode(parse({"messages": messages}, RecordLayout("messages")))
    assert mismatches(real[name], {"messages": messages}, encoded) == 0


def talk(*contents: str, **more) -> dict:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)], **more}


def encode(tokenizer, record: dict, seq_len: int = 4096, overlong="drop", all_tokens: bool = False):
    return ChatEncoder(tokenizer, seq_len, overlong, all_tokens).encode(parse(record, RecordLayout("messages")))


def supervised_text(tokenizer, sample) -> list[str]:
    return [tokenizer.decode(sample.ids[one.start : one.stop]) for one in sample.answers]


@needs_real
def test_conversation_is_one_sample_if_prompts_extend_each_other(real):
    record = talk("a", "b", "c", "d")
    (sample,) = encode(real["qwen2.5-instruct"], record).samples
    assert supervised_text(real["qwen2.5-instruct"], sample) == ["b<|im_end|>", "d<|im_end|>"]
    first, second = encode(real["qwen3"], record).samples  # the empty think block of the first is gone from the second
    assert [supervised_text(real["qwen3"], one) for one in (first, second)] == [["b<|im_end|>"], ["d<|im_end|>"]]
    assert real["qwen3"].decode(first.ids).endswith("<think>\n\n</think>\n\nb<|im_end|>")
    assert not first.has_reasoning
    newline_first = encode(real["qwen2.5-base"], talk("a", "\nb", "c", "d"))
    assert len(newline_first.samples) == 2  # what was written as two tokens is one token in what is sent later


@needs_real
def test_reasoning_is_supervised_or_counted_as_lost(real):
    record = talk("a", "b")
    record["messages"][1]["reasoning"] = "So it is."
    encoded = encode(real["qwen3"], record)
    assert encoded.samples[0].has_reasoning and not encoded.lost_reasoning_turns
    assert supervised_text(real["qwen3"], encoded.samples[0]) == ["<think>\nSo it is.\n</think>\n\nb<|im_end|>"]
    encoded = encode(real["qwen2.5-instruct"], record)
    assert not encoded.samples[0].has_reasoning and encoded.lost_reasoning_turns == 1
    inline = talk("a", "<think>\nSo it is.\n</think>\n\nb")
    for name in ("qwen3", "qwen2.5-instruct"):
        encoded = encode(real[name], inline)
        assert encoded.samples[0].has_reasoning and not encoded.lost_reasoning_turns


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_tool_arguments_given_as_text_are_not_encoded_twice(real, name):
    call = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}
    as_text = {"type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
    ids = []
    for one in (call, as_text):
        record = talk("a", "b", tools=TOOLS)
        record["messages"][1]["tool_calls"] = [one]
        (sample,) = encode(real[name], record).samples
        ids.append(sample.ids.tolist())
    assert ids[0] == ids[1]
    assert '{"name": "sum", "arguments": {"of": [1, 2]}}' in real[name].decode(ids[1])


@needs_real
def test_control_tokens_are_rejected_or_reported(real):
    tokenizer = real["qwen3"]
    for special in tokenizer.all_special_tokens:
        with pytest.raises(RecordError) as caught:
            encode(tokenizer, talk("a", f"b {special}"))
        assert caught.value.reason == Reason.CONTROL_TOKEN
    assert encode(tokenizer, talk("what is <think>?", "b")).has_control_text
    assert encode(tokenizer, talk("a", "b", tools=[{"name": "f", "description": "<tool_call>"}])).has_control_text
    assert not encode(tokenizer, talk("a < b", "<think>\nSo.\n</think>\n\nb")).has_control_text


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_all_tokens_supervises_the_whole_conversation(real, name):
    record = talk("a", "b", "c", "d", "e", "f")
    encoded = encode(real[name], record, seq_len=8, all_tokens=True)
    (sample,) = encoded.samples
    expected = real[name].apply_chat_template(record["messages"], return_dict=False)
    assert sample.ids.tolist() == expected and set(sample.weights.tolist()) == {100}


LONG = [" ".join(f"{word}{number}" for number in range(40)) for word in ("one", "two", "three", "four")]


def long_record() -> dict:
    record = talk(LONG[0], "first", LONG[1], "second", LONG[2], "third " + LONG[3], LONG[3], "fourth")
    return {"messages": [{"role": "system", "content": "Be brief."}, *record["messages"]]}


@needs_real
@pytest.mark.parametrize("name", ["qwen2.5-instruct", "qwen3"])
def test_overlong_drop_counts_answers_that_do_not_fit(real, name):
    record = long_record()
    full = encode(real[name], record)
    second = next(one.stop for sample in full.samples for one in sample.answers if one.turn == 4)
    encoded = encode(real[name], record, seq_len=second)
    assert [one.turn for sample in encoded.samples for one in sample.answers] == [2, 4]
    assert max(len(sample.ids) for sample in encoded.samples) == second
    assert (encoded.dropped_turns, encoded.split) == (2, False)
    encoded = encode(real[name], record, seq_len=second - 1)
    assert encoded.dropped_turns == 3
    with pytest.raises(RecordError) as caught:
        encode(real[name], record, seq_len=60)
    assert caught.value.reason == Reason.LONGER_THAN_SEQ_LEN


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
@pytest.mark.parametrize("seq_len", [170, 300, 340, 480, 600, 2000])
def test_overlong_split_starts_at_the_oldest_user_turn_that_fits(real, name, seq_len):
    tokenizer, messages = real[name], long_record()["messages"]
    encoded = encode(tokenizer, {"messages": messages}, seq_len, "split")
    found = {one.turn: (sample, one) for sample in encoded.samples for one in sample.answers}
    expected, begin = {}, 1
    for turn in (2, 4, 6, 8):
        for start in range(begin, turn, 2):
            history = [messages[0], *messages[start : turn + 1]]
            sent, written, _ = serve(tokenizer, history, None, len(history) - 1)
            if len(sent + written) <= seq_len:
                expected[turn], begin = sent + written, start
                break
    assert {turn: sample.ids[: one.stop].tolist() for turn, (sample, one) in found.items()} == expected
    assert encoded.dropped_turns == 4 - len(expected)
    assert encoded.split == (begin > 1)
    assert all(len(sample.ids) <= seq_len for sample in encoded.samples)


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_overlong_truncate_keeps_the_end_token(real, name):
    record = talk("a", LONG[0], "c", "d")
    sent, written, _ = serve(real[name], record["messages"], None, 1)
    for room in range(1, len(written) + 1):
        seq_len = len(sent) + room
        if room == 1:
            with pytest.raises(RecordError):
                encode(real[name], record, seq_len, "truncate")
            continue
        encoded = encode(real[name], record, seq_len, "truncate")
        (sample,) = encoded.samples
        assert sample.ids.tolist() == sent + written[: room - 1] + written[-1:]
        assert sample.weights[len(sent) :].tolist() == [100] * room
        assert (encoded.cut_turns, encoded.dropped_turns) == (int(room < len(written)), 1)


def test_answer_without_a_prompt_is_counted_as_dropped(real_or_byte):
    messages = [{"role": "assistant", "content": "Hello."}, *talk("a", "b")["messages"]]
    encoded = encode(real_or_byte, {"messages": messages})
    assert encoded.dropped_turns == 1
    assert [one.turn for sample in encoded.samples for one in sample.answers] == [2]


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte")
    train_tokenizer(iter(["a"]), "byte", 259, folder)
    return folder


@pytest.fixture
def real_or_byte(byte):
    return load_tokenizer(byte)


def with_template(folder: Path, template: str):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


HEADED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "differ"),
    [
        # It opens a thought that the rendered conversation does not have.
        (
            HEADED + PROMPT.replace("\n{%", "\n<think>\n{%"),
            r"token 24, after 'stant\\n': serving sends \[.*'<think', the conversation has \[.*'probe<",
        ),
        # It counts the messages, so that what comes first changes with what comes later.
        ("{{ messages | length }}" + HEADED + PROMPT, r"at token 0, after '': serving sends \[.*'1<.*has \[.*'2<"),
        # Its header of an answer is another one than it asks with.
        (HEADED + PROMPT.replace("assistant", "model"), r"'model\\n'.*'assis"),
    ],
)
def test_template_with_mismatched_prompt_shows_the_difference(byte, template, differ):
    with pytest.raises(BadData, match=differ) as caught:
        ChatEncoder(with_template(byte, template), 100)
    assert "\n" not in str(caught.value)


def test_template_mismatch_in_a_later_turn_names_the_turn(byte):
    forgetful = "{% if messages | length > 3 %}Later: {% endif %}" + HEADED + PROMPT
    tokenizer = with_template(byte, forgetful)
    assert len(encode(tokenizer, talk("a", "b")).samples) == 1
    with pytest.raises(BadData, match=r"turn 4: .* at token 0, .*Later"):
        encode(tokenizer, talk("a", "b", "c", "d"))
    endless = HEADED.replace("<|im_end|>", "{% if m.content != 'b' %}<|im_end|>{% endif %}") + PROMPT
    with pytest.raises(BadData, match=r"turn 2: .*instead of <\|im_end\|>"):
        encode(with_template(byte, endless), talk("a", "b"))


def test_tokenizer_that_loses_text_is_an_error(byte, tmp_path):
    content = json.loads((byte / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}
    for file in byte.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (sample,) = encode(load_tokenizer(tmp_path), talk("a", "colour")).samples  # as the tokenizer itself writes it
    assert supervised_text(load_tokenizer(tmp_path), sample) == ["color<|im_end|>"]
    tokenizer = load_tokenizer(byte)
    tokenizer.backend_tokenizer.decoder = None
    with pytest.raises(BadData, match="loses text"):
        encode(tokenizer, talk("a", "two words"))


def test_describe_template_refuses_unusable_templates(byte):
    with pytest.raises(ConfigError, match="has no chat template"):
        describe_template(with_template(byte, None))
    with pytest.raises(ConfigError, match="cannot render a minimal conversation"):
        describe_template(with_template(byte, "{% for m in messages %}"))
    with pytest.raises(ConfigError, match="without a special token"):
        describe_template(with_template(byte, HEADED.replace("<|im_end|>", "") + PROMPT))
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    tokenizer = with_template(byte, no_system + HEADED + PROMPT)
    assert encode(tokenizer, talk("a", "b")).samples
    with pytest.raises(RecordError, match="no system, please") as caught:
        encode(tokenizer, talk("a", "b", system="c"))
    assert caught.value.reason == Reason.TEMPLATE


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (LOOP, "needs more than 1 second of computing"),
        ("{{ 'x' * 3000000000 }}", "needs more than 256 MiB of memory"),
        (
            "{% set ns = namespace(s='x' * 999) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "MiB",
        ),
        ("{% if tools %}" + LOOP + "{% endif %}", "1 second"),
        ("{% for a in range(10 ** 12) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 1 < 'a' }}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_describe_template_refuses_hostile_templates(start: str, reason: str, byte):
    with pytest.raises(ConfigError, match=reason):
        describe_template(with_template(byte, start + HEADED + PROMPT))


def test_describe_template_knows_chatml(byte):
    template = describe_template(load_tokenizer(byte))
    assert (template.known_as, template.end_of_turn, template.end_of_turn_id) == ("plain ChatML", END, 258)
    assert not template.has_thinking_switch
    assert describe_template(with_template(byte, HEADED + PROMPT)).known_as is None


@needs_real
def test_describe_template_knows_the_qwen_templates(real):
    found = {name: describe_template(real[name]) for name in REAL_NAMES}
    assert all(one.known_as and one.end_of_turn_id == 151645 for one in found.values())
    assert [name for name in REAL_NAMES if found[name].has_thinking_switch] == ["qwen3-base", "qwen3"]


OTHERS = ["qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"]


@needs_real
@pytest.mark.parametrize("name", OTHERS)
def test_templates_of_other_models_equal_serving(real, name):
    """Templates of other models shipped with TRL, with Qwen3's tokenizer."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("TRL is not installed")
    path = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = load_tokenizer(REAL / "qwen3")
    tokenizer.chat_template = path.read_text()
    encoder = ChatEncoder(tokenizer, 1 << 20)
    for seed in range(60):
        record = conversation(seed)
        for message in record["messages"]:
            message.pop("weight", None)
        encoded = encoder.encode(parse(record, RecordLayout("messages")))
        for sample in encoded.samples:
            for one in sample.answers:
                sent = tokenizer.apply_chat_template(
                    as_served(record)[: one.turn],
                    tools=record.get("tools"),
                    add_generation_prompt=True,
                    return_dict=False,
                    **({} if one.thinking is None else {"enable_thinking": one.thinking}),
                )
                assert sample.ids[: one.start].tolist() == sent
