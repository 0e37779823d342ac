"""The data, hardware, limits and wishes that the choice of a method depends on, and what the hardware can do.

Memory and speed are predicted for the method's default step. Once a method is chosen, `search.py` looks for the best
step. Never imports torch.
"""

import math
from dataclasses import dataclass

from trivium.config.run import METHOD_DEFAULTS, Adapter, usual_epochs, usual_step
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.cost import Cost, cost
from trivium.plan.devices import Device
from trivium.plan.fit import best_batching, fits, micro_batch_sizes, moved
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import DataFacts, Workload, with_batching

DEFAULT_MAX_HOURS = 90 * 24.0
"""Limit on the length of a run when the user gives none."""
SEQ_LEN, MICRO_TOKENS = 1024, 8192


@dataclass(frozen=True)
class Situation:
    """What is known before a method is chosen.

    Attributes:
        facts: the data; None if there is none yet.
        is_general: whether an existing model already does the task well enough; None if unknown.
        device, num_devices: hardware to train on.
        is_laptop: whether training has to run on a laptop or another machine without a large GPU.
        adapter_only: whether only the adapter may be published, because of the model's license.
        max_cost: limit in US dollars; ignored if the device has no price.
        max_hours: limit on the length of the run. Default: `DEFAULT_MAX_HOURS`.
        model: the requested model, as `model` in a run file.
        shape: its shape, if it is not in the catalog.
        num_params: the requested size, if no model is requested.
        rank: rank of an adapter.
        calibration: measured speed of this machine.
    """

    facts: DataFacts | None = None
    is_general: bool | None = None
    device: Device | None = None
    num_devices: int = 1
    is_laptop: bool = False
    adapter_only: bool = False
    max_cost: float | None = None
    max_hours: float | None = None
    model: str | None = None
    shape: QwenShape | None = None
    num_params: int | None = None
    rank: int = Adapter.model_fields["rank"].default
    calibration: Calibration | None = None

    @property
    def devices(self) -> int:
        """Number of devices, at least one."""
        return max(1, self.num_devices)

    @property
    def hours(self) -> float:
        """Limit on the length of the run."""
        return DEFAULT_MAX_HOURS if self.max_hours is None else self.max_hours

    @property
    def has_data(self) -> bool:
        return self.facts is not None and self.facts.num_rows > 0 and self.facts.num_tokens > 0

    @property
    def starts_small(self) -> bool:
        """Whether to start with the smallest model: on a laptop or an unknown device."""
        return self.is_laptop or self.device is None

    def workload(self, shape: QwenShape, method: str) -> Workload:
        """The method's default step, fully sharded, with the batching of `best_batching`."""
        defaults = METHOD_DEFAULTS[method]
        work = Workload(
            shape=shape,
            weights=defaults["weights"],
            adapter=Adapter(rank=self.rank) if defaults["trainable"] == "adapter" else None,
            state_dtype="fp32",
            seq_len=SEQ_LEN,
            micro_tokens=SEQ_LEN,
            step_tokens=max(usual_step(defaults["loss_tokens"]), SEQ_LEN * self.devices),
            activation_checkpointing=False,
            compute_dtype="bf16",
            device_type="gpu",
            num_devices=self.devices,
        )
        if self.device is None:
            return with_batching(work, SEQ_LEN, True)
        work = moved(work, self.device)
        return best_batching(work, micro_batch_sizes(work, MICRO_TOKENS), None, self.device.memory_bytes)

    def least_memory(self, shape: QwenShape, method: str) -> Memory:
        """Least memory of a device: one sequence at a time, with activation checkpointing."""
        return peak_memory(with_batching(self.workload(shape, method), SEQ_LEN, True))

    def fits(self, shape: QwenShape, method: str) -> bool:
        """Whether the method fits at all; an unknown device fits everything."""
        return self.device is None or fits(self.least_memory(shape, method), self.device.memory_bytes)

    def cost(self, shape: QwenShape, method: str, num_tokens: int) -> Cost | None:
        """Hours and dollars to train on `num_tokens`; None if the device is unknown."""
        if self.device is None:
            return None
        work = self.workload(shape, method)
        return cost(predict_speed(work, self.device, self.calibration), num_tokens, self.device, work)

    def affordable_tokens(self, shape: QwenShape, method: str) -> float:
        """Tokens to train on within the limits; infinity if the device is unknown."""
        fixed, million = self.cost(shape, method, 0), self.cost(shape, method, 1_000_000)
        if fixed is None or million is None:
            return math.inf
        shares = [(self.hours - fixed.hours) / (million.hours - fixed.hours)]
        if self.max_cost is not None and million.money and fixed.money:
            shares.append((self.max_cost - fixed.money) / (million.money - fixed.money))
        return 1e6 * max(0.0, min(shares))


def num_epochs(method: str) -> float:
    """Default passes over the data."""
    return usual_epochs(METHOD_DEFAULTS[method]["loss_tokens"])
