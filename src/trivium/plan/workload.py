"""What is computed and stored in one optimizer step, as numbers: the input of every prediction.

A run file is reduced to these numbers by `of_run`; the planner's search varies them and writes a run file again. Also
the facts of the data that the planner uses, exact counts of trained, frozen and quantized parameters, and the sizes in
which the engine computes its loss. Reads no file and never imports torch.
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
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # values that share a scale of one byte, scales that share an fp32 scale

TYPICAL_TOKENS: dict[DataKind, int] = {"conversations": 400, "documents": 1000}
"""Assumed mean length of a record: a question with an answer of one page, and one or two pages of text."""


@dataclass(frozen=True)
class DataFacts:
    """The data in numbers, measured from files (`data/look/survey.py`) or given (`given_facts`).

    Attributes:
        num_rows: documents or conversations.
        num_tokens: tokens of one pass over them.
        kind: what a record is.
        mean_tokens: mean length of a record in tokens.
        supervised_share: share of the tokens that are supervised when only answers are.
        reasoning_share: share of the conversations that show reasoning.
        is_measured: whether the tokens were counted with the model's tokenizer, rather than estimated or given.
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
    """Facts from numbers; of records, tokens and mean length the missing ones are computed from the others.

    Raises: ConfigError when neither records nor tokens are given, or a number is not above zero.
    """
    given = {"number of records": num_rows, "number of tokens": num_tokens, "mean tokens of a record": mean_tokens}
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
    )


@dataclass(frozen=True)
class Workload:
    """One optimizer step on every device.

    Attributes:
        shape: the network, with its final vocabulary size.
        weights: what the weights start as; `nf4` ones stay quantized.
        adapter: the adapter's settings; None trains everything.
        state_dtype: how AdamW's moments are kept, see `config.Optimizer`.
        seq_len: tokens of a packed sequence.
        micro_tokens: tokens of one forward and backward on one device, a multiple of `seq_len`.
        step_tokens: tokens of an optimizer step over all devices.
        activation_checkpointing: whether the activations of a layer are computed again in the backward.
        compute_dtype: type of the matrix products.
        device_type: attention and softmax run differently on a CPU and on a GPU.
        num_devices, strategy, offload: see `config.Parallel`; one device ignores the strategy.
        supervised_share: share of the tokens that are supervised.
        document_tokens: mean length of what attention spans, at most `seq_len`; None for whole sequences.
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
        """Weights that are not trained: quantized matrices with their scales, the rest in the compute dtype."""
        if self.adapter is None:
            return 0
        if self.weights != "nf4":
            return self.shape.num_params * self.dtype_bytes
        layers = self.shape.num_hidden_layers
        packed = sum(matrix.copies * nf4_bytes(matrix.num_values) for matrix in self.shape.layer_matrices())
        unpacked = self.shape.num_params - layers * self.shape.num_layer_matmul_params
        return layers * packed + unpacked * self.dtype_bytes


def num_adapter_params(shape: QwenShape, adapter: Adapter) -> int:
    """Values of A and B of every adapted matrix, and of DoRA's magnitudes."""
    per_layer = 0
    for matrix in shape.layer_matrices():
        if matrix.name in adapter.targets:
            of_one = adapter.rank * (matrix.out_features + matrix.in_features)
            per_layer += matrix.copies * (of_one + (matrix.out_features if adapter.dora else 0))
    return shape.num_hidden_layers * per_layer


def nf4_bytes(num_values: int) -> int:
    """A quantized matrix: half a byte a value, a byte for each 64, 4 bytes for each 256 of those, and the tables.

    Source: Dettmers et al. 2023, arXiv:2305.14314 (double quantization); bitsandbytes' QuantState.
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
    return sum(count * _moment_bytes_8bit(size, is_embedding) for size, count, is_embedding in _trained_tensors(w))


def _moment_bytes_8bit(num_values: int, is_embedding: bool) -> int:
    if is_embedding or num_values < MIN_8BIT_VALUES:
        return 2 * FP32_BYTES * num_values
    return 2 * (num_values + FP32_BYTES * math.ceil(num_values / MOMENT_BLOCK))


def _trained_tensors(w: Workload) -> Iterator[tuple[int, int, bool]]:
    """Values of each trained tensor, how many such tensors there are, and whether it is an embedding."""
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
    """The step of a run file; without facts of the data, full sequences in which every token is supervised."""
    return Workload(
        shape=shape,
        weights=run.weights,
        adapter=run.adapter,
        state_dtype=run.optimizer.state_dtype,
        seq_len=run.data.seq_len,
        micro_tokens=run.sequences_per_micro_batch * run.data.seq_len,
        step_tokens=run.batch.tokens,
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
    """The same step with another micro-batch: changes memory and time, never what is learned."""
    return replace(workload, micro_tokens=micro_tokens, activation_checkpointing=activation_checkpointing)
