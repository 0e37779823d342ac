"""Speed and cost against published measurements, general properties, and the calibration file."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config.run import Adapter
from trivium.engine.metrics import training_flops
from trivium.errors import ConfigError
from trivium.measure.synthetic import synthetic_batches
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan import calibration, devices
from trivium.plan.calibration import Calibration
from trivium.plan.cost import cost, dollars
from trivium.plan.speed import (
    KINDS,
    attention_flops,
    communication_seconds,
    head_flops,
    predict_speed,
    projection_flops,
    step_work,
)
from trivium.plan.workload import Workload

QWEN_7B = QwenShape("qwen2", 151936, 4096, 11008, 32, 32, 32, 128, tie_word_embeddings=False)  # the first Qwen
DEVICES = {
    name: devices._device(name, entry, devices.CATALOG_FILE)
    for name, entry in devices._read(devices.CATALOG_FILE).items()
}
TINY = QwenShape("qwen3", 512, 64, 192, 2, 4, 2, 16, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path))
    return tmp_path


def step(shape=TINY, **values):
    """A step of full fine-tuning on a GPU, or what `values` say."""
    numbers = {"weights": "pretrained", "adapter": None, "state_dtype": "fp32", "seq_len": 256, "micro_tokens": 256}
    numbers |= {"step_tokens": values.get("micro_tokens", 256), "activation_checkpointing": False}
    return Workload(shape, **(numbers | {"compute_dtype": "bf16", "device_type": "gpu"} | values))


def full_row(name, seq_len, micro_tokens, micro_batches=4, **values):
    shape = catalog.get(name)
    return step(shape, seq_len=seq_len, micro_tokens=micro_tokens, step_tokens=micro_batches * micro_tokens, **values)


# Seconds of a step of eight micro-batches of LoRA, with checkpointing, on an A100-80. Source: github.com/QwenLM/Qwen,
# README, "Profiling of Memory and Speed". Its row for 256 tokens is left out: that stack launches far more operations.
QWEN_7B_LORA_A100 = {512: 1.5, 1024: 2.8, 2048: 5.2, 4096: 10.1, 8192: 21.3}


@pytest.mark.parametrize(("seq_len", "seconds"), QWEN_7B_LORA_A100.items())
def test_predict_speed_published_lora(seq_len, seconds):
    work = step(
        QWEN_7B,
        adapter=Adapter(rank=64),
        activation_checkpointing=True,
        seq_len=seq_len,
        micro_tokens=seq_len,
        step_tokens=8 * seq_len,
    )
    speed = predict_speed(work, DEVICES["a100-80"])
    assert speed.seconds_per_step == pytest.approx(seconds, rel=0.2)
    assert speed.low < seconds < speed.high


# Tokens a second of one GPU, of stacks that fuse less or more than this engine does: LoRA of NeMo AutoModel
# (docs/performance-summary.mdx) and of Surogate's comparison (docs/reference/benchmarks.md: Unsloth), all weights of
# llmq (benchmarks/H100x1.md and 4090x1.md), which is written in CUDA and keeps bf16 weights.
PUBLISHED = {
    "AutoModel LoRA 7B": (full_row("Qwen2.5-7B", 4096, 8192, 16, adapter=Adapter(rank=16)), "h100-80", 14_110),
    "Unsloth LoRA 8B": (full_row("Qwen3-8B", 2048, 4096, adapter=Adapter(rank=16)), "h200", 9_100),
    "Unsloth LoRA 8B, 5090": (full_row("Qwen3-8B", 2048, 4096, adapter=Adapter(rank=16)), "rtx-5090", 3_500),
    "llmq 7B": (full_row("Qwen2.5-7B", 1024, 4096, 32), "h100-80", 13_850),
    "llmq 0.5B": (full_row("Qwen2.5-0.5B", 1024, 32768), "h100-80", 149_000),
    "llmq 1.5B, 4090": (full_row("Qwen2.5-1.5B", 1024, 4096, 16), "rtx-4090", 14_100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_predict_speed_of_other_stacks(name):
    work, device, measured = PUBLISHED[name]
    assert 1 / 1.8 < predict_speed(work, DEVICES[device]).tokens_per_second / measured < 1.8


def test_predict_speed_utilization_of_large_models():
    """All weights of a 7B model on A100s: llm-foundry publishes 52 to 62% of the peak, by its non-causal count."""
    work = full_row("Qwen2.5-7B", 2048, 16384, 8)
    used = 6 * work.shape.num_matmul_params + 12 * 28 * 28 * 128 * 2048
    speed = predict_speed(work, DEVICES["a100-80"])
    assert 0.4 < used * speed.tokens_per_second / 312e12 < 0.65


def test_projection_flops_of_adapter_are_two_thirds():
    """4 instead of 6 FLOPs a parameter and token, because only the weight gradients are saved."""
    full, adapted = (step(QWEN_7B, micro_tokens=4096, adapter=kind) for kind in (None, Adapter()))
    assert projection_flops(adapted) / projection_flops(full) == pytest.approx(2 / 3, rel=0.01)
    recomputed = projection_flops(replace(adapted, activation_checkpointing=True))
    assert recomputed / projection_flops(adapted) == pytest.approx(3 / 2, rel=0.01)


def test_step_work_flops_match_the_engines_mfu():
    """The same but for attention scores, which are computed again in the backward and not part of the MFU."""
    work = step(supervised_share=0.5, document_tokens=64.0, micro_tokens=512, seq_len=256)
    batches = synthetic_batches(work)
    assert sum(batch.num_supervised for batch in batches) == 256
    found = projection_flops(work) + head_flops(work) + attention_flops(work) * 6 / 7
    assert found == pytest.approx(sum(training_flops(work.shape, batch) for batch in batches), rel=0.001)


works = st.builds(
    step,
    st.sampled_from([TINY, catalog.get("Qwen3-0.6B"), QWEN_7B]),
    adapter=st.sampled_from([None, Adapter(), Adapter(rank=64, dora=True, targets=["q_proj", "down_proj"])]),
    weights=st.sampled_from(["pretrained", "nf4"]),
    seq_len=st.just(512),
    micro_tokens=st.sampled_from([512, 2048]),
    step_tokens=st.sampled_from([2048, 65536]),
    activation_checkpointing=st.booleans(),
    supervised_share=st.sampled_from([0.1, 1.0]),
    document_tokens=st.sampled_from([None, 100.0]),
    device_type=st.sampled_from(["cpu", "gpu"]),
    num_devices=st.sampled_from([1, 4, 16]),
    strategy=st.sampled_from(["ddp", "fsdp2", "zero2", "zero3"]),
    offload=st.sampled_from(["none", "optimizer", "all"]),
)


@settings(max_examples=100, deadline=None)
@given(work=works, device=st.sampled_from(list(DEVICES.values())))
def test_predict_speed_items_add_up(work, device):
    speed = predict_speed(work, device)
    assert 0 < speed.low < speed.seconds_per_step < speed.high < math.inf
    assert sum(speed.items.values()) == pytest.approx(speed.seconds_per_step)
    assert all(seconds > 0 for seconds in speed.items.values())
    assert {term.kind for term in step_work(work)} <= set(KINDS)


@settings(max_examples=60, deadline=None)
@given(work=works, device=st.sampled_from([DEVICES["a100-80"], DEVICES["cpu-laptop"]]))
def test_predict_speed_more_work_takes_longer(work, device):
    def seconds(**changes):
        return predict_speed(replace(work, **changes), device).seconds_per_step * (1 + 1e-9)

    assert seconds(activation_checkpointing=True) >= seconds(activation_checkpointing=False) / (1 + 1e-9)
    assert seconds(supervised_share=1.0) >= seconds(supervised_share=0.1) / (1 + 1e-9)


def test_predict_speed_documents_bound_attention():
    whole, cut = step(micro_tokens=4096, seq_len=4096), step(micro_tokens=4096, seq_len=4096, document_tokens=128.0)
    device = DEVICES["a100-80"]
    ratio = predict_speed(whole, device).items["attention"] / predict_speed(cut, device).items["attention"]
    assert ratio == pytest.approx(32)


def test_communication_seconds_match_zero_paper():
    """Rajbhandari et al. 2020: sharding weights sends half as much again as an all-reduce, when types are the same."""
    work = step(compute_dtype="fp32", num_devices=8, step_tokens=8 * 256)
    device = DEVICES["h100-80"]
    sent = {name: communication_seconds(replace(work, strategy=name), device) for name in ("ddp", "zero2", "zero3")}
    assert sent["zero2"] == pytest.approx(sent["ddp"])
    assert sent["zero3"] == pytest.approx(1.5 * sent["ddp"])
    assert communication_seconds(replace(work, num_devices=1), device) == 0.0


def test_predict_speed_of_more_devices():
    work = full_row("Qwen3-8B", 2048, 4096, 8, strategy="fsdp2")
    speeds = [
        predict_speed(replace(work, num_devices=count, step_tokens=count * work.step_tokens), DEVICES["h100-80"])
        for count in (1, 8, 64)
    ]
    paces = [speed.tokens_per_second for speed in speeds]
    assert paces[0] < paces[1] < paces[2]
    assert paces[2] <= 64 * paces[0] * 1.1  # only the sharded optimizer can help


def test_predict_speed_offload_costs_time():
    work, device = full_row("Qwen3-8B", 2048, 4096), DEVICES["a100-80"]
    seconds = [
        predict_speed(replace(work, offload=kind), device).seconds_per_step for kind in ("none", "optimizer", "all")
    ]
    assert seconds[0] < seconds[1] < seconds[2]


def test_predict_speed_emulated_dtype_is_slow():
    work = step(catalog.get("Qwen3-0.6B"), micro_tokens=2048)
    t4 = DEVICES["t4"]
    bf16, fp32 = (predict_speed(replace(work, compute_dtype=dtype), t4) for dtype in ("bf16", "fp32"))
    assert bf16.items["projections"] > fp32.items["projections"]


@settings(max_examples=100, deadline=None)
@given(work=works, device=st.sampled_from([device for device in DEVICES.values() if device.kind != "cpu"]))
def test_predict_speed_stays_within_published_utilization(work, device):
    """Of the peak, by the engine's own count of FLOPs, which leaves out recomputation."""
    work = replace(work, device_type="gpu")
    speed = predict_speed(work, device)
    flops = training_flops_of(work) * work.num_micro_batches
    peak = device.flops.get("bf16", device.flops["fp32"] / 2)
    assert flops / speed.seconds_per_step / peak <= 0.5 and flops / speed.low / peak <= 0.6 * (1 + 1e-9)
    recomputing = predict_speed(replace(work, activation_checkpointing=True), device)
    assert recomputing.seconds_per_step >= speed.seconds_per_step * (1 - 1e-9)


