"""Decide whether a step fits a device, size its micro-batch, and find the cheapest changes that make it fit.

A step fits if its predicted peak is at most `FIT_SHARE` of the memory, and the peak plus the allocator's slack is at
most all of it. The rest is a margin for what the formulas do not cover, for example a display. `search.py` searches
whole plans. Never imports torch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from trivium.config.load import to_yaml
from trivium.config.run import METHOD_DEFAULTS, Adapter, Run
from trivium.errors import ConfigError
from trivium.files import GIB
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan import devices
from trivium.plan.devices import Device
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import ComputeDtype, DataFacts, DeviceType, Workload, of_run, with_batching

FIT_SHARE = 0.92
"""Share of a device's memory that a predicted peak may take."""
CPU_MICRO_TOKENS = 2048
"""Measured: 1M and 25M parameters are as fast as with 8,192, and 135M are 1.5 times as fast with 0.3 of the memory."""
MIN_SEQ_LEN = 256
MIN_RANK = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

Overrides = dict[str, object]


@dataclass(frozen=True)
class Fix:
    """A change that makes a step fit.

    Attributes:
        overrides: run file keys and their new values; empty if the change is another device.
        text: the change and its effect in one line.
        memory: the new peak.
        time_factor: new seconds per step over the old.
    """

    overrides: Overrides
    text: str
    memory: Memory
    time_factor: float


@dataclass(frozen=True)
class Change:
    """A step on a device after some changes, which may not fit.

    Attributes:
        overrides: as in `Fix`.
        name: the change, if it is not a key.
        price: new price per hour over the old; 1 if either is unknown.
    """

    workload: Workload
    device: Device
    memory_bytes: int
    overrides: Overrides = field(default_factory=dict)
    name: str = ""
    price: float = 1.0


def fits(memory: Memory, memory_bytes: int) -> bool:
    """Whether a predicted peak fits with the margin."""
    return memory.total <= FIT_SHARE * memory_bytes and memory.high <= memory_bytes


