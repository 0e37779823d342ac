"""Which model and which method, for a way that the data pays for: or what forbids it, and what would allow it.

Licence, laptop and a named model forbid by themselves; memory, time and purse are asked of each model that comes into
question. Imported by `path.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trivium.config.run import METHOD_DEFAULTS
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan.facts import DataFacts
from trivium.plan.fit import FIT_SHARE
from trivium.plan.ladder import TOKENS_PER_PARAM, Rung, short
from trivium.plan.situation import Situation, num_epochs, shape_of

GIB = 1 << 30

# What is recommended, smallest first: open licences only (Apache 2.0; Qwen2.5-3B and 72B have Qwen's own).
CHAT_MODELS = tuple(f"Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "7B", "14B", "32B"))
REASONING_MODELS = tuple(f"Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"))
BASE_MODELS = tuple(f"Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B", "14B"))
LARGEST_UNASKED = 9e9
"""Parameters of the largest model that is recommended to those who asked for no size: larger ones are slow to try."""


@dataclass(frozen=True)
class Choice:
    """A model and a method that the situation can hold and pay."""

    model: str
    method: str
    why: str
    would_change: tuple[str, ...] = ()
    budget_tokens: int | None = None
    """Tokens that time and purse pay for; None where they pay for all."""


@dataclass(frozen=True)
class Bar:
    """What forbids a way, and what would allow it."""

    why: str
    unless: str


def size_below_all(situation: Situation) -> int | None:
    """The size asked for, where no published model is nearly as small: then there is nothing to adapt."""
    smallest = catalog.get(CHAT_MODELS[0]).num_params
    size = situation.num_params
    if situation.model is not None or situation.adapter_only or size is None or not 0 < size < smallest / 2:
        return None
    return size


def choose(situation: Situation, facts: DataFacts, rung: Rung) -> Choice | Bar:
    """The model and method for that rung, or all that forbids it outright, or that no model is within the means."""
    reasons = _forbidden(situation, rung)
    if not reasons:
        return _within_means(situation, facts, rung)
    why, unless = "; ".join(reasons), " and ".join(reasons.values())
    return Bar(f"Not {rung.title}: {why}.", f"If {unless}: {rung.title}.")


def _forbidden(situation: Situation, rung: Rung) -> dict[str, str]:
    """What forbids it, whatever the model and the means -> what would have to be otherwise."""
    reasons = {}
    if situation.adapter_only and rung.name != "adapter":
        reasons["only the adapter may be shared, and this changes the weights themselves"] = (
            "the whole model may be shared"
        )
    if situation.is_laptop and rung.name != "adapter":
        reasons["it has to fit on a laptop, or a machine like one"] = "it may run on a rented GPU"
    if situation.model is not None and rung.name == "scratch":
        reasons[f"{situation.model} was asked for, and this would throw its weights away"] = "its weights do not matter"
    return reasons


def _within_means(situation: Situation, facts: DataFacts, rung: Rung) -> Choice | Bar:
    """The first model that memory holds and with which time and purse pay for all data, else for the most of it."""
    best: Choice | None = None
    best_share, bars = 0.0, []
    for name, shape in _candidates(situation, facts, rung):
        method = next((one for one in rung.methods if shape is None or situation.fits(shape, one)), None)
        if shape is None or method is None:
            if shape is None:
                return Choice(name, rung.methods[0], f"{name} was asked for; its size is not known here.")
            bars.append(_too_large(situation, rung, name, shape))
            continue
        payable = situation.affordable_tokens(shape, method) / num_epochs(method)
        if payable < _least_tokens(facts, rung):
            bars.append(_too_dear(situation, facts, rung, name, shape))
            continue
        share = min(1.0, payable / facts.num_tokens)
        if share > best_share:
            best, best_share = _chosen(situation, facts, name, shape, method, share), share
    smallest = 0 if situation.starts_small else -1
    return best or (bars[smallest] if bars else _too_little(facts, rung))


def _candidates(situation: Situation, facts: DataFacts, rung: Rung) -> Iterator[tuple[str, QwenShape | None]]:
    """Models in the order in which they are wanted: the named one alone, the size asked for alone, else a few.

    A laptop starts with the smallest, which answers fast there, and so does whoever names no device; any other with
    the largest. From nothing, a model has at most a parameter for each twenty tokens.
    """
    if situation.model is not None:
        yield situation.model, situation.shape or shape_of(situation.model)
        return
    names = BASE_MODELS if facts.kind == "documents" else REASONING_MODELS if facts.reasoning_share else CHAT_MODELS
    shapes = {name: catalog.get(name) for name in names}
    if situation.num_params is not None:
        near = min(shapes, key=lambda name: abs(shapes[name].num_params - (situation.num_params or 0)))
        shapes = {near: shapes[near]}
    else:
        shapes = {name: shape for name, shape in shapes.items() if shape.num_params <= LARGEST_UNASKED}
    from_nothing = METHOD_DEFAULTS[rung.methods[0]]["weights"] == "random"
    if from_nothing:
        most = facts.num_tokens / TOKENS_PER_PARAM
        shapes = {name: shape for name, shape in shapes.items() if shape.num_params <= most}
    for name in shapes if situation.starts_small else reversed(shapes):
        yield name if from_nothing else f"Qwen/{name}", shapes[name]


def _least_tokens(facts: DataFacts, rung: Rung) -> float:
    """Tokens of the least data for which the rung is worth the effort, so that more data never bars it."""
    return rung.start * (facts.num_tokens / facts.num_rows if facts.kind == "conversations" else 1.0)


def _too_little(facts: DataFacts, rung: Rung) -> Bar:
    most = short(facts.num_tokens / TOKENS_PER_PARAM)
    return Bar(
        f"Not {rung.title}: {short(facts.num_tokens)} tokens are enough for {most} parameters, and more are wanted.",
        f"With a model of {most} parameters or less: {rung.title}.",
    )


def _chosen(situation: Situation, facts: DataFacts, name: str, shape: QwenShape, method: str, share: float) -> Choice:
    why = f"{name}: {_why_model(situation)}"
    if method == "qlora":
        why += " With its weights in 16 bits it would not fit, so they are packed to 4 (NF4)."
    budget_tokens = None
    if share < 1.0:
        all_tokens = facts.num_tokens * num_epochs(method)
        budget_tokens = _rounded_down(share * all_tokens)
        why += f" Time and purse pay for {short(budget_tokens)} of {short(all_tokens)} tokens: take the best of them."
    larger = (f"If its answers are not good enough: better data first, then a model larger than {name}.",)
    return Choice(name, method, why, larger if situation.model is None else (), budget_tokens)


def _rounded_down(count: float) -> int:
    """To two digits, which leaves some room for what the prediction does not see."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, count))) - 1)
    return max(1, math.floor(count / unit) * unit)


