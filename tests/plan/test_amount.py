"""The size and number of steps by the amount of data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.config.load import load_run
from trivium.data.store.publish import held_out_share
from trivium.plan.amount import ENOUGH_STEPS, MAX_EPOCHS, MIN_STEP_TOKENS, settle_amount
from trivium.plan.workload import given_facts


def run_with(*overrides: str):
    return load_run(None, ["method=lora", "model=Qwen3-0.6B", "data=a.jsonl", "name=a", *overrides]).run


def settled(run, num_tokens: int):
    return settle_amount(run, given_facts("conversations", num_tokens=num_tokens))


def steps_of(run, num_tokens: int) -> float:
    return run.budget.epochs * num_tokens / run.batch.tokens


@given(st.integers(100, 10**9), st.sampled_from([256, 1000, 1024, 4096]))
def test_open_steps_are_enough_or_as_many_as_allowed(num_tokens: int, seq_len: int) -> None:
    run = settled(run_with(f"data.seq_len={seq_len}"), num_tokens)
    assert run.batch.tokens % seq_len == 0 and run.batch.tokens <= 16_384 and 3.0 <= run.budget.epochs <= MAX_EPOCHS
    if run.budget.epochs > 3.0:  # more passes only if the steps cannot be smaller
        half = run.batch.tokens // 2
        assert half < max(MIN_STEP_TOKENS, seq_len) or half % seq_len
    if run.budget.epochs < MAX_EPOCHS:
        assert steps_of(run, num_tokens) > 0.98 * ENOUGH_STEPS


@given(st.integers(100, 10**8), st.floats(1.1, 10.0))
def test_more_data_never_means_fewer_steps(num_tokens: int, factor: float) -> None:
    more = round(num_tokens * factor)
    run, larger = settled(run_with(), num_tokens), settled(run_with(), more)
    assert larger.batch.tokens >= run.batch.tokens and larger.budget.epochs <= run.budget.epochs


@pytest.mark.parametrize(
    ("overrides", "tokens", "budget"),
    [
        (["batch.tokens=8192", "budget.epochs=2"], 8192, {"epochs": 2.0}),
        (["batch.tokens=8192"], 8192, {"epochs": 16.0}),
        (["budget.epochs=1"], 1024, {"epochs": 1.0}),
        (["budget.steps=7"], 16_384, {"steps": 7}),
        (["budget.tokens=200K"], 1024, {"tokens": 200_000}),
        (["method=continue"], 1024, {"epochs": 1.0}),
    ],
)
def test_what_is_set_stays(overrides: list[str], tokens: int, budget: dict[str, float]) -> None:
    run = settled(run_with(*overrides), 10_000)
    assert run.batch.tokens == tokens and run.budget.model_dump(exclude_none=True) == budget


def test_without_data_the_usual_step_is_meant() -> None:
    assert settle_amount(run_with(), None).batch.tokens == 16_384
    assert settle_amount(run_with("method=continue"), None).batch.tokens == 32_768
    assert settle_amount(run_with("data.seq_len=3000"), None).batch.tokens == 15_000


def test_an_override_of_the_budget_replaces_the_file(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: lora\nmodel: Qwen3-0.6B\ndata: a.jsonl\nbudget:\n  steps: 7\n")
    assert load_run(file, ["budget.epochs=2"]).run.budget.model_dump(exclude_none=True) == {"epochs": 2.0}


@pytest.mark.parametrize(
    ("documents", "held_out"), [(50, 5), (91, 9), (200, 20), (1000, 20), (2000, 20), (10**6, 10**4)]
)
def test_small_data_is_held_out_enough_to_judge(documents: int, held_out: int) -> None:
    assert round(held_out_share(documents) * documents) == held_out
