"""Segment: find the cells of every image that this recipe has not done yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder, StoredFile
from ..config import EVERYTHING, THIS_PROCESS, Resources, SegmentParams, Selection, as_parameters
from ..db.bulk import in_lists
from ..db.models import Image, Plate, Recipe, Segmentation, Well
from ..enums import ArtifactKind, Stage
from ..errors import CellstoreError, ImageError, UserInputError
from ..extras import need
from ..io.image_files import encode_tiff
from ..jobs.execute import JobsResult, Tally, Work, execute
from ..jobs.lookup import find_recipe
from ..jobs.planes import (
    PlaneOrder,
    cell_rows,
    check_channels,
    choose_channels,
    insert_cells,
    open_plane,
    plane_orders,
)
from ..jobs.queue import Task
from ..jobs.recipes import RecipeSpec
from ..jobs.runs import keep_file
from ..jobs.selection import images_of, is_current
from ..jobs.workspace import Workspace
from ..learn.segmentation_networks import find_network

if TYPE_CHECKING:
    from ..analysis.segmentation import ModelFiles, SegmentationResult, Segmenter


_SHOWN_PLATES = 3


@dataclass(frozen=True)
class SegmentOrder:
    """One plane, or that of the cells and that of the nuclei; the diameter if it is settled."""

    planes: tuple[PlaneOrder, ...]
    diameter: float | None = None


@dataclass
class PlateDiameters:
    """The median of the diameters that the recipe ``source`` used on each plate.

    A plate's is settled with the first image that ``recipe_id`` did there: that more images are
    segmented by ``source`` later on changes nothing.
    """

    source: Recipe
    recipe_id: int | None = None
    _known: dict[int, float | None] = field(default_factory=dict)

    def of_plate(self, session: Session, plate_id: int) -> float | None:
        """Return the diameter in pixels; ``None``: ``source`` has found no cells there."""
        if plate_id not in self._known:
            self._known[plate_id] = self._settled(session, plate_id) or self._median(
                session, plate_id
            )
        return self._known[plate_id]

    def check(self, session: Session, images: Select[int]) -> None:
        """Refuse a selection with plates whose diameter is not known.

        Raises:
            UserInputError: with the plates, and what to do first.
        """
        chosen = images.subquery()
        on_plates = select(Well.plate_id).join(Image, Image.well_id == Well.id)
        on_plates = on_plates.join(chosen, chosen.c.id == Image.id)
        plates = select(Plate.id, Plate.barcode).where(Plate.id.in_(on_plates))
        rows = session.execute(plates.order_by(Plate.id)).all()
        unknown = [row.barcode for row in rows if self.of_plate(session, row.id) is None]
        if unknown:
            more = ", ..." if len(unknown) > _SHOWN_PLATES else ""
            shown = ", ".join(unknown[:_SHOWN_PLATES]) + more
            raise UserInputError(
                f"Recipe {self.source.id} has found no cells on {len(unknown)} of the plates "
                f"({shown}), so their diameter is not known. Segment some images of each with that "
                "recipe first."
            )

    def _settled(self, session: Session, plate_id: int) -> float | None:
        if self.recipe_id is None:
            return None
        return session.scalar(_diameters(self.recipe_id, plate_id).order_by(Image.id).limit(1))

    def _median(self, session: Session, plate_id: int) -> float | None:
        query = _diameters(self.source.id, plate_id).where(Segmentation.n_cells > 0)
        found = [value for value in session.scalars(query) if value is not None]
        return float(np.median(found)) if found else None


def _diameters(recipe_id: int, plate_id: int) -> Select[float | None]:
    query = select(Segmentation.diameter).join(Image, is_current())
    query = query.join(Well, Well.id == Image.well_id)
    return query.where(Segmentation.recipe_id == recipe_id, Well.plate_id == plate_id)


def segment_orders(
    session: Session,
    image_ids: Sequence[int],
    params: SegmentParams,
    diameters: PlateDiameters | None,
) -> dict[int, SegmentOrder | CellstoreError]:
    """Return by image id what a worker needs, or the error: the image lacks a channel."""
    planes = [plane_orders(session, image_ids, plane) for plane in params.planes]
    sizes = {} if diameters is None else _sizes(session, image_ids, diameters)
    return {
        image_id: _order([found[image_id] for found in planes], sizes.get(image_id))
        for image_id in image_ids
    }


def _order(
    planes: Sequence[PlaneOrder | CellstoreError], diameter: float | None
) -> SegmentOrder | CellstoreError:
    good = [plane for plane in planes if isinstance(plane, PlaneOrder)]
    if len(good) == len(planes):
        return SegmentOrder(tuple(good), diameter)
    return next(plane for plane in planes if isinstance(plane, CellstoreError))


def _sizes(
    session: Session, image_ids: Sequence[int], diameters: PlateDiameters
) -> dict[int, float | None]:
    sizes = {}
    for some in in_lists(image_ids):
        plates = select(Image.id, Well.plate_id).join(Well, Well.id == Image.well_id)
        for row in session.execute(plates.where(Image.id.in_(some))):
            sizes[row.id] = diameters.of_plate(session, row.plate_id)
    return sizes


def open_planes(order: SegmentOrder) -> NDArray[np.float32]:
    """Return the plane (H, W), or cells and nuclei (2, H, W); raises as ``open_plane`` does."""
    planes = [open_plane(plane) for plane in order.planes]
    if len(planes) == 1:
        return planes[0]
    if planes[0].shape != planes[1].shape:
        raise ImageError(
            f"The planes of cells and nuclei differ in size: {planes[0].shape} and "
            f"{planes[1].shape} pixels."
        )
    return np.stack(planes)


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
        params = replace(params, channels=choose_channels(session, params.channels))
        for plane in params.planes:
            check_channels(session, plane)
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
        from ..analysis.segmentation import load_segmenter

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
