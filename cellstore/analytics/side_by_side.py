"""Several readers at once, each in a thread, for work that lets other threads run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
AHEAD = 4
"""What each reader may have read that nobody has taken yet."""
_WAIT_SECONDS = 0.2


def side_by_side(readers: Sequence[Callable[[], Iterator[T]]]) -> Iterator[T]:
    """Yield what all ``readers`` yield, as it comes; no more than a few items wait.

    The first exception of a reader is raised; then, and when nobody listens any more, all stop.
    """
    if len(readers) == 1:
        yield from readers[0]()
        return
    shared = _Shared[T](max(1, len(readers)) * AHEAD)
    threads = [
        threading.Thread(target=shared.read, args=(reader,), daemon=True) for reader in readers
    ]
    for thread in threads:
        thread.start()
    try:
        yield from shared.items(len(threads))
    finally:
        shared.stop.set()
        for thread in threads:
            thread.join()


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Shared(Generic[T]):
    def __init__(self, room: int) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(room)
        self.stop = threading.Event()

    def read(self, reader: Callable[[], Iterator[T]]) -> None:
        try:
            for item in reader():
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(_End(error))
        else:
            self._put(_End())

    def _put(self, item: T | _End) -> bool:
        while not self.stop.is_set():
            try:
                self._queue.put(item, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def items(self, readers: int) -> Iterator[T]:
        while readers:
            item = self._queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                readers -= 1
