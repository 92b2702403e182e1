"""Commands that go image by image: segment, measure, qc; and finetune, which teaches segment."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cellstore.config import (
    FinetuneParams,
    MeasureParams,
    QcParams,
    Resources,
    SegmentParams,
    Selection,
    option,
)
from cellstore.enums import CellFlagReason, ImageFlagReason
from cellstore.store import Store

from . import output
from .app import (
    DEVICE,
    HTML,
    PRESET,
    SEGMENTATION,
    Common,
    command,
)
from .output import say

if TYPE_CHECKING:
    from cellstore.jobs.execute import JobsResult
    from cellstore.report.segment_preview import PreviewResult
    from cellstore.stages.correct_masks import CorrectedMasks
    from cellstore.stages.finetune import FinetuneResult
    from cellstore.stages.qc import QcResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)

SHOWN_FAILURES = 10


@command(app, "segment", then=True)
def segment(
    params: SegmentParams,
    selection: Selection,
    resources: Resources,
    store: Store,
    common: Common,
    preset: str | None = PRESET,
    preview: int | None = option(
        None,
        "Segment only N images from all over the selection, keep nothing, and write "
        "pictures of what was found.",
        min=1,
    ),
    preview_dir: Path = option(
        Path("cellstore-preview"), "Where --preview puts its pictures.", metavar="DIR"
    ),
    device: str = DEVICE,
) -> None:
    """Find the cells in every image, with Cellpose.

    Images that are done with the same options are skipped: to go on with a run that was stopped,
    give the same command again. Several may run at once, on PostgreSQL also on several machines.
    Images that fail are listed at the end; the others are done. The thresholds are Cellpose's
    own; --preset published has those of the published study.

    \b
    Example:
      cellstore segment --preview 6
      cellstore segment --channels DNA --diameter 35 --workers 2
      cellstore segment --model cyto3 --channels RNA --nuclei DNA
      cellstore segment --preset published
      cellstore segment --where "treatment = 'DMSO'"
    """
    if preview is not None and (resources.workers > 1 or resources.scheduler):
        raise typer.BadParameter(
            "--preview looks at a few images in this process. Leave out --workers and --scheduler."
        )
    if preview is not None:
        shown = store.preview(params, selection, count=preview, folder=preview_dir, device=device)
        _show_preview(shown, common)
    else:
        result = store.segment(params, selection, device=device, resources=resources)
        _end_jobs({"": result}, common, "segmented", "cells found")


def _show_preview(result: PreviewResult, common: Common) -> None:
    """Print what a preview found, and how to go on; ends with 1 if an image failed."""
    problems = [(item.name, item.problem) for item in result.images if item.problem is not None]
    if common.as_json:
        output.print_json(result)
    elif not result.images:
        typer.echo("Nothing to show: no image of the selection has its files.")
    else:
        rows = [
            (item.name, item.cells, round(item.diameter or 0.0, 1), round(item.seconds, 1))
            for item in result.images
            if item.problem is None
        ]
        output.table(["image", "cells", "diameter", "seconds"], rows)
        list_failures(problems)
        typer.echo(
            f"\nLook at the pictures in {result.folder}.\n"
            "Nothing was kept. Cells split or merged: add --diameter. Too few cells, or\n"
            "outlines too wide: see --cellprob-threshold. When it looks right, run the same\n"
            f"command without --preview for {output.count(result.available, 'image')}."
        )
    if problems:
        raise typer.Exit(1)


def _why_nothing(result: JobsResult | QcResult, verb: str) -> str:
    if result.selected == 0:
        return "no image is selected. See what there is with: cellstore status"
    there = result.selected - result.waiting - result.failed_before
    parts = [f"{output.count(there, 'image')} {verb} already with these options"]
    if result.failed_before:
        parts.append(f"{result.failed_before:,} failed before")
    if result.waiting:
        without = f"{output.count(result.waiting, 'image')} still without files"
        parts.append(f"{without}. Ingest again with --images to fill them in")
    return f"{', '.join(parts)}."


def list_failures(failures: Sequence[tuple[str, str]], word: str = "failed") -> None:
    """Print why images failed, and the first of them: a paragraph for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in failures:
        names.setdefault(reason, []).append(name)
    for reason, failed in list(names.items())[:SHOWN_FAILURES]:
        more = f" and {len(failed) - SHOWN_FAILURES} more" if len(failed) > SHOWN_FAILURES else ""
        output.wrapped(f"{word} {', '.join(failed[:SHOWN_FAILURES])}{more}: {reason}")
    output.say_more(len(names) - SHOWN_FAILURES, how="see: cellstore jobs --failed")


