"""Packed sequences as batches on one flat token axis, with everything the step needs computed on the host.

Documents never share context, and neither do the sequences of one document: positions restart in each, and `bounds`
tells attention where each ends. The label of a token is the next token of its sequence, also where the packed sequence
ends before the document does.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from trivium.data.batch.order import Order
from trivium.data.batch.sizes import SUPERVISED_MULTIPLE
from trivium.data.columns import FULL_WEIGHT, LOSS_WEIGHTS, HasColumns

NO_LABEL = -100
NO_SPANS = np.empty((0, 4), dtype=np.int64)


class TokenStore(HasColumns, Protocol):
    """What packing needs of a token store."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int [num_documents]."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) of a document."""
        ...

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        """The tokens of a document, inside (start, stop), at which another of its sequences begins."""
        ...


@dataclass(frozen=True)
class Batch:
    """The packed sequences of one forward and backward, N tokens long whatever they hold.

    Attributes:
        tokens: int64 [N].
        labels: int64 [N], the next token of the same sequence, NO_LABEL where there is none or it has no loss.
        positions: int64 [N], 0 at the start of every piece of a document, and of each of its sequences.
        cu_seqlens: int32 [D + 1], where each piece begins and the last one ends, then N again up to a power of two.
        bounds: the same numbers without the padding, for attention without a varlen kernel.
        supervised: int64 [M], the places that have a label, then place 0 up to a multiple of SUPERVISED_MULTIPLE:
            matrix products of a different size each time are slow.
        supervised_labels: int64 [M], their labels; NO_LABEL marks the padding.
        supervised_weights: float32 [M], their loss weights, 0 in the padding; None where all are 1.
        num_supervised: how many places have a label.
        spans: int64 [pieces, 4], (source, document, start, stop) of what was read; padding has none.
        supervised_columns: [M] each, the values of the stores' other columns for those labels; 0 in the padding.
        digests: hex SHA-256 of each packed sequence, see `sequence_digests`; empty for evaluation.
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
    supervised_columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    digests: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device; without waiting for the copy if they are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while the host continues."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        columns = {name: change(value) for name, value in self.supervised_columns.items()}
        return replace(self, **tensors, supervised_columns=columns)

    @property
    def total_weight(self) -> float:
        """Sum of the loss weights: what the sum of the losses is divided by."""
        return float(self.num_supervised if self.supervised_weights is None else self.supervised_weights.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens read from documents; padding is not counted."""
        return int((self.spans[:, 3] - self.spans[:, 2]).sum())

    def pieces(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each span and the token ids that were read of it."""
        begin = 0
        for source, document, start, stop in self.spans.tolist():
            end = begin + stop - start
            yield [source, document, start, stop], self.tokens[begin:end].tolist()
            begin = end

    @property
    def max_document_tokens(self) -> int:
        """Length of the longest piece."""
        return max(stop - start for start, stop in pairwise(self.bounds))


def pack(stores: Sequence[TokenStore], spans: np.ndarray, num_tokens: int) -> Batch:
    """Put pieces of documents end to end on an axis of `num_tokens`; what stays free becomes unsupervised padding.

    The sequences of one document do not see each other: each becomes a piece, and no label crosses into the next one.
    """
    tokens = np.zeros(num_tokens, dtype=np.int64)
    labels = np.full(num_tokens, NO_LABEL, dtype=np.int64)
    columns = _default_columns(stores, num_tokens)
    bounds = [0]
    for source, document, start, stop in spans.tolist():
        here, length, store = bounds[-1], stop - start, stores[source]
        past = min(stop + 1, int(store.lengths[document]))
        ids = store.tokens(document, start, past)
        tokens[here : here + length] = ids[:length]
        labels[here : here + len(ids) - 1] = ids[1:]
        for column in store.columns:
            if column.per == "token":
                values = store.column(column.name, document, start, past)
                columns[column.name][here : here + len(ids) - 1] = values[1:]
        for border in store.sequence_starts(document, start, past):
            labels[here + border - start - 1] = NO_LABEL
            if border < stop:
                bounds.append(here + border - start)
        bounds.append(here + length)
    if bounds[-1] < num_tokens:
        bounds.append(num_tokens)
    positions = np.concatenate([np.arange(stop - start) for start, stop in pairwise(bounds)])
    padded_bounds = np.full(1 + (1 << (len(bounds) - 2).bit_length()), num_tokens, dtype=np.int32)
    padded_bounds[: len(bounds)] = bounds
    labels[columns[LOSS_WEIGHTS.name] == 0] = NO_LABEL
    places = np.flatnonzero(labels != NO_LABEL)
    supervised = {name: values[places] for name, values in columns.items()}
    weights = supervised.pop(LOSS_WEIGHTS.name)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(padded_bounds),
        bounds=tuple(bounds),
        supervised=_padded(places, 0),
        supervised_labels=_padded(labels[places], NO_LABEL),
        supervised_weights=None if (weights == FULL_WEIGHT).all() else _padded(weights.astype(np.float32) / 100, 0),
        num_supervised=len(places),
        spans=spans,
        supervised_columns={name: _padded(values, 0) for name, values in supervised.items()},
    )


