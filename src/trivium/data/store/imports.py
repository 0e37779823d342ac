"""Import the padded samples written by Qwen3-Coder's binarizer as a token store with loss weights.

A set is three int32 arrays, X.input_ids.mmap, X.labels.mmap and X.lengths.mmap, each with a .shape.json. Samples are
padded to the longest one; a label is the token itself, or -100 for no loss. Ids and labels are copied without checking
them against a chat template, and no documents are held out.
Source: finetuning/sft/binarize_data.py of QwenLM/Qwen3-Coder.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.columns import FULL_WEIGHT, LOSS_WEIGHTS
from trivium.data.rejects import Reject
from trivium.data.store.megatron import StoreWriter
from trivium.data.store.partial import REJECTS
from trivium.data.store.tally import Tally
from trivium.data.tokenizer import token_dtype
from trivium.errors import BadData, ConfigError, count_of
from trivium.files import atomic_write, fsync_directory

IGNORED = -100
IDS_SUFFIX = ".input_ids.mmap"
UNSUPERVISED = "no supervised token"


def import_padded_mmap(folder: Path, out: Path) -> dict[str, Any]:
    """Convert a folder of padded .mmap files to the store `out`, and return its report.

    Samples without a supervised token (the first token is never predicted) are rejected; `out/rejects.jsonl` lists
    them by number. A run file names the result as `store: OUT/tokens`.

    Raises: ConfigError when `out` exists, BadData when the folder has no valid set or no supervised token.
    """
    if out.exists():
        raise ConfigError(f"{out} already exists. Choose a new folder for --out; nothing is overwritten.")
    largest = max((int(ids.max()) for ids, _ in read_padded_mmap(folder)), default=0)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tally, rejects = Tally(), list[Reject]()
    with StoreWriter(partial / "tokens", token_dtype(largest + 1), [LOSS_WEIGHTS]) as writer:
        for number, (ids, supervised) in enumerate(read_padded_mmap(folder), start=1):
            if not supervised[1:].any():
                rejects.append(Reject(str(folder), number, UNSUPERVISED, ""))
                continue
            weights = supervised.astype(np.uint8) * np.uint8(FULL_WEIGHT)
            writer.add(ids.astype(writer.dtype), np.array([len(ids)]), {LOSS_WEIGHTS.name: weights})
            tally.supervised_tokens += int(supervised[1:].sum())
    tally.rejected_by_reason.update(reject.reason for reject in rejects)
    tally.num_samples = tally.conversations = writer.num_documents
    if not tally.num_samples:
        shutil.rmtree(partial)
        raise BadData(
            f"{folder}: none of the {count_of(tally.records, 'sample')} has a supervised token. Expected labels other "
            "than -100."
        )
    report = {
        **tally.counts(),
        "rejected_by_reason": dict(tally.rejected_by_reason),
        "supervised_tokens": tally.supervised_tokens,
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
    }
    (partial / REJECTS).write_text("".join(json.dumps(reject._asdict()) + "\n" for reject in rejects))
    atomic_write(partial / "report.json", json.dumps(report, indent=2) + "\n")
    os.rename(partial, out)
    fsync_directory(out.parent)
    return report


def read_padded_mmap(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids [tokens] int32, supervised [tokens] bool) of every sample without its padding, sets sorted by name.

    Raises: BadData when the files are not a valid set.
    """
    names = sorted(path.name.removesuffix(IDS_SUFFIX) for path in folder.glob("*" + IDS_SUFFIX))
    if not names:
        raise BadData(
            f"{folder} has no *{IDS_SUFFIX} file. Expected a folder written by Qwen3-Coder's binarize_data.py with "
            "--save_format .mmap."
        )
    for name in names:
        yield from _read_set(folder / name)


def _read_set(prefix: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ids, labels, lengths = (_open(Path(f"{prefix}.{part}.mmap")) for part in ("input_ids", "labels", "lengths"))
    if ids.shape != labels.shape or lengths.shape != (len(ids), 1):
        raise BadData(
            f"{prefix}: found shapes {ids.shape} for ids, {labels.shape} for labels and {lengths.shape} for lengths. "
            "Expected ids and labels of one shape, and one length per sample; binarize the data again."
        )
    for number, (padded_ids, padded_labels, (length,)) in enumerate(zip(ids, labels, lengths, strict=True)):
        sample, label = np.array(padded_ids[: max(length, 0)]), np.array(padded_labels[: max(length, 0)])
        supervised = label != IGNORED
        if (
            not 0 < length <= ids.shape[1]
            or sample.min() < 0
            or not np.array_equal(sample[supervised], label[supervised])
        ):
            raise BadData(
                f"{prefix}: sample {number} of {len(ids)} (length {length}) is invalid. "
                f"Expected 1 to {ids.shape[1]:,} tokens, none negative, and labels equal to their tokens or {IGNORED}; "
                "binarize the data again."
            )
        yield sample, supervised


def _open(path: Path) -> np.ndarray:
    """Memory-map one of the arrays, int32 [samples, longest]."""
    shape_path = Path(f"{path}.shape.json")
    try:
        shape = json.loads(shape_path.read_text())
        num_samples, longest = int(shape["n_samples"]), int(shape["max_len"])
        num_bytes = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(
            f"{path} or {shape_path.name} cannot be read ({type(error).__name__}: {error}). Expected both files as "
            "written by the binarizer; copy the whole folder again."
        ) from None
    if num_samples < 1 or longest < 1 or num_bytes != num_samples * longest * np.dtype(np.int32).itemsize:
        raise BadData(
            f"{path} has {num_bytes:,} bytes, but {shape_path.name} describes {num_samples:,} samples of {longest:,} "
            "int32. Expected the same size; copy both files again."
        )
    return np.memmap(path, dtype=np.int32, mode="r", shape=(num_samples, longest))
