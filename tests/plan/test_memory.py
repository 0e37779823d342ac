"""The formulas against the allocator in a few small steps (the bench has many), and general properties."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.allocator import allocated_peak
from trivium.config.run import Adapter
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan.memory import peak_memory
from trivium.plan.workload import Workload

SMALL = QwenShape("qwen3", 3000, 128, 384, 3, 4, 2, 32, tie_word_embeddings=True)
STEP = Workload(
    SMALL,
    weights="random",
    adapter=None,
    state_dtype="fp32",
    seq_len=512,
    micro_tokens=1024,
    step_tokens=1024,
    activation_checkpointing=False,
    compute_dtype="bf16",
    device_type="cpu",
    document_tokens=200,
)
LORA: dict[str, Any] = {"weights": "pretrained", "adapter": Adapter(rank=8), "supervised_share": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "scratch": {},
    "scratch, checkpointed, accumulated": {"activation_checkpointing": True, "step_tokens": 2048},
    "scratch, fp32, untied": {"compute_dtype": "fp32", "shape": replace(SMALL, tie_word_embeddings=False)},
    "lora": LORA,
    "lora, fp32, checkpointed": LORA | {"compute_dtype": "fp32", "activation_checkpointing": True},
    "qlora, Qwen2.5, checkpointed": LORA
    | {"weights": "nf4", "activation_checkpointing": True, "shape": replace(SMALL, family="qwen2")},
    "some targets, dropout": LORA | {"adapter": Adapter(targets=["q_proj", "down_proj"], dropout=0.1)},
    "8-bit moments": {"state_dtype": "8bit", "activation_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_matches_allocator(name: str) -> None:
    work = replace(STEP, **CASES[name])
    assert peak_memory(work).allocated == pytest.approx(allocated_peak(work), rel=0.03)


steps = st.builds(
    replace,
    st.just(STEP),
    shape=st.sampled_from([SMALL, catalog.get("Qwen3-0.6B"), catalog.get("Qwen2.5-7B")]),
    device_type=st.sampled_from(["cpu", "gpu"]),
    compute_dtype=st.sampled_from(["fp32", "bf16"]),
    activation_checkpointing=st.booleans(),
    state_dtype=st.sampled_from(["fp32", "8bit"]),
    adapter=st.sampled_from([None, Adapter(), Adapter(rank=64, targets=["q_proj"])]),
    supervised_share=st.floats(0.01, 1.0),
    step_tokens=st.sampled_from([1024, 4096]),
)


@given(steps)
@settings(max_examples=60)
def test_peak_memory_is_monotonic(work: Workload) -> None:
    whole = peak_memory(work).total
    # The number of micro-batches stays the same, because accumulating gradients needs memory.
    assert peak_memory(replace(work, micro_tokens=512, step_tokens=work.step_tokens // 2)).total <= whole
    assert peak_memory(replace(work, supervised_share=0.01)).total <= whole
    # Several devices add only gathered weights and buckets.
    several = replace(work, num_devices=8, step_tokens=8 * work.step_tokens)
    added = peak_memory(several).items.get("communication", 0)
    assert peak_memory(several).total <= whole + added + 1
    zero = peak_memory(replace(several, strategy="ddp")).total
    assert zero >= whole


@given(steps)
@settings(max_examples=30)
def test_peak_memory_items_add_up(work: Workload) -> None:
    found = peak_memory(work)
    assert all(type(size) is int and size > 0 for size in found.items.values())
    assert found.total < found.high
    assert found.total == found.allocated + found.framework
