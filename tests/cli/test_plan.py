"""`trivium plan`: the page, JSON, the written run file, and wrong usage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.qwen_tokenizers import REAL, needs_real
from trivium.cli.main import trivium as cli
from trivium.config.load import load_run
from trivium.data.tokenizer import load_tokenizer
from trivium.model import catalog

ON_L4 = ("--device", "l4")
CHATS = ("--rows", "5K", "--kind", "conversations")
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "matplotlib")


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch):
    """An empty home folder, without prices or a calibration."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *words])


def plan_json(*words: str) -> dict:
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_plan_page():
    done = invoke("Qwen/Qwen3-0.6B", *CHATS, *ON_L4)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in done.stdout
    assert not any(line != line.rstrip() for line in lines)
    for heading in ("Method: LoRA", "Memory", "Time and cost", "Choices", "Next"):
        assert any(line.startswith(heading) for line in lines), heading
    obstacles = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert (
        obstacles["device"]
        > obstacles["total"]
        >= max(obstacles[item] for item in obstacles if item not in ("device", "total"))
    )


def test_plan_json_adds_up():
    found = plan_json("Qwen/Qwen3-0.6B", *CHATS, *ON_L4)
    plan = found["plan"]
    assert found["decision"]["method"] == "lora"
    assert plan["num_params"] == catalog.get("Qwen3-0.6B").num_params
    memory, cost = plan["memory"], plan["cost"]
    assert sum(memory["items"].values()) == memory["bytes"] <= memory["allowed_bytes"] < plan["device"]["memory_bytes"]
    assert plan["speed"]["low"] < plan["speed"]["tokens_per_second"] < plan["speed"]["high"]
    assert cost["money"] == pytest.approx(cost["hours"] * plan["device"]["price_per_hour"])
    assert cost["hours_low"] < cost["hours"] < cost["hours_high"]


def test_plan_write_round_trip():
    first = plan_json("Qwen3-0.6B", *CHATS, *ON_L4, "--write", "chats.yaml")["plan"]
    run = load_run(Path("chats.yaml")).run
    assert run.name == "chats" and run.model.name == "Qwen/Qwen3-0.6B"
    assert run.batch.micro_tokens == first["run"]["batch.micro_tokens"]
    second = plan_json("chats.yaml", *CHATS, *ON_L4)["plan"]
    assert second["memory"] == first["memory"] and second["speed"] == first["speed"]
    assert second["reasons"]["batch.micro_tokens"] == "as you set it"


def test_plan_surveys_data_files():
    turns = [{"role": "user", "content": "How many legs has a spider?"}, {"role": "assistant", "content": "Eight."}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 250)
    found = plan_json("Qwen3-0.6B", *ON_L4, "--data", "chats.jsonl", "--write", "run.yaml")
    assert found["decision"]["reasons"][1].startswith("250 conversations")
    assert load_run(Path("run.yaml")).run.data.sources[0].path == "chats.jsonl"
    assert plan_json("run.yaml", *ON_L4)["plan"]["num_tokens"] == found["plan"]["num_tokens"] > 250


