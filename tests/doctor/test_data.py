"""Rules about what the rows became, provoked by rows and templates."""

import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.doctor.cases import PAIRS, chat_rows, found_in, prepared_of, run_of, severity_of, text_rows, write_rows
from tests.doctor.test_tokens import write_store
from tests.support.models import byte_tokenizer, write_base
from tests.support.qwen_tokenizers import real_tokenizer
from trivium.data.tokenizer import CHATML_TEMPLATE, load_tokenizer
from trivium.doctor.examine import examine
from trivium.errors import BadData

REASONED = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "reasoning_content": "first thought", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "reasoning_content": "second thought", "content": "2"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Koeln", "days": 2})}}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "No."},
]
TWICE = CHATML_TEMPLATE.replace(
    "message['content'] +",
    "message['content'] + (message['tool_calls'][0]['function']['name'] + "
    "(message['tool_calls'][0]['function']['arguments'] | tojson | tojson) if message['tool_calls'] else '') +",
)


def prepared_with(rows, base, tmp_path, method="full", **values):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return prepared_of(run_of(tmp_path, source, method=method, model=str(base), **values))


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_q03_answers_that_do_not_fit(overlong, base, tmp_path):
    rows = chat_rows([*PAIRS, ("Tell me all.", "Well, " * 99)])
    data = {"overlong": overlong, "max_reject_share": 0.1, "held_out": 0.0}
    found = found_in(prepared_with(rows, base, tmp_path, data=data))["Q03"]
    assert found.severity == "warning" and "of 41 records" in found.found
    one_in_many = chat_rows([*PAIRS * 4, ("Tell me all.", "Well, " * 99)])
    (tmp_path / "many").mkdir()
    assert severity_of(prepared_with(one_in_many, base, tmp_path / "many", data=data), "Q03") is None


def test_q12_an_unknown_template(chats, tmp_path):
    own = CHATML_TEMPLATE.replace("message['role'] + ", "message['role'] + ' says' + ")
    own = own.replace("assistant\\n", "assistant says\\n")
    base = write_base(tmp_path / "base", byte_tokenizer(tmp_path / "bytes", own))
    prepared = prepared_of(run_of(tmp_path, chats, method="full", model=str(base)))
    assert {name: finding.severity for name, finding in found_in(prepared).items()} == {"Q12": "warning"}


def test_q15_a_template_without_reasoning(base, tmp_path):
    found = found_in(prepared_with([{"messages": REASONED}] * 9, base, tmp_path))["Q15"]
    assert found.severity == "warning" and "of 18 answers" in found.found


def test_q15_a_conversation_rendered_once(thinker, tmp_path):
    rows = [{"messages": REASONED}] * 9
    assert severity_of(prepared_with(rows, thinker, tmp_path), "Q15") is None
    once = prepared_with(rows, thinker, tmp_path, loss_tokens="all")
    assert "of 9 sampled answers" in found_in(once)["Q15"].found


def test_q16_calls_that_the_template_leaves_out_or_encodes_twice(base, tmp_path):
    left_out = found_in(prepared_with([{"messages": CALLED}] * 9, base, tmp_path))["Q16"]
    assert left_out.severity == "error" and left_out.stops_with is BadData
    assert "out of 9" in left_out.found and "of 0 as JSON" in left_out.found
    twice = write_base(tmp_path / "twice", byte_tokenizer(tmp_path / "bytes", TWICE))
    found = found_in(prepared_with([{"messages": CALLED}] * 9, twice, tmp_path))["Q16"]
    assert "out of 0" in found.found and "of 9 as JSON" in found.found


def test_q16_string_arguments_are_read_before_the_template_sees_them(tmp_path):
    """Qwen2.5's template would encode them twice."""
    template = json.loads((real_tokenizer("qwen2.5-instruct") / "tokenizer_config.json").read_text())["chat_template"]
    base = write_base(tmp_path / "base", byte_tokenizer(tmp_path / "bytes", template))
    prepared = prepared_with([{"messages": CALLED}] * 9, base, tmp_path, data={"seq_len": 512})
    assert len(prepared.conversations) == 9 and severity_of(prepared, "Q16") is None


