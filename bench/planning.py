"""How long the planner takes to answer: each published model in a fresh process, and searches over all choices.

A search covers every rentable device, 1 to 8 of each, every micro-batch, state dtype, strategy and offload. Writes
bench/results/planning.json. Targets: an answer under 1 s, a search under 3 s.

    python bench/planning.py
"""

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from trivium.model import catalog

RESULT = Path(__file__).parent / "results" / "planning.json"
COMMAND = [str(Path(sys.executable).with_name("trivium")), "plan"]
DATA = ["--rows", "20K", "--kind", "conversations"]


def seconds_of(arguments: list[str]) -> float:
    """Wall time of a fresh process, import of everything included. Raises: RuntimeError where it does not answer."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr}")
    return round(time.perf_counter() - start, 3)


def main() -> None:
    names = [name for name in catalog.names() if name.startswith("Qwen")]
    answers = {name: seconds_of([f"Qwen/{name}", *DATA, "--device", "a100-80"]) for name in names}
    searches = {
        f"{name}, {method}, {wish}": seconds_of(
            [f"Qwen/{name}", *DATA, "--device", "any", "--devices", "8", "--method", method, "--prefer", wish]
        )
        for name in ("Qwen3-0.6B", "Qwen3-8B", "Qwen2.5-72B")
        for method in ("lora", "full")
        for wish in ("cheapest", "fastest")
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu_cores": os.cpu_count(),
        "slowest_answer_seconds": max(answers.values()),
        "slowest_search_seconds": max(searches.values()),
        "answer_seconds": answers,
        "search_seconds": searches,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"slowest of {len(answers)} answers  {result['slowest_answer_seconds']:.2f} s (target 1 s)")
    print(f"slowest of {len(searches)} searches {result['slowest_search_seconds']:.2f} s (target 3 s)")


if __name__ == "__main__":
    main()
