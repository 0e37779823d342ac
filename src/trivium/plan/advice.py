"""The planner's whole answer as one value, for programs as JSON, and a plan as a run file.

The run file has everything that was chosen, each choice with its reason, and the figures in a header. What is the
method's default is left out, so that the file stays short. Prints nothing and never imports torch.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.config.load import flatten, quote, to_yaml
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError
from trivium.files import atomic_write
from trivium.plan.checklist import ChecklistItem, checklist, warnings
from trivium.plan.decide import Decision
from trivium.plan.devices import GIB
from trivium.plan.fit import FIT_SHARE
from trivium.plan.search import Goal, Plan, search
from trivium.plan.situation import Situation
from trivium.plan.speed import time_and_money

FIRST_LINE = "Planned by `trivium plan`; the figures are predictions, each choice has its reason in a comment."
ALWAYS_WRITTEN: dict[str, tuple[str, ...]] = {
    "data": ("sources", "seq_len"),
    "optimizer": ("state_dtype",),
    "batch": ("tokens", "micro_tokens"),
    "adapter": ("rank", "targets"),
    "parallel": ("devices", "strategy", "offload"),
}
"""What a plan decides or stands on, also where it is the default."""


@dataclass(frozen=True)
class Advice:
    """What `trivium plan` says.

    Attributes:
        decision: which method and why; None where the data is unknown or the method was given.
        plan: how, and what it takes; None where nothing is to be trained.
        checklist: the seven points to settle, where there is a path.
        warnings: common pitfalls of the method, a paragraph each.
    """

    decision: Decision | None
    plan: Plan | None
    checklist: tuple[ChecklistItem, ...]
    warnings: tuple[str, ...]


def advise(situation: Situation, decision: Decision | None, goal: Goal | None) -> Advice:
    """Search a plan for the goal, and fill in what follows from it.

    Raises: DoesNotFit as `search`.
    """
    plan = search(goal) if goal else None
    method, model = (plan.run.method, plan.run.model.name) if plan else (None, None)
    points = checklist(situation, decision, *_memory_and_time(plan)) if decision else []
    cautions = (*_cautions(plan), *warnings(situation, method, model))
    return Advice(decision, plan, tuple(points), cautions)


def _memory_and_time(plan: Plan | None) -> tuple[str | None, str | None]:
    """What the checklist says of both, where there is a plan."""
    if plan is None:
        return None, None
    memory = f"{plan.memory.total / GIB:.1f} GiB of {plan.device.memory_bytes / GIB:.1f} on {plan.device.title}"
    return memory, time_and_money(plan.cost) if plan.cost else None


def _cautions(plan: Plan | None) -> tuple[str, ...]:
    """What of the plan itself needs care."""
    if plan is None:
        return ()
    cautions = []
    if plan.workload.num_devices > 1:
        cautions.append(
            "Training on more than one device is planned here and not built yet; `trivium train` refuses it."
        )
    positions = plan.workload.shape.max_position_embeddings
    if plan.run.weights != "random" and plan.run.data.seq_len > positions:
        cautions.append(f"Rows of {plan.run.data.seq_len:,} tokens are longer than the {positions:,} the model knows.")
    if plan.device.kind == "gpu" and plan.workload.compute_dtype == "fp32" and plan.run.precision != "fp32":
        cautions.append(f"{plan.device.title} has no bf16, so the products run in fp32, which is several times slower.")
    return tuple(cautions)


def as_record(given: Advice) -> dict[str, Any]:
    """All of it for programs: bytes, seconds, tokens a second, hours, US dollars."""
    return {
        "decision": asdict(given.decision) if given.decision else None,
        "plan": _plan_record(given.plan) if given.plan else None,
        "checklist": [point._asdict() for point in given.checklist],
        "warnings": list(given.warnings),
    }


def _plan_record(plan: Plan) -> dict[str, Any]:
    work, speed, device = plan.workload, plan.speed, plan.device
    return {
        "run": flatten(plan.run),
        "reasons": plan.reasons,
        "num_params": work.shape.num_params,
        "num_trained_params": work.num_trained_params,
        "device": {
            "name": device.name,
            "title": device.title,
            "count": work.num_devices,
            "memory_bytes": device.memory_bytes,
            "price_per_hour": device.price_per_hour,
            "price_date": device.price_date,
        },
        "memory": {
            "bytes": plan.memory.total,
            "allowed_bytes": plan.allowed_bytes,
            "margin": 1 - FIT_SHARE,
            "instant": plan.memory.instant,
            "items": plan.memory.items,
        },
        "speed": {
            "tokens_per_second": speed.tokens_per_second,
            "low": speed.step_tokens / speed.high,
            "high": speed.step_tokens / speed.low,
            "seconds_per_step": speed.seconds_per_step,
            "items": speed.items,
        },
        "num_tokens": plan.num_tokens,
        "cost": asdict(plan.cost) if plan.cost else None,
    }


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