def _default_columns(stores: Sequence[TokenStore], num_tokens: int) -> dict[str, np.ndarray]:
    """Every column per token that one of the stores has, and the loss weights in any case, filled with defaults."""
    declared = {column.name: column for store in stores for column in store.columns if column.per == "token"}
    declared[LOSS_WEIGHTS.name] = LOSS_WEIGHTS
    return {name: np.full(num_tokens, column.default, column.dtype) for name, column in declared.items()}


def _padded(values: np.ndarray, padding: int) -> torch.Tensor:
    """The values, and `padding` up to a multiple of SUPERVISED_MULTIPLE, at least one."""
    size = max(1, -(-len(values) // SUPERVISED_MULTIPLE)) * SUPERVISED_MULTIPLE
    padded = np.full(size, padding, dtype=values.dtype)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


class BatchSource(Protocol):
    """What a training loop asks of its data: the micro-batches of step n, always the same for the same n."""

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """The micro-batches that one rank reads in a step (counted from 0): as many as every other rank."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        ...


class StoreBatches:
    """Token stores in their global order, packed into the micro-batches of every optimizer step.

    Args:
        stores: the token stores, in the order's numbering.
        order: the order of packed sequences.
        sequences_per_step: packed sequences of one optimizer step.
        sequences_per_micro_batch: packed sequences of one forward and backward; divides sequences_per_step.
        num_sequences: packed sequences of the whole run; None for no end.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        order: Order,
        sequences_per_step: int,
        sequences_per_micro_batch: int,
        num_sequences: int | None,
    ) -> None:
        self.stores = stores
        self.order = order
        self.sequences_per_step = sequences_per_step
        self.sequences_per_micro_batch = sequences_per_micro_batch
        self.num_sequences = num_sequences

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """See `BatchSource`.

        All ranks together read the same sequences whatever their number and the size of a micro-batch: micro-batch i
        goes to rank i % world_size. The last step of a run counted in epochs may have fewer sequences. Where there are
        not enough micro-batches for all ranks, the last ranks get one of padding: each makes as many forwards.
        """
        first = step * self.sequences_per_step
        last = first + self.sequences_per_step
        if self.num_sequences is not None:
            last = min(last, self.num_sequences)
        starts = list(range(first, last, self.sequences_per_micro_batch))
        starts += [last] * (-len(starts) % world_size)
        return [self._micro_batch(start, last) for start in starts[rank::world_size]]

    def epoch(self, step: int) -> float:
        """See `BatchSource`."""
        epoch, sequence = self.order.locate(step * self.sequences_per_step)
        return epoch + sequence / self.order.num_sequences(epoch)

    def _micro_batch(self, start: int, last: int) -> Batch:
        stop = min(start + self.sequences_per_micro_batch, last)
        spans = [self.order.sequence(number) for number in range(start, stop)]
        batch = pack(
            self.stores, np.concatenate([NO_SPANS, *spans]), self.sequences_per_micro_batch * self.order.seq_len
        )
        return replace(batch, digests=tuple(sequence_digests(batch, [len(one) for one in spans])))


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


def share(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """One rank's part of a list of equal batches; padding where they do not divide, so that all get as many."""
    missing = -len(batches) % world_size if batches else 0
    padding = [pack([], NO_SPANS, len(batches[0].tokens))] * missing if missing else []
    return [*batches, *padding][rank::world_size]


def sequence_digests(batch: Batch, num_spans: Sequence[int]) -> Iterator[str]:
    """Hex SHA-256 of each packed sequence of a batch: its spans, ids and labels, and the columns of its labels.

    `num_spans`: how many spans each sequence has, in order.
    """
    places = batch.supervised[: batch.num_supervised].numpy()
    weights = batch.supervised_weights
    columns = [torch.ones(len(places)) if weights is None else weights]
    columns += [batch.supervised_columns[name] for name in sorted(batch.supervised_columns)]
    first = begin = 0
    for count in num_spans:
        spans = batch.spans[first : first + count]
        end = begin + int((spans[:, 3] - spans[:, 2]).sum())
        digest = hashlib.sha256(spans.astype(np.int64).tobytes())
        digest.update(batch.tokens[begin:end].numpy().tobytes())
        digest.update(batch.labels[begin:end].numpy().tobytes())
        low, high = np.searchsorted(places, [begin, end])
        for column in columns:
            digest.update(column[low:high].numpy().tobytes())
        yield digest.hexdigest()
        first, begin = first + count, end


def step_digest(previous: str, micro_batches: Sequence[Sequence[str]]) -> str:
    """A link of the run's ledger: hex SHA-256 over the link before it and the digests of a step's sequences, in order.

    It depends neither on the size of a micro-batch nor on the number of ranks: any can compute it from the digests of
    all micro-batches, and any can verify it.
    """
    digest = hashlib.sha256(previous.encode())
    for digests in micro_batches:
        for sequence in digests:
            digest.update(bytes.fromhex(sequence))
    return digest.hexdigest()
