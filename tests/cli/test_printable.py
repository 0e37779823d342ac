"""What a file or a model says never controls the terminal: seen on a real terminal, a pty."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import PAIRS, make_base, teach
from trivium.errors import printable

CLEAR, TITLE, C1 = "\x1b[2J", "\x1b]0;owned\x07", "\x9b31m"
HOSTILE = f"a{CLEAR}b{TITLE}c{C1}d\roverwritten"


def on_a_terminal(folder: Path, *arguments: str) -> bytes:
    """Everything that a command writes to its terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trivium.cli", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        written += part
    os.close(ours)
    process.wait()
    return written


def assert_harmless(written: bytes) -> None:
    assert b"1b[2J" in written, written
    for sequence in (CLEAR, TITLE, C1, "d\roverwritten"):
        assert sequence.encode() not in written


def test_control_characters_become_visible():
    assert printable("a\x1b[2J\x9b1m\x7f\rb") == "a\\x1b[2J\\x9b1m\\x7f\\rb"
    plain = "line\n\ttab, \r\n, \u4f60\u597d, \U0001f600, \u00e9, \u00a0"
    assert printable(plain) == plain
    assert printable("\ud800").encode() == b"\\ud800"


def test_inspect_shows_the_escapes_of_data(tmp_path: Path):
    rows = [{"text": HOSTILE}, {"messages": 3, HOSTILE: 1}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert_harmless(on_a_terminal(tmp_path, "data", "inspect", "data.jsonl"))


@pytest.mark.parametrize(("verb", "values"), [("config", {f"unknown{HOSTILE}": 1}), ("train", {})])
def test_errors_show_the_escapes_of_a_run_file(verb: str, values: dict[str, int], tmp_path: Path):
    run = {"method": "scratch", "model": "1M", "data": f"no{HOSTILE}.jsonl"} | values
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert_harmless(on_a_terminal(tmp_path, verb, *["show"] * (verb == "config"), "run.yaml"))


def test_chat_shows_the_escapes_of_a_model(tmp_path: Path):
    base = make_base(tmp_path / "model", seed=3)
    teach(base, [(PAIRS[0][0], HOSTILE)], steps=90)
    written = on_a_terminal(tmp_path, "chat", str(base), "-p", PAIRS[0][0], "--temperature", "0")
    assert_harmless(written)
