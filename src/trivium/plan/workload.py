"""What is to be computed and stored in one optimizer step, as numbers: the input of every prediction.

A run file is reduced to these numbers by `of_run`; the planner's search varies them and writes a run file again.
Also the exact counts of parameters that are trained, frozen and packed. Reads no file and never imports torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trivium.config.run import Adapter, Run
from trivium.model.shape import QwenShape
from trivium.plan.facts import DataFacts

ComputeDtype = Literal["fp32", "bf16"]
Place = Literal["cpu", "gpu"]

DTYPE_BYTES: dict[ComputeDtype, int] = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4
LEAST_8BIT_VALUES, MOMENT_BLOCK = 4096, 256
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # values a scale of one byte, scales an fp32 scale of their own


@dataclass(frozen=True)
class Workload:
    """One optimizer step on every device.

    Attributes:
        shape: the network, its vocabulary settled.
        weights: what the weights start as; `nf4` ones stay packed.
        adapter: the adapter's numbers; None trains everything.
        states: how AdamW's moments are kept, see `config.Optimizer`.
        seq_len: tokens of a row.
        micro_tokens: tokens of one forward and backward on one device, a multiple of `seq_len`.
        step_tokens: tokens of an optimizer step over all devices.
        recompute: whether activations are checkpointed.
        compute_dtype: type of the matrix products.
        place: whether attention and softmax run as they do on a CPU or on a GPU.
        num_devices, strategy, offload: see `config.Parallel`; the strategy says nothing with one device.
        supervised_share: share of the tokens that carry loss.
        document_tokens: mean length of what attention spans, at most `seq_len`.
        num_token_rows: rows of the embedding, and of an untied head, that are trained beside the adapter.
    """

    shape: QwenShape
    weights: Literal["pretrained", "nf4", "random"]
    adapter: Adapter | None
    state_dtype: Literal["fp32", "8bit", "paged-8bit"]
    seq_len: int
    micro_tokens: int
    step_tokens: int
    recompute: bool
    compute_dtype: ComputeDtype
    place: Place
    num_devices: int = 1
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "fsdp2"
    offload: Literal["none", "optimizer", "all"] = "none"
    supervised_share: float = 1.0
    document_tokens: float | None = None
    num_token_rows: int = 0

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a value in the compute dtype."""
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of one device in an optimizer step."""
        return max(1, math.ceil(self.step_tokens / (self.micro_tokens * self.num_devices)))

    @property
    def num_trained_params(self) -> int:
        """Parameters with a gradient, exactly."""
        if self.adapter is None:
            return self.shape.num_params
        tables = 1 if self.shape.tie_word_embeddings else 2
        return num_adapter_params(self.shape, self.adapter) + tables * self.num_token_rows * self.shape.hidden_size

    @property
    def frozen_bytes(self) -> int:
        """Weights that stay as they are: packed ones with both levels of scales, the rest in the compute dtype."""
        if self.adapter is None:
            return 0
        if self.weights != "nf4":
            return self.shape.num_params * self.dtype_bytes
        packed = self.shape.num_hidden_layers * sum(
            nf4_bytes(rows * columns) for rows, columns in projections(self.shape).values()
        )
        unpacked = self.shape.num_params - self.shape.num_hidden_layers * self.shape.num_layer_matmul_params
        return packed + unpacked * self.dtype_bytes


def projections(shape: QwenShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's seven projections, by name."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


def num_adapter_params(shape: QwenShape, adapter: Adapter) -> int:
    """Values of A and B in every adapted projection, and of the magnitudes where DoRA has them."""
    sides = projections(shape)
    per_layer = sum(
        adapter.rank * sum(sides[target]) + (sides[target][0] if adapter.dora else 0) for target in set(adapter.targets)
    )
    return shape.num_hidden_layers * per_layer


def nf4_bytes(num_values: int) -> int:
    """A packed matrix: half a byte a value, a byte for each 64, 4 bytes for each 256 of those, and the tables.

    Source: Dettmers et al. 2023, arXiv:2305.14314 (double quantisation); bitsandbytes' QuantState.
    """
    scales = math.ceil(num_values / NF4_BLOCK)
    tables = 16 * FP32_BYTES + 256 * FP32_BYTES + FP32_BYTES  # NF4's values, the scales' values, their mean
    return math.ceil(num_values / 2) + scales + FP32_BYTES * math.ceil(scales / NF4_SCALES_BLOCK) + tables


def moment_bytes(w: Workload) -> int:
    """Both of AdamW's moments of everything trained, as `engine/optim.py` keeps them.

    In 8 bits: a byte each and an fp32 scale a block, but fp32 for embeddings and small tensors.
    Source: bitsandbytes' Optimizer2State.
    """
    if w.state_dtype == "fp32":
        return 2 * FP32_BYTES * w.num_trained_params
    return sum(count * _moment_bytes_8bit(size, is_wide) for size, count, is_wide in _trained_tensors(w))


def _moment_bytes_8bit(num_values: int, is_wide: bool) -> int:
    if is_wide or num_values < LEAST_8BIT_VALUES:
        return 2 * FP32_BYTES * num_values
    return 2 * (num_values + FP32_BYTES * math.ceil(num_values / MOMENT_BLOCK))


def _trained_tensors(w: Workload) -> Iterator[tuple[int, int, bool]]:
    """Values of each trained tensor, how many there are, and whether it is an embedding."""
    shape, layers, hidden = w.shape, w.shape.num_hidden_layers, w.shape.hidden_size
    sides = projections(shape)
    if w.adapter is not None:
        for target in sorted(set(w.adapter.targets)):
            rows, columns = sides[target]
            yield w.adapter.rank * columns, layers, False
            yield w.adapter.rank * rows, layers, False
            if w.adapter.dora:
                yield rows, layers, False
        tables = 1 if shape.tie_word_embeddings else 2
        yield w.num_token_rows * hidden, tables, False
        return
    yield shape.vocab_size * hidden, 1, True
    if not shape.tie_word_embeddings:
        yield shape.vocab_size * hidden, 1, False
    for target, (rows, columns) in sides.items():
        yield rows * columns, layers, False
        if shape.qkv_bias and target in ("q_proj", "k_proj", "v_proj"):
            yield rows, layers, False
    yield hidden, 2 * layers + 1, False
    if shape.qk_norm:
        yield shape.head_dim, 2 * layers, False


def of_run(run: Run, shape: QwenShape, facts: DataFacts | None, compute_dtype: ComputeDtype, place: Place) -> Workload:
    """The step of a run file; what the data would say and does not is taken as full rows that all carry loss."""
    micro_tokens = run.sequences_per_micro_batch * run.data.seq_len
    return Workload(
        shape=shape,
        weights=run.weights,
        adapter=run.adapter,
        state_dtype=run.optimizer.state_dtype,
        seq_len=run.data.seq_len,
        micro_tokens=micro_tokens,
        step_tokens=run.batch.tokens,
        recompute=bool(run.activation_checkpointing),
        compute_dtype=compute_dtype,
        place=place,
        num_devices=run.parallel.devices,
        strategy=run.parallel.strategy,
        offload=run.parallel.offload,
        supervised_share=facts.supervised_share if facts and run.loss_tokens == "assistant" else 1.0,
        document_tokens=min(facts.mean_tokens, run.data.seq_len) if facts else None,
    )


def with_batch(workload: Workload, micro_tokens: int, recompute: bool) -> Workload:
    """The same work in other portions: what never changes what is learnt."""
    return replace(workload, micro_tokens=micro_tokens, recompute=recompute)
