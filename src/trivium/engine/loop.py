"""The training loop: optimizer steps, metrics, evaluation, samples and checkpoints until the budget is spent.

`run_loop` resumes, trains and finishes; it calls one function for each periodic task. A run that is killed at any
instant and resumed ends with the same weights, bit for bit. Every rank runs the same loop; only rank 0 writes files.
Forward, backward and the optimizer step are in `engine.py`.
"""

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from trivium.data.batch.pack import Batch, share, step_digest
from trivium.data.batch.prefetch import Prefetch
from trivium.engine import checkpoint, plan_record
from trivium.engine.device import Machine
from trivium.engine.engine import Engine, NonFinite
from trivium.engine.metrics import Interval, training_flops
from trivium.engine.optim import learning_rate
from trivium.engine.prepare import Job
from trivium.engine.ranks import Ranks
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.sample import as_question, complete
from trivium.errors import ConfigError, Stopped, TriviumError, count_of
from trivium.files import sha256_file
from trivium.model import adapter, hf

SHOWN_DOCUMENTS, SHOWN_TOKENS = 5, 24
MAX_DEFAULT_CHECKPOINT_STEPS = 500
MAX_DEFAULT_LOG_STEPS = 10


class Observer(Protocol):
    """Receives the events of a run to show them: a live panel, plain lines, or `Silent`."""

    def note(self, text: str) -> None:
        """Show one line of text."""

    def begin(self, step: int, num_steps: int) -> None:
        """Training is about to continue after `step`."""

    def step(self, step: int, loss: float) -> None:
        """A step has finished."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics or a generated text was written."""


