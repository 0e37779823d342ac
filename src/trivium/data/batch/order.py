"""The global order of packed sequences: a pure function of (seed, epoch, number), independent of the number of devices.

An epoch is a shuffled list of documents. Documents are concatenated and cut: packed sequence n holds the tokens
[n * seq_len, (n + 1) * seq_len) of that list. Samples of conversations stay whole and are placed by best fit. Either
way, every token of an epoch is read exactly once, and one integer is the position in the data. Computing the order
reads document lengths only.
"""

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np

from trivium.errors import BadData

SPAN_FIELDS = ("source", "document", "start", "stop")
BEST_FIT_PIECES = 4096


@dataclass(frozen=True)
class ConcatAndChunk:
    """One epoch of concatenated documents, cut every `seq_len` tokens.

    Attributes:
        sources, documents: int64 [documents], source and number of each document, in order.
        ends: int64 [documents], cumulative sum of `lengths`.
        lengths: int64 [documents], tokens of each document.
        seq_len: tokens of a packed sequence.
    """

    sources: np.ndarray
    documents: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    seq_len: int

    def sequence(self, number: int) -> np.ndarray:
        """Non-empty spans of a packed sequence of the epoch, int64 [spans, 4], with the columns of SPAN_FIELDS."""
        first = number * self.seq_len
        last = min(first + self.seq_len, int(self.ends[-1]))
        low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
        pieces = np.arange(low, high + 1)
        stops = self.ends[pieces]
        starts = stops - self.lengths[pieces]
        within = [np.maximum(first - starts, 0), np.minimum(last, stops) - starts]
        spans = np.stack([self.sources[pieces], self.documents[pieces], *within], axis=1)
        return spans[spans[:, 3] > spans[:, 2]]


@dataclass(frozen=True)
class BestFit:
    """One epoch of whole documents packed by best fit.

    Attributes:
        spans: int64 [spans, 4], ordered by packed sequence.
        borders: int64 [sequences + 1], index in `spans` at which each packed sequence begins, then their number.
    """

    spans: np.ndarray
    borders: np.ndarray

    def sequence(self, number: int) -> np.ndarray:
        """Spans of a packed sequence of the epoch, int64 [spans, 4], with the columns of SPAN_FIELDS."""
        return self.spans[self.borders[number] : self.borders[number + 1]]


