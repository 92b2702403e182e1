"""Train: a network on the cells of a split, read through one stored query.

:func:`train` is the whole training from top to bottom: what to train, on which device, from which
start, the loop over epochs with its checkpoint of each, and what is kept at the end. Several
processes may train one network together: the first of them writes rows and files, the others
compute.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..config import Sources, TrainParams, TrainSetup
from ..enums import ArtifactKind, Stage, Status, Subset
from ..errors import (
    CellstoreError,
    RunCancelledError,
    StoreError,
    TeamError,
    UserInputError,
)
from ..jobs.queue import close_dead_runs, shown_worker
from ..jobs.runs import (
    RecipeSpec,
    RunHandle,
    check_still_ours,
    code_version,
    files_of,
    fingerprint,
    finished_run,
    forget_files,
    keep_files,
    result_of,
    running,
)
from ..jobs.workspace import Workspace
from ..learn.branches import BRANCHES, IMAGE, TABULAR, choose_branches, choose_channels
from ..learn.training_cells import (
    TrainingCells,
    excluded_columns,
    find_training_cells,
    validation_subset,
)
from ..models import Recipe, Run, RunMetric
from ..notebooks import Shown
from ..query.cells import plane_of
from ..settings import Progress, need

if TYPE_CHECKING:
    from ..learn.batches import Batches
    from ..learn.normalising import Scaler
    from ..learn.trackers import Trackers
    from ..learn.training import EpochMetrics, Team, Training, TrainingState

VERSION = 1
NO_WEIGHTS, IMAGENET = "none", "imagenet"
FROM_FILE = "file"
"""What a recipe calls a file of weights, wherever it lay."""

STATE = ArtifactKind.TRAINING_STATE
LOGS = Path("logs")
AGAIN = "The same command goes on after the last whole epoch."
LISTEN_SECONDS = 5.0
"""How often a training looks whether it was cancelled; the end of an epoch apart."""


@dataclass(frozen=True)
class TrainResult(Shown):
    """A finished training.

    ``images``, ``cells`` and ``images_without_cells`` count by subset (``train``,
    ``validation``); ``validation_subset`` is the subset of the split that stopped the training,
    ``None`` where no image validates: then all epochs were trained, and the last is kept.
    ``metrics`` has one record per epoch. ``already_done``: the run was there before this call.
    ``notes`` are sentences that a reader of the scores has to know. ``columns_excluded`` of the
    feature set have no value in the training subset. ``qc_run_id``: the quality-control run whose
    ``images_flagged`` (whole) and ``cells_flagged`` (those of such images included) were excluded.
    ``resumed_after``: the epoch after which the run was resumed last; 0: it never was.
    ``trackers``: by name (mlflow, wandb) the id of its run there, and a link to it if there is one.

    Of a cross-validation ``split`` is its name and ``folds`` has the result of each fold, with the
    ``predict_run_id`` in which the model labelled the test images of the fold. All else but
    ``notes`` and ``already_done`` is then that of the last fold.
    """

    run_id: int
    recipe_id: int
    split: str
    already_done: bool
    classes: int
    classes_without_cells: tuple[str, ...]
    images: dict[str, int]
    cells: dict[str, int]
    images_without_cells: dict[str, int]
    validation_subset: str | None
    epochs: int
    best_epoch: int
    stopped_early: bool
    checkpoint_sha256: str
    metrics: tuple[dict[str, float], ...]
    notes: tuple[str, ...]
    feature_set: str | None = None
    branches: tuple[str, ...] = BRANCHES
    columns_excluded: tuple[str, ...] = ()
    qc_run_id: int | None = None
    images_flagged: int = 0
    cells_flagged: int = 0
    resumed_after: int = 0
    trackers: dict[str, dict[str, str]] = field(default_factory=dict)
    predict_run_id: int | None = None
    folds: tuple[TrainResult, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is trained on which cells. ``validation``: the subset that stops it, if any.

    ``unknown``: how many of its images are of a class that is not in the training subset; they
    are excluded.
    """

    params: TrainParams
    cells: TrainingCells
    validation: Subset | None
    unknown: int
    branches: tuple[str, ...]
    channels: tuple[str, ...]
    notes: tuple[str, ...]
    spec: RecipeSpec


