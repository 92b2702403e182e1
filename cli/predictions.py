"""Commands about trained models: predict, export-model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import PredictParams
from cellstore.enums import Subset
from cellstore.errors import UserInputError

from . import render
from .context import open_store, say, sentences
from .images import end_with_failures, list_failures
from .options import (
    Device,
    DeviceOption,
    JsonOption,
    LimitOption,
    PlatesOption,
    StoreOption,
    WellsOption,
    WhereOption,
)

if TYPE_CHECKING:
    from cellstore.stages.export_model import ExportedModel
    from cellstore.stages.predict import PredictResult


class Side(StrEnum):
    """Which images are labelled."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    ALL = "all"


@sentences
def predict(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Option(metavar="RUN", help="The train run, by number, or 'latest'.")
    ] = "latest",
    subset: Annotated[
        Side,
        typer.Option(
            help="Which side of the run's split (or of --split) is labelled, or all images."
        ),
    ] = Side.TEST,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The split whose side --subset means. Default: the one of the run.",
            show_default=False,
        ),
    ] = None,
    plate: PlatesOption = None,
    well: WellsOption = None,
    where: WhereOption = None,
    limit: LimitOption = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Keep so many labels per cell, the most probable first. "
            f"Default: {PredictParams.top_k}.",
            show_default=False,
        ),
    ] = None,
    all_probabilities: Annotated[
        bool,
        typer.Option("--all-probabilities", help="Keep the probability of every label instead."),
    ] = False,
    embedding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep what the network's last layer reads of each cell as a feature set of this "
            "name, for train, export and sql.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label every cell of some images with a trained network or baseline.

    Predictions are added, never changed: each run keeps its own. The same model and cells give
    the same rows. A run that was stopped is gone on with by the same command.

    \b
    Example:
      cellstore predict
      cellstore predict --run 7 --subset all --plate BR00116991 --embedding seen_by_7
      cellstore predict --subset all --where "perturbation = 'DMSO'" --all-probabilities
    """
    if all_probabilities and top_k is not None:
        raise UserInputError("--all-probabilities keeps every label: leave out --top-k.")
    params = PredictParams(
        subset=None if subset is Side.ALL else Subset(subset.value),
        plates=tuple(plate or ()),
        top_k=PredictParams.top_k if top_k is None else top_k,
        wells=tuple(well or ()),
        where=where,
        limit=limit,
        split=split,
        all_probabilities=all_probabilities,
        embedding=embedding,
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
    embedding = [("feature set", result.feature_set)] if result.feature_set else []
    render.facts(
        [
            ("run", result.run_id),
            ("trained in run", result.train_run_id),
            ("split", result.split),
            ("images labelled", f"{result.done:,}"),
            ("labelled before", f"{result.earlier:,}"),
            ("without measured cells", f"{result.waiting:,}"),
            ("cells labelled", f"{result.cells:,}"),
            *embedding,
        ]
    )
    for note in result.notes:
        say(note)


@sentences
def export_model(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The train run, by number, or 'latest'.")
    ] = "latest",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder to write, new or empty. Default: model-RUN here.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a folder that opens without this store, and without cellstore.

    In it: the tensors (safetensors), a record of all that the model needs to know (JSON: labels,
    scales, crops, where it comes from), the Python source that puts both together with torch and
    torchvision alone, three cells and an example that labels them. Nothing in the two files of
    the model is code.

    \b
    Example:
      cellstore export-model 7 --output my-model
      cd my-model && python example.py
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.export_model(run, output)
    if as_json:
        render.as_json(result)
    else:
        _show_export(result)


def _show_export(result: ExportedModel) -> None:
    render.facts(
        [
            ("written", result.path),
            ("trained in run", result.train_run_id),
            ("model", result.model),
            ("classes", result.classes),
            ("files", ", ".join(result.files)),
        ]
    )
    for note in result.notes:
        say(note)
