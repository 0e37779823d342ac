"""A token store in memory, for tests of what only reads one."""

import numpy as np


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

    def weights(self, document: int, start: int, stop: int) -> np.ndarray | None:
        return None if self.masks is None else self.masks[document][start:stop]


def random_store(rng: np.random.Generator, lengths: list[int], vocab_size: int = 1000) -> MemoryStore:
    """Documents of the given lengths with random token ids."""
    return MemoryStore([rng.integers(0, vocab_size, size=length) for length in lengths])