def train(
    workspace: Workspace,
    params: TrainParams | None = None,
    *,
    split: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    device: str = "auto",
    setup: TrainSetup | None = None,
    force: bool = False,
) -> TrainResult:
    """Train on the training subset of a split; see ``Store.train``.

    Excluded cells do not count; features are scaled as the training subset is. Under the
    published protocol the test subset is the validation subset too, as in the study. With several
    devices this very program is run again for each, as Lightning does; on the others the result is
    the same, and nothing is written.
    """
    need("train")
    from ..learn.normalising import Scaler, fit_inputs
    from ..learn.trackers import check_logs
    from ..learn.trained_models import planes_of
    from ..learn.training import Team, check_device

    # What to train, and whether it can be done, before anything is written.
    params, setup = params or TrainParams(), setup or TrainSetup()
    check_device(device, params.precision, setup.devices)
    check_logs(setup.logs)
    plan = make_plan(workspace, params, Sources(split, segmentation, measurement))

    team = Team.open(device, params.precision, setup.devices)
    try:
        with ended_by_sigterm():
            share_of_batch(params.batch_size, team.world_size)
            check_agreed(team, plan.spec)

            # Where to begin: it is done, is resumed in an unfinished run, or is new.
            run_id = None
            if not force:
                done, run_id = team.of_first(lambda: find_earlier(workspace, plan))
                if done is not None:
                    return done
            if plan.validation and plan.unknown and not plan.cells.blocks[plan.validation]:
                raise UserInputError(
                    f"No class in the {plan.validation.value} subset of split "
                    f"{plan.cells.split.name!r} is in its training subset, too. Make another "
                    "split, without --allow-missing."
                )
            validated = () if plan.validation is None else (plan.validation,)
            plan.cells.check(plan.cells.labels, Subset.TRAIN, *validated)
            state = None if run_id is None else read_state(workspace, run_id)

            # The scale of what the network reads is fitted once: a training that is resumed keeps
            # what it began with.
            if state is None:
                normalise = plan.params.normalise if TABULAR in plan.branches else None
                by_plate = plan.params.intensity == "plate" and plan.branches != (TABULAR,)
                planes = planes_of(plan.cells.segment, plan.channels) if by_plate else ()

                def fitted() -> Scaler:
                    source, database = plan.cells.source, workspace.database
                    with database.read() as session:
                        return fit_inputs(session, database, source, normalise, planes, validated)

                scaler = team.of_first(fitted)
            else:
                scaler = Scaler.from_json(state.record["scaler"])
            training = make_training(plan, len(scaler.names), state, team)
            batches = make_batches(workspace, plan, scaler, team)

            forgotten: list[str] = []
            with (
                as_run(workspace, plan, run_id, training, team) as run,
                open_trackers(workspace, plan, setup, run, state) as trackers,
            ):
                learn(workspace, plan, scaler, training, batches, trackers, run)
                if run is not None:
                    forgotten = keep_model(workspace, plan, scaler, training, run, state, trackers)
            for path in forgotten:
                workspace.artifacts.remove(path)

            def ended() -> TrainResult:
                assert run is not None
                with workspace.database.read() as session:
                    found = trained(session.get_one(Run, run.id))
                return replace(found, already_done=False)

            return team.of_first(ended)
    finally:
        team.leave()


def make_training(plan: Plan, n_features: int, state: TrainingState | None, team: Team) -> Training:
    """Return the network with its first weights, or with those of a ``state``, to be trained."""
    from ..learn.networks import NetShape, build_net
    from ..learn.training import Training, balanced_weights

    params, labels = plan.params, plan.cells.labels
    shape = NetShape(
        len(labels),
        n_features,
        dropout=params.dropout,
        backbone=params.backbone,
        branches=plan.branches,
        plane_channels=len(plan.channels),
    )
    weights = params.weights if state is None and params.weights != NO_WEIGHTS else None
    net = build_net(shape, weights, params.seed, params.crop_size)
    class_weights = None
    if params.class_weights:
        counts: Counter[int] = Counter()
        for block in plan.cells.blocks[Subset.TRAIN]:
            counts[block.label_id] += block.n_cells
        class_weights = balanced_weights([counts[label_id] for label_id in labels.values()])
    training = Training(net, params, team, class_weights)
    if state is not None:
        training.resume(state)
    return training


