"""Redo a run in a store of its own, and compare; what carries it out is handed in.

The stages are not called from here: the caller passes the function that runs a stage on a store.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import merge
from itertools import compress, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.orm import Session

from ..artifacts import BorrowingFolder
from ..config import HitsParams, PredictParams, RunName
from ..db.bulk import in_lists
from ..db.migrate import create_unguarded
from ..db.session import connect
from ..enums import ArtifactKind, Stage, Status
from ..errors import CellstoreError, UserInputError
from ..jobs.lookup import find_run, recipe_channels
from ..jobs.runs import code_version, environment, files_of
from ..jobs.workspace import Workspace
from ..models import (
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
    TreatmentScore,
    Well,
)
from ..notebooks import Shown
from ..query.feature_files import BUILT_IN, SetReader, open_set
from ..settings import StoreSettings
from .repro import RunOptions, options_of_run

ROWS = 5_000
"""Rows that are copied or compared at once."""
IMAGES = 500
SHOWN = 5
SAMPLE = 5
"""Images that are segmented or measured again, where nobody says how many."""

TOLERANCE = 1e-4
"""Of probabilities and metrics: what 32-bit sums in another order change at most, with room."""
TOLERANCE_OF_FEATURES = 1e-9
"""Of measurements, relative: they are sums in 64 bits."""
TIMES = ("seconds", "waited")
"""Metrics of a training that are about the machine."""
PACKAGES = (
    *("python", "platform", "device", "cuda", "numpy", "scipy", "torch", "torchvision"),
    *("cellpose", "scikit-image", "scikit-learn"),
)
"""What of the environment decides the last bits of numbers."""

IDENTICAL, EQUAL, DIFFERENT = "identical", "equal within tolerance", "different"
IMPOSSIBLE = "cannot be redone"


Value = tuple[Any, str, float | None]
"""Key, text and number of one thing; two are the same if text and number are."""


@dataclass
class Check(Shown):
    """What came of redoing a run beside the store.

    ``compared`` of ``what`` were compared, ``differ`` of them differ: the first are described in
    ``differences``. ``largest`` is the largest difference of a number, to be held against
    ``tolerance``. ``same_recipe``: the recipe of the redone run has the same fingerprint.
    ``reasons``: why it cannot be redone, or why it may differ.
    """

    run_id: int
    stage: str
    outcome: str = IMPOSSIBLE
    what: str = "nothing"
    compared: int = 0
    differ: int = 0
    largest: float = 0.0
    tolerance: float = 0.0
    same_recipe: bool = False
    differences: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(
        self, named: str, then: Value | None, now: Value | None, *, relative: bool = False
    ) -> None:
        """Compare one thing: texts for equality, numbers within the tolerance; None: not there."""
        self.compared += 1
        if then is not None and now is not None and then[1] == now[1]:
            before, after = then[2], now[2]
            if before == after:
                return
            if before is not None and after is not None:
                if math.isnan(before) and math.isnan(after):
                    return
                gap = abs(before - after)
                if relative and math.isfinite(gap):
                    gap /= max(abs(before), abs(after))
                self.largest = max(self.largest, gap if math.isfinite(gap) else math.inf)
                if gap <= self.tolerance:
                    return
            named = ", ".join(part for part in (named, then[1]) if part)
            then, now = (None, "", before), (None, "", after)
        self.differ += 1
        if len(self.differences) < SHOWN:
            texts = []
            for value in (then, now):
                _, text, number = value or (None, "", None)
                known = (text, "" if number is None else f"{number:.6g}")
                texts.append(" ".join(part for part in known if part) or "nothing")
            self.differences.append(f"{named}: {texts[0]} before, {texts[1]} now")

    def count_all(
        self, named: str, then: Iterable[Value], now: Iterable[Value], *, relative: bool = False
    ) -> None:
        """Compare two series that ascend by key; ``named`` is filled with the key."""
        old, new = ((row[0], 0, row) for row in then), ((row[0], 1, row) for row in now)
        for key, found in groupby(merge(old, new, key=itemgetter(0, 1)), itemgetter(0)):
            pair = {side: row for _, side, row in found}
            parts = key if isinstance(key, tuple) else (key,)
            self.count(named.format(*parts), pair.get(0), pair.get(1), relative=relative)


CarryOut = Callable[
    [Workspace, RunOptions, str | None], tuple[int | None, Sequence[tuple[str, str]]]
]
"""Does a run on a store; the text is a condition on its images (``--where``), if any.

