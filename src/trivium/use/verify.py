"""Verifies that a run read every sample exactly once and in order, and that its files are intact.

The order of the samples is recomputed from run.yaml, and the digest of every step from the token stores. Checkpoints
and the result are checked by their SHA-256.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trivium.config.load import load_run
from trivium.data.batch.pack import step_digest
from trivium.engine import checkpoint
from trivium.engine.prepare import prepare
from trivium.engine.runfolder import RunFolder
from trivium.errors import TriviumError, count_of
from trivium.files import sha256_file


@dataclass(frozen=True)
class Verification:
    """What was verified.

    Attributes:
        num_steps: steps that read the expected tokens.
        num_tokens: tokens of those steps.
        is_finished: whether the run is finished.
        checkpoints: names of the intact checkpoints.
    """

    num_steps: int
    num_tokens: int
    is_finished: bool
    checkpoints: list[str]


def verify(path: Path, note: Callable[[str], None], every: Callable[[int, int], None]) -> Verification:
    """Recompute the ledger of a run from its data.

    Args:
        path: the run folder.
        note: called with a line when something takes long.
        every: called with (steps verified, steps in the ledger).

    Raises: TriviumError that names the first step or file that differs.
    """
    folder = RunFolder.existing(path)
    job = prepare(load_run(folder.run_yaml, []).run, note)
    for built in job.built:
        built.verify()
    records = list(folder.ledger)
    digest, num_tokens = "", 0
    for index, record in enumerate(records):
        step = index + 1
        if record["step"] != step:
            raise TriviumError(
                f"{folder.ledger.path}: found step {record['step']}, expected {step}. The ledger is damaged."
            )
        batches = job.batches.step(index)
        digest = step_digest(digest, [batch.digests for batch in batches])
        num_tokens += sum(batch.num_tokens for batch in batches)
        if (record["digest"], record["num_tokens"]) != (digest, num_tokens):
            raise TriviumError(
                f"Step {step:,} of {path} did not read the expected tokens: the ledger has {record['digest'][:12]} "
                f"after {record['num_tokens']:,} tokens, but the data gives {digest[:12]} after {num_tokens:,}. Either "
                "the ledger or the data was changed."
            )
        every(step, len(records))
    finished = folder.read("finished.json")
    if finished is not None and (finished["step"], finished["ledger"]) != (len(records), digest):
        raise TriviumError(
            f"{path}: finished.json says step {finished['step']}, but the ledger ends at step {len(records)}."
        )
    for name, expected in (finished or {}).get("model_sha256", {}).items():
        if sha256_file(folder.result / name) != expected:
            raise TriviumError(f"{folder.result / name} was changed after the run: its SHA-256 differs.")
    if finished is not None and len(records) != job.num_steps:
        raise TriviumError(f"{path} is marked as finished after {len(records)} of {count_of(job.num_steps, 'step')}.")
    verified = []
    for step in checkpoint.steps(folder.checkpoints):
        state = checkpoint.verify(checkpoint.step_folder(folder.checkpoints, step))
        if step > len(records) or state["ledger"] != records[step - 1]["digest"]:
            raise TriviumError(f"The checkpoint of step {step:,} does not match the ledger of {path}.")
        verified.append(checkpoint.step_folder(folder.checkpoints, step).name)
    return Verification(len(records), num_tokens, finished is not None, verified)
