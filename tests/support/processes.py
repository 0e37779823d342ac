"""Real processes for tests: a fork server that has imported torch, and groups of ranks as torchrun starts them."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
# The server imports these once and forks, so that a new process starts in milliseconds.
context.set_forkserver_preload(
    ["tests.engine.runs", "tests.support.interrupt", "trivium.train", "torch", "peft", "bitsandbytes"]
)

GRACE_SECONDS = 1.0


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not end in time; the message has the traceback of each."""


def run_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 2,
    seconds: float = 120.0,
    init_group: bool = True,
) -> list[Any]:
    """Run a function in `world_size` processes on 127.0.0.1 and return what each rank returned, in order of rank.

    Args:
        function: a function at the top of a module, which every rank calls with `arguments`.
        arguments: what pickle can send.
        world_size: number of processes. Each has torchrun's environment variables.
        seconds: all processes are killed after this long.
        init_group: join the gloo process group before the call; without it the function does that itself.

    Raises: RanksFailed when a rank raises, dies or does not end in time. No process is left in any case.
    """
    from torch.distributed import TCPStore

    # As under torchrun the launcher holds the store, so that no port is chosen before it is bound.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, results, outcomes = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / str(rank) for rank in range(world_size)]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                environment = torchrun_environment(rank, world_size, store.port)
                task = (sender, environment, str(stacks[rank]), init_group, function, arguments)
                process = context.Process(target=run_rank, args=task, daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                results.append(receiver)
            outcomes = collect(results, time.monotonic() + seconds)
            failures = describe_failures(processes, stacks, outcomes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if failures:
        raise RanksFailed("\n".join(failures))
    return [outcomes[rank][1] for rank in range(world_size)]


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def run_rank(
    sender: Connection,
    environment: dict[str, str],
    stack_file: str,
    init_group: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What each process does: join the group, call the function, send what it returned or its traceback."""
    os.environ.update(environment)
    from torch import distributed

    with open(stack_file, "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            if init_group:
                distributed.init_process_group("gloo")
            value = function(*arguments)
            if distributed.is_initialized():
                distributed.destroy_process_group()
            sender.send((True, value))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def collect(results: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    """By rank, (True, value) or (False, traceback); nothing of a rank that did not end.

    When one rank fails the others may wait for it forever: they get a short time more.
    """
    outcomes: dict[int, tuple[bool, Any]] = {}
    while len(outcomes) < len(results):
        waiting = [receiver for rank, receiver in enumerate(results) if rank not in outcomes]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            try:
                outcome = receiver.recv()
            except EOFError:
                outcome = (False, "died without a traceback")
            outcomes[results.index(receiver)] = outcome
            if not outcome[0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def describe_failures(
    processes: list[Any], stacks: list[Path], outcomes: dict[int, tuple[bool, Any]], seconds: float
) -> list[str]:
    """A paragraph for each rank that failed; for one that is still running, where it stands."""
    failures = [f"rank {rank}: {text}" for rank, (succeeded, text) in outcomes.items() if not succeeded]
    any_failed = bool(failures)
    for rank in sorted(set(range(len(processes))) - outcomes.keys()):
        os.kill(processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        how = "was still running when another failed" if any_failed else f"did not end in {seconds:g} s"
        failures.append(f"rank {rank} {how}:\n{stacks[rank].read_text()}")
    return failures
