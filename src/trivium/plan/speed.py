"""How long a step takes, and what a run costs: the work of a step by kind, times what a unit of each kind takes.

The work is counted in `work.py`. What a unit takes comes from a device's data sheet at the efficiencies below, or from
a `Calibration` of the machine at hand; what several devices send each other, and what lies in the host's memory, comes
on top. Measures nothing and never imports torch.

Source: Williams et al. 2009, "Roofline", doi:10.1145/1498765.1498785.
"""

from dataclasses import dataclass

from trivium.plan.calibration import Calibration
from trivium.plan.devices import Device
from trivium.plan.work import Kind, optimizer_bytes, step_work
from trivium.plan.workload import FP32_BYTES, Workload

# Of a device's peak: dense products, attention, its memory's bandwidth. Source: traces of A100s, checked in the tests.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.75, 0.6, 0.8
# FlashAttention 2 goes no faster on newer GPUs. Source: pytorch/pytorch#142132.
MOST_ATTENTION_FLOPS = 350e12
# Processors reach less of what their instructions promise, AMX (whose peak is over ten times fp32's) least of all.
CPU_PRODUCT_SHARE, AMX_SHARE, CPU_ATTENTION_SHARE = 0.6, 0.2, 0.35
LOGIT_BYTES = 20  # written, widened, exponentiated, summed, written back
NF4_VALUE_BYTES = 5  # half a byte read, two written, at half the bandwidth
SECONDS_PER_OPERATION = {"gpu": 6e-6, "apple": 15e-6, "cpu": 10e-6}
# Measured over predicted seconds, where only the data sheet is known; and the error of a machine that was measured, at
# least, where the calibration's own is not larger.
UNMEASURED_RANGE = {"gpu": (0.75, 1.6), "apple": (0.7, 2.5), "cpu": (0.5, 2.5)}
LEAST_MEASURED_ERROR = 0.25

NODE_DEVICES = 8
NETWORK_BANDWIDTH = 25e9  # bytes a second of each device to other nodes: 200 Gbit/s
HOST_LINK_BANDWIDTH = 25e9  # to the host's memory, over PCIe 4
HOST_MEMORY_BANDWIDTH = 20e9  # of the host's optimizer, for each device
OVERLAP_SHARE = 0.5  # of the computing, behind which transfers can hide
OVERHEAD_SHARE = 0.12  # of a run's hours: loading, evaluation, checkpoints


@dataclass(frozen=True)
class Speed:
    """What an optimizer step takes.

    Attributes:
        seconds_per_step: the prediction.
        low, high: seconds between which the measured time is expected.
        step_tokens: tokens of the step, over all devices.
        items: seconds by what they are for; they add up to `seconds_per_step`.
    """

    seconds_per_step: float
    low: float
    high: float
    step_tokens: int
    items: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.step_tokens / self.seconds_per_step


@dataclass(frozen=True)
class Cost:
    """Hours and US dollars of a run, each with its bounds; no money where the device has no price."""

    hours: float
    hours_low: float
    hours_high: float
    money: float | None
    money_low: float | None
    money_high: float | None


def cost(speed: Speed, num_tokens: int, device: Device, num_devices: int) -> Cost:
    """What it takes to train on `num_tokens`, loading, evaluation and checkpoints included."""
    steps = num_tokens / speed.step_tokens
    hours, low, high = (
        steps * seconds * (1.0 + OVERHEAD_SHARE) / 3600 for seconds in (speed.seconds_per_step, speed.low, speed.high)
    )
    price = None if device.price_per_hour is None else device.price_per_hour * num_devices
    money, money_low, money_high = (None if price is None else price * value for value in (hours, low, high))
    return Cost(hours, low, high, money, money_low, money_high)


