"""plan.json: the planner's prediction, the measurements, and the advice when memory runs out."""

import json
import os
import re
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.runs import context, finish, outcome, run_values, train, write_corpus
from trivium.cli.main import trivium
from trivium.config.load import dump_run
from trivium.config.run import Run, with_method_defaults
from trivium.engine import checkpoint
from trivium.engine.device import asked_bytes, is_out_of_memory, probe
from trivium.engine.loop import Silent
from trivium.engine.prepare import prepare
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError
from trivium.plan.check import read_outcome
from trivium.train import is_finished, with_recorded_choices
from trivium.use.verify import verify

MIB = 1 << 20
HEADROOM = 260 * MIB
LONG_ROWS = {
    "model": {"shape": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}},
    "batch": {"tokens": 8192, "micro_tokens": 8192},
    "budget": {"steps": 3},
    "checkpoint": {"every_steps": 1},
    "eval": {"every_steps": 100, "max_tokens": 256},
}
"""Activations are most of this model's memory: over 400 MB in one micro-batch, 27 MB in micro-batches of 512 tokens."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stories.jsonl")


def run_of(values: dict[str, Any]) -> Run:
    return Run.model_validate(with_method_defaults(values))


def open_values(corpus: Path, runs_dir: Path, **values: Any) -> dict[str, Any]:
    """A run that leaves its batching to the planner."""
    return run_values(corpus, runs_dir, batch={"tokens": 512}, budget={"steps": 6}, **values)


def plan_of(runs_dir: Path) -> dict[str, Any]:
    plan = RunFolder(runs_dir / "small").read("plan.json")
    assert plan is not None
    return plan


def test_plan_json_has_prediction_and_measurement(corpus, tmp_path):
    values = open_values(corpus, tmp_path)
    finish(values)
    folder, plan = RunFolder(tmp_path / "small"), plan_of(tmp_path)
    lines = [line for line in folder.metrics if "train/peak_memory_gib" in line]
    assert re.search(r"micro_tokens: 512 +# planner", folder.run_yaml.read_text())
    assert plan["measured"]["step"] == 6
    assert plan["measured"]["peak_memory_bytes"] == max(line["train/peak_memory_gib"] for line in lines) * (1 << 30)
    speeds = sorted(line["train/tokens_per_second"] for line in lines)
    assert speeds[0] <= plan["measured"]["tokens_per_second"] <= speeds[-1]
    memory = plan["predicted"]["peak_memory"]
    assert sum(memory["items"].values()) == memory["bytes"] and memory["low"] < memory["bytes"] < memory["high"]
    # So small a model is mostly libraries, of which the prediction counts what the process holds.
    assert abs(plan["measured"]["peak_memory_error"]) < 0.25
    found = read_outcome(folder.path)
    assert found.status == "finished" and found.peak_bytes is not None
    assert found.peak_bytes.error == pytest.approx(plan["measured"]["peak_memory_error"])


def test_resumed_run_keeps_its_recorded_batching(corpus, tmp_path):
    """A machine with little memory changes the batching of a new run, but not of a resumed one."""
    run, notes, small = run_of(open_values(corpus, tmp_path)), [], replace(probe("cpu", "fp32"), memory_bytes=1)
    assert (run.batch.micro_tokens, run.activation_checkpointing) == (None, None)
    settled = prepare(run, notes.append, small).run
    assert (settled.batch.micro_tokens, settled.activation_checkpointing) == (64, True)
    assert "the planner chose batch.micro_tokens: 64 and activation_checkpointing: true" in notes[-1]
    folder = RunFolder(tmp_path / "small")
    assert with_recorded_choices(folder, run) == run
    begun = run_of(run_values(corpus, tmp_path, batch={"tokens": 512, "micro_tokens": 256}, budget={"steps": 6}))
    write_begun(folder, begun.model_copy(update={"activation_checkpointing": False}))
    as_begun = with_recorded_choices(folder, run)
    assert prepare(as_begun, notes.append, small).run == as_begun
    assert (as_begun.batch.micro_tokens, as_begun.activation_checkpointing) == (256, False)
    assert not is_finished(folder, as_begun, Silent())


def write_begun(folder: RunFolder, run: Run) -> None:
    """Write the folder of a run that was killed after its first step."""
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    folder.run_yaml.write_text(dump_run(run, {}))


def test_resume_may_change_batching_only(corpus, tmp_path):
    values = run_values(corpus, tmp_path, budget={"steps": 2000}, batch={"tokens": 512, "micro_tokens": 512})
    folder = RunFolder(tmp_path / "small")
    begun, other = run_of(values), run_of(values | {"batch": {"tokens": 512, "micro_tokens": 128}})
    write_begun(folder, begun)
    assert not is_finished(folder, other, Silent())
    assert not is_finished(folder, other.model_copy(update={"activation_checkpointing": True}), Silent())
    with pytest.raises(ConfigError, match="seed: 0 -> 1") as refused:
        is_finished(folder, other.model_copy(update={"seed": 1}), Silent())
    assert "micro_tokens" not in str(refused.value)


def command(arguments: list[str], headroom_bytes: int | None, errors: Path) -> None:
    """Run the command line in this process, limited to `headroom_bytes` more memory than it holds now."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    if headroom_bytes is not None:
        held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert held is not None
        limit = 1024 * int(held[1]) + headroom_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    trivium(arguments)


