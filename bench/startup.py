"""How long the command takes to respond: `trivium --help`, and every invalid run file of the tests.

Each figure is the median of 5 fresh processes, imports included. Writes bench/results/startup.json.
Targets: help under 0.3 s, every error under 2 s.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.malformed import CASES  # noqa: E402  (the cases live with the tests)

NUM_PROCESSES = 5
HELP_TARGET_SECONDS = 0.3
ERROR_TARGET_SECONDS = 2.0
COMMAND = [str(Path(sys.executable).with_name("trivium"))]


def median_seconds(arguments: list[str], folder: Path, exit_code: int) -> float:
    """Median wall time of fresh processes. Raises: RuntimeError when one ends otherwise than expected."""
    seconds = []
    for _ in range(NUM_PROCESSES):
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True)
        seconds.append(time.perf_counter() - start)
        if done.returncode != exit_code:
            raise RuntimeError(f"{arguments} ended with {done.returncode}, not {exit_code}: {done.stderr.decode()}")
    return round(statistics.median(seconds), 4)


def measure_errors(folder: Path) -> dict[str, float]:
    """Seconds of `trivium config show` on each wrong run file, by the case's name."""
    seconds = {}
    for case in CASES:
        content = case.content.encode() if isinstance(case.content, str) else case.content
        (folder / "run.yaml").write_bytes(content)
        seconds[case.name] = median_seconds(["config", "show", "run.yaml", *case.overrides], folder, exit_code=2)
    return seconds


def main() -> None:
    """Measure, write the JSON, and print the two figures that have a target."""
    with tempfile.TemporaryDirectory() as name:
        help_seconds = median_seconds(["--help"], Path(name), exit_code=0)
        error_seconds = measure_errors(Path(name))
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in ("click", "pydantic", "PyYAML")}
        | {"python": platform.python_version()},
        "cpu_cores": os.cpu_count(),
        "processes_per_figure": NUM_PROCESSES,
        "help_seconds": help_seconds,
        "slowest_error_seconds": max(error_seconds.values()),
        "median_error_seconds": round(statistics.median(error_seconds.values()), 4),
        "num_error_cases": len(error_seconds),
        "targets": {"help_seconds": HELP_TARGET_SECONDS, "error_seconds": ERROR_TARGET_SECONDS},
        "error_seconds": error_seconds,
    }
    (ROOT / "bench" / "results" / "startup.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"trivium --help      {help_seconds:.3f} s (target {HELP_TARGET_SECONDS} s)")
    slowest = result["slowest_error_seconds"]
    print(f"slowest of {len(CASES)} errors {slowest:.3f} s (target {ERROR_TARGET_SECONDS} s)")


if __name__ == "__main__":
    main()
