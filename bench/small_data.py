"""How large should a step be, and how many passes, for a few hundred conversations?

Writes bench/results/small_data.json.
Trains a LoRA adapter of one model on each file with several sizes of the step and numbers of epochs, everything else at
its default, and records the held-out loss before, at its lowest and at the end. `plan/amount.py` takes its constants
from here.

    python bench/small_data.py MODEL_FOLDER FILE...
"""

import argparse
import datetime
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trivium.config.load import load_run
from trivium.engine.loop import Silent
from trivium.engine.record import read_record
from trivium.train import train_quietly

RESULT = Path(__file__).parent / "results" / "small_data.json"
CHOICES: tuple[tuple[int | None, float | None], ...] = ((16_384, 3), (1024, 3), (None, None))
"""Tokens of a step and epochs; None for what Trivium chooses."""


def measure(model: str, file: str, step_tokens: int | None, epochs: float | None, folder: Path) -> dict[str, Any]:
    """Train once and read the run's records."""
    name = f"{Path(file).stem}-{step_tokens}-{epochs}"
    given = [f"model={model}", f'data=["{file}"]', f"name={name}", f"runs_dir={folder}"]
    given += [f"batch.tokens={step_tokens}"] if step_tokens else []
    given += [f"budget.epochs={epochs}"] if epochs else []
    record = read_record(train_quietly(load_run(None, ["method=lora", *given]), Silent()).path)
    losses = record.curve("eval/loss")
    return {
        "data": Path(file).name,
        "is_default": step_tokens is None,
        "step_tokens": record.config["batch"]["tokens"],
        "epochs": record.config["budget"]["epochs"],
        "steps": record.step,
        "held_out_tokens": record.metrics[0].get("eval/num_tokens"),
        "loss_before": losses.values[0],
        "loss_lowest": min(losses.values),
        "loss_end": losses.values[-1],
        "seconds": record.curve("train/seconds").last,
        "tokens_per_second": record.curve("train/tokens_per_second").typical,
        "peak_memory_gib": record.curve("train/peak_memory_gib").highest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file in options.files:
            for step_tokens, epochs in CHOICES:
                rows.append(measure(options.model, file, step_tokens, epochs, Path(folder)))
                print(json.dumps(rows[-1]), file=sys.stderr)
    versions = {package: version(package) for package in ("torch", "peft", "trivium")}
    content = {"date": datetime.date.today().isoformat(), "model": Path(options.model).name, "versions": versions}
    RESULT.write_text(json.dumps({**content, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
