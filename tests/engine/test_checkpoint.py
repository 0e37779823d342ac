"""Checkpoints: atomic writes, verification, fallback to the previous one, and pruning."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trivium.engine import checkpoint
from trivium.errors import ConfigError, TriviumError
from trivium.files import require_free_space


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((30, 7), value), "half": torch.full((5,), value, dtype=torch.bfloat16)},
        "training": {"step.w": torch.tensor(value), "rng.cpu": torch.arange(200, dtype=torch.uint8)},
    }


def write(folder: Path, step: int) -> Path:
    place = checkpoint.step_folder(folder, step)
    checkpoint.write(place, tensors(float(step)), {"step": step})
    return place


def test_checkpoint_files_are_plain_safetensors(tmp_path):
    place = write(tmp_path, 3)
    stored = load_file(place / "model.safetensors")
    assert torch.equal(stored["w"], torch.full((30, 7), 3.0)) and stored["half"].dtype == torch.bfloat16
    empty = tensors(0.0)
    assert checkpoint.verify(place)["step"] == 3
    checkpoint.read_into(place, empty)
    assert torch.equal(empty["model"]["half"], torch.full((5,), 3.0, dtype=torch.bfloat16))
    assert not list(tmp_path.glob(".*"))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_verify_finds_flipped_bytes_truncation_and_missing_files(tmp_path_factory, data):
    place = write(tmp_path_factory.mktemp("c"), 1)
    file = place / data.draw(st.sampled_from(sorted(p.name for p in place.iterdir())))
    content = bytearray(file.read_bytes())
    match data.draw(st.sampled_from(["flip", "truncate", "remove", "zero", "garbage"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "zero":
            start = data.draw(st.integers(0, len(content) - 1))
            zeroed = content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :]
            if zeroed == content:
                return
            file.write_bytes(zeroed)
        case "garbage":
            file.write_bytes(b"\xff\x00" * 20)
        case "remove":
            file.unlink()
    try:
        state = checkpoint.verify(place)
    except checkpoint.Damaged as damage:
        assert place.name in str(damage)
    else:
        # Only white space of the manifest itself may change without a trace: it then says the same.
        assert file.name == "manifest.json" and state["step"] == 1
        assert json.loads(bytes(file.read_bytes()))["sha256"].keys() == {
            "model.safetensors", "training.safetensors", "state.json"
        }  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_load_newest_falls_back_to_the_previous_checkpoint(tmp_path, damage):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    file = newer / "training.safetensors"
    match damage:
        case "flip":
            content = bytearray(file.read_bytes())
            content[-5] ^= 4
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(file.read_bytes()[:-100])
        case "remove":
            file.unlink()
        case "swap":
            shutil.copy(older / "training.safetensors", file)
    state, problems = checkpoint.load_newest(tmp_path, checkpoint.verify)
    assert state is not None and state["step"] == 10
    assert len(problems) == 1 and "step-00000020" in problems[0] and "training.safetensors" in problems[0]
    write(tmp_path, 20)
    state, problems = checkpoint.load_newest(tmp_path, checkpoint.verify)
    assert state is not None and state["step"] == 20 and not problems


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"format": 1, "sha256": {}}', '{"format": 2, "sha256": {}}'])
def test_verify_rejects_an_incomplete_manifest(tmp_path, manifest):
    (write(tmp_path, 1) / "manifest.json").write_text(manifest)
    with pytest.raises(checkpoint.Damaged, match="manifest"):
        checkpoint.verify(tmp_path / "step-00000001")


def test_load_newest_fails_if_no_checkpoint_verifies(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(checkpoint.Damaged, match="No checkpoint"):
        checkpoint.load_newest(tmp_path, checkpoint.verify)
    assert checkpoint.steps(tmp_path) == [2, 1]


def test_load_newest_of_an_empty_folder_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "none", checkpoint.verify) == (None, [])


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path):
    for step in (5, 100, 20):
        write(tmp_path, step)
    (tmp_path / ".step-00000030.tmp").mkdir()
    (tmp_path / ".step-00000001.old").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    checkpoint.prune(tmp_path, keep=0)
    assert checkpoint.steps(tmp_path) == [100]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    place = write(tmp_path, 1)
    other = tensors(0.0)
    other["model"]["w"] = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match=r"holds w with shape \[30, 7\], but in the run's model it has \[3, 3\]"):
        checkpoint.read_into(place, other)
    other["model"]["extra"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="has no tensor extra"):
        checkpoint.read_into(place, other)


def test_checkpoint_write_checks_free_space_first(tmp_path):
    with pytest.raises(TriviumError, match="Not enough disk space.*needed.*free"):
        require_free_space(tmp_path, 1 << 60, "a checkpoint")


def test_failed_checkpoint_write_leaves_only_the_older_checkpoint(tmp_path):
    """A file size limit makes the kernel refuse the write midway, as a full disk does."""
    write(tmp_path, 1)
    code = f"""
import resource, signal, torch
from pathlib import Path
from trivium.engine import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.write(Path({str(tmp_path / "step-00000002")!r}), {{"model": {{"w": torch.zeros(100_000)}}}}, {{"step": 2}})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in result.stderr and ".step-00000002.tmp/model.safetensors" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "step-00000001")["step"] == 1
