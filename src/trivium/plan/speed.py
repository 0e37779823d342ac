"""Predict the time of a step: amounts of work by kind, times the seconds per unit of each kind.

The work follows the engine operation by operation: matrix products, attention inside documents, the head over
supervised tokens, memory traffic, the optimizer. Seconds per unit come from a device's data sheet at the efficiencies
below, or from a `Calibration` of this machine. Communication and offload are added. Never imports torch.

Sources: Williams et al. 2009, "Roofline", doi:10.1145/1498765.1498785; for the counts Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, and Dao 2023, arXiv:2307.08691 (attention).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from trivium.model.shape import loss_chunk_rows
from trivium.plan.calibration import Calibration
from trivium.plan.devices import Device
from trivium.plan.workload import FP32_BYTES, Workload

WorkKind = Literal[
    "flops",
    "head_flops",
    "attention_flops",
    "attention_scores",
    "bytes",
    "weight_bytes",
    "logits",
    "nf4_values",
    "operations",
]
KINDS: tuple[WorkKind, ...] = get_args(WorkKind)
"""Kinds of work: FLOPs of the layers, the head and attention; attention scores and logits (softmax and its gradient);
bytes read or written of activations, and of weights, gradients and moments; NF4 values dequantized; operations
launched."""

# Operations launched per layer: forward, backward, per adapted projection, per document on a CPU.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS, ADAPTER_OPERATIONS, DOCUMENT_OPERATIONS = 100, 160, 22, 21
# Reads and writes of a tensor by element-wise operations: forward, backward.
ROPE_PASSES, SWIGLU_PASSES, RESIDUAL_PASSES = (9, 12), (5, 9), (6, 15)
NORM_PASSES = {"cpu": (10, 20), "gpu": (2, 4)}  # a CPU has no fused kernel
ATTENTION_PASSES = {"cpu": (3, 3), "gpu": (0, 0)}  # casts to fp32 and back, and joining documents
ADAPTER_PASSES = ((6, 1), (3, 5))  # over outputs and inputs of adapted projections
CLIP_BYTES = 12  # bytes per parameter: the norm reads a gradient, the scale reads and writes it
STEP_BYTES = {"fp32": 28, "8bit": 16, "paged-8bit": 16}  # bytes per parameter: all read, all but the gradient written
# Block of queries on a CPU, by least document length: the CPU computes all scores of a block, masked or not.
CPU_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))

# Efficiency relative to the peak. Source: traces of A100s, checked in the tests.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.75, 0.6, 0.8
# FlashAttention 2 is not faster on newer GPUs. Source: pytorch/pytorch#142132.
MOST_ATTENTION_FLOPS = 350e12
# CPUs are less efficient, least of all with AMX, whose peak is over ten times that of fp32.
CPU_PRODUCT_SHARE, AMX_SHARE, CPU_ATTENTION_SHARE = 0.6, 0.2, 0.35
LOGIT_BYTES = 20  # written, widened, exponentiated, summed, written back
NF4_VALUE_BYTES = 5  # half a byte read, two written, at half the bandwidth
SECONDS_PER_OPERATION = {"gpu": 6e-6, "apple": 15e-6, "cpu": 10e-6}
# Range of measured over predicted seconds without a calibration, and the least relative error assumed with one.
UNMEASURED_RANGE = {"gpu": (0.75, 1.6), "apple": (0.7, 2.5), "cpu": (0.5, 2.5)}
LEAST_MEASURED_ERROR = 0.25

NODE_DEVICES = 8
NETWORK_BANDWIDTH = 25e9  # bytes per second of a device to other nodes: 200 Gbit/s
HOST_LINK_BANDWIDTH = 25e9  # to the host's memory, over PCIe 4
HOST_MEMORY_BANDWIDTH = 20e9  # of the host's optimizer, for each device
OVERLAP_SHARE = 0.5  # of compute time that can hide communication
# Model FLOPs utilization, without recomputation, of a whole step: the expected maximum, and a bound.
# Published for large models by causal counts: 42-44 % LoRA on an H100 (NeMo AutoModel, docs/performance-summary.mdx),
# 41-48 % Megatron-LM (README) and 30-46 % llm-foundry and torchtitan on H100s, 50-57 % llm-foundry on A100s; 60 % on
# an H100 by llmq (benchmarks/H100x1.md), a trainer of hand-written CUDA.
USUAL_MFU, BEST_MFU = 0.48, 0.6


@dataclass(frozen=True)
class Speed:
    """The predicted time of a step.

    Attributes:
        low, high: bounds of `seconds_per_step`.
        step_tokens: tokens of the step, over all devices.
        items: seconds by category; they add up to `seconds_per_step`.
    """

    seconds_per_step: float
    low: float
    high: float
    step_tokens: int
    items: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.step_tokens / self.seconds_per_step


def predict_speed(workload: Workload, device: Device, calibration: Calibration | None = None) -> Speed:
    """Predict the time of a step on a device.

    A calibration of another device, or without the workload's compute dtype, is ignored. Without one, a GPU is not
    expected to exceed `USUAL_MFU`, whatever the roofline says.
    """
    measured: dict[str, float] = {}
    if calibration and calibration.device == device.name:
        measured = calibration.seconds_per_unit.get(workload.compute_dtype, {})
    rates: dict[str, float] = {**seconds_per_unit(workload, device), **measured}
    items = _seconds(workload, device, rates)
    low, high = UNMEASURED_RANGE[device.kind]
    if calibration and measured:
        high = 1.0 + max(LEAST_MEASURED_ERROR, calibration.error.get(workload.compute_dtype, 0.0))
        low = 1.0 / high
    least = 0.0
    if device.kind != "cpu" and not measured:
        plain = replace(workload, activation_checkpointing=False)
        at_peak = model_flops(plain) / peak_flops(workload, device)
        items["other"] = max(0.0, at_peak / USUAL_MFU - sum(_seconds(plain, device, rates).values()))
        least = at_peak / BEST_MFU
    total = sum(items.values())
    items = {item: seconds for item, seconds in items.items() if seconds > 0.0}
    return Speed(total, max(least, low * total), high * total, workload.step_tokens, items)


def _seconds(workload: Workload, device: Device, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of a step by category, at given seconds per unit of work.

    A GPU computes while the CPU launches operations, so the slower of the two counts; a CPU does both in turn.
    """
    items: dict[str, float] = {}
    for term in step_work(workload):
        items[term.item] = items.get(term.item, 0.0) + term.amount * rates[term.kind]
    if workload.device_type == "gpu":
        items["launches"] = max(0.0, 2 * items["launches"] - sum(items.values()))
    computing = sum(items.values())
    items |= {"communication": max(0.0, communication_seconds(workload, device) - OVERLAP_SHARE * computing)}
    return items | offload_seconds(workload)


