"""The run folder: its lock and its records, which are cut back when a killed run resumes.

    run.yaml          resolved configuration, with where each value came from
    provenance.json   versions, hashes, hardware, every start and resume
    plan.json         what the planner predicted, and what was measured so far
    metrics.jsonl     one line per log step or evaluation
    ledger.jsonl      one line per optimizer step: a hash chain over the tokens it read
    samples.jsonl     text generated during training
    trackers.json     which figures other trackers have; tensorboard/ and wandb/ belong to them
    checkpoints/      see `checkpoint`
    model/            the result, a Hugging Face folder
    adapter/          the result of a run that trains an adapter, a PEFT folder
    finished.json     written last
    failure.json      why the run stopped by itself, until it is resumed

Knows files, not tensors. Of several ranks only the first one writes; for the others writing does nothing.
"""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError
from trivium.files import FolderLock, atomic_write


def now() -> str:
    """The time as every record writes it: ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class JsonLines:
    """A file with one JSON object per line, each with a `step`, that can be cut back to a step."""

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, immediately visible to readers."""
        if not self.is_writer:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records in order, without a last line that a crash left incomplete."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def cut_after(self, step: int) -> None:
        """Drop every record of a later step: the run continues from `step` and will write them again."""
        if not self.is_writer:
            return
        kept = [json.dumps(record) + "\n" for record in self if record["step"] <= step]
        atomic_write(self.path, "".join(kept))

    def sync(self) -> None:
        """Make what was appended durable."""
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

        Raises: TriviumError when there is none.
        """
        if not (path / "run.yaml").is_file():
            raise TriviumError(
                f"{path} is not a run folder: it has no run.yaml. Give the folder that `trivium train` made: runs/NAME."
            )
        return cls(path)

    def open(self) -> None:
        """Make the folder and take its lock, held until `close` or the end of the process.

        Raises: TriviumError naming the process that holds it.
        """
        if self.is_writer:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(wait=False)

    def close(self) -> None:
        """Release the lock."""
        if self.is_writer:
            self._lock.release()

    def cut_after(self, step: int) -> None:
        """Cut all records back to `step`."""
        for records in (self.metrics, self.ledger, self.samples):
            records.cut_after(step)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON record of the folder; None where it is missing or torn."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Replace a JSON record of the folder."""
        if self.is_writer:
            atomic_write(self.path / name, json.dumps(record, indent=1) + "\n")

    @property
    def result(self) -> Path:
        """Where the finished run's result is."""
        return self.adapter if self.adapter.is_dir() else self.model

    @property
    def has_progress(self) -> bool:
        """Whether there is something to lose: a checkpoint, whole or damaged, or a result."""
        return self.is_finished or any(not entry.name.startswith(".") for entry in self.checkpoints.glob("*step-*"))

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end and its result was written."""
        return self.read("finished.json") is not None
