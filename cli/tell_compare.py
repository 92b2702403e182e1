"""Two runs side by side, as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from . import render
from .tell import interval, percent

if TYPE_CHECKING:
    from cellstore.report.comparison import ComparedRun, Comparison

OPTIONS_SHOWN = 8
NAME_WIDTH = 22
"""So wide is a name at most, that a line holds three of them and a place."""


def comparison(found: Comparison, shown: int | None = None) -> None:
    """Tell where two runs differ; only the first ``shown`` of the differences, if it is given."""
    first, second = found.first.run_id, found.second.run_id
    wells = f"of {render.count(found.wells, 'well')}"
    typer.echo(f"{render.count(found.n, found.level)} {wells} that both have labelled")
    typer.echo("")
    render.table(
        ("run", "train run", "split", "right", "accuracy", "95 % interval", "wells seen"),
        [_side(item) for item in (found.first, found.second)],
    )
    typer.echo("")
    render.table(
        ("", f"{second} right", f"{second} wrong"),
        [
            (f"{first} right", found.both_right, found.only_first),
            (f"{first} wrong", found.only_second, found.both_wrong),
        ],
    )
    typer.echo("")
    _difference(found)
    render.wrapped(found.verdict)
    for warning in found.warnings:
        render.wrapped(f"Beware: {warning}")
    _recipes(found)
    _differing(found, shown)


def _side(item: ComparedRun) -> tuple[object, ...]:
    bounds = interval(item.low, item.high)
    train = "-" if item.train_run_id is None else item.train_run_id
    split = render.shortened(item.split, NAME_WIDTH)
    seen = item.wells_seen
    return (item.run_id, train, split, item.correct, percent(item.accuracy), bounds, seen)


def _difference(found: Comparison) -> None:
    points = f"{100 * found.difference:+.1f}"
    if found.difference_low is not None and found.difference_high is not None:
        low, high = 100 * found.difference_low, 100 * found.difference_high
        points += f" (95 % interval over wells: {low:+.1f} to {high:+.1f})"
    first, second = found.first.run_id, found.second.run_id
    typer.echo(f"run {first} minus run {second}: {points} points")


def _recipes(found: Comparison) -> None:
    if not found.recipes:
        typer.echo("Their recipes are the same.")
        return
    typer.echo("")
    render.table(
        ("option", f"run {found.first.run_id}", f"run {found.second.run_id}"),
        [
            (
                render.shortened(item.what, 30),
                render.shortened(item.first or "-", NAME_WIDTH),
                render.shortened(item.second or "-", NAME_WIDTH),
            )
            for item in found.recipes[:OPTIONS_SHOWN]
        ],
    )
    more = len(found.recipes) - OPTIONS_SHOWN
    if more > 0:
        typer.echo(f"and {render.count(more, 'more option')} (all with --json)")


def _differing(found: Comparison, shown: int | None) -> None:
    listed = found.differing[:shown]
    if not listed:
        return
    first, second = found.first.run_id, found.second.run_id
    right = {"first": first, "second": second, "neither": "-"}
    typer.echo("")
    render.table(
        (found.level, "truth", f"run {first}", f"run {second}", "right"),
        [
            (
                render.shortened(item.name, NAME_WIDTH),
                *(render.shortened(text, 15) for text in (item.truth, item.first, item.second)),
                right[item.right],
            )
            for item in listed
        ],
    )
    more = found.n_differing - len(listed)
    if more > 0:
        typer.echo(f"and {more:,} more in which they differ (all with --json, or --format csv)")
