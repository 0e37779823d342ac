"""Rows of tokens as batches on one flat token axis, with everything the step needs computed on the host.

Documents never share context: positions restart in each, and `bounds` tells attention where each ends. The label
of a token is the next token of its own document, also where the row ends before the document does. Knows nothing
of models or devices. Used by the engine and `verify`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from trivium.data.batch.order import Order
from trivium.data.batch.sizes import SUPERVISED_MULTIPLE

NO_LABEL = -100


class TokenStore(Protocol):
    """What packing needs of a token store."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int [num_documents]."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) of a document."""
        ...

    def weights(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """Loss weights in hundredths, uint8, of the tokens [start, stop) as labels; None where all are 100."""
        ...


@dataclass(frozen=True)
class Batch:
    """One forward and backward's worth of rows, N tokens long whatever they hold.

    Attributes:
        tokens: int64 [N].
        labels: int64 [N], the next token of the same document, NO_LABEL where there is none or it carries no loss.
        positions: int64 [N], 0 at the start of every piece of a document.
        cu_seqlens: int32 [D + 1], where each piece begins and the last one ends, then N again up to a power of two.
        bounds: the same numbers without the padding, for attention without a varlen kernel.
        supervised: int64 [M], the places that have a label, then place 0 up to a multiple of SUPERVISED_MULTIPLE:
            matrix products whose size is new every time are slow.
        supervised_labels: int64 [M], their labels; NO_LABEL marks the padding.
        supervised_weights: float32 [M], their loss weights, 0 in the padding; None where all are 1.
        num_supervised: how many carry loss.
        spans: int64 [pieces, 4], (source, document, start, stop) of what was read; padding has none.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    bounds: tuple[int, ...]
    supervised: torch.Tensor
    supervised_labels: torch.Tensor
    supervised_weights: torch.Tensor | None
    num_supervised: int
    spans: np.ndarray

    @property
    def total_weight(self) -> float:
        """Sum of the loss weights: what the sum of the losses is divided by."""
        return float(self.num_supervised if self.supervised_weights is None else self.supervised_weights.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens read from documents; padding is not counted."""
        return int((self.spans[:, 3] - self.spans[:, 2]).sum())

    def pieces(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each piece of a document: its span, and the token ids that were read."""
        for span, (begin, end) in zip(self.spans.tolist(), pairwise(self.bounds), strict=False):
            yield span, self.tokens[begin:end].tolist()

    @property
    def max_document_tokens(self) -> int:
        """Length of the longest piece."""
        return max(stop - start for start, stop in pairwise(self.bounds))


def pack(stores: Sequence[TokenStore], spans: np.ndarray, num_tokens: int) -> Batch:
    """Lay pieces of documents end to end on an axis of `num_tokens`; what stays free becomes unsupervised padding."""
    tokens = np.zeros(num_tokens, dtype=np.int64)
    labels = np.full(num_tokens, NO_LABEL, dtype=np.int64)
    hundredths = np.full(num_tokens, 100, dtype=np.uint8)
    positions = np.zeros(num_tokens, dtype=np.int64)
    bounds = [0]
    for source, document, start, stop in spans.tolist():
        here, length, store = bounds[-1], stop - start, stores[source]
        past = min(stop + 1, int(store.lengths[document]))
        ids, weights = store.tokens(document, start, past), store.weights(document, start, past)
        tokens[here : here + length] = ids[:length]
        labels[here : here + len(ids) - 1] = ids[1:]
        if weights is not None:
            hundredths[here : here + len(ids) - 1] = weights[1:]
        positions[here : here + length] = np.arange(length)
        bounds.append(here + length)
    if bounds[-1] < num_tokens:
        positions[bounds[-1] :] = np.arange(num_tokens - bounds[-1])
        bounds.append(num_tokens)
    padded_bounds = np.full(1 + (1 << (len(bounds) - 2).bit_length()), num_tokens, dtype=np.int32)
    padded_bounds[: len(bounds)] = bounds
    labels[hundredths == 0] = NO_LABEL
    places = np.flatnonzero(labels != NO_LABEL)
    weights = hundredths[places]
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(padded_bounds),
        bounds=tuple(bounds),
        supervised=_padded(places, 0),
        supervised_labels=_padded(labels[places], NO_LABEL),
        supervised_weights=None if (weights == 100).all() else _padded(weights.astype(np.float32) / 100, 0),
        num_supervised=len(places),
        spans=spans,
    )


