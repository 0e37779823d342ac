"""Predict the peak memory of an optimizer step on each device, by category, with closed formulas.

The formulas follow the engine tensor by tensor: saved activations, logits, temporary backward buffers. The peak
is the largest of six instants. `tests/plan/test_trace.py` compares them with a run on fake tensors, and
`bench/memory.py` with the allocator. Sharding over several devices follows the papers below and is not measured. Never
imports torch.

Shapes: T tokens of a micro-batch, M of them supervised, D hidden, F feed-forward, V vocabulary.

Sources: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023, arXiv:2304.11277 (FSDP); Li et al. 2020,
arXiv:2006.15704 (DDP).
"""

from dataclasses import dataclass

from trivium.data.batch.sizes import SUPERVISED_MULTIPLE
from trivium.files import MIB
from trivium.model.shape import CPU_SLICE_VALUES, loss_chunk_rows
from trivium.plan.workload import FP32_BYTES as FP32
from trivium.plan.workload import DeviceType, Workload, moment_bytes

# Memory of a process before it allocates a tensor: on a GPU the context, kernels and workspace (published figures are
# 0.3 to 1 GB), on a CPU the libraries (measured).
FRAMEWORK_BYTES = {"cpu": 480 * MIB, "gpu": 900 * MIB}
# Memory an allocator may reserve beyond what is allocated. GPU: 1.002 to 1.126 times the allocated memory in replays,
# most of which it frees before it fails. CPU, with freed blocks returned to the system: bench/limits.py.
GPU_SLACK_SHARE = 0.06
CPU_SLACK_BYTES, CPU_SLACK_SHARE, MOST_CPU_SLACK_BYTES = 128 * MIB, 0.2, 256 * MIB
DDP_BUCKET_BYTES = 25 << 20
ZERO_BUCKET_BYTES = 500_000_000  # half of DeepSpeed's default reduce and gather buckets


@dataclass(frozen=True)
class Memory:
    """The peak on one device.

    Attributes:
        items: bytes by category at the peak; they add up to `total`.
        instant: the part of the step where the peak is.
        framework: bytes outside the allocator: the runtime, its kernels and libraries.
        slack: bytes the allocator may reserve on top: freed memory that it cannot reuse.
    """

    items: dict[str, int]
    instant: str
    framework: int
    slack: int

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """Bytes allocated, without the framework."""
        return self.total - self.framework

    @property
    def high(self) -> int:
        """Upper bound: the peak with the allocator's slack."""
        return self.total + self.slack


@dataclass(frozen=True)
class ShardedMemory:
    """The part of the model on one device: bytes per trained parameter, shares of the rest, communication buffers."""

    weight_bytes: float
    frozen: float
    gradient_bytes: float
    moments: float
    buffer_bytes: float


def sharded_memory(w: Workload) -> ShardedMemory:
    """The part of the model on one device."""
    size, fp32 = w.dtype_bytes, FP32
    on_device = 0.0 if w.offload != "none" or (w.state_dtype == "paged-8bit" and w.device_type == "gpu") else 1.0
    if w.num_devices == 1:
        # Offload keeps fp32 master weights on the host, and weights in the compute dtype on the device.
        weights = fp32 if w.offload == "none" else float(size)
        return ShardedMemory(weights, 1.0, fp32 if w.offload == "none" else float(size), on_device, 0.0)
    part = 1.0 / w.num_devices
    if w.strategy == "ddp":
        return ShardedMemory(fp32, 1.0, fp32, on_device, 2 * DDP_BUCKET_BYTES)
    if w.strategy == "zero2":
        masters = fp32 * part if w.offload == "none" else 0.0
        return ShardedMemory(size + masters, 1.0, size * part, on_device * part, 2 * ZERO_BUCKET_BYTES)
    # FSDP2 and ZeRO-3 gather two layers and the embeddings at a time, and the gradients of one layer.
    shape = w.shape
    trains_all = w.adapter is None
    layer, tables = shape.num_layer_matmul_params, shape.num_embedding_params
    gathered = size * (2 * layer + tables) + (fp32 * layer if trains_all else 0)
    resident = 0.0 if w.offload == "all" else part
    if w.strategy == "zero3":
        masters = fp32 * part if w.offload == "none" else 0.0
        return ShardedMemory(size * resident + masters, resident, size * part, on_device * part, gathered)
    weights = 0.0 if w.offload != "none" else fp32 * part
    return ShardedMemory(weights, resident, fp32 * part, on_device * part, gathered)


