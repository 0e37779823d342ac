"""Rules about the machine, provoked with real packages, folders, disks and models too large for any of them."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from tests.doctor.cases import case_of, found_in, run_of, severity_of, trial_of
from trivium.doctor.machine import disk_parts, frozen_bytes, memory_bytes, memory_parts, num_trained_params
from trivium.errors import DoesNotFit
from trivium.model import quantize

TINY_TOKENIZER = {"train": {"kind": "byte", "vocab_size": 259}}


@pytest.fixture(scope="module")
def huge(texts, tmp_path_factory):
    """A model of 72 billion parameters from nothing; preparing it makes no weights."""
    folder = tmp_path_factory.mktemp("huge")
    run = run_of(folder, texts, method="scratch", model="Qwen2.5-72B", tokenizer=TINY_TOKENIZER)
    return case_of(run)


def test_m01_names_packages_that_a_setting_needs(base, chats, tmp_path):
    try:
        metadata.version("wandb")
    except metadata.PackageNotFoundError:
        run = run_of(tmp_path, chats, method="lora", model=str(base), log={"trackers": ["wandb"]})
        found = found_in(run)["M01"]
        assert found.severity == "error" and "wandb" in found.trouble.found
    else:
        pytest.skip("wandb is installed here")


def test_m01_names_versions_that_do_not_fit(base, chats, tmp_path, monkeypatch):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    assert "M01" not in found_in(run)
    asked = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: [*(asked(name) or []), "torch<2"])
    found = found_in(run)["M01"].trouble.found
    assert "torch" in found and "<2" in found and metadata.version("torch") in found


def test_m02_counts_checkpoints_and_result_against_the_disk(huge):
    found = found_in(huge)["M02"]
    assert found.severity == "error" and found.stops_with is DoesNotFit
    assert sum(disk_parts(huge).values()) > 3 * 12 * 72e9


def test_m02_forecasts_what_a_run_writes(base, chats, tmp_path):
    case = case_of(run_of(tmp_path, chats, method="lora", model=str(base)))
    trial = trial_of(case, tmp_path / "trial")
    trial.engine.save(tmp_path / "trial" / "step", {})
    written = sum(path.stat().st_size for path in (tmp_path / "trial" / "step").iterdir())
    forecast = disk_parts(case)["3 checkpoints"] / 3
    assert 0.5 * written < forecast <= written


@pytest.mark.parametrize("place", ["file", "proc"])
def test_m03_folders_where_nothing_can_be_written(place, base, chats, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    runs_dir = file / "runs" if place == "file" else Path("/proc/runs")
    if place == "proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    run = run_of(tmp_path, chats, method="lora", model=str(base), runs_dir=str(runs_dir))
    found = found_in(run)["M03"]
    assert found.severity == "error" and "runs_dir" in found.trouble.found and "cache_dir" in found.trouble.found


def test_m03_leaves_nothing_behind(base, chats, tmp_path):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    before = sorted(tmp_path.rglob("*"))
    assert found_in(run) == {} and sorted(tmp_path.rglob("*")) == before


def test_q21_a_model_that_no_memory_holds(huge):
    found = found_in(huge)["Q21"]
    assert found.severity == "error" and found.stops_with is DoesNotFit
    assert "1,083" in found.trouble.found or "GiB" in found.trouble.found
    small = replace(huge, job=replace(huge.job, shape=replace(huge.job.shape, num_hidden_layers=1, hidden_size=64)))
    assert severity_of(small, "Q21") is None


def test_q21_says_what_would_fit(huge, base, chats, tmp_path):
    lora = case_of(run_of(tmp_path, chats, method="lora", model=str(base)))
    assert "qlora" in found_in(huge)["Q21"].trouble.todo
    wide = replace(lora, job=replace(lora.job, shape=huge.job.shape))
    assert "method: qlora" in found_in(wide)["Q21"].trouble.todo


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_q21_never_counts_more_than_the_engine_holds(method, base, chats, tmp_path):
    """The bound must not be wrong the other way: it is compared with the tensors of a real engine."""
    case = case_of(run_of(tmp_path, chats, method=method, model=str(base)))
    engine = trial_of(case, tmp_path / "trial").engine
    num_trained = sum(parameter.numel() for parameter in engine.parameters.values())
    assert num_trained_params(case.run, case.job.shape) == num_trained
    held = quantize.quantised_bytes(engine.model)
    trained = 4 * num_trained
    assert frozen_bytes(case) + memory_parts(case)["trained weights"] <= held
    assert frozen_bytes(case) + trained >= 0.8 * held


def test_memory_is_that_of_the_machine():
    import torch

    lines = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    most = 1024 * (lines["MemTotal"] + lines["SwapTotal"])
    assert 0 < memory_bytes(torch.device("cpu")) <= most


def test_q23_one_of_several_processes(base, chats, tmp_path, monkeypatch):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert severity_of(run, "Q23") == "error"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert severity_of(run, "Q23") is None
