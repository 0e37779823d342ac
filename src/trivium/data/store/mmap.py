"""Padded samples as Qwen3-Coder's binarizer writes them: read for import, never written.

A set is three arrays of int32, X.input_ids.mmap, X.labels.mmap and X.lengths.mmap, each with a .shape.json beside it. A
row is a sample padded to the longest one; where its label is not the token itself but -100, nothing is learnt. Which
tokens were learnt is taken over as it is. Source: finetuning/sft/binarize_data.py of QwenLM/Qwen3-Coder. Imported
inside `data`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trivium.errors import BadData

IGNORED = -100
IDS_SUFFIX = ".input_ids.mmap"


def read_padded_mmap(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids [tokens] int32, supervised [tokens] bool) of every sample, set after set by name, without padding.

    Raises: BadData when the files are not such a set.
    """
    names = sorted(path.name.removesuffix(IDS_SUFFIX) for path in folder.glob("*" + IDS_SUFFIX))
    if not names:
        raise BadData(
            f"{folder}: holds no file *{IDS_SUFFIX}. Expected a folder that Qwen3-Coder's binarize_data.py wrote with "
            "--save_format .mmap."
        )
    for name in names:
        yield from _read_set(folder / name)


def _read_set(prefix: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ids, labels, lengths = (_open(Path(f"{prefix}.{part}.mmap")) for part in ("input_ids", "labels", "lengths"))
    if ids.shape != labels.shape or lengths.shape != (len(ids), 1):
        raise BadData(
            f"{prefix}: its ids are {ids.shape}, its labels {labels.shape} and its lengths {lengths.shape}. Expected "
            "ids and labels of one shape, and one length a sample; binarize the data again."
        )
    for number, (row_ids, row_labels, (length,)) in enumerate(zip(ids, labels, lengths, strict=True)):
        sample, label = np.array(row_ids[: max(length, 0)]), np.array(row_labels[: max(length, 0)])
        supervised = label != IGNORED
        if (
            not 0 < length <= ids.shape[1]
            or sample.min() < 0
            or not np.array_equal(sample[supervised], label[supervised])
        ):
            raise BadData(
                f"{prefix}: sample {number} of {len(ids)} has length {length}, and labels that are neither its tokens "
                f"nor {IGNORED}, or tokens below 0. Expected what the binarizer writes; binarize the data again."
            )
        yield sample, supervised


def _open(path: Path) -> np.ndarray:
    """One of the arrays, [samples, longest] int32, mapped and not read."""
    shape_path = Path(f"{path}.shape.json")
    try:
        shape = json.loads(shape_path.read_text())
        num_samples, longest = int(shape["n_samples"]), int(shape["max_len"])
        num_bytes = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(
            f"{path}: cannot be read with its {shape_path.name} ({type(error).__name__}: {error}). Expected both, as "
            "the binarizer writes them; copy the whole folder."
        ) from None
    if num_samples < 1 or longest < 1 or num_bytes != num_samples * longest * np.dtype(np.int32).itemsize:
        raise BadData(
            f"{path}: has {num_bytes:,} bytes, and {shape_path.name} speaks of {num_samples:,} samples of {longest:,} "
            "int32. Expected as many bytes as that takes; the file is cut off or not the one described."
        )
    return np.memmap(path, dtype=np.int32, mode="r", shape=(num_samples, longest))
