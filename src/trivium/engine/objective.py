"""Objectives: what a run learns from the log-probabilities that the model gives to a step's supervised tokens.

Let l_t be the log-probability of the label of supervised token t, and L = f(l_1 ... l_n) an objective with slopes
s_t = dL/dl_t. Since dL/dtheta = sum over t of s_t * dl_t/dtheta, its gradient is that of the chunked cross entropy with
the weights -s_t. So every objective that depends on the weights through these log-probabilities alone needs one more
pass through the head and nothing else of the engine: DPO, ORPO, SimPO, KTO, REINFORCE, GRPO, PPO's policy term.

`NextToken` knows its slopes beforehand and takes a single pass. Any other objective subclasses `OfLogprobs` and writes
its loss as a function of the log-probabilities.
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
    """What an objective makes of one micro-batch.

    Attributes:
        value: fp32 scalar, the micro-batch's part of the step's loss before it is divided by the step's weight.
        surrogate: scalar whose gradient is that of the loss; its value may differ.
        figures: more sums to report, fp32 scalars; like the loss they are divided by the weight of the step.
    """

    value: Tensor
    surrogate: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Turns the supervised tokens of a micro-batch into a loss; 0, of weight 0, for a micro-batch of padding."""

    def weight(self, batch: Batch) -> float:
        """What the micro-batch adds to the weight of its step: the number that the sum of all losses is divided by."""
        ...

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        """The loss of one micro-batch.

        Args:
            model: gives token losses and log-probabilities.
            hidden_MD: hidden states of the supervised tokens, [tokens, hidden].
            batch: on the device of the model.
        """
        ...


class NextToken:
    """Cross entropy of the next token times its loss weight, summed; the weight is the sum of the loss weights."""

    def weight(self, batch: Batch) -> float:
        """See `Objective`."""
        return batch.total_weight

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        """See `Objective`."""
        loss = model.token_loss_sum(hidden_MD, batch.supervised_labels, batch.supervised_weights)
        return Loss(loss.detach(), loss)


class OfLogprobs(ABC):
    """An objective that is any differentiable function of the log-probabilities of a micro-batch's labels."""

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """See `Objective`."""

    @abstractmethod
    def of_logprobs(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, and more figures, from the log-probabilities of `batch.supervised_labels`; 0 where padding."""

    def loss(self, model: Qwen, hidden_MD: Tensor, batch: Batch) -> Loss:
        """Log-probabilities first, then the cross entropy weighted by minus the slopes; see `Objective`."""
        logprobs_M = model.token_logprobs(hidden_MD, batch.supervised_labels)
        if not torch.is_grad_enabled():
            value, figures = self.of_logprobs(logprobs_M, batch)
            return Loss(value, value, figures)
        value, figures = self.of_logprobs(logprobs_M.requires_grad_(), batch)
        (slopes_M,) = torch.autograd.grad(value, logprobs_M)
        surrogate = model.token_loss_sum(hidden_MD, batch.supervised_labels, -slopes_M)
        return Loss(value.detach(), surrogate, {name: figure.detach() for name, figure in figures.items()})
