"""Drawn cells and their measurements: the ids of all are looked at, the values of a few are read.

No function holds more than the drawn cells and the rows of one batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, distinct, exists, func, select, true
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import Session, aliased

from ..analysis.features import FEATURE_NAMES
from ..artifacts import ArtifactFolder
from ..config import ImageInput
from ..db.bulk import in_lists
from ..enums import ArtifactKind, FeatureStorage, Projection, Stage, Subset
from ..errors import ImageError, UnknownNameError, UserInputError
from ..io.image_files import decode_tiff
from ..jobs.lookup import IS_CURRENT, find_recipe, has_results
from ..models import (
    Artifact,
    Cell,
    FeatureSet,
    Image,
    Label,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    Segmentation,
    SplitMember,
    Well,
)
from .exclusions import cell_counts, image_counts
from .feature_files import BUILT_IN, ReadableSet, SetReader, are_chosen, find_feature_set

_BOX = ("min_row", "min_col", "max_row", "max_col")
ROWS_AT_ONCE = 10_000
_VALUES_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class CellSource:
    """Whose cells: found by one recipe, measured by another, on a split or on plates.

    ``measure_id``: ``None``: also cells that are not measured, for what reads no measurement.
    ``subset``: one subset of the split. Without ``split_id`` and ``plates``: all images.
    ``features``: where the measurements are; a cell that is not among them is excluded.
    Excluded cells are not read. ``unflagged_by``: a quality-control run, whose flagged
    images and cells are not read either. ``annotated``: what annotations exclude is read all the
    same, as for predictions: these stay right when an exclusion is undone, and votes leave it out.
    ``chosen``: of all these only cells whose bit is set, see :func:`~.feature_files.are_chosen`.
    """

    segment_id: int
    measure_id: int | None
    split_id: int | None = None
    subset: Subset | None = None
    plates: tuple[str, ...] = ()
    features: ReadableSet = BUILT_IN
    unflagged_by: int | None = None
    annotated: bool = False
    chosen: bytes | None = field(default=None, repr=False)

    def reader(self) -> SetReader:
        """Return what reads the measurements; the files that it opens stay open with it."""
        return SetReader(self.features.files, self.measure_id, self.chosen)


@dataclass(frozen=True)
class ImageBlock:
    """An image that has cells, its subset and label in the split, and how many cells it has."""

    image_id: int
    content_sha256: str | None
    subset: Subset
    label_id: int
    n_cells: int


@dataclass(frozen=True)
class CellRows:
    """The N cells of one image.

    ``cell_ids`` and ``labels`` (N,) int64, ``boxes`` (N, 4) int64 as in table ``cells``, or none
    where a box is unknown, ``features`` (N, F) float64 in the order they were asked for,
    ``label_id``: their class.
    """

    cell_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int64] | None
    features: NDArray[np.float64]
    label_id: int | None


def cells_query(source: CellSource) -> Select[Any]:
    """Return the query of all cells of ``source`` with boxes, subset and label.

    Measurements are read by cell id; see :meth:`CellSource.reader`.
    """
    current = and_(IS_CURRENT, Segmentation.recipe_id == source.segment_id)
    query = (
        select(Image.id.label("image_id"), Cell.id.label("cell_id"), Cell.object_number)
        .add_columns(*(getattr(Cell, name) for name in _BOX))
        .select_from(Image)
        .join(Segmentation, current)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
    )
    if source.annotated:
        query = query.where(Cell.excluded.is_(None))
    else:
        query = query.where(image_counts(source.unflagged_by), cell_counts(source.unflagged_by))
    if source.plates:
        query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        query = query.where(Plate.barcode.in_(source.plates))
    if source.split_id is not None:
        member = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
        query = query.add_columns(SplitMember.subset, SplitMember.label_id)
        query = query.join(SplitMember, member)
        if source.subset is not None:
            query = query.where(SplitMember.subset == source.subset)
    return query


def as_text(query: Select[Any]) -> str:
    """Return ``query`` as SQL that runs as it stands on both databases, to be kept with a run."""
    compiled = query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    return str(compiled)


def count_cells(session: Session, query: Select[Any], source: CellSource) -> dict[int, int]:
    """Return how many cells of ``query``, one of ``cells_query(source)``, each image has, by id."""
    if source.features.files is None and source.chosen is None:
        # The database knows all of it: it counts four times as fast.
        each = source.reader().restrict(query).with_only_columns(Image.id, func.count())
        return dict(session.execute(each.group_by(Image.id)).all())
    counts: Counter[int] = Counter()
    for images, _ in stream_groups(session, query, source, Image.id):
        found, numbers = np.unique(images, return_counts=True)
        counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
    return counts


def list_blocks(session: Session, source: CellSource) -> list[ImageBlock]:
    """Return the images of a split that have cells to read, by image id; a row per image."""
    counts = count_cells(session, cells_query(source), source)
    current = and_(IS_CURRENT, Segmentation.recipe_id == source.segment_id)
    query = (
        select(Image.id, Segmentation.content_sha256, SplitMember.subset, SplitMember.label_id)
        .join(Segmentation, current)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == source.split_id)
        .order_by(Image.id)
    )
    return [ImageBlock(*row, counts[row.id]) for row in session.execute(query) if row.id in counts]


def digests_of_chosen(session: Session, source: CellSource) -> dict[int, str]:
    """Return a digest of the numbers of the chosen cells of each image, by image id.

    The numbers are those in the masks: they are the same in every store.
    """
    assert source.chosen is not None
    query = cells_query(source).with_only_columns(Image.id, Cell.id, Cell.object_number)
    rows = session.execute(
        query.order_by(Image.id, Cell.object_number).execution_options(yield_per=ROWS_AT_ONCE)
    )
    found: dict[int, Any] = {}
    for block in rows.partitions():
        images, ids, numbers = np.fromiter(chain.from_iterable(block), np.int64).reshape(-1, 3).T
        there = are_chosen(source.chosen, ids)
        images, numbers = images[there], numbers[there]
        for image_id in np.unique(images).tolist():
            of_image = numbers[images == image_id]
            found.setdefault(image_id, hashlib.sha256()).update(of_image.tobytes())
    return {image_id: digest.hexdigest() for image_id, digest in found.items()}


def name_images(session: Session, source: CellSource) -> dict[int, dict[str, Any]]:
    """Return by image id what names it in tables; with its subset and label, of a split."""
    columns = (Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
    query = select(Image.id, *columns, SplitMember.subset, Label.value)
    query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    of_split = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
    query = query.join(SplitMember, of_split, isouter=source.split_id is None)
    query = query.outerjoin(Label, Label.id == SplitMember.label_id)
    if source.subset is not None:
        query = query.where(SplitMember.subset == source.subset)
    names = ("plate", "well", "site", "plane", "time_point", "subset", "label")
    return {key: dict(zip(names, row, strict=True)) for key, *row in session.execute(query)}


def read_cells(
    session: Session,
    source: CellSource,
    image_id: int,
    columns: Sequence[str] = FEATURE_NAMES,
    reader: SetReader | None = None,
) -> CellRows:
    """Return the cells of one image, by cell id: ``cells_query`` restricted to it.

    ``reader`` (of ``source``) keeps the files of a feature set open from call to call.
    """
    query = cells_query(source).where(Image.id == image_id).order_by(Cell.id)
    rows = session.execute(query).mappings().all()
    ids = np.array([row["cell_id"] for row in rows], dtype=np.int64)
    there, values = (reader or source.reader())(session, ids, columns)
    rows, ids, values = list(compress(rows, there)), ids[there], values[there]
    boxes = [[row[name] for name in _BOX] for row in rows]
    known = not any(None in box for box in boxes)
    return CellRows(
        ids,
        np.array([row["object_number"] for row in rows], dtype=np.int64),
        np.array(boxes, dtype=np.int64).reshape(len(rows), len(_BOX)) if known else None,
        values,
        rows[0].get("label_id") if rows else None,
    )


def stream_features(
    session: Session, source: CellSource, columns: Sequence[str] = FEATURE_NAMES
) -> Iterator[NDArray[np.float64]]:
    """Yield the measurements of all cells in blocks (N, F) of at most 10,000 rows."""
    at_once = max(1, min(ROWS_AT_ONCE, _VALUES_AT_ONCE // max(1, len(columns))))
    query, reader = cells_query(source).with_only_columns(Cell.id), source.reader()
    query = query.order_by(Cell.id)
    for ids in session.scalars(query.execution_options(yield_per=at_once)).partitions():
        there, values = reader(session, np.array(ids, dtype=np.int64), columns)
        yield values[there]


def plate_of(session: Session, image_id: int) -> str:
    """Return the barcode of the plate that an image is of."""
    query = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
    return session.scalars(
        query.join(Image, Image.well_id == Well.id).where(Image.id == image_id)
    ).one()


def current_segmentation(session: Session, segment_id: int, image_id: int) -> Segmentation:
    """Return the segmentation of an image as it is now."""
    query = select(Segmentation).join(Image, IS_CURRENT)
    found = session.scalars(
        query.where(Image.id == image_id, Segmentation.recipe_id == segment_id)
    ).one_or_none()
    if found is None:
        raise ImageError("This image has changed since it was segmented. Run: cellstore segment")
    return found


def mask_file(session: Session, found: Segmentation) -> tuple[str, str]:
    """Return path and sha256 of the masks of a segmentation.

    Raises:
        ImageError: they are unknown.

    """
    if found.mask_artifact_id is None:
        raise ImageError(
            "Another tool found these cells and their masks are unknown. "
            "If you have them, run: cellstore ingest masks DIR"
        )
    file = session.get_one(Artifact, found.mask_artifact_id)
    return file.path, file.sha256


def read_masks(session: Session, artifacts: ArtifactFolder, found: Segmentation) -> NDArray[Any]:
    """Return the masks (H, W) of a segmentation.

    Raises:
        ImageError: they are unknown.
        StorageError: the file is gone or changed.

    """
    return decode_tiff(artifacts.read(*mask_file(session, found)))


def flow_file(session: Session, found: Segmentation) -> tuple[str, str]:
    """Return path and sha256 of the flows of a segmentation; raises as :func:`mask_file` does."""
    if found.flow_artifact_id is None:
        raise ImageError(
            "Another tool found these cells, and there are no flows of them. "
            "Use the branches mask and tabular only."
        )
    file = session.get_one(Artifact, found.flow_artifact_id)
    return file.path, file.sha256


def plane_of(segment: Recipe) -> ImageInput:
    """Return the plane that a segment recipe looked at; of other tools': the default plane."""
    named = segment.parameters
    if "projection" not in named:
        return ImageInput()
    return ImageInput(tuple(named["channels"] or ()), Projection(named["projection"]))


