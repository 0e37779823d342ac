"""What fits a device, how a run's batch is sized to fit it, and the cheapest changes that make a step fit.

A step fits when its predicted peak takes at most `FIT_SHARE` of the memory, and all of it with what the allocator may
hold beyond; the rest is the margin for what no formula sees, such as a display. Searches among whole plans are in
`search.py`. The verb `plan`, `train` and the engine's last words after running out of memory import this file; it never
imports torch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from trivium.config.load import to_yaml
from trivium.config.run import METHOD_DEFAULTS, Adapter, Run
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan import devices
from trivium.plan.devices import GIB, Device
from trivium.plan.memory import Memory, peak_memory
from trivium.plan.speed import predict_speed
from trivium.plan.workload import ComputeDtype, DataFacts, DeviceType, Workload, of_run, with_batching

FIT_SHARE = 0.92
"""Share of a device's memory that a predicted peak may take."""
MIN_SEQ_LEN = 256
MIN_RANK = 4
ADAPTER_RATE = METHOD_DEFAULTS["lora"]["optimizer"]["lr"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

Overrides = dict[str, object]


@dataclass(frozen=True)
class Fix:
    """A change that makes a step fit.

    Attributes:
        overrides: keys of the run file and their new values; none where the change is another device.
        text: the change and its figures in one line.
        memory: the peak with it.
        time_factor: seconds of a step with it, over seconds without.
    """

    overrides: Overrides
    text: str
    memory: Memory
    time_factor: float


@dataclass(frozen=True)
class Change:
    """One thing that could be changed.

    Attributes:
        workload: the step with it.
        device: what it runs on.
        memory_bytes: the memory there.
        overrides: see `Fix`.
        name: what is changed, where it is not a key.
        price: what an hour costs, over what it costs now; 1 where one of the two is unknown.
    """

    workload: Workload
    device: Device
    memory_bytes: int
    overrides: Overrides = field(default_factory=dict)
    name: str = ""
    price: float = 1.0


def fits(memory: Memory, memory_bytes: int) -> bool:
    """Whether a predicted peak fits, with the margin."""
    return memory.total <= FIT_SHARE * memory_bytes and memory.high <= memory_bytes


def micro_batch_sizes(workload: Workload, most_tokens: int) -> list[int]:
    """Tokens that a micro-batch of at most so many may have, largest first: rows that divide a device's share."""
    rows = max(1, workload.step_tokens // workload.seq_len // workload.num_devices)
    most_rows = min(rows, most_tokens // workload.seq_len)
    return [size * workload.seq_len for size in range(most_rows, 0, -1) if rows % size == 0] or [workload.seq_len]


def settle_batch(
    run: Run,
    shape: QwenShape,
    compute_dtype: ComputeDtype,
    device_type: DeviceType,
    memory_bytes: int,
    facts: DataFacts | None = None,
) -> Run:
    """Fill in `batch.micro_tokens` and `activation_checkpointing` where the run file leaves them open.

    The default micro-batch if that fits, else the largest one that does, with activation checkpointing only where
    nothing fits without. If nothing fits at all: the smallest, with checkpointing; the caller decides whether to try.
    """
    workload = of_run(run, shape, facts, compute_dtype, device_type)
    given = run.activation_checkpointing
    sizes = [workload.micro_tokens] if run.batch.micro_tokens else micro_batch_sizes(workload, workload.micro_tokens)
    choices = [
        (size, activation_checkpointing)
        for activation_checkpointing in ((False, True) if given is None else (given,))
        for size in sizes
    ]
    fitting = (choice for choice in choices if fits(peak_memory(with_batching(workload, *choice)), memory_bytes))
    micro_tokens, activation_checkpointing = next(fitting, choices[-1])
    batch = run.batch.model_copy(update={"micro_tokens": micro_tokens})
    return run.model_copy(update={"batch": batch, "activation_checkpointing": activation_checkpointing})


def cheapest_fixes(workload: Workload, device: Device, memory_bytes: int | None = None, count: int = 3) -> list[Fix]:
    """The cheapest changes that make a step fit, each checked to do so; fewer where there are fewer.

    Changes that leave training as it is come first, then lower precision, other hardware, and a smaller model or less
    context; within each the cheapest by time and price. Where a smaller micro-batch alone does not suffice, the other
    changes are combined with one.
    """
    here = Change(workload, device, memory_bytes or device.memory_bytes)
    fixes = sorted(_smaller_batches(here, here), key=lambda fix: fix.time_factor)
    batching_suffices = bool(fixes)
    for tier in (_coarser(here), _hardware(here), _learning_less(here)):
        offers: list[tuple[float, Fix]] = []
        for family in tier:  # of each the gentlest that suffices
            for change in family:
                found = _suffices(change, here)
                fix = found if found or batching_suffices else next(iter(_smaller_batches(change, here)), None)
                if fix:
                    offers.append((fix.time_factor * change.price, fix))
                    break
        fixes += [fix for _, fix in sorted(offers, key=lambda offer: offer[0])]
    return fixes[:count]


def _suffices(change: Change, here: Change) -> Fix | None:
    """The change as a fix, or None where it does not make the step fit."""
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
        tried = (_suffices(_with_batching(change, size, activation_checkpointing), here) for size in sizes)
        return list(itertools.islice(filter(None, tried), 1))

    if work.activation_checkpointing:
        return first(smaller, True)
    return first(smaller, False) + first([work.micro_tokens], True) or first(smaller, True)


def _with_batching(change: Change, micro_tokens: int, activation_checkpointing: bool) -> Change:
    """The change, and less at a time."""
    work, keys = change.workload, dict(change.overrides)
    if micro_tokens != work.micro_tokens:
        keys["batch.micro_tokens"] = micro_tokens
    if activation_checkpointing != work.activation_checkpointing:
        keys["activation_checkpointing"] = activation_checkpointing
    return replace(change, workload=with_batching(work, micro_tokens, activation_checkpointing), overrides=keys)


def _coarser(here: Change) -> Iterator[list[Change]]:
    """The same learning with numbers kept in fewer bits, or in fewer places."""
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
    """More devices of the kind, and larger ones that can be rented."""
    work, device = here.workload, here.device
    rows = work.step_tokens // work.seq_len
    more = [count for count in (2, 4, 8) if work.num_devices < count and rows % count == 0]
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
    """The same step on more devices, each with no more rows at a time than are its own."""
    work = here.workload
    share = replace(work, num_devices=num_devices, strategy="fsdp2")
    micro_tokens = micro_batch_sizes(share, work.micro_tokens)[0]
    keys: Overrides = {"parallel.devices": num_devices, "parallel.strategy": "fsdp2"}
    price = num_devices / work.num_devices
    changed = replace(here, workload=replace(share, micro_tokens=work.micro_tokens), overrides=keys, price=price)
    return (
        changed
        if micro_tokens == work.micro_tokens
        else _with_batching(changed, micro_tokens, work.activation_checkpointing)
    )


def moved(work: Workload, device: Device) -> Workload:
    """The same step on another kind of device, in the type that it is fast at."""
    dtype: ComputeDtype = "bf16" if "bf16" in device.flops else "fp32"
    return replace(work, compute_dtype=dtype, device_type="cpu" if device.kind == "cpu" else "gpu")


def _learning_less(here: Change) -> Iterator[list[Change]]:
    """What learns less, or something else: an adapter, a smaller one, a smaller model, shorter rows."""
    work = here.workload

    def changed(overrides: Overrides, to: Workload) -> Change:
        return replace(here, workload=to, overrides=overrides)

    if work.adapter is None and work.weights == "pretrained":
        keys: Overrides = {"trainable": "adapter", "optimizer.lr": ADAPTER_RATE}
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
    yield [changed({"data.seq_len": length}, _cut(work, length)) for length in lengths if length >= MIN_SEQ_LEN]


def _cut(work: Workload, seq_len: int) -> Workload:
    """The same step in shorter rows."""
    document_tokens = min(work.document_tokens, seq_len) if work.document_tokens else None
    return replace(work, seq_len=seq_len, document_tokens=document_tokens)


def _smaller_models(work: Workload) -> list[tuple[str, QwenShape]]:
    """Published sizes of the family where weights are needed, else halves and quarters of the budget; largest first."""
    shape = work.shape
    if work.weights == "random":
        budgets = [f"{shape.num_params / parts / 1e6:.3g}M" for parts in (2, 4, 8) if shape.num_params > 1e6 * parts]
        found = []
        for budget in budgets:
            try:
                found.append((budget, catalog.size_for_budget(round(float(budget[:-1]) * 1e6), shape.vocab_size)))
            except ConfigError:  # the vocabulary leaves nothing for the layers
                break
        return found
    sizes = [(name, catalog.get(name)) for name in catalog.names() if name.startswith("Qwen")]
    twins = [name for name, other in sizes if other == shape]
    is_base = bool(twins) and all(map(_is_base, twins))
    smaller = [
        (f"Qwen/{name}", other)
        for name, other in sizes
        if other.family == shape.family and other.num_params < shape.num_params and _is_base(name) == is_base
    ]
    return sorted(smaller, key=lambda entry: -entry[1].num_params)


def _is_base(name: str) -> bool:
    """Whether a published name is a base model's: Qwen2.5 marks its chat models, Qwen3 its bases."""
    return name.endswith("-Base") if name.startswith("Qwen3") else not name.endswith("-Instruct")


def pace(factor: float) -> str:
    """How much slower or faster something is, from its time over the other's."""
    if factor > 2:
        return f"{factor:.1f} times as long"
    if factor < 0.5:
        return f"{1 / factor:.1f} times as fast"
    return "as fast" if abs(factor - 1) < 0.005 else f"{abs(factor - 1):.0%} {'slower' if factor > 1 else 'faster'}"