def end_with_failures(
    failures: Sequence[tuple[str, str]], done: int, verb: str, again: str = "cellstore retry"
) -> NoReturn:
    """End with 1 because images failed."""
    failed = len({name for name, _ in failures})
    others = "; the others are done" if done else ""
    what = f"{failed} of {output.count(failed + done, 'image')} could not be {verb}{others}"
    then = f"To try them again: {again}"
    if are_gone(failures):  # to try again would not help
        then = "When cellstore knows where the files are, run the same command again."
    say(f"Error: {what}. {then}")
    raise typer.Exit(1)


def are_gone(failures: Sequence[tuple[str, str]]) -> bool:
    """Whether all images failed because their files are gone, which was said when it was found."""
    from cellstore.jobs.gone_files import GONE

    return bool(failures) and all(reason.startswith(GONE) for _, reason in failures)


def _end_jobs(
    results: Mapping[str, Any],
    common: Common,
    verb: str,
    cells: str = "",
    show: Callable[[dict[str, int]], None] | None = None,
) -> None:
    """Print what runs over the same images did; by title, if there are several.

    ``results``: of type ``JobsResult``; or a ``QcResult``, which ``show`` prints, with the numbers
    of images that were not tried. Ends with 1 if images failed, now or before.
    """
    found = list(results.values())
    if common.as_json:
        output.print_json(found[0])
    for title, result in () if common.as_json else results.items():
        if len(results) > 1:
            typer.echo(title)
        left = {"images missing files": result.waiting, "failed before": result.failed_before}
        left = {name: number for name, number in left.items() if number}
        if result.run_id is None:
            typer.echo(f"Nothing to do: {_why_nothing(result, verb)}")
        elif show is not None:
            show(left)
        else:
            shown = {"run": result.run_id, "recipe": result.recipe_id}
            shown |= {f"images {verb}": result.done, cells: result.cells}
            output.pairs(shown | left)
        if result.failures and show is None and not are_gone(result.failures):
            list_failures(result.failures)
        if len(results) > 1:
            typer.echo()
    lacking = getattr(found[0], "lacking", ())
    if lacking and not common.as_json:
        list_failures(lacking, "left out:")
    if lacking:
        all_images = output.count(found[0].selected + len(lacking), "image")
        say(f"Error: {len(lacking)} of {all_images} could not be {verb}: they lack a channel.")
    failed = [failure for result in found for failure in result.failures]
    if failed:
        end_with_failures(failed, max(result.done for result in found), verb)
    before = max(result.failed_before for result in found)
    if before:
        say(
            f"Error: {output.count(before, 'image')} failed in an earlier run and were not "
            "tried again. See why with: cellstore jobs --failed. To try again: cellstore retry"
        )
    if before or lacking:
        raise typer.Exit(1)


