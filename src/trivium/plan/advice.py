"""The planner's complete answer, as one value, as JSON, and as a run file.

The run file contains each choice with its reason, and the predictions in its header. Defaults of the method are left
out. Never imports torch.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.config.load import flatten, quote, to_yaml
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError
from trivium.files import GIB, atomic_write
from trivium.plan.cost import time_and_money
from trivium.plan.decide import Decision
from trivium.plan.fit import FIT_SHARE
from trivium.plan.search import Goal, Plan, search
from trivium.plan.situation import Situation
from trivium.plan.warnings import warnings
from trivium.plan.workload import DataFacts

FIRST_LINE = "Planned by `trivium plan`; the figures are predictions, each choice has its reason in a comment."
ALWAYS_WRITTEN: dict[str, tuple[str, ...]] = {
    "data": ("sources", "seq_len"),
    "optimizer": ("state_dtype",),
    "batch": ("tokens", "micro_tokens"),
    "adapter": ("rank", "targets"),
    "parallel": ("devices", "strategy", "offload"),
}
"""Keys that are written even if they have their default."""

DEVICE_FIELDS = ("name", "title", "memory_bytes", "price_per_hour", "price_date")


@dataclass(frozen=True)
class Advice:
    """The answer of `trivium plan`.

    Attributes:
        decision: which method and why; None if the data is unknown or the method was given.
        plan: None if the advice is not to train.
        warnings: common pitfalls, one paragraph each.
        facts: the data that the plan assumes, if known.
    """

    decision: Decision | None
    plan: Plan | None
    warnings: tuple[str, ...]
    facts: DataFacts | None = None


def advise(situation: Situation, decision: Decision | None, goal: Goal | None) -> Advice:
    """Search for a plan and add the warnings.

    Raises: DoesNotFit if no plan fits; see `search`.
    """
    plan = search(goal) if goal else None
    method, model = (plan.run.method, plan.run.model.name) if plan else (None, None)
    found = [*(_plan_warnings(plan) if plan else []), *warnings(situation, method, model)]
    return Advice(decision, plan, tuple(found), goal.facts if goal else situation.facts)


def _plan_warnings(plan: Plan) -> list[str]:
    found = []
    if plan.workload.num_devices > 1:
        found.append("Training on more than one device is not supported yet; `trivium train` refuses it.")
    positions = plan.workload.shape.max_position_embeddings
    if plan.run.weights != "random" and plan.run.data.seq_len > positions:
        found.append(f"data.seq_len is {plan.run.data.seq_len:,}, longer than the model's {positions:,} positions.")
    if plan.device.kind == "gpu" and plan.workload.compute_dtype == "fp32" and plan.run.precision != "fp32":
        found.append(f"{plan.device.title} has no bf16, so the run uses fp32, which is several times slower.")
    return found


def as_record(given: Advice) -> dict[str, Any]:
    """The advice as JSON: bytes, seconds, tokens per second, hours, US dollars."""
    return {
        "decision": asdict(given.decision) if given.decision else None,
        "plan": _plan_record(given.plan) if given.plan else None,
        "warnings": list(given.warnings),
        "data": asdict(given.facts) if given.facts else None,
    }


def _plan_record(plan: Plan) -> dict[str, Any]:
    work, speed, device = plan.workload, plan.speed, plan.device
    return {
        "run": flatten(plan.run),
        "reasons": plan.reasons,
        "num_params": work.shape.num_params,
        "num_trained_params": work.num_trained_params,
        "device": {"count": work.num_devices} | {name: getattr(device, name) for name in DEVICE_FIELDS},
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
    """Write the run file atomically; `load_run` reads the same run back.

    Raises: ConfigError if the file exists and was not written by the planner.
    """
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(f"# {FIRST_LINE}\n".encode())):
        raise ConfigError(
            f"{path} exists and was not written by `trivium plan`. Choose another name, or remove it first."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, run_text(plan, path.stem, [FIRST_LINE, *notes]))


def run_text(plan: Plan, name: str, notes: Sequence[str] = ()) -> str:
    """The text of the run file. The run's `name` is left out if it equals `name`."""
    values = written_values(plan.run)
    if plan.run.name == name:
        values.pop("name", None)
    comments = [f"# {line}".rstrip() for line in (*notes, *figures(plan))]
    return "".join(f"{line}\n" for line in (*comments, *_lines(values, plan.reasons)))


def figures(plan: Plan) -> list[str]:
    """The predictions, one per line."""
    work, speed = plan.workload, plan.speed
    what = "all trained" if work.adapter is None else f"{work.num_trained_params:,} of them trained"
    largest = sorted(plan.memory.items.items(), key=lambda entry: -entry[1])
    items = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest if size >= 0.01 * GIB)
    lines = [
        f"model   {work.shape.num_params:,} parameters, {what}",
        f"device  {work.num_devices} x {plan.device.title}",
        f"memory  {plan.memory.total / GIB:.2f} GiB at the peak; {plan.allowed_bytes / GIB:.2f} of "
        f"{plan.device.memory_bytes / GIB:.2f} GiB may be used",
        *textwrap.wrap(items, 110, initial_indent=8 * " ", subsequent_indent=8 * " "),
        f"speed   {speed.tokens_per_second:,.0f} tokens/s "
        f"({speed.step_tokens / speed.high:,.0f} to {speed.step_tokens / speed.low:,.0f})",
    ]
    if plan.cost and plan.num_tokens:
        lines.append(f"cost    {time_and_money(plan.cost)} for {plan.num_tokens:,} tokens")
    return lines


def written_values(run: Run) -> dict[str, Any]:
    """The run as nested values, without defaults except `ALWAYS_WRITTEN`."""
    everything, plain = run.model_dump(), run.model_dump(exclude_defaults=True)
    written = {key: value for key, value in plain.items() if key not in METHOD_DEFAULTS[run.method]}
    for key, said in METHOD_DEFAULTS[run.method].items():
        value, others = everything[key], plain.get(key, {})
        if isinstance(said, dict):
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
    """YAML lines, each key with its reason as a comment."""
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
