"""The training loop: steps, records, evaluation, samples, checkpoints, until the budget is spent.

Reads top to bottom: `train` resumes, steps and finishes; everything periodic is one call below it. The same
command goes on after a kill at any instant and ends with the same weights, bit for bit. The step itself is
`engine`. Used by `start`.
"""

import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from trivium.data.batch.pack import step_digest
from trivium.engine import checkpoint, plan_record
from trivium.engine.device import Machine
from trivium.engine.engine import Engine, NonFinite
from trivium.engine.metrics import Interval
from trivium.engine.optim import learning_rate
from trivium.engine.runfolder import RunFolder, now
from trivium.engine.sample import as_question, complete
from trivium.engine.setup import Job
from trivium.errors import ConfigError, Stopped, TriviumError
from trivium.files import sha256_file
from trivium.model import adapter, hf

SHOWN_DOCUMENTS, SHOWN_TOKENS = 5, 24
MAX_DEFAULT_CHECKPOINT_STEPS = 500


class Observer(Protocol):
    """Who watches a run: a live panel, plain lines, or nobody."""

    def note(self, text: str) -> None:
        """One line worth knowing."""
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


@dataclass
class Progress:
    """What a checkpoint remembers of the loop, beside weights and moments.

    Attributes:
        inputs: fingerprint of data, tokenizer and order, see `Job.inputs`; a resumed run must find the same.
        step: optimizer steps taken.
        num_tokens: training tokens read.
        ledger: digest of all that was read, see `data.pack.step_digest`.
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
    """Turns the first SIGTERM or SIGINT into a wish; a second one ends the process as it always would."""

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


def train(job: Job, engine: Engine, machine: Machine, folder: RunFolder, observer: Observer) -> None:
    """Train to the end of the budget, from wherever the folder's newest good checkpoint stands.

    Args:
        job: the run with its data.
        engine: with its first weights.
        machine: what it computes on.
        folder: open and locked.
        observer: is shown what happens.

    Raises:
        Stopped: a signal came; the step was finished and everything saved.
        TriviumError: the loss or a gradient is not finite; nothing was updated.
    """
    progress = resume(job, engine, folder, observer)
    run, num_steps = job.run, job.num_steps
    eval_steps = run.eval.every_steps or max(1, num_steps // 10)
    sample_steps = run.sample.every_steps or max(1, num_steps // 10)
    save_steps = run.checkpoint.every_steps or min(max(1, num_steps // 10), MAX_DEFAULT_CHECKPOINT_STEPS)
    observer.begin(progress.step, num_steps)
    with StopRequest() as stop:
        while progress.step < num_steps:
            figures = take_step(job, engine, folder, progress)
            observer.step(progress.step, figures["train/loss"])
            is_last = progress.step == num_steps
            if is_last or progress.step == 1 or progress.step % run.log.every_steps == 0:
                log(job, machine, folder, progress, figures, observer)
            if is_last or progress.step % eval_steps == 0:
                evaluate(job, engine, folder, progress, observer)
            if is_last or progress.step % sample_steps == 0:
                sample(job, engine, folder, progress, observer)
            if is_last or stop.signal or progress.step % save_steps == 0:
                save(engine, folder, progress, run.checkpoint.keep)
            if stop.signal and not is_last:
                raise Stopped(
                    f"Stopped by {signal.Signals(stop.signal).name} after step {progress.step:,} of {num_steps:,}. "
                    "Everything is saved; the same command goes on from here."
                )
    finish(job, engine, folder, progress)


def resume(job: Job, engine: Engine, folder: RunFolder, observer: Observer) -> Progress:
    """The progress to go on from: the newest checkpoint's, or the beginning's. Cuts the records back to it.

    Raises: ConfigError when the data is no longer what the checkpoint was trained on.
    """
    fresh = Progress(job.inputs)
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
            f"The data or the tokenizer of {folder.path} has changed since step {progress.step:,}: the run would go on "
            "with other samples than it began with. Put them back, or start under another name."
        )
    folder.cut_after(progress.step)
    observer.note(
        f"resumed after step {progress.step:,} from {checkpoint.step_folder(folder.checkpoints, progress.step)}"
    )
    return progress


def take_step(job: Job, engine: Engine, folder: RunFolder, progress: Progress) -> dict[str, float]:
    """One optimizer step and its line in the ledger; returns the step's own figures.

    Raises: TriviumError naming the documents at fault when something is not finite; nothing is updated then.
    """
    start = time.perf_counter()
    rate = learning_rate(progress.step, job.num_steps, job.run.optimizer.lr, job.run.schedule)
    batches = job.rows.step(progress.step)
    try:
        loss = engine.forward_backward(batches)
        norm = engine.optimizer_step(rate, batches)
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error)) from error
    seconds = time.perf_counter() - start
    progress.step += 1
    progress.num_tokens += sum(batch.num_tokens for batch in batches)
    progress.ledger = step_digest(progress.ledger, batches)
    progress.train_seconds += seconds
    progress.interval.add(job.shape, batches, loss, seconds, frozen=job.run.adapter is not None)
    folder.ledger.append({"step": progress.step, "num_tokens": progress.num_tokens, "digest": progress.ledger})
    return {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate}


def record_failure(job: Job, folder: RunFolder, step: int, error: NonFinite) -> str:
    """Write failure.json and return the paragraph that names the documents the bad numbers came from.

    `step` is the last one whose update was made.
    """
    documents = []
    for batch in error.batches:
        for (source, document, start, stop), ids in batch.pieces():
            text = job.tokenizer.decode(ids[:SHOWN_TOKENS])
            documents.append({"source": source, "document": document, "tokens": [start, stop], "text": text})
    shown = "; ".join(
        f"document {d['document']} of source {d['source']}: {d['text']!r}" for d in documents[:SHOWN_DOCUMENTS]
    )
    message = (
        f"Stopped before another update, step {step:,} being the last: {error}. It came from "
        f"{len(documents)} pieces of documents, all listed in {folder.path / 'failure.json'}, the first being {shown}. "
        "Look at those documents; if they are sound, begin anew under another name with a lower "
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
) -> None:
    """A line of metrics over the steps since the last one."""
    record = {
        "step": progress.step,
        "time": now(),
        **figures,
        **progress.interval.figures(machine),
        "train/num_tokens": progress.num_tokens,
        "train/epoch": job.rows.epoch(progress.step),
        "train/seconds": progress.train_seconds,
    }
    progress.interval = Interval()
    folder.metrics.append(record)
    observer.record(record)


def evaluate(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer) -> None:
    """A line of metrics with the loss on the held-out documents, where there are any."""
    if not job.held_out:
        return
    try:
        loss, num_tokens = engine.evaluate(job.held_out)
    except NonFinite as error:
        raise TriviumError(record_failure(job, folder, progress.step, error)) from error
    record = {"step": progress.step, "time": now(), "eval/loss": loss, "eval/num_tokens": num_tokens}
    folder.metrics.append(record)
    observer.record(record)


def sample(job: Job, engine: Engine, folder: RunFolder, progress: Progress, observer: Observer) -> None:
    """Complete the run's prompts, or answer them where answering is learnt, with the present weights."""
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
    """Commit a checkpoint, then remove those it makes superfluous; and say what became of the plan so far."""
    plan_record.record_measured(folder)
    for records in (folder.metrics, folder.ledger, folder.samples):
        records.sync()
    engine.save(checkpoint.step_folder(folder.checkpoints, progress.step), asdict(progress))
    checkpoint.prune(folder.checkpoints, keep)


def finish(job: Job, engine: Engine, folder: RunFolder, progress: Progress) -> None:
    """Write the result as a Hugging Face or PEFT folder, and last of all that the run is finished."""
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
    """What an adapter calls its base: the Hub id, or the absolute path of the folder."""
    name = job.run.model.name
    assert name is not None
    return str(Path(name).resolve()) if Path(name).is_dir() else name
