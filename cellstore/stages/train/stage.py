"""Train: a network on the cells of a split, read through one stored query.

Where a feature set is named, the network reads its columns; where masks or flows of its cells are
unknown, it has fewer branches, and says so. Several processes may train one network together: the
first of them writes rows and files, the others compute.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import TrainParams, TrainSetup
from ...db.models import Recipe, Run
from ...errors import CellstoreError, RunCancelledError, TeamError
from ...extras import need
from ...progress import Silent
from ...reading.cells import as_text, cells_query
from ...runs import RunHandle, Workspace, check_still_ours, fingerprint, running
from .keeping import forget_state, keep_checkpoint, keep_epoch, remove
from .logs import Logs, check_logs, open_logs
from .model import (
    Model,
    describe,
    fit_config,
    left_out,
    make_batches,
    make_reader,
    new_model,
    remarks,
    share_of_batch,
    with_class_weights,
)
from .outcome import TrainResult, metrics_of, result_of, summary
from .plan import Plan, check_sides, commit, make_plan
from .resume import (
    Order,
    check_not_moved,
    check_same,
    check_start,
    choose_beginning,
    order_of,
    read_state,
)
from .telling import Teller

if TYPE_CHECKING:
    from ...ops.teams import Team
    from ...ops.training import EpochMetrics, FitConfig, FitResult, Snapshot
    from ...ops.training_state import TrainingState

LOGS = Path("logs")
LISTEN_SECONDS = 5.0
"""How often a training looks whether it was cancelled; the end of an epoch apart."""

NO_SETUP = TrainSetup()


@dataclass(frozen=True)
class _Work:
    """A training that is about to begin: everything but the run."""

    workspace: Workspace
    plan: Plan
    model: Model
    config: FitConfig
    setup: TrainSetup
    team: Team
    recipe: Recipe
    state: TrainingState | None


def train(
    workspace: Workspace,
    params: TrainParams | None = None,
    *,
    split: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    device: str = "auto",
    setup: TrainSetup = NO_SETUP,
    force: bool = False,
    resume: str | None = None,
) -> TrainResult:
    """Train on the training side of a split (default: the latest) and keep the best epoch.

    Excluded cells are left out; features are scaled as the training side is. Under the
    published protocol the test side is the validation side too, as in the study. A training
    that was finished with the same recipe is returned as it is, and one that was broken off after
    an epoch is gone on with, unless ``force``. ``resume``: the run to go on with (a number, or
    ``latest``), by what it was asked to do; ``params`` and the names do not count then.

    With several devices this very program is run again for each, as Lightning does; on the others
    the result is the same, and nothing is written.

    Raises:
        MissingExtraError: torch and the like, or what a log needs, are not installed.
        UnknownNameError: no such split, recipe, feature set, branch, backbone and so on.
        UserInputError: there are no measured cells on a side, parameters are out of range, what
            a branch looks at is unknown, or the run cannot be gone on with.
        RunCancelledError: ``cellstore cancel`` has ended it.

    """
    need("train")
    order = Order(params or TrainParams(), (split, segmentation, measurement))
    if resume is not None:
        order = order_of(workspace, resume)
    plan, config = _prepare(workspace, order, device, setup)
    with _as_team(config, setup) as team:
        share_of_batch(config.batch_size, team.size)
        _check_agreed(team, plan)
        begin = team.of_first(lambda: choose_beginning(workspace, plan, order, force=force))
        if begin.done is not None:
            return begin.done
        check_sides(plan)
        state = None if begin.run_id is None else read_state(workspace, begin.run_id)
        check_start(order, state)
        model = new_model(workspace, plan, team, state)
        recipe = team.of_first(lambda: commit(workspace, plan))
        work = _Work(workspace, plan, model, config, setup, team, recipe, state)
        return _run(work, begin.run_id)


def _prepare(
    workspace: Workspace, order: Order, device: str, setup: TrainSetup
) -> tuple[Plan, FitConfig]:
    """Find out, before anything is written, what is asked for and whether it can be done."""
    from ...ops.teams import check_device

    check_device(device, order.params.precision, setup.devices)
    check_logs(setup.logs)
    config = fit_config(order.params, setup, device)
    known = order.recipe.weights_sha256 if order.recipe else None
    plan = make_plan(workspace, order.params, order.names, known)
    check_same(order, plan)
    return plan, with_class_weights(config, plan)


def _check_agreed(team: Team, plan: Plan) -> None:
    """Refuse processes that found different things in the store, as when a split was made just now.

    Raises:
        TeamError: it is so; the others then end, too.

    """
    mine = fingerprint(plan.spec)
    if team.of_first(lambda: mine) != mine:
        raise TeamError(
            "The processes of this training were asked for different things: the store has changed "
            "while they began. Start them again, with --split and the like given by name."
        )


@contextmanager
def _as_team(config: FitConfig, setup: TrainSetup) -> Iterator[Team]:
    from ...ops.teams import Team, open_fabric

    team = Team(open_fabric(config.device, config.precision, setup.devices))
    try:
        with _ended_by_sigterm():
            yield team
    finally:
        team.leave()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which clusters send before they kill, be the same as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of signals
        return

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(work: _Work, run_id: int | None) -> TrainResult:
    """Train in a run of the ledger, which is the first process's; the others only compute."""
    files: list[str] = []
    with _as_run(work, run_id) as run:
        result = _fit(work, run)
        if run is not None:
            run.result = _keep(work, run, result)
            files = forget_state(run)
    remove(work.workspace, files)
    return work.team.of_first(lambda: _told(work, run))


