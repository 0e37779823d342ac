"""What a run folder says about its run, read with patience: a run may be running, stopped, or dead half-way.

Reads only, never raises on a missing or torn record, and knows nothing of HTML. Used by the report.
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
    """One metric over the run: optimizer steps and finite values, in the order they were written."""

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> float | None:
        """The newest value."""
        return self.values[-1] if self.values else None

    @property
    def typical(self) -> float | None:
        """The median: neither the slow first step nor one hiccup moves it."""
        return median(self.values) if self.values else None

    @property
    def highest(self) -> float | None:
        """The largest value."""
        return max(self.values, default=None)


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    Attributes:
        status: `finished`, `failed`, `running` or `stopped`.
        config, provenance: what run.yaml and provenance.json hold; empty where they are missing or torn.
        run_yaml, provenance_json: the same as text, to show.
        metrics, samples: the lines of the JSONL files up to a torn one.
        plan: what was predicted and what became of it.
        floor: the least loss possible, in nats a token, and what it is; None where nobody computed one.
        failure: why the run stopped by itself; None where it did not.
        checkpoints: names of the folders, oldest first.
        missing: names of the records that the folder lacks.
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
        """A metric's finite values; what is not a finite number cannot be drawn and is left out."""
        points = [(line["step"], line[name]) for line in self.metrics if _is_finite(line.get(name))]
        return Curve([step for step, _ in points], [float(value) for _, value in points])

    @property
    def step(self) -> int:
        """The last step that left a line of metrics."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def above_floor(self) -> float | None:
        """How far the last held-out loss is above the floor, as a share of the floor; None where either is missing."""
        loss = self.curve("eval/loss").last
        return None if loss is None or self.floor is None else loss / self.floor["nats_per_token"] - 1


def read_record(path: Path) -> Record:
    """Read all that a run folder holds.

    Raises: TriviumError when `path` is no run folder.
    """
    folder = RunFolder.existing(path)
    run_yaml, provenance_json = _text(path / "run.yaml"), _text(path / "provenance.json")
    floor = _mapping(folder.read("floor.json"))
    return Record(
        name=path.resolve().name,
        status=_status(folder),
        config=_yaml(run_yaml),
        provenance=_mapping(folder.read("provenance.json")) or {},
        run_yaml=run_yaml,
        provenance_json=provenance_json,
        metrics=_lines(folder.metrics),
        samples=_lines(folder.samples),
        plan=read_outcome(path),
        floor=floor if floor and _is_finite(floor.get("nats_per_token")) and floor["nats_per_token"] > 0 else None,
        failure=_mapping(folder.read("failure.json")),
        checkpoints=sorted(entry.name for entry in folder.checkpoints.glob("step-*")),
        missing=[
            *(name for name in RECORDS if not (path / name).exists()),
            *(() if folder.result.exists() else ("the result",)),
        ],
    )


def _status(folder: RunFolder) -> str:
    """A failure is cleared by a resume, so it outranks everything; a dead process holds no lock."""
    if folder.read("failure.json") is not None:
        return "failed"
    if folder.is_finished:
        return "finished"
    return "running" if _is_locked(folder.path / "lock") else "stopped"


def _is_locked(path: Path) -> bool:
    """Whether a live process holds the run's lock; a shared lock for an instant changes nothing in the file."""
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


def _mapping(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _yaml(text: str) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(text)) or {}
    except yaml.YAMLError:
        return {}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
