"""From a resolved run file to a finished run folder: the lock, the refusals, the records, then the loop.

The one way a run begins, goes on, or is found finished; the command line and the quickstart both come
through here.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from trivium.config.load import ResolvedRun, differences, dump_run, flatten, load_run
from trivium.config.run import Run
from trivium.data.store.build import BuiltStore
from trivium.data.store.tally import describe_counts
from trivium.engine import loop, plan_record
from trivium.engine.device import Machine, begin_peak, describe, is_out_of_memory, probe, return_freed_blocks
from trivium.engine.engine import Engine
from trivium.engine.loop import Observer
from trivium.engine.provenance import provenance, versions
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.setup import Job, build_engine, prepare, supervised_share
from trivium.engine.trackers import open_trackers, require_trackers
from trivium.errors import ConfigError, Stopped
from trivium.files import atomic_write
from trivium.plan.check import PLAN_FILE

DTYPE_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
PORTIONS = ("batch.micro_tokens", "activation_checkpointing")
"""How a step is portioned: all that a resumed run may change, since it reads the same samples in the same order."""


def start(
    resolved: ResolvedRun, observer: Observer, examine: Callable[[Job, Machine], None] = lambda job, machine: None
) -> RunFolder:
    """Train a run, or go on with it, or find it finished.

    Args:
        resolved: the run.
        observer: is shown what happens.
        examine: looks at the prepared run before anything is written, and raises if it should not begin.

    Returns: the run's folder, its result in `model/` or `adapter/`.

    Raises:
        ConfigError: the run cannot be as it is set, or its folder belongs to a different run; no folder was changed.
        BadData: the data cannot be used; no folder was changed.
        Stopped: a signal came and everything was saved.
        DoesNotFit: memory ran out; what was saved is as it was.
        TriviumError: the run could not go on; `failure.json` and the records say why.
    """
    folder = RunFolder(Path(resolved.run.runs_dir) / resolved.run.name)
    run = as_begun(folder, resolved.run)
    if is_finished(folder, run, observer):
        return folder
    require_trackers(run.log.trackers)
    machine = probe(run.device, run.precision)
    job = prepare(run, observer.note, machine)
    examine(job, machine)
    folder.open()
    try:
        # Another process may have had the folder while this one prepared.
        if not is_finished(folder, run, observer):
            train(resolved, job, machine, folder, observer)
    except (Stopped, ConfigError):
        raise
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide what went wrong
            if folder.read("failure.json") is None:
                folder.write("failure.json", {"kind": type(error).__name__, "time": now(), "message": str(error)})
        raise
    finally:
        folder.close()
    return folder


def as_begun(folder: RunFolder, run: Run) -> Run:
    """A run that goes on, portioned as its folder records where the run file leaves that open: on a machine with other
    memory it computes what it would have computed where it began."""
    if not folder.has_progress:
        return run
    begun = load_run(folder.run_yaml, []).run
    batch = run.batch.model_copy(update={"micro_tokens": run.batch.micro_tokens or begun.batch.micro_tokens})
    given = run.activation_checkpointing
    recompute = begun.activation_checkpointing if given is None else given
    return run.model_copy(update={"batch": batch, "activation_checkpointing": recompute})


def is_finished(folder: RunFolder, run: Run, observer: Observer) -> bool:
    """Whether this very run has ended; a folder that holds anything of another run is refused.

    Raises: ConfigError naming every field that differs.
    """
    if not folder.has_progress:
        return False
    changes = differences(load_run(folder.run_yaml, []).run, run)
    if changed := [change for change in changes if not change.startswith(PORTIONS)]:
        raise ConfigError(
            f"{folder.path} was begun with other settings: {'; '.join(changed)}. Resuming would mix two runs, so "
            "nothing was changed. Put the settings back to go on with it, or give this run another name."
        )
    if folder.is_finished:
        observer.note(f"{folder.path} is finished: its result is in {folder.result}. Nothing was trained.")
    return folder.is_finished


def train(resolved: ResolvedRun, job: Job, machine: Machine, folder: RunFolder, observer: Observer) -> None:
    """Record what the run is made of and what the planner expects of it, build the engine, and run the loop.

    Raises: DoesNotFit with the planner's fixes when memory runs out, beside all that the loop raises.
    """
    previous = (folder.read("provenance.json") or {}) if folder.has_progress else {}
    if previous:
        # The type a run began with is kept, whatever a probe says in a busier moment.
        machine = probe(job.run.device, DTYPE_PRECISIONS[previous["hardware"]["compute_dtype"]])
        if changes := differences(load_run(folder.run_yaml, []).run, job.run):
            changed = "; ".join(changes)
            observer.note(f"goes on in other portions ({changed}): the same samples in the same order, but rounding")
    held_bytes = begin_peak(machine.device)
    if not previous:
        folder.write(PLAN_FILE, {"predicted": plan_record.predict(job, machine, versions(), held_bytes)})
    left_open = [key for key in PORTIONS if flatten(resolved.run)[key] is None]
    atomic_write(folder.run_yaml, dump_run(job.run, resolved.origins | dict.fromkeys(left_open, "planner")))
    torch.manual_seed(job.run.seed)
    if plan_record.is_tight(job, machine):
        return_freed_blocks()
    try:
        engine = build_engine(job, machine)
        record_start(job, engine, machine, folder, previous)
        for line in describe_job(job, engine, machine):
            observer.note(line)
        config = {**job.run.model_dump(mode="json"), "inputs": job.inputs}
        with closing(open_trackers(job.run.log.trackers, folder.path, job.run.name, config, observer)) as watched:
            loop.train(job, engine, machine, folder, watched)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise plan_record.ran_out(job, machine, error, held_bytes) from error
        raise


def record_start(job: Job, engine: Engine, machine: Machine, folder: RunFolder, previous: dict[str, Any]) -> None:
    """Write provenance.json: what the run is made of stays as at its first start, and this start is added."""
    record = provenance(job, engine, machine)
    settled = flatten(job.run)
    this_start = {
        "time": now(),
        "versions": record["versions"],
        "hardware": record["hardware"],
        "portions": {key: settled[key] for key in PORTIONS},
    }
    folder.write("provenance.json", {**record, **previous, "starts": [*previous.get("starts", []), this_start]})
    (folder.path / "failure.json").unlink(missing_ok=True)


def describe_job(job: Job, engine: Engine, machine: Machine) -> Iterator[str]:
    """What is about to happen, in a line, and what the user may have overlooked."""
    run = job.run
    num_trained = sum(parameter.numel() for parameter in engine.parameters.values())
    shares = [
        f"{part.built.name if part.kind == 'all' else part.kind} {share:.1%}"
        for part, share in zip(job.parts, job.rows.order.token_shares(epoch=0), strict=True)
    ]
    yield (
        f"{job.shape.num_params:,} parameters"
        + (f", {num_trained:,} of an adapter trained, scaled by {run.adapter.scaling:g}" if run.adapter else "")
        + f", {job.facts.num_tokens:,} training tokens"
        + (f" ({', '.join(shares)})" if len(job.parts) > 1 else "")
        + f", {job.num_steps:,} steps of {run.batch.tokens:,} tokens, {describe(machine.device)}, "
        + str(machine.compute_dtype).removeprefix("torch.")
    )
    for built in job.built:
        if built.report.get("conversations"):
            yield describe_conversations(built)
    if engine.model.head_rows is not None:
        tokens = ", ".join(job.tokenizer.convert_ids_to_tokens(engine.model.head_rows[0].tolist()))
        yield (
            f"the rows of {tokens} are trained beside the adapter; transformers and PEFT load that as it is, servers "
            "that take low-rank matrices alone (vLLM) need the result merged: trivium export --merge"
        )
    if not job.held_out:
        yield (
            "nothing is held out, so there is no evaluation: data.held_out is 0, every source is a ready store, or "
            "there is one document only (a text file is one; data.sources.0.documents: paragraph makes it many)"
        )


def describe_conversations(built: BuiltStore) -> str:
    """What happened to a source's conversations, in a line."""
    report = built.report
    share = report["reasoning_documents"] / max(1, report["kept"] + report["split"])
    notes = [*describe_counts(report), f"{supervised_share(built):.1%} of the tokens are supervised"]
    return f"{built.name}: " + "; ".join([*notes, f"{share:.1%} of the samples reason"] if share else notes)
