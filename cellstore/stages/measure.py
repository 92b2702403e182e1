"""The stage: what is to be measured, by which recipes, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import Select, exists, func, select
from sqlalchemy.orm import Session

from ..analysis.features import (
    BASIC_GROUP,
    FEATURE_NAMES,
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
    as_parameters,
)
from ..db.bulk import bulk_insert, in_lists
from ..db.models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureSet,
    Image,
    ImageFile,
    Recipe,
    Segmentation,
)
from ..db.statements import insert_new
from ..enums import PROJECTION_CHANNEL, FeatureStorage, Stage
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from ..io.image_files import decode_tiff, project
from ..jobs.execute import JobsResult, Part, Tallies, Tally, Work, execute_together
from ..jobs.lookup import find_recipe
from ..jobs.planes import FileOrder, PlaneOrder, check_channels, open_file, plane_orders
from ..jobs.queue import Task, close_beside, open_beside
from ..jobs.recipes import RecipeSpec, fingerprint
from ..jobs.selection import images_of, is_current, segmented
from ..jobs.workspace import Workspace
from ..query.cells import current_segmentation, last_with_masks, plane_of
from ..query.feature_files import ROWS_OF_FILE, FeatureWriter, WrittenFile, register_files

VERSION = 2
"""Of group ``basic``. 2: means are taken in 64 bits."""

CHANNEL_VERSION = 1
"""Of the groups that are measured channel by channel."""


def list_groups() -> tuple[FeatureGroup, ...]:
    """Return the registry: every group with its features."""
    return tuple(GROUPS.values())


@dataclass(frozen=True)
class GroupPlan:
    """One group: measured on ``plane`` (``basic``), or on each of ``channels``."""

    group: FeatureGroup
    source: Recipe
    plane: ImageInput | None
    channels: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the group."""
        return self.group.name

    @property
    def in_table(self) -> bool:
        """Whether the values go to table ``features``, not to files."""
        return self.group is BASIC_GROUP

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """The columns, in their order."""
        return self.group.columns(self.channels)

    @cached_property
    def spec(self) -> RecipeSpec:
        """The recipe."""
        if self.plane is not None:
            parameters = as_parameters(self.plane) | {"features": list(FEATURE_NAMES)}
            return RecipeSpec(Stage.MEASURE, VERSION, parameters, None, (self.source,))
        parameters = {
            "group": self.name,
            "channels": list(self.channels),
            "features": [feature.name for feature in self.group.features],
        }
        return RecipeSpec(Stage.MEASURE, CHANNEL_VERSION, parameters, None, (self.source,))

    @cached_property
    def feature_set(self) -> str:
        """The name of the feature set."""
        return f"{self.name}_{fingerprint(self.spec)[:8]}"

    def register(self, session: Session, recipe: Recipe) -> None:
        """Insert the feature set that ``recipe`` fills, on its first use."""
        row = {
            "name": self.feature_set,
            "recipe_id": recipe.id,
            "columns": [feature.to_json() for feature in self.features],
            "storage": FeatureStorage.TABLE if self.in_table else FeatureStorage.FILES,
        }
        insert_new(session, FeatureSet, [row])


def plan_groups(
    session: Session, params: MeasureParams, source: Recipe, images: Select[int]
) -> list[GroupPlan]:
    """Return a plan for each group that ``params`` names, in their order, each once.

    Raises:
        UnknownNameError: no such group or channel.
        UserInputError: no group at all.
    """
    groups = [_group(name) for name in dict.fromkeys(params.features)]
    if not groups:
        raise UserInputError(f"Name a group of features: {', '.join(GROUPS)}.")
    plane = params.plane or plane_of(source)
    check_channels(session, plane)
    if not any(group.per_channel for group in groups):
        channels: tuple[str, ...] = ()
    else:
        channels = _channels(session, params.plane, images)
    return [
        GroupPlan(group, source, None, channels)
        if group.per_channel
        else GroupPlan(group, source, plane, ())
        for group in groups
    ]


def _group(name: str) -> FeatureGroup:
    found = GROUPS.get(name.lower())
    if found is None:
        raise UnknownNameError.of("group of features", name, GROUPS)
    return found


def _channels(session: Session, named: ImageInput | None, images: Select[int]) -> tuple[str, ...]:
    """The channels that are named, as they are spelled; else those of the first image. Sorted."""
    query = select(ImageFile.channel)
    if named is not None and named.channels:
        of_name = (func.lower(ImageFile.channel) == name.lower() for name in named.channels)
        spelled = [session.scalars(query.where(same).limit(1)).one() for same in of_name]
        return tuple(sorted(set(spelled)))
    first = images.where(Image.content_sha256.is_not(None)).order_by(Image.id).limit(1)
    query = query.where(ImageFile.image_id.in_(first))
    found = sorted(session.scalars(query))
    if not found:
        raise UserInputError(
            "No selected image has been segmented and has its files, so its channels are unknown. "
            "Name some with --channels, or see what there is with: cellstore status"
        )
    return tuple(name for name in found if name != PROJECTION_CHANNEL) or tuple(found)


