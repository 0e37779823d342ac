"""The tables of the grammar: the words of `tales.yaml`, and the facts that each table depends on.

`{slot}` in a phrase refers to another table. A fact (`{hero}`, `{thing}`) is chosen once a story, a phrase every time.
`By` makes a table depend on earlier facts: the problem fits the thing and the place, the remedy fits the problem.
"""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class By:
    """A table that depends on facts: `options` maps their values to the list to choose from."""

    facts: tuple[str, ...]
    options: dict[tuple[str, ...], list[str]]


Table = list[str] | By
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tales.yaml").read_text(encoding="utf-8"))


def mixed(*lists: list[str]) -> list[str]:
    """The entries of the lists in turn, so that frequent and rare entries of each are mixed."""
    return [entry for group in zip_longest(*lists) for entry in group if entry is not None]


def by_one(fact: str, options: dict[str, list[str]]) -> By:
    """A table that depends on a single fact."""
    return By((fact,), {(value,): entries for value, entries in options.items()})


# Hero and friend have different names and kinds, so that a text has few derivations.
GIRLS, BOYS, KINDS = WORDS["girls"], WORDS["boys"], WORDS["kinds"]
FRIENDLY_GIRLS, FRIENDLY_BOYS = WORDS["friendly_girls"], WORDS["friendly_boys"]
THINGS: dict[str, list[str]] = WORDS["things"]
PLACES: dict[str, list[str]] = WORDS["places"]
REMEDIES = {problem: remedies for repair in WORDS["repairs"] for problem, remedies in repair["remedies"].items()}
CARELESS, SELFISH, KIND = WORDS["careless"], WORDS["selfish"], WORDS["kind"]
TRAITS = CARELESS | SELFISH | KIND


def by_name(fact: str, she: str, he: str) -> By:
    """The pronoun of a name, which adds no entropy."""
    girls, boys = GIRLS + FRIENDLY_GIRLS, BOYS + FRIENDLY_BOYS
    return by_one(fact, {name: [she] for name in girls} | {name: [he] for name in boys})


def problem_of(trait: str, made: str, ground: str) -> list[str]:
    """What can happen to a thing, by its material and the place; a selfish hero breaks it at any place."""
    return [WORDS["damage"][made]] if trait in SELFISH else WORDS["problems"][made][ground]


FACTS: dict[str, Table] = {
    "trait": mixed([*CARELESS], [*KIND], [*SELFISH]),
    "kind": KINDS,
    "hero": by_one("kind", {kind: mixed(GIRLS, BOYS) for kind in KINDS} | {"girl": GIRLS, "boy": BOYS}),
    "he": by_name("hero", "she", "he"),
    "his": by_name("hero", "her", "his"),
    "him": by_name("hero", "her", "him"),
    "pal": mixed(FRIENDLY_GIRLS, FRIENDLY_BOYS),
    "pal_kind": WORDS["friendly_kinds"],
    "pal_he": by_name("pal", "she", "he"),
    "pal_his": by_name("pal", "her", "his"),
    "thing": mixed(*THINGS.values()),
    "place": mixed(*PLACES.values()),
    "problem": By(
        ("trait", "thing", "place"),
        {
            (trait, thing, place): problem_of(trait, made, ground)
            for trait in TRAITS
            for made, things in THINGS.items()
            for ground, places in PLACES.items()
            for thing in things
            for place in places
        },
    ),
    "remedy": by_one("problem", REMEDIES),
    "moral": by_one("trait", {trait: words["morals"] for trait, words in TRAITS.items()}),
}

PHRASES: dict[str, Table] = WORDS["phrases"] | {
    "plot": by_one("trait", {trait: WORDS["plots"][name] for name in WORDS["plots"] for trait in WORDS[name]}),
    "fault": by_one("trait", {trait: words["ways"] for trait, words in (CARELESS | SELFISH).items()}),
    "rescue": by_one("problem", {problem: one["done"] for one in WORDS["repairs"] for problem in one["remedies"]}),
    "virtue": by_one("trait", {trait: words["ways"] for trait, words in KIND.items()}),
}
