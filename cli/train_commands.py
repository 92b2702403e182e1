"""Commands about learning: train, predict, models of somebody's own, export-model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import (
    BASELINES,
    AddedParams,
    ApplyParams,
    BaselineParams,
    EmbedParams,
    PredictParams,
    Resources,
    Sources,
    TrainParams,
    TrainSetup,
    option,
    option_of,
    options_of,
)
from cellstore.errors import UserInputError
from cellstore.store import Store

from . import output
from .answer_commands import show_report
from .app import (
    DEVICE,
    PRESET,
    Common,
    command,
)
from .image_commands import are_gone, end_with_failures, list_failures
from .output import say

if TYPE_CHECKING:
    from cellstore.stages.apply import ApplyResult
    from cellstore.stages.export_model import ExportedModel
    from cellstore.stages.own_models import AddedEmbeddings, AddedPredictions
    from cellstore.stages.predict import PredictResult
    from cellstore.stages.train import TrainResult
    from cellstore.stages.train_baselines import BaselineResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)

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

_ANYWAY = {"device", "store", "as_json"}
_OF_BASELINES = {"baseline", "no_predict", "force"} | {
    item.name for kind in (Sources, BaselineParams) for item in options_of(kind)
}


@command(app, "train", then=True)
def train(
    params: TrainParams,
    sources: Sources,
    setup: TrainSetup,
    baselines: BaselineParams,
    common: Common,
    preset: str | None = PRESET,
    force: bool = option(False, "Train again, even if this was trained or begun already."),
    baseline: str | None = option(
        None,
        "Train simple models for comparison instead of a network: logistic, knn (nearest "
        "neighbours), forest, or a null baseline, which knows nothing of how cells look (majority, "
        "shuffled, cellcount, position); with commas between, or 'null' for all four, 'probe' for "
        "logistic and knn, or 'all'. They label the test images at once.",
        metavar="NAME,...",
        section=BASELINES,
    ),
    no_predict: bool = option(
        False, "With --baseline: do not label the test images.", section=BASELINES
    ),
    device: str = DEVICE,
) -> None:
    """Train a network on the training images of a split.

    It sees crops of each cell and its measurements. Metrics of every epoch are kept in the
    database; the checkpoint of the best epoch is kept as a file of the store. The defaults suit
    some thousand cells; --preset published is the network of the study, trained as published.
    Cells of another tool may have no masks: then the network reads their features only, and the
    result notes this. A value that their tool did not measure counts as the mean of its column
    in the training images.

    A training that was stopped is resumed after its last whole epoch when the same command is
    given again.

    --split may name a cross-validation (split create five --folds 5): its folds are trained one
    after the other, each labels its test images, and the scores are of every image once, by the
    network that has not seen its well.

    \b
    Example:
      cellstore train --split by-well --epochs 20
      cellstore train --split by-well --branches mask,image
      cellstore train --split by-well --features cellprofiler --branches tabular
      cellstore train --split as-published --preset published
      cellstore train --split by-well --baseline null,logistic
      cellstore train --split by-well --baseline probe --features dinov2_small
      cellstore train --split five
    """
    of_baselines = {
        item.name for item in options_of(BaselineParams) if item.metadata["section"] == BASELINES
    }
    wrong, why = common.typed & {*of_baselines, "no_predict"}, "Only --baseline reads"
    if baseline is not None:
        from cellstore.learn.baselines import choose
        from cellstore.stages.train_baselines import USED

        kinds = [word.strip() for word in baseline.split(",") if word.strip()]
        read = {name for kind in choose(kinds) for name in USED[kind]}
        wrong = common.typed - (_OF_BASELINES - of_baselines | read) - _ANYWAY
        why = f"--baseline {baseline} does not read"
    if wrong:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
        raise UserInputError(f"{why} {flags}: remove it.")
    if baseline is not None:
        with common.open() as store:
            made = store.train_baselines(
                kinds, baselines, **asdict(sources), force=force, predict=not no_predict
            )
        common.show(made, _show_baselines)
        return
    with common.open() as store:
        result = store.train(
            params,
            **asdict(sources),
            device=device,
            setup=setup,
            force=force,
        )
    from cellstore.learn.training import is_first

    if not is_first():  # of several processes that train together, one prints
        return
    if not result.folds:
        common.show(result, _show_train)
        return
    with common.open() as store:
        report = store.report(f"{result.split}:{result.run_id}")
    if common.as_json:
        output.print_json({**asdict(result), "report": report})
        return
    _show_folds(result)
    show_report(report)
    say(*map(output.filled, (*result.notes, *report.notes)))


def _show_train(result: TrainResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} was trained with these options already.")
    elif result.resumed_after:
        typer.echo(f"Run {result.run_id} was resumed after epoch {result.resumed_after}.")
    features = result.feature_set or "built-in"
    unread = "" if "tabular" in result.branches else " (says which cells; not read)"
    output.pairs(
        {
            "run": result.run_id,
            "split": result.split,
            "feature set": features + unread,
            "branches": ", ".join(result.branches),
            "classes": result.classes,
            **{f"{subset} images": number for subset, number in result.images.items()},
            **{f"{subset} cells": number for subset, number in result.cells.items()},
            "epochs": result.epochs,
            "best epoch" if result.validation_subset else "kept epoch": result.best_epoch,
            **tracker_lines(result.trackers),
        }
    )
    if result.metrics:
        columns = [name for name in EPOCH_COLUMNS if any(name in row for row in result.metrics)]
        rows = [[row.get(name) for name in columns] for row in result.metrics]
        whole = [
            [int(x) if x is not None and float(x).is_integer() else x for x in row] for row in rows
        ]
        output.table([EPOCH_COLUMNS[name] for name in columns], whole)


def _show_folds(result: TrainResult) -> None:
    if result.already_done:
        typer.echo("Nothing to do: all folds were trained with these options already.")
    rows = []
    for fold in result.folds:
        best = next((row for row in fold.metrics if row["epoch"] == fold.best_epoch), {})
        validation = [best.get(f"validation_{name}") for name in ("loss", "accuracy")]
        rows.append(
            (fold.split, fold.run_id, fold.epochs, fold.best_epoch, *validation,
             fold.predict_run_id)
        )  # fmt: skip
    heads = ("fold", "train run", "epochs", "kept", "val. loss", "val. accuracy", "predict run")
    output.table(heads, rows)
    typer.echo("")


def tracker_lines(trackers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return a line for each tracker: the link to its run, or its id."""
    return {kind: known.get("link", known["run"]) for kind, known in trackers.items()}


