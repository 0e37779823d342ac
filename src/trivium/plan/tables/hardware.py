"""What the guides say fits which device, what Qwen2.5-7B takes on one, and what each of several devices takes.

A GB is 10^9 bytes. Imported inside `plan.tables`; never imports torch.
"""

from collections.abc import Iterator
from dataclasses import replace

from trivium.config.run import Adapter, Projection
from trivium.plan.devices import Device
from trivium.plan.fit import FIT_SHARE, fits
from trivium.plan.memory import peak_memory
from trivium.plan.tables.claim import Claim, Guide, point
from trivium.plan.tables.needs import FULL, GB, LORA, MODELS, SEQ_LEN, SETTINGS, gentlest, step
from trivium.plan.tables.sizes import qwen7b

DEVICES = {
    "T4": "t4",
    "24 GB": "rtx-4090",
    "A100 40": "a100-40",
    "A100 80": "a100-80",
    "H100": "h100-80",
    "H200": "h200",
}
QUERY_VALUE: list[Projection] = ["q_proj", "v_proj"]


def fit_claims(there: dict[str, Device]) -> Iterator[Claim]:
    """Which device the guides say suffices, with moments in fp32 as they have them."""
    full, lora, qlora = "Full SFT memory", "LoRA memory", "QLoRA memory"
    said: tuple[tuple[Guide, str, str, str, str, bool], ...] = (
        ("B", full, "full", "0.5B", "T4", True),
        ("B", full, "full", "1.5B", "T4", False),
        ("B", full, "full", "7B", "A100 80", True),
        ("A", "Full fine-tuning", "full", "7B", "A100 80", False),
        ("B", lora, "lora", "3B", "T4", True),
        ("B", lora, "lora", "7B", "24 GB", True),
        ("A", "LoRA: one consumer GPU is enough", "lora", "7B", "A100 40", True),
        ("B", qlora, "qlora", "7B", "T4", True),
        ("A", "LoRA: one consumer GPU is enough", "qlora", "7B", "24 GB", True),
        ("B", qlora, "qlora", "70B", "A100 80", True),
    )
    for guide, place, way, size, name, claimed in said:
        device = there[DEVICES[name]]
        work = step(way, size, device)
        least = peak_memory(replace(work, **SETTINGS["a row at a time"]))
        found = gentlest(work, device)
        settings = f"with {found[0]}: {found[1].total / GB:.1f} GB" if found else "with none of the settings"
        how = (
            f"a row at a time, recomputed, in {work.compute_dtype}: {least.total / GB:.1f} of "
            f"{FIT_SHARE * device.memory_bytes / GB:.1f} GB that may be used; {settings}"
        )
        what = f"{way} of {size} on {name}"
        yield Claim(guide, place, what, None, claimed, fits(least, device.memory_bytes), how)


