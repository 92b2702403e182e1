"""Segment: find the cells of every image that this recipe has not done yet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder, StoredFile
from ..config import SegmentParams, as_parameters
from ..db.models import Recipe, Segmentation
from ..extras import need
from ..formats.files.images import encode_tiff
from ..reading.found_cells import cell_rows, insert_cells
from ..reading.planes import check_channels, read_image
from ..runs import (
    JobsResult,
    RecipeSpec,
    Task,
    Workspace,
    images_of,
    keep_file,
    register,
    running,
    selection_counts,
    todo_count,
    work_through,
)
from ..terms import ArtifactKind, Stage

if TYPE_CHECKING:
    from ..ops.segmentation import ModelFiles, SegmentationResult, Segmenter

VERSION = 1


def segment(
    workspace: Workspace,
    params: SegmentParams | None = None,
    *,
    plates: tuple[str, ...] = (),
    limit: int | None = None,
    weights_dir: Path | None = None,
    device: str = "auto",
) -> JobsResult:
    """Segment the images of ``plates`` (none: all) that have their files; see SegmentParams.

    Masks and flows become files, every cell a row; a cell whose outline has no length is kept
    and marked as excluded. Images done before by the same recipe are left alone.

    Raises:
        MissingExtraError: Cellpose is not installed.
        UserInputError: no such model, plate or channel, or parameters out of range.
    """
    need("segment")
    from ..ops.segmentation import find_model

    params = params or SegmentParams()
    files = find_model(params.model, weights_dir)
    with workspace.database.begin() as session:
        check_channels(session, params.image)
        images = images_of(session, plates, limit)
        recipe = register(session, _spec(params, files))
        selected, waiting = selection_counts(session, images)
        todo = todo_count(session, recipe.id, images)
    if todo == 0:
        return JobsResult(None, recipe.id, selected, waiting, 0, (), 0)
    segmenter = _loaded(params, files, device)
    return _run(workspace, params, recipe, segmenter, images, (selected, waiting))


def _spec(params: SegmentParams, files: ModelFiles) -> RecipeSpec:
    # The network counts by its bytes; where it lay on this machine does not.
    named = as_parameters(params) | {"model": Path(files.name).name}
    return RecipeSpec(Stage.SEGMENT, VERSION, named, files.sha256)


def _loaded(params: SegmentParams, files: ModelFiles, device: str) -> Segmenter:
    from ..ops.segmentation import load_segmenter

    return load_segmenter(
        files,
        flow_threshold=params.flow_threshold,
        cellprob_threshold=params.cellprob_threshold,
        diameter=params.diameter,
        device=device,
    )


def _run(
    workspace: Workspace,
    params: SegmentParams,
    recipe: Recipe,
    segmenter: Segmenter,
    images: Any,
    counts: tuple[int, int],
) -> JobsResult:
    found = 0
    with running(workspace.database, recipe) as run:

        def compute(task: Task) -> _Found:
            plane = read_image(workspace.database, task.image_id, params.image)
            return _keep(workspace.artifacts, segmenter.segment(plane))

        def write(session: Session, task: Task, result: _Found) -> None:
            nonlocal found
            _insert(session, task, run.id, recipe.id, result)
            found += len(result.cells)

        outcome = work_through(
            workspace.database,
            workspace.progress,
            "segment",
            run.id,
            recipe.id,
            images,
            compute,
            write,
        )
        run.result = {"images": outcome.done, "failed": outcome.failed, "cells": found}
    return JobsResult(run.id, recipe.id, *counts, outcome.done, tuple(outcome.failures), found)


@dataclass(frozen=True)
class _Found:
    """What is left to write once the files are on disk."""

    mask: StoredFile
    flow: StoredFile
    diameter: float
    cells: list[dict[str, Any]]


def _keep(artifacts: ArtifactFolder, result: SegmentationResult) -> _Found:
    return _Found(
        artifacts.write(ArtifactKind.MASK, encode_tiff(result.masks), ".tif"),
        artifacts.write(ArtifactKind.FLOW, encode_tiff(result.flows), ".tif"),
        result.diameter,
        cell_rows(result.masks),
    )


def _insert(session: Session, task: Task, run_id: int, recipe_id: int, found: _Found) -> None:
    row = Segmentation(
        image_id=task.image_id,
        recipe_id=recipe_id,
        content_sha256=task.content_sha256,
        run_id=run_id,
        n_cells=len(found.cells),
        diameter=found.diameter,
        mask_artifact_id=keep_file(session, found.mask),
        flow_artifact_id=keep_file(session, found.flow),
        created_at=datetime.now(UTC),
    )
    insert_cells(session, row, found.cells)
