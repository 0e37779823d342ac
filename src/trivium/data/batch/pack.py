"""Packing: pieces of documents become batches on one flat token axis, with labels and positions computed on the host.

Attention never crosses documents or the sequences of one document: positions restart at each, and `bounds` marks their
ends. The label of a token is the next token of its sequence, even if that token falls outside the packed sequence.
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
from trivium.data.columns import FULL_WEIGHT, LOSS_WEIGHTS, TokenStore
from trivium.errors import BadData

NO_LABEL = -100
NO_SPANS = np.empty((0, 4), dtype=np.int64)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the packed sequences of one forward and backward pass, always N tokens including padding.

    Attributes:
        tokens: int64 [N].
        labels: int64 [N], the next token of the same sequence; NO_LABEL if there is none or it has no loss.
        positions: int64 [N], restarting at 0 with every piece of a document and every sequence in it.
        cu_seqlens: int32 [D + 1], the start of each piece and the end of the last, padded with N to a power of two.
        bounds: cu_seqlens without its padding, for attention without a varlen kernel.
        supervised: int64 [M], positions with a label, padded with 0 to a multiple of SUPERVISED_MULTIPLE.
        supervised_labels: int64 [M], their labels; NO_LABEL in the padding.
        supervised_weights: float32 [M], their loss weights, 0 in the padding; None if all are 1.
        num_supervised: number of positions with a label.
        spans: int64 [pieces, 4], (source, document, start, stop) of the tokens; none for padding.
        supervised_columns: [M] each, the other per-token columns at those labels; 0 in the padding.
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
        """Copy the tensors to a device, asynchronously if they are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy the tensors to page-locked memory, which makes copies to a GPU asynchronous."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        columns = {name: change(value) for name, value in self.supervised_columns.items()}
        return replace(self, **tensors, supervised_columns=columns)

    @property
    def total_weight(self) -> float:
        """Sum of the loss weights, the divisor of the summed loss."""
        return float(self.num_supervised if self.supervised_weights is None else self.supervised_weights.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.spans[:, 3] - self.spans[:, 2]).sum())

    def pieces(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield each span with its token ids."""
        begin = 0
        for source, document, start, stop in self.spans.tolist():
            end = begin + stop - start
            yield [source, document, start, stop], self.tokens[begin:end].tolist()
            begin = end

    @property
    def max_document_tokens(self) -> int:
        """Length of the longest piece, padding included."""
        return max(stop - start for start, stop in pairwise(self.bounds))


def pack(stores: Sequence[TokenStore], spans: np.ndarray, num_tokens: int) -> Batch:
    """Concatenate pieces of documents into a batch of `num_tokens`, padded with unsupervised tokens.

    Each sequence of a document becomes its own piece, and no label crosses into the next one.

    Raises: BadData when two stores declare a column with different dtypes.
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
    """The loss weights and every other per-token column of the stores, filled with their defaults."""
    declared = {LOSS_WEIGHTS.name: LOSS_WEIGHTS}
    for source, store in enumerate(stores):
        for column in (column for column in store.columns if column.per == "token"):
            expected = declared.setdefault(column.name, column).dtype
            if column.dtype != expected:
                raise BadData(
                    f"Column {column.name!r} of source {source} has dtype {column.dtype}, but another source or "
                    f"Trivium itself declares it as {expected}. Expected one dtype in all sources; rebuild this store "
                    f"with {expected}, or remove the source."
                )
    return {name: np.full(num_tokens, column.default, column.dtype) for name, column in declared.items()}


def _padded(values: np.ndarray, padding: int) -> torch.Tensor:
    """Pad to a multiple of SUPERVISED_MULTIPLE, at least one."""
    size = max(1, -(-len(values) // SUPERVISED_MULTIPLE)) * SUPERVISED_MULTIPLE
    padded = np.full(size, padding, dtype=values.dtype)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


class BatchSource(Protocol):
    """Training data: a pure function from the step number to micro-batches."""

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """The micro-batches of one rank in a step (counted from 0); every rank gets the same number."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        ...


@dataclass
class StoreBatches:
    """Reads token stores in their global order and packs the micro-batches of every optimizer step.

    Attributes:
        stores: the token stores, numbered as in `order`.
        order: the order of packed sequences.
        sequences_per_step: packed sequences of one optimizer step.
        sequences_per_micro_batch: packed sequences of one micro-batch; divides sequences_per_step.
        num_sequences: packed sequences of the whole run; None for no limit.
    """

    stores: Sequence[TokenStore]
    order: Order
    sequences_per_step: int
    sequences_per_micro_batch: int
    num_sequences: int | None

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """See `BatchSource`.

        Micro-batch i goes to rank i % world_size, so neither the number of ranks nor the micro-batch size changes which
        sequences a step reads. The last step of a run counted in epochs may have fewer sequences; ranks without a
        micro-batch then get one of padding, so that all ranks run the same number of forward passes.
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
    """Evaluation batches: a store's first documents, up to max_tokens, in pieces of at most seq_len tokens.

    A document is cut only if it is longer than seq_len, or is the first and longer than max_tokens.
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
    """One rank's part of a list of equal batches, padded so that every rank gets the same number."""
    missing = -len(batches) % world_size if batches else 0
    padding = [pack([], NO_SPANS, len(batches[0].tokens))] * missing if missing else []
    return [*batches, *padding][rank::world_size]


def sequence_digests(batch: Batch, num_spans: Sequence[int]) -> Iterator[str]:
    """Hex SHA-256 of each packed sequence of a batch: its spans, ids, labels and the columns at its labels.

    `num_spans`: number of spans in each sequence, in order.
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
    """A step's entry in the ledger: hex SHA-256 over the previous entry and the digests of the step's sequences.

    It does not depend on the micro-batch size or the number of ranks.
    """
    digest = hashlib.sha256(previous.encode())
    for digests in micro_batches:
        for sequence in digests:
            digest.update(bytes.fromhex(sequence))
    return digest.hexdigest()
