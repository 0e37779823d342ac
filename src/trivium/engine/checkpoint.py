"""Crash-safe checkpoints, verified by hash before they are loaded.

A checkpoint is a folder `step-00000100` with `model.safetensors`, `training.safetensors`, `state.json` and, written
last, `manifest.json`: the SHA-256 of every other file, computed before the bytes reach the disk. It is written to a
temporary folder, fsynced and renamed. Pickle is never used.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trivium.errors import ConfigError, TriviumError
from trivium.files import DISK_FULL, atomic_write, fsync_directory, require_free_space, sha256_file, write_safetensors
from trivium.model import hf

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{8})")
CONTENT = {"model.safetensors", "training.safetensors", "state.json"}


class Damaged(TriviumError):
    """A checkpoint is incomplete or differs from what was written."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step-{step:08d}"


def write(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: Mapping[str, object]) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: the checkpoint's path; an existing checkpoint is kept.
        tensors: for each file name without suffix, its tensors by name.
        state: the rest of the training state, as JSON.

    Raises: DoesNotFit when the disk has not enough free space, and OSError when it fills up meanwhile, both without
        touching existing files; TriviumError when writing fails otherwise.
    """
    if folder.exists():
        return
    num_bytes = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    require_free_space(folder.parent, num_bytes, f"checkpoint {folder.name}")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        hashes = {}
        for file, group in tensors.items():
            sources = [hf.tensor_source(name, tensor) for name, tensor in group.items()]
            hashes[f"{file}.safetensors"] = write_safetensors(temporary / f"{file}.safetensors", sources, {})
        text = json.dumps({"format": FORMAT, **state}, indent=1)
        atomic_write(temporary / "state.json", text)
        hashes["state.json"] = sha256_file(temporary / "state.json")
        atomic_write(temporary / "manifest.json", json.dumps({"format": FORMAT, "sha256": hashes}, indent=1))
        os.replace(temporary, folder)
        fsync_directory(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in DISK_FULL:
            raise  # the caller knows what the rest of the run needs
        raise TriviumError(
            f"Writing {folder.name} failed: {error}. Earlier checkpoints are unchanged. Free disk space or repair the "
            "disk, and run the same command again."
        ) from error


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the state.

    Raises: Damaged naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        expected = dict(manifest["sha256"])
        if not expected.keys() >= CONTENT:
            raise Damaged(f"{folder.name}: manifest.json does not list {sorted(CONTENT - expected.keys())[0]}")
        if manifest["format"] != FORMAT:
            raise Damaged(f"{folder.name}: its format is {manifest['format']}, but this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder.name}: manifest.json cannot be read ({type(error).__name__})") from None
    for name, digest in sorted(expected.items()):
        try:
            found = sha256_file(folder / name)
        except OSError as error:
            raise Damaged(f"{folder.name}: {name} cannot be read ({error.strerror})") from None
        if found != digest:
            raise Damaged(f"{folder.name}: {name} has changed since it was written (its SHA-256 differs)")
    return json.loads((folder / "state.json").read_bytes())


def read_into(folder: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """Copy a verified checkpoint into the given tensors, one at a time.

    Raises: ConfigError when a tensor is missing or has another shape, so the checkpoint belongs to another model.
    """
    for file, group in tensors.items():
        with safe_open(folder / f"{file}.safetensors", framework="pt") as reader:
            missing = set(group) - set(reader.keys())
            if missing:
                raise another_model(folder, f"has no tensor {sorted(missing)[0]}")
            for name, tensor in group.items():
                value = reader.get_tensor(name)
                if value.shape != tensor.shape:
                    shapes = f"{list(value.shape)}, but in the run's model it has {list(tensor.shape)}"
                    raise another_model(folder, f"holds {name} with shape {shapes}")
                tensor.copy_(value)


def another_model(folder: Path, found: str) -> ConfigError:
    """The error for a valid checkpoint that does not fit the run's model."""
    return ConfigError(
        f"{folder} {found}. The model has changed since the run started, perhaps because its data or tokenizer "
        "changed. Restore them, or add name=NEW to start another run."
    )


def steps(checkpoints: Path) -> list[int]:
    """Steps with a checkpoint, newest first, by folder name."""
    found = (STEP_FOLDER.fullmatch(entry.name) for entry in checkpoints.iterdir()) if checkpoints.is_dir() else ()
    return sorted((int(match[1]) for match in found if match), reverse=True)


def load_newest(checkpoints: Path, load: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest checkpoint that verifies, and rename newer, damaged ones to `damaged-...`.

    Returns: the loaded state, None if there is no checkpoint; and the problem of each damaged checkpoint.

    Raises: Damaged when there are checkpoints but none verifies, since starting over would silently lose the run.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for step in steps(checkpoints):
        folder = step_folder(checkpoints, step)
        try:
            state = load(folder)
        except Damaged as damage:
            problems.append(str(damage))
            damaged.append(folder)
            continue
        for broken in damaged:
            shutil.rmtree(broken.with_name(f"damaged-{broken.name}"), ignore_errors=True)
            os.replace(broken, broken.with_name(f"damaged-{broken.name}"))
        return state, problems
    if problems:
        raise Damaged(
            f"No checkpoint in {checkpoints} verifies: {'; '.join(problems)}. Nothing was changed. "
            "Restore the folder from a copy, or add name=NEW to start another run."
        )
    return None, []


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and leftovers of crashes. Call it after writing a checkpoint.

    A folder is renamed before it is deleted, so that a partly deleted checkpoint is never taken for a valid one.
    """
    for step in steps(checkpoints)[max(1, keep) :]:
        os.replace(step_folder(checkpoints, step), checkpoints / f".step-{step:08d}.old")
    for leftover in [*checkpoints.glob(".step-*.tmp"), *checkpoints.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
