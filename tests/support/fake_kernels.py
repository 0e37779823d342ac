"""Replacements for kernels that `trace.py` cannot run: they allocate and save the same tensors without computing.

These are the GPU's fused kernels (attention, normalization, dropout), NF4 weights and 8-bit moments. Large buffers
inside other kernels are counted too: casts of operands on a CPU, sums of an embedding's gradient on a GPU. Not counted
are workspaces of matrix products and sorts, partial sums of the norm, and dequantized 8-bit moments on a CPU: a few MiB
each, or long after the peak.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from trivium.engine import optim
from trivium.model import head, qwen
from trivium.model.quantize import BLOCK_SIZE, NF4Linear
from trivium.model.qwen import Documents, Linear, attend
from trivium.plan.workload import DeviceType

FP32_STATE_VALUES = 4096  # bitsandbytes keeps moments of smaller tensors in fp32
PAGED_VALUES = 100_000  # and pages moments of tensors from this size
ONE_PASS_TOKENS, ROWS_PER_SUM = 3072, 10  # embedding gradient on a GPU
FLASH_ROWS = 128  # extra rows of flash attention's buffers per document


@contextmanager
def fake_kernels(device_type: DeviceType) -> Iterator[None]:
    """Patch the engine to allocate the tensors of a CPU or a GPU."""
    replacements: list[tuple[Any, str, Any]] = [(optim, "eight_bit_adamw", FakeAdamW8bit)]
    if device_type == "gpu":
        replacements += [
            (qwen, "attend", _attend),
            (F, "rms_norm", _rms_norm),
            (F, "dropout", _dropout),
            (head, "CPU_SLICE_VALUES", sys.maxsize),  # on a GPU the softmax processes a whole chunk
        ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def _attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Flash attention in 16 bits; in fp32 the math backend for grouped heads."""
    if q_TNH.dtype != torch.float32:
        return _FlashAttention.apply(q_TNH, k_TKH, v_TKH, documents.cu_seqlens.numel() - 1)
    backend = SDPBackend.FLASH_ATTENTION if q_TNH.shape[1] == k_TKH.shape[1] else SDPBackend.MATH
    with sdpa_kernel(backend):
        return attend(q_TNH, k_TKH, v_TKH, documents)


class _FlashAttention(torch.autograd.Function):
    """Tensors saved by torch.nn.attention.varlen, and buffers of its backward.

    Source: FlashAttention 2, arXiv:2307.08691, `mha_varlen_bwd` of its CUDA interface.
    """

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, num_documents: int) -> Tensor:
        out = torch.empty_like(q_TNH)
        log_sums_NT = q_TNH.new_empty(q_TNH.shape[1], q_TNH.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out, log_sums_NT)
        ctx.num_documents = num_documents
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, _, _ = ctx.saved_tensors
        num_tokens, num_heads, head_dim = q_TNH.shape
        grad_out = grad_out.contiguous()
        gradients = [torch.empty_like(x) for x in (q_TNH, k_TKH, v_TKH)]
        num_rows = num_tokens + FLASH_ROWS * ctx.num_documents
        scratch = [
            q_TNH.new_empty(num_heads, num_rows, dtype=torch.float32),
            q_TNH.new_empty(num_rows, num_heads, 32 * math.ceil(head_dim / 32), dtype=torch.float32),
        ]
        if num_heads != k_TKH.shape[1]:
            scratch += [torch.empty_like(q_TNH), torch.empty_like(q_TNH)]  # gradients of keys and values per query head
        del scratch
        return *gradients, None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """A fused kernel that saves its input and one fp32 value per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return torch.empty_like(x) if needs_x else None, torch.empty_like(weight) if needs_weight else None


def _dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """A fused kernel that saves a mask of one byte per value."""
    return torch.native_dropout(x, p, training)[0]


def scratch_of_a_cpu(operator: Any, operands: Sequence[Any]) -> int:
    """Bytes of the casts of an elementwise kernel's operands to the widest floating-point dtype."""
    if torch.Tag.pointwise not in operator.tags:
        return 0
    tensors = [x for x in operands if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    widest = max((x.itemsize for x in tensors), default=0)
    return sum(x.numel() * widest for x in tensors if x.itemsize < widest)


def scratch_of_a_gpu(operator: Any, operands: Sequence[Any]) -> int:
    """Bytes of the fp32 partial sums of an embedding's gradient, for more than a few tokens.

    Source: `embedding_dense_backward_cuda` in PyTorch, which sums at most ten rows at a time.
    """
    if operator is not torch.ops.aten.embedding_dense_backward.default:
        return 0
    grad, tokens, num_rows = operands[:3]
    num_tokens = tokens.numel()
    if num_tokens <= ONE_PASS_TOKENS:
        return 0
    return 4 * grad.shape[-1] * (num_tokens // ROWS_PER_SUM + min(num_tokens, num_rows))


class FakeNF4Linear(NF4Linear):
    """An NF4 projection with empty buffers; reading `weight` allocates it, as dequantization does."""

    def __init__(self, layer: Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", layer.bias)
        num_scales = math.ceil(layer.weight.numel() / BLOCK_SIZE)
        sizes = {
            "packed": (math.ceil(layer.weight.numel() / 2), torch.uint8),
            "scales": (num_scales, torch.uint8),
            "scales_of_scales": (math.ceil(num_scales / 256), torch.float32),
            "tables": (16 + 256 + 1, torch.float32),
        }
        for name, (num_values, dtype) in sizes.items():
            self.register_buffer(name, layer.weight.new_empty(num_values, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The fp32 scales are dequantized first, and freed with the weight."""
        scales = torch.empty(math.ceil(self.in_features * self.out_features / BLOCK_SIZE))
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype)
        del scales
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> "FakeNF4Linear":
        nn.Module._apply(self, fn, recurse)
        return self


class FakeAdamW8bit(torch.optim.Optimizer):
    """The moments of bitsandbytes' AdamW: one byte per value and an fp32 scale per 256 values; `step` does nothing.

    Small tensors and embeddings have fp32 moments. Paged moments are outside the allocator and not counted.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], numbers: dict[str, Any], is_paged: bool) -> None:
        super().__init__(groups, numbers)
        self.is_paged = is_paged
        self.wide = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def init_state(self, group: dict[str, Any], parameter: Tensor, group_index: int, index: int) -> None:
        """Allocate the two moments of a parameter."""
        state, num_values = self.state[parameter], parameter.numel()
        is_wide = id(parameter) in self.wide or num_values < FP32_STATE_VALUES
        state["step"] = 0
        for moment in ("1", "2"):
            if not (self.is_paged and num_values >= PAGED_VALUES):
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.float32 if is_wide else torch.uint8)
            if not is_wide:
                state[f"absmax{moment}"] = parameter.new_zeros(math.ceil(num_values / 256))

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """In place; allocates nothing."""
