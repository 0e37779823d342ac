"""Interrupts code at its n-th file-system call, by killing the process or by failing the call as a full disk does.

Nothing of the code under test is replaced. Calls are seen through Python's audit events (open, mkdir, rename, remove,
rmdir, scandir, rmtree); those that raise no event are counted where they meet the system: `os.fsync`, and every write
of a file opened for writing, which can be cut off in its middle too.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
KILLED = 77
FAILED = 78


class Interrupter:
    """Counts file-system calls below a folder, and interrupts before call number `stop_at`, counted from 0."""

    def __init__(self, folder: str, stop_at: int | None, kill: bool) -> None:
        self.folder, self.stop_at, self.kill = folder, stop_at, kill
        self.calls: list[str] = []
        self.is_on = True

    def count(self, call: str) -> None:
        if not self.is_on:
            return
        self.calls.append(call)
        if len(self.calls) - 1 == self.stop_at:
            if self.kill:
                os._exit(KILLED)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], int | str | os.PathLike) and self.is_below(arguments):
            self.count(event)

    def is_below(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call is about the folder; a path relative to an open directory comes from rmtree alone."""
        path = arguments[0]
        return isinstance(path, int) or not os.path.isabs(path) or os.fspath(path).startswith(self.folder)

    def install(self) -> None:
        """See all calls of this process from now on; there is no way back."""
        count, fsync, open_file = self.count, os.fsync, io.open

        class CountedFile(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                count("write")
                done = super().write(view[: len(view) // 2])
                count("second half of a write")
                return done + super().write(view[len(view) // 2 :])

        def counted_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode != "wb":
                return open_file(file, mode, *arguments, **options)
            return io.BufferedWriter(CountedFile(file, "w"))

        def counted_fsync(descriptor: int) -> None:
            count("fsync")
            fsync(descriptor)

        io.open, os.fsync = counted_open, counted_fsync
        sys.addaudithook(self.audit)


def run_interrupted(
    action: Callable[[Path], None], folder: Path, stop_at: int | None, kill: bool, calls_file: Path
) -> None:
    """Do something to a folder in this process, interrupted; the calls that it made are written to a file."""
    interrupter = Interrupter(str(folder), stop_at, kill)
    interrupter.install()
    code = 0
    try:
        action(folder)
    except (OSError, TriviumError):
        code = FAILED
    interrupter.is_on = False
    calls_file.write_text("\n".join(interrupter.calls))
    os._exit(code)
