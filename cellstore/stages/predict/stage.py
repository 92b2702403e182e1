"""The stage: label the images of a selection, in one run that is whole when it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from ...config import PredictParams
from ...db.models import Job, Prediction, Recipe, Run
from ...errors import JobsFailedError
from ...extras import need
from ...reading.models import open_model
from ...runs import (
    Outcome,
    RunHandle,
    Share,
    Tally,
    Workspace,
    attach,
    find_run,
    keep_file,
    progressed,
    register,
    running,
    work_through,
)
from ...runs.ledger import fail_if_any
from ...terms import ArtifactKind, Stage, Status
from .plan import Plan, check_params, make_plan
from .rows import Labeller, Target, predict_work


@dataclass(frozen=True)
class PredictResult:
    """What a predict run did.

    ``selected`` images were asked for; ``waiting`` of them have no measured cells yet;
    ``earlier`` were labelled before, by this run or one of the same recipe; ``done`` now.
    ``cells`` were labelled now. ``run_id``: where the predictions are. ``split`` is that of the
    training run. ``feature_set``: where the embeddings are. ``notes`` are sentences that a reader
    of the labels has to know.
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
    feature_set: str | None = None
    notes: tuple[str, ...] = ()


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
        UnknownNameError: no such training run, split, plate, well or channel, a label of the model
            is gone, or the feature set is.
        UserInputError: the run has no checkpoint, none of the images has measured cells, the
            feature set is not the one that the model was trained on, a plate has no control cells
            to be normalised against, or the embedding cannot have its name.
        StorageError: the checkpoint is damaged.

    """
    need("train")
    from ...ops.devices import pick_device

    params, chosen = check_params(params or PredictParams()), str(pick_device(device))
    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        model = open_model(session, workspace, trained, chosen)
        plan = make_plan(session, workspace, params, model)
    with workspace.database.begin() as session:
        recipe = register(session, plan.spec)
        target = None if plan.embedding is None else _target(session, plan)
        state = progressed(session, recipe.id, plan.images, unseen=plan.unseen)
        todo = state.todo + state.failed
        earlier = _latest(session, recipe.id)
    unfinished = earlier if earlier is not None and earlier.status is not Status.DONE else None
    if earlier is not None and unfinished is None and todo == 0:
        return _result(plan, recipe, earlier.id, plan.ready, Outcome(), 0)
    return _run(workspace, plan, recipe, target, unfinished, plan.ready - todo)


def _target(session: Session, plan: Plan) -> Target:
    assert plan.embedding is not None
    return Target(plan.embedding, *plan.embedding.register(session))


def _latest(session: Session, recipe_id: int) -> Run | None:
    query = select(Run).where(Run.recipe_id == recipe_id, Run.stage == Stage.PREDICT)
    return session.scalars(query.order_by(Run.id.desc()).limit(1)).first()


def _run(
    workspace: Workspace,
    plan: Plan,
    recipe: Recipe,
    target: Target | None,
    unfinished: Run | None,
    earlier: int,
) -> PredictResult:
    outcome = Outcome()
    cells = 0
    labeller = Labeller(plan.model, plan.label_ids, plan.top_k, target is not None)
    try:
        with running(
            workspace.database,
            recipe,
            parent_id=plan.trained.id,
            split_id=plan.split.id,
            query=plan.query,
            resume=None if unfinished is None else unfinished.id,
        ) as run:
            _keep_plates(workspace, run, plan)
            tally = Tally(run.id, recipe.id)
            outcome = work_through(
                workspace.database,
                workspace.progress,
                predict_work(workspace, labeller, tally, target),
                # A run is whole or not finished: what failed is tried again.
                Share(run.id, recipe.id, plan.images, unseen=plan.unseen, again=True),
            )
            cells = tally.cells
            run.result = _summary(workspace, plan, run, recipe, outcome)
            # A run that lacks images is not finished: the next call goes on with it.
            fail_if_any(outcome.failed, outcome.done, "labelled")
    except JobsFailedError:
        return _result(plan, recipe, run.id, earlier, outcome, cells)
    return _result(plan, recipe, run.id, earlier, outcome, cells)


def _keep_plates(workspace: Workspace, run: RunHandle, plan: Plan) -> None:
    """Keep what was fitted to plates that the training has not seen, as a file of the run."""
    if not plan.plates:
        return
    text = json.dumps(plan.plates, indent=1, sort_keys=True, allow_nan=False)
    file = workspace.artifacts.write(ArtifactKind.CHECKPOINT, text.encode(), ".json")
    with workspace.database.begin() as session:
        attach(session, run.id, keep_file(session, file))


def _summary(
    workspace: Workspace, plan: Plan, run: RunHandle, recipe: Recipe, outcome: Outcome
) -> dict[str, Any]:
    """The whole run, earlier attempts included."""
    mine = and_(Job.run_id == run.id, Job.recipe_id == recipe.id, Job.status == Status.DONE)
    with workspace.database.read() as session:
        images = session.scalar(select(func.count()).select_from(Job).where(mine))
        cells = session.scalar(
            select(func.count()).where(Prediction.run_id == run.id, Prediction.rank == 1)
        )
    counts = {"images": images, "failed": outcome.failed, "cells": cells}
    named = {"feature_set": plan.embedding.name} if plan.embedding else {}
    return {**counts, **named, "notes": list(plan.notes)}


def _result(
    plan: Plan, recipe: Recipe, run_id: int, earlier: int, outcome: Outcome, cells: int
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
        feature_set=plan.embedding.name if plan.embedding else None,
        notes=plan.notes,
    )