def choose_recipes(
    session: Session, segmentation: str | None, measurement: str | None, features: str | None = None
) -> tuple[Recipe, Recipe]:
    """Return the segment and the measure recipe to read cells by; default: those used last.

    ``features``: those that made this feature set; recipes that are named too must be the same.
    """
    if features is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation).id if segmentation else None
        measure = session.get_one(Recipe, find_feature_set(session, features, asked).recipe_id)
        found, cure = f"Feature set {features!r}", "Name the feature set alone."
    elif measurement is not None:
        measure = find_recipe(session, Stage.MEASURE, measurement)
        found = f"Measure recipe {measure.id}"
        cure = f"Name one of the two, or run: cellstore measure --segmentation {segmentation}"
    else:
        return _measured_last(session, segmentation)
    segment = input_of(measure, Stage.SEGMENT)
    for reference, recipe in ((segmentation, segment), (measurement, measure)):
        if reference and find_recipe(session, recipe.stage, reference).id != recipe.id:
            raise UserInputError(
                f"{found} belongs to {recipe.stage.value} recipe {recipe.id}, not to {reference}. "
                f"{cure}"
            )
    return segment, measure


def _measured_last(session: Session, segmentation: str | None) -> tuple[Recipe, Recipe]:
    """The recipe of some cells, and the built-in measurements of them that were made last."""
    segment = (
        find_recipe(session, Stage.SEGMENT, segmentation)
        if segmentation
        else last_with_masks(session)
    )
    # Sets in files are asked for by name.
    in_files = select(FeatureSet).where(FeatureSet.storage == FeatureStorage.FILES)
    of_segment = (
        select(Recipe)
        .join(RecipeInput, RecipeInput.recipe_id == Recipe.id)
        .where(RecipeInput.input_id == segment.id, Recipe.stage == Stage.MEASURE)
    )
    built_in = (
        of_segment.join(Run, Run.recipe_id == Recipe.id)
        .where(Recipe.id.not_in(in_files.with_only_columns(FeatureSet.recipe_id)))
        .where(has_results())
        .order_by(Run.id.desc())
    )
    if (last := session.scalars(built_in.limit(1)).first()) is not None:
        return segment, last
    mine = in_files.where(FeatureSet.recipe_id.in_(of_segment.with_only_columns(Recipe.id)))
    names = ", ".join(found.name for found in session.scalars(mine.order_by(FeatureSet.id)))
    other = f", or name one of its feature sets with --features: {names}" if names else ""
    raise UserInputError(
        f"The cells of segment recipe {segment.id} are not measured yet. Run: cellstore measure"
        f"{other}"
    )


