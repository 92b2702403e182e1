"""Measure: the features of every cell of every segmented image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, exists, insert, select
from sqlalchemy.orm import Session

from ..config import ImageInput, MeasureParams, as_parameters
from ..db.models import Cell, CellFeatures, FeatureSet, Recipe, Segmentation
from ..db.statements import insert_new
from ..errors import ImageError, UserInputError
from ..extras import need
from ..reading.cells import current_segmentation, last_with_masks, plane_of, read_masks
from ..reading.planes import check_channels, read_image
from ..runs import (
    JobsResult,
    RecipeSpec,
    Task,
    Workspace,
    find_recipe,
    images_of,
    register,
    running,
    segmented,
    selection_counts,
    todo_count,
    work_through,
)
from ..terms import FeatureStorage, Stage

VERSION = 1

Columns = Mapping[str, Any]


def measure(
    workspace: Workspace,
    params: MeasureParams | None = None,
    *,
    segmentation: str | None = None,
    plates: tuple[str, ...] = (),
    limit: int | None = None,
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
    with workspace.database.begin() as session:
        source = _source(session, segmentation)
        plane = params.image or plane_of(source)
        check_channels(session, plane)
        recipe = register(session, _spec(plane, source))
        _register_features(session, recipe)
        images = segmented(images_of(session, plates, limit), source.id)
        selected, waiting = selection_counts(session, images)
        todo = todo_count(session, recipe.id, images)
    if todo == 0:
        return JobsResult(None, recipe.id, selected, waiting, 0, (), 0)
    return _run(workspace, plane, recipe, source.id, images, (selected, waiting))


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


def _run(
    workspace: Workspace,
    plane: ImageInput,
    recipe: Recipe,
    source_id: int,
    images: Select[int],
    counts: tuple[int, int],
) -> JobsResult:
    measured = 0
    with running(workspace.database, recipe) as run:

        def compute(task: Task) -> list[dict[str, Any]]:
            return _compute(workspace, plane, source_id, task)

        def write(session: Session, _task: Task, rows: list[dict[str, Any]]) -> None:
            nonlocal measured
            keys = {"recipe_id": recipe.id, "run_id": run.id}
            if rows:
                session.execute(insert(CellFeatures), [{**row, **keys} for row in rows])
            measured += len(rows)

        outcome = work_through(
            workspace.database,
            workspace.progress,
            "measure",
            run.id,
            recipe.id,
            images,
            compute,
            write,
        )
        run.result = {"images": outcome.done, "failed": outcome.failed, "cells": measured}
    return JobsResult(run.id, recipe.id, *counts, outcome.done, tuple(outcome.failures), measured)


def _compute(
    workspace: Workspace, plane: ImageInput, source_id: int, task: Task
) -> list[dict[str, Any]]:
    from ..ops.features import measure_cells

    with workspace.database.read() as session:
        found = current_segmentation(session, source_id, task.image_id)
        masks = read_masks(session, workspace.artifacts, found)
        pairs = select(Cell.label, Cell.id).where(Cell.segmentation_id == found.id)
        cells = {row.label: row.id for row in session.execute(pairs)}
    columns = measure_cells(masks, read_image(workspace.database, task.image_id, plane))
    return _rows(columns, cells, task)


def _rows(columns: Columns, cells: Mapping[int, int], task: Task) -> list[dict[str, Any]]:
    labels = columns["label"].tolist()
    if sorted(labels) != sorted(cells):
        raise ImageError(
            f"The masks of {task.name} and its cells in the database differ. "
            "See what is wrong with: cellstore verify"
        )
    names = [name for name in columns if name != "label"]
    values = zip(*(columns[name].tolist() for name in names), strict=True)
    return [
        {"cell_id": cells[label], **dict(zip(names, row, strict=True))}
        for label, row in zip(labels, values, strict=True)
    ]
