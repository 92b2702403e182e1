"""The queue of jobs: rows of one table, reserved and closed by conditional updates.

A job is one image's share of a recipe, for the bytes that the image has. It is *pending*, *running*
with a lease in the name of a worker, *done*, or *failed* with the reason kept. What is to do is a
query over images and jobs; nothing else remembers progress. All functions take the session of the
caller, who commits.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Interval,
    Row,
    Select,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from ..artifacts import machine
from ..db.bulk import in_lists, insert_new
from ..db.events import record_runs
from ..enums import Status
from ..errors import StoreError
from ..models import Image, Job, Plate, Run, UtcDateTime, Well
from .lookup import image_name

ENV_LEASE = "CELLSTORE_LEASE_SECONDS"
ALONE, LEADING = "alone", "workers"

MOST_FAILURES = 3
"""After so many tries whose error might pass (a disk, a memory), a job has failed."""

MOST_DEATHS = 4
"""After so many workers that died while they had it alone in hand, a job has failed.

The first death does not count: others may have been in hand with it, and be to blame.
"""

FIRST_WAIT = 1.0

UNSEEN = "0" * 64
"""Stands in a job for the bytes of an image that has not been seen."""

CONTENT = func.coalesce(Image.content_sha256, UNSEEN)
"""The bytes of an image as a job names them."""

_AS_IF_NEVER_RESERVED: dict[str, Any] = {
    "status": Status.PENDING,
    "attempts": Job.attempts - 1,
    "lease_until": None,
    "worker": None,
}


def new_owner(*, computes: bool = True) -> str:
    """Return a name for this process and call that no other has, as it stands in a job.

    Its parts: host, process, machine, when the process began, and a mark of the call, which says
    whether the process itself computes, so that an image may be what it died of.
    """
    pid = os.getpid()
    host = socket.gethostname().replace("|", "-")[:150]
    mark = f"{ALONE if computes else LEADING}-{uuid.uuid4().hex[:8]}"
    return "|".join((host, str(pid), machine(), _began(pid), mark))


def is_alive(owner: str | None) -> bool | None:
    """Whether the process that :func:`new_owner` named lives; ``None``: that is not known here."""
    parts = (owner or "").split("|")
    if len(parts) != 5 or not parts[1].isdecimal() or parts[2] != machine() or not parts[3]:
        return None
    return _began(int(parts[1])) == parts[3]


def _began(pid: int) -> str:
    """When a process began, in ticks, as numbers come again. Empty: there is none, or no Linux."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def shown_worker(text: str | None) -> str:
    """Return the name of the worker of a job for people: its host and its process."""
    return ":".join((text or "").split("|")[:2])


@dataclass(frozen=True)
class JobScope:
    """The jobs of some recipes for some images, given by a query of their ids.

    ``runs``: by recipe id the run in whose name its jobs are done. ``unseen``: also images that
    have not been seen, for work that opens none.
    """

    runs: Mapping[int, int]
    images: Select[int]
    unseen: bool = False


@dataclass(frozen=True)
class Task:
    """An image to work on, with its reserved jobs: the id of each by recipe id.

    ``tries`` and ``deaths`` (workers that died over it) are those of the job that has most.
    """

    image_id: int
    content_sha256: str
    name: str
    jobs: Mapping[int, int]
    tries: int
    deaths: int


def now(session: Session, plus: float = 0.0) -> ColumnElement[datetime]:
    """Return the moment ``plus`` seconds from now, by the clock of all who share the database."""
    if session.get_bind().dialect.name == "sqlite":
        return literal(datetime.now(UTC) + timedelta(seconds=plus), UtcDateTime())
    return func.clock_timestamp() + literal(timedelta(seconds=plus), Interval())


def count_images(
    session: Session, recipe_id: int, images: Select[int], *, unseen: bool = False
) -> Row[int, int, int, int, int]:
    """Count ``images`` (a query of ids) by what a recipe has done of them, by their present bytes.

    ``selected = waiting + done + failed + todo``: ``waiting`` miss files, ``failed`` are left
    alone until ``cellstore retry``, a worker may take those ``todo``. ``unseen``: images that have
    not been seen can be worked on, too.
    """
    # IS TRUE keeps the long text out of the keys of PostgreSQL's hash join.
    same = (Job.content_sha256 == CONTENT).is_(true())
    job = and_(Job.recipe_id == recipe_id, Job.image_id == Image.id, same)
    missing = literal(False) if unseen else Image.content_sha256.is_(None)
    selected, waiting = func.count(), func.count().filter(missing)
    done, failed = (func.count().filter(Job.status == s) for s in (Status.DONE, Status.FAILED))
    query = images.outerjoin(Job, job).with_only_columns(
        selected.label("selected"),
        waiting.label("waiting"),
        done.label("done"),
        failed.label("failed"),
        (selected - waiting - done - failed).label("todo"),
    )
    return session.execute(query).one()


