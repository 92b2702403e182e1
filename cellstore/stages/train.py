"""Train: the published network on the cells of a split, read through one stored query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from ..artifacts import StoredFile, sha256_of
from ..config import TrainParams, as_parameters
from ..db.models import Label, Recipe, Run, RunMetric, Split, SplitMember
from ..errors import ImageError, UserInputError
from ..extras import need
from ..reading.cells import (
    FEATURE_COLUMNS,
    CellSource,
    ImageBlock,
    as_text,
    cells_query,
    choose_recipes,
    list_blocks,
    plane_of,
    stream_features,
)
from ..runs import (
    RecipeSpec,
    RunHandle,
    Workspace,
    attach,
    find_split,
    fingerprint,
    keep_file,
    register,
    running,
)
from ..terms import ArtifactKind, Stage, Status, Subset

if TYPE_CHECKING:
    from ..ops.crops import CellBlock
    from ..ops.nets import CheckpointMeta, FusionNet
    from ..ops.scaling import Scaler
    from ..ops.training import EpochMetrics, FitConfig, FitResult
    from ..reading.blocks import BlockReader

VERSION = 1
PUBLISHED = "published"
NO_WEIGHTS = "none"
IMAGENET = "imagenet"


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    ``images``, ``cells`` and ``images_without_cells`` count by side (``train``,
    ``validation``); ``validation_side`` is the side of the split that stopped the training.
    ``metrics`` has one record per epoch. ``already_done``: the run was there before this call.
    ``notes`` are sentences that a reader of the scores has to know.
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


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first cell is read."""

    params: TrainParams
    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    labels: dict[str, int]
    sides: dict[str, tuple[ImageBlock, ...]]
    members: dict[str, int]
    validation_side: Subset
    spec: RecipeSpec


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
        UnknownNameError: no such split or recipe.
        UserInputError: there are no measured cells on a side, or parameters out of range.

    """
    need("train")
    params = params or TrainParams()
    config = _config(params, device)
    plan = _plan(workspace, params, (split, segmentation, measurement))
    earlier = None if force else _finished(workspace, plan)
    if earlier is not None:
        return earlier
    _check_sides(plan)
    net = _new_net(plan)
    recipe = _commit(workspace, plan)
    query = as_text(cells_query(plan.source))
    with running(
        workspace.database, recipe, split_id=plan.split.id, seed=params.seed, query=query
    ) as run:
        run.result = _fit(workspace, plan, config, net, run, recipe)
    with workspace.database.read() as session:
        return replace(_result(session, session.get_one(Run, run.id)), already_done=False)


def _config(params: TrainParams, device: str) -> FitConfig:
    from ..ops.training import FitConfig
    from ..reading.blocks import choose_device

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


def _plan(
    workspace: Workspace, params: TrainParams, names: tuple[str | None, str | None, str | None]
) -> _Plan:
    weights = _weights_sha256(params.weights)
    with workspace.database.read() as session:
        split = find_split(session, names[0])
        segment, measure = choose_recipes(session, names[1], names[2])
        source = CellSource(segment.id, measure.id, split.id)
        blocks = list_blocks(session, source)
        labels = _training_labels(session, split.id)
        made_by = session.get_one(Recipe, split.recipe_id)
        other = Subset.TEST if split.protocol == PUBLISHED else Subset.VALIDATION
        members = _members(session, split.id)
    parameters = _parameters(params) | {"split": split.fingerprint, "cells": _digest_of(blocks)}
    return _Plan(
        params=params,
        split=split,
        segment=segment,
        measure=measure,
        source=source,
        labels=labels,
        sides={
            "train": tuple(block for block in blocks if block.subset is Subset.TRAIN),
            "validation": tuple(block for block in blocks if block.subset is other),
        },
        members={"train": members.get(Subset.TRAIN, 0), "validation": members.get(other, 0)},
        validation_side=other,
        spec=RecipeSpec(Stage.TRAIN, VERSION, parameters, weights, (made_by, segment, measure)),
    )


def _parameters(params: TrainParams) -> dict[str, Any]:
    # A file of weights counts by its bytes; where it lay on this machine does not.
    named = params.weights if params.weights in (NO_WEIGHTS, IMAGENET) else "file"
    return as_parameters(params) | {"weights": named}


def _weights_sha256(weights: str) -> str | None:
    if weights in (NO_WEIGHTS, IMAGENET):
        return None
    path = Path(weights)
    if not path.is_file():
        raise UserInputError(
            f"There is no file of weights {weights}. Give the path of one, or 'none' or 'imagenet'."
        )
    return sha256_of(path)


def _training_labels(session: Session, split_id: int) -> dict[str, int]:
    """Label ids by value, sorted by value: the order of the network's outputs."""
    query = (
        select(Label.value, Label.id)
        .join(SplitMember, SplitMember.label_id == Label.id)
        .where(SplitMember.split_id == split_id, SplitMember.subset == Subset.TRAIN)
        .distinct()
    )
    return dict(sorted(session.execute(query).all()))


