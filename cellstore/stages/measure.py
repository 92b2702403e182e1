"""Measure: the features of every cell that was found, group by group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import Select, bindparam, exists, select
from sqlalchemy.orm import Session

from ..analysis.features import (
    BASIC_GROUP,
    GROUPS,
    Feature,
    FeatureGroup,
    measure_cells,
    measure_channels,
)
from ..analysis.regions import find_regions
from ..artifacts import ArtifactFolder
from ..config import (
    EVERYTHING,
    THIS_PROCESS,
    ImageInput,
    MeasureParams,
    Resources,
    Selection,
)
from ..db.bulk import bulk_insert, in_lists, insert_new
from ..enums import PROJECTION_CHANNEL, FeatureStorage, Stage
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from ..io.image_files import decode_tiff, project
from ..jobs.execute import ImageStage, JobsResult, RunCounter, execute
from ..jobs.lookup import IS_CURRENT, find_channels, find_recipe, images_of, in_recipes
from ..jobs.planes import ChannelFile, channel_files, choose_files, lacking_channels, open_file
from ..jobs.queue import Task
from ..jobs.runs import RecipeSpec, digest_of_numbers, fingerprint, register
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureSet,
    Image,
    ImageFile,
    Segmentation,
)
from ..query.cells import current_segmentation, last_with_masks, plane_of, read_masks
from ..query.feature_files import (
    ROWS_OF_FILE,
    WrittenFile,
    forget_lost_files,
    images_of_lost_files,
    images_per_file,
    register_files,
    set_of_recipe,
    write_features,
)

VERSION = 2
"""Of group ``basic``. 2: means are taken in 64 bits."""

CHANNEL_VERSION = 1
"""Of the groups that are measured channel by channel."""

Plane = NDArray[Any]


@dataclass(frozen=True)
class MeasureResult(JobsResult):
    """What was done for one group of features; ``others``: for the other groups of the call."""

    group: str = ""
    feature_set: str = ""
    others: tuple[MeasureResult, ...] = ()


def measure(
    workspace: Workspace,
    params: MeasureParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    segmentation: str | None = None,
    resources: Resources = THIS_PROCESS,
) -> MeasureResult:
    """Measure the cells found by one segment recipe; see ``Store.measure``.

    Masks that another tool made are measured as our own. Intensities are those of the segmented
    plane unless ``params`` names another. Each group of features is a recipe and a run of its
    own; the files of an image are opened once for all of them.
    """
    params = params or MeasureParams()
    names = dict.fromkeys(name.lower() for name in params.features)
    if not names:
        raise UserInputError(f"Name a group of features: {', '.join(GROUPS)}.")
    if unknown := [name for name in names if name not in GROUPS]:
        raise UnknownNameError.of("group of features", unknown[0], GROUPS)
    with workspace.database.read() as session:
        if segmentation is None:
            source = last_with_masks(session)
        else:
            source = find_recipe(session, Stage.SEGMENT, segmentation)
        cells = exists().where(Segmentation.recipe_id == source.id)
        masks = cells.where(Segmentation.mask_artifact_id.is_not(None))
        if session.scalar(select(cells)) and not session.scalar(select(masks)):
            raise UserInputError(
                f"Another tool found the cells of segment recipe {source.id} and their masks "
                "are unknown, so they cannot be measured. If you have the masks, run: "
                "cellstore ingest masks DIR"
            )
        images = images_of(session, selection).join(Segmentation, IS_CURRENT)
        images = images.where(Segmentation.recipe_id == source.id)
        if params.channels is not None:
            asked_for = in_recipes(session, find_channels(session, params.channels))
            params = replace(params, channels=asked_for)
        plane = params.plane or plane_of(source)
        find_channels(session, plane.channels)
        groups = []
        for asked in (GROUPS[name] for name in names):
            if asked.per_channel:
                wanted = ImageInput(_channels(session, params.plane, images))
                version = CHANNEL_VERSION
                parameters = {"group": asked.name, "channels": [*wanted.channels]}
            else:
                wanted, version, parameters = plane, VERSION, asdict(plane)
            parameters["features"] = [feature.name for feature in asked.features]
            spec = RecipeSpec(Stage.MEASURE, version, parameters, None, (source,))
            features = asked.columns(wanted.channels)
            name = f"{asked.name}_{fingerprint(spec)[:8]}"
            groups.append(MeasuredGroup(asked, wanted, spec, features, name))
        planes = [group.plane for group in groups]
        images, lacking = lacking_channels(session, images, planes)
        in_files = any(group.group is not BASIC_GROUP for group in groups)
        together = images_per_file(session, source.id, ROWS_OF_FILE) if in_files else 1
    recipes = []
    with workspace.database.begin() as session:
        for group in groups:
            recipe = register(session, group.recipe)
            in_table = group.group is BASIC_GROUP
            row = {
                "name": group.feature_set,
                "recipe_id": recipe.id,
                "columns": [asdict(feature) for feature in group.features],
                "storage": FeatureStorage.TABLE if in_table else FeatureStorage.FILES,
            }
            insert_new(session, FeatureSet, [row])
            recipes.append(recipe)
    by_recipe = {recipe.id: group for recipe, group in zip(recipes, groups, strict=True)}
    stage = Measure(workspace.artifacts, source.id, by_recipe, together)
    results = execute(workspace, stage, recipes, images, resources)
    first, *others = (
        MeasureResult(
            **vars(result) | {"lacking": lacking},
            group=group.group.name,
            feature_set=group.feature_set,
        )
        for group, result in zip(groups, results, strict=True)
    )
    return replace(first, others=tuple(others))


@dataclass(frozen=True)
class MeasuredGroup:
    """A group of features: measured on ``plane``, or on each of its channels.

    ``features`` are the columns, in their order, of the ``feature_set`` of this name.
    """

    group: FeatureGroup
    plane: ImageInput
    recipe: RecipeSpec
    features: tuple[Feature, ...]
    feature_set: str


def _channels(session: Session, named: ImageInput | None, images: Select[int]) -> tuple[str, ...]:
    """The channels that are named; else those of the first image. As recipes call them, sorted."""
    if named is not None and named.channels:
        return tuple(sorted(set(named.channels)))
    query = select(ImageFile.channel)
    first = images.where(Image.content_sha256.is_not(None)).order_by(Image.id).limit(1)
    query = query.where(ImageFile.image_id.in_(first))
    found = sorted(session.scalars(query))
    if not found:
        raise UserInputError(
            "No selected image has been segmented and has its files, so its channels are unknown. "
            "Name some with --channels, or see what there is with: cellstore status"
        )
    shown = [name for name in found if name != PROJECTION_CHANNEL] or found
    return tuple(sorted(in_recipes(session, shown)))


@dataclass(frozen=True)
class MeasureInput:
    """What a worker needs of an image: its masks and files, and the ids of its cells.

    ``mask``: path and sha256. ``object_numbers`` and ``cell_ids`` (N,): the number of
    each cell in the masks, ascending, and its id. ``files``: by recipe to measure by.
    """

    name: str
    mask: tuple[str, str]
    object_numbers: NDArray[np.int64]
    cell_ids: NDArray[np.int64]
    files: Mapping[int, Sequence[ChannelFile]]


@dataclass(frozen=True)
class MeasureOutput:
    """The measurements of the N cells of an image, by recipe.

    ``cell_ids`` (N,) ascend; ``values`` are (F, N) by recipe, a row for each of its columns.
    """

    cell_ids: NDArray[np.int64]
    values: Mapping[int, NDArray[np.float64]]


@dataclass(frozen=True)
class Measure(ImageStage[MeasureInput, MeasureOutput]):
    """The stage. ``segment_id``: whose cells; ``groups``: what is measured, by recipe id."""

    label = "measure"

    artifacts: ArtifactFolder
    segment_id: int
    groups: Mapping[int, MeasuredGroup]
    images_per_file: int = 1

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, MeasureInput | CellstoreError]:
        """Return by image id its masks, its cells and its files; masks may be unknown."""
        ids = [task.image_id for task in tasks]
        query = (
            select(Image.id, Segmentation.id, Artifact.path, Artifact.sha256)
            .join(Segmentation, IS_CURRENT)
            .join(Artifact, Artifact.id == Segmentation.mask_artifact_id)
            .where(Segmentation.recipe_id == self.segment_id)
        )
        masks: dict[int, tuple[int, tuple[str, str]]] = {}
        for some in in_lists(ids):
            for image_id, number, path, sha256 in session.execute(query.where(Image.id.in_(some))):
                masks[image_id] = (number, (path, sha256))
        files = channel_files(session, ids)
        cells = (
            select(Cell.object_number, Cell.id)
            .where(Cell.segmentation_id == bindparam("segmentation"))
            .order_by(Cell.object_number)
        )
        found: dict[int, MeasureInput | CellstoreError] = {}
        for task in tasks:
            if task.image_id not in masks:
                try:
                    now = current_segmentation(session, self.segment_id, task.image_id)
                    read_masks(session, self.artifacts, now)
                except ImageError as error:  # it has changed, or its masks are unknown
                    found[task.image_id] = error
                continue
            number, mask = masks[task.image_id]
            rows = session.execute(cells, {"segmentation": number}).all()
            table = np.array([tuple(row) for row in rows], np.int64).reshape(-1, 2)
            try:
                chosen = {
                    recipe_id: choose_files(files[task.image_id], self.groups[recipe_id].plane)
                    for recipe_id in task.jobs
                }
            except UnknownNameError as error:  # it lacks a channel
                found[task.image_id] = error
                continue
            found[task.image_id] = MeasureInput(task.name, mask, table[:, 0], table[:, 1], chosen)
        return found

    def read(
        self, task_input: MeasureInput
    ) -> tuple[MeasureInput, Plane, dict[ChannelFile, Plane]]:
        """Return the masks (H, W) and the channels (H, W) by file, each opened once."""
        masks = decode_tiff(self.artifacts.read(*task_input.mask))
        wanted = dict.fromkeys(file for files in task_input.files.values() for file in files)
        return task_input, masks, {file: open_file(file) for file in wanted}

    def compute(
        self, loaded: tuple[MeasureInput, Plane, dict[ChannelFile, Plane]]
    ) -> MeasureOutput:
        """Return the measurements; masks, planes and cells that do not fit are an error."""
        task_input, masks, opened = loaded
        regions = find_regions(masks)
        if not np.array_equal(regions.object_numbers, task_input.object_numbers):
            raise ImageError(
                f"The masks of {task_input.name} and its cells in the database differ. "
                "See what is wrong with: cellstore verify"
            )
        order = np.argsort(task_input.cell_ids)
        values = {}
        for recipe_id, files in task_input.files.items():
            group = self.groups[recipe_id]
            planes = [opened[file] for file in files]
            if group.group.per_channel:
                channels = dict(zip(group.plane.channels, planes, strict=True))
                columns = measure_channels(group.group.name, regions, channels)
            else:
                columns = measure_cells(regions, project(planes, group.plane.projection))
            rows = [columns[feature.name] for feature in group.features]
            values[recipe_id] = np.stack(rows)[:, order]
        return MeasureOutput(task_input.cell_ids[order], values)

    def write_together(
        self, run: RunCounter, done: Sequence[tuple[Task, MeasureOutput]]
    ) -> Sequence[WrittenFile]:
        """Write the file of a group that is kept in files."""
        group = self.groups[run.recipe_id]
        if group.group is BASIC_GROUP:
            return ()
        schema = pa.schema([(feature.name, pa.float64()) for feature in group.features])
        ids = [output.cell_ids for _, output in done]
        values = [output.values[run.recipe_id] for _, output in done]
        return write_features(self.artifacts, schema, ids, values)

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, MeasureOutput]],
        files: Sequence[WrittenFile],
    ) -> int:
        """Write a row for each cell, or one for each file."""
        if self.groups[run.recipe_id].group is BASIC_GROUP:
            # The last two are the centroid, which is in table cells.
            names = [feature.name for feature in BASIC_GROUP.features[:-2]]
            rows: list[tuple[Any, ...]] = []
            for _, output in done:
                values = output.values[run.recipe_id][:-2]
                columns = (output.cell_ids.tolist(), *values.tolist())
                keys = (repeat(run.recipe_id), repeat(run.run_id))
                rows += zip(*columns, *keys, strict=False)
            bulk_insert(session, CellFeatures, ("cell_id", *names, "recipe_id", "run_id"), rows)
        else:
            found = set_of_recipe(session, run.recipe_id)
            assert found is not None
            register_files(session, self.artifacts, found.id, run.run_id, files)
        return sum(len(output.cell_ids) for _, output in done)

    def digest(self, recipe_id: int, output: MeasureOutput) -> str:
        """Return the digest of the cell ids (N,), ascending, and the values (F, N), as float64."""
        return digest_of_numbers(output.cell_ids, output.values[recipe_id])

    def find_lost(
        self, session: Session, recipe_id: int, images: Select[int]
    ) -> Collection[int] | None:
        """Return the images whose file of features is gone; group ``basic`` has none."""
        if self.groups[recipe_id].group is BASIC_GROUP:
            return None
        return images_of_lost_files(session, self.artifacts, recipe_id)

    def forget_lost(self, session: Session, recipe_id: int) -> None:
        """Delete the rows of the files of features that are gone."""
        forget_lost_files(session, self.artifacts, recipe_id)