def cut_to_seq_len(sources: np.ndarray, documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Spans [spans, 4] of documents in order; documents longer than `seq_len` are cut into several."""
    num_pieces = -(-lengths // seq_len)
    owner = np.repeat(np.arange(len(lengths)), num_pieces)
    first_piece = np.concatenate([[0], np.cumsum(num_pieces)[:-1]])
    starts = (np.arange(len(owner)) - first_piece[owner]) * seq_len
    return np.stack([sources[owner], documents[owner], starts, np.minimum(starts + seq_len, lengths[owner])], axis=1)


def best_fit(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Assign each piece to a packed sequence: longest piece first, to the fullest sequence with room, or a new one.

    Source: best-fit decreasing, Johnson 1973, "Near-optimal bin packing algorithms".
    """
    sequence_of = [0] * len(lengths)
    rooms: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    num_sequences = 0
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        place = bisect_left(rooms, (lengths[piece], -1))
        if place == len(rooms):
            room, sequence = seq_len, num_sequences
            num_sequences += 1
        else:
            room, sequence = rooms.pop(place)
        sequence_of[piece] = sequence
        insort(rooms, (room - lengths[piece], sequence))
    return sequence_of


class Order:
    """Maps packed sequences to spans of documents, for one source or a mixture.

    Args:
        lengths: per source, the tokens of each document.
        weights: per source, its relative share of the training tokens; None reads every document once per epoch.
        seq_len: tokens of a packed sequence.
        seed: seed of the shuffling.
        whole: cut documents only if they are longer than seq_len (best fit); otherwise concatenate and cut.

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
                raise BadData(f"Source {source} has no tokens to train on. See why with: trivium data inspect FILE")
        self.documents_per_epoch = self._documents_per_epoch(weights)
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._sequences_in_epoch: list[int] = []
        self._counting = Lock()  # shared by the training loop and the prefetch thread

    def _documents_per_epoch(self, weights: Sequence[float] | None) -> list[int]:
        """Number of documents of each source in one epoch.

        With weights, an epoch has as many tokens as all sources together; each source's documents are repeated, or
        spread over several epochs, to reach its share of the tokens.
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
        """A source's documents in an epoch: the next ones of an endless stream that is reshuffled at every pass."""
        count, total = self.documents_per_epoch[source], len(self.lengths[source])
        first, last = epoch * count, (epoch + 1) * count
        chosen = []
        for turn in range(first // total, (last - 1) // total + 1):
            permutation = np.random.default_rng([self.seed, 1, source, turn]).permutation(total)
            chosen.append(permutation[max(0, first - turn * total) : last - turn * total])
        return np.concatenate(chosen)

    def _lay_out_epoch(self, epoch: int) -> ConcatAndChunk | BestFit:
        per_source = [self._documents(source, epoch) for source in range(len(self.lengths))]
        sources = np.repeat(np.arange(len(per_source), dtype=np.int64), [len(chosen) for chosen in per_source])
        documents = np.concatenate(per_source)
        lengths = np.concatenate([lengths[chosen] for lengths, chosen in zip(self.lengths, per_source, strict=True)])
        shuffle = np.random.default_rng([self.seed, 2, epoch]).permutation(len(documents))
        sources, documents, lengths = sources[shuffle], documents[shuffle], lengths[shuffle]
        if not self.whole:
            return ConcatAndChunk(sources, documents, np.cumsum(lengths), lengths, self.seq_len)
        return self._fit_whole(cut_to_seq_len(sources, documents, lengths, self.seq_len), epoch)

    def _fit_whole(self, spans: np.ndarray, epoch: int) -> BestFit:
        """Best fit over windows of BEST_FIT_PIECES, shuffled within each so that full sequences do not come first."""
        ordered: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        for start in range(0, len(spans), BEST_FIT_PIECES):
            window = spans[start : start + BEST_FIT_PIECES]
            sequence_of = np.array(best_fit((window[:, 3] - window[:, 2]).tolist(), self.seq_len))
            count = int(sequence_of.max()) + 1
            place = np.random.default_rng([self.seed, 3, epoch, start]).permutation(count)[sequence_of]
            ordered.append(window[np.argsort(place, kind="stable")])
            sizes.append(np.bincount(place, minlength=count))
        return BestFit(np.concatenate(ordered), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))

    def num_sequences(self, epoch: int) -> int:
        """Packed sequences of an epoch; some may not be full."""
        with self._counting:
            while len(self._sequences_in_epoch) <= epoch:
                self._sequences_in_epoch.append(self._count_sequences(len(self._sequences_in_epoch)))
        return self._sequences_in_epoch[epoch]

    def _count_sequences(self, epoch: int) -> int:
        if not self.whole:
            return -(-sum(self._tokens_per_source(epoch)) // self.seq_len)
        layout = self._epoch(epoch)
        assert isinstance(layout, BestFit)
        return len(layout.borders) - 1

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, number within it) of a packed sequence numbered from the start of training."""
        epoch = 0
        while number >= self.num_sequences(epoch):
            number -= self.num_sequences(epoch)
            epoch += 1
        return epoch, number

    def sequence(self, number: int) -> np.ndarray:
        """Spans of a packed sequence numbered from the start of training, int64 [spans, 4] as in SPAN_FIELDS."""
        epoch, inside = self.locate(number)
        return self._epoch(epoch).sequence(inside)

    def num_sequences_in_epochs(self, epochs: float) -> int:
        """Packed sequences of the first `epochs` epochs, rounded up for a fraction of one."""
        whole = int(epochs)
        count = sum(self.num_sequences(epoch) for epoch in range(whole))
        part = round((epochs - whole) * self.num_sequences(whole), 6)
        return count + math.ceil(part)

    def token_shares(self, epoch: int) -> list[float]:
        """Each source's actual share of an epoch's tokens."""
        per_source = self._tokens_per_source(epoch)
        return [tokens / sum(per_source) for tokens in per_source]

    def _tokens_per_source(self, epoch: int) -> list[int]:
        return [int(lengths[self._documents(source, epoch)].sum()) for source, lengths in enumerate(self.lengths)]

    def fingerprint(self) -> str:
        """Hex SHA-256 of everything the order depends on; must be the same when a run resumes."""
        digest = hashlib.sha256(repr((self.seed, self.seq_len, self.whole, self.documents_per_epoch)).encode())
        for lengths in self.lengths:
            digest.update(np.ascontiguousarray(lengths).tobytes())
        return digest.hexdigest()
