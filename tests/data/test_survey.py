"""Survey: equal to a build if everything is read, and close to it otherwise."""

import gzip
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from random import Random

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from tests.support.qwen_tokenizers import REAL, REAL_NAMES, needs_real
from trivium.config.inputs import Source
from trivium.data.chat.samples import ConversationSettings
from trivium.data.look import survey as survey_module
from trivium.data.look.estimate import estimated_tokens, template_tokens
from trivium.data.look.survey import survey
from trivium.data.store.build import BuildSettings, build_sources
from trivium.data.tokenizer import document_encoding, load_for_counting, load_tokenizer, train_tokenizer
from trivium.errors import BadData, ConfigError
from trivium.plan.workload import DataFacts

ROOT = Path(__file__).parents[2]
ENGLISH = (
    "Once upon a time there lived a miller who had three sons, a mill, a donkey and a cat. When he died the eldest "
    "took the mill, the second the donkey, and nothing was left for the youngest but the cat. He was sad about it. "
    "'What am I to do with a cat?' he said. 'I can have a pair of gloves made of its fur, and then nothing is left.'"
)
KOREAN = (
    "옛날 옛적에 세 아들을 둔 방앗간 주인이 살았습니다. 그에게는 방앗간과 당나귀와 고양이 한 마리가 있었습니다. 주인이 "
    "죽자 맏아들은 방앗간을, 둘째는 당나귀를 가졌고, 막내에게는 고양이밖에 남지 않았습니다. 막내는 몹시 슬퍼했습니다."
)
CHINESE = (
    "从前有一个磨坊主、他有三个儿子、一座磨坊、一头驴和一只猫。他死后、老大得了磨坊、老二得了驴、小儿子只得到了那只猫。"
)


def chat(number):
    """Conversations of several lengths; every third has reasoning, every fifth has two answers, one supervised."""
    thought = "" if number % 3 else "<think>\nWhiskers and claws.\n</think>\n\n"
    answer = thought + "It is a cat. " * (1 + number % 7)
    first = [{"role": "user", "content": f"What is animal {number}?"}, {"role": "assistant", "content": answer}]
    if number % 5:
        return first
    return [*first, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "train": False}]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [json.dumps({"messages": chat(number)}) for number in range(300)]
    path.write_text("\n".join([*rows, "{cut off", json.dumps({"messages": []})]) + "\n")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter([ENGLISH]), "bpe", 300, folder)
    return load_tokenizer(folder)


def build(path, tokenizer, tmp_path, seq_len=4096, held_out=0.0):
    settings = BuildSettings(
        cache_dir=tmp_path / "cache",
        conversations=ConversationSettings(seq_len),
        held_out=held_out,
        max_reject_share=1.0,
        max_document_mib=16.0,
        workers=1,
    )
    (built,) = build_sources([Source(path=str(path))], tokenizer, settings)
    return built


@pytest.mark.parametrize("seq_len", [4096, 160])
def test_survey_counts_conversations_like_a_build(chats, small, tmp_path, seq_len):
    built = build(chats, small, tmp_path, seq_len)
    found = survey([Source(path=str(chats))], small, ConversationSettings(seq_len=seq_len))
    report = built.report
    assert found.kind == "conversations" and found.is_measured and found.read_share == 1.0
    assert (found.num_rows, found.num_rejected) == (report["kept"] + report["split"], report["rejected"])
    assert found.num_tokens == report["tokens"] and found.mean_tokens == report["tokens"] / report["documents"]
    assert found.supervised_share == report["supervised_tokens"] / report["tokens"]
    reasoning = built.reasoning()
    assert reasoning is not None and found.reasoning_share == reasoning.mean()
    of_store = survey([Source(store=str(built.path))])
    assert (of_store.num_tokens, of_store.supervised_share) == (found.num_tokens, found.supervised_share)
    assert of_store.reasoning_share == found.reasoning_share


def test_survey_counts_documents_like_a_build(small, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in (ENGLISH, KOREAN, CHINESE)))
    built = build(path, small, tmp_path)
    found = survey([Source(path=str(path))], small)
    assert found.kind == "documents" and (found.num_rows, found.num_tokens) == (3, built.report["tokens"])
    assert (found.supervised_share, found.reasoning_share) == (1.0, 0.0)
    assert survey([Source(store=str(built.path))]).num_tokens == found.num_tokens


