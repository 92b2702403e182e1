"""Train: the published network on the cells of a split, read through one stored query.

Where a feature set is named, the network reads its columns; where masks or flows of its cells are
unknown, it has fewer branches, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...artifacts import StoredFile
from ...config import TrainParams, as_parameters
from ...db.models import Recipe, Run, RunMetric
from ...errors import UserInputError
from ...extras import need
from ...ops.branches import TABULAR
from ...reading.cells import as_text, cells_query, plane_of, stream_features
from ...runs import RunHandle, Workspace, attach, keep_file, running
from ...terms import ArtifactKind, Subset
from .outcome import TrainResult, finished, result_of, summary
from .plan import NO_WEIGHTS, Plan, check_sides, commit, make_plan

if TYPE_CHECKING:
    from ...ops.checkpoints import CheckpointMeta
    from ...ops.nets import FusionNet
    from ...ops.scaling import Scaler
    from ...ops.training import EpochMetrics, FitConfig, FitResult
    from ...reading.blocks import BlockReader
    from ...reading.loading import Batches


@dataclass(frozen=True)
class _Model:
    """A network that has not been trained, and what its features are scaled by."""

    net: FusionNet
    scaler: Scaler


def train(
    workspace: Workspace,
    params: TrainParams | None = None,
    *,
    split: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> TrainResult:
    """Train on the training side of a split (default: the latest) and keep the best epoch.

    Excluded cells are left out; features are scaled as the training side is. Under the
    published protocol the test side is the validation side too, as in the study. A training
    that was finished with the same recipe is returned as it is, unless ``force``.

    Raises:
        MissingExtraError: torch and the like are not installed.
        UnknownNameError: no such split, recipe, feature set or branch.
        UserInputError: there are no measured cells on a side, parameters are out of range, or what
            a branch looks at is unknown.

    """
    need("train")
    params = params or TrainParams()
    config = _config(params, device)
    plan = make_plan(workspace, params, (split, segmentation, measurement))
    earlier = None if force else finished(workspace, plan)
    if earlier is not None:
        return earlier
    check_sides(plan)
    model = _new_model(workspace, plan)
    recipe = commit(workspace, plan)
    query = as_text(cells_query(plan.source))
    with running(
        workspace.database, recipe, split_id=plan.split.id, seed=params.seed, query=query
    ) as run:
        run.result = _fit(workspace, plan, config, model, run, recipe)
    with workspace.database.read() as session:
        return replace(result_of(session, session.get_one(Run, run.id)), already_done=False)


def _config(params: TrainParams, device: str) -> FitConfig:
    from ...ops.training import FitConfig
    from ...reading.blocks import choose_device

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
        device=choose_device(device),
        seed=params.seed,
    )


def _new_model(workspace: Workspace, plan: Plan) -> _Model:
    from ...ops.nets import NetShape, build_net

    scaler = _fit_scaler(workspace, plan)
    shape = NetShape(
        len(plan.labels), len(scaler.names), dropout=plan.params.dropout, branches=plan.branches
    )
    weights = None if plan.params.weights == NO_WEIGHTS else plan.params.weights
    return _Model(build_net(shape, weights, plan.params.seed), scaler)


def _fit(
    workspace: Workspace,
    plan: Plan,
    config: FitConfig,
    model: _Model,
    run: RunHandle,
    recipe: Recipe,
) -> dict[str, Any]:
    from ...ops.training import fit

    reader = _reader(workspace, plan, model.scaler)
    workspace.progress.start("train", config.max_epochs)
    try:
        result = fit(
            model.net,
            _batches(plan, reader, config, "train"),
            _batches(plan, reader, config, "validation"),
            config,
            lambda epoch: _tell(workspace, run.id, epoch),
        )
    finally:
        workspace.progress.finish()
    sha256 = _keep_checkpoint(workspace, run.id, _meta(plan, model, recipe), plan, result)
    return summary(plan, result, _left_out(plan, model.scaler)) | {"checkpoint_sha256": sha256}


def _fit_scaler(workspace: Workspace, plan: Plan) -> Scaler:
    from ...ops.scaling import Scaler

    if TABULAR not in plan.branches:
        return Scaler((), (), ())
    training, features = replace(plan.source, subset=Subset.TRAIN), plan.source.features
    with workspace.database.read() as session:
        values = stream_features(session, training, features.columns)
        return Scaler.fit(features.columns, values, gaps=not features.in_table)


def _left_out(plan: Plan, scaler: Scaler) -> list[str]:
    """The columns without a value on the training side."""
    kept = frozenset(scaler.names)
    all_columns = plan.source.features.columns if TABULAR in plan.branches else ()
    return [name for name in all_columns if name not in kept]


def _reader(workspace: Workspace, plan: Plan, scaler: Scaler) -> BlockReader:
    from ...reading.blocks import BlockReader

    classes = {label_id: index for index, label_id in enumerate(plan.labels.values())}
    return BlockReader(
        workspace,
        plan.source,
        plane_of(plan.segment),
        scaler,
        plan.params.crop_size,
        classes,
        branches=plan.branches,
    )


def _batches(plan: Plan, reader: BlockReader, config: FitConfig, side: str) -> Batches:
    from ...reading.loading import training_batches

    return training_batches(
        reader,
        plan.sides[side],
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=side == "train",
        device=config.device,
    )


def _tell(workspace: Workspace, run_id: int, epoch: EpochMetrics) -> None:
    values = {name: float(value) for name, value in asdict(epoch).items() if name != "epoch"}
    with workspace.database.begin() as session:
        session.add_all(
            RunMetric(run_id=run_id, epoch=epoch.epoch, name=name, value=value)
            for name, value in values.items()
        )
    workspace.progress.note(
        f"epoch {epoch.epoch}: training loss {epoch.train_loss:.3f}, accuracy "
        f"{epoch.train_accuracy:.3f}; validation loss {epoch.validation_loss:.3f}, accuracy "
        f"{epoch.validation_accuracy:.3f}"
    )
    workspace.progress.advance()


def _meta(plan: Plan, model: _Model, recipe: Recipe) -> CheckpointMeta:
    from ...ops.checkpoints import CheckpointMeta

    return CheckpointMeta(
        shape=model.net.shape,
        labels=tuple(plan.labels),
        field=plan.split.field.value,
        scaler=model.scaler,
        crop_size=plan.params.crop_size,
        fingerprints={
            "train": recipe.fingerprint,
            "split": plan.split.fingerprint,
            "segment": plan.segment.fingerprint,
            "measure": plan.measure.fingerprint,
        },
        feature_set=plan.source.features.name,
    )


def _keep_checkpoint(
    workspace: Workspace, run_id: int, meta: CheckpointMeta, plan: Plan, result: FitResult
) -> str:
    """Write tensors and the record beside them, then their rows; return the tensors' sha256."""
    from ...ops.checkpoints import save_net

    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_net(result.state), ".safetensors")
    record = meta.to_json() | {
        "tensors_sha256": tensors.sha256,
        "parameters": plan.spec.parameters,
        "image": as_parameters(plane_of(plan.segment)),
        "best_epoch": result.best_epoch,
    }
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    _link(workspace, run_id, (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json")))
    return tensors.sha256


def _link(workspace: Workspace, run_id: int, files: Sequence[StoredFile]) -> None:
    with workspace.database.begin() as session:
        for file in files:
            attach(session, run_id, keep_file(session, file))
