"""Builds: the same store for any number of workers, after kills and with concurrent builds; bad data is an error."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from trivium.config.inputs import Source
from trivium.data.source.corpus import open_corpus
from trivium.data.store import build as module
from trivium.data.store.build import BuildSettings, BuiltStore, build_sources
from trivium.data.store.megatron import Store, StoreWriter
from trivium.data.store.publish import (
    HASH_VALUES,
    HIGH_VALUES,
    Lengths,
    count_distinct,
    held_out_limit,
)
from trivium.data.store.train_tokenizer import sample_texts, train_tokenizer_from_sources
from trivium.data.tokenizer import document_encoding, load_tokenizer, train_tokenizer
from trivium.errors import BadData, ConfigError, TriviumError

WORDS = ["the", "a", "fox", "crow", "river", "sings", "falls", "waits", "then", "\u00e9t\u00e9", "\u65e5\u672c"]


def make_texts(number: int) -> list[str]:
    generator = random.Random(number)
    return [f"{index}: " + " ".join(generator.choices(WORDS, k=generator.randrange(1, 80))) for index in range(number)]


def write_jsonl(path: Path, texts: list[str], extra: list[str] = ()) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts) + "".join(line + "\n" for line in extra)
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(make_texts(200)), "bpe", 400, folder)
    return load_tokenizer(folder)


def build(path: Path | Source, tokenizer, cache_dir: Path, **changes) -> BuiltStore:
    source = path if isinstance(path, Source) else Source(path=str(path))
    options = {"held_out": 0.05, "max_reject_share": 0.01, "max_document_mib": 1.0, "workers": 1} | changes
    (store,) = build_sources([source], tokenizer, BuildSettings(cache_dir=cache_dir, **options))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(store: Store) -> list[list[int]]:
    return [store.tokens(index).tolist() for index in range(len(store))]


def test_build_stores_every_document_once_with_its_end_token(tmp_path, tokenizer):
    texts = make_texts(300)
    built = build(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "cache")
    train, held_out = documents(built.open()), documents(built.open_held_out())
    expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    assert sorted(train + held_out) == sorted(expected)
    assert train == [ids for ids in expected if ids in train]  # the order of the file
    assert 3 <= len(held_out) <= 40
    assert built.report["records"] == built.report["kept"] == 300
    assert built.manifest["tokens"] == built.open().num_tokens == sum(map(len, train))
    assert built.report["text_bytes"] == sum(len(text.encode()) for text in texts)
    lengths = list(map(len, expected))
    assert built.report["tokens_per_document"]["p50"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert built.report["tokens_per_document"]["max"] == max(lengths)


def test_build_does_not_depend_on_workers_or_block_size(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    for name, number in (("b.jsonl", 400), ("a.jsonl", 500)):
        write_jsonl(tmp_path / "texts" / name, make_texts(number), ["null"])
    stores = [
        build(
            tmp_path / "texts",
            tokenizer,
            tmp_path / f"cache{workers}{block_bytes}",
            workers=workers,
            block_bytes=block_bytes,
        )
        for workers, block_bytes in ((1, 1 << 19), (1, 3000), (2, 4000), (3, 2500))
    ]
    assert all(contents(store.path) == contents(stores[0].path) for store in stores[1:])
    assert stores[0].report["rejected"] == 2
    rejects = [json.loads(line) for line in (stores[0].path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in rejects] == [
        ("a.jsonl", 501, "not a JSON object"),
        ("b.jsonl", 401, "not a JSON object"),
    ]


def test_build_reuses_and_checks_an_existing_store(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50), ["{}"])
    first = build(path, tokenizer, tmp_path / "cache", max_reject_share=0.1)
    monkeypatch.setattr(module, "encode_blocks", None)
    assert build(path, tokenizer, tmp_path / "cache", max_reject_share=0.1) == first
    with pytest.raises(BadData, match="1 of 51 records"):
        build(path, tokenizer, tmp_path / "cache")
    tokens = first.path / "tokens.bin"
    with tokens.open("r+b") as file:
        file.seek(tokens.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BadData, match="the manifest says"):
        build(path, tokenizer, tmp_path / "cache", max_reject_share=0.1)
    os.truncate(first.path / "manifest.json", 100)
    with pytest.raises(BadData, match=r"manifest\.json cannot be read"):
        build(path, tokenizer, tmp_path / "cache", max_reject_share=0.1)


def test_verify_hashes_all_files_and_build_only_changed_ones(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    monkeypatch.setattr("trivium.data.source.corpus.FRESH_NANOSECONDS", 0)
    built = build(path, tokenizer, tmp_path / "cache")
    hashed = []
    monkeypatch.setattr("trivium.data.source.corpus.sha256_file", lambda file: hashed.append(file.name))
    assert build(path, tokenizer, tmp_path / "cache") == built and not hashed
    monkeypatch.undo()
    tokens = built.path / "tokens.bin"
    before, content = tokens.stat(), bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(BadData, match="the manifest says"):
        build(path, tokenizer, tmp_path / "cache")
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if the disk had flipped it
    assert build(path, tokenizer, tmp_path / "cache") == built
    with pytest.raises(BadData, match=r"tokens\.bin.*the manifest says"):
        built.verify()


def test_manifest_lists_the_control_tokens_in_training(tmp_path, tokenizer):
    built = build(write_jsonl(tmp_path / "a.jsonl", make_texts(50)), tokenizer, tmp_path / "cache")
    control = sorted(tokenizer.get_added_vocab().values())
    assert built.find_control_tokens(control) == set(built.open().found_among(control)) == {tokenizer.eos_token_id}


def test_build_makes_a_new_store_for_different_inputs(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    train_tokenizer(iter(make_texts(30)), "char", 300, tmp_path / "char")
    folders = {
        build(path, tokenizer, tmp_path / "cache").path,
        build(path, load_tokenizer(tmp_path / "char"), tmp_path / "cache").path,
        build(path, tokenizer, tmp_path / "cache", held_out=0.1).path,
        build(path, tokenizer, tmp_path / "cache", max_document_mib=0.5).path,
        build(write_jsonl(path, make_texts(51)), tokenizer, tmp_path / "cache").path,
    }
    assert len(folders) == 5


SCRIPT = """
import json, sys
from pathlib import Path
from trivium.config.inputs import Source
from trivium.data.store import partial
from trivium.data.store.build import BuildSettings, StoreJob
from trivium.data.source.corpus import open_corpus
from trivium.data.tokenizer import Encoding
if __name__ == "__main__":
    partial.JOURNAL_EVERY_BLOCKS = 3
    source, encoding, cache, workers = sys.argv[1:]
    Path(cache).mkdir(exist_ok=True)
    job = StoreJob(
        corpus=open_corpus(Source(path=source), 1.0, Path(cache)),
        encoding=Encoding(**json.loads(Path(encoding).read_text())),
        chat=None,
        settings=BuildSettings(
            cache_dir=Path(cache), held_out=0.05, max_reject_share=0.01, workers=int(workers), block_bytes=2000
        ),
    )
    print(job.run().path)
