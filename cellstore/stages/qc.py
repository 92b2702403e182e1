"""Quality control: measure the pixels of each image once, then flag what is odd on each plate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    Float,
    Select,
    and_,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import Session

from ..analysis.quality import WHITE_NOISE_SLOPE, Limits, PlaneQuality, plane_quality, robust_limits
from ..config import EVERYTHING, THIS_PROCESS, QcParams, Resources, Selection
from ..db.bulk import bulk_insert, insert_new
from ..enums import CellFlagReason, ImageFlagReason, Stage, Status
from ..errors import ImageError, UnknownNameError, UserInputError, some_of
from ..jobs.execute import ImageStage, RunCounter, run_jobs
from ..jobs.lookup import IS_CURRENT, channels_now, find_recipe, images_of
from ..jobs.planes import ChannelFile, channel_files, open_file
from ..jobs.queue import JobScope, Task, count_images
from ..jobs.runs import RecipeSpec, digest, register, running
from ..jobs.workspace import Workspace
from ..models import (
    Cell,
    CellFeatures,
    CellFlag,
    Image,
    ImageFile,
    ImageFlag,
    ImageQuality,
    Job,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Well,
)
from ..notebooks import Shown
from ..query.cells import last_with_masks
from ..query.exclusions import cell_counts, image_counts
from ..settings import track

PIXELS_VERSION = 1
VERSION = 1
MIN_CELLS = 50
"""A plate with fewer cells says nothing about which area is usual."""

_AT_ONCE = 20_000
_IMAGE_COLUMNS = ("run_id", "image_id", "reason", "channel", "value", "low", "high")
_CELL_COLUMNS = ("run_id", "cell_id", "reason", "value")

MEASURED = np.dtype(
    [("image_id", "i8")] + [(name, "f8") for name in ("slope", "background", "saturated", "std")]
)
Qualities = list[tuple[str, PlaneQuality]]
Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]
Row = tuple[Any, ...]


@dataclass(frozen=True)
class PlateSummary:
    """A plate after quality control.

    ``images`` have files, ``seen`` of them were looked at, ``flagged`` have a flag; ``by_reason``
    counts images by reason (an image may have several). ``cells`` count, ``excluded`` do
    not, flags aside; ``cells_flagged`` have a flag, ``cells_by_reason`` counts them by reason.
    """

    plate: str
    images: int = 0
    seen: int = 0
    flagged: int = 0
    by_reason: Mapping[str, int] = field(default_factory=dict)
    cells: int = 0
    excluded: int = 0
    cells_flagged: int = 0
    cells_by_reason: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FlaggedImage(Shown):
    """A flag of an image: its ``value`` is not from ``low`` to ``high``.

    ``channel`` is empty where the reason is about the whole image.
    """

    image_id: int
    plate: str
    well: str
    site: int
    core_name: str
    reason: str
    channel: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class QcResult(Shown):
    """What quality control did and found.

    ``run_id`` is None when there was nothing to look at; ``already_done``: this run found the same
    before. ``selected``, ``waiting``, ``done``, ``failures`` and ``failed_before`` as in
    ``JobsResult``. ``segment_recipe``: whose cells, None: none; ``measure_recipe``: whose areas.
    ``notes`` are sentences that a reader of the numbers has to know; ``flags`` are listed where
    they are asked for.
    """

    run_id: int | None = None
    already_done: bool = False
    segment_recipe: int | None = None
    measure_recipe: int | None = None
    selected: int = 0
    waiting: int = 0
    done: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    failed_before: int = 0
    plates: tuple[PlateSummary, ...] = ()
    notes: tuple[str, ...] = ()
    flags: tuple[FlaggedImage, ...] = ()
    html: str | None = None


def qc(
    workspace: Workspace,
    params: QcParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    segmentation: str | None = None,
    resources: Resources = THIS_PROCESS,
) -> QcResult:
    """Measure the pixels of the selected images, and flag what is odd; see :meth:`Store.qc`.

    An image is opened once, whatever the limits. It is compared with all images of its plate that
    have been looked at, not only with selected ones. Cells are those of one segment recipe
    (default: the one used last, if any), their areas those of its last measurement. Where nothing
    has changed since a run with the same limits, that run is returned.
    """
    params = params or QcParams()
    if params.outlier <= 0 or params.cell_outlier <= 0:
        raise UserInputError("The numbers of robust standard deviations must be above 0.")
    with workspace.database.read() as session:
        images = images_of(session, selection)
    with workspace.database.begin() as session:
        quality = register(session, quality_spec())
        segment = _segment_of(session, segmentation)
        measure = None if segment is None else _measure_of(session, segment)
        inputs = tuple(source for source in (quality, segment, measure) if source is not None)
        recipe = register(session, RecipeSpec(Stage.QC, VERSION, asdict(params), None, inputs))
        state = count_images(session, quality.id, images)
        seen = images.where(Image.content_sha256.is_not(None))
        on_plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id).join(Image)
        plates = sorted(session.scalars(on_plates.where(Image.id.in_(seen)).distinct()))
        earlier = None if state.todo else _earlier(session, recipe, plates)
    if not plates:
        return QcResult(selected=state.selected, waiting=state.waiting)
    did, run_id = RunCounter(0, quality.id), earlier
    if run_id is None:
        with running(workspace.database, recipe) as run:
            if state.todo:
                scope = JobScope({quality.id: run.id}, images)
                did = run_jobs(workspace, MeasureQuality(), scope, resources)[quality.id]
            failed = len(did.failures)
            run.result = {"images": did.images, "failed": failed, "plates": plates}
            with workspace.database.read() as session:
                flagging = flagging_of(session, run.id)
                rows = select(Plate.id).where(Plate.barcode.in_(plates)).order_by(Plate.barcode)
                plate_ids = session.scalars(rows).all()
                run.result["state"] = _state(session, flagging, plates)
            for plate_id in track(workspace.progress, "flag", len(plate_ids), plate_ids):
                with workspace.database.begin() as session:
                    flag_plate(session, flagging, plate_id)
            if failed and not did.images and not state.done:  # never the latest, then
                run.error = f"None of the {failed} images could be looked at."
        run_id = run.id
    with workspace.database.read() as session:
        flagging = flagging_of(session, run_id)
        found_on = summaries(session, flagging, plates)
    return QcResult(
        run_id=run_id,
        already_done=earlier is not None,
        segment_recipe=flagging.segment_id,
        measure_recipe=flagging.measure_id,
        selected=state.selected,
        waiting=state.waiting,
        done=did.images,
        failures=tuple(did.failures),
        failed_before=state.failed,
        plates=found_on,
        notes=_notes(flagging, found_on),
    )


def _segment_of(session: Session, segmentation: str | None) -> Recipe | None:
    """The segment recipe of this name; else the one used last, if there is any."""
    if segmentation is not None:
        return find_recipe(session, Stage.SEGMENT, segmentation)
    try:
        return last_with_masks(session)
    except UnknownNameError:  # then the cells that came last from another tool, if any
        last = select(Recipe).join(Segmentation, Segmentation.recipe_id == Recipe.id)
        return session.scalars(last.order_by(Segmentation.id.desc()).limit(1)).first()


def _measure_of(session: Session, segment: Recipe) -> Recipe | None:
    """The measure recipe of these cells that was used last and knows areas."""
    areas = exists().where(CellFeatures.recipe_id == Recipe.id, CellFeatures.area.is_not(None))
    query = (
        select(Recipe)
        .join(RecipeInput, RecipeInput.recipe_id == Recipe.id)
        .join(Run, Run.recipe_id == Recipe.id)
        .where(RecipeInput.input_id == segment.id, Recipe.stage == Stage.MEASURE, areas)
        .order_by(Run.id.desc())
    )
    return session.scalars(query.limit(1)).first()


def _earlier(session: Session, recipe: Recipe, plates: Sequence[str]) -> int | None:
    """The newest finished run of these limits, if it saw these plates as they are now."""
    query = select(Run).where(Run.recipe_id == recipe.id, Run.status == Status.DONE)
    run = session.scalars(query.order_by(Run.id.desc()).limit(1)).first()
    if run is None or run.result is None or not set(plates) <= set(run.result["plates"]):
        return None
    now = _state(session, flagging_of(session, run.id), run.result["plates"])
    return run.id if run.result["state"] == now else None


def _state(session: Session, flagging: Flagging, plates: Sequence[str]) -> str:
    """A digest of all that the flags of some plates depend on beside the recipe."""
    segmented = and_(IS_CURRENT, Segmentation.recipe_id == flagging.segment_id)
    query = (
        select(Image.id, Image.content_sha256, Segmentation.id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Segmentation, segmented)
        .add_columns(_done(flagging.quality_id), _done(flagging.measure_id))
        .where(Plate.barcode.in_(plates))
        .order_by(Image.id, Segmentation.id)
    )
    digest = hashlib.sha256()
    for row in session.execute(query.execution_options(yield_per=10_000)):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def _done(recipe_id: int | None) -> Any:
    job = exists().where(Job.recipe_id == recipe_id, Job.image_id == Image.id)
    return job.where(Job.content_sha256 == Image.content_sha256, Job.status == Status.DONE)


def _notes(flagging: Flagging, plates: Sequence[Any]) -> tuple[str, ...]:
    notes = []
    few = [plate.plate for plate in plates if plate.seen < flagging.params.min_images]
    if few:
        notes.append(
            f"Too few images to say what is usual on {some_of(few)}: only saturated and empty "
            f"images are flagged there. See --min-images, now {flagging.params.min_images}."
        )
    if flagging.segment_id is None:
        notes.append("No cells yet, so only pixels were looked at. Run: cellstore segment")
    elif flagging.measure_id is None:
        notes.append("The cells are not measured, so their areas are unknown: cellstore measure")
    return tuple(notes)


# --- image by image: the quality of its pixels ----------------------------------------------------


def quality_spec() -> RecipeSpec:
    """Return the recipe of the numbers; limits are another's, so that they may change."""
    names = [item.name for item in fields(PlaneQuality)]
    return RecipeSpec(Stage.QC, PIXELS_VERSION, {"measures": names})


