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
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trivium.engine.record import read_record

RESULT = Path(__file__).parent / "results" / "small_data.json"
CHOICES: tuple[tuple[int | None, float | None], ...] = ((16_384, 3), (1024, 3), (None, None))
"""Tokens of a step and epochs; None for what Trivium chooses."""


def measure(model: str, file: str, step_tokens: int | None, epochs: float | None, folder: Path) -> dict[str, Any]:
    """Train once, in a process of its own so that its peak memory is its own, and read the run's records."""
    given = [f"runs_dir={folder}", f"name={Path(file).stem}-{step_tokens}-{epochs}"]
    given += [f"batch.tokens={step_tokens}"] if step_tokens else []
    given += [f"budget.epochs={epochs}"] if epochs else []
    run_file = folder / "run.yaml"
    run_file.write_text(f"method: lora\nmodel: {json.dumps(model)}\ndata: {json.dumps(file)}\n")
    command = [sys.executable, "-m", "trivium.cli", "train", str(run_file), *given]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    record = read_record(Path(result.stdout.strip()).parent)
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
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    versions = {package: version(package) for package in ("torch", "peft", "trivium")}
    content = {"date": datetime.date.today().isoformat(), "model": Path(options.model).name, "versions": versions}
    RESULT.write_text(json.dumps({**content, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
