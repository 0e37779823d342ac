"""Every recipe loads, fits the device in its header, and trains one optimizer step with a small model and data."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.engine.runs import write_conversations, write_corpus
from tests.support.models import make_base
from trivium.config.load import load_run
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.engine.build import build_engine
from trivium.engine.device import Machine
from trivium.engine.loop import Progress, batches_ahead, train_step
from trivium.engine.prepare import prepare
from trivium.engine.ranks import ALONE
from trivium.engine.runfolder import RunFolder
from trivium.files import GIB
from trivium.model.resolve import planned_shape
from trivium.model.shape import QwenShape
from trivium.plan import devices
from trivium.plan.fit import fits
from trivium.plan.memory import peak_memory
from trivium.plan.workload import of_run, with_batching

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape(run: Run) -> QwenShape:
    found = planned_shape(run)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def shipped_prices(monkeypatch):
    monkeypatch.setenv("TRIVIUM_HOME", "/dev/null")


def test_recipes_cover_every_method():
    assert {load_run(path).run.method for path in FILES.values()} == set(METHOD_DEFAULTS)


@pytest.mark.parametrize("name", FILES)
def test_recipe_header_matches_peak_memory(name):
    run, header = load_run(FILES[name]).run, FILES[name].read_text(encoding="utf-8")
    count, title = re.findall(r"^# device: (\d+) x (.+)$", header, re.MULTILINE)[0]
    device = {device.title: device for device in devices.catalog().values()}[title]
    assert run.precision != "auto" and run.parallel.devices == int(count)
    work = of_run(run, shape(run), None, run.precision, "cpu" if device.kind == "cpu" else "gpu")
    memory = peak_memory(work)
    assert fits(memory, device.memory_bytes)
    assert f"# peak memory: {memory.total / GIB:.2f} GiB" in header
    for saved in re.findall(r"true needs ([\d.]+) GiB less", header):
        less = memory.total - peak_memory(with_batching(work, work.micro_tokens, True)).total
        assert f"{less / GIB:.1f}" == saved


@dataclass(frozen=True)
class Small:
    """A small model of each family with a chat template, and a little data of each kind."""

    models: dict[str, Path]
    data: dict[str, Path]
    cache: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    folder = tmp_path_factory.mktemp("recipes")
    return Small(
        models={"qwen3": make_base(folder / "qwen3"), "qwen2": make_base(folder / "qwen2", family="qwen2")},
        data={
            "assistant": write_conversations(folder / "chats.jsonl", 40),
            "all": write_corpus(folder / "corpus.jsonl", 20),
        },
        cache=folder / "cache",
    )


def shrunken(name: str, small: Small, runs_dir: Path) -> Run:
    """The recipe with another model and other data, a short step and one device; all else unchanged."""
    run = load_run(FILES[name]).run
    budgeted = run.model.params is not None
    model = "100K" if budgeted else small.models[shape(run).family]
    settings = [
        f"model={model}",
        f"data.sources=[{small.data[run.loss_tokens]}]",
        "data.seq_len=128",
        "data.held_out=0.0",
        "data.workers=1",
        f"data.cache_dir={small.cache}",
        "batch.tokens=512",
        "batch.micro_tokens=256",
        "budget={steps: 1}",
        "parallel.devices=1",
        "parallel.offload=none",
        f"runs_dir={runs_dir}",
        *(["tokenizer={train: {kind: byte, vocab_size: 259}}"] if budgeted else []),
    ]
    return load_run(FILES[name], settings).run


@pytest.mark.parametrize("name", FILES)
def test_recipe_trains_one_step(name, small, tmp_path):
    run = shrunken(name, small, tmp_path)
    machine = Machine(torch.device("cpu"), DTYPES[run.precision], 1e9, 8 << 30)
    job = prepare(run, lambda text: None, machine)
    assert job.has_conversations == (run.loss_tokens == "assistant")
    engine = build_engine(job, machine)
    trained = {key: value.detach().clone() for key, value in engine.model.named_parameters() if value.requires_grad}
    assert any(".lora_" in key for key in trained) == (run.trainable == "adapter")

    folder = RunFolder(tmp_path / run.name)
    folder.path.mkdir()
    with batches_ahead(job, machine, 0, ALONE) as ahead:
        figures = train_step(job, engine, ahead, folder, Progress(job.inputs))

    assert math.isfinite(figures["train/loss"]) and figures["train/grad_norm"] > 0.0
    assert any(not torch.equal(value, trained[key]) for key, value in engine.model.named_parameters() if key in trained)
