"""`import trivium`: the same results and errors as the commands, in scripts, threads and after interrupts."""

import hashlib
import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import trivium
from tests.engine.runs import write_corpus
from trivium.cli.main import trivium as cli
from trivium.engine.runfolder import RunFolder

KEYS = {
    "method": "scratch",
    "model": {"shape": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "tokenizer": {"train": {"kind": "byte", "vocab_size": 259}},
    "data": {"sources": [Path("stories.jsonl")], "seq_len": 64, "held_out": 0.05},
    "batch": {"tokens": 256},
    "budget": {"steps": 6},
}
RUN_FILE = json.dumps({**KEYS, "data": {**KEYS["data"], "sources": ["stories.jsonl"]}})  # YAML holds JSON


def invoke(*arguments: str):
    return CliRunner().invoke(cli, arguments)


def weights(run: Path) -> str:
    return hashlib.sha256((RunFolder(run).result / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with data, a run file, and a run that the command line trained."""
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "stories.jsonl", 60)
    (folder / "small.yaml").write_text(RUN_FILE)
    with chdir(folder):
        done = invoke("train", "small.yaml")
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def test_import_loads_neither_torch_nor_pydantic():
    code = (
        "import sys, time; start = time.perf_counter(); import trivium; took = time.perf_counter() - start\n"
        "assert not {'torch', 'transformers', 'pydantic', 'click', 'numpy'} & sys.modules.keys()\n"
        "assert took < 0.1 and set(trivium.__all__) <= set(dir(trivium))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_found_and_stays_a_function():
    import trivium.doctor.examine
    import trivium.plan.fit
    import trivium.train

    for name in trivium.__all__:
        assert callable(getattr(trivium, name)) or name == "__version__"
        assert not hasattr(getattr(trivium, name), "__path__")
    with pytest.raises(AttributeError, match="trian"):
        trivium.trian  # noqa: B018


def test_train_from_keys_and_from_a_file_give_the_weights_of_the_command(workplace):
    from_keys = trivium.train(**KEYS, name="keys")
    from_file = trivium.train("small.yaml", "budget.steps=3", budget={"steps": 4}, name="both")
    assert weights(from_keys.folder) == weights(workplace / "runs" / "small")
    assert from_file.metrics["step"][-1] == 3  # an override wins over a key, and both over the file
    assert "name: keys" in (text := (from_keys.folder / "run.yaml").read_text()) and "# argument" in text


def test_a_run_shows_its_metrics_and_report(workplace):
    run = trivium.open_run("runs/small")
    lines = [json.loads(line) for line in (workplace / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert run.held_out_loss == [line["eval/loss"] for line in lines if "eval/loss" in line][-1]
    assert run.train_loss == [line["train/loss"] for line in lines if "train/loss" in line][-1]
    assert run.metrics["step"] == sorted({line["step"] for line in lines})
    assert len({len(column) for column in run.metrics.values()}) == 1
    assert run.metrics["train/loss"][0] is None and run.metrics["eval/loss"][0] == lines[0]["eval/loss"]
    page = (workplace / "runs/small/report.html").read_text()
    assert "srcdoc" in run.report._repr_html_() and page.splitlines()[0][:5] in "<!doctype <!DOCTYPE"
    assert "runs/small" in repr(run) and f"{run.held_out_loss:.4f}" in repr(run)


def test_load_gives_the_logits_of_stock_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = trivium.load("runs/small")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids.equal(
        AutoTokenizer.from_pretrained("runs/small/model")("Once upon a time", return_tensors="pt").input_ids
    )
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained("runs/small/model")(ids).logits
        assert model(ids).logits.equal(expected)
