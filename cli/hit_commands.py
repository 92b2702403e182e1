"""Commands about wells and treatments: profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cellstore.config import ProfileParams, option
from cellstore.store import Store

from . import output
from .app import MEASUREMENT, SEGMENTATION, command
from .output import count, say

if TYPE_CHECKING:
    from cellstore.stages.profile import ProfileResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.callback()(lambda: None)  # of one command alone Typer makes no group


def _show_profile(result: ProfileResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} has made these profiles already.")
    wells = f"{result.wells:,} on {count(result.plates, 'plate')}"
    output.pairs(
        {
            "run": result.run_id,
            "wells": f"{wells}, {result.controls:,} of them negative controls",
            "cells": result.cells,
            "wells without cells": result.wells_without_cells,
            "features": f"{result.features:,} of {result.measured:,} of {result.feature_set}",
        }
    )
    if result.gone:
        typer.echo("")
        rows = ((why, len(names), ", ".join(names)) for why, names in result.gone.items())
        output.table(("left out because", "features", "which"), rows)
    say(*map(output.filled, result.notes))


@command(app, "profile", _show_profile, then=True)
def profile(
    params: ProfileParams,
    store: Store,
    segmentation: str | None = SEGMENTATION,
    measurement: str | None = MEASUREMENT,
    force: bool = option(False, "Make them again, even if nothing has changed."),
) -> ProfileResult:
    """Average the cells of each well, and compare wells with the controls of their plate.

    A profile is a row of numbers for a well: each feature, averaged over its cells, as the
    distance from the negative controls of the same plate in their standard deviations. Features
    that say nothing, or the same as another one, are removed. All of it as pycytominer does it.
    What the profiles are for: cellstore hits. See docs/hits.md.

    \b
    Example:
      cellstore profile
      cellstore profile --features texture --exclude-flagged latest
      cellstore profile --positions median-polish --normalise standardise
      cellstore profile --select none --harmony plate
    """
    return store.profile(params, segmentation=segmentation, measurement=measurement, force=force)
