"""Devices to rent or to own: memory, bandwidth, rates, prices, with sources and dates. Prices are the user's to edit.

Never imports torch.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: what the command line calls it, such as `h100-80`.
        title: what people call it.
        kind: `gpu` (CUDA or ROCm), `apple` (memory shared with the CPU), `cpu`.
        memory_bytes: all that it has.
        bandwidth: bytes a second of its memory.
        flops: peak dense FLOP/s by dtype: `fp32`, `fp16`, `bf16`; one that is missing is not there in hardware.
        link_bandwidth: bytes a second to and from the other devices of its node, in each direction.
        price_per_hour: US dollars for one, rented; None where it is not rented.
        source, price_source: where the figures come from.
        price_date: when the price was seen, ISO.
    """

    name: str
    title: str
    kind: Literal["gpu", "apple", "cpu"]
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]
    link_bandwidth: float
    price_per_hour: float | None
    source: str
    price_source: str = ""
    price_date: str = ""