def model_flops(workload: Workload) -> float:
    """FLOPs of a step on one device as MFU counts them, see `engine/metrics.py`; without activation checkpointing."""
    of_micro_batch = projection_flops(workload) + head_flops(workload) + attention_flops(workload) * 6 / 7
    return of_micro_batch * workload.num_micro_batches


def peak_flops(workload: Workload, device: Device) -> float:
    """Peak FLOP/s in the compute dtype; without hardware support it runs at half the rate of fp32."""
    return device.flops.get(workload.compute_dtype, device.flops["fp32"] / 2)


def seconds_per_unit(workload: Workload, device: Device) -> dict[WorkKind, float]:
    """Seconds per unit of each kind of work, from the device's data sheet."""
    peak = peak_flops(workload, device)
    second_per_byte = 1.0 / (BANDWIDTH_SHARE * device.bandwidth)
    if device.kind == "cpu":
        is_matrix_unit = peak > 10 * device.flops["fp32"]
        products = (AMX_SHARE if is_matrix_unit else CPU_PRODUCT_SHARE) * peak
        attention = CPU_ATTENTION_SHARE * device.flops["fp32"]
    else:
        products = PRODUCT_SHARE * peak
        attention = min(ATTENTION_SHARE * peak, MOST_ATTENTION_FLOPS)
    return {
        "flops": 1.0 / products,
        "head_flops": 1.0 / products,
        "attention_flops": 1.0 / attention,
        "attention_scores": 0.0,  # included in the efficiency of attention
        "bytes": second_per_byte,
        "weight_bytes": second_per_byte,
        "logits": LOGIT_BYTES * second_per_byte,
        "nf4_values": NF4_VALUE_BYTES * second_per_byte,
        "operations": SECONDS_PER_OPERATION[device.kind],
    }


