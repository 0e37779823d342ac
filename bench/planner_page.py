"""Update the generated parts of docs/planner.md: the accuracy measured in bench/results, and the device catalog.

python bench/planner_page.py [--check]
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TRIVIUM_HOME"] = os.devnull  # no changed prices

from trivium.files import GIB
from trivium.plan import devices

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "planner.md"


def generated() -> dict[str, str]:
    """The generated parts by name."""
    return {
        "accuracy": "\n\n".join([memory("cpu", "a CPU"), memory("cuda", "a GPU"), speed(), limits()]),
        "devices": device_table(),
    }


def load(name: str) -> dict[str, Any] | None:
    path = ROOT / "bench" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def memory(name: str, where: str) -> str:
    """Errors of the predicted peak by method, against the allocator."""
    record = load(f"memory-{name}")
    if record is None:
        return f"**Memory on {where}** is not measured yet."
    errors: dict[str, list[float]] = {}
    for row in record["rows"]:
        errors.setdefault(row["name"].partition(",")[0], []).append(row["error"])
    machine = f"{record['date']}, torch {record['versions']['torch']}"
    return section(f"**Memory on {where}** ({machine}): predicted against allocated peak", "bench/memory.py", errors)


def speed() -> str:
    """Errors of predicted tokens per second by method."""
    record = load("speed")
    if record is None:
        return "**Speed** is not measured yet."
    errors: dict[str, list[float]] = {}
    for result in record["results"]:
        errors.setdefault(result["method"], []).append(result["error"])
    machine = f"{record['machine']['processor']}, {record['date']}"
    text = f"**Speed** ({machine}): predicted after `--calibrate` against measured tokens per second"
    return section(text, "bench/speed.py", errors)


def section(text: str, bench: str, errors: dict[str, list[float]]) -> str:
    """A paragraph with the overall error, and a table by method."""
    every = [abs(error) for found in errors.values() for error in found]
    rows = []
    for method, found in errors.items():
        low, high = min(0.0, *found), max(0.0, *found)
        rows.append((method, len(found), f"{median(map(abs, found)):.2%}", f"{low:+.1%}", f"{high:+.1%}"))
    summary = f"in {len(every)} settings: median error {median(every):.2%}, worst {max(every):.1%} (`{bench}`)."
    head = ("method", "settings", "median error", "most below", "most above")
    return f"{textwrap.fill(f'{text}, {summary}', 120)}\n\n{markdown(head, rows)}"


def limits() -> str:
    """Outcomes of random steps with limited memory."""
    record = load("limits")
    if record is None:
        return "**Verdicts** are not measured yet."
    fits, impossible = record["summary"]["fits"], record["summary"]["impossible"]
    text = (
        f"**Verdicts**: random steps in a process with limited memory. Of {fits['num']} predicted to fit, "
        f"{fits['right']} ran; of {impossible['num']} predicted not to fit, {impossible['right']} ran out of memory "
        "(`bench/limits.py`)."
    )
    return textwrap.fill(text, 120)


def device_table() -> str:
    rows = []
    for name, device in devices.catalog().items():
        price = "" if device.price_per_hour is None else f"${device.price_per_hour:.2f}"
        seen = ", ".join(filter(None, (device.price_source, device.price_date)))
        bf16 = f"{device.flops['bf16'] / 1e12:,.4g}" if "bf16" in device.flops else ""
        capacity, bandwidth = f"{device.memory_bytes / GIB:,.1f}", f"{device.bandwidth / 1e9:,.0f}"
        rows.append((f"`{name}`", device.title, capacity, bandwidth, bf16, price, seen, device.source))
    return markdown(("name", "device", "GiB", "GB/s", "bf16 TFLOP/s", "per hour", "price from", "source"), rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    text = page = PAGE.read_text(encoding="utf-8")
    for name, part in generated().items():
        start, stop = f"<!-- {name}: made by bench/planner_page.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(stop)}", re.DOTALL)
        page, found = pattern.subn(lambda _, made=f"{start}\n\n{part}\n\n{stop}": made, page)
        if not found:
            raise SystemExit(f"docs/planner.md lacks the comments around its part {name!r}.")
    if "--check" in sys.argv:
        if text != page:
            raise SystemExit("docs/planner.md is out of date. Run: python bench/planner_page.py")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
