"""The planner's prediction for a run, the measurements to compare it with, and its advice when memory runs out.

`plan.json` in the run folder holds `predicted`, written at the first start, and `measured`, updated from the metrics at
every checkpoint. `plan/check.py` reads the file.
"""

from dataclasses import asdict, replace
from statistics import median
from typing import Any

from trivium.engine.device import LOOSE_FACTOR, Machine, asked_bytes, peak_memory_bytes
from trivium.engine.prepare import Job
from trivium.engine.runfolder import RunFolder, now
from trivium.errors import DoesNotFit
from trivium.files import GIB, MIB
from trivium.plan import calibration
from trivium.plan.check import PLAN_FILE
from trivium.plan.fit import FIT_SHARE, cheapest_fixes
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import Workload, of_run

FIRST_STEP_BYTES = 70 << 20
"""Resident memory of modules that torch imports in the first optimizer step on a CPU. Measured with torch 2.13."""
SHOWN_CHARACTERS = 200
RESIDENT = "the process's peak resident memory, including memory in use before the model was built"
ALLOCATED = "the peak that PyTorch allocated on the device, without the GPU runtime and its kernels"


def workload_of(job: Job, machine: Machine) -> Workload:
    """The planner's workload of one step, including the trainable tokens of an adapter."""
    workload = of_run(job.run, job.shape, job.facts, machine.precision, machine.device_type)
    return workload if job.run.adapter is None else replace(workload, num_token_rows=len(job.trained_tokens))


def predict(job: Job, machine: Machine, versions: dict[str, str], held_bytes: int) -> dict[str, Any]:
    """The `predicted` part of plan.json; times cover training steps only.

    `held_bytes`: memory of the process before the engine is built, see `begin_peak`.
    """
    workload, device = workload_of(job, machine), machine.as_planned
    memory = peak_memory(workload)
    measured_rates = calibration.load()
    if measured_rates is not None and measured_rates.device != device.name:
        measured_rates = None
    speed = predict_speed(workload, device, measured_rates)
    first_step = job.batches.step(0)  # samples are not split between packed sequences, so some end in padding
    read_share = sum(batch.num_tokens for batch in first_step) / sum(len(batch.tokens) for batch in first_step)
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
    """Whether a CPU run may run out of memory unless freed blocks return to the system, see `return_freed_blocks`."""
    allocated_bytes = peak_memory(workload_of(job, machine)).allocated
    return machine.device_type == "cpu" and LOOSE_FACTOR * allocated_bytes > machine.memory_bytes


def _kept_bytes(job: Job, machine: Machine, memory: Memory) -> int:
    """Upper bound of the memory that the allocator holds but does not use."""
    is_loose = machine.device_type == "cpu" and not is_tight(job, machine)
    return round((LOOSE_FACTOR - 1) * memory.allocated) if is_loose else memory.slack


def record_measured(folder: RunFolder) -> None:
    """Update `measured` in plan.json: largest peak and median speed of all metrics, and the relative errors."""
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
    """The planner's three cheapest changes that fit in `limit_bytes`, in one sentence."""
    fixes = cheapest_fixes(workload, machine.as_planned, memory_bytes=limit_bytes)
    if not fixes:
        return "no known change makes it fit; use a smaller model or another device"
    return "; ".join(f"({number}) {fix.text}" for number, fix in enumerate(fixes, start=1))


def ran_out(job: Job, machine: Machine, error: Exception, held_bytes: int) -> DoesNotFit:
    """The error for a run that ran out of memory, with changes that would fit.

    Available memory was less than the memory in use plus the failed request, and less than the plan's peak: that is the
    limit for suggested changes.

    `held_bytes`: memory of the process before the engine was built.
    """
    workload = workload_of(job, machine)
    memory, asked = peak_memory(workload), asked_bytes(error)
    grown = peak_memory_bytes(machine.device) - (held_bytes if machine.device_type == "cpu" else 0)
    # Suggested changes are compared with a peak that includes the allocator's slack; these two exclude it.
    limit = min(machine.memory_bytes, min(memory.total, memory.framework + grown + asked) + memory.slack)
    said = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
    wanted = f"{asked / MIB:,.1f} MiB more" if asked else f"more ({said})"
    return DoesNotFit(
        f"Out of memory on {machine.device}: the run held {grown / GIB:,.2f} GiB and requested {wanted}. The planner "
        f"predicted a peak of {memory.total / GIB:,.2f} GiB. The device has {machine.memory_bytes / GIB:,.2f} GiB, but "
        "other processes or a limit may take part of it. Changes that would fit: "
        f"{suggest_fixes(workload, machine, limit)}. Checkpoints are unchanged. If you change only batch.micro_tokens "
        "or activation_checkpointing, the same command resumes the run; for any other change, also add name=NEW."
    )