@dataclass(frozen=True)
class MeasureQuality(ImageStage[Sequence[ChannelFile], Qualities]):
    """The part of the stage that goes image by image: the quality of each channel, as rows."""

    label = "look at pixels"

    def fetch(self, session: Session, tasks: Sequence[Task]) -> Mapping[int, Sequence[ChannelFile]]:
        """Return by image id the files of its channels."""
        return channel_files(session, [task.image_id for task in tasks])

    def read(self, task_input: Sequence[ChannelFile]) -> list[tuple[str, NDArray[Any]]]:
        """Return the plane (H, W) of each channel, which has the name that recipes give it."""
        return [(file.in_recipes, open_file(file)) for file in task_input]

    def compute(self, loaded: Any) -> Qualities:
        """Return the quality of each channel."""
        qualities = []
        for channel, plane in loaded:
            try:
                qualities.append((channel, plane_quality(plane)))
            except ValueError as error:
                raise ImageError(
                    f"Channel {channel} has no pixel that is a number. Export the field again."
                ) from error
        return qualities

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, Qualities]],
        files: Any,
    ) -> int:
        """Write a row for each channel."""
        rows = [
            {
                "image_id": task.image_id,
                "content_sha256": task.content_sha256,
                "channel": channel,
                **asdict(quality),
                "recipe_id": run.recipe_id,
                "run_id": run.run_id,
            }
            for task, qualities in done
            for channel, quality in qualities
        ]
        if rows:
            session.execute(insert(ImageQuality), rows)
        return 0

    def digest(self, recipe_id: int, output: Qualities) -> str:
        """Return the digest of the numbers of all channels, by name."""
        return digest(sorted([channel, *astuple(quality)] for channel, quality in output))


