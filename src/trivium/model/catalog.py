"""Model shapes: the published Qwen and SmolLM2 sizes, a ladder of small ones, and a search for any parameter budget.

Never imports torch.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import replace

from trivium.errors import ConfigError
from trivium.model.shape import FAMILIES, Family, QwenShape

BUDGET_TOLERANCE = 0.05
LEAST_ASPECT = 3  # hidden size per layer; narrower and deeper models hardly train
# Widths of the search: from, up to, step, head size, step of the feed-forward size. From 2048 on the number of heads is
# a multiple of four for grouped-query attention.
WIDTHS = ((16, 256, 16, 32, 32), (256, 1024, 64, 64, 64), (1024, 2048, 256, 128, 128), (2048, 16385, 512, 128, 128))

# Published sizes. Columns after the name: layers, hidden, attention heads, key-value heads, head size, intermediate,
# vocabulary, tied. Source: the config.json of each model on huggingface.co/Qwen.
QWEN25 = {
    "Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151936, True),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "Qwen2.5-3B": (36, 2048, 16, 2, 128, 11008, 151936, True),
    "Qwen2.5-7B": (28, 3584, 28, 4, 128, 18944, 152064, False),
    "Qwen2.5-14B": (48, 5120, 40, 8, 128, 13824, 152064, False),
    "Qwen2.5-32B": (64, 5120, 40, 8, 128, 27648, 152064, False),
    "Qwen2.5-72B": (80, 8192, 64, 8, 128, 29568, 152064, False),
}
QWEN3 = {
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936, True),
    "Qwen3-1.7B": (28, 2048, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": (36, 2560, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, False),
    "Qwen3-14B": (40, 5120, 40, 8, 128, 17408, 151936, False),
    "Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936, False),
}
# SmolLM2, with the base of the rotary positions. Source: the config.json of each model on huggingface.co/HuggingFaceTB.
SMOLLM2 = {
    "SmolLM2-135M": ((30, 576, 9, 3, 64, 1536, 49152, True), 100_000.0),
    "SmolLM2-360M": ((32, 960, 15, 5, 64, 2560, 49152, True), 100_000.0),
    "SmolLM2-1.7B": ((24, 2048, 32, 32, 64, 8192, 49152, True), 130_000.0),
}
OWNERS = {"Qwen": "Qwen", "SmolLM2": "HuggingFaceTB"}  # on the Hub, by the beginning of a model's name
# Small shapes, named by parameter count, for tests and laptops. 19 of the 21 million parameters are Qwen's embeddings.
LADDER: dict[str, tuple[Family, tuple[int, int, int, int, int, int, int, bool]]] = {
    "ladder-7k": ("qwen2", (2, 16, 2, 2, 8, 42, 64, True)),
    "ladder-0.5m": ("qwen2", (4, 64, 2, 2, 32, 170, 4096, True)),
    "ladder-1m": ("qwen3", (4, 128, 4, 4, 32, 320, 2048, True)),
    "ladder-21m": ("qwen2", (6, 128, 4, 4, 32, 341, 151936, True)),
    "ladder-116m": ("qwen2", (12, 512, 8, 8, 64, 1365, 151936, True)),
    "ladder-582m": ("qwen2", (24, 1024, 16, 4, 64, 2816, 151936, False)),
}
# Qwen2.5 base models with a longer context; the larger three also have a larger norm epsilon than their chat models.
LONG_BASE = ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B", "Qwen2.5-72B")
COARSE_BASE = ("Qwen2.5-14B", "Qwen2.5-32B", "Qwen2.5-72B")


def _shape(
    family: Family, row: tuple[int, int, int, int, int, int, int, bool], positions: int, eps: float
) -> QwenShape:
    layers, hidden, heads, key_value_heads, head_dim, intermediate, vocab, tied = row
    return QwenShape(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        rms_norm_eps=eps,
        max_position_embeddings=positions,
    )


def _all_shapes() -> Iterator[tuple[str, QwenShape]]:
    """Names and shapes, smallest of each family first. Base and chat models differ in positions and epsilon only."""
    for name, (family, row) in LADDER.items():
        yield name, _shape(family, row, positions=4096, eps=1e-6)
    for name, row in QWEN25.items():
        positions = 131072 if name in LONG_BASE else 32768
        yield name, _shape("qwen2", row, positions, eps=1e-5 if name in COARSE_BASE else 1e-6)
        yield f"{name}-Instruct", _shape("qwen2", row, positions=32768, eps=1e-6)
    for name, row in QWEN3.items():
        if name != "Qwen3-32B":  # published as a chat model only
            yield f"{name}-Base", _shape("qwen3", row, positions=32768, eps=1e-6)
        yield name, _shape("qwen3", row, positions=40960, eps=1e-6)
    for name, (row, rope_theta) in SMOLLM2.items():
        shape = replace(_shape("llama", row, positions=8192, eps=1e-5), rope_theta=rope_theta)
        yield name, shape
        yield f"{name}-Instruct", shape


CATALOG = dict(_all_shapes())


def names() -> list[str]:
    """All names, smallest first within the ladder, Qwen2.5, Qwen3 and SmolLM2."""
    return list(CATALOG)


def hub_ids() -> dict[str, str]:
    """The Hub ids of the published models by their names in the catalog, in the order of `names`."""
    owners = ((name, owner) for name in CATALOG for start, owner in OWNERS.items() if name.startswith(start))
    return {name: f"{owner}/{name}" for name, owner in owners}


def is_listed(name: str) -> bool:
    """Whether `get` finds `name`."""
    return name.lower() in {known.lower() for known in CATALOG}


def get(name: str) -> QwenShape:
    """The shape named `name`; case does not matter.

    Raises: ConfigError with the nearest known name.
    """
    by_lower = {known.lower(): known for known in CATALOG}
    found = by_lower.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0)[0]
        raise ConfigError(
            f"There is no model size named {name!r}; the nearest is {by_lower[near]!r}. "
            "`trivium model list` shows them all."
        )
    return CATALOG[found]


def size_for_budget(num_params: int, vocab_size: int, family: Family = "qwen3") -> QwenShape:
    """The best-shaped model within 5% of `num_params`, including embeddings.

    Raises: ConfigError with the numbers when the vocabulary leaves too little for the layers.
    """
    if num_params <= 0 or vocab_size <= 0:
        raise ConfigError(
            f"The parameter budget is {num_params:,} and the vocabulary {vocab_size:,}. Expected both above zero."
        )
    candidates = list(_candidates(num_params, vocab_size, family))
    fitting = [shape for shape in candidates if abs(shape.num_params / num_params - 1) <= BUDGET_TOLERANCE]
    if not fitting:
        raise ConfigError(_why_nothing_fits(num_params, vocab_size, candidates))
    return min(fitting, key=lambda shape: _distance_from_usual(shape, num_params))


def _candidates(num_params: int, vocab_size: int, family: Family) -> Iterator[QwenShape]:
    """Shapes near the budget: all widths that the vocabulary allows, with the depth that the budget allows."""
    widths = ((hidden, *steps) for start, stop, by, *steps in WIDTHS for hidden in range(start, stop, by))
    for hidden, head_dim, step in widths:
        if vocab_size * hidden > num_params * (1 + BUDGET_TOLERANCE):
            return
        heads = math.ceil(hidden / head_dim)
        if hidden % heads and FAMILIES[family].even_heads:
            continue
        tied = 2 * vocab_size * hidden > num_params / 4
        middle = round(hidden * 8 / 3 / step)
        for intermediate in range(max(1, middle - 2) * step, (middle + 3) * step, step):
            row = (1, hidden, heads, _key_value_heads(heads), head_dim, intermediate, vocab_size, tied)
            one_layer = _shape(family, row, positions=4096, eps=1e-6)
            without_layers = one_layer.num_embedding_params + hidden
            layers = (num_params - without_layers) / (one_layer.num_params - without_layers)
            for depth in {math.floor(layers), math.ceil(layers)}:
                yield replace(one_layer, num_hidden_layers=min(max(1, depth), hidden // LEAST_ASPECT))


def _key_value_heads(heads: int) -> int:
    """Grouped-query attention: groups of four heads from 16 heads on, of two from 8, if they divide evenly."""
    if heads >= 16 and heads % 4 == 0:
        return heads // 4
    return heads // 2 if heads >= 8 and heads % 2 == 0 else heads


def _distance_from_usual(shape: QwenShape, num_params: int) -> float:
    """Distance from common proportions: 0 is ideal, 1 is a factor of two in width over depth or the budget tolerance.

    The ideal ratio of width to depth is 24 in small models and hidden / 32 from 768 channels on, up to 128, like the
    published Qwen sizes.
    """
    ideal_aspect = min(max(24, shape.hidden_size / 32), 128)
    aspect = abs(math.log2(shape.hidden_size / shape.num_hidden_layers / ideal_aspect))
    feed_forward = abs(math.log2(shape.intermediate_size / shape.hidden_size * 3 / 8))
    return aspect + 2 * feed_forward + abs(shape.num_params / num_params - 1) / BUDGET_TOLERANCE


def _why_nothing_fits(num_params: int, vocab_size: int, candidates: list[QwenShape]) -> str:
    """The message with the cost of the vocabulary and the nearest budget or vocabulary that works."""
    if not candidates:
        affordable = max(1, num_params // (2 * 16))
        return (
            f"A vocabulary of {vocab_size:,} tokens costs {vocab_size:,} x 16 = {vocab_size * 16:,} parameters at the "
            f"smallest width of 16 channels, but the budget is {num_params:,}. Give the model more parameters, or "
            f"train a tokenizer of at most about {affordable:,} tokens, which leaves half of the budget for the layers."
        )
    nearest = min(candidates, key=lambda shape: abs(shape.num_params - num_params))
    return (
        f"No well-shaped model with {vocab_size:,} tokens comes within {BUDGET_TOLERANCE:.0%} of {num_params:,} "
        f"parameters: the nearest has {nearest.num_params:,}, of which {vocab_size:,} x {nearest.hidden_size} = "
        f"{vocab_size * nearest.hidden_size:,} are embeddings. Use that as the budget, or a smaller vocabulary."
    )
