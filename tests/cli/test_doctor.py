"""`trivium doctor` and the doctor's part of `trivium train`, as a user has them."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.doctor.cases import chat_rows, write_rows
from tests.support.models import byte_tokenizer, write_base, zero_rows
from trivium.cli.main import trivium
from trivium.doctor import examine

ROOT = Path(__file__).parents[2]
RUN_FILE = """
method: lora
model: base
data: {sources: [chats.jsonl], seq_len: 128, held_out: 0.1, workers: 1}
batch: {tokens: 512}
budget: {steps: 2}
precision: fp32
"""
FROZEN = "adapter.train_tokens=[<|im_start|>]"


def run(folder: Path, *arguments: str) -> Result:
    """The command in this process: exit_code, stdout and stderr."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(trivium, arguments)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A base that never met the end of a turn, some conversations, and a run file."""
    folder = tmp_path_factory.mktemp("workplace")
    write_base(folder / "base", byte_tokenizer(folder / "bytes"), edit=zero_rows(257, 258))
    write_rows(folder / "chats.jsonl", chat_rows())
    (folder / "lora.yaml").write_text(RUN_FILE)
    return folder


def test_doctor_prints_nothing_for_a_sound_run(workplace):
    command = [sys.executable, "-m", "trivium.cli", "doctor", "lora.yaml"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Nothing to fix" in done.stderr
    assert not (workplace / "runs" / "lora").exists() and not list((workplace / "runs").glob(".doctor*"))


def test_doctor_exit_code_and_errors_first(workplace):
    done = run(workplace, "doctor", "lora.yaml", FROZEN, "optimizer.lr=1e-6")
    assert done.exit_code == 2
    assert done.stdout.index("error  Q04") < done.stdout.index("warning  Q19") and "docs/doctor.md#q04" in done.stdout
    assert "--allow Q04" in done.stderr and "Traceback" not in done.stderr


def test_json_is_a_list_of_records(workplace):
    done = run(workplace, "doctor", "lora.yaml", FROZEN, "--json")
    (finding,) = json.loads(done.stdout)
    assert done.exit_code == 2
    assert set(finding) == {"id", "severity", "title", "found", "expected", "fix", "anchor"}
    assert (finding["id"], finding["severity"], finding["anchor"]) == ("Q04", "error", "docs/doctor.md#q04")


def test_train_is_stopped_before_its_folder_is_made(workplace):
    done = run(workplace, "train", "lora.yaml", FROZEN)
    assert done.exit_code == 2 and "Q04" in done.stderr and "<|im_end|>" in done.stderr and done.stdout == ""
    assert not (workplace / "runs" / "lora").exists()


def test_doctor_exit_codes_for_data_and_size(workplace):
    from tests.doctor.test_tokens import chat_ids, write_store

    ids, weights = chat_ids()
    weights[-1] = 0
    write_store(workplace / "endless", [ids] * 9, weights=[weights] * 9)
    sources = ["data.sources=[{store: endless}]", "data.held_out=0", "data.seq_len=128", "method=full"]
    endless = run(workplace, "doctor", "lora.yaml", *sources)
    assert endless.exit_code == 4 and "Q02" in endless.stdout
    huge = run(workplace, "train", "lora.yaml", "method=scratch", "model=Qwen2.5-72B", "tokenizer=bytes")
    assert huge.exit_code == 3 and "Q21" in huge.stderr and "M02" in huge.stderr


def test_allow_ignores_an_error(workplace):
    write_rows(workplace / "called.jsonl", chat_rows())
    call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Ulm"}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    write_rows(workplace / "called.jsonl", [{"messages": turns}] * 20)
    arguments = ["train", "lora.yaml", "name=called", "data.sources=[called.jsonl]"]
    refused = run(workplace, *arguments)
    assert refused.exit_code == 4 and "Q16" in refused.stderr
    allowed = run(workplace, *arguments, "--allow", "q16")
    assert allowed.exit_code == 0, allowed.stderr
    assert "error: Q16" in allowed.stderr and allowed.stdout == "runs/called/adapter\n"
    again = run(workplace, *arguments)
    assert again.exit_code == 0 and "is finished" in again.stderr  # a finished run is left in peace


@pytest.mark.parametrize("verb", ["doctor", "train"])
def test_allow_refuses_an_unknown_id(workplace, verb):
    done = run(workplace, verb, "lora.yaml", "--allow", "Q99")
    assert done.exit_code == 2 and "--allow Q99" in done.stderr and "Did you mean Q" in done.stderr


def test_every_rule_is_documented(workplace):
    text = (ROOT / "docs" / "doctor.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    rules = [rule for rules in (examine.RUN_RULES, examine.PREPARED_RULES, examine.LOADED_RULES) for rule in rules]
    assert set(sections) == {rule.id for rule in rules} == examine.IDS
    for rule in rules:
        assert sections[rule.id].startswith(f"**{rule.title}**"), rule.id
        assert re.search(r"\b(error|warning|info)\b", sections[rule.id])
        assert rule.id.startswith("M") or "Source:" in sections[rule.id] or rule.id == "Q21", rule.id


def test_every_rule_is_provoked_by_a_test():
    text = "".join(path.read_text() for path in (ROOT / "tests" / "doctor").glob("test_*.py"))
    for name in examine.IDS:
        assert f"def test_{name.lower()}_" in text or f'"{name}": ' in text, name