def predict_speed(workload: Workload, device: Device, calibration: Calibration | None = None) -> Speed:
    """The time of an optimizer step on a device, or on the machine that was measured.

    A GPU computes while the next operations are begun, so that of the two the slower counts; a processor does one
    after the other. A calibration of another device, or without the workload's compute dtype, is not used.
    """
    is_of_this = calibration is not None and calibration.device == device.name
    measured = calibration.seconds_per_unit.get(workload.compute_dtype) if calibration and is_of_this else None
    rates: dict[str, float] = {**seconds_per_unit(workload, device), **(measured or {})}
    items: dict[str, float] = {}
    for term in step_work(workload):
        items[term.item] = items.get(term.item, 0.0) + term.amount * rates[term.kind]
    if workload.place == "gpu":
        items["launches"] = max(0.0, 2 * items["launches"] - sum(items.values()))
    computing = sum(items.values())
    items |= {"communication": max(0.0, communication_seconds(workload, device) - OVERLAP_SHARE * computing)}
    items |= offload_seconds(workload)
    total = sum(items.values())
    low, high = UNMEASURED_RANGE[device.kind]
    if calibration and measured:
        high = 1.0 + max(LEAST_MEASURED_ERROR, calibration.error.get(workload.compute_dtype, 0.0))
        low = 1.0 / high
    items = {item: seconds for item, seconds in items.items() if seconds > 0.0}
    return Speed(total, low * total, high * total, workload.step_tokens, items)


def seconds_per_unit(workload: Workload, device: Device) -> dict[Kind, float]:
    """What a unit of each kind takes by the device's data sheet.

    A dtype that the hardware lacks is emulated in fp32, at half its rate.
    """
    peak = device.flops.get(workload.compute_dtype, device.flops["fp32"] / 2)
    second_per_byte = 1.0 / (BANDWIDTH_SHARE * device.bandwidth)
    if device.kind == "cpu":
        is_matrix_unit = peak > 10 * device.flops["fp32"]
        products = (AMX_SHARE if is_matrix_unit else CPU_PRODUCT_SHARE) * peak
        attention = CPU_ATTENTION_SHARE * device.flops["fp32"]
    else:
        products = PRODUCT_SHARE * peak
        attention = min(ATTENTION_SHARE * peak, MOST_ATTENTION_FLOPS)
    return {
        "flops": 1.0 / products,
        "head_flops": 1.0 / products,
        "attention_flops": 1.0 / attention,
        "attention_scores": 0.0,  # their time is in attention's share of the peak
        "bytes": second_per_byte,
        "weight_bytes": second_per_byte,
        "logits": LOGIT_BYTES * second_per_byte,
        "nf4_values": NF4_VALUE_BYTES * second_per_byte,
        "operations": SECONDS_PER_OPERATION[device.kind],
    }


def communication_seconds(workload: Workload, device: Device) -> float:
    """What the devices send each other in a step, were nothing hidden behind the computing.

    Rings send (W - 1) / W of a tensor for a gather or a scatter, twice that for both. Source: Rajbhandari et al. 2020,
    arXiv:1910.02054. Gradients travel in fp32, weights as they are computed with.
    """
    devices, trained = workload.num_devices, workload.num_trained_params
    if devices == 1:
        return 0.0
    gradient_bytes, weight_bytes = FP32_BYTES * trained, workload.dtype_bytes * trained
    micro_batches = workload.num_micro_batches
    sent = {
        "ddp": 2 * gradient_bytes,
        "zero2": micro_batches * gradient_bytes + weight_bytes,
        "fsdp2": micro_batches * (2 * (weight_bytes + workload.frozen_bytes) + gradient_bytes),
    }
    sent["zero3"] = sent["fsdp2"]
    bandwidth = device.link_bandwidth if devices <= NODE_DEVICES else min(device.link_bandwidth, NETWORK_BANDWIDTH)
    return sent[workload.strategy] * (devices - 1) / devices / (BANDWIDTH_SHARE * bandwidth)


def offload_seconds(workload: Workload) -> dict[str, float]:
    """Gradients to the host, its optimizer, weights back; with `all`, the weights of every pass over them too."""
    if workload.offload == "none":
        return {}
    trained = workload.num_trained_params / workload.num_devices
    moved = 2 * FP32_BYTES * trained
    if workload.offload == "all":
        weights = workload.dtype_bytes * workload.num_trained_params + workload.frozen_bytes
        moved += (3 if workload.recompute else 2) * workload.num_micro_batches * weights
    return {"offload": moved / HOST_LINK_BANDWIDTH + optimizer_bytes(workload) / HOST_MEMORY_BANDWIDTH}
