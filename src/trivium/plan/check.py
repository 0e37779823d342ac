"""Predictions against measurements, from the `plan.json` of run folders.

Reads one file of each folder, written by `engine/plan_record.py`. Never imports torch.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from trivium.errors import ConfigError
from trivium.plan.devices import GIB

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Figure:
    """A prediction with its bounds, and what was measured; None where nothing was yet."""

    predicted: float
    low: float
    high: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """By which share of the measured value the prediction is over it, or below."""
        return self.predicted / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Outcome:
    """The plan of a run and its measurements.

    Attributes:
        path: the run folder.
        status: `finished`, `unfinished`, or `no plan` where there is none to read.
        device: what was planned for.
        is_calibrated: whether the device's speed had been measured, rather than read from a data sheet.
        peak_bytes: most memory on the device.
        tokens_per_second: training tokens a second, padding not counted.
        hours: time spent in steps.
        memory_items: bytes by what they are for, at the instant of the peak.
        instant: when that is.
        measured_how: what the peak is the peak of.
    """

    path: Path
    status: Literal["finished", "unfinished", "no plan"]
    device: str = ""
    is_calibrated: bool = False
    peak_bytes: Figure | None = None
    tokens_per_second: Figure | None = None
    hours: Figure | None = None
    memory_items: dict[str, int] | None = None
    instant: str = ""
    measured_how: str = ""


@dataclass(frozen=True)
class Summary:
    """How far one kind of prediction was off over all finished runs, as shares without their sign."""

    median: float
    worst: float
    worst_run: str


def check(folders: Sequence[Path]) -> list[Outcome]:
    """The plans of many runs.

    Raises: ConfigError naming every path that is not a run folder.
    """
    if strangers := [str(folder) for folder in folders if not (folder / "run.yaml").is_file()]:
        raise ConfigError(
            f"Not a run folder: {', '.join(strangers)}. Expected folders that `trivium train` made, with a run.yaml in "
            "them. Name them as runs/NAME."
        )
    return [read_outcome(folder) for folder in folders]


def read_outcome(folder: Path) -> Outcome:
    """One run's plan; a missing, torn or malformed file counts as no plan."""
    status = "finished" if (folder / "finished.json").is_file() else "unfinished"
    try:
        plan: dict[str, Any] = json.loads((folder / PLAN_FILE).read_bytes())
        predicted, measured = plan["predicted"], plan.get("measured") or {}
        memory = predicted["peak_memory"]
        return Outcome(
            path=folder,
            status=status,
            device=str(predicted["device"]),
            is_calibrated=bool(predicted["is_calibrated"]),
            peak_bytes=_figure(memory, "bytes", measured.get("peak_memory_bytes")),
            tokens_per_second=_figure(predicted["speed"], "tokens_per_second", measured.get("tokens_per_second")),
            hours=_figure(predicted["time"], "hours", measured.get("hours") if status == "finished" else None),
            memory_items={str(name): int(size) for name, size in memory["items"].items()},
            instant=str(memory["instant"]),
            measured_how=str(memory["what"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return Outcome(folder, "no plan")


def _figure(record: dict[str, Any], key: str, measured: Any) -> Figure:
    """Raises: ValueError or TypeError where a value is not a finite number."""
    figure = Figure(
        float(record[key]), float(record["low"]), float(record["high"]), None if measured is None else float(measured)
    )
    if not all(math.isfinite(value or 0.0) for value in vars(figure).values()):
        raise ValueError("not finite")
    return figure


def summarise(outcomes: Sequence[Outcome], figure: Callable[[Outcome], Figure | None]) -> Summary | None:
    """Median and worst error of finished runs in one figure; None where none was measured."""
    errors = [
        (abs(found.error), str(outcome.path))
        for outcome in outcomes
        if outcome.status == "finished" and (found := figure(outcome)) and found.error is not None
    ]
    if not errors:
        return None
    worst, worst_run = max(errors)
    return Summary(median([error for error, _ in errors]), worst, worst_run)


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of it for programs: bytes, tokens a second, errors as shares of what was measured."""
    return {
        "runs": [
            {
                "run": str(outcome.path),
                "status": outcome.status,
                "device": outcome.device or None,
                "is_calibrated": outcome.is_calibrated,
                "peak_memory_bytes": _record(outcome.peak_bytes),
                "tokens_per_second": _record(outcome.tokens_per_second),
                "hours": _record(outcome.hours),
            }
            for outcome in outcomes
        ],
        "peak_memory_bytes": _summary_record(summarise(outcomes, lambda outcome: outcome.peak_bytes)),
        "tokens_per_second": _summary_record(summarise(outcomes, lambda outcome: outcome.tokens_per_second)),
    }


def _record(figure: Figure | None) -> dict[str, float | None] | None:
    if figure is None:
        return None
    return {
        "predicted": figure.predicted,
        "low": figure.low,
        "high": figure.high,
        "measured": figure.measured,
        "error": figure.error,
    }


def _summary_record(summary: Summary | None) -> dict[str, Any] | None:
    return None if summary is None else {"median": summary.median, "worst": summary.worst, "run": summary.worst_run}


def as_table(outcomes: Sequence[Outcome]) -> str:
    """All of it to read, a line a run; errors count from what was measured, so +5 % promised 5 % too much."""
    head = ["run", "GiB predicted", "measured", "error", "tokens/s predicted", "measured", "error", ""]
    lines = [head]
    for outcome in outcomes:
        memory = _cells(outcome.peak_bytes, lambda size: f"{size / GIB:.2f}")
        speed = _cells(outcome.tokens_per_second, lambda rate: f"{rate:,.0f}")
        lines.append([str(outcome.path), *memory, *speed, "" if outcome.status == "finished" else outcome.status])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = [
        "  ".join(
            cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    named = {
        "memory": summarise(outcomes, lambda outcome: outcome.peak_bytes),
        "speed": summarise(outcomes, lambda outcome: outcome.tokens_per_second),
    }
    rows += [
        f"{name}: median error {summary.median:.1%}, worst {summary.worst:.1%} ({summary.worst_run})"
        for name, summary in named.items()
        if summary is not None
    ]
    return "\n".join(rows)


def _cells(figure: Figure | None, show: Callable[[float], str]) -> list[str]:
    if figure is None:
        return ["-", "-", "-"]
    if figure.measured is None or figure.error is None:
        return [show(figure.predicted), "-", "-"]
    return [show(figure.predicted), show(figure.measured), f"{figure.error:+.1%}"]
