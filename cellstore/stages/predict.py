"""Predict: what a trained model says about every cell, appended image by image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, exists, func, insert, or_, select
from sqlalchemy.orm import Session, aliased

from ..config import PredictParams, Selection, as_parameters
from ..db.models import (
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Label,
    Prediction,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
)
from ..errors import JobsFailedError, UnknownNameError, UserInputError
from ..extras import need
from ..ops.branches import TABULAR
from ..reading.cells import CellSource, as_text, cells_query
from ..reading.models import OpenModel, open_model
from ..runs import (
    Outcome,
    RecipeSpec,
    RunHandle,
    Share,
    Tally,
    Task,
    Work,
    Workspace,
    find_run,
    images_of,
    progressed,
    register,
    running,
    segmented,
    work_through,
)
from ..runs.ledger import fail_if_any
from ..terms import LabelField, Stage, Status, Subset

if TYPE_CHECKING:
    from ..ops.crops import CellBlock
    from ..ops.models import ModelMeta

VERSION = 1


@dataclass(frozen=True)
class PredictResult:
    """What a predict run did.

    ``selected`` images were asked for; ``waiting`` of them have no measured cells yet;
    ``earlier`` were labelled before, by this run or one of the same recipe; ``done`` now.
    ``cells`` were labelled now. ``run_id``: where the predictions are.
    """

    run_id: int
    recipe_id: int
    train_run_id: int
    split: str
    selected: int
    waiting: int
    earlier: int
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int


@dataclass(frozen=True)
class _Plan:
    """The model of the training run, and the images to label; ``unseen``: it opens none."""

    params: PredictParams
    model: OpenModel
    split: Split
    label_ids: NDArray[np.int64]
    source: CellSource
    images: Select[int]
    selected: int
    ready: int
    unseen: bool

    @property
    def trained(self) -> Run:
        """The training run."""
        return self.model.run


@dataclass(frozen=True)
class _Labeller:
    """A model, and the label id of each of its classes."""

    model: OpenModel
    label_ids: NDArray[np.int64]
    top_k: int

    def read(self, order: int) -> CellBlock:
        """Return the cells of the image with this id."""
        return self.model.reader(order)

    def compute(self, loaded: Sequence[CellBlock]) -> list[list[dict[str, Any]]]:
        """Return rows of table ``predictions`` for the cells of each image, but for the run."""
        return [self._rows(cells.cell_ids.numpy(), self.model.predict(cells)) for cells in loaded]

    def keep(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep no file: the rows are all there is."""
        return made

    def _rows(
        self, cell_ids: NDArray[np.int64], probabilities: NDArray[np.float64]
    ) -> list[dict[str, Any]]:
        kept = min(self.top_k, len(self.label_ids))
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :kept]
        chosen = np.clip(np.take_along_axis(probabilities, order, axis=1), 0.0, 1.0)
        names = ("cell_id", "rank", "label_id", "probability")
        columns = (
            np.repeat(cell_ids, kept),
            np.tile(np.arange(1, kept + 1), len(cell_ids)),
            self.label_ids[order].ravel(),
            chosen.ravel(),
        )
        values = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in values]


def predict(
    workspace: Workspace,
    params: PredictParams | None = None,
    *,
    run: str = "latest",
    device: str = "auto",
) -> PredictResult:
    """Label the cells of a selection of images with the model of a training run.

    Rows are appended, never changed. An interrupted run of the same checkpoint and images is gone
    on with. Where more images have been measured since, a new run labels all of them, so that
    every finished run is whole.

    Raises:
        MissingExtraError: torch and the like are not installed.
        UnknownNameError: no such training run or plate, or the feature set is gone.
        UserInputError: the run has no checkpoint, none of the images has measured cells, or the
            feature set is not the one that the network was trained on.
        StorageError: the checkpoint is damaged.

    """
    need("train")
    from ..reading.blocks import choose_device

    params = _checked(params or PredictParams())
    chosen = choose_device(device)
    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        plan = _plan(session, params, open_model(session, workspace, trained, chosen))
    labeller = _Labeller(plan.model, plan.label_ids, params.top_k)
    with workspace.database.begin() as session:
        recipe = register(session, _spec(session, plan))
        state = progressed(session, recipe.id, plan.images, unseen=plan.unseen)
        todo = state.todo + state.failed
        earlier = _latest(session, recipe.id)
    unfinished = earlier if earlier is not None and earlier.status is not Status.DONE else None
    if earlier is not None and unfinished is None and todo == 0:
        return _result(plan, recipe, earlier.id, plan.ready, Outcome(), 0)
    return _run(workspace, plan, recipe, labeller, unfinished, plan.ready - todo)


