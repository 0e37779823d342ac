"""Write docs/planner.md: how the planner computes, how far off it was measured to be, and common rules of thumb.

Figures come from the code itself and from bench/results; what was not measured yet is marked.

    python bench/planner_page.py [--check]
"""

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TRIVIUM_HOME"] = os.devnull  # no edits of prices, no calibration

from trivium.config.run import Adapter
from trivium.model import catalog
from trivium.plan import devices, speed
from trivium.plan.devices import GIB
from trivium.plan.fit import FIT_SHARE
from trivium.plan.memory import FRAMEWORK_BYTES, GPU_SLACK_SHARE
from trivium.plan.speed import projection_flops
from trivium.plan.workload import Workload, num_adapter_params

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "planner.md"
COLUMNS = 120

INTRODUCTION = f"""\
<!-- made by bench/planner_page.py; do not edit -->
# The planner

`trivium plan` recommends a training method and predicts whether a run fits, how long it takes and what it costs. It
needs no GPU and does not import torch. `trivium plan --calibrate` measures this machine once, and every run stores its
prediction and its measurements in `plan.json` (`trivium plan --check runs/*`).

## How it computes

**Memory** (`plan/memory.py`) is a closed form that follows the engine tensor by tensor: weights, what stays frozen,
adapter, gradients, moments, what autograd keeps of each layer, the chunk of logits, the temporary buffers
of a backward. The peak is the largest of six instants, from the last chunk of the loss to the optimizer's step, and
the page shows the items of that one. Trained weights, their gradients and both moments are in fp32, 16 bytes a
parameter;
8-bit moments take 10. Frozen weights are in the compute dtype, or quantized to NF4 with both levels of scales, 0.516
bytes a value; the embedding and the head stay in 16 bits. The loss is computed in chunks, so that no step holds all
of its logits.

The prediction is what the allocator gives out, plus {FRAMEWORK_BYTES["gpu"] / GIB:.2f} GiB for the
runtime of a GPU ({FRAMEWORK_BYTES["cpu"] / GIB:.2f} on a CPU). An allocator holds freed memory that it cannot use
again: up to {GPU_SLACK_SHARE:.0%} of what it has given out on a GPU. On a CPU the C library has held 2.4 times as much
as was given out, so a run whose memory is tight makes it give back; then 128 MiB and a fifth more were enough for all
plans that were tried. A plan fits when its peak takes at most {FIT_SHARE:.0%} of the device, and all of it with what
is held beyond.

**Speed** (`plan/speed.py`) is a roofline: FLOPs of the projections, of attention inside documents and
of the head over the supervised tokens; bytes of activations, weights and moments; operations begun. Frozen
weights get no gradient, checkpointed layers run their forward twice, quantized weights are dequantized in each pass.
Without a calibration a GPU is taken to reach {speed.PRODUCT_SHARE:.0%} of its peak in products,
{speed.ATTENTION_SHARE:.0%} in attention and {speed.BANDWIDTH_SHARE:.0%} of its bandwidth, within
{speed.UNMEASURED_RANGE["gpu"][0]:g} to {speed.UNMEASURED_RANGE["gpu"][1]:g} times the predicted time; a calibration
replaces these figures by measured ones.

**Cost** is steps x seconds x price, and {speed.OVERHEAD_SHARE:.0%} for loading, evaluation and checkpoints. Prices
are dated below and yours to edit in `~/.trivium/devices.yaml`.

**Several devices** (`plan/memory.py`) are predicted from the documents of DDP, FSDP and ZeRO. Training on more than
one is not built yet, so nothing of it is measured.

**The search** (`plan/search.py`) varies micro-batch, activation checkpointing, optimizer states, strategy, devices and,
where both are open, LoRA and QLoRA. Of the plans within 2 % of the best it takes the plainest. Where nothing fits,
the three cheapest changes with which it would are named (`plan/fit.py`)."""


