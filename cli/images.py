"""The command that finds cells, and how the result of a stage that goes image by image is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import DEFAULT_MODEL, ImageInput, Resources, SegmentParams
from cellstore.enums import Projection

from . import render
from .context import open_store, say, sentences
from .options import (
    ChannelsOption,
    Device,
    DeviceOption,
    DryRunOption,
    JsonOption,
    LimitOption,
    PlatesOption,
    SchedulerOption,
    StoreOption,
    WellsOption,
    WhereOption,
    WorkersOption,
    names,
    selection,
)

if TYPE_CHECKING:
    from cellstore.jobs.execute import Forecast, JobsResult
    from cellstore.report.segment_preview import PreviewResult
    from cellstore.stages.qc import QcResult

SHOWN_FAILURES = 10
PREVIEW_FOLDER = Path("cellstore-preview")


@sentences
def segment(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME|FILE|run:N",
            help="The network: cellstore-nuclei (comes with cellstore), Cellpose's cyto, cyto2, "
            "cyto3 or nuclei (with Cellpose 4: cpsam), fetched on first use; the file of your own; "
            "or run:N, what 'cellstore finetune' made in run N.",
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
    diameter_from: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Take, on each plate, the median of the diameters that this segmentation used "
            "there: number or start of the fingerprint, as 'cellstore status' lists them.",
            show_default=False,
        ),
    ] = None,
    channels: ChannelsOption = None,
    projection: Annotated[
        Projection, typer.Option(help="How several channels become one picture.")
    ] = Projection.MEDIAN,
    nuclei: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Channels of the nuclei, a second picture for networks that look at two "
            "(cyto, cyto2, cyto3, cpsam). Default: none.",
            show_default=False,
        ),
    ] = None,
    preview: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Segment only N images from all over the selection, keep nothing, and write "
            "pictures of what was found.",
            show_default=False,
        ),
    ] = None,
    preview_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where --preview puts its pictures.")
    ] = PREVIEW_FOLDER,
    plate: PlatesOption = None,
    well: WellsOption = None,
    where: WhereOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    dry_run: DryRunOption = False,
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
    goes on where it was: several may run at once, on PostgreSQL also on several machines. An
    image that fails is named at the end; the others are done. Defaults are those of the
    published pipeline.

    \b
    Example:
      cellstore segment --channels DNA --preview 6
      cellstore segment --channels DNA --diameter 35 --workers 2
      cellstore segment --model cyto3 --channels RNA --nuclei DNA
      cellstore segment --channels DNA --where "perturbation = 'DMSO'" --dry-run
    """
    params = SegmentParams(
        model=model,
        flow_threshold=flow_threshold,
        cellprob_threshold=cellprob_threshold,
        diameter=diameter,
        image=ImageInput(names(channels), projection),
        nuclei=ImageInput(names(nuclei), projection) if nuclei else None,
        diameter_from=diameter_from,
    )
    chosen = selection(plate, well, where, limit)
    if preview is not None and (dry_run or workers > 1 or scheduler):
        raise typer.BadParameter(
            "--preview looks at a few images in this process: leave --dry-run, --workers and "
            "--scheduler away."
        )
    if preview is not None:
        with open_store(ctx, store, quiet=as_json) as opened:
            shown = opened.preview(
                params,
                chosen,
                count=preview,
                folder=preview_dir,
                weights_dir=weights_dir,
                device=device.value,
            )
        show_preview(shown, as_json=as_json)
        return
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.segment(
            params,
            chosen,
            weights_dir=weights_dir,
            device=device.value,
            resources=Resources(workers, scheduler),
            dry_run=dry_run,
        )
    show_jobs(result, "segmented", "cells found", as_json=as_json)


