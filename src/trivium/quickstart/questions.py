"""Questions about the quickstart's stories, each with one exact answer taken from the facts the story was told from.

The stories come from a stream of their own, so the model that was trained on the corpus has not read them, and every
story stands in one row only. Nothing can be answered without the story. An answer begins with "It was", because a word
is known to the model with the blank before it: at the very start of an answer it would be an unknown heap of letters.
Knows nothing of chat templates, tokens or models. Only `quickstart` may import this file.
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

# For each kind of question what is asked, what is answered, and which fact the answer is. The order is that in which a
# small model learns them: a thing stands right behind the colour that is asked for, a remedy stands anywhere.
QUESTIONS = {
    "thing": ("What was {colour}?", "It was the {thing}."),
    "hero": ("Who was the {kind}?", "It was {hero}."),
    "trait": ("What was the nature of {hero}?", "It was {trait}."),
    "place": ("To what place did {hero} go?", "It was the {place}."),
    "remedy": ("What helped?", "It was {remedy}."),
}
STORIES_TO_CHOOSE_FROM = 4


def facts_of(told: Story) -> dict[str, str]:
    """The facts of a story, and the colour of its thing, which is a choice that the grammar does not name.

    Colours stand nowhere but before the thing, and there once, so that asking for a colour is never ambiguous.
    """
    before_thing = re.findall(rf"(\w+) {told.facts['thing']}\b", told.text)
    colours = PHRASES["colour"]
    assert isinstance(colours, list)
    (colour,) = [word for word in before_thing if word in colours]
    return {**told.facts, "colour": colour}


def question_rows(seed: int, questions_per_story: int = 1) -> Iterator[dict[str, Any]]:
    """Rows `{"messages": [user, assistant, ...]}` without end, the same for the same seed; no story comes twice.

    Args:
        seed: of a stream that no corpus shares, whatever its seed.
        questions_per_story: the story stands before the first question, further ones are turns of their own.

    All kinds are asked equally often, and of a few stories the one with the answers least heard so far is taken, so
    that rare words are asked for nearly as often as common ones.
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
    """The story with the first question, its answer, then the other questions and answers."""
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
    """Write two JSONL files of rows that share no story; the held-out ones ask one question each.

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