def start_command(arguments: list[str], headroom_bytes: int | None, errors: Path) -> Any:
    process = context.Process(target=command, args=(arguments, headroom_bytes, errors))
    process.start()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the data of a process")
def test_out_of_memory_suggests_fixes_that_fit(corpus, tmp_path):
    run_file, errors, folder = tmp_path / "small.yaml", tmp_path / "errors", RunFolder(tmp_path / "small")
    run_file.write_text(json.dumps(run_values(corpus, tmp_path, **LONG_ROWS)))
    process = start_command(["train", str(run_file)], None, errors)
    while not checkpoint.steps(folder.checkpoints):
        time.sleep(0.001)
    process.kill()
    process.join()
    saved, predicted = checkpoint.steps(folder.checkpoints), plan_of(tmp_path)["predicted"]

    process = start_command(["train", str(run_file)], HEADROOM, errors)
    process.join()
    said = errors.read_text()
    assert process.exitcode == 3, said
    print(said)
    assert "Out of memory" in said and all(f"({number}) " in said for number in (1, 2, 3)) and "Traceback" not in said
    failure = folder.read("failure.json")
    assert failure is not None and failure["kind"] == "DoesNotFit" and failure["message"] in said
    assert "failed" in (folder.path / "report.html").read_text()
    assert checkpoint.steps(folder.checkpoints) == saved
    for step in saved:
        checkpoint.verify(checkpoint.step_folder(folder.checkpoints, step))

    process = start_command(["train", str(run_file), "batch.micro_tokens=512"], HEADROOM, errors)
    process.join()
    assert process.exitcode == 0, errors.read_text()
    assert "resuming with different batching (batch.micro_tokens: 8192 -> 512)" in errors.read_text()
    assert verify(folder.path, lambda text: None, lambda step, steps: None).is_finished
    assert folder.read("failure.json") is None
    assert plan_of(tmp_path)["predicted"] == predicted


def test_is_out_of_memory_and_asked_bytes():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 45)
    assert is_out_of_memory(found.value) and asked_bytes(found.value) == 1 << 47
    with pytest.raises(MemoryError) as of_python:
        bytearray(1 << 46)
    assert is_out_of_memory(of_python.value) and asked_bytes(of_python.value) == 0
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.00 GiB of which 1.00 GiB"
    assert is_out_of_memory(torch.OutOfMemoryError(said)) and asked_bytes(torch.OutOfMemoryError(said)) == 5 << 29
    for other in (RuntimeError("shapes do not match"), OSError(2, "no file"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def test_planner_chosen_batching_equals_the_same_batching_configured(corpus, tmp_path):
    train(open_values(corpus, tmp_path / "open"))
    train(run_values(corpus, tmp_path / "set", batch={"tokens": 512, "micro_tokens": 512}, budget={"steps": 6}))
    assert outcome(tmp_path / "open") == outcome(tmp_path / "set")