def _padded(values: np.ndarray, padding: int) -> torch.Tensor:
    """The values, and `padding` up to a multiple of SUPERVISED_MULTIPLE."""
    size = -(-len(values) // SUPERVISED_MULTIPLE) * SUPERVISED_MULTIPLE
    padded = np.full(size, padding, dtype=values.dtype)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


class Rows:
    """The micro-batches of every optimizer step.

    Args:
        stores: the token stores, in the order's numbering.
        order: the order of rows.
        rows_per_step: rows one optimizer step consumes.
        rows_per_micro_batch: rows of one forward and backward; divides rows_per_step.
        num_rows: rows of the whole run; None goes on for ever.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        order: Order,
        rows_per_step: int,
        rows_per_micro_batch: int,
        num_rows: int | None,
    ) -> None:
        self.stores = stores
        self.order = order
        self.rows_per_step = rows_per_step
        self.rows_per_micro_batch = rows_per_micro_batch
        self.num_rows = num_rows

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """The micro-batches that a rank reads in a step (counted from 0).

        All ranks together read the same rows whatever their number and the size of a micro-batch; the last step
        of a run counted in epochs may hold fewer.
        """
        first = step * self.rows_per_step
        last = first + self.rows_per_step
        if self.num_rows is not None:
            last = min(last, self.num_rows)
        starts = range(first, last, self.rows_per_micro_batch)[rank::world_size]
        return [self._micro_batch(start, min(start + self.rows_per_micro_batch, last)) for start in starts]

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        epoch, row = self.order.locate(step * self.rows_per_step)
        return epoch + row / self.order.num_rows(epoch)

    def _micro_batch(self, first: int, last: int) -> Batch:
        spans = np.concatenate([self.order.row(row) for row in range(first, last)])
        return pack(self.stores, spans, self.rows_per_micro_batch * self.order.seq_len)


def sequential_batches(store: TokenStore, batch_tokens: int, seq_len: int, max_tokens: int) -> list[Batch]:
    """A store's documents from the first on, in pieces of at most seq_len, up to max_tokens: always the same batches.

    Used for evaluation: a document is cut only where it is longer than seq_len, or alone longer than max_tokens.
    """
    batches: list[Batch] = []
    pieces: list[tuple[int, int, int, int]] = []
    filled = read = 0
    for document, whole in enumerate(np.asarray(store.lengths).tolist()):
        if read and read + whole > max_tokens:
            break
        length = min(whole, max_tokens)
        read += length
        for start in range(0, length, seq_len):
            stop = min(start + seq_len, length)
            if filled + stop - start > batch_tokens:
                batches.append(pack([store], np.array(pieces, dtype=np.int64), batch_tokens))
                pieces, filled = [], 0
            pieces.append((0, document, start, stop))
            filled += stop - start
    if pieces:
        batches.append(pack([store], np.array(pieces, dtype=np.int64), batch_tokens))
    return batches


def step_digest(previous: str, batches: Sequence[Batch]) -> str:
    """Hex SHA-256 over the digest before it and what a step read, pieces, ids and labels: a link of the run's ledger.

    The order of pieces is the order of rows, so it does not depend on the size of a micro-batch.
    """
    digest = hashlib.sha256(previous.encode())
    for batch in batches:
        digest.update(batch.spans.astype(np.int64).tobytes())
    for batch in batches:
        digest.update(batch.tokens[: batch.num_tokens].numpy().tobytes())
    for batch in batches:
        digest.update(batch.labels[: batch.num_tokens].numpy().tobytes())
    return digest.hexdigest()
