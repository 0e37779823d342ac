"""A trial of untrusted template code in a child process with little time and memory.

A chat template is a program from a model's folder. The sandbox keeps it from files and code, but not from loops and
strings that never end.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from trivium.errors import ConfigError

CPU_SECONDS, WALL_SECONDS = 1, 30  # a busy machine may give the child little of its processors
MEMORY_BYTES = 1 << 28
OUT_OF_MEMORY = 3


def require_bounded(render: Callable[[], object], what: str) -> None:
    """Call `render` in a forked child, which ends with it; its exceptions are not errors here.

    Raises: ConfigError naming `what` when it needs more than CPU_SECONDS or MEMORY_BYTES.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: the child only renders
        child = os.fork()
    if child == 0:
        os._exit(_within_limits(render))
    needs = _wait(child)
    if needs is not None:
        raise ConfigError(
            f"{what} needs more than {needs} for a minimal conversation; expected a text at once. It is damaged or "
            "malicious: use the model's own chat template, from a source that you trust."
        )


def _within_limits(render: Callable[[], object]) -> int:
    """The child's exit code. SIGXCPU ends it when its time is over."""
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        statm = Path("/proc/self/statm")
        if statm.exists():
            size = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
        render()
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return 0  # a template that fails quickly is described by the caller, which renders it again
    return 0


def _wait(child: int) -> str | None:
    """What the child needed too much of; None if it ended within its limits."""
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"{WALL_SECONDS} seconds"
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"{CPU_SECONDS} second of computing"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_MEMORY:
        return f"{MEMORY_BYTES >> 20} MiB of memory"
    return None
