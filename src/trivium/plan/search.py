"""The search for the cheapest or fastest way to run a step that fits, over all that the user has left open.

Varies what leaves the tokens that are learnt from as they are: the portions of the batch, recomputation, the
optimizer's states, the device, how many of them and how they share the work, and the way itself where `Goal.runs`
offers several (LoRA or QLoRA). Why each was chosen: `reasons.py`. The verb `plan` imports this file; never torch.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trivium.config.run import Run
from trivium.errors import DoesNotFit
from trivium.plan.devices import Device
from trivium.plan.fit import FIT_SHARE, portions
from trivium.plan.goal import Goal, Plan, count_tokens, settled
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.reasons import reasons, too_dear, too_large
from trivium.plan.speed import Cost, Speed, cost, predict_speed
from trivium.plan.workload import Workload, with_batch

TIE = 1.02
"""Plans that cost at most this much more than the best are as good; the plainest of them is taken."""
MAX_MICRO_TOKENS = 65_536
# What may be chosen, plainest first. Paged states lie in the host's memory when a GPU's is full.
STATES = ("fp32", "8bit", "paged-8bit")
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True)
class Candidate:
    """A plan that fits the memory.

    Attributes:
        run: the way it goes.
        price: what a step costs, in dollars or seconds, as `Group.price` counts.
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

    Raises: DoesNotFit when no plan fits the memory, the purse or the hours; the message names what would.
    """
    one_first = goal.prefer == "cheapest" and goal.num_devices[0] == 1
    together = [goal.num_devices[:1], goal.num_devices[1:]] if one_first else [goal.num_devices]
    beyond: list[Candidate] = []
    for counts in together:
        within = _best_groups([Group(goal, device, count) for device in goal.devices for count in counts], beyond)
        if within:
            best = min(candidate.price for candidate in within)
            ties = [candidate for candidate in within if candidate.price <= TIE * best]
            plan = _plan(goal, min(ties, key=lambda candidate: (candidate.deviations, candidate.memory.total)))
            return replace(plan, reasons=reasons(goal, plan))
    if beyond:
        raise DoesNotFit(too_dear(goal, [_plan(goal, candidate) for candidate in beyond]))
    raise DoesNotFit(_too_large(goal))


def _best_groups(groups: "list[Group]", beyond: list[Candidate]) -> list[Candidate]:
    """Plans within purse and hours, the best of all groups among them; those that are not are put `beyond`.

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
class Group:
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
        """No plan of the group costs less: nothing recomputed or sent to the host, the largest portions."""
        plainest = (
            with_batch(work, self.sizes(run, work)[0], bool(run.activation_checkpointing))
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
                for candidate in self.portioned(run, work):
                    fitting.add(held)
                    yield candidate

    def works(self) -> Iterator[tuple[Run, Workload]]:
        """Every way to hold the step and to share it, not yet portioned; what stays on the devices first."""
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
        return [work.micro_tokens] if run.batch.micro_tokens else portions(work, MAX_MICRO_TOKENS)

    def portioned(self, run: Run, work: Workload) -> Iterator[Candidate]:
        """The portions that fit, with and without recomputation: the largest, and smaller ones that are as good."""
        given, allowed = run.activation_checkpointing, FIT_SHARE * self.device.memory_bytes
        for recompute in (False, True) if given is None else (given,):
            tried = [with_batch(work, size, recompute) for size in reversed(self.sizes(run, work))]
            # A step at once holds no gradients of portions before it, so that it may fit where its half does not.
            parts, whole = tried[:-1], tried[-1:]
            num_fitting = bisect_right(parts, allowed, key=lambda portioned: peak_memory(portioned).total)
            fitting = parts[:num_fitting] + [each for each in whole if peak_memory(each).total <= allowed]
            least = float("inf")
            for portioned in reversed(fitting):
                speed = self.speed(portioned)
                price = self.price(speed)
                if price > TIE * least:
                    break
                least = min(least, price)
                memory, deviations = peak_memory(portioned), self._deviations(run, portioned)
                yield Candidate(run, portioned, self.device, memory, speed, price, deviations)

    def _deviations(self, run: Run, work: Workload) -> int:
        shared = 1 + STRATEGIES.index(work.strategy) + OFFLOADS.index(work.offload) if work.num_devices > 1 else 0
        return self.goal.runs.index(run) + STATES.index(work.state_dtype) + work.recompute + shared


def _too_large(goal: Goal) -> str:
    """What to say when nothing fits: what the largest hardware would need to have."""
    largest = Group(goal, max(goal.devices, key=lambda device: device.memory_bytes), max(goal.num_devices))
    least: dict[str, int] = {}
    for run, work in largest.works():
        recomputed = run.activation_checkpointing is not False
        peak = peak_memory(with_batch(work, largest.sizes(run, work)[-1], recomputed)).total
        least[run.method] = min(peak, least.get(run.method, peak))
    return too_large(goal, largest.device, largest.num_devices, least)


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
    """Whether purse and hours allow it; a limit that cannot be judged does not count."""
    run_cost = _cost(goal, candidate)
    if run_cost is None:
        return True
    in_time = goal.hours is None or run_cost.hours <= goal.hours
    return in_time and (goal.purse is None or run_cost.money is None or run_cost.money <= goal.purse)
