"""Commands about wells and treatments: profile, hits."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cellstore.config import HitsParams, ProfileParams, option, options_of, spelled
from cellstore.enums import Verdict
from cellstore.store import Store

from . import output
from .app import HTML, MEASUREMENT, SEGMENTATION, Common, command, say_next
from .output import count, say_more, span

if TYPE_CHECKING:
    from cellstore.stages.hits import DoseRow, HitRow, HitsResult, TargetRow
    from cellstore.stages.profile import ProfileResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HIT_HEADERS = ("treatment", "verdict", "wells", "effect", "95 % interval", "q", "cells")
TARGET_HEADERS = ("target", "perturbations", "consistency", "q")
DOSE_HEADERS = ("perturbation", "of", "trend p", "active from", "EC50 (95 % interval)")
SHOWN_ROWS = 40
SHOWN_ALIKE = 10
"""Treatments that do not differ from the controls, at most."""


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


@command(app, "profile", _show_profile, then=lambda _: ("cellstore hits",))
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


def _short(value: float | None) -> float | None:
    """A number of two digits."""
    return None if value is None else float(f"{value:.2g}")


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else span(_short(low), _short(high))


def _hit_cells(row: HitRow) -> tuple[Any, ...]:
    ratio = None if row.cell_count is None else f"{100 * row.cell_count:.0f} %"
    effect = (_short(row.effect), _interval(row.effect_low, row.effect_high))
    q = row.cell_count_q if row.verdict == Verdict.FEWER_CELLS else row.q
    return (row.name, row.verdict, row.n_wells, *effect, _short(q), ratio)


def _dose_cells(row: DoseRow) -> tuple[Any, ...]:
    unit = f" {row.unit}" if row.unit else ""
    why = (row.note or "").partition(":")[0].removeprefix("the EC50 ")  # the rest is in --json
    ec50 = f"not determined ({why})" if why else "not determined"
    if row.ec50 is not None:
        ec50 = f"{row.ec50:.3g}{unit}"
    if row.low is not None and row.high is not None:
        ec50 += f" ({_interval(row.low, row.high)})"
    lowest = None if row.lowest_active is None else f"{row.lowest_active:.3g}{unit}"
    return (row.name, row.quantity.replace("_", " "), _short(row.trend_p), lowest, ec50)


def _target_cells(row: TargetRow) -> tuple[Any, ...]:
    return (row.target, row.perturbations, _short(row.consistency), _short(row.q))


def _by_plate_set(
    result: HitsResult,
    rows: Sequence[Any],
    headers: tuple[str, ...],
    cells: Callable[[Any], tuple[Any, ...]],
) -> None:
    """Print a table for each plate set; of treatments without a difference, a few."""
    for name, of_set in groupby(rows, lambda row: row.plate_set):
        if len(result.plate_sets) > 1:
            typer.echo(f"{name} ({count(len(result.plate_sets[name]), 'plate')})")
        listed = list(of_set)
        differ = sum(getattr(row, "verdict", "") != Verdict.NO.value for row in listed)
        most = min(SHOWN_ROWS, differ + SHOWN_ALIKE)  # those that differ come first
        output.table(headers, [cells(row) for row in listed[:most]])
        say_more(len(listed) - most)
        typer.echo("")


def _show_hits(result: HitsResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} has compared these wells already.")
    output.wrapped(result.answer)
    typer.echo("")
    plates = sum(map(len, result.plate_sets.values()))
    output.pairs(
        {
            "run": result.run_id,
            "profile run": str(result.profile_run),
            "features": f"{result.columns:,} of {result.feature_set or 'the built-in set'}",
            "controls": result.control,
            "plates": plates,
        }
    )
    typer.echo("")
    _by_plate_set(result, result.rows, HIT_HEADERS, _hit_cells)
    if result.targets:
        typer.echo("Do hits of one target look alike?")
    _by_plate_set(result, result.targets, TARGET_HEADERS, _target_cells)
    if result.doses:
        typer.echo("What changes with the dose?")
    _by_plate_set(result, result.doses, DOSE_HEADERS, _dose_cells)
    output.wrapped(result.rule)
    if result.html:
        typer.echo(f"page: {result.html}")


@command(app, "hits")
def hits(
    params: HitsParams,
    store: Store,
    common: Common,
    html: Path | None = HTML,
    force: bool = option(False, "Compare again, even if nothing has changed."),
) -> None:
    """Show which treatments differ from the controls, how surely, and from which dose on.

    The wells of each treatment are compared with the negative controls of the same plates, by the
    profiles that 'cellstore profile' made. effect: how much farther from the controls they are than
    controls are from each other, in standard deviations of the controls. q: the share of false
    hits among all treatments that are as clear as this one; of 'mainly fewer cells', by their
    number. cells: their number, relative to the controls. See docs/hits.md.

    \b
    Example:
      cellstore hits
      cellstore hits --html hits.html
      cellstore hits --q 0.1 --min-effect 2 --control DMSO
      cellstore hits --curve area --curve probability:taxol --run 8
    """
    found = store.hits(params, html=html, force=force)
    common.show(found, _show_hits)
    if common.as_json:
        return
    words = [
        word
        for item in options_of(HitsParams)
        if (value := getattr(params, item.name)) != item.default
        for word in spelled(item, value)
    ]
    page = shlex.join(["cellstore", "hits", *words, "--html", "hits.html"])
    rows = f'cellstore sql "FROM hit_table WHERE run_id = {found.run_id}"'
    say_next((rows,) if html else (page, rows), common)
