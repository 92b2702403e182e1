"""Jobs: what is running, what failed and why; another try; and a request to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, select, update

from ..config import RunName
from ..db.events import Change, record_events
from ..enums import Stage, Status
from ..errors import UnknownNameError, UserInputError
from ..jobs.gone_files import lost_files
from ..jobs.lookup import find_run, image_name, images_named
from ..jobs.queue import CONTENT, close_dead_runs, now, requeue, shown_worker
from ..jobs.workspace import Workspace
from ..models import Image, Job, Plate, Recipe, Run, Well
from ..notebooks import Shown

STAGES = (Stage.SEGMENT, Stage.MEASURE, Stage.QC, Stage.PREDICT)
"""The stages that go image by image."""

LISTENING = (*STAGES, Stage.TRAIN)
"""The stages whose runs look whether they were cancelled."""


@dataclass(frozen=True)
class JobsList(Shown):
    """``counts`` of every recipe; ``jobs``: those asked for, the latest first; ``more`` exist.

    Counted are the jobs for the present bytes of the images. A job is one image's share of a
    recipe: ``lease`` are the seconds until the job of a silent worker is free, ``wait`` those until
    the next try; ``reason`` is the last line of ``error``.
    """

    counts: tuple[dict[str, Any], ...]
    jobs: tuple[dict[str, Any], ...]
    more: int


@dataclass(frozen=True)
class RetryResult(Shown):
    """How many failed jobs are open again, and the commands that do them.

    ``lost_files`` are masks and files of features that are gone, which the commands make again.
    """

    jobs: int
    commands: tuple[str, ...]
    lost_files: int = 0


_CURRENT = and_(Image.id == Job.image_id, Job.content_sha256 == CONTENT)
"""Joins a job to its image; the bytes that an image had before are of no interest."""


def list_jobs(
    workspace: Workspace,
    *,
    stage: str | None = None,
    status: str | None = None,
    image: str | None = None,
    limit: int = 100,
) -> JobsList:
    """List the jobs of a stage or an image that stand as ``status`` says (None: all).

    ``limit`` 0 only counts them by recipe.
    """
    known = [item.value for item in Status if item is not Status.CANCELLED]
    if status is not None and status not in known:
        raise UnknownNameError.of("status", status, known)
    stages = _stages(stage)
    with workspace.database.read() as session:
        which: list[ColumnElement[bool]] = [] if stage is None else [Recipe.stage.in_(stages)]
        if image is not None:
            which.append(images_named(session, image))
        found = select(Recipe.stage).select_from(Job).join(Recipe, Recipe.id == Job.recipe_id)
        found = found.join(Image, _CURRENT).where(*which)
        by_status = (
            func.count().filter(Job.status == item).label(item.value)
            for item in (Status.PENDING, Status.RUNNING, Status.DONE, Status.FAILED)
        )
        counts = found.add_columns(Recipe.id.label("recipe_id"), *by_status)
        counts = counts.add_columns(func.avg(Job.seconds).label("seconds"))
        counts = counts.group_by(Recipe.stage, Recipe.id).order_by(Recipe.id)
        counted = tuple(dict(row) for row in session.execute(counts).mappings())
        if limit == 0:
            return JobsList(counted, (), 0)
        query = found.add_columns(Job, now(session).label("moment"), Plate.barcode, Image.core_name)
        query = query.add_columns(Image.plane, Image.time_point)
        query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        if status is not None:
            query = query.where(Job.status == Status(status))
        total = session.scalar(query.with_only_columns(func.count())) or 0
        jobs = []
        for of_stage, job, at, *name in session.execute(query.order_by(Job.id.desc()).limit(limit)):
            lease, wait = (
                None if until is None else round((until - at).total_seconds(), 1)
                for until in (job.lease_until, job.not_before)
            )
            lines = (job.error or "").strip().splitlines()
            jobs.append(
                {
                    "job_id": job.id,
                    "stage": Stage(of_stage).value,
                    "recipe_id": job.recipe_id,
                    "run_id": job.run_id,
                    "image": image_name(*name),
                    "status": job.status.value,
                    "attempts": job.attempts,
                    "deaths": job.deaths,
                    "worker": shown_worker(job.worker) or None,
                    "lease": lease,
                    "wait": wait,
                    "seconds": job.seconds,
                    "reason": lines[-1] if lines else None,
                    "error": job.error,
                }
            )
        return JobsList(counted, tuple(jobs), total - len(jobs))


def _stages(name: str | None) -> tuple[Stage, ...]:
    """Return the stage of this name; without a name all that go image by image."""
    known = [item.value for item in STAGES]
    if name is not None and name not in known:
        raise UnknownNameError.of("stage", name, known)
    return STAGES if name is None else (Stage(name),)


def retry(
    workspace: Workspace,
    *,
    stage: str | None = None,
    run: RunName | None = None,
    image: str | None = None,
) -> RetryResult:
    """Open the failed jobs of a stage, a run, an image (None: of all) for another try.

    If it is of all, files that are gone are looked for, too.
    """
    with workspace.database.begin() as session:
        recipes = select(Recipe.id).where(Recipe.stage.in_(_stages(stage)))
        which = [Job.recipe_id.in_(recipes), Job.status == Status.FAILED, exists().where(_CURRENT)]
        if run is not None:
            which.append(Job.run_id == find_run(session, run, *STAGES).id)
        if image is not None:
            which.append(exists().where(Image.id == Job.image_id, images_named(session, image)))
        last = select(func.max(Job.run_id)).where(*which).group_by(Job.recipe_id)
        commands = select(Run.command).where(Run.id.in_(last)).order_by(Run.id)
        typed = tuple(session.scalars(commands))
        opened = requeue(session, *which)
        if opened:
            old, new = (
                {"status": item.value, "number": opened} for item in (Status.FAILED, Status.PENDING)
            )
            record_events(session, [Change("jobs", None, old, new)])
        lost, makers = 0, tuple[str, ...]()
        if stage is None and run is None and image is None:
            lost, makers = lost_files(session, workspace.artifacts)
        return RetryResult(opened, tuple(dict.fromkeys((*makers, *typed))), lost)


def cancel(workspace: Workspace, run: RunName | None = None) -> tuple[int, ...]:
    """Mark running runs (None: all that listen) as cancelled; return their numbers.

    Their process ends within seconds, when the images in its hands are done; of a process that is
    gone already, the mark says so. A training has kept what it was at the end of its last epoch.
    """
    with workspace.database.begin() as session:
        query = select(Run.id).where(Run.status == Status.RUNNING, Run.stage.in_(LISTENING))
        if run is not None:
            found = find_run(session, run)
            if found.stage not in LISTENING:
                raise UserInputError(
                    f"A {found.stage.value} run such as run {found.id} cannot be cancelled from "
                    "here. Stop it with Ctrl-C where it runs."
                )
            if found.status is not Status.RUNNING:
                raise UserInputError(f"Run {found.id} is {found.status.value}; nothing is running.")
            query = query.where(Run.id == found.id)
        ids = tuple(session.scalars(query.order_by(Run.id)))
        # Its end is when its process has written the images in its hands.
        mark = update(Run).where(Run.id.in_(ids))
        session.execute(mark.values(status=Status.CANCELLED, error="Cancelled."))
        close_dead_runs(session)
        old, new = ({"status": item.value} for item in (Status.RUNNING, Status.CANCELLED))
        record_events(session, [Change("runs", number, old, new) for number in ids])
        return ids
