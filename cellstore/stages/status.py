"""Status: what is in a store, what is left to do, and what failed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.orm import Session

from ..db.models import (
    Cell,
    CellFeatures,
    Image,
    Job,
    Plate,
    Prediction,
    Recipe,
    Run,
    Split,
    Treatment,
    Well,
)
from ..db.types import Base
from ..runs import Workspace
from ..terms import Stage, Status


@dataclass(frozen=True)
class RecipeStatus:
    """How far one recipe of a stage has come. ``stale``: done for bytes that have changed since."""

    stage: str
    recipe_id: int
    fingerprint: str
    done: int
    stale: int
    failed: int
    open: int


@dataclass(frozen=True)
class FailedJob:
    """An image that a recipe could not do, and why (the last line of a long reason)."""

    stage: str
    recipe_id: int
    image: str
    attempts: int
    reason: str


@dataclass(frozen=True)
class StatusResult:
    """What is in a store. ``cells`` counts all recipes; ``excluded`` those that do not count.

    ``segmented`` and ``measured`` are images that at least one recipe has done for their
    present bytes.
    """

    store: str
    database: str
    plates: int
    wells: int
    treatments: int
    images: int
    missing_images: int
    segmented: int
    measured: int
    cells: int
    excluded: int
    features: int
    splits: int
    runs: int
    predictions: int
    recipes: tuple[RecipeStatus, ...]
    failed: tuple[FailedJob, ...]


def status(workspace: Workspace) -> StatusResult:
    """Count what is in a store."""
    with workspace.database.read() as session:
        return StatusResult(
            store=str(workspace.settings.root),
            database=workspace.database.shown,
            plates=_count(session, Plate),
            wells=_count(session, Well),
            treatments=_count(session, Treatment),
            images=_count(session, Image),
            missing_images=_count(session, Image, Image.content_sha256.is_(None)),
            segmented=_images_done(session, Stage.SEGMENT),
            measured=_images_done(session, Stage.MEASURE),
            cells=_count(session, Cell),
            excluded=_count(session, Cell, Cell.excluded.is_not(None)),
            features=_count(session, CellFeatures),
            splits=_count(session, Split),
            runs=_count(session, Run),
            predictions=_count(session, Prediction),
            recipes=_recipes(session),
            failed=_failed(session),
        )


def _count(session: Session, table: type[Base], *where: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(table).where(*where)) or 0


def _images_done(session: Session, stage: Stage) -> int:
    query = (
        select(func.count(Image.id.distinct()))
        .join(Job, _current())
        .join(Recipe, Recipe.id == Job.recipe_id)
        .where(Recipe.stage == stage, Job.status == Status.DONE)
    )
    return session.scalar(query) or 0


def _current() -> ColumnElement[bool]:
    return and_(Job.image_id == Image.id, Job.content_sha256 == Image.content_sha256)


def _recipes(session: Session) -> tuple[RecipeStatus, ...]:
    current = Job.content_sha256 == Image.content_sha256
    rows = session.execute(
        select(
            Recipe.stage,
            Recipe.id,
            Recipe.fingerprint,
            _tally(and_(Job.status == Status.DONE, current)),
            _tally(and_(Job.status == Status.DONE, Image.content_sha256 != Job.content_sha256)),
            _tally(and_(Job.status == Status.FAILED, current)),
            _tally(and_(Job.status.in_((Status.PENDING, Status.RUNNING)), current)),
        )
        .join(Job, Job.recipe_id == Recipe.id)
        .join(Image, Image.id == Job.image_id)
        .group_by(Recipe.stage, Recipe.id, Recipe.fingerprint)
        .order_by(Recipe.id)
    )
    return tuple(
        RecipeStatus(Stage(stage).value, number, mark, *counts)
        for stage, number, mark, *counts in rows
    )


def _tally(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(condition)


def _failed(session: Session) -> tuple[FailedJob, ...]:
    rows = session.execute(_failed_jobs())
    return tuple(
        FailedJob(
            Stage(row.stage).value,
            row.recipe_id,
            f"{row.barcode}/{row.core_name}",
            row.attempts,
            _last_line(row.error),
        )
        for row in rows
    )


def _failed_jobs() -> Select[Stage, int, str, str, int, str | None]:
    return (
        select(
            Recipe.stage,
            Job.recipe_id,
            Plate.barcode,
            Image.core_name,
            Job.attempts,
            Job.error,
        )
        .join(Recipe, Recipe.id == Job.recipe_id)
        .join(Image, _current())
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Job.status == Status.FAILED)
        .order_by(Job.recipe_id, Plate.barcode, Image.core_name)
    )


def _last_line(error: str | None) -> str:
    # An unexpected error is kept with its traceback, whose last line names it.
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else "no reason was kept"
