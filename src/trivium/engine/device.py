"""What the machine is and what it is fast at: device, compute type, peak speed, memory.

Answers are found out by a probe rather than by a list of names, since bf16 on a processor without the
instructions is tens of times slower than fp32. Used by the engine.
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

from trivium.errors import ConfigError
from trivium.plan import devices
from trivium.plan.workload import ComputeDtype, DeviceType

PROBE_ROWS, PROBE_WIDTH = 512, 768
BYTES_OF_UNIT = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ASKED_MEMORY = re.compile(r"[Tt]ried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
OUT_OF_MEMORY = ("t allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""What a RuntimeError says for want of memory: the CPU's allocator on Linux and elsewhere, a driver, its libraries."""
M_MMAP_THRESHOLD, RETURNED_BLOCK_BYTES = -3, 1 << 20
LOOSE_FACTOR = 2.5  # resident over allocated, at most, where freed blocks are kept
RESET_PEAK_RESIDENT = "5"
"""What makes Linux forget the peak of a process's resident memory. Source: proc_pid_clear_refs(5)."""


@dataclass(frozen=True)
class Machine:
    """What a run computes on.

    Attributes:
        device: where the weights live.
        compute_dtype: type of the matrix products, fp32 or bf16.
        peak_flops: FLOP/s of a large matrix product in that type, measured here; the denominator of MFU.
        memory_bytes: all memory that the device can ever give.
    """

    device: torch.device
    compute_dtype: torch.dtype
    peak_flops: float
    memory_bytes: int

    @property
    def precision(self) -> ComputeDtype:
        """The compute type, as run files name it."""
        return "bf16" if self.compute_dtype == torch.bfloat16 else "fp32"

    def with_precision(self, precision: ComputeDtype) -> "Machine":
        """The machine computing in another type."""
        return replace(self, compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    @property
    def device_type(self) -> DeviceType:
        """Which of the two ways attention and softmax run."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    @property
    def as_planned(self) -> devices.Device:
        """The planner's figures of this device."""
        if self.device.type == "cpu":
            found = devices.processor()
        elif self.device.type == "cuda":
            found = devices.identify(torch.cuda.get_device_name(self.device), self.memory_bytes)
        else:
            found = devices.this_machine()
        return replace(found, memory_bytes=self.memory_bytes)


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
    there = memory_bytes(device)
    if precision != "auto":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return Machine(device, dtype, measure_flops(device, dtype), there)
    fp32, bf16 = measure_flops(device, torch.float32), measure_flops(device, torch.bfloat16)
    if bf16 > 1.2 * fp32:
        return Machine(device, torch.bfloat16, bf16, there)
    return Machine(device, torch.float32, fp32, there)


def memory_bytes(device: torch.device) -> int:
    """All memory that a device can ever give; of a CPU the host's."""
    return devices.host_memory_bytes() if device.type == "cpu" else torch.accelerator.get_memory_info(device)[1]


def begin_peak(device: torch.device) -> int:
    """Measure `peak_memory_bytes` from here on; returns what is held already, in bytes.

    Where a CPU's peak cannot be begun anew (not Linux), it goes on from what the process had before.
    """
    if device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(RESET_PEAK_RESIDENT)
    else:
        torch.accelerator.reset_peak_memory_stats()
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: the allocator's peak on an accelerator, resident memory on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated()


def return_freed_blocks() -> None:
    """Make the C library give freed blocks of a MiB and more back to the system, where that is glibc.

    Left alone it keeps blocks of up to 32 MiB, cannot always use them again, and has held 2.4 times what was allocated.
    Giving back makes small steps up to half slower, so it is for runs that would not fit otherwise.
    Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_BLOCK_BYTES)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, the accelerator's, the CPU allocator's, the system's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def asked_bytes(error: Exception) -> int:
    """How much an allocation that failed had asked for; 0 where its error does not say."""
    found = ASKED_MEMORY.search(str(error))
    return int(float(found[1]) * BYTES_OF_UNIT[found[2]]) if found else 0


def describe(device: torch.device) -> str:
    """A name for the device that a report can print."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