# --- plate by plate: what is odd ------------------------------------------------------------------


@dataclass(frozen=True)
class Flagging:
    """By which limits a run flags, and by whose rows: recipes of quality, cells and areas."""

    run_id: int
    params: QcParams
    quality_id: int
    segment_id: int | None
    measure_id: int | None


def flagging_of(session: Session, run_id: int) -> Flagging:
    """Return by which limits, and from whose rows, a quality-control run flags."""
    recipe = session.get_one(Run, run_id).recipe
    ids = {source.stage: source.id for source in recipe.inputs}
    params = QcParams.from_recipe(recipe.parameters)
    return Flagging(run_id, params, ids[Stage.QC], ids.get(Stage.SEGMENT), ids.get(Stage.MEASURE))


def flag_plate(session: Session, flagging: Flagging, plate_id: int) -> None:
    """Write the flags of a plate's images and cells, as they are now."""
    params, rows = flagging.params, list[Row]()

    def usual(values: Numbers, *, log: bool = False) -> Limits | None:
        """What is usual on the plate; None: there are too few images to say."""
        if np.isfinite(values).sum() < params.min_images:
            return None
        return robust_limits(values, params.outlier, log=log)

    def flag(
        reason: ImageFlagReason, ids: Ids, values: Numbers, limits: Limits | None, channel: str = ""
    ) -> None:
        """Flag the images whose value is below or above its limits; None: no image is."""
        if limits is None:
            return
        low, high = (x if np.isfinite(x) else None for x in (limits.low, limits.high))
        outside = limits.outside(values)
        for image_id, value in zip(ids[outside].tolist(), values[outside].tolist(), strict=True):
            rows.append((flagging.run_id, image_id, reason.value, channel, value, low, high))

    noisy: dict[int, list[float]] = {}
    for name, of_channel in channels_of(session, flagging, plate_id).items():
        ids, slopes, backgrounds, saturated, stds = (
            of_channel[key] for key in MEASURED.names or ()
        )
        focus = usual(slopes)
        blurred = None if focus is None else Limits(focus.low, np.inf)
        flag(ImageFlagReason.OUT_OF_FOCUS, ids, slopes, blurred, name)
        flag(ImageFlagReason.BACKGROUND, ids, backgrounds, usual(backgrounds), name)
        white = Limits(-np.inf, params.saturated)
        flag(ImageFlagReason.SATURATED, ids, saturated, white, name)
        # Noise is what has the power spectrum of noise, or none, and varies less than is usual: a
        # spectrum alone would not tell it from small spots everywhere.
        varying = usual(stds, log=True)
        dull = stds < (varying.low if varying else 0)
        slopes = np.where(stds == 0, WHITE_NOISE_SLOPE, slopes)
        noise = np.where(dull & np.isfinite(slopes), slopes, -np.inf)
        for image_id, slope in zip(ids.tolist(), noise.tolist(), strict=True):
            noisy.setdefault(image_id, []).append(slope)
    # An image is noise if all its channels are; its value is that of the least noisy one.
    noisy_ids = np.array([*noisy], np.int64)
    lowest = np.array([min(slopes) for slopes in noisy.values()], np.float64)
    flag(ImageFlagReason.NO_SIGNAL, noisy_ids, lowest, Limits(-np.inf, params.noise))
    if flagging.segment_id is not None:
        ids, counts = counts_by_image(session, flagging, plate_id)
        none, some = counts == 0, counts > 0
        flag(ImageFlagReason.NO_CELLS, ids[none], counts[none], Limits(1.0, np.inf))
        number = usual(counts[some], log=True)
        flag(ImageFlagReason.CELL_COUNT, ids[some], counts[some], number)
        if flagging.measure_id is not None:
            image_ids, cell_ids, areas = _areas(session, flagging, plate_id)
            ids, medians = _medians(image_ids, areas)
            flag(ImageFlagReason.CELL_AREA, ids, medians, usual(medians, log=True))
            limits = robust_limits(areas, params.cell_outlier, log=True)
            if limits is not None and len(areas) >= MIN_CELLS:
                odd = limits.outside(areas)
                flags = [
                    (flagging.run_id, cell_id, CellFlagReason.AREA.value, area)
                    for cell_id, area in zip(
                        cell_ids[odd].tolist(), areas[odd].tolist(), strict=True
                    )
                ]
                bulk_insert(session, CellFlag, _CELL_COLUMNS, flags)
        if params.border:
            _flag_border(session, flagging, plate_id)
    bulk_insert(session, ImageFlag, _IMAGE_COLUMNS, rows)


