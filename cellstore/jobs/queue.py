"""The queue of jobs: rows of one table, reserved and closed by conditional updates.

A job is one image's share of a recipe, for the bytes that the image has. It is *pending*, *running*
with a lease in the name of a worker, *done*, or *failed* with the reason kept. What is to do is a
query over images and jobs; nothing else remembers progress. All functions take the session of the
caller, who commits.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    and_,
    case,
    cast,
    exists,
    extract,
    func,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..db.bulk import in_lists
from ..db.session import Database
from ..db.statements import insert_from, insert_new
from ..enums import Status
from ..errors import CellstoreError, UserInputError
from ..models import Image, Job, Plate, Run, Well

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


MOST_FAILURES = 3
"""After so many tries whose error might pass (a disk, a memory), a job has failed."""

MOST_DEATHS = 5
"""After so many workers that died over it, a job has failed."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0

UNSEEN = "0" * 64
"""Stands in a job for the bytes of an image that has not been seen."""

AT_ONCE = 10_000
"""Images whose jobs are made in one transaction."""


_AS_IF_NEVER_TAKEN: dict[str, Any] = {
    "status": Status.PENDING,
    "attempts": Job.attempts - 1,
    "lease_until": None,
    "worker": None,
}


@dataclass(frozen=True)
class Task:
    """A reserved job: one image to work on. ``deaths``: workers that died over it before."""

    job_id: int
    image_id: int
    content_sha256: str
    name: str
    tries: int
    deaths: int


@dataclass
class Outcome:
    """How the jobs of a run ended."""

    done: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """How many images failed."""
        return len(self.failures)


@dataclass(frozen=True)
class Progressed:
    """How far a recipe has come with the images of a selection, by their present bytes.

    ``selected = waiting + done + failed + todo``: ``waiting`` miss files, ``failed`` are left
    alone until ``cellstore retry``.
    """

    selected: int
    waiting: int
    done: int
    failed: int

    @property
    def todo(self) -> int:
        """Images that a worker may take."""
        return self.selected - self.waiting - self.done - self.failed


def content() -> ColumnElement[str]:
    """The bytes of an image as a job names them."""
    return func.coalesce(Image.content_sha256, UNSEEN)


def progressed(
    session: Session, recipe_id: int, candidates: Select[int], *, unseen: bool = False
) -> Progressed:
    """Count the ``candidates`` (a query of image ids) by what ``recipe_id`` has done of them.

    ``unseen``: images that have not been seen can be worked on, too.
    """
    # IS TRUE keeps the long text out of the keys of PostgreSQL's hash join.
    same = (Job.content_sha256 == content()).is_(true())
    job = and_(Job.recipe_id == recipe_id, Job.image_id == Image.id, same)
    missing = literal(False) if unseen else Image.content_sha256.is_(None)
    query = candidates.outerjoin(Job, job).with_only_columns(
        func.count(),
        func.count().filter(missing),
        func.count().filter(Job.status == Status.DONE),
        func.count().filter(Job.status == Status.FAILED),
    )
    return Progressed(*session.execute(query).one())


def enqueue(
    session: Session,
    run_id: int,
    recipe_id: int,
    candidates: Select[int],
    after: int,
    *,
    unseen: bool = False,
) -> int | None:
    """Make the jobs of the next candidates after image id ``after`` that have none.

    Returns the last image id looked at; ``None`` when there is none left.
    """
    piece = candidates.where(Image.id > after).order_by(Image.id).limit(AT_ONCE).subquery()
    last = session.scalar(select(func.max(piece.c.id)))
    if last is None:
        return None
    rows: Any = candidates.where(Image.id > after, Image.id <= last).with_only_columns(
        literal(recipe_id),
        Image.id,
        content(),
        literal(run_id),
        literal(Status.PENDING.value),
        literal(0),
        literal(0),
    )
    if not unseen:
        rows = rows.where(Image.content_sha256.is_not(None))
    known = exists().where(
        Job.recipe_id == recipe_id, Job.image_id == Image.id, Job.content_sha256 == content()
    )
    columns = ("recipe_id", "image_id", "content_sha256", "run_id", "status", "attempts", "deaths")
    insert_from(session, Job, columns, rows.where(~known))
    return int(last)


def reserve(
    session: Session,
    run_id: int,
    recipe_id: int,
    candidates: Select[int],
    owner: Owner,
    lease: float,
    number: int,
) -> list[Task]:
    """Reserve up to ``number`` pending jobs for ``owner``: one conditional UPDATE."""
    moment = now(session)
    free = and_(
        Job.status == Status.PENDING, or_(Job.not_before.is_(None), Job.not_before <= moment)
    )
    chosen = (
        select(Job.id)
        .where(Job.recipe_id == recipe_id, free, _among(candidates))
        .order_by(Job.id)
        .limit(number)
        .with_for_update(skip_locked=True)
    )
    ids = list(session.scalars(chosen))
    if not ids:
        return []
    claim = (
        update(Job)
        .where(Job.id.in_(ids), free)
        .values(
            status=Status.RUNNING,
            run_id=run_id,
            worker=owner.text,
            attempts=Job.attempts + 1,
            lease_until=moment + lease,
            not_before=None,
        )
        .returning(Job.id)
    )
    return _tasks(session, list(session.scalars(claim)))


