"""The training engine: four verbs (forward_backward, optimizer_step, save, load) over one model.

It knows nothing of files of data, budgets, logs or run folders; `loop` does. The loss of a step is the weighted sum of
the token losses of all its micro-batches over the sum of the weights of the whole step (the number of supervised
tokens, where all weights are 1), never a mean of means. What is frozen is neither updated nor saved. Tests and benches
drive these verbs directly.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trivium.config.run import Optimizer
from trivium.data.batch.pack import Batch
from trivium.engine import checkpoint
from trivium.engine.loss import cross_entropy_sum
from trivium.engine.optim import build_adamw, state_tensors, take_steps
from trivium.errors import TriviumError
from trivium.model.qwen import Documents, Qwen


class NonFinite(TriviumError):
    """A loss or a gradient is NaN or infinite; nothing was updated.

    Attributes:
        batches: the micro-batches to look at: the one with the bad loss, or all of the step.
    """

    def __init__(self, message: str, batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.batches = batches


class Engine:
    """A model with its optimizer on one device.

    Args:
        model: already on the device, with its compute type set; trained weights in fp32.
        config: AdamW's numbers.
        loraplus_lr_ratio: LoRA+, see `config.Adapter`.
    """

    def __init__(self, model: Qwen, config: Optimizer, loraplus_lr_ratio: float = 1.0) -> None:
        self.model = model
        self.config = config
        self.optimizer = build_adamw(model, config, loraplus_lr_ratio)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(model.parameters()).device

    def forward_backward(self, batches: Sequence[Batch]) -> float:
        """Add the gradient of the step's loss; return that loss in nats per supervised token.

        Raises: NonFinite naming the first micro-batch whose loss is NaN or infinite.
        """
        if not self.model.training:
            self.model.train()
        total_weight = sum(batch.total_weight for batch in batches)
        sums = []
        for batch in batches:
            if batch.num_supervised:
                loss = self._loss_sum(batch)
                (loss / total_weight).backward()
                sums.append((batch, loss.detach()))
        total = 0.0
        for batch, loss_sum in sums:
            if not math.isfinite(value := float(loss_sum)):
                raise NonFinite(f"the loss is {value}", [batch])
            total += value
        return total / (total_weight or 1.0)

    def optimizer_step(self, lr: float, batches: Sequence[Batch] = ()) -> float:
        """Clip, update the weights, clear the gradients; return the gradient's norm before clipping.

        Raises: NonFinite, before anything is updated, when the norm is NaN or infinite.
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
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Mean loss in nats over the supervised tokens of all batches by their weights, and how many tokens they are.

        Raises: NonFinite naming the first batch whose loss is NaN or infinite.
        """
        self.model.eval()
        total, total_weight, num_supervised = 0.0, 0.0, 0
        for batch in batches:
            if batch.num_supervised:
                loss_sum = float(self._loss_sum(batch))
                if not math.isfinite(loss_sum):
                    raise NonFinite(f"the held-out loss is {loss_sum}", [batch])
                total += loss_sum
                total_weight += batch.total_weight
                num_supervised += batch.num_supervised
        return total / (total_weight or 1.0), num_supervised

    def save(self, folder: Path, state: Mapping[str, object]) -> None:
        """Write weights, moments, random state and `state` as one checkpoint, crash-safe; see `checkpoint`."""
        checkpoint.write(folder, self._tensors(), state)

    def load(self, folder: Path) -> dict[str, Any]:
        """Take weights, moments and random state from a checkpoint that verifies; return its `state`.

        Raises: checkpoint.Damaged when a byte differs from what was written.
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

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        move = {"device": self.device, "non_blocking": True}
        documents = Documents(batch.cu_seqlens.to(**move), batch.bounds, batch.max_document_tokens)
        hidden_TD = self.model(batch.tokens.to(**move), batch.positions.to(**move), documents)
        supervised_MD = hidden_TD[batch.supervised.to(**move)]
        weights = batch.supervised_weights
        return cross_entropy_sum(
            supervised_MD,
            self.model.head_weight,
            batch.supervised_labels.to(**move),
            None if weights is None else weights.to(**move),
            self.model.head_rows,
        )

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds, by file: the trained weights under their names; moments, steps and random state."""
        training = state_tensors(self.optimizer, self.parameters)
        training["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            training["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return {"model": dict(self.parameters), "training": training}
