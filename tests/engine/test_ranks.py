"""Steps and runs on several gloo ranks have the same losses, weights and ledger as on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.runs import adapt_values, run_values, train, write_conversations, write_corpus
from tests.engine.test_engine import CONFIG
from tests.engine.test_objective import Preference, model_of
from tests.support.memory_store import random_store
from tests.support.processes import run_ranks
from trivium.data.batch.order import Order
from trivium.data.batch.pack import StoreBatches, sequential_batches, share
from trivium.engine.engine import Engine, NonFinite
from trivium.engine.ranks import Ranks
from trivium.engine.runfolder import RunFolder
from trivium.use.verify import verify

STEPS = 6


def batches_of(num_sequences: int | None = None) -> StoreBatches:
    """Ten short documents, some without a single supervised token, five sequences a step, one a micro-batch."""
    rng = np.random.default_rng(0)
    lengths = [5, 17, 40, 3, 60, 21, 33, 8, 64, 50]
    store = random_store(rng, lengths, vocab_size=500)
    store.masks = [rng.choice(np.array([0, 100, 50], np.uint8), size=length) for length in lengths]
    for silent in (2, 5, 8):
        store.masks[silent][:] = 0
    return StoreBatches([store], Order([store.lengths], None, 64, seed=0, whole=True), 5, 1, num_sequences)


def take_steps(kind: str, objective: Any = None) -> dict[str, Any]:
    """What a few steps give, on this process's part of each."""
    ranks = Ranks.current()
    engine = Engine(model_of(kind), CONFIG, objective=objective, ranks=ranks)
    batches, losses, norms = batches_of(), [], []
    for step in range(STEPS):
        mine = batches.step(step, ranks.rank, ranks.size)
        losses.append(engine.forward_backward(mine)["loss"])
        norms.append(engine.optimizer_step(1e-3, mine))
    store = batches.stores[0]
    held_out = sequential_batches(store, 64, 64, 300)
    found = {
        "losses": losses,
        "norms": norms,
        "held out": engine.evaluate(share(held_out, ranks.rank, ranks.size)),
        "weights": {name: parameter.detach().numpy() for name, parameter in engine.parameters.items()},
    }
    return found


@pytest.mark.parametrize(
    ("kind", "world_size"), [("tied", 2), ("untied", 2), ("adapter, trainable tokens", 2), ("tied", 4)]
)
def test_steps_on_several_ranks_equal_steps_on_one(kind, world_size):
    alone = take_steps(kind)
    for found in run_ranks(take_steps, kind, world_size=world_size):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert found["held out"] == pytest.approx(alone["held out"], rel=1e-6)
        for name, weights in alone["weights"].items():
            error = np.linalg.norm(found["weights"][name] - weights) / np.linalg.norm(weights)
            assert error <= 1e-6, name


def test_objective_is_divided_by_the_weight_of_all_ranks():
    alone = take_steps("tied", Preference())
    for found in run_ranks(take_steps, "tied", Preference()):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def meet_nan() -> list[Any]:
    ranks = Ranks.current()
    engine = Engine(model_of("untied"), CONFIG, ranks=ranks)
    batches = batches_of().step(0, ranks.rank, ranks.size)
    everything = [batch for rank in range(ranks.size) for batch in batches_of().step(0, rank, ranks.size)]
    others = {token for batch in everything[1:] for token in batch.tokens.tolist()}
    poison = next(token for token in everything[0].tokens.tolist() if token not in others)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[poison] = float("inf")
    try:
        engine.forward_backward(batches)
    except NonFinite as error:
        return ranks.gather(len(error.batches))
    return []


def test_nan_on_one_rank_stops_all_ranks():
    assert run_ranks(meet_nan) == [[1, 0], [1, 0]]


def talk() -> dict[str, Any]:
    ranks = Ranks.current()
    order = []
    with ranks.first_goes_first():
        order.append(ranks.rank)
    return {
        "sum": ranks.sum([1.5, float(ranks.rank)]),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
        "first": ranks.from_first({"rank": ranks.rank, "text": "ü" * ranks.rank}),
        "gathered": ranks.gather(["x" * 10**ranks.rank, None, 0.1]),
    }


def test_ranks_sum_gather_and_from_first():
    found = run_ranks(talk, world_size=3)
    assert found[0] == found[1] == found[2]
    assert found[0]["sum"] == [4.5, 3.0] and found[0]["any"] == (True, False)
    assert found[0]["first"] == {"rank": 0, "text": ""}
    assert found[0]["gathered"] == [["x" * 10**rank, None, 0.1] for rank in range(3)]


def test_ranks_of_one_process_return_their_arguments():
    ranks = Ranks()
    assert ranks.sum([1.0, 2.0]) == [1.0, 2.0] and ranks.any(True) and not ranks.any(False)
    assert ranks.gather("x") == ["x"] and ranks.from_first("x") == "x" and ranks.is_first


def lines_of(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs_dir / "small" / name).read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    assert lines_of(one, "ledger.jsonl") == lines_of(other, "ledger.jsonl")
    for key in ("train/loss", "eval/loss", "eval/num_tokens", "train/num_tokens", "train/grad_norm"):
        values = [
            [line[key] for line in lines_of(runs_dir, "metrics.jsonl") if key in line] for runs_dir in (one, other)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    result = RunFolder(one / "small").result
    for file in result.glob("*.safetensors"):
        expected = load_file(RunFolder(other / "small").result / file.name)
        for name, weights in load_file(file).items():
            difference = (weights.float() - expected[name].float()).norm() / expected[name].float().norm().clamp(
                min=1e-9
            )
            assert difference <= 1e-5, name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stories.jsonl")


def test_run_on_two_ranks_equals_run_on_one(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(run_values(corpus, one, budget={"epochs": 0.4}))
    run_ranks(train, run_values(corpus, two, budget={"epochs": 0.4}))
    assert_same_run(one, two)
    assert verify(two / "small", lambda text: None, lambda step, steps: None).is_finished


def test_run_resumes_with_another_number_of_ranks(corpus, tmp_path):
    base = tmp_path / "base"
    train(run_values(corpus, base, budget={"steps": 4}))
    conversations = write_conversations(tmp_path / "questions.jsonl")
    one, two = tmp_path / "one", tmp_path / "two"

    def values(runs_dir: Path) -> dict[str, Any]:
        adapter = {"rank": 4, "train_tokens": ["<|im_end|>"]}
        return adapt_values(base / "small" / "model", conversations, runs_dir, method="lora", adapter=adapter)

    train(values(one))
    run_ranks(train_until, values(two), 7)
    train_until(values(two), 15)
    run_ranks(train, values(two), world_size=3)
    assert_same_run(two, one)


def train_until(values: dict[str, Any], step: int) -> None:
    """Train until a signal comes to one rank after some steps: all ranks stop after the same one."""
    import os
    import signal

    from trivium.engine.loop import Silent
    from trivium.errors import Stopped

    class Stopping(Silent):
        def step(self, number: int, loss: float) -> None:
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(values, Stopping())