def channels_of(session: Session, flagging: Flagging, plate_id: int) -> dict[str, NDArray[Any]]:
    """Return what was measured of each channel of a plate: rows of ``MEASURED``."""
    quality = ImageQuality
    query = (
        select(quality.channel, quality.image_id, quality.power_log_log_slope)
        .add_columns(quality.background, quality.saturated, quality.std)
        .join(Image, looked_at(flagging.quality_id))
        .join(Well, Well.id == Image.well_id)
        .where(Well.plate_id == plate_id, image_counts())
        .order_by(quality.image_id)
    )
    by_channel: dict[str, list[Row]] = {}
    for channel, *values in session.execute(query.execution_options(yield_per=_AT_ONCE)):
        by_channel.setdefault(channel, []).append(tuple(values))
    return {name: np.array(rows, MEASURED) for name, rows in sorted(by_channel.items())}


def looked_at(quality_id: int) -> Any:
    """Return the condition that joins an image to its quality, as its bytes are now."""
    return and_(
        ImageQuality.image_id == Image.id,
        ImageQuality.recipe_id == quality_id,
        ImageQuality.content_sha256 == Image.content_sha256,
    )


def counts_by_image(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Numbers]:
    """Return the segmented images of a plate, and how many cells count in each."""
    counted = func.count(Cell.id).filter(cell_counts())
    query = _segmentations(flagging, plate_id)
    query = query.outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
    rows = session.execute(query.with_only_columns(Image.id, counted).group_by(Image.id)).all()
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    return ids, np.array([row[1] for row in rows], dtype=np.float64)


