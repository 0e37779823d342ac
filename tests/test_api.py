"""`import trivium`: the same results and errors as the commands, in scripts, threads and after interrupts."""

import asyncio
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path

import pandas
import pytest
import torch
from click.testing import CliRunner

import trivium
from tests.engine.runs import write_corpus
from tests.support.models import PAIRS
from trivium.cli.main import trivium as cli
from trivium.config.load import load_run
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
    return weights_of(RunFolder(run).result)


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


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
        "import sys, trivium\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic', 'click', 'trivium.api'} & sys.modules.keys()\n"
        "assert trivium.plan and not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert dir(trivium) == trivium.__all__"
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
    frame = pandas.DataFrame(run.metrics)
    assert frame["eval/loss"].dropna().iloc[-1] == run.held_out_loss and len(frame) == len(run.metrics["step"])
    page = (workplace / "runs/small/report.html").read_text()
    assert "srcdoc" in run.report._repr_html_() and page.splitlines()[0][:5] in "<!doctype <!DOCTYPE"
    assert "runs/small" in repr(run) and f"{run.held_out_loss:.4f}" in repr(run)
    with pytest.raises(trivium.TriviumError, match="is not a run folder"):
        trivium.open_run("runs/small/model")


def test_a_run_that_was_killed_has_a_report_too(workplace):
    shutil.copytree(workplace / "runs" / "small", workplace / "runs" / "killed")
    for name in ("finished.json", "report.html"):
        (workplace / "runs" / "killed" / name).unlink()
    assert "not finished" in trivium.open_run("runs/killed").report._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "keys", "words"),
    [
        (("small.yaml",), {"sed": 1}, "argument: sed is not a known key; did you mean seed?"),
        (("small.yaml",), {"budget": {"epoch": 2}}, "argument: budget.epoch is not a known key; did you mean epochs?"),
        (("small.yaml",), {"optimizer": {"lr": "1e-4"}}, 'argument: optimizer.lr is "1e-4"; expected a number'),
        (("small.yaml",), {"model": object}, "argument: model is <class 'object'>; expected text or"),
        (("small.yaml", "budget.epoch=2"), {}, "command line: budget.epoch is not a known key"),
        ((), {"method": "lora", "data": "x.jsonl"}, "argument: model is missing; expected text or"),
        ((), {"method": "lora", "model": "base"}, "argument: data is missing"),
        ((), {}, "argument: method is missing"),
        (("gone.yaml",), {}, "gone.yaml: no such file"),
    ],
)
@pytest.mark.parametrize("verb", [trivium.train, trivium.doctor])
def test_a_wrong_key_is_named(verb, arguments, keys, words):
    with pytest.raises(trivium.ConfigError) as caught:
        verb(*arguments, **keys)
    assert words in str(caught.value)


def test_python_values_of_all_kinds_mean_what_they_mean_in_a_run_file():
    import numpy as np

    keys = {**KEYS, "seed": np.int64(3), "optimizer": {"lr": np.float64(1e-3)}, "sample": {"prompts": ("Once",)}}
    run = load_run(None, (), keys).run
    assert (type(run.seed), run.seed, run.data.sources[0].path) == (int, 3, "stories.jsonl")
    assert run.sample.prompts == ["Once"] and run.name == "scratch"
    changed = load_run(Path("small.yaml"), (), {"data": {"seq_len": 32}, "model": "1M"}).run
    assert changed.data.sources == run.data.sources and changed.data.seq_len == 32 and changed.data.held_out == 0.05
    assert changed.model.params == 10**6 and changed.model.shape is None
    whole = load_run(Path("small.yaml"), (), {"data": "other.jsonl", "batch": {"tokens": 8192}}).run
    assert whole.data.seq_len != 64 and [source.path for source in whole.data.sources] == ["other.jsonl"]


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (["train", "small.yaml", "budget.steps=9"], lambda: trivium.train("small.yaml", budget={"steps": 9})),
        (["train", "small.yaml", "--allow", "Q99"], lambda: trivium.train("small.yaml", allow=["Q99"])),
        (["train", "small.yaml", "data=gone.jsonl", "name=x"],
         lambda: trivium.train("small.yaml", data="gone.jsonl", name="x")),
        (["doctor", "small.yaml", "data=gone.jsonl", "name=x"],
         lambda: trivium.doctor("small.yaml", data="gone.jsonl", name="x").require_sound()),
        (["eval", "gone"], lambda: trivium.evaluate("gone")),
        (["eval", "runs/small/model"], lambda: trivium.evaluate("runs/small/model", held_out="gone.jsonl")),
        (["compare", "gone"], lambda: trivium.compare("gone")),
        (["export", "runs/small", "--out", "runs"], lambda: trivium.export("runs/small", Path("runs"))),
        (["export", "runs/small", "--out", "x", "--merge"], lambda: trivium.export("runs/small", "x", merge=True)),
        (["plan", "Qwen3-8B", "--device", "l5"], lambda: trivium.plan("Qwen3-8B", device="l5")),
        (["plan", "Qwen3-8B", "--rows", "few", "--kind", "documents"],
         lambda: trivium.plan("Qwen3-8B", rows="few", kind="documents")),
        (["plan", "Qwen3-8B", "--kind", "documents"], lambda: trivium.plan("Qwen3-8B", kind="documents")),
        (["plan", "Qwen2.5-72B", "--device", "t4", "--method", "full", "--devices", "1"],
         lambda: trivium.plan("Qwen2.5-72B", device="t4", method="full", devices=1)),
    ],
)  # fmt: skip
def test_a_function_raises_what_its_command_prints(command, call):
    if command[:2] == ["eval", "runs/small/model"]:
        command = [*command, "--held-out", "gone.jsonl"]
    refused = invoke(*command)
    with pytest.raises(trivium.TriviumError) as caught:
        call()
    said = " ".join(refused.stderr.replace("trivium: ", "").split())
    assert said.endswith(" ".join(str(caught.value).split()))
    assert refused.exit_code == type(caught.value).exit_code > 0 and not refused.stdout.strip()
    assert caught.value._render_traceback_() == [f"{type(caught.value).__name__}: {caught.value}"]


