"""`trivium compare`: the table on stdout, the page in a folder, all of it as JSON."""

import json
import re
import shutil
from pathlib import Path

from click.testing import CliRunner

from tests.support.models import PAIRS, STORIES, make_run
from trivium.cli.main import trivium as cli


def test_compare_a_run_with_its_base_model(base: Path, adapter: Path, tmp_path: Path, monkeypatch):
    run = make_run(tmp_path / "runs" / "tuned", f"method: qlora\nweights: nf4\nmodel: {{name: {base}}}\n")
    shutil.copytree(adapter, run / "adapter")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    files = ("--prompts", "prompts.jsonl", "--held-out", "texts.jsonl", "--max-new-tokens", "6")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["compare", "runs/tuned", *files])
    assert done.exit_code == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["base", "tuned"]
    figures = {label: values for label, *values in (re.split(r"\s{2,}", line.strip()) for line in lines)}
    assert len(figures["held-out loss"]) == 2 and figures["training time"][0] == "-"
    assert "NF4" in done.stderr and "report: comparison/report.html" in done.stderr
    assert "tuned and base model" in (tmp_path / "comparison" / "report.html").read_text()
    again = CliRunner().invoke(cli, ["compare", "runs/tuned", *files, "--json", "--out", "elsewhere"])
    assert again.exit_code == 0, again.stderr
    found = json.loads(again.stdout)
    assert found == json.loads((tmp_path / "elsewhere" / "comparison.json").read_text())
    assert f"{found['models'][1]['held_out']['loss']:.4f}" == figures["held-out loss"][1]
    nothing = CliRunner().invoke(cli, ["compare", "runs/nothing/there", "--out", "never"])
    assert nothing.exit_code == 2 and "is not a model" in nothing.stderr and not (tmp_path / "never").exists()
