"""Traces of a step against the memory that torch allocates."""

import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.allocator import allocated_peak
from tests.support.trace import Trace, trace_peak
from trivium.config.run import Adapter
from trivium.measure.synthetic import synthetic_batches, synthetic_engine
from trivium.model import catalog, head, qwen
from trivium.model.shape import QwenShape
from trivium.plan.workload import Workload

SMALL = QwenShape("qwen3", 2000, 128, 384, 2, 4, 2, 32, tie_word_embeddings=True)
QWEN2 = replace(SMALL, family="qwen2")
SCRATCH: dict[str, Any] = {"weights": "random", "adapter": None}
LORA: dict[str, Any] = {"weights": "pretrained", "adapter": Adapter(rank=8), "supervised_share": 0.5}


def workload(**changes: Any) -> Workload:
    values: dict[str, Any] = {
        "shape": SMALL,
        "state_dtype": "fp32",
        "seq_len": 512,
        "micro_tokens": 512,
        "step_tokens": 512,
        "activation_checkpointing": False,
        "compute_dtype": "bf16",
        "device_type": "cpu",
        "document_tokens": 300,
    }
    return Workload(**values | changes)


CASES: dict[str, dict[str, Any]] = {
    "scratch, fp32": {**SCRATCH, "compute_dtype": "fp32"},
    "scratch, 8-bit, accumulated": {
        **SCRATCH,
        "activation_checkpointing": True,
        "state_dtype": "8bit",
        "step_tokens": 1024,
    },
    "scratch, large untied head": {**SCRATCH, "shape": replace(SMALL, vocab_size=30_000, tie_word_embeddings=False)},
    "lora, fp32, checkpointed": {**LORA, "compute_dtype": "fp32", "activation_checkpointing": True},
    "qlora, one document per sequence": {**LORA, "weights": "nf4", "shape": QWEN2, "document_tokens": None},
    "dora, dropout, trainable tokens": {
        **LORA,
        "adapter": Adapter(rank=4, dora=True, dropout=0.1),
        "num_token_rows": 2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_trace_peak_matches_allocator(name: str) -> None:
    work = workload(**CASES[name])
    assert trace_peak(work).peak_bytes == pytest.approx(allocated_peak(work), rel=0.01)


def weight_bytes(trace: Trace) -> int:
    return trace.items["weights"] + trace.items.get("frozen weights", 0)


@pytest.mark.parametrize("changes", [SCRATCH, LORA, {**LORA, "weights": "nf4"}], ids=["scratch", "lora", "qlora"])
def test_trace_peak_counts_weights_gradients_moments(changes: dict[str, Any]) -> None:
    work = workload(**changes)
    trace = trace_peak(work)
    trained = work.num_trained_params
    assert weight_bytes(trace) == 4 * trained + work.frozen_bytes
    assert sum(trace.items.values()) == trace.peak_bytes == max(trace.phases.values())
    num_tensors = len(synthetic_engine(replace(work, weights="pretrained")).parameters)
    assert trace.items["moments"] == 8 * trained + 4 * num_tensors  # and a step counter per tensor
    # The optimizer step needs little more than weights, moments and gradients.
    states = weight_bytes(trace) + trace.items["moments"] + 4 * trained
    assert states <= trace.phases["optimizer"] < 1.05 * states


def test_trace_peak_needs_little_memory() -> None:
    shape = replace(catalog.get("Qwen3-8B"), num_hidden_layers=2)
    work = workload(**LORA, shape=shape, device_type="gpu")
    trace_peak(workload(**LORA, device_type="gpu"))  # imports everything first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trace = trace_peak(work)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert weight_bytes(trace) > 3e9
    assert grown < 2e8


def test_fake_kernels_of_gpu_and_restored() -> None:
    before = qwen.attend, F.rms_norm, F.dropout, head.CPU_SLICE_VALUES
    work = workload(**LORA | {"adapter": Adapter(dropout=0.1)})
    on_cpu, on_gpu = trace_peak(work), trace_peak(replace(work, device_type="gpu"))
    assert on_gpu.phases["backward"] < on_cpu.phases["backward"]
    assert (qwen.attend, F.rms_norm, F.dropout, head.CPU_SLICE_VALUES) == before


def test_trace_peak_refuses_several_devices() -> None:
    with pytest.raises(ValueError, match="one device"):
        trace_peak(workload(**SCRATCH, num_devices=2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "changes",
    [SCRATCH, LORA, {**LORA, "activation_checkpointing": True}],
    ids=["scratch", "lora", "activation_checkpointing"],
)
def test_trace_peak_matches_gpu(changes: dict[str, Any]) -> None:
    shape = replace(catalog.get("Qwen3-0.6B"), num_hidden_layers=4)
    work = workload(**changes, shape=shape, device_type="gpu", seq_len=2048, micro_tokens=8192, step_tokens=16384)
    engine, batches = synthetic_engine(work, "cuda"), synthetic_batches(work)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        engine.forward_backward(batches)
        engine.optimizer_step(1e-5, batches)
    assert trace_peak(work).peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.03)
