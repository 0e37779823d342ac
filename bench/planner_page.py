"""Write docs/planner.md: how the planner computes, how far off it was measured to be, and what guides say beside it.

Figures come from the code itself and from bench/results; what was not measured yet is said to be so.

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

from trivium.plan import devices, speed
from trivium.plan.fit import FIT_SHARE
from trivium.plan.memory import FRAMEWORK_BYTES, GIB, GPU_SLACK_SHARE
from trivium.plan.tables import tables
from trivium.plan.tables.claim import GUIDES
from trivium.plan.tables.show import as_markdown, summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "planner.md"
COLUMNS = 120

INTRODUCTION = f"""\
<!-- made by bench/planner_page.py; do not edit -->
# The planner

`trivium plan` says which way to train, whether it fits, how long it takes and what it costs, before anything is
rented. It needs no GPU and imports no torch. `trivium plan --trace` checks its memory against a step of the engine
itself on tensors without values, `--calibrate` measures the machine at hand once, and every run keeps what was
predicted beside what was measured in its `plan.json` (`trivium plan --check runs/*`).

## How it computes

**Memory** (`plan/memory.py`) is a closed form that follows the engine tensor by tensor: weights, what stays frozen,
adapter, gradients, moments, what autograd keeps of each layer, the chunk of logits, what a backward holds for a
moment. The peak is the largest of six instants, from the last chunk of the loss to the optimizer's step, and the page
shows the items of that one. Weights that train, their gradients and both moments are in fp32, 16 bytes a parameter;
8-bit moments take 10. Frozen weights are in the compute dtype, or packed in NF4 with both levels of scales, 0.516
bytes a value; the embedding and the head stay in 16 bits. The loss is computed in chunks, so that no step holds all
of its logits.

What is predicted is what the allocator gives out, and beside it {FRAMEWORK_BYTES["gpu"] / GIB:.2f} GiB for the
runtime of a GPU ({FRAMEWORK_BYTES["cpu"] / GIB:.2f} on a CPU). An allocator holds freed memory that it cannot use
again: up to {GPU_SLACK_SHARE:.0%} of what it has given out on a GPU. On a CPU the C library has held 2.4 times as much
as was given out, so a run whose memory is tight makes it give back; then 128 MiB and a fifth more were enough for all
plans that were tried. A plan fits when its peak takes at most {FIT_SHARE:.0%} of the device, and all of it with what
is held beyond.

**Speed** (`plan/work.py`, `plan/speed.py`) is a roofline: FLOPs of the projections, of attention inside documents and
of the head over the tokens that carry loss; bytes of activations, weights and moments; operations begun. Frozen
weights have no gradient of their own, recomputed layers run their forward twice, packed weights are unpacked in every
pass. Without a calibration a GPU is taken to reach {speed.PRODUCT_SHARE:.0%} of its peak in products,
{speed.ATTENTION_SHARE:.0%} in attention and {speed.BANDWIDTH_SHARE:.0%} of its bandwidth, within
{speed.UNMEASURED_RANGE["gpu"][0]:g} to {speed.UNMEASURED_RANGE["gpu"][1]:g} times the predicted time; a calibration
replaces these figures by measured ones.

**Cost** is steps x seconds x price, and {speed.OVERHEAD_SHARE:.0%} for loading, evaluation and checkpoints. Prices
are dated below and yours to edit in `~/.trivium/devices.yaml`.

**Several devices** (`plan/sharding.py`) are predicted from the documents of DDP, FSDP and ZeRO. Training on more than
one is not built yet, so nothing of it is measured.

**The search** (`plan/search.py`) varies micro-batch, recomputation, the optimizer's states, strategy, devices and,
where both are open, LoRA and QLoRA. Of the plans within 2 % of the best it takes the plainest. Where nothing fits,
the three cheapest changes with which it would are named (`plan/fit.py`)."""


def page() -> str:
    """All of it."""
    found = tables()
    parts = [wrapped(INTRODUCTION), "## How right it is", *measured(), "## Devices", device_table()]
    parts += ["## Two guides, computed again", guides_note(), summary(found), as_markdown(found)]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs of even lines, once the figures stand in them; headings and comments as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(("#", "<!--")) else textwrap.fill(paragraph, COLUMNS, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def guides_note() -> str:
    """Which guides, and how to read what follows."""
    titles = "; ".join(f"{letter}: *{title}*" for letter, title in GUIDES.items())
    return wrapped(
        "Every figure that two guides give for the memory, sizes, time and cost of training Qwen, with ours beside it "
        f"({titles}). GB are 10^9 bytes here, since neither says which it means. A figure is right where our range "
        "overlaps with theirs. `trivium plan --table` prints the same."
    )


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
    """Errors of the predicted peak by the way to train, against the allocator's own count."""
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
    """Errors of predicted tokens a second by the way to train."""
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
    """What became of random plans in processes that are given no more memory than was planned with."""
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
    return markdown(("way", "settings", "median error", "furthest below", "furthest above"), rows)


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
