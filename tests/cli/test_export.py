"""`trivium export` in a real process: the folder on stdout, what was measured on stderr, refusals with exit 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.use.models import make_adapter, make_base, make_run
from trivium.cli.main import trivium as cli


def trivium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_merge_is_reported_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "runs" / "qlora", "weights: nf4\n")
    make_adapter(run / "adapter", base)
    done = trivium(tmp_path, "export", "runs/qlora", "--merge", "--to", "hf", "--out", "merged", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "merged\n"
    for words in ("verified: reloaded", "rounding to bfloat16", "trained against the NF4 base"):
        assert words in done.stderr
    assert not list(tmp_path.glob(".*"))
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(cli, ["export", "runs/qlora", "--merge", "--out", "merged"])
    assert (again.exit_code, again.stdout) == (2, "") and "never overwrites" in again.stderr
    copied = CliRunner().invoke(cli, ["export", "runs/qlora", "--out", "adapter", "--json"])
    assert copied.exit_code == 0 and json.loads(copied.stdout)["max_difference"] == 0.0
