"""Sound runs of every kind: no rule has anything to say, in any of the three rounds."""

from pathlib import Path

import pytest

from tests.doctor.cases import chat_rows, found_in, prepared_of, run_of, write_rows
from tests.support.models import write_base
from tests.support.qwen_tokenizers import real_tokenizer
from trivium.doctor.prepared import load

SHAPE = {
    "shape": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def no_findings(run, tmp_path: Path) -> None:
    assert found_in(run) == {}
    prepared = prepared_of(run)
    assert found_in(prepared) == {}
    assert found_in(load(prepared)) == {}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_conversations_on_a_chat_model(method, base, chats, tmp_path):
    no_findings(run_of(tmp_path, chats, method=method, model=str(base)), tmp_path)


def test_an_untied_model(tokenizer, chats, tmp_path):
    base = write_base(tmp_path / "untied", tokenizer, tie_word_embeddings=False)
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base)), tmp_path)


def test_dropout_and_trained_tokens(base, chats, tmp_path):
    adapter = {"rank": 4, "dropout": 0.5, "train_tokens": ["<|im_end|>"], "loraplus_lr_ratio": 8.0}
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base), adapter=adapter), tmp_path)


def test_documents_from_scratch(texts, tmp_path):
    tokenizer = {"train": {"kind": "byte", "vocab_size": 259}}
    no_findings(run_of(tmp_path, texts, method="scratch", model=SHAPE, tokenizer=tokenizer), tmp_path)


def test_few_documents_on_a_base_model(tokenizer, texts, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, stops=[256])
    prepared = prepared_of(run_of(tmp_path, texts, method="continue", model=str(base)))
    assert {name: finding.severity for name, finding in found_in(prepared).items()} == {"Q33": "info"}
    assert found_in(load(prepared)) == {}


def test_reasoning_and_tools(thinker, tmp_path):
    call = {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Ulm"}'}}
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "reasoning_content": "first", "content": "1"},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "reasoning_content": "it is dry", "content": "No."},
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [*[{"messages": turns}] * 9, *chat_rows()])
    no_findings(run_of(tmp_path, rows, method="lora", model=str(thinker), data={"seq_len": 256}), tmp_path)


def test_a_real_chat_tokenizer(chats, tmp_path):
    base = write_base(tmp_path / "base", real_tokenizer("qwen3"), stops=[151645, 151643], vocab_size=151936)
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base), data={"held_out": 0.0}), tmp_path)


def test_a_real_base_model_only_has_q05(chats, tmp_path):
    base = write_base(tmp_path / "base", real_tokenizer("qwen2.5-base"), stops=[151643], vocab_size=151936)
    prepared = prepared_of(run_of(tmp_path, chats, method="lora", model=str(base), data={"held_out": 0.0}))
    found = found_in(prepared)
    assert {name: finding.severity for name, finding in found.items()} == {"Q05": "warning"}
    assert "151645" in found["Q05"].fix
