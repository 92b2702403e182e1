"""Workers behind a Dask scheduler, on other machines too."""

from __future__ import annotations

import logging
import pickle
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

from ..errors import CellstoreError, MissingExtraError, StoreError, UserInputError, first_line
from .execute import CHUNKS, Answers, Crash, Finished, ImageStage, wait_for_one, work_on
from .queue import Task

CONNECT_SECONDS = 10
DESERTED_SECONDS = 60
"""How long a Dask cluster may be without any worker."""
DESERTED_POLL = 0.5


class DaskCluster:
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    computes_here = False

    def __init__(self, stage: ImageStage[Any, Any], address: str) -> None:
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

    def finished(self, stop: threading.Event, *, briefly: bool) -> list[Finished]:
        """Wait for a chunk. Errors of an image are answers; others are the cluster's own."""
        from distributed.scheduler import KilledWorker

        finished: list[Finished] = []
        done = wait_for_one([future for future, _ in self._chunks], stop, briefly=briefly)
        over = [chunk for chunk in self._chunks if chunk[0] in done]
        self._chunks = [chunk for chunk in self._chunks if chunk[0] not in done]
        for future, tasks in over:
            if future.cancelled():
                raise self._gone()
            error = future.exception()
            if isinstance(error, KilledWorker):
                finished.append((tasks, Crash(suspect=True)))
            elif isinstance(error, CellstoreError):
                finished.append((tasks, error))
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
