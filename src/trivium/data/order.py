"""The global order of training rows: a pure function of (seed, epoch, row), whatever the number of devices.

An epoch is a list of documents, shuffled and laid end to end; row r is the tokens [r * seq_len, (r + 1) * seq_len)
of that line. So every token of an epoch is read exactly once, and the place in the data is one integer.
Reads lengths only, never a token, and knows nothing of devices. Used by `pack`, the engine and `verify`.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from trivium.errors import BadData

SPAN_FIELDS = ("source", "document", "start", "stop")


class Order:
    """Which tokens stand in which row, for one or several mixed sources.

    Args:
        lengths: per source, the number of tokens of each document.
        weights: per source, its share of the training tokens (relative); None reads every document once an epoch.
        seq_len: tokens in a row.
        seed: of the shuffling.

    Raises: BadData when a source has no tokens.
    """

    def __init__(self, lengths: Sequence[np.ndarray], weights: Sequence[float] | None, seq_len: int, seed: int) -> None:
        self.lengths = [np.asarray(source, dtype=np.int64) for source in lengths]
        self.seq_len = seq_len
        self.seed = seed
        for source, source_lengths in enumerate(self.lengths):
            if not source_lengths.sum():
                raise BadData(f"Source {source} holds no tokens to train on. Look at it with: trivium data inspect")
        self.documents_per_epoch = self._documents_per_epoch(weights)
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._rows_in_epoch: list[int] = []

    def _documents_per_epoch(self, weights: Sequence[float] | None) -> list[int]:
        """How many documents each source gives to one epoch.

        With weights, an epoch is as long as all sources together, and each source's documents are repeated or
        spread over several epochs until its share of the tokens is the one asked for.
        """
        if weights is None:
            return [len(source) for source in self.lengths]
        num_tokens = sum(int(source.sum()) for source in self.lengths)
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        return [
            max(1, round(share * num_tokens / max(1.0, source.mean())))
            for share, source in zip(shares, self.lengths, strict=True)
        ]

    def _documents(self, source: int, epoch: int) -> np.ndarray:
        """The documents a source gives to an epoch: the next ones of its endless, pass by pass reshuffled line."""
        count, total = self.documents_per_epoch[source], len(self.lengths[source])
        first, last = epoch * count, (epoch + 1) * count
        chosen = []
        for turn in range(first // total, (last - 1) // total + 1):
            permutation = np.random.default_rng([self.seed, 1, source, turn]).permutation(total)
            chosen.append(permutation[max(0, first - turn * total) : last - turn * total])
        return np.concatenate(chosen)

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, documents, and the end of each document on the epoch's token line."""
        per_source = [self._documents(source, epoch) for source in range(len(self.lengths))]
        sources = np.repeat(np.arange(len(per_source), dtype=np.int32), [len(chosen) for chosen in per_source])
        documents = np.concatenate(per_source)
        lengths = np.concatenate([lengths[chosen] for lengths, chosen in zip(self.lengths, per_source, strict=True)])
        shuffle = np.random.default_rng([self.seed, 2, epoch]).permutation(len(documents))
        return sources[shuffle], documents[shuffle], np.cumsum(lengths[shuffle])

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch; the last one may be shorter than seq_len."""
        while len(self._rows_in_epoch) <= epoch:
            num_tokens = sum(self._tokens_per_source(len(self._rows_in_epoch)))
            self._rows_in_epoch.append(-(-num_tokens // self.seq_len))
        return self._rows_in_epoch[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """(epoch, row inside it) of a row counted from the beginning of training."""
        epoch = 0
        while row >= self.num_rows(epoch):
            row -= self.num_rows(epoch)
            epoch += 1
        return epoch, row

    def row(self, row: int) -> np.ndarray:
        """The pieces of documents in a row counted from the beginning of training.

        Returns: int64 [pieces, 4], the columns named by SPAN_FIELDS; tokens [start, stop) of each document.
        """
        epoch, inside = self.locate(row)
        sources, documents, ends = self._epoch(epoch)
        first = inside * self.seq_len
        last = min(first + self.seq_len, int(ends[-1]))
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        pieces = np.arange(low, high + 1)
        stops = ends[pieces]
        starts = stops - [self.lengths[s][d] for s, d in zip(sources[pieces], documents[pieces], strict=True)]
        columns = [sources[pieces], documents[pieces], np.maximum(first - starts, 0), np.minimum(last, stops) - starts]
        spans = np.stack(columns, axis=1)
        return spans[spans[:, 3] > spans[:, 2]]

    def num_rows_in_epochs(self, epochs: float) -> int:
        """Rows of the first `epochs` passes; a part of an epoch is rounded up to whole rows."""
        whole = int(epochs)
        rows = sum(self.num_rows(epoch) for epoch in range(whole))
        part = round((epochs - whole) * self.num_rows(whole), 6)
        return rows + math.ceil(part)

    def token_shares(self, epoch: int) -> list[float]:
        """Each source's achieved share of an epoch's tokens."""
        per_source = self._tokens_per_source(epoch)
        return [tokens / sum(per_source) for tokens in per_source]

    def _tokens_per_source(self, epoch: int) -> list[int]:
        return [int(lengths[self._documents(source, epoch)].sum()) for source, lengths in enumerate(self.lengths)]

    def fingerprint(self) -> str:
        """Hex digest of everything the order depends on; a resumed run must find the same."""
        digest = hashlib.sha256(repr((self.seed, self.seq_len, self.documents_per_epoch)).encode())
        for lengths in self.lengths:
            digest.update(np.ascontiguousarray(lengths).tobytes())
        return digest.hexdigest()