"""


def start_build(source: Path, tokenizer, cache: Path, workers: int) -> subprocess.Popen[str]:
    """A build in a separate process; it is given the encoding, since importing transformers is slow."""
    script, encoding = source.with_name("build_script.py"), source.with_name("encoding")
    script.write_text(SCRIPT)
    encoding.write_text(json.dumps(asdict(document_encoding(tokenizer))))
    command = [sys.executable, str(script), str(source), str(encoding), str(cache), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_resume_and_give_the_same_bytes(tmp_path, tokenizer, workers):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(6000), ["{}", '{"text": "cut'])
    whole = build(path, tokenizer, tmp_path / "whole")
    cache = tmp_path / "killed"
    generator = random.Random(workers)
    sizes = []
    for _ in range(4):
        process = start_build(path, tokenizer, cache, workers)
        before = sizes[-1] if sizes else 0
        while process.poll() is None and (
            not list(cache.glob("*.partial/journal.json")) or size_of_partial(cache) <= before
        ):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        sizes.append(size_of_partial(cache))
        if list(cache.glob("store-*/manifest.json")):
            break
    assert sizes[0] > 0, "the first kill came after the end; the corpus is too small for this machine"
    output, errors = start_build(path, tokenizer, cache, workers).communicate()
    assert contents(Path(output.strip())) == contents(whole.path), errors
    assert not list(cache.glob("*.partial"))


def size_of_partial(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*.partial/documents.bin"))


def test_concurrent_builds_make_one_store(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    builds = [start_build(path, tokenizer, tmp_path / "cache", 1) for _ in range(2)]
    ends = [process.communicate() for process in builds]
    assert [process.returncode for process in builds] == [0, 0], ends
    (folder,) = {output.strip() for output, _ in ends}
    assert contents(Path(folder)) == contents(build(path, tokenizer, tmp_path / "alone").path)


def test_killed_worker_is_an_error_and_finished_work_is_kept(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(6000))
    cache = tmp_path / "cache"
    process = start_build(path, tokenizer, cache, 2)
    while not list(cache.glob("*.partial/journal.json")) and process.poll() is None:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "A tokenizer process died" in errors
    assert size_of_partial(cache) > 0


def test_build_stops_with_too_many_rejects_and_keeps_their_list(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(90), ["{}"] * 7 + ["null"] * 3)
    with pytest.raises(BadData) as caught:
        build(path, tokenizer, tmp_path / "cache")
    message = str(caught.value)
    assert (
        "10 of 100 records" in message and "field missing (7), not a JSON object (3)" in message and "\n" not in message
    )
    (rejects,) = (tmp_path / "cache").glob("*.partial/rejects.jsonl")
    assert str(rejects) in message and len(rejects.read_text().splitlines()) == 10
    assert not list((tmp_path / "cache").glob("store-*/manifest.json"))
    built = build(path, tokenizer, tmp_path / "cache", max_reject_share=0.1)
    assert built.report["kept"] + built.report["rejected"] == built.report["records"] == 100
    assert built.report["rejected_by_reason"] == {"field missing": 7, "not a JSON object": 3}


def test_build_stops_early_with_mostly_rejects(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(10), ["{}"] * 40_000)
    with pytest.raises(BadData, match="field missing"):
        build(path, tokenizer, tmp_path / "cache", block_bytes=4000)
    (rejects,) = (tmp_path / "cache").glob("*.partial/rejects.jsonl")
    assert 9_990 <= len(rejects.read_text().splitlines()) < 12_000


def test_build_without_documents_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(BadData, match="has no documents"):
        build(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache")
    with pytest.raises(ConfigError, match="no such file"):
        build(tmp_path / "gone", tokenizer, tmp_path / "cache")


def test_build_skips_a_cache_folder_inside_the_source(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    first = build(tmp_path, tokenizer, tmp_path / "runs" / "cache")
    assert build(tmp_path, tokenizer, tmp_path / "runs" / "cache") == first


def test_build_detects_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    encode = module.encode_blocks

    def and_write(*arguments):
        yield from encode(*arguments)
        write_jsonl(path, make_texts(101))

    monkeypatch.setattr(module, "encode_blocks", and_write)
    with pytest.raises(BadData, match="changed while it was being read"):
        build(path, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("store-*/"))


def test_duplicates_are_counted_and_split_together(tmp_path, tokenizer):
    texts = make_texts(200)
    built = build(
        write_jsonl(tmp_path / "a.jsonl", texts + texts[:70] + texts[:30]), tokenizer, tmp_path / "cache", held_out=0.2
    )
    assert built.report["duplicates"] == 100
    train, held_out = documents(built.open()), documents(built.open_held_out())
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held_out}
    assert len(train) + len(held_out) == 300


@pytest.mark.parametrize(("texts", "held_out", "expected"), [
    (["a", "b"], 0.001, (1, 1)),
    (["a", "b"], 0.999, (1, 1)),
    (["a", "a", "b"], 0.001, None),
    (["a", "a"], 0.5, (2, 0)),
    (["a"], 0.5, (1, 0)),
    (["a", "b"], 0.0, (2, 0)),
])  # fmt: skip
def test_held_out_split_leaves_neither_side_empty(tmp_path, tokenizer, texts, held_out, expected):
    built = build(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "cache", held_out=held_out)
    store = built.open_held_out()
    found = (len(built.open()), len(store) if store else 0)
    assert found == expected if expected else sorted(found) == [1, 2]


def test_count_distinct_is_exact_with_buckets(tmp_path, monkeypatch):
    monkeypatch.setattr("trivium.data.store.publish.BUCKET_HASHES", 100)
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**63, (700, 2), dtype=np.uint64)
    values[:200, 0] = values[200:400, 0]  # equal in the first half only
    rows = values[generator.integers(0, 700, 3000)]
    rows.astype(">u8").tofile(tmp_path / "hashes.bin")
    expected = {int(high) << 64 | int(low) for high, low in rows}
    assert count_distinct(tmp_path / "hashes.bin") == (len(expected), min(expected), max(expected))
    assert held_out_limit(0.5, 0, HASH_VALUES - 1) == HIGH_VALUES // 2 - 1


def test_lengths_are_close_and_their_ends_and_mean_exact():
    lengths = np.unique(np.random.default_rng(0).integers(1, 10**7, 20_000))
    found = Lengths()
    for part in np.array_split(np.random.default_rng(1).permutation(lengths), 7):
        found.add(part)
    described = found.describe()
    assert (described["min"], described["max"]) == (lengths.min(), lengths.max())
    assert described["mean"] == round(float(lengths.mean()), 2)
    exact = np.quantile(lengths, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], method="inverted_cdf")
    quantiles = [value for key, value in described.items() if key.startswith("p")]
    assert np.all((quantiles <= exact) & (quantiles >= exact * 0.998))
    small = Lengths()
    small.add(np.array([5, 7, 7, 7]))
    assert small.describe()["p50"] == 7 and small.describe()["mean"] == 6.5


def test_control_tokens_in_documents_are_counted_and_stay_text(tmp_path, tokenizer):
    texts = ["plain", "ends <|im_end|> here", "<|endoftext|>"]
    built = build(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "cache", held_out=0.0)
    assert built.report["control_token_records"] == 2
    for ids in documents(built.open()):
        assert [token for token in ids if token >= len(tokenizer) - 3] == [tokenizer.eos_token_id]


def test_external_store_is_used_unchanged(tmp_path, tokenizer):
    with StoreWriter(tmp_path / "theirs", np.dtype(np.int32)) as writer:
        writer.add(np.arange(10, dtype=np.int32), np.array([4, 6]))
    built = build(Source(store=str(tmp_path / "theirs")), tokenizer, tmp_path / "cache")
    assert documents(built.open()) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]] and built.open_held_out() is None
    with StoreWriter(tmp_path / "other", np.dtype(np.int32)) as writer:
        writer.add(np.array([len(tokenizer)], dtype=np.int32), np.array([1]))
    with pytest.raises(BadData, match="store built with this tokenizer"):
        build(Source(store=str(tmp_path / "other")), tokenizer, tmp_path / "cache")


def test_hub_corpus_equals_its_files(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    path = write_jsonl(tmp_path / "set" / "train.jsonl", make_texts(100))
    streamed = build(Source(hub=str(tmp_path / "set")), tokenizer, tmp_path / "cache", block_bytes=2000)
    assert (
        contents(streamed.path)["tokens.bin"] == contents(build(path, tokenizer, tmp_path / "cache").path)["tokens.bin"]
    )
    with pytest.raises(BadData, match="cannot read it"):
        build(Source(hub=str(tmp_path / "set"), split="nosuch"), tokenizer, tmp_path / "cache")


def test_train_tokenizer_from_sources_is_deterministic_and_cached(tmp_path):
    sources = [Source(path=str(write_jsonl(tmp_path / f"{number}.jsonl", make_texts(number)))) for number in (300, 400)]
    options = {"kind": "bpe", "vocab_size": 300, "max_document_mib": 1.0}
    folder = train_tokenizer_from_sources(sources, cache_dir=tmp_path / "cache", **options)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer_from_sources(sources, cache_dir=tmp_path / "cache", **options) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    other = train_tokenizer_from_sources(sources, cache_dir=tmp_path / "other", **options)
    assert contents(other) == contents(folder)
    with pytest.raises(ConfigError, match="is a token store"):
        train_tokenizer_from_sources([Source(store="x")], cache_dir=tmp_path / "cache", **options)


def test_sample_texts_is_spread_and_bounded(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(4000))
    corpus = open_corpus(Source(path=str(path)), 1.0, tmp_path)
    blocks = type(corpus).blocks
    monkeypatch.setattr(type(corpus), "blocks", lambda self: blocks(self, block_bytes=4000))
    texts = list(sample_texts([corpus], 100_000))
    assert 60_000 < sum(len(text.encode()) for text in texts) < 110_000
    places = [int(text.split(":")[0]) for text in texts]
    assert places[0] == 0 and places[-1] > 3500
    assert texts == list(sample_texts([corpus], 100_000))


def test_build_checks_disk_space_before_writing(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(TriviumError, match="Not enough disk space"):
        build(path, tokenizer, tmp_path / "cache")
