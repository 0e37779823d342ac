"""Publishing: a finished partial store becomes a store, with its held-out split, report and manifest.

The partial's files are read in constant memory and not changed, so after a kill only this step is repeated.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.store.encode import HASH_BYTES
from trivium.data.store.megatron import StoreWriter
from trivium.data.store.partial import HASHES, REJECTS, Partial, SampleGroup
from trivium.files import atomic_write, fsync_directory, sha256_file

HASH_VALUES = 1 << (8 * HASH_BYTES)
HIGH_VALUES = 1 << (4 * HASH_BYTES)
BUCKET_HASHES = 1 << 21
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EXACT_LENGTH_BITS = 10
EXACT_BELOW = 1 << EXACT_LENGTH_BITS
"""Quantiles of lengths are exact below, and rounded down from here on."""
USUAL_SHARE, MAX_SMALL_SHARE, ENOUGH_HELD_OUT = 0.01, 0.1, 20


def publish(
    partial: Partial, final: Path, held_out: float | None, control_ids: Sequence[int], inputs: dict[str, Any]
) -> None:
    """Write the store of `partial` to the folder `final`, atomically.

    Args:
        partial: all documents, committed.
        final: the folder to create; must not exist.
        held_out: share of the distinct documents that go to `held_out.bin`; None to choose it by their number.
        control_ids: tokens to look for; the manifest lists those that occur in the training documents.
        inputs: everything the store depends on, for manifest.json.
    """
    folder = partial.folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_distinct, smallest, largest = count_distinct(partial.folder / HASHES)
    share = held_out_share(num_distinct) if held_out is None else held_out
    split = _Split(folder, partial, held_out_limit(share, smallest, largest), control_ids)
    tally = partial.tally
    report = {
        **tally.counts(),
        "rejected_by_reason": dict(tally.rejected_by_reason.most_common()),
        "duplicates": tally.num_samples - num_distinct,
        "text_bytes": tally.text_bytes,
        "reasoning_documents": tally.reasoning_documents,
        "supervised_tokens": tally.supervised_tokens,
        **split.counts,
        "bytes_per_token": round(tally.text_bytes / tally.num_tokens, 4),
        "tokens_per_document": split.lengths.describe(),
    }
    atomic_write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    with (partial.folder / REJECTS).open("rb") as source, (folder / REJECTS).open("wb") as target:
        shutil.copyfileobj(source, target)
        os.fsync(target.fileno())
    hashes = split.hashes | {path.name: sha256_file(path) for path in folder.iterdir() if path.name not in split.hashes}
    manifest = {
        **inputs,
        **split.counts,
        "control_tokens": sorted(split.control_tokens),
        "sha256": dict(sorted(hashes.items())),
    }
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    os.rename(folder, final)
    fsync_directory(final.parent)


def held_out_share(num_distinct: int) -> float:
    """The share to hold out by default: 1%, but about 20 documents if a tenth of the data is that many."""
    return max(USUAL_SHARE, min(MAX_SMALL_SHARE, ENOUGH_HELD_OUT / max(1, num_distinct)))


def held_out_limit(held_out: float, smallest: int, largest: int) -> int:
    """The largest high half of a hash that is held out, -1 for none.

    Splitting by content hash puts all copies of a document and all samples of a conversation on the same side; a copy
    in training would make the held-out loss too low. With two or more distinct documents, neither side is empty.
    `smallest` and `largest` are whole hashes.
    """
    if held_out == 0.0:
        return -1
    return min(max(int(held_out * HIGH_VALUES) - 1, smallest // HIGH_VALUES), largest // HIGH_VALUES - 1)


class _Split:
    """Writes tokens.* and, unless empty, held_out.*.

    Attributes:
        counts: documents and tokens of both.
        hashes: SHA-256 of the large files by name.
        lengths: of the samples.
        control_tokens: the control tokens that occur in the training documents.
    """

    def __init__(self, folder: Path, partial: Partial, limit: int, control_ids: Sequence[int]) -> None:
        self.lengths = Lengths()
        self.control_tokens: set[int] = set()
        wanted = np.array(control_ids, dtype=np.int64)
        with ExitStack() as stack:
            training, held_out = (
                stack.enter_context(StoreWriter(folder / name, partial.dtype, partial.columns))
                for name in ("tokens", "held_out")
            )
            for group in partial.groups():
                held = group.hashes[:, 0] <= np.uint64(limit) if limit >= 0 else np.zeros(len(group.hashes), bool)
                tokens = _add(training, group, ~held)
                _add(held_out, group, held)
                self.control_tokens.update(np.unique(tokens[np.isin(tokens, wanted)]).tolist())
                self.lengths.add(group.lengths)
        self.hashes = training.hashes()
        if held_out.num_documents:
            self.hashes |= held_out.hashes()
        else:
            for path in folder.glob("held_out*"):
                path.unlink()
        self.counts = {
            "documents": training.num_documents,
            "tokens": training.num_tokens,
            "held_out_documents": held_out.num_documents,
            "held_out_tokens": held_out.num_tokens,
        }


def _add(writer: StoreWriter, group: SampleGroup, chosen: np.ndarray) -> np.ndarray:
    """Append the chosen samples, bool [samples], and return their tokens."""
    chosen_tokens = np.repeat(chosen, group.lengths)
    masks = {"token": chosen_tokens, "document": chosen}
    columns = {column.name: group.columns[column.name][masks[column.per]] for column in writer.columns}
    tokens = group.tokens[chosen_tokens]
    writer.add(tokens, group.lengths[chosen], columns)
    return tokens


def count_distinct(path: Path) -> tuple[int, int, int]:
    """The exact number of distinct hashes in a file, the smallest and the largest, in constant memory.

    A file too large to sort at once is first partitioned by the leading bits of the hashes.
    """
    num_distinct, smallest, largest = 0, HASH_VALUES, -1
    for hashes in _buckets(path):
        ordered = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
        num_distinct += 1 + int((ordered[1:] != ordered[:-1]).any(axis=1).sum())
        smallest = min(smallest, _as_int(ordered[0]))
        largest = max(largest, _as_int(ordered[-1]))
    return num_distinct, smallest, largest


def _as_int(high_low: np.ndarray) -> int:
    return int(high_low[0]) << 64 | int(high_low[1])


def _buckets(path: Path) -> Iterator[np.ndarray]:
    """Yield the hashes [n, 2] uint64 in parts without common values."""
    num_hashes = path.stat().st_size // HASH_BYTES
    bits = max(0, (num_hashes // BUCKET_HASHES).bit_length())
    if bits == 0:
        if num_hashes:
            yield np.fromfile(path, ">u8").astype(np.uint64).reshape(-1, 2)
        return
    folder = path.with_suffix(".buckets")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES * BUCKET_HASHES):
            hashes = np.frombuffer(chunk, ">u8").reshape(-1, 2)
            bucket_of = hashes[:, 0] >> np.uint64(64 - bits)
            for bucket in np.unique(bucket_of):
                with (folder / str(bucket)).open("ab") as bucket_file:
                    hashes[bucket_of == bucket].tofile(bucket_file)
    for bucket_path in folder.iterdir():
        yield np.fromfile(bucket_path, ">u8").astype(np.uint64).reshape(-1, 2)
    shutil.rmtree(folder)


class Lengths:
    """Counts lengths in bounded memory: smallest, largest and mean are exact, quantiles within 0.2 %.

    Attributes:
        counts: how many there are of each length, rounded down to ten significant bits: exact below `EXACT_BELOW`.
        total: sum of all lengths.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.total = 0
        self._ends: list[int] = []

    def add(self, lengths: np.ndarray) -> None:
        """Count lengths, an integer array."""
        if not lengths.size:
            return
        _, exponent = np.frexp(lengths.astype(np.float64))
        shift = np.maximum(exponent - EXACT_LENGTH_BITS, 0)
        values, counts = np.unique((lengths >> shift) << shift, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.total += int(lengths.sum(dtype=np.int64))
        ends = [*self._ends, int(lengths.min()), int(lengths.max())]
        self._ends = [min(ends), max(ends)]

    def describe(self) -> dict[str, float]:
        """Smallest, quantiles, largest and mean length; there must be one."""
        smallest, largest = self._ends
        lengths = np.array(sorted(self.counts), dtype=np.int64)
        cumulative = np.cumsum([self.counts[length] for length in lengths.tolist()])
        quantiles = {
            f"p{round(100 * quantile):02d}": max(
                smallest, int(lengths[np.searchsorted(cumulative, quantile * cumulative[-1])])
            )
            for quantile in QUANTILES
        }
        return {"min": smallest, **quantiles, "max": largest, "mean": round(self.total / int(cumulative[-1]), 2)}
