"""The global order of training rows: a pure function of (seed, epoch, row), whatever the number of devices.

An epoch is a list of documents, shuffled. Documents are laid end to end: row r is the tokens [r * seq_len,
(r + 1) * seq_len) of that line. Conversations stay whole: each goes to the fullest row that still has room for it.
Either way every token of an epoch is read exactly once, and the place in the data is one integer.
Reads lengths only, never a token, and knows nothing of devices. Used by `pack`, the engine and `verify`.
"""

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from trivium.errors import BadData

SPAN_FIELDS = ("source", "document", "start", "stop")
BEST_FIT_PIECES = 4096


class Layout(Protocol):
    """The rows of one epoch."""

    def row(self, row: int) -> np.ndarray:
        """The pieces of documents in a row of the epoch, int64 [pieces, 4], the columns named by SPAN_FIELDS."""
        ...


@dataclass(frozen=True)
class Line:
    """Documents end to end, cut into rows wherever a row is full.

    Attributes:
        sources, documents: which ones, in order.
        ends: where on the line each ends.
        lengths: tokens of each.
        seq_len: tokens in a row.
    """

    sources: np.ndarray
    documents: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    seq_len: int

    def row(self, row: int) -> np.ndarray:
        """See `Layout`; empty pieces are left out."""
        first = row * self.seq_len
        last = min(first + self.seq_len, int(self.ends[-1]))
        low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
        pieces = np.arange(low, high + 1)
        stops = self.ends[pieces]
        starts = stops - self.lengths[pieces]
        within = [np.maximum(first - starts, 0), np.minimum(last, stops) - starts]
        spans = np.stack([self.sources[pieces], self.documents[pieces], *within], axis=1)
        return spans[spans[:, 3] > spans[:, 2]]


@dataclass(frozen=True)
class WholePieces:
    """Pieces that are never cut, put together into rows.

    Attributes:
        spans: int64 [pieces, 4], row after row.
        borders: int64 [rows + 1], where in `spans` each row begins, and their number.
    """

    spans: np.ndarray
    borders: np.ndarray

    def row(self, row: int) -> np.ndarray:
        """See `Layout`."""
        return self.spans[self.borders[row] : self.borders[row + 1]]


def cut_to_rows(sources: np.ndarray, documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Spans [pieces, 4] of documents in order, those longer than `seq_len` in several pieces."""
    num_pieces = -(-lengths // seq_len)
    owner = np.repeat(np.arange(len(lengths)), num_pieces)
    first_piece = np.concatenate([[0], np.cumsum(num_pieces)[:-1]])
    starts = (np.arange(len(owner)) - first_piece[owner]) * seq_len
    return np.stack([sources[owner], documents[owner], starts, np.minimum(starts + seq_len, lengths[owner])], axis=1)


def best_fit(lengths: Sequence[int], seq_len: int) -> list[int]:
    """The row of each piece: longest first, into the fullest row with room for it, or a new one.

    Source: best-fit decreasing, Johnson 1973, "Near-optimal bin packing algorithms".
    """
    row_of = [0] * len(lengths)
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    num_rows = 0
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        place = bisect_left(rooms, (lengths[piece], -1))
        if place == len(rooms):
            room, row = seq_len, num_rows
            num_rows += 1
        else:
            room, row = rooms.pop(place)
        row_of[piece] = row
        insort(rooms, (room - lengths[piece], row))
    return row_of


class Order:
    """Which tokens stand in which row, for one or several mixed sources.

    Args:
        lengths: per source, the number of tokens of each document.
        weights: per source, its share of the training tokens (relative); None reads every document once an epoch.
        seq_len: tokens in a row.
        seed: of the shuffling.
        whole: a document is cut only where it is longer than a row; otherwise wherever a row is full.

    Raises: BadData when a source has no tokens.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        seq_len: int,
        seed: int,
        whole: bool = False,
    ) -> None:
        self.lengths = [np.asarray(source, dtype=np.int64) for source in lengths]
        self.seq_len = seq_len
        self.seed = seed
        self.whole = whole
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

    def _lay_out_epoch(self, epoch: int) -> Layout:
        per_source = [self._documents(source, epoch) for source in range(len(self.lengths))]
        sources = np.repeat(np.arange(len(per_source), dtype=np.int64), [len(chosen) for chosen in per_source])
        documents = np.concatenate(per_source)
        lengths = np.concatenate([lengths[chosen] for lengths, chosen in zip(self.lengths, per_source, strict=True)])
        shuffle = np.random.default_rng([self.seed, 2, epoch]).permutation(len(documents))
        sources, documents, lengths = sources[shuffle], documents[shuffle], lengths[shuffle]
        if not self.whole:
            return Line(sources, documents, np.cumsum(lengths), lengths, self.seq_len)
        return self._fit_whole(cut_to_rows(sources, documents, lengths, self.seq_len), epoch)

    def _fit_whole(self, spans: np.ndarray, epoch: int) -> WholePieces:
        """Best fit among a few thousand pieces at a time, and their rows shuffled: full ones are not all in front."""
        laid: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        for start in range(0, len(spans), BEST_FIT_PIECES):
            window = spans[start : start + BEST_FIT_PIECES]
            row_of = np.array(best_fit((window[:, 3] - window[:, 2]).tolist(), self.seq_len))
            num_rows = int(row_of.max()) + 1
            place = np.random.default_rng([self.seed, 3, epoch, start]).permutation(num_rows)[row_of]
            laid.append(window[np.argsort(place, kind="stable")])
            sizes.append(np.bincount(place, minlength=num_rows))
        return WholePieces(np.concatenate(laid), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch; one may be shorter than seq_len."""
        while len(self._rows_in_epoch) <= epoch:
            next_epoch = len(self._rows_in_epoch)
            if self.whole:
                layout = self._epoch(next_epoch)
                assert isinstance(layout, WholePieces)
                self._rows_in_epoch.append(len(layout.borders) - 1)
            else:
                self._rows_in_epoch.append(-(-sum(self._tokens_per_source(next_epoch)) // self.seq_len))
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
        return self._epoch(epoch).row(inside)

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
        digest = hashlib.sha256(repr((self.seed, self.seq_len, self.whole, self.documents_per_epoch)).encode())
        for lengths in self.lengths:
            digest.update(np.ascontiguousarray(lengths).tobytes())
        return digest.hexdigest()
