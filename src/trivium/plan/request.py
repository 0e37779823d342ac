"""From the user's request to what the planner works on: the situation, the method, and the goal of the search.

A run file leaves open what it does not set; a model alone, or data alone, leaves open everything else. Reads the run
file and a model's config.json; what needs torch or Arrow is brought by the caller. The verb `plan` imports this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from trivium.config.inputs import COUNT_PATTERN, Source, parse_count
from trivium.config.load import ResolvedRun, load_run, quote
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError
from trivium.model.resolve import hub_id, planned_shape, shape_of_name
from trivium.model.shape import QwenShape
from trivium.plan import calibration, devices
from trivium.plan.decide import Decision, decide
from trivium.plan.devices import Device
from trivium.plan.search import Goal
from trivium.plan.situation import Situation
from trivium.plan.workload import DataFacts

NODE = (1, 2, 4, 8)
"""Numbers of rented devices that are tried by default: up to those of one machine."""
NO_DATA_YET = "data.jsonl"


@dataclass(frozen=True)
class PlanRequest:
    """What is asked.

    Attributes:
        target: a run file, a model's name or folder, or a size such as `25M`; None where only the data is known.
        overrides: `key=value`, laid over the run file.
        sources: files to learn from, instead of the run file's.
        facts: the data in numbers; None where there is none, or files are to be looked at.
        device: a name, `any` for every device that can be rented, None for this machine.
        num_devices: how many; None leaves it open where devices are rented.
        memory_bytes: of a device, instead of all of it.
        method: the training method, where it is not open.
        prefer, max_cost, max_hours: see `Goal`.
        adapter_only, is_general: see `Situation`.
        name: of the run, where no run file says it.
    """

    target: str | None = None
    overrides: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    facts: DataFacts | None = None
    device: str | None = None
    num_devices: int | None = None
    memory_bytes: int | None = None
    method: str | None = None
    prefer: Literal["cheapest", "fastest"] = "cheapest"
    max_cost: float | None = None
    max_hours: float | None = None
    adapter_only: bool = False
    is_general: bool | None = None
    name: str = "plan"

    @property
    def run_file(self) -> Path | None:
        """The target, where that is a file to be read."""
        path = Path(self.target) if self.target else None
        return path if path and (path.is_file() or path.suffix in (".yaml", ".yml")) else None

    @property
    def devices(self) -> tuple[Device, ...]:
        """What it may run on, each with the memory that counts."""
        if self.device == "any":
            found = tuple(device for device in devices.catalog().values() if device.price_per_hour)
        else:
            found = (devices.get(self.device) if self.device else devices.this_machine(),)
        return tuple(replace(device, memory_bytes=self.memory_bytes or device.memory_bytes) for device in found)


@dataclass(frozen=True)
class ResolvedRequest:
    """What a request comes to.

    Attributes:
        decision: which method and why, where that was open and the data is known.
        goal: what to search for; None where nothing is to be trained.
    """

    situation: Situation
    decision: Decision | None
    goal: Goal | None


Survey = Callable[[Sequence[Source]], DataFacts]
ReadHub = Callable[[str], QwenShape]


def resolve_request(request: PlanRequest, survey: Survey, read_hub: ReadHub) -> ResolvedRequest:
    """What a request comes to; `survey` looks at files, `read_hub` fetches the shape of a model that no list has.

    Raises: ConfigError when the run file, the model, the device or the method is wrong.
    """
    if request.run_file:
        return _of_run_file(request, survey, read_hub)
    facts = request.facts or (survey([Source(path=path) for path in request.sources]) if request.sources else None)
    situation = _situation(request, facts)
    if request.method is None and (facts is not None or request.is_general):
        decision = decide(situation)
        return ResolvedRequest(situation, decision, _goal_of_decision(request, decision, facts, read_hub))
    if request.target is None:
        raise ConfigError(
            f"--method {request.method} was given without a model. Give a model too, such as Qwen/Qwen3-0.6B, or a "
            "run file."
        )
    methods = (request.method,) if request.method else _usual_methods(request.target)
    return ResolvedRequest(situation, None, _goal(request, _runs(request, methods, request.target), facts, read_hub))


def resolve_situation(situation: Situation, request: PlanRequest, read_hub: ReadHub) -> ResolvedRequest:
    """What a situation and its one device ask for, where no model or run file is named."""
    decision = decide(situation)
    goal = _goal_of_decision(request, decision, situation.facts, read_hub)
    device = situation.device
    return ResolvedRequest(situation, decision, replace(goal, devices=(device,)) if goal and device else goal)


def _of_run_file(request: PlanRequest, survey: Survey, read_hub: ReadHub) -> ResolvedRequest:
    """A run file sets the method; what it leaves open is searched."""
    method = (f"method={request.method}",) if request.method else ()
    resolved = load_run(request.run_file, [*request.overrides, *method])
    sources = [Source(path=path) for path in request.sources] or resolved.run.data.sources
    are_there = all(source.path is not None and Path(source.path).exists() for source in sources)
    facts = request.facts or (survey(sources) if are_there else None)
    goal = _goal(request, [resolved], facts, read_hub)
    situation = replace(_situation(request, facts), model=resolved.run.model.name, shape=goal.shape)
    if resolved.run.adapter is not None:
        situation = replace(situation, rank=resolved.run.adapter.rank)
    return ResolvedRequest(situation, None, goal)


def _goal_of_decision(
    request: PlanRequest, decision: Decision, facts: DataFacts | None, read_hub: ReadHub
) -> Goal | None:
    """What to search for after a decision; LoRA and QLoRA are searched together."""
    if decision.method is None or decision.model is None:
        return None
    methods = tuple(dict.fromkeys((decision.method, "qlora"))) if decision.name == "adapter" else (decision.method,)
    if decision.budget_tokens is not None:
        request = replace(request, overrides=(f"budget.tokens={decision.budget_tokens}", *request.overrides))
    return _goal(request, _runs(request, methods, request.target or decision.model), facts, read_hub)


def _usual_methods(target: str) -> tuple[str, ...]:
    """What is meant when a model is named and no more: what has no weights is built, anything else is adapted."""
    is_size = COUNT_PATTERN.fullmatch(target.strip()) is not None
    return ("scratch",) if is_size or target.lower().startswith("ladder-") else ("lora", "qlora")


def _runs(request: PlanRequest, methods: Sequence[str], model: str) -> list[ResolvedRun]:
    """A run of each method on the model and the data."""
    paths = ", ".join(quote(path) for path in request.sources or (NO_DATA_YET,))
    given = [f"data=[{paths}]", f"name={request.name}", *request.overrides]
    runs = []
    for method in methods:
        needs_weights = METHOD_DEFAULTS[method]["weights"] != "random"
        name = hub_id(model) if needs_weights else model
        runs.append(load_run(None, [f"method={method}", f"model={quote(name)}", *given]))
    return runs


def _goal(request: PlanRequest, resolved: Sequence[ResolvedRun], facts: DataFacts | None, read_hub: ReadHub) -> Goal:
    """What to search for: everything that is not set."""
    run = resolved[0].run
    set_keys = {key for key, origin in resolved[0].origins.items() if not origin.startswith("default")}
    set_keys -= set() if request.run_file or request.method else {"method"}
    there = request.devices
    counts = NODE if request.device and there[0].kind == "gpu" else NODE[:1]
    if request.num_devices or "parallel.devices" in set_keys:
        counts = (request.num_devices or run.parallel.devices,)
    if run.sequences_per_step % counts[0]:
        raise ConfigError(
            f"A step of {run.batch.tokens:,} tokens is {run.sequences_per_step} rows of {run.data.seq_len:,}, which "
            f"{counts[0]} devices cannot share evenly. Change batch.tokens or the number of devices."
        )
    return Goal(
        runs=tuple(entry.run for entry in resolved),
        shape=planned_shape(run) or _from_hub(run, read_hub),
        devices=there,
        num_devices=counts,
        set_keys=frozenset(set_keys),
        facts=facts,
        prefer=request.prefer,
        max_cost=request.max_cost,
        max_hours=request.max_hours,
        calibration=calibration.load(),
    )


def _from_hub(run: Run, read_hub: ReadHub) -> QwenShape:
    assert run.model.name is not None
    return read_hub(run.model.name)


def _situation(request: PlanRequest, facts: DataFacts | None) -> Situation:
    """What the decision stands on."""
    there, target = request.devices, None if request.run_file else request.target
    is_size = target is not None and COUNT_PATTERN.fullmatch(target.strip()) is not None
    return Situation(
        facts=facts,
        is_general=request.is_general,
        device=there[0] if len(there) == 1 else None,
        num_devices=request.num_devices or 1,
        is_laptop=not request.device and there[0].kind != "gpu",
        adapter_only=request.adapter_only,
        max_cost=request.max_cost,
        max_hours=request.max_hours,
        model=None if is_size else target,
        shape=shape_of_name(target) if target and not is_size else None,
        num_params=cast(int, parse_count(target)) if is_size else None,
        calibration=calibration.load(),
    )
