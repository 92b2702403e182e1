"""Work done ahead of whoever needs it, in threads: reading while a network computes.

Decoding, hashing and torch's arithmetic let other threads run. What comes, and in which order, does
not depend on timing. Errors come out where the result would have; threads end when the taker stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")

_LOOK_AROUND = 0.1
"""Seconds after which a thread that cannot hand over looks whether it is still wanted."""


def read_ahead(ids: Iterable[S], read: Callable[[S], T], workers: int) -> Generator[T, None, None]:
    """Yield ``read(id)`` for all ``ids`` in their order, ``workers`` of them in the making.

    At most ``workers + 1`` results wait, or are being made, beside the one that was yielded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cellstore-read")
    waiting: deque[Future[T]] = deque()
    try:
        for one in ids:
            waiting.append(pool.submit(read, one))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _End:
    """The last thing in a queue, with the error that ended it, if one did."""

    error: BaseException | None = None


class Ahead(Generic[T]):
    """Iterate over it to get what ``items`` yields, made by a thread up to ``depth`` items ahead.

    Beside those, one item is in the making. ``items`` is closed when it is exhausted, and when the
    taker closes the iterator, an error passes through it, or it is forgotten.
    """

    def __init__(self, items: Generator[T, None, None] | Iterator[T], depth: int = 1) -> None:
        self._items = items
        self._queue: Queue[T | _End] = Queue(depth)
        self._unwanted = Event()

    def __iter__(self) -> Generator[T, None, None]:
        """Start the thread, and yield what it makes."""
        thread = Thread(target=self._make, name="cellstore-ahead", daemon=True)
        thread.start()
        try:
            while not isinstance(found := self._queue.get(), _End):
                yield found
                del found  # it may be a gigabyte, and the next one is coming
            if found.error is not None:
                raise found.error
        finally:
            self._unwanted.set()
            self._clear()
            thread.join()

    def _clear(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            return

    def _make(self) -> None:
        end = _End()
        try:
            for item in self._items:
                if not self._hand_over(item):
                    break
                del item
        except BaseException as error:
            end = _End(error)
        finally:
            _close(self._items)
        self._hand_over(end)

    def _hand_over(self, item: T | _End) -> bool:
        while not self._unwanted.is_set():
            try:
                self._queue.put(item, timeout=_LOOK_AROUND)
            except Full:
                continue
            return True
        return False


def _close(items: Any) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()
