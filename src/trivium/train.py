"""Train a run: the entry point for the command line, the quickstart and scripts. Read this file first.

    check     the doctor checks the run file                             doctor/
    prepare   tokenizer, token stores, model shape, batching             engine/prepare.py
    check     the doctor checks data, tokens, numerics and memory        doctor/
    open      the run folder and its lock                                engine/runfolder.py
    build     the engine: model, adapter, optimizer                      engine/build.py
    loop      steps, evaluation, checkpoints until the budget is spent   engine/loop.py
    report    report.html, even if the run failed                        report/

Calling `train` again resumes a stopped or killed run and does nothing for a finished one. Under torch.distributed
every rank calls it; rank 0 makes the decisions and writes the files.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from trivium.config.load import ResolvedRun, differences, dump_run, flatten, load_run
from trivium.config.run import Run
from trivium.doctor.examine import require_sound, require_startable
from trivium.doctor.findings import Finding
from trivium.doctor.machine import disk_needed
from trivium.doctor.prepared import PreparedRun
from trivium.engine import checkpoint, plan_record
from trivium.engine.build import build_engine
from trivium.engine.device import Machine, begin_peak, is_out_of_memory, probe, return_freed_blocks
from trivium.engine.loop import Observer, Silent, run_loop
from trivium.engine.prepare import Job, cache_folder, prepare
from trivium.engine.provenance import (
    BATCHING_KEYS,
    begun_machine,
    describe_job,
    describe_serving,
    record_start,
    versions,
)
from trivium.engine.ranks import Ranks
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.trackers import open_trackers, require_trackers
from trivium.errors import ConfigError, Interrupted, Stopped
from trivium.files import atomic_write, full_disk_explained
from trivium.plan.check import PLAN_FILE
from trivium.report.html import write_report
from trivium.report.panel import watch

KEPT = "Checkpoints are whole, and the run resumes from the newest one."


def train(resolved: ResolvedRun, allowed: frozenset[str] = frozenset()) -> RunFolder:
    """Train a run to its end, or resume it; show progress on stderr and write report.html.

    Args:
        resolved: the run file's values with their origins.
        allowed: ids of the doctor's rules whose errors do not stop the run.

    Returns: the run folder; its result is in `model/` or `adapter/`.

    Raises: the errors of `train_quietly`, after writing the report; Interrupted for a Ctrl-C that ends it at once.
    """
    path = Path(resolved.run.runs_dir) / resolved.run.name
    with watch() as observer:
        try:
            folder = train_quietly(resolved, observer, allowed)
        except ConfigError:
            raise  # the folder did not change, so its report is up to date
        except KeyboardInterrupt as error:
            raise interrupted(path) from error  # at once, without a report
        except BaseException:
            with suppress(OSError, MemoryError):  # a full disk or memory must not hide the error
                if (path / "metrics.jsonl").is_file():
                    write_report(path)
            raise
    write_report(path)
    return folder


def interrupted(path: Path) -> Interrupted:
    """What Ctrl-C leaves of a run that did not end its step, the second one or one before training."""
    steps = checkpoint.steps(path / "checkpoints")
    saved = (
        f"Its newest checkpoint is after step {steps[0]:,}; later steps are lost, and run again by the same command."
        if steps
        else "It has no checkpoint yet; the same command starts it again, with the token stores that are complete."
    )
    return Interrupted(f"Interrupted: {path} was stopped at once. {saved}")


def train_quietly(resolved: ResolvedRun, observer: Observer, allowed: frozenset[str] = frozenset()) -> RunFolder:
    """`train` without its panel and report.

    Raises:
        ConfigError: the configuration is wrong, or the folder belongs to another run; nothing was changed.
        BadData: the data cannot be used; nothing was changed.
        Stopped: a signal arrived and everything was saved.
        DoesNotFit: memory or the disk ran out; saved files are unchanged.
        TriviumError: the run could not continue; `failure.json` says why.
    """
    ranks = Ranks.current()
    observer = observer if ranks.is_first else Silent()
    folder = RunFolder(Path(resolved.run.runs_dir) / resolved.run.name, is_writer=ranks.is_first)

    show(require_startable(resolved.run, allowed), observer)
    run = with_recorded_choices(folder, resolved.run)
    if ranks.from_first(is_finished(folder, run, observer)):
        return folder
    require_trackers(run.log.trackers)
    machine = agree(probe(run.device, run.precision), ranks)
    in_cache = full_disk_explained(cache_folder(run), "Finished work is kept.")
    with in_cache, ranks.first_goes_first():  # rank 0 builds the data, the others read it
        job = prepare(run, observer.note, machine)
    show(require_sound(job, machine, allowed), observer)

    with opened(folder), full_disk_explained(folder.path, KEPT, lambda: disk_needed(PreparedRun(job, machine, []))):
        # Another process may have finished the run while this one prepared.
        if not ranks.from_first(is_finished(folder, run, observer)):
            build_and_loop(resolved, job, machine, folder, observer, ranks)
    return folder


def build_and_loop(
    resolved: ResolvedRun, job: Job, machine: Machine, folder: RunFolder, observer: Observer, ranks: Ranks
) -> None:
    """Record the run's provenance and the planner's prediction, build the engine, and run the loop.

    Raises: DoesNotFit with suggested fixes when memory runs out, and the errors of the loop.
    """
    previous = (folder.read("provenance.json") or {}) if folder.has_progress else {}
    if previous:
        machine = begun_machine(previous, job.run)
        if changes := differences(load_run(folder.run_yaml, []).run, job.run):
            changed = "; ".join(changes)
            observer.note(
                f"resuming with different batching ({changed}): same samples in the same order, rounding differs"
            )
    held_bytes = begin_peak(machine.device)
    if not previous:
        folder.write(PLAN_FILE, {"predicted": plan_record.predict(job, machine, versions(), held_bytes)})
    if folder.is_writer:
        atomic_write(folder.run_yaml, dump_run(job.run, resolved.origins | chosen(resolved.run, job.run)))
    torch.manual_seed(job.run.seed)
    if plan_record.is_tight(job, machine):
        return_freed_blocks()
    try:
        engine = build_engine(job, machine, ranks)
        record_start(job, engine, machine, folder, previous)
        for line in describe_job(job, engine, machine):
            observer.note(line)
        config = {**job.run.model_dump(mode="json"), "inputs": job.inputs}
        trackers = job.run.log.trackers if ranks.is_first else []
        with closing(open_trackers(trackers, folder.path, job.run.name, config, observer)) as tracked:
            run_loop(job, engine, machine, folder, tracked)
        for line in describe_serving(job, folder.path):
            observer.note(line)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise plan_record.ran_out(job, machine, error, held_bytes) from error
        raise


def chosen(given: Run, settled: Run) -> dict[str, str]:
    """The origin of each setting that the run file leaves open."""
    before = flatten(given)
    changed = [key for key, value in flatten(settled).items() if value != before[key]]
    return {key: "planner" if key in BATCHING_KEYS else "amount of data" for key in changed}


def show(findings: list[Finding], observer: Observer) -> None:
    """Print the doctor's findings that did not stop the run."""
    for finding in findings:
        observer.note(f"{finding.severity}: {finding.paragraph()}")