@command(app, "measure", then=True)
def measure(
    params: MeasureParams,
    selection: Selection,
    resources: Resources,
    common: Common,
    segmentation: str | None = SEGMENTATION,
    listed: bool = option(
        False, "Only list all features: unit, source and formula.", name="--list"
    ),
) -> None:
    """Measure every cell that was found: area, shape, intensity, texture.

    The values are those of scikit-image, lengths in pixels. Each group of features is a feature
    set: basic is table 'features', the others are tables of their own to 'cellstore sql', with a
    column for each feature and channel. Cells whose perimeter is 0 are kept and marked as
    excluded.

    \b
    Example:
      cellstore measure
      cellstore measure --features basic,intensity --channels DNA,RNA --workers 2
      cellstore measure --list
    """
    if listed:
        _list_features(common)
        return
    with common.open() as store:
        result = store.measure(params, selection, segmentation=segmentation, resources=resources)
    groups = {f"{r.group}: feature set {r.feature_set}": r for r in (result, *result.others)}
    _end_jobs(groups, common, "measured", "cells measured")


def _list_features(common: Common) -> None:
    from cellstore.analysis.features import GROUPS

    groups = list(GROUPS.values())
    if common.as_json:
        output.print_json(groups)
        return
    for group in groups:
        typer.echo(f"{group.name}: {group.description}\n")
        ending = "_*" if group.per_channel else ""
        rows = [(f"{f.name}{ending}", f.unit, f.formula, f.source) for f in group.features]
        output.table(("feature", "unit", "formula", "source"), rows)
        typer.echo()
    typer.echo("*: each channel. All that is known of them: cellstore measure --list --json")


@command(app, "qc", then=True)
def qc(
    params: QcParams,
    selection: Selection,
    resources: Resources,
    store: Store,
    common: Common,
    segmentation: str | None = SEGMENTATION,
    listed: bool = option(False, "List the flagged images with reason and value.", name="--list"),
    html: Path | None = HTML,
) -> None:
    """Flag images and cells that are unusual on their plate; delete nothing.

    Images: out of focus, saturated, unusual background, only noise, unusual number or size
    of cells, no cells. Cells: unusual area, cut by the border. What is flagged still counts,
    unless you exclude it: split create, train, report, compare and votes have --exclude-flagged.
    With other limits later, no image is opened again.

    \b
    Example:
      cellstore qc
      cellstore qc --plate BR00116991 --html qc.html
      cellstore qc --outlier 4 --list
    """
    result = store.qc(
        params,
        selection,
        segmentation=segmentation,
        html=html,
        resources=resources,
    )
    if listed:
        from cellstore.stages.qc import list_flags

        result = replace(result, flags=list_flags(store.workspace, result))
    _end_jobs(
        {"": result}, common, "looked at", show=lambda left: _show_qc(result, left, listed=listed)
    )


def _show_qc(result: QcResult, left: dict[str, int], *, listed: bool) -> None:
    if result.already_done:
        typer.echo(f"Nothing has changed since run {result.run_id}, which found:")
    else:
        output.pairs({"run": result.run_id, "images looked at now": result.done} | left)
    typer.echo("")
    images = {
        ImageFlagReason.OUT_OF_FOCUS: "focus",
        ImageFlagReason.SATURATED: "saturated",
        ImageFlagReason.BACKGROUND: "backgr.",
        ImageFlagReason.NO_SIGNAL: "noise",
        ImageFlagReason.CELL_COUNT: "count",
        ImageFlagReason.CELL_AREA: "area",
        ImageFlagReason.NO_CELLS: "empty",
    }
    output.table(
        ["plate", "seen", "flagged", *images.values()],
        [
            [
                plate.plate,
                plate.seen,
                plate.flagged,
                *(plate.by_reason.get(reason, 0) for reason in images),
            ]
            for plate in result.plates
        ],
    )
    if result.segment_recipe is not None:
        typer.echo("")
        cells = {CellFlagReason.AREA: "odd area", CellFlagReason.BORDER: "at border"}
        rows = [
            [
                *(plate.plate, plate.cells, plate.cells_flagged),
                *(*(plate.cells_by_reason.get(reason, 0) for reason in cells), plate.excluded),
            ]
            for plate in result.plates
        ]
        output.table(["plate", "cells", "flagged", *cells.values(), "excluded"], rows)
    if listed and not result.flags:
        typer.echo("\nNo image is flagged.")
    elif listed:
        typer.echo("")
        flags = [
            (
                f"{flag.plate}/{flag.well}/{flag.site}",
                *(flag.reason, flag.channel or None, flag.value),
                output.span(flag.low, flag.high),
            )
            for flag in result.flags
        ]
        output.table(["image", "reason", "channel", "value", "usual"], flags)
    say(*map(output.filled, result.notes))
    list_failures(result.failures)
    if result.html:
        typer.echo(f"page: {result.html}")


