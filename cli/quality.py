"""The command that looks for odd images and cells: qc."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import QcParams, Resources
from cellstore.enums import CellFlagReason, ImageFlagReason

from . import render
from .context import open_store, say, sentences
from .images import (
    end_with_earlier_failures,
    end_with_failures,
    list_failures,
    show_forecast,
)
from .options import (
    DryRunOption,
    JsonOption,
    LimitOption,
    PlatesOption,
    SchedulerOption,
    StoreOption,
    WellsOption,
    WhereOption,
    WorkersOption,
    selection,
)

if TYPE_CHECKING:
    from cellstore.stages.qc import FlaggedImage, QcResult

USUAL = QcParams()
SHORT = {
    ImageFlagReason.OUT_OF_FOCUS: "focus",
    ImageFlagReason.SATURATED: "white",
    ImageFlagReason.NO_SIGNAL: "noise",
    ImageFlagReason.CELL_COUNT: "count",
    ImageFlagReason.CELL_AREA: "area",
    ImageFlagReason.NO_CELLS: "empty",
    CellFlagReason.BORDER: "at border",
}
"""Reasons as the heads of columns, so that a table fits 80 characters."""


@sentences
def qc(
    ctx: typer.Context,
    outlier: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="How far an image may be from the plate's median: focus, background, number and "
            "area of cells, in robust standard deviations.",
        ),
    ] = USUAL.outlier,
    cell_outlier: Annotated[
        float, typer.Option(metavar="X", help="The same for the area of a cell.")
    ] = USUAL.cell_outlier,
    saturated: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0, max=1.0, help="Share of a channel's pixels that may be white."
        ),
    ] = USUAL.saturated,
    border: Annotated[
        bool, typer.Option("--border/--no-border", help="Flag cells that touch the border.")
    ] = USUAL.border,
    min_images: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Plates with fewer images are compared with nothing."
        ),
    ] = USUAL.min_images,
    segmentation: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Whose cells: number or start of the fingerprint, as 'cellstore status' lists "
            "them. Default: the last used, if any.",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the flagged images with reason and value.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page: maps of the plates, and their oddest fields.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Also write the maps of one plate as a picture.",
            show_default=False,
        ),
    ] = None,
    plate: PlatesOption = None,
    well: WellsOption = None,
    where: WhereOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Flag images and cells that are odd on their plate; delete nothing.

    Images: out of focus, saturated, odd background, nothing but noise, odd number or size of
    cells, no cells. Cells: odd area, cut by the border. Flags are kept beside what they speak of.
    They count only where you ask for it: split create, train and report have --leave-out-flagged.
    Each image is opened once, whatever the limits.

    \b
    Example:
      cellstore qc
      cellstore qc --plate BR00116991 --html qc.html
      cellstore qc --outlier 4 --list
    """
    params = QcParams(outlier, cell_outlier, saturated, border=border, min_images=min_images)
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.qc(
            params,
            selection(plate, well, where, limit),
            segmentation=segmentation,
            html=None if dry_run else html,
            plot=None if dry_run else plot,
            resources=Resources(workers, scheduler),
            dry_run=dry_run,
        )
        if listed:
            result = replace(result, flags=opened.flagged_images(result))
    if as_json:
        render.as_json(result)
    elif result.forecast is not None:
        show_forecast(result, result.forecast, "looked at")
    else:
        _show(result, listed=listed)
    if not dry_run:
        end_with_failures(len(result.failures), result.done, "looked at")
        end_with_earlier_failures(result.failed_before)


def _show(result: QcResult, *, listed: bool) -> None:
    if result.run_id is None:
        typer.echo(f"Nothing to look at: {_why_nothing(result)}")
        return
    if result.already_done:
        typer.echo(f"Nothing has changed since run {result.run_id}, which found:")
    else:
        pairs = [("run", result.run_id), ("images looked at now", f"{result.done:,}")]
        pairs += [("images missing files", f"{result.waiting:,}")] if result.waiting else []
        pairs += [("failed before", f"{result.failed_before:,}")] if result.failed_before else []
        render.facts(pairs)
    typer.echo("")
    _images(result)
    if result.segment_recipe is not None:
        typer.echo("")
        _cells(result)
    if listed:
        typer.echo("")
        _list(result.flags)
    for note in result.notes:
        say(note)
    list_failures(result.failures)
    for name, path in (("page", result.html), ("picture", result.picture)):
        if path:
            typer.echo(f"{name}: {path}")


def _why_nothing(result: QcResult) -> str:
    if result.waiting:
        return (
            f"{render.count(result.waiting, 'image')} still without files. Ingest again with "
            "--images to fill them in."
        )
    return "no image is selected. See what there is with: cellstore status"


def _images(result: QcResult) -> None:
    reasons = [reason.value for reason in ImageFlagReason]
    heads = [SHORT.get(reason, reason.value) for reason in ImageFlagReason]
    render.table(
        ["plate", "images", "flagged", *heads],
        [
            [plate.plate, plate.seen, plate.flagged, *_numbers(plate.by_reason, reasons)]
            for plate in result.plates
        ],
    )


def _cells(result: QcResult) -> None:
    reasons = [reason.value for reason in CellFlagReason]
    heads = [SHORT.get(reason, f"odd {reason.value}") for reason in CellFlagReason]
    render.table(
        ["plate", "cells", "flagged", *heads, "perimeter 0"],
        [
            [
                *(plate.plate, plate.cells, plate.cells_flagged),
                *(*_numbers(plate.cells_by_reason, reasons), plate.excluded),
            ]
            for plate in result.plates
        ],
    )


def _numbers(found: Any, reasons: Sequence[str]) -> list[int]:
    return [found.get(reason, 0) for reason in reasons]


def _list(flags: Sequence[FlaggedImage]) -> None:
    if not flags:
        typer.echo("No image is flagged.")
        return
    render.table(
        ["image", "reason", "channel", "value", "usual"],
        [
            [
                f"{flag.plate}/{flag.well}/{flag.site}",
                flag.reason,
                flag.channel or None,
                flag.value,
                render.span(flag.low, flag.high),
            ]
            for flag in flags
        ],
    )