Plane = NDArray[Any]


@dataclass(frozen=True)
class MeasureOrder:
    """What a worker needs: the name of the image, its masks, its cells by label, its files.

    ``plane`` is that of group ``basic``, ``channels`` are those of the other ``groups``.
    """

    name: str
    mask: tuple[str, str]
    cells: Mapping[int, int]
    groups: tuple[str, ...]
    plane: PlaneOrder | None
    channels: Mapping[str, FileOrder]


@dataclass(frozen=True)
class Pixels:
    """An image: ``masks``, ``plane`` and ``channels`` by name, (H, W) each."""

    order: MeasureOrder
    masks: Plane
    plane: Plane | None
    channels: Mapping[str, Plane]


@dataclass(frozen=True)
class Measured:
    """The measurements of an image's N cells.

    ``cell_ids`` (N,) ascend; ``values`` are (F, N) of each group, a row for each of its columns.
    """

    cell_ids: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class MeasureSteps:
    """Makes a :class:`MeasureStep` in a worker."""

    artifacts: ArtifactFolder

    def __call__(self) -> MeasureStep:
        """Return it."""
        return MeasureStep(self.artifacts)


@dataclass(frozen=True)
class MeasureStep:
    """Opens masks and planes of an image and measures its cells; writes no file."""

    artifacts: ArtifactFolder

    def read(self, order: MeasureOrder) -> Pixels:
        """Return the pixels of an image; a file that several groups look at is opened once."""
        masks = decode_tiff(self.artifacts.read(*order.mask))
        files = (*(order.plane.files if order.plane else ()), *order.channels.values())
        opened = {file: open_file(file) for file in dict.fromkeys(files)}
        plane = None
        if order.plane is not None:
            plane = project([opened[file] for file in order.plane.files], order.plane.projection)
        channels = {name: opened[file] for name, file in order.channels.items()}
        return Pixels(order, masks, plane, channels)

    def compute(self, loaded: Sequence[Pixels]) -> list[Measured]:
        """Return the measurements of each image."""
        return [measured(pixels) for pixels in loaded]

    def keep(self, made: Measured) -> Measured:
        """Keep no file: files of features hold many images, and are written where rows are."""
        return made


def measured(pixels: Pixels) -> Measured:
    """Measure all groups of an order.

    Raises:
        ImageError: masks, planes and cells do not fit each other.
    """
    order, regions = pixels.order, find_regions(pixels.masks)
    labels = regions.labels.tolist()
    if labels != sorted(order.cells):
        raise ImageError(
            f"The masks of {order.name} and its cells in the database differ. "
            "See what is wrong with: cellstore verify"
        )
    cell_ids = np.array([order.cells[label] for label in labels], np.int64)
    by_id = np.argsort(cell_ids)
    values = {}
    for name in order.groups:
        if name == BASIC_GROUP.name:
            assert pixels.plane is not None
            columns = measure_cells(regions, pixels.plane)
        else:
            columns = measure_channels(name, regions, pixels.channels)
        rows = [column for key, column in columns.items() if key != "label"]
        values[name] = np.stack(rows)[:, by_id]
    return Measured(cell_ids[by_id], values)


Mask = tuple[str, str]
Planes = Mapping[int, PlaneOrder | CellstoreError]


def orders_of(
    session: Session, tasks: Sequence[Task], wanted: Mapping[int, Sequence[GroupPlan]]
) -> dict[int, MeasureOrder | CellstoreError]:
    """Return by job what a worker needs, or why the image cannot be measured.

    ``wanted``: by image the groups to measure on it, one at least, all of the same cells and
    channels.
    """
    ids = [task.image_id for task in tasks]
    book = _Book(session, ids, wanted)
    return {task.job_id: book.order(task, wanted[task.image_id]) for task in tasks}


