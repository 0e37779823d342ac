"""Rules about the run's own numbers, each provoked and each at its borders."""

from dataclasses import replace

import pytest
import torch

from tests.doctor.cases import found_in, prepared_of, run_of, severity_of
from tests.support.models import byte_tokenizer, write_base
from trivium.doctor.prepared import PreparedRun
from trivium.engine.device import Machine


@pytest.fixture(scope="module")
def prepared(base, chats, tmp_path_factory) -> PreparedRun:
    return prepared_of(run_of(tmp_path_factory.mktemp("run"), chats, method="lora", model=str(base)))


def with_run(prepared: PreparedRun, **values) -> PreparedRun:
    return replace(prepared, job=replace(prepared.job, run=prepared.run.model_copy(update=values)))


def with_rate(prepared: PreparedRun, rate: float, **values) -> PreparedRun:
    return with_run(prepared, optimizer=prepared.run.optimizer.model_copy(update={"lr": rate}), **values)


@pytest.mark.parametrize(
    ("rate", "severity"), [(2e-5, "warning"), (2.1e-5, None), (2e-4, None), (2.9e-3, None), (3e-3, "warning")]
)
def test_q19_adapters_learn_in_a_range(prepared, rate, severity):
    assert severity_of(with_rate(prepared, rate), "Q19") == severity


def test_q19_large_models_need_lower_rates(prepared):
    wide = replace(prepared.job.shape, intermediate_size=1 << 18)
    layers = 3_000_000_000 // wide.num_layer_matmul_params
    large = replace(prepared, job=replace(prepared.job, shape=replace(wide, num_hidden_layers=layers + 1)))
    assert severity_of(with_rate(large, 1e-3), "Q19") == "warning"
    assert severity_of(with_rate(large, 9e-4), "Q19") is None
    assert "1e-3" not in str(severity_of(with_rate(prepared, 1e-3), "Q19"))


@pytest.mark.parametrize(("rate", "severity"), [(1e-5, None), (9e-5, None), (1e-4, "warning"), (3e-4, "warning")])
def test_q19_all_weights_of_a_pretrained_model(prepared, rate, severity):
    everything = with_rate(prepared, rate, trainable="everything", adapter=None)
    assert severity_of(everything, "Q19") == severity


@pytest.mark.parametrize(("rate", "severity"), [(1e-5, "warning"), (1e-3, None), (5e-2, "warning")])
def test_q19_random_weights(prepared, rate, severity):
    assert (
        severity_of(with_rate(prepared, rate, trainable="everything", adapter=None, weights="random"), "Q19")
        == severity
    )


@pytest.mark.parametrize(
    ("adapter", "severity"),
    [
        ({"rank": 64, "alpha": 15.0}, "warning"),
        ({"rank": 64, "alpha": 16.0}, "info"),
        ({"rank": 16}, None),
        ({"rank": 8, "alpha": 32.0}, None),
        ({"rank": 8, "alpha": 33.0}, "warning"),
        ({"rank": 64, "alpha": 16.0, "rslora": True}, None),
    ],
)
def test_q20_scaling(base, chats, tmp_path, adapter, severity):
    prepared = prepared_of(run_of(tmp_path, chats, method="lora", model=str(base), adapter=adapter))
    assert severity_of(prepared, "Q20") == severity


def test_q22_bf16_on_a_device_that_emulates_it(prepared):
    slow = Machine(torch.device("cpu"), torch.bfloat16, peak_flops=1.0, memory_bytes=8 << 30)
    asked = with_run(replace(prepared, machine=slow), precision="bf16")
    assert severity_of(asked, "Q22") == "warning"
    assert severity_of(with_run(asked, precision="auto"), "Q22") is None
    fast = replace(asked, machine=replace(slow, peak_flops=1e18))
    assert severity_of(fast, "Q22") is None


@pytest.mark.parametrize(
    ("numbers", "severity"),
    [
        ({"rope_theta": 1e4}, "warning"),
        ({"family": "llama", "rope_theta": 1e4}, None),
        ({"intermediate_size": 42}, "info"),
        ({"intermediate_size": 128}, None),
    ],
)
def test_q26_shapes_of_random_weights(texts, tmp_path, numbers, severity):
    shape = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2} | numbers
    tokenizer = {"train": {"kind": "byte", "vocab_size": 259}}
    prepared = prepared_of(run_of(tmp_path, texts, method="scratch", model={"shape": shape}, tokenizer=tokenizer))
    assert severity_of(prepared, "Q26") == severity


def test_q26_leaves_pretrained_models_alone(chats, tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "bytes")
    base = write_base(tmp_path / "base", tokenizer, intermediate_size=42, rope_theta=1e4)
    assert found_in(prepared_of(run_of(tmp_path, chats, method="full", model=str(base)))) == {}


def test_q31_sequences_beyond_the_positions(tokenizer, chats, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, max_position_embeddings=120)
    run = run_of(tmp_path, chats, method="full", model=str(base))
    assert severity_of(prepared_of(run), "Q31") == "warning"
    short = run_of(tmp_path, chats, method="full", model=str(base), data={"seq_len": 120}, batch={"tokens": 480})
    assert severity_of(prepared_of(short), "Q31") is None
