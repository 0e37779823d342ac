"""Which method to train with: none, an adapter, full fine-tuning, continued pre-training, or from scratch.

An ordered list of approaches, each with the amount of data that it needs. The amount of data selects the approach;
license, laptop, memory, time and cost can rule it out, and then the next lower one is tried. `decide` is total: every
situation gets an answer, with its reasons and with what would change it. Never imports torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trivium.config.inputs import parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.model import catalog
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.devices import GIB
from trivium.plan.fit import FIT_SHARE
from trivium.plan.situation import Situation, num_epochs
from trivium.plan.workload import DataFacts

ApproachName = Literal["none", "adapter", "full", "continue", "scratch"]


@dataclass(frozen=True)
class Approach:
    """A way to train and the data it needs: a number of conversations, or of tokens of documents.

    Attributes:
        name, title: for programs and for people.
        methods: `method` of a run file, preferred one first.
        start: the least data for which it is worth the effort.
        stop: where its range ends, None where it is open; up to the next approach there is no rule.
        basis: where the figures come from, and what contradicts them.
        other: the method that is nearly as good for the same data.
    """

    name: ApproachName
    title: str
    methods: tuple[str, ...]
    start: int
    stop: int | None
    basis: str
    other: str | None = None


TABLE = "a common rule of thumb"
CONTEXT = "the context of Qwen, 32,768 tokens; what fits into the prompt needs no training"
APPROACHES: dict[str, tuple[Approach, ...]] = {
    "conversations": (
        Approach("none", "no training (prompt or retrieve)", (), 0, 100, TABLE),
        Approach("adapter", "LoRA", ("lora", "qlora"), 100, 10_000, TABLE, other="full"),
        Approach("full", "full fine-tuning", ("full",), 10_000, 1_000_000, f"{TABLE}; LoRA is common here too", "lora"),
    ),
    "documents": (
        Approach("none", "no training (prompt or retrieve)", (), 0, 32_768, CONTEXT),
        Approach("adapter", "LoRA on the text", ("lora", "qlora"), 32_768, 32_768, CONTEXT),
        Approach(
            "continue",
            "continued pre-training",
            ("continue",),
            10**9,
            10**10,
            f"{TABLE}; Gururangan et al. 2020, arXiv:2004.10964, gain from much less text of the task itself",
        ),
        Approach("scratch", "from scratch", ("scratch",), 10**11, None, TABLE),
    ),
}
UNITS = {"conversations": "conversations", "documents": "tokens"}
TOKENS_PER_PARAM = 20
"""Compute-optimal training from scratch. Source: Hoffmann et al. 2022, arXiv:2203.15556 (Chinchilla)."""


def amount(facts: DataFacts) -> int:
    """What is compared with `start`: the number of conversations, or the tokens of documents."""
    return facts.num_rows if facts.kind == "conversations" else facts.num_tokens


def short(count: float) -> str:
    """A count as people write it: 5K, 1.5B; 32,768 stays as it is."""
    if count < 1e5 and count % 100:
        return f"{count:,.0f}"
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= unit:
            return f"{count / unit:.4g}{suffix}"
    return f"{count:.4g}"


# What is recommended, smallest first: open licenses only (Apache 2.0; Qwen2.5-3B and 72B have Qwen's own).
CHAT_MODELS = tuple(f"Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "7B", "14B", "32B"))
REASONING_MODELS = tuple(f"Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"))
BASE_MODELS = tuple(f"Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B", "14B"))
LARGEST_UNASKED = 9e9
"""Parameters of the largest model that is recommended when no size is requested: larger ones are slow to try."""


@dataclass(frozen=True)
class ModelChoice:
    """A model and a method that fit the hardware and the limits."""

    model: str
    method: str
    why: str
    would_change: tuple[str, ...] = ()
    budget_tokens: int | None = None
    """Tokens that the limits allow; None where they allow all."""


@dataclass(frozen=True)
class Obstacle:
    """What rules an approach out, and what would allow it."""

    why: str
    unless: str


def size_below_all(situation: Situation) -> int | None:
    """The requested size, where no published model is nearly as small: then there is nothing to adapt."""
    smallest = catalog.get(CHAT_MODELS[0]).num_params
    size = situation.num_params
    if situation.model is not None or situation.adapter_only or size is None or not 0 < size < smallest / 2:
        return None
    return size


def choose(situation: Situation, facts: DataFacts, approach: Approach) -> ModelChoice | Obstacle:
    """The model and method for an approach, or what rules it out."""
    reasons = _forbidden(situation, approach)
    if not reasons:
        return _within_means(situation, facts, approach)
    why, unless = "; ".join(reasons), " and ".join(reasons.values())
    return Obstacle(f"Not {approach.title}: {why}.", f"If {unless}: {approach.title}.")


def _forbidden(situation: Situation, approach: Approach) -> dict[str, str]:
    """What rules it out for every model -> what would have to change."""
    reasons = {}
    if situation.adapter_only and approach.name != "adapter":
        reasons["only the adapter may be shared, and this changes the base weights"] = "the whole model may be shared"
    if situation.is_laptop and approach.name != "adapter":
        reasons["it has to run on a laptop, or a machine without a large GPU"] = "it may run on a rented GPU"
    if situation.model is not None and approach.name == "scratch":
        reasons[f"{situation.model} was requested, and this would not use its weights"] = "its weights are not needed"
    return reasons


def _within_means(situation: Situation, facts: DataFacts, approach: Approach) -> ModelChoice | Obstacle:
    """The first model that fits and can train on all data within the limits, else the one that trains on the most."""
    best: ModelChoice | None = None
    best_share, obstacles = 0.0, []
    for name, shape in _candidates(situation, facts, approach):
        method = next((one for one in approach.methods if shape is None or situation.fits(shape, one)), None)
        if shape is None or method is None:
            if shape is None:
                return ModelChoice(name, approach.methods[0], f"{name} was requested; its size is not known here.")
            obstacles.append(_too_large(situation, approach, name, shape))
            continue
        affordable = situation.affordable_tokens(shape, method) / num_epochs(method)
        if affordable < _least_tokens(facts, approach):
            obstacles.append(_too_expensive(situation, facts, approach, name, shape))
            continue
        share = min(1.0, affordable / facts.num_tokens)
        if share > best_share:
            best, best_share = _model_choice(situation, facts, name, shape, method, share), share
    smallest = 0 if situation.starts_small else -1
    return best or (obstacles[smallest] if obstacles else _too_little(facts, approach))


def _candidates(situation: Situation, facts: DataFacts, approach: Approach) -> Iterator[tuple[str, QwenShape | None]]:
    """Models in the order to try them: only the named one, only the requested size, else a few.

    A laptop, or an unknown device, starts with the smallest; anything else with the largest. From scratch a model has
    at most one parameter for each twenty tokens.
    """
    if situation.model is not None:
        yield situation.model, situation.shape or published_shape(situation.model)
        return
    names = BASE_MODELS if facts.kind == "documents" else REASONING_MODELS if facts.reasoning_share else CHAT_MODELS
    shapes = {name: catalog.get(name) for name in names}
    if situation.num_params is not None:
        near = min(shapes, key=lambda name: abs(shapes[name].num_params - (situation.num_params or 0)))
        shapes = {near: shapes[near]}
    else:
        shapes = {name: shape for name, shape in shapes.items() if shape.num_params <= LARGEST_UNASKED}
    from_nothing = METHOD_DEFAULTS[approach.methods[0]]["weights"] == "random"
    if from_nothing:
        most = facts.num_tokens / TOKENS_PER_PARAM
        shapes = {name: shape for name, shape in shapes.items() if shape.num_params <= most}
    for name in shapes if situation.starts_small else reversed(shapes):
        yield name if from_nothing else f"Qwen/{name}", shapes[name]


def _least_tokens(facts: DataFacts, approach: Approach) -> float:
    """Tokens of the least data for which the approach is worth the effort, so that more data never rules it out."""
    return approach.start * (facts.num_tokens / facts.num_rows if facts.kind == "conversations" else 1.0)


def _too_little(facts: DataFacts, approach: Approach) -> Obstacle:
    most = short(facts.num_tokens / TOKENS_PER_PARAM)
    return Obstacle(
        f"Not {approach.title}: {short(facts.num_tokens)} tokens are enough for {most} parameters only.",
        f"With a model of {most} parameters or less: {approach.title}.",
    )


def _model_choice(
    situation: Situation, facts: DataFacts, name: str, shape: QwenShape, method: str, share: float
) -> ModelChoice:
    why = f"{name}: {_why_model(situation)}"
    if method == "qlora":
        why += " With 16-bit weights it would not fit, so they are quantized to 4 bits (NF4)."
    budget_tokens = None
    if share < 1.0:
        all_tokens = facts.num_tokens * num_epochs(method)
        budget_tokens = _rounded_down(share * all_tokens)
        why += f" The limits on time and cost allow {short(budget_tokens)} of {short(all_tokens)} tokens: use the best."
    larger = (f"If its answers are not good enough: improve the data first, then try a larger model than {name}.",)
    return ModelChoice(name, method, why, larger if situation.model is None else (), budget_tokens)


def _rounded_down(count: float) -> int:
    """To two digits, which leaves some room for what the prediction does not see."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, count))) - 1)
    return max(1, math.floor(count / unit) * unit)