def _show_finetune(result: FinetuneResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} learned from these masks already.")
    before, after = result.before, result.after
    output.pairs(
        {
            "run": result.run_id,
            "started from": result.start,
            "images learned from": result.images,
            "cells learned from": result.cells,
            "images held out": result.held_out,
            "AP before": "not known" if before is None else f"{before:.3f}",
            "AP after": "not known" if after is None else f"{after:.3f}",
        }
    )
    for item in result.refused[:SHOWN_FAILURES]:
        say(f"Not used: {item['file']}: {item['reason']}")
    output.say_more(len(result.refused) - SHOWN_FAILURES, " files")
    if before is None or after is None:
        say("No image was held out, so nobody knows whether the new network is better.")
    elif after < before:
        say("The new network is worse on the held-out images. More masks, or fewer --epochs, help.")
    size = result.diameter or "PIXELS"
    say(f"Next: cellstore segment --model {result.model} --diameter {size} --preview 6")


@command(app, "finetune", _show_finetune)
def finetune(
    masks: Annotated[
        list[Path],
        typer.Option(
            "--masks",
            metavar="DIR|FILE",
            help="Corrected label images (TIFF, PNG or NPY), named like their images; may be given "
            "several times.",
        ),
    ],
    params: FinetuneParams,
    store: Store,
    plate: str | None = option(
        None, "The plate of the masks, where several have images of these names.", metavar="BARCODE"
    ),
    device: str = DEVICE,
) -> FinetuneResult:
    """Teach a Cellpose network with masks that you corrected.

    The masks are matched to images by name, as in 'cellstore ingest'. Some wells are not learned
    from: the average precision (IoU 0.5) on them, before and after, shows whether the new network
    is better. It is kept in the store, and 'cellstore segment --model run:N' uses it.

    \b
    Example:
      cellstore finetune --masks corrected/ --channels DNA
      cellstore finetune --masks corrected/ --model cyto3 --channels RNA --nuclei DNA
    """
    return store.finetune(masks, params, plate=plate, device=device)


def _show_corrected(result: CorrectedMasks) -> None:
    if not result.saved:
        say(f"{result.image} stays as it is: no masks were stored.")
        return
    segmentation = f"{result.segmentation} ({result.name})"
    rows = {"image": result.image, "cells": result.cells, "segmentation": segmentation}
    output.pairs({**rows, "file": result.file})


@command(
    app,
    "napari",
    _show_corrected,
    then=lambda result: (
        [f"cellstore finetune --masks {shlex.quote(result.folder)}"] if result.saved else []
    ),
)
def napari(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="As in audit: PLATE/A01/1, an id.")],
    store: Store,
    segmentation: str | None = option(
        None, "Whose masks. Default: the newest of the image.", metavar="RECIPE"
    ),
    folder: Path = option(
        Path("corrected"),
        "Where corrected masks are written, named like their images, as finetune reads them.",
        name="--folder",
    ),
) -> CorrectedMasks:
    """Correct the masks of an image in napari.

    The channels and the masks open in a window of napari, where masks are painted, erased and
    filled. Shift-S stores them: as a segmentation of its own (measure and train take it then as
    the last used), and as a file from which finetune learns. The masks from before stay.

    \b
    Example:
      cellstore napari BR00116991/F15/8
      cellstore napari 4711 --segmentation 2 --folder corrected
    """
    return store.napari(image, segmentation=segmentation, folder=folder)