def last_with_masks(session: Session) -> Recipe:
    """Return the segment recipe used last whose masks are known, also if another tool made them.

    One that found no cells is behind all others.
    """
    for known in (Segmentation.mask_artifact_id.is_not(None), true()):
        mine = (Segmentation.recipe_id == Recipe.id, known)
        newest = select(func.max(Segmentation.run_id)).where(*mine)
        last = newest.correlate(Recipe).scalar_subquery()
        found_cells = exists().where(*mine, Segmentation.n_cells > 0).correlate(Recipe)
        query = select(Recipe).where(Recipe.stage == Stage.SEGMENT, last.is_not(None))
        query = query.order_by(found_cells.desc(), last.desc(), Recipe.id.desc())
        if (found := session.scalars(query.limit(1)).first()) is not None:
            return found
    raise UnknownNameError("No image was segmented yet. Run: cellstore segment")


def input_of(recipe: Recipe, stage: Stage) -> Recipe:
    """Return the recipe of ``stage`` whose results ``recipe`` reads."""
    return next(item for item in recipe.inputs if item.stage is stage)


def trainings_of_features(session: Session, recipe: Recipe) -> Iterator[Run]:
    """Yield the trainings whose networks made the features that a recipe makes or reads.

    First the one that made these features, then the one that made what its network has read.
    """
    while True:
        read = [recipe, *recipe.inputs]
        measure = next((item for item in read if item.stage is Stage.MEASURE), None)
        if measure is None or "embedding" not in measure.parameters:
            return
        query = (
            select(Run)
            .join(RunArtifact, RunArtifact.run_id == Run.id)
            .join(Artifact, Artifact.id == RunArtifact.artifact_id)
            .where(Artifact.kind == ArtifactKind.CHECKPOINT, Run.stage == Stage.TRAIN)
            .where(Artifact.sha256 == measure.weights_sha256)
            .order_by(Run.id)
        )
        training = session.scalars(query.limit(1)).first()
        if training is None:
            return
        yield training
        recipe = session.get_one(Recipe, training.recipe_id)