@needs_real
def test_plan_counts_tokens_with_a_local_tokenizer_without_torch():
    """The tokens of one epoch, which the page states, are those that preparing the run makes."""
    turns = [{"role": "user", "content": "거미의 다리는 몇 개예요?"}, {"role": "assistant", "content": "여덟 개예요."}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 250)
    shutil.copytree(REAL / "qwen2.5-instruct", "mine")
    Path("mine/config.json").write_text(json.dumps(catalog.get("Qwen2.5-0.5B-Instruct").to_hf_config()))
    code = f"""
import sys
from trivium.cli.main import trivium
trivium(["plan", "./mine", "--data", "chats.jsonl", {", ".join(map(repr, ON_L4))}], standalone_mode=False)
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ["data: tokens counted with the model's tokenizer", "False"]
    tokenizer = load_tokenizer("mine")
    ids = tokenizer.apply_chat_template(turns, return_dict=False)[:-1]  # no newline after the last end of turn
    assert f"250 conversations, about {len(ids)} training tokens each" in done.stdout
    assert "in answers" in done.stdout and "epochs" in done.stdout and "steps of" in done.stdout


def test_plan_advises_no_training_for_little_data():
    found = plan_json("--rows", "20", "--kind", "conversations", *ON_L4)
    assert found["plan"] is None and found["decision"]["method"] is None
    assert plan_json("Qwen3-0.6B", "--rows", "20", "--kind", "conversations", "--method", "lora", *ON_L4)["plan"]
    assert "no training" in invoke("--general", "yes", *ON_L4).stdout


def test_plan_of_size_and_folder():
    built = plan_json("25M", *ON_L4)["plan"]
    assert built["run"]["method"] == "scratch" and abs(built["num_params"] / 25e6 - 1) < 0.05
    shape = catalog.get("Qwen3-1.7B")
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(shape.to_hf_config()))
    assert plan_json("./mine", *ON_L4)["plan"]["num_params"] == shape.num_params


def test_plan_device_any():
    found = plan_json("Qwen3-8B", "--method", "full", *CHATS, "--device", "any")["plan"]
    assert found["device"]["price_per_hour"] and found["cost"]["money"] > 0
    fast = plan_json("Qwen3-8B", "--method", "full", *CHATS, "--device", "any", "--prefer", "fastest")["plan"]
    assert fast["cost"]["hours"] <= 1.02 * found["cost"]["hours"]


def test_plan_does_not_fit_shows_fixes():
    done = invoke("Qwen3-8B", *ON_L4, "--method", "full", "--devices", "1")
    assert done.exit_code == 3
    assert "may be used" in done.stderr and [f"{number}. " in done.stderr for number in (1, 2, 3)] == [True] * 3
    assert invoke("Qwen3-8B", *CHATS, *ON_L4, "--method", "lora", "--max-cost", "0.001").exit_code == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nothing to plan"),
        (("Qwen3-9B",), "Qwen3-8B"),
        (("no/such/folder",), "no folder"),
        (("empty",), "no config.json"),
        (("missing.yaml",), "no such file"),
        (("0M",), "above 0"),
        (("Qwen3-0.6B", "--device", "h1000"), "nearest is"),
        (("Qwen3-0.6B", "--devices", "0"), "--devices"),
        (("Qwen3-0.6B", "--devices", "3", *ON_L4), "share evenly"),
        (("Qwen3-0.6B", "--memory", "-1"), "--memory"),
        (("Qwen3-0.6B", "--memory", "0"), "--memory"),
        (("Qwen3-0.6B", "--max-cost", "nan"), "--max-cost"),
        (("Qwen3-0.6B", "--max-hours", "inf"), "--max-hours"),
        (("Qwen3-0.6B", "--rows", "0", "--kind", "documents"), "--rows"),
        (("Qwen3-0.6B", "--tokens", "many", "--kind", "documents"), "--tokens"),
        (("Qwen3-0.6B", "--tokens", "5M"), "--kind"),
        (("Qwen3-0.6B", "--kind", "documents"), "without an amount"),
        (("Qwen3-0.6B", "--kind", "poems"), "--kind"),
        (("Qwen3-0.6B", "--method", "magic"), "--method"),
        (("--method", "lora", *CHATS), "Expected a run file, a model"),
        (("Qwen3-0.6B", "batch.tokens=-5"), "batch.tokens"),
        (("Qwen3-0.6B", "no.such.key=1"), "not a known key"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--check",), "run folders"),
        (("--check", "empty"), "Not a run folder"),
    ],
)
def test_plan_refuses_wrong_usage(words: tuple[str, ...], says: str):
    Path("empty").mkdir()
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert says in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_plan_never_imports_torch():
    wishes = [
        ("Qwen2.5-72B-Instruct", "--device", "any"),
        ("Qwen/Qwen3-0.6B",),
        ("10M",),
        ("plan.yaml", "--devices", "2"),
    ]
    Path("plan.yaml").write_text("method: lora\nmodel: Qwen/Qwen3-4B\ndata: chats.jsonl\n")
    code = f"""
import sys
from trivium.cli.main import trivium
for words in {wishes!r}:
    trivium(["plan", *words, "--rows", "5K", "--kind", "conversations"], standalone_mode=False)
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1:] == ["[]"], done.stderr
