"""Trackers: send the metrics of a run to trackio, wandb or tensorboard, in addition to metrics.jsonl.

A tracker is imported only if `log.trackers` names it. `trackers.json` in the run folder holds the id of the tracker run
and the last step sent of every metric, so a resumed run continues the same tracker run without sending a step twice. It
is written before a metric is sent: after a SIGKILL a metric may be missing in a tracker, but not in metrics.jsonl.

API keys and server addresses come from the environment or the tracker's own login; this file never reads them.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from trivium.engine.loop import Observer
from trivium.errors import ConfigError, TriviumError
from trivium.files import atomic_write

STATE = "trackers.json"
DEFAULT_PROJECT = "trivium"
GLOBAL_STEP = "train/global_step"
WANDB_FLUSH_SECONDS = 1.0


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker of the run is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"log.trackers lists {', '.join(missing)}, which cannot be imported. Run pip install {' '.join(missing)} "
            "(or all three: pip install 'trivium[track]'), or remove it from log.trackers: metrics.jsonl and "
            "report.html have every metric anyway."
        )


@dataclass(frozen=True)
class TrackedRun:
    """The run as trackers see it; `id` is unique and stays the same after a resume."""

    folder: Path
    name: str
    id: str
    is_resumed: bool
    config: dict[str, Any]
    note: Callable[[str], None]


class Tracker(Protocol):
    """A run in one tracker."""

    def send(self, metrics: dict[str, Any], step: int) -> None:
        """Log metrics of a step."""

    def close(self) -> None:
        """Send pending metrics and end."""


class TensorBoard:
    """Event files in RUN/tensorboard; see them with `tensorboard --logdir runs`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = run.folder / "tensorboard"
        if not run.is_resumed:
            shutil.rmtree(events, ignore_errors=True)
        self._writer = SummaryWriter(str(events))
        if not run.is_resumed:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```")

    def send(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run with its files in RUN/wandb; offline if the user is not logged in."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        mode = None
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            run.note(
                f"wandb is not logged in, so it logs offline; upload later: wandb sync {run.folder}/wandb/offline-run-*"
            )
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
                dir=run.folder,
                id=run.id,
                name=run.name,
                config=run.config,
                resume="allow",
                mode=mode,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                    x_transaction_log_flush_interval=WANDB_FLUSH_SECONDS,
                ),
            )
        except wandb.Error as error:
            raise TriviumError(
                f"wandb could not start: {error}. It needs a login and a network connection. Nothing was trained. Set "
                "WANDB_MODE=offline to log to disk, or remove wandb from log.trackers."
            ) from error
        # wandb's own step must increase with every call, but training metrics and an evaluation can share a step.
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP)

    def send(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({**metrics, GLOBAL_STEP: step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run, stored locally or in the Space in TRACKIO_SPACE_ID; see it with `trackio show`."""

    def __init__(self, run: TrackedRun) -> None:
        self._trackio = import_module("trackio")
        with redirect_stdout(sys.stderr):  # stdout is reserved for results
            self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
                name=run.id,  # trackio identifies a run by its name
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def send(self, metrics: dict[str, Any], step: int) -> None:
        self._trackio.log({**metrics, GLOBAL_STEP: step}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Trackers(Observer):
    """An observer that sends the metrics of each record to the run's trackers and forwards every event to another."""

    def __init__(self, observer: Observer, trackers: list[Tracker], path: Path, state: dict[str, Any]) -> None:
        self._observer = observer
        self._trackers = trackers
        self._path = path
        self._state = state

    def note(self, text: str) -> None:
        self._observer.note(text)

    def begin(self, step: int, num_steps: int) -> None:
        self._observer.begin(step, num_steps)

    def step(self, step: int, loss: float) -> None:
        self._observer.step(step, loss)

    def record(self, record: dict[str, Any]) -> None:
        """Send the record's metrics (names with a `/`) unless they were sent before."""
        self._observer.record(record)
        step, sent = record["step"], self._state["sent"]
        metrics = {name: value for name, value in record.items() if "/" in name and step > sent.get(name, -1)}
        if not metrics or not self._trackers:
            return
        sent.update(dict.fromkeys(metrics, step))
        atomic_write(self._path, json.dumps(self._state, indent=1) + "\n")
        for tracker in self._trackers:
            tracker.send(metrics, step)

    def close(self) -> None:
        """End the tracker runs; a resumed run reopens them."""
        for tracker in self._trackers:
            tracker.close()


def open_trackers(
    names: Sequence[str], folder: Path, run_name: str, config: dict[str, Any], observer: Observer
) -> Trackers:
    """Start a run in each tracker, or continue the one recorded in the run folder.

    Args:
        names: keys of `TRACKERS`.
        folder: the run folder, which exists.
        run_name: the name shown in the trackers.
        config: everything that affects the metrics, as JSON values; a change starts a new tracker run.
        observer: receives every event too.

    Raises: TriviumError when a tracker refuses to start.
    """
    path = folder / STATE
    config_sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    state: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    is_resumed = state.get("config_sha256") == config_sha256
    if not is_resumed:
        state = {"run_id": f"{run_name}-{secrets.token_hex(4)}", "config_sha256": config_sha256, "sent": {}}
    run = TrackedRun(folder, run_name, state["run_id"], is_resumed, config, observer.note)
    return Trackers(observer, [TRACKERS[name](run) for name in names], path, state)
