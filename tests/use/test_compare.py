"""Comparisons of real runs: every model gets the same questions and stops, and costs are what was recorded."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.engine.runs import adapt_values, train, write_conversations
from tests.support.models import PAIRS, STORIES, make_adapter, make_base, make_run
from trivium.engine.record import read_record
from trivium.engine.runfolder import RunFolder
from trivium.use.answers import answers, read_questions, score
from trivium.use.compare import Comparison, compare, find_models
from trivium.use.held_out import measure, passages_of_file, passages_of_run
from trivium.use.load import load

METHODS = {"lora": {"adapter": {"rank": 4, "train_tokens": ["<|im_end|>"]}}, "full": {}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A LoRA and a full run of one base, prompts with answers, and texts of another kind."""
    folder = tmp_path_factory.mktemp("workplace")
    base = make_base(folder / "base")
    conversations = write_conversations(folder / "questions.jsonl", 60)
    for name, values in METHODS.items():
        train(adapt_values(base, conversations, folder / "runs", name=name, method=name, budget={"steps": 4}, **values))
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return folder


@pytest.fixture(scope="module")
def compared(workplace: Path) -> Comparison:
    return compare(
        [str(workplace / "runs" / name) for name in METHODS],
        prompts=workplace / "prompts.jsonl",
        held_out=None,
        general=workplace / "general.jsonl",
        max_new_tokens=8,
    )


def test_compare_lists_base_models_first(compared: Comparison, workplace: Path):
    assert [(m.name, m.base, m.method) for m in compared.models] == [
        ("base", None, None),
        ("lora", "base", "lora"),
        ("full", "base", "full"),
    ]
    assert compared.same_tokenizer and compared.held_out == "held-out set of lora"
    assert compared.general == str(workplace / "general.jsonl")
    assert any("chat template" in note and "<|im_end|>" in note for note in compared.notes)


def test_compare_gives_the_values_of_its_parts(compared: Comparison, workplace: Path):
    own = passages_of_run(workplace / "runs" / "lora", lambda text: None)
    questions = read_questions(workplace / "prompts.jsonl")
    for model, place in zip(compared.models, ("base", "runs/lora", "runs/full"), strict=True):
        loaded = load(str(workplace / place))
        general = passages_of_file(workplace / "general.jsonl", loaded.tokenizer)
        assert model.held_out == measure(loaded, own)
        assert model.general == measure(loaded, general)
        given = answers(loaded, questions, as_chat=True, stop_ids=[256, 258], max_new_tokens=8)
        assert model.answers == given and model.scores == score(questions, given)
    base, *tuned = compared.models
    assert compared.forgotten(base) is None
    for model in tuned:
        assert compared.forgotten(model) == pytest.approx(model.general.loss - base.general.loss)


def test_compare_costs_are_those_recorded_by_the_run(compared: Comparison, workplace: Path):
    base, *tuned = compared.models
    assert (base.num_trained_params, base.train_seconds, base.tokens_per_second, base.peak_memory_gib) == (None,) * 4
    for model in tuned:
        run = workplace / "runs" / model.name
        folder, record = RunFolder(run), read_record(run)
        assert model.num_trained_params == folder.read("provenance.json")["model"]["num_trained_params"] > 0
        assert model.train_seconds == folder.read("finished.json")["train_seconds"]
        assert model.tokens_per_second == record.curve("train/tokens_per_second").typical
        assert model.peak_memory_gib == record.curve("train/peak_memory_gib").highest
        assert model.size_bytes == sum(path.stat().st_size for path in folder.result.iterdir())
    assert tuned[0].num_trained_params < tuned[1].num_trained_params
    json.dumps(asdict(compared))  # plain values all through


def test_find_models_lists_a_run_that_is_a_base_model_once(tmp_path: Path):
    first = make_run(tmp_path / "first", "weights: random\nmethod: scratch\n")
    make_base(first / "model")
    tuned = make_run(tmp_path / "tuned", f"weights: pretrained\nmethod: lora\nmodel: {{name: {first / 'model'}}}\n")
    make_adapter(tuned / "adapter", first / "model")
    whole = make_run(tmp_path / "whole", f"weights: pretrained\nmethod: full\nmodel: {{name: {first / 'model'}}}\n")
    shutil.copytree(first / "model", whole / "model")
    for names in ([tuned, whole], [tuned, first, whole], [first, whole, tuned]):
        found = [(one.name, one.base) for one, _ in find_models([str(name) for name in names], lambda text: None)]
        assert found[0] == ("first", None)
        assert sorted(found[1:]) == [("tuned", "first"), ("whole", "first")]


def test_compare_notes_a_missing_base_model(tmp_path: Path):
    run = make_run(tmp_path / "whole", "weights: pretrained\nmethod: full\nmodel: {name: /nowhere/at-all}\n")
    make_base(run / "model")
    said: list[str] = []
    assert [one.name for one, _ in find_models([str(run)], said.append)] == ["whole"]
    assert len(said) == 1 and "compared without its base" in said[0]


def test_compare_different_tokenizers_by_bits_per_byte(tmp_path: Path, base: Path, taught: Path):
    from trivium.data.tokenizer import train_tokenizer

    other = tmp_path / "other"
    shutil.copytree(base, other)
    train_tokenizer(["Lily the fox " * 50], "bpe", 300, other)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": STORIES[0]}) + "\n")
    compared = compare([str(base), str(other)], prompts=None, held_out=tmp_path / "texts.jsonl", general=None)
    assert not compared.same_tokenizer
    one, another = (model.held_out for model in compared.models)
    assert one is not None and another is not None and one.num_tokens > another.num_tokens
    assert compared.questions == [] and all(model.scores is None for model in compared.models)
