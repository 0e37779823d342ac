"""One optimizer step as numbers, the input of every prediction, and the facts about the data.

`of_run` makes a `Workload` from a run file. Parameters and bytes of weights and optimizer states are counted exactly.
Never imports torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trivium.config.run import Adapter, Run
from trivium.errors import ConfigError
from trivium.model.shape import QwenShape

ComputeDtype = Literal["fp32", "bf16"]
DeviceType = Literal["cpu", "gpu"]
DataKind = Literal["documents", "conversations"]

DTYPE_BYTES: dict[ComputeDtype, int] = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4
MIN_8BIT_VALUES, MOMENT_BLOCK = 4096, 256
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # values per one-byte scale, scales per fp32 scale

TYPICAL_TOKENS: dict[DataKind, int] = {"conversations": 400, "documents": 1000}
"""Assumed mean tokens of a record."""
TYPICAL_SUPERVISED: dict[DataKind, float] = {"conversations": 0.7, "documents": 1.0}
"""Assumed share of supervised tokens when only answers have loss: instruction data has 0.5 to 0.8."""


@dataclass(frozen=True)
class DataFacts:
    """The data in numbers, surveyed from files (`data/look/survey.py`) or given (`given_facts`).

    Attributes:
        num_rows: number of documents or conversations.
        num_tokens: tokens of one epoch.
        mean_tokens: mean tokens of a record.
        supervised_share: share of supervised tokens when only answers have loss.
        reasoning_share: share of the conversations with reasoning.
        is_measured: whether the tokens were counted with the model's tokenizer.
    """

    num_rows: int
    num_tokens: int
    kind: DataKind
    mean_tokens: float
    supervised_share: float = 1.0
    reasoning_share: float = 0.0
    is_measured: bool = False


def given_facts(
    kind: DataKind, num_rows: int | None = None, num_tokens: int | None = None, mean_tokens: float | None = None
) -> DataFacts:
    """Facts from numbers; missing ones are computed from the others.

    Raises: ConfigError if neither records nor tokens are given, or a number is not above zero.
    """
    given = {"number of records": num_rows, "number of tokens": num_tokens, "mean tokens per record": mean_tokens}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"The {name} is {value}. Expected a number above zero.")
    if num_rows is None and num_tokens is None:
        raise ConfigError("The amount of data is missing. Expected a number of records or of tokens.")
    mean = mean_tokens or (num_tokens / num_rows if num_rows and num_tokens else TYPICAL_TOKENS[kind])
    return DataFacts(
        num_rows=num_rows or max(1, round((num_tokens or 0) / mean)),
        num_tokens=num_tokens or max(1, round((num_rows or 0) * mean)),
        kind=kind,
        mean_tokens=mean,
        supervised_share=TYPICAL_SUPERVISED[kind],
    )


@dataclass(frozen=True)
class Workload:
    """One optimizer step on every device.

    Attributes:
        shape: the network, with its final vocabulary size.
        weights: initial weights; `nf4` weights stay quantized.
        adapter: None trains all weights.
        state_dtype: dtype of AdamW's moments.
        seq_len: tokens of a packed sequence.
        micro_tokens: tokens of a micro-batch on one device, a multiple of `seq_len`.
        step_tokens: tokens of a step over all devices.
        compute_dtype: dtype of the matrix products.
        num_devices, strategy, offload: see `config.Parallel`; one device ignores the strategy.
        supervised_share: share of supervised tokens.
        document_tokens: mean tokens of a document in a packed sequence; None for whole sequences.
        num_token_rows: trainable tokens next to the adapter.
    """

    shape: QwenShape
    weights: Literal["pretrained", "nf4", "random"]
    adapter: Adapter | None
    state_dtype: Literal["fp32", "8bit", "paged-8bit"]
    seq_len: int
    micro_tokens: int
    step_tokens: int
    activation_checkpointing: bool
    compute_dtype: ComputeDtype
    device_type: DeviceType
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
        """Micro-batches of one device in a step."""
        return max(1, math.ceil(self.step_tokens / (self.micro_tokens * self.num_devices)))

    @property
    def num_trained_params(self) -> int:
        """Parameters with a gradient."""
        if self.adapter is None:
            return self.shape.num_params
        tables = 1 if self.shape.tie_word_embeddings else 2
        return num_adapter_params(self.shape, self.adapter) + tables * self.num_token_rows * self.shape.hidden_size

    @property
    def frozen_bytes(self) -> int:
        """Bytes of frozen weights: NF4 matrices with their scales, the rest in the compute dtype."""
        if self.adapter is None:
            return 0
        if self.weights != "nf4":
            return self.shape.num_params * self.dtype_bytes
        layers = self.shape.num_hidden_layers
        packed = sum(matrix.copies * nf4_bytes(matrix.num_values) for matrix in self.shape.layer_matrices())
        unpacked = self.shape.num_params - layers * self.shape.num_layer_matmul_params
        return layers * packed + unpacked * self.dtype_bytes


def num_adapter_params(shape: QwenShape, adapter: Adapter) -> int:
    """Parameters of A and B of every adapted matrix, and of DoRA's magnitudes."""
    per_layer = 0
    for matrix in shape.layer_matrices():
        if matrix.name in adapter.targets:
            of_one = adapter.rank * (matrix.out_features + matrix.in_features)
            per_layer += matrix.copies * (of_one + (matrix.out_features if adapter.dora else 0))
    return shape.num_hidden_layers * per_layer


