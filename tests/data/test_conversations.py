"""Conversations from file to store: every record is kept, split or rejected, in any format and container."""

import json
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.data.broken_records import BROKEN_RECORDS
from trivium.config.inputs import Source
from trivium.data.chat.samples import ConversationSettings
from trivium.data.store.build import BuildSettings, BuiltStore, build_sources
from trivium.data.store.train_tokenizer import train_tokenizer_from_sources
from trivium.data.tokenizer import load_tokenizer, train_tokenizer
from trivium.errors import BadData, ConfigError

WORDS = ["fox", "crow", "hen", "owl", "bear", "wolf", "d\u00e9j\u00e0", "\u65e5\u672c"]
# As Qwen3's does, this template shows reasoning in the last answer only: earlier ones need samples of their own.
REASONING_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.reasoning_content and loop.last %}
{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_messages(rng: Random, max_answers: int = 4, with_reasoning: bool = True) -> list[dict]:
    messages = []
    for _ in range(rng.randrange(1, max_answers + 1)):
        words = rng.sample(WORDS, 4)
        messages.append({"role": "user", "content": " ".join(words)})
        answer = {"role": "assistant", "content": words[rng.randrange(4)]}
        if with_reasoning and rng.random() < 0.4:
            answer["reasoning_content"] = f"one of {words[0]}"
        messages.append(answer)
    return messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter([" ".join(WORDS)] * 50), "bpe", 300, folder)
    (folder / "chat_template.jinja").write_text(REASONING_TEMPLATE)
    return load_tokenizer(folder)


def build(source: Source, tokenizer, cache_dir: Path, **changes) -> BuiltStore:
    options = {"held_out": 0.1, "max_reject_share": 1.0, "max_document_mib": 1.0, "workers": 1} | changes
    conversations = ConversationSettings(options.pop("seq_len", 200), options.pop("overlong", "drop"))
    settings = BuildSettings(cache_dir=cache_dir, conversations=conversations, **options)
    (built,) = build_sources([source], tokenizer, settings)
    return built


def write_rows(path: Path, rows: list) -> Source:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Source(path=str(path))


def samples(built: BuiltStore) -> list[tuple[list[int], list[int]]]:
    found = []
    for store in filter(None, (built.open(), built.open_held_out())):
        found += [(store.tokens(n).tolist(), store.column("loss_weights", n).tolist()) for n in range(len(store))]
    return found