def show_preview(result: PreviewResult, *, as_json: bool) -> None:
    """Print what a preview found, and how to go on; ends with 1 if an image failed."""
    problems = [item for item in result.images if item.problem is not None]
    if as_json:
        render.as_json(result)
    elif not result.images:
        typer.echo("Nothing to show: no image of the selection has its files.")
    else:
        render.table(
            ["image", "cells", "diameter", "seconds"],
            [
                (item.name, item.cells, _rounded(item.diameter), _rounded(item.seconds))
                for item in result.images
                if item.problem is None
            ],
        )
        list_failures([(item.name, item.problem or "") for item in problems])
        _how_to_go_on(result)
    if problems:
        raise typer.Exit(1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _how_to_go_on(result: PreviewResult) -> None:
    if result.sheet is not None:
        typer.echo(f"\nLook at {result.sheet}, and at the pictures beside it.")
    images = render.count(result.available, "image")
    typer.echo(
        "Nothing was kept. Cells split or merged: give --diameter. Too few cells, or\n"
        "outlines too wide: see --cellprob-threshold. When it looks right, run the same\n"
        f"command without --preview for {images}."
    )


def show_jobs(result: JobsResult, verb: str, cells: str, *, as_json: bool) -> None:
    """Print what a stage did image by image; ends with 1 if images failed."""
    if as_json:
        render.as_json(result)
    else:
        print_jobs(result, verb, cells)
    end_jobs([result], verb)


def print_jobs(result: JobsResult, verb: str, cells: str) -> None:
    """Print what a stage did image by image, or would do."""
    if result.forecast is not None:
        show_forecast(result, result.forecast, verb)
    else:
        _show_counts(result, verb, cells)
        list_failures(result.failures)


def end_jobs(results: Sequence[JobsResult], verb: str) -> None:
    """End with 1 if images failed in any of several runs over the same images, now or before."""
    if any(result.forecast is not None for result in results):
        return
    failed = {name for result in results for name, _ in result.failures}
    end_with_failures(len(failed), max(result.done for result in results), verb)
    end_with_earlier_failures(max(result.failed_before for result in results))


def end_with_earlier_failures(failed: int) -> None:
    """End with 1 if images failed in earlier runs."""
    if failed:
        say(
            f"Error: {render.count(failed, 'image')} failed before, left alone now. See why with: "
            "cellstore jobs --failed. Another try: cellstore retry"
        )
        raise typer.Exit(1)


def end_with_failures(failed: int, done: int, verb: str, again: str = "cellstore retry") -> None:
    """End with 1 if images failed."""
    if failed:
        say(
            f"Error: {failed} of {render.count(failed + done, 'image')} could not be {verb}; "
            f"the others are done. Open them for another try with: {again}"
        )
        raise typer.Exit(1)


def show_forecast(result: JobsResult | QcResult, forecast: Forecast, verb: str) -> None:
    """Print how many images there are to do, and how long that may take."""
    pairs = [
        ("images selected", f"{result.selected:,}"),
        (f"{verb} already", f"{result.selected - _not_done(result, forecast):,}"),
        ("missing files", f"{result.waiting:,}"),
        ("failed before", f"{result.failed_before:,}"),
        ("to do", f"{forecast.images:,}"),
        ("time", _time(forecast)),
    ]
    render.facts(pairs)


def _not_done(result: JobsResult | QcResult, forecast: Forecast) -> int:
    return result.waiting + result.failed_before + forecast.images


def _time(forecast: Forecast) -> str:
    if forecast.seconds is None or forecast.per_image is None:
        return "unknown: no image has been through this stage yet. Try some with --limit 5"
    workers = render.count(forecast.workers, "worker")
    return (
        f"about {duration(forecast.seconds)} with {workers} "
        f"({forecast.per_image:.3g} s an image, as {forecast.basis} took)"
    )


def duration(seconds: float) -> str:
    """Return ``2 h 5 min``, ``3 min`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def list_failures(failures: Sequence[tuple[str, str]]) -> None:
    """Print the first images that failed, and why."""
    for name, reason in failures[:SHOWN_FAILURES]:
        typer.echo(f"failed {render.cell(name)}: {render.cell(reason)}")
    if len(failures) > SHOWN_FAILURES:
        typer.echo(f"and {len(failures) - SHOWN_FAILURES} more: see cellstore jobs --failed")


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
    if result.failed_before:
        pairs.append(("failed before", f"{result.failed_before:,}"))
    render.facts(pairs)


def _why_nothing(result: JobsResult, verb: str) -> str:
    if result.selected == 0:
        return "no image is selected. See what there is with: cellstore status"
    there = result.selected - result.waiting - result.failed_before
    parts = [f"{render.count(there, 'image')} {verb} already with these options"]
    if result.failed_before:
        parts.append(f"{result.failed_before:,} failed before")
    if not result.waiting:
        return f"{', '.join(parts)}."
    parts.append(f"{render.count(result.waiting, 'image')} still without files")
    return f"{', '.join(parts)}. Ingest again with --images to fill them in."
