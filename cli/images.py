"""Commands that go image by image: segment, measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import DEFAULT_MODEL, ImageInput, MeasureParams, SegmentParams
from cellstore.terms import Projection

from . import render
from .context import open_store, say, sentences
from .options import (
    ChannelsOption,
    Device,
    DeviceOption,
    JsonOption,
    LimitOption,
    PlatesOption,
    StoreOption,
    names,
)

if TYPE_CHECKING:
    from cellstore.runs.jobs import JobsResult

SHOWN_FAILURES = 10


@sentences
def segment(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME|FILE",
            help="The network: cellstore-nuclei (comes with cellstore), Cellpose's cyto, cyto2, "
            "cyto3 or nuclei (fetched on first use), or the file of your own.",
        ),
    ] = DEFAULT_MODEL,
    flow_threshold: Annotated[
        float,
        typer.Option(
            metavar="X", help="Higher keeps cells whose shape fits the network's flows less well."
        ),
    ] = 0.7,
    cellprob_threshold: Annotated[
        float, typer.Option(metavar="X", help="Lower finds more and larger cells, also dim ones.")
    ] = -5.0,
    diameter: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            metavar="PIXELS",
            help="Diameter of the cells. Default: estimated for each image.",
            show_default=False,
        ),
    ] = None,
    channels: ChannelsOption = None,
    projection: Annotated[
        Projection, typer.Option(help="How several channels become one picture.")
    ] = Projection.MEDIAN,
    plate: PlatesOption = None,
    limit: LimitOption = None,
    weights_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that holds the named networks, for machines without internet access.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the cells in every image, with Cellpose.

    Images that were done with the same options are left alone, so that a run that was stopped
    goes on where it was. An image that fails is named at the end; the others are done.
    Defaults are those of the published pipeline.

    \b
    Example:
      cellstore segment --channels DNA --diameter 35
    """
    params = SegmentParams(
        model=model,
        flow_threshold=flow_threshold,
        cellprob_threshold=cellprob_threshold,
        diameter=diameter,
        image=ImageInput(names(channels), projection),
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.segment(
            params,
            plates=tuple(plate or ()),
            limit=limit,
            weights_dir=weights_dir,
            device=device.value,
        )
    show_jobs(result, "segmented", "cells found", as_json=as_json)


@sentences
def measure(
    ctx: typer.Context,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels",
            metavar="A,B,...",
            help="Channels whose intensity is measured. Default: what was segmented.",
            show_default=False,
        ),
    ] = None,
    projection: Annotated[
        Projection, typer.Option(help="How the --channels become one picture.")
    ] = Projection.MEDIAN,
    segmentation: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Which segmentation: number or start of the fingerprint, as 'cellstore status' "
            "lists them. Default: the last used.",
            show_default=False,
        ),
    ] = None,
    plate: PlatesOption = None,
    limit: LimitOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every cell that was found: area, shape, intensity.

    The values are those of scikit-image's regionprops, lengths in pixels. Cells whose perimeter
    is 0 are kept and marked as excluded.

    \b
    Example:
      cellstore measure
      cellstore measure --channels DNA
    """
    image = ImageInput(names(channels), projection) if channels else None
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.measure(
            MeasureParams(image), segmentation=segmentation, plates=tuple(plate or ()), limit=limit
        )
    show_jobs(result, "measured", "cells measured", as_json=as_json)


def show_jobs(result: JobsResult, verb: str, cells: str, *, as_json: bool) -> None:
    """Print what a stage did image by image; ends with 1 if images failed."""
    if as_json:
        render.as_json(result)
    else:
        _show_counts(result, verb, cells)
        list_failures(result.failures)
    end_with_failures(len(result.failures), result.done, verb)


def end_with_failures(failed: int, done: int, verb: str) -> None:
    """End with 1 if images failed."""
    if failed:
        say(
            f"Error: {failed} of {render.count(failed + done, 'image')} could not be {verb}; "
            "the others are done. Running the same command again tries them again."
        )
        raise typer.Exit(1)


def list_failures(failures: Sequence[tuple[str, str]]) -> None:
    """Print the first images that failed, and why."""
    for name, reason in failures[:SHOWN_FAILURES]:
        typer.echo(f"failed {render.cell(name)}: {render.cell(reason)}")
    if len(failures) > SHOWN_FAILURES:
        typer.echo(f"and {len(failures) - SHOWN_FAILURES} more: see cellstore status --failed")


def _show_counts(result: JobsResult, verb: str, cells: str) -> None:
    if result.run_id is None:
        typer.echo(f"Nothing to do: {_why_nothing(result, verb)}")
        return
    pairs = [
        ("run", result.run_id),
        ("recipe", result.recipe_id),
        (f"images {verb}", f"{result.done:,}"),
        (cells, f"{result.cells:,}"),
    ]
    if result.waiting:
        pairs.append(("images missing files", f"{result.waiting:,}"))
    render.facts(pairs)


def _why_nothing(result: JobsResult, verb: str) -> str:
    if result.selected == 0:
        return "there are no images yet. Bring some in with: cellstore ingest"
    there = result.selected - result.waiting
    done = f"{render.count(there, 'image')} {verb} already with these options"
    if not result.waiting:
        return f"{done}."
    waiting = f"{render.count(result.waiting, 'image')} still without files"
    return f"{done}, {waiting}. Ingest again with --images to fill them in."
