"""The models of a run: counts, presets, sizes in rows, and the combinations that are refused."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trivium.config.inputs import COUNT_SUFFIXES, parse_count
from trivium.config.run import METHOD_DEFAULTS, Run, with_method_defaults

MINIMAL = {"name": "x", "method": "scratch", "model": "1M", "data": "a.txt"}


def build(**values) -> Run:
    return Run.model_validate(with_method_defaults(MINIMAL | values))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("25M", 25_000_000),
        ("1.5B", 1_500_000_000),
        ("7k", 7000),
        (" 2 T ", 2 * 10**12),
        ("12", 12),
        (1e6, 10**6),
        (3, 3),
    ],
)
def test_counts(text: object, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize("value", ["M", "1e6", "-5M", "5 X", "1_000", "", 1.5, math.inf, None, [1]])
def test_what_is_no_count_is_left_as_it_is(value: object):
    assert parse_count(value) == value


@given(number=st.integers(0, 9000), suffix=st.sampled_from(sorted(COUNT_SUFFIXES)))
def test_a_count_is_its_number_times_its_suffix(number: int, suffix: str):
    assert parse_count(f"{number}{suffix}") == number * COUNT_SUFFIXES[suffix]


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_every_method_is_a_preset_that_can_be_overridden_one_by_one(method: str):
    run = build(method=method, model="some/model")
    preset = METHOD_DEFAULTS[method]
    for name, value in preset.items():
        found = run.model_dump()[name]
        assert (value.items() <= found.items()) if isinstance(value, dict) else found == value
    mixed = build(method=method, model="some/model", loss_tokens="all", optimizer={"weight_decay": 0.05})
    assert mixed.loss_tokens == "all"
    assert mixed.optimizer.weight_decay == 0.05
    assert mixed.optimizer.lr == run.optimizer.lr


def test_defaults_do_not_touch_the_values_they_are_laid_under():
    values = {"method": "scratch", "optimizer": {"beta1": 0.5}}
    with_method_defaults(values)
    assert values == {"method": "scratch", "optimizer": {"beta1": 0.5}}


def test_method_of_a_wrong_type_is_left_for_validation():
    for method in ([], {}, 5, None, "unknown"):
        assert with_method_defaults({"method": method}) == {"method": method}


@given(seq_len=st.integers(8, 20_000), rows=st.integers(1, 300))
def test_micro_batches_divide_the_step_and_fit_their_tokens(seq_len: int, rows: int):
    run = build(data={"sources": ["a"], "seq_len": seq_len}, batch={"tokens": seq_len * rows})
    assert run.sequences_per_step == rows
    assert rows % run.sequences_per_micro_batch == 0
    assert run.sequences_per_micro_batch * seq_len <= max(8192, seq_len)


@given(seq_len=st.integers(8, 5000), tokens=st.integers(1, 10**6))
def test_a_batch_that_is_not_whole_rows_names_one_that_is(seq_len: int, tokens: int):
    data = {"sources": ["a"], "seq_len": seq_len}
    if tokens % seq_len == 0:
        assert build(data=data, batch={"tokens": tokens}).batch.tokens == tokens
        return
    with pytest.raises(ValidationError) as caught:
        build(data=data, batch={"tokens": tokens})
    nearest = int(str(caught.value.errors()[0]["msg"]).rsplit(" ", 1)[1])
    assert nearest % seq_len == 0 and nearest > 0
    assert build(data=data, batch={"tokens": nearest}).batch.tokens == nearest


def test_runs_cannot_be_changed():
    run = build()
    with pytest.raises(ValidationError):
        run.seed = 3


@pytest.mark.parametrize(
    "module", ["trivium.config.run", "trivium.config.explain", "trivium.config.load", "trivium.cli.main"]
)
def test_torch_is_never_imported(module: str):
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'matplotlib'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