def nf4_bytes(num_values: int) -> int:
    """Bytes of a quantized matrix: 1/2 per value, 1 per 64 values, 4 per 256 of those, and the tables.

    Source: Dettmers et al. 2023, arXiv:2305.14314 (double quantization); bitsandbytes' QuantState.
    """
    scales = math.ceil(num_values / NF4_BLOCK)
    tables = 16 * FP32_BYTES + 256 * FP32_BYTES + FP32_BYTES  # NF4's values, the scales' values, their mean
    return math.ceil(num_values / 2) + scales + FP32_BYTES * math.ceil(scales / NF4_SCALES_BLOCK) + tables


def moment_bytes(w: Workload) -> int:
    """Bytes of both AdamW moments of all trained parameters.

    8-bit moments have an fp32 scale per block; embeddings and small tensors have fp32 moments.
    Source: bitsandbytes' Optimizer2State.
    """
    if w.state_dtype == "fp32":
        return 2 * FP32_BYTES * w.num_trained_params
    return sum(count * _moment_bytes_8bit(size, is_embedding) for size, count, is_embedding in _trained_tensors(w))


def _moment_bytes_8bit(num_values: int, is_embedding: bool) -> int:
    if is_embedding or num_values < MIN_8BIT_VALUES:
        return 2 * FP32_BYTES * num_values
    return 2 * (num_values + FP32_BYTES * math.ceil(num_values / MOMENT_BLOCK))


def _trained_tensors(w: Workload) -> Iterator[tuple[int, int, bool]]:
    """Size, number, and whether it is an embedding, of each kind of trained tensor."""
    shape, layers, hidden = w.shape, w.shape.num_hidden_layers, w.shape.hidden_size
    if w.adapter is not None:
        for matrix in shape.layer_matrices():
            if matrix.name in w.adapter.targets:
                count = layers * matrix.copies
                yield w.adapter.rank * matrix.in_features, count, False
                yield w.adapter.rank * matrix.out_features, count, False
                if w.adapter.dora:
                    yield matrix.out_features, count, False
        yield w.num_token_rows * hidden, 1 if shape.tie_word_embeddings else 2, False
        return
    yield shape.vocab_size * hidden, 1, True
    if not shape.tie_word_embeddings:
        yield shape.vocab_size * hidden, 1, False
    for matrix in shape.layer_matrices():
        yield matrix.num_values, layers * matrix.copies, False
        if matrix.has_bias:
            yield matrix.out_features, layers * matrix.copies, False
    yield hidden, 2 * layers + 1, False
    if shape.qk_norm:
        yield shape.head_dim, 2 * layers, False


def of_run(
    run: Run, shape: QwenShape, facts: DataFacts | None, compute_dtype: ComputeDtype, device_type: DeviceType
) -> Workload:
    """The step of a run file. Without facts, sequences are whole documents and all tokens are supervised."""
    return Workload(
        shape=shape,
        weights=run.weights,
        adapter=run.adapter,
        state_dtype=run.optimizer.state_dtype,
        seq_len=run.data.seq_len,
        micro_tokens=run.sequences_per_micro_batch * run.data.seq_len,
        step_tokens=run.step_tokens,
        activation_checkpointing=bool(run.activation_checkpointing),
        compute_dtype=compute_dtype,
        device_type=device_type,
        num_devices=run.parallel.devices,
        strategy=run.parallel.strategy,
        offload=run.parallel.offload,
        supervised_share=facts.supervised_share if facts and run.loss_tokens == "assistant" else 1.0,
        document_tokens=min(facts.mean_tokens, run.data.seq_len) if facts else None,
    )


def with_batching(workload: Workload, micro_tokens: int, activation_checkpointing: bool) -> Workload:
    """The same step with another micro-batch and checkpointing, which change memory and time but not the result."""
    return replace(workload, micro_tokens=micro_tokens, activation_checkpointing=activation_checkpointing)
