"""The live panel and the plain lines, drawn on real consoles."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from rich.console import Console

from trivium.plan.cost import hours
from trivium.report.panel import BARS, LivePanel, PlainLines, curve

TRAIN = {
    "step": 50,
    "train/loss": 1.25,
    "train/learning_rate": 1e-3,
    "train/grad_norm": 0.5,
    "train/tokens_per_second": 12345.0,
    "train/mfu": 0.42,
    "train/peak_memory_gib": 0.5,
}
EVAL = {"step": 50, "eval/loss": 1.125, "eval/num_tokens": 64000}
SAMPLE = {"step": 50, "prompt": "Once", "text": " upon [a] time\nthere was"}


def watch(observer: LivePanel | PlainLines) -> None:
    with observer:
        observer.note("a note [with] brackets")
        observer.record({**EVAL, "step": 0})
        observer.begin(0, 100)
        for step in range(1, 51):
            observer.step(step, 5.0 - step / 20)
        for record in (TRAIN, EVAL, SAMPLE):
            observer.record(record)


def test_the_panel_shows_figures_curve_and_sample():
    screen = io.StringIO()
    watch(LivePanel(Console(file=screen, force_terminal=True, width=100, height=40)))
    shown = screen.getvalue()
    assert re.search(
        r"\n.{0,20}step +time left +loss +held-out +tokens/s +MFU +memory", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    )
    for expected in (
        "a note [with] brackets",
        "50 of 100",
        "1.2500",
        "1.1250",
        "12,345",
        "42%",
        "upon [a] time",
        "\u2588",
    ):
        assert expected in shown, expected


def test_a_run_that_fails_before_its_first_step_leaves_the_terminal_clean():
    screen = io.StringIO()
    with LivePanel(Console(file=screen, force_terminal=True, width=100)) as panel:
        panel.note("about to fail")
    assert "training" not in screen.getvalue()


def test_plain_lines_are_one_line_a_record_without_colour():
    screen = io.StringIO()
    watch(PlainLines(Console(file=screen, width=60)))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 5 and "\x1b" not in screen.getvalue()
    assert lines[2].startswith("step 50/100  loss 1.2500  lr 1.00e-03")
    assert lines[4] == "step 50/100  sample: Once upon [a] time there was"


def test_curve_heights():
    lines = curve([float(2**value) for value in range(10, 0, -1)], columns=19, rows=3)
    assert len(lines) == 3 and all(len(line) == 19 for line in lines)
    assert lines[0][9:11] == "\u2588\u2588" and lines[0][-1] == " " and lines[-1][-1] == "\u2581"
    assert all(line[9:] == line[9] * 31 for line in curve([2.0] * 5, 40))


SHOW = """
import math, sys
from trivium.report.panel import watch
with watch() as observer:
    observer.note("a note that is rather long, longer than a narrow terminal at any rate, and has no end in sight")
    observer.begin(0, 4000)
    for step in range(1, 1001):
        observer.step(step, 2.5 + 9 * math.exp(-step / 15) - step / 2500)
        if step in (500, 1000):
            observer.record({**%(train)r, "step": step})
    observer.record({**%(sample)r, "step": 1000})
    sys.stdout.flush()
""" % {"train": TRAIN, "sample": SAMPLE}  # noqa: UP031


def on_a_terminal(code: str, columns: int, **environment: str) -> str:
    """What a program writes to a real terminal of that width; its first line is written when it has started."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS", "LINES", "NO_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=inherited | environment
    )
    os.close(slave)
    written = b""
    with suppress(OSError):  # the end of a terminal
        while piece := os.read(master, 1 << 16):
            written += piece
    os.close(master)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "CI": "true"}], ids=["dumb", "CI"]
)
def test_terminals_that_keep_a_log_get_lines(environment: dict[str, str]):
    written = on_a_terminal(SHOW, 80, **environment)
    assert "\x1b" not in written and "training" not in written
    lines = written.splitlines()
    assert [line.partition("  ")[0] for line in lines if line.startswith("step")] == [
        "step 500/4,000", "step 1,000/4,000", "step 1,000/4,000",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [24, 40, 80, 120])
def test_the_panel_fits_and_fills_its_terminal(columns: int):
    written = on_a_terminal(SHOW, columns, TERM="xterm-256color")
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written).replace("\r", "")
    last = plain[plain.rindex("\u256d\u2500 training") :].splitlines()
    assert {len(line) for line in last if line} == {columns}
    assert all(line.startswith(("\u256d", "\u2502", "\u2570")) for line in last if line)
    text = " ".join(word for line in last for word in line.split())
    for cell in ("1,000 of 4,000", "1.2500", "12,345", "0.50 GiB", "42%"):
        assert cell in text, (cell, last)
    chart = [line[2:-2] for line in last if re.search("[\u2581-\u2588]", line)]
    assert (
        len(chart) == 5
        and chart[-1].rstrip().endswith(tuple("\u2581\u2588"))
        and len(chart[-1].rstrip()) == columns - 4
    )
    note = plain[: plain.index("\u256d")].splitlines()
    assert all(len(line) <= columns for line in note)
    if columns >= 40:  # words stay whole
        assert set("".join(f"{line.rstrip()} " for line in note).split()) <= set(SHOW.replace('"', " ").split())


def test_curve_shows_what_follows_the_first_fall():
    """After the first tenth, a loss that still falls steadily uses the whole height."""
    lines = curve([2.5 + 9 * math.exp(-step / 15) - step / 2500 for step in range(1000)], columns=109, rows=5)
    assert all(len(line) == 109 for line in lines)
    bars = [[line[9:][column] for line in lines] for column in range(100)]
    heights = [
        sum(8 if cell == "\u2588" else " ".join(BARS).index(cell) // 2 + 1 for cell in bar if cell != " ")
        for bar in bars
    ]
    assert heights[0] == 40 and heights == sorted(heights, reverse=True)
    assert heights[15] >= 36 and heights[50] in range(18, 26) and heights[-1] == 1
    assert lines[0].startswith("2.4") and lines[-1].startswith("2.1")


def test_curve_of_few_values_fills_its_width():
    lines = curve([3.0, 2.0, 1.0], columns=69, rows=3)
    assert all(len(line) == 69 for line in lines) and lines[-1][9:].strip() == lines[-1][9:]
    assert curve([], 60) == [] and curve([1.0], 5) == [] and len(curve([-1.0, 0.0, 2.0], 40)) == 5


def test_hours_are_shown_in_a_fitting_unit():
    assert [hours(seconds / 3600) for seconds in (0.4, 59, 186, 3599, 9000)] == [
        "0.4 s", "59 s", "3.1 min", "60 min", "2.5 h",
    ]  # fmt: skip