def enqueue(session: Session, scope: JobScope, after: int) -> int | None:
    """Make the jobs of the next images after image id ``after`` that have none.

    Returns the last image id looked at; ``None`` when there is none left.
    """
    piece = scope.images.where(Image.id > after).order_by(Image.id).limit(10_000).subquery()
    last = session.scalar(select(func.max(piece.c.id)))
    if last is None:
        return None
    columns = ("recipe_id", "image_id", "content_sha256", "run_id", "status", "attempts", "deaths")
    for recipe_id, run_id in scope.runs.items():
        known = exists().where(
            Job.recipe_id == recipe_id, Job.image_id == Image.id, Job.content_sha256 == CONTENT
        )
        start: Any = (literal(Status.PENDING.value), literal(0), literal(0))
        rows: Any = scope.images.where(Image.id > after, Image.id <= last, ~known)
        if not scope.unseen:
            rows = rows.where(Image.content_sha256.is_not(None))
        rows = rows.with_only_columns(
            literal(recipe_id), Image.id, CONTENT, literal(run_id), *start
        )
        insert_new(session, Job, rows, columns)
    return int(last)


def reserve(
    session: Session,
    scope: JobScope,
    owner: str,
    lease: float,
    number: int,
    *,
    after_deaths: bool = False,
) -> list[Task]:
    """Reserve the pending jobs of up to ``number`` images for ``owner``: one conditional UPDATE.

    Those over which no worker has died, or those ``after_deaths``.

    The first recipe with something to do chooses the images; those jobs of the other recipes that
    are free for them are reserved with it, so that each image is opened once for all.

    Raises:
        StoreError: another process took this one for dead, and ended a run of the scope.
    """
    of_scope = select(Run.id).where(Run.id.in_(set(scope.runs.values())))
    if (ended := session.scalar(of_scope.where(Run.ended_at.is_not(None)).limit(1))) is not None:
        raise StoreError(
            f"Run {ended} was ended by another command, because this process had not answered for "
            "too long. Nothing is lost: run the same command again to go on."
        )
    moment = now(session)
    free = and_(
        Job.status == Status.PENDING,
        or_(Job.not_before.is_(None), Job.not_before <= moment),
        Job.deaths > 0 if after_deaths else Job.deaths == 0,
    )
    columns = (Job.id, Job.recipe_id, Job.image_id, Job.content_sha256, Job.attempts, Job.deaths)
    found: list[Any] = []
    for recipe_id in scope.runs:
        chosen = select(*columns).where(Job.recipe_id == recipe_id, free, among(scope.images))
        if found:
            chosen = chosen.where(Job.image_id.in_([row.image_id for row in found]))
        # Rows that another worker reserves just now are passed over, so that neither waits.
        chosen = chosen.order_by(Job.id).limit(number).with_for_update(skip_locked=True)
        jobs = chosen.subquery()
        named = (
            select(jobs, Plate.barcode, Image.core_name, Image.plane, Image.time_point)
            .join(Image, Image.id == jobs.c.image_id)
            .join(Well, Well.id == Image.well_id)
            .join(Plate, Plate.id == Well.plate_id)
            .order_by(jobs.c.id)
        )
        found += session.connection().execute(named).all()
    if not found:
        return []
    claim = (
        update(Job)
        .where(Job.id.in_([row.id for row in found]), free)
        .values(
            status=Status.RUNNING,
            run_id=case(dict(scope.runs), value=Job.recipe_id),
            worker=owner,
            attempts=Job.attempts + 1,
            lease_until=now(session, lease),
            not_before=None,
        )
        .returning(Job.id)
    )
    claimed = set(session.connection().scalars(claim))
    by_image: dict[int, list[Any]] = {}
    for row in found:
        if row.id in claimed:
            by_image.setdefault(row.image_id, []).append(row)
    return [
        Task(
            image_id,
            rows[0].content_sha256,
            image_name(rows[0].barcode, rows[0].core_name, rows[0].plane, rows[0].time_point),
            {row.recipe_id: row.id for row in rows},
            max(row.attempts + 1 - row.deaths for row in rows),
            max(row.deaths for row in rows),
        )
        for image_id, rows in by_image.items()
    ]


def among(images: Select[int]) -> ColumnElement[bool]:
    """Return whether the image of a job is one of ``images``, and has the bytes of the job."""
    current = (Image.id == Job.image_id, Job.content_sha256 == CONTENT)
    found = images.where(*current).with_only_columns(true()).correlate(Job).limit(1)
    # Looked up job by job: PostgreSQL makes a join with all images of an EXISTS.
    return found.scalar_subquery().is_(true())


