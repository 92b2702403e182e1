"""Segment: find the cells of every image that this recipe has not done yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder, StoredFile
from ..config import EVERYTHING, THIS_PROCESS, Resources, SegmentParams, Selection, as_parameters
from ..db.models import Segmentation
from ..errors import CellstoreError
from ..extras import need
from ..formats.files.images import encode_tiff
from ..reading.found_cells import cell_rows, insert_cells
from ..reading.planes import PlaneOrder, check_channels, open_plane, plane_orders
from ..runs import (
    JobsResult,
    RecipeSpec,
    Tally,
    Task,
    Work,
    Workspace,
    execute,
    images_of,
    keep_file,
)
from ..terms import ArtifactKind, Stage

if TYPE_CHECKING:
    from ..ops.segmentation import ModelFiles, SegmentationResult, Segmenter

VERSION = 1
GPU_BATCH = 8
"""Images that a GPU is given at once; halved when its memory does not hold them."""


def segment(
    workspace: Workspace,
    params: SegmentParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    weights_dir: Path | None = None,
    device: str = "auto",
    resources: Resources = THIS_PROCESS,
    dry_run: bool = False,
) -> JobsResult:
    """Segment the images of a selection that have their files; see SegmentParams.

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
    with workspace.database.read() as session:
        check_channels(session, params.image)
        images = images_of(session, selection)
    make = SegmentSteps(files, params, device, workspace.artifacts)

    def work_of(tally: Tally) -> Work[PlaneOrder, Found]:
        return segment_work(params, make, tally)

    spec = _spec(params, files)
    return execute(workspace, spec, images, work_of, resources=resources, dry_run=dry_run)


def _spec(params: SegmentParams, files: ModelFiles) -> RecipeSpec:
    # The network counts by its bytes; where it lay on this machine does not.
    named = as_parameters(params) | {"model": Path(files.name).name}
    return RecipeSpec(Stage.SEGMENT, VERSION, named, files.sha256)


@dataclass(frozen=True)
class Found:
    """What is left to write of an image once its files are on disk."""

    mask: StoredFile
    flow: StoredFile
    diameter: float
    cells: list[dict[str, Any]]


@dataclass(frozen=True)
class SegmentSteps:
    """Loads the network in a worker."""

    files: ModelFiles
    params: SegmentParams
    device: str
    artifacts: ArtifactFolder

    def __call__(self) -> SegmentStep:
        """Return what segments with it."""
        from ..ops.segmentation import load_segmenter

        segmenter = load_segmenter(
            self.files,
            flow_threshold=self.params.flow_threshold,
            cellprob_threshold=self.params.cellprob_threshold,
            diameter=self.params.diameter,
            device=self.device,
        )
        return SegmentStep(segmenter, self.artifacts)


@dataclass(frozen=True)
class SegmentStep:
    """Opens the plane of an image, finds its cells, writes masks and flows."""

    segmenter: Segmenter
    artifacts: ArtifactFolder

    def read(self, order: PlaneOrder) -> NDArray[np.float32]:
        """Return the plane (H, W)."""
        return open_plane(order)

    def compute(self, loaded: Sequence[NDArray[np.float32]]) -> list[SegmentationResult]:
        """Return the cells of each plane."""
        return [self.segmenter.segment(plane) for plane in loaded]

    def keep(self, made: SegmentationResult) -> Found:
        """Write masks and flows."""
        return Found(
            self.artifacts.write(ArtifactKind.MASK, encode_tiff(made.masks), ".tif"),
            self.artifacts.write(ArtifactKind.FLOW, encode_tiff(made.flows), ".tif"),
            made.diameter,
            cell_rows(made.masks),
        )


def segment_work(
    params: SegmentParams, step: SegmentSteps, tally: Tally
) -> Work[PlaneOrder, Found]:
    """Return what is done with each image."""

    def fetch(session: Session, tasks: Sequence[Task]) -> Mapping[int, PlaneOrder | CellstoreError]:
        orders = plane_orders(session, [task.image_id for task in tasks], params.image)
        return {task.job_id: orders[task.image_id] for task in tasks}

    def insert(session: Session, pairs: Sequence[tuple[Task, Found]]) -> None:
        for task, found in pairs:
            _insert(session, task, tally, found)
            tally.cells += len(found.cells)

    return Work("segment", step, fetch, insert, batch=_batch(step.device))


def _batch(device: str) -> int:
    gpu = device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())
    return GPU_BATCH if gpu else 1


def _insert(session: Session, task: Task, tally: Tally, found: Found) -> None:
    row = Segmentation(
        image_id=task.image_id,
        recipe_id=tally.recipe_id,
        content_sha256=task.content_sha256,
        run_id=tally.run_id,
        n_cells=len(found.cells),
        diameter=found.diameter,
        mask_artifact_id=keep_file(session, found.mask),
        flow_artifact_id=keep_file(session, found.flow),
        created_at=datetime.now(UTC),
    )
    insert_cells(session, row, found.cells)
