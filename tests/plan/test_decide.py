"""The choice of a method and its warnings."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config.run import METHOD_DEFAULTS
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.plan import devices
from trivium.plan.decide import decide
from trivium.plan.fit import FIT_SHARE
from trivium.plan.situation import Situation
from trivium.plan.warnings import warnings
from trivium.plan.workload import DataFacts, given_facts

HEIGHTS = {"none": 0, "adapter": 1, "full": 2, "continue": 3, "scratch": 4}
DEVICES = devices.catalog()
BIG = {"device": DEVICES["h200"], "num_devices": 64, "is_general": False}
LAPTOP = {"device": DEVICES["apple-m2"], "is_laptop": True, "is_general": False}


def pairs(count: int, **known) -> DataFacts:
    return DataFacts(count, count * 500, "conversations", 500.0, **known)


def text(num_tokens: int) -> DataFacts:
    return DataFacts(max(1, num_tokens // 1000), num_tokens, "documents", 1000.0)


# The method by amount of data, when hardware, license and max_cost allow everything.
@pytest.mark.parametrize(
    ("facts", "name", "method"),
    [
        (pairs(99), "none", None),
        (pairs(100), "adapter", "lora"),
        (pairs(9_999), "adapter", "lora"),
        (pairs(10_000), "full", "full"),
        (pairs(1_000_000), "full", "full"),
        (text(20_000), "none", None),
        (text(10**9), "continue", "continue"),
        (text(10**10), "continue", "continue"),
        (text(10**11), "scratch", "scratch"),
    ],
)
def test_decide_by_amount_of_data(facts, name, method):
    decision = decide(Situation(facts, **BIG))
    assert (decision.name, decision.method) == (name, method)
    assert not any("gap" in reason for reason in decision.reasons)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (pairs(1_000_001), "full"),
        (text(10**8), "adapter"),
        (text(10**10 + 1), "continue"),
        (text(10**11 - 1), "continue"),
    ],
)
def test_decide_reports_gaps_between_approaches(facts, name):
    decision = decide(Situation(facts, **BIG))
    assert decision.name == name and any("gap" in reason for reason in decision.reasons)


@pytest.mark.parametrize("num_pairs", [5_000, 20_000, 50_000])
def test_decide_fairy_tales_on_a_laptop(num_pairs):
    """Synthetic tales in Korean on a laptop; only the adapter may be published."""
    decision = decide(Situation(pairs(num_pairs), adapter_only=True, **LAPTOP))
    assert (decision.method, decision.model) == ("lora", "Qwen/Qwen2.5-0.5B-Instruct")
    if num_pairs >= 10_000:
        assert any("laptop" in reason and "adapter may be published" in reason for reason in decision.reasons)


def test_decide_no_training_if_general_model_works():
    for facts in (None, pairs(50_000), text(10**12)):
        decision = decide(Situation(facts, **{**BIG, "is_general": True}))
        assert (decision.name, decision.method, decision.model) == ("none", None, None)


def test_decide_adapter_on_laptop():
    assert decide(Situation(text(10**12), **LAPTOP)).method == "lora"


@pytest.mark.parametrize(("device", "method"), [("t4", "qlora"), ("a100-80", "lora")])
def test_decide_lora_or_qlora_by_memory(device, method):
    """7B needs QLoRA on 16 GB, and LoRA fits on 25 GB and more."""
    situation = Situation(pairs(5_000), False, DEVICES[device], model="Qwen/Qwen2.5-7B-Instruct")
    decision = decide(situation)
    assert (decision.method, decision.model) == (method, "Qwen/Qwen2.5-7B-Instruct")
    shape = catalog.get("Qwen2.5-7B-Instruct")
    needed = situation.least_memory(shape, method).total
    assert needed <= FIT_SHARE * DEVICES[device].memory_bytes
    if method == "qlora":  # the weights alone, in 16 bits
        assert 2 * shape.num_params > FIT_SHARE * DEVICES[device].memory_bytes


def test_decide_full_7b_needs_several_a100():
    situation = Situation(pairs(50_000), False, DEVICES["a100-80"], model="Qwen2.5-7B-Instruct")
    alone, eight = decide(situation), decide(replace(situation, num_devices=8))
    assert alone.method == "lora" and any("GiB" in reason for reason in alone.reasons)
    assert eight.method == "full"


def test_decide_limits_cost_and_time():
    """6 x parameters x tokens FLOPs at the full peak are too cheap to be possible."""
    device = DEVICES["h100-80"]
    assert device.price_per_hour is not None
    smallest = catalog.get("Qwen3-0.6B-Base").num_matmul_params
    hours = 6 * smallest * 1e11 / device.flops["bf16"] / 3600
    situation = Situation(text(10**11), False, device, 8)
    poor = decide(replace(situation, max_cost=hours * device.price_per_hour))
    assert poor.name == "continue" and any("USD" in reason for reason in poor.reasons)
    assert poor.budget_tokens is not None and 10**9 <= poor.budget_tokens < 10**11
    slow = decide(replace(situation, max_hours=hours / 8))
    assert slow.name == "continue" and any("days" in reason for reason in slow.reasons)
    rich = decide(replace(situation, max_cost=10 * hours * device.price_per_hour, max_hours=10 * hours / 8))
    assert rich.name == "scratch" and rich.budget_tokens is None


def test_decide_small_size_from_scratch():
    decision = decide(Situation(text(2 * 10**8), num_params=10**7, **LAPTOP))
    assert (decision.method, decision.model) == ("scratch", "10M")
    assert decide(Situation(text(2 * 10**8), num_params=10**7, adapter_only=True, **LAPTOP)).method == "lora"
    odd = decide(Situation(text(10**8), num_params=12_345_678)).model
    assert odd == "12345678"


def test_decide_reasoning_model_for_reasoning_data():
    reasoning = decide(Situation(pairs(5_000, reasoning_share=0.8), **LAPTOP))
    assert reasoning.model == "Qwen/Qwen3-0.6B"
    assert decide(Situation(text(10**9), **BIG)).model == "Qwen/Qwen3-8B-Base"


def test_warnings_of_common_pitfalls():
    few, little, instruct = pairs(5_000), text(10**8), "Qwen/Qwen2.5-7B-Instruct"
    assert any("below 10K LoRA" in text for text in warnings(Situation(few), "full", instruct))
    assert any("below 1B" in text and "2004.10964" in text for text in warnings(Situation(little), "continue", None))
    (format_lost,) = [text for text in warnings(Situation(little), "continue", instruct) if "conversations" in text]
    assert "Use Qwen/Qwen2.5-7B," in format_lost
    assert any("Qwen3-4B-Base" in text for text in warnings(Situation(little), "continue", "Qwen3-4B"))
    assert any("<|im_end|>" in text for text in warnings(Situation(few), "lora", "Qwen/Qwen3-4B-Base"))
    assert any("Rank 64" in text for text in warnings(Situation(few, rank=64), "lora", instruct))
    assert warnings(Situation(pairs(50_000)), "lora", instruct) == ()
    situation = Situation(text(10**9), device=DEVICES["h100-80"])
    (cost,) = warnings(situation, "scratch", "Qwen3-0.6B-Base")
    assert "FLOP" in cost and "1.7 tokens per parameter" in cost


facts = st.none() | st.builds(
    DataFacts,
    num_rows=st.integers(-1, 10**13),
    num_tokens=st.integers(-1, 10**15),
    kind=st.sampled_from(["documents", "conversations"]),
    mean_tokens=st.floats(0, 1e9),
    supervised_share=st.floats(0, 1),
    reasoning_share=st.floats(0, 1),
)
limits = st.none() | st.floats(allow_nan=True, allow_infinity=True)
situations = st.builds(
    Situation,
    facts=facts,
    is_general=st.sampled_from([None, False, True]),
    device=st.sampled_from([None, *DEVICES.values()]),
    num_devices=st.integers(0, 4096),
    is_laptop=st.booleans(),
    adapter_only=st.booleans(),
    max_cost=limits,
    max_hours=limits,
    model=st.none() | st.sampled_from(catalog.names()) | st.text(max_size=20),
    num_params=st.none() | st.integers(-1, 10**13),
    rank=st.integers(1, 512),
)


@settings(max_examples=150, deadline=None)
@given(situations)
def test_decide_any_situation(situation):
    decision = decide(situation)
    assert decision.method is None or decision.method in METHOD_DEFAULTS
    assert (decision.method is None) == (decision.name == "none") == (decision.model is None)
    assert decision.reasons and all(line.endswith(".") for line in decision.reasons)
    warnings(situation, decision.method, decision.model)
    if situation.is_general:
        assert decision.name == "none"
    if situation.adapter_only:
        assert decision.method in (None, "lora", "qlora")
    if situation.is_laptop and decision.model is not None and decision.name not in ("adapter", "none"):
        assert situation.num_params is not None  # smaller than any published model, so it fits a laptop


@settings(max_examples=150, deadline=None)
@given(situations, st.integers(2, 10**6))
def test_decide_more_data_never_lowers_approach(situation, times):
    if situation.facts is None:
        return
    more = replace(
        situation.facts, num_rows=situation.facts.num_rows * times, num_tokens=situation.facts.num_tokens * times
    )
    before, after = decide(situation), decide(replace(situation, facts=more))
    assert HEIGHTS[after.name] >= HEIGHTS[before.name]


@settings(max_examples=100, deadline=None)
@given(
    situations.filter(lambda situation: situation.max_cost is not None and situation.max_cost >= 0), st.floats(1, 1e6)
)
def test_decide_more_money_never_lowers_approach(situation, times):
    richer = replace(situation, max_cost=situation.max_cost * times)
    assert HEIGHTS[decide(richer).name] >= HEIGHTS[decide(situation).name]


@pytest.mark.parametrize(
    "known", [{}, {"num_rows": 0}, {"num_tokens": -1}, {"num_rows": 5, "mean_tokens": float("nan")}]
)
def test_given_facts_refuses_impossible(known):
    with pytest.raises(ConfigError):
        given_facts("documents", **known)