def fit_grid(there: dict[str, Device]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """For every way, size and device: the gentlest settings that fit and the peak in GB; head and rows."""
    rows = []
    for way, sizes in (("full", FULL), ("lora", LORA), ("qlora", MODELS)):
        for size in sizes:
            cells = []
            for name in DEVICES.values():
                device = there[name]
                found = gentlest(step(way, size, device), device)
                cells.append(f"{found[1].total / GB:.1f} {found[0]}" if found else "no")
            rows.append((f"{way} {MODELS[size]}", *cells))
    return ("", *DEVICES), tuple(rows)


def seven_billion_claims() -> Iterator[Claim]:
    """Guide A's figures for Qwen2.5-7B on one GPU: LoRA a row at a time, and the parts of full fine-tuning."""
    shape, place = qwen7b(), "LoRA: one consumer GPU is enough"
    params = shape.num_params
    ways: tuple[tuple[str, str, Adapter, tuple[float, float]], ...] = (
        ("QLoRA", "qlora", Adapter(), (10, 16)),
        ("LoRA on q and v", "lora", Adapter(targets=QUERY_VALUE), (20, 24)),
        ("LoRA on all 7", "lora", Adapter(), (24, 35)),
    )
    for what, way, adapter, (low, high) in ways:
        work = step(way, "7B", rows=1, adapter=adapter)
        found = peak_memory(replace(work, recompute=True)).total, peak_memory(work).total
        yield Claim(
            "A",
            place,
            what,
            "bytes",
            (low * GB, high * GB),
            found,
            f"r=16, a row of {SEQ_LEN:,} tokens at a time, recomputed to kept",
        )
    least = peak_memory(step("qlora", "7B", rows=1, recompute=True, seq_len=256, micro_tokens=256)).total
    yield Claim(
        "A",
        place,
        "QLoRA on a T4 with Unsloth",
        "bytes",
        point(7 * GB),
        point(least),
        "256 tokens at a time, recomputed; embedding and head, 2.2 GB, in 16 bits on the GPU",
    )
    place = "Full fine-tuning"
    engine = peak_memory(step("full", "7B", rows=1, recompute=True))
    yield Claim("A", place, "weights in bf16", "bytes", point(15 * GB), point(2 * params), f"{params:,} x 2 B")
    yield Claim("A", place, "both moments in fp32", "bytes", point(58 * GB), point(8 * params), f"{params:,} x 8 B")
    yield Claim(
        "A",
        place,
        "gradients",
        "bytes",
        (15 * GB, 30 * GB),
        (2 * params, 4 * params),
        f"{params:,} x 2 B, or x 4 B as here",
    )
    yield Claim(
        "A",
        place,
        "all of it, on one device",
        "bytes",
        (60 * GB, 120 * GB),
        (93 * GB, 123 * GB),
        "its own parts: 15 + 58 + 15 + 5 to 15 + 58 + 30 + 20",
    )
    yield Claim(
        "A",
        "Cost and time comparison",
        "all of it, in the table of costs",
        "bytes",
        (60 * GB, 80 * GB),
        point(engine.total),
        f"here {params:,} x (4 + 4 + 8) B = {16 * params / GB:.1f} GB, recomputed",
    )
    yield Claim(
        "A",
        "How the three paradigms compare",
        "all of it, over the weights in 16 bits",
        "times",
        point(4),
        point(6),
        "(2 + 2 + 8) / 2, before activations; with masters and gradients in fp32 8",
    )


def several_claims(there: dict[str, Device]) -> Iterator[Claim]:
    """Guide A's setups for full fine-tuning of Qwen2.5-7B on several GPUs."""
    setups: tuple[tuple[str, int, str, str, int], ...] = (
        ("2 x A100 80, ZeRO-2, 1,024 tokens", 2, "a100-80", "zero2", 1024),
        ("4 x A100 80, ZeRO-2, 4,096 tokens", 4, "a100-80", "zero2", 4096),
        ("4 x A100 80, ZeRO-3, 4,096 tokens", 4, "a100-80", "zero3", 4096),
        ("4 x A100 40, ZeRO-3, recomputed (tight)", 4, "a100-40", "zero3", 1024),
        ("8 x A100 40, ZeRO-3, 4,096 tokens", 8, "a100-40", "zero3", 4096),
    )
    for what, count, name, strategy, seq_len in setups:
        device = there[name]
        work = step(
            "full",
            "7B",
            seq_len=seq_len,
            micro_tokens=seq_len,
            step_tokens=4 * seq_len * count,
            recompute=True,
            num_devices=count,
            strategy=strategy,
        )
        memory, host = peak_memory(work), peak_memory(replace(work, offload="optimizer"))
        allowed = FIT_SHARE * device.memory_bytes
        how = (
            f"{memory.total / GB:.1f} of {allowed / GB:.1f} GB on each that may be used; "
            f"{host.total / GB:.1f} with the optimizer on the host"
        )
        yield Claim("A", "Full fine-tuning", what, None, True, fits(memory, device.memory_bytes), how)
    work = step("full", "7B", seq_len=4096, micro_tokens=4096, step_tokens=2**20, num_devices=8, strategy="fsdp2")
    found = peak_memory(replace(work, recompute=True)).total, peak_memory(work).total
    yield Claim(
        "A",
        "Cost and time comparison",
        "from scratch, 8 GPUs, on each",
        "bytes",
        (60 * GB, 80 * GB),
        found,
        "a row of 4,096 tokens at a time, FSDP2, recomputed to kept",
    )
