"""FLOP counts against torch's counter, and the fit of a calibration."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trivium.config.run import Adapter
from trivium.errors import TriviumError
from trivium.measure import calibrate as calibrating
from trivium.measure.calibrate import TIMINGS, Timing, calibrate, fit, non_negative_fit
from trivium.measure.synthetic import synthetic_batches, synthetic_engine
from trivium.model.shape import QwenShape
from trivium.plan import calibration
from trivium.plan.devices import processor
from trivium.plan.speed import (
    KINDS,
    adapter_flops,
    attention_flops,
    head_flops,
    predict_speed,
    projection_flops,
    step_work,
)
from trivium.plan.workload import Workload

CPU = torch.device("cpu")
SMALL = Workload(
    shape=QwenShape("qwen3", 320, 64, 160, 3, 4, 4, 16, tie_word_embeddings=True),
    weights="random",
    adapter=None,
    state_dtype="fp32",
    seq_len=128,
    micro_tokens=256,
    step_tokens=256,
    activation_checkpointing=False,
    compute_dtype="bf16",  # in fp32 the head adds its products in place, which torch does not count
    device_type="cpu",
    document_tokens=64.0,
)
ADAPTER = Adapter(rank=8, targets=["q_proj", "v_proj", "down_proj"])


def counted_flops(workload):
    """FLOPs that torch counts in one step, with the formulas of attention added for the CPU."""
    engine, batches = synthetic_engine(workload), synthetic_batches(workload)

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(grad_out, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad_out, query, key, value)

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        engine.forward_backward(batches)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": True},
        {"supervised_share": 0.5},
        {"document_tokens": 128.0},
        {"adapter": ADAPTER, "weights": "pretrained"},
        {"adapter": ADAPTER, "weights": "pretrained", "activation_checkpointing": True, "supervised_share": 0.25},
        {"adapter": Adapter(rank=4), "weights": "nf4", "activation_checkpointing": True},
        {"adapter": Adapter(rank=4, targets=["q_proj"]), "weights": "pretrained", "activation_checkpointing": True},
        {"shape": replace(SMALL.shape, family="qwen2", tie_word_embeddings=False)},
    ],
    ids=lambda changes: "-".join(changes) or "everything",
)
def test_step_work_flops_match_torch_counter(changes):
    workload = replace(SMALL, **changes)
    # Torch counts all attention scores, twice the causal ones.
    counts = [count(workload) for count in (projection_flops, adapter_flops, head_flops, attention_flops)]
    assert sum(counts) + counts[-1] == pytest.approx(counted_flops(workload), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(2, 12),
    columns=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_non_negative_fit_is_optimal(rows, columns, seed, scale):
    """The Karush-Kuhn-Tucker conditions hold."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = non_negative_fit(matrix * scale, target) * scale
    slope = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert slope.min() > -1e-7 and np.abs(slope[x > 1e-9]).max(initial=0.0) < 1e-7


def seconds_by(rates, workload):
    return sum(term.amount * rates[term.kind] for term in step_work(workload))


def test_fit_recovers_rates():
    """The timings can tell all kinds of work apart."""
    rng = np.random.default_rng(0)
    usual = {"flops": 4e-12, "head_flops": 5e-12, "attention_flops": 1.5e-11, "attention_scores": 1e-9}
    usual |= {"bytes": 1.4e-10, "weight_bytes": 1.2e-10, "logits": 1.7e-9, "nf4_values": 1e-9, "operations": 1e-5}
    steps = [timing.workload("bf16", "cpu") for timing in TIMINGS]
    for _ in range(5):
        planted = {kind: seconds * rng.uniform(0.3, 3.0) for kind, seconds in usual.items()}
        found, error = fit(steps, [seconds_by(planted, workload) for workload in steps])
        assert found == pytest.approx(planted, rel=1e-6)
        assert error < 1e-9


def test_fit_with_noise():
    rng = np.random.default_rng(1)
    planted = dict.fromkeys(KINDS, 0.0) | {"flops": 5e-12, "head_flops": 5e-12, "bytes": 1e-10, "operations": 1e-5}
    steps = [timing.workload("bf16", "cpu") for timing in TIMINGS]
    times = [seconds_by(planted, workload) * rng.uniform(0.93, 1.07) for workload in steps]
    found, error = fit(steps, times)
    assert error < 0.2
    unseen = Timing(320, 5, 12000, tokens=768, document=192, head_dim=32).workload("bf16", "cpu")
    assert seconds_by(found, unseen) == pytest.approx(seconds_by(planted, unseen), rel=0.1)


def test_fit_without_a_kind_of_work():
    steps = [timing.workload("bf16", "cpu") for timing in TIMINGS if timing.trained != "packed"]
    found, _ = fit(steps, [1.0] * len(steps))
    assert set(found) == set(KINDS) - {"nf4_values"}


def test_fit_of_gpu_launches():
    """The smallest step is limited by launches of 5 microseconds each."""
    steps = [timing.workload("bf16", "gpu") for timing in TIMINGS]
    planted = {"flops": 2e-15, "head_flops": 2e-15, "attention_flops": 4e-15, "attention_scores": 0.0, "bytes": 1e-12}
    planted |= {"weight_bytes": 1e-12, "logits": 1e-11, "nf4_values": 2e-12, "operations": 5e-6}

    def seconds(workload):
        computing = seconds_by(planted | {"operations": 0.0}, workload)
        return max(computing, seconds_by(planted, workload) - computing)

    found, error = fit(steps, [seconds(workload) for workload in steps])
    assert found["operations"] == pytest.approx(5e-6)
    assert found["flops"] == pytest.approx(2e-15, rel=0.05)
    assert error < 0.05


def test_calibrate_refuses_contradicting_timings(monkeypatch):
    """The same step takes one second, then ten."""
    timing = Timing(32, 1, 64, tokens=32, document=16, head_dim=16)
    seconds = iter([1.0, 10.0])
    monkeypatch.setattr(calibrating, "TIMINGS", (timing, timing))
    monkeypatch.setattr(calibrating, "measure_step", lambda workload, device: next(seconds))
    with pytest.raises(TriviumError, match="contradict each other"):
        calibrate(device="cpu")


def test_calibrate_this_machine(tmp_path, monkeypatch):
    """Steps this small are not accurate; bench/speed.py checks the accuracy."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path))
    timings = (Timing(32, 1, 64, tokens=32, document=16, head_dim=16), Timing(32, 2, 64, 32, 32, 16, trained="adapter"))
    monkeypatch.setattr(calibrating, "TIMINGS", timings)
    monkeypatch.setattr(calibrating, "SECONDS_PER_TIMING", 0.0)
    monkeypatch.setattr(calibrating, "MAX_ERROR", float("inf"))
    notes = []
    found = calibrate(notes.append, "cpu")
    assert found.device == processor().name and found.num_threads == torch.get_num_threads()
    assert "fp32" in found.seconds_per_unit and notes[0] == "fp32: step 1 of 2"
    calibration.save(found)
    assert calibration.load() == found
    workload = TIMINGS[1].workload("fp32", "cpu")
    predicted = predict_speed(workload, processor(), calibration.load())
    assert predicted.seconds_per_step > 0.0 and predicted != predict_speed(workload, processor())
