"""The order of packed sequences: complete, without repeats, deterministic, and mixed by weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.batch.order import Order, best_fit
from trivium.errors import BadData

document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(st.lists(document_lengths, min_size=1, max_size=3), st.integers(8, 40), st.integers(0, 5), st.integers(0, 3))
def test_order_reads_every_token_of_an_epoch_once(sources, seq_len, seed, epoch):
    order = Order([np.array(lengths) for lengths in sources], None, seq_len, seed)
    first = sum(order.num_sequences(e) for e in range(epoch))
    read = [np.zeros(length, dtype=int) for lengths in sources for length in lengths]
    offset = np.cumsum([0] + [len(lengths) for lengths in sources])
    sizes = []
    for row in range(first, first + order.num_sequences(epoch)):
        spans = order.sequence(row)
        sizes.append((spans[:, 3] - spans[:, 2]).sum())
        for source, document, start, stop in spans:
            read[offset[source] + document][start:stop] += 1
    assert all((counts == 1).all() for counts in read)
    assert all(size == seq_len for size in sizes[:-1]) and 0 < sizes[-1] <= seq_len


@given(document_lengths, st.integers(8, 40), st.integers(0, 1000))
def test_order_sequence_depends_only_on_its_number(lengths, seq_len, row):
    def build():
        return Order([np.array(lengths)], None, seq_len, seed=7)

    one, other = build(), build()
    for earlier in (3, 0, 17):
        other.sequence(earlier)
    assert np.array_equal(one.sequence(row), other.sequence(row))


def test_order_shuffles_epochs_and_seeds_differently():
    lengths = [np.full(200, 10)]
    order = Order(lengths, None, 100, seed=0)
    first, second = ([tuple(order.sequence(e * 20 + r)[:, 1]) for r in range(20)] for e in (0, 1))
    assert first != second
    assert first != [tuple(Order(lengths, None, 100, seed=1).sequence(r)[:, 1]) for r in range(20)]


def test_order_weights_set_the_token_shares():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(20, 200, size=3000), rng.integers(5, 50, size=400)]
    order = Order(lengths, [1.0, 3.0], 128, seed=0)
    for epoch in (0, 1, 5):
        assert order.token_shares(epoch)[1] == pytest.approx(0.75, abs=0.02)
    tokens = np.zeros(2)
    for row in range(order.num_sequences(0)):
        for source, _, start, stop in order.sequence(row):
            tokens[source] += stop - start
    assert tokens[1] / tokens.sum() == pytest.approx(order.token_shares(0)[1])


def test_order_reads_a_weighted_source_evenly_over_epochs():
    order = Order([np.full(100, 10), np.full(100, 10)], [3.0, 1.0], 50, seed=0)
    counts = np.zeros((2, 100), dtype=int)
    for epoch in range(2):
        for source in range(2):
            np.add.at(counts[source], order._documents(source, epoch), 1)
    assert (counts[0] == 3).all()
    assert (counts[1] == 1).all()


@given(document_lengths, st.integers(8, 40), st.floats(0.1, 3.9))
def test_num_sequences_in_epochs_of_a_fraction(lengths, seq_len, epochs):
    order = Order([np.array(lengths)], None, seq_len, seed=0)
    exact = epochs * order.num_sequences(0)
    assert exact - 1e-6 <= order.num_sequences_in_epochs(epochs) < exact + 1


def test_order_fingerprint_depends_on_lengths_seed_and_seq_len():
    lengths = [np.array([5, 6, 7])]
    prints = {
        Order(lengths, None, 8, 0).fingerprint(),
        Order(lengths, None, 8, 1).fingerprint(),
        Order(lengths, None, 9, 0).fingerprint(),
        Order([np.array([5, 7, 6])], None, 8, 0).fingerprint(),
    }
    assert len(prints) == 4


def test_order_refuses_a_source_without_tokens():
    with pytest.raises(BadData, match="no tokens"):
        Order([np.array([3, 4]), np.array([], dtype=int)], None, 8, 0)


@given(st.lists(document_lengths, min_size=1, max_size=3), st.integers(8, 40), st.integers(0, 5), st.integers(0, 2))
def test_order_cuts_whole_documents_only_if_too_long(sources, seq_len, seed, epoch):
    order = Order([np.array(lengths) for lengths in sources], None, seq_len, seed, whole=True)
    first = sum(order.num_sequences(e) for e in range(epoch))
    spans = [order.sequence(row) for row in range(first, first + order.num_sequences(epoch))]
    assert all(0 < (row[:, 3] - row[:, 2]).sum() <= seq_len for row in spans)
    expected = [
        (source, document, start, min(start + seq_len, length))
        for source, lengths in enumerate(sources)
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_len)
    ]
    assert sorted(map(tuple, np.concatenate(spans).tolist())) == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_leaves_no_two_sequences_that_fit_into_one(lengths):
    row_of = best_fit(lengths, 50)
    filled = np.bincount(row_of, weights=lengths)
    assert filled.max() <= 50 and filled.min() > 0
    smallest = np.sort(filled)[:2]
    assert len(filled) == 1 or smallest.sum() > 50


def test_best_fit_fills_sequences_with_short_conversations():
    lengths = np.random.default_rng(0).integers(20, 200, size=20_000)
    order = Order([lengths], None, 1024, seed=0, whole=True)
    assert lengths.sum() / (1024 * order.num_sequences(0)) > 0.995
