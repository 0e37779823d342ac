"""Small real runs in separate processes, for tests that kill, stop and damage them."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer  # noqa: F401  imported here so that the fork server has it before it forks

from tests.support.processes import context
from trivium.engine.runfolder import RunFolder
from trivium.quickstart.grammar import story

WALL_CLOCK = {"time", "train/tokens_per_second", "train/mfu", "train/peak_memory_gib", "train/seconds"}


def write_corpus(path: Path, num_stories: int = 150) -> Path:
    rng = Random(5)
    path.write_text("".join(json.dumps({"text": story(rng).text}) + "\n" for _ in range(num_stories)))
    return path


def write_conversations(path: Path, num_rows: int = 120) -> Path:
    """Short conversations of one and two turns, each answer a word of its question."""
    rng = Random(6)
    rows = []
    for _ in range(num_rows):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            words = rng.sample(["fox", "crow", "hen", "owl", "bear", "wolf"], 3)
            messages.append({"role": "user", "content": f"last of {' '.join(words)}?"})
            messages.append({"role": "assistant", "content": words[-1]})
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return path


def run_values(corpus: Path, runs_dir: Path, **values: Any) -> dict[str, Any]:
    """A run of 24 steps over about 3 epochs' worth of documents, with everything periodic happening often."""
    return {
        "method": "scratch",
        "name": "small",
        "model": {
            "shape": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
            }
        },
        "tokenizer": {"train": {"kind": "byte", "vocab_size": 259}},
        "data": {
            "sources": [str(corpus)],
            "seq_len": 64,
            "held_out": 0.05,
            "workers": 1,
            "cache_dir": str(corpus.parent / "cache"),
        },
        "budget": {"steps": 24},
        "batch": {"tokens": 512, "micro_tokens": 256},
        "eval": {"every_steps": 6, "max_tokens": 1024},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 3},
        "device": "cpu",
        "precision": "fp32",
        "runs_dir": str(runs_dir),
        **values,
    }


def train(values: dict[str, Any], observer: Any = None) -> None:
    """Start or resume a run, in this process."""
    from trivium.config.load import ResolvedRun
    from trivium.config.run import Run, with_method_defaults
    from trivium.doctor.examine import IDS
    from trivium.engine.loop import Silent
    from trivium.train import train_quietly

    train_quietly(ResolvedRun(Run.model_validate(with_method_defaults(values)), {}), observer or Silent(), IDS)


def spawn(values: dict[str, Any]) -> Any:
    """A run in a real process, which can be killed."""
    process = context.Process(target=train, args=(values,))
    process.start()
    return process


def wait_until(is_reached: Callable[[], object], process: Any) -> None:
    """Wait for something that a run does; fails when the run ends before."""
    while not is_reached():
        assert process.is_alive() or is_reached(), f"the run ended before, with exit code {process.exitcode}"
        time.sleep(0.001)


def finish(values: dict[str, Any]) -> None:
    """Run the same command until it ends by itself."""
    process = spawn(values)
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def adapt_values(base: Path, conversations: Path, runs_dir: Path, **values: Any) -> dict[str, Any]:
    """A run on a base model; everything else as in `run_values`, on conversations that stay whole in their rows."""
    data = {"sources": [str(conversations)], "seq_len": 128, "held_out": 0.1, "workers": 1}
    data["cache_dir"] = str(conversations.parent / "cache")
    defaults = {"model": {"name": str(base)}, "data": data, "tokenizer": None, "optimizer": {"lr": 1e-2}}
    return run_values(conversations, runs_dir, **defaults | values)


def outcome(runs_dir: Path) -> dict[str, Any]:
    """All that must be the same after any number of kills: weights, moments, result, ledger, metrics but for time."""
    folder = runs_dir / "small"
    last = max((folder / "checkpoints").glob("step-*"))
    files = [last / "model.safetensors", last / "training.safetensors", *RunFolder(folder).result.glob("*.safetensors")]
    hashes = {file.name + file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "hashes": hashes,
        "ledger": (folder / "ledger.jsonl").read_text(),
        "metrics": [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in metrics],
    }
