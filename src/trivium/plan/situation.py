"""What somebody has and wants, and what that can hold, compute and pay: the ground the decision stands on.

Rough on purpose: memory in the smallest portions that the engine can work in, time by parameters times tokens. What is
exact once a way is chosen is in `fit.py` and `speed.py`. Imported inside `plan` and by its verb; never imports torch.
"""

import math
from dataclasses import dataclass

from trivium.config import METHOD_DEFAULTS, Adapter
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan.devices import Device
from trivium.plan.facts import DataFacts
from trivium.plan.fit import fits
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.workload import Workload

MAX_DAYS = 90.0
"""Longer than this nobody waits who has not said so."""
USUAL_UTILISATION = 0.4
"""Share of a device's peak that training gets out of it. Source: 38 to 46 % of H100s and 52 to 60 % of A100s with
recomputation, MosaicML's llm-foundry benchmarks."""
ROW_TOKENS = 1024


@dataclass(frozen=True)
class Situation:
    """What is known before anything is decided; None and the defaults stand for what is not.

    Attributes:
        facts: the data; None when there is none yet.
        is_general: whether an off-the-shelf model already does the task well enough; None when nobody has tried.
        device: what training would run on.
        num_devices: how many of them.
        is_laptop: whether training has to fit on a laptop.
        adapter_only: whether only the adapter may be shared, apart from the model's weights and their licence.
        purse: US dollars for the run; counts where the device has a price.
        days: how long the run may take. Default: `MAX_DAYS`.
        model: the model wanted, as `model` in a run file names it.
        shape: its shape, where the catalogue does not know it.
        num_params: the size wanted, where no model is.
        rank: of the adapter.
    """

    facts: DataFacts | None = None
    is_general: bool | None = None
    device: Device | None = None
    num_devices: int = 1
    is_laptop: bool = False
    adapter_only: bool = False
    purse: float | None = None
    days: float | None = None
    model: str | None = None
    shape: QwenShape | None = None
    num_params: int | None = None
    rank: int = Adapter.model_fields["rank"].default

    @property
    def devices(self) -> int:
        """How many devices, one at the least."""
        return max(1, self.num_devices)

    @property
    def max_days(self) -> float:
        """How long the run may take."""
        return MAX_DAYS if self.days is None else self.days

    @property
    def has_data(self) -> bool:
        """Whether there is anything to learn from."""
        return self.facts is not None and self.facts.num_rows > 0 and self.facts.num_tokens > 0

    @property
    def starts_small(self) -> bool:
        """Whether the smallest model is the one to begin with: on a laptop, or on nobody knows what."""
        return self.is_laptop or self.device is None

    def least_memory(self, shape: QwenShape, method: str) -> Memory:
        """What a device needs at the least: one row of 1,024 tokens at a time, activations recomputed, all sharded."""
        chosen = METHOD_DEFAULTS[method]
        workload = Workload(
            shape=shape,
            weights=chosen["weights"],
            adapter=Adapter(rank=self.rank) if chosen["trainable"] == "adapter" else None,
            states="fp32",
            seq_len=ROW_TOKENS,
            micro_tokens=ROW_TOKENS,
            step_tokens=ROW_TOKENS * self.devices,
            recompute=True,
            compute_dtype="bf16" if self.device is None or "bf16" in self.device.flops else "fp32",
            place="cpu" if self.device is not None and self.device.kind == "cpu" else "gpu",
            num_devices=self.devices,
        )
        return peak_memory(workload)

    def fits(self, shape: QwenShape, method: str) -> bool:
        """Whether the method can work on that model at all; an unknown device holds anything."""
        return self.device is None or fits(self.least_memory(shape, method), self.device.memory_bytes)

    def days_for(self, num_params: int, num_tokens: float, method: str) -> float | None:
        """Days to train on so many tokens; None where the device's speed is unknown.

        6 FLOPs a parameter and token, or 4 where the weights are frozen and have no gradient, at 40 % of the peak.
        Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
        """
        flops = self.device.flops.get("bf16", self.device.flops.get("fp32", 0.0)) if self.device else 0.0
        if not flops > 0:
            return None
        each = 4 if METHOD_DEFAULTS[method]["trainable"] == "adapter" else 6
        return each * num_params * num_tokens / (flops * USUAL_UTILISATION * self.devices) / 86_400

    def price_of(self, days: float) -> float | None:
        """US dollars for so many days on all devices; None where they are not rented."""
        if self.device is None or self.device.price_per_hour is None:
            return None
        return days * 24 * self.device.price_per_hour * self.devices

    def affordable_tokens(self, num_params: int, method: str) -> float:
        """Tokens that time and purse allow to be read; infinity where neither is known to end."""
        days = self.days_for(num_params, 1.0, method)
        if days is None:
            return math.inf
        limits = [self.max_days / days]
        price = self.price_of(days)
        if self.purse is not None and price:
            limits.append(self.purse / price)
        return min(limits)


def shape_of(name: str) -> QwenShape | None:
    """The shape of a published model, with its owner before it or not; None for any other."""
    try:
        return catalog.get(name.rsplit("/", 1)[-1])
    except ConfigError:
        return None


def is_chat_model(name: str) -> bool | None:
    """Whether a published model was tuned for conversations, by its name; None for a model that is not published."""
    last = name.rsplit("/", 1)[-1].lower()
    if last.startswith("ladder-") or shape_of(last) is None:
        return None
    return last.endswith("-instruct") or (last.startswith("qwen3") and not last.endswith("-base"))


def num_epochs(method: str) -> float:
    """Passes over the data where nobody says otherwise."""
    return METHOD_DEFAULTS[method].get("budget", {}).get("epochs", 1.0)
