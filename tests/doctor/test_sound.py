"""Sound runs of every kind: no rule has anything to say, in any of the three rounds."""

from pathlib import Path

import pytest

from tests.doctor.cases import TURN_END, case_of, found_in, real_tokenizer, run_of, trial_of, write_base

SHAPE = {
    "shape": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def no_findings(run, tmp_path: Path) -> None:
    assert found_in(run) == {}
    case = case_of(run)
    assert found_in(case) == {}
    assert found_in(trial_of(case, tmp_path / "trial")) == {}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_conversations_on_a_chat_model(method, base, chats, tmp_path):
    no_findings(run_of(tmp_path, chats, method=method, model=str(base)), tmp_path)


def test_an_untied_model(tokenizer, chats, tmp_path):
    base = write_base(tmp_path / "untied", tokenizer, tie=False)
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base)), tmp_path)


def test_dropout_and_token_rows(base, chats, tmp_path):
    adapter = {"rank": 4, "dropout": 0.5, "train_tokens": ["<|im_end|>"], "b_rate_ratio": 8.0}
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base), adapter=adapter), tmp_path)


def test_documents_from_nothing(texts, tmp_path):
    tokenizer = {"train": {"kind": "byte", "vocab_size": 259}}
    no_findings(run_of(tmp_path, texts, method="scratch", model=SHAPE, tokenizer=tokenizer), tmp_path)


def test_documents_on_a_base_model_are_told_of_being_few(tokenizer, texts, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, stops=[256])
    case = case_of(run_of(tmp_path, texts, method="continue", model=str(base)))
    assert {name: finding.severity for name, finding in found_in(case).items()} == {"Q33": "info"}
    assert found_in(trial_of(case, tmp_path / "trial")) == {}


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "qwen3"])
def test_the_real_tokenizers(name, chats, tmp_path):
    folder = real_tokenizer(name)
    base = write_base(tmp_path / "base", folder, stops=[151645, 151643], vocab_size=151936)
    no_findings(run_of(tmp_path, chats, method="lora", model=str(base), data={"held_out": 0.0}), tmp_path)


@pytest.mark.parametrize("name", ["qwen2.5-base", "qwen3-base"])
def test_a_real_base_model_is_only_told_what_its_servers_read(name, chats, tmp_path):
    folder = real_tokenizer(name)
    base = write_base(tmp_path / "base", folder, stops=[151643], vocab_size=151936)
    case = case_of(run_of(tmp_path, chats, method="lora", model=str(base), data={"held_out": 0.0}))
    assert {name: finding.severity for name, finding in found_in(case).items()} == {"Q05": "warning"}
    assert "151645" in found_in(case)["Q05"].trouble.todo and TURN_END != 151645
