"""Packing ahead of the training step: a background thread prepares the batches of the next steps.

Since a step is a pure function of its number, nothing about the run depends on how far ahead the thread is.
"""

from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Thread
from types import TracebackType

from trivium.data.batch.pack import Batch, BatchSource

POLL_SECONDS = 0.1


class Prefetch:
    """The steps [first, last) of a source, one after another, each packed before it is asked for.

    Args:
        source: where the batches come from.
        first, last: steps.
        rank, world_size: see `BatchSource.step`.
        prepare: what is done to a batch in the thread, for example `Batch.pinned` where a GPU will copy it.
        depth: steps that may be waiting at a time; their tokens are all the memory that this takes.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def next(self) -> list[Batch]:
        """The micro-batches of the next step.

        Raises: whatever the source raised for it.
        """
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
