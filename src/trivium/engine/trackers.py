"""Trackers: the figures of metrics.jsonl, sent to trackio, wandb or tensorboard as well.

A tracker is imported only when the run file names it. Each figure of each step is sent once: `trackers.json` in the run
folder holds the name of the tracker's run and the last step sent of every figure, so that a resumed run goes on in the
same tracker run, and steps that it repeats (with the same figures) are not sent again. It is written before a figure is
sent, and trackers write about once a second: what a SIGKILL catches on the way is only in metrics.jsonl.

Keys and addresses are the trackers' own business, from the environment or their log-in, and are never read here.
Nothing listens: figures go to a folder, or out. Used by `start`.
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
    """Refuse a run whose trackers are not installed, before it writes anything.

    Raises: ConfigError.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"log.trackers names {', '.join(missing)}, which cannot be imported. Expected it to be installed. Run: "
            f"pip install {' '.join(missing)} (or all three: pip install 'trivium[track]'), or take it out of "
            "log.trackers: metrics.jsonl and report.html hold every figure without it."
        )


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run."""

    folder: Path
    """The run folder."""
    name: str
    id: str
    """The tracker's run, unlike any other; the same after a resume."""
    is_resumed: bool
    config: dict[str, Any]
    note: Callable[[str], None]


class Tracker(Protocol):
    """One tracker's run."""

    def send(self, figures: dict[str, Any], step: int) -> None:
        """Add figures of a step."""
        ...

    def close(self) -> None:
        """Send all that waits, and end."""
        ...


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

    def send(self, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; its files lie in RUN/wandb. Without a log-in it is kept offline."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        mode = None
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            run.note(
                f"wandb is not logged in, so its run is kept in {run.folder / 'wandb'}; `wandb sync` sends it later"
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
                f"wandb refuses the run: {error}. Expected a log-in and a network. Nothing was trained; set "
                "WANDB_MODE=offline to keep its run on disk, or take wandb out of log.trackers."
            ) from error
        # Steps of wandb's own only grow, and a line of metrics and an evaluation may have the same one.
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP)

    def send(self, figures: dict[str, Any], step: int) -> None:
        self._run.log({**figures, GLOBAL_STEP: step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its own folder or in the Space that TRACKIO_SPACE_ID names; see it with `trackio show`."""

    def __init__(self, run: TrackedRun) -> None:
        self._trackio = import_module("trackio")
        with redirect_stdout(sys.stderr):  # stdout is for results
            self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
                name=run.id,  # it finds a run again by its name
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def send(self, figures: dict[str, Any], step: int) -> None:
        self._trackio.log({**figures, GLOBAL_STEP: step}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Trackers:
    """An observer that passes everything on, and sends the figures of each line of metrics to the run's trackers."""

    def __init__(self, observer: Observer, trackers: list[Tracker], path: Path, state: dict[str, Any]) -> None:
        self._observer = observer
        self._trackers = trackers
        self._path = path
        self._state = state

    def note(self, text: str) -> None:
        """See `Observer`."""
        self._observer.note(text)

    def begin(self, step: int, num_steps: int) -> None:
        """See `Observer`."""
        self._observer.begin(step, num_steps)

    def step(self, step: int, loss: float) -> None:
        """See `Observer`."""
        self._observer.step(step, loss)

    def record(self, record: dict[str, Any]) -> None:
        """Send the figures, which are all that has a `/` in its name, unless they were sent before."""
        self._observer.record(record)
        step, sent = record["step"], self._state["sent"]
        figures = {name: value for name, value in record.items() if "/" in name and step > sent.get(name, -1)}
        if not figures or not self._trackers:
            return
        sent.update(dict.fromkeys(figures, step))
        atomic_write(self._path, json.dumps(self._state, indent=1) + "\n")
        for tracker in self._trackers:
            tracker.send(figures, step)

    def close(self) -> None:
        """Send what still waits, and end the trackers' runs; a resumed one opens them again."""
        for tracker in self._trackers:
            tracker.close()


def open_trackers(
    names: Sequence[str], folder: Path, run_name: str, config: dict[str, Any], observer: Observer
) -> Trackers:
    """Begin a run in each tracker named, or go on with the one that the run folder knows of.

    Args:
        names: of `TRACKERS`.
        folder: the run folder, which exists.
        run_name: what the trackers call the run.
        config: all that decides the run's figures, as JSON values; with another one, a new tracker run begins.
        observer: who else watches the run.

    Raises: TriviumError when a tracker refuses.
    """
    path = folder / STATE
    config_sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    state: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    is_resumed = state.get("config_sha256") == config_sha256
    if not is_resumed:
        state = {"run_id": f"{run_name}-{secrets.token_hex(4)}", "config_sha256": config_sha256, "sent": {}}
    run = TrackedRun(folder, run_name, state["run_id"], is_resumed, config, observer.note)
    return Trackers(observer, [TRACKERS[name](run) for name in names], path, state)
