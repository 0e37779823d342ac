"""The planner's whole answer: which way, the plan of it, what to beware of and what to settle, as one value.

Puts together what `path`, `checklist` and `search` say; prints nothing. The verb `plan` imports this file, never torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

from trivium.config.load import flatten
from trivium.plan.checklist import Point, checklist, warnings
from trivium.plan.fit import FIT_SHARE
from trivium.plan.goal import Goal, Plan
from trivium.plan.memory import GIB
from trivium.plan.path import Path
from trivium.plan.search import search
from trivium.plan.situation import Situation
from trivium.plan.write import time_and_money


@dataclass(frozen=True)
class Answer:
    """What `trivium plan` says.

    Attributes:
        path: which way and why; None where nothing is known of the data, or the way was given.
        plan: how, and what it takes; None where nothing is to be trained.
        checklist: the seven points to settle, where there is a path.
        warnings: what commonly goes wrong that way, a paragraph each.
    """

    path: Path | None
    plan: Plan | None
    checklist: tuple[Point, ...]
    warnings: tuple[str, ...]


def answer(situation: Situation, path: Path | None, goal: Goal | None) -> Answer:
    """Search a plan for the goal, and fill in what follows from it.

    Raises: DoesNotFit as `search`.
    """
    plan = search(goal) if goal else None
    method, model = (plan.run.method, plan.run.model.name) if plan else (None, None)
    points = checklist(situation, path, *_memory_and_time(plan)) if path else []
    cautions = (*_cautions(plan), *warnings(situation, method, model))
    return Answer(path, plan, tuple(points), cautions)


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


def as_record(given: Answer) -> dict[str, Any]:
    """All of it for programs: bytes, seconds, tokens a second, hours, US dollars."""
    return {
        "path": asdict(given.path) if given.path else None,
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
