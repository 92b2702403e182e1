"""Measure: the features of every cell of every segmented image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import exists, insert, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..config import (
    EVERYTHING,
    THIS_PROCESS,
    ImageInput,
    MeasureParams,
    Resources,
    Selection,
    as_parameters,
)
from ..db.bulk import in_lists
from ..db.models import Artifact, Cell, CellFeatures, FeatureSet, Image, Recipe, Segmentation
from ..db.statements import insert_new
from ..errors import CellstoreError, ImageError, UserInputError
from ..extras import need
from ..formats.files.images import decode_tiff
from ..reading.cells import last_with_masks, plane_of
from ..reading.planes import PlaneOrder, check_channels, open_plane, plane_orders
from ..runs import (
    JobsResult,
    RecipeSpec,
    Tally,
    Task,
    Work,
    Workspace,
    execute,
    find_recipe,
    images_of,
    segmented,
)
from ..runs.selection import is_current
from ..terms import FeatureStorage, Stage

VERSION = 2

Columns = Mapping[str, Any]


def measure(
    workspace: Workspace,
    params: MeasureParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    segmentation: str | None = None,
    resources: Resources = THIS_PROCESS,
    dry_run: bool = False,
) -> JobsResult:
    """Measure the cells found by one segment recipe (default: the one used last).

    Masks that another tool made are measured as our own. Intensities are those of the segmented
    plane unless ``params`` names another.

    Raises:
        MissingExtraError: scikit-image is not installed.
        UnknownNameError: nothing has been segmented, or no such recipe, plate or channel.
        UserInputError: the masks of that recipe's cells are unknown.
    """
    need("segment")
    params = params or MeasureParams()
    with workspace.database.read() as session:
        source = _source(session, segmentation)
        plane = params.image or plane_of(source)
        check_channels(session, plane)
        images = segmented(images_of(session, selection), source.id)

    def work_of(tally: Tally) -> Work[MeasureOrder, Measured]:
        return measure_work(plane, source.id, MeasureSteps(workspace.artifacts), tally)

    return execute(
        workspace,
        _spec(plane, source),
        images,
        work_of,
        resources=resources,
        dry_run=dry_run,
        on_register=_register_features,
    )


def _source(session: Session, segmentation: str | None) -> Recipe:
    if segmentation is None:
        return last_with_masks(session)
    found = find_recipe(session, Stage.SEGMENT, segmentation)
    cells = exists().where(Segmentation.recipe_id == found.id)
    masks = cells.where(Segmentation.mask_artifact_id.is_not(None))
    if session.scalar(select(cells)) and not session.scalar(select(masks)):
        raise UserInputError(
            f"Another tool found the cells of segment recipe {found.id} and their masks are "
            "unknown, so they cannot be measured. If you have the masks, run: cellstore ingest "
            "masks DIR"
        )
    return found


def _spec(plane: ImageInput, source: Recipe) -> RecipeSpec:
    from ..ops.features import FEATURE_NAMES

    parameters = {"image": as_parameters(plane), "features": list(FEATURE_NAMES)}
    return RecipeSpec(Stage.MEASURE, VERSION, parameters, None, (source,))


def _register_features(session: Session, recipe: Recipe) -> None:
    from ..ops.features import FEATURES

    name = f"basic_{recipe.fingerprint[:8]}"
    columns = [feature.to_json() for feature in FEATURES]
    row = {"name": name, "recipe_id": recipe.id, "columns": columns}
    insert_new(session, FeatureSet, [{**row, "storage": FeatureStorage.TABLE}])


@dataclass(frozen=True)
class MeasureOrder:
    """What a worker needs: the name of the image, its masks, its plane, its cells by label."""

    name: str
    mask: tuple[str, str]
    plane: PlaneOrder
    cells: Mapping[int, int]


@dataclass(frozen=True)
class Measured:
    """The measurements of an image's cells: ``columns`` (N,) each, in the order of ``cell_ids``."""

    cell_ids: NDArray[np.int64]
    columns: Columns


@dataclass(frozen=True)
class MeasureSteps:
    """Makes a :class:`MeasureStep` in a worker."""

    artifacts: ArtifactFolder

    def __call__(self) -> MeasureStep:
        """Return it."""
        return MeasureStep(self.artifacts)


Pixels = tuple[MeasureOrder, NDArray[Any], NDArray[np.float32]]


