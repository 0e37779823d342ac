"""Search for the cheapest or fastest run that fits, over every key that the user has not set.

Varies the micro-batch, activation checkpointing, optimizer state dtype, device, number of devices and strategy, and
LoRA or QLoRA if `Goal.runs` has both. Each choice gets a one-line reason. Never imports torch.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trivium.config.run import Run
from trivium.errors import DoesNotFit
from trivium.files import GIB
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.cost import Cost, cost, dollars, hours
from trivium.plan.devices import Device
from trivium.plan.fit import FIT_SHARE, cheapest_fixes, fits, micro_batch_sizes, moved, pace
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import Speed, predict_speed
from trivium.plan.workload import DataFacts, Workload, num_adapter_params, of_run, with_batching

TIE = 1.02
"""Plans within this factor of the best price count as equal; the one nearest to the defaults is chosen."""
MAX_MICRO_TOKENS = 65_536
# The choices, defaults first. Paged states move to the host's memory when a GPU's is full.
STATES = ("fp32", "8bit", "paged-8bit")
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
OFFLOADS = ("none", "optimizer", "all")
GIVEN = "as you set it"


@dataclass(frozen=True)
class Goal:
    """What to plan.

    Attributes:
        runs: one run for each method to choose from, preferred one first.
        shape: the network.
        devices: the devices to choose from.
        num_devices: numbers of devices to choose from, smallest first.
        set_keys: dotted keys that the user has set; they are kept.
        facts: the data, if known.
        prefer: less money (less time on devices without a price), or less time.
        max_cost, max_hours: limits of the whole run, in US dollars and hours.
        calibration: measured speed of this machine.
    """

    runs: tuple[Run, ...]
    shape: QwenShape
    devices: tuple[Device, ...]
    num_devices: tuple[int, ...] = (1,)
    set_keys: frozenset[str] = frozenset()
    facts: DataFacts | None = None
    prefer: Literal["cheapest", "fastest"] = "cheapest"
    max_cost: float | None = None
    max_hours: float | None = None
    calibration: Calibration | None = None

    def calibration_of(self, device: Device) -> Calibration | None:
        """The calibration, if it is of this device."""
        return self.calibration if self.calibration and self.calibration.device == device.name else None

    def workload(self, run: Run, device: Device, num_devices: int) -> Workload:
        """The step of a run on `num_devices`, in the set precision or the one the device is fast at."""
        work = moved(of_run(run, self.shape, self.facts, "fp32", "cpu"), device)
        compute_dtype = work.compute_dtype if run.precision == "auto" else run.precision
        return replace(work, compute_dtype=compute_dtype, num_devices=num_devices)

    def price(self, plan: "Plan") -> float:
        """What a step costs: dollars for the cheapest plan if the device has a price, else seconds."""
        rent = plan.device.price_per_hour if self.prefer == "cheapest" else None
        return plan.speed.seconds_per_step * (rent * plan.workload.num_devices if rent else 1.0)


@dataclass(frozen=True)
class Plan:
    """A run with its predictions.

    Attributes:
        run: the run with every choice set.
        workload: its step.
        memory: the peak on each device.
        num_tokens: training tokens of the whole run; None if the data is unknown.
        cost: cost of the whole run, if `num_tokens` is known.
        reasons: the reason for each chosen key, one line each.
    """

    run: Run
    workload: Workload
    device: Device
    memory: Memory
    speed: Speed
    num_tokens: int | None
    cost: Cost | None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def allowed_bytes(self) -> int:
        """Memory that a peak may use; the rest is the margin."""
        return int(FIT_SHARE * self.device.memory_bytes)


def count_tokens(run: Run, facts: DataFacts | None) -> int | None:
    """Training tokens of the whole run; None if they depend on unknown data."""
    if run.budget.tokens is not None:
        return run.budget.tokens
    if run.budget.steps is not None:
        return run.budget.steps * run.step_tokens
    return round((run.budget.epochs or run.default_epochs) * facts.num_tokens) if facts else None


def settled(run: Run, workload: Workload) -> Run:
    """The run with the choices of its workload."""
    parallel = {"devices": workload.num_devices, "strategy": workload.strategy, "offload": workload.offload}
    return run.model_copy(
        update={
            "batch": run.batch.model_copy(update={"micro_tokens": workload.micro_tokens}),
            "activation_checkpointing": workload.activation_checkpointing,
            "optimizer": run.optimizer.model_copy(update={"state_dtype": workload.state_dtype}),
            "parallel": run.parallel.model_copy(update=parallel),
            "precision": workload.compute_dtype,
        }
    )


def search(goal: Goal) -> Plan:
    """The cheapest or fastest plan that fits; within 2%, the one nearest to the defaults, then with the least memory.

    The cheapest plan uses several devices only if one is not enough.

    Raises: DoesNotFit if no plan fits the memory, `max_cost` or `max_hours`; the message lists what would fit.
    """
    one_first = goal.prefer == "cheapest" and goal.num_devices[0] == 1
    tries = [goal.num_devices[:1], goal.num_devices[1:]] if one_first else [goal.num_devices]
    beyond: list[Plan] = []
    for counts in tries:
        within = _best_groups([DeviceGroup(goal, device, count) for device in goal.devices for count in counts], beyond)
        if within:
            best = min(goal.price(plan) for plan in within)
            ties = [plan for plan in within if goal.price(plan) <= TIE * best]
            plan = min(ties, key=lambda plan: (_deviations(goal, plan), plan.memory.total))
            return replace(plan, reasons=reasons(goal, plan))
    raise DoesNotFit(why_too_expensive(goal, beyond) if beyond else _too_large(goal))


def _best_groups(groups: "list[DeviceGroup]", beyond: list[Plan]) -> list[Plan]:
    """Plans within the limits, including the best of all groups; plans over the limits are added to `beyond`.

    Groups are searched in the order of a lower bound of their price, until the bound exceeds the best plan.
    """
    within: list[Plan] = []
    for least, group in sorted(((group.least_price(), group) for group in groups), key=lambda entry: entry[0]):
        if within and least > TIE * min(map(group.goal.price, within)):
            break
        for plan in group.plans():
            (within if _is_affordable(group.goal, plan) else beyond).append(plan)
    return within


@dataclass(frozen=True)
class DeviceGroup:
    """All plans on `num_devices` of one kind of device."""

    goal: Goal
    device: Device
    num_devices: int

    def plan(self, run: Run, work: Workload) -> Plan:
        """The plan for a step."""
        num_tokens = count_tokens(run, self.goal.facts)
        speed = predict_speed(work, self.device, self.goal.calibration_of(self.device))
        run_cost = cost(speed, num_tokens, self.device, work) if num_tokens else None
        return Plan(settled(run, work), work, self.device, peak_memory(work), speed, num_tokens, run_cost)

    def least_price(self) -> float:
        """A lower bound of the price: no offload or unset checkpointing, and the largest micro-batch."""
        plainest = (
            self.plan(run, with_batching(work, self.sizes(run, work)[0], bool(run.activation_checkpointing)))
            for run, work in self.works()
            if work.offload == self.choices("parallel.offload", OFFLOADS, run.parallel.offload)[0]
        )
        return min(map(self.goal.price, plainest), default=float("inf"))

    def plans(self) -> Iterator[Plan]:
        """All plans that fit the memory; with offload only if none fits without."""
        fitting: set[tuple[str, str, str]] = set()
        for run, work in self.works():
            key = (run.method, work.state_dtype, work.strategy)
            if key not in fitting:
                for plan in self.batchings(run, work):
                    fitting.add(key)
                    yield plan

    def works(self) -> Iterator[tuple[Run, Workload]]:
        """Every combination of offload, strategy and optimizer state dtype, before batching; no offload first."""
        gpu, several = self.device.kind == "gpu", self.num_devices > 1
        for run in self.goal.runs:
            base = self.goal.workload(run, self.device, self.num_devices)
            if run.sequences_per_step % self.num_devices:
                continue
            offloads = self.choices("parallel.offload", OFFLOADS if gpu and several else OFFLOADS[:1], base.offload)
            strategies = self.choices("parallel.strategy", STRATEGIES if several else ("fsdp2",), base.strategy)
            dtypes = self.choices("optimizer.state_dtype", STATES if gpu else STATES[:2], base.state_dtype)
            for offload, strategy, dtype in itertools.product(offloads, strategies, dtypes):
                yield run, replace(base, state_dtype=dtype, strategy=strategy, offload=offload)

    def choices(self, key: str, choices: Sequence[Any], given: Any) -> Sequence[Any]:
        """The choices for a key, or only the given value if the user has set it."""
        return [given] if key in self.goal.set_keys else choices

    def sizes(self, run: Run, work: Workload) -> list[int]:
        """Micro-batches to try, largest first."""
        return [work.micro_tokens] if run.batch.micro_tokens else micro_batch_sizes(work, MAX_MICRO_TOKENS)

    def batchings(self, run: Run, work: Workload) -> Iterator[Plan]:
        """The largest micro-batch that fits, with and without checkpointing, and smaller ones that are as good."""
        given, allowed = run.activation_checkpointing, FIT_SHARE * self.device.memory_bytes
        for activation_checkpointing in (False, True) if given is None else (given,):
            tried = [with_batching(work, size, activation_checkpointing) for size in reversed(self.sizes(run, work))]
            # A whole step in one micro-batch accumulates no gradients, so it may fit where half of it does not.
            parts, whole = tried[:-1], tried[-1:]
            num_fitting = bisect_right(parts, allowed, key=lambda sized: peak_memory(sized).total)
            fitting = parts[:num_fitting] + [each for each in whole if peak_memory(each).total <= allowed]
            least = float("inf")
            for sized in reversed(fitting):
                plan = self.plan(run, sized)
                price = self.goal.price(plan)
                if price > TIE * least:
                    break
                least = min(least, price)
                yield plan


def _deviations(goal: Goal, plan: Plan) -> int:
    """Number of choices between a plan and the defaults."""
    work = plan.workload
    sharing = 1 + STRATEGIES.index(work.strategy) + OFFLOADS.index(work.offload) if work.num_devices > 1 else 0
    method = [run.method for run in goal.runs].index(plan.run.method)
    return method + STATES.index(work.state_dtype) + work.activation_checkpointing + sharing


def _is_affordable(goal: Goal, plan: Plan) -> bool:
    """Whether a plan is within `max_cost` and `max_hours`; limits that cannot be checked are ignored."""
    if plan.cost is None:
        return True
    in_time = goal.max_hours is None or plan.cost.hours <= goal.max_hours
    return in_time and (goal.max_cost is None or plan.cost.money is None or plan.cost.money <= goal.max_cost)


def reasons(goal: Goal, plan: Plan) -> dict[str, str]:
    """The reason for each key that a plan chooses, one line each."""
    run, work = plan.run, plan.workload
    why = {"method": _why_method(goal, plan), "device": _why_device(goal, plan)}
    if work.num_devices > 1:
        alone = replace(work, num_devices=1)
        why["parallel.devices"] = f"one {_versus(goal, plan, alone)}"
        sharing = "fsdp2" if work.strategy == "ddp" else "ddp"
        why["parallel.strategy"] = f"{sharing} {_versus(goal, plan, replace(work, strategy=sharing))}"
        if work.offload != "none":
            why["parallel.offload"] = f"without {_versus(goal, plan, replace(work, offload='none'))}"
    why["batch.micro_tokens"] = _why_micro_batch(goal, plan)
    other = with_batching(work, work.micro_tokens, not work.activation_checkpointing)
    word = "keeping activations" if work.activation_checkpointing else "checkpointing activations"
    why["activation_checkpointing"] = f"{word} {_versus(goal, plan, other)}"
    coarser = "8bit" if work.state_dtype == "fp32" else "fp32"
    why["optimizer.state_dtype"] = f"{coarser} {_versus(goal, plan, replace(work, state_dtype=coarser))}"
    if run.adapter:
        num_params = num_adapter_params(work.shape, run.adapter)
        why["adapter"] = f"{num_params:,} parameters, {num_params / work.shape.num_params:.2%} of the model"
    fast = "fast on this device" if work.compute_dtype == "bf16" else "bf16 is slow on this device"
    why["precision"] = fast if "precision" not in goal.set_keys else GIVEN
    return {key: GIVEN if key in goal.set_keys else text for key, text in why.items()}


def _versus(goal: Goal, plan: Plan, other: Workload) -> str:
    """The memory or speed of another choice, everything else being equal."""
    memory = peak_memory(other)
    if not fits(memory, plan.device.memory_bytes):
        return f"would need {memory.total / GIB:.1f} GiB, but only {plan.allowed_bytes / GIB:.1f} may be used"
    speed = predict_speed(other, plan.device, goal.calibration_of(plan.device))
    saved = (plan.memory.total - memory.total) / GIB
    space = f", with {saved:.1f} GiB less" if saved > 0.05 else ""
    return f"would be {pace(speed.seconds_per_step / plan.speed.seconds_per_step)}{space}"


def _why_method(goal: Goal, plan: Plan) -> str:
    others = [run for run in goal.runs if run.method != plan.run.method]
    if not others:
        return "the usual method for this data and model"
    work, other = plan.workload, others[0]
    return f"{other.method} {_versus(goal, plan, replace(work, weights=other.weights, adapter=other.adapter))}"


def _why_device(goal: Goal, plan: Plan) -> str:
    if len(goal.devices) == 1:
        return "the only device considered"
    wish = "cheapest" if goal.prefer == "cheapest" else "fastest"
    return f"the {wish} of {len(goal.devices)} devices that fit"


def _why_micro_batch(goal: Goal, plan: Plan) -> str:
    work = plan.workload
    larger = [size for size in micro_batch_sizes(work, work.step_tokens) if size > work.micro_tokens]
    if not larger:
        return "all tokens of a step on this device"
    return f"{larger[-1]:,} {_versus(goal, plan, with_batching(work, larger[-1], work.activation_checkpointing))}"


def _too_large(goal: Goal) -> str:
    """The message if nothing fits: what each method needs on the largest hardware, and the cheapest changes."""
    device, num_devices = max(goal.devices, key=lambda device: device.memory_bytes), max(goal.num_devices)
    largest = DeviceGroup(goal, device, num_devices)
    least: dict[str, int] = {}
    for run, work in largest.works():
        is_checkpointed = run.activation_checkpointing is not False
        peak = peak_memory(with_batching(work, largest.sizes(run, work)[-1], is_checkpointed)).total
        least[run.method] = min(peak, least.get(run.method, peak))
    needs = " and ".join(f"{method} needs at least {peak / GIB:.1f} GiB" for method, peak in least.items())
    on = device.title if num_devices == 1 else f"each of {num_devices} x {device.title}"
    lines = [
        f"With a model of {goal.shape.num_params / 1e9:.3g}B parameters, {needs} on {on}, where "
        f"{FIT_SHARE * device.memory_bytes / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB may be used "
        f"({1 - FIT_SHARE:.0%} is kept free as a margin)."
    ]
    fixes = cheapest_fixes(goal.workload(goal.runs[0], device, num_devices), device)
    lines.append("The cheapest changes that make it fit:" if fixes else "No single change makes it fit.")
    return "\n".join([*lines, *(f"  {number}. {fix.text}" for number, fix in enumerate(fixes, 1))])


def why_too_expensive(goal: Goal, plans: list[Plan]) -> str:
    """The message if no plan is within the limits: what the cheapest and the fastest would cost."""
    costs = [(plan, plan.cost) for plan in plans if plan.cost]
    limits = [f"${goal.max_cost:,g}"] if goal.max_cost is not None else []
    limits += [f"{goal.max_hours:g} h"] if goal.max_hours else []
    cheapest = min(costs, key=lambda entry: (entry[1].money or 0.0, entry[1].hours))
    fastest = min(costs, key=lambda entry: entry[1].hours)
    text = f"It fits in memory, but exceeds the limit of {' and '.join(limits)}"
    for word, (plan, taken) in {"cheapest": cheapest, "fastest": fastest}.items():
        money = "" if taken.money is None else f"{dollars(taken.money)} and "
        text += f"{':' if word == 'cheapest' else ';'} the {word} plan takes {money}{hours(taken.hours)} on "
        text += f"{plan.workload.num_devices} x {plan.device.name}"
    share = min(
        (goal.max_cost or 0.0) / cheapest[1].money if goal.max_cost is not None and cheapest[1].money else 1.0,
        goal.max_hours / fastest[1].hours if goal.max_hours else 1.0,
    )
    tokens = (cheapest[0].num_tokens or 0) * share
    return (
        f"{text}. Raise the limit, train on about {tokens / 1e6:,.1f}M tokens (budget.tokens), or use a smaller model."
    )
