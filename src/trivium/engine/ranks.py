"""Communication between the processes that train together.

In a single process every method returns its argument. With torch.distributed, values are sent as tensors and JSON, not
as pickles. All ranks must call the same methods in the same order: a rank that skips one blocks the others.
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
    """This process in its group.

    Attributes:
        rank: index of this process.
        size: number of processes.
        device: device of the tensors in collectives: `cpu` for gloo, this rank's GPU for NCCL.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> "Ranks":
        """The initialized process group, or a group of one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which makes decisions and writes files."""
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
        """Sum the gradients over all ranks, in place."""
        if self.size > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank; must be JSON."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; must be JSON."""
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
        """Run the block on rank 0 first, then on the others, for example to build a cache once."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()


ALONE = Ranks()