def _among(candidates: Select[int]) -> ColumnElement[bool]:
    """Whether the image of a job is a candidate, and still has the bytes of the job."""
    current = (Image.id == Job.image_id, content() == Job.content_sha256)
    found = candidates.where(*current).with_only_columns(true()).correlate(Job).limit(1)
    # Looked up job by job: PostgreSQL makes a join with all images of an EXISTS.
    return found.scalar_subquery().is_(true())


def _tasks(session: Session, ids: Sequence[int]) -> list[Task]:
    rows = session.execute(
        select(
            Job.id,
            Job.image_id,
            Job.content_sha256,
            Plate.barcode,
            Image.core_name,
            Job.attempts,
            Job.deaths,
        )
        .join(Image, Image.id == Job.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Job.id.in_(ids))
        .order_by(Job.id)
    )
    return [
        Task(job, image, digest, f"{barcode}/{core}", attempts - deaths, deaths)
        for job, image, digest, barcode, core, attempts, deaths in rows
    ]


def held_by_others(session: Session, recipe_id: int, candidates: Select[int], owner: Owner) -> bool:
    """Whether other workers have candidates in hand, or one waits for its next try."""
    query = select(Job.id).where(
        Job.recipe_id == recipe_id,
        Job.status.in_((Status.PENDING, Status.RUNNING)),
        or_(Job.status == Status.PENDING, Job.worker != owner.text),
        _among(candidates),
    )
    return session.scalar(query.limit(1)) is not None


def close(session: Session, owner: Owner, tasks: Sequence[Task], seconds: float) -> set[int]:
    """Close jobs as done; return the ids of those that were still ours, by unchanged bytes.

    After a lease ran out a job may be another worker's: what was computed is then dropped.
    ``seconds``: what one of them took.
    """
    unchanged = exists().where(Image.id == Job.image_id, content() == Job.content_sha256)
    done = (
        update(Job)
        .where(Job.id.in_([task.job_id for task in tasks]), _held(owner), unchanged)
        .values(status=Status.DONE, seconds=seconds, lease_until=None, error=None)
        .returning(Job.id)
    )
    return set(session.scalars(done))


def open_beside(session: Session, recipe_id: int, tasks: Sequence[Task]) -> set[int]:
    """Return the ids of those images of ``tasks`` that another recipe still has to do.

    Jobs that somebody works on are left to him. See :func:`close_beside`.
    """
    ids = [task.image_id for task in tasks]
    taken = select(Job.image_id).join(Image, Image.id == Job.image_id)
    taken = taken.where(Job.recipe_id == recipe_id, content() == Job.content_sha256)
    taken = taken.where(Job.status.in_((Status.DONE, Status.RUNNING)), Job.image_id.in_(ids))
    return set(ids) - set(session.scalars(taken))


def close_beside(session: Session, run_id: int, recipe_id: int, tasks: Sequence[Task]) -> set[int]:
    """Close the jobs of another recipe for the images of ``tasks``, which were done in one go.

    These jobs were never reserved: what decides is this one conditional UPDATE. Returns the ids
    of the images whose jobs were open until now; results of others must not be written.
    """
    ids = [task.image_id for task in tasks]
    shared = {"recipe_id": recipe_id, "run_id": run_id, "status": Status.PENDING}
    rows = [
        {**shared, "image_id": task.image_id, "content_sha256": task.content_sha256}
        for task in sorted(tasks, key=lambda task: task.image_id)
    ]
    insert_new(session, Job, [{**row, "attempts": 0, "deaths": 0} for row in rows])
    unchanged = exists().where(Image.id == Job.image_id, content() == Job.content_sha256)
    done = (
        update(Job)
        .where(Job.recipe_id == recipe_id, Job.image_id.in_(ids), unchanged)
        .where(Job.status.in_((Status.PENDING, Status.FAILED)))
        .values(
            status=Status.DONE,
            run_id=run_id,
            attempts=Job.attempts + 1,
            error=None,
            not_before=None,
            worker=None,
        )
        .returning(Job.image_id)
    )
    return set(session.scalars(done))


def release(session: Session, owner: Owner, jobs: Iterable[int]) -> None:
    """Give jobs back that were not worked on."""
    session.execute(
        update(Job).where(Job.id.in_(list(jobs)), _held(owner)).values(**_AS_IF_NEVER_TAKEN)
    )


