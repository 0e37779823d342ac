"""A seeded grammar that generates short stories, and computes the exact probability of a story.

The entropy of the grammar is the lowest possible loss of a language model trained on the stories. Generating and
scoring use the same tables (`tales.py`): the writer draws each choice at random, the reader follows the text.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

from trivium.files import atomic_write
from trivium.quickstart.tales import FACTS, PHRASES, By, Table

ZIPF_SHIFT = 8


@dataclass(frozen=True)
class Story:
    """A story, its cost -ln p in nats, and its facts (hero, thing, problem, ...)."""

    text: str
    nats: float
    facts: dict[str, str]


class _Teller:
    """What writer and reader share: walking through the tables."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.facts: dict[str, str] = {}

    def pick(self, options: Sequence[str]) -> int:
        """Choose one of the options."""
        raise NotImplementedError

    def emit(self, words: str) -> None:
        """Write, or check, the next words of the text."""
        raise NotImplementedError

    def choose(self, table: Table) -> str:
        """Choose from a table. All choices are made here, so that their costs add up to -ln p."""
        options = table.options[tuple(self.facts[fact] for fact in table.facts)] if isinstance(table, By) else table
        index = self.pick(options)
        self.nats += _costs(len(options))[index]
        return options[index]

    def tell(self, template: str) -> None:
        """Emit a template from left to right; a fact is chosen when it is first needed."""
        for words, slot in _pieces(template):
            self.emit(words)
            name = slot.lower()
            if name in FACTS:
                if name not in self.facts:
                    self.facts[name] = self.choose(FACTS[name])
                self.emit(_like(slot, self.facts[name]))
            elif name:
                self.tell(self.choose(PHRASES[name]))


class _Writer(_Teller):
    """Draws each choice from a random generator and collects the words."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self.rng = rng
        self.words: list[str] = []

    def pick(self, options: Sequence[str]) -> int:
        return bisect_right(_cumulative(len(options)), self.rng.random()) if len(options) > 1 else 0

    def emit(self, words: str) -> None:
        self.words.append(words)


class _Mismatch(Exception):
    """The text does not match this derivation."""


class _Reader(_Teller):
    """Follows a text. If several options match the next words, it takes one and records the others.

    `script` holds the earlier choices among several matches; `branches` holds the scripts that are left to try.
    """

    def __init__(self, text: str, script: list[int]) -> None:
        super().__init__()
        self.text, self.lowered, self.position = text, text.lower(), 0
        self.script, self.taken = script, 0
        self.branches: list[list[int]] = []

    def pick(self, options: Sequence[str]) -> int:
        possible = [index for index, option in enumerate(options) if self._could_begin(option)]
        if not possible:
            raise _Mismatch
        if len(possible) == 1:
            return possible[0]
        if self.taken == len(self.script):
            self.branches += [[*self.script, other] for other in possible[1:]]
            self.script = [*self.script, possible[0]]
        self.taken += 1
        return self.script[self.taken - 1]

    def emit(self, words: str) -> None:
        if not self.text.startswith(words, self.position):
            raise _Mismatch
        self.position += len(words)

    def _could_begin(self, option: str) -> bool:
        """Whether the text may continue with this option, judging by the words known so far; never wrongly False."""
        position = self.position
        for words, slot in _pieces(option):
            for known in (words, self.facts.get(slot.lower(), "")):
                if not self.lowered.startswith(known.lower(), position):
                    return False
                position += len(known)
            if slot.lower() not in self.facts:
                break
        return True


@cache
def _pieces(template: str) -> list[tuple[str, str]]:
    """`"the {colour} kite"` -> `[("the ", "colour"), (" kite", "")]`."""
    parts = [*re.split(r"\{(\w+)\}", template), ""]
    return list(zip(parts[::2], parts[1::2], strict=True))


@cache
def _like(slot: str, words: str) -> str:
    """The words, capitalized if the slot is."""
    return words[0].upper() + words[1:] if slot[0].isupper() else words


@cache
def _probabilities(num_options: int) -> list[float]:
    """Zipf's law, as in natural language: p is proportional to 1 / (rank + 8)."""
    weights = [1 / (rank + ZIPF_SHIFT) for rank in range(1, num_options + 1)]
    return [weight / math.fsum(weights) for weight in weights]


@cache
def _costs(num_options: int) -> list[float]:
    """-ln p of each option."""
    return [-math.log(probability) for probability in _probabilities(num_options)]


@cache
def _cumulative(num_options: int) -> list[float]:
    """Cumulative probabilities of the options; the last one is exactly 1."""
    return [*accumulate(_probabilities(num_options)[:-1]), 1.0]


def story(rng: Random) -> Story:
    """Generate one story; the same generator state gives the same story on every machine."""
    writer = _Writer(rng)
    writer.tell("{story}")
    return Story("".join(writer.words), writer.nats, writer.facts)


def derivations(text: str) -> list[float]:
    """The cost in nats of every derivation of this text; empty if the grammar cannot generate it.

    Depth-first search by replay. Only derivations that contradict the text are dropped, so none is missed.
    """
    costs: list[float] = []
    scripts: list[list[int]] = [[]]
    while scripts:
        reader = _Reader(text, scripts.pop())
        try:
            reader.tell("{story}")
            if reader.position == len(text):
                costs.append(reader.nats)
        except _Mismatch:
            pass
        scripts += reader.branches
    return costs


def score(text: str) -> float:
    """-ln p(text) in nats, with p summed over all derivations; infinite if the grammar cannot generate the text."""
    costs = derivations(text)
    if not costs:
        return math.inf
    least = min(costs)
    return least - math.log(math.fsum(math.exp(least - cost) for cost in costs))


def floor_nats_per_token(texts: Iterable[str], tokens_per_text: Iterable[int]) -> float:
    """The loss of the best possible model on these stories, in nats per predicted token.

    `tokens_per_text` counts each story's tokens, including its end-of-document token; the first token of a document is
    not predicted, so n tokens are n - 1 predictions.

    A tokenizer maps each text to one sequence of tokens, so a model's loss summed over a story is
    -ln q(tokens after the first | the first). Every story starts with the same token ("Once"), and the text determines
    where a story ends, so for the grammar itself this sum is -ln p(text). By Gibbs' inequality, no q has a smaller
    expected -ln q over stories drawn from p than q = p. Stories are drawn independently, so the training stories tell
    nothing about the held-out ones, and a model can only be below this loss by chance.

    Source: Cover and Thomas, Elements of Information Theory, theorem 2.6.3.
    """
    costs = [score(text) for text in texts]
    return math.fsum(costs) / sum(num_tokens - 1 for num_tokens in tokens_per_text)


def write_corpus(path: Path, num_stories: int, seed: int | str) -> None:
    """Write stories as JSON lines `{"text": ...}`; the same seed writes the same bytes."""
    rng = Random(seed)
    lines = [json.dumps({"text": story(rng).text}) + "\n" for _ in range(num_stories)]
    atomic_write(path, "".join(lines))
