"""What the caching allocator reserves: exact where its rules leave no choice, and never too little."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.measure.allocator import MIB, CachingAllocator, reserved_bytes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([1, 10 * MIB, 33 * MIB], 46 * MIB),
    ],
)
def test_segments_have_the_documented_sizes(sizes: list[int], expected: int) -> None:
    assert reserved_bytes(enumerate(sizes)) == expected


def test_what_was_given_back_is_used_again_and_joined() -> None:
    allocator = CachingAllocator()
    parts = [allocator.take(10 * MIB // 2) for _ in range(4)]
    assert allocator.reserved_bytes == 20 * MIB
    allocator.give(parts[1])
    allocator.give(parts[3])
    assert allocator.take(9 * MIB).num_bytes == 9 * MIB and allocator.reserved_bytes == 40 * MIB  # two holes of five
    allocator.give(parts[2])
    allocator.take(15 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_the_smallest_hole_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    wide, narrow = allocator.take(40 * MIB), allocator.take(30 * MIB)
    allocator.give(wide)
    allocator.give(narrow)
    assert allocator.take(29 * MIB + MIB // 2) is narrow


@given(st.lists(st.integers(1, 64 * MIB), min_size=1, max_size=60), st.integers(0, 1000))
def test_reserved_is_never_less_than_allocated_and_twice_the_same_needs_no_more(sizes: list[int], seed: int) -> None:
    order = random.Random(seed)
    held, changes, total, peak = [], [], 0, 0
    for number, size in enumerate(sizes):
        changes.append((number, size))
        held.append(number)
        total += size
        peak = max(peak, total)
        while held and order.random() < 0.4:
            gone = held.pop(order.randrange(len(held)))
            changes.append((gone, -sizes[gone]))
            total -= sizes[gone]
    changes += [(number, -sizes[number]) for number in held]
    once = reserved_bytes(changes)
    assert once >= peak
    assert reserved_bytes(changes + changes) == once