def renew(session: Session, scope: JobScope, owner: str, lease: float) -> bool:
    """Renew the leases of the jobs in hand; return whether a run of the scope was cancelled."""
    # Rows that are being closed just now are passed over, so that neither waits for the other.
    held = select(Job.id).where(Job.worker == owner, Job.status == Status.RUNNING)
    ids = held.where(Job.recipe_id.in_(scope.runs)).with_for_update(skip_locked=True)
    until = now(session, lease)
    session.execute(update(Job).where(Job.id.in_(ids)).values(lease_until=until))
    runs = set(scope.runs.values())
    cancelled = select(Run.id).where(Run.id.in_(runs), Run.status == Status.CANCELLED)
    return session.scalar(cancelled.limit(1)) is not None


def close(
    session: Session, owner: str, digests: Mapping[int, str | None], seconds: float
) -> dict[int, list[int]]:
    """Close jobs as done; return by image those recipes whose jobs were ours, by unchanged bytes.

    ``digests``: by job the digest of the rows that are written with it.

    After a lease ran out a job may be another worker's, or its run ended by another command: what
    was computed is then dropped.
    ``seconds``: what one image took.
    """
    unchanged = exists().where(Image.id == Job.image_id, Job.content_sha256 == CONTENT)
    # Whoever takes this process for dead and ends the run waits until the rows are written.
    is_open = select(Run.id).where(Run.id == Job.run_id, Run.ended_at.is_(None))
    is_open = is_open.with_for_update(read=True).correlate(Job)
    # A table of all digests is one parameter: the statement is the same for any number of jobs.
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    rows_of = func.json_each if is_sqlite else func.json_each_text
    made = rows_of(literal(dict(digests), JSON())).table_valued("key", "value")
    done = (
        update(Job)
        .where(Job.id == cast(made.c.key, BigInteger))
        .where(Job.worker == owner, Job.status == Status.RUNNING, unchanged, is_open.exists())
        .values(status=Status.DONE, seconds=seconds, lease_until=None, error=None)
        .values(digest=made.c.value)
        .returning(Job.image_id, Job.recipe_id)
    )
    closed: dict[int, list[int]] = {}
    for image_id, recipe_id in session.connection().execute(done).all():
        closed.setdefault(image_id, []).append(recipe_id)
    return closed


def release(
    session: Session, scope: JobScope, owner: str, tasks: Sequence[Task] | None = None
) -> None:
    """Give jobs back that were not worked on (``None``: all that ``owner`` has in hand)."""
    given_back = update(Job).where(Job.worker == owner, Job.status == Status.RUNNING)
    given_back = given_back.where(Job.recipe_id.in_(scope.runs))
    if tasks is not None:
        given_back = given_back.where(Job.image_id.in_([task.image_id for task in tasks]))
    session.execute(given_back.values(**_AS_IF_NEVER_RESERVED))


def fail(session: Session, owner: str, task: Task, reason: str, *, may_pass: bool) -> bool:
    """Note that the jobs of an image failed; return whether they are tried again, after a while.

    ``may_pass``: the error is not one of the image itself.
    """
    again = may_pass and task.tries < MOST_FAILURES
    wait = min(30.0, FIRST_WAIT * 4.0 ** (task.tries - 1))  # seconds
    session.execute(
        update(Job)
        .where(Job.worker == owner, Job.status == Status.RUNNING)
        .where(Job.id.in_(task.jobs.values()))
        .values(
            status=Status.PENDING if again else Status.FAILED,
            not_before=now(session, wait) if again else null(),
            lease_until=None,
            error=reason,
        )
    )
    return again


def record_crash(session: Session, owner: str, task: Task) -> bool:
    """Note that a worker of ``owner`` died over an image; return whether it is tried again."""
    mine = update(Job).where(Job.worker == owner, Job.status == Status.RUNNING)
    mine = mine.where(Job.id.in_(task.jobs.values()))
    session.execute(mine.values(**_after_crash(session)))
    return task.deaths < MOST_DEATHS


def _after_crash(session: Session) -> dict[str, Any]:
    """The values of jobs whose worker died: pending again after a while, failed in the end."""
    last = Job.deaths >= MOST_DEATHS
    reason = (
        f"Its worker died {MOST_DEATHS} times with this image alone: killed, out of memory, or "
        "crashed."
    )
    waits = {deaths: now(session, FIRST_WAIT * (deaths + 1)) for deaths in range(MOST_DEATHS)}
    return {
        "status": case((last, Status.FAILED.value), else_=Status.PENDING.value),
        "error": case((last, reason), else_=Job.error),
        "deaths": Job.deaths + 1,
        "not_before": case(waits, value=Job.deaths, else_=null()),
        "lease_until": None,
        "worker": None,
    }


