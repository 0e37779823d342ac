"""`trivium eval`: figures on stdout, the rest on stderr, every answer in a file."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.models import PAIRS, STORIES
from trivium.cli.main import trivium as cli


def trivium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, taught) -> Path:
    """A folder with a model that answers, prompts with answers, and documents."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(taught, folder / "taught")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS] + [{"prompt": "?", "answer": "never"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return folder


def test_eval_json_and_answers_file(workplace: Path):
    done = trivium(
        workplace, "eval", "taught", "--held-out", "texts.jsonl", "--prompts", "prompts.jsonl",
        "--answers", "answers.jsonl", "--max-new-tokens", "30", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompts"]["exact_match"] == 0.75 and found["prompts"]["num_questions"] == 4
    assert found["prompts"]["json_valid"] == 1.0
    assert found["held_out"]["num_tokens"] == sum(map(len, STORIES)) and found["held_out"]["loss"] > 0
    rows = [json.loads(line) for line in (workplace / "answers.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in rows] == [*(answer for _, answer in PAIRS), "never"]
    assert [row["is_exact"] for row in rows] == [True, True, True, False]
    assert rows[0]["messages"] == [{"role": "user", "content": PAIRS[0][0]}] and rows[0]["text"] == PAIRS[0][1]


def test_a_table_without_json(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workplace)
    done = CliRunner().invoke(cli, ["eval", "taught", "--prompts", "prompts.jsonl", "--max-new-tokens", "30"])
    assert done.exit_code == 0, done.stderr
    assert "exact match" in done.stdout and "75.0%" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["taught"], 2, "taught is not a run"),
        (["nothing", "--held-out", "texts.jsonl"], 2, "nothing is not a model"),
        (["taught", "--prompts", "gone.jsonl"], 2, "gone.jsonl does not exist"),
        (["taught", "--held-out", "gone.jsonl"], 2, "gone.jsonl"),
        (["taught", "--answers", "out.jsonl"], 2, "Add --prompts FILE"),
        pytest.param(
            ["taught", "--lm-eval", "hellaswag"], 2, "pip install 'trivium[eval]'",
            marks=pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed"),
        ),
    ],
)  # fmt: skip
def test_eval_refusals(workplace, arguments: list[str], exit_code: int, words: str, monkeypatch):
    monkeypatch.chdir(workplace)
    done = CliRunner().invoke(cli, ["eval", *arguments])
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert words in " ".join(done.stderr.split())
