"""`trivium export`: the folder on stdout, what was measured on stderr, refusals with exit 2."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.models import make_adapter, make_base, make_run
from trivium.cli.main import trivium as cli


def test_export_reports_a_merge_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "runs" / "qlora", "weights: nf4\n")
    make_adapter(run / "adapter", base)
    monkeypatch.chdir(tmp_path)
    merge = ["export", "runs/qlora", "--merge", "--out", "merged", "--dtype", "bfloat16"]
    done = CliRunner().invoke(cli, merge)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "merged\n"
    for words in ("verified: after reloading", "rounding to bfloat16", "trained on the NF4 base"):
        assert words in done.stderr
    assert not list(tmp_path.glob(".*"))
    again = CliRunner().invoke(cli, ["export", "runs/qlora", "--merge", "--out", "merged"])
    assert (again.exit_code, again.stdout) == (2, "") and "nothing is overwritten" in again.stderr
    copied = CliRunner().invoke(cli, ["export", "runs/qlora", "--out", "adapter", "--json"])
    assert copied.exit_code == 0 and json.loads(copied.stdout)["max_difference"] == 0.0
