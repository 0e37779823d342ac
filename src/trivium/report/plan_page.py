"""Format the advice of `trivium plan` for the terminal: method, memory bars, time, cost, and reasons.

Plain text if stdout is not a terminal, and no color if NO_COLOR is set.
"""

import math
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trivium.config.load import flatten, to_yaml
from trivium.errors import count_of
from trivium.files import GIB
from trivium.plan.advice import Advice
from trivium.plan.cost import time_and_money
from trivium.plan.decide import Decision
from trivium.plan.fit import FIT_SHARE
from trivium.plan.search import Plan
from trivium.plan.workload import DataFacts

MAX_COLUMNS = 100
BAR_COLUMNS = 40
EIGHTHS = " ▏▎▍▌▋▊▉"


def print_page(advice: Advice, next_commands: Iterable[str]) -> None:
    """Print the page to stdout."""
    columns = min(shutil.get_terminal_size().columns, MAX_COLUMNS) if sys.stdout.isatty() else MAX_COLUMNS
    click.echo(_text(advice, next_commands, Console(width=columns, highlight=False)))


def page_text(advice: Advice) -> str:
    """The page as plain text."""
    return _text(advice, (), Console(width=MAX_COLUMNS, highlight=False, color_system=None, force_jupyter=False))


def _text(advice: Advice, next_commands: Iterable[str], console: Console) -> str:
    plan = advice.plan
    parts = [*_decision(advice.decision)] if advice.decision else []
    if plan:
        parts += [_title(plan), *_memory(plan), *_amount(plan, advice.facts), *_speed(plan), *_choices(plan)]
    parts += _section("Warnings", [("!", text) for text in advice.warnings])
    parts += _section("Next", [("$", command) for command in next_commands])
    with console.capture() as capture:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def bar(share: float, columns: int = BAR_COLUMNS) -> str:
    """A bar with a resolution of one eighth of a column."""
    eighths = round(max(0.0, min(1.0, share)) * columns * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> list[Any]:
    """A heading and rows of a label and texts; empty without rows."""
    rows = list(rows)
    if not rows:
        return []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return [Text(title, style="bold"), Padding(grid, (0, 0, 1, 2))]


def _decision(decision: Decision) -> list[Any]:
    labels = ["why", *[""] * (len(decision.reasons) - 1)]
    return _section(f"Method: {decision.title}", zip(labels, decision.reasons, strict=True))


def _title(plan: Plan) -> Text:
    work, run = plan.workload, plan.run
    name = run.model.name or f"a model with {work.shape.num_params / 1e6:,.3g}M parameters"
    count = f"{work.num_devices} x " if work.num_devices > 1 else ""
    trained = f"{work.num_trained_params:,} of {work.shape.num_params:,} parameters are trained"
    return Text.assemble((f"{run.method} of {name} on {count}{plan.device.title}", "bold"), f"\n  {trained}\n")


def _memory(plan: Plan) -> list[Any]:
    memory, device = plan.memory, plan.device.memory_bytes
    title = Text.assemble(
        ("Memory", "bold"),
        f"  {_gib(memory.total)} of {_gib(device)} at the peak ({memory.instant}); {_gib(plan.allowed_bytes)} may be "
        f"used, {1 - FIT_SHARE:.0%} is kept free",
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    for item, size in sorted(memory.items.items(), key=lambda entry: -entry[1]):
        grid.add_row(Text(item), _gib(size), Text(bar(size / device)))
    color = "green" if memory.total <= plan.allowed_bytes else "red"
    grid.add_row(Text("total", style="bold"), _gib(memory.total), Text(bar(memory.total / device), style=color))
    grid.add_row(Text("device"), _gib(device), Text("█" * BAR_COLUMNS, style="dim"))
    return [title, Padding(grid, (0, 0, 1, 2))]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def _amount(plan: Plan, facts: DataFacts | None) -> list[Any]:
    """What the plan assumes of the data, and how much of it the run reads."""
    run, rows = plan.run, []
    if facts:
        answers = f", {facts.supervised_share:.0%} of them in answers" if run.loss_tokens == "assistant" else ""
        records, each = count_of(facts.num_rows, facts.kind.removesuffix("s")), facts.num_tokens / facts.num_rows
        rows.append(("data", f"{records}, about {each:,.0f} training tokens each{answers}"))
    if plan.num_tokens:
        steps = count_of(math.ceil(plan.num_tokens / run.step_tokens), "step")
        passes = plan.num_tokens / facts.num_tokens if facts else 0.0
        epochs = f"{passes:,.3g} {'epoch' if passes == 1 else 'epochs'}, " if facts else ""
        rows.append(("run", f"{epochs}{plan.num_tokens:,} tokens: {steps} of {run.step_tokens:,} tokens"))
    return _section("Assumed amount", rows)


def _speed(plan: Plan) -> list[Any]:
    speed = plan.speed
    between = f"{speed.step_tokens / speed.high:,.0f} to {speed.step_tokens / speed.low:,.0f}"
    rows = [
        ("speed", f"{speed.tokens_per_second:,.0f} tokens/s ({between})"),
        ("step", f"{speed.seconds_per_step:,.3g} s for {speed.step_tokens:,} tokens: {_shares(speed.items)}"),
    ]
    if plan.cost and plan.num_tokens:
        rows.append(("run", time_and_money(plan.cost)))
    else:
        rows.append(("run", "depends on the data: add --data FILE, or --rows NUMBER --kind conversations"))
    device = plan.device
    if device.price_per_hour is not None:
        seen = f" (as of {device.price_date})" if device.price_date else ""
        rows.append(("price", f"${device.price_per_hour:.2f} per device and hour{seen}"))
    return _section("Time and cost", rows)


def _shares(items: dict[str, float]) -> str:
    total = sum(items.values())
    largest = sorted(items.items(), key=lambda entry: -entry[1])[:4]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest if seconds > 0.005 * total)


def _choices(plan: Plan) -> list[Any]:
    values = flatten(plan.run)
    chosen = {"device": plan.device.name, "adapter": f"rank {plan.run.adapter.rank}" if plan.run.adapter else ""}
    return _section(
        "Choices",
        [(key, chosen.get(key) or to_yaml(values[key]), reason) for key, reason in plan.reasons.items()],
    )
