"""Sizing the batch, fixes, the search against an exhaustive one, and written run files."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config.load import ResolvedRun, load_run, to_yaml
from trivium.errors import ConfigError, DoesNotFit
from trivium.files import GIB
from trivium.model import catalog
from trivium.model.resolve import planned_shape
from trivium.plan import devices
from trivium.plan.advice import write_run
from trivium.plan.devices import Device
from trivium.plan.fit import FIT_SHARE, Fix, cheapest_fixes, micro_batch_sizes, settle_batch
from trivium.plan.memory import peak_memory
from trivium.plan.search import MAX_MICRO_TOKENS, STATES, TIE, Goal, Plan, search
from trivium.plan.speed import predict_speed
from trivium.plan.workload import DataFacts, Workload, of_run, with_batching

DEVICES = devices.catalog()
RENTED = tuple(device for device in DEVICES.values() if device.price_per_hour)
FACTS = DataFacts(5_000, 2_000_000, "conversations", 400.0, supervised_share=0.4)
MODELS = ("Qwen2.5-0.5B-Instruct", "Qwen3-0.6B", "Qwen3-4B-Base", "Qwen3-8B", "Qwen2.5-32B")

methods = st.sampled_from(["lora", "qlora", "full", "continue"])
models = st.sampled_from(MODELS)
gpus = st.sampled_from(["rtx-3060", "t4", "l4", "rtx-4090", "l40s", "a100-80", "b200"]).map(DEVICES.__getitem__)
gib = st.floats(0.5, 200.0)


def resolve(method: str, model: str, *overrides: str) -> ResolvedRun:
    given = [f"method={method}", f"model=Qwen/{model}", "data=data.jsonl", "name=plan"]
    return load_run(None, [*given, *overrides])


def goal(method: str, model: str, *there: Device, **wishes: object) -> Goal:
    return Goal((resolve(method, model).run,), catalog.get(model), there, facts=FACTS, **wishes)  # type: ignore[arg-type]


def with_memory(device: Device, size: float) -> Device:
    return replace(device, memory_bytes=int(size * GIB))


@given(methods, models, gib, st.booleans())
@settings(max_examples=25)
def test_settle_batch_takes_largest_that_fits(method: str, model: str, size: float, is_open: bool):
    overrides = [] if is_open else ["activation_checkpointing=false"]
    run, shape, memory_bytes = resolve(method, model, *overrides).run, catalog.get(model), int(size * GIB)
    settled = settle_batch(run, shape, "bf16", "gpu", memory_bytes, FACTS)
    work = of_run(settled, shape, FACTS, "bf16", "gpu")
    default = of_run(run, shape, FACTS, "bf16", "gpu")

    def does_fit(tokens: int, activation_checkpointing: bool) -> bool:
        return peak_memory(with_batching(default, tokens, activation_checkpointing)).total <= FIT_SHARE * memory_bytes

    sizes = [rows * work.seq_len for rows in range(1, default.micro_tokens // work.seq_len + 1)]
    dividing = [tokens for tokens in sizes if default.step_tokens % tokens == 0]
    plain = [tokens for tokens in dividing if does_fit(tokens, False)]
    recomputed = [tokens for tokens in dividing if is_open and does_fit(tokens, True)]
    assert work.activation_checkpointing == (not plain and is_open)
    assert work.micro_tokens == max(plain or recomputed or [work.seq_len])
    assert settled.model_copy(update={"batch": run.batch, "activation_checkpointing": None}) == run.model_copy(
        update={"activation_checkpointing": None}
    )


def test_settle_batch_keeps_what_is_set():
    run = resolve("lora", "Qwen3-0.6B", "batch.micro_tokens=16384", "activation_checkpointing=false").run
    assert settle_batch(run, catalog.get("Qwen3-0.6B"), "bf16", "gpu", 1 << 20) == run


def changes_batching_only(fix: Fix) -> bool:
    """Whether a fix is only a smaller micro-batch, activation checkpointing, or both."""
    return all(word.startswith(("batch.micro", "activation_ch")) for word in fix.text.partition(":")[0].split())


@given(methods, models, gpus)
@settings(max_examples=12)
def test_cheapest_fixes_make_the_run_fit(method: str, model: str, device: Device):
    """The overrides of a fix give a run with the predicted peak."""
    run = resolve(method, model).run
    work = goal(method, model, device).workload(run, device, 1)
    fixes = cheapest_fixes(work, device, count=20)
    for fix in fixes:
        name = fix.text.partition(" ")[0]
        bought = DEVICES.get(name, device)
        assert fix.memory.total <= FIT_SHARE * bought.memory_bytes, fix.text
        typed = [f"{key}={to_yaml(value)}" for key, value in fix.overrides.items()]
        assert all(override in fix.text for override in typed) and (typed or name in DEVICES)
        changed = resolve(method, model, *typed).run
        shape = planned_shape(changed)
        assert shape is not None
        there = replace(goal(method, model, bought), shape=shape).workload(changed, bought, changed.parallel.devices)
        if "parallel.devices" not in fix.overrides and "batch.micro_tokens" not in fix.overrides:
            there = replace(there, micro_tokens=work.micro_tokens)
        assert peak_memory(there).total == fix.memory.total, fix.text
    neutral = [changes_batching_only(fix) for fix in fixes]
    assert neutral == sorted(neutral, reverse=True)  # changes that keep the training the same come first


def test_cheapest_fixes_are_sorted():
    device = DEVICES["rtx-4090"]
    run = resolve("lora", "Qwen3-4B-Base", "batch.micro_tokens=16384").run
    work = goal("lora", "Qwen3-4B-Base", device).workload(run, device, 1)
    assert peak_memory(work).total > device.memory_bytes
    fixes = cheapest_fixes(work, device)
    assert len(fixes) == 3 and fixes == cheapest_fixes(work, device, count=9)[:3]
    batching_only = [fix for fix in fixes if changes_batching_only(fix)]
    assert batching_only == sorted(batching_only, key=lambda fix: fix.time_factor) and batching_only
    tiny = cheapest_fixes(work, device, memory_bytes=1 << 20, count=50)
    assert all("GiB, $" in fix.text for fix in tiny)  # only another device helps with one mebibyte


def exhaustive(method: str, model: str, device: Device) -> list[tuple[Workload, float]]:
    """Seconds of every step that fits, found by trying all of them."""
    start = goal(method, model, device).workload(resolve(method, model).run, device, 1)
    found = []
    for tokens in micro_batch_sizes(start, MAX_MICRO_TOKENS):
        for activation_checkpointing in (False, True):
            for states in STATES if device.kind == "gpu" else STATES[:2]:
                work = replace(with_batching(start, tokens, activation_checkpointing), state_dtype=states)
                if peak_memory(work).total <= FIT_SHARE * device.memory_bytes:
                    found.append((work, predict_speed(work, device).seconds_per_step))
    return found


@given(methods, models, gpus, gib)
@settings(max_examples=12)
def test_search_is_as_good_as_exhaustive(method: str, model: str, device: Device, size: float):
    device = with_memory(device, size)
    everything = exhaustive(method, model, device)
    if not everything:
        with pytest.raises(DoesNotFit, match="cheapest changes|No single change"):
            search(goal(method, model, device))
        return
    plan = search(goal(method, model, device))
    assert plan.memory == peak_memory(plan.workload) and plan.memory.total <= FIT_SHARE * device.memory_bytes
    seconds = next(seconds for work, seconds in everything if work == plan.workload)
    assert seconds <= TIE * min(seconds for _, seconds in everything)
    assert of_run(plan.run, catalog.get(model), FACTS, plan.workload.compute_dtype, "gpu") == plan.workload
    assert set(plan.reasons) >= {"method", "device", "batch.micro_tokens", "activation_checkpointing"}


@given(methods, models, gpus, gib, st.floats(1.0, 3.0))
@settings(max_examples=12)
def test_search_more_memory_is_never_slower(method: str, model: str, device: Device, size: float, more: float):
    try:
        small = search(goal(method, model, with_memory(device, size)))
    except DoesNotFit:
        return
    large = search(goal(method, model, with_memory(device, size * more)))
    assert large.speed.seconds_per_step <= TIE * small.speed.seconds_per_step


def alone(everything: Goal, count: int) -> list[Plan]:
    """The plan for each device alone, if one fits."""
    plans = []
    for device in everything.devices:
        with suppress(DoesNotFit):
            plans.append(search(replace(everything, devices=(device,), num_devices=(count,))))
    return plans


@pytest.mark.parametrize(("model", "is_one_enough"), [("Qwen3-4B-Base", True), ("Qwen2.5-32B", False)])
def test_search_cheapest_prefers_one_device(model: str, is_one_enough: bool):
    everything = goal("full", model, *RENTED, num_devices=(1, 4, 8))
    counts = (1,) if is_one_enough else (4, 8)
    each = [plan for count in counts for plan in alone(everything, count)]
    assert bool(alone(everything, 1)) == is_one_enough

    def dollars(plan: Plan) -> float:
        return plan.speed.seconds_per_step * (plan.device.price_per_hour or 0.0) * plan.workload.num_devices

    plan = search(everything)
    assert plan.workload.num_devices in counts and dollars(plan) <= TIE * min(map(dollars, each))


def test_search_fastest_of_all_devices():
    everything = goal("full", "Qwen3-4B-Base", *RENTED, prefer="fastest", num_devices=(1, 4, 8))
    each = [plan.speed.seconds_per_step for count in everything.num_devices for plan in alone(everything, count)]
    assert search(everything).speed.seconds_per_step <= TIE * min(each)


def test_search_keeps_set_keys():
    resolved = resolve("full", "Qwen3-0.6B", "optimizer.state_dtype=8bit", "batch.micro_tokens=4096", "precision=fp32")
    keys = frozenset(key for key, origin in resolved.origins.items() if not origin.startswith("default"))
    plan = search(Goal((resolved.run,), catalog.get("Qwen3-0.6B"), (DEVICES["h100-80"],), set_keys=keys))
    assert plan.run.optimizer.state_dtype == "8bit" and plan.run.batch.micro_tokens == 4096
    assert plan.workload.compute_dtype == "fp32" and plan.reasons["batch.micro_tokens"] == "as you set it"
    assert plan.cost is None  # the amount of data is unknown


def test_search_takes_qlora_when_lora_does_not_fit():
    runs = tuple(resolve(method, "Qwen2.5-32B").run for method in ("lora", "qlora"))
    shape = catalog.get("Qwen2.5-32B")
    roomy = search(Goal(runs, shape, (DEVICES["b200"],), facts=FACTS))
    tight = search(Goal(runs, shape, (DEVICES["l40s"],), facts=FACTS))
    assert (roomy.run.method, tight.run.method) == ("lora", "qlora")
    assert "lora would need" in tight.reasons["method"] and tight.run.weights == "nf4"


def test_search_max_cost_and_max_hours():
    plan = search(goal("lora", "Qwen3-8B", *RENTED))
    assert plan.cost is not None and plan.cost.money is not None
    enough = search(goal("lora", "Qwen3-8B", *RENTED, max_cost=plan.cost.money, prefer="fastest"))
    assert enough.cost is not None and (enough.cost.money or 0.0) <= plan.cost.money
    with pytest.raises(DoesNotFit, match=r"limit of \$0\.01: the cheapest plan takes"):
        search(goal("lora", "Qwen3-8B", *RENTED, max_cost=0.01))
    with pytest.raises(DoesNotFit, match=r"limit of 1e-06 h"):
        search(goal("lora", "Qwen3-8B", *RENTED, max_hours=1e-6))


@given(methods, models, st.sampled_from([1, 2, 4]), st.sampled_from(["data.seq_len=2048", "adapter.rank=64", "seed=3"]))
@settings(max_examples=8)
def test_write_run_round_trip(tmp_path_factory, method: str, model: str, num_devices: int, override: str):
    if method in ("full", "continue") and override.startswith("adapter"):
        override = "budget.steps=10"
    run, roomy = resolve(method, model, override).run, [with_memory(device, 2000.0) for device in RENTED[-3:]]
    plan = search(Goal((run,), catalog.get(model), tuple(roomy), num_devices=(num_devices,), facts=FACTS))
    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    write_run(plan, path, ["a note"])
    loaded = load_run(path).run
    assert loaded == plan.run
    written = path.read_text()
    assert written.splitlines()[1] == "# a note" and f"{plan.memory.total / GIB:.2f} GiB" in written
    shape = planned_shape(loaded)
    assert shape is not None
    assert of_run(loaded, shape, FACTS, plan.workload.compute_dtype, plan.workload.device_type) == plan.workload


def test_write_run_never_overwrites_other_files(tmp_path: Path):
    plan = search(goal("lora", "Qwen3-0.6B", DEVICES["l4"]))
    mine = tmp_path / "mine.yaml"
    mine.write_text("method: lora\n")
    with pytest.raises(ConfigError, match="not written by"):
        write_run(plan, mine)
    assert mine.read_text() == "method: lora\n"
    fresh = tmp_path / "new" / "plan.yaml"
    write_run(plan, fresh)
    before = fresh.read_text()
    write_run(plan, fresh)
    assert fresh.read_text() == before