def agree(machine: Machine, ranks: Ranks) -> Machine:
    """The machine that all ranks assume: precision and speed of rank 0, and the smallest memory of any rank."""
    precision, peak_flops = ranks.from_first([machine.precision, machine.peak_flops])
    memory_bytes = min(ranks.gather(machine.memory_bytes))
    return replace(machine, peak_flops=peak_flops, memory_bytes=memory_bytes).with_precision(precision)


def with_recorded_choices(folder: RunFolder, run: Run) -> Run:
    """The run with the settings it leaves open taken from its folder if it is resumed.

    This keeps results identical when a run is resumed on a machine with more or less memory.
    """
    if not folder.has_progress:
        return run
    begun = load_run(folder.run_yaml, []).run
    batch = {name: value for name, value in run.batch.model_dump().items() if value is not None}
    checkpointing = run.activation_checkpointing
    return run.model_copy(
        update={
            "batch": begun.batch.model_copy(update=batch),
            "budget": begun.budget if run.budget.is_open else run.budget,
            "activation_checkpointing": begun.activation_checkpointing if checkpointing is None else checkpointing,
        }
    )


def is_finished(folder: RunFolder, run: Run, observer: Observer) -> bool:
    """Whether the folder holds the finished result of this run.

    Raises: ConfigError naming every setting that differs if the folder belongs to another run.
    """
    if not folder.has_progress:
        return False
    changes = differences(load_run(folder.run_yaml, []).run, run)
    if changed := [change for change in changes if not change.startswith(BATCHING_KEYS)]:
        raise ConfigError(
            f"{folder.path} was started with other settings: {'; '.join(changed)}. Resuming would mix two runs, so "
            "nothing was changed. Restore the settings to resume it, or add name=NEW to start another run."
        )
    if folder.is_finished:
        observer.note(f"{folder.path} is finished: its result is in {folder.result}. Nothing was trained.")
    return folder.is_finished


@contextmanager
def opened(folder: RunFolder) -> Iterator[None]:
    """Open and lock the folder; record an error that ends the run in failure.json."""
    folder.open()
    try:
        yield
    except (Stopped, ConfigError):
        raise
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide the error
            if folder.read("failure.json") is None:
                folder.write("failure.json", {"kind": type(error).__name__, "time": now(), "message": str(error)})
        raise
    finally:
        folder.close()
