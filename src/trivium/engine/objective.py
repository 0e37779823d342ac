"""Objectives: losses computed from the log-probabilities of a step's supervised tokens.

Let l_t be the log-probability of the label of supervised token t, and L = f(l_1 ... l_n) an objective with slopes
s_t = dL/dl_t. Since dL/dtheta = sum over t of s_t * dl_t/dtheta, its gradient equals that of the chunked cross entropy
with the weights -s_t. An objective that is a function of these log-probabilities therefore costs one extra pass through
the head and needs no other change to the engine: DPO, ORPO, SimPO, KTO, REINFORCE, GRPO, PPO's policy term.

`NextToken` has constant slopes and needs a single pass. Other objectives subclass `OfLogprobs`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trivium.data.batch.pack import Batch
from trivium.model.qwen import Qwen


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch, before division by the step's weight.

    Attributes:
        value: fp32 scalar.
        surrogate: scalar with the gradient of the loss; its value may differ.
        figures: more fp32 scalars to report, divided by the step's weight like the loss.
    """

    value: Tensor
    surrogate: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Computes the loss of a micro-batch. For a micro-batch of padding, loss and weight are 0."""

    def weight(self, batch: Batch) -> float:
        """The micro-batch's part of the step's weight, by which the sum of all losses is divided."""
        ...

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        """The loss from the hidden states of the supervised tokens, [tokens, hidden]; `batch` is on their device."""
        ...


class NextToken:
    """Sum of next-token cross entropies times their loss weights; its weight is the sum of the loss weights."""

    def weight(self, batch: Batch) -> float:
        return batch.total_weight

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        loss = model.token_loss_sum(hidden_MD, batch.supervised_labels, batch.supervised_weights)
        return Loss(loss.detach(), loss)


class OfLogprobs(ABC):
    """An objective that is a differentiable function of the log-probabilities of a micro-batch's labels."""

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """See `Objective`."""

    @abstractmethod
    def of_logprobs(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss and other figures from the log-probabilities of `batch.supervised_labels`, 0 for padding."""

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        """Compute log-probabilities, then the cross entropy weighted by the negative slopes."""
        logprobs_M = model.token_logprobs(hidden_MD, batch.supervised_labels)
        if not torch.is_grad_enabled():
            value, figures = self.of_logprobs(logprobs_M, batch)
            return Loss(value, value, figures)
        value, figures = self.of_logprobs(logprobs_M.requires_grad_(), batch)
        (slopes_M,) = torch.autograd.grad(value, logprobs_M)
        surrogate = model.token_loss_sum(hidden_MD, batch.supervised_labels, -slopes_M)
        return Loss(value.detach(), surrogate, {name: figure.detach() for name, figure in figures.items()})
