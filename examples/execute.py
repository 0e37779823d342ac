"""Run a notebook from its first cell to its last in a temporary folder, and write its outputs back: `make notebook`.

python examples/execute.py [NOTEBOOK]
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("first_run.ipynb")


def execute(path: Path) -> Any:
    """The notebook with the outputs of this run, and nothing about this machine's software.

    Raises: nbclient's CellExecutionError when a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIVIUM_HOME"] = folder  # the plan is that of a machine that was not calibrated
        os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm misses ipywidgets, which nothing here needs
        NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    executed = execute(path)
    nbformat.write(executed, path)
