"""`trivium data` and `trivium tokenizer`: paths and figures on stdout, remarks on stderr, exit codes as promised."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from trivium.cli.main import trivium


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    rows = [{"text": f"Once there was a fox, number {number}."} for number in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    return path


def call(*arguments: object):
    return CliRunner().invoke(trivium, list(map(str, arguments)))


def test_from_text_to_tokenizer_to_store_to_eyes(tmp_path, stories):
    folder, cache = tmp_path / "tokenizer", tmp_path / "cache"
    trained = call("tokenizer", "train", stories, "--vocab-size", 300, "--out", folder, "--cache-dir", cache)
    assert (trained.exit_code, trained.stdout.strip()) == (0, str(folder))
    assert call("tokenizer", "train", stories, "--out", folder, "--cache-dir", cache).exit_code == 2

    shown = json.loads(call("tokenizer", "inspect", folder, "a fox", "--json").stdout)
    size = shown["vocab_size"]
    assert shown["eos"] == shown["pad"] == ["<|endoftext|>", size - 3]
    assert "".join(shown["pieces"]) == "a fox" and shown["bytes_per_token"] == round(5 / len(shown["ids"]), 3)
    assert "vocab_size" in call("tokenizer", "inspect", folder).stdout

    built = call("data", "build", stories, "--tokenizer", folder, "--cache-dir", cache)
    assert built.exit_code == 0 and "1 of 201 rows refused" in built.stderr
    store = built.stdout.strip()
    (report,) = json.loads(call("data", "build", stories, "--tokenizer", folder, "--cache-dir", cache, "--json").stdout)
    assert report["store"] == store and report["rows"] == 201 and report["rejected"] == 1

    seen = call("data", "inspect", store, stories, "--tokenizer", folder, "-n", 2).stdout
    assert "document 1" in seen and "<|endoftext|>" in seen and "stories.jsonl:201: field missing" in seen
    found = json.loads(call("data", "inspect", store, stories, "--json").stdout)
    assert [one["unit"] for one in found] == ["tokens", "bytes"] and found[1]["num_documents"] == 200
    assert sum(count for _, count in found[1]["histogram"]) == 200 and found[0]["share"] == 1.0


def test_bad_data_is_exit_4_and_a_wrong_name_exit_2(tmp_path, stories):
    folder = tmp_path / "tokenizer"
    call("tokenizer", "train", stories, "--kind", "byte", "--out", folder, "--cache-dir", tmp_path / "cache")
    options = ("--tokenizer", folder, "--cache-dir", tmp_path / "cache")
    bad = call("data", "build", stories, *options, "--max-reject-share", 0)
    assert bad.exit_code == 4 and bad.stdout == "" and "field missing (1)" in bad.stderr
    assert call("data", "build", tmp_path / "gone", *options).exit_code == 2
    assert call("data", "inspect", tmp_path / "gone").exit_code == 2


def test_workers_import_nothing_heavy():
    script = (
        "import sys, trivium.data.encode; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
