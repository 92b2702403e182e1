"""Jobs: image by image, resumable, safe beside other processes on the same store.

A job is reserved with one conditional UPDATE and a lease that a thread renews while the work
runs, so that a killed worker's job comes back by itself. Rows of one image are written in one
short transaction, which also closes its job: either both are there or neither.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, exists, func, literal, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..db.models import Image, Job, Plate, Well
from ..db.session import Database
from ..db.statements import insert_from
from ..errors import CellstoreError, DatabaseError, StorageError, StoreError
from ..progress import Progress
from ..terms import Status

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
WAIT_SECONDS = 1.0

UNSEEN = "0" * 64
"""Stands in a job for the bytes of an image that has not been seen."""

R = TypeVar("R")


@dataclass(frozen=True)
class Task:
    """A reserved job: one image to work on."""

    job_id: int
    image_id: int
    content_sha256: str
    name: str
    worker: str


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
class JobsResult:
    """What a stage that goes image by image did.

    ``run_id`` is None when there was nothing to do. ``selected`` counts the images that the
    selection names, ``waiting`` those of them whose files are still missing, ``cells`` what was
    written by this run.
    """

    run_id: int | None
    recipe_id: int
    selected: int
    waiting: int
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int


class LeaseLostError(StoreError):
    """Another worker took the job over; what was computed here is dropped."""


def todo_count(
    session: Session, recipe_id: int, candidates: Select[int], *, unseen: bool = False
) -> int:
    """Return how many of the ``candidates`` (a query of image ids) this recipe has not done.

    ``unseen``: images that have not been seen count, too.
    """
    query = _open_images(recipe_id, candidates, unseen)
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def work_through(
    database: Database,
    progress: Progress,
    label: str,
    run_id: int,
    recipe_id: int,
    candidates: Select[int],
    compute: Callable[[Task], R],
    write: Callable[[Session, Task, R], None],
    *,
    unseen: bool = False,
) -> Outcome:
    """Do every open job of ``recipe_id`` among ``candidates``; one failing image fails alone.

    ``compute`` runs outside any transaction, ``write`` inside the one that closes the job.
    ``unseen``: also images that have not been seen, for work that opens none.

    Raises:
        StorageError: the disk is full or read-only; the job in hand is given back.

    """
    total = _enqueue(database, run_id, recipe_id, candidates, unseen)
    outcome = Outcome()
    progress.start(label, total)
    try:
        for task in _reserved(database, run_id, recipe_id, candidates):
            _do(database, task, compute, write, outcome)
            progress.advance()
            if outcome.failures and outcome.failures[-1][0] == task.name:
                progress.note(f"{task.name}: {outcome.failures[-1][1]}")
    finally:
        progress.finish()
    return outcome


def _content() -> ColumnElement[str]:
    return func.coalesce(Image.content_sha256, UNSEEN)


def _open_images(recipe_id: int, candidates: Select[int], unseen: bool) -> Select[int, str]:
    finished = exists().where(
        Job.recipe_id == recipe_id,
        Job.image_id == Image.id,
        Job.content_sha256 == _content(),
        Job.status == Status.DONE,
    )
    content = _content().label("content_sha256")
    query = select(Image.id, content).where(Image.id.in_(candidates), ~finished)
    return query if unseen else query.where(Image.content_sha256.is_not(None))


def _enqueue(
    database: Database, run_id: int, recipe_id: int, candidates: Select[int], unseen: bool
) -> int:
    """Make the missing jobs, give failed ones another try, and return how many are open."""
    open_images = _open_images(recipe_id, candidates, unseen).subquery()
    rows = select(
        literal(recipe_id),
        open_images.c.id,
        open_images.c.content_sha256,
        literal(run_id),
        literal(Status.PENDING.value),
        literal(0),
    )
    columns = ["recipe_id", "image_id", "content_sha256", "run_id", "status", "attempts"]
    with database.begin() as session:
        insert_from(session, Job, columns, rows)
        session.execute(
            update(Job)
            .where(Job.recipe_id == recipe_id, Job.status == Status.FAILED)
            .where(Job.image_id.in_(candidates))
            .values(status=Status.PENDING)
        )
        return todo_count(session, recipe_id, candidates, unseen=unseen)


def _reserved(
    database: Database, run_id: int, recipe_id: int, candidates: Select[int]
) -> Iterator[Task]:
    """Yield jobs, each reserved for this process, until none is open or in other hands."""
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"[:255]
    while True:
        with database.begin() as session:
            task = _reserve(session, run_id, recipe_id, candidates, worker)
            elsewhere = task is None and _in_other_hands(session, recipe_id, candidates)
        if task is not None:
            with _lease(database, task):
                yield task
        elif elsewhere:
            time.sleep(WAIT_SECONDS)
        else:
            return


def _claimable() -> Any:
    expired = and_(Job.status == Status.RUNNING, Job.lease_until < time.time())
    return or_(Job.status == Status.PENDING, expired)


def _among(candidates: Select[int]) -> Any:
    current = and_(Image.id == Job.image_id, _content() == Job.content_sha256)
    return exists().where(current, Image.id.in_(candidates))


def _reserve(
    session: Session, run_id: int, recipe_id: int, candidates: Select[int], worker: str
) -> Task | None:
    chosen = (
        select(Job.id)
        .where(Job.recipe_id == recipe_id, _claimable(), _among(candidates))
        .order_by(Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(chosen)
    if job_id is None:
        return None
    claim: Any = session.execute(
        update(Job)
        .where(Job.id == job_id, _claimable())
        .values(
            status=Status.RUNNING,
            run_id=run_id,
            worker=worker,
            attempts=Job.attempts + 1,
            lease_until=time.time() + LEASE_SECONDS,
        )
    )
    return _task(session, job_id, worker) if claim.rowcount == 1 else None


def _task(session: Session, job_id: int, worker: str) -> Task:
    row = session.execute(
        select(Job.id, Job.image_id, Job.content_sha256, Plate.barcode, Image.core_name)
        .join(Image, Image.id == Job.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Job.id == job_id)
    ).one()
    return Task(row.id, row.image_id, row.content_sha256, f"{row.barcode}/{row.core_name}", worker)


def _in_other_hands(session: Session, recipe_id: int, candidates: Select[int]) -> bool:
    query = select(Job.id).where(
        Job.recipe_id == recipe_id, Job.status == Status.RUNNING, _among(candidates)
    )
    return session.scalar(query.limit(1)) is not None


@contextmanager
def _lease(database: Database, task: Task) -> Iterator[None]:
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_SECONDS):
            # A renewal that fails is tried again; if all fail, closing the job finds out.
            with suppress(CellstoreError, SQLAlchemyError), database.begin() as session:
                session.execute(
                    update(Job).where(_held(task)).values(lease_until=time.time() + LEASE_SECONDS)
                )

    thread = threading.Thread(target=renew, daemon=True, name="cellstore-lease")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _do(
    database: Database,
    task: Task,
    compute: Callable[[Task], R],
    write: Callable[[Session, Task, R], None],
    outcome: Outcome,
) -> None:
    started = time.monotonic()
    try:
        result = compute(task)
        with database.begin() as session:
            _close(session, task, time.monotonic() - started)
            write(session, task, result)
        outcome.done += 1
    except (StorageError, DatabaseError, KeyboardInterrupt, SystemExit):
        _release(database, task)
        raise
    except LeaseLostError:
        return
    except Exception as error:
        _fail(database, task, error)
        outcome.failures.append((task.name, _sentence(error)))


def _held(task: Task) -> Any:
    """Whether the job is still ours: after a lease ran out it may be another worker's."""
    return and_(Job.id == task.job_id, Job.worker == task.worker, Job.status == Status.RUNNING)


def _close(session: Session, task: Task, seconds: float) -> None:
    """Close the job, unless it is no longer ours or the image has changed meanwhile."""
    unchanged = exists().where(Image.id == task.image_id, _content() == task.content_sha256)
    done: Any = session.execute(
        update(Job)
        .where(_held(task), unchanged)
        .values(status=Status.DONE, seconds=seconds, lease_until=None, error=None)
    )
    if done.rowcount != 1:
        raise LeaseLostError(f"The job of {task.name} was taken over by another worker.")


def _release(database: Database, task: Task) -> None:
    # If this fails too, the lease will run out by itself; the first error is the one to report.
    with suppress(CellstoreError), database.begin() as session:
        session.execute(
            update(Job)
            .where(_held(task))
            .values(status=Status.PENDING, lease_until=None, worker=None)
        )


def _fail(database: Database, task: Task, error: Exception) -> None:
    known = isinstance(error, CellstoreError)
    text = str(error) if known else "".join(traceback.format_exception(error))
    with database.begin() as session:
        session.execute(
            update(Job)
            .where(_held(task))
            .values(status=Status.FAILED, lease_until=None, error=text)
        )


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
