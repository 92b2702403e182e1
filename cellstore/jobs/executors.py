"""Who works: a thread of this process, processes of this machine, or a Dask cluster.

An executor takes chunks of images and gives back their answers. When a worker dies, the answer is a
:class:`Crash`, which tells whether the worker had that very chunk in its hands.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..config import Resources
from ..errors import (
    CellstoreError,
    MissingExtraError,
    StorageError,
    StoreError,
    UserInputError,
    first_line,
)
from .queue import Task

if TYPE_CHECKING:
    from .execute import ImageStage

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

CHUNKS = 2
"""Chunks that a worker has: one at work, one that waits behind it."""

MOST_FALSE_STARTS = 10
"""After so many deaths before it could do anything, a worker is not started again."""

POLL_SECONDS = 0.5
CONNECT_SECONDS = 10
DESERTED_SECONDS = 60
"""How long a Dask cluster may be without any worker."""
DESERTED_POLL = 0.5

Stage: TypeAlias = "ImageStage[Any, Any]"
_here = threading.local()  # networks are not shared by threads


@dataclass(frozen=True)
class Success:
    """The output of one image, and the seconds that it took."""

    output: Any
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why one image failed: a sentence, and all that is known. ``may_pass``: not its own fault.

    ``stops``: an error that the next image would meet, too: a full disk, a network that cannot be
    read.
    """

    sentence: str
    detail: str
    may_pass: bool
    stops: CellstoreError | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return what is kept of an error: of an unexpected one, its traceback."""
        known = isinstance(error, CellstoreError)
        detail = str(error) if known else "".join(traceback.format_exception(error))
        may_pass = not known or isinstance(error.__cause__, OSError)
        return cls(first_line(error), detail, may_pass)

    @classmethod
    def of_all(cls, error: CellstoreError) -> Failure:
        """Return the answer that ends a run."""
        return cls(first_line(error), str(error), may_pass=True, stops=error)


@dataclass(frozen=True)
class Crash:
    """A worker is gone. ``suspect``: it was working on this very chunk."""

    suspect: bool


Answers = list[Success | Failure]
Finished = tuple[Sequence[Task], Answers | Crash]


def work_on(given: Stage | bytes, inputs: Sequence[Any]) -> Answers:
    """Do what a stage does in a worker with each of ``inputs``; return their answers in order.

    While a batch is computed, the next one is read and the files of the last one are written.
    """
    error = load_stage(given)
    if error is not None:
        return [Failure.of_all(error)] * len(inputs)
    stage: Stage = _here.stage
    batches = [inputs[i : i + stage.batch] for i in range(0, len(inputs), stage.batch)]
    if len(batches) == 1:
        return _written(stage, *_computed(stage, _attempts(stage.read, batches[0])))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming = reader.submit(_attempts, stage.read, batches[0])
        written: list[Future[Answers]] = []
        for number in range(len(batches)):
            loaded = coming.result()
            if number + 1 < len(batches):
                coming = reader.submit(_attempts, stage.read, batches[number + 1])
            written.append(writer.submit(_written, stage, *_computed(stage, loaded)))
        return [answer for future in written for answer in future.result()]


def load_stage(given: Stage | bytes) -> CellstoreError | None:
    """Load a stage in this worker, so that its first chunk need not; the error if it cannot."""
    if getattr(_here, "given", None) != given:
        stage: Stage = pickle.loads(given) if isinstance(given, bytes) else given  # noqa: S301 - the parent's
        try:
            stage.load()
        except CellstoreError as error:
            return error
        _here.given, _here.stage = given, stage
    return None


def _attempts(function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """Call a function with each argument; a failure takes the place of what cannot be done."""
    results = []
    for argument in arguments:
        try:
            results.append(function(argument))
        except Exception as error:
            results.append(Failure.of(error))
    return results


def _computed(stage: Stage, loaded: Sequence[Any]) -> tuple[list[Any], float]:
    """What the images of a batch give, those that could be read; and the seconds for each."""
    started = time.perf_counter()
    good = [item for item in loaded if not isinstance(item, Failure)]
    made = _attempts(stage.compute, [good] if good else [])
    if made and isinstance(made[0], Failure) and len(good) > 1:
        # One of them spoils the batch: each for itself, so that it fails alone.
        made = _attempts(stage.compute, [[item] for item in good])
    results = iter(
        [one for part in made for one in ([part] if isinstance(part, Failure) else part)]
    )
    answers = [item if isinstance(item, Failure) else next(results) for item in loaded]
    return answers, (time.perf_counter() - started) / max(1, len(loaded))


def _written(stage: Stage, results: Sequence[Any], seconds: float) -> Answers:
    answers: Answers = []
    for result in results:
        if isinstance(result, Failure):
            answers.append(result)
            continue
        started = time.perf_counter()
        try:
            output = stage.write(result)
            answers.append(Success(output, seconds + time.perf_counter() - started))
        except StorageError as error:  # of a file that is written, not of one that is read
            answers.append(Failure.of_all(error))
        except Exception as error:
            answers.append(Failure.of(error))
    return answers


class Workers(Protocol):
    """Workers and the chunks that they have. ``computes_here``: in this process, not beside it."""

    computes_here: bool

    def room(self) -> int:
        """Return how many chunks more may be submitted, so that nobody waits.

        Raises:
            CellstoreError: a worker cannot load the stage, or dies whenever it tries.
        """

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Give a chunk to the worker that has least to do."""

    def in_flight(self) -> list[Sequence[Task]]:
        """Return the chunks that have not been answered."""

    def finished(self, stops: Sequence[threading.Event], *, briefly: bool) -> list[Finished]:
        """Wait for a worker, or for one of ``stops``; return the chunks that are over, in order.

        ``briefly``: only for a moment, because another worker has nothing to do.
        """

    def close(self, *, drop: bool) -> None:
        """End the workers; ``drop``: what is in flight is not waited for."""