def make_batches(
    workspace: Workspace, plan: Plan, scaler: Scaler, team: Team
) -> tuple[Batches, Batches | None]:
    """Return the batches that this process reads, to train on and to validate by, if any."""
    from ..learn.batches import Batches, CellReader, default_memory

    params, cells = plan.params, plan.cells
    reader = CellReader(
        workspace,
        cells.source,
        plane_of(cells.segment),
        scaler,
        params.crop_size,
        {label_id: index for index, label_id in enumerate(cells.labels.values())},
        branches=plan.branches,
        channels=plan.channels,
        kept_bytes=default_memory() // team.world_size,  # as if all processes were on one host
        device=str(team.device),
    )

    def batches(subset: Subset) -> Batches:
        return Batches(
            reader,
            cells.blocks[subset],
            batch_size=share_of_batch(params.batch_size, team.world_size),
            seed=params.seed,
            share=(team.global_rank, team.world_size),
            shuffle=subset is Subset.TRAIN,
            sampler=params.sampler if subset is Subset.TRAIN else "cells",
        )

    return batches(Subset.TRAIN), None if plan.validation is None else batches(plan.validation)


def learn(
    workspace: Workspace,
    plan: Plan,
    scaler: Scaler,
    training: Training,
    batches: tuple[Batches, Batches | None],
    trackers: Trackers,
    run: RunHandle | None,
) -> None:
    """Train epoch by epoch; the process that has the run keeps each epoch before the next begins.

    Training stops by itself where validation gets no better; see :class:`Training`.
    """
    team, (train_batches, validation_batches) = training.team, batches
    progress = workspace.progress if run is not None else Progress()
    checked = time.monotonic()

    def on_step(epoch: int, step: int) -> None:
        nonlocal checked
        if step == 0:
            progress.start(f"epoch {epoch + 1}", train_batches.count(epoch))
        progress.advance()
        # Among several processes only the end of an epoch is where all can stop.
        if run is None or team.world_size > 1 or time.monotonic() - checked < LISTEN_SECONDS:
            return
        checked = time.monotonic()
        with workspace.database.read() as session:
            check_still_ours(session, run)

    def keep(epoch: EpochMetrics) -> None:
        """Write the metrics of an epoch, and the state at its end in the place of the last one."""
        assert run is not None
        kept = {name: value for name, value in asdict(epoch).items() if value is not None}
        values = {name: float(value) for name, value in kept.items() if name != "epoch"}
        read = (train_batches, validation_batches)
        values["waited"] = sum(item.waited for item in read if item is not None)  # in seconds
        # With the number of the run in it, so that its file is that of no other run.
        state = training.state(run=run.id, scaler=scaler.to_json(), trackers=trackers.ids)
        file = workspace.artifacts.write(STATE, state.to_bytes(), ".safetensors")
        with workspace.database.begin() as session:
            check_still_ours(session, run)
            session.add_all(
                RunMetric(run_id=run.id, epoch=epoch.epoch, name=name, value=value)
                for name, value in values.items()
            )
            old = forget_files(session, run.id, STATE)
            keep_files(session, [file], run.id)
        for path in old:
            workspace.artifacts.remove(path)
        trackers.write(epoch.epoch, values)
        progress.finish()
        parts = []
        for name in ("loss", "accuracy"):
            parts.append(f"{name} {values[f'train_{name}']:.3f}")
            if f"validation_{name}" in values:
                parts[-1] += f", validation {values[f'validation_{name}']:.3f}"
        progress.note(f"epoch {epoch.epoch}: {'; '.join(parts)}")
        progress.advance()

    progress.start("train", plan.params.epochs)
    progress.advance(len(training.epochs))
    try:
        with closing(training.run(train_batches, validation_batches, on_step)) as epochs:
            for epoch in epochs:
                team.of_first(partial(keep, epoch))
    finally:
        progress.finish()