class Silent:
    """An observer that shows nothing."""

    def note(self, text: str) -> None: ...
    def begin(self, step: int, num_steps: int) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def record(self, record: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """The loop's part of a checkpoint.

    Attributes:
        inputs: digest of data, tokenizer and order, see `Job.inputs`; a resumed run must have the same.
        step: optimizer steps done.
        num_tokens: training tokens read.
        ledger: digest of everything read so far, see `step_digest`.
        train_seconds: time spent in steps.
        interval: sums since the last line of metrics.
    """

    inputs: str
    step: int = 0
    num_tokens: int = 0
    ledger: str = ""
    train_seconds: float = 0.0
    interval: Interval = field(default_factory=Interval)


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request to stop after the step; a second one has its default effect.

    Python delivers signals to the main thread only, so a run in another thread leaves their handlers alone.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if is_main else ():
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_loop(job: Job, engine: Engine, machine: Machine, folder: RunFolder, observer: Observer) -> None:
    """Train to the end of the budget, starting from the newest valid checkpoint if there is one.

    The engine has its initial weights; the folder is open and locked.

    Raises:
        Stopped: a signal arrived; the step was finished and everything saved.
        TriviumError: the loss or a gradient is not finite; no weight was updated.
    """
    progress = resume(job, engine, folder, observer)
    run, num_steps, ranks = job.run, job.num_steps, engine.ranks
    eval_steps = run.eval.every_steps or max(1, num_steps // 10)
    sample_steps = run.sample.every_steps or max(1, num_steps // 10)
    log_steps = run.log.every_steps or min(max(1, num_steps // 50), MAX_DEFAULT_LOG_STEPS)
    save_steps = run.checkpoint.every_steps or min(max(1, num_steps // 10), MAX_DEFAULT_CHECKPOINT_STEPS)
    observer.begin(progress.step, num_steps)
    with StopRequest() as stop, batches_ahead(job, machine, progress.step, ranks) as ahead:
        while progress.step < num_steps:
            figures = train_step(job, engine, ahead, folder, progress)
            observer.step(progress.step, figures["train/loss"])
            is_last = progress.step == num_steps
            is_stopped = ranks.any(stop.signal is not None)
            if is_last or progress.step == 1 or progress.step % log_steps == 0:
                metrics = {**figures, **progress.interval.figures(machine, ranks.size)}
                log(job, folder, progress, metrics, observer)
            if is_last or progress.step % eval_steps == 0:
                evaluate(job, engine, folder, progress, observer)
            if is_last or progress.step % sample_steps == 0:
                sample(job, engine, folder, progress, observer)
            if is_last or is_stopped or progress.step % save_steps == 0:
                save(engine, folder, progress, run.checkpoint.keep)
            if is_stopped and not is_last:
                name = signal.Signals(stop.signal).name if stop.signal else "a signal to another process"
                raise Stopped(
                    f"Stopped by {name} after step {progress.step:,} of {num_steps:,}. "
                    "Everything is saved; run the same command again to continue (in Python, make the same call again)."
                )
    if ranks.is_first:
        finish(job, engine, folder, progress)
    ranks.barrier()


def batches_ahead(job: Job, machine: Machine, step: int, ranks: Ranks) -> Prefetch:
    """The batches of the steps after `step`, packed in the background; in pinned memory for a GPU."""
    prepare = Batch.pinned if machine.device.type == "cuda" else None
    return Prefetch(job.batches, step, job.num_steps, ranks.rank, ranks.size, prepare)


def resume(job: Job, engine: Engine, folder: RunFolder, observer: Observer) -> Progress:
    """Load the newest checkpoint, or start fresh; truncate the run's JSONL files to its step and return its progress.

    Raises: ConfigError when the data differs from the data the checkpoint was trained on.
    """
    fresh = Progress(job.inputs)
    with engine.ranks.first_goes_first():  # rank 0 moves damaged checkpoints aside
        state, problems = checkpoint.load_newest(folder.checkpoints, engine.load)
    for problem in problems:
        observer.note(f"set aside a damaged checkpoint: {problem}")
    if state is None:
        folder.cut_after(-1)
        evaluate(job, engine, folder, fresh, observer)
        sample(job, engine, folder, fresh, observer)
        return fresh
    fields: dict[str, Any] = {key: state[key] for key in asdict(fresh)}
    fields["interval"] = Interval(**fields["interval"])
    progress = Progress(**fields)
    if progress.inputs != fresh.inputs:
        raise ConfigError(
            f"The data or the tokenizer of {folder.path} has changed since step {progress.step:,}, so the run would "
            "continue on different samples. Restore them, or add name=NEW to start another run."
        )
    folder.cut_after(progress.step)
    observer.note(
        f"resumed after step {progress.step:,} from {checkpoint.step_folder(folder.checkpoints, progress.step)}"
    )
    return progress


def train_step(job: Job, engine: Engine, ahead: Prefetch, folder: RunFolder, progress: Progress) -> dict[str, float]:
    """Run one optimizer step, append it to the ledger, and return its metrics.

    Raises: TriviumError naming the documents involved when a loss or gradient is not finite; nothing was updated.
    """
    start = time.perf_counter()
    lr = learning_rate(progress.step, job.num_steps, job.run.optimizer.lr, job.run.schedule)
    batches = ahead.next()
    try:
        figures = engine.forward_backward(batches)
        norm = engine.optimizer_step(lr, batches)
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error, engine.ranks)) from error
    seconds = time.perf_counter() - start
    num_tokens, flops, digests = zip(*micro_batches_read(job, batches, engine.ranks), strict=True)
    progress.step += 1
    progress.num_tokens += sum(num_tokens)
    progress.ledger = step_digest(progress.ledger, digests)
    progress.train_seconds += seconds
    progress.interval.add(figures["loss"], sum(flops), sum(num_tokens), seconds)
    folder.ledger.append({"step": progress.step, "num_tokens": progress.num_tokens, "digest": progress.ledger})
    return {
        **{f"train/{name}": value for name, value in figures.items()},
        "train/grad_norm": norm,
        "train/learning_rate": lr,
    }


def micro_batches_read(job: Job, batches: Sequence[Batch], ranks: Ranks) -> list[tuple[int, float, list[str]]]:
    """Tokens, training FLOPs and digests of each micro-batch of a step, on all ranks, in data order."""
    frozen = job.run.adapter is not None
    mine = [(batch.num_tokens, training_flops(job.shape, batch, frozen), list(batch.digests)) for batch in batches]
    return [one for micro_batches in zip(*ranks.gather(mine), strict=True) for one in micro_batches]


def record_failure(job: Job, folder: RunFolder, step: int, error: NonFinite, ranks: Ranks) -> str:
    """Write failure.json and return a message naming the documents in the affected micro-batches.

    `step` is the last completed step.
    """
    documents = []
    for batch in error.batches:
        for (source, document, start, stop), ids in batch.pieces():
            text = job.tokenizer.decode(ids[:SHOWN_TOKENS])
            documents.append({"source": source, "document": document, "tokens": [start, stop], "text": text})
    documents = [document for found in ranks.gather(documents) for document in found]
    shown = "; ".join(
        f"document {d['document']} of source {d['source']}: {d['text']!r}" for d in documents[:SHOWN_DOCUMENTS]
    )
    message = (
        f"Training stopped after step {step:,}, before the next update: {error}. {folder.path / 'failure.json'} lists "
        f"every document in the affected micro-batches ({count_of(len(documents), 'piece')}), starting with {shown}. "
        "Check those documents; if they are fine, add name=NEW and a lower optimizer.lr, or precision=fp32, to start "
        "another run."
    )
    folder.write("failure.json", {"kind": "not finite", "step": step, "message": message, "documents": documents})
    return message


def log(job: Job, folder: RunFolder, progress: Progress, metrics: dict[str, float], observer: Observer) -> None:
    """Write a line of metrics over the steps since the previous line."""
    record = {
        "step": progress.step,
        "time": now(),
        **metrics,
        "train/num_tokens": progress.num_tokens,
        "train/epoch": job.batches.epoch(progress.step),
        "train/seconds": progress.train_seconds,
    }
    progress.interval = Interval()
    folder.metrics.append(record)
    observer.record(record)


def evaluate(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer) -> None:
    """Write a line of metrics with the held-out loss, if documents are held out."""
    if not job.held_out:
        return
    try:
        loss, num_tokens = engine.evaluate(share(job.held_out, engine.ranks.rank, engine.ranks.size))
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error, engine.ranks)) from error
    record = {"step": progress.step, "time": now(), "eval/loss": loss, "eval/num_tokens": num_tokens}
    folder.metrics.append(record)
    observer.record(record)


def sample(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer) -> None:
    """Generate text for the run's prompts; a run on conversations sees them as user messages."""
    settings = job.run.sample
    for prompt in settings.prompts:
        text = complete(
            engine.model,
            job.tokenizer,
            as_question(prompt, job.tokenizer) if job.has_conversations else prompt,
            job.stop_ids,
            settings.max_new_tokens,
            settings.temperature,
            job.run.seed,
        )
        record = {"step": progress.step, "prompt": prompt, "text": text}
        folder.samples.append(record)
        observer.record(record)


def save(engine: Engine, folder: RunFolder, progress: Progress, keep: int) -> None:
    """Write a checkpoint, delete those older than the `keep` newest, and record measurements in plan.json."""
    plan_record.record_measured(folder)
    for records in (folder.metrics, folder.ledger, folder.samples):
        records.sync()
    engine.save(checkpoint.step_folder(folder.checkpoints, progress.step), asdict(progress))
    if folder.is_writer:
        checkpoint.prune(folder.checkpoints, keep)


def finish(job: Job, engine: Engine, folder: RunFolder, progress: Progress) -> None:
    """Write the result as a Hugging Face or PEFT folder, then finished.json."""
    generation = {"eos_token_id": job.stop_ids, "pad_token_id": job.tokenizer.pad_token_id}
    if job.run.adapter is None:
        dtype = engine.model.compute_dtype
        hf.save_folder(engine.model, folder.model, job.tokenizer_folder, dtype, generation)
    else:
        name = job.run.model.name
        assert name is not None
        base_name = str(Path(name).resolve()) if Path(name).is_dir() else name
        adapter.save(engine.model, folder.adapter, base_name, job.tokenizer_folder, generation)
    folder.write(
        "finished.json",
        {
            "time": now(),
            "step": progress.step,
            "num_tokens": progress.num_tokens,
            "train_seconds": progress.train_seconds,
            "ledger": progress.ledger,
            "model_sha256": {path.name: sha256_file(path) for path in folder.result.glob("*.safetensors")},
        },
    )
