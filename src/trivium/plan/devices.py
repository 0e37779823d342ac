"""The catalog of devices: memory, bandwidth, peak FLOP/s and prices, with their sources.

The catalog is `devices.yaml` in this folder; `~/.trivium/devices.yaml` can add devices and change prices. Also detects
the device of this machine, without torch.
"""

import difflib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from trivium.config.inputs import Part
from trivium.config.yaml_tree import Problem, parse_tree, printable, read_file
from trivium.errors import ConfigError, count_of
from trivium.files import GIB

GIGA, TERA = 1e9, 1e12
CATALOG_FILE = Path(__file__).with_name("devices.yaml")
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CPUINFO = Path("/proc/cpuinfo")
# Usable share of the memory that the driver reports: the runtime reserves 0.6 % (H100) to 1.7 % (T4).
DRIVER_SHARE = 0.98
# fp32 FLOP per cycle and core by CPU flag, and the ratio of bf16 to fp32 FLOP.
FP32_PER_CYCLE = {"avx512f": 64, "avx2": 32}
BF16_RATIO = {"amx_bf16": 32, "avx512_bf16": 2}
USUAL_CLOCK, USUAL_BANDWIDTH_PER_CORE, MOST_CPU_BANDWIDTH = 2.6e9, 10 * GIGA, 300 * GIGA

Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: as on the command line, for example `h100-80`.
        kind: `gpu` (CUDA or ROCm), `apple` (memory shared with the CPU) or `cpu`.
        memory_bytes: usable memory.
        bandwidth: memory bandwidth in bytes per second.
        flops: peak dense FLOP/s by dtype (`fp32`, `fp16`, `bf16`); dtypes without hardware support are missing.
        link_bandwidth: bytes per second to and from other devices of the node, in each direction.
        price_per_hour: US dollars to rent one; None if unknown.
        source, price_source: sources of the figures and of the price.
        price_date: ISO date of the price.
    """

    name: str
    title: str
    kind: Literal["gpu", "apple", "cpu"]
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]
    link_bandwidth: float
    price_per_hour: float | None
    source: str
    price_source: str = ""
    price_date: str = ""


class DeviceRates(Part):
    """Peak dense TFLOP/s by dtype."""

    fp32: Positive
    fp16: Positive | None = None
    bf16: Positive | None = None


class DeviceEntry(Part):
    """A device in a catalog file."""

    title: str
    kind: Literal["gpu", "apple", "cpu"] = "gpu"
    memory_gib: Positive
    bandwidth_gb_per_second: Positive
    tflops: DeviceRates
    link_gb_per_second: Positive
    source: str
    price_per_hour: Annotated[float, Field(ge=0.0)] | None = None
    price_source: str = ""
    price_date: Annotated[str, Field(pattern=r"^(\d{4}-\d\d(-\d\d)?)?$")] = ""


def home_folder() -> Path:
    """Folder of the user's devices and calibration: $TRIVIUM_HOME or ~/.trivium."""
    return Path(os.environ.get("TRIVIUM_HOME") or Path.home() / ".trivium")


def catalog() -> dict[str, Device]:
    """All devices by name, with the user's changes applied.

    Raises: ConfigError naming file, device and key if the user's file is wrong.
    """
    entries, own = _read(CATALOG_FILE), home_folder() / "devices.yaml"
    edits = _read(own) if own.exists() else {}
    for name, edit in edits.items():
        price = {"price_source": str(own), "price_date": ""} if "price_per_hour" in edit else {}
        entries[name] = {**entries.get(name, {}), **price, **edit}
    return {name: _device(name, entry, own if name in edits else CATALOG_FILE) for name, entry in entries.items()}


