"""The device of a run: its compute dtype, peak FLOP/s and memory.

Speed is measured, not looked up: on a CPU without bf16 instructions bf16 is tens of times slower than fp32.
"""

import ctypes
import errno
import re
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trivium.errors import ConfigError, count_of
from trivium.plan import devices
from trivium.plan.workload import ComputeDtype, DeviceType

PROBE_ROWS, PROBE_WIDTH = 512, 768
BYTES_OF_UNIT = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ASKED_MEMORY = re.compile(r"[Tt]ried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
OUT_OF_MEMORY = ("t allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""Parts of RuntimeError messages that mean out of memory: CPU allocators, GPU drivers, CUDA libraries."""
M_MMAP_THRESHOLD, RETURNED_BLOCK_BYTES = -3, 1 << 20
LOOSE_FACTOR = 2.5  # upper bound of resident over allocated memory when the C library keeps freed blocks
RESET_PEAK_RESIDENT = "5"
"""Resets the peak resident memory of a process on Linux. Source: proc_pid_clear_refs(5)."""


@dataclass(frozen=True)
class Machine:
    """The device a run computes on.

    Attributes:
        device: the torch device.
        compute_dtype: dtype of matrix products, fp32 or bf16.
        peak_flops: measured FLOP/s of a large matrix product in that dtype; the denominator of MFU.
        memory_bytes: total memory of the device.
    """

    device: torch.device
    compute_dtype: torch.dtype
    peak_flops: float
    memory_bytes: int

    @property
    def precision(self) -> ComputeDtype:
        """The compute dtype in the words of run files."""
        return "bf16" if self.compute_dtype == torch.bfloat16 else "fp32"

    def with_precision(self, precision: ComputeDtype) -> "Machine":
        """The machine with another compute dtype."""
        return replace(self, compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    @property
    def device_type(self) -> DeviceType:
        """Selects between the CPU and the GPU code paths of attention and softmax."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    @property
    def as_planned(self) -> devices.Device:
        """The planner's specification of this device."""
        if self.device.type == "cpu":
            found = devices.processor()
        elif self.device.type == "cuda":
            found = devices.identify(torch.cuda.get_device_name(self.device), self.memory_bytes)
        else:
            found = devices.this_machine()
        return replace(found, memory_bytes=self.memory_bytes)


def choose_device(name: str) -> torch.device:
    """The torch device of a name; `auto` prefers the accelerator.

    Raises: ConfigError when the device is unknown or not available.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda, mps or xpu.") from None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        present = f"only {accelerator.type}" if accelerator else "no accelerator"
        raise ConfigError(
            f"device is {name}, but torch finds {present} on this machine. Set device: auto, or install a build of "
            f"torch for {name}."
        )
    return device


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the fastest of repeated matrix products."""
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
    """Find and measure the device; precision `auto` selects bf16 if it is measurably faster than fp32."""
    device = choose_device(device_name)
    is_cpu = device.type == "cpu"
    memory_bytes = devices.host_memory_bytes() if is_cpu else torch.accelerator.get_memory_info(device)[1]
    if precision != "auto":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return Machine(device, dtype, measure_flops(device, dtype), memory_bytes)
    fp32, bf16 = measure_flops(device, torch.float32), measure_flops(device, torch.bfloat16)
    if bf16 > 1.2 * fp32:
        return Machine(device, torch.bfloat16, bf16, memory_bytes)
    return Machine(device, torch.float32, fp32, memory_bytes)


def begin_peak(device: torch.device) -> int:
    """Reset `peak_memory_bytes` (not possible on a CPU outside Linux); returns the bytes in use now."""
    if device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(RESET_PEAK_RESIDENT)
    else:
        torch.accelerator.reset_peak_memory_stats()
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on an accelerator, resident on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated()


def return_freed_blocks() -> None:
    """Make glibc return freed blocks of 1 MiB and more to the system.

    By default it keeps blocks of up to 32 MiB and was seen to hold 2.4 times the allocated memory. Returning them slows
    small steps by up to half, so it is done only for runs that would not fit otherwise.
    Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_BLOCK_BYTES)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, torch or the system means out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def asked_bytes(error: Exception) -> int:
    """The size of the failed allocation in an out-of-memory error; 0 if the message does not say."""
    found = ASKED_MEMORY.search(str(error))
    return int(float(found[1]) * BYTES_OF_UNIT[found[2]]) if found else 0


def describe(device: torch.device) -> str:
    """A name of the device for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {count_of(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