def _why_model(situation: Situation) -> str:
    if situation.model is not None:
        return "the requested model."
    if situation.num_params is not None:
        return f"the published model nearest to {short(situation.num_params)} parameters."
    if situation.starts_small:
        return "the smallest published model, the fastest to try on a laptop; start there."
    return "the largest with an open license, up to 8B, that fits the hardware and the limits."


def _too_large(situation: Situation, approach: Approach, name: str, shape: QwenShape) -> Obstacle:
    needed = min(situation.least_memory(shape, method).total for method in approach.methods)
    has = situation.device.memory_bytes if situation.device else 0
    return Obstacle(
        f"Not {approach.title}: {name} needs {needed / GIB:.1f} GiB on each device with the smallest micro-batch, and "
        f"{FIT_SHARE:.0%} of {has / GIB:.1f} GiB may be used.",
        f"With {needed / FIT_SHARE / GIB:.1f} GiB or more on each device: {approach.title}, with {name}.",
    )


def _means(situation: Situation) -> str:
    return f"{situation.hours / 24:,.3g} days" + (
        "" if situation.max_cost is None else f" and {situation.max_cost:,.0f} USD"
    )


def _too_expensive(situation: Situation, facts: DataFacts, approach: Approach, name: str, shape: QwenShape) -> Obstacle:
    """Its arithmetic for the least data that the approach is worth it for."""
    method = approach.methods[0]
    tokens = round(_least_tokens(facts, approach) * num_epochs(method))
    needed = situation.cost(shape, method, tokens)
    assert needed is not None  # without a device nothing is too expensive
    cost = f"{needed.hours / 24:,.3g} days" + (f" and {needed.money:,.0f} USD" if needed.money else "")
    return Obstacle(
        f"Not {approach.title}: {short(tokens)} tokens, the least worth it, take {cost} with {name}, and the limit is "
        f"{_means(situation)}.",
        f"With {cost}: {approach.title}, with {name}.",
    )