def test_survey_without_a_tokenizer_estimates_tokens(chats, small):
    counted, estimated = survey([Source(path=str(chats))], small), survey([Source(path=str(chats))])
    assert not estimated.is_measured and "estimated" in estimated.how
    assert (estimated.num_rows, estimated.num_rejected) == (counted.num_rows, counted.num_rejected)
    assert estimated.reasoning_share == pytest.approx(1 / 3)
    assert estimated.supervised_share == pytest.approx(counted.supervised_share, abs=0.15)


@needs_real
def test_estimated_tokens_are_close_to_qwens_tokenizer():
    tokenizer = Tokenizer.from_file(str(REAL / "qwen3" / "tokenizer.json"))
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    code = [path.read_text() for path in sorted((ROOT / "src/trivium/data").rglob("*.py"))]
    for texts, error in ((pages, 0.06), (code, 0.06), ([ENGLISH], 0.1), ([KOREAN], 0.15), ([CHINESE], 0.15)):
        counted = sum(len(tokenizer.encode(text).ids) for text in texts)
        assert sum(map(estimated_tokens, texts)) == pytest.approx(counted, rel=error)


def write_varied_chats(path):
    """Questions and answers of one to three turns from the docs, Korean text and code, some with tools and systems."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    answers = [part for part in pages.split("\n\n") if 20 < len(part) < 2000] + [KOREAN] * 30
    code = [part for file in (ROOT / "src/trivium/data").rglob("*.py") for part in file.read_text().split("\n\n\n")]
    answers += [f"```python\n{part}\n```" for part in code if len(part) < 1500]
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    rows = []
    for number, answer in enumerate(Random(0).sample(answers, len(answers))):
        turns = [{"role": "system", "content": "Answer from the docs."}] if number % 4 == 0 else []
        for repeat in range(1 + number % 3):
            turns.append({"role": "user", "content": f"What do the docs say about point {number + repeat}, please?"})
            turns.append({"role": "assistant", "content": answer if repeat == 0 else f"As I said: {answer[:200]}"})
        rows.append({"messages": turns} | ({"tools": [tool]} if number % 7 == 0 else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@needs_real
@pytest.mark.parametrize(
    ("name", "model"), [("qwen2.5-instruct", "Qwen/Qwen2.5-7B-Instruct"), ("qwen3", "Qwen/Qwen3-8B")]
)
def test_survey_predicts_what_a_build_makes(name, model, tmp_path):
    """The training tokens and their supervised share, without held-out conversations and those that are too long."""
    path, tokenizer = write_varied_chats(tmp_path / "chats.jsonl"), load_tokenizer(REAL / name)
    report = build(path, tokenizer, tmp_path, seq_len=512, held_out=None).report
    share = report["supervised_tokens"] / (report["tokens"] + report["held_out_tokens"])
    settings = {"conversations": ConversationSettings(512), "held_out": None, "template": template_tokens(model)}
    counted = survey([Source(path=str(path))], load_for_counting(REAL / name), **settings)
    assert counted.num_tokens == pytest.approx(report["tokens"], rel=0.02) and counted.is_measured
    assert counted.read_share < 0.9 and counted.supervised_share == pytest.approx(share, abs=0.02)
    estimated = survey([Source(path=str(path))], **settings)
    assert estimated.num_tokens == pytest.approx(report["tokens"], rel=0.1) and not estimated.is_measured
    assert estimated.supervised_share == pytest.approx(share, abs=0.05)


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_counting_uses_the_ids_of_training(name):
    counting, training = load_for_counting(REAL / name), load_tokenizer(REAL / name)
    messages = [{"role": "user", "content": f"{KOREAN}\t12 <think> don't"}, {"role": "assistant", "content": CHINESE}]
    rendered = [one.apply_chat_template(messages, return_dict=False) for one in (counting, training)]
    assert rendered[0] == rendered[1]
    encodings = [document_encoding(one) for one in (counting, training)]
    assert encodings[0].end_id == encodings[1].end_id and encodings[0].vocab_size == encodings[1].vocab_size


@pytest.mark.parametrize("text", ["", "\ud800", "😀" * 40, "a", "ไทย", "\n" * 999])
def test_estimated_tokens_of_any_text(text):
    assert 1 <= estimated_tokens(text) <= max(1, len(text.encode("utf-8", "surrogatepass")))


def plain_lines(path, rows):
    path.write_text("".join(f"{row['text']}\n" for row in rows))
    return Source(path=str(path), documents="line")


def paragraphs(path, rows):
    path.write_text("".join(f"{row['text']}\n\n" for row in rows))
    return Source(path=str(path), documents="paragraph")


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def json_list(path, rows):
    path.write_text(json.dumps(rows))
    return Source(path=str(path))


def compressed(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return Source(path=str(path))


def table(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
    return Source(path=str(path))


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (plain_lines, ".txt"),
        (paragraphs, ".txt"),
        (json_lines, ".jsonl"),
        (json_list, ".json"),
        (compressed, ".jsonl.gz"),
        (table, ".parquet"),
    ],
)
def test_survey_extrapolates_from_a_part(write, suffix, tmp_path, small, monkeypatch):
    rows = [{"text": f"{number}: " + "The miller had a cat. " * (1 + number % 11)} for number in range(6000)]
    source = write(tmp_path / f"rows{suffix}", rows)
    whole = survey([source], None)
    monkeypatch.setattr(survey_module, "MOST_BYTES_READ", 100_000)
    monkeypatch.setattr(survey_module, "MOST_BYTES_ENCODED", 30_000)
    part, encoded = survey([source], None), survey([source], small)
    assert whole.num_rows == 6000 and whole.read_share == 1.0
    assert 0 < encoded.read_share < part.read_share < 0.5
    for found in (part, encoded):
        assert found.num_rows == pytest.approx(6000, rel=0.0 if suffix == ".parquet" else 0.1)
    assert part.num_tokens == pytest.approx(whole.num_tokens, rel=0.1)


def test_survey_samples_the_whole_file(tmp_path, monkeypatch):
    """Short records first, long ones later: reading only the beginning would be off by a factor of ten."""
    rows = [{"text": "A cat. " * (1 if number < 20_000 else 60)} for number in range(24_000)]
    source = json_lines(tmp_path / "rows.jsonl", rows)
    whole = survey([source])
    monkeypatch.setattr(survey_module, "MOST_BYTES_READ", 500_000)
    part = survey([source])
    assert part.mean_tokens == pytest.approx(whole.mean_tokens, rel=0.1)


def test_survey_weighs_sources_by_their_tokens(chats, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(ENGLISH * 500)
    alone, other = survey([Source(path=str(chats))]), survey([Source(path=str(texts))])
    both = survey([Source(path=str(chats)), Source(path=str(texts))])
    assert (alone.kind, other.kind, both.kind) == ("conversations", "documents", "documents")
    assert both.num_tokens == alone.num_tokens + other.num_tokens and both.num_rows == alone.num_rows + 1
    assert both.reasoning_share == alone.reasoning_share
    supervised = alone.supervised_share * alone.num_tokens + other.num_tokens
    assert both.supervised_share == pytest.approx(supervised / both.num_tokens)


def test_survey_gives_the_planner_its_data_facts(chats):
    found = survey([Source(path=str(chats))])
    facts = DataFacts(**{field.name: getattr(found, field.name) for field in fields(DataFacts)})
    assert facts.num_rows == found.num_rows


def test_survey_skips_a_store_inside_the_source(chats, small, tmp_path):
    build(chats, small, tmp_path)
    found = survey([Source(path=str(tmp_path))], cache_dir=tmp_path / "cache")
    assert found.num_rows == survey([Source(path=str(chats))]).num_rows


def test_survey_without_usable_records_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(BadData, match="no usable record"):
        survey([Source(path=str(path))])
    with pytest.raises(ConfigError, match="no such file"):
        survey([Source(path=str(tmp_path / "nowhere.jsonl"))])


def test_survey_does_not_import_torch():
    code = "import sys, trivium.data.look.survey; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
