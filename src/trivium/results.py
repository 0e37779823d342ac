"""What the functions of `trivium.api` return: small values that show themselves as text, or in a notebook as a page."""

import textwrap
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivium.errors import TriviumError, printable

if TYPE_CHECKING:
    from trivium.doctor.findings import Finding
    from trivium.engine.record import Record
    from trivium.plan.advice import Advice
    from trivium.plan.search import Plan
    from trivium.use.compare import ComparedModel, Comparison

COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}

PAGE_HEIGHT = 640


@dataclass(frozen=True)
class Report:
    """A report; a notebook shows the page itself."""

    path: Path

    def _repr_html_(self) -> str:
        return _frame(self.path.read_text(encoding="utf-8"))


def _frame(page: str) -> str:
    """A whole page inside of another: the styles of a report and of a notebook do not mix."""
    return f'<iframe srcdoc="{escape(page)}" style="width:100%;height:{PAGE_HEIGHT}px;border:0"></iframe>'


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """The folder of a run, finished or not, and what is in it.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    @cached_property
    def record(self) -> "Record":
        """The run folder's files, read once. Raises: TriviumError when `folder` is not a run folder."""
        from trivium.engine.record import read_record

        return read_record(self.folder)

    @property
    def result(self) -> Path:
        """The folder of the model or adapter, for `trivium.load`, transformers or PEFT."""
        from trivium.engine.runfolder import RunFolder

        return RunFolder(self.folder).result

    @property
    def report(self) -> Report:
        """The run's report.html, written now if the run was killed before it could."""
        path = self.folder / "report.html"
        if path.is_file():
            return Report(path)
        from trivium.report.html import write_report

        return Report(write_report(self.folder))

    @cached_property
    def metrics(self) -> dict[str, list[Any]]:
        """Every logged step as columns, for example for pandas.DataFrame; None where a step has no such value."""
        rows: dict[int, dict[str, Any]] = {}
        for line in self.record.metrics:
            rows.setdefault(line["step"], {}).update(line)
        names = dict.fromkeys(name for row in rows.values() for name in row)
        return {name: [row.get(name) for row in rows.values()] for name in names}

    @property
    def train_loss(self) -> float | None:
        """The last training loss in nats per token."""
        return self.record.curve("train/loss").last

    @property
    def held_out_loss(self) -> float | None:
        """The last loss on the held-out documents in nats per token; None without any."""
        return self.record.curve("eval/loss").last

    def __repr__(self) -> str:
        losses = {"training loss": self.train_loss, "held-out loss": self.held_out_loss}
        shown = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        state = f"{self.record.status} at step {self.record.step:,}"
        return f"<run {self.folder}: {', '.join([state, *shown])}>"


@dataclass(frozen=True, repr=False)
class TrainingPlan:
    """The answer of the planner; its text is the page that `trivium plan` prints.

    Attributes:
        advice: the method with reasons, the plan, and warnings.
    """

    advice: "Advice"

    @property
    def plan(self) -> "Plan | None":
        """The planned run with its memory, speed and cost; None if the advice is not to train."""
        return self.advice.plan

    @property
    def record(self) -> dict[str, Any]:
        """Everything as plain values, as `trivium plan --json` prints it: bytes, seconds, hours, US dollars."""
        from trivium.plan.advice import as_record

        return as_record(self.advice)

    def __repr__(self) -> str:
        from trivium.report.plan_page import page_text

        return page_text(self.advice)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What the doctor found in a run; its text is the page that `trivium doctor` prints.

    Attributes:
        findings: in the order of the checks.
        allowed: ids of the rules whose errors do not stop the run.
        failure: why the run could not be prepared, which ended the checks early; None if it could.
    """

    findings: tuple["Finding", ...]
    allowed: frozenset[str] = frozenset()
    failure: TriviumError | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing stops the run."""
        return self._refusal is None

    def require_sound(self) -> None:
        """Raise the error that stops the run, if there is one."""
        if self._refusal is not None:
            raise self._refusal

    @property
    def _refusal(self) -> TriviumError | None:
        from trivium.doctor.findings import refusal, stopping

        errors = stopping(self.findings, self.allowed)
        return self.failure or (refusal(errors, with_paragraphs=False) if errors else None)

    @property
    def page(self) -> str:
        """All findings as text with colors for a terminal, errors first; empty without findings."""
        blocks = [self._block(finding) for name in COLORS for finding in self.findings if finding.severity == name]
        return "\n\n".join(blocks) + "\n" if blocks else ""

    def _block(self, finding: "Finding") -> str:
        wrapper = textwrap.TextWrapper(
            100, initial_indent="  ", subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
        )
        mark = " (allowed)" if finding.severity == "error" and finding.id in self.allowed else ""
        label = click.style(f"{finding.severity}{mark}", fg=COLORS[finding.severity], bold=True)
        lines = [f"{label}  {click.style(finding.id, bold=True)} {finding.title}"]
        texts = {"Found:": finding.found, "Expected:": finding.expected, "Fix:": finding.fix}
        lines += [wrapper.fill(f"{name:<10}{printable(text)}") for name, text in texts.items()]
        return "\n".join([*lines, f"  {finding.anchor}"])

    def __repr__(self) -> str:
        last = str(self._refusal) if self._refusal else "" if self.findings else "Nothing to fix: all checks passed."
        return "\n".join(part for part in (click.unstyle(self.page), last) if part).rstrip()


@dataclass(frozen=True, repr=False)
class ModelComparison:
    """Models side by side; its text is the table that `trivium compare` prints, and a notebook shows the report.

    Attributes:
        comparison: every figure and answer.
    """

    comparison: "Comparison"

    @property
    def models(self) -> "list[ComparedModel]":
        """Base models first, then the others in the order given."""
        return self.comparison.models

    @property
    def table(self) -> dict[str, list[Any]]:
        """The table as columns, one entry per model, for example for pandas.DataFrame; None if not measured."""
        from trivium.report.comparison import table

        rows = {row.label: row.values for row in table(self.comparison)}
        return {"model": [model.name for model in self.models], **rows}

    def __repr__(self) -> str:
        from trivium.report.comparison import as_text

        return click.unstyle(as_text(self.comparison)).rstrip()

    def _repr_html_(self) -> str:
        from trivium.report.comparison import render

        return _frame(render(self.comparison))