UNTRIED = "It is not known whether a general model already does this: try that first, it is free."
TRIED = "A general model was tried and is not good enough."
IF_GENERAL = "If a general model answers a few dozen of your hardest cases well: no training."


@dataclass(frozen=True)
class Decision:
    """The answer.

    Attributes:
        name, title: the approach.
        method: what a run file calls it; None where nothing is to be trained.
        model: what a run file names as `model`; None where nothing is to be trained.
        budget_tokens: tokens to be read, where the limits do not allow all; `budget.tokens` of a run file.
        other_method: the method to compare it with, where another is nearly as good.
        reasons: why, a line each, in the order of the questions.
        would_change: what would lead elsewhere, with its figure, a line each.
        rules_of_thumb: figures that are only that, and their source.
    """

    name: ApproachName
    title: str
    method: str | None
    model: str | None
    budget_tokens: int | None
    other_method: str | None
    reasons: tuple[str, ...]
    would_change: tuple[str, ...]
    rules_of_thumb: tuple[str, ...]


def decide(situation: Situation) -> Decision:
    """Whether training is needed, which approach the data selects, and what rules it out."""
    if situation.is_general:
        return _untrained(("A general model already does it: choose one, write a prompt, and measure it.",), ())
    tried = UNTRIED if situation.is_general is None else TRIED
    facts = situation.facts
    if facts is None or not situation.has_data:
        return _untrained((tried, "There is no training data yet."), (_start_of(APPROACHES["conversations"][1]),))
    if (size := size_below_all(situation)) is not None:
        return _small_from_scratch(size, facts, tried)
    approaches = APPROACHES[facts.kind]
    wanted = max(index for index, approach in enumerate(approaches) if approach.start <= amount(facts))
    obstacles: list[Obstacle] = []
    for index in range(wanted, 0, -1):
        found = choose(situation, facts, approaches[index])
        if isinstance(found, ModelChoice):
            return _decision(situation, facts, (index, wanted), obstacles, found, tried)
        obstacles.append(found)
    reasons = (tried, _why_amount(facts, wanted), *(obstacle.why for obstacle in obstacles))
    would_change = (*(obstacle.unless for obstacle in obstacles), *map(_start_of, approaches[wanted + 1 : wanted + 2]))
    return _untrained(reasons, would_change, _rules(facts, (0, wanted)))


def _untrained(reasons: tuple[str, ...], would_change: tuple[str, ...], rules: tuple[str, ...] = ()) -> Decision:
    none = APPROACHES["conversations"][0]
    return Decision(none.name, none.title, None, None, None, None, reasons, would_change, rules)


