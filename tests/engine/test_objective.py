"""Objectives: gradients of functions of the log-probabilities, compared with autograd through plain logits."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.test_engine import CONFIG, engine_shape
from tests.support.memory_store import random_store
from tests.support.models import small_model
from trivium.config.run import Adapter
from trivium.data.batch.pack import Batch, pack
from trivium.engine.engine import Engine
from trivium.engine.objective import NextToken, Objective, OfLogprobs
from trivium.model import adapter
from trivium.model.qwen import Documents, Qwen

TOKEN_IDS = [3, 77, 410]


class NextTokenByLogprobs(OfLogprobs):
    """Next-token learning without its single pass."""

    def weight(self, batch: Batch) -> float:
        return batch.total_weight

    def of_logprobs(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        weights = 1.0 if batch.supervised_weights is None else batch.supervised_weights
        return -(logprobs_M * weights).sum(), {}


class Preference(OfLogprobs):
    """As in DPO: the first document of a batch should be likelier than the second, each by the sum of its tokens."""

    def weight(self, batch: Batch) -> float:
        return 1.0 if batch.num_supervised else 0.0

    def of_logprobs(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        border = batch.bounds[1]
        places = batch.supervised
        chosen = logprobs_M[(places < border)].sum()
        rejected = logprobs_M[(places >= border)].sum()
        margin = 0.01 * (chosen - rejected)
        return -F.logsigmoid(margin) * self.weight(batch), {"margin": margin}


class Clipped(OfLogprobs):
    """As in GRPO and PPO: a clipped ratio to old log-probabilities times an advantage of either sign."""

    def __init__(self, old: Tensor, advantages: Tensor) -> None:
        self.old, self.advantages = old, advantages

    def weight(self, batch: Batch) -> float:
        return float(batch.num_supervised)

    def of_logprobs(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        count = batch.num_supervised
        ratio = (logprobs_M[:count] - self.old[:count]).exp()
        advantages = self.advantages[:count]
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -gain.sum(), {"ratio": ratio.sum()}


def model_of(kind: str) -> Qwen:
    torch.manual_seed(0)
    shape = engine_shape("qwen2" if kind == "qwen2" else "qwen3", tied=kind != "untied")
    model = small_model(shape, scale=2.0)
    if kind.startswith("adapter"):
        model.requires_grad_(False)
        adapter.inject(model, Adapter(rank=4), seed=2, token_ids=TOKEN_IDS if kind.endswith("tokens") else [])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.05)
    return model


def batch_of(weighted: bool = False) -> Batch:
    rng = np.random.default_rng(0)
    store = random_store(rng, [50, 70], vocab_size=500)
    store.documents[0][[5, 20]], store.documents[1][9] = TOKEN_IDS[:2], TOKEN_IDS[2]
    if weighted:
        store.masks = [rng.choice(np.array([0, 100, 50], np.uint8), size=length) for length in (50, 70)]
    return pack([store], np.array([[0, 0, 0, 50], [0, 1, 0, 70]]), 128)


def plain_gradients(model: Qwen, objective: OfLogprobs, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The same loss by autograd through all logits."""
    documents = Documents(batch.cu_seqlens, batch.bounds, batch.max_document_tokens)
    hidden = model(batch.tokens, batch.positions, documents)[batch.supervised]
    logprobs = F.log_softmax(model.logits(hidden).float(), dim=-1)
    logprobs = logprobs.gather(1, batch.supervised_labels.clamp(min=0)[:, None])[:, 0]
    loss, _ = objective.of_logprobs(logprobs.masked_fill(batch.supervised_labels < 0, 0.0), batch)
    loss = loss / objective.weight(batch)
    model.zero_grad()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def objectives(batch: Batch) -> dict[str, OfLogprobs]:
    generator = torch.Generator().manual_seed(4)
    size = len(batch.supervised)
    old = -6.2 + torch.randn(size, generator=generator)
    return {
        "preference": Preference(),
        "clipped": Clipped(old, torch.randn(size, generator=generator)),
        "next token": NextTokenByLogprobs(),
    }


@pytest.mark.parametrize("kind", ["tied", "untied", "qwen2", "adapter", "adapter, trainable tokens"])
@pytest.mark.parametrize("name", ["preference", "clipped", "next token"])
def test_objective_gradients_equal_autograd_through_plain_logits(kind, name):
    """Over all tensors within 1e-6; single tensors, whose rounding is larger, within 2e-6."""
    model, batch = model_of(kind), batch_of(weighted=name == "next token")
    objective = objectives(batch)[name]
    expected_loss, expected = plain_gradients(model, objective, batch)
    model.zero_grad()
    engine = Engine(model, CONFIG, objective=objective)
    figures = engine.forward_backward([batch])
    assert figures["loss"] == pytest.approx(expected_loss, rel=1e-6)
    assert expected.keys() == engine.parameters.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0
        assert (engine.parameters[key].grad - gradient).norm() <= 2e-6 * gradient.norm(), key
    found = torch.cat([engine.parameters[key].grad.flatten() for key in expected])
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert (found - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter, trainable tokens"])
@pytest.mark.parametrize("name", ["preference", "clipped"])
def test_objective_slopes_reach_hidden_states_and_head_as_in_fp64(kind, name):
    model, batch = model_of(kind), batch_of()
    objective = objectives(batch)[name]
    hidden = torch.randn(len(batch.supervised), 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    objective.loss(model, hidden, batch).surrogate.backward()

    exact = hidden.detach().double().requires_grad_()
    head = model.head_weight.detach().double().requires_grad_()
    rows = None if model.head_rows is None else model.head_rows[1].detach().double().requires_grad_()
    logits = exact @ head.T
    if rows is not None:
        logits = logits.index_copy(1, model.head_rows[0], exact @ rows.T)
    labels = batch.supervised_labels
    logprobs = F.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0.0)
    objective.of_logprobs(logprobs, batch)[0].backward()
    pairs = [(hidden.grad, exact.grad)]
    pairs += [(model.head_weight.grad, head.grad)] if rows is None else [(model.head_rows[1].grad, rows.grad)]
    for found, expected in pairs:
        assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["tied", "untied", "adapter, trainable tokens"])
def test_next_token_in_one_pass_equals_next_token_by_logprobs(kind):
    batches = [batch_of(weighted=True), batch_of()]
    found = []
    objective: Objective
    for objective in (NextToken(), NextTokenByLogprobs()):
        engine = Engine(model_of(kind), CONFIG, objective=objective)
        loss = engine.forward_backward(batches)["loss"]
        found.append((loss, {name: p.grad for name, p in engine.parameters.items()}, engine.evaluate(batches)[0]))
    (loss, gradients, held_out), (slow_loss, slow_gradients, slow_held_out) = found
    assert loss == pytest.approx(slow_loss, rel=1e-6) and held_out == pytest.approx(slow_held_out, rel=1e-6)
    assert loss == pytest.approx(held_out, rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - slow_gradients[name]).norm() <= 1e-6 * gradient.norm(), name


def test_objective_figures_are_divided_by_the_weight_of_the_step():
    batch = batch_of()
    engine = Engine(model_of("tied"), CONFIG, objective=Preference())
    one = engine.forward_backward([batch])
    engine.optimizer.zero_grad()
    two = engine.forward_backward([batch, batch])
    assert one.keys() == {"loss", "margin"}
    assert two == pytest.approx(one, rel=1e-6)
