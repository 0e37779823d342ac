"""The ladder of ways to train, each with the amount of data that pays for it: a table, and where its figures are from.

The higher, the more data, time and money, and the deeper the change. Decides nothing. Imported inside `plan`.
"""

from dataclasses import dataclass
from typing import Literal

from trivium.plan.facts import DataFacts

RungName = Literal["none", "adapter", "full", "continue", "scratch"]


@dataclass(frozen=True)
class Rung:
    """One way, and the data that pays for it: rows of conversations, tokens of documents.

    Attributes:
        name: what programs call it.
        title: what people call it.
        methods: the methods of a run file that go this way, best first.
        start: the least data for which it is worth the effort.
        stop: where the table's range ends, None where it is open; from there to the next rung no table says anything.
        basis: where the figures come from, and what speaks against them.
        other: the method that is nearly as sound for the same data.
    """

    name: RungName
    title: str
    methods: tuple[str, ...]
    start: int
    stop: int | None
    basis: str
    other: str | None = None


TABLE = "the table of four paths that courses teach, a rule of thumb"
CONTEXT = "what Qwen reads at once, 32,768 tokens; what fits into the prompt needs no training"
LADDER: dict[str, tuple[Rung, ...]] = {
    "conversations": (
        Rung("none", "no training (prompt or retrieve)", (), 0, 100, TABLE),
        Rung("adapter", "LoRA", ("lora", "qlora"), 100, 10_000, TABLE, other="full"),
        Rung("full", "full fine-tuning", ("full",), 10_000, 1_000_000, f"{TABLE} that gives LoRA here, too", "lora"),
    ),
    "documents": (
        Rung("none", "no training (prompt or retrieve)", (), 0, 32_768, CONTEXT),
        Rung("adapter", "LoRA on the text", ("lora", "qlora"), 32_768, 32_768, CONTEXT),
        Rung(
            "continue",
            "continued pre-training",
            ("continue",),
            10**9,
            10**10,
            f"{TABLE}; Gururangan et al. 2020, arXiv:2004.10964, gain from much less text of the task itself",
        ),
        Rung("scratch", "from scratch", ("scratch",), 10**11, None, TABLE),
    ),
}
UNITS = {"conversations": "conversations", "documents": "tokens"}
TOKENS_PER_PARAM = 20
"""Of a model from nothing, for the least arithmetic. Source: Hoffmann et al. 2022, arXiv:2203.15556 (Chinchilla)."""


def amount(facts: DataFacts) -> int:
    """What the ladder counts: conversations by the row, documents by the token."""
    return facts.num_rows if facts.kind == "conversations" else facts.num_tokens


def short(count: float) -> str:
    """A count as people write it: 5K, 1.5B; 32,768 stays as it is."""
    if count < 1e5 and count % 100:
        return f"{count:,.0f}"
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= unit:
            return f"{count / unit:.4g}{suffix}"
    return f"{count:.4g}"