def test_plan_is_the_plan_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path))
    ways = [
        (["small.yaml", "seed=1"], lambda: trivium.plan("small.yaml", seed=1)),
        (["small.yaml", "name=scratch"], lambda: trivium.plan(**KEYS)),
        (["Qwen3-0.6B", "--rows", "5K", "--kind", "conversations", "--device", "l4", "--memory", "20"],
         lambda: trivium.plan("Qwen3-0.6B", rows="5K", kind="conversations", device="l4", memory=20)),
        (["--data", "stories.jsonl", "--device", "any", "--max-hours", "3"],
         lambda: trivium.plan(data=Path("stories.jsonl"), device="any", max_hours=3)),
    ]  # fmt: skip
    for command, call in ways:
        planned = call()
        assert json.loads(invoke("plan", *command, "--json").stdout) == json.loads(json.dumps(planned.record))
        page = invoke("plan", *command).stdout
        assert page.startswith(repr(planned)) and ("Time and cost" in page) == (planned.plan is not None)


def test_plan_writes_the_run_file_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path))
    trivium.plan("small.yaml", device="l4", write=tmp_path / "one" / "plan.yaml")
    assert invoke("plan", "small.yaml", "--device", "l4", "--write", str(tmp_path / "two" / "plan.yaml")).exit_code == 0
    assert (tmp_path / "one" / "plan.yaml").read_text() == (tmp_path / "two" / "plan.yaml").read_text()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target": "Qwen3-8B", "model": "Qwen3-4B", "method": "lora"}, "Found two models"),
        ({"target": "Qwen3-8B", "devices": 0}, "--devices is 0"),
        ({"target": "Qwen3-8B", "prefer": "best"}, "--prefer is 'best'; expected one of cheapest, fastest"),
        ({"target": "Qwen3-8B", "method": "lroa"}, "expected one of lora, qlora"),
        ({"target": "Qwen3-8B", "rows": 5, "kind": "poems"}, "--kind is 'poems'"),
        ({"target": "Qwen3-8B", "tokens": -1, "kind": "documents"}, "--tokens is -1; expected a number above zero"),
        ({}, "nothing to plan"),
    ],
)
def test_plan_refuses_values_that_the_command_could_not_be_given(keys, words):
    with pytest.raises(trivium.ConfigError, match=words):
        trivium.plan(keys.pop("target", None), **keys)


def test_doctor_finds_what_the_command_finds():
    overrides = ["data.held_out=0", "optimizer.lr=0.5"]
    printed = invoke("doctor", "small.yaml", *overrides, "--json")
    found = trivium.doctor("small.yaml", data={"held_out": 0.0}, optimizer={"lr": 0.5})
    assert [finding.record() for finding in found.findings] == json.loads(printed.stdout) != []
    assert repr(found).startswith(invoke("doctor", "small.yaml", *overrides).stdout.rstrip())
    assert found.is_sound == (printed.exit_code == 0)


def test_doctor_returns_errors_and_what_ended_its_checks(taught):
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}] * 20
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"method": "lora", "model": taught, "data": {"sources": ["talk.jsonl"], "seq_len": 64}}
    stopped = trivium.doctor(**run, batch={"tokens": 512}, precision="fp32", optimizer={"lr": 0.9})
    unprepared = trivium.doctor(**run | {"data": "gone.jsonl"})
    assert not unprepared.is_sound and "gone.jsonl" in repr(unprepared) and not unprepared.findings
    for finding in stopped.findings:
        assert finding.id in repr(stopped)
    with pytest.raises(trivium.ConfigError, match=r"gone\.jsonl"):
        unprepared.require_sound()


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


