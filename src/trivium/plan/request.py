"""Turn the options of `trivium plan` into a situation, a method, and the goal of the search.

Reads the run file and a model's config.json. The caller passes in the functions that need torch or Arrow.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from trivium.config.inputs import COUNT_PATTERN, parse_count
from trivium.config.load import ResolvedRun, load_run, quote
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError
from trivium.model.resolve import hub_id, planned_shape, shape_of_name
from trivium.model.shape import QwenShape
from trivium.plan import calibration, devices
from trivium.plan.amount import settle_amount
from trivium.plan.decide import CHAT_MODELS, Decision, decide
from trivium.plan.devices import Device
from trivium.plan.search import Goal, Plan
from trivium.plan.situation import Situation
from trivium.plan.workload import DataFacts, given_facts

NODE = (1, 2, 4, 8)
"""Numbers of rented devices to try by default, up to one node."""
NO_DATA_YET = "data.jsonl"
"""Placeholder path when the user gives no files."""
MAX_AMOUNT = 1e18


@dataclass(frozen=True)
class PlanRequest:
    """The options of `trivium plan`.

    Attributes:
        target: a run file, a model's name or folder, or a size like `25M`; None if only the data is known.
        overrides: `key=value` overrides of the run file.
        keys: keys of a run file as Python values; with a `model`, they are the run to plan.
        sources: training files, instead of the run's.
        facts: the data in numbers, if given in numbers.
        device: a name, `any` for every device with a price, None for this machine.
        num_devices: None to choose for rented GPUs.
        memory_bytes: memory of a device, instead of all of it.
        method: None to choose it.
        prefer, max_cost, max_hours: see `Goal`.
        adapter_only, is_general: see `Situation`.
        name: name of the run without a run file.
    """

    target: str | None = None
    overrides: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
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
        """The target, if it is a run file."""
        path = Path(self.target) if self.target else None
        return path if path and (path.is_file() or path.suffix in (".yaml", ".yml")) else None

    @property
    def has_run(self) -> bool:
        """Whether a run file or keys say which run to plan; otherwise the target or the data does."""
        return self.run_file is not None or "model" in self.keys

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices to choose from, with `memory_bytes` applied."""
        if self.device == "any":
            found = tuple(device for device in devices.catalog().values() if device.price_per_hour)
        else:
            found = (devices.get(self.device) if self.device else devices.this_machine(),)
        return tuple(replace(device, memory_bytes=self.memory_bytes or device.memory_bytes) for device in found)


@dataclass(frozen=True)
class ResolvedRequest:
    """The decision, None if the method was given or the data is unknown, and the goal, None if not to train."""

    situation: Situation
    decision: Decision | None
    goal: Goal | None


Survey = Callable[[Run], DataFacts]
ReadHub = Callable[[str], QwenShape]


def resolve_request(request: PlanRequest, survey: Survey, read_hub: ReadHub) -> ResolvedRequest:
    """Resolve a request; `survey` inspects the data of a run, `read_hub` gets the shape of a model outside the catalog.

    Raises: ConfigError if the run file, model, device or method is wrong.
    """
    if request.has_run:
        if request.target and not request.run_file:
            raise ConfigError(f"Found two models to plan: {request.target} and the key model. Expected one of them.")
        return _of_run(request, survey, read_hub)
    facts = request.facts or (survey(_surveyed_run(request)) if request.sources else None)
    situation = _situation(request, facts)
    if request.method is None and (facts is not None or request.is_general):
        decision = decide(situation)
        return ResolvedRequest(situation, decision, _goal_of_decision(request, decision, facts, read_hub))
    if request.target is None:
        given = f"--method {request.method} without a model" if request.method else "no model and no data"
        raise ConfigError(
            f"There is nothing to plan: found {given}. Expected a run file, a model (Qwen/Qwen3-0.6B), or data: --data "
            "FILE, or --rows 5K --kind conversations, or --tokens 1B --kind documents."
        )
    methods = (request.method,) if request.method else ("scratch",) if _is_new(request.target) else ("lora", "qlora")
    return ResolvedRequest(situation, None, _goal(request, _runs(request, methods, request.target), facts, read_hub))


def _of_run(request: PlanRequest, survey: Survey, read_hub: ReadHub) -> ResolvedRequest:
    method = (f"method={request.method}",) if request.method else ()
    files = {"data": {"sources": list(request.sources)}} if request.sources else {}
    resolved = load_run(request.run_file, [*request.overrides, *method], {**request.keys, **files})
    exist = all(source.path is not None and Path(source.path).exists() for source in resolved.run.data.sources)
    facts = request.facts or (survey(resolved.run) if exist else None)
    goal = _goal(request, [resolved], facts, read_hub)
    situation = replace(_situation(request, facts), model=resolved.run.model.name, shape=goal.shape)
    if resolved.run.adapter is not None:
        situation = replace(situation, rank=resolved.run.adapter.rank)
    return ResolvedRequest(situation, None, goal)


def _surveyed_run(request: PlanRequest) -> Run:
    """A run on the data before the method is known, for its tokenizer and its sequence length."""
    model = request.target or f"Qwen/{CHAT_MODELS[0]}"
    method = request.method or ("scratch" if _is_new(model) else "lora")
    return _runs(request, (method,), model)[0].run