@contextmanager
def _as_run(work: _Work, run_id: int | None) -> Iterator[RunHandle | None]:
    if not work.team.is_first:
        yield None
        return
    plan, workspace = work.plan, work.workspace
    with running(
        workspace.database,
        work.recipe,
        split_id=plan.split.id,
        seed=plan.params.seed,
        query=as_text(cells_query(plan.source)),
        resume=run_id,
        alone=True,
    ) as run:
        with workspace.database.read() as session:
            check_not_moved(session, run.id, work.state)
        try:
            yield run
        except (KeyboardInterrupt, RunCancelledError):
            workspace.progress.note(f"Go on with: cellstore train --resume {run.id}")
            raise
        except RuntimeError as error:
            if work.team.size == 1 or isinstance(error, CellstoreError):
                raise
            raise TeamError(
                "Another process of this training has ended, so it cannot go on. "
                f"Go on with: cellstore train --resume {run.id}"
            ) from error


def _fit(work: _Work, run: RunHandle | None) -> FitResult:
    from ...ops.training import fit

    reader = make_reader(work.workspace, work.plan, work.model.fitted, work.team)
    train = make_batches(work.plan, reader, work.team, "train")
    validation = make_batches(work.plan, reader, work.team, "validation")
    teller = _teller(work, run, train.count())
    logs = _logs(work, run)

    def keep(epoch: EpochMetrics, snapshot: Snapshot) -> None:
        assert run is not None
        waited = train.waited + validation.waited
        state = snapshot().beside({"fitted": work.model.fitted.to_json()})
        logs.write(epoch.epoch, keep_epoch(work.workspace, run, epoch, waited, state))
        teller.epoch(epoch)

    teller.begin(0 if work.state is None else len(work.state.record["epochs"]))
    ended = False
    try:
        result = fit(
            work.model.net,
            train,
            validation,
            work.config,
            keep,
            on_step=teller.step,
            start=work.state,
            fabric=work.team.fabric,
        )
        ended = True
    finally:
        teller.end()
        logs.close(done=ended)
    return result


def _teller(work: _Work, run: RunHandle | None, steps: int) -> Teller:
    progress = work.workspace.progress if run is not None else Silent()
    heard = time.monotonic()

    def listen() -> None:
        nonlocal heard
        # Among several processes only the end of an epoch is a place where all can stop.
        if run is None or work.team.size > 1 or time.monotonic() - heard < LISTEN_SECONDS:
            return
        heard = time.monotonic()
        with work.workspace.database.read() as session:
            check_still_ours(session, run)

    return Teller(progress, work.config.max_epochs, steps, listen)


def _logs(work: _Work, run: RunHandle | None) -> Logs:
    if run is None or not work.setup.logs:
        return Logs(work.workspace.progress.note)
    folder = work.setup.log_dir or LOGS / f"run-{run.id}"
    parameters, tell = work.plan.spec.parameters, work.workspace.progress.note
    logs = open_logs(work.setup.logs, folder, run.id, parameters, tell)
    with work.workspace.database.read() as session:
        for record in metrics_of(session, run.id):
            logs.write(int(record.pop("epoch")), record)
    return logs


def _keep(work: _Work, run: RunHandle, result: FitResult) -> dict[str, Any]:
    """Write the checkpoint; return what the run keeps of its training."""
    meta = describe(work.plan, work.model, work.recipe)
    sha256 = keep_checkpoint(work.workspace, run, meta, work.plan, result)
    columns = left_out(work.plan, work.model.fitted.scaler)
    notes = remarks(work.plan, work.model.fitted)
    kept = summary(work.plan, result, columns, notes)
    resumed = 0 if work.state is None else len(work.state.record["epochs"])
    return kept | {"checkpoint_sha256": sha256, "resumed_after": resumed}


def _told(work: _Work, run: RunHandle | None) -> TrainResult:
    assert run is not None
    with work.workspace.database.read() as session:
        return replace(result_of(session, session.get_one(Run, run.id)), already_done=False)
