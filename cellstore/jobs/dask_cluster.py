"""Workers behind a Dask scheduler, on other machines too."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import MissingExtraError, StoreError, UserInputError, first_line
from .execute import CHUNKS, Worker
from .queue import Task

CONNECT_SECONDS = 10


@dataclass
class DaskCluster(Worker):
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    address: str = ""
    deserted: float | None = None

    def start(self) -> None:
        """Connect to the scheduler."""
        if not re.fullmatch(r"[a-z]+://\S+:\d+", self.address):
            raise UserInputError(
                f"{self.address!r} is not the address of a Dask scheduler. It looks like "
                "tcp://host:8786."
            )
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("distributed", "distributed") from error
        for name in ("distributed", "tornado", "asyncio"):  # what is wrong we say in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        make_client: Any = distributed.Client
        try:
            self.client = make_client(self.address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise StoreError(
                f"The Dask scheduler at {self.address} does not answer. Check the address, or "
                "leave --scheduler out to work on this machine."
            ) from error
        self.pool = self.client.get_executor(pure=False, retries=0)

    def room(self) -> int:
        """Two chunks for each thread of the workers that there are now."""
        try:
            threads: int = sum(self.client.nthreads().values())
        except (OSError, TimeoutError, AssertionError) as error:
            raise self.gone() from error
        if threads:
            self.deserted = None
        else:
            self.deserted = self.deserted or time.monotonic()
            if time.monotonic() - self.deserted > 60:
                raise StoreError(
                    f"The Dask scheduler at {self.address} has no workers. Start some with: "
                    f"dask worker {self.address}"
                )
        return CHUNKS * threads - len(self.chunks)

    def gone(self) -> StoreError:
        """What is said when the scheduler ends or answers no more."""
        return StoreError(
            f"The Dask scheduler at {self.address} is gone. What is done is kept; start it again "
            "and run the same command."
        )

    def recover(self, error: Exception, tasks: Sequence[Task]) -> list[Task]:
        """Dask starts a worker again by itself, and lost this chunk only; others are at fault."""
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return []
        if isinstance(error, CancelledError):
            raise self.gone() from error
        raise StoreError(
            f"The Dask cluster at {self.address} cannot do this work ({first_line(error)}) Its "
            "scheduler and its workers need the same cellstore as this machine."
        ) from error

    def close(self, *, drop: bool) -> None:
        """Leave the cluster as it is."""
        with suppress(Exception):
            self.pool.shutdown(wait=not drop)
        self.client.close()
