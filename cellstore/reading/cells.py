"""The cells that a network reads: one query, asked as a whole or image by image.

Excluded cells are left out here, and nowhere else. No function holds more than the rows of one
image or of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, func, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.models import (
    Cell,
    CellFeatures,
    Image,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    SplitMember,
    Well,
)
from ..errors import ImageError, UserInputError
from ..runs.lookup import find_recipe
from ..terms import Projection, Stage, Subset

_KEYS = ("cell_id", "recipe_id", "run_id")
FEATURE_COLUMNS: tuple[str, ...] = tuple(
    column.name for column in CellFeatures.__table__.columns if column.name not in _KEYS
)
"""The built-in measurements, in the order in which a network reads them."""

_BOX = ("min_row", "min_col", "max_row", "max_col")
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class CellSource:
    """Whose cells: found by one recipe, measured by another, on a split or on plates.

    ``subset``: one side of the split. Without ``split_id`` and ``plates``: all images.
    """

    segment_id: int
    measure_id: int
    split_id: int | None = None
    subset: Subset | None = None
    plates: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageBlock:
    """An image that has cells, its place in the split, and how many cells it has."""

    image_id: int
    content_sha256: str
    subset: Subset
    label_id: int
    n_cells: int


@dataclass(frozen=True)
class CellRows:
    """The N cells of one image.

    ``cell_ids`` and ``labels`` (N,) int64, ``boxes`` (N, 4) int64 as in table ``cells``,
    ``features`` (N, F) float64 in the order of ``FEATURE_COLUMNS``, ``label_id``: their class.
    """

    cell_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int64]
    features: NDArray[np.float64]
    label_id: int | None

    def __len__(self) -> int:
        return len(self.cell_ids)


def cells_query(source: CellSource) -> Select[Any]:
    """Return the query of all cells of ``source`` with boxes, measurements, side and label."""
    current = and_(
        Segmentation.image_id == Image.id,
        Segmentation.content_sha256 == Image.content_sha256,
        Segmentation.recipe_id == source.segment_id,
    )
    measured = and_(CellFeatures.cell_id == Cell.id, CellFeatures.recipe_id == source.measure_id)
    query = (
        select(Image.id.label("image_id"), Cell.id.label("cell_id"), Cell.label.label("label"))
        .add_columns(*(getattr(Cell, name) for name in _BOX))
        .add_columns(*(getattr(CellFeatures, name) for name in FEATURE_COLUMNS))
        .select_from(Image)
        .join(Segmentation, current)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(CellFeatures, measured)
        .where(Cell.excluded.is_(None))
    )
    return _of_split(_of_plates(query, source), source)


def _of_plates(query: Select[Any], source: CellSource) -> Select[Any]:
    if not source.plates:
        return query
    on_plate = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    return on_plate.where(Plate.barcode.in_(source.plates))


def _of_split(query: Select[Any], source: CellSource) -> Select[Any]:
    if source.split_id is None:
        return query
    member = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
    joined = query.add_columns(SplitMember.subset, SplitMember.label_id).join(SplitMember, member)
    return joined if source.subset is None else joined.where(SplitMember.subset == source.subset)


def as_text(query: Select[Any]) -> str:
    """Return ``query`` as SQL that runs as it stands on both databases, to be kept with a run."""
    compiled = query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    return str(compiled)


def list_blocks(session: Session, source: CellSource) -> list[ImageBlock]:
    """Return the images of a split that have cells to read, by image id; a row per image."""
    keys = (Image.id, Segmentation.content_sha256, SplitMember.subset, SplitMember.label_id)
    query = cells_query(source).with_only_columns(*keys, func.count(Cell.id))
    rows = session.execute(query.group_by(*keys).order_by(Image.id))
    return [ImageBlock(*row) for row in rows]


def read_cells(session: Session, source: CellSource, image_id: int) -> CellRows:
    """Return the cells of one image, by cell id: ``cells_query`` restricted to it."""
    query = cells_query(source).where(Image.id == image_id).order_by(Cell.id)
    rows = session.execute(query).mappings().all()
    return CellRows(
        np.array([row["cell_id"] for row in rows], dtype=np.int64),
        np.array([row["label"] for row in rows], dtype=np.int64),
        _columns(rows, _BOX, np.int64),
        _columns(rows, FEATURE_COLUMNS, np.float64),
        rows[0].get("label_id") if rows else None,
    )


def stream_features(session: Session, source: CellSource) -> Iterator[NDArray[np.float64]]:
    """Yield the measurements of all cells in blocks (N, F) of at most 10,000 rows."""
    columns = [getattr(CellFeatures, name) for name in FEATURE_COLUMNS]
    query = cells_query(source).with_only_columns(*columns).order_by(Cell.id)
    rows = session.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))
    for block in rows.partitions():
        yield np.array([tuple(row) for row in block], dtype=np.float64)


def _columns(rows: Any, names: tuple[str, ...], dtype: Any) -> NDArray[Any]:
    table = [[row[name] for name in names] for row in rows]
    return np.array(table, dtype=dtype).reshape(-1, len(names))


def mask_and_flow(session: Session, segment_id: int, image_id: int) -> tuple[int, int]:
    """Return the artifact ids of the current masks and flows of an image.

    Raises:
        ImageError: the image has changed, and its new bytes are not segmented yet.

    """
    query = (
        select(Segmentation.mask_artifact_id, Segmentation.flow_artifact_id)
        .join(Image, Image.id == Segmentation.image_id)
        .where(Image.id == image_id, Segmentation.recipe_id == segment_id)
        .where(Segmentation.content_sha256 == Image.content_sha256)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        raise ImageError("This image has changed since it was segmented. Run: cellstore segment")
    return found.mask_artifact_id, found.flow_artifact_id


def plane_of(segment: Recipe) -> ImageInput:
    """Return the plane that a segment recipe looked at."""
    named = segment.parameters["image"]
    return ImageInput(tuple(named["channels"]), Projection(named["projection"]))


def choose_recipes(
    session: Session, segmentation: str | None, measurement: str | None
) -> tuple[Recipe, Recipe]:
    """Return the segment and the measure recipe to read cells by; default: those used last.

    Raises:
        UnknownNameError: nothing has been segmented, or no recipe has that name.
        UserInputError: the measurements are not those of the segmentation.

    """
    if segmentation is None and measurement is not None:
        measure = find_recipe(session, Stage.MEASURE, measurement)
        return input_of(session, measure, Stage.SEGMENT), measure
    segment = find_recipe(session, Stage.SEGMENT, segmentation)
    if measurement is None:
        return segment, _last_measure_of(session, segment)
    measure = find_recipe(session, Stage.MEASURE, measurement)
    if input_of(session, measure, Stage.SEGMENT).id != segment.id:
        raise UserInputError(
            f"Measure recipe {measure.id} did not read the cells of segment recipe {segment.id}. "
            "Leave one of the two away, or run: cellstore measure --segmentation "
            f"{segment.id}"
        )
    return segment, measure


def input_of(session: Session, recipe: Recipe, stage: Stage) -> Recipe:
    """Return the recipe of ``stage`` whose results ``recipe`` reads."""
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    return session.scalars(
        query.where(RecipeInput.recipe_id == recipe.id, Recipe.stage == stage)
    ).one()


def _last_measure_of(session: Session, segment: Recipe) -> Recipe:
    query = (
        select(Recipe)
        .join(RecipeInput, RecipeInput.recipe_id == Recipe.id)
        .join(Run, Run.recipe_id == Recipe.id)
        .where(RecipeInput.input_id == segment.id, Recipe.stage == Stage.MEASURE)
        .order_by(Run.id.desc())
    )
    found = session.scalars(query.limit(1)).first()
    if found is None:
        raise UserInputError(
            f"The cells of segment recipe {segment.id} are not measured yet. Run: cellstore measure"
        )
    return found