def communication_seconds(workload: Workload, device: Device) -> float:
    """Seconds of communication in a step, without overlap.

    A ring of W devices sends (W - 1) / W of a tensor for a gather or a scatter, twice that for an all-reduce. Source:
    Rajbhandari et al. 2020, arXiv:1910.02054. Gradients are sent in fp32, weights in the compute dtype.
    """
    devices, trained = workload.num_devices, workload.num_trained_params
    if devices == 1:
        return 0.0
    gradient_bytes, weight_bytes = FP32_BYTES * trained, workload.dtype_bytes * trained
    micro_batches = workload.num_micro_batches
    sent = {
        "ddp": 2 * gradient_bytes,
        "zero2": micro_batches * gradient_bytes + weight_bytes,
        "fsdp2": micro_batches * (2 * (weight_bytes + workload.frozen_bytes) + gradient_bytes),
    }
    sent["zero3"] = sent["fsdp2"]
    bandwidth = device.link_bandwidth if devices <= NODE_DEVICES else min(device.link_bandwidth, NETWORK_BANDWIDTH)
    return sent[workload.strategy] * (devices - 1) / devices / (BANDWIDTH_SHARE * bandwidth)


def offload_seconds(workload: Workload) -> dict[str, float]:
    """Seconds to move gradients to the host, step there, and move weights back; `all` moves weights in every pass."""
    if workload.offload == "none":
        return {}
    trained = workload.num_trained_params / workload.num_devices
    moved = 2 * FP32_BYTES * trained
    if workload.offload == "all":
        weights = workload.dtype_bytes * workload.num_trained_params + workload.frozen_bytes
        moved += (3 if workload.activation_checkpointing else 2) * workload.num_micro_batches * weights
    return {"offload": moved / HOST_LINK_BANDWIDTH + optimizer_bytes(workload) / HOST_MEMORY_BANDWIDTH}


class Term(NamedTuple):
    """An amount of work of one step on one device."""

    item: str
    kind: WorkKind
    amount: float


def step_work(workload: Workload) -> Iterator[Term]:
    """All work of a step on one device, without communication."""
    for term in _micro_batch_work(workload):
        yield Term(term.item, term.kind, term.amount * workload.num_micro_batches)
    if workload.offload == "none":
        yield Term("optimizer", "weight_bytes", optimizer_bytes(workload))


def optimizer_bytes(workload: Workload) -> float:
    """Bytes that gradient clipping and AdamW read and write on one device."""
    is_sharded = workload.num_devices > 1 and workload.strategy != "ddp"
    share = 1 / workload.num_devices if is_sharded else 1.0
    return share * workload.num_trained_params * (CLIP_BYTES + STEP_BYTES[workload.state_dtype])


