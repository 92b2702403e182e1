"""Commands that say where a label comes from: audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from . import render, tell_audit
from .context import open_store, sentences
from .options import JsonOption, StoreOption

R = TypeVar("R")

app = typer.Typer(
    help="Show where a label comes from: for an image, a cell, or a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("image")
@sentences
def audit_image(
    ctx: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="r01c01f01, PLATE/r01c01f01, PLATE/A01/1, a file name, or an id."
        ),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every run that labelled an image, and from what.

    When, by whom, by which code and network, whether its well was in training, which
    segmentation, how many cells, the votes, the winner, the truth.

    \b
    Example:
      cellstore audit image r01c01f01
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_image(image)
    _show(result, tell_audit.image, as_json=as_json)


@app.command("well")
@sentences
def audit_well(
    ctx: typer.Context,
    well: Annotated[str, typer.Argument(metavar="WELL", help="PLATE/A01.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was done to a well, when that was corrected, and what its images show.

    \b
    Example:
      cellstore audit well BR00116991/D14
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_well(well)
    _show(result, tell_audit.well, as_json=as_json)


@app.command("cell")
@sentences
def audit_cell(
    ctx: typer.Context,
    cell: Annotated[int, typer.Argument(metavar="CELL", min=1, help="The id in the table cells.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a cell comes from and what was predicted.

    \b
    Example:
      cellstore audit cell 4711
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_cell(cell)
    _show(result, tell_audit.cell, as_json=as_json)


@app.command("run")
@sentences
def audit_run(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The run, by number, or 'latest'.")
    ] = "latest",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run was made from, and what it made.

    \b
    Example:
      cellstore audit run 3
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_run(run)
    _show(result, tell_audit.run, as_json=as_json)


def _show(result: R, told: Callable[[R], None], *, as_json: bool) -> None:
    if as_json:
        render.as_json(result)
    else:
        told(result)