def open_trackers(
    workspace: Workspace,
    plan: Plan,
    setup: TrainSetup,
    run: RunHandle | None,
    state: TrainingState | None,
) -> Trackers:
    """Return the trackers that were asked for, told all that is known of the run so far.

    Their ids are kept with the run, and with its state for who resumes it.
    """
    from ..learn.trackers import TrackedRun, Trackers

    known = {} if state is None else state.record.get("trackers", {})
    if run is None or not setup.logs:
        return Trackers((), None, known, workspace.progress.note)
    tags = {
        "cellstore.run": str(run.id),
        "cellstore.store": workspace.settings.root.name,
        "cellstore.split": plan.cells.split.name,
        "cellstore.recipe": fingerprint(plan.spec),
        "cellstore.version": code_version(),
        "cellstore.database": workspace.database.engine.dialect.name,
    }
    folder = setup.log_dir or LOGS / f"run-{run.id}"
    about = TrackedRun(run.id, folder, tags, plan.spec.parameters)
    trackers = Trackers(setup.logs, about, known, workspace.progress.note)
    run.result["trackers"] = trackers.ids
    with workspace.database.read() as session:
        for record in metrics_of(session.get_one(Run, run.id)):
            trackers.write(int(record.pop("epoch")), record)
    return trackers


def keep_model(
    workspace: Workspace,
    plan: Plan,
    scaler: Scaler,
    training: Training,
    run: RunHandle,
    state: TrainingState | None,
    trackers: Trackers,
) -> list[str]:
    """Write the best epoch and what the run keeps of its training.

    The rows of the files are written when the run is closed. The state of the last epoch is
    forgotten then; its paths will be in the list that is returned.
    """
    from ..learn.trained_models import NETWORK, ModelRecord, write_model

    cells = plan.cells
    record = ModelRecord(
        NETWORK,
        labels=tuple(cells.labels),
        field=cells.split.field,
        scaler=scaler,
        fingerprints=cells.fingerprints(plan.spec),
        feature_set=cells.source.features.name,
        shape=training.net.shape,
        crop_size=plan.params.crop_size,
        channels=plan.channels,
    )
    more = {
        "parameters": plan.spec.parameters,
        "image": asdict(plane_of(cells.segment)),
        "best_epoch": training.best + 1,
    }
    files = write_model(workspace, training.best_state, record, more)
    run.result = summary(plan, training, scaler) | {
        "checkpoint_sha256": files[0].sha256,
        "resumed_after": 0 if state is None else len(state.record["epochs"]),
        "trackers": trackers.ids,
    }
    best = training.epochs[training.best]
    scores = {"best_epoch": best.epoch, "epochs": len(training.epochs)}
    measured = {name: value for name, value in asdict(best).items() if value is not None}
    scores |= {f"best_{name}": value for name, value in measured.items() if "_" in name}
    trackers.keep([workspace.artifacts.existing(file.path) for file in files], scores)
    forgotten: list[str] = []

    def close(session: Session) -> None:
        check_still_ours(session, run)
        keep_files(session, files, run.id)
        forgotten.extend(forget_files(session, run.id, STATE))

    run.at_end.append(close)
    return forgotten


