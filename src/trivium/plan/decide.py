"""Choose how to train: not at all, LoRA, full fine-tuning, continued pre-training, or from scratch.

The amount of data selects one of an ordered list of approaches. If the license, the hardware, or the limits on time and
cost rule it out, the next lower approach is tried. Every situation gets a decision with its reasons. Never imports
torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trivium.config.inputs import parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.files import GIB
from trivium.model import catalog
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.fit import FIT_SHARE
from trivium.plan.situation import Situation, num_epochs
from trivium.plan.workload import DataFacts


@dataclass(frozen=True)
class Approach:
    """A way to train, and the amount of data it suits.

    Attributes:
        methods: the `method` values of a run file, preferred one first.
        start: least data: conversations, or tokens of documents.
        stop: most data, None for no limit. No rule covers the gap up to the next approach.
        basis: source of `start` and `stop`.
    """

    name: Literal["none", "adapter", "full", "continue", "scratch"]
    title: str
    methods: tuple[str, ...]
    start: int
    stop: int | None
    basis: str


COMMON = "a common rule of thumb"
CONTEXT = "Qwen's context is 32,768 tokens, and text that fits in the prompt needs no training"
GURURANGAN = f"{COMMON}; Gururangan et al. 2020, arXiv:2004.10964, gained from far less text from the task itself"
APPROACHES: dict[str, tuple[Approach, ...]] = {
    "conversations": (
        Approach("none", "no training (use prompting or retrieval)", (), 0, 100, COMMON),
        Approach("adapter", "LoRA", ("lora", "qlora"), 100, 10_000, COMMON),
        Approach("full", "full fine-tuning", ("full",), 10_000, 1_000_000, f"{COMMON}; LoRA is common too"),
    ),
    "documents": (
        Approach("none", "no training (use prompting or retrieval)", (), 0, 32_768, CONTEXT),
        Approach("adapter", "LoRA on the text", ("lora", "qlora"), 32_768, 32_768, CONTEXT),
        Approach("continue", "continued pre-training", ("continue",), 10**9, 10**10, GURURANGAN),
        Approach("scratch", "training from scratch", ("scratch",), 10**11, None, COMMON),
    ),
}
UNITS = {"conversations": "conversations", "documents": "tokens"}
TOKENS_PER_PARAM = 20
"""Compute-optimal training from scratch. Source: Hoffmann et al. 2022, arXiv:2203.15556 (Chinchilla)."""

# Models to recommend, smallest first: only open licenses (Apache 2.0; Qwen2.5-3B and 72B have Qwen's license).
CHAT_MODELS = tuple(f"Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "7B", "14B", "32B"))
REASONING_MODELS = tuple(f"Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"))
BASE_MODELS = tuple(f"Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B", "14B"))
MAX_DEFAULT_PARAMS = 9e9
"""Parameters of the largest model recommended when no size is requested; larger ones are slow to try."""


@dataclass(frozen=True)
class Decision:
    """The recommended approach.

    Attributes:
        method, model: values for a run file; None for no training.
        budget_tokens: `budget.tokens` of a run file, if the limits do not allow all the data.
        reasons: why, one line each.
    """

    name: str
    title: str
    method: str | None
    model: str | None
    budget_tokens: int | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ModelChoice:
    """A model and a method that fit the hardware and the limits; `budget_tokens` is None if all the data fits."""

    model: str
    method: str
    why: str
    budget_tokens: int | None = None


def decide(situation: Situation) -> Decision:
    """Decide whether to train, with which approach, and on which model."""
    if situation.is_general:
        return _no_training(["A general model already does the task: choose one, write a prompt, and measure it."])
    tried = (
        "It is not known whether a general model already does the task: try one first, on a few dozen hard cases."
        if situation.is_general is None
        else "A general model was tried and is not good enough."
    )
    facts = situation.facts
    if facts is None or not situation.has_data:
        first = APPROACHES["conversations"][1]
        return _no_training([tried, f"There is no training data yet; {first.title} takes {first.start} conversations."])
    if (size := _size_below_published(situation)) is not None:
        return _small_from_scratch(size, facts, tried)
    approaches, amount = APPROACHES[facts.kind], _amount(facts)
    selected = max(index for index, approach in enumerate(approaches) if approach.start <= amount)
    reasons = [tried, _why_amount(facts, selected)]
    for approach in approaches[selected:0:-1]:
        choice = _choose(situation, facts, approach)
        if isinstance(choice, ModelChoice):
            title = "QLoRA" if choice.method == "qlora" else approach.title
            reasons.append(choice.why)
            return Decision(approach.name, title, choice.method, choice.model, choice.budget_tokens, tuple(reasons))
        reasons.append(choice)
    return _no_training(reasons)


def _no_training(reasons: list[str]) -> Decision:
    none = APPROACHES["conversations"][0]
    return Decision(none.name, none.title, None, None, None, tuple(reasons))


def _size_below_published(situation: Situation) -> int | None:
    """The requested size, if it is less than half of the smallest published model; then there is nothing to adapt."""
    size = situation.num_params
    if situation.model is not None or situation.adapter_only or size is None:
        return None
    return size if 0 < size < catalog.get(CHAT_MODELS[0]).num_params / 2 else None


def _small_from_scratch(num_params: int, facts: DataFacts, tried: str) -> Decision:
    """Train a model smaller than any published one from scratch, whatever the data."""
    size, enough = short(num_params), short(num_params * TOKENS_PER_PARAM)
    return Decision(
        name="scratch",
        title="training from scratch",
        method="scratch",
        model=size if parse_count(size) == num_params else str(num_params),
        budget_tokens=None,
        reasons=(
            tried,
            f"A model of {size} parameters was requested, and no published Qwen is that small.",
            f"{short(facts.num_tokens)} tokens are {facts.num_tokens / num_params:.2g} per parameter; about "
            f"{TOKENS_PER_PARAM} ({enough} tokens) are compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556). A "
            "small model keeps improving with more.",
        ),
    )


def _choose(situation: Situation, facts: DataFacts, approach: Approach) -> ModelChoice | str:
    """The first model that fits and can train on all the data within the limits, else the one that trains on the most.

    Returns what rules the approach out if no model fits.
    """
    if obstacle := _forbidden(situation, approach):
        return obstacle
    best: ModelChoice | None = None
    best_share, obstacles = 0.0, []
    for name, shape in _candidates(situation, facts, approach):
        if shape is None:
            return ModelChoice(name, approach.methods[0], f"{name}: the requested model, of unknown size.")
        method = next((method for method in approach.methods if situation.fits(shape, method)), None)
        if method is None:
            obstacles.append(_too_large(situation, approach, name, shape))
            continue
        affordable = situation.affordable_tokens(shape, method) / num_epochs(method)
        if affordable < _least_tokens(facts, approach):
            obstacles.append(_too_expensive(situation, facts, approach, name, shape))
            continue
        share = min(1.0, affordable / facts.num_tokens)
        if share > best_share:
            best, best_share = _model_choice(situation, facts, name, method, share), share
    if best or obstacles:
        return best or obstacles[0 if situation.starts_small else -1]
    most = short(facts.num_tokens / TOKENS_PER_PARAM)
    return f"Not {approach.title}: {short(facts.num_tokens)} tokens are enough for only {most} parameters."


def _forbidden(situation: Situation, approach: Approach) -> str | None:
    """What rules the approach out for every model."""
    is_adapter, model = approach.name == "adapter", situation.model
    why = []
    if situation.adapter_only and not is_adapter:
        why.append("only an adapter may be published, but this changes the base weights")
    if situation.is_laptop and not is_adapter:
        why.append("it has to run on a laptop, or a machine without a large GPU")
    if model is not None and approach.name == "scratch":
        why.append(f"{model} was requested, and training from scratch does not use its weights")
    return f"Not {approach.title}: {'; '.join(why)}." if why else None


def _candidates(situation: Situation, facts: DataFacts, approach: Approach) -> Iterator[tuple[str, QwenShape | None]]:
    """Models in the order to try them: the requested model, the one nearest to the requested size, or a few.

    On a laptop or an unknown device the smallest comes first, otherwise the largest. From scratch a model has at most
    one parameter for each `TOKENS_PER_PARAM` tokens.
    """
    if situation.model is not None:
        yield situation.model, situation.shape or published_shape(situation.model)
        return
    names = BASE_MODELS if facts.kind == "documents" else REASONING_MODELS if facts.reasoning_share else CHAT_MODELS
    shapes, size = {name: catalog.get(name) for name in names}, situation.num_params
    if size is not None:
        nearest = min(shapes, key=lambda name: abs(shapes[name].num_params - size))
        shapes = {nearest: shapes[nearest]}
    from_scratch = METHOD_DEFAULTS[approach.methods[0]]["weights"] == "random"
    most = math.inf if size is not None else MAX_DEFAULT_PARAMS
    if from_scratch:
        most = min(most, facts.num_tokens / TOKENS_PER_PARAM)
    for name in shapes if situation.starts_small else reversed(shapes):
        if shapes[name].num_params <= most:
            yield name if from_scratch else f"Qwen/{name}", shapes[name]


def _amount(facts: DataFacts) -> int:
    """The number to compare with `Approach.start`: conversations, or tokens of documents."""
    return facts.num_rows if facts.kind == "conversations" else facts.num_tokens


def _least_tokens(facts: DataFacts, approach: Approach) -> float:
    """Tokens of the least data the approach suits. Independent of the amount of data, so more never rules it out."""
    return approach.start * (facts.num_tokens / facts.num_rows if facts.kind == "conversations" else 1.0)


def _model_choice(situation: Situation, facts: DataFacts, name: str, method: str, share: float) -> ModelChoice:
    """The choice of a model that can train on a `share` of the data within the limits."""
    if situation.model is not None:
        why = f"{name}: the requested model."
    elif situation.num_params is not None:
        why = f"{name}: the published model nearest to {short(situation.num_params)} parameters."
    elif situation.starts_small:
        why = f"{name}: the smallest published model, the fastest to try on a laptop; start there."
    else:
        why = f"{name}: the largest with an open license, up to 8B, that fits the hardware and the limits."
    if method == "qlora":
        why += " It does not fit with 16-bit weights, so they are quantized to 4 bits (NF4)."
    if share == 1.0:
        return ModelChoice(name, method, why)
    all_tokens = facts.num_tokens * num_epochs(method)
    # Two significant digits, which leaves some room for the error of the prediction.
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, share * all_tokens))) - 1)
    budget_tokens = max(1, math.floor(share * all_tokens / unit) * unit)
    why += f" The time and cost limits allow {short(budget_tokens)} of {short(all_tokens)} tokens: use the best data."
    return ModelChoice(name, method, why, budget_tokens)


def _too_large(situation: Situation, approach: Approach, name: str, shape: QwenShape) -> str:
    needed = min(situation.least_memory(shape, method).total for method in approach.methods)
    has = situation.device.memory_bytes if situation.device else 0
    return (
        f"Not {approach.title}: {name} needs {needed / GIB:.1f} GiB on each device with the smallest micro-batch, but "
        f"only {FIT_SHARE:.0%} of {has / GIB:.1f} GiB may be used."
    )


def _too_expensive(situation: Situation, facts: DataFacts, approach: Approach, name: str, shape: QwenShape) -> str:
    """The time and cost of the least data the approach suits, and the limits."""
    method = approach.methods[0]
    tokens = round(_least_tokens(facts, approach) * num_epochs(method))
    needed = situation.cost(shape, method, tokens)
    assert needed is not None  # without a device nothing is too expensive
    takes, limit = (
        f"{hours / 24:,.3g} days" + (f" and {money:,.0f} USD" if money else "")
        for hours, money in ((needed.hours, needed.money), (situation.hours, situation.max_cost))
    )
    return (
        f"Not {approach.title}: {short(tokens)} tokens, the least it suits, take {takes} with {name}, but the limit is "
        f"{limit}."
    )


def _why_amount(facts: DataFacts, selected: int) -> str:
    """Why the amount of data selects this approach, and the source of the rule."""
    approaches, amount = APPROACHES[facts.kind], _amount(facts)
    approach = approaches[selected]
    counted = f"{short(amount)} {UNITS[facts.kind]}"
    if approach.stop is None:
        return f"{counted}: enough for {approach.title}, at least {short(approach.start)} ({approach.basis})."
    if amount <= approach.stop:
        between = f"{short(approach.start)} to {short(approach.stop)}"
        return f"{counted}: the range of {approach.title}, {between} ({approach.basis})."
    gap = f"beyond {short(approach.stop)}"
    if selected + 1 < len(approaches):
        gap = f"between {short(approach.stop)} and {short(approaches[selected + 1].start)}"
    return f"{counted}: no rule covers this gap, {gap}; {approach.title} is the approach for less data."


def short(count: float) -> str:
    """A count with a suffix: 5K, 1.5B. Counts below 100,000 that are not multiples of 100 keep all digits."""
    if count < 1e5 and count % 100:
        return f"{count:,.0f}"
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= unit:
            return f"{count / unit:.4g}{suffix}"
    return f"{count:.4g}"
