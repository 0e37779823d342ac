"""What a plan is asked for and what it is: `Goal` and `Plan`, the values between which the search goes.

Decides nothing. Imported by the search, its reasons and whoever shows or writes a plan; never imports torch.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from trivium.config.run import Run
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.devices import Device
from trivium.plan.facts import DataFacts
from trivium.plan.fit import FIT_SHARE, moved
from trivium.plan.memory import Memory
from trivium.plan.speed import Cost, Speed
from trivium.plan.workload import Workload, of_run


@dataclass(frozen=True)
class Goal:
    """What is to be planned.

    Attributes:
        runs: the ways to train that are open, the preferred one first; they differ in their method alone.
        shape: the network.
        devices: what it may run on, each with the memory that counts.
        num_devices: how many of them may work together, the fewest first; see `search` for which is taken.
        set_keys: dotted keys that the user has set, which stay as they are.
        facts: the data, where it is known.
        prefer: less money (less time, where nothing is rented), or less time.
        purse, hours: what the whole run may cost at most, in US dollars and hours.
        calibration: of the machine at hand.
    """

    runs: tuple[Run, ...]
    shape: QwenShape
    devices: tuple[Device, ...]
    num_devices: tuple[int, ...] = (1,)
    set_keys: frozenset[str] = frozenset()
    facts: DataFacts | None = None
    prefer: Literal["cheapest", "fastest"] = "cheapest"
    purse: float | None = None
    hours: float | None = None
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
        num_tokens: tokens to train on in all; None where the run is as long as data that nobody has measured.
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
    """Tokens that the whole run trains on; None where that depends on data which nobody has measured."""
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
            "activation_checkpointing": workload.recompute,
            "optimizer": run.optimizer.model_copy(update={"state_dtype": workload.state_dtype}),
            "parallel": run.parallel.model_copy(update=parallel),
            "precision": workload.compute_dtype,
        }
    )