def _goal_of_decision(
    request: PlanRequest, decision: Decision, facts: DataFacts | None, read_hub: ReadHub
) -> Goal | None:
    """The goal for a decision; LoRA and QLoRA are searched together."""
    if decision.method is None or decision.model is None:
        return None
    methods = tuple(dict.fromkeys((decision.method, "qlora"))) if decision.name == "adapter" else (decision.method,)
    if decision.budget_tokens is not None:
        request = replace(request, overrides=(f"budget.tokens={decision.budget_tokens}", *request.overrides))
    return _goal(request, _runs(request, methods, request.target or decision.model), facts, read_hub)


def _is_new(model: str) -> bool:
    """Whether there are no pretrained weights of this model."""
    return _is_size(model) or model.lower().startswith("ladder-")


def _is_size(target: str) -> bool:
    return COUNT_PATTERN.fullmatch(target.strip()) is not None


def _runs(request: PlanRequest, methods: Sequence[str], model: str) -> list[ResolvedRun]:
    """A run of each method on the model and the data."""
    paths = ", ".join(quote(path) for path in request.sources or (NO_DATA_YET,))
    given = [f"data.sources=[{paths}]", f"name={request.name}", *request.overrides]
    runs = []
    for method in methods:
        name = model if METHOD_DEFAULTS[method]["weights"] == "random" else hub_id(model)
        runs.append(load_run(None, [f"method={method}", f"model={quote(name)}", *given], request.keys or None))
    return runs


def _goal(request: PlanRequest, resolved: Sequence[ResolvedRun], facts: DataFacts | None, read_hub: ReadHub) -> Goal:
    """The goal: search every key that the user has not set."""
    runs = tuple(settle_amount(entry.run, facts) for entry in resolved)
    run = runs[0]
    set_keys = {key for key, origin in resolved[0].origins.items() if not origin.startswith("default")}
    set_keys -= set() if request.has_run or request.method else {"method"}
    choices = request.devices
    counts = NODE if request.device and choices[0].kind == "gpu" else NODE[:1]
    if request.num_devices or "parallel.devices" in set_keys:
        counts = (request.num_devices or run.parallel.devices,)
    if run.sequences_per_step % counts[0]:
        raise ConfigError(
            f"A step of {run.step_tokens:,} tokens is {run.sequences_per_step} sequences of {run.data.seq_len:,}, "
            f"which {counts[0]} devices cannot share evenly. Change batch.tokens or the number of devices."
        )
    return Goal(
        runs=runs,
        shape=planned_shape(run) or read_hub(cast(str, run.model.name)),
        devices=choices,
        num_devices=counts,
        set_keys=frozenset(set_keys),
        facts=facts,
        prefer=request.prefer,
        max_cost=request.max_cost,
        max_hours=request.max_hours,
        calibration=calibration.load(),
    )


def _situation(request: PlanRequest, facts: DataFacts | None) -> Situation:
    choices, target = request.devices, None if request.has_run else request.target
    is_size = target is not None and _is_size(target)
    return Situation(
        facts=facts,
        is_general=request.is_general,
        device=choices[0] if len(choices) == 1 else None,
        num_devices=request.num_devices or 1,
        is_laptop=not request.device and choices[0].kind != "gpu",
        adapter_only=request.adapter_only,
        max_cost=request.max_cost,
        max_hours=request.max_hours,
        model=None if is_size else target,
        shape=shape_of_name(target) if target and not is_size else None,
        num_params=cast(int, parse_count(target)) if is_size else None,
        calibration=calibration.load(),
    )


def amount(name: str, value: str | float) -> float:
    """A number above zero, with an optional suffix as in run files: 0.5, 24, 10K, 1.5B.

    Raises: ConfigError that calls the number `name`.
    """
    text = str(value).replace(",", "").replace("_", "")
    count = parse_count(text)
    try:
        number = float(text if isinstance(count, str) or not count else str(count))
    except ValueError:
        number = math.nan
    if not 0 < number <= MAX_AMOUNT:
        raise ConfigError(
            f"{name} is {value!r}; expected a number above zero and up to {MAX_AMOUNT:.0e}, for example 0.5 or 10K."
        )
    return number


def one_of(name: str, value: str | None, choices: Collection[str]) -> None:
    """Raise ConfigError unless the value is one of the choices or None."""
    if value is not None and value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def facts_in_numbers(rows: float | None, tokens: float | None, kind: Any, has_files: bool) -> DataFacts | None:
    """The facts from --rows, --tokens and --kind; None without them.

    Raises: ConfigError when they are incomplete, or given in addition to files.
    """
    if rows is None and tokens is None:
        if kind is not None:
            raise ConfigError(
                f"--kind {kind} was given without an amount. Add --rows, --tokens or both; with --data, remove --kind."
            )
        return None
    if has_files or kind is None:
        given = "with --data" if has_files else "without --kind"
        raise ConfigError(
            f"Found --rows or --tokens {given}. Expected either --data FILE alone, or --rows or --tokens with --kind "
            "conversations or --kind documents."
        )
    return given_facts(kind, *(None if count is None else round(count) for count in (rows, tokens)))


def placeholder_notes(plan: Plan) -> list[str]:
    """Notes for the header of a written run file: the data that it names may not exist."""
    if [source.path for source in plan.run.data.sources] == [NO_DATA_YET]:
        return [f"{NO_DATA_YET} is a placeholder: replace it with the path of your data."]
    return []
