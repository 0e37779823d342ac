"""Rules about the machine: installed packages, write permission, memory and disk space."""

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from trivium.config.run import Run
from trivium.doctor.findings import Rule, Violation
from trivium.doctor.prepared import PreparedRun
from trivium.engine.plan_record import suggest_fixes
from trivium.engine.prepare import cache_folder
from trivium.engine.runfolder import RunFolder
from trivium.errors import DoesNotFit, count_of
from trivium.files import GIB, MIB, existing_parent, with_reserve
from trivium.model import hf
from trivium.plan.fit import FIT_SHARE, fits
from trivium.plan.memory import peak_memory
from trivium.plan.workload import FP32_BYTES

RECORD_BYTES_OF_A_STEP = 200  # a line of the ledger, and a tenth of a line of metrics
MOMENT_BYTES = {"fp32": 4, "8bit": 1, "paged-8bit": 1}


def needed_packages(run: Run) -> dict[str, str]:
    """Optional packages that the run needs, each with the setting that needs it."""
    needed: dict[str, str] = {tracker: f"log.trackers: [{tracker}]" for tracker in run.log.trackers}
    if run.trainable == "adapter":
        needed["peft"] = "trainable: adapter"
    if run.weights == "nf4":
        needed["bitsandbytes"] = "weights: nf4"
    elif run.optimizer.state_dtype != "fp32":
        needed["bitsandbytes"] = f"optimizer.state_dtype: {run.optimizer.state_dtype}"
    return needed


def installed_versions(run: Run) -> Violation | None:
    """M01: packages that are missing or whose version Trivium does not support."""
    from packaging.requirements import Requirement

    found = [
        f"{package} is not installed ({setting} needs it)"
        for package, setting in needed_packages(run).items()
        if _installed(package) is None
    ]
    for line in metadata.requires("trivium") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            state = "is not installed" if version is None else f"{version} is installed"
            found.append(f"{requirement.name} {state} (Trivium needs {requirement.specifier})")
    if not found:
        return None
    return Violation(
        "error",
        f"{'; '.join(found)}.",
        "the packages that Trivium and the run's settings need.",
        "install them, for example with pip install --upgrade 'trivium[gpu,track]'.",
    )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def several_processes(run: Run) -> Violation | None:
    """Q23: a launcher started one process per GPU, but Trivium trains on one device."""
    num_processes = os.environ.get("WORLD_SIZE", "1")
    if num_processes == "1":
        return None
    return Violation(
        "error",
        f"WORLD_SIZE is {num_processes}: a launcher like torchrun started several processes.",
        "one process, since this version trains on one device; the other processes would train the same run again.",
        "start the run without the launcher: trivium train RUN.yaml.",
    )


def may_write(run: Run) -> Violation | None:
    """M03: folders that are not writable."""
    found = []
    for key, folder in (("runs_dir", Path(run.runs_dir) / run.name), ("data.cache_dir", cache_folder(run))):
        there = existing_parent(folder)
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            found.append(f"{key}: cannot write in {there} ({error.strerror})")
    if not found:
        return None
    return Violation(
        "error",
        f"{'; '.join(found)}.",
        "writable folders for the run and its token stores.",
        "set runs_dir and data.cache_dir to other folders, or fix their permissions.",
    )


def memory(prepared: PreparedRun) -> Violation | None:
    """Q21: a step needs more memory than the device has, or leaves less than the planner's margin."""
    needed, there = peak_memory(prepared.workload), prepared.machine.memory_bytes
    if fits(needed, there):
        return None
    items = sorted(needed.items.items(), key=lambda item: -item[1])
    table = ", ".join(f"{name} {size / GIB:,.2f}" for name, size in items if size >= GIB / 100)
    return Violation(
        "error" if needed.total > there else "warning",
        f"a step needs {needed.total / GIB:,.2f} GiB at its peak, {needed.instant} ({table}), but "
        f"{prepared.machine.device} has {there / GIB:,.2f} GiB.",
        f"at most {FIT_SHARE:.0%} of the memory; the rest is the planner's safety margin.",
        f"one of these changes: {suggest_fixes(prepared.workload, prepared.machine, there)}.",
    )


def disk_parts(prepared: PreparedRun) -> dict[str, int]:
    """Peak disk use of the run in bytes: one checkpoint more than `checkpoint.keep`, the result, and the records."""
    run, shape = prepared.run, prepared.job.shape
    num_trained = prepared.workload.num_trained_params
    checkpoint = num_trained * (FP32_BYTES + 2 * MOMENT_BYTES[run.optimizer.state_dtype])
    if run.adapter is None:
        result = shape.num_params * prepared.machine.compute_dtype.itemsize
    else:  # other initializations are saved with twice the rank
        result = num_trained * FP32_BYTES * (1 if run.adapter.init == "default" else 2)
    num_checkpoints = min(run.checkpoint.keep + 1, prepared.job.num_steps)
    return {
        count_of(num_checkpoints, "checkpoint"): num_checkpoints * checkpoint,
        "the result": result + hf.companion_bytes(prepared.job.tokenizer_folder),
        "records": prepared.job.num_steps * RECORD_BYTES_OF_A_STEP,
    }


def disk_needed(prepared: PreparedRun) -> int:
    """Bytes that must be free so that the run can write all that it has not written yet."""
    folder = RunFolder(Path(prepared.run.runs_dir) / prepared.run.name)
    written = [*folder.checkpoints.rglob("*"), *folder.path.glob("*.jsonl")]
    already = sum(path.stat().st_size for path in written if path.is_file())
    return with_reserve(max(0, sum(disk_parts(prepared).values()) - already))


def disk(prepared: PreparedRun) -> Violation | None:
    """M02: checkpoints and result need more than the free disk space. The token stores are built already."""
    there = existing_parent(Path(prepared.run.runs_dir) / prepared.run.name)
    needed, free = disk_needed(prepared), shutil.disk_usage(there).free
    if needed <= free:
        return None
    table = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in disk_parts(prepared).items())
    return Violation(
        "error",
        f"the run needs {needed / MIB:,.1f} MiB in {there} ({table}, and a reserve, less what it has written), but "
        f"only {free / MIB:,.1f} MiB are free.",
        "space for the result, the records and one checkpoint more than checkpoint.keep.",
        "free some space, lower checkpoint.keep, or put runs_dir on a larger disk.",
    )


RUN_RULES = (
    Rule[Run]("M01", "versions", installed_versions),
    Rule[Run]("M03", "write-permission", may_write),
    Rule[Run]("Q23", "several-processes", several_processes),
)
RULES = (
    Rule[PreparedRun]("Q21", "memory", memory, DoesNotFit),
    Rule[PreparedRun]("M02", "disk", disk, DoesNotFit),
)