def _show_baselines(results: Sequence[BaselineResult]) -> None:
    first, several = results[0], len({item.split for item in results}) > 1
    output.pairs(
        {
            "split": f"{first.split} to {results[-1].split}" if several else first.split,
            "classes": first.classes,
            "training images": first.images,
            "training cells": first.cells,
        }
    )
    typer.echo("")
    output.table(
        (*["fold"] * several, "baseline", "kind", "train run", "learned from", "predict run", ""),
        [
            (
                *[item.split] * several,
                item.baseline,
                "null" if item.null else "classical",
                *(item.run_id, f"{item.rows:,}", item.predict_run_id),
                "was there already" if item.already_done else "",
            )
            for item in results
        ],
    )
    notes = dict.fromkeys(note for item in results for note in item.notes)
    say(*map(output.filled, notes))
    if several and first.predict_run_id:
        family = first.split.rpartition("-")[0]
        say(f"All folds as one: cellstore report --run {shlex.quote(family)}:{first.baseline}")


def _show_predict(result: PredictResult) -> None:
    if result.done == 0 and not result.failures:
        typer.echo(f"Nothing to do: run {result.run_id} has labelled these images already.")
        typer.echo(f"To do it again and compare: cellstore repro {result.run_id} --check")
    output.pairs(
        {
            "run": result.run_id,
            "trained in run": result.train_run_id,
            "split": result.split,
            "images labelled": result.done,
            "labelled before": result.earlier,
            "without measured cells": result.waiting,
            "cells labelled": result.cells,
            **({"feature set": result.feature_set} if result.feature_set else {}),
        }
    )
    if result.failures and not are_gone(result.failures):
        list_failures(result.failures)


