"""The search for the cheapest or fastest run that fits, over everything that the user has left open, and its reasons.

Varies what leaves training itself unchanged: the micro-batch, activation checkpointing, the optimizer states, the
device, how many devices and how they share the work, and LoRA or QLoRA where `Goal.runs` offers both. Each choice gets
one line of why, against the next best. Never imports torch.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trivium.config.run import Run
from trivium.errors import DoesNotFit
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.devices import GIB, Device
from trivium.plan.fit import FIT_SHARE, cheapest_fixes, fits, micro_batch_sizes, moved, pace
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import Cost, Speed, cost, predict_speed
from trivium.plan.workload import DataFacts, Workload, num_adapter_params, of_run, with_batching

TIE = 1.02
"""Plans that cost at most this much more than the best are as good; the plainest of them is taken."""
MAX_MICRO_TOKENS = 65_536
# What may be chosen, plainest first. Paged states lie in the host's memory when a GPU's is full.
STATES = ("fp32", "8bit", "paged-8bit")
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
OFFLOADS = ("none", "optimizer", "all")
GIVEN = "as you set it"


@dataclass(frozen=True)
class Goal:
    """What is to be planned.

    Attributes:
        runs: the methods that are open, the preferred one first; the runs differ only in the method.
        shape: the network.
        devices: what it may run on, each with the memory that counts.
        num_devices: how many of them may work together, the fewest first; see `search` for which is taken.
        set_keys: dotted keys that the user has set, which stay as they are.
        facts: the data, where it is known.
        prefer: less money (less time, where nothing is rented), or less time.
        max_cost, max_hours: what the whole run may cost at most, in US dollars and hours.
        calibration: of the machine at hand.
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
        """What was measured, where that is the machine that was measured."""
        return self.calibration if self.calibration and self.calibration.device == device.name else None

    def workload(self, run: Run, device: Device, num_devices: int) -> Workload:
        """The step of one of the runs on so many devices, in the type that they are fast at or the one that is set."""
        work = moved(of_run(run, self.shape, self.facts, "fp32", "cpu"), device)
        compute_dtype = work.compute_dtype if run.precision == "auto" else run.precision
        return replace(work, compute_dtype=compute_dtype, num_devices=num_devices)


