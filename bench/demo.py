"""Runs the demo and records what it shows: a real model before and after, in what time and memory.

Writes bench/results/demo.json. Wall-clock times are of whatever else the machine does meanwhile; CPU times are not.

    python bench/demo.py
"""

import datetime
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trivium.demo import model
from trivium.demo.demo import CHATS, compare_demo, measure, questions, read_data, summary, train_demo
from trivium.engine.provenance import versions

RESULT = Path(__file__).parent / "results" / "demo.json"


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Clock:
    """Wall-clock and CPU seconds of the parts of a program; child processes count when they have ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.last = self._now()

    def lap(self, name: str) -> None:
        """Record the time since the previous lap."""
        now = self._now()
        self.seconds[name] = {key: round(now[key] - self.last[key], 1) for key in now}
        self.last = now

    def _now(self) -> dict[str, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {"wall": time.perf_counter(), "cpu": sum(one.ru_utime + one.ru_stime for one in used)}


def run(out: Path) -> dict[str, Any]:
    """The demo in a folder, and its figures."""
    clock = Clock()
    base = model.fetch(out / model.NAME, to_stderr)
    clock.lap("fetch")
    folder = train_demo(base, out, to_stderr)
    clock.lap("train")
    comparison, _ = compare_demo(folder, out, to_stderr, lambda name: lambda done, total: None)
    clock.lap("compare")
    before, after = comparison.models
    return {
        "model": model.NAME,
        "cpu_cores": os.cpu_count(),
        "num_conversations": len(read_data(CHATS).splitlines()),
        "num_steps": (folder.read("finished.json") or {})["step"],
        "num_questions": len(questions()),
        "before": measure(before),
        "after": measure(after),
        "transcript": summary(comparison),
        "num_trained_params": after.num_trained_params,
        "adapter_bytes": after.size_bytes,
        "peak_memory_gib": after.peak_memory_gib,
        "tokens_per_second": after.tokens_per_second,
        "seconds": clock.seconds,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    content = {"date": datetime.date.today().isoformat(), "versions": versions(), **found}
    RESULT.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
