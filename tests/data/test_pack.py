"""Packing: labels stay inside documents, no token is lost, and ranks and micro-batch size do not matter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory_store import random_store
from trivium.data.batch.order import Order
from trivium.data.batch.pack import (
    NO_LABEL,
    SUPERVISED_MULTIPLE,
    StoreBatches,
    pack,
    sequence_digests,
    sequential_batches,
    share,
    step_digest,
)

document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def batches_of(lengths, seq_len=16, sequences_per_step=4, sequences_per_micro_batch=2, num_sequences=None):
    store = random_store(np.random.default_rng(0), lengths)
    order = Order([store.lengths], None, seq_len, seed=3)
    return store, StoreBatches([store], order, sequences_per_step, sequences_per_micro_batch, num_sequences)


@given(document_lengths)
def test_pack_makes_every_token_but_the_first_a_label_once(lengths):
    store, source = batches_of(lengths)
    source.num_sequences = source.order.num_sequences(0)
    labels = []
    for step in range(-(-source.num_sequences // source.sequences_per_step)):
        for batch in source.step(step):
            labels += batch.supervised_labels[: batch.num_supervised].tolist()
    expected = [int(token) for document in store.documents for token in document[1:]]
    assert sorted(labels) == sorted(expected)


@given(document_lengths, st.integers(0, 5))
def test_pack_fills_batches_with_the_documents_of_their_spans(lengths, step):
    store, source = batches_of(lengths)
    for batch in source.step(step):
        assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (32,)
        assert batch.cu_seqlens.tolist()[: len(batch.bounds)] == list(batch.bounds)
        assert set(batch.cu_seqlens.tolist()[len(batch.bounds) :]) <= {32}
        pieces = list(zip(batch.bounds, batch.bounds[1:], strict=False))
        for (begin, end), (_, document, start, stop) in zip(pieces, batch.spans.tolist(), strict=False):
            ids = store.documents[document]
            assert batch.tokens[begin:end].tolist() == ids[start:stop].tolist()
            assert batch.positions[begin:end].tolist() == list(range(stop - start))
            following = ids[start + 1 : stop + 1].tolist()
            assert batch.labels[begin:end].tolist() == following + [NO_LABEL] * (end - begin - len(following))
        assert batch.num_tokens <= 32
        assert (batch.labels[batch.num_tokens :] == NO_LABEL).all()
        places = torch.nonzero(batch.labels != NO_LABEL)[:, 0]
        assert torch.equal(batch.supervised[: batch.num_supervised], places)
        assert torch.equal(batch.supervised_labels[: batch.num_supervised], batch.labels[places])
        assert (batch.supervised_labels[batch.num_supervised :] == NO_LABEL).all()
        assert len(batch.supervised) % SUPERVISED_MULTIPLE == 0


@given(document_lengths, st.integers(0, 6), st.integers(1, 5), st.sampled_from([None, 3, 9, 10]))
def test_step_reads_the_same_for_any_ranks_and_micro_batches(lengths, step, world_size, num_sequences):
    ledgers, spans = set(), set()
    for per_micro_batch in (1, 2, 4):
        store, source = batches_of(lengths, sequences_per_micro_batch=per_micro_batch, num_sequences=num_sequences)
        store.masks = [np.full(length, 100 if number % 3 else 50, np.uint8) for number, length in enumerate(lengths)]
        shares = [source.step(step, rank, world_size) for rank in range(world_size)]
        assert len({len(one) for one in shares}) == 1, "every rank makes as many forwards"
        in_order = [batch for micro_batches in zip(*shares, strict=True) for batch in micro_batches]
        ledgers.add(step_digest("", [batch.digests for batch in in_order]))
        spans.add(str([span for batch in in_order for span in batch.spans.tolist()]))
        for batch in in_order:
            assert len(batch.supervised) >= SUPERVISED_MULTIPLE and len(batch.tokens) == 16 * per_micro_batch
    assert len(ledgers) == len(spans) == 1


@given(document_lengths, st.integers(1, 5))
def test_share_gives_every_batch_to_one_rank_and_pads_the_rest(lengths, world_size):
    store = random_store(np.random.default_rng(0), lengths)
    batches = sequential_batches(store, 32, 16, 10_000)
    shares = [share(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(one) for one in shares}) == 1
    given = [batch for one in shares for batch in one if batch.num_tokens]
    assert sorted(map(id, given)) == sorted(map(id, batches))
    assert all(batch.num_supervised == 0 for one in shares for batch in one if not batch.num_tokens)


def test_last_step_reads_the_remaining_sequences():
    _, source = batches_of([16] * 10, sequences_per_step=4, sequences_per_micro_batch=4, num_sequences=10)
    assert [sum(batch.num_tokens for batch in source.step(step)) for step in range(4)] == [64, 64, 32, 0]


@given(document_lengths, st.integers(1, 400))
def test_sequential_batches_read_the_first_documents_whole(lengths, max_tokens):
    store = random_store(np.random.default_rng(0), lengths)
    batches = sequential_batches(store, 32, 16, max_tokens)
    spans = np.concatenate([batch.spans for batch in batches])
    documents = sorted(set(spans[:, 1].tolist()))
    assert documents == list(range(len(documents)))
    read = int((spans[:, 3] - spans[:, 2]).sum())
    assert read == min(store.lengths[documents].sum(), max_tokens)
    assert len(documents) == len(lengths) or read + lengths[len(documents)] > max_tokens


def test_digests_change_with_one_token_and_with_the_past():
    store = random_store(np.random.default_rng(0), [20, 12])
    spans = np.array([[0, 0, 0, 20], [0, 1, 0, 12]])
    before = list(sequence_digests(pack([store], spans, 32), [1, 1]))
    store.documents[1][11] += 1
    after = list(sequence_digests(pack([store], spans, 32), [1, 1]))
    assert before[0] == after[0] and before[1] != after[1]
    assert step_digest("x", [before]) == step_digest("x", [before[:1], before[1:]])
    assert len({step_digest("x", [before]), step_digest("x", [after]), step_digest("y", [before])}) == 3


@given(document_lengths, st.integers(0, 2**32 - 1))
def test_pack_supervises_labels_with_their_weights(lengths, seed):
    rng = np.random.default_rng(seed)
    store = random_store(rng, lengths)
    store.masks = [rng.choice(np.array([0, 100, 50], dtype=np.uint8), size=length) for length in lengths]
    order = Order([store.lengths], None, 64, seed=3, whole=True)
    found = []
    for row in range(order.num_sequences(0)):
        batch = pack([store], order.sequence(row), 64)
        weights = batch.supervised_weights
        count = batch.num_supervised
        hundredths = [100] * count if weights is None else (100 * weights[:count]).round().int().tolist()
        assert weights is None or (weights[count:] == 0).all()
        found += zip(batch.supervised_labels[:count].tolist(), hundredths, strict=True)
        assert batch.total_weight == pytest.approx(sum(hundredths) / 100)
    pairs = zip(store.documents, store.masks, strict=True)
    expected = [
        pair for ids, mask in pairs for pair in zip(ids[1:].tolist(), mask[1:].tolist(), strict=True) if pair[1]
    ]
    assert sorted(found) == sorted(expected)