def micro_batch_sizes(workload: Workload, max_tokens: int) -> list[int]:
    """Sizes in tokens up to `max_tokens`, largest first, that divide a device's share of the step evenly."""
    sequences = max(1, workload.step_tokens // workload.seq_len // workload.num_devices)
    most = min(sequences, max_tokens // workload.seq_len)
    return [size * workload.seq_len for size in range(most, 0, -1) if sequences % size == 0] or [workload.seq_len]


def best_batching(workload: Workload, sizes: list[int], checkpointing: bool | None, memory_bytes: int) -> Workload:
    """The first of `sizes` that fits, with activation checkpointing (if None, open) only if no size fits without.

    Returns the last size with checkpointing if nothing fits.
    """
    choices = [
        with_batching(workload, size, is_checkpointed)
        for is_checkpointed in ((False, True) if checkpointing is None else (checkpointing,))
        for size in sizes
    ]
    return next((choice for choice in choices if fits(peak_memory(choice), memory_bytes)), choices[-1])


def settle_batch(
    run: Run,
    shape: QwenShape,
    compute_dtype: ComputeDtype,
    device_type: DeviceType,
    memory_bytes: int,
    facts: DataFacts | None = None,
) -> Run:
    """Fill in `batch.micro_tokens` and `activation_checkpointing` if the run file leaves them open.

    A CPU gains nothing from micro-batches above `CPU_MICRO_TOKENS`. See `best_batching`. If nothing fits, the caller
    decides whether to try anyway.
    """
    work = of_run(run, shape, facts, compute_dtype, device_type)
    most = min(work.micro_tokens, CPU_MICRO_TOKENS) if device_type == "cpu" else work.micro_tokens
    sizes = [work.micro_tokens] if run.batch.micro_tokens else micro_batch_sizes(work, most)
    work = best_batching(work, sizes, run.activation_checkpointing, memory_bytes)
    batch = run.batch.model_copy(update={"micro_tokens": work.micro_tokens})
    return run.model_copy(update={"batch": batch, "activation_checkpointing": work.activation_checkpointing})


def cheapest_fixes(workload: Workload, device: Device, memory_bytes: int | None = None, count: int = 3) -> list[Fix]:
    """Up to `count` of the cheapest changes that make a step fit; each is checked.

    Smaller micro-batches and activation checkpointing come first, then lower precision, other hardware, and a smaller
    model or less context. Each group is sorted by time and price. If batching alone is not enough, the other changes
    are combined with it.
    """
    here = Change(workload, device, memory_bytes or device.memory_bytes)
    fixes = sorted(_smaller_batches(here, here), key=lambda fix: fix.time_factor)
    batching_suffices = bool(fixes)
    for group in (_lower_precision(here), _hardware(here), _smaller_training(here)):
        offers: list[tuple[float, Fix]] = []
        for alternatives in group:  # take the smallest change that is enough
            for change in alternatives:
                fix = _as_fix(change, here)
                if fix is None and not batching_suffices:
                    fix = next(iter(_smaller_batches(change, here)), None)
                if fix:
                    offers.append((fix.time_factor * change.price, fix))
                    break
        fixes += [fix for _, fix in sorted(offers, key=lambda offer: offer[0])]
    return fixes[:count]


def _as_fix(change: Change, here: Change) -> Fix | None:
    """The change as a fix; None if the step still does not fit."""
    memory = peak_memory(change.workload)
    if not fits(memory, change.memory_bytes):
        return None
    before = predict_speed(here.workload, here.device).seconds_per_step
    factor = predict_speed(change.workload, change.device).seconds_per_step / before
    keys = [f"{key}={to_yaml(value)}" for key, value in change.overrides.items()]
    name = " ".join([change.name, *keys] if change.name else keys)
    return Fix(change.overrides, f"{name}: {memory.total / GIB:.1f} GiB, {pace(factor)}", memory, factor)


def _smaller_batches(change: Change, here: Change) -> list[Fix]:
    """The change with the largest smaller micro-batch that fits, and with checkpointing; with both if needed."""
    work = change.workload
    smaller = [size for size in micro_batch_sizes(work, work.micro_tokens) if size < work.micro_tokens]

    def first(sizes: list[int], activation_checkpointing: bool) -> list[Fix]:
        tried = (_as_fix(_with_batching(change, size, activation_checkpointing), here) for size in sizes)
        return list(itertools.islice(filter(None, tried), 1))

    if work.activation_checkpointing:
        return first(smaller, True)
    return first(smaller, False) + first([work.micro_tokens], True) or first(smaller, True)


def _with_batching(change: Change, micro_tokens: int, activation_checkpointing: bool) -> Change:
    work, keys = change.workload, dict(change.overrides)
    if micro_tokens != work.micro_tokens:
        keys["batch.micro_tokens"] = micro_tokens
    if activation_checkpointing != work.activation_checkpointing:
        keys["activation_checkpointing"] = activation_checkpointing
    return replace(change, workload=with_batching(work, micro_tokens, activation_checkpointing), overrides=keys)


def _lower_precision(here: Change) -> Iterator[list[Change]]:
    """The same training with numbers in fewer bits, or sharded over the devices."""
    work = here.workload
    eight_bit: Overrides = {"optimizer.state_dtype": "8bit"}
    packed: Overrides = {"weights": "nf4"}
    if work.num_devices > 1 and work.strategy in ("ddp", "zero2"):
        sharded = replace(work, strategy="fsdp2")
        yield [replace(here, workload=sharded, overrides={"parallel.strategy": "fsdp2"})]
    if work.state_dtype == "fp32":
        yield [replace(here, workload=replace(work, state_dtype="8bit"), overrides=eight_bit)]
    if work.adapter is not None and work.weights == "pretrained":
        yield [
            replace(here, workload=replace(work, weights="nf4"), overrides=packed),
            replace(here, workload=replace(work, weights="nf4", state_dtype="8bit"), overrides=packed | eight_bit),
        ]


def _hardware(here: Change) -> Iterator[list[Change]]:
    """More of the same GPU, and larger GPUs to rent."""
    work, device = here.workload, here.device
    sequences = work.step_tokens // work.seq_len
    more = [count for count in (2, 4, 8) if work.num_devices < count and sequences % count == 0]
    if device.kind == "gpu":
        yield [_spread(here, count) for count in more]
    rented = [other for other in devices.catalog().values() if other.kind == "gpu" and other.price_per_hour]
    yield [
        Change(
            moved(work, other),
            other,
            other.memory_bytes,
            name=f"{other.name} ({other.memory_bytes / GIB:.0f} GiB, ${other.price_per_hour:.2f}/h)",
            price=(other.price_per_hour or 0.0) / (device.price_per_hour or 1.0),
        )
        for other in sorted(rented, key=lambda other: other.price_per_hour or 0.0)
        if other.memory_bytes > here.memory_bytes
    ]


def _spread(here: Change, num_devices: int) -> Change:
    """The same step on more devices, with the micro-batch cut to a device's share of the step."""
    work = replace(here.workload, num_devices=num_devices, strategy="fsdp2")
    keys: Overrides = {"parallel.devices": num_devices, "parallel.strategy": "fsdp2"}
    price = num_devices / here.workload.num_devices
    change = replace(here, workload=work, overrides=keys, price=price)
    return _with_batching(change, micro_batch_sizes(work, work.micro_tokens)[0], work.activation_checkpointing)


def moved(work: Workload, device: Device) -> Workload:
    """The same step on another device, in bf16 if the device is fast at it."""
    dtype: ComputeDtype = "bf16" if "bf16" in device.flops else "fp32"
    return replace(work, compute_dtype=dtype, device_type="cpu" if device.kind == "cpu" else "gpu")


def _smaller_training(here: Change) -> Iterator[list[Change]]:
    """An adapter instead of all weights, a smaller adapter, a smaller model, shorter sequences."""
    work = here.workload

    def changed(overrides: Overrides, to: Workload) -> Change:
        return replace(here, workload=to, overrides=overrides)

    if work.adapter is None and work.weights == "pretrained":
        keys: Overrides = {"trainable": "adapter", "optimizer.lr": METHOD_DEFAULTS["lora"]["optimizer"]["lr"]}
        lora = replace(work, adapter=Adapter())
        yield [changed(keys, lora), changed(keys | {"weights": "nf4"}, replace(lora, weights="nf4"))]
    if adapter := work.adapter:
        ranks = [rank for halvings in range(1, 12) if (rank := adapter.rank >> halvings) >= MIN_RANK]
        yield [
            changed({"adapter.rank": rank}, replace(work, adapter=adapter.model_copy(update={"rank": rank})))
            for rank in ranks
        ]
        if set(adapter.targets) > set(ATTENTION):
            lighter = adapter.model_copy(update={"targets": ATTENTION})
            yield [changed({"adapter.targets": ATTENTION}, replace(work, adapter=lighter))]
    yield [changed({"model": name}, replace(work, shape=shape)) for name, shape in _smaller_models(work)]
    lengths = [work.seq_len >> halvings for halvings in range(1, 12) if work.seq_len % (1 << halvings) == 0]
    yield [
        changed(
            {"data.seq_len": length},
            replace(work, seq_len=length, document_tokens=min(work.document_tokens or 0, length) or None),
        )
        for length in lengths
        if length >= MIN_SEQ_LEN
    ]


def _smaller_models(work: Workload) -> list[tuple[str, QwenShape]]:
    """Smaller published models of the family; from scratch 1/2, 1/4 and 1/8 of the parameters. Largest first."""
    shape = work.shape
    if work.weights == "random":
        budgets = [f"{shape.num_params / parts / 1e6:.3g}M" for parts in (2, 4, 8) if shape.num_params > 1e6 * parts]
        found = []
        for budget in budgets:
            try:
                found.append((budget, catalog.size_for_budget(round(float(budget[:-1]) * 1e6), shape.vocab_size)))
            except ConfigError:  # the embedding alone is larger
                break
        return found
    sizes = [(hub_id, catalog.get(name)) for name, hub_id in catalog.hub_ids().items()]
    twins = [name for name, other in sizes if other == shape]
    wants_base = bool(twins) and all(map(is_base, twins))
    smaller = [
        (name, other)
        for name, other in sizes
        if other.family == shape.family and other.num_params < shape.num_params and is_base(name) == wants_base
    ]
    return sorted(smaller, key=lambda entry: -entry[1].num_params)


def is_base(name: str) -> bool:
    """Whether a published model is a base model: Qwen3 marks its base models, the others their chat models."""
    name = name.rsplit("/", 1)[-1].lower()
    return name.endswith("-base") if name.startswith("qwen3") else not name.endswith("-instruct")


def pace(factor: float) -> str:
    """A ratio of times as text."""
    if factor > 2:
        return f"{factor:.1f} times as slow"
    if factor < 0.5:
        return f"{1 / factor:.1f} times as fast"
    return "as fast" if abs(factor - 1) < 0.005 else f"{abs(factor - 1):.0%} {'slower' if factor > 1 else 'faster'}"