def feature_leak(session: Session, recipe: Recipe, split_id: int) -> str | None:
    """Say whether the features of a recipe were learned on wells that a split does not train on.

    An embedding knows the labels of the wells that its network was trained on, or stopped by; so
    does one by a network that has learned from another's embedding.
    """
    behind = trainings_of_features(session, recipe)
    trainings = [run for run in behind if run.split_id not in (None, split_id)]
    if not trainings:
        return None
    mine, theirs = aliased(SplitMember), aliased(SplitMember)
    image, other = aliased(Image), aliased(Image)
    learned_wells = (
        select(other.well_id)
        .join(theirs, theirs.image_id == other.id)
        .where(theirs.split_id.in_([run.split_id for run in trainings]))
        .where(theirs.subset != Subset.TEST)
    )
    query = (
        select(func.count(distinct(image.well_id)))
        .join(mine, mine.image_id == image.id)
        .where(mine.split_id == split_id, mine.subset != Subset.TRAIN)
        .where(image.well_id.in_(learned_wells))
    )
    number = session.scalar(query) or 0
    if number == 0:
        return None
    runs = " and ".join(str(run.id) for run in trainings)
    return (
        f"A leak: the features are an embedding by training run {runs}, which learned the labels "
        f"of {number:,} wells that this split does not train on. Scores are too good; use the "
        "split of that training."
    )


Ids = NDArray[np.int64]


def stream_groups(
    session: Session, query: Select[Any], source: CellSource, group: Any
) -> Iterator[tuple[Ids, Ids]]:
    """Yield, in blocks, the ``group`` and the id of all cells of ``query``, by id: (N,) each.

    ``query`` is one of ``cells_query(source)``, with conditions of its own. A cell that the
    feature set of ``source`` lacks is excluded.
    """
    reader = source.reader()
    chosen = reader.restrict(query).with_only_columns(group, Cell.id).order_by(Cell.id)
    rows = session.execute(chosen.execution_options(yield_per=ROWS_AT_ONCE))
    for block in rows.partitions():
        groups, ids = np.fromiter(chain.from_iterable(block), np.int64).reshape(-1, 2).T
        there = reader.has(session, ids)
        yield groups[there], ids[there]


def read_drawn(
    session: Session, source: CellSource, cell_ids: Ids, columns: tuple[str, ...]
) -> tuple[NDArray[np.float64], Ids, NDArray[np.str_]]:
    """Return the measurements (N, F), the ids of wells (N,) and the barcodes of plates (N,).

    ``cell_ids`` (N,) ascend.
    """
    positions = (
        select(Well.id, Plate.barcode)
        .select_from(Cell)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .order_by(Cell.id)
    )
    values = source.reader()(session, cell_ids, columns)[1]
    wells: list[int] = []
    plates: list[str] = []
    for ids in in_lists(cell_ids.tolist()):
        for well, plate in session.execute(positions.where(Cell.id.in_(ids))):
            wells.append(well)
            plates.append(plate)
    return values, np.array(wells, dtype=np.int64), np.array(plates, dtype=np.str_)
