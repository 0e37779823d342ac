"""Token stores: compatible with Megatron in both directions, and damage is detected."""

import os
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.store.megatron import Store, StoreWriter
from trivium.errors import BadData

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from trivium.data.tokenizer import token_dtype

DOCUMENTS = st.lists(st.lists(st.integers(0, 65535), max_size=30), min_size=1, max_size=12)
DTYPES = st.sampled_from([np.uint16, np.int32])


def write(prefix, documents, dtype=np.uint16):
    with StoreWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=dtype), np.array([len(document)], dtype=np.int32))


@settings(max_examples=60)
@given(documents=DOCUMENTS, dtype=DTYPES)
def test_megatron_reads_what_we_write(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("ours") / "tokens"
    write(prefix, documents, dtype)
    store = Store(prefix.parent)
    assert [store.tokens(index).tolist() for index in range(len(store))] == documents
    assert store.num_tokens == sum(map(len, documents)) and store.lengths.tolist() == list(map(len, documents))
    if store.num_tokens:  # Megatron cannot map an empty file
        theirs = IndexedDataset(str(prefix))
        assert [theirs[index].tolist() for index in range(len(theirs))] == documents
        assert theirs.index.dtype == dtype
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


@settings(max_examples=60)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=9), min_size=1, max_size=4),
        min_size=1,
        max_size=9,
    ),
    dtype=DTYPES,
)
def test_we_read_what_megatron_writes(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("theirs") / "some.prefix"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document([token for sequence in sequences for token in sequence], list(map(len, sequences)))
    builder.finalize(f"{prefix}.idx")
    store = Store(prefix)
    joined = [[token for sequence in sequences for token in sequence] for sequences in documents]
    assert len(store) == len(documents) and store.dtype == dtype
    assert store.lengths.tolist() == list(map(len, joined))
    assert [store.tokens(index).tolist() for index in range(len(store))] == joined
    assert store.tokens(0, 1, len(joined[0])).tolist() == joined[0][1:]
    assert store.largest_token() == max(max(document) for document in joined)


def test_store_bytes_equal_megatron(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6]]
    write(tmp_path / "ours", documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [259, 65_499, 65_500, 151_669])
def test_token_dtype_follows_megatron(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_store_raises_index_errors(tmp_path):
    write(tmp_path / "tokens", [[1, 2, 3], []])
    store = Store(tmp_path)
    assert store.tokens(0, 3, 3).tolist() == [] and store.tokens(1).tolist() == []
    for place in ((2,), (-1,), (0, 0, 4), (0, 2, 1), (0, -1, 2)):
        with pytest.raises(IndexError):
            store.tokens(*place)


def test_fingerprint_depends_on_the_store(tmp_path):
    for name, documents in {"a": [[1, 2], [3]], "b": [[1, 2], [4]], "c": [[1], [2, 3]], "same": [[1, 2], [3]]}.items():
        write(tmp_path / name, documents)
    prints = {name: Store(tmp_path / name).fingerprint for name in ("a", "b", "c", "same")}
    assert prints["a"] == prints["same"] and len(set(prints.values())) == 3


def patch(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def break_index(offset, content):
    return lambda prefix: patch(prefix.with_suffix(".idx"), offset, content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "no such file"),
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "no such file"),
        (lambda prefix: os.truncate(prefix.with_suffix(".idx"), 20), "truncated"),
        (lambda prefix: os.truncate(prefix.with_suffix(".idx"), 50), "its header implies"),
        (lambda prefix: os.truncate(prefix.with_suffix(".bin"), 7), "has 7 bytes, but its .idx implies"),
        (lambda prefix: prefix.with_suffix(".bin").write_bytes(b"a" * 13), "has 13 bytes, but its .idx implies 12"),
        (break_index(0, b"GARBAGE"), "MMIDIDX"),
        (break_index(9, struct.pack("<Q", 2)), "version 2"),
        (break_index(17, b"\x06"), "token dtype 6"),
        (break_index(18, struct.pack("<Q", 2**60)), "implies"),
        (break_index(34, struct.pack("<i", -1)), "gaps or overlaps"),
        (break_index(34, struct.pack("<i", 4)), "gaps or overlaps"),
        (break_index(34 + 12, struct.pack("<q", 2)), "gaps or overlaps"),
        (break_index(34 + 36 + 8, struct.pack("<q", 3)), "do not rise"),
        (break_index(34 + 36, struct.pack("<q", 1)), "do not rise"),
    ],
)  # fmt: skip
def test_store_detects_damage(tmp_path, damage, said):
    write(tmp_path / "tokens", [[1, 2, 3], [4], [5, 6]])
    damage(tmp_path / "tokens")
    with pytest.raises(BadData, match=said):
        Store(tmp_path)
