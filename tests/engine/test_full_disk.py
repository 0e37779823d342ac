"""A disk that is really full, before, during and at the end of a run: one paragraph, and the same command goes on.

The disk is a tmpfs in a mount namespace of its own, which ends with the process.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.runs import finish, outcome, run_values, write_corpus

MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
PROGRAM = """
import json, sys
from pathlib import Path
from tests.engine.runs import train
from trivium.engine.loop import Silent
from trivium.errors import DoesNotFit

values, fill_at = json.loads(sys.argv[1])
filler = Path(values["runs_dir"]) / "filler"

class Filling(Silent):
    def step(self, step, loss):
        if step == fill_at:
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)): pass
                except OSError:
                    pass

try:
    train(values, Filling())
except DoesNotFit as error:
    print(error)
    filler.unlink()
    train(values)
"""


def on_small_disk(size: str, disk: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a tmpfs of `size` at `disk`, and copies what is there to `disk`-after."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here, so no disk can be filled")
    disk.mkdir()
    keep = ["sh", "-c", '"$@"; code=$?; cp -r "$0" "$0-after"; exit $code', str(disk)]
    mounted = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", size, str(disk), *keep, *command]
    return subprocess.run(mounted, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stories.jsonl")


def trivium(run: dict[str, Any], folder: Path) -> list[str]:
    (folder / "run.yaml").write_text(json.dumps(run))
    return [sys.executable, "-m", "trivium.cli", "train", str(folder / "run.yaml")]


def test_the_doctor_and_the_last_save_want_the_same_space(corpus: Path, tmp_path: Path):
    """A disk that the doctor passes is large enough for the end of the run, and a small run needs little."""
    run = run_values(corpus, tmp_path / "disk", budget={"steps": 4})
    small = on_small_disk("1M", tmp_path / "disk", *trivium(run, tmp_path))
    assert small.returncode == 3 and "M02" in small.stderr and "MiB are free" in small.stderr, small.stderr
    assert not list((tmp_path / "disk-after").rglob("*step-*"))
    run = run_values(corpus, tmp_path / "disk2", budget={"steps": 4})
    done = on_small_disk("2M", tmp_path / "disk2", *trivium(run, tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk2-after" / "small" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("step", [1, 11, 24])
def test_a_disk_that_fills_up_stops_a_run_that_then_goes_on(step: int, corpus: Path, tmp_path: Path):
    finish(run_values(corpus, tmp_path / "plain"))
    values = run_values(corpus, tmp_path / "disk")
    done = on_small_disk("8M", tmp_path / "disk", sys.executable, "-c", PROGRAM, json.dumps([values, step]))
    assert done.returncode == 0, done.stderr
    message = done.stdout
    assert "The disk is full: " in message and " 0.0 MiB are free in " in message and message.count("\n") == 1, message
    assert "run the same command again" in message and str(tmp_path / "disk" / "small") in message
    assert outcome(tmp_path / "disk-after") == outcome(tmp_path / "plain")


def test_a_full_disk_stops_the_building_of_stores(tmp_path: Path):
    corpus = write_corpus(tmp_path / "stories.jsonl", num_stories=20_000)
    run = run_values(corpus, tmp_path / "disk")
    run["data"]["cache_dir"] = str(tmp_path / "disk" / "cache")
    done = on_small_disk("2M", tmp_path / "disk", *trivium(run, tmp_path))
    assert done.returncode == 3, done.stderr
    assert "trivium: Not enough disk space in" in done.stderr
