"""Common pitfalls of a method, and a checklist of seven points to settle before training, as far as they are known.

Warnings apply to any method, the recommended one or the one in a run file. Never imports torch.
"""

from collections.abc import Iterator
from typing import NamedTuple

from trivium.config.inputs import parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.decide import TOKENS_PER_PARAM, Decision, short
from trivium.plan.devices import GIB
from trivium.plan.situation import Situation, is_chat_model, num_epochs, shape_to_build
from trivium.plan.speed import hours
from trivium.plan.workload import DataFacts

FEW_CONVERSATIONS, FEW_TOKENS, LARGE_RANK, FEW_REASON = 10_000, 10**9, 64, 0.5


class ChecklistItem(NamedTuple):
    """One point of the checklist."""

    question: str
    answer: str


def warnings(situation: Situation, method: str | None, model: str | None) -> tuple[str, ...]:
    """What commonly goes wrong with this method and may go wrong here, a paragraph each."""
    if method is None:
        return ()
    chosen, facts = METHOD_DEFAULTS[method], situation.facts
    found: list[str] = []
    if chosen["trainable"] == "everything" and chosen["weights"] != "random":
        found += _of_full_training(facts)
    if facts and chosen["weights"] != "random":
        found += _of_pretrained(facts, model)
    if chosen["trainable"] == "adapter" and situation.rank >= LARGE_RANK:
        found.append(
            f"Rank {situation.rank}: a large adapter costs more memory and time, and overfits a small data set more "
            "easily. 8 to 16 is usual; use more only for many examples."
        )
    if facts and facts.kind == "conversations" and 0 < facts.reasoning_share < FEW_REASON:
        found.append(
            f"{facts.reasoning_share:.0%} of the conversations show reasoning: a reasoning model may unlearn it. The "
            "guides of Qwen and Unsloth mix three parts with reasoning to one without: data.reasoning_share=0.75."
        )
    shape = _shape(situation, model)
    if facts and shape and chosen["weights"] == "random":
        found.append(_compute(situation, facts, shape, method))
    return tuple(found)


def _of_full_training(facts: DataFacts | None) -> Iterator[str]:
    if facts and facts.kind == "conversations" and facts.num_rows < FEW_CONVERSATIONS:
        yield (
            f"{short(facts.num_rows)} conversations: below {short(FEW_CONVERSATIONS)} LoRA is usually about as good as "
            "full fine-tuning and more stable, because full fine-tuning overfits a small data set."
        )
    yield (
        "All weights change, so the model forgets something: mix in general text, and measure forgetting with "
        "`trivium compare RUN --general TEXTS`."
    )


def _of_pretrained(facts: DataFacts, model: str | None) -> Iterator[str]:
    is_chat = is_chat_model(model) if model else None
    if facts.kind == "documents" and facts.num_tokens < FEW_TOKENS:
        yield (
            f"{short(facts.num_tokens)} tokens of plain text: below {short(FEW_TOKENS)} continued pre-training is said "
            "to have little effect, though Gururangan et al. 2020 (arXiv:2004.10964) gain from far less text of the "
            "task itself. For facts alone retrieval is more reliable; measure both."
        )
    if facts.kind == "documents" and model and is_chat:
        base = model.removesuffix("-Instruct") if model.endswith("-Instruct") else f"{model}-Base"
        yield (
            f"{model} was tuned for conversations, and plain text damages that: it may no longer answer or stop. Take "
            f"{base if published_shape(base) else 'a base model'}, or mix conversations in."
        )
    if facts.kind == "conversations" and is_chat is False:
        yield (
            f"{model} is a base model: its embeddings of <|im_start|> and <|im_end|> may be untrained and have to be "
            "trained too. The chat version of the model needs fewer examples."
        )


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
    return text + "."


def checklist(
    situation: Situation, decision: Decision, memory: str | None = None, time: str | None = None
) -> list[ChecklistItem]:
    """The seven points, with `memory` and `time` from a plan where there is one."""
    method = "" if decision.method is None else f" (method: {decision.method})"
    return [
        ChecklistItem("Method", decision.title + method),
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
        return "none yet; conversations as JSON lines with `messages`, or plain text"
    known = "counted" if facts.is_measured else "estimated"
    answers = f", {facts.supervised_share:.0%} of them in answers" if facts.kind == "conversations" else ""
    reasoning = f"; {facts.reasoning_share:.0%} with reasoning" if facts.reasoning_share else ""
    return f"{facts.num_rows:,} {facts.kind}, {short(facts.num_tokens)} tokens ({known}){answers}{reasoning}"


def _shape(situation: Situation, model: str | None) -> QwenShape | None:
    """The shape of the model: of a size to build, as given, or as published."""
    size = parse_count(model)
    if isinstance(size, int):
        return shape_to_build(size)
    return situation.shape or (published_shape(model) if model else None)


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


def _evaluation(situation: Situation, decision: Decision) -> str:
    if decision.method is None:
        return "`trivium eval MODEL --prompts questions.jsonl`: a few dozen questions with answers, before any training"
    forgetting = "`trivium compare RUN --general TEXTS` for forgetting"
    if situation.facts and situation.facts.kind == "documents":
        return f"`trivium eval RUN` for the held-out loss; {forgetting}"
    return f"`trivium eval RUN --prompts questions.jsonl` with questions that are not in the data; {forgetting}"


def _comparison(decision: Decision) -> str:
    if decision.other_method is None:
        return "optional; no other method suits this data, hardware and license as well"
    return (
        f"optional: `trivium train RUN_FILE method={decision.other_method} name=other`, "
        "then `trivium compare RUN runs/other --prompts questions.jsonl`"
    )
