"""Each question has one answer, which stands in its story word for word and cannot be guessed without it."""

import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trivium.data.tokenizer import train_tokenizer
from trivium.quickstart.grammar import derivations, write_corpus
from trivium.quickstart.questions import QUESTIONS, question_rows, write_questions
from trivium.quickstart.quickstart import CORPUS_SEED
from trivium.quickstart.tales import PHRASES, PLACES, REMEDIES, THINGS

COLOURS = "|".join(PHRASES["colour"])
GROUNDS = "|".join(place for places in PLACES.values() for place in places)
OBJECTS = "|".join(thing for things in THINGS.values() for thing in things)
AIDS = {remedy for remedies in REMEDIES.values() for remedy in remedies}
ROWS = [*islice(question_rows(seed=3), 3000)]


def read(told: str) -> dict[str, str]:
    """What a reader learns from the text alone; fails where a question would have two answers."""
    trait, kind, hero = re.search(r"\ba (\w+) (\w+) (?:named|called) (\w+)", told).groups()
    assert len(re.findall(rf"\b{kind} (?:named|called)\b", told)) == 1
    ((colour, thing),) = re.findall(rf"\b({COLOURS}) ({OBJECTS})\b", told)
    (place,) = set(re.findall(rf"\bto (?:the|a) \w+ ({GROUNDS})\b", told))
    (remedy,) = [aid for aid in AIDS if re.search(rf"\b{aid}\b", told)]
    return {
        "trait": trait,
        "kind": kind,
        "hero": hero,
        "colour": colour,
        "thing": thing,
        "place": place,
        "remedy": remedy,
    }


def asked(row: dict) -> tuple[str, list[tuple[str, str, str]]]:
    """The story of a row, and the kind, the question and the answer's own words of each turn."""
    contents = [message["content"] for message in row["messages"]]
    told, contents[0] = contents[0].split("\n\n")
    turns = []
    for question, answer in zip(contents[::2], contents[1::2], strict=True):
        (kind,) = [kind for kind, (words, _) in QUESTIONS.items() if _matches(words, question, r"\w+")]
        turns.append((kind, question, _matches(QUESTIONS[kind][1], answer, ".+")[kind]))
    return told, turns


def _matches(template: str, text: str, slot: str) -> re.Match[str] | None:
    parts = re.split(r"\{(\w+)\}", template)
    words = [re.escape(part) if index % 2 == 0 else f"(?P<{part}>{slot})" for index, part in enumerate(parts)]
    return re.fullmatch("".join(words), text)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), questions_per_story=st.integers(1, len(QUESTIONS)))
def test_a_reader_of_the_story_alone_gives_the_same_answers(seed: int, questions_per_story: int) -> None:
    for row in islice(question_rows(seed, questions_per_story), 5):
        told, turns = asked(row)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * questions_per_story
        assert len({kind for kind, *_ in turns}) == questions_per_story
        assert len(derivations(told)) == 1
        facts = read(told)
        for kind, question, answer in turns:
            assert answer == facts[kind]
            assert re.search(rf"\b{re.escape(answer)}\b", told)
            assert question == QUESTIONS[kind][0].format_map(facts)


def test_kinds_and_answers_are_asked_for_about_equally_often() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in ROWS:
        for kind, _, answer in asked(row)[1]:
            answers[kind][answer] += 1
    assert {kind: count.total() for kind, count in answers.items()} == dict.fromkeys(
        QUESTIONS, len(ROWS) // len(QUESTIONS)
    )
    for kind, count in answers.items():
        assert count.most_common()[0][1] <= (6 if kind == "remedy" else 2) * count.most_common()[-1][1], (kind, count)


def test_no_question_can_be_answered_without_its_story() -> None:
    """The best guess from the words of a question alone, hindsight included, is seldom right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in ROWS:
        _, ((_, question, answer),) = asked(row)
        answers[re.sub(r" [A-Z]\w+\?", "", question)][answer] += 1
    common = [count for count in answers.values() if count.total() >= 30]
    assert len(common) >= 20
    assert max(count.most_common()[0][1] / count.total() for count in common) < 0.35
    assert sum(count.most_common()[0][1] for count in common) < 0.15 * sum(count.total() for count in common)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_corpus(folder / "stories.jsonl", 8000, CORPUS_SEED)
    write_questions(folder / "train.jsonl", folder / "held_out.jsonl", 400, 200, seed=7, questions_per_story=5)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_corpus_training_and_held_out_share_no_story(files: Path) -> None:
    corpus = [row["text"] for row in lines(files / "stories.jsonl")]
    taught = [asked(row)[0] for row in lines(files / "train.jsonl")]
    held_out = [asked(row)[0] for row in lines(files / "held_out.jsonl")]
    assert (len(taught), len(held_out)) == (400, 200)
    assert len({*taught, *held_out}) == 600
    assert not {*corpus} & {*taught, *held_out}
    assert all(len(row["messages"]) == 2 for row in lines(files / "held_out.jsonl"))


def test_a_held_out_story_that_is_in_training_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files drawn from one stream, so that every story of the one would come in the other."""
    rows = [*islice(question_rows(7), 40)]
    monkeypatch.setattr("trivium.quickstart.questions.question_rows", lambda *_: iter(rows))
    write_questions(tmp_path / "train.jsonl", tmp_path / "held_out.jsonl", 25, 15, seed=7, questions_per_story=1)
    assert lines(tmp_path / "train.jsonl") == rows[:25]
    assert lines(tmp_path / "held_out.jsonl") == rows[25:]


def test_write_questions_is_reproducible(files: Path, tmp_path: Path) -> None:
    for seed in (7, 8):
        write_questions(tmp_path / f"{seed}", tmp_path / f"held_out-{seed}", 400, 200, seed, questions_per_story=5)
    assert (tmp_path / "7").read_bytes() == (files / "train.jsonl").read_bytes()
    assert (tmp_path / "held_out-7").read_bytes() == (files / "held_out.jsonl").read_bytes()
    assert (tmp_path / "8").read_bytes() != (tmp_path / "7").read_bytes()


def test_answers_use_tokens_of_the_stories(files: Path, tmp_path: Path) -> None:
    """Each word of an answer is one token, the one that the story has, so that nothing is learned but to find it."""
    texts = [row["text"] for row in lines(files / "stories.jsonl")]
    train_tokenizer(texts, "bpe", 2048, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for row in lines(files / "train.jsonl"):
        told = {*tokenizer.encode(row["messages"][0]["content"]).tokens}
        for message in row["messages"][1::2]:
            lead, *words, stop = tokenizer.encode(message["content"]).tokens
            assert len(words) == len(message["content"].split()) - 1
            assert (lead, words[0], stop) == ("It", "\u0120was", ".")
            assert {*words[-1:]} <= told
