"""From a plan to what the loop needs: the network, what scales its inputs, and the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...config import ImageInput, TrainParams, TrainSetup
from ...db.models import Recipe
from ...errors import UnknownNameError, UserInputError
from ...ops.branches import TABULAR
from ...ops.sampling import CELLS, SAMPLERS
from ...reading.cells import plane_of
from ...reading.memory import default_memory
from ...reading.normalising import (
    INTENSITIES,
    NORMALISATIONS,
    PLATE,
    describe_plates,
    fit_scaler,
    fit_whites,
)
from ...runs import Workspace
from .plan import NO_WEIGHTS, Plan

if TYPE_CHECKING:
    from ...ops.checkpoints import CheckpointMeta
    from ...ops.nets import FusionNet
    from ...ops.normalising import WhiteLevels
    from ...ops.scaling import FeatureScaler
    from ...ops.teams import Team
    from ...ops.training import FitConfig
    from ...ops.training_state import TrainingState
    from ...reading.blocks import BlockReader
    from ...reading.loading import Batches


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
        from ...ops.normalising import WhiteLevels, read_scaler

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
    from ...ops.augmentation import check_augmentations
    from ...ops.training import FitConfig

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
    from ...ops.objectives import balanced_weights

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
    from ...ops.nets import NetShape, build_net

    if state is None:
        fitted = team.of_first(lambda: _fit(workspace, plan))
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


def _fit(workspace: Workspace, plan: Plan) -> Fitted:
    from ...ops.scaling import Scaler

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
    from ...reading.blocks import BlockReader

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
    from ...reading.loading import training_batches

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
    from ...ops.checkpoints import CheckpointMeta

    return CheckpointMeta(
        shape=model.net.shape,
        labels=tuple(plan.labels),
        field=plan.split.field.value,
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
