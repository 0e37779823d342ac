"""What one device computes in an optimizer step: FLOPs, bytes, operations, by what they are for.

Follows the engine operation by operation: products of the blocks, attention inside documents, the head over supervised
tokens, what only moves bytes, the optimizer. Knows no device and no seconds; `speed` and `engine/calibrate.py` give
them. Never imports torch.

Source of the counts: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; Dao 2023, arXiv:2307.08691 (attention).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from trivium.plan.workload import FP32_BYTES, Workload, projections

Kind = Literal[
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
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of work by their units. FLOPs of the blocks' products, the head's and attention's own; scores of attention and
logits of the head, each normalised and differentiated; bytes of activations and of weights, gradients and moments that
are read or written; packed weights unpacked; operations begun."""

# Of one layer, as the engine begins them: forward, backward, of each adapted projection, of each document on a CPU.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS, ADAPTER_OPERATIONS, DOCUMENT_OPERATIONS = 100, 160, 22, 21
# Element-wise operations in passes over a tensor, one for each read and one for each write: forward, and backward.
ROPE_PASSES, SWIGLU_PASSES, RESIDUAL_PASSES = (9, 12), (5, 9), (6, 15)
NORM_PASSES = {"cpu": (10, 20), "gpu": (2, 4)}  # a CPU has no kernel of its own for it
ATTENTION_PASSES = {"cpu": (3, 3), "gpu": (0, 0)}  # to fp32 and back, and documents joined
ADAPTER_PASSES = ((6, 1), (3, 5))  # over the outputs and the inputs of what is adapted
HEAD_CHUNK_BYTES = 1 << 28  # as `engine/loss.py` cuts the logits of a trained head
CLIP_BYTES = 12  # the norm reads a gradient, the scale reads and writes it
STEP_BYTES = {"fp32": 28, "8bit": 16, "paged-8bit": 16}  # weight, gradient and moments, read and but one written
# Queries that a CPU takes together, by the least length of a document: their scores are all computed, masked or not.
CPU_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))


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
    return share * workload.num_trained_params * (CLIP_BYTES + STEP_BYTES[workload.state_dtype])


def _micro_batch_work(workload: Workload) -> Iterator[Term]:
    shape, tokens = workload.shape, workload.micro_tokens
    layers, supervised = shape.num_hidden_layers, tokens * workload.supervised_share
    yield Term("projections", "flops", projection_flops(workload))
    yield Term("adapter", "flops", adapter_flops(workload))
    yield Term("attention", "attention_flops", attention_flops(workload) * _masked_share(workload))
    scores = layers * shape.num_attention_heads * tokens * _document_tokens(workload) / 2
    yield Term("attention", "attention_scores", (2 + workload.recompute) * scores * _masked_share(workload))
    yield Term("head", "head_flops", head_flops(workload))
    yield Term("head", "logits", supervised * shape.vocab_size)
    yield Term("element-wise", "bytes", layers * _layer_bytes(workload))
    yield Term("weights", "weight_bytes", _weight_bytes(workload))
    if workload.weights == "nf4":
        values = layers * shape.num_layer_matmul_params
        yield Term("unpacking", "nf4_values", (2 + workload.recompute) * values)
    yield Term("launches", "operations", layers * _layer_operations(workload))


def projection_flops(workload: Workload) -> float:
    """Of the blocks' projections in a micro-batch: 2 a parameter and token, forward, again, and for each gradient.

    Frozen weights get no gradient, and below the first layer's there is nothing that one would go to. What a layer ends
    with is not computed again: its result is needed by no gradient.
    """
    shape, adapter = workload.shape, workload.adapter
    params = shape.num_hidden_layers * shape.num_layer_matmul_params
    passes = params * (2 if adapter else 3)
    if workload.recompute:
        is_last = adapter is None or "down_proj" not in adapter.targets
        last = shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size
        passes += params - (last if is_last else 0)
    if adapter is not None and not workload.num_token_rows:
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        passes -= shape.hidden_size * heads * shape.head_dim
    return 2.0 * passes * workload.micro_tokens


