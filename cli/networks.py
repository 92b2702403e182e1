"""The command that trains networks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from cellstore.config import BaselineParams, TrainSetup
from cellstore.learn.branches import TABULAR

from . import render
from .baselines import (
    DEFAULTS,
    BaselineOption,
    MaxCellsOption,
    NoPredictOption,
    check_alone,
    train_baselines,
)
from .context import open_store, say, sentences
from .options import (
    Device,
    DeviceOption,
    JsonOption,
    LeaveOutOption,
    QcRunOption,
    StoreOption,
    leave_out,
    names,
)
from .train_options import (
    AugmentOption,
    BackboneOption,
    BatchSizeOption,
    BranchesOption,
    ClassWeightsOption,
    CompileOption,
    CropSizeOption,
    DevicesOption,
    DropoutOption,
    EpochsOption,
    FeaturesOption,
    ForceOption,
    IntensityOption,
    LearningRateOption,
    ListOption,
    LogDirOption,
    LogOption,
    LossOption,
    MeasurementOption,
    MonitorOption,
    NormaliseOption,
    PatienceOption,
    PrecisionOption,
    RecipeOption,
    ResumeOption,
    SamplerOption,
    ScheduleOption,
    SeedOption,
    SegmentationOption,
    SmoothingOption,
    SplitOption,
    TrainChannelsOption,
    WarmupOption,
    WeightDecayOption,
    WeightsOption,
    check_resume,
    chosen_params,
)

if TYPE_CHECKING:
    from cellstore.stages.train import TrainResult


@sentences
def train(
    ctx: typer.Context,
    recipe: RecipeOption = "published",
    list_recipes: ListOption = False,
    resume: ResumeOption = None,
    force: ForceOption = False,
    split: SplitOption = None,
    segmentation: SegmentationOption = None,
    measurement: MeasurementOption = None,
    features: FeaturesOption = None,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    branches: BranchesOption = None,
    channels: TrainChannelsOption = None,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    crop_size: CropSizeOption = None,
    dropout: DropoutOption = None,
    epochs: EpochsOption = None,
    patience: PatienceOption = None,
    monitor: MonitorOption = None,
    batch_size: BatchSizeOption = None,
    sampler: SamplerOption = None,
    augment: AugmentOption = None,
    loss: LossOption = None,
    class_weights: ClassWeightsOption = None,
    label_smoothing: SmoothingOption = None,
    learning_rate: LearningRateOption = None,
    schedule: ScheduleOption = None,
    warmup_epochs: WarmupOption = None,
    weight_decay: WeightDecayOption = None,
    normalise: NormaliseOption = None,
    intensity: IntensityOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    baseline: BaselineOption = None,
    no_predict: NoPredictOption = False,
    max_cells: MaxCellsOption = DEFAULTS.max_cells,
    device: DeviceOption = Device.AUTO,
    devices: DevicesOption = 1,
    compile_: CompileOption = False,
    log: LogOption = None,
    log_dir: LogDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network on the training side of a split.

    It sees crops of each cell and its measurements. Metrics of every epoch are kept in the
    database; the checkpoint of the best epoch is kept as a file of the store. Without options it
    is the published network, trained as published. Cells of another tool may have no masks: then
    the network reads their features only, and says so. A value that their tool did not measure
    counts as the mean of its column on the training side.

    A training that was broken off goes on, after its last whole epoch, when the same command is
    given again, or with --resume.

    \b
    Example:
      cellstore train --split by-well --crop-size 64 --epochs 20
      cellstore train --split by-well --recipe compact --branches mask,image
      cellstore train --split by-well --features cellprofiler --branches tabular
      cellstore train --resume 7
      cellstore train --split by-well --baseline null,logistic
    """
    flagged = leave_out(leave_out_flagged, qc_run)
    names_of_rows = (split, segmentation, measurement)
    if baseline is not None:
        chosen = BaselineParams(
            max_cells=max_cells,
            seed=DEFAULTS.seed if seed is None else seed,
            features=features,
            normalise=normalise or DEFAULTS.normalise,
            leave_out_flagged=flagged,
        )
        train_baselines(
            ctx,
            baseline,
            chosen,
            names_of_rows,
            force=force,
            predict=not no_predict,
            store=store,
            as_json=as_json,
        )
        return
    check_alone(ctx)
    check_resume(ctx)
    params = chosen_params(
        recipe,
        crop_size=crop_size,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        dropout=dropout,
        weights=weights,
        seed=seed,
        features=features,
        branches=branches,
        leave_out_flagged=flagged,
        channels=channels,
        backbone=backbone,
        augment=augment,
        loss=loss,
        class_weights=class_weights,
        sampler=sampler,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        monitor=monitor,
        precision=precision,
        normalise=normalise,
        intensity=intensity,
    )
    setup = TrainSetup(devices, compile_, names(log), log_dir)
    _say_processors(device, devices)
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.train(
            params,
            split=split,
            segmentation=segmentation,
            measurement=measurement,
            device=device.value,
            setup=setup,
            force=force,
            resume=resume,
        )
    if not is_first_process():
        return
    if as_json:
        render.as_json(result)
    else:
        _show_train(result)


def is_first_process() -> bool:
    """Whether this process, of those that train together, is the one that tells of it."""
    from cellstore.learn.training import is_first

    return is_first()


def _show_train(result: TrainResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} was trained with these options already.")
    elif result.resumed_after:
        typer.echo(f"Run {result.run_id} went on after epoch {result.resumed_after}.")
    render.facts(
        [
            ("run", result.run_id),
            ("split", result.split),
            ("feature set", _set_name(result)),
            ("branches", ", ".join(result.branches)),
            ("classes", result.classes),
            *((f"{side} images", f"{number:,}") for side, number in result.images.items()),
            *((f"{side} cells", f"{number:,}") for side, number in result.cells.items()),
            ("epochs", result.epochs),
            ("best epoch", result.best_epoch),
        ]
    )
    if result.metrics:
        render.table(
            list(EPOCH_COLUMNS.values()),
            [[_whole(row.get(name)) for name in EPOCH_COLUMNS] for row in result.metrics],
        )
    for note in result.notes:
        say(note)


def _set_name(result: TrainResult) -> str:
    name = result.feature_set or "built-in"
    return name if TABULAR in result.branches else f"{name} (says which cells; not read)"


def _say_processors(device: Device, devices: int) -> None:
    """Say that several devices are processes on a CPU, before they begin."""
    from cellstore.analysis.devices import pick_device

    started = "LOCAL_RANK" in os.environ  # by the first process, or a launcher
    if devices > 1 and not started and pick_device(device.value).type == "cpu":
        say(f"No GPU is used: {devices} processes share the CPU. One may be as fast.")


EPOCH_COLUMNS = {
    "epoch": "epoch",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "validation_loss": "val. loss",
    "validation_accuracy": "val. accuracy",
    "learning_rate": "rate",
    "seconds": "seconds",
    "waited": "waited",
}
"""Metrics of an epoch and their heads, which fit 80 columns."""


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value
