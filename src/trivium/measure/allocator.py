"""What a GPU's caching allocator holds of the device while it gives out and takes back memory.

It asks the device for segments and keeps them, so more is reserved than allocated: free pieces of a segment are reused
only where a block fits. Rules of PyTorch's allocator with its default settings and room on the device; where there is
none it gives unused segments back, and a step may still fit. Used by `trace` alone.

Source: `CUDACachingAllocator.cpp` in PyTorch.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

MIB = 1 << 20
GRANULE_BYTES = 512  # sizes of blocks are multiples of this
SMALL_BYTES, SMALL_SEGMENT_BYTES = MIB, 2 * MIB  # blocks of up to the first come from segments of the second
MIDDLE_BYTES, MIDDLE_SEGMENT_BYTES = 10 * MIB, 20 * MIB
LARGE_MULTIPLE_BYTES = 2 * MIB  # a larger block has a segment of its own


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, given out or free, between its neighbours."""

    num_bytes: int
    place: int
    is_small: bool
    is_free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """The allocator of one device, in bytes.

    Attributes:
        reserved_bytes: what it holds of the device; it never gives any back.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by size, then place
        self._places = count(step=1 << 50)  # far apart: segments never touch

    def take(self, num_bytes: int) -> Block:
        """Give out the smallest free block that is large enough, or a part of a new segment."""
        num_bytes = max(GRANULE_BYTES, _round_up(num_bytes, GRANULE_BYTES))
        is_small = num_bytes <= SMALL_BYTES
        free = self._free[is_small]
        index = bisect_left(free, (num_bytes, -1))
        block = free.pop(index)[2] if index < len(free) else self._new_segment(num_bytes, is_small)
        rest = block.num_bytes - num_bytes
        if rest >= GRANULE_BYTES if is_small else rest > SMALL_BYTES:
            self._split(block, num_bytes)
        block.is_free = False
        return block

    def give(self, block: Block) -> None:
        """Take a block back and join it with its free neighbours."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                free = self._free[block.is_small]
                del free[bisect_left(free, (neighbour.num_bytes, neighbour.place))]
                block = _join(neighbour, block) if neighbour is block.before else _join(block, neighbour)
        self._keep(block)

    def _new_segment(self, num_bytes: int, is_small: bool) -> Block:
        if is_small:
            size = SMALL_SEGMENT_BYTES
        elif num_bytes < MIDDLE_BYTES:
            size = MIDDLE_SEGMENT_BYTES
        else:
            size = _round_up(num_bytes, LARGE_MULTIPLE_BYTES)
        self.reserved_bytes += size
        return Block(size, next(self._places), is_small)

    def _split(self, block: Block, num_bytes: int) -> None:
        rest = Block(block.num_bytes - num_bytes, block.place + num_bytes, block.is_small, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.num_bytes, block.after = num_bytes, rest
        self._keep(rest)

    def _keep(self, block: Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], (block.num_bytes, block.place, block))


def reserved_bytes(changes: Iterable[tuple[int, int]]) -> int:
    """What is reserved in the end, when blocks are taken and given in this order.

    changes: a block's number, and bytes more or less.
    """
    allocator = CachingAllocator()
    blocks: dict[int, Block] = {}
    for number, num_bytes in changes:
        if num_bytes > 0:
            blocks[number] = allocator.take(num_bytes)
        elif num_bytes < 0:
            allocator.give(blocks.pop(number))
    return allocator.reserved_bytes


def _round_up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


def _join(first: Block, second: Block) -> Block:
    """Two neighbours as one."""
    first.num_bytes += second.num_bytes
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
