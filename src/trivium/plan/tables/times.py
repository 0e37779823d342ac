"""What the guides say of time, money and the size of data, each predicted again with a device's rates and price.

An example has 400 to 1,024 tokens where a guide does not say how long it is. Imported inside `plan.tables`; no torch.
"""

from collections.abc import Iterator
from dataclasses import replace

from trivium.plan.devices import Device
from trivium.plan.fit import fits
from trivium.plan.memory import peak_memory
from trivium.plan.speed import Speed, cost, predict_speed
from trivium.plan.tables.claim import Claim, point
from trivium.plan.tables.needs import step
from trivium.plan.tables.sizes import qwen7b
from trivium.plan.workload import with_batch

EXAMPLE_TOKENS = (400, 1024)
PLACE = "Cost and time comparison"
DAY, MONTH = 24.0, 30.4 * 24.0
CLUSTERS = ((8, "a100-80"), (8, "h100-80"), (32, "h100-80"), (64, "h100-80"), (256, "h100-80"), (1024, "h100-80"))
TEXT_BYTES_A_TOKEN = (3.0, 5.0)


def tuning_claims(there: dict[str, Device]) -> Iterator[Claim]:
    """LoRA on one GPU, full fine-tuning on four, by the number of examples."""
    adapted = replace(step("qlora", "7B", rows=1, recompute=True), step_tokens=16_384)
    tuned = step(
        "full",
        "7B",
        seq_len=1024,
        micro_tokens=4096,
        step_tokens=65_536,
        recompute=True,
        num_devices=4,
        strategy="zero3",
    )
    for what, work, name, examples, passes, hours, money in (
        ("QLoRA of 7B, 10K examples, RTX 4090", adapted, "rtx-4090", 10_000, 1, (1, 3), (2, 10)),
        ("full of 7B, 10K examples twice, 4 x A100 80", tuned, "a100-80", 10_000, 2, (4, 12), (50, 170)),
        ("full of 7B, 50K examples twice, 4 x A100 80", tuned, "a100-80", 50_000, 2, (10, 24), (50, 170)),
    ):
        device = there[name]
        speed = predict_speed(work, device)
        taken = [cost(speed, examples * passes * tokens, device, work.num_devices) for tokens in EXAMPLE_TOKENS]
        how = (
            f"{examples * passes:,} x {EXAMPLE_TOKENS[0]} to {EXAMPLE_TOKENS[1]:,} tokens at "
            f"{_rate(speed)}, and 12 % for the rest of a run"
        )
        yield Claim("A", PLACE, f"{what}: time", "hours", hours, (taken[0].hours_low, taken[1].hours_high), how)
        price = (device.price_per_hour or 0.0) * work.num_devices
        yield Claim(
            "A",
            PLACE,
            f"{what}: money",
            "dollars",
            money,
            (taken[0].money_low or 0.0, taken[1].money_high or 0.0),
            f"the same at ${price:.2f} an hour, the price of {device.price_date}",
        )
    how = "6 FLOP for each parameter and token over 4, without the weights' gradient; ten times the data make it 15"
    place = "When each approach makes sense"
    yield Claim("A", place, "full over LoRA, arithmetic for the same tokens", "times", (10, 50), point(6 / 4), how)


def _rate(speed: Speed) -> str:
    """Tokens a second with their bounds."""
    low, high = speed.step_tokens / speed.high, speed.step_tokens / speed.low
    return f"{speed.tokens_per_second:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"


def from_nothing(device: Device, count: int) -> Speed:
    """The fastest portions of a step of 4M tokens or more, with activations kept or not, of those that fit."""
    work = step("full", "7B", seq_len=4096, step_tokens=max(2**22, 2**14 * count), num_devices=count, strategy="fsdp2")
    choices = [(rows * 4096, recompute) for rows in (1, 2, 4) for recompute in (False, True)]
    tried = (with_batch(work, *choice) for choice in choices)
    fitting = [each for each in tried if fits(peak_memory(each), device.memory_bytes)]
    return min((predict_speed(each, device) for each in fitting), key=lambda speed: speed.seconds_per_step)


def scratch_claims(there: dict[str, Device]) -> Iterator[Claim]:
    """A trillion tokens through 7.6 billion parameters."""
    shape, device = qwen7b(), there["a100-80"]
    taken = cost(from_nothing(device, 8), 10**12, device, 8)
    flops = 6 * shape.num_matmul_params * 1e12
    days_at_peak = flops / (8 * device.flops["bf16"]) / 3600 / DAY
    how = (
        f"6 x {shape.num_matmul_params / 1e9:.3g}e9 x 1e12 = {flops:.3g} FLOP, {days_at_peak:.0f} days at the peak of "
        "8 x 312 TFLOP/s, which nobody reaches"
    )
    yield Claim("A", "Custom harness", "1T tokens, 7B, 8 x A100 80", "hours", point(MONTH), point(taken.hours), how)
    how = f"{taken.hours / DAY:,.0f} days x 24 h x 8 x ${device.price_per_hour:.2f}"
    yield Claim("A", PLACE, "the same: money", "dollars", (10e3, float("inf")), point(taken.money or 0.0), how)


def scratch_grid(there: dict[str, Device]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """How long guide A's clusters take for a trillion tokens, and for the eighteen that Qwen2.5 has read."""
    rows = []
    for count, name in CLUSTERS:
        device = there[name]
        speed = from_nothing(device, count)
        taken = [cost(speed, tokens, device, count) for tokens in (10**12, 18 * 10**12)]
        shown = [f"{each.hours / DAY:,.0f} days, ${(each.money or 0.0) / 1e3:,.0f}K" for each in taken]
        rows.append((f"{count} x {device.title}", f"{speed.tokens_per_second:,.0f}", *shown))
    return ("", "tokens/s", "1T tokens", "18T tokens"), tuple(rows)


def data_claims() -> Iterator[Claim]:
    """Text and the same text as token ids."""
    low, high = TEXT_BYTES_A_TOKEN
    yield Claim(
        "A",
        "Custom training harness",
        "2 TB of text, tokenised",
        "bytes",
        point(25e9),
        (2e12 / high * 4, 2e12 / low * 4),
        f"{low:g} to {high:g} B of text a token, 4 B an id: with 151,665 tokens an id does not fit 16 bits",
    )