def reclaim_expired(session: Session, scope: JobScope, owner: str) -> bool:
    """Free the jobs of workers that are gone; return whether any is left to do or to wait for.

    A worker is gone when its lease has run out, or at once when it was a process of this machine
    that is no more; never while it lives there. Its run, if nothing else closed it, has failed.
    Jobs count the death, but not where the process had others compute: no image was in its hands.
    """
    running = and_(Job.recipe_id.in_(scope.runs), Job.status == Status.RUNNING)
    names = session.scalars(select(Job.worker).where(running).distinct())
    lives = {name: is_alive(name) for name in names if name}
    dead = [name for name, known in lives.items() if known is False]
    alive = [name for name, known in lives.items() if known]
    leading = [name for name in lives if f"|{LEADING}-" in name]
    late = and_(Job.lease_until < now(session), Job.worker.not_in(alive))
    gone = and_(running, or_(late, Job.worker.in_(dead)))
    # What somebody closes just now is not gone.
    found = select(Job.id, Job.run_id).where(gone).with_for_update(skip_locked=True)
    rows = session.execute(found).all()
    for ids in in_lists([row.id for row in rows]):
        these = and_(Job.id.in_(ids), gone)
        given_back = and_(these, Job.worker.in_(leading))
        session.execute(update(Job).where(given_back).values(**_AS_IF_NEVER_RESERVED))
        session.execute(update(Job).where(these).values(**_after_crash(session)))
    if rows:
        still_working = exists().where(running, Job.run_id == Run.id)
        theirs = {row.run_id for row in rows} - set(scope.runs.values())
        over = update(Run).where(Run.id.in_(theirs), ~still_working)
        over = over.where(Run.status == Status.RUNNING).values(**_died()).returning(Run.id)
        if ended := session.scalars(over).all():
            record_runs(session, ended)
    in_other_hands = and_(Job.status == Status.RUNNING, Job.worker != owner)
    left = select(Job.id).where(
        Job.recipe_id.in_(scope.runs),
        Job.status.in_((Status.PENDING, Status.RUNNING)),
        or_(Job.status == Status.PENDING, in_other_hands),
        among(scope.images),
    )
    return session.scalar(left.limit(1)) is not None


def close_dead_runs(session: Session) -> None:
    """Close the runs of processes of this machine that are gone: nothing else would.

    But not those in which another process works.
    """
    query = select(Run.id, Run.process).where(Run.ended_at.is_(None))
    gone = {
        number: process for number, process in session.execute(query) if is_alive(process) is False
    }
    if not gone:
        return
    for number, _ in at_work(session, gone):
        gone.pop(number, None)
    # By its process, too: another command may have gone on with the run meanwhile.
    these = (Run.id.in_(gone), Run.process.in_(gone.values()), Run.ended_at.is_(None))
    running = update(Run).where(*these, Run.status == Status.RUNNING).returning(Run.id)
    ended = list(session.scalars(running.values(**_died())))
    cancelled = update(Run).where(*these).returning(Run.id)
    ended += session.scalars(cancelled.values(ended_at=datetime.now(UTC)))
    record_runs(session, ended)


def at_work(session: Session, run_ids: Collection[int]) -> list[tuple[int, str]]:
    """Return the run and the name of each worker that has its jobs in hand, and is not dead."""
    in_hand = select(Job.run_id, Job.worker).where(Job.status == Status.RUNNING)
    rows = session.execute(in_hand.where(Job.run_id.in_(run_ids)).distinct())
    return [(run_id, name) for run_id, name in rows if name and is_alive(name) is not False]


def _died() -> dict[str, Any]:
    return {"status": Status.FAILED, "error": "Its process died.", "ended_at": datetime.now(UTC)}


def requeue(session: Session, *which: ColumnElement[bool], status: Status = Status.FAILED) -> int:
    """Make failed jobs (or those of another status) as good as new; return how many."""
    done: Any = session.execute(
        update(Job)
        .where(Job.status == status, *which)
        .values(status=Status.PENDING, attempts=0, deaths=0, not_before=None, worker=None)
    )
    return int(done.rowcount)


def reopen(session: Session, recipe_id: int, image_ids: Collection[int]) -> None:
    """Open the jobs again by which images were done, by their present bytes: files are gone."""
    current = exists().where(Image.id == Job.image_id, Job.content_sha256 == CONTENT)
    for some in in_lists(image_ids):
        mine = (Job.recipe_id == recipe_id, Job.image_id.in_(some), current)
        requeue(session, *mine, status=Status.DONE)