def _decision(
    situation: Situation,
    facts: DataFacts,
    indices: tuple[int, int],
    obstacles: list[Obstacle],
    choice: ModelChoice,
    tried: str,
) -> Decision:
    """The decision for the first of two approaches, the second is the one that the amount of data selects."""
    index, wanted = indices
    approaches = APPROACHES[facts.kind]
    approach = approaches[index]
    below = f"With fewer than {short(approach.start)} {UNITS[facts.kind]}: {approaches[index - 1].title}."
    other = next((other for other in approaches[1:] if other.methods[0] == approach.other), None)
    other_choice = choose(situation, facts, other) if other else None
    return Decision(
        name=approach.name,
        title="QLoRA" if choice.method == "qlora" else approach.title,
        method=choice.method,
        model=choice.model,
        budget_tokens=choice.budget_tokens,
        other_method=other_choice.method if isinstance(other_choice, ModelChoice) else None,
        reasons=(tried, _why_amount(facts, wanted), *(obstacle.why for obstacle in obstacles), choice.why),
        would_change=(
            *(() if situation.is_general is False else (IF_GENERAL,)),
            *(obstacle.unless for obstacle in obstacles),
            *map(_start_of, approaches[wanted + 1 : wanted + 2]),
            below,
            *_larger_by(other, other_choice, choice),
            *choice.would_change,
        ),
        rules_of_thumb=_rules(facts, (index, wanted)),
    )


def _larger_by(
    other: Approach | None, other_choice: ModelChoice | Obstacle | None, choice: ModelChoice
) -> tuple[str, ...]:
    """Where the other method can use a larger model on the same hardware."""
    if other is None or not isinstance(other_choice, ModelChoice):
        return ()
    shape, other_shape = published_shape(choice.model), published_shape(other_choice.model)
    if shape is None or other_shape is None or other_shape.num_params <= shape.num_params:
        return ()
    return (
        f"If a larger model helps more than training all weights: {other.title}, which can use {other_choice.model}.",
    )


def _small_from_scratch(num_params: int, facts: DataFacts, tried: str) -> Decision:
    """A model smaller than any published one is trained from scratch, whatever the data."""
    enough = num_params * TOKENS_PER_PARAM
    has = f"{short(facts.num_tokens)} tokens are {facts.num_tokens / num_params:.2g} for each parameter"
    return Decision(
        name="scratch",
        title="from scratch",
        method="scratch",
        model=short(num_params) if parse_count(short(num_params)) == num_params else str(num_params),
        budget_tokens=None,
        other_method=None,
        reasons=(
            tried,
            f"A model of {short(num_params)} parameters was requested, and no published Qwen is that small.",
            f"{has}; about {TOKENS_PER_PARAM} are compute-optimal, which is {short(enough)}.",
        ),
        would_change=("If a model of 0.5B parameters will do: adapt one, which needs a few hundred examples.",),
        rules_of_thumb=(
            f"{TOKENS_PER_PARAM} tokens for each parameter: Hoffmann et al. 2022, arXiv:2203.15556, who measured it on "
            "models from 70M to 16B; a small model keeps improving with more.",
        ),
    )


def _start_of(approach: Approach) -> str:
    unit = "conversations" if approach.name == "full" or approach.start < 10**4 else "tokens of raw text"
    return f"With {short(approach.start)} {unit} or more: {approach.title}."


def _why_amount(facts: DataFacts, wanted: int) -> str:
    """Which approach the amount of data selects."""
    approaches, unit, has = APPROACHES[facts.kind], UNITS[facts.kind], amount(facts)
    approach = approaches[wanted]
    counted = f"{short(has)} {unit}"
    if approach.stop is None:
        return f"{counted}: enough for {approach.title}, from {short(approach.start)} on."
    if has <= approach.stop:
        return f"{counted}: the range of {approach.title}, {short(approach.start)} to {short(approach.stop)}."
    gap = f"beyond {short(approach.stop)}"
    if wanted + 1 < len(approaches):
        gap = f"between {short(approach.stop)} and {short(approaches[wanted + 1].start)}"
    return f"{counted}: a gap, because there is no rule {gap}; {approach.title} is the next lower method."


def _rules(facts: DataFacts, indices: tuple[int, int]) -> tuple[str, ...]:
    approaches, unit = APPROACHES[facts.kind], UNITS[facts.kind]
    named = dict.fromkeys(approaches[index] for index in indices)
    return tuple(f"{approach.title}, {_range(approach)} {unit}: {approach.basis}." for approach in named)


def _range(approach: Approach) -> str:
    if not approach.start and approach.stop is not None:
        return f"below {short(approach.stop)}"
    if approach.stop is None or approach.stop == approach.start:
        return f"{short(approach.start)} or more"
    return f"{short(approach.start)} to {short(approach.stop)}"
