"""Devices to rent or to own: memory, bandwidth, rates, prices, with sources and dates. Prices are the user's to edit.

The catalog is `devices.yaml` in this folder, with the user's own file of the same form over it. Also says what the
machine at hand is, as far as that can be told without torch. Measures nothing and never imports torch.
"""

import difflib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from trivium.config.inputs import Part
from trivium.config.yaml_tree import Problem, parse_tree, printable, read_file
from trivium.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30
GIGA, TERA = 1e9, 1e12
CATALOG_FILE = Path(__file__).with_name("devices.yaml")
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CPUINFO = Path("/proc/cpuinfo")
# The driver counts what the runtime then keeps for itself: 0.6 % (H100) to 1.7 % (T4).
DRIVER_SHARE = 0.98
# FLOP a cycle and core of a vector unit in fp32, and how many times that in bf16, by the flag that promises it.
FP32_PER_CYCLE = {"avx512f": 64, "avx2": 32}
BF16_RATIO = {"amx_bf16": 32, "avx512_bf16": 2}
USUAL_CLOCK, USUAL_BANDWIDTH_PER_CORE, MOST_CPU_BANDWIDTH = 2.6e9, 10 * GIGA, 300 * GIGA

Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: what the command line calls it, such as `h100-80`.
        title: what people call it.
        kind: `gpu` (CUDA or ROCm), `apple` (memory shared with the CPU), `cpu`.
        memory_bytes: what a program can use of it.
        bandwidth: bytes a second of its memory.
        flops: peak dense FLOP/s by dtype: `fp32`, `fp16`, `bf16`; one that is missing is not there in hardware.
        link_bandwidth: bytes a second to and from the other devices of its node, in each direction.
        price_per_hour: US dollars for one, rented; None where it is not rented.
        source, price_source: where the figures come from.
        price_date: when the price was seen, ISO.
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
    """A device as a file describes it."""

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
    """Where the user's devices and this machine's calibration lie: $TRIVIUM_HOME, else ~/.trivium."""
    return Path(os.environ.get("TRIVIUM_HOME") or Path.home() / ".trivium")


def catalog() -> dict[str, Device]:
    """Every device by name, the user's edits laid over what Trivium ships.

    Raises: ConfigError naming file, device and key when the user's file is wrong.
    """
    entries, own = _read(CATALOG_FILE), home_folder() / "devices.yaml"
    edits = _read(own) if own.exists() else {}
    for name, edit in edits.items():
        price = {"price_source": str(own), "price_date": ""} if "price_per_hour" in edit else {}
        entries[name] = {**entries.get(name, {}), **price, **edit}
    return {name: _device(name, entry, own if name in edits else CATALOG_FILE) for name, entry in entries.items()}


def get(name: str) -> Device:
    """The device of this name, in upper or lower case.

    Raises: ConfigError with the nearest known name.
    """
    devices = catalog()
    if name.lower() not in devices:
        near = difflib.get_close_matches(name.lower(), devices, n=1, cutoff=0)[0]
        raise ConfigError(
            f"There is no device named {name!r}; the nearest is {near!r}. Known are {', '.join(devices)}. Add your own "
            f"devices to {home_folder() / 'devices.yaml'}."
        )
    return devices[name.lower()]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """A file's devices as plain values, by name in lower case."""
    problems: list[Problem] = []
    try:
        content = parse_tree(read_file(path), str(path), problems).plain()
    except Problem as problem:
        problems.append(problem)
        content = None
    if problems:
        raise ConfigError(str(problems[0]))
    for name, entry in (content or {}).items() if isinstance(content or {}, dict) else [("", content)]:
        if not isinstance(entry, dict) or not NAME.fullmatch(name.lower()):
            raise ConfigError(
                printable(f"{path}: found {name or entry!r}")
                + "; expected the name of a device and its keys, such as `h100-80: {price_per_hour: 2.10}`."
            )
    return {name.lower(): entry for name, entry in (content or {}).items()}


