"""Who holds a job, and for how long: names of workers, and leases that a thread renews."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Float, cast, extract, func, literal, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..db.models import Job, Run
from ..db.session import Database
from ..errors import CellstoreError, UserInputError
from ..terms import Status

ENV_LEASE = "CELLSTORE_LEASE_SECONDS"
LEASE_SECONDS = 60.0
SHORTEST_LEASE = 1.0
ALONE = "alone"


def lease_seconds() -> float:
    """Return how long a job stays reserved for a worker that is not heard of.

    Raises:
        UserInputError: ``CELLSTORE_LEASE_SECONDS`` is no number of 1 or more.
    """
    text = os.environ.get(ENV_LEASE) or str(LEASE_SECONDS)
    with suppress(ValueError):
        if (seconds := float(text)) >= SHORTEST_LEASE:
            return seconds
    raise UserInputError(f"{ENV_LEASE} should be a number of seconds, 1 or more, not {text!r}.")


def now(session: Session) -> ColumnElement[float]:
    """Return the moment, in seconds, by the clock that all who share the database share."""
    session.connection()  # waits for the lock of SQLite: the moment is that after it
    if session.get_bind().dialect.name == "sqlite":
        return literal(time.time())
    return cast(extract("epoch", func.clock_timestamp()), Float(53))


@dataclass(frozen=True)
class Owner:
    """A process that reserves jobs. ``machine`` and ``started`` are empty where unknown.

    ``mark`` is of this call; it begins with ``alone`` where the process itself computes, so that
    an image may be what it died of.
    """

    host: str
    pid: int
    machine: str
    started: str
    mark: str

    @classmethod
    def of_this_process(cls, *, computes: bool = True) -> Owner:
        """Return a name that no other process or call has."""
        pid = os.getpid()
        host = socket.gethostname().replace("|", "-")[:150]
        mark = f"{ALONE if computes else 'crew'}-{uuid.uuid4().hex[:8]}"
        return cls(host, pid, _machine(), _started(pid) or "", mark)

    @property
    def computes(self) -> bool:
        """Whether it computes itself, with no workers."""
        return self.mark.startswith(ALONE)

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return what :attr:`text` wrote, ``None`` for anything else."""
        parts = text.split("|")
        if len(parts) != 5 or not parts[1].isdecimal():
            return None
        return cls(parts[0], int(parts[1]), *parts[2:])

    @property
    def text(self) -> str:
        """The name as it stands in a job."""
        return "|".join((self.host, str(self.pid), self.machine, self.started, self.mark))

    @property
    def shown(self) -> str:
        """The name for people."""
        return f"{self.host}:{self.pid}"

    def is_dead(self) -> bool:
        """Whether this was a process of this machine that is gone; False if that is unknown."""
        return self._is_here() and _started(self.pid) != self.started

    def is_alive(self) -> bool:
        """Whether this is a process of this machine that lives; False if that is unknown."""
        return self._is_here() and _started(self.pid) == self.started

    def _is_here(self) -> bool:
        return bool(self.machine) and self.machine == _machine()


def _machine() -> str:
    """What tells this machine, since it was started, from all others: and this container, too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return ""
    return hashlib.sha256(f"{boot}{space}".encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a process began, in ticks: a number is used again, with another beginning."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def shown_worker(text: str | None) -> str:
    """Return the name of the worker of a job for people."""
    owner = Owner.parse(text or "")
    return owner.shown if owner else (text or "")


@contextmanager
def heartbeat(
    database: Database, recipe_id: int, runs: Sequence[int], owner: Owner, seconds: float
) -> Iterator[threading.Event]:
    """Renew the leases of ``owner`` while the block runs.

    Yields an event that is set when one of ``runs`` has been cancelled by ``cellstore cancel``.
    """
    over, cancelled = threading.Event(), threading.Event()

    def beat() -> None:
        while not over.wait(min(5.0, seconds / 4)):
            # A beat that fails is tried again; if all fail, closing the job finds out.
            with suppress(CellstoreError, SQLAlchemyError), database.begin() as session:
                if _renew(session, recipe_id, runs, owner, seconds):
                    cancelled.set()

    thread = threading.Thread(target=beat, daemon=True, name="cellstore-heartbeat")
    thread.start()
    try:
        yield cancelled
    finally:
        over.set()
        thread.join()


def _renew(
    session: Session, recipe_id: int, runs: Sequence[int], owner: Owner, seconds: float
) -> bool:
    held: Any = (
        Job.recipe_id == recipe_id,
        Job.status == Status.RUNNING,
        Job.worker == owner.text,
    )
    # Rows that are being closed just now are passed over, so that neither waits for the other.
    free = select(Job.id).where(*held).with_for_update(skip_locked=True)
    lease = now(session) + seconds
    session.execute(update(Job).where(Job.id.in_(free)).values(lease_until=lease))
    cancelled = select(Run.id).where(Run.id.in_(runs), Run.status == Status.CANCELLED)
    return session.scalar(cancelled.limit(1)) is not None


def bury_runs(session: Session) -> None:
    """Close the runs of processes of this machine that are gone: nothing else would."""
    query = select(Run.id, Run.process).where(Run.status == Status.RUNNING)
    gone = [
        number
        for number, process in session.execute(query)
        if (owner := Owner.parse(process or "")) and owner.is_dead()
    ]
    if gone:
        died = {"status": Status.FAILED, "error": "Its process died."}
        session.execute(update(Run).where(Run.id.in_(gone)).values(**died))
