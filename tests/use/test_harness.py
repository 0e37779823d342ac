"""The harness is handed the loaded model as it is; where it is not installed, that is said."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.models import make_adapter, make_base
from trivium.errors import ConfigError
from trivium.use.harness import require_harness, run_tasks
from trivium.use.load import load

TASK = """
task: boats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_require_harness_says_how_to_install_it():
    with pytest.raises(ConfigError, match="pip install 'trivium"):
        require_harness()


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_task_is_run_on_an_adapter_with_trained_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lm_eval.tasks

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": "Is it?", "a": n % 2}) + "\n" for n in range(4)))
    (tmp_path / "boats.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    known = partial(lm_eval.tasks.TaskManager, include_path=str(tmp_path))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known)
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=[258])
    loaded = load(str(adapter))
    found = run_tasks(loaded, ["boats"])
    assert found["boats"]["acc,none"] == 0.5
    with pytest.raises(ConfigError, match="has no task nonsense"):
        run_tasks(loaded, ["nonsense"])