@command(app, "predict", then=True)
def predict(
    params: PredictParams,
    store: Store,
    common: Common,
    run: str = option("latest", "The train run, by number, or 'latest'.", metavar="RUN"),
    device: str = DEVICE,
) -> None:
    """Label every cell of some images with a trained network or baseline.

    Predictions are added, never changed: each run keeps its own. The same model and cells give
    the same rows. To go on with a run that was stopped, give the same command again.

    \b
    Example:
      cellstore predict
      cellstore predict --run 7 --subset all --plate BR00116991 --embedding seen_by_7
      cellstore predict --subset all --where "treatment = 'DMSO'" --all-probabilities
    """
    result = store.predict(params, run=run, device=device)
    common.show(result, _show_predict)
    if result.failures:
        end_with_failures(result.failures, result.done, "labelled", "the same command")


def _show_apply(result: ApplyResult) -> None:
    if result.done == 0 and not result.failures:
        typer.echo(f"Nothing to do: {result.name} has what {result.function} makes already.")
    made: dict[str, Any] = {"run": result.run_id} if result.run_id else {}
    made["function"] = result.function
    if result.feature_set is None:
        made |= {"model": f"{result.name} (run {result.train_run_id})", "split": result.split}
    else:
        made |= {"feature set": result.feature_set, "columns": result.columns}
    made |= {"images done": result.done, "done before": result.earlier}
    left = {"without cells or files": result.waiting, "failed before": result.failed_before}
    made |= {name: number for name, number in left.items() if number}
    output.pairs({**made, "cells": result.cells})
    if result.failures and not are_gone(result.failures):
        list_failures(result.failures)


def _failed_apply(result: ApplyResult) -> int:
    if result.failures:
        again = "cellstore retry" if result.feature_set else "the same command"
        end_with_failures(result.failures, result.done, "done", again)
    return 0


def _then_predicted(result: ApplyResult | AddedPredictions) -> tuple[str, ...]:
    return (
        f"cellstore report --run {result.run_id or result.train_run_id}",
        f"cellstore runs --split {shlex.quote(result.split or '')}",
    )


def _then_learn(result: Any) -> tuple[str, ...]:
    """Of what made a feature set, or predictions, as ``apply`` may."""
    if result.feature_set is None:
        return _then_predicted(result)
    learn = f"cellstore train --baseline probe --features {shlex.quote(result.feature_set)}"
    return ("cellstore retry", learn) if getattr(result, "failed_before", 0) else (learn,)


@command(app, "apply", _show_apply, _failed_apply, then=_then_learn)
def apply(
    function: Annotated[
        str, typer.Argument(metavar="MODULE:NAME|MODEL.onnx", help="What looks at the cells.")
    ],
    params: ApplyParams,
    resources: Resources,
    store: Store,
    device: str = DEVICE,
) -> ApplyResult:
    """Let a function or a model of your own look at every cell, and keep what it returns.

    MODULE is a file MODULE.py in this folder, or an installed module; NAME in it is a function, a
    module of torch (with weights loaded) or an estimator of scikit-learn. A function gets a
    dictionary with image (cells, channels, rows, columns), mask, features and cell_id, and returns
    a row of numbers for each cell. An embedding or features become a feature set; probabilities
    become predictions, for votes, report and audit. A stopped command goes on when it is given
    again; images that were added since are added.

    \b
    Example:
      cellstore apply my_model:embed --name mine --channels DNA,RNA --crop 64
      cellstore apply my_model:vit --name vit --gives probabilities
      cellstore apply model.onnx --name vit --device cuda
    """
    # What the function prints is not the answer of this command, which may be JSON.
    with redirect_stdout(sys.stderr):
        return store.apply(function, **asdict(params), device=device, resources=resources)


