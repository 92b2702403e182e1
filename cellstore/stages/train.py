"""Train: a network on the cells of a split, read through one stored query.

Where a feature set is named, the network reads its columns; where masks or flows of its cells are
unknown, it has fewer branches, and says so. Several processes may train one network together: the
first of them writes rows and files, the others compute.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..config import ImageInput, TrainParams, TrainSetup, as_parameters
from ..enums import ArtifactKind, FeatureStorage, Stage, Status, Subset
from ..errors import (
    CellstoreError,
    MissingExtraError,
    RunCancelledError,
    StorageError,
    StoreError,
    TeamError,
    UnknownNameError,
    UserInputError,
    first_line,
)
from ..extras import need
from ..jobs.lookup import RUN_WORDS, find_run, find_split
from ..jobs.queue import close_dead_runs, shown_worker
from ..jobs.recipes import RecipeSpec, fingerprint, register
from ..jobs.runs import (
    RunHandle,
    attach,
    check_still_ours,
    files_of,
    forget_files,
    keep_file,
    running,
)
from ..jobs.workspace import Workspace
from ..learn.batches import CELLS, SAMPLERS, default_memory
from ..learn.branches import BRANCHES, IMAGE, TABULAR, choose_branches, choose_channels
from ..learn.inputs import flags_that_count, taught_wells, training_labels
from ..learn.normalising import (
    INTENSITIES,
    NORMALISATIONS,
    PLATE,
    describe_plates,
    fit_scaler,
    fit_whites,
)
from ..models import Recipe, Run, RunMetric, Split, SplitMember
from ..progress import Progress, Silent
from ..query.cells import (
    CellSource,
    Flagged,
    ImageBlock,
    as_text,
    cells_query,
    choose_recipes,
    count_flagged,
    input_of,
    list_blocks,
    plane_of,
    recipes_of_set,
)
from ..query.feature_files import open_set, set_of_recipe

if TYPE_CHECKING:
    from ..learn.batches import Batches, BlockReader
    from ..learn.checkpoints import CheckpointMeta
    from ..learn.networks import FusionNet
    from ..learn.normalising import FeatureScaler, WhiteLevels
    from ..learn.training import EpochMetrics, FitConfig, FitResult, Snapshot, Team, TrainingState


CSV, TENSORBOARD, MLFLOW = LOGS_LOGS = ("csv", "tensorboard", "mlflow")

_NEEDED = {TENSORBOARD: ("tensorboard", "tensorboardX"), MLFLOW: ("mlflow",)}
"""Packages of which one must be there; ``csv`` needs none."""


class _Logger(Protocol):
    def log_hyperparams(self, params: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finalize(self, status: str) -> None: ...


@dataclass
class Logs:
    """The open loggers of a run, by kind.

    They write copies: one that fails is told of once through ``tell`` and left alone from then on,
    and the training goes on.
    """

    tell: Callable[[str], None]
    loggers: dict[str, _Logger] = field(default_factory=dict)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an epoch, by name."""
        self._each(lambda logger: logger.log_metrics(dict(metrics), step=epoch))

    def close(self, *, done: bool) -> None:
        """Write what is still in memory."""
        self._each(lambda logger: logger.finalize("success" if done else "failed"))

    def _each(self, act: Callable[[_Logger], None]) -> None:
        for kind, logger in list(self.loggers.items()):
            try:
                act(logger)
            except Exception as error:  # whatever a server or a disk of another's may do
                del self.loggers[kind]
                self.tell(f"The log for {kind} has ended: {first_line(error)}")


def check_logs(kinds: Sequence[str]) -> None:
    """Refuse a kind of log that is unknown, or whose package is not installed.

    Raises:
        UnknownNameError, MissingExtraError

    """
    for kind in kinds:
        if kind not in LOGS_LOGS:
            raise UnknownNameError.of("kind of log", kind, LOGS_LOGS)
        packages = _NEEDED.get(kind, ())
        if packages and not any(find_spec(name) for name in packages):
            raise MissingExtraError(
                f"A log for {kind} needs the package {packages[0]}, which is not installed. "
                f"Install it with: pip install {packages[0]}"
            )


