"""Why a plan is as it is, one line a choice, and why there is none: each choice against the next best.

Every figure is predicted anew for the alternative. Decides nothing; imported by the search, and never imports torch.
"""

from dataclasses import replace

from trivium.plan.devices import Device
from trivium.plan.fit import FIT_SHARE, cheapest_fixes, fits, pace, portions
from trivium.plan.goal import Goal, Plan
from trivium.plan.memory import GIB, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import Workload, num_adapter_params, with_batch

GIVEN = "as you set it"


def reasons(goal: Goal, plan: Plan) -> dict[str, str]:
    """One line of why for each key that a plan chooses."""
    run, work = plan.run, plan.workload
    why = {"method": _why_method(goal, plan), "device": _why_device(goal, plan)}
    if work.num_devices > 1:
        alone = replace(work, num_devices=1)
        why["parallel.devices"] = f"one {_versus(goal, plan, alone)}"
        sharing = "fsdp2" if work.strategy == "ddp" else "ddp"
        why["parallel.strategy"] = f"{sharing} {_versus(goal, plan, replace(work, strategy=sharing))}"
        if work.offload != "none":
            why["parallel.offload"] = f"without {_versus(goal, plan, replace(work, offload='none'))}"
    why["batch.micro_tokens"] = _why_portion(goal, plan)
    other = with_batch(work, work.micro_tokens, not work.recompute)
    word = "keeping activations" if work.recompute else "recomputing activations"
    why["activation_checkpointing"] = f"{word} {_versus(goal, plan, other)}"
    coarser = "8bit" if work.state_dtype == "fp32" else "fp32"
    why["optimizer.state_dtype"] = f"{coarser} {_versus(goal, plan, replace(work, state_dtype=coarser))}"
    if run.adapter:
        num_params = num_adapter_params(work.shape, run.adapter)
        why["adapter"] = f"{num_params:,} parameters, {num_params / work.shape.num_params:.2%} of the model"
    fast = "the device is fast at it" if work.compute_dtype == "bf16" else "the device is not fast at bf16"
    why["precision"] = fast if "precision" not in goal.set_keys else GIVEN
    return {key: GIVEN if key in goal.set_keys else text for key, text in why.items()}


def _versus(goal: Goal, plan: Plan, other: Workload) -> str:
    """What another choice would have meant, the rest being equal."""
    memory = peak_memory(other)
    if not fits(memory, plan.device.memory_bytes):
        return f"would take {memory.total / GIB:.1f} GiB, and {plan.allowed_bytes / GIB:.1f} may be used"
    speed = predict_speed(other, plan.device, goal.calibration_of(plan.device))
    saved = (plan.memory.total - memory.total) / GIB
    space = f", with {saved:.1f} GiB less" if saved > 0.05 else ""
    return f"would be {pace(speed.seconds_per_step / plan.speed.seconds_per_step)}{space}"


def _why_method(goal: Goal, plan: Plan) -> str:
    others = [run for run in goal.runs if run.method != plan.run.method]
    if not others:
        return "what the data and the model ask for"
    work, other = plan.workload, others[0]
    return f"{other.method} {_versus(goal, plan, replace(work, weights=other.weights, adapter=other.adapter))}"


def _why_device(goal: Goal, plan: Plan) -> str:
    if len(goal.devices) == 1:
        return "the one to plan for"
    wish = "cheapest" if goal.prefer == "cheapest" else "fastest"
    return f"the {wish} of {len(goal.devices)} on which it fits"


def _why_portion(goal: Goal, plan: Plan) -> str:
    work = plan.workload
    larger = [size for size in portions(work, work.step_tokens) if size > work.micro_tokens]
    if not larger:
        return "all that a device does in a step, at once"
    return f"{larger[-1]:,} {_versus(goal, plan, with_batch(work, larger[-1], work.recompute))}"


def too_large(goal: Goal, device: Device, num_devices: int, least_bytes: dict[str, int]) -> str:
    """Why no plan fits the largest there is, given what each method takes there at the least, and what would fit."""
    needs = " and ".join(f"{method} at least {peak / GIB:.1f} GiB" for method, peak in least_bytes.items())
    on = device.title if num_devices == 1 else f"each of {num_devices} x {device.title}"
    there = f"{FIT_SHARE * device.memory_bytes / GIB:.1f} of its {device.memory_bytes / GIB:.1f} GiB may be used"
    lines = [
        f"A model of {goal.shape.num_params / 1e9:.3g}B parameters takes with {needs} on {on}, where {there} "
        f"({1 - FIT_SHARE:.0%} stay free as a margin)."
    ]
    fixes = cheapest_fixes(goal.workload(goal.runs[0], device, num_devices), device)
    lines.append("The cheapest changes with which it fits:" if fixes else "No single change makes it fit.")
    return "\n".join([*lines, *(f"  {number}. {fix.text}" for number, fix in enumerate(fixes, 1))])


def too_dear(goal: Goal, plans: list[Plan]) -> str:
    """Why no plan is within purse and hours, and what the cheapest and the fastest would take."""
    costs = [(plan, plan.cost) for plan in plans if plan.cost]
    limits = [f"${goal.purse:,.2f}" if goal.purse is not None else "", f"{goal.hours:g} h" if goal.hours else ""]
    cheapest = min(costs, key=lambda entry: (entry[1].money or 0.0, entry[1].hours))
    fastest = min(costs, key=lambda entry: entry[1].hours)
    shown = []
    for word, (plan, taken) in {"cheapest": cheapest, "fastest": fastest}.items():
        money = "" if taken.money is None else f"${taken.money:,.2f} and "
        shown.append(
            f"the {word} takes {money}{taken.hours:,.1f} h on {plan.workload.num_devices} x {plan.device.name}"
        )
    share = min(
        (goal.purse or 0.0) / cheapest[1].money if goal.purse is not None and cheapest[1].money else 1.0,
        goal.hours / fastest[1].hours if goal.hours else 1.0,
    )
    tokens = (cheapest[0].num_tokens or 0) * share
    return (
        f"It fits the memory, but not {' and '.join(filter(None, limits))}: {'; '.join(shown)}. Allow that, train on "
        f"about {tokens / 1e6:,.1f}M tokens (budget.tokens), or take a smaller model."
    )
