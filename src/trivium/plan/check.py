"""Compare predictions with measurements: reads `plan.json` of run folders. Never imports torch."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from trivium.errors import ConfigError
from trivium.files import GIB

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Figure:
    """A prediction with its bounds, and the measured value; None if it was not measured."""

    predicted: float
    low: float
    high: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; positive if it is too high."""
        return self.predicted / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Outcome:
    """The plan of a run and its measurements.

    Attributes:
        path: the run folder.
        status: `no plan` if there is no readable plan.
        device: title of the device the plan is for.
        is_calibrated: whether the device's speed was measured, not taken from a data sheet.
        peak_bytes: peak memory of the device.
        tokens_per_second: training tokens, without padding.
        hours: time spent in steps.
        memory_items: bytes by category at the peak.
        instant: the part of the step where the peak is.
        measured_how: how the peak is measured.
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


def check(folders: Sequence[Path]) -> list[Outcome]:
    """Read the plans of several runs.

    Raises: ConfigError naming every path that is not a run folder.
    """
    if others := [str(folder) for folder in folders if not (folder / "run.yaml").is_file()]:
        raise ConfigError(
            f"Not a run folder: {', '.join(others)}. Expected folders that `trivium train` wrote, with a run.yaml in "
            "them, for example runs/NAME."
        )
    return [read_outcome(folder) for folder in folders]


def read_outcome(folder: Path) -> Outcome:
    """Read the plan of one run; a missing or malformed file counts as no plan."""
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
    """Raises: ValueError or TypeError if a value is not a finite number."""
    figure = Figure(
        float(record[key]), float(record["low"]), float(record["high"]), None if measured is None else float(measured)
    )
    if not all(math.isfinite(value or 0.0) for value in vars(figure).values()):
        raise ValueError("not finite")
    return figure


def _errors(outcomes: Sequence[Outcome], name: str) -> dict[str, Any] | None:
    """Median and worst absolute error of a figure over the finished runs; None if none was measured."""
    errors = [
        (abs(figure.error), str(outcome.path))
        for outcome in outcomes
        if outcome.status == "finished" and (figure := getattr(outcome, name)) and figure.error is not None
    ]
    if not errors:
        return None
    worst, run = max(errors)
    return {"median": median([error for error, _ in errors]), "worst": worst, "run": run}


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything as JSON: bytes, tokens per second, hours, relative errors."""
    runs = [
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
    ]
    return {
        "runs": runs,
        "peak_memory_bytes": _errors(outcomes, "peak_bytes"),
        "tokens_per_second": _errors(outcomes, "tokens_per_second"),
    }


def _record(figure: Figure | None) -> dict[str, float | None] | None:
    return {**asdict(figure), "error": figure.error} if figure else None


def as_table(outcomes: Sequence[Outcome]) -> str:
    """Everything as text, one line per run, then the median and worst errors."""
    head = ["run", "GiB predicted", "measured", "error", "tokens/s predicted", "measured", "error", ""]
    cells = [head]
    for outcome in outcomes:
        memory = _cells(outcome.peak_bytes, lambda size: f"{size / GIB:.2f}")
        speed = _cells(outcome.tokens_per_second, lambda rate: f"{rate:,.0f}")
        cells.append([str(outcome.path), *memory, *speed, "" if outcome.status == "finished" else outcome.status])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for run, *figures, status in cells:
        right = [cell.rjust(width) for cell, width in zip(figures, widths[1:-1], strict=True)]
        lines.append("  ".join([run.ljust(widths[0]), *right, status]).rstrip())
    for title, name in (("memory", "peak_bytes"), ("speed", "tokens_per_second")):
        if errors := _errors(outcomes, name):
            lines.append(f"{title}: median error {errors['median']:.1%}, worst {errors['worst']:.1%} ({errors['run']})")
    return "\n".join(lines)


def _cells(figure: Figure | None, show: Callable[[float], str]) -> list[str]:
    if figure is None:
        return ["-", "-", "-"]
    if figure.measured is None or figure.error is None:
        return [show(figure.predicted), "-", "-"]
    return [show(figure.predicted), show(figure.measured), f"{figure.error:+.1%}"]
