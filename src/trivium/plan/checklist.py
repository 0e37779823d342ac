"""Warnings about common pitfalls of a method, and a checklist of seven points to settle before training.

Never imports torch.
"""

from typing import NamedTuple

from trivium.config.inputs import TrainTokenizer, parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.decide import TOKENS_PER_PARAM, Decision, short
from trivium.plan.devices import GIB
from trivium.plan.fit import is_base
from trivium.plan.situation import Situation, num_epochs
from trivium.plan.speed import hours
from trivium.plan.workload import DataFacts

FEW_CONVERSATIONS, FEW_TOKENS, LARGE_RANK, LOW_REASONING_SHARE = 10_000, 10**9, 64, 0.5


class ChecklistItem(NamedTuple):
    question: str
    answer: str


def warnings(situation: Situation, method: str | None, model: str | None) -> tuple[str, ...]:
    """Common pitfalls of the method that may apply here, one paragraph each."""
    if method is None:
        return ()
    defaults, facts = METHOD_DEFAULTS[method], situation.facts
    if defaults["weights"] == "random":
        shape = _shape(situation, model)
        found = [_compute(situation, facts, shape, method)] if facts and shape else []
    else:
        found = _forgetting(facts) if defaults["trainable"] == "everything" else []
        found += _wrong_model(facts, model) if facts else []
    if defaults["trainable"] == "adapter" and situation.rank >= LARGE_RANK:
        found.append(
            f"Rank {situation.rank}: a large adapter costs memory and time, and overfits small data sets more easily. "
            "8 to 16 is usual; use more only for many examples."
        )
    if facts and facts.kind == "conversations" and 0 < facts.reasoning_share < LOW_REASONING_SHARE:
        found.append(
            f"{facts.reasoning_share:.0%} of the conversations show reasoning: a reasoning model may unlearn it. The "
            "guides of Qwen and Unsloth mix three parts with reasoning to one without: data.reasoning_share=0.75."
        )
    return tuple(found)


def _forgetting(facts: DataFacts | None) -> list[str]:
    found = []
    if facts and facts.kind == "conversations" and facts.num_rows < FEW_CONVERSATIONS:
        found.append(
            f"{short(facts.num_rows)} conversations: below {short(FEW_CONVERSATIONS)} LoRA is usually about as good as "
            "full fine-tuning and more stable, because full fine-tuning overfits a small data set."
        )
    found.append(
        "All weights change, so the model forgets something: mix in general text, and measure forgetting with "
        "`trivium compare RUN --general TEXTS`."
    )
    return found


def _wrong_model(facts: DataFacts, model: str | None) -> list[str]:
    """Warnings when the kind of data does not suit a pretrained model."""
    is_chat = None  # None: not published, so unknown
    if model and published_shape(model) and "ladder-" not in model.lower():
        is_chat = not is_base(model)
    if facts.kind == "conversations":
        if is_chat is not False:
            return []
        return [
            f"{model} is a base model: its embeddings of <|im_start|> and <|im_end|> may be untrained and have to be "
            "trained too. The chat version of the model needs fewer examples."
        ]
    found = []
    if facts.num_tokens < FEW_TOKENS:
        found.append(
            f"{short(facts.num_tokens)} tokens of plain text: below {short(FEW_TOKENS)} continued pre-training is said "
            "to have little effect, though Gururangan et al. 2020 (arXiv:2004.10964) gain from far less text of the "
            "task itself. For facts alone retrieval is more reliable; measure both."
        )
    if model and is_chat:
        base = model.removesuffix("-Instruct") if model.endswith("-Instruct") else f"{model}-Base"
        found.append(
            f"{model} was tuned for conversations, and plain text damages that: it may no longer answer or stop. Take "
            f"{base if published_shape(base) else 'a base model'}, or mix conversations in."
        )
    return found