def peak_memory(workload: Workload) -> Memory:
    """Predict the peak of one optimizer step."""
    framework = FRAMEWORK_BYTES[workload.device_type]
    found = instants(workload)
    name = max(found, key=lambda name: sum(found[name].values()))
    items = {key: round(size) for key, size in found[name].items() if size >= 1}
    allocated = sum(items.values())
    return Memory({**items, "framework": framework}, name, framework, _slack(workload.device_type, allocated))


def _slack(device_type: DeviceType, allocated: int) -> int:
    if device_type == "gpu":
        return round(GPU_SLACK_SHARE * allocated)
    return CPU_SLACK_BYTES + min(round(CPU_SLACK_SHARE * allocated), MOST_CPU_SLACK_BYTES)


def instants(workload: Workload) -> dict[str, dict[str, float]]:
    """Bytes by category at each instant that can be the peak."""
    w, share = workload, sharded_memory(workload)
    states: dict[str, float] = {
        "weights": 0 if w.adapter else w.num_trained_params * share.weight_bytes,
        "frozen weights": w.frozen_bytes * share.frozen,
        "adapter": w.num_trained_params * share.weight_bytes if w.adapter else 0,
        "moments": moment_bytes(w) * share.moments,
        "communication": share.buffer_bytes,
    }
    stages = {
        "in the loss": _in_loss(w, share),
        "in the final norm's backward": _in_final_norm(w, share),
        "in the last layer's backward": _in_last_layer(w, share),
        "in the first layer's backward": _in_first_layer(w, share),
        "at the embedding's gradient": _at_embedding(w, share),
        "in the optimizer's step": _in_optimizer(w, share),
    }
    return {name: states | items for name, items in stages.items()}