@dataclass(frozen=True)
class MeasureStep:
    """Opens masks and plane of an image and measures its cells; writes no file."""

    artifacts: ArtifactFolder

    def read(self, order: MeasureOrder) -> Pixels:
        """Return the masks and the plane, (H, W) both."""
        return order, decode_tiff(self.artifacts.read(*order.mask)), open_plane(order.plane)

    def compute(self, loaded: Sequence[Pixels]) -> list[Measured]:
        """Return the measurements of each image."""
        return [_measured(*pixels) for pixels in loaded]

    def keep(self, made: Measured) -> Measured:
        """Keep no file: the rows are all there is."""
        return made


def _measured(order: MeasureOrder, masks: NDArray[Any], plane: NDArray[np.float32]) -> Measured:
    from ..ops.features import measure_cells

    columns = dict(measure_cells(masks, plane))
    labels = columns.pop("label").tolist()
    if sorted(labels) != sorted(order.cells):
        raise ImageError(
            f"The masks of {order.name} and its cells in the database differ. "
            "See what is wrong with: cellstore verify"
        )
    return Measured(np.array([order.cells[label] for label in labels], np.int64), columns)


def measure_work(
    plane: ImageInput, source_id: int, step: MeasureSteps, tally: Tally
) -> Work[MeasureOrder, Measured]:
    """Return what is done with each image."""

    def fetch(
        session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, MeasureOrder | CellstoreError]:
        return _orders(session, tasks, plane, source_id)

    def insert_rows(session: Session, pairs: Sequence[tuple[Task, Measured]]) -> None:
        for _, measured in pairs:
            _insert(session, tally, measured)
            tally.cells += len(measured.cell_ids)

    return Work("measure", step, fetch, insert_rows)


def _orders(
    session: Session, tasks: Sequence[Task], plane: ImageInput, source_id: int
) -> dict[int, MeasureOrder | CellstoreError]:
    ids = [task.image_id for task in tasks]
    planes = plane_orders(session, ids, plane)
    masks = _masks(session, source_id, ids)
    cells = _cells(session, [number for number, _ in masks.values()])
    orders: dict[int, MeasureOrder | CellstoreError] = {}
    for task in tasks:
        found, opened = masks.get(task.image_id), planes[task.image_id]
        if isinstance(opened, CellstoreError):
            orders[task.job_id] = opened
        elif found is None:
            orders[task.job_id] = _unknown(session, source_id, task.image_id)
        else:
            number, mask = found
            orders[task.job_id] = MeasureOrder(task.name, mask, opened, cells.get(number, {}))
    return orders


def _masks(
    session: Session, source_id: int, image_ids: Sequence[int]
) -> dict[int, tuple[int, tuple[str, str]]]:
    """By image: its segmentation, and the path and the sha256 of the masks."""
    query = (
        select(Image.id, Segmentation.id, Artifact.path, Artifact.sha256)
        .join(Segmentation, is_current())
        .join(Artifact, Artifact.id == Segmentation.mask_artifact_id)
        .where(Segmentation.recipe_id == source_id)
    )
    found = {}
    for some in in_lists(image_ids):
        for image, number, path, sha256 in session.execute(query.where(Image.id.in_(some))):
            found[image] = (number, (path, sha256))
    return found


def _cells(session: Session, segmentations: Sequence[int]) -> dict[int, dict[int, int]]:
    """By segmentation: the cell of each label."""
    found: dict[int, dict[int, int]] = {}
    query = select(Cell.segmentation_id, Cell.label, Cell.id)
    for some in in_lists(segmentations):
        for number, label, cell in session.execute(query.where(Cell.segmentation_id.in_(some))):
            found.setdefault(number, {})[label] = cell
    return found


def _unknown(session: Session, source_id: int, image_id: int) -> CellstoreError:
    """Why an image has no masks to measure."""
    from ..reading.cells import current_segmentation

    try:
        current_segmentation(session, source_id, image_id)
    except ImageError as error:
        return error
    return ImageError(
        "Another tool found these cells and their masks are unknown. "
        "If you have them, run: cellstore ingest masks DIR"
    )


def _insert(session: Session, tally: Tally, measured: Measured) -> None:
    if not len(measured.cell_ids):
        return
    names = ("cell_id", *measured.columns, "recipe_id", "run_id")
    values = (column.tolist() for column in (measured.cell_ids, *measured.columns.values()))
    keys = (tally.recipe_id, tally.run_id)
    rows = [dict(zip(names, (*row, *keys), strict=True)) for row in zip(*values, strict=True)]
    session.execute(insert(CellFeatures), rows)