def adapter_flops(workload: Workload) -> float:
    """Of A and B in a micro-batch: forward, again, and two gradients; DoRA multiplies them with each other too."""
    adapter, sides = workload.adapter, projections(workload.shape)
    if adapter is None:
        return 0.0
    targets, layers, again = set(adapter.targets), workload.shape.num_hidden_layers, 1 + workload.recompute
    passes = sum(sum(sides[target]) for target in targets) * (3 + workload.recompute) * layers
    if workload.recompute and "down_proj" in targets and not adapter.dora:
        passes -= layers * workload.shape.hidden_size  # B of what a layer ends with
    if not workload.num_token_rows:
        passes -= len(targets & {"q_proj", "k_proj", "v_proj"}) * workload.shape.hidden_size
    flops = 2.0 * adapter.rank * passes * workload.micro_tokens
    if adapter.dora:
        flops += 2.0 * adapter.rank * layers * again * sum(sides[target][0] * sides[target][1] for target in targets)
    return flops


def attention_flops(workload: Workload) -> float:
    """Of causal attention inside documents in a micro-batch: 2 products forward, 5 backward, 2 again.

    A product costs 2 * heads * head_dim a pair of tokens, and a document of n tokens has about n * n / 2 pairs.
    """
    shape = workload.shape
    width = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return (7.0 + 2 * workload.recompute) * width * _document_tokens(workload) * workload.micro_tokens


def _document_tokens(workload: Workload) -> float:
    return workload.document_tokens or workload.seq_len


def _masked_share(workload: Workload) -> float:
    """Scores that are computed over those that count: a CPU's blocks of queries reach past the diagonal."""
    length = _document_tokens(workload)
    block = next(block for least, block in CPU_QUERY_BLOCKS if length >= least)
    return 1.0 + block / length if workload.place == "cpu" else 1.0


def head_flops(workload: Workload) -> float:
    """Of the head and its gradients in a micro-batch, over supervised tokens only; never computed again."""
    tokens = workload.micro_tokens * workload.supervised_share
    return (6.0 if workload.adapter is None else 4.0) * tokens * workload.shape.vocab_size * workload.shape.hidden_size


def _layer_bytes(workload: Workload) -> float:
    """Bytes of activations that one layer reads and writes in a micro-batch, whatever it computes with them."""
    shape, adapter = workload.shape, workload.adapter
    sides = projections(shape)
    query, key_value = sides["q_proj"][0], sides["k_proj"][0]
    products = sum(rows + columns for rows, columns in sides.values())
    adapted = [sides[target] for target in set(adapter.targets)] if adapter else []
    normed = 2 * shape.hidden_size + (query + key_value if shape.qk_norm else 0)
    passes = [0.0, 0.0]
    for way in (0, 1):
        passes[way] += NORM_PASSES[workload.place][way] * normed
        passes[way] += ROPE_PASSES[way] * (query + key_value)
        passes[way] += ATTENTION_PASSES[workload.place][way] * 2 * (query + key_value)
        passes[way] += SWIGLU_PASSES[way] * shape.intermediate_size
        passes[way] += RESIDUAL_PASSES[way] * shape.hidden_size
        passes[way] += products * (2 if way and adapter is None else 1)
        of_outputs, of_inputs = ADAPTER_PASSES[way]
        passes[way] += sum(of_outputs * rows + of_inputs * columns for rows, columns in adapted)
    forward, backward = passes
    return workload.micro_tokens * workload.dtype_bytes * ((1 + workload.recompute) * forward + backward)


def _weight_bytes(workload: Workload) -> float:
    """Bytes that a micro-batch moves for each weight, whatever its tokens: casts, gradients widened, summed, joined."""
    shape, width, passes = workload.shape, workload.dtype_bytes, 2 + workload.recompute
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
    """Chunks of the logits of a trained head, each of which adds to the gradient of all of it."""
    rows = max(64, HEAD_CHUNK_BYTES // (workload.shape.vocab_size * workload.dtype_bytes))
    return math.ceil(workload.micro_tokens * workload.supervised_share / rows)


def _layer_operations(workload: Workload) -> float:
    """Operations of one layer in a micro-batch; a GPU takes all documents at once."""
    targets = len(set(workload.adapter.targets)) if workload.adapter else 0
    forward = FORWARD_OPERATIONS + ADAPTER_OPERATIONS / 3 * targets
    backward = BACKWARD_OPERATIONS + ADAPTER_OPERATIONS * 2 / 3 * targets
    documents = workload.micro_tokens / _document_tokens(workload) if workload.place == "cpu" else 0.0
    again = 1 + workload.recompute
    return again * forward + backward + (again + 2) / 3 * DOCUMENT_OPERATIONS * documents
