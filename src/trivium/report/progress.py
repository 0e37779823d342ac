"""Progress of what takes long: bars and remarks on a terminal, otherwise only remarks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from trivium.data.store.build import BuildProgress, Listener


class Waiting(NamedTuple):
    """Callbacks for progress."""

    note: Callable[[str], None]
    """Prints one line."""
    bar: Callable[[str], Callable[[int, int], None]]
    """Starts a bar with a name; returns a function of (done, total)."""


@contextmanager
def _progress() -> "Iterator[tuple[Progress, Callable[[str], None]]]":
    """Bars that disappear at the end, and a function that prints one line above them."""
    from rich.progress import Progress

    from trivium.report.panel import find_console, print_line

    console, _ = find_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars, lambda text: print_line(console, text)


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Show bars and remarks until the block ends."""
    with _progress() as (bars, note):

        def bar(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield Waiting(note, bar)


@contextmanager
def building() -> "Iterator[Listener]":
    """Show progress of the builds in the block: one bar each on a terminal, otherwise a line every ten seconds."""
    from trivium.data.store.build import Listener

    with _progress() as (bars, note):
        tasks: dict[str, TaskID] = {}

        class Bars(Listener):
            def advance(self, progress: "BuildProgress") -> None:
                if progress.name not in tasks:
                    tasks[progress.name] = bars.add_task(progress.name, total=progress.total_bytes)
                text = f"{progress.name}: {progress.figures}"
                bars.update(tasks[progress.name], completed=progress.num_bytes, description=text)

        yield Listener(note) if bars.disable else Bars(note)
