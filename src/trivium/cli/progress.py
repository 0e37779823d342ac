"""Progress on stderr: bars and remarks on a terminal, otherwise only the remarks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trivium.data.store.build import BuildProgress, Listener


class Waiting:
    """Callbacks for progress."""

    def __init__(self, note: Callable[[str], None], bar: Callable[[str], Callable[[int, int], None]]) -> None:
        self.note = note
        """Prints one line."""
        self.bar = bar
        """Starts a bar with a name; returns what to call with (done, total)."""


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Show bars and remarks until the block ends."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield Waiting(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True), bar)


@contextmanager
def building() -> "Iterator[Listener]":
    """Show the builds of the block: a bar each on a terminal, elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from trivium.data.store.build import Listener

    console = Console(stderr=True)
    listener = Listener(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    if not console.is_terminal:
        yield listener
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        class Bars(Listener):
            def advance(self, progress: "BuildProgress") -> None:
                if progress.name not in tasks:
                    tasks[progress.name] = bars.add_task(progress.name, total=progress.total_bytes)
                text = f"{progress.name}: {progress.figures}"
                bars.update(tasks[progress.name], completed=progress.num_bytes, description=text)

        yield Bars(listener.note)