@dataclass
class _Book:
    """Masks, cells and files of some images."""

    session: Session
    image_ids: Sequence[int]
    wanted: Mapping[int, Sequence[GroupPlan]]

    def __post_init__(self) -> None:
        plans = {plan.name: plan for plans in self.wanted.values() for plan in plans}.values()
        self._source_id = next(iter(plans)).source.id
        self._masks = _masks(self.session, self._source_id, self.image_ids)
        self._cells = _cells(self.session, [number for number, _ in self._masks.values()])
        plane = next((plan.plane for plan in plans if plan.plane), None)
        self._planes = self._files(plane) if plane else {}
        channels = next((plan.channels for plan in plans if plan.channels), ())
        self._channels = self._files(ImageInput(channels)) if channels else {}

    def _files(self, wanted: ImageInput) -> Planes:
        return plane_orders(self.session, self.image_ids, wanted)

    def order(self, task: Task, plans: Sequence[GroupPlan]) -> MeasureOrder | CellstoreError:
        """The order of one image."""
        image_id = task.image_id
        if image_id not in self._masks:
            return _unknown(self.session, self._source_id, image_id)
        number, mask = self._masks[image_id]
        plane = self._planes.get(image_id) if any(plan.plane for plan in plans) else None
        names = next((plan.channels for plan in plans if plan.channels), ())
        channels = self._channels.get(image_id) if names else None
        for found in (plane, channels):
            if isinstance(found, CellstoreError):
                return found
        assert not isinstance(plane, CellstoreError)
        assert not isinstance(channels, CellstoreError)
        return MeasureOrder(
            task.name,
            mask,
            self._cells.get(number, {}),
            tuple(plan.name for plan in plans),
            plane,
            dict(zip(names, channels.files, strict=True)) if channels else {},
        )


def _masks(
    session: Session, source_id: int, image_ids: Sequence[int]
) -> dict[int, tuple[int, Mask]]:
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
    try:
        current_segmentation(session, source_id, image_id)
    except ImageError as error:
        return error
    return ImageError(
        "Another tool found these cells and their masks are unknown. "
        "If you have them, run: cellstore ingest masks DIR"
    )


MOST_TOGETHER = 400
"""Images whose measurements wait for each other, to be written in one file, at most."""

Pairs = Sequence[tuple[Task, Measured]]


class TakenOverError(RuntimeError):
    """Another process measured a group on an image while it was measured here, too."""


@dataclass(frozen=True)
class Target:
    """A group that is measured, and the run in whose name. ``beside``: in another's pass."""

    plan: GroupPlan
    tally: Tally
    beside: bool


@dataclass(frozen=True)
class Packed:
    """What is written of some images: of each group the images, and the files it has."""

    of_group: Mapping[str, Pairs]
    files: Mapping[str, Sequence[WrittenFile]]


def measure_work(workspace: Workspace, targets: Sequence[Target]) -> Work[MeasureOrder, Measured]:
    """Return what is done with each image; the first of ``targets`` is the one with the jobs."""
    writer = _Writer(workspace, targets)
    return Work(
        "measure",
        MeasureSteps(workspace.artifacts),
        writer.orders,
        writer.insert,
        pack=writer.pack,
        together=_rows_together(workspace, targets),
    )


def _rows_together(workspace: Workspace, targets: Sequence[Target]) -> int:
    """Images that fill a file, by what the first ones hold."""
    if all(target.plan.in_table for target in targets):
        return 1
    source_id = targets[0].plan.source.id
    query = select(Segmentation.n_cells).where(Segmentation.recipe_id == source_id).limit(1000)
    with workspace.database.read() as session:
        mean = session.scalar(select(func.avg(query.subquery().c.n_cells)))
    return max(1, min(MOST_TOGETHER, int(ROWS_OF_FILE / max(1.0, float(mean or 0)))))


