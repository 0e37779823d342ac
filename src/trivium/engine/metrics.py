"""Throughput metrics and the formula of MFU. Metric names follow the Hugging Face Trainer."""

from dataclasses import dataclass
from typing import Any

from trivium.data.batch.pack import Batch
from trivium.engine.device import Machine, peak_memory_bytes
from trivium.files import GIB
from trivium.model.shape import QwenShape

MFU_FORMULA = (
    "(k * block parameters * tokens + k * head parameters * supervised tokens + 6 * layers * heads * head_dim * sum of "
    "squared document lengths) / seconds / measured peak FLOP/s, with k = 6, or 4 for frozen weights"
)


def training_flops(shape: QwenShape, batch: Batch, frozen: bool = False) -> float:
    """FLOPs of a forward and backward pass over a batch, without recomputation.

    Matrix products cost 6 FLOPs per parameter and token, or 4 if the weights are `frozen`. The output head counts
    supervised tokens only. Embedding lookups and adapter products are not counted. Causal attention costs
    6 * heads * head_dim * length^2 per layer and document: only the causal half of the attention matrix counts.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    pieces = batch.spans[:, 3] - batch.spans[:, 2]
    squares = float((pieces.astype(float) ** 2).sum())
    attention = 6.0 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * squares
    head = shape.vocab_size * shape.hidden_size
    products = (shape.num_matmul_params - head) * batch.num_tokens + head * batch.num_supervised
    return (4.0 if frozen else 6.0) * products + attention


@dataclass
class Interval:
    """Sums over the steps since the last line of metrics; saved in checkpoints, so a resume does not change metrics."""

    loss: float = 0.0
    flops: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, flops: float, num_tokens: int, seconds: float) -> None:
        """Count one step."""
        self.loss += loss
        self.flops += flops
        self.steps += 1
        self.tokens += num_tokens
        self.seconds += seconds

    def figures(self, machine: Machine, num_devices: int) -> dict[str, Any]:
        """Mean loss in nats per token, tokens per second without padding, MFU, peak memory in GiB."""
        return {
            "train/loss": self.loss / self.steps,
            "train/tokens_per_second": self.tokens / self.seconds,
            "train/mfu": self.flops / self.seconds / (num_devices * machine.peak_flops),
            "train/peak_memory_gib": peak_memory_bytes(machine.device) / GIB,
        }
