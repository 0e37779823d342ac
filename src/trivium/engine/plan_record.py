"""What the planner says of a prepared run: beforehand, beside what became of it, and when memory ran out.

`plan.json` in the run folder holds `predicted`, written at the first start and never changed, and `measured`, taken
from the metrics whenever the run is saved. Nothing here alters what a run computes. Used by `start`, `loop` and the
doctor; `plan/check.py` reads the file.
"""

from dataclasses import asdict, replace
from statistics import median
from typing import Any

from trivium.engine.build import trained_tokens
from trivium.engine.device import LOOSE_FACTOR, Machine, asked_bytes, peak_memory_bytes
from trivium.engine.prepare import Job
from trivium.engine.runfolder import RunFolder, now
from trivium.errors import DoesNotFit
from trivium.plan import calibration
from trivium.plan.check import PLAN_FILE
from trivium.plan.devices import GIB, MIB
from trivium.plan.fit import FIT_SHARE, cheapest_fixes
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import Workload, of_run

FIRST_STEP_BYTES = 70 << 20
"""Resident memory that the libraries take when an optimizer is first made and a step first taken, on a CPU. Measured
with torch 2.13, most of it modules that torch imports there."""
SHOWN_CHARACTERS = 200
RESIDENT = "the process's largest resident memory from the building of the engine on, what it held before included"
ALLOCATED = "the most that the device's allocator had given out; the runtime and its kernels come on top"


def workload_of(job: Job, machine: Machine) -> Workload:
    """One step of a prepared run as numbers, the rows of tokens that are trained beside an adapter counted too."""
    workload = of_run(job.run, job.shape, job.facts, machine.precision, machine.device_type)
    return workload if job.run.adapter is None else replace(workload, num_token_rows=len(trained_tokens(job)))


def predict(job: Job, machine: Machine, versions: dict[str, str], held_bytes: int) -> dict[str, Any]:
    """The prediction of a run, as plan.json keeps it; the times are those of the steps alone.

    Args:
        job: the prepared run.
        machine: what it computes on.
        versions: of what the run is made with.
        held_bytes: memory that the process holds before the engine is built, see `begin_peak`.
    """
    workload, device = workload_of(job, machine), machine.as_planned
    memory = peak_memory(workload)
    measured_rates = calibration.load()
    if measured_rates is not None and measured_rates.device != device.name:
        measured_rates = None
    speed = predict_speed(workload, device, measured_rates)
    read_share = share_of_real_tokens(job)
    tokens = read_share * workload.step_tokens
    items = {name: size for name, size in memory.items.items() if name != "framework"}
    if machine.device_type == "cpu":
        items |= {"held before the engine": held_bytes, "loaded by the first step": FIRST_STEP_BYTES}
    peak_bytes = sum(items.values())
    hours = job.num_steps / 3600
    return {
        "at": now(),
        "versions": versions,
        "device": device.title,
        "device_memory_bytes": machine.memory_bytes,
        "is_calibrated": measured_rates is not None and workload.compute_dtype in measured_rates.seconds_per_unit,
        "workload": {
            key: value
            for key, value in asdict(workload).items()
            if key not in ("shape", "adapter") and value is not None
        },
        "peak_memory": {
            "bytes": peak_bytes,
            "low": round(FIT_SHARE * peak_bytes),
            "high": max(round(peak_bytes / FIT_SHARE), peak_bytes + _kept_bytes(job, machine, memory)),
            "what": RESIDENT if machine.device_type == "cpu" else ALLOCATED,
            "instant": memory.instant,
            "items": items,
        },
        "speed": {
            "tokens_per_second": tokens / speed.seconds_per_step,
            "low": tokens / speed.high,
            "high": tokens / speed.low,
            "what": f"tokens read from the data, {read_share:.1%} of those computed",
            "seconds_per_step": speed.seconds_per_step,
            "items": speed.items,
        },
        "time": {"hours": hours * speed.seconds_per_step, "low": hours * speed.low, "high": hours * speed.high},
    }


