"""The live panel and the plain lines, drawn on real consoles."""

import io
import re

from rich.console import Console

from trivium.plan.cost import hours
from trivium.report.panel import LivePanel, PlainLines, curve

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
    lines = curve([float(value) for value in range(10, 0, -1)], columns=10, rows=3)
    assert len(lines) == 3 and all(len(line) == 10 for line in lines)
    assert lines[0][0] == "\u2588" and lines[0][-1] == " " and lines[-1][-1] == "\u2581"
    assert curve([2.0] * 5) and curve([]) == []


def test_hours_are_shown_in_a_fitting_unit():
    assert [hours(seconds / 3600) for seconds in (0.4, 59, 186, 3599, 9000)] == [
        "0.4 s", "59 s", "3.1 min", "60 min", "2.5 h",
    ]  # fmt: skip
