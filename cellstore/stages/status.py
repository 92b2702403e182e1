"""Status: what is in a store, what is left to do, and what failed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from ..enums import FeatureStorage, Level, Stage, Status
from ..jobs.selection import is_current
from ..jobs.workspace import Workspace
from ..models import (
    EXCLUSIONS,
    Base,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Image,
    ImageFlag,
    Job,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    RunMetric,
    Segmentation,
    Split,
    Treatment,
    Well,
)
from ..query.exclusions import excluded_images


@dataclass(frozen=True)
class RecipeStatus:
    """How far one recipe of a stage has come.

    ``stale``: done for bytes that have changed since. ``todo``: what its next run would do, stale
    ones and those that others have not finished included. ``reads``: the segment recipe whose
    cells it measures; ``replaced_by``: the segment recipe that was used after it.
    """

    stage: str
    recipe_id: int
    fingerprint: str
    done: int
    stale: int
    failed: int
    open: int
    todo: int = 0
    reads: int | None = None
    replaced_by: int | None = None


@dataclass(frozen=True)
class FeatureSetStatus:
    """A feature set: how many columns it has, and how many cells have values in it."""

    name: str
    recipe_id: int
    storage: str
    columns: int
    cells: int


@dataclass(frozen=True)
class BrokenOff:
    """A training that did not come to its end, after so many whole ``epochs``.

    Networks only, and only while no run of the same recipe has come to its end.
    """

    run_id: int
    status: str
    epochs: int
    started_at: str


@dataclass(frozen=True)
class StatusResult:
    """What is in a store.

    ``cells`` counts all recipes; ``excluded`` and ``excluded_images`` are those that do not count,
    whatever quality control has flagged.
    ``segmented`` and ``measured`` are images that at least one recipe has done for their
    present bytes, or whose cells and features another tool gave. ``features`` counts the rows of
    the built-in measurements; ``feature_sets`` are all sets. ``flagged_images`` are those of the
    newest finished quality-control run, ``qc_run_id``. ``broken_off``: trainings to go on with.
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
    feature_sets: tuple[FeatureSetStatus, ...] = ()
    qc_run_id: int | None = None
    flagged_images: int = 0
    broken_off: tuple[BrokenOff, ...] = ()
    excluded_images: int = 0


def status(workspace: Workspace) -> StatusResult:
    """Count what is in a store."""
    with workspace.database.read() as session:
        qc_run_id = _newest_qc(session)
        return StatusResult(
            store=str(workspace.settings.root),
            database=workspace.database.shown,
            plates=_count(session, Plate),
            wells=_count(session, Well),
            treatments=_count(session, Treatment),
            images=_count(session, Image),
            missing_images=_count(session, Image, Image.content_sha256.is_(None)),
            segmented=_images_done(session, Stage.SEGMENT, select(Recipe.id)),
            measured=_images_done(session, Stage.MEASURE, _inputs_of_imported_sets()),
            cells=_count(session, Cell),
            excluded=_excluded_cells(session),
            features=_count(session, CellFeatures),
            splits=_count(session, Split),
            runs=_count(session, Run),
            predictions=_count(session, Prediction),
            recipes=tuple(sorted(_recipes(session) + _imported(session), key=_number)),
            feature_sets=_feature_sets(session),
            qc_run_id=qc_run_id,
            flagged_images=_flagged(session, qc_run_id),
            broken_off=_broken_off(session),
            excluded_images=session.scalar(
                select(func.count()).select_from(excluded_images().subquery())
            )
            or 0,
        )


def _excluded_cells(session: Session) -> int:
    own = select(EXCLUSIONS.c.id).where(EXCLUSIONS.c.level == Level.CELL.value)
    of_images = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    of_images = of_images.where(Segmentation.image_id.in_(excluded_images()))
    both = own.where(EXCLUSIONS.c.run_id.is_(None)).union(of_images).subquery()
    return session.scalar(select(func.count()).select_from(both)) or 0


def _broken_off(session: Session) -> tuple[BrokenOff, ...]:
    finished = aliased(Run)
    query = (
        select(Run, func.count(RunMetric.epoch.distinct()))
        .join(Recipe, Recipe.id == Run.recipe_id)
        .outerjoin(RunMetric, RunMetric.run_id == Run.id)
        .where(Run.stage == Stage.TRAIN, Run.status.in_((Status.FAILED, Status.CANCELLED)))
        .where(Recipe.parameters["baseline"].as_string().is_(None))
        .where(
            ~exists().where(
                finished.recipe_id == Run.recipe_id,
                finished.split_id == Run.split_id,
                finished.status == Status.DONE,
            )
        )
        .group_by(Run.id)
        .order_by(Run.id)
    )
    return tuple(
        BrokenOff(run.id, run.status.value, epochs, run.started_at.isoformat())
        for run, epochs in session.execute(query)
    )


def _newest_qc(session: Session) -> int | None:
    done = select(func.max(Run.id)).where(Run.stage == Stage.QC, Run.status == Status.DONE)
    return session.scalar(done)


