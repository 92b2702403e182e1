"""What does not count, and the quality-control run whose flags are asked for.

The view ``exclusions`` of the database says all of it. Whatever counts images or cells asks
:func:`image_counts` and :func:`cell_counts`; DuckDB asks ``later_exclusions`` (``query/sql``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from ..config import VoteOptions
from ..enums import ExclusionSource, Level, Stage, Status
from ..errors import UserInputError, some_of
from ..jobs.lookup import renamed_plates
from ..jobs.run_names import NamedRun, find_named_run
from ..models import (
    EXCLUSIONS,
    METADATA,
    Cell,
    Image,
    ImagePrediction,
    Job,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Well,
)


def find_qc_run(session: Session, reference: str = "latest") -> Run:
    """Return a finished quality-control run by its number; ``latest``: the newest."""
    found = session.get_one(Run, find_named_run(session, reference, (Stage.QC,)).id)
    if found.status != Status.DONE:
        raise UserInputError(
            f"Quality-control run {found.id} is {Status(found.status).value}, so its flags are "
            "incomplete. Run: cellstore qc, or name another run."
        )
    return found


def with_flags(
    session: Session, options: VoteOptions, run: NamedRun
) -> tuple[VoteOptions, tuple[str, ...]]:
    """Return the options with the number of the quality-control run, and what is to be noted."""
    labelled = and_(Prediction.run_id.in_(run.read_as), Prediction.rank == 1)
    seen = select(Segmentation).join(Cell, Cell.segmentation_id == Segmentation.id)
    seen = seen.join(Prediction, Prediction.cell_id == Cell.id).where(labelled)
    segment_ids = session.scalars(seen.with_only_columns(Segmentation.recipe_id).distinct())
    whole = select(ImagePrediction.image_id).where(ImagePrediction.run_id.in_(run.read_as))
    of_cells = seen.with_only_columns(Segmentation.image_id)
    images = select(Image.id).where(or_(Image.id.in_(of_cells), Image.id.in_(whole)))
    qc, unseen = qc_run_for(session, str(options.exclude_flagged), images, segment_ids.all())
    return replace(options, exclude_flagged=str(qc.id)), unseen_notes(qc, unseen)


def qc_run_for(
    session: Session, reference: str, images: Select[int], segment_ids: Sequence[int] = ()
) -> tuple[Run, int]:
    """Return a quality-control run that has looked at every plate of ``images``, and at the cells.

    ``segment_ids``: the recipes that found the cells. The number counts those of ``images`` that it
    knew nothing of, so flagged none.
    """
    run = find_qc_run(session, reference)
    on_plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id).join(Image)
    names = set(session.scalars(on_plates.where(Image.id.in_(images)).distinct()))
    seen = set((run.result or {}).get("plates", ()))
    seen |= {now for _, now in renamed_plates(session, seen - names).values()}
    missing = sorted(names - seen)
    if missing:
        raise UserInputError(
            f"Quality-control run {run.id} has not looked at plate {some_of(missing)}. "
            "Run: cellstore qc"
        )
    of = next((item.id for item in run.recipe.inputs if item.stage is Stage.SEGMENT), None)
    for segment_id in segment_ids:
        if segment_id != of:
            what = "no cells" if of is None else f"the cells of segment recipe {of}"
            raise UserInputError(
                f"Quality-control run {run.id} looked at {what}, not at those of segment recipe "
                f"{segment_id}. Run: cellstore qc --segmentation {segment_id}"
            )
    looked_at = (
        select(Job.id)
        .join(Recipe, Recipe.id == Job.recipe_id)
        .join(RecipeInput, RecipeInput.input_id == Recipe.id)
        .where(RecipeInput.recipe_id == run.recipe_id, Recipe.stage == Stage.QC)
        .where(Job.status == Status.DONE, Job.run_id <= run.id, Job.image_id == Image.id)
        .where(Job.content_sha256 == Image.content_sha256)
    )
    query = select(func.count()).select_from(Image).where(Image.id.in_(images))
    return run, session.scalar(query.where(~looked_at.exists())) or 0


def unseen_notes(run: Run, unseen: int) -> tuple[str, ...]:
    """Return the sentence on images that a quality-control run knew nothing of, if any."""
    sentence = (
        f"Quality-control run {run.id} has not looked at {unseen:,} of the images, so none of them "
        "was excluded. Run: cellstore qc"
    )
    return (sentence,) if unseen else ()


def image_counts(qc_run: int | None = None) -> ColumnElement[bool]:
    """Return the condition that a row of ``images`` counts: no exclusion of it, its well or plate.

    ``qc_run``: what this quality-control run has flagged does not count either.
    """
    own = aliased(Well)
    plate = select(own.plate_id).where(own.id == Image.well_id).correlate(Image).scalar_subquery()
    return and_(
        _not_excluded(Level.IMAGE, Image.id, qc_run),
        _not_excluded(Level.WELL, Image.well_id, qc_run),
        _not_excluded(Level.PLATE, plate, qc_run),
    )


def cell_counts(qc_run: int | None = None) -> ColumnElement[bool]:
    """Return the condition that a row of ``cells`` counts, where its image does (see there)."""
    return and_(Cell.excluded.is_(None), _not_excluded(Level.CELL, Cell.id, qc_run))


def why_excluded(session: Session, cell_id: int) -> list[str]:
    """Return why a cell does not count: first its own reasons, then those of its image, ..."""
    cells, segmentations, images, wells = (
        METADATA.tables[name] for name in ("cells", "segmentations", "images", "wells")
    )
    query = select(cells.c.id, images.c.id, images.c.well_id, wells.c.plate_id)
    query = query.select_from(cells.join(segmentations).join(images).join(wells))
    ids = session.execute(query.where(cells.c.id == cell_id)).one()
    found = EXCLUSIONS.c
    return [
        reason
        for level, row_id in zip(
            (Level.CELL, Level.IMAGE, Level.WELL, Level.PLATE), ids, strict=True
        )
        for reason in session.scalars(
            select(found.reason)
            .where(found.level == level.value, found.id == row_id, found.run_id.is_(None))
            .order_by(found.source.desc(), found.annotation_id)
        )
    ]


def _not_excluded(level: Level, row_id: Any, qc_run: int | None) -> ColumnElement[bool]:
    """Return the condition that neither a person nor this run excludes a row.

    What the segmentation excludes is a column of ``cells``; PostgreSQL would read all of it for the
    cells of one image.
    """
    found = EXCLUSIONS.c
    counted: ColumnElement[bool] = found.source == ExclusionSource.ANNOTATION.value
    if qc_run is not None:
        counted = or_(counted, found.run_id == qc_run)
    return ~exists().where(found.level == level.value, found.id == row_id, counted)
