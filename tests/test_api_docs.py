"""The examples of docs/python.md run from the first to the last, in one folder with a small model and small data."""

import json
import re
from pathlib import Path

from tests.engine.runs import write_conversations
from tests.support.models import PAIRS, make_base, teach

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    teach(make_base(tmp_path / "Qwen" / "Qwen3-0.6B"), PAIRS, steps=10)
    write_conversations(tmp_path / "chats.jsonl", 40)
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") > 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr()
    assert "runs/lora is finished" in said.err and "runs/run is finished" in said.err
    assert "<run runs/lora: finished at step" in said.out
    errors = re.findall(r"print\(error\)  # (.+)", PAGE.read_text())
    assert errors and all(error in said.out for error in errors)


def test_every_function_is_listed():
    import trivium

    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(name for name in trivium.__all__ if name.islower() and name != "__version__")
