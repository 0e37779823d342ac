"""Rules about the machine: what is installed, what may be written, what fits. Looks at no data.

A need that is computed here is less than what training takes, so a refusal is never wrong; that nothing is found does
not promise that all fits. Imported by `examine.py`.
"""

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from trivium.config import Run
from trivium.doctor.case import Case
from trivium.doctor.findings import Rule, Trouble
from trivium.engine.runfolder import RunFolder
from trivium.engine.setup import cache_folder
from trivium.errors import DoesNotFit
from trivium.model.shape import QwenShape

MIB, GIB = 1 << 20, 1 << 30
FP32_BYTES = 4
MOMENT_BYTES = {"fp32": 4, "8bit": 1, "paged-8bit": 1}
NF4_BYTES = 0.5  # without the scales, which only add to it
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")


def needed_packages(run: Run) -> dict[str, str]:
    """What the run needs beyond what Trivium always does, and for which setting."""
    needed: dict[str, str] = {tracker: f"log.trackers: [{tracker}]" for tracker in run.log.trackers}
    if run.trainable == "adapter":
        needed["peft"] = "trainable: adapter"
    if run.weights == "nf4":
        needed["bitsandbytes"] = "weights: nf4"
    elif run.optimizer.states != "fp32":
        needed["bitsandbytes"] = f"optimizer.states: {run.optimizer.states}"
    return needed


def installed_versions(run: Run) -> Trouble | None:
    """M01: packages that are missing or of a version that Trivium was never tried with."""
    from packaging.requirements import Requirement

    problems = [
        f"{package}, which {setting} needs, is not installed"
        for package, setting in needed_packages(run).items()
        if _installed(package) is None
    ]
    for line in metadata.requires("trivium") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            is_there = "is not installed" if found is None else f"{found} is installed"
            problems.append(f"{requirement.name} {is_there}, Trivium needs {requirement.specifier}")
    if not problems:
        return None
    return Trouble(
        "error",
        f"{'; '.join(problems)}.",
        "the packages that Trivium's own metadata asks for, and those of the run's settings.",
        "install them, for example with pip install --upgrade 'trivium[gpu,track]'.",
    )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def several_processes(run: Run) -> Trouble | None:
    """Q23: started once a GPU by a launcher, where one device is trained on."""
    num_processes = os.environ.get("WORLD_SIZE", "1")
    if num_processes == "1":
        return None
    return Trouble(
        "error",
        f"WORLD_SIZE is {num_processes}: a launcher such as torchrun has started this process as one of several.",
        "one process, since this version trains on one device; the others would each train the same run.",
        "start it without the launcher: trivium train RUN.yaml.",
    )


def may_write(run: Run) -> Trouble | None:
    """M03: folders in which nothing can be made."""
    problems = []
    for key, folder in (("runs_dir", Path(run.runs_dir) / run.name), ("data.cache_dir", cache_folder(run))):
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            problems.append(f"{key}: nothing can be written in {there} ({error.strerror})")
    if not problems:
        return None
    return Trouble(
        "error",
        f"{'; '.join(problems)}.",
        "folders where the run and its token stores can be written.",
        "set runs_dir and data.cache_dir to folders of your own, or mend their permissions.",
    )


def num_trained_params(run: Run, shape: QwenShape) -> int:
    """Parameters that are trained, but for the few of token rows and DoRA's magnitudes."""
    if run.adapter is None:
        return shape.num_params
    hidden, wide = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sides = {
        "q_proj": hidden + query,
        "k_proj": hidden + key_value,
        "v_proj": hidden + key_value,
        "o_proj": query + hidden,
        "gate_proj": hidden + wide,
        "up_proj": hidden + wide,
        "down_proj": wide + hidden,
    }
    return shape.num_hidden_layers * run.adapter.rank * sum(sides[target] for target in set(run.adapter.targets))


def frozen_bytes(case: Case) -> int:
    """What the weights that stay as they are take in memory."""
    if case.run.adapter is None:
        return 0
    shape, value_bytes = case.job.shape, case.machine.compute_dtype.itemsize
    if case.run.weights != "nf4":
        return shape.num_params * value_bytes
    packed = shape.num_hidden_layers * shape.num_layer_matmul_params
    return int(packed * NF4_BYTES) + (shape.num_params - packed) * value_bytes


def memory_parts(case: Case) -> dict[str, int]:
    """What must be in the device's memory at once, in bytes, activations and the system left out."""
    num_trained = num_trained_params(case.run, case.job.shape)
    states = case.run.optimizer.states
    return {
        "frozen weights": frozen_bytes(case),
        "trained weights": num_trained * FP32_BYTES,
        "gradients": num_trained * FP32_BYTES,
        # Paged moments may lie elsewhere while they are not needed.
        "moments": 0 if states == "paged-8bit" else 2 * num_trained * MOMENT_BYTES[states],
    }


def memory_bytes(device: torch.device) -> int:
    """All memory that a device can ever give: of a CPU with swap, and no more than the container's limit."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[1]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total + _swap_bytes()


def _swap_bytes() -> int:
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal:"))


def memory(case: Case) -> Trouble | None:
    """Q21: weights, gradients and moments alone are more than the device has."""
    parts, there = memory_parts(case), memory_bytes(case.machine.device)
    needed = sum(parts.values())
    if needed <= there:
        return None
    table = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in parts.items() if size)
    if case.run.adapter is None:
        change = "train an adapter (method: lora or qlora), set optimizer.states: paged-8bit, or take a smaller model"
    elif case.run.weights == "nf4":
        change = "take a smaller model"
    else:
        change = "quantise the base (method: qlora), or take a smaller model"
    return Trouble(
        "error",
        f"the run needs more than {needed / GIB:,.1f} GiB ({table}) before any activation, and {case.machine.device} "
        f"has {there / GIB:,.1f} GiB.",
        "weights, gradients and moments that fit, with room for activations.",
        f"{change}.",
    )


def disk_parts(case: Case) -> dict[str, int]:
    """What the run will hold on disk at its fullest, in bytes: one checkpoint more than it keeps, and the result."""
    run, shape = case.run, case.job.shape
    num_trained = num_trained_params(run, shape)
    checkpoint = num_trained * (FP32_BYTES + 2 * MOMENT_BYTES[run.optimizer.states])
    result = shape.num_params * case.machine.compute_dtype.itemsize if run.adapter is None else num_trained * FP32_BYTES
    num_checkpoints = min(run.checkpoint.keep + 1, case.job.num_steps)
    return {f"{num_checkpoints} checkpoints": num_checkpoints * checkpoint, "the result": result}


def disk(case: Case) -> Trouble | None:
    """M02: checkpoints and result are more than the disk has free. The store is there by now."""
    folder = RunFolder(Path(case.run.runs_dir) / case.run.name)
    already = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    parts = disk_parts(case)
    needed = sum(parts.values()) - already
    there = folder.path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed <= free:
        return None
    table = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
    return Trouble(
        "error",
        f"the run will write {needed / MIB:,.0f} MiB in {there} ({table}), and {free / MIB:,.0f} MiB are free.",
        "room for one checkpoint more than checkpoint.keep and for the result; the token stores are there already.",
        "free some space, lower checkpoint.keep, or set runs_dir to a larger disk.",
    )


RUN_RULES = (
    Rule[Run]("M01", "versions", installed_versions),
    Rule[Run]("M03", "write-permission", may_write),
    Rule[Run]("Q23", "several-processes", several_processes),
)
RULES = (
    Rule[Case]("Q21", "memory", memory, DoesNotFit),
    Rule[Case]("M02", "disk", disk, DoesNotFit),
)
