"""What the documents show is true: their run files load, their verbs exist, their paths are there."""

import re
from pathlib import Path

import pytest

from trivium.cli.main import VERBS
from trivium.config.load import load_run
from trivium.config.run import METHOD_DEFAULTS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "AGENTS.md", "CONTRIBUTING.md", "docs/design.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_run_files_load(name, tmp_path):
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)):
        file = tmp_path / f"run{number}.yaml"
        file.write_text(block)
        assert load_run(file).run.method in METHOD_DEFAULTS


@pytest.mark.parametrize("name", ["README.md", "AGENTS.md", "CONTRIBUTING.md"])
def test_verbs_exist(name):
    named = set(re.findall(r"(?:`|bin/)trivium (\w+)", (ROOT / name).read_text()))
    assert named <= set(VERBS)


@pytest.mark.parametrize("name", ["README.md", "AGENTS.md", "CONTRIBUTING.md"])
def test_paths_are_there(name):
    for path in re.findall(r"`((?:src|tests|docs|bench)/[\w./]*)`", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


def test_the_table_of_methods_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` +\| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    _, *rows = rows  # the first is the head of the table
    assert [method for method, _ in rows] == list(METHOD_DEFAULTS)
    for method, start in rows:
        weights = METHOD_DEFAULTS[method]["weights"]
        assert start.startswith({"pretrained": "pretrained", "nf4": "pretrained, NF4", "random": "random"}[weights])
