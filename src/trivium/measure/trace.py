"""The most memory of an optimizer step, found by running the engine on tensors that have sizes and no values.

The network, the adapter, the loss and the optimizer are the real ones; each storage is counted from when an operator
first returns it until nothing refers to it. Needs neither the memory nor the device, and is a check of
`plan.memory`. Of what kernels take and give back inside themselves it knows the large parts only (`fake_kernels`), and
nothing of what is not the allocator's. One device only. Imports torch, so the planner's search never waits for it.
"""

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.config.run import Optimizer
from trivium.data.batch.pack import Batch
from trivium.engine import optim
from trivium.engine.engine import Engine
from trivium.measure.fake_kernels import FakeNF4Linear, fake_kernels, scratch_of_a_cpu, scratch_of_a_gpu
from trivium.measure.synthetic import DTYPES, synthetic_batches
from trivium.model import adapter
from trivium.model.qwen import Linear, Qwen
from trivium.plan.workload import DeviceType, Workload

LEARNING_RATE = 1e-4  # any
GRANULE_BYTES = 512  # sizes of blocks on a GPU are multiples of this. Source: `CUDACachingAllocator.cpp` in PyTorch
REST = "activations and temporaries"


@dataclass(frozen=True)
class Trace:
    """What a step has allocated.

    Attributes:
        peak_bytes: the most at one time.
        phases: the most in each phase: forward (with the loss), backward, optimizer.
        items: bytes by what they are for, at the peak; they add up to it.
        seconds: how long the trace took.
    """

    peak_bytes: int
    phases: dict[str, int]
    items: dict[str, int]
    seconds: float


def trace_peak(workload: Workload) -> Trace:
    """Run one optimizer step, with the moments there already, without values.

    Two micro-batches show what accumulation needs, however many more there are.

    Raises: ValueError for more than one device.
    """
    if workload.num_devices != 1:
        raise ValueError(f"a trace is of one device, and the workload has {workload.num_devices}")
    start = time.perf_counter()
    model = _model_without_storage(workload)
    batches = synthetic_batches(replace(workload, step_tokens=min(workload.step_tokens, 2 * workload.micro_tokens)))
    ledger = _Ledger(workload.device_type)
    with FakeTensorMode() as fake, ledger, fake_kernels(workload.device_type):
        _give_storage(model)
        config = Optimizer(lr=LEARNING_RATE, weight_decay=0.0, state_dtype=workload.state_dtype)
        engine = Engine(model, config)
        ledger.name("frozen weights", [*model.parameters(), *model.buffers()])
        ledger.name("weights", engine.parameters.values())
        ledger.name("moments", optim.state_tensors(engine.optimizer, engine.parameters).values())
        batches = [_on_fake(batch, fake) for batch in batches]
        engine.forward_backward(batches)
        ledger.name("gradients", [p.grad for p in engine.parameters.values() if p.grad is not None])
        ledger.phase = "optimizer"
        engine.optimizer_step(LEARNING_RATE, batches)
    return Trace(
        peak_bytes=ledger.peak_bytes,
        phases=ledger.phases,
        items=ledger.items(),
        seconds=time.perf_counter() - start,
    )


class _Ledger(TorchDispatchMode):
    """Every storage that appears and goes, in order."""

    def __init__(self, device_type: DeviceType) -> None:
        super().__init__()
        self.granule_bytes = GRANULE_BYTES if device_type == "gpu" else 1
        self.scratch_bytes = scratch_of_a_gpu if device_type == "gpu" else scratch_of_a_cpu
        self.phase = "forward"
        self.phases: dict[str, int] = {}
        self.changes: list[tuple[int, int]] = []  # a storage's number, and bytes more or less
        self.live: dict[int, tuple[int, Any]] = {}  # by address: number, weak reference
        self.names: dict[int, str] = {}
        self.num_storages = self.total_bytes = self.peak_bytes = self.changes_to_peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a loss or a norm that is read on the host
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, FakeTensor):
                self._see(leaf.untyped_storage())
        self._pass(self.scratch_bytes(func, args))
        return out

    def name(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say what storages are for."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self.names[self.live[tensor.untyped_storage()._cdata][0]] = name

    def items(self) -> dict[str, int]:
        """Bytes at the peak by name."""
        at_peak: dict[str, int] = {}
        for number, num_bytes in self.changes[: self.changes_to_peak]:
            name = self.names.get(number, REST)
            at_peak[name] = at_peak.get(name, 0) + num_bytes
        return {name: num_bytes for name, num_bytes in at_peak.items() if num_bytes}

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self.live:
            return
        num_bytes = -(-storage.nbytes() // self.granule_bytes) * self.granule_bytes
        number = self._take(num_bytes)

        def free(_: object) -> None:
            del self.live[address]
            self._give(number, num_bytes)

        self.live[address] = number, weakref.ref(storage, free)

    def _pass(self, num_bytes: int) -> None:
        """What is taken and given back within an operator."""
        if num_bytes:
            self._give(self._take(num_bytes), num_bytes)

    def _take(self, num_bytes: int) -> int:
        number = self.num_storages
        self.num_storages += 1
        self.changes.append((number, num_bytes))
        self.total_bytes += num_bytes
        phase = "backward" if torch._C._current_graph_task_id() != -1 else self.phase
        self.phases[phase] = max(self.phases.get(phase, 0), self.total_bytes)
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.changes_to_peak = self.total_bytes, len(self.changes)
        return number

    def _give(self, number: int, num_bytes: int) -> None:
        self.changes.append((number, -num_bytes))
        self.total_bytes -= num_bytes


def _model_without_storage(workload: Workload) -> Qwen:
    """The network on the meta device, adapted where that is asked for."""
    dtype = DTYPES[workload.compute_dtype]
    with torch.device("meta"):
        model = Qwen(workload.shape)
    model.compute_dtype, model.activation_checkpointing = dtype, workload.activation_checkpointing
    if workload.adapter is None:
        return model
    model.to(dtype)
    if workload.weights == "nf4":
        for path, module in list(model.named_modules()):
            if isinstance(module, Linear) and path != "lm_head":
                model.set_submodule(path, FakeNF4Linear(module, dtype))
    plain = workload.adapter.model_copy(update={"init": "default"})
    adapter.inject(model, plain, seed=0, token_ids=range(workload.num_token_rows))
    if workload.adapter.init != "default":
        _remember_start(model)
    return model


def _remember_start(model: Qwen) -> None:
    """An adapter that starts from the weights keeps its initial values."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and path.endswith((f"lora_A.{adapter.NAME}", f"lora_B.{adapter.NAME}")):
            module.register_buffer("start", torch.empty_like(module.weight), persistent=False)


def _give_storage(model: Qwen) -> None:
    """Put each of the model's tensors on the fake device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _on_fake(batch: Batch, fake: FakeTensorMode) -> Batch:
    """The batch without values; what the host alone reads stays."""
    fields: dict[str, Any] = {
        name: fake.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **fields)
