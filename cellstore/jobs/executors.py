"""Who works: this process, processes of this machine, or a Dask cluster.

A crew takes chunks of orders and gives back futures of their answers. When a worker dies, the
future fails with :class:`WorkerDiedError`, which tells whether the chunk was the one in its hands.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any, Protocol, TypeVar

from ..config import Resources
from ..errors import (
    CellstoreError,
    MissingExtraError,
    StorageError,
    StoreError,
    UserInputError,
    first_line,
)

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


CHUNKS = 2
"""Chunks that a worker has: one at work, one that waits behind it."""

MOST_FALSE_STARTS = 10
"""After so many deaths before it could do anything, a worker is not started again."""

CONNECT_SECONDS = 10
DESERTED_SECONDS = 60
"""How long a Dask cluster may be without any worker."""
DESERTED_POLL = 0.5

Make = Callable[[], AnyStep]


class WorkerDiedError(StoreError):
    """A worker is gone. ``suspect``: it was working on this very chunk."""

    def __init__(self, suspect: bool) -> None:
        super().__init__("A worker died.")
        self.suspect = suspect


class Crew(Protocol):
    """Workers. ``computes_here``: in this process, which an image may kill."""

    computes_here: bool

    def start(self, make: Make) -> None:
        """Let the workers make their step; they are busy with it for a while."""

    def room(self, flying: int) -> int:
        """Return how many chunks more may be given beside ``flying``, so that nobody waits.

        Workers that died are started anew.

        Raises:
            CellstoreError: a worker cannot make its step, or dies whenever it tries.
        """

    def submit(self, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Give a chunk to the worker that has least to do."""

    def close(self, *, drop: bool) -> None:
        """Send the workers home; ``drop``: what is in flight is not waited for."""


def open_crew(resources: Resources) -> Crew:
    """Return the crew that ``resources`` describe.

    Raises:
        UserInputError: fewer than one worker, or both workers and a scheduler.
        MissingExtraError: a Dask scheduler, and Dask is not installed.
        StoreError: the scheduler does not answer.
    """
    if resources.workers < 1:
        raise UserInputError("There must be at least one worker. Give --workers 1 or more.")
    if resources.scheduler is not None:
        return DaskCluster(resources.scheduler)
    return LocalProcesses(resources.workers) if resources.workers > 1 else ThisProcess()


class ThisProcess:
    """One thread beside the one that talks to the database."""

    computes_here = True

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cellstore-worker")

    def start(self, make: Make) -> None:
        """Let the thread make the step."""
        self._make = make
        self._ready = self._pool.submit(prepare, make)

    def room(self, flying: int) -> int:
        """One chunk at work and one that waits, when the step is made."""
        return CHUNKS - flying if _is_ready(self._ready) else 0

    def submit(self, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Add a chunk to the queue of the thread."""
        return self._pool.submit(carry_out, self._make, orders, batch)

    def close(self, *, drop: bool) -> None:
        """Let the thread end; what it works on just now cannot be dropped."""
        self._pool.shutdown(wait=not drop, cancel_futures=drop)


class _Process:
    """One process, started again when it died, and the chunks that it has, oldest first."""

    def __init__(self, threads: int, make: Make) -> None:
        self._threads, self._make = threads, make
        self._false_starts = 0
        self._start()

    def _start(self) -> None:
        # "spawn": torch and threads do not survive a fork.
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=set_up_process, initargs=(self._threads,)
        )
        self._ready = self._pool.submit(prepare, self._make)
        self.chunks: list[Future[list[Answer]]] = []

    def is_ready(self) -> bool:
        """Whether the step is made; a process that died is started anew.

        Raises:
            CellstoreError: the step cannot be made, or the process dies whenever it tries.
        """
        if not self._ready.done():
            return False
        if isinstance(self._ready.exception(), BrokenProcessPool):
            self._false_starts += 1
            if self._false_starts >= MOST_FALSE_STARTS:
                raise StoreError(
                    "Workers die while they start: killed, or out of memory. Free some memory, or "
                    "give fewer --workers. A Python script that asks for workers must do so below "
                    "if __name__ == '__main__':"
                )
            self._start()
            return False
        self._false_starts = 0
        if any(chunk.done() for chunk in self.chunks):
            if all(chunk.done() for chunk in self.chunks):
                self._start()  # it died, and all its chunks have been told of
            return False
        return _is_ready(self._ready)

    def submit(self, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Hand a chunk over; what it becomes is told by the future that is returned."""
        told: Future[list[Answer]] = Future()
        told.set_running_or_notify_cancel()
        self.chunks.append(told)
        try:
            inner = self._pool.submit(carry_out, self._make, orders, batch)
        except BrokenProcessPool:
            told.set_exception(WorkerDiedError(suspect=False))
        else:
            inner.add_done_callback(partial(self._tell, told))
        return told

    def _tell(self, told: Future[list[Answer]], inner: Future[list[Answer]]) -> None:
        first = self.chunks[0] is told
        error = BrokenProcessPool() if inner.cancelled() else inner.exception()
        if isinstance(error, BrokenProcessPool):
            told.set_exception(WorkerDiedError(suspect=first))
            return
        self.chunks.remove(told)
        if error is None:
            told.set_result(inner.result())
        else:
            told.set_exception(error)

    def close(self, *, drop: bool) -> None:
        """End the process."""
        if drop:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=drop)


