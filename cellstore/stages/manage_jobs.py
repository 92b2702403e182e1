"""Jobs: what is running, what failed and why; another try; and a request to stop."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, select, true, update
from sqlalchemy.orm import Session

from ..db.events import Change, record_events
from ..enums import Stage, Status
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import find_image, find_recipe, run_in
from ..jobs.queue import CONTENT, now, requeue, shown_worker
from ..jobs.workspace import Workspace
from ..models import Image, Job, Plate, Recipe, Run, Well

STAGES = (Stage.SEGMENT, Stage.MEASURE, Stage.QC, Stage.PREDICT)
"""The stages that go image by image."""

LISTENING = (*STAGES, Stage.TRAIN)
"""The stages whose runs look whether they were cancelled."""


@dataclass(frozen=True)
class JobRow:
    """One image's share of a recipe. ``lease``: seconds until the job of a silent worker is free.

    ``wait``: seconds until the next try. ``reason`` is the last line of ``error``.
    """

    job_id: int
    stage: str
    recipe_id: int
    run_id: int
    image: str
    status: str
    attempts: int
    deaths: int
    worker: str | None
    lease: float | None
    wait: float | None
    seconds: float | None
    reason: str | None
    error: str | None


@dataclass(frozen=True)
class JobCounts:
    """How the jobs of a recipe stand, for the present bytes of the images."""

    stage: str
    recipe_id: int
    pending: int
    running: int
    done: int
    failed: int
    seconds: float | None


@dataclass(frozen=True)
class JobsList:
    """``counts`` of every recipe; ``jobs``: those asked for, the latest first; ``more`` exist."""

    counts: tuple[JobCounts, ...]
    jobs: tuple[JobRow, ...]
    more: int


@dataclass(frozen=True)
class RetryResult:
    """How many failed jobs are open again, and the commands that do them."""

    jobs: int
    commands: tuple[str, ...]


def list_jobs(
    workspace: Workspace,
    *,
    stage: str | None = None,
    status: str | None = None,
    recipe: str | None = None,
    limit: int = 100,
) -> JobsList:
    """List the jobs of a stage or a recipe that stand as ``status`` says (None: all).

    ``limit`` 0 only counts them by recipe.

    Raises:
        UnknownNameError: no such stage, recipe or status.
    """
    with workspace.database.read() as session:
        which = _which(session, stage, recipe)
        asked = which if status is None else and_(which, Job.status == _status(status))
        rows = session.execute(_rows(session, asked).limit(limit)).all() if limit else []
        total = session.scalar(_joined(select(func.count(Job.id)), asked)) or 0 if limit else 0
        return JobsList(
            tuple(JobCounts(Stage(row[0]).value, *row[1:]) for row in _counts(session, which)),
            tuple(_row(row) for row in rows),
            total - len(rows),
        )


def _status(name: str) -> Status:
    known = [item.value for item in Status if item is not Status.CANCELLED]
    if name not in known:
        raise UnknownNameError.of("status", name, known)
    return Status(name)


def _which(session: Session, stage: str | None, recipe: str | None) -> ColumnElement[bool]:
    chosen: ColumnElement[bool] = true()
    if stage is not None:
        chosen = and_(chosen, Recipe.stage == _stage(stage))
    if recipe is not None:
        ids = []
        for item in (_stage(stage),) if stage else STAGES:
            with suppress(UnknownNameError):
                ids.append(find_recipe(session, item, recipe).id)
        if not ids:
            known = select(Recipe.id).where(Recipe.stage.in_(STAGES)).order_by(Recipe.id)
            raise UnknownNameError.of("recipe", recipe, session.scalars(known))
        chosen = and_(chosen, Recipe.id.in_(ids))
    return chosen


def _stage(name: str) -> Stage:
    known = [item.value for item in STAGES]
    if name not in known:
        raise UnknownNameError.of("stage", name, known)
    return Stage(name)


def _joined(query: Select[Any], which: ColumnElement[bool]) -> Select[Any]:
    current = and_(Image.id == Job.image_id, Job.content_sha256 == CONTENT)
    return query.join(Recipe, Recipe.id == Job.recipe_id).join(Image, current).where(which)


def _rows(session: Session, which: ColumnElement[bool]) -> Select[Any]:
    moment = now(session)
    query: Any = select(
        Job.id,
        Recipe.stage,
        Job.recipe_id,
        Job.run_id,
        Plate.barcode,
        Image.core_name,
        Job.status,
        Job.attempts,
        Job.deaths,
        Job.worker,
        Job.lease_until,
        Job.not_before,
        moment.label("moment"),
        Job.seconds,
        Job.error,
    )
    joined = _joined(query, which).join(Well, Well.id == Image.well_id)
    return joined.join(Plate, Plate.id == Well.plate_id).order_by(Job.id.desc())


def _row(row: Any) -> JobRow:
    lines = (row.error or "").strip().splitlines()
    return JobRow(
        job_id=row.id,
        stage=Stage(row.stage).value,
        recipe_id=row.recipe_id,
        run_id=row.run_id,
        image=f"{row.barcode}/{row.core_name}",
        status=row.status.value,
        attempts=row.attempts,
        deaths=row.deaths,
        worker=shown_worker(row.worker) or None,
        lease=_seconds_until(row.lease_until, row.moment),
        wait=_seconds_until(row.not_before, row.moment),
        seconds=row.seconds,
        reason=lines[-1] if lines else None,
        error=row.error,
    )


def _seconds_until(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else round((moment - now).total_seconds(), 1)


def _counts(session: Session, which: ColumnElement[bool]) -> Any:
    by_status = (
        func.count().filter(Job.status == status)
        for status in (Status.PENDING, Status.RUNNING, Status.DONE, Status.FAILED)
    )
    query: Any = select(Recipe.stage, Recipe.id, *by_status, func.avg(Job.seconds))
    return session.execute(
        _joined(query.select_from(Job), which).group_by(Recipe.stage, Recipe.id).order_by(Recipe.id)
    )


def retry(
    workspace: Workspace,
    *,
    stage: str | None = None,
    run: str | None = None,
    image: str | None = None,
) -> RetryResult:
    """Open the failed jobs of a stage, a run, an image (None: of all) for another try.

    Raises:
        UnknownNameError: there is no such stage, run or image.
    """
    with workspace.database.begin() as session:
        stages = STAGES if stage is None else (_stage(stage),)
        recipes = select(Recipe.id).where(Recipe.stage.in_(stages))
        which: list[ColumnElement[bool]] = [
            Job.recipe_id.in_(recipes),
            Job.status == Status.FAILED,
        ]
        if run is not None:
            which.append(Job.run_id == run_in(session, run, STAGES).id)
        if image is not None:
            which.append(Job.image_id == find_image(session, image))
        # The bytes that an image had before are of no use to try again.
        current = and_(Image.id == Job.image_id, Job.content_sha256 == CONTENT)
        which.append(exists().where(current))
        commands = select(Run.command).where(
            Run.id.in_(select(func.max(Job.run_id)).where(*which).group_by(Job.recipe_id))
        )
        typed = tuple(session.scalars(commands.order_by(Run.id)))
        opened = requeue(session, *which)
        old = {"status": Status.FAILED.value, "number": opened}
        if opened:
            new = {"status": Status.PENDING.value, "number": opened}
            record_events(session, [Change("jobs", None, old, new)])
        return RetryResult(opened, typed)


def cancel(workspace: Workspace, run: str | None = None) -> tuple[int, ...]:
    """Mark running runs (None: all that listen) as cancelled; return their numbers.

    Their process ends within seconds, when the images in its hands are done; of a process that is
    gone already, the mark says so. A training has kept what it was at the end of its last epoch.

    Raises:
        UnknownNameError: there is no such run.
        UserInputError: it is over, or is of a stage that does not listen.
    """
    with workspace.database.begin() as session:
        query = select(Run.id).where(Run.status == Status.RUNNING, Run.stage.in_(LISTENING))
        if run is not None:
            query = query.where(Run.id == _running(session, run).id)
        ids = tuple(session.scalars(query.order_by(Run.id)))
        session.execute(
            update(Run)
            .where(Run.id.in_(ids))
            .values(status=Status.CANCELLED, error="Cancelled.", ended_at=datetime.now(UTC))
        )
        old, new = ({"status": item.value} for item in (Status.RUNNING, Status.CANCELLED))
        record_events(session, [Change("runs", number, old, new) for number in ids])
        return ids


def _running(session: Session, reference: str) -> Run:
    found = run_in(session, reference)
    if found.stage not in LISTENING:
        raise UserInputError(
            f"A {found.stage.value} run such as run {found.id} cannot be cancelled from here. Stop "
            "it with Ctrl-C where it runs."
        )
    if found.status is not Status.RUNNING:
        raise UserInputError(f"Run {found.id} is {found.status.value}; nothing is running.")
    return found
