"""Rules about the machine: what is installed, what may be written, what fits. Looks at no data.

What a step needs is the planner's prediction; what a run writes is counted. Imported by `examine.py`.
"""

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from trivium.config.run import Run
from trivium.doctor.case import Case
from trivium.doctor.findings import Rule, Trouble
from trivium.engine.plan_record import suggest_fixes
from trivium.engine.prepare import cache_folder
from trivium.engine.runfolder import RunFolder
from trivium.errors import DoesNotFit
from trivium.plan.fit import FIT_SHARE, fits
from trivium.plan.memory import peak_memory
from trivium.plan.workload import FP32_BYTES

MIB, GIB = 1 << 20, 1 << 30
MOMENT_BYTES = {"fp32": 4, "8bit": 1, "paged-8bit": 1}


def needed_packages(run: Run) -> dict[str, str]:
    """What the run needs beyond what Trivium always does, and for which setting."""
    needed: dict[str, str] = {tracker: f"log.trackers: [{tracker}]" for tracker in run.log.trackers}
    if run.trainable == "adapter":
        needed["peft"] = "trainable: adapter"
    if run.weights == "nf4":
        needed["bitsandbytes"] = "weights: nf4"
    elif run.optimizer.state_dtype != "fp32":
        needed["bitsandbytes"] = f"optimizer.state_dtype: {run.optimizer.state_dtype}"
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


def memory(case: Case) -> Trouble | None:
    """Q21: a step needs more than the device has, or so much that the margin is gone."""
    needed, there = peak_memory(case.workload), case.machine.memory_bytes
    if fits(needed, there):
        return None
    items = sorted(needed.items.items(), key=lambda item: -item[1])
    table = ", ".join(f"{name} {size / GIB:,.2f}" for name, size in items if size >= GIB / 100)
    return Trouble(
        "error" if needed.total > there else "warning",
        f"a step needs {needed.total / GIB:,.2f} GiB at its peak, {needed.instant} ({table}), and "
        f"{case.machine.device} has {there / GIB:,.2f} GiB.",
        f"at most {FIT_SHARE:.0%} of the memory; the rest is the margin for what no formula sees.",
        f"one of the cheapest changes that fit: {suggest_fixes(case.workload, case.machine, there)}.",
    )


def disk_parts(case: Case) -> dict[str, int]:
    """What the run will hold on disk at its fullest, in bytes: one checkpoint more than it keeps, and the result."""
    run, shape = case.run, case.job.shape
    num_trained = case.workload.num_trained_params
    checkpoint = num_trained * (FP32_BYTES + 2 * MOMENT_BYTES[run.optimizer.state_dtype])
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
