"""What to beware of on a way, and the seven points to settle before training, filled in as far as they are known.

Decides nothing: `path.py` does. Warnings are for any method, the recommended one or the one that a run file names.
Imported by the verb `plan`; never imports torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from trivium.config.run import METHOD_DEFAULTS, parse_count
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.decide import TOKENS_PER_PARAM, Decision, short
from trivium.plan.devices import GIB
from trivium.plan.situation import Situation, is_chat_model, num_epochs, shape_to_build
from trivium.plan.speed import hours

FEW_CONVERSATIONS, FEW_TOKENS, LARGE_RANK, FEW_REASON = 10_000, 10**9, 64, 0.5


class ChecklistItem(NamedTuple):
    """One point of the checklist."""

    question: str
    answer: str


class WarningContext(NamedTuple):
    """What a warning looks at: the situation, and what the method chooses."""

    situation: Situation
    method: str
    model: str | None
    shape: QwenShape | None

    @property
    def chosen(self) -> dict[str, Any]:
        return METHOD_DEFAULTS[self.method]

    @property
    def tunes_everything(self) -> bool:
        return self.chosen["trainable"] == "everything" and self.chosen["weights"] != "random"


def warnings(situation: Situation, method: str | None, model: str | None) -> tuple[str, ...]:
    """What commonly goes wrong on that way and may here, a paragraph each."""
    if method is None:
        return ()
    given = WarningContext(situation, method, model, _shape(situation, model))
    return tuple(text for warn in WARNINGS if (text := warn(given)) is not None)


def _overfits(given: WarningContext) -> str | None:
    facts = given.situation.facts
    if not facts or facts.kind != "conversations" or not given.tunes_everything or facts.num_rows >= FEW_CONVERSATIONS:
        return None
    return (
        f"{short(facts.num_rows)} conversations: below {short(FEW_CONVERSATIONS)} LoRA does about as well as full "
        "fine-tuning and is steadier, since all weights together learn so few by heart."
    )


def _forgets(given: WarningContext) -> str | None:
    if not given.tunes_everything:
        return None
    return (
        "All weights change, so something is forgotten: mix general text in, and measure it with "
        "`trivium compare RUN --general TEXTS`."
    )


def _little_text(given: WarningContext) -> str | None:
    facts = given.situation.facts
    if not facts or facts.kind != "documents" or given.chosen["weights"] == "random" or facts.num_tokens >= FEW_TOKENS:
        return None
    return (
        f"{short(facts.num_tokens)} tokens of raw text: below {short(FEW_TOKENS)} it is commonly said to change next "
        "to nothing. That is no law: Gururangan et al. 2020 (arXiv:2004.10964) gain from far less where it is the "
        "task's own text. For facts alone, retrieval is surer; measure both."
    )


def _text_on_chat(given: WarningContext) -> str | None:
    facts, model = given.situation.facts, given.model
    if not facts or facts.kind != "documents" or given.chosen["weights"] == "random" or not model:
        return None
    if not is_chat_model(model):
        return None
    base = model.removesuffix("-Instruct") if model.endswith("-Instruct") else f"{model}-Base"
    return (
        f"{model} was tuned for conversations, and raw text breaks its format: it may no longer answer or stop. Take "
        f"{base if published_shape(base) else 'a base model'}, or mix conversations in."
    )


def _chat_on_base(given: WarningContext) -> str | None:
    facts, model = given.situation.facts, given.model
    if not facts or facts.kind != "conversations" or given.chosen["weights"] == "random" or not model:
        return None
    if is_chat_model(model) is not False:
        return None
    return (
        f"{model} has never been taught to converse: its rows for <|im_start|> and <|im_end|> may be untrained, and "
        "have to be trained, too. The version tuned for conversations needs fewer examples."
    )


def _large_rank(given: WarningContext) -> str | None:
    rank = given.situation.rank
    if given.chosen["trainable"] != "adapter" or rank < LARGE_RANK:
        return None
    return (
        f"Rank {rank}: more of everything the adapter costs, and more room to learn a small set by heart. 8 to 16 is "
        "usual; a higher one pays where there are more examples than the adapter can hold."
    )


def _little_reasoning(given: WarningContext) -> str | None:
    facts = given.situation.facts
    if not facts or facts.kind != "conversations" or not 0 < facts.reasoning_share < FEW_REASON:
        return None
    return (
        f"{facts.reasoning_share:.0%} of the conversations reason: a model that can think learns to leave it. Qwen's "
        "and Unsloth's guides mix three parts with reasoning to one without: data.reasoning_share=0.75."
    )


def _arithmetic(given: WarningContext) -> str | None:
    """What a model from nothing costs, which is where most people stop."""
    facts, shape = given.situation.facts, given.shape
    if not facts or given.chosen["weights"] != "random" or shape is None:
        return None
    size = shape.num_params
    per_param = facts.num_tokens / size
    text = (
        f"6 x {short(size)} parameters x {short(facts.num_tokens)} tokens are {6.0 * size * facts.num_tokens:.2g} FLOP"
    )
    cost = given.situation.cost(shape, given.method, facts.num_tokens)
    if cost is not None and given.situation.device is not None:
        text += f": {hours(cost.hours)} of {given.situation.devices} x {given.situation.device.title}"
    if per_param < TOKENS_PER_PARAM:
        text += (
            f". The tokens are {per_param:.2g} for each parameter and about {TOKENS_PER_PARAM} are wanted "
            f"({short(TOKENS_PER_PARAM * size)}): take a smaller model or more text"
        )
    return text + "."


WARNINGS: tuple[Callable[[WarningContext], str | None], ...] = (
    _overfits,
    _forgets,
    _little_text,
    _text_on_chat,
    _chat_on_base,
    _large_rank,
    _little_reasoning,
    _arithmetic,
)


def checklist(
    situation: Situation, decision: Decision, memory: str | None = None, time: str | None = None
) -> list[ChecklistItem]:
    """The seven points, `memory` and `time` in the caller's words where it has computed them."""
    return [
        ChecklistItem(
            "Path", decision.title if decision.method is None else f"{decision.title} (method: {decision.method})"
        ),
        ChecklistItem("Base model", decision.model or "a general one; try several with your prompts"),
        ChecklistItem("Data", _data(situation)),
        ChecklistItem("Memory", memory or _memory(situation, decision)),
        ChecklistItem("Training time", time or _time(situation, decision)),
        ChecklistItem("Evaluation", _evaluation(situation, decision)),
        ChecklistItem("Comparison", _comparison(decision)),
    ]