def _micro_batch_work(workload: Workload) -> Iterator[Term]:
    shape, tokens = workload.shape, workload.micro_tokens
    layers, supervised = shape.num_hidden_layers, tokens * workload.supervised_share
    yield Term("projections", "flops", projection_flops(workload))
    yield Term("adapter", "flops", adapter_flops(workload))
    yield Term("attention", "attention_flops", attention_flops(workload) * _masked_share(workload))
    scores = layers * shape.num_attention_heads * tokens * _document_tokens(workload) / 2
    yield Term(
        "attention", "attention_scores", (2 + workload.activation_checkpointing) * scores * _masked_share(workload)
    )
    yield Term("head", "head_flops", head_flops(workload))
    yield Term("head", "logits", supervised * shape.vocab_size)
    yield Term("element-wise", "bytes", layers * _layer_bytes(workload))
    yield Term("weights", "weight_bytes", _weight_bytes(workload))
    if workload.weights == "nf4":
        values = layers * shape.num_layer_matmul_params
        yield Term("unpacking", "nf4_values", (2 + workload.activation_checkpointing) * values)
    yield Term("launches", "operations", layers * _layer_operations(workload))


def projection_flops(workload: Workload) -> float:
    """FLOPs of the layers' projections in a micro-batch: 2 per parameter and token for each pass.

    The passes are forward, recomputed forward, and each gradient. Frozen weights have no gradient, and the first
    layer's frozen q, k and v need no gradient of their input. Checkpointing does not recompute the last product of a
    layer, because no gradient needs its result.
    """
    shape, adapter = workload.shape, workload.adapter
    params = shape.num_hidden_layers * shape.num_layer_active_params
    passes = params * (2 if adapter else 3)
    if workload.activation_checkpointing:
        is_last = adapter is None or "down_proj" not in adapter.targets
        last = shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size
        passes += params - (last if is_last else 0)
    if adapter is not None and not workload.num_token_rows:
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        passes -= shape.hidden_size * heads * shape.head_dim
    return 2.0 * passes * workload.micro_tokens


def adapter_flops(workload: Workload) -> float:
    """FLOPs of A and B in a micro-batch: forward, recomputed forward, two gradients; DoRA also multiplies A with B."""
    adapter, shape = workload.adapter, workload.shape
    if adapter is None:
        return 0.0
    layers, again = shape.num_hidden_layers, 1 + workload.activation_checkpointing
    adapted = [matrix for matrix in shape.layer_matrices() if matrix.name in adapter.targets]
    sides = sum(matrix.active * (matrix.out_features + matrix.in_features) for matrix in adapted)
    passes = sides * (2 + again) * layers
    if workload.activation_checkpointing and "down_proj" in adapter.targets and not adapter.dora:
        passes -= layers * shape.hidden_size  # B of the last product of a layer
    if not workload.num_token_rows:
        passes -= len({"q_proj", "k_proj", "v_proj"}.intersection(adapter.targets)) * shape.hidden_size
    flops = 2.0 * adapter.rank * passes * workload.micro_tokens
    if adapter.dora:
        values = sum(matrix.active * matrix.num_values for matrix in adapted)
        flops += 2.0 * adapter.rank * layers * again * values
    return flops


def attention_flops(workload: Workload) -> float:
    """FLOPs of causal attention inside documents in a micro-batch: 2 products forward, 5 backward, 2 recomputed.

    A product costs 2 * heads * head_dim per pair of tokens, and a document of n tokens has about n * n / 2 pairs.
    """
    shape = workload.shape
    width = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return (7.0 + 2 * workload.activation_checkpointing) * width * _document_tokens(workload) * workload.micro_tokens


def _document_tokens(workload: Workload) -> float:
    return workload.document_tokens or workload.seq_len


def _masked_share(workload: Workload) -> float:
    """Computed over unmasked scores: a CPU's blocks of queries reach past the diagonal."""
    length = _document_tokens(workload)
    block = next(block for least, block in CPU_QUERY_BLOCKS if length >= least)
    return 1.0 + block / length if workload.device_type == "cpu" else 1.0


