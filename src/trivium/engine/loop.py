"""The training loop: steps, records, evaluation, samples, checkpoints, until the budget is spent.

Reads top to bottom: `run_loop` resumes, steps and finishes; everything periodic is one call below it. The same command
continues after a kill at any instant and ends with the same weights, bit for bit. Every rank runs the same loop; only
the folder of the first one writes. The step itself is in `engine.py`.
"""

import signal
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
from trivium.errors import ConfigError, Stopped, TriviumError
from trivium.files import sha256_file
from trivium.model import adapter, hf

SHOWN_DOCUMENTS, SHOWN_TOKENS = 5, 24
MAX_DEFAULT_CHECKPOINT_STEPS = 500


class Observer(Protocol):
    """Shows a run: a live panel, plain lines, or `Silent`."""

    def note(self, text: str) -> None:
        """Show one line of text."""
        ...

    def begin(self, step: int, num_steps: int) -> None:
        """The step after `step` is about to start."""
        ...

    def step(self, step: int, loss: float) -> None:
        """A step was taken."""
        ...

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics or a sample was written."""
        ...


class Silent:
    """An observer that shows nothing: all ranks but the first have it, and tests."""

    def note(self, text: str) -> None:
        """See `Observer`."""

    def begin(self, step: int, num_steps: int) -> None:
        """See `Observer`."""

    def step(self, step: int, loss: float) -> None:
        """See `Observer`."""

    def record(self, record: dict[str, Any]) -> None:
        """See `Observer`."""


@dataclass
class Progress:
    """What a checkpoint keeps of the loop, in addition to weights and optimizer state.

    Attributes:
        inputs: fingerprint of data, tokenizer and order, see `Job.inputs`; a resumed run must find the same.
        step: optimizer steps taken.
        num_tokens: training tokens read.
        ledger: digest of everything that was read, see `step_digest`.
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
    """Turns the first SIGTERM or SIGINT into a request to stop; a second one has its usual effect."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
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


def run_loop(job: Job, engine: Engine, machine: Machine, folder: RunFolder, observer: Observer, ranks: Ranks) -> None:
    """Train to the end of the budget, from the folder's newest good checkpoint on.

    Args:
        job: the run with its data.
        engine: with its initial weights.
        machine: what it computes on.
        folder: open and locked.
        observer: is shown what happens.
        ranks: the processes that train together.

    Raises:
        Stopped: a signal came; the step was finished and everything saved.
        TriviumError: the loss or a gradient is not finite; nothing was updated.
    """
    progress = resume(job, engine, folder, observer, ranks)
    run, num_steps = job.run, job.num_steps
    eval_steps = run.eval.every_steps or max(1, num_steps // 10)
    sample_steps = run.sample.every_steps or max(1, num_steps // 10)
    save_steps = run.checkpoint.every_steps or min(max(1, num_steps // 10), MAX_DEFAULT_CHECKPOINT_STEPS)
    observer.begin(progress.step, num_steps)
    with StopRequest() as stop, batches_ahead(job, machine, progress.step, ranks) as ahead:
        while progress.step < num_steps:
            figures = train_step(job, engine, ahead, folder, progress, ranks)
            observer.step(progress.step, figures["train/loss"])
            is_last = progress.step == num_steps
            is_stopped = ranks.any(stop.signal is not None)
            if is_last or progress.step == 1 or progress.step % run.log.every_steps == 0:
                log(job, machine, folder, progress, figures, observer, ranks)
            if is_last or progress.step % eval_steps == 0:
                evaluate(job, engine, folder, progress, observer, ranks)
            if is_last or progress.step % sample_steps == 0:
                sample(job, engine, folder, progress, observer)
            if is_last or is_stopped or progress.step % save_steps == 0:
                save(engine, folder, progress, run.checkpoint.keep)
            if is_stopped and not is_last:
                name = signal.Signals(stop.signal).name if stop.signal else "a signal to another process"
                raise Stopped(
                    f"Stopped by {name} after step {progress.step:,} of {num_steps:,}. "
                    "Everything is saved; run the same command again to continue."
                )
    if ranks.is_first:
        finish(job, engine, folder, progress)
    ranks.barrier()


def batches_ahead(job: Job, machine: Machine, step: int, ranks: Ranks) -> Prefetch:
    """The batches of all further steps, packed in the background; in pinned memory where a GPU copies them."""
    prepare = Batch.pinned if machine.device.type == "cuda" else None
    return Prefetch(job.batches, step, job.num_steps, ranks.rank, ranks.size, prepare)


def resume(job: Job, engine: Engine, folder: RunFolder, observer: Observer, ranks: Ranks) -> Progress:
    """The progress to continue from: of the newest checkpoint, or of the beginning. Cuts the records back to it.

    Raises: ConfigError when the data is not what the checkpoint was trained on.
    """
    fresh = Progress(job.inputs)
    with ranks.first_goes_first():  # it sets damaged checkpoints aside
        state, problems = checkpoint.load_newest(folder.checkpoints, engine.load)
    for problem in problems:
        observer.note(f"set aside a damaged checkpoint: {problem}")
    if state is None:
        folder.cut_after(-1)
        evaluate(job, engine, folder, fresh, observer, ranks)
        sample(job, engine, folder, fresh, observer)
        return fresh
    fields: dict[str, Any] = {key: state[key] for key in asdict(fresh)}
    fields["interval"] = Interval(**fields["interval"])
    progress = Progress(**fields)
    if progress.inputs != fresh.inputs:
        raise ConfigError(
            f"The data or the tokenizer of {folder.path} has changed since step {progress.step:,}: the run would "
            "continue on other samples than it began with. Restore them, or start under another name."
        )
    folder.cut_after(progress.step)
    observer.note(
        f"resumed after step {progress.step:,} from {checkpoint.step_folder(folder.checkpoints, progress.step)}"
    )
    return progress


def train_step(
    job: Job, engine: Engine, ahead: Prefetch, folder: RunFolder, progress: Progress, ranks: Ranks
) -> dict[str, float]:
    """One optimizer step and its line in the ledger; returns the figures of the step.

    Raises: TriviumError naming the documents at fault when something is not finite; nothing is updated then.
    """
    start = time.perf_counter()
    lr = learning_rate(progress.step, job.num_steps, job.run.optimizer.lr, job.run.schedule)
    batches = ahead.next()
    try:
        figures = engine.forward_backward(batches)
        norm = engine.optimizer_step(lr, batches)
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error, ranks)) from error
    seconds = time.perf_counter() - start
    read = what_was_read(job, batches, ranks)
    progress.step += 1
    progress.num_tokens += sum(one.num_tokens for one in read)
    progress.ledger = step_digest(progress.ledger, [one.digests for one in read])
    progress.train_seconds += seconds
    progress.interval.add(figures["loss"], sum(one.flops for one in read), sum(one.num_tokens for one in read), seconds)
    folder.ledger.append({"step": progress.step, "num_tokens": progress.num_tokens, "digest": progress.ledger})
    return {
        **{f"train/{name}": value for name, value in figures.items()},
        "train/grad_norm": norm,
        "train/learning_rate": lr,
    }


@dataclass(frozen=True)
class Read:
    """What was read in one micro-batch: tokens, FLOPs they cost, the digests of its sequences."""

    num_tokens: int
    flops: float
    digests: list[str]


def what_was_read(job: Job, batches: Sequence[Batch], ranks: Ranks) -> list[Read]:
    """All micro-batches of a step, of all ranks, in the order of the data."""
    frozen = job.run.adapter is not None
    mine = [[batch.num_tokens, training_flops(job.shape, batch, frozen), list(batch.digests)] for batch in batches]
    return [Read(*one) for micro_batches in zip(*ranks.gather(mine), strict=True) for one in micro_batches]


def record_failure(job: Job, folder: RunFolder, step: int, error: NonFinite, ranks: Ranks) -> str:
    """Write failure.json and return the paragraph that names the documents the bad numbers came from.

    `step` is the last one whose update was made.
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
        f"Stopped before another update, step {step:,} being the last: {error}. It came from "
        f"{len(documents)} pieces of documents, all listed in {folder.path / 'failure.json'}, the first being {shown}. "
        "Look at those documents; if they are fine, start again under another name with a lower "
        "optimizer.lr, or with precision: fp32."
    )
    folder.write("failure.json", {"kind": "not finite", "step": step, "message": message, "documents": documents})
    return message


