"""Prefetch: a background thread packs the batches of the next steps while the current step trains.

The batches depend only on the step number, so prefetching never changes a run.
"""

from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Thread

from trivium.data.batch.pack import Batch, BatchSource

POLL_SECONDS = 0.1


class Prefetch:
    """Packs the steps [first, last) of a source in the background and hands them out in order.

    Args:
        source: the source of batches.
        first, last: range of steps.
        rank, world_size: see `BatchSource.step`.
        prepare: applied to each batch in the thread, for example `Batch.pinned`.
        depth: maximum number of finished steps kept in memory.
    """

    def __init__(
        self,
        source: BatchSource,
        first: int,
        last: int,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[Batch], Batch] | None = None,
        depth: int = 2,
    ) -> None:
        self._source = source
        self._steps = range(first, last)
        self._ranks = rank, world_size
        self._prepare = prepare
        self._ready: Queue[list[Batch] | BaseException] = Queue(depth)
        self._closed = Event()
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def next(self) -> list[Batch]:
        """The micro-batches of the next step; re-raises the source's error, or IndexError after the last step."""
        while True:
            try:
                found = self._ready.get(timeout=POLL_SECONDS)
            except Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise IndexError("there is no further step") from None
                continue
            if isinstance(found, BaseException):
                raise found
            return found

    def _run(self) -> None:
        for step in self._steps:
            try:
                batches = self._source.step(step, *self._ranks)
                if self._prepare is not None:
                    batches = [self._prepare(batch) for batch in batches]
                found: list[Batch] | BaseException = batches
            except BaseException as error:
                found = error
            while not self._closed.is_set():
                try:
                    self._ready.put(found, timeout=POLL_SECONDS)
                    break
                except Full:
                    continue
            if self._closed.is_set() or isinstance(found, BaseException):
                return