class LocalProcesses:
    """Processes of this machine, each a pool of its own, so that one death is one worker's."""

    computes_here = False

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._processes: list[_Process] = []
        self._working: list[_Process] = []

    def start(self, make: Make) -> None:
        """Start the processes."""
        threads = max(1, cores() // self._workers)
        for _ in range(self._workers):
            self._processes.append(_Process(threads, make))

    def room(self, flying: int) -> int:
        """One chunk at work and one that waits, for each process that is up."""
        self._working = [process for process in self._processes if process.is_ready()]
        return sum(max(0, CHUNKS - len(process.chunks)) for process in self._working)

    def submit(self, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Give a chunk to the process that has the fewest."""
        return min(self._working, key=lambda process: len(process.chunks)).submit(orders, batch)

    def close(self, *, drop: bool) -> None:
        """End all processes; those that are to be dropped are killed."""
        for process in self._processes:
            process.close(drop=drop)


def _is_ready(prepared: Future[CellstoreError | None]) -> bool:
    if not prepared.done():
        return False
    error = prepared.result()
    if error is not None:
        raise error
    return True


class DaskCluster:
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    computes_here = False

    def __init__(self, address: str) -> None:
        self._address = address
        if not re.fullmatch(r"[a-z]+://\S+:\d+", address):
            raise UserInputError(
                f"{address!r} is no address of a Dask scheduler. It looks like tcp://host:8786."
            )
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("distributed", "distributed") from error
        for name in ("distributed", "tornado", "asyncio"):  # what is wrong we say in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        make_client: Any = distributed.Client
        try:
            self._client = make_client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise StoreError(
                f"The Dask scheduler at {address} does not answer. Check the address, or leave "
                "--scheduler out to work on this machine."
            ) from error
        self._executor: Executor = self._client.get_executor(pure=False, retries=0)
        self._deserted: float | None = None

    def start(self, make: Make) -> None:
        """Make nothing yet: each worker makes its step when it gets its first chunk."""
        self._make = make

    def room(self, flying: int) -> int:
        """Two chunks for each thread of the workers that there are now."""
        threads = self._threads()
        if threads:
            self._deserted = None
            return CHUNKS * threads - flying
        self._deserted = self._deserted or time.monotonic()
        if time.monotonic() - self._deserted > DESERTED_SECONDS:
            raise StoreError(
                f"The Dask scheduler at {self._address} has no workers. Start some with: "
                f"dask worker {self._address}"
            )
        time.sleep(DESERTED_POLL)
        return 0

    def _threads(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except (OSError, TimeoutError, AssertionError) as error:
            raise self._gone() from error

    def _gone(self) -> StoreError:
        return StoreError(
            f"The Dask scheduler at {self._address} is gone. What is done is kept; start it again "
            "and run the same command."
        )

    def submit(self, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Give a chunk to the scheduler."""
        told: Future[list[Answer]] = Future()
        told.set_running_or_notify_cancel()
        inner = self._executor.submit(carry_out, self._make, orders, batch)
        inner.add_done_callback(partial(self._tell, told))
        return told

    def _tell(self, told: Future[list[Answer]], inner: Future[list[Answer]]) -> None:
        from distributed.scheduler import KilledWorker

        if inner.cancelled():
            told.set_exception(self._gone())
            return
        error = inner.exception()
        if isinstance(error, KilledWorker):
            told.set_exception(WorkerDiedError(suspect=True))
        elif error is not None:
            told.set_exception(self._refused(error))
        else:
            told.set_result(inner.result())

    def _refused(self, error: BaseException) -> BaseException:
        # Errors of an image are answers; what comes this way is of the cluster itself.
        return StoreError(
            f"The Dask cluster at {self._address} cannot do this work ({first_line(error)}) Its "
            "scheduler and its workers need the same cellstore as this machine."
        )

    def close(self, *, drop: bool) -> None:
        """Leave the cluster as it is."""
        with suppress(Exception):
            self._executor.shutdown(wait=not drop)
        self._client.close()


def cores() -> int:
    """Return the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
