"""What the user has and wants, and what the hardware can hold and compute within the limits.

Memory and speed are those of the method's default step; `search.py` finds the best one once a method is chosen. Never
imports torch.
"""

import math
from dataclasses import dataclass

from trivium.config.inputs import TrainTokenizer
from trivium.config.run import METHOD_DEFAULTS, Adapter, BatchSize
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.devices import Device
from trivium.plan.fit import fits, micro_batch_sizes, moved
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import Cost, cost, predict_speed
from trivium.plan.workload import DataFacts, Workload, with_batching

DEFAULT_MAX_HOURS = 90 * 24.0
"""Limit on the length of a run when the user gives none."""
ROW_TOKENS, MICRO_TOKENS = 1024, 8192


@dataclass(frozen=True)
class Situation:
    """What is known before anything is decided; None and the defaults stand for what is not.

    Attributes:
        facts: the data; None when there is none yet.
        is_general: whether an existing model already does the task well enough; None when unknown.
        device: what training would run on.
        num_devices: how many of them.
        is_laptop: whether training has to fit on a laptop, or on a machine without a GPU that is worth the name.
        adapter_only: whether only the adapter may be published, because of the model's license.
        max_cost: US dollars for the run; counts where the device has a price.
        max_hours: how long the run may take. Default: `DEFAULT_MAX_HOURS`.
        model: the model wanted, as `model` in a run file names it.
        shape: its shape, where it is not in the catalog.
        num_params: the size wanted, where no model is.
        rank: of the adapter.
        calibration: what was measured of the machine at hand.
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
        """How many devices, one at the least."""
        return max(1, self.num_devices)

    @property
    def hours(self) -> float:
        """How long the run may take."""
        return DEFAULT_MAX_HOURS if self.max_hours is None else self.max_hours

    @property
    def has_data(self) -> bool:
        """Whether there is anything to learn from."""
        return self.facts is not None and self.facts.num_rows > 0 and self.facts.num_tokens > 0

    @property
    def starts_small(self) -> bool:
        """Whether the smallest model is the one to begin with: on a laptop or an unknown device."""
        return self.is_laptop or self.device is None

    def workload(self, shape: QwenShape, method: str) -> Workload:
        """The method's usual step, fully sharded, with the largest micro-batch that fits.

        Where none fits: the smallest, with activation checkpointing.
        """
        defaults = METHOD_DEFAULTS[method]
        step_tokens = defaults.get("batch", {}).get("tokens", BatchSize.model_fields["tokens"].default)
        work = Workload(
            shape=shape,
            weights=defaults["weights"],
            adapter=Adapter(rank=self.rank) if defaults["trainable"] == "adapter" else None,
            state_dtype="fp32",
            seq_len=ROW_TOKENS,
            micro_tokens=ROW_TOKENS,
            step_tokens=max(step_tokens, ROW_TOKENS * self.devices),
            activation_checkpointing=False,
            compute_dtype="bf16",
            device_type="gpu",
            num_devices=self.devices,
        )
        sizes = micro_batch_sizes(work, MICRO_TOKENS)
        if self.device is None:
            return with_batching(work, sizes[-1], True)
        work, memory_bytes = moved(work, self.device), self.device.memory_bytes
        choices = [
            with_batching(work, size, activation_checkpointing)
            for activation_checkpointing in (False, True)
            for size in sizes
        ]
        return next((choice for choice in choices if fits(peak_memory(choice), memory_bytes)), choices[-1])

    def least_memory(self, shape: QwenShape, method: str) -> Memory:
        """What a device needs at the least: one sequence at a time, with checkpointing."""
        return peak_memory(with_batching(self.workload(shape, method), ROW_TOKENS, True))

    def fits(self, shape: QwenShape, method: str) -> bool:
        """Whether the method can work on that model at all; an unknown device holds anything."""
        return self.device is None or fits(self.least_memory(shape, method), self.device.memory_bytes)

    def cost(self, shape: QwenShape, method: str, num_tokens: int) -> Cost | None:
        """Hours and dollars to train on so many tokens; None where the device is not known."""
        if self.device is None:
            return None
        speed = predict_speed(self.workload(shape, method), self.device, self.calibration)
        return cost(speed, num_tokens, self.device, self.devices)

    def affordable_tokens(self, shape: QwenShape, method: str) -> float:
        """Tokens that the limits allow to be read; infinity where no device is known."""
        million = self.cost(shape, method, 1_000_000)
        if million is None:
            return math.inf
        shares = [self.hours / million.hours]
        if self.max_cost is not None and million.money:
            shares.append(self.max_cost / million.money)
        return 1e6 * min(shares)


def shape_to_build(num_params: int) -> QwenShape | None:
    """The shape of about that size for the tokenizer that is trained by default; None where there can be none."""
    try:
        return catalog.size_for_budget(num_params, TrainTokenizer.model_fields["vocab_size"].default)
    except ConfigError:
        return None


def is_chat_model(name: str) -> bool | None:
    """Whether a published model was tuned for conversations, by its name; None for a model that is not published."""
    last = name.rsplit("/", 1)[-1].lower()
    if last.startswith("ladder-") or published_shape(last) is None:
        return None
    return last.endswith("-instruct") or (last.startswith("qwen3") and not last.endswith("-base"))


def num_epochs(method: str) -> float:
    """Passes over the data by default."""
    return METHOD_DEFAULTS[method].get("budget", {}).get("epochs", 1.0)