def test_load_applies_an_adapter_as_peft_does(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = trivium.load(adapter)
    ids = tokenizer("The owl sings.", return_tensors="pt").input_ids
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)
        assert not torch.allclose(model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-2)


def test_evaluate_gives_the_figures_of_the_command(taught, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS] + [{"prompt": "?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = trivium.evaluate("runs/small")
    assert json.loads(invoke("eval", "runs/small", "--json").stdout) == own.figures
    assert invoke("eval", "runs/small").stdout == f"{own}\n" and own.prompts is None
    found = trivium.evaluate(taught, prompts=prompts, answers=tmp_path / "a.jsonl", max_new_tokens=30)
    printed = invoke("eval", str(taught), "--prompts", str(prompts), "--max-new-tokens", "30", "--json")
    assert json.loads(printed.stdout) == found.figures
    assert found.prompts is not None and found.prompts.exact_match == 1.0 and found.held_out is None
    assert [answer.text for answer in found.answers[:3]] == [answer for _, answer in PAIRS]
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert written == [asdict(answer) for answer in found.answers]


def test_compare_gives_the_figures_of_the_command(base, adapter, tmp_path):
    printed = invoke("compare", str(adapter), "--held-out", "stories.jsonl", "--out", str(tmp_path / "one"))
    found = trivium.compare(adapter, held_out="stories.jsonl", out=tmp_path / "two")
    assert repr(found) + "\n" == printed.stdout and found.table["model"] == ["base", "adapter"]
    assert found.table["held-out loss"] == [model.held_out.loss for model in found.models if model.held_out]
    for name in ("comparison.json", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert found._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(trivium.ConfigError, match="nothing to compare"):
        trivium.compare()


def test_export_measures_what_the_command_measures(adapter, tmp_path):
    printed = invoke("export", str(adapter), "--merge", "--out", str(tmp_path / "one"), "--json")
    done = trivium.export(adapter, tmp_path / "two", merge=True)
    assert asdict(done) | {"folder": str(tmp_path / "one")} == json.loads(printed.stdout)
    assert done.max_difference < 1e-4
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    with pytest.raises(trivium.ConfigError, match="--dtype is 'fp8'; expected one of float32"):
        trivium.export(adapter, tmp_path / "three", merge=True, dtype="fp8")


LONGER = {"budget": {"steps": 100}, "eval": {"every_steps": 1000}, "checkpoint": {"every_steps": 1000}}


def test_an_interrupted_script_has_saved_and_the_same_call_resumes(workplace):
    """Ctrl-C in a script: an exception with the paragraph, a checkpoint, and then the same weights as without."""
    whole = trivium.train("small.yaml", name="whole", **LONGER)
    Path("script.py").write_text(f"import trivium\ntrivium.train('small.yaml', name='interrupted', **{LONGER})\n")
    command, folder = [sys.executable, "script.py"], RunFolder(workplace / "runs" / "interrupted")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(folder.ledger)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1 and "trivium.errors.Stopped: Stopped by SIGINT after step" in errors
    assert "make the same call again" in errors and not folder.is_finished
    subprocess.run(command, check=True, capture_output=True)
    assert weights(folder.path) == weights(whole.folder)


def test_a_run_in_another_thread_or_under_an_event_loop():
    """Notebooks run cells under an event loop, and a thread may not set signal handlers."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        threaded = pool.submit(trivium.train, "small.yaml", name="thread").result()

    async def cell():
        return trivium.train("small.yaml", name="loop")

    assert weights(threaded.folder) == weights(asyncio.run(cell()).folder) == weights(Path("runs/small"))
    assert signal.getsignal(signal.SIGINT) is before


def test_workers_do_not_run_a_script_again(tmp_path):
    """A script without `if __name__ == "__main__"` may tokenize with several processes."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from pathlib import Path\n"
        "from trivium.config.inputs import Source\n"
        "from trivium.data.store.build import BuildSettings, build_sources\n"
        "from trivium.data.tokenizer import load_tokenizer\n"
        "settings = BuildSettings(cache_dir=Path('workers'), held_out=0.0, max_reject_share=0.0, max_document_mib=1.0,"
        " workers=2, block_bytes=1000)\n"
        "(built,) = build_sources([Source(path='stories.jsonl')], load_tokenizer(Path('runs/small/model')), settings)\n"
        "print(built.open().num_tokens)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started, num_tokens = done.stdout.split()
    assert started == "started" and int(num_tokens) > 1000
