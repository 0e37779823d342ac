"""Choose the size and number of optimizer steps from the amount of data. Never imports torch.

A fixed step of 16,384 tokens gives 300 short conversations a dozen updates, too few to learn anything. So small data
gets smaller steps, and if these are as small as they may be, more passes. The constants come from
`bench/small_data.py`, an experiment with a real chat model; its figures are in `bench/results/small_data.json`.
"""

from trivium.config.run import Run
from trivium.plan.workload import DataFacts

ENOUGH_STEPS = 100
MIN_STEP_TOKENS = 1024
MAX_EPOCHS = 16.0


def settle_amount(run: Run, facts: DataFacts | None) -> Run:
    """Fill in `batch.tokens` and `budget` if the run file leaves them open; without facts, with their defaults.

    The step is halved until the run has `ENOUGH_STEPS`. Conversations that are still too few for that are read up to
    `MAX_EPOCHS` times; documents are not, because a base model trained on them repeatedly learns them by heart.
    """
    epochs, step_tokens = run.default_epochs, run.step_tokens
    one_epoch = facts.num_tokens if facts else None
    if one_epoch is not None and run.batch.tokens is None:
        wanted = _total_tokens(run, one_epoch) / ENOUGH_STEPS
        least = max(MIN_STEP_TOKENS, run.data.seq_len)
        while step_tokens > wanted and step_tokens // 2 >= least and step_tokens // 2 % run.data.seq_len == 0:
            step_tokens //= 2
    batch = run.batch.model_copy(update={"tokens": step_tokens})
    if not run.budget.is_open:
        return run.model_copy(update={"batch": batch})
    if one_epoch and run.loss_tokens == "assistant":
        epochs = min(max(epochs, ENOUGH_STEPS * step_tokens / one_epoch), max(epochs, MAX_EPOCHS))
    budget = run.budget.model_copy(update={"epochs": round(epochs, 1)})
    return run.model_copy(update={"batch": batch, "budget": budget})


def _total_tokens(run: Run, one_epoch: int) -> float:
    """Training tokens of the whole run; infinite for a number of steps, which no size of a step changes."""
    if run.budget.steps is not None:
        return float("inf")
    return float(run.budget.tokens or one_epoch * (run.budget.epochs or run.default_epochs))
