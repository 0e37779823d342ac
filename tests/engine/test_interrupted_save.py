"""Saving and loading checkpoints, interrupted at every file-system call."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.interrupt import FAILED, KILLED, run_interrupted
from tests.support.processes import context
from trivium.engine import checkpoint

OLD, KEPT, NEW = 1, 2, 3


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((30, 7), float(step)), "half": torch.full((5,), step, dtype=torch.bfloat16)},
        "training": {"step.w": torch.tensor(float(step)), "rng.cpu": torch.full((200,), step, dtype=torch.uint8)},
    }


def write(checkpoints: Path, step: int) -> None:
    checkpoint.write(checkpoint.step_folder(checkpoints, step), tensors(step), {"step": step})


def load(checkpoints: Path) -> tuple[int, list[str]]:
    """The step that `load_newest` finds and its problems; every bit of that checkpoint must be what was written."""
    found = tensors(0)

    def read(folder: Path) -> dict:
        state = checkpoint.verify(folder)
        checkpoint.read_into(folder, found)
        return state

    state, problems = checkpoint.load_newest(checkpoints, read)
    assert state is not None
    for file, group in tensors(state["step"]).items():
        assert all(torch.equal(found[file][name], tensor) for name, tensor in group.items())
    return state["step"], problems


def damage(checkpoints: Path, step: int) -> None:
    file = checkpoint.step_folder(checkpoints, step) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def save_new(checkpoints: Path) -> None:
    """What training does every so often: a new checkpoint, and the oldest goes."""
    write(checkpoints, NEW)
    checkpoint.prune(checkpoints, keep=2)


def load_past_the_damaged(checkpoints: Path) -> None:
    checkpoint.load_newest(checkpoints, checkpoint.verify)


def before_a_save(checkpoints: Path) -> None:
    """Two checkpoints, and what an earlier kill left of a save and of a removal."""
    for step in (OLD, KEPT):
        write(checkpoints, step)
    shutil.copytree(checkpoint.step_folder(checkpoints, OLD), checkpoints / ".step-00000003.tmp")
    shutil.copytree(checkpoint.step_folder(checkpoints, OLD), checkpoints / ".step-00000000.old")


def before_a_load(checkpoints: Path) -> None:
    """A damaged newest checkpoint, and one of the same step that was set aside before."""
    for step in (OLD, KEPT, NEW):
        write(checkpoints, step)
    damage(checkpoints, NEW)
    shutil.copytree(checkpoint.step_folder(checkpoints, OLD), checkpoints / "damaged-step-00000003")


def contents(checkpoints: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(p.relative_to(checkpoints)): p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}


class Interrupted:
    """An action on copies of one folder, each in a separate process."""

    def __init__(self, place: Path, prepare: Callable[[Path], None], action: Callable[[Path], None]) -> None:
        self.place, self.action, self.start = place, action, place / "start"
        self.start.mkdir()
        prepare(self.start)

    def run(self, stop_at: int | None, kill: bool = True) -> tuple[Path, int | None, list[str]]:
        """The folder after the action, the exit code, and the calls made (unknown after a kill)."""
        folder = self.place / f"{stop_at}-{kill}"
        shutil.copytree(self.start, folder)
        calls = self.place / "calls"
        calls.unlink(missing_ok=True)
        process = context.Process(target=run_interrupted, args=(self.action, folder, stop_at, kill, calls))
        process.start()
        process.join()
        return folder, process.exitcode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_checkpoint_write_and_prune_interrupted_at_every_call_leave_the_newest_whole(tmp_path, kill):
    saving = Interrupted(tmp_path, before_a_save, save_new)
    undisturbed, code, calls = saving.run(None)
    assert code == 0 and load(undisturbed) == (NEW, [])
    assert {"open", "write", "fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir"} <= set(calls)
    expected, found = contents(undisturbed), []
    for stop_at in range(len(calls)):
        folder, code, _ = saving.run(stop_at, kill)
        # A failed removal of leftovers does not fail the run: the next save removes them.
        assert code == KILLED if kill else code in (FAILED, 0), f"at {calls[stop_at]}, call {stop_at}"
        step, problems = load(folder)
        assert step == (NEW if checkpoint.step_folder(folder, NEW).exists() else KEPT) and not problems
        save_new(folder)
        assert load(folder) == (NEW, []) and contents(folder) == expected, f"at {calls[stop_at]}, call {stop_at}"
        found.append(step)
        shutil.rmtree(folder)
    assert found == sorted(found) and {KEPT, NEW} == set(found)


def test_load_newest_killed_at_every_call_loses_no_checkpoint(tmp_path):
    loading = Interrupted(tmp_path, before_a_load, load_past_the_damaged)
    _, code, calls = loading.run(None)
    assert code == 0 and {"os.rename", "os.rmdir"} <= set(calls)
    for stop_at in range(len(calls)):
        folder, code, _ = loading.run(stop_at)
        assert code == KILLED
        assert load(folder)[0] == KEPT, f"at {calls[stop_at]}, call {stop_at}"
        save_new(folder)
        assert load(folder) == (NEW, [])
        shutil.rmtree(folder)
