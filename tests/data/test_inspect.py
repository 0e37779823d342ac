"""Inspect: same counts as a build, and proofs equal to those computed with transformers alone."""

import itertools
import json

import numpy as np
import pytest

from tests.support.qwen_tokenizers import REAL, needs_real
from trivium.config.inputs import Source
from trivium.data.chat.samples import ConversationSettings
from trivium.data.look.inspect import Look, inspect_all
from trivium.data.store.build import BuildSettings, build_sources
from trivium.data.store.tally import COUNTS
from trivium.data.tokenizer import load_tokenizer, train_tokenizer

END = "<|im_end|>"
REASONED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6", "weight": 0.5},
]
ROWS = [
    REASONED,
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    [{"role": "user", "content": "One"}, {"role": "assistant", "content": "1", "train": False}],
    [{"role": "user", "content": "Long " * 200}, {"role": "assistant", "content": "?"}],
    [{"role": "user", "content": "Nobody answers"}],
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in ROWS] + ["{cut off"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["abc"]), "byte", 259, folder)
    return load_tokenizer(folder)


def look(tokenizer, num_shown: int = 9, **settings) -> Look:
    return Look(tokenizer, ConversationSettings(**{"seq_len": 128, **settings}), num_shown)


@needs_real
def test_inspect_proofs_equal_transformers(chats):
    tokenizer = load_tokenizer(REAL / "qwen3")
    (found,) = inspect_all([Source(path=str(chats))], look(tokenizer))
    first, second, plain = found.documents
    assert [shown.name for shown in found.documents] == [
        "chats.jsonl:1, sample 1 of 2",
        "chats.jsonl:1, sample 2 of 2",
        "chats.jsonl:2",
    ]
    assert (
        first.notes == ["2 samples, since the template renders earlier messages differently in later prompts"]
        and not second.notes
    )
    for shown, messages in ((first, REASONED[:2]), (second, REASONED[:4]), (plain, ROWS[1][:1])):
        (proof,) = shown.proofs
        arguments = {"add_generation_prompt": True, "enable_thinking": proof.thinking}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        assert proof.turn == len(messages) + 1 and shown.spans[0].text == prompt
        assert proof.prompt_tokens == len(tokenizer.apply_chat_template(messages, return_dict=False, **arguments))
        assert proof.prompt_tokens + proof.answer_tokens == shown.num_tokens
    assert [(span.text, span.weight) for span in second.spans[1:]] == [(f"6{END}", 50)]
    assert first.spans[1].text.endswith(f"Two and two.\n</think>\n\n4{END}") and first.spans[1].weight == 100


@pytest.mark.parametrize("overlong", ["drop", "split", "truncate"])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_inspect_finds_the_same_as_a_build(chats, small, tmp_path, overlong, all_tokens):
    settings = ConversationSettings(seq_len=256, overlong=overlong, all_tokens=all_tokens)
    source = Source(path=str(chats))
    options = {"held_out": 0.0, "max_reject_share": 1.0, "max_document_mib": 16.0, "workers": 1}
    build_settings = BuildSettings(cache_dir=tmp_path / "cache", conversations=settings, **options)
    (built,) = build_sources([source], small, build_settings)
    found, store = inspect_all([source, Source(path=str(built.path))], Look(small, settings, 9))
    assert found.counts == store.counts == {name: built.report[name] for name in COUNTS}
    assert found.counts["records"] == len(ROWS) + 1 == sum(found.counts[name] for name in ("kept", "split", "rejected"))
    assert found.rejected_by_reason == built.report["rejected_by_reason"]
    assert (found.num_documents, found.size) == (built.report["documents"], built.report["tokens"])
    assert found.num_supervised == store.num_supervised == built.report["supervised_tokens"]
    assert found.num_reasoning == store.num_reasoning == built.report["reasoning_documents"]
    assert (found.histogram, found.lengths) == (store.histogram, store.lengths)
    assert found.lengths == built.report["tokens_per_document"]
    assert [shown.spans for shown in found.documents] == [shown.spans for shown in store.documents]
    assert found.rejects == store.rejects
    rejects = [json.loads(line) for line in (built.path / "rejects.jsonl").read_text().splitlines()]
    assert sorted(itertools.chain(*found.rejects.values())) == sorted(
        f"{row['file']}:{row['line']}: {row['reason']} {row['detail']}".rstrip() for row in rejects
    )


def test_inspect_without_a_tokenizer_shows_text(chats):
    (found,) = inspect_all([Source(path=str(chats))], look(None, 1))
    (shown,) = found.documents
    assert found.unit == "bytes" and found.num_supervised is None and shown.num_tokens is None
    assert [(span.text, span.weight) for span in shown.spans] == [
        ("system: Be brief.\n", 0),
        ("user: 2 + 2?\n", 0),
        ("assistant: (reasons: Two and two.) 4\n", 100),
        ("user: And 3 + 3?\n", 0),
        ("assistant: 6\n", 50),
    ]
    assert found.rejected_by_reason == {
        "all answers have train: false or weight 0": 1,
        "no assistant turn": 1,
        "not JSON": 1,
    }
    assert found.rejects["no assistant turn"] == ["chats.jsonl:5: no assistant turn"]
    assert found.counts["records"] == 6 and found.counts["kept"] == 3 and found.num_reasoning == 1


def test_inspect_notes_split_dropped_and_cut_answers(chats, small):
    (whole,) = inspect_all([Source(path=str(chats))], look(small, 1))
    assert [proof.turn for proof in whole.documents[0].proofs] == [3, 5]
    seq_len = whole.documents[0].num_tokens - 1
    (dropped,) = inspect_all([Source(path=str(chats))], look(small, 1, seq_len=seq_len))
    assert [proof.turn for proof in dropped.documents[0].proofs] == [3] and dropped.counts["dropped_turns"] == 1
    assert "1 answer dropped: too long, or not preceded by a message" in dropped.documents[0].notes
    (split,) = inspect_all([Source(path=str(chats))], look(small, 1, seq_len=seq_len, overlong="split"))
    assert [[proof.turn for proof in shown.proofs] for shown in split.documents] == [[3], [5]]
    assert "the beginning of the history was dropped so that later answers fit" in split.documents[0].notes
    assert split.counts["split"] == 1 and split.documents[1].spans[0].text.count("2 + 2?") == 0


def test_inspect_shows_a_few_rejects_and_counts_all(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(['{"text": "a"}', *["{}"] * 9, '{"text": null}']) + "\n")
    (found,) = inspect_all([Source(path=str(path))], look(None))
    assert found.rejected_by_reason == {"field missing": 9, "field is null": 1}
    assert [len(shown) for shown in found.rejects.values()] == [3, 1]
    assert found.documents[0].spans[0].weight is None and np.isclose(found.share, 1.0)
