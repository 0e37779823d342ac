"""Find the peak memory of an optimizer step by running the engine on fake tensors, to check `plan/memory.py`.

The network, adapter, loss and optimizer are the real ones, on tensors with shapes and no values, so neither the memory
nor the device is needed. A storage counts from its first appearance until nothing refers to it. Buffers inside kernels
are counted only if they are large (`fake_kernels`), memory outside the allocator is not counted. One device only.
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

from tests.support.fake_kernels import FakeNF4Linear, fake_kernels, scratch_of_a_cpu, scratch_of_a_gpu
from trivium.config.run import Optimizer
from trivium.data.batch.pack import Batch
from trivium.engine import optim
from trivium.engine.engine import Engine
from trivium.measure.synthetic import DTYPES, synthetic_batches
from trivium.model import adapter
from trivium.model.qwen import Linear, Qwen
from trivium.plan.workload import DeviceType, Workload

LR = 1e-4  # the value does not matter
BLOCK_BYTES = 512  # a GPU allocates multiples of this. Source: `CUDACachingAllocator.cpp` in PyTorch
REST = "activations and temporaries"


@dataclass(frozen=True)
class Trace:
    """The allocated memory of a step.

    Attributes:
        phases: peak bytes of each phase: forward (with the loss), backward, optimizer.
        items: bytes by category at the peak; they add up to `peak_bytes`.
        seconds: duration of the trace.
    """

    peak_bytes: int
    phases: dict[str, int]
    items: dict[str, int]
    seconds: float


def trace_peak(workload: Workload) -> Trace:
    """Trace one optimizer step with existing moments.

    At most two micro-batches are traced, since more need no more memory.

    Raises: ValueError for more than one device.
    """
    if workload.num_devices != 1:
        raise ValueError(f"expected a workload of one device, found {workload.num_devices} devices")
    start = time.perf_counter()
    model = _model_without_storage(workload)
    batches = synthetic_batches(replace(workload, step_tokens=min(workload.step_tokens, 2 * workload.micro_tokens)))
    log = _AllocationLog(workload.device_type)
    with FakeTensorMode() as fake, log, fake_kernels(workload.device_type):
        _give_storage(model)
        config = Optimizer(lr=LR, weight_decay=0.0, state_dtype=workload.state_dtype)
        engine = Engine(model, config)
        log.name("frozen weights", [*model.parameters(), *model.buffers()])
        log.name("weights", engine.parameters.values())
        log.name("moments", optim.state_tensors(engine.optimizer, engine.parameters).values())
        batches = [_on_fake(batch, fake) for batch in batches]
        engine.forward_backward(batches)
        log.name("gradients", [p.grad for p in engine.parameters.values() if p.grad is not None])
        log.phase = "optimizer"
        engine.optimizer_step(LR, batches)
    return Trace(
        peak_bytes=log.peak_bytes,
        phases=log.phases,
        items=log.items(),
        seconds=time.perf_counter() - start,
    )


class _AllocationLog(TorchDispatchMode):
    """Records every storage that is allocated and freed, in order."""

    def __init__(self, device_type: DeviceType) -> None:
        super().__init__()
        self.block_bytes = BLOCK_BYTES if device_type == "gpu" else 1
        self.scratch_bytes = scratch_of_a_gpu if device_type == "gpu" else scratch_of_a_cpu
        self.phase = "forward"
        self.phases: dict[str, int] = {}
        self.changes: list[tuple[int, int]] = []  # number of a storage, bytes allocated (or freed, negative)
        self.live: dict[int, tuple[int, Any]] = {}  # by address: number, weak reference
        self.names: dict[int, str] = {}
        self.num_storages = self.total_bytes = self.peak_bytes = self.changes_to_peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a loss or norm read on the host
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, FakeTensor):
                self._track(leaf.untyped_storage())
        if scratch := self.scratch_bytes(func, args):  # allocated and freed inside the operator
            self._free(self._allocate(scratch), scratch)
        return out

    def name(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Name the category of storages."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self.names[self.live[tensor.untyped_storage()._cdata][0]] = name

    def items(self) -> dict[str, int]:
        """Bytes at the peak by category."""
        at_peak: dict[str, int] = {}
        for number, num_bytes in self.changes[: self.changes_to_peak]:
            name = self.names.get(number, REST)
            at_peak[name] = at_peak.get(name, 0) + num_bytes
        return {name: num_bytes for name, num_bytes in at_peak.items() if num_bytes}

    def _track(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self.live:
            return
        num_bytes = -(-storage.nbytes() // self.block_bytes) * self.block_bytes
        number = self._allocate(num_bytes)

        def free(_: object) -> None:
            del self.live[address]
            self._free(number, num_bytes)

        self.live[address] = number, weakref.ref(storage, free)

    def _allocate(self, num_bytes: int) -> int:
        number = self.num_storages
        self.num_storages += 1
        self.changes.append((number, num_bytes))
        self.total_bytes += num_bytes
        phase = "backward" if torch._C._current_graph_task_id() != -1 else self.phase
        self.phases[phase] = max(self.phases.get(phase, 0), self.total_bytes)
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.changes_to_peak = self.total_bytes, len(self.changes)
        return number

    def _free(self, number: int, num_bytes: int) -> None:
        self.changes.append((number, -num_bytes))
        self.total_bytes -= num_bytes


def _model_without_storage(workload: Workload) -> Qwen:
    """The network on the meta device, with its adapter."""
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
    if workload.adapter.init != "default":  # the adapter keeps its initial values
        for path, module in model.named_modules():
            if isinstance(module, Linear) and path.endswith((f"lora_A.{adapter.NAME}", f"lora_B.{adapter.NAME}")):
                module.register_buffer("start", torch.empty_like(module.weight), persistent=False)
    return model


def _give_storage(model: Qwen) -> None:
    """Replace the model's meta tensors by fake ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _on_fake(batch: Batch, fake: FakeTensorMode) -> Batch:
    """The batch with fake tensors."""
    fields: dict[str, Any] = {
        name: fake.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **fields)
