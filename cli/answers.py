"""Commands that say how good labels are: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellstore.errors import UserInputError

from . import render, tell
from .context import open_store, sentences
from .options import (
    ControlsOption,
    JsonOption,
    LeaveOutOption,
    MinCellsOption,
    MinMarginOption,
    QcRunOption,
    StoreOption,
    leave_out,
    vote_rules,
)


@sentences
def report(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Option(metavar="RUN", help="The predict run, by number, or 'latest'.")
    ] = "latest",
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="RUN",
            help="Put another predict run beside it; see cellstore compare.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with pictures: one file that needs nothing else.",
            show_default=False,
        ),
    ] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="FEATURE",
            help="A feature on the plate maps of the page, for example area; may be given again.",
            show_default=False,
        ),
    ] = None,
    min_cells: MinCellsOption = 1,
    min_margin: MinMarginOption = 0.0,
    controls: ControlsOption = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also score images that the network was trained on; marked."),
    ] = False,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a predict run: majority votes against the truth.

    The cells of an image vote; the winner is compared with the treatment of its well.

    \b
    Example:
      cellstore report
      cellstore report --run 8 --html report.html --map area --map eccentricity
      cellstore report --run 8 --compare 5 --min-cells 20 --no-controls
    """
    if maps and html is None:
        raise UserInputError("The maps are on the page. Name a file for it too: --html report.html")
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.report(
            run,
            compare=compare,
            rules=vote_rules(min_cells, min_margin, controls),
            html=html,
            maps=maps or (),
            force=force,
            leave_out_flagged=leave_out(leave_out_flagged, qc_run),
        )
    if as_json:
        render.as_json(result)
    else:
        tell.report(result)
