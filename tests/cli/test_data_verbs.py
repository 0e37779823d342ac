"""`trivium data` and `trivium tokenizer`: results on stdout, remarks on stderr, documented exit codes."""

import json
import os
import pty
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.data.test_mmap import IGNORED, write_set
from trivium.cli.main import trivium
from trivium.data.tokenizer import train_tokenizer


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    rows = [{"text": f"Once there was a fox, number {number}."} for number in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    return path


def call(*arguments: object):
    return CliRunner().invoke(trivium, list(map(str, arguments)))


def test_tokenizer_train_then_data_build_then_inspect(tmp_path, stories):
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
    assert built.exit_code == 0 and "201 records = 200 kept + 0 split into several samples + 1 rejected" in built.stderr
    store = built.stdout.strip()
    (report,) = json.loads(call("data", "build", stories, "--tokenizer", folder, "--cache-dir", cache, "--json").stdout)
    assert report["store"] == store and report["records"] == 201 and report["rejected"] == 1

    seen = call("data", "inspect", store, stories, "--tokenizer", folder, "-n", 2).stdout
    assert "document 1" in seen and "<|endoftext|>" in seen and "stories.jsonl:201: field missing" in seen
    found = json.loads(call("data", "inspect", store, stories, "--json").stdout)
    assert [one["unit"] for one in found] == ["tokens", "bytes"] and found[1]["num_documents"] == 200
    assert sum(count for _, count in found[1]["histogram"]) == 200 and found[0]["share"] == 1.0


QUESTION = {"role": "user", "content": "2 + 2?"}
CHATS = [
    {"messages": [QUESTION, {"role": "assistant", "content": "4"}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "four", "weight": 0.5}]},
    {"messages": [QUESTION]},
]


@pytest.fixture
def chats(tmp_path):
    """A file of conversations, and a tokenizer next to it."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    train_tokenizer(iter(["abc"]), "byte", 259, tmp_path / "tokenizer")
    return path


def test_data_build_and_inspect_show_supervised_tokens(tmp_path, chats):
    options = ("--tokenizer", tmp_path / "tokenizer", "--seq-len", 64)
    seen = call("data", "inspect", chats, *options).stdout
    assert "3 records = 2 kept + 0 split into several samples + 1 rejected" in seen
    assert "rejected: no assistant turn, 1 record\n    chats.jsonl:3: no assistant turn" in seen
    assert "turn 2 verified: 25 prompt tokens + 2 answer tokens" in seen and "0 documents with reasoning" in seen
    assert "[[4<|im_end|>]]" in seen and "[[0.5: four<|im_end|>]]" in seen
    assert "user: 2 + 2?\n[[assistant: 4\n]]" in call("data", "inspect", chats).stdout

    building = ("data", "build", chats, *options, "--cache-dir", tmp_path, "--max-reject-share", 1, "--held-out", 0)
    built = call(*building)
    assert "3 records = 2 kept + 0 split into several samples + 1 rejected" in built.stderr
    assert "7 supervised tokens (12.3%)" in built.stderr
    (found,) = json.loads(call("data", "inspect", built.stdout.strip(), *options[:2], "--json").stdout)
    assert (found["num_supervised"], found["size"]) == (7, 57)
    whole = json.loads(call(*building, "--loss-tokens", "all", "--json").stdout)
    assert whole[0]["supervised_tokens"] == whole[0]["tokens"] - 2


def test_data_inspect_says_which_lengths_are_exact(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "a" * 2_000_003}) + "\n" + json.dumps({"text": "b"}) + "\n")
    shown = call("data", "inspect", path, "-n", 0).stdout
    assert "min 1, p01 1," in shown and "max 2,000,003, mean 1,000,002.0" in shown
    about = int(shown.partition("p99 about ")[2].partition(", ")[0].replace(",", ""))
    assert 0.998 * 2_000_003 <= about <= 2_000_003


def test_data_inspect_takes_fields_and_formats(tmp_path, chats):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"frage": "2 + 2?", "antwort": "4"}\n')
    named = ("--format", "prompt", "--fields", "prompt=frage", "--fields", "answer=antwort")
    assert "[[assistant: 4\n]]" in call("data", "inspect", odd, *named).stdout
    assert call("data", "inspect", odd, "--fields", "frage").exit_code == 2
    wrong = call("data", "inspect", odd, "--fields", "question=frage")
    assert wrong.exit_code == 2 and "expected one of messages" in wrong.stderr
    info = tmp_path / "dataset_info.json"
    info.write_text(
        json.dumps({"odd": {"file_name": "odd.jsonl", "columns": {"prompt": "frage", "response": "antwort"}}})
    )
    assert "[[assistant: 4\n]]" in call("data", "inspect", info, "--dataset", "odd").stdout


@pytest.mark.parametrize("no_color", [None, "1"])
def test_data_inspect_uses_colors_unless_no_color(tmp_path, chats, no_color):
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    main, side = pty.openpty()
    command = [sys.executable, "-m", "trivium.cli", "data", "inspect", chats]
    subprocess.run(
        list(map(str, command)), stdout=side, env=environment | ({"NO_COLOR": no_color} if no_color else {}), check=True
    )
    os.close(side)
    seen = os.read(main, 1 << 16).decode().replace("\r\n", "\n")
    assert ("\x1b[32massistant: 4" in seen, "\x1b[33massistant: four" in seen) == (not no_color, not no_color)
    assert ("[[assistant: 4" in seen) == bool(no_color)


def test_data_import_converts_a_binarized_folder(tmp_path):
    folder, out = tmp_path / "binarized", tmp_path / "imported"
    folder.mkdir()
    write_set(folder, "a", [([1, 2, 3], [IGNORED, 2, 3]), ([4], [4])])
    imported = call("data", "import", folder, "--out", out)
    assert imported.stdout.strip() == str(out / "tokens") and "2 records = 1 kept + 0 split" in imported.stderr
    assert "2 supervised tokens (66.7%)" in imported.stderr and "no supervised token, 1 record" in imported.stderr
    assert "1[[2 3]]" in call("data", "inspect", out).stdout.replace(" [[", "[[")
    assert call("data", "import", folder, "--out", out).exit_code == 2
    assert call("data", "import", out, "--out", tmp_path / "other").exit_code == 4


def test_exit_codes_of_bad_data_and_wrong_names(tmp_path, stories):
    folder = tmp_path / "tokenizer"
    call("tokenizer", "train", stories, "--kind", "byte", "--out", folder, "--cache-dir", tmp_path / "cache")
    options = ("--tokenizer", folder, "--cache-dir", tmp_path / "cache")
    bad = call("data", "build", stories, *options, "--max-reject-share", 0)
    assert bad.exit_code == 4 and bad.stdout == "" and "field missing (1)" in bad.stderr
    assert call("data", "build", tmp_path / "gone", *options).exit_code == 2
    assert call("data", "inspect", tmp_path / "gone").exit_code == 2


def test_worker_processes_import_nothing_heavy():
    module = "trivium.data.store.encode"
    script = f"import sys, {module}; print({{'torch', 'transformers', 'datasets', 'pyarrow'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
