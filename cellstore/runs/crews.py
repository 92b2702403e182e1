"""Who works: this process, processes of this machine, or a Dask cluster.

A crew takes chunks of orders and gives back futures of their answers. When a worker dies, the
future fails with :class:`WorkerDiedError`, which tells whether the chunk was the one in its hands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol

from ..config import Resources
from ..errors import DatabaseError, MissingExtraError, StoreError, UserInputError
from .workers import Answer, AnyStep, carry_out, idle, set_up_process

Make = Callable[[], AnyStep]


class WorkerDiedError(StoreError):
    """A worker is gone. ``suspect``: it was working on this very chunk."""

    def __init__(self, suspect: bool) -> None:
        super().__init__("A worker died.")
        self.suspect = suspect


class Crew(Protocol):
    """Workers. ``slots``: how many chunks may be in flight, so that nobody waits for the next."""

    slots: int

    def submit(self, make: Make, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
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

    slots = 2

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cellstore-worker")

    def submit(self, make: Make, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Add a chunk to the queue of the thread."""
        return self._pool.submit(carry_out, make, orders, batch)

    def close(self, *, drop: bool) -> None:
        """Let the thread end; what it works on just now cannot be dropped."""
        self._pool.shutdown(wait=not drop, cancel_futures=drop)


class _Process:
    """One process, started again when it died, and the chunks that it has, oldest first."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = self._started()
        self.chunks: list[Future[list[Answer]]] = []

    def _started(self) -> ProcessPoolExecutor:
        # "spawn": torch and threads do not survive a fork.
        pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=set_up_process, initargs=(self._threads,)
        )
        pool.submit(idle)
        return pool

    def submit(self, make: Make, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Hand a chunk over; what it becomes is told by the future that is returned."""
        told: Future[list[Answer]] = Future()
        told.set_running_or_notify_cancel()
        self.chunks.append(told)
        try:
            inner = self._pool.submit(carry_out, make, orders, batch)
        except BrokenProcessPool:
            self._restart()
            inner = self._pool.submit(carry_out, make, orders, batch)
        inner.add_done_callback(partial(self._tell, told))
        return told

    def _tell(self, told: Future[list[Answer]], inner: Future[list[Answer]]) -> None:
        first = self.chunks[0] is told
        error = inner.exception() if not inner.cancelled() else BrokenProcessPool()
        if isinstance(error, BrokenProcessPool):
            told.set_exception(WorkerDiedError(suspect=first))
            return
        self.chunks.remove(told)
        if error is None:
            told.set_result(inner.result())
        else:
            told.set_exception(error)

    def mend(self) -> None:
        """Start a new process in place of one that died, once all its chunks have been told of."""
        if self.chunks and all(chunk.done() for chunk in self.chunks):
            self._restart()

    def _restart(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.chunks = [chunk for chunk in self.chunks if not chunk.done()]
        self._pool = self._started()

    def close(self, *, drop: bool) -> None:
        """End the process."""
        if drop:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=drop)


class LocalProcesses:
    """Processes of this machine, each a pool of its own, so that one death is one worker's."""

    def __init__(self, workers: int) -> None:
        threads = max(1, cores() // workers)
        self._processes = [_Process(threads) for _ in range(workers)]
        self.slots = 2 * workers

    def submit(self, make: Make, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Give a chunk to the process that has the fewest."""
        for process in self._processes:
            process.mend()
        return min(self._processes, key=lambda process: len(process.chunks)).submit(
            make, orders, batch
        )

    def close(self, *, drop: bool) -> None:
        """End all processes; those that are to be dropped are killed."""
        for process in self._processes:
            process.close(drop=drop)


class DaskCluster:
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("distributed", "distributed") from error
        make_client: Any = distributed.Client
        try:
            self._client = make_client(address, timeout="10s", set_as_default=False)
            threads = sum(self._client.nthreads().values())
        except (OSError, ValueError, TimeoutError) as error:
            raise StoreError(
                f"The Dask scheduler at {address} does not answer. Check the address, or leave "
                "--scheduler out to work on this machine."
            ) from error
        if not threads:
            self._client.close()
            raise StoreError(
                f"The Dask scheduler at {address} has no workers. Start some with: "
                f"dask worker {address}"
            )
        self.slots = 2 * threads
        self._executor: Executor = self._client.get_executor(pure=False, retries=0)

    def submit(self, make: Make, orders: Sequence[Any], batch: int) -> Future[list[Answer]]:
        """Give a chunk to the scheduler."""
        told: Future[list[Answer]] = Future()
        told.set_running_or_notify_cancel()
        inner = self._executor.submit(carry_out, make, orders, batch)
        inner.add_done_callback(partial(_tell_of_dask, told))
        return told

    def close(self, *, drop: bool) -> None:
        """Leave the cluster as it is."""
        with suppress(Exception):
            self._executor.shutdown(wait=not drop)
        self._client.close()


def _tell_of_dask(told: Future[list[Answer]], inner: Future[list[Answer]]) -> None:
    from distributed.scheduler import KilledWorker

    if inner.cancelled():
        told.set_exception(DatabaseError("The Dask scheduler is gone. Run the command again."))
        return
    error = inner.exception()
    if isinstance(error, KilledWorker):
        told.set_exception(WorkerDiedError(suspect=True))
    elif error is not None:
        told.set_exception(error)
    else:
        told.set_result(inner.result())


def cores() -> int:
    """Return the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