def training_flops_of(work):
    adapted = replace(work, activation_checkpointing=False)
    return projection_flops(adapted) + head_flops(adapted) + attention_flops(adapted) * 6 / 7


def test_predict_speed_bounds_large_models():
    work = full_row("Qwen2.5-7B", 2048, 16384, 8)
    utilization = training_flops_of(work) * 8 / predict_speed(work, DEVICES["a100-80"]).seconds_per_step / 312e12
    assert 0.45 <= utilization <= 0.5


def test_cost_is_hours_times_price():
    device, work = DEVICES["h100-80"], full_row("Qwen3-8B", 2048, 4096, num_devices=8)
    speed = predict_speed(work, device)
    found = cost(speed, 10**9, device, work)
    assert found.hours >= 10**9 / speed.tokens_per_second / 3600
    assert found.money == pytest.approx(found.hours * 8 * device.price_per_hour)
    assert found.hours_low < found.hours < found.hours_high and found.money_low < found.money < found.money_high
    unpriced = cost(speed, 10**9, DEVICES["gh200"], work)
    assert (unpriced.money, unpriced.money_low, unpriced.money_high) == (None, None, None)


def test_cost_includes_loading_and_saving():
    """15 GB of weights take longer than a second to load, however little there is to train."""
    device, work = DEVICES["a40"], full_row("Qwen2.5-7B", 1024, 1024, adapter=Adapter(rank=16))
    speed = predict_speed(work, device)
    nothing, little = (cost(speed, count, device, work) for count in (0, 50_000))
    assert 25 < 3600 * nothing.hours < 60 and nothing.hours_low < nothing.hours < nothing.hours_high
    assert little.hours - nothing.hours == pytest.approx(1.12 * 50_000 / speed.tokens_per_second / 3600)
    everything = cost(speed, 0, device, replace(work, adapter=None))
    fresh = cost(speed, 0, device, replace(work, adapter=None, weights="random"))
    assert nothing.hours < fresh.hours < everything.hours  # saved: all weights and their moments


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0.012, "under $0.10"),
        (0.1, "$0.10"),
        (0.8649, "$0.86"),
        (5.2389, "$5.20"),
        (8.01, "$8.00"),
        (9.97, "$10"),
        (67.4, "$67"),
        (999.4, "$999"),
        (999.6, "$1K"),
        (1314, "$1.31K"),
        (131_655.69, "$132K"),
        (2.5e6, "$2.5M"),
    ],
)
def test_dollars(amount, text):
    assert dollars(amount) == text