def _device(name: str, values: dict[str, Any], path: Path) -> Device:
    """Check the values of one device. Raises: ConfigError with the first thing that is wrong."""
    try:
        entry = DeviceEntry.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key, reason = ".".join(str(part) for part in first["loc"]), first["msg"]
        known = ", ".join(DeviceEntry.model_fields)
        raise ConfigError(printable(f"{path}: {name}.{key}: {reason}") + f". A device's keys are {known}.") from None
    return Device(
        name=name,
        title=entry.title,
        kind=entry.kind,
        memory_bytes=int(entry.memory_gib * GIB),
        bandwidth=entry.bandwidth_gb_per_second * GIGA,
        flops={dtype: rate * TERA for dtype, rate in entry.tflops.model_dump(exclude_none=True).items()},
        link_bandwidth=entry.link_gb_per_second * GIGA,
        price_per_hour=entry.price_per_hour,
        source=entry.source,
        price_source=entry.price_source,
        price_date=entry.price_date,
    )


def this_machine() -> Device:
    """What a run on this machine would train on: its first NVIDIA GPU, Apple's GPU, else the processor.

    Memory is what this machine has. An unknown GPU gets the rates of the slowest with as much memory,
    and its `source` says so. Other vendors' GPUs are not seen: name theirs.
    """
    return _nvidia() or _apple() or processor()


def host_memory_bytes() -> int:
    """Physical memory, and no more than the container's limit; swap is not counted."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def _output(*command: str) -> str:
    """What a short command prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia() -> Device | None:
    """The first GPU that the driver lists."""
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits").splitlines()
    reported, _, mebibytes = lines[0].rpartition(",") if lines else ("", "", "")
    if not mebibytes.strip().isdigit():
        return None
    return identify(reported, int(mebibytes) << 20)


def identify(reported: str, driver_bytes: int) -> Device:
    """The catalog's device behind a driver's name, such as `NVIDIA A100-SXM4-80GB`, with this one's memory.

    All words of the title but those in brackets must be in that name; most words win, then the nearest memory.
    """
    words, usable = _words(reported), int(driver_bytes * DRIVER_SHARE)
    gpus = [device for device in catalog().values() if device.kind == "gpu"]
    found = [gpu for gpu in gpus if _words(gpu.title) <= words and "laptop" not in words]
    if found:
        best = max(found, key=lambda gpu: (len(_words(gpu.title)), -abs(gpu.memory_bytes - usable)))
        return _with(best, memory_bytes=min(best.memory_bytes, driver_bytes))
    roomy = [gpu for gpu in gpus if gpu.memory_bytes > 0.95 * usable] or gpus
    near = min(roomy, key=lambda gpu: gpu.bandwidth)
    source = f"not in the catalog; rates of {near.title}, the slowest with as much memory"
    return _with(near, name="this-gpu", title=reported, memory_bytes=usable, price_per_hour=None, source=source)


def _words(title: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"\(.*\)", "", title).lower()))


def _with(device: Device, **changes: Any) -> Device:
    return Device(**{**vars(device), **changes})


def _apple() -> Device | None:
    """Apple silicon, with the share of its memory that Metal gives the GPU."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    words = _words(_output("sysctl", "-n", "machdep.cpu.brand_string"))
    total = host_memory_bytes()
    memory_bytes = total * 2 // 3 if total <= 36 * GIB else total * 3 // 4
    chips = [device for device in catalog().values() if device.kind == "apple"]
    found = [chip for chip in chips if _words(chip.title) <= words]
    best = max(found or chips[:1], key=lambda chip: len(_words(chip.title)))
    return _with(best, memory_bytes=memory_bytes, price_per_hour=None)


def processor() -> Device:
    """This processor by its cores and the instructions it promises; a guess that calibration replaces."""
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
        title=f"this processor ({model or platform.machine()}, {cores} cores)",
        kind="cpu",
        memory_bytes=host_memory_bytes(),
        bandwidth=min(cores * USUAL_BANDWIDTH_PER_CORE, MOST_CPU_BANDWIDTH),
        flops={"fp32": fp32} | bf16,
        link_bandwidth=GIGA,
        price_per_hour=None,
        source="its cores, clock and instructions, as the operating system tells them",
    )
