"""What happens inside a worker: read, compute, keep; no database.

A worker is a thread of this process, a process of this machine, or a Dask worker somewhere else.
Reading the next batch and keeping the last one go on while a batch is computed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any, Protocol, TypeVar

from ..errors import CellstoreError, StorageError, first_line

Order = TypeVar("Order", contravariant=True)
Loaded = TypeVar("Loaded")
Made = TypeVar("Made")
Result = TypeVar("Result", covariant=True)

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class Step(Protocol[Order, Loaded, Made, Result]):
    """What a worker does with images. Made once in each worker, used for many images."""

    def read(self, order: Order) -> Loaded:
        """Open the files of one image."""

    def compute(self, loaded: Sequence[Loaded]) -> Sequence[Made]:
        """Work on the images of a batch; an answer for each, in their order."""

    def keep(self, made: Made) -> Result:
        """Write the files of one image; return what its rows need."""


AnyStep = Step[Any, Any, Any, Any]


@dataclass(frozen=True)
class Success:
    """The result of one image, and the seconds that it took."""

    result: Any
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why one image failed: a sentence, and all that is known. ``may_pass``: not its own fault."""

    sentence: str
    detail: str
    may_pass: bool


@dataclass(frozen=True)
class Stop:
    """An error that the next image would meet, too: a full disk, a network that cannot be read."""

    error: CellstoreError


Answer = Success | Failure | Stop

_own = threading.local()  # a step may not be shared by threads


def carry_out(make: Callable[[], AnyStep], orders: Sequence[Any], batch: int) -> list[Answer]:
    """Work on ``orders``, ``batch`` at a time; return an answer for each, in their order."""
    try:
        step = _step(make)
    except CellstoreError as error:
        return [Stop(error)] * len(orders)
    batches = [orders[start : start + batch] for start in range(0, len(orders), batch)]
    if len(batches) == 1:
        return _kept(step, *_computed(step, _read(step, batches[0])))
    return [answer for answers in _overlapped(step, batches) for answer in answers]


def _step(make: Callable[[], AnyStep]) -> AnyStep:
    if getattr(_own, "make", None) != make:
        _own.step = make()
        _own.make = make
    step: AnyStep = _own.step
    return step


def _overlapped(step: AnyStep, batches: Sequence[Sequence[Any]]) -> Iterator[list[Answer]]:
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as keeper:
        coming = reader.submit(_read, step, batches[0])
        kept: list[Future[list[Answer]]] = []
        for number in range(len(batches)):
            loaded = coming.result()
            if number + 1 < len(batches):
                coming = reader.submit(_read, step, batches[number + 1])
            kept.append(keeper.submit(_kept, step, *_computed(step, loaded)))
        yield from (future.result() for future in kept)


def _read(step: AnyStep, orders: Sequence[Any]) -> list[Any]:
    return [_tried(step.read, order) for order in orders]


def _computed(step: AnyStep, loaded: list[Any]) -> tuple[list[Any], float]:
    """What the images of a batch give, those that could be read; and the seconds for each."""
    started = time.perf_counter()
    good = [item for item in loaded if not isinstance(item, Failure)]
    made = iter(_of_batch(step, good))
    results = [item if isinstance(item, Failure) else next(made) for item in loaded]
    return results, (time.perf_counter() - started) / max(1, len(loaded))


def _of_batch(step: AnyStep, loaded: list[Any]) -> list[Any]:
    if not loaded:
        return []
    made = _tried(step.compute, loaded)
    if not isinstance(made, Failure):
        return list(made)
    if len(loaded) == 1:
        return [made]
    # One of them spoils the batch: each for itself, so that it fails alone.
    return [one for item in loaded for one in _of_batch(step, [item])]


def _kept(step: AnyStep, made: list[Any], seconds: float) -> list[Answer]:
    return [_answer(step, item, seconds) for item in made]


def _answer(step: AnyStep, made: Any, seconds: float) -> Answer:
    if isinstance(made, Failure):
        return made
    started = time.perf_counter()
    try:
        kept = step.keep(made)
    except StorageError as error:
        return Stop(error)  # of a file that is written, not of one that is read
    except Exception as error:
        return explained(error)
    return Success(kept, seconds + time.perf_counter() - started)


def _tried(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:
        return explained(error)


def explained(error: Exception) -> Failure:
    """Return what is kept of an error: of an unexpected one, its traceback."""
    known = isinstance(error, CellstoreError)
    detail = str(error) if known else "".join(traceback.format_exception(error))
    may_pass = not known or isinstance(error.__cause__, OSError)
    return Failure(first_line(error), detail, may_pass)


def set_up_process(threads: int) -> None:
    """Prepare a process that only works: few threads, no Ctrl-C, no life without its parent."""
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    # Ctrl-C, and the SIGTERM that clusters send to all of a job, are for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True, name="cellstore-parent").start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def prepare(make: Callable[[], AnyStep]) -> CellstoreError | None:
    """Make the step of this worker, so that its first chunk need not; the error if it cannot."""
    try:
        _step(make)
    except CellstoreError as error:
        return error
    return None