def _why_model(situation: Situation) -> str:
    if situation.model is not None:
        return "the model that was asked for."
    if situation.num_params is not None:
        return f"the published one nearest to {short(situation.num_params)} parameters."
    if situation.starts_small:
        return "the smallest published one, the fastest to try and to answer on a laptop; begin there."
    return "the largest that the hardware holds and the means pay for, of those up to 8B that have an open licence."


def _too_large(situation: Situation, rung: Rung, name: str, shape: QwenShape) -> Bar:
    needed = min(situation.least_memory(shape, method).total for method in rung.methods)
    has = situation.device.memory_bytes if situation.device else 0
    return Bar(
        f"Not {rung.title}: {name} needs {needed / GIB:.1f} GiB on each device even in the smallest portions, and "
        f"{FIT_SHARE:.0%} of {has / GIB:.1f} GiB may be used.",
        f"With {needed / FIT_SHARE / GIB:.1f} GiB or more on each device: {rung.title}, with {name}.",
    )


def _means(situation: Situation) -> str:
    return f"{situation.max_days:,.3g} days" + ("" if situation.purse is None else f" and {situation.purse:,.0f} USD")


def _too_dear(situation: Situation, facts: DataFacts, rung: Rung, name: str, shape: QwenShape) -> Bar:
    """Its arithmetic for the least data that the rung is worth it for."""
    method = rung.methods[0]
    tokens = round(_least_tokens(facts, rung) * num_epochs(method))
    needed = situation.cost(shape, method, tokens)
    assert needed is not None  # without a device nothing is too dear
    cost = f"{needed.hours / 24:,.3g} days" + (f" and {needed.money:,.0f} USD" if needed.money else "")
    return Bar(
        f"Not {rung.title}: {short(tokens)} tokens, where it begins to pay, take {cost} with {name}, and there are "
        f"{_means(situation)}.",
        f"With {cost}: {rung.title}, with {name}.",
    )
