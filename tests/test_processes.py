"""The harness for tests of several processes: `run_ranks` returns values, shows tracebacks and ends what hangs."""

import os
import time

import psutil
import pytest
import torch
from torch import distributed

from tests.support.processes import RanksFailed, run_ranks


def sum_over_ranks(size: int) -> tuple[int, list[float]]:
    rank = distributed.get_rank()
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == (str(rank), str(rank), "2")
    values = torch.arange(size, dtype=torch.float32) * 10**rank
    distributed.all_reduce(values)
    return rank, values.tolist()


def fail_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("rank one has no data")
    distributed.barrier()


def die_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        os._exit(3)
    distributed.barrier()


def hang_on_rank_one() -> None:
    while distributed.get_rank() == 1:
        time.sleep(60)


def join_the_group_itself() -> int:
    assert not distributed.is_initialized()
    distributed.init_process_group("gloo")
    return distributed.get_world_size()


def test_run_ranks_returns_what_each_rank_returned():
    assert run_ranks(sum_over_ranks, 3) == [(0, [0.0, 11.0, 22.0]), (1, [0.0, 11.0, 22.0])]


def test_run_ranks_lets_a_function_join_the_group_from_torchruns_environment():
    assert run_ranks(join_the_group_itself, world_size=3, init_group=False) == [3, 3, 3]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (fail_on_rank_one, r"(?s)rank 1: Traceback.*in fail_on_rank_one.*ValueError: rank one has no data"),
        (die_on_rank_one, r"rank 1: died without a traceback"),
    ],
)
def test_run_ranks_raises_the_traceback_of_a_failed_rank_and_leaves_no_process(function, found):
    with pytest.raises(RanksFailed, match=found):
        run_ranks(function)
    assert not ranks_alive()


def test_run_ranks_ends_a_rank_that_hangs_and_says_where_it_hung():
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 did not end in 8 s.*in hang_on_rank_one"):
        run_ranks(hang_on_rank_one, seconds=8)
    assert not ranks_alive()


def ranks_alive() -> list[int]:
    """Processes with a rank below this one; the fork server itself has none."""
    below = psutil.Process().children(recursive=True)
    return [process.pid for process in below if is_rank(process)]


def is_rank(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return parent is not None and parent.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
