"""What the functions of `trivium.api` return: small values that show themselves as text, or in a notebook as HTML."""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.engine.record import Record

PAGE_HEIGHT = 640


@dataclass(frozen=True)
class Report:
    """A report; a notebook shows the page itself."""

    path: Path

    def _repr_html_(self) -> str:
        # In a frame, the styles of the page and of the notebook do not mix.
        page = escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width:100%;height:{PAGE_HEIGHT}px;border:0"></iframe>'


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
        """The run's report.html."""
        return Report(self.folder / "report.html")

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