def _compute(situation: Situation, facts: DataFacts, shape: QwenShape, method: str) -> str:
    """The compute of training from scratch, and whether the data is enough."""
    size = shape.num_params
    flops = 6.0 * size * facts.num_tokens
    text = f"6 x {short(size)} parameters x {short(facts.num_tokens)} tokens are {flops:.2g} FLOP"
    cost = situation.cost(shape, method, facts.num_tokens)
    if cost is not None and situation.device is not None:
        text += f": {hours(cost.hours)} of {situation.devices} x {situation.device.title}"
    if facts.num_tokens < TOKENS_PER_PARAM * size:
        text += (
            f". There are {facts.num_tokens / size:.2g} tokens for each parameter, and about {TOKENS_PER_PARAM} are "
            f"recommended ({short(TOKENS_PER_PARAM * size)}): take a smaller model or more text"
        )
    return f"{text}."


def checklist(
    situation: Situation, decision: Decision, memory: str | None = None, time: str | None = None
) -> list[ChecklistItem]:
    """Seven points to settle before training; `memory` and `time` come from a plan if there is one."""
    method, other = decision.method, decision.other_method
    forgetting = "`trivium compare RUN --general TEXTS` for forgetting"
    if method is None:
        test = "`trivium eval MODEL --prompts questions.jsonl`: a few dozen questions with answers, before any training"
    elif situation.facts and situation.facts.kind == "documents":
        test = f"`trivium eval RUN` for the held-out loss; {forgetting}"
    else:
        test = f"`trivium eval RUN --prompts questions.jsonl` with questions that are not in the data; {forgetting}"
    comparison = "optional; no other method suits this data, hardware and license as well"
    if other:
        comparison = (
            f"optional: `trivium train RUN_FILE method={other} name=other`, "
            "then `trivium compare RUN runs/other --prompts questions.jsonl`"
        )
    return [
        ChecklistItem("Method", decision.title + (f" (method: {method})" if method else "")),
        ChecklistItem("Base model", decision.model or "a general one; try several with your prompts"),
        ChecklistItem("Data", _data(situation)),
        ChecklistItem("Memory", memory or _memory(situation, decision)),
        ChecklistItem("Training time", time or _time(situation, decision)),
        ChecklistItem("Evaluation", test),
        ChecklistItem("Comparison", comparison),
    ]


def _data(situation: Situation) -> str:
    facts = situation.facts
    if not facts or not situation.has_data:
        return "none yet; conversations as JSON lines with `messages`, or plain text"
    known = "counted" if facts.is_measured else "estimated"
    answers = f", {facts.supervised_share:.0%} of them in answers" if facts.kind == "conversations" else ""
    reasoning = f"; {facts.reasoning_share:.0%} with reasoning" if facts.reasoning_share else ""
    return f"{facts.num_rows:,} {facts.kind}, {short(facts.num_tokens)} tokens ({known}){answers}{reasoning}"


def _shape(situation: Situation, model: str | None) -> QwenShape | None:
    """The shape of a published model, or of a new model of about the given size; None if unknown."""
    size = parse_count(model)
    if not isinstance(size, int):
        return situation.shape or (published_shape(model) if model else None)
    try:
        return catalog.size_for_budget(size, TrainTokenizer.model_fields["vocab_size"].default)
    except ConfigError:
        return None


def _memory(situation: Situation, decision: Decision) -> str:
    shape = _shape(situation, decision.model)
    if decision.method is None:
        return "inference only: about 2 bytes per parameter"
    if shape is None:
        return "run `trivium plan` on the run file"
    methods = (decision.method,) if decision.name == "scratch" else (decision.method, "full", "lora", "qlora")
    needed = (f"{name} {situation.least_memory(shape, name).total / GIB:.1f} GiB" for name in dict.fromkeys(methods))
    return f"at least, on each device: {', '.join(needed)}"


def _time(situation: Situation, decision: Decision) -> str:
    facts, shape = situation.facts, _shape(situation, decision.model)
    if decision.method is None or facts is None:
        return "none"
    tokens = decision.budget_tokens or round(facts.num_tokens * num_epochs(decision.method))
    cost = situation.cost(shape, decision.method, tokens) if shape else None
    if cost is None:
        return f"{short(tokens)} training tokens; give a device to predict the time"
    return f"about {hours(cost.hours)} for {short(tokens)} tokens"