def open_workers(stage: Stage, resources: Resources) -> Workers:
    """Return the workers that ``resources`` describe; they begin to load ``stage``.

    Raises:
        UserInputError: fewer than one worker, or no address of a scheduler.
        MissingExtraError: a Dask scheduler, and Dask is not installed.
        StoreError: the scheduler does not answer.
    """
    if resources.workers < 1:
        raise UserInputError("There must be at least one worker. Give --workers 1 or more.")
    if resources.scheduler is not None:
        return DaskCluster(stage, resources.scheduler)
    return LocalWorkers(stage, resources.workers)


class _Worker:
    """A pool of one thread or process, whether it has loaded the stage, and its chunks.

    A pool for each, so that a death is one worker's and tells which chunk it had in its hands:
    libraries that start workers again (loky) only say that one of them died.
    """

    def __init__(self, given: Stage | bytes, threads: int) -> None:
        self.given, self.threads = given, threads
        self.false_starts = 0
        self.start()

    def start(self) -> None:
        """Start the thread or process, again if it has died."""
        if isinstance(self.given, bytes):  # "spawn": torch and threads do not survive a fork
            self.pool: Executor = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=set_up_process, initargs=(self.threads,)
            )
        else:
            self.pool = ThreadPoolExecutor(1, thread_name_prefix="cellstore-worker")
        self.loading = self.pool.submit(load_stage, self.given)
        self.chunks: list[tuple[Future[Answers] | None, Sequence[Task]]] = []


