"""A run folder such as a finished quickstart leaves, with made-up but realistic numbers."""

import datetime
import json
import math
from pathlib import Path
from random import Random

import pytest

RUN_YAML = """\
name: little-stories
method: scratch  # run.yaml:1
model:
  params: 1000000  # run.yaml:2
data:
  sources:
    - path: stories.jsonl  # run.yaml:4
  seq_len: 256  # default
"""
PROVENANCE = {
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "hardware": {"device": "cpu, 2 threads", "compute_dtype": "float32", "peak_flops": 1.1e11},
    "model": {
        "family": "qwen3",
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_params": 1_049_984,
    },
    "num_steps": 600,
}
STORY = (
    "Once upon a time, there was a brave rabbit named Lily. Cheese and drawing made her happy. One stormy night, Lily "
    "went to the old forest. On a fine stump sat Ruby the duck, very angry."
)


def metrics_lines(num_steps: int) -> list[dict[str, object]]:
    """A falling loss, a cosine rate, and what a shared machine does to the speed."""
    rng, start = Random(0), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    lines: list[dict[str, object]] = []
    for step in range(0, num_steps + 1, 5):
        loss = 0.66 + 7.0 * math.exp(-step / 22) + 0.5 * math.exp(-step / 160)
        time = (start + datetime.timedelta(seconds=0.31 * step)).isoformat()
        if step % 60 == 0:
            lines.append({"step": step, "time": time, "eval/loss": loss + 0.01, "eval/num_tokens": 30_000})
        if step:
            rate = 3e-3 * min(1, step / 30) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 600)))
            lines.append(
                {
                    "step": step,
                    "time": time,
                    "train/loss": loss + rng.gauss(0, 0.015),
                    "train/grad_norm": 0.4 + 3 * math.exp(-step / 30) + abs(rng.gauss(0, 0.08)),
                    "train/learning_rate": rate,
                    "train/tokens_per_second": 13_500 + rng.gauss(0, 500) - (6000 if step == 5 else 0),
                    "train/mfu": 0.71 + rng.gauss(0, 0.02),
                    "train/peak_memory_gib": 1.1 + 0.2 * min(1, step / 60),
                    "train/num_tokens": 4096 * step,
                    "train/seconds": 0.31 * step,
                }
            )
    return lines


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A finished run with a floor, samples and checkpoints."""
    folder = tmp_path / "little-stories"
    for name in ("checkpoints/step-00000300", "checkpoints/step-00000600", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "run.yaml").write_text(RUN_YAML)
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE, indent=1))
    write_lines(folder / "metrics.jsonl", metrics_lines(600))
    prompt = "Once upon a time"
    texts = {0: " pan" * 20, 120: ", there was a was the the kite. " * 4, 360: STORY[16:120], 600: STORY[16:]}
    write_lines(
        folder / "samples.jsonl",
        [{"step": step, "prompt": prompt, "text": text} for step, text in texts.items()],
    )
    floor = {"nats_per_token": 0.6, "what": "entropy of the grammar on the held-out stories"}
    (folder / "floor.json").write_text(json.dumps(floor))
    (folder / "finished.json").write_text(json.dumps({"step": 600, "num_tokens": 4096 * 600}))
    return folder
