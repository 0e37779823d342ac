"""examples/first_run.ipynb runs, and what it shows is what a run shows; a kernel's stop button saves the run."""

import re
import time
from pathlib import Path

import nbformat
import pytest

from examples.execute import NOTEBOOK, execute
from tests.engine.runs import run_values, write_corpus
from trivium.engine.runfolder import RunFolder


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell) -> str:
    """The text of a cell's outputs; of the panel, what GitHub shows if it shows no HTML."""
    return "".join(output.get("text") or output["data"].get("text/plain", "") for output in cell.outputs)


def answers(notebook) -> list[str]:
    return [line for cell in code_cells(notebook) for line in shown(cell).splitlines() if " expected " in line]


def test_the_committed_outputs_are_those_of_one_run_and_name_no_folder_of_its_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not re.search(r"/(home|root|tmp|Users|usr|opt)/|site-packages", NOTEBOOK.read_text())
    assert len(answers(notebook)) == 10 and "Error" not in "".join(map(shown, cells))


@pytest.mark.long
def test_the_notebook_runs_and_its_adapter_answers():
    notebook = execute(NOTEBOOK)
    text = "".join(map(shown, code_cells(notebook)))
    assert "Time and cost" in text and "Nothing to fix" in text and "training" in text
    pairs = [re.findall(r"expected (.+?\.) +(.*)", line)[0] for line in answers(notebook) if "unseen" not in line]
    assert len(pairs) == 7 and sum(expected == answer for expected, answer in pairs) >= 5
    assert "\x1b[2K" not in text and "<run runs/lora: finished" in text


def test_the_stop_button_saves_and_the_same_cell_continues_in_a_panel(tmp_path):
    from jupyter_client.manager import start_new_kernel

    corpus = write_corpus(tmp_path / "stories.jsonl", 60)
    values = run_values(corpus, Path("runs"), budget={"steps": 300}, eval={"every_steps": 1000})
    code = f"import trivium\ntrivium.train(**{values!r})"
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        folder = RunFolder(tmp_path / "runs" / "small")
        client.execute(code)
        while len(list(folder.ledger)) < 3:
            time.sleep(0.02)
            assert manager.is_alive()
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)["content"]
        assert (reply["status"], reply["ename"]) == ("error", "Stopped")
        assert len(reply["traceback"]) == 1 and "Everything is saved" in reply["traceback"][0]
        assert folder.has_progress and not folder.is_finished
        messages = []
        again = client.execute_interactive(code, timeout=120, output_hook=messages.append)
        assert again["content"]["status"] == "ok"
        drawn = [message for message in messages if message["msg_type"].endswith("display_data")]
        assert [message["msg_type"] for message in drawn[:2]] == ["display_data", "update_display_data"]
        assert len({message["content"]["transient"]["display_id"] for message in drawn}) == 1
        assert "300 of 300" in drawn[-1]["content"]["data"]["text/html"]
        lines = "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")
        assert "resumed after step" in lines and "\x1b" not in lines
        assert folder.is_finished
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