class LocalWorkers:
    """One thread of this process, or some processes, which are started again when they died."""

    def __init__(self, stage: Stage, workers: int) -> None:
        self.computes_here = workers == 1
        given = stage if self.computes_here else pickle.dumps(stage)
        threads = max(1, cores() // workers)
        self._workers = [_Worker(given, threads) for _ in range(workers)]

    def room(self) -> int:
        """One chunk at work and one that waits, for each worker that has loaded the stage."""
        room = 0
        for worker in self._workers:
            if not worker.loading.done():
                continue
            if isinstance(worker.loading.exception(), BrokenProcessPool):
                worker.false_starts += 1
                if worker.false_starts >= MOST_FALSE_STARTS:
                    raise StoreError(
                        "Workers die while they start: killed, or out of memory. Free some memory, "
                        "or give fewer --workers. A Python script that asks for workers must do so "
                        "below if __name__ == '__main__':"
                    )
                worker.start()
                continue
            if (error := worker.loading.result()) is not None:
                raise error
            worker.false_starts = 0
            room += max(0, CHUNKS - len(worker.chunks))
        return room

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Give a chunk to the worker that has the fewest."""
        ready = [worker for worker in self._workers if worker.loading.done()]
        worker = min(ready, key=lambda worker: len(worker.chunks))
        try:
            worker.chunks.append((worker.pool.submit(work_on, worker.given, inputs), tasks))
        except BrokenProcessPool:  # it died while it had nothing to do
            worker.chunks.append((None, tasks))

    def in_flight(self) -> list[Sequence[Task]]:
        """Return the chunks of all workers."""
        return [tasks for worker in self._workers for _, tasks in worker.chunks]

    def finished(self, stops: Sequence[threading.Event], *, briefly: bool) -> list[Finished]:
        """Wait for the first worker; of one that died, the oldest chunk is what it died of."""
        oldest = [worker.chunks[0][0] for worker in self._workers if worker.chunks]
        if None not in oldest:
            waited_for: list[Future[Any]] = [future for future in oldest if future is not None]
            waited_for += [w.loading for w in self._workers if not w.loading.done()]
            _wait(waited_for, stops, briefly)
        finished: list[Finished] = []
        for worker in self._workers:
            crashed = False
            while worker.chunks:
                future, tasks = worker.chunks[0]
                if not crashed and future is not None and not future.done():
                    break
                worker.chunks.pop(0)
                if future is None or crashed or isinstance(future.exception(), BrokenProcessPool):
                    finished.append((tasks, Crash(suspect=not crashed and future is not None)))
                    crashed = True
                else:
                    finished.append((tasks, future.result()))
            if crashed:
                worker.start()
        return finished

    def close(self, *, drop: bool) -> None:
        """End all workers; processes that are to be dropped are killed, a thread ends alone."""
        for worker in self._workers:
            if drop and isinstance(worker.pool, ProcessPoolExecutor):
                for process in list((worker.pool._processes or {}).values()):
                    process.kill()
            worker.pool.shutdown(wait=not (drop and self.computes_here), cancel_futures=drop)


def _wait(
    futures: Sequence[Future[Any]], stops: Sequence[threading.Event], briefly: bool
) -> set[Future[Any]]:
    """Wait for one of ``futures`` or ``stops``; return the futures that are done."""
    while True:
        done, _ = wait(futures, POLL_SECONDS, FIRST_COMPLETED)
        if done or briefly or not futures or any(stop.is_set() for stop in stops):
            return done


def set_up_process(threads: int) -> None:
    """Prepare a process that only works: few threads, no Ctrl-C, no life without its parent."""
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    # Ctrl-C, and the SIGTERM that clusters send to all of a job, are for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def die_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True, name="cellstore-parent").start()


class DaskCluster:
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    computes_here = False

    def __init__(self, stage: Stage, address: str) -> None:
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
        self._stage = pickle.dumps(stage)
        self._chunks: list[tuple[Future[Answers], Sequence[Task]]] = []
        self._deserted: float | None = None

    def room(self) -> int:
        """Two chunks for each thread of the workers that there are now."""
        try:
            threads: int = sum(self._client.nthreads().values())
        except (OSError, TimeoutError, AssertionError) as error:
            raise self._gone() from error
        if threads:
            self._deserted = None
            return CHUNKS * threads - len(self._chunks)
        self._deserted = self._deserted or time.monotonic()
        if time.monotonic() - self._deserted > DESERTED_SECONDS:
            raise StoreError(
                f"The Dask scheduler at {self._address} has no workers. Start some with: "
                f"dask worker {self._address}"
            )
        time.sleep(DESERTED_POLL)
        return 0

    def _gone(self) -> StoreError:
        return StoreError(
            f"The Dask scheduler at {self._address} is gone. What is done is kept; start it again "
            "and run the same command."
        )

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Give a chunk to the scheduler."""
        self._chunks.append((self._executor.submit(work_on, self._stage, inputs), tasks))

    def in_flight(self) -> list[Sequence[Task]]:
        """Return the chunks that the scheduler has."""
        return [tasks for _, tasks in self._chunks]

    def finished(self, stops: Sequence[threading.Event], *, briefly: bool) -> list[Finished]:
        """Wait for a chunk. Errors of an image are answers; others are the cluster's own."""
        from distributed.scheduler import KilledWorker

        finished: list[Finished] = []
        done = _wait([future for future, _ in self._chunks], stops, briefly)
        over = [chunk for chunk in self._chunks if chunk[0] in done]
        self._chunks = [chunk for chunk in self._chunks if chunk[0] not in done]
        for future, tasks in over:
            if future.cancelled():
                raise self._gone()
            error = future.exception()
            if isinstance(error, KilledWorker):
                finished.append((tasks, Crash(suspect=True)))
            elif error is not None:
                raise StoreError(
                    f"The Dask cluster at {self._address} cannot do this work "
                    f"({first_line(error)}) Its scheduler and its workers need the same cellstore "
                    "as this machine."
                ) from error
            else:
                finished.append((tasks, future.result()))
        return finished

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
