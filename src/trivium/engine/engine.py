"""The training engine: forward_backward, optimizer_step, evaluate, save and load for one model.

Data files, budgets, logs and run folders are handled in `loop.py`. The loss of a step is the sum of the losses of all
micro-batches on all ranks divided by the sum of their weights, not a mean of means; for next-token prediction the
divisor is the sum of the loss weights of all supervised tokens. Frozen weights are not updated or saved.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trivium.config.run import Optimizer
from trivium.data.batch.pack import Batch
from trivium.engine import checkpoint
from trivium.engine.objective import Loss, NextToken, Objective
from trivium.engine.optim import build_adamw, state_tensors, take_steps
from trivium.engine.ranks import ALONE, Ranks
from trivium.errors import TriviumError
from trivium.model.qwen import Documents, Qwen


class NonFinite(TriviumError):
    """A loss or a gradient is NaN or infinite; nothing was updated. Raised on all ranks together.

    Attributes:
        batches: this rank's micro-batches with such a loss, or all of the step for a gradient.
    """

    def __init__(self, message: str, batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.batches = batches


class Engine:
    """A model and its optimizer on one device; data-parallel over `ranks`.

    Args:
        model: already on the device, with its compute dtype set; trained weights in fp32.
        config: the settings of AdamW.
        loraplus_lr_ratio: learning rate of LoRA's B matrices relative to the others.
        objective: the loss; None is next-token prediction.
        ranks: the processes that share every step.
    """

    def __init__(
        self,
        model: Qwen,
        config: Optimizer,
        loraplus_lr_ratio: float = 1.0,
        objective: Objective | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.config = config
        self.objective = objective or NextToken()
        self.ranks = ranks
        self.optimizer = build_adamw(model, config, loraplus_lr_ratio)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(model.parameters()).device

    def forward_backward(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Accumulate the gradients of a step; return `loss` (nats per token for `NextToken`) and other metrics.

        All ranks must pass the same number of micro-batches; see `StoreBatches.step` for padding.

        Raises: NonFinite with the micro-batches whose loss is NaN or infinite.
        """
        if not self.model.training:
            self.model.train()
        (total_weight,) = self.ranks.sum([sum(self.objective.weight(batch) for batch in batches)])
        losses = []
        for batch in batches:
            loss = self._loss(batch)
            (loss.surrogate / (total_weight or 1.0)).backward()
            losses.append(Loss(loss.value, loss.value, loss.figures))
        self.ranks.sum_gradients(self.parameters.values())
        return self._figures(losses, batches, total_weight, "the loss")

    def optimizer_step(self, lr: float, batches: Sequence[Batch] = ()) -> float:
        """Clip the gradients, update the weights and clear the gradients; return the norm before clipping.

        Raises: NonFinite when the norm is NaN or infinite; nothing was updated.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        if not math.isfinite(value := float(norm)):
            raise NonFinite(f"the gradient's norm is {value}", batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The loss over the batches of all ranks, computed as for one step, and their number of supervised tokens.

        Raises: NonFinite with the batches whose loss is NaN or infinite.
        """
        self.model.eval()
        weight, num_supervised = self.ranks.sum(
            [sum(self.objective.weight(batch) for batch in batches), sum(batch.num_supervised for batch in batches)]
        )
        losses = [self._loss(batch) for batch in batches]
        return self._figures(losses, batches, weight, "the held-out loss")["loss"], int(num_supervised)

    def _loss(self, batch: Batch) -> Loss:
        batch = batch.to(self.device)
        documents = Documents(batch.cu_seqlens, batch.bounds, batch.max_document_tokens)
        hidden_TD = self.model(batch.tokens, batch.positions, documents)
        return self.objective.loss(self.model, hidden_TD[batch.supervised], batch)

    def _figures(
        self, losses: Sequence[Loss], batches: Sequence[Batch], total_weight: float, what: str
    ) -> dict[str, float]:
        """Sums over all micro-batches and ranks divided by the step's weight; every rank checks the same number."""
        names = ["loss", *(losses[0].figures if losses else ())]
        values = [float(loss.value) for loss in losses]
        sums = [sum(values), *(sum(float(loss.figures[name]) for loss in losses) for name in names[1:])]
        sums = self.ranks.sum(sums)
        if not math.isfinite(sums[0]):
            bad = [batch for batch, value in zip(batches, values, strict=True) if not math.isfinite(value)]
            raise NonFinite(f"{what} is {sums[0]}", bad)
        return {name: value / (total_weight or 1.0) for name, value in zip(names, sums, strict=True)}

    def save(self, folder: Path, state: Mapping[str, object]) -> None:
        """Write weights, optimizer state, RNG state and `state` as a checkpoint; see `checkpoint.py`.

        All ranks have the same state, so only rank 0 writes.
        """
        if self.ranks.is_first:
            checkpoint.write(folder, self._tensors(), state)
        self.ranks.barrier()

    def load(self, folder: Path) -> dict[str, Any]:
        """Verify a checkpoint, load weights, optimizer state and RNG state from it, and return its `state`.

        Raises: checkpoint.Damaged when a file differs from its recorded hash.
        """
        state = checkpoint.verify(folder)
        tensors = self._tensors()
        with torch.no_grad():
            checkpoint.read_into(folder, tensors)
        take_steps(self.optimizer, self.parameters, tensors["training"])
        torch.set_rng_state(tensors["training"]["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["training"]["rng.cuda"], self.device)
        return state

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint by file: trained weights; optimizer and RNG state."""
        training = state_tensors(self.optimizer, self.parameters)
        training["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            training["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return {"model": dict(self.parameters), "training": training}
