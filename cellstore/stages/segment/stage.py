"""Segment: find the cells of every image that this recipe has not done yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select
from sqlalchemy.orm import Session

from ...artifacts import ArtifactFolder, StoredFile
from ...config import EVERYTHING, THIS_PROCESS, Resources, SegmentParams, Selection, as_parameters
from ...db.models import Recipe, Segmentation
from ...errors import CellstoreError, UserInputError
from ...extras import need
from ...formats.files.images import encode_tiff
from ...reading.found_cells import cell_rows, insert_cells
from ...reading.networks import find_network
from ...reading.planes import check_channels
from ...runs import (
    JobsResult,
    RecipeSpec,
    Tally,
    Task,
    Work,
    Workspace,
    execute,
    find_recipe,
    images_of,
    keep_file,
)
from ...terms import ArtifactKind, Stage
from .orders import PlateDiameters, SegmentOrder, open_planes, segment_orders

if TYPE_CHECKING:
    from ...ops.segmentation import ModelFiles, SegmentationResult, Segmenter

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
        UserInputError: no such model, run, plate, recipe or channel, parameters out of range, or
            plates whose diameter the recipe of ``diameter_from`` does not know.
    """
    plan = make_plan(workspace, params or SegmentParams(), selection, weights_dir, device)

    def work_of(tally: Tally) -> Work[SegmentOrder, Found]:
        return segment_work(plan.params, plan.steps, tally, plan.source)

    return execute(
        workspace,
        plan.spec,
        plan.images,
        work_of,
        resources=resources,
        dry_run=dry_run,
        parent_id=plan.made_by,
    )


@dataclass(frozen=True)
class Plan:
    """What is to be done: the recipe, the images, what loads the network in a worker.

    ``source``: the recipe whose diameters are used, if any; ``made_by``: the run of this store
    that made the network, if it is one.
    """

    params: SegmentParams
    spec: RecipeSpec
    images: Select[int]
    steps: SegmentSteps
    source: Recipe | None
    made_by: int | None


def make_plan(
    workspace: Workspace,
    params: SegmentParams,
    selection: Selection,
    weights_dir: Path | None,
    device: str,
) -> Plan:
    """Find the network, the images and the channels, before any work begins.

    Raises:
        as :func:`segment`.
    """
    need("segment")
    network = find_network(workspace, params.model, weights_dir)
    with workspace.database.read() as session:
        check_channels(session, params.image)
        if params.nuclei is not None:
            check_channels(session, params.nuclei)
        source = _source(session, params)
        images = images_of(session, selection)
        if source is not None:
            PlateDiameters(source).check(session, images)
    steps = SegmentSteps(network.files, params, device, workspace.artifacts)
    spec = segment_spec(params, network.files, source)
    return Plan(params, spec, images, steps, source, network.run_id)


def _source(session: Session, params: SegmentParams) -> Recipe | None:
    if params.diameter_from is None:
        return None
    if params.diameter is not None:
        raise UserInputError("Give --diameter or --diameter-from, not both.")
    return find_recipe(session, Stage.SEGMENT, params.diameter_from)


def segment_spec(
    params: SegmentParams, files: ModelFiles, source: Recipe | None = None
) -> RecipeSpec:
    """Return what decides the result: the network, the options, where the diameters are from."""
    # The network counts by its bytes; where it lay on this machine does not.
    named = as_parameters(params) | {"model": Path(files.name).name}
    if source is None:
        return RecipeSpec(Stage.SEGMENT, VERSION, named, files.sha256)
    named |= {"diameter_from": source.fingerprint}
    return RecipeSpec(Stage.SEGMENT, VERSION, named, files.sha256, (source,))


@dataclass(frozen=True)
class Found:
    """What is left to write of an image once its files are on disk."""

    mask: StoredFile
    flow: StoredFile
    diameter: float
    cells: list[dict[str, Any]]


class Loaded(NamedTuple):
    """An image that was opened, and the diameter of its cells if it is settled."""

    image: NDArray[np.float32]
    diameter: float | None


@dataclass(frozen=True)
class SegmentSteps:
    """Loads the network in a worker."""

    files: ModelFiles
    params: SegmentParams
    device: str
    artifacts: ArtifactFolder

    def __call__(self) -> SegmentStep:
        """Return what segments with it."""
        from ...ops.segmentation import load_segmenter

        segmenter = load_segmenter(
            self.files,
            flow_threshold=self.params.flow_threshold,
            cellprob_threshold=self.params.cellprob_threshold,
            diameter=self.params.diameter,
            device=self.device,
            sizes_given=self.params.diameter_from is not None,
        )
        return SegmentStep(segmenter, self.artifacts)


@dataclass(frozen=True)
class SegmentStep:
    """Opens the planes of an image, finds its cells, writes masks and flows."""

    segmenter: Segmenter
    artifacts: ArtifactFolder

    def read(self, order: SegmentOrder) -> Loaded:
        """Return the planes, (H, W) or (2, H, W), and the diameter."""
        return Loaded(open_planes(order), order.diameter)

    def compute(self, loaded: Sequence[Loaded]) -> list[SegmentationResult]:
        """Return the cells of each image."""
        images = [item.image for item in loaded]
        sizes = [item.diameter for item in loaded if item.diameter is not None]
        return self.segmenter.segment_batch(images, sizes or None)

    def keep(self, made: SegmentationResult) -> Found:
        """Write masks and flows."""
        return Found(
            self.artifacts.write(ArtifactKind.MASK, encode_tiff(made.masks), ".tif"),
            self.artifacts.write(ArtifactKind.FLOW, encode_tiff(made.flows), ".tif"),
            made.diameter,
            cell_rows(made.masks),
        )


def segment_work(
    params: SegmentParams, steps: SegmentSteps, tally: Tally, source: Recipe | None = None
) -> Work[SegmentOrder, Found]:
    """Return what is done with each image; ``source``: the recipe whose diameters are used."""
    sizes = None if source is None else PlateDiameters(source, tally.recipe_id)

    def fetch(
        session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, SegmentOrder | CellstoreError]:
        ids = [task.image_id for task in tasks]
        orders = segment_orders(session, ids, params, sizes)
        return {task.job_id: orders[task.image_id] for task in tasks}

    def insert(session: Session, pairs: Sequence[tuple[Task, Found]]) -> None:
        for task, found in pairs:
            _insert(session, task, tally, found)
            tally.add(session, len(found.cells))

    return Work("segment", steps, fetch, insert, batch=_batch(steps.device))


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
