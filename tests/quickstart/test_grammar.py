"""The stories' probabilities are exact: proven by searching derivations, by enumeration and by sampling."""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from trivium.quickstart import grammar
from trivium.quickstart.tales import FACTS, PHRASES, REMEDIES, TRAITS, By, Table

STORIES = [grammar.story(Random(seed)) for seed in range(400)]


def entries(table: Table) -> set[str]:
    return set(table) if isinstance(table, list) else {entry for options in table.options.values() for entry in options}


def test_each_story_has_one_derivation_and_it_costs_what_was_recorded() -> None:
    for told in STORIES:
        assert grammar.derivations(told.text) == [pytest.approx(told.nats, rel=1e-12)]


def test_ambiguous_derivations_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy grammar in which "aa" has two derivations and all five texts can be listed by hand."""
    monkeypatch.setattr(grammar, "PHRASES", {"story": ["{head}{tail}"], "head": ["a", "aa"], "tail": ["a", "", "b"]})
    a, aa = (math.exp(-cost) for cost in grammar._costs(2))
    then_a, then_end, then_b = (math.exp(-cost) for cost in grammar._costs(3))
    expected = {
        "aa": a * then_a + aa * then_end,
        "a": a * then_end,
        "ab": a * then_b,
        "aaa": aa * then_a,
        "aab": aa * then_b,
    }
    assert len(grammar.derivations("aa")) == 2
    assert {text: math.exp(-grammar.score(text)) for text in expected} == pytest.approx(expected)
    assert math.fsum(expected.values()) == pytest.approx(1)


def test_stories_are_as_frequent_as_their_score_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts, tables that depend on facts, slots inside slots: 100,000 toy stories against their probabilities."""
    he = By(("who",), {("ann",): ["she"], ("bob",): ["he"], ("cat",): ["it", "she"]})
    monkeypatch.setattr(grammar, "FACTS", {"who": ["ann", "bob", "cat"], "he": he})
    phrases = {
        "story": ["{Who} {did}.", "So {who} {did}. {He} {did}."],
        "did": ["ran", "hid {how}"],
        "how": ["as {he} does", "well"],
    }
    monkeypatch.setattr(grammar, "PHRASES", phrases)
    rng, num_stories = Random(0), 100_000
    counts = Counter(grammar.story(rng).text for _ in range(num_stories))
    probabilities = {text: math.exp(-grammar.score(text)) for text in counts}
    assert math.fsum(probabilities.values()) == pytest.approx(1)
    for text, count in counts.items():
        expected = probabilities[text] * num_stories
        assert abs(count - expected) < 5 * math.sqrt(expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_score_of_a_damaged_story_is_infinite(seed: int, data: st.DataObject) -> None:
    text = grammar.story(Random(seed)).text
    position = data.draw(st.integers(0, len(text) - 1))
    assert grammar.score(text[:position] + "~" + text[position + 1 :]) == math.inf
    assert grammar.score(text[:position]) == math.inf
    assert grammar.score(text + text[position:]) == math.inf


def test_a_wrong_name_or_remedy_or_moral_later_in_the_story_is_impossible() -> None:
    changed = 0
    for told in STORIES[:60]:
        facts = told.facts
        for fact, others in {
            "hero": entries(FACTS["hero"]),
            "remedy": entries(FACTS["remedy"]),
            "moral": entries(FACTS["moral"]),
        }.items():
            allowed = {"remedy": REMEDIES[facts["problem"]], "moral": TRAITS[facts["trait"]]["morals"]}.get(
                fact, [facts["hero"]]
            )
            other = min(set(others) - set(allowed))
            head, found, tail = told.text.rpartition(facts[fact])
            if found:
                changed += 1
                assert grammar.score(head + other + tail) == math.inf
    assert changed > 150


def test_the_facts_of_a_story_are_consistent_and_in_its_text() -> None:
    names = entries(FACTS["hero"]) | entries(FACTS["pal"])
    for told in STORIES:
        facts = told.facts
        assert facts["remedy"] in REMEDIES[facts["problem"]]
        assert facts["moral"] in TRAITS[facts["trait"]]["morals"]
        for fact in ("hero", "kind", "place", "thing", "problem", "remedy", "moral"):
            assert facts[fact].lower() in told.text.lower()
        assert set(re.findall(r"\b[A-Z][a-z]+\b", told.text)) & names == {facts["hero"], facts["pal"]}


def test_tables_are_complete() -> None:
    """Every slot exists, facts are plain words, no option stands twice in a list, "an" is never needed."""
    for table in (*FACTS.values(), *PHRASES.values()):
        lists = [table] if isinstance(table, list) else list(table.options.values())
        assert all(len(set(options)) == len(options) for options in lists)
    for name, table in PHRASES.items():
        for entry in entries(table):
            slots = re.findall(r"{(\w+)}", entry)
            assert all(slot.lower() in FACTS or slot in PHRASES for slot in slots), name
    assert not any("{" in entry for table in FACTS.values() for entry in entries(table))
    assert set(FACTS) | set(PHRASES) - {"story"} == {
        slot.lower() for table in PHRASES.values() for entry in entries(table) for slot in re.findall(r"{(\w+)}", entry)
    }
    text = " ".join(told.text for told in STORIES)
    assert not re.findall(r"\b[Aa] [aeiou]\w*|\{|\}|  |\.\.| [.,!?]", text)


def test_the_corpus_is_seeded_varied_and_of_the_promised_size(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        grammar.write_corpus(tmp_path / name, num_stories=3000, seed=seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
    texts = [json.loads(line)["text"] for line in first.splitlines()]
    assert len(texts) == len(set(texts)) == 3000
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 60 and max(lengths) <= 170
    assert len({text.split(".")[0] for text in texts}) > 2500
    assert {text.split()[0] for text in texts} == {"Once"}
    ordered = sorted(texts)
    assert not any(later.startswith(earlier) for earlier, later in pairwise(ordered)), "an end must be certain"


def test_the_floor_is_meaningful_per_token() -> None:
    """With a byte-level BPE of 2,000 entries, trained on other stories: neither trivial nor noise."""
    rng = Random(1)
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((grammar.story(rng).text for _ in range(4000)), trainer)
    num_tokens = [len(tokenizer.encode(told.text).ids) + 1 for told in STORIES]
    floor = grammar.floor_nats_per_token((told.text for told in STORIES), num_tokens)
    expected = math.fsum(told.nats for told in STORIES) / (sum(num_tokens) - len(STORIES))
    assert floor == pytest.approx(expected, rel=1e-12)
    assert 0.55 < floor < 0.9