def make_plan(workspace: Workspace, params: TrainParams, sources: Sources) -> Plan:
    """Return what to train on which cells."""
    weights_sha256, from_file = None, params.weights not in (NO_WEIGHTS, IMAGENET)
    if from_file:
        path = Path(params.weights)
        if not path.is_file():
            raise UserInputError(
                f"There is no file of weights {path}. Give the path of one, or 'none' or "
                "'imagenet'."
            )
        weights_sha256 = sha256_of(path)
    elif params.weights == IMAGENET:
        from ..learn.exported_classifier import TIMM
        from ..learn.pretrained import timm_weights

        if params.backbone.startswith(TIMM):
            # The hub may have other weights of this name one day.
            weights_sha256 = sha256_of(timm_weights(params.backbone.removeprefix(TIMM))[0])
    with workspace.database.read() as session:
        cells = find_training_cells(session, workspace, sources, params)
        branches, note = choose_branches(session, cells.source, params.branches)
        channels: tuple[str, ...] = ()
        if IMAGE in branches:
            channels = choose_channels(session, cells.source, params.channels)
    subset, validation, unknown = validation_subset(cells.split), None, 0
    if cells.members.get(subset):
        validation = subset
        known = tuple(b for b in cells.blocks[subset] if b.label_id in cells.labels.values())
        unknown = len(cells.blocks[subset]) - len(known)
        cells = replace(cells, blocks={**cells.blocks, subset: known})
    # A file of weights counts by its bytes; where it lay on this machine does not. The feature
    # set is named by the measure recipe.
    given = asdict(params)
    for name in ("features", "exclude_flagged", "where", "sql"):
        del given[name]
    parameters = given | {
        "weights": FROM_FILE if from_file else params.weights,
        "branches": list(branches),
        "channels": list(channels),
        **cells.parameters,
    }
    return Plan(
        params=params,
        cells=cells,
        validation=validation,
        unknown=unknown,
        branches=branches,
        channels=channels,
        notes=((note,) if note else ()) + cells.notes,
        spec=RecipeSpec(
            Stage.TRAIN, VERSION, parameters, weights_sha256, cells.inputs, cells.local
        ),
    )


def share_of_batch(cells: int, size: int) -> int:
    """Return how many cells of a batch each of ``size`` processes reads."""
    if cells < 2 * size:
        raise UserInputError(
            f"A batch of {cells} cells cannot be shared out to {size} processes, which need two or "
            "more each. Give fewer --devices, or a larger --batch-size."
        )
    return cells // size


def check_agreed(team: Team, spec: RecipeSpec) -> None:
    """Refuse processes that found different things: a split may have been made just now."""
    mine = fingerprint(spec)
    if team.of_first(lambda: mine) != mine:
        raise TeamError(
            "The processes of this training were asked for different things: the store has changed "
            "while they began. Start them again, with --split and the like given by name."
        )


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which clusters send before they kill, be the same as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def find_earlier(workspace: Workspace, plan: Plan) -> tuple[TrainResult | None, int | None]:
    """Return the finished training of a plan, or an unfinished run that has seen an epoch."""
    with workspace.database.begin() as session:
        done = finished_run(session, plan.spec, plan.cells.split.id)
        if done is not None:
            return trained(done), None
        close_dead_runs(session)
        query = (
            select(Run)
            .join(Recipe, Recipe.id == Run.recipe_id)
            .where(Recipe.fingerprint == fingerprint(plan.spec), Recipe.stage == Stage.TRAIN)
            .where(Run.status != Status.DONE, Run.split_id == plan.cells.split.id)
        )
        runs = list(session.scalars(query.order_by(Run.id.desc())))
        busy = next((run for run in runs if run.status is Status.RUNNING), None)
        if busy is not None:
            where = shown_worker(busy.process) or busy.host
            raise UserInputError(
                f"Run {busy.id} is training this just now, at {where}. Wait for it; mark it as "
                f"over, if that machine has lost it, with: cellstore cancel {busy.id}, or train "
                "another one beside it with --force."
            )
        return None, next((run.id for run in runs if files_of(session, run.id, STATE)), None)


def read_state(workspace: Workspace, run_id: int) -> TrainingState | None:
    """Return the state of a run at the end of its last epoch; none: it has seen no such end."""
    from ..learn.training import TrainingState

    with workspace.database.read() as session:
        files = files_of(session, run_id, STATE)
    if not files:
        return None
    return TrainingState.from_bytes(workspace.artifacts.read(files[-1].path, files[-1].sha256))


