"""The engine's arithmetic: results do not depend on packing, accumulation or ranks; NaN stops before the update."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.memory_store import random_store
from tests.support.models import small_model, small_shape
from trivium.config.run import Optimizer
from trivium.data.batch.order import Order
from trivium.data.batch.pack import StoreBatches, pack
from trivium.engine.engine import Engine, NonFinite
from trivium.model.qwen import Documents, Qwen, init_weights
from trivium.model.shape import QwenShape

CONFIG = Optimizer(lr=1e-3, weight_decay=0.1)


def engine_shape(family: str = "qwen3", tied: bool = True) -> QwenShape:
    return small_shape(family=family, vocab_size=500, tie_word_embeddings=tied)


def small_engine(family: str = "qwen3", tied: bool = True, config: Optimizer = CONFIG) -> Engine:
    return Engine(small_model(engine_shape(family, tied), scale=3.0), config)


def rows_of(sequences_per_micro_batch: int, sequences_per_step: int = 4) -> StoreBatches:
    store = random_store(np.random.default_rng(0), [5, 17, 40, 3, 90, 21, 33, 8, 64, 50], vocab_size=500)
    return StoreBatches(
        [store], Order([store.lengths], None, 64, seed=0), sequences_per_step, sequences_per_micro_batch, None
    )


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in engine.parameters.items()}
    engine.optimizer.zero_grad()
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", True)])
def test_micro_batches_equal_one_large_batch(family, tied):
    engine = small_engine(family, tied)
    whole = engine.forward_backward(rows_of(sequences_per_micro_batch=4).step(0))
    expected = gradients(engine)
    split = engine.forward_backward(rows_of(sequences_per_micro_batch=1).step(0))
    assert split == pytest.approx(whole, rel=1e-6)
    assert_same(expected, gradients(engine))


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", True)])
def test_packed_equals_unpacked(family, tied):
    engine = small_engine(family, tied)
    store = random_store(np.random.default_rng(0), [5, 17, 40, 3, 63], vocab_size=500)
    spans = np.array([[0, document, 0, length] for document, length in enumerate(store.lengths)])
    packed = engine.forward_backward([pack([store], spans, 128)])
    expected = gradients(engine)
    alone = engine.forward_backward([pack([store], span[None], int(span[3])) for span in spans])
    assert alone == pytest.approx(packed, rel=1e-6)
    assert_same(expected, gradients(engine))


def test_loss_is_a_mean_over_tokens_not_micro_batches():
    engine = small_engine()
    batches = rows_of(sequences_per_micro_batch=1).step(0)
    losses = [engine.evaluate([batch]) for batch in batches]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert engine.forward_backward(batches)["loss"] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_loss_equals_cross_entropy_of_the_logits():
    engine = small_engine()
    batch = rows_of(sequences_per_micro_batch=4).step(0)[0]
    total = 0.0
    for begin, end in zip(batch.bounds, batch.bounds[1:], strict=False):
        length = end - begin
        documents = Documents(torch.tensor([0, length], dtype=torch.int32), (0, length), length)
        hidden = engine.model(batch.tokens[begin:end], torch.arange(length), documents)
        logits = F.linear(hidden, engine.model.head_weight)
        total += float(F.cross_entropy(logits, batch.labels[begin:end], ignore_index=-100, reduction="sum"))
    assert engine.evaluate([batch])[0] == pytest.approx(total / batch.num_supervised, rel=1e-6)


def test_weight_decay_applies_to_matrices_only():
    engine = small_engine("qwen2")
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0)
    assert sum(len(group["params"]) for group in engine.optimizer.param_groups) == len(engine.parameters)


def test_nonfinite_loss_names_its_micro_batch():
    engine = small_engine(tied=False)
    batches = rows_of(sequences_per_micro_batch=1).step(0)
    others = {token for index in (0, 1, 3) for token in batches[index].tokens.tolist()}
    poison = next(token for token in batches[2].tokens.tolist() if token not in others)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[poison] = float("inf")
    with pytest.raises(NonFinite) as caught:
        engine.forward_backward(batches)
    assert caught.value.batches == [batches[2]]


def test_nonfinite_gradient_is_found_before_the_update():
    engine = small_engine()
    batches = rows_of(sequences_per_micro_batch=2).step(0)
    engine.forward_backward(batches)
    next(iter(engine.parameters.values())).grad[0, 0] = float("inf")
    before = {name: parameter.clone() for name, parameter in engine.parameters.items()}
    with pytest.raises(NonFinite, match="norm is"):
        engine.optimizer_step(1e-3, batches)
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.parameters.items())


@pytest.mark.parametrize("state_dtype", ["fp32", "8bit"])
def test_training_after_save_and_load_is_bit_identical(tmp_path, state_dtype):
    rows = rows_of(sequences_per_micro_batch=2)
    config = CONFIG.model_copy(update={"state_dtype": state_dtype})
    straight, first = (small_engine(tied=False, config=config) for _ in range(2))
    for step in range(6):
        straight.forward_backward(rows.step(step))
        straight.optimizer_step(1e-3)
    for step in range(3):
        first.forward_backward(rows.step(step))
        first.optimizer_step(1e-3)
    first.save(tmp_path / "step-00000003", {"step": 3})
    head_moments = first.optimizer.state[first.model.lm_head.weight]
    assert any(value.dtype == torch.uint8 for value in head_moments.values() if torch.is_tensor(value)) == (
        state_dtype == "8bit"
    )
    torch.manual_seed(99)
    second = Engine(Qwen(engine_shape(tied=False)), config)
    init_weights(second.model, seed=50)
    assert second.load(tmp_path / "step-00000003")["step"] == 3
    for step in range(3, 6):
        second.forward_backward(rows.step(step))
        second.optimizer_step(1e-3)
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_loss_weights_act_like_repeated_tokens():
    """A token of weight 0.5 pulls half as hard as one of weight 1; doubling all weights changes nothing."""
    engine = small_engine()
    rng = np.random.default_rng(0)
    store = random_store(rng, [30, 20], vocab_size=500)
    spans = np.array([[0, 0, 0, 30], [0, 1, 0, 20]])

    def loss_and_gradients(*masks: int) -> tuple[float, dict[str, torch.Tensor]]:
        store.masks = [np.full(30, masks[0], np.uint8), np.full(20, masks[1], np.uint8)]
        loss = engine.forward_backward([pack([store], spans, 64)])["loss"]
        return loss, gradients(engine)

    first, second = (loss_and_gradients(*masks)[0] for masks in ((100, 0), (0, 100)))
    mixed, mixed_gradients = loss_and_gradients(100, 50)
    assert mixed == pytest.approx((29 * first + 0.5 * 19 * second) / (29 + 0.5 * 19), rel=1e-5)
    doubled, doubled_gradients = loss_and_gradients(200, 100)
    assert doubled == pytest.approx(mixed, rel=1e-6)
    assert_same(mixed_gradients, doubled_gradients)
