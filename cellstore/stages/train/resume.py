"""Trainings that did not come to their end, and what is needed to go on with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...config import TrainParams
from ...db.models import Recipe, Run, RunMetric, Split
from ...errors import StorageError, StoreError, UserInputError
from ...ops.branches import BRANCHES
from ...reading.cells import input_of
from ...reading.featuresets import set_of_recipe
from ...runs import Workspace, files_of, find_run, fingerprint
from ...runs.leases import bury_runs, shown_worker
from ...runs.lookup import RUN_WORDS
from ...terms import ArtifactKind, FeatureStorage, Stage, Status
from .outcome import TrainResult, finished
from .plan import FROM_FILE, Names, Plan

if TYPE_CHECKING:
    from ...ops.training_state import TrainingState

BASELINE = "baseline"
"""The parameter of a run that is no network; such a run is done in one go."""

_TUPLES = ("branches", "channels", "augment")


@dataclass(frozen=True)
class Order:
    """What is to be trained; ``run``: the run to go on with, of this ``recipe``."""

    params: TrainParams
    names: Names
    run: Run | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Beginning:
    """Where a training begins: it is done already, goes on in a run, or (neither) is new."""

    done: TrainResult | None = None
    run_id: int | None = None


def order_of(workspace: Workspace, reference: str) -> Order:
    """Return what a run that is not finished was asked to do; ``latest``: the last such run.

    Raises:
        UnknownNameError: there is no such training run.
        UserInputError: it is finished, is running, or is a baseline.

    """
    with workspace.database.begin() as session:
        bury_runs(session)
    with workspace.database.read() as session:
        run = _find(session, reference)
        recipe = session.get_one(Recipe, run.recipe_id)
        if BASELINE in recipe.parameters:
            raise UserInputError(f"Run {run.id} is a baseline, trained in one go. Train it again.")
        if run.status is Status.DONE:
            raise UserInputError(
                f"Run {run.id} is finished: there is nothing to go on with. Label images with it: "
                f"cellstore predict --run {run.id}"
            )
        if run.status is Status.RUNNING:
            raise UserInputError(f"{_is_at_it(run)}, or resume it when it is over.")
        return _order(session, run, recipe)


def _find(session: Session, reference: str) -> Run:
    if reference not in RUN_WORDS:
        return find_run(session, reference, Stage.TRAIN)
    query = select(Run).where(Run.stage == Stage.TRAIN, Run.status != Status.DONE)
    found = session.scalars(query.order_by(Run.id.desc()).limit(1)).first()
    if found is None:
        raise UserInputError("Every training is finished: there is nothing to go on with.")
    return found


def _order(session: Session, run: Run, recipe: Recipe) -> Order:
    measure = input_of(session, recipe, Stage.MEASURE)
    segment = input_of(session, recipe, Stage.SEGMENT)
    features = set_of_recipe(session, measure.id)
    name = features.name if features and features.storage is FeatureStorage.FILES else None
    split = session.get_one(Split, run.split_id)
    names = (split.name, str(segment.id), str(measure.id))
    return Order(_params(recipe.parameters, name), names, run, recipe)


def _params(stored: Mapping[str, Any], features: str | None) -> TrainParams:
    known = {item.name for item in fields(TrainParams)}
    values = {name: value for name, value in stored.items() if name in known}
    values = {"branches": BRANCHES} | values | {"features": features}
    values |= {name: tuple(values[name]) for name in _TUPLES if name in values}
    if "leave_out_flagged" in stored:
        values["leave_out_flagged"] = str(stored["leave_out_flagged"])
    return TrainParams(**values)


def check_same(order: Order, plan: Plan) -> None:
    """Refuse to go on where a new training would not be the one that was begun.

    Raises:
        UserInputError: cells or features are not those that the run has read.

    """
    run, recipe = order.run, order.recipe
    if run is None or recipe is None or fingerprint(plan.spec) == recipe.fingerprint:
        return
    now, then = plan.spec.parameters, recipe.parameters
    what = "This cellstore trains in another way than the one that began it"
    if now.get("feature_files") != then.get("feature_files"):
        what = f"Feature set {plan.source.features.name!r} has changed since"
    elif now.get("cells") != then.get("cells"):
        what = f"The measured cells of split {plan.split.name!r} have changed since"
    raise UserInputError(f"Run {run.id} cannot be gone on with. {what}; train anew.")


def choose_beginning(workspace: Workspace, plan: Plan, order: Order, *, force: bool) -> Beginning:
    """Return where the training of a plan begins. ``force``: at the beginning, whatever there is.

    An unfinished run of the same recipe is gone on with, if it has seen the end of an epoch.

    Raises:
        UserInputError: a run of the same recipe is running.

    """
    if order.run is not None:
        return Beginning(run_id=order.run.id)
    if force:
        return Beginning()
    done = finished(workspace, plan)
    if done is not None:
        return Beginning(done)
    with workspace.database.begin() as session:
        bury_runs(session)
        runs = _unfinished(session, plan)
        busy = next((run for run in runs if run.status is Status.RUNNING), None)
        kept = [run for run in runs if files_of(session, run.id, ArtifactKind.TRAINING_STATE)]
    if busy is not None:
        raise UserInputError(f"{_is_at_it(busy)}, or train another one beside it with --force.")
    return Beginning(run_id=kept[0].id) if kept else Beginning()


def _unfinished(session: Session, plan: Plan) -> list[Run]:
    """The runs of a plan's recipe that have not come to their end, the latest first."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(plan.spec), Recipe.stage == Stage.TRAIN)
        .where(Run.status != Status.DONE, Run.split_id == plan.split.id)
    )
    return list(session.scalars(query.order_by(Run.id.desc())))


def _is_at_it(run: Run) -> str:
    return (
        f"Run {run.id} is training this just now, at {shown_worker(run.process) or run.host}. Wait "
        f"for it; mark it as over, if that machine has lost it, with: cellstore cancel {run.id}"
    )


def read_state(workspace: Workspace, run_id: int) -> TrainingState | None:
    """Return the state of a run at the end of its last epoch; none: it has seen no such end.

    Raises:
        StorageError: the file is damaged, or is that of another run.

    """
    from ...ops.training_state import TrainingState

    with workspace.database.read() as session:
        files = files_of(session, run_id, ArtifactKind.TRAINING_STATE)
    if not files:
        return None
    state = TrainingState.from_bytes(workspace.artifacts.read(files[-1].path, files[-1].sha256))
    if state.record.get("run") != run_id:
        raise StorageError(
            f"The stored state of run {run_id} is that of another run. Train anew with --force."
        )
    return state


def check_not_moved(session: Session, run_id: int, state: TrainingState | None) -> None:
    """Refuse to go on from a state that is not the last one of its run any more.

    Raises:
        StoreError: another process has gone on with it since the state was read.

    """
    epochs = session.scalar(
        select(func.count(RunMetric.epoch.distinct())).where(RunMetric.run_id == run_id)
    )
    if epochs != (0 if state is None else len(state.record["epochs"])):
        raise StoreError(
            f"Another process has gone on with run {run_id} in the meantime. Go on from where it "
            f"is now with: cellstore train --resume {run_id}"
        )


def check_start(order: Order, state: TrainingState | None) -> None:
    """Refuse a run that has seen no end of an epoch, and began from a file that may be gone.

    Raises:
        UserInputError: it is so.

    """
    if order.run is not None and state is None and order.params.weights == FROM_FILE:
        raise UserInputError(
            f"Run {order.run.id} was broken off in its first epoch, and began from a file of "
            "weights: train anew, with --weights and that file."
        )
