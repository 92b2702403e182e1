"""Baselines on the command line: what ``train --baseline`` does, and the command contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import BaselineParams
from cellstore.errors import UserInputError

from . import render
from .context import open_store, say
from .options import names

if TYPE_CHECKING:
    from pathlib import Path

    from cellstore.stages.baselines import BaselineResult

DEFAULTS = BaselineParams()

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
    | {"seed", "leave_out_flagged", "qc_run", "device", "store", "as_json"}
)
"""Options of train that mean something to a baseline."""


def train_baselines(
    ctx: typer.Context,
    baseline: str,
    params: BaselineParams,
    sources: tuple[str | None, str | None, str | None],
    *,
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
            predict=predict,
        )
    if as_json:
        render.as_json(results)
    else:
        _show(results)


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
