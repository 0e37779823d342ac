"""Which way: do not train, adapt a model, fine-tune all of it, go on pre-training it, or build one from nothing.

A ladder of ways, each with the amount of data that pays for it. The data says how high to climb; licence, laptop,
memory, time and purse say how far down to step again. `decide` is total: every situation has an answer, with its
reasons and with what would change it. Which model and whether it can be done is `choice.py`'s business; what to beware
of and what is left to do stands in `checklist.py`. Imported by the verb `plan`; never imports torch.
"""

from dataclasses import dataclass

from trivium.config.run import parse_count
from trivium.plan.choice import Bar, Choice, choose, size_below_all
from trivium.plan.facts import DataFacts
from trivium.plan.ladder import LADDER, TOKENS_PER_PARAM, UNITS, Rung, RungName, amount, short
from trivium.plan.situation import Situation, shape_of

UNTRIED = "Nobody has tried yet whether a general model does it: try that first, it costs nothing."
TRIED = "A general model was tried and does not do it."
IF_GENERAL = "If a general model answers a few dozen of your hardest cases well: no training."


@dataclass(frozen=True)
class Path:
    """The answer.

    Attributes:
        name, title: the way.
        method: what a run file calls it; None where nothing is to be trained.
        model: what a run file names as `model`; None where nothing is to be trained.
        budget_tokens: tokens to be read, where time and purse do not pay for all; `budget.tokens` of a run file.
        other_method: the method to compare it with, where another is as sound.
        reasons: why, a line each, in the order in which they were asked.
        would_change: what would lead elsewhere, with its figure, a line each.
        rules_of_thumb: which of the figures are no more than that, and where they come from.
    """

    name: RungName
    title: str
    method: str | None
    model: str | None
    budget_tokens: int | None
    other_method: str | None
    reasons: tuple[str, ...]
    would_change: tuple[str, ...]
    rules_of_thumb: tuple[str, ...]


def decide(situation: Situation) -> Path:
    """Walk the tree: is training needed, how much data is there, what forbids the way that the data pays for."""
    if situation.is_general:
        return _untrained(("A general model already does it: choose one, write the prompt, measure it.",), ())
    tried = UNTRIED if situation.is_general is None else TRIED
    facts = situation.facts
    if facts is None or not situation.has_data:
        return _untrained((tried, "There is no data to learn from yet."), (_start_of(LADDER["conversations"][1]),))
    if (size := size_below_all(situation)) is not None:
        return _small_from_scratch(size, facts, tried)
    ladder = LADDER[facts.kind]
    wanted = max(index for index, rung in enumerate(ladder) if rung.start <= amount(facts))
    bars: list[Bar] = []
    for index in range(wanted, 0, -1):
        found = choose(situation, facts, ladder[index])
        if isinstance(found, Choice):
            return _chosen(situation, facts, (index, wanted), bars, found, tried)
        bars.append(found)
    reasons = (tried, _why_amount(facts, wanted), *(bar.why for bar in bars))
    would_change = (*(bar.unless for bar in bars), *map(_start_of, ladder[wanted + 1 : wanted + 2]))
    return _untrained(reasons, would_change, _rules(facts, (0, wanted)))


def _untrained(reasons: tuple[str, ...], would_change: tuple[str, ...], rules: tuple[str, ...] = ()) -> Path:
    none = LADDER["conversations"][0]
    return Path(none.name, none.title, None, None, None, None, reasons, would_change, rules)


