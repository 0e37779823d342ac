"""The processes that train together, and all that they say to each other.

Alone, every method returns what it was given. With torch.distributed, values travel as tensors and JSON, never as
pickles. Every rank calls the same methods in the same order: a rank that skips one leaves the others waiting.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where the tensors of collectives are: `cpu` for gloo, this rank's GPU for NCCL.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> "Ranks":
        """The ranks of the process group that was initialized; this process alone where there is none."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this rank decides, and writes records, checkpoints and reports."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in place."""
        if self.size > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)

    def from_first(self, value: Any) -> Any:
        """The first rank's value on every rank; must survive JSON."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks; must survive JSON."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(data)], device=self.device))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        found = self._all_gather(padded)
        return [json.loads(bytes(one[:size].tolist())) for one, size in zip(found, sizes, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first rank does what stands inside alone, for example builds the data; the others then find it done."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()


ALONE = Ranks()
