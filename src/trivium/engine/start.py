"""From a resolved run file to a finished run folder: the lock, the refusals, the records, then the loop.

The one way a run begins, goes on, or is found finished; the command line and the quickstart both come
through here.
"""

from pathlib import Path
from typing import Any

import torch

from trivium.engine import loop
from trivium.engine.device import Machine, probe
from trivium.engine.loop import Observer
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.setup import Job, build_engine, prepare, provenance
from trivium.errors import ConfigError, Stopped
from trivium.files import atomic_write
from trivium.runfile import ResolvedRun, differences, dump_run, load_run


def start(resolved: ResolvedRun, observer: Observer) -> RunFolder:
    """Train a run, or go on with it, or find it finished.

    Returns: the run's folder, its result in `model/`.

    Raises:
        ConfigError: the run cannot be as it is set, or its folder belongs to a different run; no folder was changed.
        BadData: the data cannot be used; no folder was changed.
        Stopped: a signal came and everything was saved.
        TriviumError: the run could not go on; `failure.json` and the records say why.
    """
    run = resolved.run
    folder = RunFolder(Path(run.runs_dir) / run.name)
    refuse_another_run(folder, resolved)
    if folder.is_finished:
        observer.note(f"{folder.path} is finished: its result is in {folder.model}. Nothing was trained.")
        return folder
    job = prepare(run, observer.note)
    machine = probe(run.device, run.precision)
    folder.open()
    try:
        if not folder.has_progress:
            atomic_write(folder.run_yaml, dump_run(run, resolved.origins))
        (folder.path / "failure.json").unlink(missing_ok=True)
        train(job, machine, folder, observer)
    except Stopped:
        raise
    except Exception as error:
        if folder.read("failure.json") is None:
            folder.write("failure.json", {"kind": type(error).__name__, "time": now(), "message": str(error)})
        raise
    finally:
        folder.close()
    return folder


def refuse_another_run(folder: RunFolder, resolved: ResolvedRun) -> None:
    """A folder that holds a checkpoint or a result goes on only with the run it began with.

    Raises: ConfigError naming every field that differs.
    """
    if not folder.has_progress:
        return
    changed = differences(load_run(folder.run_yaml, []).run, resolved.run)
    if changed:
        raise ConfigError(
            f"{folder.path} was begun with other settings: {'; '.join(changed)}. Resuming would mix two runs, so "
            "nothing was changed. Put the settings back to go on with it, or give this run another name."
        )


def train(job: Job, machine: Machine, folder: RunFolder, observer: Observer) -> None:
    """Build the engine, record what the run is made of, and run the loop."""
    run = job.run
    torch.manual_seed(run.seed)
    engine = build_engine(job, machine)
    previous = (folder.read("provenance.json") or {}) if folder.has_progress else {}
    record: dict[str, Any] = {**provenance(job, machine), **previous, "starts": [*previous.get("starts", []), now()]}
    folder.write("provenance.json", record)
    shares = ", ".join(f"{share:.1%}" for share in job.rows.order.token_shares(epoch=0))
    observer.note(
        f"{job.shape.num_params:,} parameters, {sum(store.num_tokens for store in job.stores):,} training tokens"
        + (f" (sources {shares})" if len(job.stores) > 1 else "")
        + f", {job.num_steps:,} steps of {run.batch.tokens:,} tokens, {record['hardware']['device']}, "
        + record["hardware"]["compute_dtype"]
    )
    loop.train(job, engine, machine, folder, observer)
