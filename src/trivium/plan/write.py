"""A plan as a run file: all that was chosen explicit, each choice with its reason, the figures in a header.

What the method says by itself is left out, so that the file stays short and `method=qlora` still overrides it whole.
Decides nothing. The verb `plan` and the generator of the recipes import this file; it never imports torch.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivium.config.load import quote, to_yaml
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError
from trivium.files import atomic_write
from trivium.plan.goal import Plan
from trivium.plan.memory import GIB
from trivium.plan.speed import Cost

FIRST_LINE = "Planned by `trivium plan`; the figures are predictions, each choice has its reason beside it."
ALWAYS_WRITTEN: dict[str, tuple[str, ...]] = {
    "data": ("sources", "seq_len"),
    "optimizer": ("state_dtype",),
    "batch": ("tokens", "micro_tokens"),
    "adapter": ("rank", "targets"),
    "parallel": ("devices", "strategy", "offload"),
}
"""What a plan decides or stands on, also where it is the default."""


def write_run(plan: Plan, path: Path, notes: Sequence[str] = ()) -> None:
    """Write the run file, whole or not at all; `load_run` reads the same run back.

    Raises: ConfigError when there is a file that no plan wrote.
    """
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(f"# {FIRST_LINE}\n".encode())):
        raise ConfigError(f"{path} is there already, and no plan wrote it. Give another name, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, run_text(plan, path.stem, [FIRST_LINE, *notes]))


def run_text(plan: Plan, name: str, notes: Sequence[str] = ()) -> str:
    """The run file's text; a run of another name than the file keeps it. Notes come before the figures."""
    values = written_values(plan.run)
    if plan.run.name == name:
        values.pop("name", None)
    comments = [*notes, *figures(plan)]
    return "".join(
        f"{line}\n" for line in [*(f"# {line}".rstrip() for line in comments), *_lines(values, plan.reasons)]
    )


def figures(plan: Plan) -> list[str]:
    """What the run takes, in a few lines."""
    work, speed = plan.workload, plan.speed
    what = "everything is trained" if work.adapter is None else f"{work.num_trained_params:,} of them trained"
    lines = [
        f"model   {work.shape.num_params:,} parameters, {what}",
        f"device  {work.num_devices} x {plan.device.title}",
        f"memory  {plan.memory.total / GIB:.2f} GiB at the peak; {plan.allowed_bytes / GIB:.2f} of "
        f"{plan.device.memory_bytes / GIB:.2f} GiB may be used",
        *textwrap.wrap(_items(plan), 110, initial_indent=8 * " ", subsequent_indent=8 * " "),
        f"speed   {speed.tokens_per_second:,.0f} tokens/s "
        f"({speed.step_tokens / speed.high:,.0f} to {speed.step_tokens / speed.low:,.0f})",
    ]
    if plan.cost and plan.num_tokens:
        lines.append(f"cost    {time_and_money(plan.cost)} for {plan.num_tokens:,} tokens")
    return lines


def _items(plan: Plan) -> str:
    """The peak by what it is for, largest first, in GiB."""
    largest = sorted(plan.memory.items.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest if size >= 0.01 * GIB)


def time_and_money(cost: Cost) -> str:
    """Hours and dollars with their bounds."""
    text = f"{hours(cost.hours)} ({hours(cost.hours_low)} to {hours(cost.hours_high)})"
    if cost.money is not None:
        text += f", ${cost.money:,.2f} (${cost.money_low:,.2f} to ${cost.money_high:,.2f})"
    return text


def hours(count: float) -> str:
    """Hours as people say them: 40 s, 12 min, 3.4 h, 12 days, 300 years."""
    for unit, size, most in (("s", 1 / 3600, 90), ("min", 1 / 60, 90), ("h", 1.0, 48), ("days", 24.0, 730)):
        if count / size < most:
            return f"{count / size:,.2g} {unit}" if count / size < 10 else f"{count / size:,.0f} {unit}"
    return f"{count / 8766:,.0f} years"


def written_values(run: Run) -> dict[str, Any]:
    """The run as nested values in its own order, without what is the default of its method or of every run."""
    everything, plain = run.model_dump(), run.model_dump(exclude_defaults=True)
    written = {key: value for key, value in plain.items() if key not in METHOD_DEFAULTS[run.method]}
    for key, said in METHOD_DEFAULTS[run.method].items():
        value, others = everything[key], plain.get(key, {})
        if key == "budget":
            written[key] = {name: entry for name, entry in value.items() if entry is not None}
        elif isinstance(said, dict):
            written[key] = {
                name: entry
                for name, entry in value.items()
                if (entry != said[name] if name in said else name in others)
            }
        elif value != said:
            written[key] = value
    written = {key: value for key, value in written.items() if value != {}}
    for part, names in ALWAYS_WRITTEN.items():
        if everything[part] is not None and (part != "parallel" or run.parallel.devices > 1):
            written[part] = {name: everything[part][name] for name in names} | written.get(part, {})
    return {key: written[key] for key in everything if key in written}


def _lines(values: dict[str, Any], reasons: dict[str, str], prefix: str = "", indent: str = "") -> Iterator[str]:
    """YAML, a key a line, with its reason at the end."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        start, reason = f"{indent}{quote(name, always=False)}:", f"  # {reasons[key]}" if key in reasons else ""
        if isinstance(value, dict) and value:
            yield start + reason
            yield from _lines(value, reasons, f"{key}.", f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield start + reason
            for item in value:
                first, *others = _lines(item, {}, "", f"{indent}    ")
                yield from [f"{indent}  - {first.lstrip()}", *others]
        else:
            yield f"{start} {to_yaml(value)}{reason}"
