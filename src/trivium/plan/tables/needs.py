"""Guide B's tables of memory: full fine-tuning, LoRA and QLoRA of one size after another.

Theirs is reckoned as they do, with true counts of parameters, and beside it what a step of this engine takes. A GB is
10^9 bytes throughout, since the guides do not say which one they mean. Imported inside `plan.tables`; no torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trivium.config.run import Adapter
from trivium.model import catalog
from trivium.plan.devices import Device
from trivium.plan.fit import fits, moved
from trivium.plan.memory import Memory, instants, peak_memory
from trivium.plan.tables.claim import Claim, point
from trivium.plan.tables.sizes import frozen_share
from trivium.plan.workload import Workload

GB = 1e9
SEQ_LEN, ROWS = 1024, 4  # guide B's T and B
MODELS = {
    "0.5B": "Qwen2.5-0.5B",
    "1.5B": "Qwen2.5-1.5B",
    "3B": "Qwen2.5-3B",
    "7B": "Qwen2.5-7B",
    "13B": "Qwen2.5-14B",
    "70B": "Qwen2.5-72B",
}
"""Guide B's sizes and the Qwen that is meant, or nearest."""
# Guide B's tables, in GB. Full: weights, gradients, Adam, activations, total. LoRA: base, adapter with gradients and
# Adam, activations, total. QLoRA: base, adapter and activations, total.
FULL = {
    "0.5B": (1.0, 1.0, 4.0, 1.5, 7.5),
    "1.5B": (3.0, 3.0, 12.0, 3.0, 21.0),
    "3B": (6.0, 6.0, 24.0, 5.0, 41.0),
    "7B": (14.0, 14.0, 56.0, 10.0, 94.0),
}
LORA = {
    "0.5B": (1.0, 0.05, 1.5, 2.5),
    "1.5B": (3.0, 0.15, 3.0, 6.0),
    "3B": (6.0, 0.3, 5.0, 11.0),
    "7B": (14.0, 0.7, 10.0, 25.0),
}
QLORA = {"7B": (3.5, 8.0, 11.5), "13B": (6.5, 12.0, 18.5), "70B": (35.0, 30.0, 65.0)}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "recomputed": {"recompute": True},
    "a row at a time": {"recompute": True, "micro_tokens": SEQ_LEN},
    "8-bit moments": {"recompute": True, "micro_tokens": SEQ_LEN, "state_dtype": "8bit"},
    "paged moments": {"recompute": True, "micro_tokens": SEQ_LEN, "state_dtype": "paged-8bit"},
}
"""What may be changed to make a step fit without changing what is learnt by more than rounding, gentlest first."""
TRAINED = {"full": "pretrained", "lora": "pretrained", "qlora": "nf4"}


def step(way: str, size: str, device: Device | None = None, rows: int = ROWS, **changes: Any) -> Workload:
    """A step of guide B's: rows of 1,024 tokens, all of which carry loss, an adapter of rank 16."""
    work = Workload(
        shape=catalog.get(MODELS[size]),
        weights="nf4" if TRAINED[way] == "nf4" else "pretrained",
        adapter=None if way == "full" else Adapter(rank=16),
        state_dtype="fp32",
        seq_len=SEQ_LEN,
        micro_tokens=rows * SEQ_LEN,
        step_tokens=ROWS * SEQ_LEN,
        recompute=False,
        compute_dtype="bf16",
        place="gpu",
    )
    return replace(moved(work, device) if device else work, **changes)


def gentlest(work: Workload, device: Device) -> tuple[str, Memory] | None:
    """The first of `SETTINGS` with which a step fits a device, and what it takes then."""
    for name, changes in SETTINGS.items():
        memory = peak_memory(replace(work, **changes))
        if fits(memory, device.memory_bytes):
            return name, memory
    return None


def activations(work: Workload) -> float:
    """Most bytes of activations, logits and what a backward holds for a moment."""
    names = ("activations", "logits", "temporaries")
    return max(sum(items.get(name, 0.0) for name in names) for items in instants(work).values())