def _checked(params: PredictParams) -> PredictParams:
    if params.top_k < 1:
        raise UserInputError(f"Top-k must be 1 or more, not {params.top_k}.")
    if params.subset is not None and params.subset not in list(Subset):
        raise UnknownNameError.of("side", params.subset, list(Subset))
    return params


def _plan(session: Session, params: PredictParams, model: OpenModel) -> _Plan:
    split = session.get_one(Split, model.run.split_id)
    chosen = _chosen(session, params, split)
    split_id = split.id if params.subset is not None else None
    source = replace(model.source, split_id=split_id, subset=params.subset, plates=params.plates)
    unseen = model.meta.branches == (TABULAR,)
    images = _measured(segmented(chosen, source.segment_id), source, not unseen)
    selected, ready = (_count(session, query) for query in (chosen, images))
    if ready == 0:
        raise UserInputError(_nothing_to_label(params, split, selected, model.run.id))
    label_ids = _label_ids(session, model.meta)
    return _Plan(params, model, split, label_ids, source, images, selected, ready, unseen)


def _chosen(session: Session, params: PredictParams, split: Split) -> Select[int]:
    chosen = images_of(session, Selection(plates=params.plates))
    if params.subset is None:
        return chosen
    members = select(SplitMember.image_id).where(
        SplitMember.split_id == split.id, SplitMember.subset == params.subset
    )
    return chosen.where(Image.id.in_(members))


def _measured(images: Select[int], source: CellSource, pixels: bool) -> Select[int]:
    """Those of ``images``, joined to their segmentations, whose cells are measured.

    An image without cells is measured, too. ``pixels``: not those that have not been seen.
    """
    measured = aliased(Job)  # the jobs of this stage are looked up around it
    done = and_(
        measured.recipe_id == source.measure_id,
        measured.image_id == Image.id,
        measured.content_sha256 == Image.content_sha256,
        measured.status == Status.DONE,
    )
    if source.features.in_table:
        return images.where(exists().where(done))
    imported = ~exists().where(measured.recipe_id == source.measure_id)
    found = images.where(or_(exists().where(done), and_(imported, _in_files(source))))
    return found.where(Image.content_sha256.is_not(None)) if pixels else found


def _in_files(source: CellSource) -> ColumnElement[bool]:
    """Whether cells of a segmentation are within the range of cells of a file of the feature set.

    One that is, and has no row there, is labelled as an image without cells.
    """
    file = and_(
        Cell.segmentation_id == Segmentation.id,
        FeatureSet.recipe_id == source.measure_id,
        FeatureFile.feature_set_id == FeatureSet.id,
        Cell.id.between(FeatureFile.first_cell_id, FeatureFile.last_cell_id),
    )
    return or_(Segmentation.n_cells == 0, exists().where(file).correlate(Segmentation))


def _count(session: Session, images: Select[int]) -> int:
    named = select(func.count()).select_from(Image).where(Image.id.in_(images))
    return session.scalar(named) or 0


def _nothing_to_label(params: PredictParams, split: Split, selected: int, run_id: int) -> str:
    if selected == 0:
        where = "in the store" if params.subset is None else f"in split {split.name!r}"
        side = "" if params.subset is None else f" on the {params.subset} side"
        return f"There is no image{side} {where} to label. Choose another side or other plates."
    return (
        f"None of the {selected} images has cells measured by the recipes of training run "
        f"{run_id}. Run: cellstore segment, then: cellstore measure; or ingest their features"
    )


def _spec(session: Session, plan: _Plan) -> RecipeSpec:
    parameters = as_parameters(plan.params) | {"images": _digest_of(session, plan.images)}
    if plan.source.features.mark is not None:
        parameters["feature_files"] = plan.source.features.mark
    model = plan.model
    inputs = (session.get_one(Recipe, model.run.recipe_id), model.segment, model.measure)
    sha256 = model.checkpoint.tensors.sha256
    return RecipeSpec(Stage.PREDICT, VERSION, parameters, sha256, inputs)