@dataclass(frozen=True)
class Plan:
    """A run that fits, and what it takes.

    Attributes:
        run: the run with everything chosen.
        workload: its step.
        device: what it runs on; how many is the workload's.
        memory: the peak on each device.
        speed: of the step.
        num_tokens: tokens to train on in all; None where it depends on data of unknown size.
        cost: of the whole run, where its length is known.
        reasons: for each key that was chosen, one line of why.
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
        """What a peak may take of the device; the rest is the margin."""
        return int(FIT_SHARE * self.device.memory_bytes)


def count_tokens(run: Run, facts: DataFacts | None) -> int | None:
    """Tokens that the whole run trains on; None where that depends on data of unknown size."""
    if run.budget.tokens is not None:
        return run.budget.tokens
    if run.budget.steps is not None:
        return run.budget.steps * run.batch.tokens
    return round((run.budget.epochs or 1.0) * facts.num_tokens) if facts else None


def settled(run: Run, workload: Workload) -> Run:
    """The run with what its step was planned to be, all of it explicit."""
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


@dataclass(frozen=True)
class Candidate:
    """A plan that fits the memory.

    Attributes:
        run: the run of its method.
        price: what a step costs, in dollars or seconds, as `DeviceGroup.price` counts.
        deviations: how far it is from the plainest, in choices.
    """

    run: Run
    workload: Workload
    device: Device
    memory: Memory
    speed: Speed
    price: float
    deviations: int


def search(goal: Goal) -> Plan:
    """The cheapest or fastest plan that fits; of those within 2 %, the plainest and then the one with least memory.

    For the cheapest, several devices are taken only where one does not do, since that is one thing to rent and to run.

    Raises: DoesNotFit when no plan fits the memory, the max_cost or the hours; the message names what would.
    """
    one_first = goal.prefer == "cheapest" and goal.num_devices[0] == 1
    together = [goal.num_devices[:1], goal.num_devices[1:]] if one_first else [goal.num_devices]
    beyond: list[Candidate] = []
    for counts in together:
        within = _best_groups([DeviceGroup(goal, device, count) for device in goal.devices for count in counts], beyond)
        if within:
            best = min(candidate.price for candidate in within)
            ties = [candidate for candidate in within if candidate.price <= TIE * best]
            plan = _plan(goal, min(ties, key=lambda candidate: (candidate.deviations, candidate.memory.total)))
            return replace(plan, reasons=reasons(goal, plan))
    if beyond:
        raise DoesNotFit(why_too_expensive(goal, [_plan(goal, candidate) for candidate in beyond]))
    raise DoesNotFit(_too_large(goal))


def _best_groups(groups: "list[DeviceGroup]", beyond: list[Candidate]) -> list[Candidate]:
    """Plans within max_cost and hours, the best of all groups among them; those that are not are put `beyond`.

    Groups are taken in the order of what they would cost with memory without end, so that the search ends at the first
    that even so costs more than a plan already found.
    """
    within: list[Candidate] = []
    for least, group in sorted(((group.least_price(), group) for group in groups), key=lambda entry: entry[0]):
        if within and least > TIE * min(candidate.price for candidate in within):
            break
        for candidate in group.candidates():
            (within if _is_affordable(group.goal, candidate) else beyond).append(candidate)
    return within


@dataclass(frozen=True)
class DeviceGroup:
    """All plans on so many devices of a kind."""

    goal: Goal
    device: Device
    num_devices: int

    def price(self, speed: Speed) -> float:
        """What a step costs: dollars where they count and are known, else seconds."""
        rent = self.device.price_per_hour if self.goal.prefer == "cheapest" else None
        return speed.seconds_per_step * (rent * self.num_devices if rent else 1.0)

    def speed(self, work: Workload) -> Speed:
        """What a step takes."""
        return predict_speed(work, self.device, self.goal.calibration_of(self.device))

    def least_price(self) -> float:
        """No plan of the group costs less: no checkpointing or offload, the largest micro-batch."""
        plainest = (
            with_batching(work, self.sizes(run, work)[0], bool(run.activation_checkpointing))
            for run, work in self.works()
            if work.offload == self.choices("parallel.offload", OFFLOADS, run.parallel.offload)[0]
        )
        return min((self.price(self.speed(work)) for work in plainest), default=float("inf"))

    def candidates(self) -> Iterator[Candidate]:
        """All that fit; the host's memory is used only where the device's does not do."""
        fitting: set[tuple[str, str, str]] = set()
        for run, work in self.works():
            held = (run.method, work.state_dtype, work.strategy)
            if held not in fitting:
                for candidate in self.batchings(run, work):
                    fitting.add(held)
                    yield candidate

    def works(self) -> Iterator[tuple[Run, Workload]]:
        """Every combination of offload, strategy and optimizer states, before batching; without offload first."""
        gpu, several = self.device.kind == "gpu", self.num_devices > 1
        for run in self.goal.runs:
            base = self.goal.workload(run, self.device, self.num_devices)
            if run.sequences_per_step % self.num_devices:
                continue
            for offload in self.choices(
                "parallel.offload", OFFLOADS if gpu and several else OFFLOADS[:1], base.offload
            ):
                for strategy in self.choices("parallel.strategy", STRATEGIES if several else ("fsdp2",), base.strategy):
                    for dtype in self.choices("optimizer.state_dtype", STATES if gpu else STATES[:2], base.state_dtype):
                        yield run, replace(base, state_dtype=dtype, strategy=strategy, offload=offload)

    def choices(self, key: str, choices: Sequence[Any], given: Any) -> Sequence[Any]:
        """What may be chosen for a key: all, or what the user has set it to."""
        return [given] if key in self.goal.set_keys else choices

    def sizes(self, run: Run, work: Workload) -> list[int]:
        """Micro-batches to try, largest first."""
        return [work.micro_tokens] if run.batch.micro_tokens else micro_batch_sizes(work, MAX_MICRO_TOKENS)

    def batchings(self, run: Run, work: Workload) -> Iterator[Candidate]:
        """Batchings that fit, with and without checkpointing: the largest micro-batch and smaller ones as good."""
        given, allowed = run.activation_checkpointing, FIT_SHARE * self.device.memory_bytes
        for activation_checkpointing in (False, True) if given is None else (given,):
            tried = [with_batching(work, size, activation_checkpointing) for size in reversed(self.sizes(run, work))]
            # A whole step in one micro-batch accumulates no gradients, so it may fit where half of it does not.
            parts, whole = tried[:-1], tried[-1:]
            num_fitting = bisect_right(parts, allowed, key=lambda sized: peak_memory(sized).total)
            fitting = parts[:num_fitting] + [each for each in whole if peak_memory(each).total <= allowed]
            least = float("inf")
            for sized in reversed(fitting):
                speed = self.speed(sized)
                price = self.price(speed)
                if price > TIE * least:
                    break
                least = min(least, price)
                memory, deviations = peak_memory(sized), self._deviations(run, sized)
                yield Candidate(run, sized, self.device, memory, speed, price, deviations)

    def _deviations(self, run: Run, work: Workload) -> int:
        shared = 1 + STRATEGIES.index(work.strategy) + OFFLOADS.index(work.offload) if work.num_devices > 1 else 0
        return self.goal.runs.index(run) + STATES.index(work.state_dtype) + work.activation_checkpointing + shared


def _too_large(goal: Goal) -> str:
    """What to say when nothing fits: what the largest hardware would need to have."""
    largest = DeviceGroup(goal, max(goal.devices, key=lambda device: device.memory_bytes), max(goal.num_devices))
    least: dict[str, int] = {}
    for run, work in largest.works():
        recomputed = run.activation_checkpointing is not False
        peak = peak_memory(with_batching(work, largest.sizes(run, work)[-1], recomputed)).total
        least[run.method] = min(peak, least.get(run.method, peak))
    return why_too_large(goal, largest.device, largest.num_devices, least)


def _plan(goal: Goal, candidate: Candidate) -> Plan:
    """The candidate with what its whole run takes."""
    work = candidate.workload
    run = settled(candidate.run, work)
    num_tokens = count_tokens(run, goal.facts)
    return Plan(run, work, candidate.device, candidate.memory, candidate.speed, num_tokens, _cost(goal, candidate))


def _cost(goal: Goal, candidate: Candidate) -> Cost | None:
    num_tokens = count_tokens(candidate.run, goal.facts)
    return cost(candidate.speed, num_tokens, candidate.device, candidate.workload.num_devices) if num_tokens else None


def _is_affordable(goal: Goal, candidate: Candidate) -> bool:
    """Whether max_cost and hours allow it; a limit that cannot be judged does not count."""
    run_cost = _cost(goal, candidate)
    if run_cost is None:
        return True
    in_time = goal.max_hours is None or run_cost.hours <= goal.max_hours
    return in_time and (goal.max_cost is None or run_cost.money is None or run_cost.money <= goal.max_cost)


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
    why["batch.micro_tokens"] = _why_micro_batch(goal, plan)
    other = with_batching(work, work.micro_tokens, not work.activation_checkpointing)
    word = "keeping activations" if work.activation_checkpointing else "checkpointing activations"
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


def _why_micro_batch(goal: Goal, plan: Plan) -> str:
    work = plan.workload
    larger = [size for size in micro_batch_sizes(work, work.step_tokens) if size > work.micro_tokens]
    if not larger:
        return "the whole step of a device at once"
    return f"{larger[-1]:,} {_versus(goal, plan, with_batching(work, larger[-1], work.activation_checkpointing))}"


def why_too_large(goal: Goal, device: Device, num_devices: int, least_bytes: dict[str, int]) -> str:
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


def why_too_expensive(goal: Goal, plans: list[Plan]) -> str:
    """Why no plan is within max_cost and hours, and what the cheapest and the fastest would take."""
    costs = [(plan, plan.cost) for plan in plans if plan.cost]
    limits = [
        f"${goal.max_cost:,.2f}" if goal.max_cost is not None else "",
        f"{goal.max_hours:g} h" if goal.max_hours else "",
    ]
    cheapest = min(costs, key=lambda entry: (entry[1].money or 0.0, entry[1].hours))
    fastest = min(costs, key=lambda entry: entry[1].hours)
    shown = []
    for word, (plan, taken) in {"cheapest": cheapest, "fastest": fastest}.items():
        money = "" if taken.money is None else f"${taken.money:,.2f} and "
        shown.append(
            f"the {word} takes {money}{taken.hours:,.1f} h on {plan.workload.num_devices} x {plan.device.name}"
        )
    share = min(
        (goal.max_cost or 0.0) / cheapest[1].money if goal.max_cost is not None and cheapest[1].money else 1.0,
        goal.max_hours / fastest[1].hours if goal.max_hours else 1.0,
    )
    tokens = (cheapest[0].num_tokens or 0) * share
    return (
        f"It fits the memory, but not {' and '.join(filter(None, limits))}: {'; '.join(shown)}. Allow that, train on "
        f"about {tokens / 1e6:,.1f}M tokens (budget.tokens), or take a smaller model."
    )
