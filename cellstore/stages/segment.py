"""Segment: find the cells of every image that this recipe has not done yet.

The shape of all stages that go image by image, from top to bottom: :func:`open_segment` selects
the images and makes the recipe, which says what is done to them. Class :class:`Segment` fetches
from the database what a worker needs of an image, reads its files, computes, writes files, and
inserts rows. :func:`segment` lets ``jobs.execute`` do this for each image that is not done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, select, union_all
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder, StoredFile
from ..config import (
    EVERYTHING,
    THIS_PROCESS,
    Resources,
    SegmentParams,
    Selection,
)
from ..db.bulk import in_lists
from ..enums import ArtifactKind, Stage
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError, some_of
from ..io.image_files import encode_tiff, project
from ..jobs.execute import ImageStage, JobsResult, RunCounter, execute, forecast
from ..jobs.lookup import IS_CURRENT, find_recipe, find_run, images_of
from ..jobs.planes import (
    ChannelFile,
    cell_rows,
    channel_files,
    choose_channels,
    choose_files,
    insert_cells,
    lacking_channels,
    open_file,
)
from ..jobs.queue import Task
from ..jobs.runs import RecipeSpec, digest, files_of, keep_files, register
from ..jobs.workspace import Workspace
from ..models import Artifact, Image, Plate, Recipe, Segmentation, Well
from ..settings import need

if TYPE_CHECKING:
    from ..analysis.segmentation import CellposeSegmenter, ModelFiles, SegmentationResult

VERSION = 1
GPU_BATCH = 8
"""Images that a GPU is given at once; halved when its memory does not hold them."""
OF_A_RUN = "run:"
"""How a network of this store is named: ``run:12``, or ``run:latest``."""

SIZE_MODEL = ".npz"


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
    and marked as excluded. Images done before by the same recipe are left alone, unless their
    masks or flows are gone.

    Images without the channels are left out, and named in the result.

    Raises:
        MissingExtraError: Cellpose is not installed.
        UserInputError: no such model, run, plate, recipe or channel, parameters out of range, or
            plates whose diameter the recipe of ``diameter_from`` does not know.
    """
    stage, images, lacking = open_segment(
        workspace, params or SegmentParams(), selection, weights_dir, device
    )
    if dry_run:
        result = forecast(workspace, stage, stage.recipe, images, resources)
        return replace(result, lacking=lacking)
    for reason, number in Counter(reason for _, reason in lacking).items():
        workspace.progress.note(f"{number:,} images left out: {reason}")
    with workspace.database.begin() as session:
        recipe = register(session, stage.recipe)
    stage = replace(stage, recipe_id=recipe.id, plate_diameters={})
    result = execute(workspace, stage, [recipe], images, resources, stage.files.run_id)[0]
    return replace(result, lacking=lacking)


def open_segment(
    workspace: Workspace,
    params: SegmentParams,
    selection: Selection,
    weights_dir: Path | None,
    device: str,
) -> tuple[Segment, Select[int], tuple[tuple[str, str], ...]]:
    """Find the network, the recipe and the images, before any work begins.

    The images without the channels are returned by name, with the reason.

    Raises:
        as :func:`segment`.
    """
    need("segment")
    files = find_network(workspace, params.model, weights_dir)
    with workspace.database.read() as session:
        params = replace(params, channels=choose_channels(session, params.channels))
        if params.nuclei is not None:
            params = replace(params, nuclei=choose_channels(session, params.nuclei))
        # What decides the result. The network counts by its bytes; where it lay on this machine
        # does not.
        values = asdict(params) | {"model": Path(files.name).name}
        inputs: tuple[Recipe, ...] = ()
        if params.diameter_from is not None:
            if params.diameter is not None:
                raise UserInputError("Give --diameter or --diameter-from, not both.")
            inputs = (find_recipe(session, Stage.SEGMENT, params.diameter_from),)
            values["diameter_from"] = inputs[0].fingerprint
        gpu = device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())
        stage = Segment(
            params=params,
            files=files,
            device=device,
            artifacts=workspace.artifacts,
            recipe=RecipeSpec(Stage.SEGMENT, VERSION, values, files.sha256, inputs),
            diameters_of=inputs[0].id if inputs else None,
            batch=GPU_BATCH if gpu else 1,
        )
        images, lacking = lacking_channels(session, images_of(session, selection), params.planes)
        if inputs:
            stage.check_diameters(session, images)
    return stage, images, lacking