def _flagged(session: Session, run_id: int | None) -> int:
    images = select(func.count(ImageFlag.image_id.distinct())).where(ImageFlag.run_id == run_id)
    return session.scalar(images) or 0


def _count(session: Session, table: type[Base], *where: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(table).where(*where)) or 0


def _images_done(session: Session, stage: Stage, imported: Select[int]) -> int:
    """Images with a finished job, or with cells of a segment recipe that is among ``imported``."""
    done = exists().where(_current(), Job.status == Status.DONE)
    done = done.where(Job.recipe_id == Recipe.id, Recipe.stage == stage)
    given = exists().where(is_current(), Segmentation.recipe_id.in_(imported))
    return session.scalar(select(func.count()).select_from(Image).where(or_(done, given))) or 0


def _inputs_of_imported_sets() -> Select[int]:
    """Segment recipes of feature sets that no job of ours fills."""
    query = select(RecipeInput.input_id)
    query = query.join(FeatureSet, FeatureSet.recipe_id == RecipeInput.recipe_id)
    query = query.where(FeatureSet.storage == FeatureStorage.FILES)
    return query.where(~exists().where(Job.recipe_id == FeatureSet.recipe_id))


def _feature_sets(session: Session) -> tuple[FeatureSetStatus, ...]:
    in_table = select(FeatureSet.id, func.count()).group_by(FeatureSet.id)
    in_table = in_table.join(CellFeatures, CellFeatures.recipe_id == FeatureSet.recipe_id)
    in_files = select(FeatureFile.feature_set_id, func.sum(FeatureFile.n_rows))
    in_files = in_files.group_by(FeatureFile.feature_set_id)
    cells = dict(session.execute(in_table).all()) | dict(session.execute(in_files).all())
    return tuple(
        FeatureSetStatus(
            found.name,
            found.recipe_id,
            found.storage.value,
            len(found.columns),
            int(cells.get(found.id, 0)),
        )
        for found in session.scalars(select(FeatureSet).order_by(FeatureSet.id))
    )


def _imported(session: Session) -> tuple[RecipeStatus, ...]:
    """The segment recipes of other tools: no job of ours found their cells."""
    current = _tally(is_current())
    rows = session.execute(
        select(Recipe.id, Recipe.fingerprint, current, func.count() - current)
        .join(Segmentation, Segmentation.recipe_id == Recipe.id)
        .join(Image, Image.id == Segmentation.image_id)
        .where(Recipe.stage == Stage.SEGMENT, ~exists().where(Job.recipe_id == Recipe.id))
        .group_by(Recipe.id, Recipe.fingerprint)
    )
    return tuple(
        RecipeStatus(Stage.SEGMENT.value, number, mark, done, stale, 0, 0)
        for number, mark, done, stale in rows
    )


def _number(recipe: RecipeStatus) -> int:
    return recipe.recipe_id


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
    ).all()
    seen = session.scalar(select(func.count(Image.content_sha256))) or 0
    reads, last, segmented = _reads(session), _last_segment(session), _segmented(session)
    found = []
    for stage, number, mark, done, stale, failed, unfinished in rows:
        source = reads.get(number)
        ready = {Stage.SEGMENT: seen, Stage.QC: seen}.get(stage)
        ready = segmented.get(source or 0, 0) if stage == Stage.MEASURE else ready
        todo = unfinished if ready is None else max(0, ready - done - failed)
        replaced = stage == Stage.SEGMENT and last != number
        found.append(
            RecipeStatus(
                Stage(stage).value,
                number,
                mark,
                done,
                stale,
                failed,
                unfinished,
                todo,
                source,
                last if replaced else None,
            )
        )
    return tuple(found)


def _reads(session: Session) -> dict[int, int]:
    """By measure recipe: the segment recipe that it reads."""
    query = select(RecipeInput.recipe_id, RecipeInput.input_id)
    measure = aliased(Recipe)
    query = query.join(Recipe, Recipe.id == RecipeInput.input_id).join(
        measure, measure.id == RecipeInput.recipe_id
    )
    where = (Recipe.stage == Stage.SEGMENT, measure.stage == Stage.MEASURE)
    return {row[0]: row[1] for row in session.execute(query.where(*where))}


def _last_segment(session: Session) -> int | None:
    query = select(Run.recipe_id).where(Run.stage == Stage.SEGMENT)
    return session.scalar(query.order_by(Run.id.desc()).limit(1))


def _segmented(session: Session) -> dict[int, int]:
    """By segment recipe: images whose present bytes it has done, and that can be opened."""
    query = select(Segmentation.recipe_id, func.count()).join(Image, is_current())
    seen = query.where(
        Image.content_sha256.is_not(None), Segmentation.mask_artifact_id.is_not(None)
    )
    rows = session.execute(seen.group_by(Segmentation.recipe_id))
    return {row[0]: row[1] for row in rows}


def _tally(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(condition)