Returns the number of the new run, and the images that failed, each with the reason.
"""


def check(
    workspace: Workspace,
    reference: RunName,
    carry_out: CarryOut,
    *,
    images: int | None = None,
) -> Check:
    """Redo a run beside the store, and compare; see :meth:`cellstore.Store.check_run`.

    Of segment and measure runs ``images`` are 5 by default, of predict runs all.
    """
    began = time.monotonic()
    with workspace.database.read() as session:
        run = find_run(session, reference)
        if run.status is not Status.DONE:
            raise UserInputError(
                f"Run {run.id} is {run.status.value}: only a finished run is redone."
            )
        options = options_of_run(session, run)
        if options is None:
            raise UserInputError(
                f"A run of stage {run.stage.value} like run {run.id} is not redone beside the "
                "store: its inputs are files outside it. See how it is done with: "
                f"cellstore repro {run.id}"
            )
        every, chosen, sampled = _images_of(session, run, images)
    where = f"image_id IN ({', '.join(map(str, chosen))})" if sampled else None
    if where is not None and isinstance(options.params, PredictParams):
        asked = options.params.where
        asked = f"({asked}) AND {where}" if asked else where
        options = replace(options, params=replace(options.params, where=asked, limit=None))
    found = Check(run.id, run.stage.value)
    try:
        if isinstance(options.params, HitsParams) and options.params.run is not None:
            raise UserInputError("its dose curves of probabilities read predictions of another run")
        with scratch_store(workspace, run.id, every) as redone:
            new_id, failures = carry_out(redone, options, where)
            if failures:
                of = len(chosen if sampled else every)
                found.reasons = [f"{len(failures)} of {of} images failed"]
                found.reasons += [f"{name}: {reason}" for name, reason in failures[:SHOWN]]
            elif new_id is not None:
                with workspace.database.read() as then, redone.database.read() as now:
                    old, new = then.get_one(Run, run.id), now.get_one(Run, new_id)
                    both = (workspace, then, old), (redone, now, new)
                    _compare(found, both, options, chosen if sampled else None)
                    found.same_recipe = old.recipe.fingerprint == new.recipe.fingerprint
            if not found.compared and not failures:
                raise UserInputError("there is nothing to compare")
        if found.compared:
            found.outcome = DIFFERENT if found.differ else EQUAL if found.largest else IDENTICAL
    except CellstoreError as error:
        found = Check(run.id, run.stage.value, reasons=[str(error)])
    if found.outcome == IDENTICAL and found.same_recipe:
        found.reasons = []
    else:
        found.reasons += options.doubts
        code, here = code_version(), environment()
        if run.code_version != code:
            found.reasons.append(f"made by cellstore {run.code_version}, redone by {code}")
        found.reasons += [
            f"{name} was {run.environment[name]}, is {here.get(name, 'gone')}"
            for name in PACKAGES
            if name in run.environment and run.environment[name] != here.get(name)
        ]
    if found.outcome != IMPOSSIBLE and not found.same_recipe:
        if run.stage is Stage.SPLIT and found.differ:
            found.reasons.append("the images or treatments of the store are others than then")
        # Of a sample of the images a prediction has a recipe of its own.
        if not (sampled and run.stage is Stage.PREDICT):
            found.reasons.append(
                "what it reads is not what it was: its recipe has another fingerprint"
            )
    found.seconds = round(time.monotonic() - began, 1)
    return found


# The store in which the run is redone


def _read_by(run: Run) -> tuple[Recipe, list[int], list[int]]:
    """The recipe that says how a run reads cells, the segment and the measure recipes it names."""
    read = run.recipe
    if run.stage is Stage.PREDICT:  # it reads cells as the training did
        assert run.parent is not None
        read = run.parent.recipe
    segmented, measured = (
        [item.id for item in read.inputs if item.stage is stage]
        for stage in (Stage.SEGMENT, Stage.MEASURE)
    )
    return read, segmented, measured


def _images_of(
    session: Session, run: Run, number: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """The images that are copied, those the run is redone for, and whether these are a part.

    A sample is spread over the images of the run.
    """
    images = select(Job.image_id).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
    images = images.where(Job.status == Status.DONE)
    if run.stage is Stage.SEGMENT:
        images = select(Segmentation.image_id).where(Segmentation.run_id == run.id)
    elif run.stage is Stage.SPLIT:
        images = select(Image.id)
    elif run.stage in (Stage.HITS, Stage.PROFILE):  # they read whole plates
        result = run.result or {}
        of_sets = result.get("plate_sets", {"": result.get("barcodes", ())}).values()
        images = select(Image.id).join(Image.well).join(Well.plate)
        images = images.where(Plate.barcode.in_({plate for plates in of_sets for plate in plates}))
    elif run.stage is Stage.TRAIN:
        images = select(SplitMember.image_id).where(SplitMember.split_id == run.split_id)
    every = sorted(session.scalars(images))
    chosen = tuple(every)
    by_image = run.stage in (Stage.SEGMENT, Stage.MEASURE)
    if by_image or run.stage is Stage.PREDICT:
        number = min(number or (SAMPLE if by_image else len(every)), len(every))
        chosen = tuple(every[i * len(every) // number] for i in range(number))
    read, segmented, _ = _read_by(run)
    stored = read.parameters
    # Where whole plates decide how, all their images.
    whole = stored.get("normalise", "train") != "train" or stored.get("intensity") == "plate"
    plates: set[int] = set()
    if whole or (run.stage is Stage.SEGMENT and segmented):
        for some in in_lists(list(chosen), ROWS):
            query = select(Well.plate_id).join(Well.images).where(Image.id.in_(some)).distinct()
            plates |= set(session.scalars(query))
    on_plates = select(Image.id).join(Image.well)
    on_plates = on_plates.where(Well.plate_id.in_(plates)).order_by(Image.id)
    copied = tuple(session.scalars(on_plates)) or chosen
    return copied, chosen, by_image or len(chosen) < len(every)


@contextmanager
def scratch_store(workspace: Workspace, run_id: int, images: Sequence[int]) -> Iterator[Workspace]:
    """Yield a store of its own with copies of the rows that a run needs, of these images.

    Nothing is written to ``workspace``.
    """
    with tempfile.TemporaryDirectory(prefix="cellstore-redo-", ignore_cleanup_errors=True) as name:
        settings = StoreSettings(Path(name).resolve())
        database = connect(settings.sqlite)
        try:
            create_unguarded(database)
            folder = BorrowingFolder(settings.root / "artifacts", workspace.artifacts)
            with workspace.database.read() as reader, database.begin() as writer:
                _copy_rows(reader, writer, reader.get_one(Run, run_id), images)
            yield Workspace(settings, database, folder, workspace.progress)
        finally:
            database.close()


def _copy_rows(reader: Session, writer: Session, run: Run, images: Sequence[int]) -> None:
    read, segmented, measured = _read_by(run)
    of_cells = () if run.stage in (Stage.SEGMENT, Stage.SPLIT) else segmented
    qc = read.parameters.get("exclude_flagged")
    named = recipe_channels(reader)  # in the copy channels are called what recipes call them

    def copy(model: type[Base], *conditions: Any) -> None:
        table: Any = model.__table__
        query = select(table).where(*conditions)
        if model is Run:
            query = query.order_by(Run.id)  # parents before children
        result = reader.execute(query.execution_options(yield_per=ROWS))
        for part in result.mappings().partitions(ROWS):
            rows = [dict(row) for row in part]
            for row in rows if model is ImageFile and named else ():
                plate = writer.get_one(Image, row["image_id"]).well.plate_id
                names = named.get(plate, named.get(None, {}))
                row["channel"] = names.get(row["channel"], row["channel"])
            writer.execute(insert(table), rows)

    def copy_artifacts(ids: Select[Any]) -> None:
        there = set(writer.scalars(select(Artifact.id)))
        copy(Artifact, Artifact.id.in_(set(reader.scalars(ids)) - there))

    # What does not grow with the images, and the wells.
    small = (Folder, Plate, Perturbation, Treatment, TreatmentPart, Well, Recipe, RecipeInput)
    for model in (*small, Label, Split, Run, FeatureSet):
        copy(model)
    copy(Annotation, Annotation.created_at <= run.started_at)  # later ones do not count
    if run.stage is Stage.SPLIT:
        writer.execute(update(Run).values(split_id=None))
        writer.execute(delete(Split))
    for some in in_lists(list(images), IMAGES):
        copy(Image, Image.id.in_(some))
        copy(ImageFile, ImageFile.image_id.in_(some))
        if run.stage is not Stage.SPLIT:
            copy(SplitMember, SplitMember.image_id.in_(some))
        found = (Segmentation.image_id.in_(some), Segmentation.recipe_id.in_(segmented))
        for column in (Segmentation.mask_artifact_id, Segmentation.flow_artifact_id):
            copy_artifacts(select(column).where(*found, column.is_not(None)))
        copy(Segmentation, *found)
        cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        cells = cells.where(Segmentation.image_id.in_(some))
        cells = cells.where(Segmentation.recipe_id.in_(of_cells))
        copy(Cell, Cell.id.in_(cells))
        of_measures = CellFeatures.recipe_id.in_(measured)
        copy(CellFeatures, CellFeatures.cell_id.in_(cells), of_measures)
        done = (Job.recipe_id.in_(measured), Job.status == Status.DONE)
        copy(Job, Job.image_id.in_(some), *done)
        if qc is not None:
            copy(CellFlag, CellFlag.cell_id.in_(cells), CellFlag.run_id == qc)
            copy(ImageFlag, ImageFlag.image_id.in_(some), ImageFlag.run_id == qc)
    of_runs = RunArtifact.run_id == run.parent_id
    copy_artifacts(select(RunArtifact.artifact_id).where(of_runs))
    copy(RunArtifact, of_runs)
    sets = select(FeatureSet.id).where(FeatureSet.recipe_id.in_(measured))
    copy_artifacts(select(FeatureFile.artifact_id).where(FeatureFile.feature_set_id.in_(sets)))
    copy(FeatureFile, FeatureFile.feature_set_id.in_(sets))


# What is compared

Stored = tuple[Workspace, Session, Run]
"""A store, its session, and the run there."""


def _compare(
    found: Check, both: tuple[Stored, Stored], options: RunOptions, images: Sequence[int] | None
) -> None:
    """Compare what a run made with what its repetition made; ``images``: of these alone."""
    run = both[0][2]
    sources = [item.id for item in run.recipe.inputs if item.stage is Stage.SEGMENT]
    # Of cells that both stores have: rows were copied with their ids.
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    if images is not None:
        cells = cells.where(Segmentation.image_id.in_(images))
    if sources:
        cells = cells.where(Segmentation.recipe_id.in_(sources))
    found.tolerance = TOLERANCE
    series: Callable[[Stored], Iterable[Value]]
    match run.stage:
        case Stage.PREDICT:
            found.what, named = "predictions", "cell {}, rank {}"
            series = partial(_predicted, cells=None if images is None else cells)
        case Stage.TRAIN:
            found.what, named, series = "checkpoints and metrics", "epoch {}, {}", _metrics
        case Stage.PROFILE:
            found.what, named, series = "values of profiles", "{1} of well {0}", _profiled
        case Stage.HITS:
            found.what, named, series = "scores", "{0} {1}, {2} {3} {4} {5}: {6}", _scored
        case Stage.SEGMENT:
            found.what, named, found.tolerance = "images' masks", "image {}", 0.0
            series = partial(_masks, images=images)
        case Stage.SPLIT:
            found.what, named, found.tolerance = "members of the split", "{1} of split {0}", 0.0
            series = partial(_members, name=options.inputs["name"])
        case _:
            found.what, named = "measurements", "{1} of cell {0}"
            found.tolerance, series = TOLERANCE_OF_FEATURES, partial(_measurements, cells=cells)
    found.count_all(named, *map(series, both), relative=run.stage is Stage.MEASURE)
    if run.stage is Stage.TRAIN:
        before, now = map(_checkpoint, both)
        if before != now:
            found.largest = found.largest or math.ulp(1.0)  # not the same bits
            found.differ += not found.compared  # a baseline has no metrics that could decide
            text = f"checkpoint: sha256 {before[:12]} before, {now[:12]} now"
            found.differences.insert(0, text)
        found.compared += 1


def _predicted(one: Stored, cells: Select[Any] | None) -> Iterator[Value]:
    """Label and probability by cell and rank."""
    query = select(Prediction.cell_id, Prediction.rank, Label.value, Prediction.probability)
    query = query.join(Label, Label.id == Prediction.label_id)
    query = query.order_by(Prediction.cell_id, Prediction.rank)
    if cells is not None:
        query = query.where(Prediction.cell_id.in_(cells))
    for cell, rank, label, probability in _rows(one, query, Prediction.run_id):
        yield (cell, rank), label, probability


def _metrics(one: Stored) -> list[Value]:
    """The metrics of a training by epoch and name."""
    query = select(RunMetric.epoch, RunMetric.name, RunMetric.value)
    query = query.where(RunMetric.name.not_in(TIMES))
    return sorted(((e, n), "", v) for e, n, v in _rows(one, query, RunMetric.run_id))


def _checkpoint(one: Stored) -> str:
    """The sha256 of the tensors that a training wrote."""
    query = select(Artifact.sha256).join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
    query = query.where(Artifact.kind == ArtifactKind.CHECKPOINT)
    query = query.where(Artifact.path.not_like("%.json")).order_by(Artifact.id)
    return str(next(_rows(one, query, RunArtifact.run_id), ("none",))[0])


def _masks(one: Stored, images: Sequence[int] | None) -> Iterator[Value]:
    query = select(Segmentation.image_id, Segmentation.n_cells, Artifact.sha256)
    query = query.outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
    query = query.order_by(Segmentation.image_id)
    if images is not None:
        query = query.where(Segmentation.image_id.in_(images))
    for image, n_cells, sha256 in _rows(one, query, Segmentation.run_id):
        yield image, f"{n_cells} cells in masks {(sha256 or 'unknown')[:12]}", None


def _members(one: Stored, name: str) -> list[Value]:
    """The fingerprint of each split that a run made, and subset and label of its images."""
    _, session, run = one
    made = session.scalars(select(Split).where(Split.recipe_id == run.recipe_id)).all()
    splits = [split for split in made if name in (split.family, split.name)]
    if not splits:
        raise UserInputError("The split is deleted, so there is nothing to compare with.")
    found: list[Value] = [((x.name, "fingerprint"), x.fingerprint, None) for x in splits]
    query = select(Split.name, SplitMember.image_id, SplitMember.subset, Label.value)
    query = query.join(Label, Label.id == SplitMember.label_id)
    query = query.join(Split, Split.id == SplitMember.split_id)
    query = query.where(Split.id.in_([split.id for split in splits]))
    for split, image, subset, label in session.execute(query):
        found.append(((split, f"image {image}"), f"{subset.value} {label}", None))
    return sorted(found, key=itemgetter(0))


def _rows(one: Stored, query: Any, run: Any) -> Iterator[Any]:
    """The rows of a query that are of the run; ``run`` is their column of run ids."""
    _, session, its_run = one
    mine = query.where(run == its_run.id)
    yield from session.execute(mine.execution_options(yield_per=ROWS))


def _profiled(one: Stored) -> Iterator[Value]:
    """The values of profiles by well and name."""
    workspace, session, run = one
    for file in files_of(session, run.id, ArtifactKind.PROFILES):
        data = workspace.artifacts.read(file.path, file.sha256)
        table = pq.read_table(pa.BufferReader(data)).sort_by("well_id")
        wells, names = table["well_id"].to_pylist(), sorted(table.column_names)
        for well, row in zip(wells, table.select(names).to_pylist(), strict=True):
            yield from (((well, name), "", value) for name, value in row.items())


def _scored(one: Stored) -> list[Value]:
    """The numbers of a hits run by what they are about; a verdict is a text."""
    keys = ("level", "name", "plate_set", "measure", "quantity", "dose_unit")
    names = ("verdict", "value", "low", "high", "p", "q", "n_wells", "n_controls", "n_plates")
    query = select(*(getattr(TreatmentScore, name) for name in (*keys, *names)))
    found = list[Value]()
    for row in _rows(one, query, TreatmentScore.run_id):
        key = tuple(str(value or "") for value in row[: len(keys)])
        verdict, *numbers = row[len(keys) :]
        found.append(((*key, "verdict"), str(verdict or ""), None))
        found += [((*key, n), "", x) for n, x in zip(names[1:], numbers, strict=True)]
    return sorted(found, key=itemgetter(0))


def _measurements(one: Stored, cells: Select[Any]) -> Iterator[Value]:
    """The measurements of cells by cell and name."""
    workspace, session, run = one
    ids = sorted(session.scalars(cells))
    features = open_set(session, workspace.artifacts, run.recipe_id) if ids else BUILT_IN
    names, reader = sorted(features.columns), SetReader(features.files, run.recipe_id)
    for some in in_lists(ids, ROWS):
        there, values = reader(session, np.array(some, dtype=np.int64), names)
        for cell, row in zip(compress(some, there), values[there].tolist(), strict=True):
            for name, value in zip(names, row, strict=True):
                yield (cell, name), "", None if math.isnan(value) else value
