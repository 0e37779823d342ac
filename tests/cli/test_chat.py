"""`trivium chat` on a terminal of its own, and through pipes: conversations, commands, Ctrl-C, plain completion."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.models import PAIRS
from trivium.cli.main import trivium as cli

COMMAND = [sys.executable, "-m", "trivium.cli", "chat"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, base, taught) -> Path:
    """A folder with a base that goes on with texts, and a model that answers."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(base, folder / "base")
    shutil.copytree(taught, folder / "taught")
    return folder


class Terminal:
    """A command whose stdin and stdout are a terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, words: str) -> str:
        """What was printed up to and including some words."""
        while words not in self.seen:
            self.read(f"{words!r} after {self.seen!r}")
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def read(self, awaited: str) -> None:
        """Take in what is printed next."""
        ready, _, _ = select.select([self.master], [], [], 60)
        assert ready, f"waited in vain for {awaited}"
        self.seen += os.read(self.master, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_until_idle(self) -> None:
        """Return when the program sleeps and has used no CPU time for a while: it waits for a key.

        A Ctrl-C between the prompt and the moment Python's readline begins to wait is noticed at the next key only.
        """
        if not os.path.exists("/proc/self/stat"):
            time.sleep(2)
            return
        since, last = time.monotonic(), None
        while time.monotonic() - since < 0.3:
            assert self.process.poll() is None
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            now = (fields[0], fields[11:13], [line for line in status.splitlines() if "ctxt_switches" in line])
            if fields[0] != "S" or now != last:
                since, last = time.monotonic(), now
            time.sleep(0.02)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_chat_on_a_terminal(workplace: Path):
    terminal = Terminal(workplace, "taught", "--temperature", "0", "--max-new-tokens", "3000")
    try:
        terminal.until("/help lists the commands")
        terminal.until("> ")
        terminal.type(PAIRS[0][0] + "\n")
        terminal.until(PAIRS[0][0])
        terminal.until(PAIRS[0][1])
        terminal.type("/retry\n")
        terminal.until("/retry")
        terminal.until(PAIRS[0][1])
        terminal.type("/save saved.jsonl\n")
        terminal.until("appended to saved.jsonl")
        terminal.type("/think\n")
        terminal.until("no thinking switch")
        terminal.type("/nonsense\n")
        terminal.until("is not a command")
        terminal.type("/system Be short.\n")
        terminal.until("system prompt: Be short.")
        terminal.type("/clear\n")
        terminal.until("new conversation")
        terminal.type("/save other.jsonl\n")
        terminal.until("No answer is complete")
        terminal.type("/quit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
    (row,) = [json.loads(line) for line in (workplace / "saved.jsonl").read_text().splitlines()]
    assert [turn["content"] for turn in row["messages"]] == list(PAIRS[0])
    assert not (workplace / "other.jsonl").exists()


def test_chat_ctrl_c_stops_the_answer_not_the_program(workplace: Path):
    # The likeliest token of this model is the one before it, so that its answer never ends by itself.
    terminal = Terminal(workplace, "base", "--chat", "--temperature", "0", "--max-new-tokens", "100000")
    try:
        terminal.until("> ")
        terminal.type("Lily\n")
        terminal.until("Lily")
        while len(terminal.seen) < 20:
            terminal.read("an answer")
        terminal.type("\x03")
        terminal.until("stopped")
        terminal.until("> ")
        terminal.wait_until_idle()
        terminal.type("\x03")
        terminal.until("Type /quit to quit.")
        terminal.type("/quit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_chat_answers_or_completes_a_prompt(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    question, answer = PAIRS[0]
    ask = ["chat", "taught", "-p", question, "--temperature", "0"]
    assert CliRunner().invoke(cli, ask).stdout == f"{answer}\n"
    completed = CliRunner().invoke(cli, [*ask, "--complete", "--max-new-tokens", "5"])
    assert completed.stdout.startswith(question) and answer not in completed.stdout
    plain = CliRunner().invoke(cli, ["chat", "base", "-p", "Lily", "--max-new-tokens", "5", "--seed", "1"])
    assert plain.exit_code == 0 and plain.stdout.startswith("Lily") and len(plain.stdout) > len("Lily\n")
    again = CliRunner().invoke(cli, ["chat", "base", "-p", "Lily", "--max-new-tokens", "5", "--seed", "1"])
    assert again.stdout == plain.stdout


def test_chat_answers_or_completes_stdin_by_the_kind_of_model(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    options = ["--temperature", "0", "--max-new-tokens", "20"]
    answered = CliRunner().invoke(cli, ["chat", "taught", *options], input=f"{PAIRS[0][0]}\n")
    assert (answered.exit_code, answered.stdout) == (0, f"{PAIRS[0][1]}\n")
    assert answered.stderr.splitlines()[-1] == (
        "answering the text on stdin as a message, because taught is a chat model; --complete continues it"
    )
    for name, extra, why in (("base", [], ", because base is not a chat model"), ("taught", ["--complete"], "")):
        completed = CliRunner().invoke(cli, ["chat", name, *options, *extra], input="Lily the fox\n")
        assert completed.exit_code == 0 and completed.stdout.startswith("Lily the fox")
        assert f"continuing the text on stdin{why}" in completed.stderr.splitlines()
    assert CliRunner().invoke(cli, ["chat", "taught"], input="\n").exit_code == 2


def test_chat_answers_lines_of_stdin_with_chat_flag(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    lines = f"{PAIRS[0][0]}\n\n/clear\n{PAIRS[2][0]}\n"
    options = ["--chat", "--temperature", "0", "--max-new-tokens", "20"]
    conversed = CliRunner().invoke(cli, ["chat", "taught", *options], input=lines)
    assert conversed.exit_code == 0, conversed.stderr
    assert conversed.stdout.splitlines() == [PAIRS[0][1], PAIRS[2][1]]


def test_chat_refuses_conflicting_options(workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    for arguments, words in (
        (["base", "-p", "x", "--system", "Be short."], "Add --chat"),
        (["base", "-p", "x", "--no-thinking"], "Add --chat"),
        (["base", "-p", ""], "prompt is empty"),
        (["nothing", "-p", "x"], "is not a model"),
    ):
        refused = CliRunner().invoke(cli, ["chat", *arguments])
        assert refused.exit_code == 2 and words in " ".join(refused.stderr.split())
    template = workplace / "base" / "chat_template.jinja"
    written = template.read_text()
    template.unlink()
    try:
        refused = CliRunner().invoke(cli, ["chat", "base", "-p", "x", "--chat"])
        assert refused.exit_code == 2 and "no usable chat template" in refused.stderr
    finally:
        template.write_text(written)
