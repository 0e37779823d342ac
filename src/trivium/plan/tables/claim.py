"""A figure that a guide gives, the same figure computed, and what comes of comparing the two.

Knows no guide's contents: `sizes.py`, `needs.py` and `times.py` do. Imported inside `plan.tables`; never imports torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trivium.plan.write import hours

GUIDES = {
    "A": "Three ways to train Qwen: LoRA, full fine-tuning, and from scratch",
    "B": "From Scratch vs Fine-tuning",
}
"""The two guides whose tables are computed again, by the letter that stands for each."""
RIGHT_WITHIN, ROUGH_WITHIN = 0.05, 0.25
"""A figure that is rounded, or given with a ~, may be off by so much; up to the second it is still of use."""

Guide = Literal["A", "B"]
Unit = Literal["bytes", "parameters", "share", "times", "bytes a parameter", "hours", "dollars"]
Verdict = Literal["right", "rough", "wrong"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """One figure, from and to, or whether something fits.

    Attributes:
        guide: which of the two says it.
        place: under which heading or in which table.
        what: what is counted, in a few words.
        unit: of both figures; None where the question is whether it fits.
        said: the guide's figure; with an open end where it says "or more".
        found: ours.
        arithmetic: how ours comes about, in one line.
    """

    guide: Guide
    place: str
    what: str
    unit: Unit | None
    said: Range | bool
    found: Range | bool
    arithmetic: str

    @property
    def gap(self) -> float:
        """How far apart the two ranges are, as a share: 0 where they overlap, 1 where one is twice the other."""
        if isinstance(self.said, bool) or isinstance(self.found, bool):
            return 0.0 if self.said == self.found else math.inf
        return max(self.found[0] / self.said[1], self.said[0] / self.found[1], 1.0) - 1.0

    @property
    def verdict(self) -> Verdict:
        """What to think of the guide's figure."""
        if self.gap <= RIGHT_WITHIN:
            return "right"
        return "rough" if self.gap <= ROUGH_WITHIN else "wrong"

    @property
    def distance(self) -> str:
        """The verdict, and how far off the figure is where it is not right."""
        if self.verdict == "right" or math.isinf(self.gap):
            return self.verdict
        return f"{self.verdict}: {f'{self.gap:.0%} off' if self.gap < 1 else f'{self.gap + 1:.2g} times'}"


def point(value: float) -> Range:
    """A single figure as a range."""
    return value, value


def shown(figure: Range | bool, unit: Unit | None) -> str:
    """A figure as people write it."""
    if isinstance(figure, bool):
        return "fits" if figure else "does not fit"
    low, high = (_shown(value, unit) for value in figure)
    if math.isinf(figure[1]):
        return f"{low} or more"
    if not figure[0]:
        return f"under {high}"
    return low if low == high else f"{low} to {high}"


def _shown(value: float, unit: Unit | None) -> str:
    if unit == "bytes":
        return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e9:.2f} GB"
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "hours":
        return hours(value)
    if unit == "dollars":
        return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"
    if unit == "parameters":
        return short_count(value)
    return f"{value:.3g} {unit}"


def short_count(count: float) -> str:
    """Parameters as people write them: 6.9K, 161.5M, 7.616B."""
    if math.isinf(count):
        return ""
    size, suffix = next(((size, suffix) for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= size))
    return f"{count / size:.4g}{suffix}"
