"""Commands about networks: train, predict."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import PredictParams, TrainParams
from cellstore.terms import Subset

from . import render
from .context import open_store, say, sentences
from .images import end_with_failures, list_failures
from .options import (
    Device,
    DeviceOption,
    JsonOption,
    LeaveOutOption,
    PlatesOption,
    QcRunOption,
    StoreOption,
    leave_out,
)

if TYPE_CHECKING:
    from cellstore.stages.predict import PredictResult
    from cellstore.stages.train import TrainResult

PUBLISHED = TrainParams()


class Side(StrEnum):
    """Which images are labelled."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    ALL = "all"


@sentences
def train(
    ctx: typer.Context,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The split. Default: the latest.", show_default=False),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Which segmentation, as 'cellstore status' lists them. Default: the last used.",
            show_default=False,
        ),
    ] = None,
    measurement: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Which measurement, as 'cellstore status' lists them. Default: the last used.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The feature set that the tabular branch reads, also one ingested from another "
            "tool. Default: the built-in measurements last used.",
            show_default=False,
        ),
    ] = None,
    branches: Annotated[
        str | None,
        typer.Option(
            metavar="mask,flow,tabular",
            help="What the network looks at: all or some of these. Default: all three, or those "
            "of them that are known of the cells.",
            show_default=False,
        ),
    ] = None,
    crop_size: Annotated[
        int, typer.Option(min=1, metavar="PIXELS", help="Crops of cells are scaled to this.")
    ] = PUBLISHED.crop_size,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=2, help="Cells per step.")
    ] = PUBLISHED.batch_size,
    epochs: Annotated[
        int, typer.Option(metavar="N", min=1, help="At most so many passes over the cells.")
    ] = PUBLISHED.epochs,
    patience: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Stop after so many epochs without a better validation loss."
        ),
    ] = PUBLISHED.patience,
    learning_rate: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="Step of Adam.")
    ] = PUBLISHED.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="Weight decay of Adam.")
    ] = PUBLISHED.weight_decay,
    label_smoothing: Annotated[
        float,
        typer.Option(metavar="X", min=0.0, max=1.0, help="Smoothing of the labels in the loss."),
    ] = PUBLISHED.label_smoothing,
    dropout: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Dropout of the tabular branch.")
    ] = PUBLISHED.dropout,
    weights: Annotated[
        str,
        typer.Option(
            metavar="none|imagenet|FILE",
            help="What the image branches start from: chance, ImageNet, or a file.",
        ),
    ] = PUBLISHED.weights,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Same seed, same start.")
    ] = PUBLISHED.seed,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    device: DeviceOption = Device.AUTO,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the published network on the training side of a split.

    It sees each cell's mask and flow crops and its measurements. Metrics of every epoch are
    kept in the database; the checkpoint of the best epoch is kept as a file of the store.
    Defaults are those of the published pipeline. Cells of another tool may have no masks: then
    the network reads their features only, and says so. A value that their tool did not measure
    counts as the mean of its column on the training side.

    \b
    Example:
      cellstore train --split by-well --crop-size 64 --epochs 20
      cellstore train --split by-well --features cellprofiler --branches tabular
    """
    params = TrainParams(
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
        branches=None if branches is None else tuple(_names(branches)),
        leave_out_flagged=leave_out(leave_out_flagged, qc_run),
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.train(
            params,
            split=split,
            segmentation=segmentation,
            measurement=measurement,
            device=device.value,
        )
    if as_json:
        render.as_json(result)
    else:
        _show_train(result)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show_train(result: TrainResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} was trained with these options already.")
    render.facts(
        [
            ("run", result.run_id),
            ("split", result.split),
            ("feature set", result.feature_set or "built-in"),
            ("branches", ", ".join(result.branches)),
            ("classes", result.classes),
            *((f"{side} images", f"{number:,}") for side, number in result.images.items()),
            *((f"{side} cells", f"{number:,}") for side, number in result.cells.items()),
            ("epochs", result.epochs),
            ("best epoch", result.best_epoch),
        ]
    )
    if result.metrics:
        headers = list(result.metrics[0])
        render.table(
            [name.replace("_", " ") for name in headers],
            [[_whole(row.get(name)) for name in headers] for row in result.metrics],
        )
    for note in result.notes:
        say(note)


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value


@sentences
def predict(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Option(metavar="RUN", help="The train run, by number, or 'latest'.")
    ] = "latest",
    subset: Annotated[
        Side, typer.Option(help="Which side of the run's split is labelled, or all images.")
    ] = Side.TEST,
    plate: PlatesOption = None,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Keep so many labels per cell, the most probable first."
        ),
    ] = 5,
    device: DeviceOption = Device.AUTO,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label every cell of some images with a trained network.

    Predictions are added, never changed: each run keeps its own.

    \b
    Example:
      cellstore predict
      cellstore predict --run 7 --subset all --plate BR00116991
    """
    params = PredictParams(
        subset=None if subset is Side.ALL else Subset(subset.value),
        plates=tuple(plate or ()),
        top_k=top_k,
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.predict(params, run=run, device=device.value)
    if as_json:
        render.as_json(result)
    else:
        _show_predict(result)
        list_failures(result.failures)
    end_with_failures(len(result.failures), result.done, "labelled", "the same command")


def _show_predict(result: PredictResult) -> None:
    if result.done == 0 and not result.failures:
        typer.echo(f"Nothing to do: run {result.run_id} has labelled these images already.")
    render.facts(
        [
            ("run", result.run_id),
            ("trained in run", result.train_run_id),
            ("split", result.split),
            ("images labelled", f"{result.done:,}"),
            ("labelled before", f"{result.earlier:,}"),
            ("without measured cells", f"{result.waiting:,}"),
            ("cells labelled", f"{result.cells:,}"),
        ]
    )
