"""The command itself, in real processes: exit codes, streams, and what it does not import."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from trivium.cli import main
from trivium.errors import BadData, ConfigError, DoesNotFit, Stopped, TriviumError

COMMAND = [sys.executable, "-c", "from trivium.cli.main import main; main()"]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "matplotlib")


def run(*arguments: str, folder: Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, timeout=60, **options)


def test_help_lists_every_verb_with_nothing_on_stderr(tmp_path: Path):
    done = run("--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for verb, words in main.VERBS.items():
        assert f"  {verb} " in done.stdout
        assert " ".join(words.split()) in " ".join(done.stdout.split())


def test_version(tmp_path: Path):
    assert run("--version", folder=tmp_path).stdout == "trivium 0.1.0\n"


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_is_a_command(verb: str):
    command = main.trivium.get_command(click.Context(main.trivium), verb)
    assert isinstance(command, click.Command)
    assert command.name == verb


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["trian"], "Did you mean train?"),
        (["confg"], "Did you mean config?"),
        (["xyzzy"], "Commands: quickstart, demo, plan"),
        (["config", "shw"], "No such command 'shw'"),
        (["--colour"], "No such option"),
        (["config", "show"], "Missing argument 'FILE'"),
        (["config", "show", "run.yaml", "--yaml"], "No such option"),
    ],
)
def test_usage_errors(arguments: list[str], fragment: str, tmp_path: Path):
    done = run(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert fragment in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["config", "show", "run.yaml"], ["config", "schema"], ["config", "explain"], ["model", "list"]],
)
def test_light_verbs_import_nothing_heavy(arguments: list[str], tmp_path: Path):
    (tmp_path / "run.yaml").write_text("method: scratch\nmodel: 1M\ndata: a.txt\n")
    code = (
        "import sys, atexit\nfrom trivium.cli.main import main\n"
        f"atexit.register(lambda: print('heavy', sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "heavy []\n")


@pytest.fixture
def verb_that_raises(monkeypatch: pytest.MonkeyPatch):
    """Puts a verb `chat` into the group that raises what the test gives."""

    def install(error: BaseException) -> None:
        @click.command("chat")
        def chat() -> None:
            raise error

        monkeypatch.setattr(main.VerbGroup, "get_command", lambda self, ctx, name: chat)

    return install


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(TriviumError("a"), 1), (ConfigError("a"), 2), (DoesNotFit("a"), 3), (BadData("a"), 4), (Stopped("a"), 75)],
)
def test_errors_end_with_their_exit_code(error: TriviumError, exit_code: int, verb_that_raises):
    verb_that_raises(error)
    result = CliRunner().invoke(main.trivium, ["chat"])
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", "trivium: a\n")


def test_interruption_ends_with_130(verb_that_raises):
    for error in (KeyboardInterrupt(), click.Abort()):
        verb_that_raises(error)
        assert CliRunner().invoke(main.trivium, ["chat"]).exit_code == 130


def test_unexpected_error_has_a_traceback_only_with_debug(verb_that_raises):
    verb_that_raises(ZeroDivisionError("line one\nline two"))
    plain = CliRunner().invoke(main.trivium, ["chat"])
    assert (plain.exit_code, plain.stdout) == (1, "")
    assert plain.stderr.startswith("trivium: unexpected error: ZeroDivisionError: line one line two.")
    assert plain.stderr.count("\n") == 1 and "--debug" in plain.stderr
    debug = CliRunner().invoke(main.trivium, ["--debug", "chat"])
    assert debug.exit_code == 1 and "Traceback (most recent call last)" in debug.stderr


def test_debug_shows_the_traceback_of_an_expected_error(tmp_path: Path):
    assert "Traceback" not in run("config", "show", "absent.yaml", folder=tmp_path).stderr
    done = run("--debug", "config", "show", "absent.yaml", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr and "trivium: absent.yaml: no such file" in done.stderr


def test_a_broken_pipe_prints_no_error(tmp_path: Path):
    process = subprocess.Popen(
        [*COMMAND, "config", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_a_real_interrupt_ends_with_130(tmp_path: Path):
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    code = (
        "import time, click\nfrom trivium.cli import main\n"
        f"@click.command('chat')\ndef chat():\n    open({str(fifo)!r}, 'w').close()\n    time.sleep(60)\n"
        "main.VerbGroup.get_command = lambda self, ctx, name: chat\nmain.main()"
    )
    with subprocess.Popen([sys.executable, "-c", code, "chat"], stderr=subprocess.PIPE) as process:
        fifo.open().close()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"")
