"""Redo a run in a store of its own, and compare; what carries it out is handed in.

The stages are not called from here: who asks for the redo passes what runs an order on a store.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.orm import Session

from ..artifacts import BorrowingFolder
from ..config import PredictParams, SplitParams, TrainParams
from ..db.bulk import in_lists
from ..db.models import (
    METADATA,
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    Job,
    Label,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Treatment,
    Well,
)
from ..db.quality_models import CellFlag, ImageFlag
from ..db.session import connect, sqlite_url
from ..db.split_models import Split, SplitMember
from ..db.types import Base
from ..enums import ArtifactKind, FeatureStorage, Stage, Status
from ..errors import CellstoreError, UserInputError
from ..jobs.lookup import run_in
from ..jobs.runs import code_version, environment
from ..jobs.workspace import Workspace
from ..settings import StoreSettings
from .repro import (
    DIFFERENT,
    EQUAL,
    FROM_FILE,
    IDENTICAL,
    IMPOSSIBLE,
    Check,
    Order,
    input_of,
    order_of,
)

SCRATCH_ROWS = 5_000
"""Rows that are copied at once."""

IMAGES = 500


@dataclass(frozen=True)
class Wanted:
    """What a redo needs beside the small tables, which are copied whole.

    ``images`` by id; ``segmented``: recipes whose segmentations come along, ``with_cells`` those
    of them whose cells do; ``measured``: recipes whose measurements do; ``files_of``: runs whose
    files do; ``qc``: the run whose flags count; ``splits``: whether splits are there already.
    """

    images: Sequence[int]
    segmented: Collection[int] = ()
    with_cells: Collection[int] = ()
    measured: Collection[int] = ()
    files_of: Collection[int] = ()
    qc: int | None = None
    splits: bool = True


@contextmanager
def scratch_store(workspace: Workspace, wanted: Wanted) -> Iterator[Workspace]:
    """Yield a store of its own with copies of the rows; nothing is written to ``workspace``."""
    with tempfile.TemporaryDirectory(prefix="cellstore-redo-", ignore_cleanup_errors=True) as name:
        settings = StoreSettings(Path(name).resolve())
        database = connect(sqlite_url(settings.sqlite))
        try:
            # Without the triggers, which guard what people do: rows come as is easiest to copy.
            METADATA.create_all(database.engine)
            folder = BorrowingFolder(settings.artifacts, workspace.artifacts)
            opened = Workspace(settings, database, folder, workspace.progress)
            _fill(workspace, opened, wanted)
            yield opened
        finally:
            database.close()


def _fill(source: Workspace, target: Workspace, wanted: Wanted) -> None:
    with source.database.read() as reader, target.database.begin() as writer:
        copier = _Copier(reader, writer)
        copier.small_tables(wanted)
        for some in in_lists(list(wanted.images), IMAGES):
            copier.images(some, wanted)
        copier.files(wanted)


@dataclass(frozen=True)
class _Copier:
    reader: Session
    writer: Session

    def small_tables(self, wanted: Wanted) -> None:
        """Copy what does not grow with the images, and the wells."""
        tables: list[type[Base]] = [Folder, Plate, Treatment, Well, Recipe, RecipeInput, Label]
        tables.append(Split)
        for table in tables:
            self.copy(table, select(table.__table__))
        self.copy(Run, select(Run.__table__).order_by(Run.id))  # parents before children
        self.copy(FeatureSet, select(FeatureSet.__table__))
        if not wanted.splits:
            self.writer.execute(update(Run).values(split_id=None))
            self.writer.execute(delete(Split))

    def images(self, some: Sequence[int], wanted: Wanted) -> None:
        """Copy some images and what was found in them."""
        self.copy(Image, select(Image.__table__).where(Image.id.in_(some)))
        self.copy(ImageFile, select(ImageFile.__table__).where(ImageFile.image_id.in_(some)))
        if wanted.splits:
            members = select(SplitMember.__table__).where(SplitMember.image_id.in_(some))
            self.copy(SplitMember, members)
        found = select(Segmentation.__table__).where(
            Segmentation.image_id.in_(some), Segmentation.recipe_id.in_(wanted.segmented)
        )
        for column in (Segmentation.mask_artifact_id, Segmentation.flow_artifact_id):
            self.artifacts(found.with_only_columns(column).where(column.is_not(None)))
        self.copy(Segmentation, found)
        cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        cells = cells.where(Segmentation.image_id.in_(some))
        cells = cells.where(Segmentation.recipe_id.in_(wanted.with_cells))
        self.copy(Cell, select(Cell.__table__).where(Cell.id.in_(cells)))
        self._measurements(some, cells, wanted)

    def _measurements(self, some: Sequence[int], cells: Select[Any], wanted: Wanted) -> None:
        values = select(CellFeatures.__table__).where(CellFeatures.cell_id.in_(cells))
        self.copy(CellFeatures, values.where(CellFeatures.recipe_id.in_(wanted.measured)))
        jobs = select(Job.__table__).where(Job.image_id.in_(some))
        self.copy(Job, jobs.where(Job.recipe_id.in_(wanted.measured), Job.status == Status.DONE))
        if wanted.qc is not None:
            of_cells = select(CellFlag.__table__).where(CellFlag.cell_id.in_(cells))
            self.copy(CellFlag, of_cells.where(CellFlag.run_id == wanted.qc))
            of_images = select(ImageFlag.__table__).where(ImageFlag.image_id.in_(some))
            self.copy(ImageFlag, of_images.where(ImageFlag.run_id == wanted.qc))

    def files(self, wanted: Wanted) -> None:
        """Copy the rows of the files of runs, and of feature sets."""
        of_runs = select(RunArtifact.__table__).where(RunArtifact.run_id.in_(wanted.files_of))
        self.artifacts(of_runs.with_only_columns(RunArtifact.artifact_id))
        self.copy(RunArtifact, of_runs)
        sets = select(FeatureSet.id).where(FeatureSet.recipe_id.in_(wanted.measured))
        files = select(FeatureFile.__table__).where(FeatureFile.feature_set_id.in_(sets))
        self.artifacts(files.with_only_columns(FeatureFile.artifact_id))
        self.copy(FeatureFile, files)

    def artifacts(self, ids: Select[Any]) -> None:
        """Copy rows of files that are not there yet."""
        rows = self.reader.execute(select(Artifact.__table__).where(Artifact.id.in_(ids)))
        there = set(self.writer.scalars(select(Artifact.id)))
        new = [dict(row) for row in rows.mappings() if row["id"] not in there]
        if new:
            self.writer.execute(insert(_rows(Artifact)), new)

    def copy(self, table: type[Base], query: Select[Any]) -> None:
        """Copy the rows of a query, a piece at a time."""
        result = self.reader.execute(query.execution_options(yield_per=SCRATCH_ROWS))
        for part in result.mappings().partitions(SCRATCH_ROWS):
            self.writer.execute(insert(_rows(table)), [dict(row) for row in part])


def _rows(table: type[Base]) -> Any:
    """The table itself: rows of it need not be made objects."""
    return table.__table__


SHOWN = 5
ROWS = 10_000

TOLERANCE = 1e-4
"""Of probabilities and metrics: what 32-bit sums in another order change at most, with room."""

TOLERANCE_OF_FEATURES = 1e-9
"""Of measurements, relative: they are sums in 64 bits."""

TIMES = ("seconds", "waited")
"""Metrics of a training that are about the machine."""


@dataclass
class Tally:
    """How much was compared, and the first differences."""

    what: str
    tolerance: float
    compared: int = 0
    differ: int = 0
    largest: float = 0.0
    differences: list[str] = field(default_factory=list)

    def count(self, named: str, then: Any, now: Any) -> None:
        """Compare one thing: numbers within the tolerance, everything else for equality."""
        self.compared += 1
        if then == now:
            return
        if isinstance(then, float) and isinstance(now, float):
            if math.isnan(then) and math.isnan(now):
                return
            gap = abs(then - now)
            self.largest = max(self.largest, gap if math.isfinite(gap) else math.inf)
            if gap <= self.tolerance:
                return
        self.differ += 1
        if len(self.differences) < SHOWN:
            self.differences.append(f"{named}: {_shown(then)} before, {_shown(now)} now")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


Keyed = tuple[Any, tuple[Any, ...]]


def merged(
    then: Iterable[Keyed], now: Iterable[Keyed]
) -> Iterator[tuple[Any, tuple[Any, ...] | None, tuple[Any, ...] | None]]:
    """Yield each key of two series that ascend by key, with the values of both; None: not there."""
    olds, news = iter(then), iter(now)
    old, new = next(olds, None), next(news, None)
    while old is not None or new is not None:
        if new is None or (old is not None and old[0] < new[0]):
            assert old is not None
            yield old[0], old[1], None
            old = next(olds, None)
        elif old is None or new[0] < old[0]:
            yield new[0], None, new[1]
            new = next(news, None)
        else:
            yield old[0], old[1], new[1]
            old, new = next(olds, None), next(news, None)


def compare_predictions(
    then: Session, now: Session, runs: tuple[int, int], cells: Select[Any] | None
) -> Tally:
    """Compare labels and probabilities of each cell and rank; ``cells``: of these alone."""
    tally = Tally("predictions", TOLERANCE)
    old = _predictions(then, runs[0], cells)
    for (cell, rank), before, after in merged(old, _predictions(now, runs[1], None)):
        named = f"cell {cell}, rank {rank}"
        if before is None or after is None:
            tally.count(named, before and before[0], after and after[0])
        elif before[0] != after[0]:
            tally.count(named, f"{before[0]} {before[1]:.4f}", f"{after[0]} {after[1]:.4f}")
        else:
            tally.count(f"{named}, {before[0]}", before[1], after[1])
    return tally


def _predictions(session: Session, run_id: int, cells: Select[Any] | None) -> Iterator[Keyed]:
    query = (
        select(Prediction.cell_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.run_id == run_id)
        .order_by(Prediction.cell_id, Prediction.rank)
    )
    if cells is not None:
        query = query.where(Prediction.cell_id.in_(cells))
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield (row[0], row[1]), (row[2], row[3])


def compare_trainings(then: Session, now: Session, runs: tuple[int, int]) -> Tally:
    """Compare the tensors of the checkpoints by sha256; where they differ, the metrics decide."""
    tally = Tally("checkpoints and metrics", TOLERANCE)
    before, after = _tensors(then, runs[0]), _tensors(now, runs[1])
    if before == after:
        tally.count("checkpoint", before, after)
    else:
        tally.compared += 1
        tally.largest = math.ulp(1.0)  # not the same bits, whatever the metrics say
        tally.differences.append(f"checkpoint: sha256 {before[:12]} before, {after[:12]} now")
    old, new = _metrics(then, runs[0]), _metrics(now, runs[1])
    for (epoch, name), first, second in merged(old, new):
        tally.count(f"{name} of epoch {epoch}", first and first[0], second and second[0])
    if before != after and tally.compared == 1:  # a baseline has no metrics that could decide
        tally.differ += 1
    return tally


def _tensors(session: Session, run_id: int) -> str:
    query = (
        select(Artifact.sha256)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id, Artifact.kind == ArtifactKind.CHECKPOINT)
        .where(Artifact.path.like("%.safetensors"))
    )
    return session.scalars(query.order_by(Artifact.id)).first() or "none"


def _metrics(session: Session, run_id: int) -> Iterator[Keyed]:
    query = select(RunMetric.epoch, RunMetric.name, RunMetric.value)
    query = query.where(RunMetric.run_id == run_id, RunMetric.name.not_in(TIMES))
    rows = [((row[0], row[1]), (row[2],)) for row in session.execute(query)]
    yield from sorted(rows, key=lambda row: row[0])


def compare_masks(
    then: Session, now: Session, runs: tuple[int, int], images: Sequence[int]
) -> Tally:
    """Compare the masks of images by sha256, and how many cells they have."""
    tally = Tally("images' masks", 0.0)
    pairs = merged(_masks(then, runs[0], images), _masks(now, runs[1], images))
    for image, before, after in pairs:
        tally.count(f"image {image}", before and _mask(*before), after and _mask(*after))
    return tally


def _mask(sha256: str | None, cells: int) -> str:
    return f"{cells} cells in masks {(sha256 or 'unknown')[:12]}"


def _masks(session: Session, run_id: int, images: Sequence[int]) -> Iterator[Keyed]:
    query = (
        select(Segmentation.image_id, Artifact.sha256, Segmentation.n_cells)
        .outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
        .where(Segmentation.image_id.in_(images), Segmentation.run_id == run_id)
        .order_by(Segmentation.image_id)
    )
    for row in session.execute(query):
        yield row[0], (row[1], row[2])


def compare_features(
    then: Session, now: Session, recipes: tuple[int, int], cells: Select[Any]
) -> Tally:
    """Compare the built-in measurements of cells, value by value."""
    tally = Tally("measurements", TOLERANCE_OF_FEATURES)
    old, new = _features(then, recipes[0], cells), _features(now, recipes[1], None)
    names = _feature_columns()
    compare_values(tally, names, merged(old, new))
    return tally


def compare_values(
    tally: Tally,
    names: Sequence[str],
    pairs: Iterable[tuple[Any, tuple[Any, ...] | None, tuple[Any, ...] | None]],
) -> None:
    """Compare rows of numbers, each by its relative difference."""
    for cell, before, after in pairs:
        if before is None or after is None:
            told = ("measured", None) if after is None else (None, "measured")
            tally.count(f"cell {cell}", *told)
            continue
        for name, first, second in zip(names, before, after, strict=True):
            _relative(tally, f"{name} of cell {cell}", first, second)


def _relative(tally: Tally, named: str, then: Any, now: Any) -> None:
    if isinstance(then, float) and isinstance(now, float) and then != now:
        size = max(abs(then), abs(now))
        gap = abs(then - now) / size if size and math.isfinite(size) else math.nan
        if gap <= tally.tolerance:
            tally.compared += 1
            tally.largest = max(tally.largest, gap)
            return
    tally.count(named, then, now)


def _feature_columns() -> list[str]:
    keys = ("cell_id", "recipe_id", "run_id")
    return [column.name for column in CellFeatures.__table__.columns if column.name not in keys]


def _features(session: Session, recipe_id: int, cells: Select[Any] | None) -> Iterator[Keyed]:
    columns = [getattr(CellFeatures, name) for name in _feature_columns()]
    query = select(CellFeatures.cell_id).add_columns(*columns)
    query = query.where(CellFeatures.recipe_id == recipe_id).order_by(CellFeatures.cell_id)
    if cells is not None:
        query = query.where(CellFeatures.cell_id.in_(cells))
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield row[0], tuple(row[1:])


def compare_members(then: Session, now: Session, splits: tuple[int, int]) -> Tally:
    """Compare the side and the label of each image of two splits."""
    tally = Tally("members of the split", 0.0)
    for image, before, after in merged(_members(then, splits[0]), _members(now, splits[1])):
        tally.count(f"image {image}", before and " ".join(before), after and " ".join(after))
    return tally


def _members(session: Session, split_id: int) -> Iterator[Keyed]:
    query = (
        select(SplitMember.image_id, SplitMember.subset, Label.value)
        .join(Label, Label.id == SplitMember.label_id)
        .join(Image, Image.id == SplitMember.image_id)
        .where(SplitMember.split_id == split_id)
        .order_by(SplitMember.image_id)
    )
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield row[0], (row[1].value, row[2])


Comparer = Callable[[Session, Session, Run], Tally]


SAMPLE = 5
"""Images that are segmented or measured again, where nobody says how many."""

MINDED = ("python", "platform", "numpy", "torch", "torchvision", "cellpose", "scikit-image")
"""What of the environment decides the last bits of numbers."""


@dataclass(frozen=True)
class Done:
    """What carrying out an order came to: the number of the new run, and images that failed."""

    run_id: int | None
    failures: tuple[tuple[str, str], ...] = ()


CarryOut = Callable[[Workspace, Order, str | None], Done]
"""Runs an order on a store; the text is a condition on its images (``--where``), if any."""


@dataclass(frozen=True)
class _Job:
    """A run that is to be redone: what of it is asked, and what it needs."""

    run: Run
    recipe: Recipe
    order: Order
    wanted: Wanted
    images: tuple[int, ...] = ()
    sampled: bool = False
    reasons: list[str] = field(default_factory=list)


def check(
    workspace: Workspace,
    reference: str,
    carry_out: CarryOut,
    *,
    images: int | None = None,
    weights: Path | None = None,
) -> Check:
    """Redo a run beside the store, and compare what it says with what is stored.

    ``images``: so many of its images alone (of segment and measure runs 5, of predict runs all).
    ``weights``: the file that a training began from, or the network of a segmentation. Nothing is
    written to the store.

    Raises:
        UnknownNameError: there is no such run.
        UserInputError: the run is not finished, or its stage cannot be redone beside the store.
    """
    began = time.monotonic()
    with workspace.database.read() as session:
        run = run_in(session, reference)
        job = _job(session, run, images, weights)
    try:
        with scratch_store(workspace, job.wanted) as redone:
            found = _redo(workspace, redone, job, carry_out)
    except CellstoreError as error:
        found = _impossible(job, str(error))
    return replace(found, seconds=round(time.monotonic() - began, 1))


def _job(session: Session, run: Run, images: int | None, weights: Path | None) -> _Job:
    if run.status is not Status.DONE:
        raise UserInputError(f"Run {run.id} is {run.status.value}: only a finished run is redone.")
    recipe = session.get_one(Recipe, run.recipe_id)
    order = order_of(session, run, recipe)
    if order is None:
        raise UserInputError(
            f"A run of stage {run.stage.value} like run {run.id} is not redone beside the store: "
            f"its inputs are files outside it. See how it is done with: cellstore repro {run.id}"
        )
    order = _with_weights(order, weights)
    reasons = [*order.doubts, *_other_versions(run)]
    found = _NEEDS[run.stage](session, run, recipe, images)
    return _Job(run, recipe, order, *found, reasons=reasons)


def _with_weights(order: Order, weights: Path | None) -> Order:
    params: Any = order.params
    if weights is None:
        return order
    if isinstance(params, TrainParams) and params.weights == FROM_FILE:
        return replace(order, params=replace(params, weights=str(weights)), doubts=())
    if hasattr(params, "flow_threshold"):
        return replace(order, params=replace(params, model=str(weights)))
    raise UserInputError("This run began from no file of weights: leave --weights away.")


def _other_versions(run: Run) -> list[str]:
    """Sentences on why the numbers may be others."""
    here = environment()
    found = []
    if run.code_version != code_version():
        found.append(f"made by cellstore {run.code_version}, redone by {code_version()}")
    other = [n for n in MINDED if n in run.environment and run.environment[n] != here.get(n)]
    found += [f"{name} was {run.environment[name]}, is {here.get(name, 'gone')}" for name in other]
    return found


Needs = tuple[Wanted, tuple[int, ...], bool]


def _spread(ids: Sequence[int], number: int | None) -> tuple[int, ...]:
    """So many of some ids, from all over them."""
    if number is None or number >= len(ids):
        return tuple(ids)
    return tuple(ids[place * len(ids) // number] for place in range(number))


def _of_jobs(session: Session, run: Run) -> list[int]:
    query = select(Job.image_id).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
    return sorted(session.scalars(query.where(Job.status == Status.DONE)))


def _for_segment(session: Session, run: Run, recipe: Recipe, number: int | None) -> Needs:
    query = select(Segmentation.image_id).where(Segmentation.run_id == run.id)
    chosen = _spread(sorted(session.scalars(query)), number or SAMPLE)
    source = input_of(session, recipe, Stage.SEGMENT)
    images: Sequence[int] = chosen
    if source is not None:  # the diameters of whole plates count
        images = _with_plates(session, chosen)
    segmented = [] if source is None else [source.id]
    files = [] if run.parent_id is None else [run.parent_id]
    return Wanted(images, segmented=segmented, files_of=files), chosen, True


def _for_measure(session: Session, run: Run, recipe: Recipe, number: int | None) -> Needs:
    chosen = _spread(_of_jobs(session, run), number or SAMPLE)
    source = input_of(session, recipe, Stage.SEGMENT)
    ids = [] if source is None else [source.id]
    return Wanted(chosen, segmented=ids, with_cells=ids), chosen, True


def _for_split(session: Session, _run: Run, recipe: Recipe, _number: int | None) -> Needs:
    images = tuple(session.scalars(select(Image.id).order_by(Image.id)))
    segment = input_of(session, recipe, Stage.SEGMENT)
    ids = [] if segment is None else [segment.id]
    qc = recipe.parameters.get("exclude_flagged")
    return Wanted(images, segmented=ids, qc=qc, splits=False), images, False


def _for_train(session: Session, run: Run, recipe: Recipe, _number: int | None) -> Needs:
    query = select(SplitMember.image_id).where(SplitMember.split_id == run.split_id)
    members = tuple(session.scalars(query.order_by(SplitMember.image_id)))
    images = _with_plates(session, members) if _by_plate(recipe) else members
    return _reading(session, recipe, images, ()), members, False


def _for_predict(session: Session, run: Run, recipe: Recipe, number: int | None) -> Needs:
    labelled = _of_jobs(session, run)
    chosen = _spread(labelled, number)
    assert run.parent_id is not None
    trained = session.get_one(Run, run.parent_id)
    taught = session.get_one(Recipe, trained.recipe_id)
    images = _with_plates(session, chosen) if _by_plate(taught) else chosen
    wanted = _reading(session, taught, images, [trained.id])
    return wanted, chosen, len(chosen) < len(labelled)


def _reading(
    session: Session, recipe: Recipe, images: Sequence[int], files_of: Sequence[int]
) -> Wanted:
    """What is needed to read cells as the training with this recipe did."""
    segment = input_of(session, recipe, Stage.SEGMENT)
    measure = input_of(session, recipe, Stage.MEASURE)
    return Wanted(
        images,
        segmented=[] if segment is None else [segment.id],
        with_cells=[] if segment is None else [segment.id],
        measured=[] if measure is None else [measure.id],
        files_of=files_of,
        qc=recipe.parameters.get("exclude_flagged"),
    )


def _by_plate(recipe: Recipe) -> bool:
    """Whether other images of a plate decide what is read of one."""
    stored = recipe.parameters
    return stored.get("normalise", "train") != "train" or stored.get("intensity") == "plate"


def _with_plates(session: Session, images: Sequence[int]) -> tuple[int, ...]:
    """All images of the plates that some are on."""
    plates: set[int] = set()
    for start in range(0, len(images), 5_000):
        some = images[start : start + 5_000]
        query = select(Well.plate_id).join(Image, Image.well_id == Well.id)
        plates |= set(session.scalars(query.where(Image.id.in_(some)).distinct()))
    query = select(Image.id).join(Well, Well.id == Image.well_id)
    return tuple(session.scalars(query.where(Well.plate_id.in_(plates)).order_by(Image.id)))


_NEEDS: dict[Stage, Callable[[Session, Run, Recipe, int | None], Needs]] = {
    Stage.SEGMENT: _for_segment,
    Stage.MEASURE: _for_measure,
    Stage.SPLIT: _for_split,
    Stage.TRAIN: _for_train,
    Stage.PREDICT: _for_predict,
}


def _redo(workspace: Workspace, redone: Workspace, job: _Job, carry_out: CarryOut) -> Check:
    by_image = job.run.stage in (Stage.SEGMENT, Stage.MEASURE, Stage.PREDICT)
    where = _where(job) if by_image and job.sampled else None
    done = carry_out(redone, _asked(job, where), where)
    job.reasons.extend(f"{name}: {reason}" for name, reason in done.failures[:SHOWN])
    if done.run_id is None or done.failures:
        number = len(done.failures)
        return _impossible(job, f"{number} of {len(job.images)} images failed" if number else "")
    with workspace.database.read() as then, redone.database.read() as now:
        new = now.get_one(Run, done.run_id)
        recipe = now.get_one(Recipe, new.recipe_id)
        tally = _compared(workspace, redone, then, now, job, new)
    return _verdict(job, tally, same=recipe.fingerprint == job.recipe.fingerprint)


def _where(job: _Job) -> str:
    return f"image_id IN ({', '.join(map(str, job.images))})"


def _asked(job: _Job, where: str | None) -> Order:
    """The order; of a part of the images a prediction is asked by a condition of its own."""
    params = job.order.params
    if where is None or not isinstance(params, PredictParams):
        return job.order
    asked = f"({params.where}) AND {where}" if params.where else where
    return replace(job.order, params=replace(params, where=asked, limit=None))


def _compared(
    workspace: Workspace, redone: Workspace, then: Session, now: Session, job: _Job, new: Run
) -> Tally:
    run, runs = job.run, (job.run.id, new.id)
    if run.stage is Stage.PREDICT:
        cells = _cells_of(then, job) if job.sampled else None
        return compare_predictions(then, now, runs, cells)
    if run.stage is Stage.TRAIN:
        return compare_trainings(then, now, runs)
    if run.stage is Stage.SEGMENT:
        return compare_masks(then, now, runs, job.images)
    if run.stage is Stage.SPLIT:
        return _splits_compared(then, now, job)
    recipes = (run.recipe_id, new.recipe_id)
    if _in_files(then, run.recipe_id):
        return _files_compared(workspace, redone, then, now, job, recipes)
    return compare_features(then, now, recipes, _cells_of(then, job))


def _cells_of(session: Session, job: _Job) -> Select[Any]:
    source = _segment_of(session, job)
    query = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    query = query.where(Segmentation.image_id.in_(job.images))
    return query if source is None else query.where(Segmentation.recipe_id == source.id)


def _segment_of(session: Session, job: _Job) -> Recipe | None:
    return input_of(session, job.recipe, Stage.SEGMENT)


def _splits_compared(then: Session, now: Session, job: _Job) -> Tally:
    assert isinstance(job.order.params, SplitParams)
    total: Tally | None = None
    made = select(Split).where(Split.recipe_id == job.recipe.id).order_by(Split.id)
    name = job.order.names["name"]
    mine = [split for split in then.scalars(made) if name in (split.family, split.name)]
    for split in mine:
        again = now.scalars(select(Split).where(Split.name == split.name)).one()
        tally = compare_members(then, now, (split.id, again.id))
        tally.count(f"fingerprint of {split.name}", split.fingerprint, again.fingerprint)
        total = tally if total is None else _sum(total, tally)
    if total is None:
        raise UserInputError("The split is deleted, so there is nothing to compare with.")
    return total


def _sum(one: Tally, other: Tally) -> Tally:
    one.compared += other.compared
    one.differ += other.differ
    one.differences = (one.differences + other.differences)[:SHOWN]
    return one


def _in_files(session: Session, recipe_id: int) -> bool:
    query = select(FeatureSet.storage).where(FeatureSet.recipe_id == recipe_id)
    return session.scalar(query) is FeatureStorage.FILES


def _files_compared(
    workspace: Workspace,
    redone: Workspace,
    then: Session,
    now: Session,
    job: _Job,
    recipes: tuple[int, int],
) -> Tally:
    tally = Tally("measurements", TOLERANCE_OF_FEATURES)
    cells = sorted(then.scalars(_cells_of(then, job)))
    columns = then.scalars(select(FeatureSet.columns).where(FeatureSet.recipe_id == recipes[0]))
    names = [str(column["name"]) for column in columns.one()]
    old = _from_files(workspace, then, recipes[0], cells, names)
    new = _from_files(redone, now, recipes[1], cells, names)
    compare_values(tally, names, merged(old, new))
    return tally


def _from_files(
    workspace: Workspace, session: Session, recipe_id: int, cells: list[int], names: list[str]
) -> Iterable[Keyed]:
    if not cells:
        return []
    query = (
        select(Artifact.path)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.recipe_id == recipe_id)
        .where(FeatureFile.first_cell_id <= cells[-1], FeatureFile.last_cell_id >= cells[0])
    )
    rows: list[Keyed] = []
    for path in session.scalars(query):
        table = pq.read_table(
            workspace.artifacts.locate(path),
            columns=["cell_id", *names],
            filters=[("cell_id", "in", cells)],
        )
        columns = [table.column(name).to_pylist() for name in ("cell_id", *names)]
        rows += [(row[0], row[1:]) for row in zip(*columns, strict=True)]
    return sorted(rows, key=lambda row: row[0])


def _verdict(job: _Job, tally: Tally, *, same: bool) -> Check:
    if tally.differ:
        verdict = DIFFERENT
    elif tally.compared == 0:
        return _impossible(job, "there is nothing to compare")
    else:
        verdict = EQUAL if tally.largest else IDENTICAL
    if job.run.stage is Stage.SPLIT and tally.differ and not same:
        job.reasons.append("the images or treatments of the store are others than then")
    # Of a sample of the images a prediction has a recipe of its own.
    asked_alike = same or (job.sampled and job.run.stage is Stage.PREDICT)
    if not asked_alike:
        job.reasons.append("what it reads is not what it was: its recipe has another fingerprint")
    return _check(job, verdict, tally, same=same)


def _impossible(job: _Job, reason: str) -> Check:
    if reason:
        job.reasons.insert(0, reason)
    return _check(job, IMPOSSIBLE, Tally("nothing", 0.0), same=False)


def _check(job: _Job, verdict: str, tally: Tally, *, same: bool) -> Check:
    reasons = () if verdict == IDENTICAL and same else tuple(job.reasons)
    return Check(
        run_id=job.run.id,
        stage=job.run.stage.value,
        verdict=verdict,
        what=tally.what,
        compared=tally.compared,
        differ=tally.differ,
        largest=tally.largest,
        tolerance=tally.tolerance,
        same_recipe=same,
        differences=tuple(tally.differences),
        reasons=reasons,
    )