def log(
    job: Job,
    machine: Machine,
    folder: RunFolder,
    progress: Progress,
    figures: dict[str, float],
    observer: Observer,
    ranks: Ranks,
) -> None:
    """Write a line of metrics over the steps since the last one."""
    record = {
        "step": progress.step,
        "time": now(),
        **figures,
        **progress.interval.figures(machine, ranks.size),
        "train/num_tokens": progress.num_tokens,
        "train/epoch": job.batches.epoch(progress.step),
        "train/seconds": progress.train_seconds,
    }
    progress.interval = Interval()
    folder.metrics.append(record)
    observer.record(record)


def evaluate(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer, ranks: Ranks) -> None:
    """Write a line of metrics with the loss on the held-out documents, if there are any."""
    if not job.held_out:
        return
    try:
        loss, num_tokens = engine.evaluate(share(job.held_out, ranks.rank, ranks.size))
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error, ranks)) from error
    record = {"step": progress.step, "time": now(), "eval/loss": loss, "eval/num_tokens": num_tokens}
    folder.metrics.append(record)
    observer.record(record)


def sample(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer) -> None:
    """Complete the run's prompts, or answer them if the run trains on conversations, with the current weights."""
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
    """Commit a checkpoint, remove those that are no longer kept, and record what was measured of the plan."""
    plan_record.record_measured(folder)
    for records in (folder.metrics, folder.ledger, folder.samples):
        records.sync()
    engine.save(checkpoint.step_folder(folder.checkpoints, progress.step), asdict(progress))
    if folder.is_writer:
        checkpoint.prune(folder.checkpoints, keep)


def finish(job: Job, engine: Engine, folder: RunFolder, progress: Progress) -> None:
    """Write the result as a Hugging Face or PEFT folder, and last that the run is finished."""
    generation = {"eos_token_id": job.stop_ids, "pad_token_id": job.tokenizer.pad_token_id}
    if job.run.adapter is None:
        dtype = engine.model.compute_dtype
        hf.save_folder(engine.model, folder.model, job.tokenizer_folder, dtype, generation)
    else:
        adapter.save(engine.model, folder.adapter, base_name(job), job.tokenizer_folder, generation)
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


def base_name(job: Job) -> str:
    """What an adapter calls its base model: the Hub id, or the absolute path of the folder."""
    name = job.run.model.name
    assert name is not None
    return str(Path(name).resolve()) if Path(name).is_dir() else name
