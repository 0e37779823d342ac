"""Rules about the machine, provoked with real packages, folders, disks and models too large for any of them."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from tests.doctor.cases import found_in, prepared_of, run_of, severity_of
from trivium.config.load import dump_run, load_run
from trivium.doctor.machine import disk_parts
from trivium.doctor.prepared import load
from trivium.engine.device import probe
from trivium.engine.prepare import settle_batching
from trivium.errors import ConfigError, DoesNotFit
from trivium.model import quantize
from trivium.plan.fit import cheapest_fixes
from trivium.plan.memory import peak_memory

TINY_TOKENIZER = {"train": {"kind": "byte", "vocab_size": 259}}


@pytest.fixture(scope="module")
def huge(texts, tmp_path_factory):
    """A model of 72 billion parameters from nothing; preparing it makes no weights."""
    folder = tmp_path_factory.mktemp("huge")
    run = run_of(folder, texts, method="scratch", model="Qwen2.5-72B", tokenizer=TINY_TOKENIZER)
    return prepared_of(run)


def test_m01_names_packages_that_a_setting_needs(base, chats, tmp_path):
    try:
        metadata.version("wandb")
    except metadata.PackageNotFoundError:
        run = run_of(tmp_path, chats, method="lora", model=str(base), log={"trackers": ["wandb"]})
        found = found_in(run)["M01"]
        assert found.severity == "error" and "wandb" in found.found
    else:
        pytest.skip("wandb is installed here")


def test_m01_names_versions_that_do_not_fit(base, chats, tmp_path, monkeypatch):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    assert "M01" not in found_in(run)
    asked = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: [*(asked(name) or []), "torch<2"])
    found = found_in(run)["M01"].found
    assert "torch" in found and "<2" in found and metadata.version("torch") in found


def test_m02_counts_checkpoints_and_result_against_the_disk(huge):
    found = found_in(huge)["M02"]
    assert found.severity == "error" and found.stops_with is DoesNotFit
    assert sum(disk_parts(huge).values()) > 3 * 12 * 72e9


def test_m02_forecasts_what_a_run_writes(base, chats, tmp_path):
    prepared = prepared_of(run_of(tmp_path, chats, method="lora", model=str(base)))
    loaded = load(prepared)
    loaded.engine.save(tmp_path / "step", {})
    written = sum(path.stat().st_size for path in (tmp_path / "step").iterdir())
    forecast = disk_parts(prepared)["3 checkpoints"] / 3
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
    assert found.severity == "error" and "runs_dir" in found.found and "cache_dir" in found.found


def test_m03_leaves_nothing_behind(base, chats, tmp_path):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    before = sorted(tmp_path.rglob("*"))
    assert found_in(run) == {} and sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def long(texts, tmp_path_factory):
    """A small model that reads much at a time, so that most of its memory are activations."""
    folder = tmp_path_factory.mktemp("long")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    run = run_of(
        folder, texts, method="scratch", model={"shape": sizes}, tokenizer=TINY_TOKENIZER, batch={"tokens": 8192}
    )
    return prepared_of(run)


def with_memory(prepared, memory_bytes):
    return replace(prepared, machine=replace(prepared.machine, memory_bytes=round(memory_bytes)))


def test_q21_a_model_that_does_not_fit(huge):
    found = found_in(huge)["Q21"]
    assert found.severity == "error" and found.stops_with is DoesNotFit
    assert "has 8.00 GiB" in found.found and "moments" in found.found
    small = replace(huge, job=replace(huge.job, shape=replace(huge.job.shape, num_hidden_layers=1, hidden_size=64)))
    assert severity_of(small, "Q21") is None


def test_q21_warns_without_a_margin(huge):
    needed = peak_memory(huge.workload).total
    assert severity_of(with_memory(huge, needed / 0.90), "Q21") is None
    assert severity_of(with_memory(huge, needed / 0.95), "Q21") == "warning"
    assert severity_of(with_memory(huge, needed * 0.99), "Q21") == "error"


def test_q21_offers_what_then_fits(long, tmp_path):
    tight = with_memory(long, 0.99 * peak_memory(long.workload).total)
    found = found_in(tight)["Q21"].fix
    fixes = cheapest_fixes(tight.workload, tight.machine.as_planned, tight.machine.memory_bytes)
    assert len(fixes) == 3 and all(f"({number}) {fix.text}" in found for number, fix in enumerate(fixes, start=1))
    (tmp_path / "run.yaml").write_text(dump_run(tight.run, {}))
    settings = [f"{key}={value}" for key, value in fixes[0].overrides.items()]
    fixed = replace(tight, job=replace(tight.job, run=load_run(tmp_path / "run.yaml", settings).run))
    assert severity_of(fixed, "Q21") is None


def test_q21_uses_the_batching_of_the_planner(long):
    notes = []
    usual = settle_batching(long.run, long.job.shape, long.job.facts, long.machine, notes.append)
    assert not notes
    tight = with_memory(long, 1.07 * peak_memory(replace(long, job=replace(long.job, run=usual)).workload).total)
    settled = settle_batching(tight.run, tight.job.shape, tight.job.facts, tight.machine, notes.append)
    assert settled.sequences_per_micro_batch < usual.sequences_per_micro_batch or settled.activation_checkpointing
    assert len(notes) == 1 and "the planner chose" in notes[0]
    assert severity_of(replace(tight, job=replace(tight.job, run=settled)), "Q21") is None


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_weights_are_counted_as_the_engine_holds_them(method, base, chats, tmp_path):
    prepared = prepared_of(run_of(tmp_path, chats, method=method, model=str(base)))
    engine = load(prepared).engine
    num_trained = sum(parameter.numel() for parameter in engine.parameters.values())
    assert prepared.workload.num_trained_params == num_trained
    frozen = quantize.quantized_bytes(engine.model) - 4 * num_trained
    assert prepared.workload.frozen_bytes == pytest.approx(frozen, rel=0.02)


def test_memory_is_that_of_the_machine():

    lines = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    assert 0 < probe("cpu", "fp32").memory_bytes <= 1024 * lines["MemTotal"]


@pytest.mark.parametrize("parallel", [{"devices": 2}, {"offload": "optimizer"}])
def test_refuses_settings_that_are_not_supported_yet(parallel, base, chats, tmp_path):
    run = run_of(tmp_path, chats, method="lora", model=str(base), parallel=parallel)
    with pytest.raises(ConfigError, match=f"parallel.{next(iter(parallel))} is .*this version trains on one device"):
        prepared_of(run)


def test_q23_one_of_several_processes(base, chats, tmp_path, monkeypatch):
    run = run_of(tmp_path, chats, method="lora", model=str(base))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert severity_of(run, "Q23") == "error"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert severity_of(run, "Q23") is None
