"""Read the files of a run folder for reports and comparisons.

The run may still be running or may have been killed, so missing and truncated files are not errors.
"""

import fcntl
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trivium.engine.runfolder import JsonLines, RunFolder
from trivium.plan.check import Outcome, read_outcome

RECORDS = ("run.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl", "checkpoints")


@dataclass(frozen=True)
class Curve:
    """The finite values of one metric and their optimizer steps, in the order they were written."""

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> float | None:
        """The latest value."""
        return self.values[-1] if self.values else None

    @property
    def typical(self) -> float | None:
        """The median, which ignores a slow first step."""
        return median(self.values) if self.values else None

    @property
    def highest(self) -> float | None:
        """The largest value."""
        return max(self.values, default=None)


@dataclass(frozen=True)
class Record:
    """The contents of a run folder.

    Attributes:
        status: `finished`, `failed`, `running` or `stopped`.
        config, provenance: run.yaml and provenance.json; empty if missing or damaged.
        run_yaml, provenance_json: their text.
        metrics, samples: the lines of the JSONL files before the first truncated one.
        plan: prediction and measurement.
        floor: floor.json: the lowest possible loss in nats per token and its meaning; None if not computed.
        failure: failure.json; None if the run did not fail.
        checkpoints: folder names, oldest first.
        missing: names of missing files.
    """

    name: str
    status: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    run_yaml: str
    provenance_json: str
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    plan: Outcome
    floor: dict[str, Any] | None
    failure: dict[str, Any] | None
    checkpoints: list[str]
    missing: list[str]

    def curve(self, name: str) -> Curve:
        """The finite values of a metric."""
        points = [(line["step"], line[name]) for line in self.metrics if _is_finite(line.get(name))]
        return Curve([step for step, _ in points], [float(value) for _, value in points])

    @property
    def step(self) -> int:
        """The last step with metrics."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def above_floor(self) -> float | None:
        """Relative distance of the last held-out loss to the floor; None if either is missing."""
        loss = self.curve("eval/loss").last
        return None if loss is None or self.floor is None else loss / self.floor["nats_per_token"] - 1


def read_record(path: Path) -> Record:
    """Read a run folder.

    Raises: TriviumError when `path` is not a run folder.
    """
    folder = RunFolder.existing(path)
    run_yaml, provenance_json = (
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for file in (folder.run_yaml, path / "provenance.json")
    )
    floor = folder.read("floor.json")
    return Record(
        name=path.resolve().name,
        status=_status(folder),
        config=_yaml(run_yaml),
        provenance=folder.read("provenance.json") or {},
        run_yaml=run_yaml,
        provenance_json=provenance_json,
        metrics=_lines(folder.metrics),
        samples=_lines(folder.samples),
        plan=read_outcome(path),
        floor=floor if floor and _is_finite(floor.get("nats_per_token")) and floor["nats_per_token"] > 0 else None,
        failure=folder.read("failure.json"),
        checkpoints=sorted(entry.name for entry in folder.checkpoints.glob("step-*")),
        missing=[
            *(name for name in RECORDS if not (path / name).exists()),
            *(() if folder.result.exists() else ("the result",)),
        ],
    )


def _status(folder: RunFolder) -> str:
    """A resume deletes failure.json, so it is checked first; a dead process holds no lock."""
    if folder.read("failure.json") is not None:
        return "failed"
    if folder.is_finished:
        return "finished"
    return "running" if _is_locked(folder.path / "lock") else "stopped"


def _is_locked(path: Path) -> bool:
    """Whether a live process holds the run's lock, tested by taking a shared lock for an instant."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lines(records: JsonLines) -> list[dict[str, Any]]:
    return [line for line in records if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _yaml(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
