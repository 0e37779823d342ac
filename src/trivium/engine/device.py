"""What the machine is and what it is fast at: device, compute type, peak speed, memory.

Answers are found out by a probe rather than by a list of names, since bf16 on a processor without the
instructions is tens of times slower than fp32. Used by the engine.
"""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from trivium.errors import ConfigError

PROBE_ROWS, PROBE_WIDTH = 512, 768
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What a run computes on.

    Attributes:
        device: where the weights live.
        compute_dtype: type of the matrix products, fp32 or bf16.
        peak_flops: FLOP/s of a large matrix product in that type, measured here; the denominator of MFU.
    """

    device: torch.device
    compute_dtype: torch.dtype
    peak_flops: float


def choose_device(name: str) -> torch.device:
    """The device a run names; `auto` is the accelerator if there is one.

    Raises: ConfigError when the device is unknown or not in this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: found {name!r}; expected auto, cpu, cuda, mps or xpu.") from None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        present = accelerator.type if accelerator else "none"
        raise ConfigError(
            f"device: {name} was asked for and this machine's accelerator is: {present}. "
            "Set device: auto, or install a build of torch for that device."
        )
    return device


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of repeated matrix products, the best of several."""
    left = torch.ones(PROBE_ROWS, PROBE_WIDTH, dtype=dtype, device=device)
    right = torch.ones(PROBE_WIDTH, 4 * PROBE_WIDTH, dtype=dtype, device=device)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * PROBE_ROWS * PROBE_WIDTH * 4 * PROBE_WIDTH / best


def probe(device_name: str, precision: str) -> Machine:
    """Find the device, and under `auto` take bf16 where it is measurably faster than fp32."""
    device = choose_device(device_name)
    if precision != "auto":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return Machine(device, dtype, measure_flops(device, dtype))
    fp32, bf16 = measure_flops(device, torch.float32), measure_flops(device, torch.bfloat16)
    if bf16 > 1.2 * fp32:
        return Machine(device, torch.bfloat16, bf16)
    return Machine(device, torch.float32, fp32)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: the allocator's peak on an accelerator, resident memory on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / GIB
    return torch.accelerator.max_memory_allocated() / GIB


def describe(device: torch.device) -> str:
    """A name for the device that a report can print."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
