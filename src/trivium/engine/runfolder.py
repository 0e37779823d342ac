"""The run folder: its lock, and its files, which are truncated to the last checkpoint when a killed run resumes.

    run.yaml          resolved configuration with the origin of each value
    provenance.json   versions, hashes, hardware, every start and resume
    plan.json         the planner's prediction and the measurements so far
    metrics.jsonl     one line per log step or evaluation
    ledger.jsonl      one line per optimizer step: a hash chain over the tokens it read
    samples.jsonl     text generated during training
    trackers.json     what was sent to trackers; their files are in tensorboard/ and wandb/
    checkpoints/      see `checkpoint.py`
    model/            the result, a Hugging Face folder
    adapter/          the result of an adapter run, a PEFT folder
    finished.json     written last
    failure.json      the error that ended the run, until it is resumed

Only rank 0 writes; on other ranks writing does nothing.
"""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError
from trivium.files import FolderLock, atomic_write, errors_named


def now() -> str:
    """The current time for records: ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class JsonLines:
    """A file with one JSON object per line, each with a `step`."""

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer

    def append(self, record: dict[str, Any]) -> None:
        """Append a line; readers see it at once."""
        if not self.is_writer:
            return
        with errors_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines in order, without a last line truncated by a crash."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def cut_after(self, step: int) -> None:
        """Remove the lines after `step`; a run that resumes at `step` writes them again."""
        if not self.is_writer:
            return
        kept = [json.dumps(record) + "\n" for record in self if record["step"] <= step]
        atomic_write(self.path, "".join(kept))

    def sync(self) -> None:
        """Make appended lines durable."""
        if self.is_writer and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


class RunFolder:
    """The folder of one run; `is_writer` is false for all ranks but the first."""

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self.run_yaml = path / "run.yaml"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.metrics = JsonLines(path / "metrics.jsonl", is_writer)
        self.ledger = JsonLines(path / "ledger.jsonl", is_writer)
        self.samples = JsonLines(path / "samples.jsonl", is_writer)
        self._lock = FolderLock(path / "lock")

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started.

        Raises: TriviumError when `path` is not a run folder.
        """
        if not (path / "run.yaml").is_file():
            raise TriviumError(
                f"{path} is not a run folder: it has no run.yaml. Give a folder written by `trivium train`: runs/NAME."
            )
        return cls(path)

    def open(self) -> None:
        """Create the folder and take its lock until `close` or the end of the process.

        Raises: TriviumError naming the process that holds the lock.
        """
        if self.is_writer:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(wait=False)

    def close(self) -> None:
        """Release the lock."""
        if self.is_writer:
            self._lock.release()

    def cut_after(self, step: int) -> None:
        """Remove the lines after `step` from all JSONL files."""
        for records in (self.metrics, self.ledger, self.samples):
            records.cut_after(step)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object in the folder; None if it is missing or damaged."""
        try:
            content = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a JSON object into the folder."""
        if self.is_writer:
            atomic_write(self.path / name, json.dumps(record, indent=1) + "\n")

    @property
    def result(self) -> Path:
        """The folder of the result."""
        return self.adapter if self.adapter.is_dir() else self.model

    @property
    def has_progress(self) -> bool:
        """Whether the folder has a checkpoint, valid or damaged, or a result."""
        return self.is_finished or any(not entry.name.startswith(".") for entry in self.checkpoints.glob("*step-*"))

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end and wrote its result."""
        return self.read("finished.json") is not None