def page() -> str:
    """All of it."""
    parts = [wrapped(INTRODUCTION), "## How accurate it is", *measured()]
    parts += ["## Common rules of thumb, and where they are wrong", rules_of_thumb(), "## Devices", device_table()]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs of even lines, once the figures stand in them; headings and comments as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(("#", "<!--")) else textwrap.fill(paragraph, COLUMNS, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def step_of_7b(**changes: Any) -> Workload:
    """A step of four sequences of 1,024 tokens on Qwen2.5-7B, all weights trained on a GPU, or what `changes` say."""
    values: dict[str, Any] = {"weights": "pretrained", "adapter": None, "state_dtype": "fp32", "seq_len": 1024}
    values |= {"micro_tokens": 4096, "step_tokens": 4096, "activation_checkpointing": False, "compute_dtype": "bf16"}
    return Workload(catalog.get("Qwen2.5-7B"), **values | {"device_type": "gpu"} | changes)


def rules_of_thumb() -> str:
    """A few rules, each against the planner's own arithmetic."""
    full, lora = step_of_7b(), step_of_7b(adapter=Adapter(rank=16))
    shape, packed = full.shape, step_of_7b(adapter=Adapter(rank=16), weights="nf4")
    adapters = {size: catalog.get(f"Qwen2.5-{size}") for size in ("0.5B", "7B")}
    shares = (num_adapter_params(other, Adapter(rank=16)) / other.num_params for other in adapters.values())
    small, large = shares
    saved = projection_flops(full) / projection_flops(lora)
    flops = 6 * shape.num_matmul_params * 1e12
    days = flops / (8 * devices.get("a100-80").flops["bf16"]) / 86400
    weights = {name: round(work.frozen_bytes / 1e9, 1) for name, work in (("nf4", packed), ("bf16", lora))}
    table = 128 * catalog.get("Qwen3-0.6B").vocab_size
    rows = [
        (
            "full fine-tuning takes 12 bytes a parameter",
            f"16: fp32 weights, gradients and two moments, 4 each. {shape.num_params / 1e9:.2f}B parameters take "
            f"{16 * shape.num_params / 1e9:.0f} GB before any activation",
        ),
        (
            "LoRA computes a tenth of full fine-tuning",
            f"full fine-tuning is {saved:.2f} times as much: 6 FLOP a parameter and token against 4, since only the "
            "gradients of the frozen weights are left out",
        ),
        (
            "QLoRA takes half a byte a parameter",
            f"0.516 for the projections, and the embedding and head stay in 16 bits: {weights['nf4']} GB for 7B "
            f"instead of {weights['bf16']}",
        ),
        ("an adapter of rank 16 is under 1 % of the model", f"{large:.2%} of 7B, but {small:.2%} of 0.5B"),
        (
            "8 GPUs pre-train 7B on 1T tokens in a month",
            f"6 x {shape.num_matmul_params / 1e9:.2f}e9 x 1e12 = {flops:.2e} FLOP: {days:.0f} days at the full peak of "
            "8 A100s, and no run reaches the peak",
        ),
        (
            "a token id takes 2 bytes on disk",
            f"4: {catalog.get('Qwen3-0.6B').vocab_size:,} ids do not fit 16 bits. 1T tokens take 4 TB",
        ),
        (
            "a 10M model can use Qwen's tokenizer",
            f"its embeddings alone are {table / 1e6:.1f}M parameters at a width of 128: train a smaller tokenizer",
        ),
    ]
    return markdown(("rule", "what the planner computes"), rows)


def measured() -> Iterator[str]:
    """What the benches found."""
    for name, where in (("memory-cpu", "On a CPU"), ("memory-cuda", "On a GPU")):
        record = load(name)
        yield memory_errors(where, record) if record else f"**Memory. {where}** it was not measured yet."
    record = load("speed")
    yield speed_errors(record) if record else "**Speed** was not measured yet."
    if record := load("limits"):
        yield verdicts(record["summary"])


def load(name: str) -> dict[str, Any] | None:
    """A bench's results, where there are any."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def memory_errors(where: str, record: dict[str, Any]) -> str:
    """Errors of the predicted peak by method, against the allocator's own count."""
    found, torch = record["summary"], record["versions"]["torch"]
    text = wrapped(
        f"**Memory. {where}** ({record['device']}, {record['date']}, torch {torch}), the predicted peak of a step "
        f"against what the allocator counted, in {found['num']} settings: median error {found['median']:.2%}, worst "
        f"{found['worst']:.2%} (`bench/memory.py`)."
    )
    ways: dict[str, list[float]] = {}
    for row in record["rows"]:
        ways.setdefault(row["name"].partition(",")[0], []).append(row["error"])
    return f"{text}\n\n{by_way(ways)}"


def speed_errors(record: dict[str, Any]) -> str:
    """Errors of predicted tokens a second by method."""
    ways: dict[str, list[float]] = {}
    for result in record["results"]:
        ways.setdefault(result["method"], []).append(result["error"])
    errors = [abs(error) for found in ways.values() for error in found]
    middle, worst = median(errors), max(errors)
    text = wrapped(
        f"**Speed** ({record['machine']['processor']}, {record['date']}), predicted after `--calibrate` against "
        f"measured tokens a second, in {len(errors)} settings: median error {middle:.1%}, worst {worst:.1%} "
        "(`bench/speed.py`)."
    )
    return f"{text}\n\n{by_way(ways)}"


def verdicts(found: dict[str, dict[str, int]]) -> str:
    """How random plans ended in processes that are given no more memory than was planned with."""
    fits, impossible = found["fits"], found["impossible"]
    return wrapped(
        f"**Verdicts.** Random steps were run in a process whose memory is limited. Of {fits['num']} that were said to "
        f"fit {fits['right']} ran; of {impossible['num']} said to be impossible {impossible['right']} ran out "
        "(`bench/limits.py`)."
    )


def by_way(ways: dict[str, list[float]]) -> str:
    """A line a way: settings, median error, and the most that was promised too little and too much."""
    rows = []
    for way, errors in ways.items():
        low, high = min(0.0, *errors), max(0.0, *errors)
        rows.append((way, len(errors), f"{median(map(abs, errors)):.2%}", f"{low:+.1%}", f"{high:+.1%}"))
    return markdown(("method", "settings", "median error", "furthest below", "furthest above"), rows)


def device_table() -> str:
    """The catalogue."""
    rows = []
    for name, device in devices.catalog().items():
        price = "" if device.price_per_hour is None else f"${device.price_per_hour:.2f}"
        seen = ", ".join(filter(None, (device.price_source, device.price_date)))
        bf16 = f"{device.flops['bf16'] / 1e12:,.4g}" if "bf16" in device.flops else ""
        memory, bandwidth = f"{device.memory_bytes / GIB:,.1f}", f"{device.bandwidth / 1e9:,.0f}"
        rows.append((f"`{name}`", device.title, memory, bandwidth, bf16, price, seen, device.source))
    head = ("name", "device", "GiB", "GB/s", "bf16 TFLOP/s", "an hour", "price seen", "figures from")
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    made = page()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
            raise SystemExit("docs/planner.md is not what the code says. Run: python bench/planner_page.py")
        return
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