def is_tight(job: Job, machine: Machine) -> bool:
    """Whether a CPU's memory may not do unless freed blocks go back to the system, see `return_freed_blocks`."""
    allocated_bytes = peak_memory(workload_of(job, machine)).allocated
    return machine.device_type == "cpu" and LOOSE_FACTOR * allocated_bytes > machine.memory_bytes


def _kept_bytes(job: Job, machine: Machine, memory: Memory) -> int:
    """What the allocator may hold beyond what it has given out, at most."""
    is_loose = machine.device_type == "cpu" and not is_tight(job, machine)
    return round((LOOSE_FACTOR - 1) * memory.allocated) if is_loose else memory.slack


def share_of_real_tokens(job: Job) -> float:
    """How full the rows are, by those of the first step: conversations stay whole, so theirs end in padding."""
    batches = job.batches.step(0)
    return sum(batch.num_tokens for batch in batches) / sum(len(batch.tokens) for batch in batches)


def record_measured(folder: RunFolder) -> None:
    """Write what the metrics say so far beside the prediction, errors as shares of what was measured.

    The peak is the largest that a line has, over all starts; the speed is the median of the lines.
    """
    plan = folder.read(PLAN_FILE)
    lines = [line for line in folder.metrics if "train/tokens_per_second" in line]
    if plan is None or not lines:
        return
    predicted = plan["predicted"]
    peak_bytes = round(GIB * max(line["train/peak_memory_gib"] for line in lines))
    tokens_per_second = median(line["train/tokens_per_second"] for line in lines)
    plan["measured"] = {
        "at": now(),
        "step": lines[-1]["step"],
        "peak_memory_bytes": peak_bytes,
        "peak_memory_error": predicted["peak_memory"]["bytes"] / peak_bytes - 1,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_error": predicted["speed"]["tokens_per_second"] / tokens_per_second - 1,
        "hours": lines[-1]["train/seconds"] / 3600,
    }
    folder.write(PLAN_FILE, plan)


def suggest_fixes(workload: Workload, machine: Machine, limit_bytes: int) -> str:
    """What would fit into so many bytes, in one sentence: the planner's three cheapest changes."""
    fixes = cheapest_fixes(workload, machine.as_planned, memory_bytes=limit_bytes)
    if not fixes:
        return "no change that the planner knows makes it fit; take a smaller model or another device"
    return "; ".join(f"({number}) {fix.text}" for number, fix in enumerate(fixes, start=1))


def ran_out(job: Job, machine: Machine, error: Exception, held_bytes: int) -> DoesNotFit:
    """What to say when memory ran out: what was asked for, what there is, and what would fit.

    The room that there really was is less than what was held and asked for together, and less than what the plan needs.

    Args:
        job, machine: the run.
        error: what said so.
        held_bytes: what the process had held before the engine was built.
    """
    workload = workload_of(job, machine)
    memory, asked = peak_memory(workload), asked_bytes(error)
    grown = peak_memory_bytes(machine.device) - (held_bytes if machine.device_type == "cpu" else 0)
    # What the allocator held beyond what it had given out is in none of the last two, and in what a fix is held to.
    limit = min(machine.memory_bytes, min(memory.total, memory.framework + grown + asked) + memory.slack)
    said = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
    wanted = f"{asked / MIB:,.1f} MiB more were asked for" if asked else f"more was asked for ({said})"
    return DoesNotFit(
        f"The memory of {machine.device} ran out: {wanted} when the engine had {grown / GIB:,.2f} GiB. The planner "
        f"expected {memory.total / GIB:,.2f} GiB at the peak and the device has {machine.memory_bytes / GIB:,.2f} in "
        "all, of which other processes, or a limit, may hold a part. What would fit: "
        f"{suggest_fixes(workload, machine, limit)}. Checkpoints are as they were. With batch.micro_tokens or "
        "activation_checkpointing changed the same command goes on from the newest one; with anything else changed it "
        "is another run and needs another name."
    )