def _digest_of(session: Session, images: Select[int]) -> str:
    """What the images of the selection hold: with more of them, a run of its own labels all."""
    digest = hashlib.sha256()
    query = select(Image.content_sha256, Image.id).where(Image.id.in_(images))
    ordered = query.order_by(Image.content_sha256, Image.id).execution_options(yield_per=10_000)
    for content, image_id in session.execute(ordered):
        digest.update(f"{content or image_id}\n".encode())
    return digest.hexdigest()


def _latest(session: Session, recipe_id: int) -> Run | None:
    query = select(Run).where(Run.recipe_id == recipe_id, Run.stage == Stage.PREDICT)
    return session.scalars(query.order_by(Run.id.desc()).limit(1)).first()


def _label_ids(session: Session, meta: ModelMeta) -> NDArray[np.int64]:
    query = select(Label.value, Label.id).where(Label.field == LabelField(meta.field))
    known = dict(session.execute(query).all())
    gone = [value for value in meta.labels if value not in known]
    if gone:
        raise UnknownNameError.of("label", gone[0], known)
    return np.array([known[value] for value in meta.labels], dtype=np.int64)


def _run(
    workspace: Workspace,
    plan: _Plan,
    recipe: Recipe,
    labeller: _Labeller,
    unfinished: Run | None,
    earlier: int,
) -> PredictResult:
    outcome = Outcome()
    cells = 0
    try:
        with running(
            workspace.database,
            recipe,
            parent_id=plan.trained.id,
            split_id=plan.split.id,
            query=as_text(cells_query(plan.source)),
            resume=None if unfinished is None else unfinished.id,
        ) as run:
            tally = Tally(run.id, recipe.id)
            outcome = work_through(
                workspace.database,
                workspace.progress,
                _work(labeller, tally),
                # A run is whole or not finished: what failed is tried again.
                Share(run.id, recipe.id, plan.images, unseen=plan.unseen, again=True),
            )
            cells = tally.cells
            run.result = _summary(workspace, run, outcome)
            # A run that lacks images is not finished: the next call goes on with it.
            fail_if_any(outcome.failed, outcome.done, "labelled")
    except JobsFailedError:
        return _result(plan, recipe, run.id, earlier, outcome, cells)
    return _result(plan, recipe, run.id, earlier, outcome, cells)


def _work(labeller: _Labeller, tally: Tally) -> Work[int, list[dict[str, Any]]]:
    def fetch(_session: Session, tasks: Sequence[Task]) -> dict[int, int]:
        return {task.job_id: task.image_id for task in tasks}

    def write(session: Session, pairs: Sequence[tuple[Task, list[dict[str, Any]]]]) -> None:
        for _, rows in pairs:
            if rows:
                keys = {"run_id": tally.run_id}
                session.execute(insert(Prediction), [{**row, **keys} for row in rows])
            tally.add(session, len({row["cell_id"] for row in rows}))

    return Work("predict", lambda: labeller, fetch, write)


def _summary(workspace: Workspace, run: RunHandle, outcome: Outcome) -> dict[str, Any]:
    """The whole run, earlier attempts included."""
    mine = and_(Job.run_id == run.id, Job.status == Status.DONE)
    with workspace.database.read() as session:
        images = session.scalar(select(func.count()).select_from(Job).where(mine))
        cells = session.scalar(
            select(func.count()).where(Prediction.run_id == run.id, Prediction.rank == 1)
        )
    return {"images": images, "failed": outcome.failed, "cells": cells}


def _result(
    plan: _Plan, recipe: Recipe, run_id: int, earlier: int, outcome: Outcome, cells: int
) -> PredictResult:
    return PredictResult(
        run_id=run_id,
        recipe_id=recipe.id,
        train_run_id=plan.trained.id,
        split=plan.split.name,
        selected=plan.selected,
        waiting=plan.selected - plan.ready,
        earlier=earlier,
        done=outcome.done,
        failures=tuple(outcome.failures),
        cells=cells,
    )
