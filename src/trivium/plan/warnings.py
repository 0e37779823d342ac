"""Warnings about common pitfalls of a training method. Never imports torch."""

from trivium.config.inputs import TrainTokenizer, parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.resolve import published_shape
from trivium.model.shape import QwenShape
from trivium.plan.cost import hours
from trivium.plan.decide import TOKENS_PER_PARAM, short
from trivium.plan.fit import is_base
from trivium.plan.situation import Situation
from trivium.plan.workload import DataFacts

FEW_CONVERSATIONS, FEW_TOKENS, LARGE_RANK, LOW_REASONING_SHARE = 10_000, 10**9, 64, 0.5


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
            f"Rank {situation.rank}: a large adapter costs memory and time and overfits small datasets more easily. "
            "A rank of 8 to 16 is usual; go higher only with many examples."
        )
    if facts and facts.kind == "conversations" and 0 < facts.reasoning_share < LOW_REASONING_SHARE:
        found.append(
            f"{facts.reasoning_share:.0%} of the conversations have reasoning: a reasoning model may forget how to "
            "reason. The guides of Qwen and Unsloth mix three parts with reasoning and one part without: "
            "data.reasoning_share=0.75."
        )
    return tuple(found)


def _forgetting(facts: DataFacts | None) -> list[str]:
    found = []
    if facts and facts.kind == "conversations" and facts.num_rows < FEW_CONVERSATIONS:
        found.append(
            f"{short(facts.num_rows)} conversations: below {short(FEW_CONVERSATIONS)} LoRA is usually about as good as "
            "full fine-tuning and more stable, because full fine-tuning overfits a small dataset."
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
            f"{model} is a base model: its embeddings of <|im_start|> and <|im_end|> may be untrained, so they have to "
            "be trained too. The chat version of the model needs fewer examples."
        ]
    found = []
    if facts.num_tokens < FEW_TOKENS:
        found.append(
            f"{short(facts.num_tokens)} tokens of plain text: below {short(FEW_TOKENS)}, continued pre-training is "
            "said to have little effect, though Gururangan et al. 2020 (arXiv:2004.10964) gained from far less text "
            "from the task itself. For facts alone, retrieval is more reliable; measure both."
        )
    if model and is_chat:
        base = model.removesuffix("-Instruct") if model.endswith("-Instruct") else f"{model}-Base"
        found.append(
            f"{model} was tuned for conversations, and training on plain text damages that: it may no longer answer or "
            f"stop. Use {base if published_shape(base) else 'a base model'}, or mix in conversations."
        )
    return found


def _compute(situation: Situation, facts: DataFacts, shape: QwenShape, method: str) -> str:
    """The compute of training from scratch, and whether the data is enough."""
    size = shape.num_params
    flops = 6.0 * size * facts.num_tokens
    text = f"6 x {short(size)} parameters x {short(facts.num_tokens)} tokens = {flops:.2g} FLOP"
    cost = situation.cost(shape, method, facts.num_tokens)
    if cost is not None and situation.device is not None:
        text += f", {hours(cost.hours)} on {situation.devices} x {situation.device.title}"
    if facts.num_tokens < TOKENS_PER_PARAM * size:
        text += (
            f". That is {facts.num_tokens / size:.2g} tokens per parameter; about {TOKENS_PER_PARAM} are recommended "
            f"({short(TOKENS_PER_PARAM * size)}): use a smaller model or more text"
        )
    return f"{text}."


def _shape(situation: Situation, model: str | None) -> QwenShape | None:
    """The shape of a published model, or of a new model of about the given size; None if unknown."""
    size = parse_count(model)
    if not isinstance(size, int):
        return situation.shape or (published_shape(model) if model else None)
    try:
        return catalog.size_for_budget(size, TrainTokenizer.model_fields["vocab_size"].default)
    except ConfigError:
        return None