@contextmanager
def as_run(
    workspace: Workspace,
    plan: Plan,
    run_id: int | None,
    training: Training,
    team: Team,
) -> Iterator[RunHandle | None]:
    """Record the training as a run, or as run ``run_id`` that is resumed.

    On the processes of a team that write nothing there is none.
    """
    if not team.is_global_zero:
        yield None
        return
    with running(
        workspace.database,
        plan.spec,
        split_id=plan.cells.split.id,
        seed=plan.params.seed,
        query=plan.cells.query(),
        resume=run_id,
        alone=True,
        device=str(team.device),
    ) as run:
        known = select(func.count(RunMetric.epoch.distinct())).where(RunMetric.run_id == run.id)
        with workspace.database.read() as session:
            if session.scalar(known) != len(training.epochs):
                raise StoreError(
                    f"Another process has resumed run {run.id} in the meantime. {AGAIN}"
                )
        try:
            yield run
        except (KeyboardInterrupt, RunCancelledError):
            workspace.progress.note(AGAIN)
            raise
        except RuntimeError as error:
            if team.world_size == 1 or isinstance(error, CellstoreError):
                raise
            raise TeamError(
                f"Another process of this training has ended, so it cannot go on. {AGAIN}"
            ) from error


def summary(plan: Plan, training: Training, scaler: Scaler) -> dict[str, Any]:
    """Return what a run keeps of its training."""
    from ..learn.normalising import describe_plates

    cells = plan.cells
    blocks = {"train": cells.blocks[Subset.TRAIN]}
    without = {"train": cells.members[Subset.TRAIN] - len(blocks["train"])}
    if plan.validation is not None:
        blocks["validation"] = cells.blocks[plan.validation]
        of_known = cells.members[plan.validation] - plan.unknown
        without["validation"] = of_known - len(blocks["validation"])
    seen = {block.label_id for block in blocks["train"]}
    unseen = [value for value, label_id in cells.labels.items() if label_id not in seen]
    columns = cells.source.features.columns if TABULAR in plan.branches else ()
    excluded, column_notes = excluded_columns(columns, scaler.names)
    notes, flagged = list(plan.notes), cells.flagged
    if plan.validation is None:
        notes.append(
            f"No image validates, so nothing stopped the training: its {plan.params.epochs} epochs "
            "were given, and the last is kept."
        )
    if plan.validation is Subset.TEST:
        notes.append(
            "As published, the test subset also decided when to stop, and its wells are in "
            "training too: scores are those of wells already seen."
        )
    if plan.unknown:
        notes.append(
            f"{plan.unknown} images of the validation subset were excluded: their classes are not "
            "in the training subset."
        )
    if unseen:
        notes.append(f"{len(unseen)} classes have no cell to train on: {', '.join(unseen[:5])}.")
    missing = sum(without.values()) - (flagged[0] if flagged else 0)
    if missing > 0:
        notes.append(f"{missing} images of the split have no cells to read and were excluded.")
    if flagged:
        notes.append(
            f"Excluded, because quality-control run {cells.source.unflagged_by} flagged them: "
            f"{flagged[0]:,} images and {flagged[1]:,} cells, those of the images included."
        )
    notes += column_notes + describe_plates(scaler)
    kept: dict[str, Any] = {
        "classes": len(cells.labels),
        "classes_without_cells": unseen,
        "images": {name: len(some) for name, some in blocks.items()},
        "cells": {name: sum(b.n_cells for b in some) for name, some in blocks.items()},
        "images_without_cells": without,
        "validation_subset": plan.validation and plan.validation.value,
        "epochs": len(training.epochs),
        "best_epoch": training.best + 1,
        "stopped_early": training.stopped_early,
        "feature_set": cells.source.features.name,
        "branches": list(plan.branches),
        "columns_excluded": excluded,
        "notes": notes,
    }
    if flagged:
        kept["qc_run_id"] = cells.source.unflagged_by
        kept["images_flagged"], kept["cells_flagged"] = flagged
    return kept


def trained(run: Run) -> TrainResult:
    """Return the result of a finished training run."""
    assert run.split is not None
    metrics = metrics_of(run)
    return result_of(run, TrainResult, split=run.split.name, already_done=True, metrics=metrics)


def metrics_of(run: Run) -> tuple[dict[str, float], ...]:
    """Return the metrics of a run by name, a record for each epoch."""
    epochs: dict[int, dict[str, float]] = {}
    for item in run.metrics:
        record = epochs.setdefault(item.epoch, {"epoch": item.epoch})
        record[item.name] = float("nan") if item.value is None else item.value
    return tuple(epochs.values())