def _members(session: Session, split_id: int) -> dict[Subset, int]:
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    return dict(session.execute(query.group_by(SplitMember.subset)).all())


def _digest_of(blocks: Sequence[ImageBlock]) -> str:
    """What decides the cells beside the recipes: which images have how many of them, by now."""
    digest = hashlib.sha256()
    for line in sorted((b.content_sha256, b.subset.value, b.n_cells) for b in blocks):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def _check_sides(plan: _Plan) -> None:
    for side, blocks in plan.sides.items():
        if blocks:
            continue
        named = "test" if (side, plan.validation_side) == ("validation", Subset.TEST) else side
        if plan.members[side] == 0:
            raise UserInputError(
                f"Split {plan.split.name!r} has no image on its {named} side. Make another split: "
                "classes with three wells or more give one, or ask for another validation size."
            )
        raise UserInputError(
            f"None of the {plan.members[side]} images on the {named} side of split "
            f"{plan.split.name!r} has measured cells. Run: cellstore segment, then: cellstore "
            "measure"
        )


def _new_net(plan: _Plan) -> FusionNet:
    from ..ops.nets import NetShape, build_net

    shape = NetShape(len(plan.labels), len(FEATURE_COLUMNS), dropout=plan.params.dropout)
    weights = None if plan.params.weights == NO_WEIGHTS else plan.params.weights
    return build_net(shape, weights, plan.params.seed)


def _commit(workspace: Workspace, plan: _Plan) -> Recipe:
    """Register the recipe and freeze the split: from here on a run relies on it."""
    with workspace.database.begin() as session:
        session.execute(
            update(Split)
            .where(Split.id == plan.split.id, Split.frozen_at.is_(None))
            .values(frozen_at=datetime.now(UTC))
        )
        return register(session, plan.spec)


def _fit(
    workspace: Workspace,
    plan: _Plan,
    config: FitConfig,
    net: FusionNet,
    run: RunHandle,
    recipe: Recipe,
) -> dict[str, Any]:
    from ..ops.training import fit

    scaler = _fit_scaler(workspace, plan)
    reader = _reader(workspace, plan, scaler)
    workspace.progress.start("train", config.max_epochs)
    try:
        result = fit(
            net,
            _batches(plan, reader, "train"),
            _batches(plan, reader, "validation"),
            config,
            lambda epoch: _tell(workspace, run.id, epoch),
        )
    finally:
        workspace.progress.finish()
    sha256 = _keep_checkpoint(workspace, run.id, _meta(plan, net, scaler, recipe), plan, result)
    return _summary(plan, result) | {"checkpoint_sha256": sha256}


def _fit_scaler(workspace: Workspace, plan: _Plan) -> Scaler:
    from ..ops.scaling import Scaler

    training = replace(plan.source, subset=Subset.TRAIN)
    with workspace.database.read() as session:
        return Scaler.fit(FEATURE_COLUMNS, stream_features(session, training))


def _reader(workspace: Workspace, plan: _Plan, scaler: Scaler) -> BlockReader:
    from ..reading.blocks import BlockReader

    classes = {label_id: index for index, label_id in enumerate(plan.labels.values())}
    return BlockReader(
        workspace, plan.source, plane_of(plan.segment), scaler, plan.params.crop_size, classes
    )