def _show_embedders(known: list[dict[str, Any]]) -> None:
    for row in known:
        typer.echo(row["name"])
        for key in ("source", "revision", "licence", "preprocessing"):
            if row[key] is not None:
                output.wrapped(f"  {key}: {row[key]}")


@command(app, "embed", _show_apply, _failed_apply, then=_then_learn)
def embed(
    params: EmbedParams,
    common: Common,
    model: str | None = option(
        None,
        "The network: timm:NAME, torchvision:NAME, hf:OWNER/NAME[@REVISION] (Hugging Face), a name "
        "that --list shows, or a folder with config.json and model.safetensors.",
    ),
    name: str | None = option(None, "What the feature set is called. Default: as the model."),
    mode: str | None = option(
        None,
        "What the network sees: each channel by itself in grey, and what it makes of them side by "
        "side (channels); three channels as red, green and blue (rgb); or all channels together, "
        "for networks of microscopy (native). Default: that of the model, or channels.",
        choices=("channels", "rgb", "native"),
    ),
    weights: Path | None = option(
        None, "A file of its weights that you have fetched, instead of a download."
    ),
    crop: int | None = option(
        None,
        "Crops of cells are scaled to this. Default: what the network was trained with.",
        metavar="PIXELS",
        min=1,
    ),
    note: str | None = option_of(ApplyParams, "note"),
    device: str = DEVICE,
    listed: bool = option(
        False,
        "List the known networks: source, revision, licence, preprocessing.",
        name="--list",
    ),
) -> ApplyResult | None:
    """Embed every cell with a published network: a feature set of the cells that are there.

    'cellstore train --baseline probe --features NAME' then says what it is worth, and every command
    that reads a feature set can read it. Weights are fetched once through the Hugging Face hub or
    torchvision, and kept in their caches; the commit and the sha256 of what was used are stored.
    Some licences forbid commercial use: they are printed before anything is fetched. A stopped
    command goes on when it is given again; images that were added since are added.

    \b
    Example:
      cellstore embed --list
      cellstore embed --model dinov2-small
      cellstore embed --model openphenom --channels DNA,ER,RNA,AGP,Mito
      cellstore embed --model timm:resnet50 --mode rgb --channels AGP,ER,DNA
      cellstore embed --model my-vit/ --name my_vit --device cuda
    """
    if listed:
        from cellstore.learn.embedders import KNOWN

        shown = ("source", "revision", "licence", "preprocessing", "mode", "channels", "size")
        rows = [
            {"name": name} | {key: getattr(known, key) for key in shown}
            for name, known in KNOWN.items()
        ]
        common.show(rows, _show_embedders)
        return None
    if model is None:
        raise UserInputError("Name a network: --model MODEL. See: cellstore embed --list")
    from cellstore.learn.embedders import licence_of

    say(f"Licence of {model}: {licence_of(model)}.")
    with common.open() as store:
        given = {**asdict(params), "note": note}
        return store.embed(
            model, name, mode=mode, weights=weights, crop=crop, device=device, **given
        )


predictions = typer.Typer(no_args_is_help=True, help="Predictions of models of your own.")
app.add_typer(predictions, name="predictions")


def _show_added(result: AddedPredictions) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} holds these predictions already.")
    trained_on = "not known"
    if result.trained_on is not None:
        trained_on = ", ".join(result.trained_on) or "none of these images"
    output.pairs(
        {
            "run": result.run_id,
            "model": f"{result.name} (run {result.train_run_id})",
            "split": result.split,
            "trained on": trained_on,
            "images": result.images,
            "cells": result.cells,
            "rows": result.rows,
            **tracker_lines(result.trackers),
        }
    )