def _in_loss(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """The last chunk of logits, with all activations saved for the backward."""
    vocab, hidden, size, rows = w.shape.vocab_size, w.shape.hidden_size, w.dtype_bytes, num_supervised_rows(w)
    is_trained, is_wide = w.adapter is None, size == FP32
    chunk = min(loss_chunk_rows(vocab, size, is_trained), rows)
    carried = FP32 * chunk * hidden if chunk < rows else 0  # product of the previous chunk
    # The softmax takes a whole chunk on a GPU; on a CPU a slice, with the previous slice still allocated.
    slice_rows = 2 * max(1, CPU_SLICE_VALUES // vocab) if w.device_type == "cpu" else chunk
    softmax = 0 if is_wide else FP32 * vocab * min(slice_rows, chunk)
    hidden_gradient = (FP32 + size + FP32) * chunk * hidden
    head_gradient = 0
    if is_trained and not is_wide:
        # The product in 16 bits, and on a CPU its fp32 copy before it is added.
        product = (size + (FP32 if w.device_type == "cpu" else 0)) * vocab * hidden
        head_gradient = (FP32 + size) * chunk * hidden + product
    final_norm = w.micro_tokens * (_saved_by_norm(w, hidden, 1) + size * hidden)
    return {
        "gradients": _earlier_gradients(w, share) + (vocab * hidden * FP32 if is_trained else 0),
        "activations": _saved_by_layers(w, w.shape.num_hidden_layers) + final_norm + 2 * size * rows * hidden,
        "16-bit copies": _copies_of_layers(w) + (vocab * hidden * size if is_trained and not is_wide else 0),
        "logits": chunk * vocab * size,
        "temporaries": max(carried + softmax, carried + hidden_gradient, head_gradient),
    }


def _in_final_norm(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """All activations are still saved, the logits are freed."""
    per_token = 20 if w.device_type == "cpu" else FP32 + 2 * w.dtype_bytes
    hidden, size = w.shape.hidden_size, w.dtype_bytes
    return {
        "gradients": _earlier_gradients(w, share) + _head_gradient(w),
        "activations": _saved_by_layers(w, w.shape.num_hidden_layers),
        "16-bit copies": _copies_of_layers(w),
        "temporaries": w.micro_tokens * hidden * (per_token + size) + num_supervised_rows(w) * hidden * size,
    }


def _in_last_layer(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """The feed-forward of the last layer; with checkpointing its activations have just been recomputed."""
    recomputed = _saved_by_layer(w) if w.activation_checkpointing else 0
    return {
        "gradients": _earlier_gradients(w, share) + _head_gradient(w),
        "activations": _saved_by_layers(w, w.shape.num_hidden_layers) + recomputed,
        "16-bit copies": _copies_of_layers(w) + (_copies_of_layer(w) if w.activation_checkpointing else 0),
        "temporaries": _feed_forward_temporaries(w),
    }


def _in_first_layer(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """The feed-forward of the first layer, with the gradients of all other layers."""
    shape = w.shape
    to_come = 0.0
    if w.num_micro_batches == 1:
        to_come = FP32 * (shape.num_layer_matmul_params - shape.hidden_size * shape.intermediate_size)
        if not shape.tie_word_embeddings:
            to_come += FP32 * shape.vocab_size * shape.hidden_size
        if w.adapter:
            to_come = FP32 * w.num_trained_params / shape.num_hidden_layers
    gradients = w.num_trained_params * share.gradient_bytes
    pending = _head_gradient(w) if w.num_micro_batches > 1 and shape.tie_word_embeddings else 0
    return {
        "gradients": gradients + pending - to_come * share.gradient_bytes / FP32,
        "activations": _saved_by_layers(w, 1)
        + (_saved_by_layer(w) if w.activation_checkpointing else 0)
        - _unsaved_input(w),
        "16-bit copies": _copies_of_layer(w),
        "temporaries": _feed_forward_temporaries(w),
    }


def _at_embedding(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """The embedding's gradient is a separate tensor, added to the head's if they are tied."""
    table = w.shape.vocab_size * w.shape.hidden_size * FP32 if w.adapter is None else 0
    tables = (1 if w.shape.tie_word_embeddings else 0) + (1 if w.num_micro_batches > 1 else 0)
    return {
        "gradients": w.num_trained_params * share.gradient_bytes + tables * table,
        "temporaries": w.micro_tokens * w.shape.hidden_size * FP32 if w.adapter is None else 0,
    }


def _in_optimizer(w: Workload, share: ShardedMemory) -> dict[str, float]:
    """AdamW needs no buffers; bitsandbytes' on a CPU needs a few of the size of one tensor."""
    slack = 0
    if w.state_dtype != "fp32" and w.device_type == "cpu":
        table = w.shape.vocab_size if w.adapter is None else 0
        slack = 3 * FP32 * w.shape.hidden_size * max(table, w.shape.intermediate_size)
    return {"gradients": w.num_trained_params * share.gradient_bytes, "temporaries": slack}


def num_supervised_rows(w: Workload) -> int:
    """Tokens that the head processes: the supervised tokens of a micro-batch, padded."""
    rows = round(w.supervised_share * w.micro_tokens)
    return -(-rows // SUPERVISED_MULTIPLE) * SUPERVISED_MULTIPLE


def _earlier_gradients(w: Workload, share: ShardedMemory) -> float:
    """Gradients allocated before a backward: those of previous micro-batches."""
    return w.num_trained_params * share.gradient_bytes if w.num_micro_batches > 1 else 0


def _head_gradient(w: Workload) -> float:
    """The head's gradient, allocated in the loss. An untied head adds it to the accumulated gradient at once."""
    if w.adapter is not None or (w.num_micro_batches > 1 and not w.shape.tie_word_embeddings):
        return 0
    return w.shape.vocab_size * w.shape.hidden_size * FP32


def _saved_by_layers(w: Workload, num_layers: int) -> float:
    """Saved activations of the first `num_layers` layers, and the rotary cosines and sines."""
    rotary = w.micro_tokens * w.shape.head_dim * w.dtype_bytes
    if w.activation_checkpointing:
        return num_layers * w.micro_tokens * w.shape.hidden_size * w.dtype_bytes + rotary
    return num_layers * _saved_by_layer(w) - (_unsaved_input(w) if num_layers > 1 else 0) + rotary


def _unsaved_input(w: Workload) -> float:
    """The input of the first norm is not saved if the embedding is frozen."""
    if w.adapter is None or w.num_token_rows or w.activation_checkpointing:
        return 0
    return w.micro_tokens * _saved_by_norm(w, w.shape.hidden_size, 1)


def _saved_by_norm(w: Workload, width: int, num_groups: int) -> float:
    """Bytes per token saved by an RMSNorm: its input; on a CPU in fp32, and normalized too if its weight is trained."""
    if w.device_type == "gpu":
        return w.dtype_bytes * width + FP32 * num_groups
    return FP32 * (width * (2 if w.adapter is None else 1) + num_groups)


def _saved_by_layer(w: Workload) -> float:
    """Bytes saved by a layer in a micro-batch."""
    return w.micro_tokens * (_saved_by_attention(w) + _saved_by_feed_forward(w) + _saved_by_adapter(w))


def _saved_by_attention(w: Workload) -> float:
    """Bytes per token: norms, queries, keys, values, attention output, inputs of trained projections."""
    shape, size, saved = w.shape, w.dtype_bytes, _projections_with_saved_input(w)
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    saved_bytes = _saved_by_norm(w, shape.hidden_size, 1)
    if saved & {"q_proj", "k_proj", "v_proj"}:
        saved_bytes += size * shape.hidden_size
    if shape.qk_norm:
        saved_bytes += _saved_by_norm(w, query, shape.num_attention_heads)
        saved_bytes += _saved_by_norm(w, key_value, shape.num_key_value_heads)
    in_attention = FP32 if w.device_type == "cpu" else size
    saved_bytes += in_attention * (2 * query + 2 * key_value) + FP32 * shape.num_attention_heads
    # A CPU processes documents one by one and joins the results.
    is_copied = w.device_type == "cpu" and (size != FP32 or w.micro_tokens > (w.document_tokens or w.seq_len))
    return saved_bytes + (size * query if is_copied and "o_proj" in saved else 0)


def _saved_by_feed_forward(w: Workload) -> float:
    """Bytes per token: the norm, gate before and after SiLU, up, and their product if down_proj is trained."""
    shape, size, saved = w.shape, w.dtype_bytes, _projections_with_saved_input(w)
    saved_bytes = _saved_by_norm(w, shape.hidden_size, 1) + 3 * size * shape.intermediate_size
    if saved & {"gate_proj", "up_proj"}:
        saved_bytes += size * shape.hidden_size
    return saved_bytes + (size * shape.intermediate_size if "down_proj" in saved else 0)


def _saved_by_adapter(w: Workload) -> float:
    """Bytes per token: outputs of A; DoRA's two outputs; dropout's masks and outputs."""
    if w.adapter is None:
        return 0
    size, saved_bytes = w.dtype_bytes, 0
    mask_bytes = size if w.device_type == "cpu" else 1
    for matrix in w.shape.layer_matrices():
        if matrix.name in w.adapter.targets:
            per_matrix = size * w.adapter.rank
            if w.adapter.dora:
                per_matrix += 2 * size * matrix.out_features
            if w.adapter.dropout:
                per_matrix += (mask_bytes + size) * matrix.in_features
            saved_bytes += matrix.active * per_matrix
    return saved_bytes


def _projections_with_saved_input(w: Workload) -> set[str]:
    """Projections whose input is saved; with dropout, its output is saved instead."""
    if w.adapter is None:
        return {matrix.name for matrix in w.shape.layer_matrices()}
    return set() if w.adapter.dropout else set(w.adapter.targets)


def _copies_of_layer(w: Workload) -> float:
    """16-bit copies of a layer's trained weights, saved with the activations."""
    if w.dtype_bytes == FP32:
        return 0
    if w.adapter is None:
        return w.dtype_bytes * w.shape.num_layer_matmul_params
    return w.dtype_bytes * w.num_trained_params / w.shape.num_hidden_layers


def _copies_of_layers(w: Workload) -> float:
    return 0 if w.activation_checkpointing else w.shape.num_hidden_layers * _copies_of_layer(w)


def _feed_forward_temporaries(w: Workload) -> float:
    """Buffers of a feed-forward's backward.

    The gradient of the residual stream, and the largest of: two gradients of the feed-forward's width, a weight's
    gradient in two dtypes, a dequantized NF4 weight, or DoRA's weight norm.
    """
    size, hidden, wide = w.dtype_bytes, w.shape.hidden_size, w.shape.intermediate_size
    matrix = hidden * wide
    stream = size * hidden * w.micro_tokens
    moment = 2 * size * wide * w.micro_tokens
    if w.adapter is None and size != FP32:
        moment = max(moment, (size + FP32) * matrix, size * wide * w.micro_tokens + size * matrix)
    if w.weights == "nf4":
        moment = max(moment, size * wide * w.micro_tokens + size * matrix)
    if w.adapter and w.adapter.dora:
        moment = max(moment, 3 * FP32 * matrix)
    return stream + moment
