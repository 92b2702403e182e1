"""Baselines on the command line: what ``train --baseline`` does, and the command contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import BaselineParams, ContrastParams
from cellstore.errors import UserInputError

from . import render
from .context import open_store, say, sentences
from .options import JsonOption, PlatesOption, StoreOption, names

if TYPE_CHECKING:
    from pathlib import Path

    from cellstore.stages.contrast import ContrastResult, ContrastRow
    from cellstore.stages.train_baselines import BaselineResult

DEFAULTS = BaselineParams()
COMPARED = ContrastParams()

BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="NAME,...",
        help="Train no network but what it has to beat: logistic, forest, or a null baseline "
        "(majority, shuffled, cellcount, position); with commas between, or 'null' for all four, "
        "or 'all'. They label the test side at once, for the report.",
        show_default=False,
    ),
]
NoPredictOption = Annotated[
    bool, typer.Option("--no-predict", help="With --baseline: do not label the test side.")
]
MaxCellsOption = Annotated[
    int,
    typer.Option(
        "--max-cells",
        min=1,
        metavar="N",
        help="With --baseline: learn from so many cells at most, as many of each class as can be.",
    ),
]

SHARED = frozenset(
    {"baseline", "no_predict", "max_cells", "split", "segmentation", "measurement", "features"}
    | {"normalise", "force", "seed", "leave_out_flagged", "qc_run", "device", "store", "as_json"}
)
"""Options of train that mean something to a baseline."""


def train_baselines(
    ctx: typer.Context,
    baseline: str,
    params: BaselineParams,
    sources: tuple[str | None, str | None, str | None],
    *,
    force: bool,
    predict: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Train baselines and tell of them; ``sources``: split, segmentation and measurement.

    Raises:
        UserInputError: an option was given that only networks have.
    """
    _check_options(ctx)
    with open_store(ctx, store, quiet=as_json) as opened:
        results = opened.train_baselines(
            names(baseline),
            params,
            split=sources[0],
            segmentation=sources[1],
            measurement=sources[2],
            force=force,
            predict=predict,
        )
    if as_json:
        render.as_json(results)
    else:
        _show(results)


def _as_row(row: ContrastRow) -> tuple[Any, ...]:
    return (
        *(row.treatment, row.verdict, row.wells or None, row.cells or None),
        *(None if value is None else f"{value:.3f}" for value in (row.accuracy, row.auc)),
        "-" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}",
        None if row.usual is None else f"{row.usual:.3f}",
    )


HEADERS = ("treatment", "differs", "wells", "cells", "accuracy", "AUC", "95 % interval", "chance")


def check_alone(ctx: typer.Context) -> None:
    """Refuse options of baselines where a network is trained.

    Raises:
        UserInputError: one was given.
    """
    for name in ("no_predict", "max_cells"):
        if _typed(ctx, name):
            raise UserInputError(f"{_flag(name)} is an option of baselines: give --baseline, too.")


def _check_options(ctx: typer.Context) -> None:
    given = [name for name in ctx.params if name not in SHARED and _typed(ctx, name)]
    if given:
        flags = ", ".join(map(_flag, given))
        raise UserInputError(f"Baselines have no option {flags}. Leave it away, or --baseline.")


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _show(results: Sequence[BaselineResult]) -> None:
    first = results[0]
    render.facts(
        [
            ("split", first.split),
            ("classes", first.classes),
            ("training images", f"{first.images:,}"),
            ("training cells", f"{first.cells:,}"),
        ]
    )
    typer.echo("")
    render.table(
        ("baseline", "kind", "train run", "learned from", "predict run", ""),
        [
            (
                item.baseline,
                "null" if item.null else "classical",
                *(item.run_id, f"{item.rows:,}", item.predict_run_id),
                "was there already" if item.already_done else "",
            )
            for item in results
        ],
    )
    for note in dict.fromkeys(note for item in results for note in item.notes):
        say(note)
    if first.predict_run_id is not None:
        typer.echo("\nThey stand beside the score of every run of this split: cellstore report")


@sentences
def contrast(
    ctx: typer.Context,
    treatment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compare only this treatment; may be given several times. Default: all.",
            show_default=False,
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare with this treatment. Default: what is marked as negative control.",
            show_default=False,
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Compare all treatments as one, as the study did.")
    ] = False,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The feature set. Default: the built-in measurements last used.",
            show_default=False,
        ),
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
    plate: PlatesOption = None,
    folds: Annotated[
        int, typer.Option(min=2, metavar="N", help="Parts in which wells are held out in turn.")
    ] = COMPARED.folds,
    max_cells: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Compare so many cells of each side at most, evenly of wells."
        ),
    ] = COMPARED.max_cells,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Same seed, same cells and folds.")
    ] = COMPARED.seed,
    force: Annotated[
        bool, typer.Option("--force", help="Compare again, even if nothing has changed.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which treatments look different from control at all.

    A logistic regression tells cells of a treatment from control cells of the same plates, as
    many of each, by their measurements. It is asked about wells that it has not seen: 0.5 is
    chance, and the last rows show what chance looks like between control wells.

    \b
    Example:
      cellstore contrast
      cellstore contrast --treatment taxol --control DMSO
      cellstore contrast --pooled
    """
    params = ContrastParams(
        treatments=tuple(treatment or ()),
        control=control,
        features=features,
        plates=tuple(plate or ()),
        pooled=pooled,
        folds=folds,
        max_cells=max_cells,
        seed=seed,
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.contrast(
            params, segmentation=segmentation, measurement=measurement, force=force
        )
    if as_json:
        render.as_json(result)
    else:
        _show_contrast(result)


def _show_contrast(result: ContrastResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} has compared these cells already.")
    render.facts(
        [
            ("run", result.run_id),
            ("control", result.control),
            ("feature set", result.feature_set or "built-in"),
            ("measurements", result.columns),
            ("different", f"{result.different} of {result.tested} that could be compared"),
        ]
    )
    typer.echo("")
    render.table(HEADERS, map(_as_row, result.rows))
    for row in result.rows:
        if row.note:
            typer.echo(f"{row.treatment}: {row.note}")
    for note in result.notes:
        say(note)
