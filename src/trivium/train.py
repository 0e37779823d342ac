"""Train a run: the way in for the command line, the quickstart and scripts. Read this file first.

    check     the doctor examines the run file                          doctor/
    prepare   tokenizer, token stores, shape of the network, batching    engine/prepare.py
    check     the doctor examines data, tokens, numbers and memory       doctor/
    open      the run folder, its lock and its records                   engine/runfolder.py
    build     the engine: model, adapter, optimizer                      engine/build.py
    loop      steps, evaluation, checkpoints until the budget is spent   engine/loop.py
    report    report.html, however the run ended                         report/

The same call resumes a run that was stopped or killed, and finds one that is finished. Under torch.distributed every
rank calls it; the first one decides and writes.
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
from trivium.engine import plan_record
from trivium.engine.build import build_engine
from trivium.engine.device import Machine, begin_peak, is_out_of_memory, probe, return_freed_blocks
from trivium.engine.loop import Observer, Silent, run_loop
from trivium.engine.prepare import Job, prepare
from trivium.engine.provenance import BATCHING_KEYS, begun_machine, describe_job, record_start, versions
from trivium.engine.ranks import Ranks
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.trackers import open_trackers, require_trackers
from trivium.errors import ConfigError, Stopped
from trivium.files import atomic_write
from trivium.plan.check import PLAN_FILE
from trivium.report.html import write_report
from trivium.report.panel import watch


def train(resolved: ResolvedRun, allowed: frozenset[str] = frozenset()) -> RunFolder:
    """Train a run to its end, or resume it, or find it finished; shows progress on stderr and leaves report.html.

    Args:
        resolved: the run file's values with their origins.
        allowed: ids of the doctor's rules whose errors do not stop the run.

    Returns: the run folder; its result is in `model/` or `adapter/`.

    Raises: what `train_quietly` raises, after the report was written.
    """
    path = Path(resolved.run.runs_dir) / resolved.run.name
    with watch() as observer:
        try:
            folder = train_quietly(resolved, observer, allowed)
        except ConfigError:
            raise  # nothing was changed, so the report is up to date
        except BaseException:
            with suppress(OSError):  # a full disk must not hide the error
                if (path / "metrics.jsonl").is_file():
                    write_report(path)
            raise
    write_report(path)
    return folder


def train_quietly(
    resolved: ResolvedRun,
    observer: Observer,
    allowed: frozenset[str] = frozenset(),
) -> RunFolder:
    """`train` without its panel and report.

    Raises:
        ConfigError: the run cannot be trained as configured, or its folder belongs to another run; nothing was changed.
        BadData: the data cannot be used; no folder was changed.
        Stopped: a signal came and everything was saved.
        DoesNotFit: memory ran out; what was saved is unchanged.
        TriviumError: the run could not continue; `failure.json` and the records say why.
    """
    ranks = Ranks.current()
    observer = observer if ranks.is_first else Silent()
    folder = RunFolder(Path(resolved.run.runs_dir) / resolved.run.name, is_writer=ranks.is_first)

    show(require_startable(resolved.run, allowed), observer)
    run = with_recorded_batching(folder, resolved.run)
    if ranks.from_first(is_finished(folder, run, observer)):
        return folder
    require_trackers(run.log.trackers)
    machine = agree(probe(run.device, run.precision), ranks)
    with ranks.first_goes_first():  # it builds the data, the others find it built
        job = prepare(run, observer.note, machine)
    show(require_sound(job, machine, allowed), observer)

    with opened(folder):
        # Another process may have trained the run while this one prepared it.
        if not ranks.from_first(is_finished(folder, run, observer)):
            build_and_loop(resolved, job, machine, folder, observer, ranks)
    return folder


def build_and_loop(
    resolved: ResolvedRun, job: Job, machine: Machine, folder: RunFolder, observer: Observer, ranks: Ranks
) -> None:
    """Record what the run is made of and what the planner predicts, build the engine, and run the loop.

    Raises: DoesNotFit with the planner's fixes when memory runs out, and everything that the loop raises.
    """
    previous = (folder.read("provenance.json") or {}) if folder.has_progress else {}
    if previous:
        machine = begun_machine(previous, job.run)
        if changes := differences(load_run(folder.run_yaml, []).run, job.run):
            changed = "; ".join(changes)
            observer.note(f"resuming with other batching ({changed}): same samples, same order, different rounding")
    held_bytes = begin_peak(machine.device)
    if not previous:
        folder.write(PLAN_FILE, {"predicted": plan_record.predict(job, machine, versions(), held_bytes)})
    if folder.is_writer:
        left_open = [key for key in BATCHING_KEYS if flatten(resolved.run)[key] is None]
        atomic_write(folder.run_yaml, dump_run(job.run, resolved.origins | dict.fromkeys(left_open, "planner")))
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
            run_loop(job, engine, machine, folder, tracked, ranks)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise plan_record.ran_out(job, machine, error, held_bytes) from error
        raise


def show(findings: list[Finding], observer: Observer) -> None:
    """Print what the doctor found and did not stop the run for."""
    for finding in findings:
        observer.note(f"{finding.severity}: {finding.paragraph()}")


def agree(machine: Machine, ranks: Ranks) -> Machine:
    """The machine as all ranks take it: what was measured on the first one, and the least memory of any."""
    precision, peak_flops = ranks.from_first([machine.precision, machine.peak_flops])
    memory_bytes = min(ranks.gather(machine.memory_bytes))
    return replace(machine, peak_flops=peak_flops, memory_bytes=memory_bytes).with_precision(precision)


def with_recorded_batching(folder: RunFolder, run: Run) -> Run:
    """A resumed run with the batching that its folder records, where the run file leaves it open.

    So it computes the same on a machine with more or less memory than the one it began on.
    """
    if not folder.has_progress:
        return run
    begun = load_run(folder.run_yaml, []).run
    batch = run.batch.model_copy(update={"micro_tokens": run.batch.micro_tokens or begun.batch.micro_tokens})
    given = run.activation_checkpointing
    checkpointing = begun.activation_checkpointing if given is None else given
    return run.model_copy(update={"batch": batch, "activation_checkpointing": checkpointing})


def is_finished(folder: RunFolder, run: Run, observer: Observer) -> bool:
    """Whether this very run has ended; a folder that holds a part of another run is refused.

    Raises: ConfigError naming every field that differs.
    """
    if not folder.has_progress:
        return False
    changes = differences(load_run(folder.run_yaml, []).run, run)
    if changed := [change for change in changes if not change.startswith(BATCHING_KEYS)]:
        raise ConfigError(
            f"{folder.path} was begun with other settings: {'; '.join(changed)}. Resuming would mix two runs, so "
            "nothing was changed. Restore the settings to resume it, or give this run another name."
        )
    if folder.is_finished:
        observer.note(f"{folder.path} is finished: its result is in {folder.result}. Nothing was trained.")
    return folder.is_finished


@contextmanager
def opened(folder: RunFolder) -> Iterator[None]:
    """The folder open and locked; an error that ends the run by itself is recorded in failure.json."""
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