def _chosen(
    situation: Situation, facts: DataFacts, rungs: tuple[int, int], bars: list[Bar], choice: Choice, tried: str
) -> Path:
    """The path at the first of two rungs, the second being the one that the data alone would have taken."""
    index, wanted = rungs
    ladder = LADDER[facts.kind]
    rung = ladder[index]
    below = f"With fewer than {short(rung.start)} {UNITS[facts.kind]}: {ladder[index - 1].title}."
    other = next((other for other in ladder[1:] if other.methods[0] == rung.other), None)
    other_choice = choose(situation, facts, other) if other else None
    return Path(
        name=rung.name,
        title="QLoRA" if choice.method == "qlora" else rung.title,
        method=choice.method,
        model=choice.model,
        budget_tokens=choice.budget_tokens,
        other_method=other_choice.method if isinstance(other_choice, Choice) else None,
        reasons=(tried, _why_amount(facts, wanted), *(bar.why for bar in bars), choice.why),
        would_change=(
            *(() if situation.is_general is False else (IF_GENERAL,)),
            *(bar.unless for bar in bars),
            *map(_start_of, ladder[wanted + 1 : wanted + 2]),
            below,
            *_larger_by(other, other_choice, choice),
            *choice.would_change,
        ),
        rules_of_thumb=_rules(facts, (index, wanted)),
    )


def _larger_by(other: Rung | None, other_choice: Choice | Bar | None, choice: Choice) -> tuple[str, ...]:
    """Where the other way can take a larger model on the same hardware."""
    if other is None or not isinstance(other_choice, Choice):
        return ()
    shape, other_shape = shape_of(choice.model), shape_of(other_choice.model)
    if shape is None or other_shape is None or other_shape.num_params <= shape.num_params:
        return ()
    return (f"If a larger model does more than a deeper change: {other.title}, which can take {other_choice.model}.",)


def _small_from_scratch(num_params: int, facts: DataFacts, tried: str) -> Path:
    """A model smaller than any that is published has no weights to begin with, whatever the data."""
    enough = num_params * TOKENS_PER_PARAM
    has = f"{short(facts.num_tokens)} tokens are {facts.num_tokens / num_params:.2g} for each parameter"
    return Path(
        name="scratch",
        title="from scratch",
        method="scratch",
        model=short(num_params) if parse_count(short(num_params)) == num_params else str(num_params),
        budget_tokens=None,
        other_method=None,
        reasons=(
            tried,
            f"A model of {short(num_params)} parameters was asked for, and no published Qwen is that small: there are "
            "no weights to adapt.",
            f"{has}; about {TOKENS_PER_PARAM} make the best use of the arithmetic, which is {short(enough)}.",
        ),
        would_change=("If a model of 0.5B parameters will do: adapt one, which needs a few hundred examples.",),
        rules_of_thumb=(
            f"{TOKENS_PER_PARAM} tokens for each parameter: Hoffmann et al. 2022, arXiv:2203.15556, who measured it on "
            "models from 70M to 16B; a small model goes on learning from more.",
        ),
    )


def _start_of(rung: Rung) -> str:
    unit = "conversations" if rung.name == "full" or rung.start < 10**4 else "tokens of raw text"
    return f"With {short(rung.start)} {unit} or more: {rung.title}."


def _why_amount(facts: DataFacts, wanted: int) -> str:
    """Where the data stands on the ladder, and whether any table has a row for it."""
    ladder, unit, has = LADDER[facts.kind], UNITS[facts.kind], amount(facts)
    rung = ladder[wanted]
    counted = f"{short(has)} {unit}"
    if rung.stop is None:
        return f"{counted}: {rung.title} pays from {short(rung.start)} on."
    if has <= rung.stop:
        return f"{counted}: the range of {rung.title}, {short(rung.start)} to {short(rung.stop)}."
    gap = f"beyond {short(rung.stop)}"
    if wanted + 1 < len(ladder):
        gap = f"between {short(rung.stop)} and {short(ladder[wanted + 1].start)}"
    return f"{counted}: a gap, since the table says nothing {gap}; {rung.title} is the nearest way below."


def _rules(facts: DataFacts, rungs: tuple[int, int]) -> tuple[str, ...]:
    ladder, unit = LADDER[facts.kind], UNITS[facts.kind]
    named = dict.fromkeys(ladder[index] for index in rungs)
    return tuple(f"{rung.title}, {_range(rung)} {unit}: {rung.basis}." for rung in named)


def _range(rung: Rung) -> str:
    if not rung.start and rung.stop is not None:
        return f"below {short(rung.stop)}"
    if rung.stop is None or rung.stop == rung.start:
        return f"{short(rung.start)} or more"
    return f"{short(rung.start)} to {short(rung.stop)}"