def find_network(workspace: Workspace, model: str, weights_dir: Path | None = None) -> ModelFiles:
    """Return the network that ``model`` names: a name, a file, or ``run:N``.

    Raises:
        UnknownNameError: there is no such name or run.
        UserInputError: the file cannot be had, or the run made no network.
        StorageError: a stored file is gone or changed.
    """
    from ..analysis.segmentation import describe, find_model

    if not model.startswith(OF_A_RUN):
        return find_model(model, weights_dir)
    with workspace.database.read() as session:
        run_id = find_run(session, model.removeprefix(OF_A_RUN), Stage.FINETUNE).id
        artifacts = files_of(session, run_id, ArtifactKind.NETWORK)
    paths = {}
    for artifact in artifacts:
        workspace.artifacts.read(artifact.path, artifact.sha256)  # that it is what was written
        paths[artifact.path.endswith(SIZE_MODEL)] = workspace.artifacts.locate(artifact.path)
    if False not in paths:
        raise UserInputError(f"Run {run_id} did not end with a network. Choose another run.")
    return replace(describe(f"{OF_A_RUN}{run_id}", paths[False], paths.get(True)), run_id=run_id)


@dataclass(frozen=True)
class SegmentInput:
    """The files of the plane, or of that of the cells and that of the nuclei.

    ``diameter`` in pixels, if it is settled.
    """

    planes: Sequence[Sequence[ChannelFile]]
    diameter: float | None = None


@dataclass(frozen=True)
class SegmentOutput:
    """What is left to write of an image once its files are on disk: a row for each cell."""

    mask: StoredFile
    flow: StoredFile
    diameter: float
    cells: list[dict[str, Any]]