def release_all(session: Session, owner: Owner, recipe_id: int) -> None:
    """Give back all jobs of a recipe that ``owner`` has in hand."""
    mine = and_(Job.recipe_id == recipe_id, _held(owner))
    session.execute(update(Job).where(mine).values(**_AS_IF_NEVER_TAKEN))


def fail(session: Session, owner: Owner, task: Task, reason: str, *, may_pass: bool) -> bool:
    """Note that a job failed; return whether it is tried again, after a while.

    ``may_pass``: the error is not one of the image itself.
    """
    again = may_pass and task.tries < MOST_FAILURES
    later = now(session) + wait_after(task.tries) if again else null()
    session.execute(
        update(Job)
        .where(Job.id == task.job_id, _held(owner))
        .values(
            status=Status.PENDING if again else Status.FAILED,
            not_before=later,
            lease_until=None,
            error=reason,
        )
    )
    return again


def wait_after(tries: int) -> float:
    """Return the seconds before the next try: 1, 4, 16, ... up to 30, more or less."""
    return min(LONGEST_WAIT, FIRST_WAIT * 4.0 ** (tries - 1)) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret


def mourn(session: Session, owner: Owner, task: Task) -> bool:
    """Note that the process that worked on a job of ``owner`` died; whether it is tried again."""
    mine = and_(Job.id == task.job_id, _held(owner))
    session.execute(_after_death(session, mine))
    return task.deaths + 1 < MOST_DEATHS


def take_back(session: Session, recipe_id: int) -> int:
    """Free the jobs of workers that are gone; return how many.

    A worker is gone when its lease has run out, or at once when it was a process of this machine
    that is no more; never while it lives there. Its run, if nothing else closed it, has failed.
    Jobs count the death, but not where the process had others compute: no image was in its hands.
    """
    running = and_(Job.recipe_id == recipe_id, Job.status == Status.RUNNING)
    names = [name or "" for name in session.scalars(select(Job.worker).where(running).distinct())]
    owners = {name: Owner.parse(name) for name in names}
    dead = [name for name, owner in owners.items() if owner and owner.is_dead()]
    leading = [name for name, owner in owners.items() if owner and not owner.computes]
    alive = [name for name, owner in owners.items() if owner and owner.is_alive()]
    late = and_(Job.lease_until < now(session), Job.worker.not_in(alive))
    gone = and_(running, or_(late, Job.worker.in_(dead)))
    # What somebody closes just now is not gone.
    found = select(Job.id, Job.run_id).where(gone).with_for_update(skip_locked=True)
    rows = session.execute(found).all()
    if not rows:
        return 0
    freed = 0
    for ids in in_lists([row.id for row in rows]):
        these = and_(Job.id.in_(ids), gone)
        given_back: Any = session.execute(
            update(Job).where(these, Job.worker.in_(leading)).values(**_AS_IF_NEVER_TAKEN)
        )
        buried: Any = session.execute(_after_death(session, these))
        freed += int(given_back.rowcount + buried.rowcount)
    session.execute(
        update(Run)
        .where(Run.id.in_({row.run_id for row in rows}), Run.status == Status.RUNNING)
        .where(~_still_working())
        .values(status=Status.FAILED, error="Its process died.")
    )
    return freed


def _still_working() -> ColumnElement[bool]:
    return exists().where(
        Job.recipe_id == Run.recipe_id, Job.status == Status.RUNNING, Job.run_id == Run.id
    )


def _after_death(session: Session, which: ColumnElement[bool]) -> Any:
    last = Job.deaths + 1 >= MOST_DEATHS
    reason = f"Its worker died {MOST_DEATHS} times: killed, out of memory, or crashed."
    wait = case((Job.deaths >= 5, LONGEST_WAIT), else_=FIRST_WAIT * (Job.deaths + 1))
    return (
        update(Job)
        .where(which)
        .values(
            status=case((last, Status.FAILED.value), else_=Status.PENDING.value),
            error=case((last, reason), else_=Job.error),
            deaths=Job.deaths + 1,
            not_before=case((last, null()), else_=now(session) + wait),
            lease_until=None,
            worker=None,
        )
    )


def _held(owner: Owner) -> ColumnElement[bool]:
    """Whether a job is still ours: after a lease ran out it may be another worker's."""
    return and_(Job.worker == owner.text, Job.status == Status.RUNNING)


def forgive(session: Session, recipe_id: int, candidates: Select[int]) -> int:
    """Give failed jobs among the candidates another try; return how many."""
    failed = and_(Job.recipe_id == recipe_id, Job.status == Status.FAILED, _among(candidates))
    return reopen(session, failed)


def reopen(session: Session, which: ColumnElement[bool]) -> int:
    """Make failed jobs as good as new; return how many."""
    done: Any = session.execute(
        update(Job)
        .where(Job.status == Status.FAILED, which)
        .values(status=Status.PENDING, attempts=0, deaths=0, not_before=None, worker=None)
    )
    return int(done.rowcount)
