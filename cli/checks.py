"""``split check``: what a split gives away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.enums import GroupLevel
from cellstore.errors import UserInputError

from . import render
from .context import open_store, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.analysis.leaks import Finding
    from cellstore.stages.split import CheckResult

WIDTH = 80
MARGIN = 9
"""Width of the column of severities: ``warning`` and a gap."""


@sentences
def check(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The split. Default: the latest.")
    ] = None,
    csv: Annotated[
        list[Path] | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Check a split table instead, without a store; may be given several times, as the "
            "files of `split import`.",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="What a table (--csv) is to predict. Default: the target, if it has one.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        GroupLevel | None,
        typer.Option(
            help="What a table (--csv) should keep on one side. Default: well.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 on warnings, too.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what lets the test side be seen in training.

    A line for each finding. Leaks: wells, equal image files, or one compound under two names on
    both sides. Warnings: classes that are missing on a side, or that their plate or well position
    alone gives away. Ends with 1 if there is a leak.

    \b
    Example:
      cellstore split check by-well
      cellstore split check --csv split.csv --csv wells.csv --strict
    """
    if csv:
        result = _check_tables(csv, name, field, group)
    else:
        if field or group:
            raise UserInputError("--field and --group are for tables: give --csv FILE, too.")
        with open_store(ctx, store, quiet=True) as opened:
            result = opened.check_split(name)
    if as_json:
        render.as_json(result)
    else:
        _show(result)
    if result.leaks or (strict and result.warnings):
        raise typer.Exit(1)


def _check_tables(
    csv: list[Path], name: str | None, field: str | None, group: GroupLevel | None
) -> CheckResult:
    from cellstore.stages.split import check_tables

    if name is not None:
        raise UserInputError("Name a split of the store, or give tables with --csv, not both.")
    return check_tables(csv, field, group or GroupLevel.WELL)


def _show(result: CheckResult) -> None:
    render.facts(_facts(result))
    if result.findings:
        typer.echo()
    for finding in result.findings:
        typer.echo(f"{finding.severity.value:<{MARGIN}}{finding.message}")
        typer.echo(" " * MARGIN + _examples(finding))
    if not result.leaks:
        typer.echo("No leak found: the test side is not seen in training.")
    if result.rows:
        wells = "" if result.wells else "wells, plates and "
        typer.echo(f"Tables do not tell {wells}image files, so these were not looked at.")


def _facts(result: CheckResult) -> list[tuple[str, str]]:
    pairs = [
        ("split", f"{result.split} ({result.protocol}, by {result.group_level})"),
        ("rows", f"{result.rows:,}") if result.rows else ("images", f"{result.images:,}"),
    ]
    if result.wells:
        pairs.append(("wells on both sides", f"{result.wells_on_both_sides:,} of {result.wells:,}"))
    pairs.append(("classes on both sides", f"{result.labels_on_both_sides:,} of {result.labels:,}"))
    if result.unseen:
        pairs.append(
            ("bytes not compared", f"{render.count(result.unseen, 'image')} without files")
        )
    if result.refused:
        pairs.append(("rows not usable", f"{result.refused:,}"))
    return pairs


def _examples(finding: Finding) -> str:
    """As many examples as fit on a line, one at least, cut if need be."""
    room = WIDTH - MARGIN
    shown = ""
    for number, text in enumerate(map(render.cell, finding.examples), start=1):
        longer = f"{shown}, {text}" if shown else text
        more = ", ..." if number < finding.count else ""
        if shown and len(longer + more) > room:
            return f"{shown}, ..."
        shown = longer
    if len(shown) > room:
        return f"{shown[: room - 1]}…"
    return f"{shown}, ..." if finding.count > len(finding.examples) else shown