def _data(situation: Situation) -> str:
    facts = situation.facts
    if not facts or not situation.has_data:
        return "none yet; as conversations, JSON lines with `messages`, or as raw text"
    known = "counted" if facts.is_measured else "estimated"
    answers = f", {facts.supervised_share:.0%} of them in answers" if facts.kind == "conversations" else ""
    reasons = f"; {facts.reasoning_share:.0%} reason" if facts.reasoning_share else ""
    rows = f"{facts.num_rows:,} {facts.kind}"
    return f"{rows}, {short(facts.num_tokens)} tokens ({known}){answers}{reasons}"


def _shape(situation: Situation, model: str | None) -> QwenShape | None:
    """The shape of the model, be it given, published, or a size to build."""
    size = parse_count(model)
    if isinstance(size, int):
        return shape_to_build(size)
    return situation.shape or (published_shape(model) if model else None)


def _memory(situation: Situation, decision: Decision) -> str:
    """The ways side by side, in the smallest portions."""
    shape = _shape(situation, decision.model)
    if decision.method is None:
        return "that of answering only: about 2 bytes a parameter"
    if shape is None:
        return "`trivium plan` of a run file says it"
    methods = dict.fromkeys(
        (decision.method, "full", "lora", "qlora") if decision.name != "scratch" else (decision.method,)
    )
    needed = (f"{method} {situation.least_memory(shape, method).total / GIB:.1f} GiB" for method in methods)
    return f"at the least, on each device: {', '.join(needed)}"


def _time(situation: Situation, decision: Decision) -> str:
    facts, shape = situation.facts, _shape(situation, decision.model)
    if decision.method is None or facts is None:
        return "none"
    tokens = decision.budget_tokens or round(facts.num_tokens * num_epochs(decision.method))
    cost = situation.cost(shape, decision.method, tokens) if shape else None
    if cost is None:
        return f"{short(tokens)} tokens to be read; name a device to know how long that takes"
    span = f"{cost.hours / 24:,.3g} days" if cost.hours >= 48 else f"{cost.hours:,.3g} hours"
    return f"about {span} for {short(tokens)} tokens"


def _evaluation(situation: Situation, decision: Decision) -> str:
    asked = "`trivium eval {} --prompts questions.jsonl`"
    if decision.method is None:
        return f"{asked.format('MODEL')}: a few dozen questions with answers, before anything is trained"
    if situation.facts and situation.facts.kind == "documents":
        return "`trivium eval RUN`, the loss on what was held out; `trivium compare RUN --general TEXTS`, what was lost"
    return (
        f"{asked.format('RUN')}, questions kept out of the data; `trivium compare RUN --general TEXTS`, what was lost"
    )


def _comparison(decision: Decision) -> str:
    if decision.other_method is None:
        return "optional; none that this hardware and licence allow is as sound for this data"
    return (
        f"optional: `trivium train RUN_FILE method={decision.other_method} name=other`, "
        "then `trivium compare RUN runs/other --prompts questions.jsonl`"
    )
