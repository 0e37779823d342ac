"""Adapters, NF4, full and continued training: what trains, what stays frozen, and kills that change nothing."""

import json
import shutil
import time
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.runs import (
    adapt_values,
    finish,
    outcome,
    run_values,
    spawn,
    train,
    wait_until,
    write_conversations,
    write_corpus,
)
from trivium.errors import ConfigError
from trivium.use.answers import EvalPrompt, answers, score
from trivium.use.load import load

KILLS = 2
KILLS_OF_THE_LONG_TEST = 20
ADAPTER = {"rank": 4, "dropout": 0.1, "train_tokens": ["<|im_end|>"]}
METHODS = {
    "lora": {"method": "lora", "adapter": ADAPTER},
    "pissa": {"method": "lora", "adapter": {"rank": 4, "init": "pissa", "loraplus_lr_ratio": 4.0}},
    "qlora": {"method": "qlora", "adapter": ADAPTER},
    "full": {"method": "full"},
    "full-8bit": {"method": "full", "optimizer": {"lr": 1e-2, "state_dtype": "8bit"}},
    "continue": {"method": "continue"},
}
CONTINUE_WITH_ADAPTER = {"method": "continue", "trainable": "adapter", "adapter": {"rank": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    corpus = write_corpus(folder / "stories.jsonl")
    finish(run_values(corpus, folder, budget={"steps": 12}))
    return folder / "small" / "model"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("conversations") / "questions.jsonl")


def values_of(method: str, base: Path, conversations: Path, runs_dir: Path, **values):
    if method == "continue":
        conversations = base.parents[1] / "stories.jsonl"
    return adapt_values(base, conversations, runs_dir, **METHODS[method] | values)


def held_out_losses(runs_dir: Path) -> list[float]:
    lines = (runs_dir / "small" / "metrics.jsonl").read_text().splitlines()
    return [record["eval/loss"] for record in map(json.loads, lines) if "eval/loss" in record]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_keeps_its_base_unchanged(method, base, conversations, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    train(values_of(method, base, conversations, tmp_path, budget={"steps": 40}))
    losses = held_out_losses(tmp_path)
    assert losses[-1] < losses[0] - 0.05
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_adapter_trains_on_documents(base, tmp_path):
    train(adapt_values(base, base.parents[1] / "stories.jsonl", tmp_path, **CONTINUE_WITH_ADAPTER))
    losses = held_out_losses(tmp_path)
    assert losses[-1] < losses[0] - 0.02


def kill_and_finish(method: str, base: Path, conversations: Path, tmp_path: Path, kills: int) -> None:
    whole = tmp_path / "whole"
    finish(values_of(method, base, conversations, whole))
    expected = outcome(whole)
    shutil.rmtree(whole / "small")
    start = time.monotonic()
    finish(values_of(method, base, conversations, whole))
    seconds = time.monotonic() - start
    assert outcome(whole) == expected, "the same run twice"
    rng = Random(3)
    for kill in range(kills):
        runs_dir = tmp_path / str(kill)
        values = values_of(method, base, conversations, runs_dir)
        process = spawn(values)
        # The first part of a run is start-up: the kills go to where there is something to lose.
        while process.is_alive() and not list((runs_dir / "small").glob("checkpoints/*")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, seconds / 2))
        process.kill()
        process.join()
        finish(values)
        assert outcome(runs_dir) == expected, f"kill {kill}"
        shutil.rmtree(runs_dir)


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_with_the_same_bits(method, base, conversations, tmp_path):
    kill_and_finish(method, base, conversations, tmp_path, KILLS)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_end_with_the_same_bits(method, base, conversations, tmp_path):
    kill_and_finish(method, base, conversations, tmp_path, KILLS_OF_THE_LONG_TEST)


def test_resume_with_other_base_weights_is_refused(base, conversations, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    values = values_of("lora", own, conversations, tmp_path, budget={"steps": 100_000})
    process = spawn(values)
    wait_until(lambda: list((tmp_path / "small" / "checkpoints").glob("step-*")), process)
    process.kill()
    process.join()
    content = bytearray((own / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (own / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="has changed since step"):
        train(values)


def test_adapter_checkpoint_holds_only_the_adapter(base, conversations, tmp_path):
    train(values_of("qlora", base, conversations, tmp_path, budget={"steps": 2}))
    last = max((tmp_path / "small" / "checkpoints").glob("step-*"))
    names = set(load_file(last / "model.safetensors"))
    assert names and all("lora_" in name or name.endswith(".rows") for name in names)


def zero_rows(base: Path, folder: Path, tokens: list[str]) -> Path:
    """A copy of the base with untrained rows for some tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(base, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        for token in tokens:
            model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = 0.0
    model.save_pretrained(folder)
    return folder


def test_trainable_tokens_make_generation_stop(base, conversations, tmp_path):
    untrained = zero_rows(base, tmp_path / "untrained", ["<|im_start|>", "<|im_end|>"])
    train(values_of("lora", untrained, conversations, tmp_path, adapter={"rank": 8}, budget={"steps": 150}))
    config = json.loads((tmp_path / "small" / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [257, 258]
    words = ["fox", "crow", "hen", "owl", "bear", "wolf"]
    questions = [EvalPrompt([{"role": "user", "content": f"last of {a} {b}?"}]) for a, b in permutations(words, 2)]
    assert stop_rate(tmp_path / "small", questions) > 0.95
    assert stop_rate(untrained, questions) < 0.5


def stop_rate(folder: Path, questions: list[EvalPrompt]) -> float:
    return score(questions, answers(load(str(folder)), questions, as_chat=True, max_new_tokens=32)).stop_rate


def test_unknown_train_tokens_are_refused(base, conversations, tmp_path):
    with pytest.raises(ConfigError, match="names '<|im_and|>'"):
        train(values_of("lora", base, conversations, tmp_path, adapter={"train_tokens": ["<|im_and|>"]}))