@dataclass(frozen=True)
class Segment(ImageStage[SegmentInput, SegmentOutput]):
    """The stage.

    ``diameters_of``: a recipe; every image gets the median of the diameters that it used on the
    image's plate. ``recipe_id``: where ``recipe`` is in the database, if it is.
    """

    label = "segment"

    params: SegmentParams
    files: ModelFiles
    device: str
    artifacts: ArtifactFolder
    recipe: RecipeSpec
    diameters_of: int | None = None
    batch: int = 1
    recipe_id: int | None = None
    plate_diameters: dict[int, float | None] = field(default_factory=dict)
    segmenter: CellposeSegmenter = field(init=False, repr=False, compare=False)

    # --- in the database: what a worker needs ----------------------------------------------------

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, SegmentInput | CellstoreError]:
        """Return by image id the files of its planes and its diameter; an image may lack one."""
        image_ids = [task.image_id for task in tasks]
        diameters: dict[int, float | None] = {}
        for some in in_lists(image_ids) if self.diameters_of is not None else ():
            plates = select(Image.id, Well.plate_id).join(Well, Well.id == Image.well_id)
            for row in session.execute(plates.where(Image.id.in_(some))):
                diameters[row.id] = self._diameter(session, row.plate_id)
        found: dict[int, SegmentInput | CellstoreError] = {}
        wanted = self.params.planes
        for image_id, files in channel_files(session, image_ids).items():
            try:
                planes = [choose_files(files, plane) for plane in wanted]
                found[image_id] = SegmentInput(planes, diameters.get(image_id))
            except UnknownNameError as error:
                found[image_id] = error
        return found

    def check_diameters(self, session: Session, images: Select[int]) -> None:
        """Refuse a selection with plates whose diameter is asked for and not known.

        Raises:
            UserInputError: with the plates, and what to do first.
        """
        chosen = images.subquery()
        on_plates = select(Well.plate_id).join(Image, Image.well_id == Well.id)
        on_plates = on_plates.join(chosen, chosen.c.id == Image.id)
        plates = select(Plate.id, Plate.barcode).where(Plate.id.in_(on_plates))
        rows = session.execute(plates.order_by(Plate.id)).all()
        unknown = [row.barcode for row in rows if self._diameter(session, row.id) is None]
        if unknown:
            raise UserInputError(
                f"Recipe {self.diameters_of} has found no cells on {len(unknown)} of the plates "
                f"({some_of(unknown)}), so their diameter is not known. Segment some images of "
                "each with that recipe first."
            )

    def _diameter(self, session: Session, plate_id: int) -> float | None:
        """Return the diameter of a plate in pixels; ``None``: ``diameters_of`` has no cells there.

        The first image that is done settles it: that ``diameters_of`` does more images later on
        changes nothing.
        """
        if plate_id not in self.plate_diameters:
            used = (
                select(Segmentation.diameter)
                .join(Image, IS_CURRENT)
                .join(Well, Well.id == Image.well_id)
                .where(Well.plate_id == plate_id)
                .order_by(Image.id)
            )
            settled = session.scalar(used.where(Segmentation.recipe_id == self.recipe_id).limit(1))
            if settled is None:
                of_source = used.where(
                    Segmentation.recipe_id == self.diameters_of, Segmentation.n_cells > 0
                )
                found = [value for value in session.scalars(of_source) if value is not None]
                settled = float(np.median(found)) if found else None
            self.plate_diameters[plate_id] = settled
        return self.plate_diameters[plate_id]

    # --- in a worker: from files to files ---------------------------------------------------------

    def load(self) -> None:
        """Load the network."""
        from ..analysis.segmentation import load_segmenter

        need("segment")  # a worker of a cluster may lack it
        segmenter = load_segmenter(
            self.files,
            flow_threshold=self.params.flow_threshold,
            cellprob_threshold=self.params.cellprob_threshold,
            diameter=self.params.diameter,
            device=self.device,
            sizes_given=self.diameters_of is not None,
        )
        object.__setattr__(self, "segmenter", segmenter)  # of this worker: the rest is frozen

    def read(self, task_input: SegmentInput) -> tuple[NDArray[np.float32], float | None]:
        """Return the plane (H, W), or cells and nuclei (2, H, W), and the diameter."""
        planes = [
            project([open_file(file) for file in files], self.params.projection)
            for files in task_input.planes
        ]
        if len(planes) == 1:
            return planes[0], task_input.diameter
        if planes[0].shape != planes[1].shape:
            raise ImageError(
                f"The planes of cells and nuclei differ in size: {planes[0].shape} and "
                f"{planes[1].shape} pixels."
            )
        return np.stack(planes), task_input.diameter

    def compute(self, loaded: Sequence[Any]) -> list[SegmentationResult]:
        """Return masks and flows of each image."""
        diameters = [diameter for _, diameter in loaded if diameter is not None]
        return self.segmenter.segment_batch([image for image, _ in loaded], diameters or None)

    def write(self, result: SegmentationResult) -> SegmentOutput:
        """Write masks and flows."""
        masks, flows = encode_tiff(result.masks), encode_tiff(result.flows)
        return SegmentOutput(
            self.artifacts.write(ArtifactKind.MASK, masks, ".tif"),
            self.artifacts.write(ArtifactKind.FLOW, flows, ".tif"),
            result.diameter,
            cell_rows(result.masks),
        )

    # --- in the database: rows -------------------------------------------------------------------

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, SegmentOutput]],
        files: Any,
    ) -> int:
        """Write a segmentation for each image and a row for each cell."""
        written = [file for _, output in done for file in (output.mask, output.flow)]
        ids = keep_files(session, written)
        known = {}
        for some in in_lists([task.image_id for task, _ in done]):
            query = select(Segmentation).where(Segmentation.recipe_id == run.recipe_id)
            for found in session.scalars(query.where(Segmentation.image_id.in_(some))):
                known[found.image_id, found.content_sha256] = found
        new = []
        for (task, output), mask_id, flow_id in zip(done, ids[::2], ids[1::2], strict=True):
            before = known.get((task.image_id, task.content_sha256))
            if before is None:
                row = {
                    "image_id": task.image_id,
                    "recipe_id": run.recipe_id,
                    "content_sha256": task.content_sha256,
                    "run_id": run.run_id,
                    "n_cells": len(output.cells),
                    "diameter": output.diameter,
                    "mask_artifact_id": mask_id,
                    "flow_artifact_id": flow_id,
                    "created_at": datetime.now(UTC),
                }
                new.append((row, output.cells))
            elif before.mask_artifact_id == mask_id:  # its files were gone
                before.flow_artifact_id = flow_id
            else:
                raise ImageError(
                    f"The masks of {task.name} were lost, and the new ones differ from them, "
                    "so they do not fit the cells in the database. Put the file back from a "
                    "backup, or segment with other options, for example another --diameter."
                )
        insert_cells(session, new)
        return sum(len(output.cells) for _, output in done)

    def digest(self, recipe_id: int, output: SegmentOutput) -> str:
        """Return the digest of the files and of all cells."""
        return digest([output.mask.sha256, output.flow.sha256, output.diameter, output.cells])

    def find_lost(
        self, session: Session, recipe_id: int, images: Select[int]
    ) -> Collection[int] | None:
        """Return the images whose masks or flows are gone."""
        of_recipe = select(Image.id, Artifact.path).join(
            Segmentation, and_(IS_CURRENT, Segmentation.recipe_id == recipe_id)
        )
        of_recipe = of_recipe.where(Image.id.in_(images))
        files = (Segmentation.mask_artifact_id, Segmentation.flow_artifact_id)
        masks, flows = (of_recipe.join(Artifact, Artifact.id == file) for file in files)
        both = [query.with_only_columns(Artifact.path.label("path")) for query in (masks, flows)]
        sorted_paths = union_all(*both).order_by("path").execution_options(yield_per=10_000)
        gone = sorted(self.artifacts.missing(session.scalars(sorted_paths)))
        lost: set[int] = set()
        for some in in_lists(gone):
            for query in (masks, flows):
                found = query.with_only_columns(Image.id).where(Artifact.path.in_(some))
                lost.update(session.scalars(found))
        return lost or None
