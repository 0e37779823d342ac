"""NF4 base models for QLoRA: projections in 4 bits, everything else in the compute dtype.

bitsandbytes packs the weights. Each product unpacks its weight and is a plain matrix product, so results do not depend
on the fused kernels of a machine. Packed weights are frozen and derived from the model folder, so they are never saved.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trivium.errors import ConfigError
from trivium.model import hf
from trivium.model.qwen import Linear, Qwen

BLOCK_SIZE = 64
PIECE_VALUES = 1 << 17  # values packed at a time; bitsandbytes' CPU code needs about twenty bytes for each
# On some CPUs bitsandbytes warns about a missing kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class NF4Linear(nn.Linear):
    """A frozen projection in NF4 with double quantization, 4.127 bits per weight; PEFT adapts it like nn.Linear.

    weight: fp32 (out, in), to be quantized. bias: not quantized. compute_dtype: dtype of the unpacked weight.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's constructor would allocate a full weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        packed, self.state = _quantize(weight, compute_dtype)
        self.packed: Tensor
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The weight in the compute dtype, (out, in), unpacked on each access."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state).view(self.out_features, self.in_features)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and its two levels of scales."""
        state = self.state
        parts = (self.packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        return sum(part.numel() * part.element_size() for part in parts)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenProduct.apply(input, self)

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """Move the scales with the packed weight."""
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """input @ weight.T + bias, with a gradient for the input only; backward unpacks the weight again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return grad_output @ ctx.layer.weight, None


def _quantize(weight: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Packed values and QuantState as from bitsandbytes' `quantize_4bit`, computed in pieces to save memory.

    The state describes the weight as a single row: bitsandbytes' CPU code applies wrong scales to rows that are not a
    multiple of the block size.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    pieces = [
        quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type="nf4") for piece in weight.flatten().split(PIECE_VALUES)
    ]
    absmax = torch.cat([state.absmax for _, state in pieces])
    offset = absmax.mean()
    quantized_absmax, state2 = quantize_blockwise(absmax - offset, blocksize=256)
    state = QuantState(
        absmax=quantized_absmax,
        shape=torch.Size([weight.numel()]),
        code=get_4bit_type("nf4", device=weight.device),
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=compute_dtype,
        offset=offset,
        state2=state2,
    )
    return torch.cat([packed for packed, _ in pieces]), state


def require_bitsandbytes() -> None:
    """Raises: ConfigError when it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "NF4 needs bitsandbytes, which is not installed. Install it with `pip install 'trivium[gpu]'`, or use "
            "unquantized weights (weights: pretrained), which need four times the memory."
        )


def quantize_projections(network: nn.Module, compute_dtype: torch.dtype) -> None:
    """Quantize the linear layers of a transformers model, except its head, like `load_quantized`.

    Raises: ConfigError without bitsandbytes.
    """
    require_bitsandbytes()
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            network.set_submodule(path, NF4Linear(module.weight.detach().float(), module.bias, compute_dtype))


def load_quantized(model: Qwen, folder: Path, compute_dtype: torch.dtype, device: torch.device | str) -> Qwen:
    """Load a model on the meta device, frozen, with projections in NF4 and the rest in the compute dtype; return it.

    Only one matrix at a time is in memory unquantized.

    Raises: ConfigError as `hf.find_tensors`, and without bitsandbytes.
    """
    require_bitsandbytes()
    files = hf.find_tensors(model.shape, folder)

    def read(name: str, parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        hf.read_tensor(files[name], name, value)
        return nn.Parameter(value, requires_grad=False)

    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and path != "lm_head":
            bias = None if module.bias is None else read(f"{path}.bias", module.bias, compute_dtype)
            weight = read(f"{path}.weight", module.weight, torch.float32)
            model.set_submodule(path, NF4Linear(weight, bias, compute_dtype))
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, read(f"{path}.{name}", parameter, compute_dtype))
    model.compute_dtype = compute_dtype
    return model


def quantized_bytes(model: Qwen) -> int:
    """Bytes of the model's weights, packed and unpacked."""
    packed = sum(module.num_bytes for module in model.modules() if isinstance(module, NF4Linear))
    return packed + sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
