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
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.orm import Session

from ..artifacts import BorrowingFolder
from ..config import PredictParams, TrainParams
from ..db.bulk import in_lists
from ..db.session import connect, sqlite_url
from ..enums import ArtifactKind, FeatureStorage, Stage, Status
from ..errors import CellstoreError, UserInputError
from ..jobs.lookup import run_in
from ..jobs.runs import code_version, environment
from ..jobs.workspace import Workspace
from ..models import (
    METADATA,
    Annotation,
    Artifact,
    Base,
    Cell,
    CellFeatures,
    CellFlag,
    FeatureFile,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    ImageFlag,
    Job,
    Label,
    Perturbation,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
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
    files do; ``qc``: the run whose flags count; ``splits``: whether splits are there already;
    ``until``: annotations made later do not count.
    """

    images: Sequence[int]
    segmented: Collection[int] = ()
    with_cells: Collection[int] = ()
    measured: Collection[int] = ()
    files_of: Collection[int] = ()
    qc: int | None = None
    splits: bool = True
    until: datetime | None = None


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
            with workspace.database.read() as reader, database.begin() as writer:
                _copy_rows(reader, writer, wanted)
            yield Workspace(settings, database, folder, workspace.progress)
        finally:
            database.close()


def _copy_rows(reader: Session, writer: Session, wanted: Wanted) -> None:
    def copy(model: type[Base], *conditions: Any) -> None:
        table: Any = model.__table__
        query = select(table).where(*conditions)
        if model is Run:
            query = query.order_by(Run.id)  # parents before children
        result = reader.execute(query.execution_options(yield_per=SCRATCH_ROWS))
        for part in result.mappings().partitions(SCRATCH_ROWS):
            writer.execute(insert(table), [dict(row) for row in part])

    def copy_artifacts(ids: Select[Any]) -> None:
        there = set(writer.scalars(select(Artifact.id)))
        copy(Artifact, Artifact.id.in_(set(reader.scalars(ids)) - there))

    # What does not grow with the images, and the wells.
    for model in (
        Folder,
        Plate,
        Perturbation,
        Treatment,
        TreatmentPart,
        Well,
        Recipe,
        RecipeInput,
        Label,
        Split,
        Run,
        FeatureSet,
    ):
        copy(model)
    copy(Annotation, *() if wanted.until is None else (Annotation.created_at <= wanted.until,))
    if not wanted.splits:
        writer.execute(update(Run).values(split_id=None))
        writer.execute(delete(Split))
    for some in in_lists(list(wanted.images), IMAGES):
        copy(Image, Image.id.in_(some))
        copy(ImageFile, ImageFile.image_id.in_(some))
        if wanted.splits:
            copy(SplitMember, SplitMember.image_id.in_(some))
        found = (Segmentation.image_id.in_(some), Segmentation.recipe_id.in_(wanted.segmented))
        for column in (Segmentation.mask_artifact_id, Segmentation.flow_artifact_id):
            copy_artifacts(select(column).where(*found, column.is_not(None)))
        copy(Segmentation, *found)
        cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        cells = cells.where(Segmentation.image_id.in_(some))
        cells = cells.where(Segmentation.recipe_id.in_(wanted.with_cells))
        copy(Cell, Cell.id.in_(cells))
        measured = CellFeatures.recipe_id.in_(wanted.measured)
        copy(CellFeatures, CellFeatures.cell_id.in_(cells), measured)
        done = (Job.recipe_id.in_(wanted.measured), Job.status == Status.DONE)
        copy(Job, Job.image_id.in_(some), *done)
        if wanted.qc is not None:
            copy(CellFlag, CellFlag.cell_id.in_(cells), CellFlag.run_id == wanted.qc)
            copy(ImageFlag, ImageFlag.image_id.in_(some), ImageFlag.run_id == wanted.qc)
    of_runs = RunArtifact.run_id.in_(wanted.files_of)
    copy_artifacts(select(RunArtifact.artifact_id).where(of_runs))
    copy(RunArtifact, of_runs)
    sets = select(FeatureSet.id).where(FeatureSet.recipe_id.in_(wanted.measured))
    copy_artifacts(select(FeatureFile.artifact_id).where(FeatureFile.feature_set_id.in_(sets)))
    copy(FeatureFile, FeatureFile.feature_set_id.in_(sets))


SHOWN = 5
ROWS = 10_000

TOLERANCE = 1e-4
"""Of probabilities and metrics: what 32-bit sums in another order change at most, with room."""

TOLERANCE_OF_FEATURES = 1e-9
"""Of measurements, relative: they are sums in 64 bits."""

TIMES = ("seconds", "waited")
"""Metrics of a training that are about the machine."""


@dataclass
class Differences:
    """How much was compared, and the first differences."""

    what: str
    tolerance: float
    compared: int = 0
    differ: int = 0
    largest: float = 0.0
    first: list[str] = field(default_factory=list)

    def count(self, named: str, then: Any, now: Any, *, relative: bool = False) -> None:
        """Compare one thing: numbers within the tolerance, everything else for equality."""
        self.compared += 1
        if then == now:
            return
        if isinstance(then, float) and isinstance(now, float):
            if math.isnan(then) and math.isnan(now):
                return
            gap = abs(then - now)
            if relative and math.isfinite(gap):
                gap /= max(abs(then), abs(now))
            self.largest = max(self.largest, gap if math.isfinite(gap) else math.inf)
            if gap <= self.tolerance:
                return
        self.differ += 1
        if len(self.first) < SHOWN:
            before, after = (
                "nothing" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x)
                for x in (then, now)
            )
            self.first.append(f"{named}: {before} before, {after} now")


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


def _rows(session: Session, query: Select[*tuple[Any, ...]], keys: int = 1) -> Iterator[Keyed]:
    """Rows of a query that is ordered by its first ``keys`` columns."""
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield (row[0] if keys == 1 else tuple(row[:keys])), tuple(row[keys:])


def compare_predictions(
    then: Session, now: Session, runs: tuple[int, int], cells: Select[Any] | None
) -> Differences:
    """Compare labels and probabilities of each cell and rank; ``cells``: of these alone."""
    found = Differences("predictions", TOLERANCE)
    query = select(Prediction.cell_id, Prediction.rank, Label.value, Prediction.probability)
    query = query.join(Label, Label.id == Prediction.label_id)
    query = query.order_by(Prediction.cell_id, Prediction.rank)
    old = query.where(Prediction.run_id == runs[0])
    if cells is not None:
        old = old.where(Prediction.cell_id.in_(cells))
    new = query.where(Prediction.run_id == runs[1])
    for (cell, rank), before, after in merged(_rows(then, old, 2), _rows(now, new, 2)):
        named = f"cell {cell}, rank {rank}"
        if before is None or after is None:
            found.count(named, before and before[0], after and after[0])
        elif before[0] != after[0]:
            found.count(named, f"{before[0]} {before[1]:.4f}", f"{after[0]} {after[1]:.4f}")
        else:
            found.count(f"{named}, {before[0]}", before[1], after[1])
    return found


def compare_trainings(then: Session, now: Session, runs: tuple[int, int]) -> Differences:
    """Compare the tensors of the checkpoints by sha256; where they differ, the metrics decide."""
    found = Differences("checkpoints and metrics", TOLERANCE)
    tensors, metrics = [], []
    for session, run_id in zip((then, now), runs, strict=True):
        query = select(Artifact.sha256).join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        query = query.where(Artifact.kind == ArtifactKind.CHECKPOINT, RunArtifact.run_id == run_id)
        query = query.where(Artifact.path.not_like("%.json")).order_by(Artifact.id)
        tensors.append(session.scalars(query).first() or "none")
        values = select(RunMetric.epoch, RunMetric.name, RunMetric.value)
        values = values.where(RunMetric.run_id == run_id, RunMetric.name.not_in(TIMES))
        metrics.append(sorted(_rows(session, values, 2), key=lambda row: row[0]))
    before, after = tensors
    if before == after:
        found.count("checkpoint", before, after)
    else:
        found.compared += 1
        found.largest = math.ulp(1.0)  # not the same bits, whatever the metrics say
        found.first.append(f"checkpoint: sha256 {before[:12]} before, {after[:12]} now")
    for (epoch, name), first, second in merged(*metrics):
        found.count(f"{name} of epoch {epoch}", first and first[0], second and second[0])
    if before != after and found.compared == 1:  # a baseline has no metrics that could decide
        found.differ += 1
    return found


def compare_masks(
    then: Session, now: Session, runs: tuple[int, int], images: Sequence[int]
) -> Differences:
    """Compare the masks of images by sha256, and how many cells they have."""
    found = Differences("images' masks", 0.0)
    query = select(Segmentation.image_id, Artifact.sha256, Segmentation.n_cells)
    query = query.outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
    query = query.where(Segmentation.image_id.in_(images)).order_by(Segmentation.image_id)
    old, new = (
        _rows(session, query.where(Segmentation.run_id == run_id))
        for session, run_id in zip((then, now), runs, strict=True)
    )
    for image, before, after in merged(old, new):
        masks = [
            row and f"{row[1]} cells in masks {(row[0] or 'unknown')[:12]}"
            for row in (before, after)
        ]
        found.count(f"image {image}", *masks)
    return found


def compare_features(
    workspaces: tuple[Workspace, Workspace],
    then: Session,
    now: Session,
    recipes: tuple[int, int],
    cells: Select[Any],
) -> Differences:
    """Compare the measurements of cells, value by value, in the table or in files."""
    found = Differences("measurements", TOLERANCE_OF_FEATURES)
    stored = select(FeatureSet).where(FeatureSet.recipe_id == recipes[0])
    feature_set = then.scalars(stored).one_or_none()
    if feature_set is not None and feature_set.storage is FeatureStorage.FILES:
        names = [str(column["name"]) for column in feature_set.columns]
        ids = sorted(then.scalars(cells))
        old, new = (
            _rows_of_files(workspace, session, recipe, ids, names)
            for workspace, session, recipe in zip(workspaces, (then, now), recipes, strict=True)
        )
    else:
        keys = ("cell_id", "recipe_id", "run_id")
        names = [c.name for c in CellFeatures.__table__.columns if c.name not in keys]
        query = select(CellFeatures.cell_id, *(getattr(CellFeatures, name) for name in names))
        query = query.order_by(CellFeatures.cell_id)
        mine = query.where(CellFeatures.recipe_id == recipes[0], CellFeatures.cell_id.in_(cells))
        old = _rows(then, mine)
        new = _rows(now, query.where(CellFeatures.recipe_id == recipes[1]))
    for cell, before, after in merged(old, new):
        if before is None or after is None:
            measured = ("measured", None) if after is None else (None, "measured")
            found.count(f"cell {cell}", *measured)
            continue
        for name, first, second in zip(names, before, after, strict=True):
            found.count(f"{name} of cell {cell}", first, second, relative=True)
    return found


def _rows_of_files(
    workspace: Workspace, session: Session, recipe_id: int, cells: list[int], names: list[str]
) -> Iterator[Keyed]:
    if not cells:
        return
    query = (
        select(Artifact.path)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.recipe_id == recipe_id)
        .where(FeatureFile.first_cell_id <= cells[-1], FeatureFile.last_cell_id >= cells[0])
    )
    rows: list[Keyed] = []
    for path in session.scalars(query):
        columns = ["cell_id", *names]
        wanted = [("cell_id", "in", cells)]
        table = pq.read_table(workspace.artifacts.locate(path), columns=columns, filters=wanted)
        values = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        rows += [(row[0], row[1:]) for row in values]
    yield from sorted(rows, key=lambda row: row[0])


def compare_splits(then: Session, now: Session, recipe: Recipe, name: str) -> Differences:
    """Compare the subset and the label of each image of a split, or of all its folds."""
    found = Differences("members of the split", 0.0)
    made = select(Split).where(Split.recipe_id == recipe.id).order_by(Split.id)
    mine = [split for split in then.scalars(made) if name in (split.family, split.name)]
    if not mine:
        raise UserInputError("The split is deleted, so there is nothing to compare with.")
    query = select(SplitMember.image_id, SplitMember.subset, Label.value)
    query = query.join(Label, Label.id == SplitMember.label_id)
    query = query.join(Image, Image.id == SplitMember.image_id).order_by(SplitMember.image_id)
    for split in mine:
        again = now.scalars(select(Split).where(Split.name == split.name)).one()
        old = _rows(then, query.where(SplitMember.split_id == split.id))
        new = _rows(now, query.where(SplitMember.split_id == again.id))
        for image, before, after in merged(old, new):
            members = [row and f"{row[0].value} {row[1]}" for row in (before, after)]
            found.count(f"image {image}", *members)
        found.count(f"fingerprint of {split.name}", split.fingerprint, again.fingerprint)
    return found


SAMPLE = 5
"""Images that are segmented or measured again, where nobody says how many."""

PACKAGES = ("python", "platform", "numpy", "torch", "torchvision", "cellpose", "scikit-image")
"""What of the environment decides the last bits of numbers."""


@dataclass(frozen=True)
class Done:
    """What carrying out an order came to: the number of the new run, and images that failed."""

    run_id: int | None
    failures: tuple[tuple[str, str], ...] = ()


CarryOut = Callable[[Workspace, Order, str | None], Done]
"""Runs an order on a store; the text is a condition on its images (``--where``), if any."""


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
        if run.status is not Status.DONE:
            raise UserInputError(
                f"Run {run.id} is {run.status.value}: only a finished run is redone."
            )
        recipe = session.get_one(Recipe, run.recipe_id)
        order = order_of(session, run, recipe)
        if order is None:
            raise UserInputError(
                f"A run of stage {run.stage.value} like run {run.id} is not redone beside the "
                "store: its inputs are files outside it. See how it is done with: "
                f"cellstore repro {run.id}"
            )
        if weights is not None:
            order = _with_weights(order, weights)
        wanted, chosen, sampled = _needs(session, run, recipe, images)
    reasons, here = list(order.doubts), environment()
    if run.code_version != code_version():
        reasons.append(f"made by cellstore {run.code_version}, redone by {code_version()}")
    other = [name for name in PACKAGES if run.environment.get(name, "") != here.get(name)]
    reasons += [
        f"{name} was {run.environment[name]}, is {here.get(name, 'gone')}"
        for name in other
        if name in run.environment
    ]
    found, same, impossible = Differences("nothing", 0.0), False, False
    try:
        with scratch_store(workspace, replace(wanted, until=run.started_at)) as redone:
            where = None
            if sampled and run.stage in (Stage.SEGMENT, Stage.MEASURE, Stage.PREDICT):
                where = f"image_id IN ({', '.join(map(str, chosen))})"
            if where is not None and isinstance(order.params, PredictParams):
                asked = f"({order.params.where}) AND {where}" if order.params.where else where
                order = replace(order, params=replace(order.params, where=asked, limit=None))
            done = carry_out(redone, order, where)
            reasons += [f"{name}: {reason}" for name, reason in done.failures[:SHOWN]]
            if done.run_id is None or done.failures:
                impossible = True
                if done.failures:
                    failed = len(done.failures)
                    reasons.insert(0, f"{failed} of {len(chosen)} images failed")
            else:
                found, same = _compared(
                    workspace, redone, run, done.run_id, order, chosen, sampled=sampled
                )
                if not found.compared:
                    impossible = True
                    reasons.insert(0, "there is nothing to compare")
    except CellstoreError as error:
        impossible = True
        reasons.insert(0, str(error))
    if impossible:
        outcome = IMPOSSIBLE
        found, same = Differences("nothing", 0.0), False
    else:
        outcome = DIFFERENT if found.differ else EQUAL if found.largest else IDENTICAL
        if run.stage is Stage.SPLIT and found.differ and not same:
            reasons.append("the images or treatments of the store are others than then")
        # Of a sample of the images a prediction has a recipe of its own.
        if not same and not (sampled and run.stage is Stage.PREDICT):
            reasons.append("what it reads is not what it was: its recipe has another fingerprint")
    return Check(
        run_id=run.id,
        stage=run.stage.value,
        outcome=outcome,
        what=found.what,
        compared=found.compared,
        differ=found.differ,
        largest=found.largest,
        tolerance=found.tolerance,
        same_recipe=same,
        differences=tuple(found.first),
        reasons=() if outcome == IDENTICAL and same else tuple(reasons),
        seconds=round(time.monotonic() - began, 1),
    )


def _compared(
    workspace: Workspace,
    redone: Workspace,
    run: Run,
    new_id: int,
    order: Order,
    images: Sequence[int],
    *,
    sampled: bool,
) -> tuple[Differences, bool]:
    """Compare a run with its repetition; also whether their recipes have one fingerprint."""
    with workspace.database.read() as then, redone.database.read() as now:
        old, new = (
            session.get_one(Recipe, session.get_one(Run, number).recipe_id)
            for session, number in ((then, run.id), (now, new_id))
        )
        runs = (run.id, new_id)
        source = input_of(then, old, Stage.SEGMENT)
        cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        cells = cells.where(Segmentation.image_id.in_(images))
        if source is not None:
            cells = cells.where(Segmentation.recipe_id == source.id)
        match run.stage:
            case Stage.PREDICT:
                found = compare_predictions(then, now, runs, cells if sampled else None)
            case Stage.TRAIN:
                found = compare_trainings(then, now, runs)
            case Stage.SEGMENT:
                found = compare_masks(then, now, runs, images)
            case Stage.SPLIT:
                found = compare_splits(then, now, old, order.names["name"])
            case _:
                recipes = (old.id, new.id)
                found = compare_features((workspace, redone), then, now, recipes, cells)
        return found, old.fingerprint == new.fingerprint


def _with_weights(order: Order, weights: Path) -> Order:
    params: Any = order.params
    if isinstance(params, TrainParams) and params.weights == FROM_FILE:
        return replace(order, params=replace(params, weights=str(weights)), doubts=())
    if hasattr(params, "flow_threshold"):
        return replace(order, params=replace(params, model=str(weights)))
    raise UserInputError("This run began from no file of weights: leave --weights away.")


def _needs(
    session: Session, run: Run, recipe: Recipe, number: int | None
) -> tuple[Wanted, tuple[int, ...], bool]:
    """What a run needs to be redone, the images it is redone for, whether these are a part.

    A sample is spread over the images of the run.
    """

    def sample(query: Select[Any], number: int | None) -> tuple[int, ...]:
        ids = sorted(session.scalars(query))
        if number is None or number >= len(ids):
            return tuple(ids)
        return tuple(ids[i * len(ids) // number] for i in range(number))

    source = input_of(session, recipe, Stage.SEGMENT)
    segmented = [] if source is None else [source.id]
    of_jobs = select(Job.image_id).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
    of_jobs = of_jobs.where(Job.status == Status.DONE)
    match run.stage:
        case Stage.SEGMENT:
            of_run = select(Segmentation.image_id).where(Segmentation.run_id == run.id)
            chosen = sample(of_run, number or SAMPLE)
            # Where it reads another segmentation, the diameters of whole plates count.
            images = chosen if source is None else _with_plates(session, chosen)
            files = [] if run.parent_id is None else [run.parent_id]
            return Wanted(images, segmented=segmented, files_of=files), chosen, True
        case Stage.MEASURE:
            chosen = sample(of_jobs, number or SAMPLE)
            return Wanted(chosen, segmented=segmented, with_cells=segmented), chosen, True
        case Stage.SPLIT:
            images = sample(select(Image.id), None)
            qc = recipe.parameters.get("exclude_flagged")
            return Wanted(images, segmented=segmented, qc=qc, splits=False), images, False
        case Stage.TRAIN:
            members = select(SplitMember.image_id).where(SplitMember.split_id == run.split_id)
            chosen, sampled, trained, files = sample(members, None), False, recipe, []
        case _:
            chosen = sample(of_jobs, number)
            sampled = len(chosen) < len(sample(of_jobs, None))
            assert run.parent_id is not None
            trained = session.get_one(Recipe, session.get_one(Run, run.parent_id).recipe_id)
            files = [run.parent_id]
    # What it takes to read cells as the training did: where whole plates decide how, all of them.
    stored = trained.parameters
    by_plate = stored.get("normalise", "train") != "train" or stored.get("intensity") == "plate"
    segment, measure = (input_of(session, trained, s) for s in (Stage.SEGMENT, Stage.MEASURE))
    of_segment = [] if segment is None else [segment.id]
    wanted = Wanted(
        _with_plates(session, chosen) if by_plate else chosen,
        segmented=of_segment,
        with_cells=of_segment,
        measured=[] if measure is None else [measure.id],
        files_of=files,
        qc=stored.get("exclude_flagged"),
    )
    return wanted, chosen, sampled


def _with_plates(session: Session, images: Sequence[int]) -> tuple[int, ...]:
    """All images of the plates that some are on."""
    plates: set[int] = set()
    for some in in_lists(list(images), SCRATCH_ROWS):
        query = select(Well.plate_id).join(Image, Image.well_id == Well.id)
        plates |= set(session.scalars(query.where(Image.id.in_(some)).distinct()))
    every = select(Image.id).join(Well, Well.id == Image.well_id)
    return tuple(session.scalars(every.where(Well.plate_id.in_(plates)).order_by(Image.id)))