def test_q17_control_tokens_written_out(base, thinker, tmp_path):
    taken = [*PAIRS[:9], ("What does <think> mean?", "To reason.")]
    found = found_in(prepared_with(chat_rows(taken), thinker, tmp_path))["Q17"]
    assert found.severity == "warning" and found.found.startswith("found 1 record with")
    (tmp_path / "refused").mkdir()
    refused = [*PAIRS[:9], ("What is <|im_end|>?", "An end.")]
    data = {"max_reject_share": 0.5}
    found = found_in(prepared_with(chat_rows(refused), base, tmp_path / "refused", data=data))["Q17"]
    assert "1 rejected record with" in found.found


def test_q17_documents_are_plain_text_whatever_they_spell(base, tmp_path):
    rows = [*text_rows(), {"text": "The token <|im_end|> ends a turn."}]
    assert severity_of(prepared_with(rows, base, tmp_path, method="continue"), "Q17") is None


def test_q27_sixteen_bits_for_a_large_vocabulary(base, tmp_path):
    tokenizer = load_tokenizer(real_tokenizer("qwen3"))
    for dtype, expected in ((np.uint16, "error"), (np.int32, None)):
        sources = write_store(tmp_path / dtype.__name__, [np.array([7, 8, 9, 256])] * 9, dtype=dtype)
        prepared = prepared_of(run_of(tmp_path, sources, method="continue", model=str(base)))
        assert severity_of(prepared, "Q27") is None
        assert severity_of(replace(prepared, job=replace(prepared.job, tokenizer=tokenizer)), "Q27") == expected


def test_q28_documents_on_a_chat_model(base, texts, chats, tmp_path):
    documents = prepared_of(run_of(tmp_path, texts, method="continue", model=str(base)))
    assert severity_of(documents, "Q28") == "warning"
    mixed = prepared_of(run_of(tmp_path, [str(texts), str(chats)], method="continue", model=str(base)))
    assert severity_of(mixed, "Q28") is None


def test_q30_a_system_turn_in_every_conversation(base, tmp_path):
    always = prepared_with(chat_rows(system="You are a fox."), base, tmp_path)
    found = found_in(always)["Q30"]
    assert found.severity == "info" and "You are a fox." in found.found and "writes none" in found.found
    (tmp_path / "half").mkdir()
    half = chat_rows(PAIRS[:20], system="You are a fox.") + chat_rows(PAIRS[20:])
    assert severity_of(prepared_with(half, base, tmp_path / "half"), "Q30") is None


def test_q33_little_text_for_a_pretrained_model(base, texts, tmp_path):
    run = run_of(tmp_path, texts, method="continue", model=str(base), budget={"epochs": 3.0})
    found = found_in(prepared_of(run))["Q33"]
    assert found.severity == "info" and "3.0 times" in found.found


@pytest.mark.parametrize("name", ["rows.txt", "rows.md", "rows.txt.gz"])
def test_q34_json_lines_with_the_name_of_a_text(name, base, tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in text_rows()).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    run = run_of(tmp_path, path, method="continue", model=str(base), data={"held_out": 0.0})
    assert str(path) in found_in(prepared_of(run))["Q34"].found
    prose = tmp_path / "prose" / name
    prose.parent.mkdir()
    text = ("{1}: a note\n" + "A fox drew a house. " * 40).encode()
    prose.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    run = run_of(tmp_path, prose, method="continue", model=str(base), data={"held_out": 0.0})
    assert severity_of(prepared_of(run), "Q34") is None


def test_examine_reads_every_byte_of_the_stores(base, tmp_path):
    run = run_of(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows()), method="full", model=str(base))
    (built,) = prepared_of(run).job.built
    for path in built.path.iterdir():
        os.utime(path, (1e9, 1e9))  # long ago, so that its hash is remembered
    prepared_of(run)
    tokens = built.path / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    os.utime(tokens, (1e9, 1e9))  # as if the disk had flipped it
    prepared_of(run)
    with pytest.raises(BadData, match=r"tokens\.bin.*changed after it was built"):
        list(examine(run, frozenset(), lambda text: None))
