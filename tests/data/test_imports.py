"""Import: every token and label of the binarizer is in the store, or its sample is rejected."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_mmap import IGNORED, write_set
from trivium.data.store.imports import UNSUPERVISED, import_padded_mmap
from trivium.data.store.megatron import Store
from trivium.errors import BadData, ConfigError

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 150_000), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=9
)


@settings(max_examples=25)
@given(ROWS)
def test_import_stores_or_rejects_every_sample(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("binarized")
    samples = [([i for i, _ in row], [i if supervised else IGNORED for i, supervised in row]) for row in rows]
    write_set(folder, "a", samples)
    useful = [sample for sample in samples if any(label != IGNORED for label in sample[1][1:])]
    if not useful:
        with pytest.raises(BadData, match="none of the"):
            import_padded_mmap(folder, folder / "store")
        return
    report = import_padded_mmap(folder, folder / "store")
    store = Store(folder / "store" / "tokens")
    assert [store.tokens(n).tolist() for n in range(len(store))] == [ids for ids, _ in useful]
    expected = [[100 if label != IGNORED else 0 for label in labels] for _, labels in useful]
    assert [store.column("loss_weights", n).tolist() for n in range(len(store))] == expected
    assert (report["records"], report["kept"]) == (len(samples), len(useful))
    assert report["records"] == report["kept"] + report["split"] + report["rejected"]
    assert report["tokens"] == store.num_tokens
    assert report["supervised_tokens"] == sum(np.count_nonzero(weights[1:]) for weights in expected)
    refused = [json.loads(line) for line in (folder / "store" / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in refused] == [n for n, sample in enumerate(samples, start=1) if sample not in useful]
    assert report["rejected_by_reason"] == ({UNSUPERVISED: len(refused)} if refused else {})


def test_import_does_not_overwrite(tmp_path):
    write_set(tmp_path, "a", [([1, 2], [IGNORED, 2])])
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        import_padded_mmap(tmp_path, tmp_path)