@pytest.mark.parametrize("overlong", ["drop", "split", "truncate"])
def test_every_record_is_kept_split_or_rejected(tokenizer, tmp_path, overlong):
    rng = Random(1)
    good = [{"messages": make_messages(rng, max_answers=8)} for _ in range(300)]
    broken = [row for form, row, _ in BROKEN_RECORDS if form == "messages" and not isinstance(row, bytes)] * 3
    rows = [*good, *broken, "no json", "[1, 2]", '{"messages": [']
    rng.shuffle(rows)
    built = build(write_rows(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", overlong=overlong)
    report = built.report
    assert report["records"] == len(rows) == report["kept"] + report["split"] + report["rejected"]
    rejects = [json.loads(line) for line in (built.path / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == report["rejected"] == sum(report["rejected_by_reason"].values())
    assert len({row["line"] for row in rejects}) == len(rejects)
    assert report["split"] > 20 and report["reasoning_documents"] > 20
    assert report["documents"] + report["held_out_documents"] == len(samples(built))
    assert report["supervised_tokens"] == sum(weight > 0 for _, mask in samples(built) for weight in mask[1:])
    if overlong == "truncate":
        assert report["cut_turns"] + report["dropped_turns"] > 0


def test_samples_fit_and_end_with_a_supervised_end_of_turn(tokenizer, tmp_path):
    rng = Random(2)
    source = write_rows(tmp_path / "a.jsonl", [{"messages": make_messages(rng)} for _ in range(200)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for ids, mask in samples(build(source, tokenizer, tmp_path / "cache")):
        assert ids[-1] == end and mask[-1] == 100 and len(ids) <= 200


def test_all_samples_of_a_conversation_are_held_out_together(tokenizer, tmp_path):
    rng = Random(3)
    marks = [f"{number} " for number in range(150)]
    rows = []
    for mark in marks:
        messages = make_messages(rng, with_reasoning=True)
        messages[0]["content"] = mark + messages[0]["content"]
        rows.append({"messages": messages})
    built = build(write_rows(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "cache", held_out=0.3)
    sides = []
    for store in (built.open(), built.open_held_out()):
        texts = [tokenizer.decode(store.tokens(n)) for n in range(len(store))]
        sides.append({text.split("\n")[1].split()[0] for text in texts})
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sides[0] | sides[1] == {mark.strip() for mark in marks}


def test_conversations_do_not_depend_on_workers_or_block_size(tokenizer, tmp_path):
    rng = Random(4)
    source = write_rows(tmp_path / "a.jsonl", [{"messages": make_messages(rng)} for _ in range(300)])
    one = build(source, tokenizer, tmp_path / "one")
    two = build(source, tokenizer, tmp_path / "two", workers=2, block_bytes=3000)
    assert {p.name: p.read_bytes() for p in one.path.iterdir()} == {p.name: p.read_bytes() for p in two.path.iterdir()}


def as_sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def test_every_container_and_format_gives_the_same_samples(tokenizer, tmp_path):
    rng = Random(5)
    rows = [make_messages(rng, max_answers=1, with_reasoning=False) for _ in range(60)]
    records = [{"messages": messages} for messages in rows]
    pairs = [[message["content"] for message in messages] for messages in rows]
    sources = [write_rows(tmp_path / "rows.jsonl", records)]
    for name, indent in (("list.json", None), ("pretty.json", 2)):
        (tmp_path / name).write_text(json.dumps(records, indent=indent))
        sources.append(Source(path=str(tmp_path / name)))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
    sources.append(Source(path=str(tmp_path / "rows.parquet")))
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.jsonl", records)
    sources.append(Source(hub=str(tmp_path / "hub")))
    sources.append(write_rows(tmp_path / "s.jsonl", [{"conversations": as_sharegpt(messages)} for messages in rows]))
    sources.append(write_rows(tmp_path / "a.jsonl", [{"instruction": q, "input": "", "output": a} for q, a in pairs]))
    sources.append(write_rows(tmp_path / "p.jsonl", [{"prompt": q, "completion": a} for q, a in pairs]))
    mapped = write_rows(tmp_path / "m.jsonl", [{"frage": q, "antwort": a, "nr": n} for n, (q, a) in enumerate(pairs)])
    sources.append(mapped.model_copy(update={"fields": {"prompt": "frage", "answer": "antwort"}}))
    info = {"mine": {"file_name": "s.jsonl", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    sources.append(Source(path=str(tmp_path / "dataset_info.json"), dataset="mine"))
    found = [sorted(samples(build(source, tokenizer, tmp_path / "cache"))) for source in sources]
    assert len(found[0]) == 60
    assert all(one == found[0] for one in found[1:])


def test_documents_among_conversations_are_fully_supervised(tokenizer, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [{"messages": make_messages(Random(6))}])
    write_rows(folder / "b.jsonl", [{"text": "fox crow hen"}])
    built = build(Source(path=str(folder)), tokenizer, tmp_path / "cache", held_out=0.0)
    (ids, mask) = samples(built)[-1]
    assert tokenizer.decode(ids) == "fox crow hen<|endoftext|>" and set(mask) == {100}
    assert built.report["conversations"] == 1 and built.report["kept"] + built.report["split"] == 2


def test_settings_that_change_samples_change_the_store(tokenizer, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"messages": make_messages(Random(7))} for _ in range(20)])
    first = build(source, tokenizer, tmp_path / "cache")
    assert build(source, tokenizer, tmp_path / "cache").path == first.path
    assert build(source, tokenizer, tmp_path / "cache", seq_len=100).path != first.path
    assert build(source, tokenizer, tmp_path / "cache", overlong="split").path != first.path


def test_samples_with_reasoning_are_marked(tokenizer, tmp_path):
    reasoned = {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "owl"}]}
    reasoned["messages"][1]["reasoning_content"] = "hen"
    plain = {"messages": [{"role": "user", "content": "crow"}, {"role": "assistant", "content": "owl"}]}
    built = build(write_rows(tmp_path / "a.jsonl", [reasoned, plain]), tokenizer, tmp_path / "cache", held_out=0.0)
    assert built.reasoning().tolist() == [True, False]
    assert np.asarray(built.open().lengths)[0] > np.asarray(built.open().lengths)[1]


def test_unknown_format_error_names_the_fields(tokenizer, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"frage": "fox", "antwort": "owl"}])
    with pytest.raises(BadData, match=r"'frage', 'antwort', which match no known format.*fields"):
        build(source, tokenizer, tmp_path / "cache")


def test_tokenizer_without_a_chat_template_is_refused(tokenizer, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"messages": make_messages(Random(8))}])
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        build(source, plain, tmp_path / "cache")


def test_tokenizer_is_trained_on_the_messages(tmp_path):
    rows = [{"messages": make_messages(Random(number))} for number in range(20)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    folder = train_tokenizer_from_sources(
        [source], kind="bpe", vocab_size=300, cache_dir=tmp_path / "cache", max_document_mib=1.0
    )
    assert len(load_tokenizer(folder)(" wolf crow").input_ids) <= 3