def calibrated(**values):
    rates = dict.fromkeys(KINDS, 1e-9)
    numbers = {"device": "cpu-laptop", "title": "a laptop", "num_threads": 8, "seconds_per_unit": {"fp32": rates}}
    return Calibration(
        **(numbers | {"error": {"fp32": 0.1}, "date": "2026-11-22", "versions": {"torch": "2"}} | values)
    )


def test_predict_speed_uses_calibration_of_its_device_and_dtype():
    laptop, measured = DEVICES["cpu-laptop"], calibrated()
    work = step(compute_dtype="fp32", device_type="cpu")
    by_rates = sum(term.amount for term in step_work(work)) * 1e-9
    assert predict_speed(work, laptop, measured).seconds_per_step == pytest.approx(by_rates)
    for other, device in ((work, DEVICES["cpu-server"]), (replace(work, compute_dtype="bf16"), laptop)):
        assert predict_speed(other, device, measured) == predict_speed(other, device)
    # Kinds that were not measured use the data sheet, for example dequantization without bitsandbytes.
    part = calibrated(seconds_per_unit={"fp32": {"flops": 0.0}})
    assert 0 < predict_speed(work, laptop, part).seconds_per_step < predict_speed(work, laptop).seconds_per_step


def test_calibration_save_and_load(home):
    assert calibration.load() is None
    assert calibration.save(calibrated()) == home / "calibration.json"
    assert calibration.load() == calibrated()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps(calibrated().model_dump() | {"seconds_per_unit": {"fp32": {"flops": -1.0}}}),
        json.dumps(calibrated().model_dump() | {"seconds_per_unit": {"fp32": {"flops": float("nan")}}}),
        json.dumps(calibrated().model_dump() | {"more": 1}),
    ],
)
def test_calibration_load_refuses_other_files(home, content):
    (home / "calibration.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a calibration") as caught:
        calibration.load()
    assert "\n" not in str(caught.value)