@dataclass(frozen=True)
class _Writer:
    workspace: Workspace
    targets: Sequence[Target]

    def orders(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, MeasureOrder | CellstoreError]:
        """Return what workers need for the groups that the images lack."""
        lacking = [self._open(session, target, tasks) for target in self.targets]
        wanted = {
            task.image_id: [
                target.plan
                for target, images in zip(self.targets, lacking, strict=True)
                if task.image_id in images
            ]
            for task in tasks
        }
        return orders_of(session, tasks, wanted)

    def _open(self, session: Session, target: Target, tasks: Sequence[Task]) -> set[int]:
        if target.beside:
            return open_beside(session, target.tally.recipe_id, tasks)
        return {task.image_id for task in tasks}

    def pack(self, pairs: Pairs) -> Packed:
        """Write the files of groups that have some.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        of_group, files = {}, {}
        tasks = [task for task, _ in pairs]
        for target in self.targets:
            plan = target.plan
            with self.workspace.database.read() as session:
                images = self._open(session, target, tasks)
            mine = [
                (task, made)
                for task, made in pairs
                if task.image_id in images and plan.name in made.values
            ]
            of_group[plan.name] = mine
            if not plan.in_table:
                files[plan.name] = self._files(plan, [made for _, made in mine])
        return Packed(of_group, files)

    def _files(self, plan: GroupPlan, made: Sequence[Measured]) -> Sequence[WrittenFile]:
        made = [one for one in made if len(one.cell_ids)]
        if not made:
            return ()
        cell_ids = np.concatenate([one.cell_ids for one in made])
        values = np.concatenate([one.values[plan.name] for one in made], axis=1)
        order = np.argsort(cell_ids)
        schema = pa.schema([(feature.name, pa.float64()) for feature in plan.features])
        writer = FeatureWriter(self.workspace.artifacts, schema)
        try:
            writer.write(cell_ids[order], _batch(schema, values[:, order]))
            writer.finish()
        finally:
            writer.abandon()
        return writer.files

    def insert(self, session: Session, packed: Packed) -> None:
        """Write the rows, and close the jobs of the groups that are measured beside.

        Raises:
            TakenOverError: a file holds cells that another process has measured since.
        """
        counts = {}
        for target in self.targets:
            pairs = packed.of_group[target.plan.name]
            if target.beside:
                pairs = self._closed(session, target, pairs)
            if target.plan.in_table:
                _insert(session, target.tally, [made for _, made in pairs])
            else:
                self._register(session, target, packed.files[target.plan.name])
            counts[target.plan.name] = len(pairs), sum(len(made.cell_ids) for _, made in pairs)
        for target in self.targets:  # last, when nothing can go wrong any more
            images, cells = counts[target.plan.name]
            target.tally.add(session, cells, images if target.beside else 0)

    def _closed(self, session: Session, target: Target, pairs: Pairs) -> Pairs:
        tally, tasks = target.tally, [task for task, _ in pairs]
        closed = close_beside(session, tally.run_id, tally.recipe_id, tasks)
        if len(closed) < len(pairs) and not target.plan.in_table:
            raise TakenOverError(f"{target.plan.name} was measured by another process meanwhile.")
        return [(task, made) for task, made in pairs if task.image_id in closed]

    def _register(self, session: Session, target: Target, files: Sequence[WrittenFile]) -> None:
        query = select(FeatureSet.id).where(FeatureSet.recipe_id == target.tally.recipe_id)
        set_id = session.scalars(query).one()
        register_files(session, self.workspace.artifacts, set_id, target.tally.run_id, files)


def _batch(schema: pa.Schema, values: NDArray[np.float64]) -> pa.RecordBatch:
    """What a cell does not have (NaN) is null: averages in SQL pass over it."""
    arrays = [pa.array(row, from_pandas=True) for row in values]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _insert(session: Session, tally: Tally, made: Sequence[Measured]) -> None:
    names = [feature.name for feature in BASIC_GROUP.features]
    rows = []
    for one in made:
        columns = (one.cell_ids.tolist(), *one.values[BASIC_GROUP.name].tolist())
        keys = tally.recipe_id, tally.run_id
        rows += [(*row, *keys) for row in zip(*columns, strict=True)]
    bulk_insert(session, CellFeatures, ("cell_id", *names, "recipe_id", "run_id"), rows)


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
    dry_run: bool = False,
) -> MeasureResult:
    """Measure the cells found by one segment recipe (default: the one used last).

    Masks that another tool made are measured as our own. Intensities are those of the segmented
    plane unless ``params`` names another. Each group of features is a recipe and a run of its
    own; the files of an image are opened once for all of them. Returns what was done for the
    first group, with that of the others.

    Raises:
        UnknownNameError: nothing has been segmented, or no such recipe, plate, group or channel.
        UserInputError: the masks of that recipe's cells are unknown.
    """
    params = params or MeasureParams()
    with workspace.database.read() as session:
        source = _source(session, segmentation)
        images = segmented(images_of(session, selection), source.id)
        plans = plan_groups(session, params, source, images)

    def work_of(tallies: Tallies) -> Work[Any, Any]:
        targets = [
            Target(plans[place], tally, beside=number > 0)
            for number, (place, tally) in enumerate(tallies)
        ]
        return measure_work(workspace, targets)

    parts = [Part(plan.spec, plan.register) for plan in plans]
    results = execute_together(
        workspace, parts, images, work_of, resources=resources, dry_run=dry_run
    )
    return _together(plans, results)


def _together(plans: list[GroupPlan], results: list[JobsResult]) -> MeasureResult:
    first, *others = (
        (plan, {field.name: getattr(result, field.name) for field in fields(JobsResult)})
        for plan, result in zip(plans, results, strict=True)
    )
    beside = tuple(_result(*one) for one in others)
    return _result(*first, beside)


def _result(
    plan: GroupPlan, values: dict[str, Any], others: tuple[MeasureResult, ...] = ()
) -> MeasureResult:
    return MeasureResult(**values, group=plan.name, feature_set=plan.feature_set, others=others)


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
