"""Prefetch: the same batches in order, errors at the right step, and a thread that ends."""

import threading
import time

import numpy as np
import pytest

from tests.support.memory_store import random_store
from trivium.data.batch.order import Order
from trivium.data.batch.pack import StoreBatches
from trivium.data.batch.prefetch import Prefetch


def source(num_documents: int = 200) -> StoreBatches:
    store = random_store(np.random.default_rng(0), [5 + index % 40 for index in range(num_documents)])
    return StoreBatches([store], Order([store.lengths], None, 32, seed=1, whole=True), 4, 2, None)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_prefetch_gives_the_same_batches_as_its_source(rank, world_size):
    plain = source()
    with Prefetch(source(), 3, 60, rank, world_size) as ahead:
        for step in range(3, 60):
            found, expected = ahead.next(), plain.step(step, rank, world_size)
            assert [batch.digests for batch in found] == [batch.digests for batch in expected]
            assert plain.epoch(step) == source().epoch(step)
        with pytest.raises(IndexError):
            ahead.next()


class Failing:
    """A source whose fifth step cannot be read."""

    def step(self, step: int, rank: int = 0, world_size: int = 1):
        if step == 4:
            raise OSError("the disk is gone")
        return [step]

    def epoch(self, step: int) -> float:
        return 0.0


def test_prefetch_raises_at_the_step_that_failed():
    with Prefetch(Failing(), 0, 10) as ahead:
        assert [ahead.next() for _ in range(4)] == [[0], [1], [2], [3]]
        with pytest.raises(OSError, match="disk is gone"):
            ahead.next()


def test_prefetch_ends_its_thread_and_never_reads_far_ahead():
    before = threading.active_count()
    read = []

    class Counting(Failing):
        def step(self, step: int, rank: int = 0, world_size: int = 1):
            read.append(step)
            return [step]

    with Prefetch(Counting(), 0, 10_000, depth=2) as ahead:
        ahead.next()
        deadline = time.monotonic() + 5
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4  # one taken, two waiting, one in hand
    assert threading.active_count() == before
