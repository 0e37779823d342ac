"""A token store in memory, for tests of what only reads one."""

import numpy as np

from trivium.data.columns import LOSS_WEIGHTS, Column


class MemoryStore:
    """Documents as a list of arrays, read like `trivium.data.store.megatron.Store`."""

    def __init__(self, documents: list[np.ndarray], masks: list[np.ndarray] | None = None) -> None:
        self.documents = documents
        self.masks = masks

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self.documents], dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.documents[document][start:stop]

    @property
    def columns(self) -> tuple[Column, ...]:
        return () if self.masks is None else (LOSS_WEIGHTS,)

    def column(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        assert self.masks is not None and name == LOSS_WEIGHTS.name
        return self.masks[document][start:stop]

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        return []


def random_store(rng: np.random.Generator, lengths: list[int], vocab_size: int = 1000) -> MemoryStore:
    """Documents of the given lengths with random token ids."""
    return MemoryStore([rng.integers(0, vocab_size, size=length) for length in lengths])