@command(predictions, "add", _show_added, then=_then_predicted)
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A table of cells and classes.")],
    params: AddedParams,
    store: Store,
) -> AddedPredictions:
    """Keep the predictions of a model that is not of cellstore, with where they come from.

    FILE (CSV, TSV, Excel, Parquet) has a row for each cell and class. A cell is named by cell_id,
    or by plate, well, site and object_number, or by plate, well, site and a point x, y in pixels.
    Column label is a class of the split, column probability from 0 to 1; or each class has a
    column of its own. Every row is checked before anything is written. Then votes, report, compare
    and audit work as for a network of cellstore, and say what was declared.

    \b
    Example:
      cellstore predictions add labels.csv --name vit --trained-on train
      cellstore predictions add labels.parquet --name forest --split by-well
    """
    return store.add_predictions(file, **asdict(params))


embeddings = typer.Typer(no_args_is_help=True, help="Embeddings of models of your own.")
app.add_typer(embeddings, name="embeddings")


def _show_embeddings(result: AddedEmbeddings) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} holds these embeddings already.")
    output.pairs(
        {
            "run": result.run_id,
            "feature set": result.feature_set,
            "cells": result.cells,
            "columns": result.columns,
        }
    )


@command(embeddings, "add", _show_embeddings, then=_then_learn)
def add_embeddings(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A table of cells and numbers.")],
    store: Store,
    name: str = option("", "What the feature set is called, for example dinov3."),
    model: Path | None = option_of(AddedParams, "model"),
    segmentation: str | None = option_of(AddedParams, "segmentation"),
    note: str | None = option_of(AddedParams, "note"),
) -> AddedEmbeddings:
    """Keep numbers that a model that is not of cellstore made of cells, as a feature set.

    FILE (CSV, TSV, Excel, Parquet) has a row for each cell, which is named as in cellstore
    predictions add. All other columns are numbers; those that cellstore export wrote are left out,
    so that an export with new columns can be brought as it is. No cell is added.

    \b
    Example:
      cellstore embeddings add vectors.parquet --name dinov3
    """
    return store.add_embeddings(file, name, model=model, segmentation=segmentation, note=note)


def _show_withdrawn(done: dict[str, Any]) -> None:
    typer.echo(f"Run {done['run_id']} is withdrawn.")


@command(predictions, "withdraw", _show_withdrawn, then=lambda _: ("cellstore runs",))
def withdraw(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The predict run, by number.")],
    store: Store,
    reason: str = option("", "Why; it is shown with the run.", metavar="TEXT"),
) -> dict[str, Any]:
    """Mark predictions that were added as wrong.

    They stay in the store, so that what was published with them is found. No command takes them by
    default any more. A command that gets the number of their run notes that they were withdrawn,
    and why.

    \b
    Example:
      cellstore predictions withdraw 12 --reason "the classes were mixed up"
    """
    return {"run_id": store.withdraw_predictions(run, reason=reason), "status": "withdrawn"}


def _show_model(result: ExportedModel) -> None:
    output.pairs(
        {
            "written": result.path,
            "trained in run": result.train_run_id,
            "model": result.model,
            "classes": result.classes,
            "files": ", ".join(result.files),
        }
    )


@command(app, "export-model")
def export_model(
    store: Store,
    common: Common,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The train run, by number, or 'latest'.")
    ] = "latest",
    folder: Path | None = option(
        None,
        "The folder to write, new or empty. Default: model-RUN here.",
        name="--output",
        metavar="DIR",
    ),
) -> None:
    """Write a trained model as a folder that opens without this store, and without cellstore.

    The folder holds the trained model (model.safetensors of a network, model.skops of a
    baseline), a JSON file with everything else that it needs (labels, scales, crops, origin), the
    Python source that loads both, three cells, and an example that labels them. A network needs
    torch and torchvision, a baseline scikit-learn and skops. The model files contain no code.

    \b
    Example:
      cellstore export-model 7 --output my-model
      cd my-model && python example.py
    """
    result = store.export_model(run, folder)
    common.show(result, _show_model)
    if not common.as_json:
        say(f"Next: cd {shlex.quote(str(result.path))} && python example.py")
