"""Columns and sequences: values stay aligned with their tokens, and the sequences of a document stay separate."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory_store import random_store
from trivium.data.batch.order import Order
from trivium.data.batch.pack import NO_LABEL, pack
from trivium.data.columns import LOSS_WEIGHTS, Column
from trivium.data.store.megatron import Selection, Store, StoreWriter
from trivium.errors import BadData

LOG_PROBS = Column("reference_log_probs", "float32")
REWARDS = Column("rewards", "float64", per="document")
SEQ_LEN = 24
# A document is a list of the lengths of its sequences; Megatron's format allows empty ones.
DOCUMENTS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32 - 1)


def write(prefix, documents, seed, columns=(LOSS_WEIGHTS, LOG_PROBS, REWARDS)):
    """A store of random tokens and values, and for each document [tokens, weights, log-probabilities, sequence]."""
    rng = np.random.default_rng(seed)
    written, lengths = [], [length for document in documents for length in document]
    for document in documents:
        size = sum(document)
        weights = rng.choice(np.array([0, 100, 50], dtype=np.uint8), size=size)
        sequence = np.repeat(np.arange(len(document)), document)
        written.append((rng.integers(1, 1000, size), weights, rng.normal(size=size).astype(np.float32), sequence))
    with StoreWriter(prefix, np.dtype(np.uint16), columns) as writer:
        values = {
            LOSS_WEIGHTS.name: np.concatenate([one[1] for one in written]),
            LOG_PROBS.name: np.concatenate([one[2] for one in written]),
            REWARDS.name: np.arange(len(documents), dtype=np.float64),
        }
        tokens = np.concatenate([one[0] for one in written]).astype(np.uint16)
        writer.add(tokens, np.array(lengths), values, np.array([len(document) for document in documents]))
    return Store(prefix), written


@given(documents=DOCUMENTS, seed=SEEDS)
def test_column_reads_what_the_writer_was_given(tmp_path_factory, documents, seed):
    store, written = write(tmp_path_factory.mktemp("store") / "tokens", documents, seed)
    assert store.columns == (LOSS_WEIGHTS, LOG_PROBS, REWARDS)
    chosen = Selection(store, np.arange(len(documents))[::-1])
    for index, (tokens, weights, log_probs, _) in enumerate(written):
        start, stop = len(tokens) // 3, len(tokens)
        for one, number in ((store, index), (chosen, len(documents) - 1 - index)):
            assert one.tokens(number, start, stop).tolist() == tokens[start:].tolist()
            assert one.column(LOSS_WEIGHTS.name, number, start, stop).tolist() == weights[start:].tolist()
            assert one.column(LOG_PROBS.name, number, start, stop).tolist() == log_probs[start:].tolist()
            assert one.column(REWARDS.name, number, start, stop).tolist() == [index]
    with pytest.raises(KeyError):
        store.column("nosuch", 0)


def packed(store, whole, seed):
    """All batches of an epoch, and each span with its start in the batch."""
    order = Order([store.lengths], None, SEQ_LEN, seed % 1000, whole)
    for row in range(order.num_sequences(0)):
        spans = order.sequence(row)
        batch = pack([store], spans, SEQ_LEN)
        begins = np.cumsum([0, *(spans[:, 3] - spans[:, 2])])[:-1]
        yield batch, list(zip(spans.tolist(), begins.tolist(), strict=True))


@given(documents=DOCUMENTS, seed=SEEDS, whole=st.booleans())
def test_pack_puts_column_values_at_the_tokens_they_belong_to_as_labels(tmp_path_factory, documents, seed, whole):
    store, written = write(tmp_path_factory.mktemp("store") / "tokens", documents, seed)
    num_supervised = 0
    for batch, spans in packed(store, whole, seed):
        expected = {}
        for (_, document, start, stop), begin in spans:
            tokens, weights, log_probs, sequence = written[document]
            for label in range(start + 1, min(stop + 1, len(tokens))):
                if sequence[label] == sequence[label - 1] and weights[label]:
                    expected[begin + label - 1 - start] = (tokens[label], weights[label], log_probs[label])
        count = batch.num_supervised
        places = batch.supervised[:count].tolist()
        assert places == sorted(expected)
        assert batch.supervised_labels[:count].tolist() == [expected[place][0] for place in places]
        weights = batch.supervised_weights
        found = [1.0] * count if weights is None else weights[:count].tolist()
        assert found == pytest.approx([expected[place][1] / 100 for place in places])
        (values,) = batch.supervised_columns.values()
        assert list(batch.supervised_columns) == [LOG_PROBS.name] and values.dtype == torch.float32
        assert values[:count].tolist() == [expected[place][2] for place in places]
        assert len(values) == len(batch.supervised) and not values[count:].any()
        num_supervised += count
    label_weights = [one[1][1:][one[3][1:] == one[3][:-1]] for one in written]
    assert num_supervised == sum(np.count_nonzero(weights) for weights in label_weights)


@given(documents=DOCUMENTS, seed=SEEDS, whole=st.booleans())
def test_pack_keeps_the_sequences_of_a_document_apart(tmp_path_factory, documents, seed, whole):
    store, written = write(tmp_path_factory.mktemp("store") / "tokens", documents, seed, columns=())
    for batch, spans in packed(store, whole, seed):
        owner = np.full(SEQ_LEN, -1)
        for number, ((_, document, start, stop), begin) in enumerate(spans):
            owner[begin : begin + stop - start] = 10 * number + written[document][3][start:stop]
            assert batch.tokens[begin : begin + stop - start].tolist() == written[document][0][start:stop].tolist()
        borders = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), SEQ_LEN]
        assert list(batch.bounds) == borders
        assert batch.cu_seqlens.tolist()[: len(borders)] == borders
        for begin, end in pairwise(borders):
            assert batch.positions[begin:end].tolist() == list(range(end - begin))
            within = batch.labels[begin : end - 1]
            assert torch.equal(within, batch.tokens[begin + 1 : end]) or (owner[begin] == -1)
        assert (batch.labels[owner == -1] == NO_LABEL).all()
        assert [span for span, _ in batch.pieces()] == [span for span, _ in spans]
        for (span, ids), (_, begin) in zip(batch.pieces(), spans, strict=True):
            assert ids == batch.tokens[begin : begin + span[3] - span[2]].tolist()


@given(documents=DOCUMENTS, seed=SEEDS)
def test_order_keeps_documents_of_several_sequences_whole(tmp_path_factory, documents, seed):
    store, _ = write(tmp_path_factory.mktemp("store") / "tokens", documents, seed, columns=())
    order = Order([store.lengths], None, SEQ_LEN, seed % 1000, whole=True)
    spans = np.concatenate([order.sequence(row) for row in range(order.num_sequences(0))])
    for document, sequences in enumerate(documents):
        found = spans[spans[:, 1] == document]
        assert len(found) == -(-sum(sequences) // SEQ_LEN)


def test_pack_refuses_a_column_with_different_dtypes(tmp_path):
    stores = []
    for dtype in ("float32", "float64"):
        column = Column("rewards", dtype)
        with StoreWriter(tmp_path / dtype, np.dtype(np.uint16), [column]) as writer:
            writer.add(np.arange(3, dtype=np.uint16), np.array([3]), {column.name: np.ones(3, dtype)})
        stores.append(Store(tmp_path / dtype))
    spans = np.array([[0, 0, 0, 3], [1, 0, 0, 3]])
    with pytest.raises(BadData, match="'rewards' of source 1 has dtype float64.*float32"):
        pack(stores, spans, 8)
    pack([stores[0], stores[0]], spans, 8)


def test_pack_gives_stores_without_a_column_its_default(tmp_path):
    store, _ = write(tmp_path / "tokens", [[8]], seed=0, columns=(LOG_PROBS,))
    plain = random_store(np.random.default_rng(0), [6])
    batch = pack([store, plain], np.array([[1, 0, 0, 6], [0, 0, 0, 8]]), 16)
    values = batch.supervised_columns[LOG_PROBS.name]
    assert values[:5].tolist() == [0.0] * 5
    assert values[5:12].tolist() == store.column(LOG_PROBS.name, 0)[1:].tolist()
    assert batch.supervised_weights is None


def pack_of_old(stores, spans, num_tokens):
    """Reference implementation of packing without columns and sequences."""
    tokens = np.zeros(num_tokens, dtype=np.int64)
    labels = np.full(num_tokens, NO_LABEL, dtype=np.int64)
    hundredths = np.full(num_tokens, 100, dtype=np.uint8)
    positions = np.zeros(num_tokens, dtype=np.int64)
    bounds = [0]
    for source, document, start, stop in spans.tolist():
        here, length, store = bounds[-1], stop - start, stores[source]
        past = min(stop + 1, int(store.lengths[document]))
        ids = store.documents[document][start:past]
        tokens[here : here + length] = ids[:length]
        labels[here : here + len(ids) - 1] = ids[1:]
        if store.masks is not None:
            hundredths[here : here + len(ids) - 1] = store.masks[document][start:past][1:]
        positions[here : here + length] = np.arange(length)
        bounds.append(here + length)
    if bounds[-1] < num_tokens:
        positions[bounds[-1] :] = np.arange(num_tokens - bounds[-1])
        bounds.append(num_tokens)
    padded_bounds = np.full(1 + (1 << (len(bounds) - 2).bit_length()), num_tokens, dtype=np.int32)
    padded_bounds[: len(bounds)] = bounds
    labels[hundredths == 0] = NO_LABEL
    places = np.flatnonzero(labels != NO_LABEL)
    weights = hundredths[places]
    size = max(64, -(-len(places) // 64) * 64)  # a batch without labels has padding too: every rank makes a forward

    def padded(values, padding):
        return torch.from_numpy(np.concatenate([values, np.full(size - len(values), padding, values.dtype)]))

    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "positions": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(padded_bounds),
        "bounds": tuple(bounds),
        "supervised": padded(places, 0),
        "supervised_labels": padded(labels[places], NO_LABEL),
        "supervised_weights": None if (weights == 100).all() else padded(weights.astype(np.float32) / 100, 0),
        "num_supervised": len(places),
    }


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), SEEDS, st.booleans(), st.booleans())
def test_pack_without_columns_is_bit_identical_to_the_reference(lengths, seed, whole, has_weights):
    rng = np.random.default_rng(seed)
    store = random_store(rng, lengths)
    if has_weights:
        store.masks = [rng.choice(np.array([0, 100, 50], dtype=np.uint8), size=length) for length in lengths]
    order = Order([store.lengths], None, 16, seed % 1000, whole)
    spans = np.concatenate([order.sequence(row) for row in range(min(3, order.num_sequences(0)))])
    batch = pack([store], spans, 48)
    for name, expected in pack_of_old([store], spans, 48).items():
        found = getattr(batch, name)
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype and torch.equal(found, expected), name
        else:
            assert found == expected, name
    assert not batch.supervised_columns


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage", "dtype", "name"])
def test_store_detects_broken_columns(tmp_path, damage):
    write(tmp_path / "tokens", [[3, 4], [5]], seed=0)
    declaration, values = tmp_path / "tokens.columns.json", tmp_path / "tokens.rewards.col"
    declared = json.loads(declaration.read_text())
    if damage == "cut":
        values.write_bytes(values.read_bytes()[:-1])
    elif damage == "missing":
        values.unlink()
    elif damage == "garbage":
        declaration.write_text("{")
    else:
        declared[0][damage] = "../object"
        declaration.write_text(json.dumps(declared))
    with pytest.raises(BadData, match=r"rewards\.col|columns\.json"):
        Store(tmp_path)


def test_fingerprint_depends_on_columns(tmp_path):
    prints = set()
    for name, seed, columns in (("a", 1, ()), ("b", 1, (LOSS_WEIGHTS,)), ("c", 1, (LOG_PROBS,))):
        prints.add(write(tmp_path / name, [[5], [6]], seed, columns)[0].fingerprint)
    path = tmp_path / "c.reference_log_probs.col"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert len(prints | {Store(tmp_path / "c").fingerprint}) == 4
