"""Reading padded samples of Qwen3-Coder's binarizer; damaged files are errors."""

import json
from pathlib import Path

import numpy as np
import pytest

from trivium.data.store.imports import IGNORED, read_padded_mmap
from trivium.errors import BadData

PAD = 151643


def save_mmap(path: Path, rows: list[list[int]], padding: int) -> None:
    """Like `save_mmap` of the binarizer: int32 samples padded to the longest, with a shape file."""
    longest = max(map(len, rows))
    Path(f"{path}.shape.json").write_text(json.dumps({"n_samples": len(rows), "max_len": longest}))
    array = np.memmap(path, dtype=np.int32, mode="w+", shape=(len(rows), longest))
    for index, row in enumerate(rows):
        array[index] = row + [padding] * (longest - len(row))
    array.flush()


def write_set(folder: Path, name: str, samples: list[tuple[list[int], list[int]]]) -> None:
    save_mmap(folder / f"{name}.input_ids.mmap", [ids for ids, _ in samples], PAD)
    save_mmap(folder / f"{name}.labels.mmap", [labels for _, labels in samples], IGNORED)
    save_mmap(folder / f"{name}.lengths.mmap", [[len(ids)] for ids, _ in samples], IGNORED)


def sample(seed: int) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    ids = random.integers(0, 151669, random.integers(1, 40)).tolist()
    return ids, [token if random.random() < 0.5 else IGNORED for token in ids]


def test_read_padded_mmap_gives_samples_in_order_without_padding(tmp_path):
    sets = {"b.jsonl": [sample(seed) for seed in range(20)], "a": [([PAD, PAD], [IGNORED, PAD])]}
    for name, samples in sets.items():
        write_set(tmp_path, name, samples)
    found = list(read_padded_mmap(tmp_path))
    assert [(ids.tolist(), np.where(mask, ids, IGNORED).tolist()) for ids, mask in found] == [
        *sets["a"],
        *sets["b.jsonl"],
    ]
    assert {(ids.dtype, mask.dtype) for ids, mask in found} == {(np.dtype(np.int32), np.dtype(bool))}


def write_length(folder: Path, length: int) -> None:
    np.memmap(folder / "a.lengths.mmap", dtype=np.int32, mode="r+")[1] = length


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "a.labels.mmap").unlink(), "cannot be read"),
        (lambda folder: (folder / "a.lengths.mmap.shape.json").write_text("{}"), "KeyError"),
        (lambda folder: (folder / "a.input_ids.mmap").write_bytes(b"1234"), "4 bytes"),
        (lambda folder: save_mmap(folder / "a.labels.mmap", [[1]] * 5, IGNORED), "one shape"),
        (lambda folder: write_length(folder, 0), "length 0"),
        (lambda folder: write_length(folder, 1000), "length 1000"),
        (lambda folder: save_mmap(folder / "a.labels.mmap", [[1, 2, 3], [4, 5, 7]], IGNORED), "sample 1 of 2"),
    ],
)
def test_read_padded_mmap_refuses_damaged_files(tmp_path, spoil, expected):
    write_set(tmp_path, "a", [([1, 2, 3], [IGNORED, 2, 3]), ([4, 5, 6], [4, 5, 6])])
    assert len(list(read_padded_mmap(tmp_path))) == 2
    spoil(tmp_path)
    with pytest.raises(BadData, match=expected):
        list(read_padded_mmap(tmp_path))


def test_read_padded_mmap_refuses_a_folder_without_sets(tmp_path):
    with pytest.raises(BadData, match=r"binarize_data\.py"):
        list(read_padded_mmap(tmp_path))