def head_flops(workload: Workload) -> float:
    """FLOPs of the head and its gradients in a micro-batch, over supervised tokens; never recomputed."""
    tokens = workload.micro_tokens * workload.supervised_share
    return (6.0 if workload.adapter is None else 4.0) * tokens * workload.shape.vocab_size * workload.shape.hidden_size


def _layer_bytes(workload: Workload) -> float:
    """Bytes of activations that one layer reads and writes in a micro-batch."""
    shape, adapter, matrices = workload.shape, workload.adapter, workload.shape.layer_matrices()
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    products = sum(matrix.active * (matrix.out_features + matrix.in_features) for matrix in matrices)
    adapted = [matrix for matrix in matrices if adapter and matrix.name in adapter.targets]
    normed = 2 * shape.hidden_size + (query + key_value if shape.qk_norm else 0)
    passes = [0.0, 0.0]
    for step in (0, 1):
        passes[step] += NORM_PASSES[workload.device_type][step] * normed
        passes[step] += ROPE_PASSES[step] * (query + key_value)
        passes[step] += ATTENTION_PASSES[workload.device_type][step] * 2 * (query + key_value)
        passes[step] += SWIGLU_PASSES[step] * shape.intermediate_size
        passes[step] += RESIDUAL_PASSES[step] * shape.hidden_size
        passes[step] += products * (2 if step and adapter is None else 1)
        of_outputs, of_inputs = ADAPTER_PASSES[step]
        passes[step] += sum(
            matrix.active * (of_outputs * matrix.out_features + of_inputs * matrix.in_features) for matrix in adapted
        )
    forward, backward = passes
    return workload.micro_tokens * workload.dtype_bytes * ((1 + workload.activation_checkpointing) * forward + backward)


def _weight_bytes(workload: Workload) -> float:
    """Bytes read and written for weights in a micro-batch: casts, and gradients cast to fp32 and accumulated."""
    shape, width, passes = workload.shape, workload.dtype_bytes, 2 + workload.activation_checkpointing
    layers = shape.num_hidden_layers * shape.num_layer_matmul_params
    table = shape.vocab_size * shape.hidden_size
    cast = 0 if width == FP32_BYTES else FP32_BYTES + width
    summed = 3 * FP32_BYTES * (workload.num_micro_batches - 1) / workload.num_micro_batches
    if workload.adapter is not None:
        trained = workload.num_trained_params
        return trained * (FP32_BYTES + passes * cast + summed) + passes * width * layers
    chunks = _head_chunks(workload)
    head = cast + 3 * FP32_BYTES + chunks * (2 * FP32_BYTES + (0 if width == FP32_BYTES else 2 * width))
    looked_up = FP32_BYTES + (3 * FP32_BYTES if shape.tie_word_embeddings else 0)
    of_layers = passes * cast + (FP32_BYTES if width == FP32_BYTES else 0) + summed
    return layers * of_layers + table * (head + looked_up) + shape.num_embedding_params * summed


def _head_chunks(workload: Workload) -> int:
    """Chunks of logits of a trained head; each adds to the whole gradient of the head."""
    rows = loss_chunk_rows(workload.shape.vocab_size, workload.dtype_bytes, is_trained=True)
    return math.ceil(workload.micro_tokens * workload.supervised_share / rows)


def _layer_operations(workload: Workload) -> float:
    """Operations launched by one layer in a micro-batch; a GPU processes all documents at once."""
    targets = len(set(workload.adapter.targets)) if workload.adapter else 0
    forward = FORWARD_OPERATIONS + ADAPTER_OPERATIONS / 3 * targets
    backward = BACKWARD_OPERATIONS + ADAPTER_OPERATIONS * 2 / 3 * targets
    documents = workload.micro_tokens / _document_tokens(workload) if workload.device_type == "cpu" else 0.0
    again = 1 + workload.activation_checkpointing
    return again * forward + backward + (again + 2) / 3 * DOCUMENT_OPERATIONS * documents
