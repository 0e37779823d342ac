"""How far a build is, on stderr: a bar on a terminal, a plain line every ten seconds elsewhere.

Counts nothing itself. Imported by `build.py`.
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class BuildProgress:
    """Shows one build; `total_bytes` None means that nobody knows how much there is."""

    def __init__(self, name: str, total_bytes: int | None) -> None:
        self._name = name
        self._total_bytes = total_bytes
        self._num_bytes = 0
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "BuildProgress":
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self._name, total=self._total_bytes)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int, num_tokens: int, num_rejected: int) -> None:
        """`num_bytes` more were read; there are `num_tokens` tokens and `num_rejected` refused rows so far."""
        self._num_bytes += num_bytes
        figures = f"{num_tokens:,} tokens, {num_rejected:,} rows refused"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_bytes, description=f"{self._name}: {figures}")
        elif time.monotonic() - self._last_line > PLAIN_EVERY_SECONDS:
            self._last_line = time.monotonic()
            share = f" of about {self._total_bytes / 2**20:,.0f}" if self._total_bytes else ""
            print(f"{self._name}: {self._num_bytes / 2**20:,.0f}{share} MiB, {figures}", file=sys.stderr, flush=True)