def get(name: str) -> Device:
    """The device with this name, ignoring case.

    Raises: ConfigError with the nearest known name.
    """
    devices = catalog()
    if name.lower() not in devices:
        near = difflib.get_close_matches(name.lower(), devices, n=1, cutoff=0)[0]
        raise ConfigError(
            f"Unknown device {name!r}; the nearest is {near!r}. Known devices: {', '.join(devices)}. Add your own to "
            f"{home_folder() / 'devices.yaml'}."
        )
    return devices[name.lower()]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The devices of a file as plain values, by lower-case name."""
    problems: list[Problem] = []
    try:
        content = parse_tree(read_file(path), str(path), problems).plain() or {}
        if problems:
            raise problems[0]
    except Problem as problem:
        raise ConfigError(str(problem)) from None
    for name, entry in content.items() if isinstance(content, dict) else [("", content)]:
        if not isinstance(entry, dict) or not NAME.fullmatch(name.lower()):
            raise ConfigError(
                printable(f"{path}: found {name or entry!r}")
                + "; expected the name of a device and its keys, for example `h100-80: {price_per_hour: 2.10}`."
            )
    return {name.lower(): entry for name, entry in content.items()}


def _device(name: str, values: dict[str, Any], path: Path) -> Device:
    """Validate one device. Raises: ConfigError with the first problem."""
    try:
        entry = DeviceEntry.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key, reason = ".".join(str(part) for part in first["loc"]), first["msg"]
        known = ", ".join(DeviceEntry.model_fields)
        raise ConfigError(printable(f"{path}: {name}.{key}: {reason}") + f". Known keys: {known}.") from None
    return Device(
        name=name,
        memory_bytes=int(entry.memory_gib * GIB),
        bandwidth=entry.bandwidth_gb_per_second * GIGA,
        flops={dtype: rate * TERA for dtype, rate in entry.tflops.model_dump(exclude_none=True).items()},
        link_bandwidth=entry.link_gb_per_second * GIGA,
        **entry.model_dump(include={"title", "kind", "source", "price_per_hour", "price_source", "price_date"}),
    )


def this_machine() -> Device:
    """The device a run on this machine would use: the first NVIDIA GPU, Apple's GPU, or the CPU.

    AMD and Intel GPUs are not detected; name them instead.
    """
    return _nvidia() or _apple() or processor()


def host_memory_bytes() -> int:
    """Physical memory or the container's limit, whichever is less; swap is not counted."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def _output(*command: str) -> str:
    """The output of a short command; empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia() -> Device | None:
    """The first GPU in the driver's list."""
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits").splitlines()
    reported, _, mebibytes = lines[0].rpartition(",") if lines else ("", "", "")
    if not mebibytes.strip().isdigit():
        return None
    return identify(reported, int(mebibytes) << 20)


def identify(reported: str, driver_bytes: int) -> Device:
    """The catalog device that matches a driver's name, for example `NVIDIA A100-SXM4-80GB`, with this GPU's memory.

    All words of the title outside parentheses must be in the driver's name. The match with most words wins, then the
    one with the nearest memory. An unknown GPU gets the rates of the slowest with as much memory.
    """
    words, usable = _words(reported), int(driver_bytes * DRIVER_SHARE)
    gpus = [device for device in catalog().values() if device.kind == "gpu"]
    found = [gpu for gpu in gpus if _words(gpu.title) <= words and "laptop" not in words]
    if found:
        best = max(found, key=lambda gpu: (len(_words(gpu.title)), -abs(gpu.memory_bytes - usable)))
        return replace(best, memory_bytes=min(best.memory_bytes, driver_bytes))
    roomy = [gpu for gpu in gpus if gpu.memory_bytes > 0.95 * usable] or gpus
    near = min(roomy, key=lambda gpu: gpu.bandwidth)
    source = f"not in the catalog; rates of {near.title}, the slowest with as much memory"
    return replace(near, name="this-gpu", title=reported, memory_bytes=usable, price_per_hour=None, source=source)


def _words(title: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"\(.*\)", "", title).lower()))


def _apple() -> Device | None:
    """Apple silicon, with the share of memory that Metal gives the GPU."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    words = _words(_output("sysctl", "-n", "machdep.cpu.brand_string"))
    total = host_memory_bytes()
    memory_bytes = total * 2 // 3 if total <= 36 * GIB else total * 3 // 4
    chips = [device for device in catalog().values() if device.kind == "apple"]
    found = [chip for chip in chips if _words(chip.title) <= words]
    best = max(found or chips[:1], key=lambda chip: len(_words(chip.title)))
    return replace(best, memory_bytes=memory_bytes, price_per_hour=None)


def processor() -> Device:
    """This CPU, with rates estimated from its cores, clock and instruction sets; calibration replaces them."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    flags = set(found[1].split()) if (found := re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)) else set()
    model = found[1].strip() if (found := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)) else ""
    clocks = [float(clock) * 1e6 for clock in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    per_cycle = next((flop for flag, flop in FP32_PER_CYCLE.items() if flag in flags), 16)
    fp32 = cores * per_cycle * max([*clocks, USUAL_CLOCK])
    bf16 = next(({"bf16": fp32 * ratio} for flag, ratio in BF16_RATIO.items() if flag in flags), {})
    return Device(
        name="this-cpu",
        title=f"this processor ({model or platform.machine()}, {count_of(cores, 'core')})",
        kind="cpu",
        memory_bytes=host_memory_bytes(),
        bandwidth=min(cores * USUAL_BANDWIDTH_PER_CORE, MOST_CPU_BANDWIDTH),
        flops={"fp32": fp32} | bf16,
        link_bandwidth=GIGA,
        price_per_hour=None,
        source="cores, clock and instruction sets reported by the operating system",
    )
