"""Questions about generated stories, each with one exact answer from the story's facts.

The stories come from a separate random stream, so the model was not trained on them, and each is in only one record.
No question can be answered without its story. Answers start with "It was" because the model knows words with a space
in front; at the start of an answer, a word would be an unknown sequence of tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from trivium.files import atomic_write
from trivium.quickstart.grammar import Story, story
from trivium.quickstart.tales import PHRASES

# The question and answer about each fact, from easy to hard for a small model: a thing directly follows its color, a
# remedy can be anywhere.
QUESTIONS = {
    "thing": ("What was {colour}?", "It was the {thing}."),
    "hero": ("Who was the {kind}?", "It was {hero}."),
    "trait": ("What was the nature of {hero}?", "It was {trait}."),
    "place": ("To what place did {hero} go?", "It was the {place}."),
    "remedy": ("What helped?", "It was {remedy}."),
}
STORIES_TO_CHOOSE_FROM = 4


def facts_of(told: Story) -> dict[str, str]:
    """The facts of a story, and the color of its thing. A color occurs only once, so its question is not ambiguous."""
    before_thing = re.findall(rf"(\w+) {told.facts['thing']}\b", told.text)
    colours = PHRASES["colour"]
    assert isinstance(colours, list)
    (colour,) = [word for word in before_thing if word in colours]
    return {**told.facts, "colour": colour}


def question_rows(seed: int, questions_per_story: int = 1) -> Iterator[dict[str, Any]]:
    """Endless records `{"messages": [user, assistant, ...]}`, deterministic in the seed, without repeated stories.

    Args:
        seed: of a random stream that differs from those of the corpora.
        questions_per_story: the story is in the message of the first question; the other questions follow.

    All kinds of questions are equally frequent. Of a few stories, the one with the rarest answers so far is chosen, so
    that rare words are nearly as frequent as common ones.
    """
    assert 1 <= questions_per_story <= len(QUESTIONS)
    rng = Random(f"questions {seed}")
    asked: Counter[str] = Counter()
    seen: set[str] = set()
    kinds_left: list[str] = []
    while True:
        if len(kinds_left) < questions_per_story:
            kinds_left = rng.sample([*QUESTIONS], len(QUESTIONS))
        kinds, kinds_left = kinds_left[:questions_per_story], kinds_left[questions_per_story:]
        candidates = [told for told in (story(rng) for _ in range(STORIES_TO_CHOOSE_FROM)) if told.text not in seen]
        if not candidates:
            continue
        told = min(candidates, key=lambda one: sum(asked[one.facts[kind]] for kind in kinds))
        seen.add(told.text)
        asked.update(told.facts[kind] for kind in kinds)
        yield {"messages": _turns(told, kinds)}


def _turns(told: Story, kinds: Iterable[str]) -> list[dict[str, str]]:
    """The messages: the story with the first question, its answer, then the other questions and answers."""
    facts = facts_of(told)
    turns = []
    for kind in kinds:
        question, answer = (words.format_map(facts) for words in QUESTIONS[kind])
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns[0]["content"] = f"{told.text}\n\n{turns[0]['content']}"
    return turns


def write_questions(
    training: Path, held_out: Path, num_training: int, num_held_out: int, seed: int, questions_per_story: int
) -> None:
    """Write two JSONL files of records with no stories in common; the held-out ones have one question each.

    The same arguments write the same bytes.
    """
    taught = [*islice(question_rows(seed, questions_per_story), num_training)]
    stories = {_story_of(row) for row in taught}
    unheard = (row for row in question_rows(seed + 1) if _story_of(row) not in stories)
    _write(training, taught)
    _write(held_out, islice(unheard, num_held_out))


def _story_of(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"].split("\n\n")[0]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
