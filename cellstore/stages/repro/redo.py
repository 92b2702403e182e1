"""Redo a run in a store of its own, and compare; what carries it out is handed in.

The stages are not called from here: who asks for the redo passes what runs an order on a store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...config import PredictParams, SplitParams, TrainParams
from ...db.models import (
    Artifact,
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from ...errors import CellstoreError, UserInputError
from ...runs import Workspace, run_in
from ...runs.ledger import code_version, environment
from ...terms import FeatureStorage, Stage, Status
from . import compare
from .compare import Tally
from .facts import DIFFERENT, EQUAL, IDENTICAL, IMPOSSIBLE, Check, Order
from .orders import FROM_FILE, input_of, order_of
from .scratch import Wanted, scratch_store

SAMPLE = 5
"""Images that are segmented or measured again, where nobody says how many."""

MINDED = ("python", "platform", "numpy", "torch", "torchvision", "cellpose", "scikit-image")
"""What of the environment decides the last bits of numbers."""


@dataclass(frozen=True)
class Done:
    """What carrying out an order came to: the number of the new run, and images that failed."""

    run_id: int | None
    failures: tuple[tuple[str, str], ...] = ()


CarryOut = Callable[[Workspace, Stage, Order, str | None], Done]
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
    qc = recipe.parameters.get("leave_out_flagged")
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
        qc=recipe.parameters.get("leave_out_flagged"),
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
    done = carry_out(redone, job.run.stage, _asked(job, where), where)
    job.reasons.extend(f"{name}: {reason}" for name, reason in done.failures[: compare.SHOWN])
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
        return compare.compare_predictions(then, now, runs, cells)
    if run.stage is Stage.TRAIN:
        return compare.compare_trainings(then, now, runs)
    if run.stage is Stage.SEGMENT:
        return compare.compare_masks(then, now, runs, job.images)
    if run.stage is Stage.SPLIT:
        return _splits_compared(then, now, job)
    recipes = (run.recipe_id, new.recipe_id)
    if _in_files(then, run.recipe_id):
        return _files_compared(workspace, redone, then, now, job, recipes)
    return compare.compare_features(then, now, recipes, _cells_of(then, job))


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
        tally = compare.compare_members(then, now, (split.id, again.id))
        tally.count(f"fingerprint of {split.name}", split.fingerprint, again.fingerprint)
        total = tally if total is None else _sum(total, tally)
    if total is None:
        raise UserInputError("The split is deleted, so there is nothing to compare with.")
    return total


def _sum(one: Tally, other: Tally) -> Tally:
    one.compared += other.compared
    one.differ += other.differ
    one.differences = (one.differences + other.differences)[: compare.SHOWN]
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
    tally = Tally("measurements", compare.TOLERANCE_OF_FEATURES)
    cells = sorted(then.scalars(_cells_of(then, job)))
    columns = then.scalars(select(FeatureSet.columns).where(FeatureSet.recipe_id == recipes[0]))
    names = [str(column["name"]) for column in columns.one()]
    old = _from_files(workspace, then, recipes[0], cells, names)
    new = _from_files(redone, now, recipes[1], cells, names)
    compare.compare_values(tally, names, compare.merged(old, new))
    return tally


def _from_files(
    workspace: Workspace, session: Session, recipe_id: int, cells: list[int], names: list[str]
) -> Iterable[compare.Keyed]:
    if not cells:
        return []
    query = (
        select(Artifact.path)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.recipe_id == recipe_id)
        .where(FeatureFile.first_cell_id <= cells[-1], FeatureFile.last_cell_id >= cells[0])
    )
    rows: list[compare.Keyed] = []
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
