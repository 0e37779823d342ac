"""Progress on stderr: bars and remarks on a terminal, otherwise only the remarks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