def areas_by_image(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Numbers]:
    """Return the images of a plate that have measured cells, and the median area in each."""
    image_ids, _, areas = _areas(session, flagging, plate_id)
    return _medians(image_ids, areas)


def _medians(image_ids: Ids, areas: Numbers) -> tuple[Ids, Numbers]:
    """Medians of runs of the same image."""
    images, starts = np.unique(image_ids, return_index=True)
    parts = np.split(areas, starts[1:]) if len(images) else []
    return images, np.array([np.median(some) for some in parts], dtype=np.float64)


def _areas(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Ids, Numbers]:
    """Image, cell and area of every cell that counts and is measured, by image."""
    measured = and_(CellFeatures.cell_id == Cell.id, CellFeatures.recipe_id == flagging.measure_id)
    query = (
        _segmentations(flagging, plate_id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(CellFeatures, measured)
        .where(cell_counts(), CellFeatures.area > 0)
        .with_only_columns(Image.id, Cell.id, CellFeatures.area)
        .order_by(Image.id)
    )
    parts = [np.empty((3, 0))]
    for block in session.execute(query.execution_options(yield_per=_AT_ONCE)).partitions():
        parts.append(np.array([tuple(row) for row in block], dtype=np.float64).T)
    images, cells, areas = np.concatenate(parts, axis=1)  # ids are exact in float64, to 2**53
    return images.astype(np.int64), cells.astype(np.int64), areas


def _flag_border(session: Session, flagging: Flagging, plate_id: int) -> None:
    """Flag the cells whose box reaches the edge of the image; a box that is unknown does not."""
    size = select(
        ImageFile.image_id,
        func.max(ImageFile.height).label("height"),
        func.max(ImageFile.width).label("width"),
    )
    size = size.join(Image, Image.id == ImageFile.image_id).join(Well, Well.id == Image.well_id)
    sizes = size.where(Well.plate_id == plate_id).group_by(ImageFile.image_id).subquery()
    at_edge = or_(
        *(Cell.min_row == 0, Cell.min_col == 0),
        *(Cell.max_row >= sizes.c.height, Cell.max_col >= sizes.c.width),
    )
    columns: tuple[Any, ...] = (
        literal(flagging.run_id),
        Cell.id,
        literal(CellFlagReason.BORDER.value),
        literal(None, Float(53)),
    )
    rows = (
        _segmentations(flagging, plate_id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(sizes, sizes.c.image_id == Image.id)
        .where(cell_counts(), at_edge)
        .with_only_columns(*columns)
    )
    insert_new(session, CellFlag, rows, _CELL_COLUMNS)


def _segmentations(flagging: Flagging, plate_id: int) -> Select[Any]:
    return (
        select(Image.id)
        .join(Segmentation, IS_CURRENT)
        .join(Well, Well.id == Image.well_id)
        .where(Well.plate_id == plate_id, Segmentation.recipe_id == flagging.segment_id)
        .where(image_counts())
    )


# --- what a run found -----------------------------------------------------------------------------


def summaries(
    session: Session, flagging: Flagging, barcodes: Sequence[str]
) -> tuple[PlateSummary, ...]:
    """Return what a run found on each of some plates."""
    images = select(Plate.barcode).select_from(Image).join(Well, Well.id == Image.well_id)
    images = images.join(Plate, Plate.id == Well.plate_id).where(Plate.barcode.in_(barcodes))
    of_run = and_(ImageFlag.image_id == Image.id, ImageFlag.run_id == flagging.run_id)
    flags = images.join(ImageFlag, of_run)
    counts: dict[str, tuple[Any, ...]] = {
        "images": (images.where(Image.content_sha256.is_not(None)), Image.id),
        "seen": (images.join(ImageQuality, looked_at(flagging.quality_id)), Image.id),
        "flagged": (flags, Image.id),
        "by_reason": (flags, Image.id, ImageFlag.reason),
    }
    if flagging.segment_id is not None:
        cells = images.join(Segmentation, IS_CURRENT)
        cells = cells.where(Segmentation.recipe_id == flagging.segment_id)
        cells = cells.join(Cell, Cell.segmentation_id == Segmentation.id)
        mine = and_(CellFlag.cell_id == Cell.id, CellFlag.run_id == flagging.run_id)
        counts |= {
            "cells": (cells.where(image_counts(), cell_counts()), Cell.id),
            "excluded": (cells.where(~and_(image_counts(), cell_counts())), Cell.id),
            "cells_flagged": (cells.join(CellFlag, mine), Cell.id),
            "cells_by_reason": (cells.join(CellFlag, mine), Cell.id, CellFlag.reason),
        }
    found: dict[str, dict[str, Any]] = {name: {} for name in barcodes}
    for name, (query, what, *reason) in counts.items():
        keys = (Plate.barcode, *reason)
        counted = query.with_only_columns(*keys, func.count(what.distinct())).group_by(*keys)
        for barcode, *reasons, number in session.execute(counted):
            if reasons:
                found[barcode].setdefault(name, {})[reasons[0].value] = number
            else:
                found[barcode][name] = number
    return tuple(PlateSummary(plate, **numbers) for plate, numbers in found.items())


def list_flags(workspace: Workspace, result: QcResult) -> tuple[FlaggedImage, ...]:
    """Return all flags of images that a run has on the plates of ``result``."""
    if result.run_id is None:
        return ()
    plates = [plate.plate for plate in result.plates]
    with workspace.database.read() as session:
        return tuple(flagged_images(session, result.run_id, plates))


def flagged_images(
    session: Session, run_id: int, barcodes: Sequence[str]
) -> Iterator[FlaggedImage]:
    """Yield the flags of a run on some plates, in the order of plate, well and site.

    Channels have the names that they have now.
    """
    now = {plate: channels_now(session, plate) for plate in barcodes}
    query = (
        select(
            *(Image.id, Plate.barcode, Well.name, Image.site, Image.core_name),
            *(ImageFlag.reason, ImageFlag.channel, ImageFlag.value, ImageFlag.low, ImageFlag.high),
        )
        .join(ImageFlag, and_(ImageFlag.image_id == Image.id, ImageFlag.run_id == run_id))
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Plate.barcode.in_(barcodes))
        .order_by(
            Plate.barcode,
            Well.well_row,
            Well.well_column,
            Image.site,
            Image.plane,
            Image.time_point,
        )
        .order_by(Image.id, ImageFlag.reason, ImageFlag.channel)
    )
    for row in session.execute(query.execution_options(yield_per=1_000)):
        image, limits = (row.name, row.site, row.core_name), (row.value, row.low, row.high)
        channel = now[row.barcode].get(row.channel, row.channel)
        yield FlaggedImage(row.id, row.barcode, *image, row.reason.value, channel, *limits)
