"""The command that measures cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import ImageInput, MeasureParams, Resources
from cellstore.enums import Projection
from cellstore.store import Store

from . import render
from .context import open_store, sentences
from .images import end_jobs, print_jobs
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
    names,
    selection,
)

if TYPE_CHECKING:
    from cellstore.analysis.features import Feature, FeatureGroup
    from cellstore.stages.measure import MeasureResult


@sentences
def measure(
    ctx: typer.Context,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            metavar="A,B,...",
            help="Groups of features: basic, intensity, texture; --list says what is in them. "
            "May be given several times. Default: basic.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels",
            metavar="A,B,...",
            help="Channels whose intensity is measured. Default: of group basic what was "
            "segmented, of the other groups each channel there is.",
            show_default=False,
        ),
    ] = None,
    projection: Annotated[
        Projection, typer.Option(help="How the --channels become one picture for group basic.")
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
    well: WellsOption = None,
    where: WhereOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    dry_run: DryRunOption = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Only list all features: unit, source and formula.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
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
        _show_registry(as_json=as_json)
        return
    image = ImageInput(names(channels), projection) if channels else None
    groups = names(",".join(features)) if features else MeasureParams().features
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.measure(
            MeasureParams(image, groups),
            selection(plate, well, where, limit),
            segmentation=segmentation,
            resources=Resources(workers, scheduler),
            dry_run=dry_run,
        )
    _show(result, as_json=as_json)


def _show(result: MeasureResult, *, as_json: bool) -> None:
    results = (result, *result.others)
    if as_json:
        render.as_json(result)
    elif len(results) == 1:
        print_jobs(result, "measured", "cells measured")
    else:
        for one in results:
            typer.echo(f"{one.group}: feature set {one.feature_set}")
            print_jobs(one, "measured", "cells measured")
            typer.echo()
    end_jobs(results, "measured")


def _show_registry(*, as_json: bool) -> None:
    groups = Store.feature_groups()
    if as_json:
        render.as_json(groups)
        return
    for group in groups:
        typer.echo(f"{group.name}: {group.description}\n")
        rows = [
            (_shown(group, feature), feature.unit, feature.formula, feature.source)
            for feature in group.features
        ]
        render.table(("feature", "unit", "formula", "source"), rows)
        typer.echo()
    typer.echo("*: each channel. All that is known of them: cellstore measure --list --json")


def _shown(group: FeatureGroup, feature: Feature) -> str:
    return f"{feature.name}_*" if group.per_channel else feature.name