def open_logs(
    kinds: Sequence[str],
    folder: Path,
    run_id: int,
    parameters: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Logs:
    """Return loggers that write to ``folder``, in which earlier logs of these kinds are replaced.

    Raises:
        StorageError: the folder cannot be written.

    """
    try:
        loggers = {kind: _open(kind, folder, run_id) for kind in kinds}
        for kind, logger in loggers.items():
            if kind != CSV:  # has no place for them
                logger.log_hyperparams({name: str(value) for name, value in parameters.items()})
    except OSError as error:
        raise StorageError(
            f"Logs cannot be written to {folder}: {error.strerror}. Name another with --log-dir."
        ) from error
    return Logs(tell, loggers)


def _open(kind: str, folder: Path, run_id: int) -> Any:
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    if kind == MLFLOW:
        from lightning.pytorch.loggers import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place.resolve()}/mlflow.db"
        return MLFlowLogger("cellstore", f"run {run_id}", tracking_uri=uri)
    if kind == TENSORBOARD:
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        return TensorBoardLogger(folder, name="", version=kind)
    from lightning.fabric.loggers.csv_logs import CSVLogger

    (place / "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(folder, name="", version=kind, flush_logs_every_n_steps=1)


class Teller:
    """Tells a listener of epochs and steps; ``done`` epochs were there before.

    ``listen`` is called after every step: it may end the training with an error.
    """

    def __init__(
        self, progress: Progress, epochs: int, steps: int, listen: Callable[[], None]
    ) -> None:
        self._progress, self._steps, self._listen = progress, steps, listen
        self._epochs, self._epoch, self._in_epoch = epochs, 0, False

    def begin(self, done: int) -> None:
        """Show the bar of epochs, of which some are done."""
        self._epoch = done
        self._progress.start("train", self._epochs)
        if done:
            self._progress.advance(done)

    def step(self) -> None:
        """A batch was trained on."""
        if not self._in_epoch:
            self._progress.start(f"epoch {self._epoch + 1}", self._steps)
            self._in_epoch = True
        self._progress.advance()
        self._listen()

    def epoch(self, epoch: EpochMetrics) -> None:
        """An epoch is over, and what is known of it is in the store."""
        self._leave_epoch()
        self._epoch = epoch.epoch
        self._progress.note(
            f"epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, validation "
            f"{epoch.validation_loss:.3f}; accuracy {epoch.train_accuracy:.3f}, validation "
            f"{epoch.validation_accuracy:.3f}"
        )
        self._progress.advance()

    def end(self) -> None:
        """Take the bars away."""
        self._leave_epoch()
        self._progress.finish()

    def _leave_epoch(self) -> None:
        if self._in_epoch:
            self._progress.finish()
            self._in_epoch = False


VERSION = 1
PUBLISHED = "published"
NO_WEIGHTS = "none"
IMAGENET = "imagenet"
FROM_FILE = "file"
"""What a recipe calls a file of weights, wherever it lay."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``untaught``: images of the validation side whose class is not on the training side; they are
    left out.
    """

    params: TrainParams
    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    labels: dict[str, int]
    sides: dict[str, tuple[ImageBlock, ...]]
    members: dict[str, int]
    validation_side: Subset
    branches: tuple[str, ...]
    channels: tuple[str, ...]
    remarks: tuple[str, ...]
    flagged: Flagged | None
    untaught: int
    spec: RecipeSpec


Names = tuple[str | None, str | None, str | None]
"""Of the split, the segmentation and the measurement; none: the latest."""


def make_plan(
    workspace: Workspace, params: TrainParams, names: Names, weights: str | None = None
) -> Plan:
    """Return the plan. ``weights``: the sha256 of a file of weights that is not needed any more."""
    weights = weights or _weights_sha256(params.weights)
    with workspace.database.read() as session:
        split = find_split(session, names[0])
        if params.features is None:
            segment, measure = choose_recipes(session, names[1], names[2])
        else:
            segment, measure = recipes_of_set(session, params.features, names[1], names[2])
        features = open_set(session, workspace.artifacts, measure.id)
        qc, unseen = flags_that_count(session, params.exclude_flagged, split.id, segment.id)
        leak = taught_wells(session, measure, split.id)
        source = CellSource(segment.id, measure.id, split.id, features=features)
        source = replace(source, unflagged_by=qc.id if qc else None)
        branches, remark = choose_branches(session, source, _wanted(params))
        channels: tuple[str, ...] = ()
        if IMAGE in branches:
            channels = choose_channels(session, source, params.channels)
        blocks = list_blocks(session, source)
        labels = training_labels(session, split.id)
        made_by = session.get_one(Recipe, split.recipe_id)
        other = Subset.TEST if split.protocol == PUBLISHED else Subset.VALIDATION
        flagged = count_flagged(session, source, blocks, (Subset.TRAIN, other))
        members = _members(session, split.id)
        by_qc = (session.get_one(Recipe, qc.recipe_id),) if qc else ()
    parameters = _parameters(params, source, branches, channels)
    parameters |= {"split": split.fingerprint, "cells": _digest_of(blocks)}
    validated = [block for block in blocks if block.subset is other]
    taught = tuple(block for block in validated if block.label_id in labels.values())
    return Plan(
        params=params,
        split=split,
        segment=segment,
        measure=measure,
        source=source,
        labels=labels,
        sides={
            "train": tuple(block for block in blocks if block.subset is Subset.TRAIN),
            "validation": taught,
        },
        members={"train": members.get(Subset.TRAIN, 0), "validation": members.get(other, 0)},
        validation_side=other,
        branches=branches,
        channels=channels,
        remarks=tuple(text for text in (remark, unseen, leak) if text),
        flagged=flagged,
        untaught=len(validated) - len(taught),
        spec=RecipeSpec(
            Stage.TRAIN, VERSION, parameters, weights, (made_by, segment, measure, *by_qc)
        ),
    )


def _wanted(params: TrainParams) -> tuple[str, ...] | None:
    if params.channels and IMAGE not in (params.branches or ()):
        raise UserInputError(
            "Channels are looked at by the branch image: name it, too, for example with "
            "--branches mask,flow,image,tabular."
        )
    return params.branches


def _parameters(
    params: TrainParams,
    source: CellSource,
    branches: tuple[str, ...],
    channels: tuple[str, ...],
) -> dict[str, Any]:
    # A file of weights counts by its bytes; where it lay on this machine does not. The feature
    # set is named by the measure recipe.
    named = params.weights if params.weights in (NO_WEIGHTS, IMAGENET) else FROM_FILE
    parameters = as_parameters(params) | {
        "weights": named,
        "branches": list(branches),
        "channels": list(channels),
        "augment": sorted(params.augment),
        "exclude_flagged": source.unflagged_by,
    }
    del parameters["features"]
    if not source.features.in_table:
        parameters |= {"feature_files": source.features.mark, "gaps": "mean of the training side"}
    return parameters


def _weights_sha256(weights: str) -> str | None:
    if weights in (NO_WEIGHTS, IMAGENET):
        return None
    path = Path(weights)
    if not path.is_file():
        raise UserInputError(
            f"There is no file of weights {weights}. Give the path of one, or 'none' or 'imagenet'."
        )
    return sha256_of(path)


def _members(session: Session, split_id: int) -> dict[Subset, int]:
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    return dict(session.execute(query.group_by(SplitMember.subset)).all())


def _digest_of(blocks: Sequence[ImageBlock]) -> str:
    """What decides the cells beside the recipes: which images have how many of them, by now."""
    digest = hashlib.sha256()
    for line in sorted((b.content_sha256 or "", b.subset.value, b.n_cells) for b in blocks):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def check_sides(plan: Plan) -> None:
    """Refuse a split of one class, or without measured cells on a side that is needed."""
    if len(plan.labels) == 1:
        raise UserInputError(
            f"All images on the training side of split {plan.split.name!r} are of one class, "
            f"{next(iter(plan.labels))!r}: there is nothing to tell apart. Make another split."
        )
    for side, blocks in plan.sides.items():
        if blocks:
            continue
        named = "test" if (side, plan.validation_side) == ("validation", Subset.TEST) else side
        if side == "validation" and plan.untaught:
            raise UserInputError(
                f"No class on the {named} side of split {plan.split.name!r} is on its training "
                "side, too. Make another split, without --allow-missing."
            )
        if plan.members[side] == 0:
            raise UserInputError(
                f"Split {plan.split.name!r} has no image on its {named} side. Make another split: "
                "classes with three wells or more give one, or ask for another validation size."
            )
        raise UserInputError(
            f"None of the {plan.members[side]} images on the {named} side of split "
            f"{plan.split.name!r} has {_what_lacks(plan)}"
        )


def _what_lacks(plan: Plan) -> str:
    features = plan.source.features
    if plan.flagged is not None and plan.flagged.images:
        return (
            f"a measured cell that quality-control run {plan.flagged.run_id} has not flagged. "
            "Train without --exclude-flagged, or make quality control less strict: "
            "cellstore qc --help"
        )
    if features.in_table:
        return "measured cells. Run: cellstore segment, then: cellstore measure"
    group = plan.measure.parameters.get("group")
    lacking = f"cells in feature set {features.name!r}"
    if group is not None:
        return f"{lacking}. Run: cellstore measure --features {group}"
    return f"{lacking}. Ingest the features of these images too."


def commit(workspace: Workspace, plan: Plan) -> Recipe:
    """Register the recipe; the run that follows freezes the split."""
    with workspace.database.begin() as session:
        return register(session, plan.spec)


STATE = ArtifactKind.TRAINING_STATE


def keep_epoch(
    workspace: Workspace,
    run: RunHandle,
    epoch: EpochMetrics,
    waited: float,
    state: TrainingState,
) -> dict[str, float]:
    """Write the metrics of an epoch and the state at its end; return the metrics by name.

    ``waited``: the seconds in which the network waited for cells.

    Raises:
        RunCancelledError: the run was cancelled.
        StoreError: another process goes on with it.
        StorageError: the disk is full.

    """
    values = {name: float(value) for name, value in asdict(epoch).items() if name != "epoch"}
    values["waited"] = waited
    # With the number of the run in it, the file is that of no other run.
    own = state.beside({"run": run.id})
    file = workspace.artifacts.write(STATE, own.to_bytes(), ".safetensors")
    with workspace.database.begin() as session:
        check_still_ours(session, run)
        session.add_all(
            RunMetric(run_id=run.id, epoch=epoch.epoch, name=name, value=value)
            for name, value in values.items()
        )
        old = forget_files(session, run.id, STATE)
        attach(session, run.id, keep_file(session, file))
    remove(workspace, old)
    return values


def keep_checkpoint(
    workspace: Workspace, run: RunHandle, meta: CheckpointMeta, plan: Plan, result: FitResult
) -> str:
    """Write tensors and the record beside them; return the tensors' sha256.

    Their rows are written when the run ends, and the state is forgotten with it.
    """
    from ..learn.checkpoints import save_net

    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_net(result.state), ".safetensors")
    record = meta.to_json() | {
        "tensors_sha256": tensors.sha256,
        "parameters": plan.spec.parameters,
        "image": as_parameters(plane_of(plan.segment)),
        "best_epoch": result.best_epoch,
    }
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    files = (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json"))

    def link(session: Session) -> None:
        check_still_ours(session, run)
        for file in files:
            attach(session, run.id, keep_file(session, file))

    run.at_end.append(link)
    return tensors.sha256


def forget_state(run: RunHandle) -> list[str]:
    """Let the state be forgotten when the run ends; return the list that will hold its paths."""
    paths: list[str] = []

    def forget(session: Session) -> None:
        paths.extend(forget_files(session, run.id, STATE))

    run.at_end.append(forget)
    return paths


def remove(workspace: Workspace, paths: list[str]) -> None:
    """Remove files that no row names any more."""
    for path in paths:
        workspace.artifacts.remove(path)


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    ``images``, ``cells`` and ``images_without_cells`` count by side (``train``,
    ``validation``); ``validation_side`` is the side of the split that stopped the training.
    ``metrics`` has one record per epoch. ``already_done``: the run was there before this call.
    ``notes`` are sentences that a reader of the scores has to know. ``columns_left_out`` of the
    feature set have no value on the training side. ``qc_run_id``: the quality-control run whose
    ``images_flagged`` (whole) and ``cells_flagged`` (those of such images included) were left out.
    ``resumed_after``: the epoch after which the run was gone on with last; 0: it never was.
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
    validation_side: str
    epochs: int
    best_epoch: int
    stopped_early: bool
    checkpoint_sha256: str
    metrics: tuple[dict[str, float], ...]
    notes: tuple[str, ...]
    feature_set: str | None = None
    branches: tuple[str, ...] = BRANCHES
    columns_left_out: tuple[str, ...] = ()
    qc_run_id: int | None = None
    images_flagged: int = 0
    cells_flagged: int = 0
    resumed_after: int = 0


def summary(
    plan: Plan, result: FitResult, columns: list[str], remarks: Sequence[str]
) -> dict[str, Any]:
    """Return what a run keeps of its training; ``columns`` of the feature set were left out."""
    seen = {block.label_id for block in plan.sides["train"]}
    without = [value for value, label_id in plan.labels.items() if label_id not in seen]
    images = {side: len(blocks) for side, blocks in plan.sides.items()}
    left_out = {side: plan.members[side] - count for side, count in images.items()}
    left_out["validation"] -= plan.untaught
    return {
        "classes": len(plan.labels),
        "classes_without_cells": without,
        "images": images,
        "cells": {side: sum(b.n_cells for b in blocks) for side, blocks in plan.sides.items()},
        "images_without_cells": left_out,
        "validation_side": plan.validation_side.value,
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch,
        "stopped_early": result.stopped_early,
        "feature_set": plan.source.features.name,
        "branches": list(plan.branches),
        "columns_left_out": columns,
        "notes": [
            *_notes(plan, without, sum(left_out.values())),
            *_column_notes(columns),
            *remarks,
        ],
        **_flagged(plan),
    }


def _flagged(plan: Plan) -> dict[str, int]:
    found = plan.flagged
    if found is None:
        return {}
    counts = {"images_flagged": found.images, "cells_flagged": found.cells}
    return {"qc_run_id": found.run_id, **counts}


def _column_notes(columns: Sequence[str]) -> list[str]:
    if not columns:
        return []
    some = ", ".join(columns[:5])
    what = f"{len(columns)} columns of the feature set have no value on the training side"
    return [f"{what} and were left out: {some}."]


def _notes(plan: Plan, without: Sequence[str], left_out: int) -> list[str]:
    notes = list(plan.remarks)
    if plan.validation_side is Subset.TEST:
        notes.append(
            "As published, the test side also chose the epoch, and its wells are in training "
            "too: scores are those of wells already seen."
        )
    if plan.untaught:
        notes.append(
            f"{plan.untaught} images of the validation side were left out: their classes are not "
            "on the training side."
        )
    if without:
        notes.append(f"{len(without)} classes have no cell to train on: {', '.join(without[:5])}.")
    flagged = plan.flagged.images if plan.flagged else 0
    if left_out > flagged:
        missing = left_out - flagged
        notes.append(f"{missing} images of the split have no measured cells and were left out.")
    if plan.flagged:
        notes.append(
            f"Left out, because quality-control run {plan.flagged.run_id} flagged them: "
            f"{plan.flagged.images:,} images and {plan.flagged.cells:,} cells, those of the images "
            "included."
        )
    return notes


def finished(workspace: Workspace, plan: Plan) -> TrainResult | None:
    """The training that this recipe has seen to its end, the latest one."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(plan.spec), Recipe.stage == Stage.TRAIN)
        .where(Run.status == Status.DONE, Run.split_id == plan.split.id)
        .order_by(Run.id.desc())
    )
    with workspace.database.read() as session:
        found = session.scalars(query.limit(1)).first()
        return None if found is None else result_of(session, found)


def result_of(session: Session, run: Run) -> TrainResult:
    """Return what was said of a finished training run."""
    kept: Mapping[str, Any] = run.result or {}
    lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return TrainResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        split=session.scalars(select(Split.name).where(Split.id == run.split_id)).one(),
        already_done=True,
        metrics=metrics_of(session, run.id),
        **{**kept, **lists},
    )


def metrics_of(session: Session, run_id: int) -> tuple[dict[str, float], ...]:
    """Return the metrics of a run by name, a record for each epoch."""
    query = select(RunMetric).where(RunMetric.run_id == run_id).order_by(RunMetric.epoch)
    epochs: dict[int, dict[str, float]] = {}
    for item in session.scalars(query):
        record = epochs.setdefault(item.epoch, {"epoch": item.epoch})
        record[item.name] = float("nan") if item.value is None else item.value
    return tuple(epochs.values())


BASELINE = "baseline"
"""The parameter of a run that is no network; such a run is done in one go."""


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
        close_dead_runs(session)
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
    qc = stored["exclude_flagged"]
    flagged = None if qc is None else str(qc)
    return TrainParams.from_recipe(stored, features=features, exclude_flagged=flagged)


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
        close_dead_runs(session)
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
    from ..learn.training import TrainingState

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


@dataclass(frozen=True)
class Fitted:
    """What was fitted on the training side. ``whites``: of plates, or of each image by itself."""

    scaler: FeatureScaler
    whites: WhiteLevels | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the state of a training."""
        whites = None if self.whites is None else self.whites.to_json()
        return {"scaler": self.scaler.to_json(), "whites": whites}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Fitted:
        """What :meth:`to_json` described."""
        from ..learn.normalising import WhiteLevels, read_scaler

        whites = record["whites"]
        known = None if whites is None else WhiteLevels.from_json(whites)
        return cls(read_scaler(record["scaler"]), known)


@dataclass(frozen=True)
class Model:
    """A network that has not been trained, and what its inputs are scaled by."""

    net: FusionNet
    fitted: Fitted


def fit_config(params: TrainParams, setup: TrainSetup, device: str) -> FitConfig:
    """Return how to train, for a device as torch names it.

    Raises:
        UnknownNameError, UserInputError: a parameter is out of range or unknown.

    """
    from ..learn.training import FitConfig, check_augmentations

    for kind, value, known in (
        ("sampler", params.sampler, SAMPLERS),
        ("normalisation", params.normalise, NORMALISATIONS),
        ("intensity", params.intensity, INTENSITIES),
    ):
        if value not in known:
            raise UnknownNameError.of(kind, value, known)
    if params.crop_size < 1:
        raise UserInputError(f"The crop size must be 1 pixel or more, not {params.crop_size}.")
    return FitConfig(
        learning_rate=params.learning_rate,
        weight_decay=params.weight_decay,
        step_size=params.step_size,
        gamma=params.gamma,
        label_smoothing=params.label_smoothing,
        max_epochs=params.epochs,
        patience=params.patience,
        batch_size=params.batch_size,
        device=device,
        seed=params.seed,
        schedule=params.schedule,
        warmup_epochs=params.warmup_epochs,
        loss=params.loss,
        augment=check_augmentations(params.augment),
        monitor=params.monitor,
        precision=params.precision,
        compile=setup.compile,
    )


def with_class_weights(config: FitConfig, plan: Plan) -> FitConfig:
    """Return ``config`` with the weights of the classes on the training side, if it has some."""
    from ..learn.training import balanced_weights

    if not plan.params.class_weights:
        return config
    cells: Counter[int] = Counter()
    for block in plan.sides["train"]:
        cells[block.label_id] += block.n_cells
    counts = [cells[label_id] for label_id in plan.labels.values()]
    return replace(config, class_weights=balanced_weights(counts))


def new_model(workspace: Workspace, plan: Plan, team: Team, state: TrainingState | None) -> Model:
    """Return the network with its first weights, which those of a ``state`` will replace.

    What is fitted is fitted once: a training that goes on keeps what it began with.
    """
    from ..learn.networks import NetShape, build_net

    if state is None:
        fitted = team.of_first(lambda: _model_fit(workspace, plan))
    else:
        fitted = Fitted.from_json(state.record["fitted"])
    params = plan.params
    shape = NetShape(
        len(plan.labels),
        len(fitted.scaler.names),
        dropout=params.dropout,
        backbone=params.backbone,
        branches=plan.branches,
        plane_channels=len(plan.channels),
    )
    given = state is None and params.weights != NO_WEIGHTS
    weights = params.weights if given else None
    return Model(build_net(shape, weights, params.seed, params.crop_size), fitted)


def _model_fit(workspace: Workspace, plan: Plan) -> Fitted:
    from ..learn.normalising import Scaler

    params, also = plan.params, (plan.validation_side,)
    whites: WhiteLevels | None = None
    scaler: FeatureScaler = Scaler((), (), ())
    with workspace.database.read() as session:
        if TABULAR in plan.branches:
            scaler = fit_scaler(session, plan.source, params.normalise, also)
        if params.intensity == PLATE and plan.branches != (TABULAR,):
            planes = [plane_of(plan.segment), *(ImageInput((name,)) for name in plan.channels)]
            whites = fit_whites(session, workspace.database, plan.source, planes, also)
    return Fitted(scaler, whites)


def left_out(plan: Plan, scaler: FeatureScaler) -> list[str]:
    """Return the columns without a value on the training side."""
    kept = frozenset(scaler.names)
    columns = plan.source.features.columns if TABULAR in plan.branches else ()
    return [name for name in columns if name not in kept]


def remarks(plan: Plan, fitted: Fitted) -> list[str]:
    """Return sentences on what a reader of the scores has to know of how inputs were made."""
    notes = describe_plates(fitted.scaler, fitted.whites)
    if plan.params.class_weights and plan.params.sampler != "cells":
        notes.append(
            f"Small classes count twice: they are drawn more often (sampler {plan.params.sampler}) "
            "and have larger weights in the loss."
        )
    return notes


def make_reader(workspace: Workspace, plan: Plan, fitted: Fitted, team: Team) -> BlockReader:
    """Return what reads the cells of an image as the network wants them.

    The processes of a team share the memory that is kept for cells, as if all were on one host.
    """
    from ..learn.batches import BlockReader

    return BlockReader(
        workspace,
        plan.source,
        plane_of(plan.segment),
        fitted.scaler,
        plan.params.crop_size,
        {label_id: index for index, label_id in enumerate(plan.labels.values())},
        branches=plan.branches,
        channels=plan.channels,
        whites=None if fitted.whites is None else fitted.whites.plates,
        kept_bytes=default_memory() // team.size,
    )


def make_batches(plan: Plan, reader: BlockReader, team: Team, side: str) -> Batches:
    """Return the batches of a side of the split that this process of the team reads."""
    from ..learn.batches import training_batches

    params, trains = plan.params, side == "train"
    return training_batches(
        reader,
        plan.sides[side],
        batch_size=share_of_batch(params.batch_size, team.size),
        seed=params.seed,
        shuffle=trains,
        sampler=params.sampler if trains else CELLS,
        share=(team.rank, team.size),
        device=team.device,
    )


def share_of_batch(cells: int, size: int) -> int:
    """Return how many cells of a batch each of ``size`` processes reads.

    Raises:
        UserInputError: fewer than two.

    """
    if cells < 2 * size:
        raise UserInputError(
            f"A batch of {cells} cells cannot be shared out to {size} processes, which need two or "
            "more each. Give fewer --devices, or a larger --batch-size."
        )
    return cells // size


def describe(plan: Plan, model: Model, recipe: Recipe) -> CheckpointMeta:
    """Return the record that stands beside the tensors."""
    from ..learn.checkpoints import CheckpointMeta

    return CheckpointMeta(
        shape=model.net.shape,
        labels=tuple(plan.labels),
        field=plan.split.field,
        scaler=model.fitted.scaler,
        crop_size=plan.params.crop_size,
        fingerprints={
            "train": recipe.fingerprint,
            "split": plan.split.fingerprint,
            "segment": plan.segment.fingerprint,
            "measure": plan.measure.fingerprint,
        },
        feature_set=plan.source.features.name,
        channels=plan.channels,
        whites=model.fitted.whites,
    )


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
    from ..learn.training import check_device

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
    from ..learn.training import Team, open_fabric

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
    from ..learn.training import fit

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