def _batches(plan: _Plan, reader: BlockReader, side: str) -> Any:
    from ..ops.crops import BlockShuffle
    from ..reading.blocks import buffer_cells

    params = plan.params
    expected = {block.image_id: block.n_cells for block in plan.sides[side]}
    return BlockShuffle(
        list(expected),
        lambda image_id: _as_planned(reader(image_id), expected[image_id]),
        batch_size=params.batch_size,
        seed=params.seed,
        buffer_cells=buffer_cells(params.crop_size, params.batch_size),
        shuffle=side == "train",
    )


def _as_planned(cells: CellBlock, expected: int) -> CellBlock:
    if len(cells) != expected:
        raise ImageError(
            "The cells of an image changed while the network was training. Train again."
        )
    return cells


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


def _meta(plan: _Plan, net: FusionNet, scaler: Scaler, recipe: Recipe) -> CheckpointMeta:
    from ..ops.nets import CheckpointMeta

    return CheckpointMeta(
        shape=net.shape,
        labels=tuple(plan.labels),
        field=plan.split.field.value,
        scaler=scaler,
        crop_size=plan.params.crop_size,
        fingerprints={
            "train": recipe.fingerprint,
            "split": plan.split.fingerprint,
            "segment": plan.segment.fingerprint,
            "measure": plan.measure.fingerprint,
        },
    )


def _keep_checkpoint(
    workspace: Workspace, run_id: int, meta: CheckpointMeta, plan: _Plan, result: FitResult
) -> str:
    """Write tensors and the record beside them, then their rows; return the tensors' sha256."""
    from ..ops.nets import save_net

    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_net(result.state), ".safetensors")
    record = meta.to_json() | {
        "tensors_sha256": tensors.sha256,
        "parameters": plan.spec.parameters,
        "image": plan.segment.parameters["image"],
        "best_epoch": result.best_epoch,
    }
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    _link(workspace, run_id, (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json")))
    return tensors.sha256


def _link(workspace: Workspace, run_id: int, files: Sequence[StoredFile]) -> None:
    with workspace.database.begin() as session:
        for file in files:
            attach(session, run_id, keep_file(session, file))


def _summary(plan: _Plan, result: FitResult) -> dict[str, Any]:
    seen = {block.label_id for block in plan.sides["train"]}
    without = [value for value, label_id in plan.labels.items() if label_id not in seen]
    images = {side: len(blocks) for side, blocks in plan.sides.items()}
    left_out = {side: plan.members[side] - count for side, count in images.items()}
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
        "notes": _notes(plan, without, sum(left_out.values())),
    }


def _notes(plan: _Plan, without: Sequence[str], left_out: int) -> list[str]:
    notes = []
    if plan.validation_side is Subset.TEST:
        notes.append(
            "As published, the test side also chose the epoch, and its wells are in training "
            "too: scores are those of wells already seen."
        )
    if without:
        notes.append(f"{len(without)} classes have no cell to train on: {', '.join(without[:5])}.")
    if left_out:
        notes.append(f"{left_out} images of the split have no measured cells and were left out.")
    return notes


def _finished(workspace: Workspace, plan: _Plan) -> TrainResult | None:
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
        return None if found is None else _result(session, found)


def _result(session: Session, run: Run) -> TrainResult:
    kept: Mapping[str, Any] = run.result or {}
    lists = {name: tuple(kept[name]) for name in ("classes_without_cells", "notes")}
    return TrainResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        split=session.scalars(select(Split.name).where(Split.id == run.split_id)).one(),
        already_done=True,
        metrics=_metrics(session, run.id),
        **{**kept, **lists},
    )


def _metrics(session: Session, run_id: int) -> tuple[dict[str, float], ...]:
    query = select(RunMetric).where(RunMetric.run_id == run_id).order_by(RunMetric.epoch)
    epochs: dict[int, dict[str, float]] = {}
    for item in session.scalars(query):
        record = epochs.setdefault(item.epoch, {"epoch": item.epoch})
        record[item.name] = float("nan") if item.value is None else item.value
    return tuple(epochs.values())