def full_claims() -> Iterator[Claim]:
    """Guide B's table of full fine-tuning, each sum with the true count, and activations as they are here."""
    place = "Full SFT memory"
    for size, (weights, gradients, adam, kept, total) in FULL.items():
        work = step("full", size)
        params = work.shape.num_params
        states = 12 * params
        yield Claim(
            "B",
            place,
            f"{size}: weights, gradients, Adam",
            "bytes",
            point((weights + gradients + adam) * GB),
            point(states),
            f"{params:,} x (2 + 2 + 8) B",
        )
        yield _activation_claim(place, size, "full", kept)
        yield Claim(
            "B",
            place,
            f"{size}: total",
            "bytes",
            point(total * GB),
            point(states + kept * GB),
            f"12 x {params / 1e9:.4g}e9 = {states / GB:.1f} GB, and its {kept:g} GB of activations",
        )
    yield Claim(
        "B",
        "How much fits on a laptop",
        "full fine-tuning",
        "bytes a parameter",
        point(14),
        point(12),
        "2 + 2 + 8 by its own columns; with weights and gradients in fp32, as here, 4 + 4 + 8 = 16",
    )


def _activation_claim(place: str, size: str, way: str, kept: float) -> Claim:
    work = step(way, size)
    ours = activations(replace(work, recompute=True)), activations(work)
    vocab = work.shape.vocab_size
    logits = ROWS * SEQ_LEN * vocab * 4
    how = (
        f"recomputed to kept, the loss in chunks; its logits alone, {ROWS} x {SEQ_LEN:,} x {vocab:,} x 4 B, "
        f"are {logits / GB:.1f} GB where they are not chunked"
    )
    return Claim("B", place, f"{size}: activations", "bytes", point(kept * GB), ours, how)


def lora_claims() -> Iterator[Claim]:
    """Guide B's table of LoRA."""
    place = "LoRA memory"
    for size, (base, adapter, kept, total) in LORA.items():
        work = step("lora", size)
        params, trained = work.shape.num_params, work.num_trained_params
        yield Claim(
            "B", place, f"{size}: base, frozen", "bytes", point(base * GB), point(2 * params), f"{params:,} x 2 B"
        )
        yield Claim(
            "B",
            place,
            f"{size}: adapter, gradients, Adam",
            "bytes",
            point(adapter * GB),
            point(16 * trained),
            f"{trained:,} x (4 + 4 + 8) B",
        )
        yield _activation_claim(place, size, "lora", kept)
        yield _total_claim(place, size, "lora", total)


def qlora_claims() -> Iterator[Claim]:
    """Guide B's table of QLoRA."""
    place = "QLoRA memory"
    work = step("qlora", "7B")
    tables = work.shape.num_embedding_params
    yield Claim(
        "B",
        place,
        "4 bits over 16",
        "share",
        point(0.25),
        point(frozen_share(work)),
        f"embedding and head stay in 16 bits: 2 B x {tables:,} of {work.frozen_bytes / GB:.2f} GB",
    )
    for size, (base, _, total) in QLORA.items():
        work = step("qlora", size)
        packed = work.shape.num_hidden_layers * work.shape.num_layer_matmul_params
        rest = 2 * (work.shape.num_params - packed)
        yield Claim(
            "B",
            place,
            f"{size}: base",
            "bytes",
            point(base * GB),
            point(work.frozen_bytes),
            f"{MODELS[size]}: {packed:,} x 0.516 B + {rest / GB:.2f} GB that stays in 16 bits",
        )
        yield _total_claim(place, size, "qlora", total)


def _total_claim(place: str, size: str, way: str, total: float) -> Claim:
    work = step(way, size)
    least, most = peak_memory(replace(work, recompute=True)), peak_memory(work)
    how = f"the peak of a step here, recomputed to kept; {least.framework / GB:.2f} GB of it the runtime's"
    return Claim("B", place, f"{size}: total", "bytes", point(total * GB), (least.total, most.total), how)
