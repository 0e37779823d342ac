"""From a finished partial store to the published one: held-out split, duplicates, lengths, hashes, one rename.

Reads the partial's files in constant memory and changes none of them, so a kill here costs only this step. Reading
rows is over by now. Imported by `build.py`.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.store.encode import HASH_BYTES
from trivium.data.store.megatron import StoreWriter, mask_prefix
from trivium.data.store.partial import HASHES, REJECTS, Group, Partial
from trivium.files import atomic_write, fsync_directory, sha256_file

HASH_VALUES = 1 << (8 * HASH_BYTES)
HIGH_VALUES = 1 << (4 * HASH_BYTES)
REASONING_FILE = "reasoning.npy"
BUCKET_HASHES = 1 << 21
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EXACT_LENGTH_BITS = 10


def publish(partial: Partial, final: Path, held_out: float, inputs: dict[str, Any]) -> None:
    """Write the store that `partial` amounts to into `final`, which appears whole or not at all.

    Args:
        partial: all documents, committed.
        final: the folder to make; must not exist.
        held_out: share of the distinct documents that go to `held_out.bin`.
        inputs: what the store was made from, for manifest.json.
    """
    folder = partial.folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_distinct, smallest, largest = count_distinct(partial.folder / HASHES)
    limit = held_out_limit(held_out, smallest, largest)
    counts, lengths, hashes = _write_split(partial, folder, limit)
    tally = partial.tally
    report = {
        "rows": tally.num_rows,
        "kept": tally.num_kept,
        "split": tally.num_split_rows,
        "rejected": tally.num_rejected,
        "rejected_by_reason": dict(tally.rejected.most_common()),
        "duplicates": tally.num_documents - num_distinct,
        "control_token_rows": tally.num_control_rows,
        "text_bytes": tally.num_text_bytes,
        "conversations": tally.num_conversations,
        "reasoning_documents": tally.num_reasoning_documents,
        "dropped_turns": tally.num_dropped_turns,
        "cut_turns": tally.num_cut_turns,
        "lost_reasoning_turns": tally.num_lost_reasoning_turns,
        "supervised_tokens": tally.num_supervised_tokens,
        **counts,
        "bytes_per_token": round(tally.num_text_bytes / tally.num_tokens, 4),
        "tokens_per_document": describe_lengths(lengths),
    }
    atomic_write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    with (partial.folder / REJECTS).open("rb") as source, (folder / REJECTS).open("wb") as target:
        shutil.copyfileobj(source, target)
        os.fsync(target.fileno())
    hashes |= {path.name: sha256_file(path) for path in folder.iterdir() if path.name not in hashes}
    manifest = {**inputs, **counts, "sha256": dict(sorted(hashes.items()))}
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    os.rename(folder, final)
    fsync_directory(final.parent)


def held_out_limit(held_out: float, smallest: int, largest: int) -> int:
    """The largest first half of a hash that is held out; documents go by their content's hash, not by chance.

    So all copies of a document, and all samples of a conversation, fall on one side (a copy in training would make the
    held-out loss a lie), the same document falls on the same side in every corpus, and no random state is needed. When
    there are two distinct documents, neither side is left empty. `smallest` and `largest` are whole hashes.
    """
    if held_out == 0.0:
        return -1
    return min(max(int(held_out * HIGH_VALUES) - 1, smallest // HIGH_VALUES), largest // HIGH_VALUES - 1)


def _write_split(partial: Partial, folder: Path, limit: int) -> tuple[dict[str, int], Counter[int], dict[str, str]]:
    """Write tokens.* and, if any, held_out.*, with their masks; give their counts, how many samples have which length,
    and hashes."""
    histogram: Counter[int] = Counter()
    reasoning: list[np.ndarray] = []
    with ExitStack() as stack:
        train, held_out = (_Pair(folder / name, partial, stack) for name in ("tokens", "held_out"))
        for group in partial.groups():
            held = _at_most(group.hashes, limit)
            train.add(group, ~held)
            held_out.add(group, held)
            reasoning.append(group.reasoning[~held])
            values, counts = np.unique(round_lengths(group.lengths), return_counts=True)
            histogram.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    hashes = train.hashes()
    if held_out.tokens.num_documents:
        hashes |= held_out.hashes()
    else:
        for path in folder.glob("held_out*"):
            path.unlink()
    if any(part.any() for part in reasoning):
        np.save(folder / REASONING_FILE, np.concatenate(reasoning).astype(bool), allow_pickle=False)
    counts = {
        "documents": train.tokens.num_documents,
        "tokens": train.tokens.num_tokens,
        "held_out_documents": held_out.tokens.num_documents,
        "held_out_tokens": held_out.tokens.num_tokens,
    }
    return counts, histogram, hashes


class _Pair:
    """A store being written, with its mask where there is one."""

    def __init__(self, prefix: Path, partial: Partial, stack: ExitStack) -> None:
        self.tokens = stack.enter_context(StoreWriter(prefix, partial.dtype))
        self.mask: StoreWriter | None = None
        if partial.has_weights:
            self.mask = stack.enter_context(StoreWriter(mask_prefix(prefix), np.dtype(np.uint8)))

    def add(self, group: Group, chosen: np.ndarray) -> None:
        """Append the chosen samples, bool [samples]."""
        chosen_tokens = np.repeat(chosen, group.lengths)
        self.tokens.add(group.tokens[chosen_tokens], group.lengths[chosen])
        if self.mask is not None and group.weights is not None:
            self.mask.add(group.weights[chosen_tokens], group.lengths[chosen])

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the large files, taken on their way out."""
        return {f"{writer.prefix.name}.bin": writer.sha256 for writer in (self.tokens, self.mask) if writer is not None}


def _at_most(hashes: np.ndarray, limit: int) -> np.ndarray:
    """Which hashes [samples, 2] have a first half of at most `limit`, bool [samples]."""
    return np.zeros(len(hashes), dtype=bool) if limit < 0 else hashes[:, 0] <= np.uint64(limit)


def count_distinct(path: Path) -> tuple[int, int, int]:
    """How many distinct hashes a file holds, and the smallest and largest; exact, in constant memory.

    A file too large to sort at once is first dealt into buckets by the hashes' leading bits.
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
    """Yield the hashes [n, 2] uint64 in parts that share no value."""
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


def round_lengths(lengths: np.ndarray) -> np.ndarray:
    """Lengths cut to their ten leading bits: exact below 1,024, within 0.2 % above, and few distinct values."""
    _, exponent = np.frexp(lengths.astype(np.float64))
    shift = np.maximum(exponent - EXACT_LENGTH_BITS, 0)
    return (lengths >> shift) << shift


def describe_lengths(histogram: Counter[int]) -> dict[str, float]:
    """Smallest, quantiles, mean and largest of a histogram of lengths."""
    lengths = np.array(sorted(histogram), dtype=np.int64)
    counts = np.array([histogram[length] for length in lengths.tolist()], dtype=np.int64)
    cumulative = np.cumsum(counts)
    quantiles = {
        f"p{round(100 * quantile):02d}": int(lengths[np.searchsorted(cumulative, quantile * cumulative[-1])])
        for quantile in QUANTILES
    }
    mean = round(float((lengths * counts).sum() / cumulative[-1]), 2)
    return {"min": int(lengths[0]), **quantiles, "max": int(lengths[-1]), "mean": mean}
