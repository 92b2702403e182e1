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
from typing import TYPE_CHECKING, Any, TypeAlias

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
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from ..io.image_files import encode_tiff, project
from ..jobs.execute import ImageStage, JobsResult, RunCounter, execute
from ..jobs.lookup import IS_CURRENT, find_run, images_of
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
from ..models import Artifact, Image, Segmentation
from ..settings import need

if TYPE_CHECKING:
    from ..analysis.segmentation import CellposeSegmenter, ModelFiles, SegmentationResult

VERSION = 1
OF_A_RUN = "run:"
"""How a network of this store is named: ``run:12``, or ``run:latest``."""


def segment(
    workspace: Workspace,
    params: SegmentParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    device: str = "auto",
    resources: Resources = THIS_PROCESS,
) -> JobsResult:
    """Segment the images of a selection that have their files; see ``Store.segment``.

    Masks and flows become files, every cell a row. What this recipe did before is left alone,
    unless its files are gone. Images without the channels are left out, and named in the result.
    """
    stage, images, lacking = open_segment(workspace, params or SegmentParams(), selection, device)
    for reason, number in Counter(reason for _, reason in lacking).items():
        workspace.progress.note(f"{number:,} images left out: {reason}")
    with workspace.database.begin() as session:
        recipe = register(session, stage.recipe)
    result = execute(workspace, stage, [recipe], images, resources, stage.files.run_id)[0]
    return replace(result, lacking=lacking)


def open_segment(
    workspace: Workspace,
    params: SegmentParams,
    selection: Selection,
    device: str,
) -> tuple[Segment, Select[int], tuple[tuple[str, str], ...]]:
    """Find the network, the recipe and the images, before any work begins.

    The images without the channels are returned by name, with the reason.
    """
    need("segment")
    files = find_network(workspace, params.model)
    with workspace.database.read() as session:
        params = replace(params, channels=choose_channels(session, params.channels))
        if params.nuclei is not None:
            params = replace(params, nuclei=choose_channels(session, params.nuclei))
        # What decides the result. The network counts by its bytes; where it lay on this machine
        # does not.
        values = asdict(params) | {"model": Path(files.name).name}
        stage = Segment(
            params=params,
            files=files,
            device=device,
            artifacts=workspace.artifacts,
            recipe=RecipeSpec(Stage.SEGMENT, VERSION, values, files.sha256),
        )
        images, lacking = lacking_channels(session, images_of(session, selection), params.planes)
    return stage, images, lacking


def find_network(workspace: Workspace, model: str) -> ModelFiles:
    """Return the network that ``model`` names: a name, a file, or ``run:N``."""
    from ..analysis.segmentation import describe, find_model

    if not model.startswith(OF_A_RUN):
        return find_model(model)
    with workspace.database.read() as session:
        run_id = find_run(session, model.removeprefix(OF_A_RUN), Stage.FINETUNE).id
        artifacts = files_of(session, run_id, ArtifactKind.NETWORK)
    paths = {}
    for artifact in artifacts:
        workspace.artifacts.read(artifact.path, artifact.sha256)  # that it is what was written
        paths[artifact.path.endswith(".npz")] = workspace.artifacts.locate(artifact.path)
    if False not in paths:
        raise UserInputError(f"Run {run_id} did not end with a network. Choose another run.")
    return replace(describe(f"{OF_A_RUN}{run_id}", paths[False], paths.get(True)), run_id=run_id)


SegmentInput: TypeAlias = Sequence[Sequence[ChannelFile]]
"""The files of the plane, or of that of the cells and that of the nuclei."""


@dataclass(frozen=True)
class SegmentOutput:
    """What is left to write of an image once its files are on disk: a row for each cell."""

    mask: StoredFile
    flow: StoredFile
    diameter: float
    cells: list[dict[str, Any]]


@dataclass(frozen=True)
class Segment(ImageStage[SegmentInput, SegmentOutput]):
    """The stage."""

    label = "segment"

    params: SegmentParams
    files: ModelFiles
    device: str
    artifacts: ArtifactFolder
    recipe: RecipeSpec
    segmenter: CellposeSegmenter = field(init=False, repr=False, compare=False)

    # --- in the database: what a worker needs ----------------------------------------------------

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, SegmentInput | CellstoreError]:
        """Return by image id the files of its planes; an image may lack one."""
        image_ids = [task.image_id for task in tasks]
        found: dict[int, SegmentInput | CellstoreError] = {}
        for image_id, files in channel_files(session, image_ids).items():
            try:
                found[image_id] = [choose_files(files, plane) for plane in self.params.planes]
            except UnknownNameError as error:
                found[image_id] = error
        return found

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
        )
        object.__setattr__(self, "segmenter", segmenter)  # of this worker: the rest is frozen

    def read(self, task_input: SegmentInput) -> NDArray[np.float32]:
        """Return the plane (H, W), or cells and nuclei (2, H, W)."""
        planes = [
            project([open_file(file) for file in files], self.params.projection)
            for files in task_input
        ]
        if len(planes) == 1:
            return planes[0]
        if planes[0].shape != planes[1].shape:
            raise ImageError(
                f"The planes of cells and nuclei differ in size: {planes[0].shape} and "
                f"{planes[1].shape} pixels."
            )
        return np.stack(planes)

    def compute(self, loaded: NDArray[np.float32]) -> SegmentationResult:
        """Return masks and flows."""
        return self.segmenter.segment(loaded)

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
