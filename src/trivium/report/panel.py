"""Shows a run as a live panel on a terminal or in a notebook, otherwise as plain lines: Observers of the loop."""

import math
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trivium.errors import count_of, printable
from trivium.plan.cost import hours

BARS = "".join(chr(0x2581 + level) for level in range(8))
CURVE_ROWS, LABEL_COLUMNS = 5, 9  # -1.23e-05
FIRST_FALL = 10
"""The first bars, one in so many, may exceed the chart, so that the fall at the start does not flatten the rest."""
FRAME_COLUMNS = 4
CELL_GAP = 3
NOTEBOOK_SECONDS = 0.5


def curve(values: list[float], columns: int, rows: int = CURVE_ROWS) -> list[str]:
    """A bar chart of `rows` lines of `columns` characters, on a logarithmic axis with its two ends written at the left.

    A bar is the mean of the values in its place; a few values fill the width too.
    """
    columns -= LABEL_COLUMNS
    if not values or columns < 1:
        return []
    edges = [column * len(values) // columns for column in range(columns + 1)]
    pieces = [values[start : max(start + 1, stop)] for start, stop in pairwise(edges)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, high = min(means), max(means[columns // FIRST_FALL :])
    scale = math.log if low > 0 else float
    span = scale(high) - scale(low) or 1.0
    eighths = [1 + round(min(1.0, (scale(mean) - scale(low)) / span) * (8 * rows - 1)) for mean in means]
    labels = {rows - 1: f"{high:.3g}", 0: f"{low:.3g}"}
    lines = []
    for row in range(rows - 1, -1, -1):
        filled = (min(8, max(0, height - 8 * row)) for height in eighths)
        bars = "".join(BARS[level - 1] if level else " " for level in filled)
        lines.append(f"{labels.get(row, ''):<{LABEL_COLUMNS}}{bars}")
    return lines


def print_line(console: Console, text: str) -> None:
    """Print text from outside as it is, wrapped only on a terminal."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=not console.is_terminal)


class PlainLines:
    """Prints one line per record, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.num_steps = 0

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, text: str) -> None:
        """Print one line."""
        print_line(self.console, text)

    def begin(self, step: int, num_steps: int) -> None:
        """The step after `step` is about to start."""
        self.num_steps = num_steps

    def step(self, step: int, loss: float) -> None:
        """Print nothing; one line per step is too much for a log."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics or a sample was written."""
        self.note(describe(record, self.num_steps))


def describe(record: dict[str, Any], num_steps: int) -> str:
    """A record of metrics or a sample as one line."""
    step = f"step {record['step']:,}" + (f"/{num_steps:,}" if num_steps else "")
    if "train/loss" in record:
        return (
            f"{step}  loss {record['train/loss']:.4f}  lr {record['train/learning_rate']:.2e}  "
            f"grad {record['train/grad_norm']:.2f}  {record['train/tokens_per_second']:,.0f} tokens/s  "
            f"MFU {record['train/mfu']:.0%}  {record['train/peak_memory_gib']:.2f} GiB"
        )
    if "eval/loss" in record:
        return f"{step}  held-out loss {record['eval/loss']:.4f} over {count_of(record['eval/num_tokens'], 'token')}"
    return f"{step}  sample: {record['prompt']}{record['text']}".replace("\n", " ")


class LivePanel:
    """Shows the loss curve, speed, memory and time left, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.losses: list[float] = []
        self.latest: dict[str, Any] = {}
        self.text = ""
        self.begun = False
        self.first_step = self.current_step = self.num_steps = 0
        self.start = time.monotonic()
        # Last, because it draws immediately.
        self.live: Live | InPlace = Live(
            console=console, refresh_per_second=4, transient=False, get_renderable=self._render
        )

    def __enter__(self) -> "LivePanel":
        return self

    def __exit__(self, *error: object) -> None:
        if self.begun:
            self.live.stop()

    def note(self, text: str) -> None:
        """Print one line above the panel."""
        print_line(self.console, text)

    def begin(self, step: int, num_steps: int) -> None:
        """Show the panel: the step after `step` is about to start."""
        self.first_step = self.current_step = step
        self.num_steps = num_steps
        self.start = time.monotonic()
        self.begun = True
        self.live.start()

    def step(self, step: int, loss: float) -> None:
        """A step is done."""
        self.current_step = step
        self.losses.append(loss)

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics or a sample was written."""
        if "text" in record:
            self.text = printable(record["prompt"] + record["text"])
        else:
            self.latest.update(record)
        if not self.begun:
            self.note(describe(record, self.num_steps))

    def _render(self) -> Panel:
        width = self.console.width - FRAME_COLUMNS
        taken = self.current_step - self.first_step
        left = (time.monotonic() - self.start) / taken * (self.num_steps - self.current_step) if taken else None
        cells = [
            ("step", f"{self.current_step:,} of {self.num_steps:,}"),
            ("time left", hours(left / 3600) if left is not None else "?"),
            ("loss", self._figure("train/loss", ".4f")),
            ("held-out", self._figure("eval/loss", ".4f")),
            ("tokens/s", self._figure("train/tokens_per_second", ",.0f")),
            ("MFU", self._figure("train/mfu", ".0%")),
            ("memory", self._figure("train/peak_memory_gib", ".2f") + " GiB"),
        ]
        bar = Table.grid(expand=True)  # a bar alone has no line break
        bar.add_row(ProgressBar(total=max(1, self.num_steps), completed=self.current_step))
        parts: list[Any] = [bar, *_in_lines(cells, width)]
        if len(self.losses) > 1:
            parts += [Text(line, style="cyan") for line in curve(self.losses, width)]
        if self.text:
            parts.append(Text(self.text.replace("\n", " "), style="italic", overflow="ellipsis", no_wrap=True))
        return Panel(Group(*parts), title="training", title_align="left", border_style="dim")

    def _figure(self, name: str, form: str) -> str:
        return format(self.latest[name], form) if name in self.latest else "-"


def _in_lines(cells: list[tuple[str, str]], width: int) -> list[Table]:
    """Names over their values, side by side, in as many lines as the width needs."""
    lines: list[list[tuple[str, str]]] = []
    left = 0
    for name, value in cells:
        columns = max(len(name), len(value))
        if columns > left:
            lines.append([])
            left = width
        lines[-1].append((name, value))
        left -= columns + CELL_GAP
    grids = []
    for line in lines:
        grid = Table.grid(padding=(0, CELL_GAP))
        grid.add_row(*(Text(name, style="dim") for name, _ in line))
        grid.add_row(*(Text(value, style="bold") for _, value in line))
        grids.append(grid)
    return grids


class InPlace:
    """Draws in the output of a notebook's cell; stands in for rich's Live, which needs ipywidgets there."""

    def __init__(self, draw: Callable[[], Panel]) -> None:
        self.draw = draw
        self.handle: Any = None
        self.drawn = 0.0

    def start(self) -> None:
        """Show the panel."""
        # Imported by name because type checkers do not find the optional package; here it is running.
        self.handle = import_module("IPython.display").display(self.draw(), display_id=True)

    def refresh(self) -> None:
        """Replace the panel, unless it is new."""
        if self.handle is not None and time.monotonic() - self.drawn > NOTEBOOK_SECONDS:
            self.stop()

    def stop(self) -> None:
        """Show the last state."""
        self.handle.update(self.draw())
        self.drawn = time.monotonic()


class NotebookPanel(LivePanel):
    """The panel in a notebook."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live = InPlace(self._render)

    def step(self, step: int, loss: float) -> None:
        """A step is done."""
        super().step(step, loss)
        self.live.refresh()


def find_console() -> tuple[Console, bool]:
    """The console for progress, and whether a notebook shows it: stderr, or in a notebook stdout, as lines of text.

    A terminal that cannot redraw (TERM=dumb) and one in CI count as files, which get lines.

    A notebook shows stderr as an error, and would make every line that rich prints an output of its own.
    """
    console = Console(stderr=True)
    if console.is_terminal and (console.is_dumb_terminal or os.environ.get("CI")):
        console = Console(stderr=True, force_terminal=False)  # cannot redraw, or is kept as a log
    if not console.is_jupyter:
        return console, False
    return Console(file=sys.stdout, force_jupyter=False, force_terminal=False, color_system=None), True


def watch() -> LivePanel | PlainLines:
    """A live panel if stderr is a terminal or a notebook, otherwise plain lines."""
    console, is_notebook = find_console()
    if is_notebook:
        return NotebookPanel(console)
    return LivePanel(console) if console.is_terminal else PlainLines(console)
