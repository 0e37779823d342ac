"""The time and the cost of a run, from the time of a step, and both in words. Never imports torch."""

from dataclasses import dataclass

from trivium.plan.devices import Device
from trivium.plan.speed import Speed
from trivium.plan.workload import FP32_BYTES, Workload, moment_bytes

OVERHEAD_SHARE = 0.12  # of a run's hours: evaluation, checkpoints
# Assumptions about the start and the end of a run. Seconds to import, check the data and warm up; bytes per second at
# which weights are read from a disk and moved to the device, and at which results and checkpoints are written.
START_SECONDS = {"gpu": 20.0, "apple": 10.0, "cpu": 10.0}
LOAD_BANDWIDTH = {"gpu": 1e9, "apple": 2e9, "cpu": 1e9}
SAVE_BANDWIDTH = 5e8
FILE_BYTES = 2  # per parameter of published weights
FIXED_RANGE = (0.5, 2.0)  # of the seconds that these assumptions give
LEAST_DOLLARS = 0.1  # smaller amounts are not told apart


@dataclass(frozen=True)
class Cost:
    """Hours and US dollars of a run with their bounds; money is None if the device has no price."""

    hours: float
    hours_low: float
    hours_high: float
    money: float | None
    money_low: float | None
    money_high: float | None


def time_and_money(cost: Cost) -> str:
    """Hours and dollars with their bounds."""
    text = f"{hours(cost.hours)} ({hours(cost.hours_low)} to {hours(cost.hours_high)})"
    if cost.money is None or cost.money_low is None or cost.money_high is None:
        return text
    bounds = f" ({dollars(cost.money_low)} to {dollars(cost.money_high)})" if cost.money_high >= LEAST_DOLLARS else ""
    return f"{text}, {dollars(cost.money)}{bounds}"


def dollars(amount: float) -> str:
    """Dollars in about three digits: under $0.10, $0.86, $5.20, $67, $1.31K, $132K, $2.5M."""
    if amount < LEAST_DOLLARS:
        return f"under ${LEAST_DOLLARS:.2f}"
    if amount < 9.95:
        return f"${float(f'{amount:.2g}'):.2f}"
    if amount < 999.5:
        return f"${amount:.0f}"
    size, suffix = next(
        (size, suffix) for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if amount >= 0.9995 * size
    )
    return f"${float(f'{amount / size:.3g}'):,g}{suffix}"


def hours(count: float) -> str:
    """Hours in a suitable unit: 40 s, 12 min, 3.4 h, 12 days, 300 years."""
    for unit, size, most in (("s", 1 / 3600, 90), ("min", 1 / 60, 90), ("h", 1.0, 48), ("days", 24.0, 730)):
        if count / size < most:
            return f"{count / size:,.2g} {unit}" if count / size < 10 else f"{count / size:,.0f} {unit}"
    return f"{count / 8766:,.0f} years"


def cost(speed: Speed, num_tokens: int, device: Device, workload: Workload) -> Cost:
    """Time and cost to train on `num_tokens`, including loading, evaluation, checkpoints and saving."""
    steps = num_tokens / speed.step_tokens
    fixed = fixed_seconds(workload, device)
    hours, low, high = (
        (steps * seconds * (1.0 + OVERHEAD_SHARE) + factor * fixed) / 3600
        for seconds, factor in (
            (speed.seconds_per_step, 1.0),
            (speed.low, FIXED_RANGE[0]),
            (speed.high, FIXED_RANGE[1]),
        )
    )
    price = None if device.price_per_hour is None else device.price_per_hour * workload.num_devices
    money, money_low, money_high = (None if price is None else price * value for value in (hours, low, high))
    return Cost(hours, low, high, money, money_low, money_high)


def fixed_seconds(workload: Workload, device: Device) -> float:
    """Seconds of a run that do not depend on its length: starting, loading the weights, saving the result.

    The result and a last checkpoint are fp32, the checkpoint with both moments. Downloading a model is not included.
    """
    loaded = 0 if workload.weights == "random" else FILE_BYTES * workload.shape.num_params
    saved = 2 * FP32_BYTES * workload.num_trained_params + moment_bytes(workload)
    return START_SECONDS[device.kind] + loaded / LOAD_BANDWIDTH[device.kind] + saved / SAVE_BANDWIDTH
