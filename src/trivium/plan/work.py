"""What one device computes in an optimizer step: FLOPs, bytes, operations, by what they are for.

Follows the engine operation by operation: products of the blocks, attention inside documents, the head over supervised
tokens, what only moves bytes, the optimizer. Knows no device and no seconds; `speed` and `engine/calibrate.py` give
them. Never imports torch.

Source of the counts: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; Dao 2023, arXiv:2307.08691 (attention).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from trivium.plan.workload import FP32_BYTES, Workload, projections

Kind = Literal["flops", "head_flops", "attention_flops", "bytes", "weight_bytes", "logits", "nf4_values", "operations"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of work, each in its unit: FLOPs, bytes moved, logits normalised, weights unpacked, operations begun."""

# Of one layer, counted in the engine: forward, backward, and for each adapted projection in both.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS, ADAPTER_OPERATIONS = 80, 120, 30
CLIP_BYTES = 12  # the norm reads a gradient, the scale reads and writes it
STEP_BYTES = {
    "fp32": 28,
    "8bit": 16,
    "paged-8bit": 16,
}  # weight, gradient and moments read; all but the gradient written


@dataclass(frozen=True)
class Term:
    """Some work of one step on one device: what it is for, of which kind, and how much."""

    item: str
    kind: Kind
    amount: float


def step_work(workload: Workload) -> Iterator[Term]:
    """All work of a step on one device, but for what devices send each other."""
    for term in _micro_batch_work(workload):
        yield Term(term.item, term.kind, term.amount * workload.num_micro_batches)
    if workload.offload == "none":
        yield Term("optimizer", "weight_bytes", optimizer_bytes(workload))


def optimizer_bytes(workload: Workload) -> float:
    """Bytes that clipping and AdamW move on one device."""
    is_sharded = workload.num_devices > 1 and workload.strategy != "ddp"
    share = 1 / workload.num_devices if is_sharded else 1.0
    return share * workload.num_trained_params * (CLIP_BYTES + STEP_BYTES[workload.states])


def _micro_batch_work(workload: Workload) -> Iterator[Term]:
    tokens, layers = workload.micro_tokens, workload.shape.num_hidden_layers
    yield Term("projections", "flops", projection_flops(workload))
    yield Term("adapter", "flops", adapter_flops(workload))
    yield Term("attention", "attention_flops", attention_flops(workload))
    yield Term("head", "head_flops", head_flops(workload))
    yield Term("head", "logits", tokens * workload.supervised_share * workload.shape.vocab_size)
    forward, backward = _layer_bytes(workload)
    yield Term("element-wise", "bytes", layers * ((1 + workload.recompute) * forward + backward))
    yield Term("weights", "weight_bytes", _weight_bytes(workload))
    if workload.weights == "nf4":
        values = layers * workload.shape.num_layer_matmul_params
        yield Term("unpacking", "nf4_values", (2 + workload.recompute) * values)
    yield Term("launches", "operations", layers * _layer_operations(workload))


def projection_flops(workload: Workload) -> float:
    """Of the blocks' projections in a micro-batch: 2 a parameter and token, forward, again, and for each gradient.

    Frozen weights get no gradient, and below the first layer's there is nothing that one would go to.
    """
    shape, tokens = workload.shape, workload.micro_tokens
    passes = 2 + workload.recompute + (workload.adapter is None)
    flops = 2.0 * tokens * shape.num_hidden_layers * shape.num_layer_matmul_params * passes
    if workload.adapter is not None and not workload.num_token_rows:
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        flops -= 2.0 * tokens * shape.hidden_size * heads * shape.head_dim
    return flops


def adapter_flops(workload: Workload) -> float:
    """Of A and B in a micro-batch: forward, again, and two gradients; DoRA multiplies them with each other too."""
    adapter, sides = workload.adapter, projections(workload.shape)
    if adapter is None:
        return 0.0
    targets, layers, again = set(adapter.targets), workload.shape.num_hidden_layers, 1 + workload.recompute
    per_token = sum(sum(sides[target]) for target in targets) * (3 + workload.recompute) * layers
    if not workload.num_token_rows:
        per_token -= len(targets & {"q_proj", "k_proj", "v_proj"}) * workload.shape.hidden_size
    flops = 2.0 * adapter.rank * per_token * workload.micro_tokens
    if adapter.dora:
        flops += 2.0 * adapter.rank * layers * again * sum(sides[target][0] * sides[target][1] for target in targets)
    return flops


def attention_flops(workload: Workload) -> float:
    """Of causal attention inside documents in a micro-batch: 2 products forward, 5 backward, 2 again.

    A product costs 2 * heads * head_dim a pair of tokens, and a document of n tokens has about n * n / 2 pairs.
    """
    shape = workload.shape
    document_tokens = workload.document_tokens or workload.seq_len
    products = 7 + 2 * workload.recompute
    width = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return products * width * document_tokens * workload.micro_tokens


def head_flops(workload: Workload) -> float:
    """Of the head and its gradients in a micro-batch, over supervised tokens only; never computed again."""
    tokens = workload.micro_tokens * workload.supervised_share
    return (6.0 if workload.adapter is None else 4.0) * tokens * workload.shape.vocab_size * workload.shape.hidden_size


def _layer_bytes(workload: Workload) -> tuple[float, float]:
    """Bytes that one layer's element-wise operations and products read and write, forward and backward."""
    shape, adapter = workload.shape, workload.adapter
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    products = sum(rows + columns for rows, columns in projections(shape).values())
    norms = 10 * hidden + (4 * (query + key_value) if shape.qk_norm else 0)
    forward = norms + 9 * (query + key_value) + 2 * (query + key_value) + 5 * wide + products
    backward = 2 * norms + 6 * hidden + 12 * (query + key_value) + 4 * (query + key_value) + 12 * wide
    backward += products * (2 if adapter is None else 1)
    if adapter is not None:
        outputs = sum(projections(shape)[target][0] for target in set(adapter.targets))
        inputs = sum(projections(shape)[target][1] for target in set(adapter.targets))
        forward += 6 * outputs + inputs
        backward += 3 * outputs + 5 * inputs
    scale = workload.micro_tokens * workload.dtype_bytes
    return scale * forward, scale * backward


def _weight_bytes(workload: Workload) -> float:
    """Bytes that a micro-batch moves for each weight, whatever its tokens: casts, and gradients widened and summed."""
    layers = workload.shape.num_hidden_layers * workload.shape.num_layer_matmul_params
    trained, width = workload.num_trained_params, workload.dtype_bytes
    cast = 0 if width == FP32_BYTES else FP32_BYTES + width
    if workload.adapter is not None:
        return trained * (3 * FP32_BYTES + 2 * cast) + 2 * width * layers
    gradients = trained * (2 * FP32_BYTES + (3 * FP32_BYTES if workload.num_micro_batches > 1 else 0))
    return gradients + (2 + workload.recompute) * (layers * cast)


def _layer_operations(workload: Workload) -> float:
    """Operations of one layer in a micro-batch."""
    targets = len(set(workload.adapter.targets)) if workload.adapter else 0
    forward = (1 + workload.recompute) * (FORWARD_OPERATIONS + ADAPTER_OPERATIONS // 3 * targets)
    return forward + BACKWARD_OPERATIONS + ADAPTER_OPERATIONS * 2 // 3 * targets
