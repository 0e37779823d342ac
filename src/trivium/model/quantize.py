"""NF4: the seven projections of every layer in 4 bits, everything else in the compute dtype (QLoRA's base).

The packing is bitsandbytes'; the products are plain ones with the weight unpacked for as long as they take, so what
comes out does not depend on which fused kernels a machine has. The packed weights are a pure function of the model
folder: no checkpoint needs them. They are never trained, and never written. `engine` and `use` import this file;
it imports torch, and bitsandbytes where it quantizes.

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
PIECE_VALUES = 1 << 17  # packed at a time; bitsandbytes' CPU path needs some twenty bytes for each
# On some CPUs it warns, when it is imported, of a missing kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class NF4Linear(nn.Linear):
    """A frozen projection in NF4 with double quantization: 4.127 bits a weight. PEFT adapts it as any linear layer.

    weight: (out, in), quantized from fp32. bias: kept as it is. compute_dtype: what `weight` unpacks to.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # a linear layer without the weight that its own constructor makes
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        packed, self.state = _quantize(weight, compute_dtype)
        self.packed: Tensor
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The unpacked weight in the compute dtype, (out, in), made anew each time."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state).view(self.out_features, self.in_features)

    @property
    def num_bytes(self) -> int:
        """What the packed weight and its two levels of scales take."""
        state = self.state
        parts = (self.packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        return sum(part.numel() * part.element_size() for part in parts)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenProduct.apply(input, self)

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """Move the scales along with what they belong to."""
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
    """Packed values and their bitsandbytes QuantState: what `quantize_4bit` gives, a piece at a time to save memory.

    The state says that the weight is one long row: bitsandbytes' CPU path unpacks rows that are no whole number of
    blocks with each other's scales.
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
            "NF4 needs bitsandbytes, which is not installed. Install it with `pip install 'trivium[gpu]'`, or use the "
            "unquantized weights (weights: pretrained), which take four times the memory."
        )


def quantize_projections(network: nn.Module, compute_dtype: torch.dtype) -> None:
    """Put every linear layer of a loaded transformers model but its head in NF4, as `load_quantized` would have.

    Raises: ConfigError without bitsandbytes.
    """
    require_bitsandbytes()
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            network.set_submodule(path, NF4Linear(module.weight.detach().float(), module.bias, compute_dtype))


def load_quantized(model: Qwen, folder: Path, compute_dtype: torch.dtype, device: torch.device | str) -> Qwen:
    """Fill a model that is on the meta device from a folder: projections in NF4, the rest in the compute dtype.

    One matrix at a time is in memory in full. All of it is frozen; returns the model given.

    Raises: ConfigError as `hf.find_tensors`, and without bitsandbytes, before anything is read.
    """
    require_bitsandbytes()
    files = hf.find_tensors(model, folder)

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
    """What the model's weights take in memory, packed or not."""
    packed = sum(module.num_bytes for module in model.modules() if isinstance(module, NF4Linear))
    return packed + sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
