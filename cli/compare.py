"""The command that puts two predict runs side by side: compare."""

from __future__ import annotations

import csv
import io
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.errors import UserInputError

from . import render, tell_compare
from .context import open_store, say, sentences
from .options import (
    ControlsOption,
    JsonOption,
    LeaveOutOption,
    Level,
    MinCellsOption,
    MinMarginOption,
    QcRunOption,
    StoreOption,
    Vote,
    leave_out,
    vote_rules,
)
from .questions import ReplaceOption
from .writing import check_output

if TYPE_CHECKING:
    from cellstore.report.comparison import Comparison

SHOWN = 20
COLUMNS = ("unit_id", "name", "truth", "first", "second", "right")


class Format(StrEnum):
    """How a comparison is written."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"


@sentences
def compare(
    ctx: typer.Context,
    first: Annotated[
        str, typer.Argument(metavar="RUN", help="A predict run, by number, or 'latest'.")
    ],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other one.")],
    level: Annotated[
        Level, typer.Option("--level", help="What is compared: images or wells.")
    ] = Level.IMAGE,
    vote: Annotated[
        Vote, typer.Option("--vote", help="How cells vote; see cellstore votes.")
    ] = Vote.HARD,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=0,
            help="List only the first N that differ. Default: 20 as text, all as JSON or CSV.",
            show_default=False,
        ),
    ] = None,
    min_cells: MinCellsOption = 1,
    min_margin: MinMarginOption = 0.0,
    controls: ControlsOption = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also compare images that a network was trained on; marked."),
    ] = False,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    form: Annotated[
        Format, typer.Option("--format", help="How it is written; csv: only what differs.")
    ] = Format.TEXT,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write to a file.", show_default=False),
    ] = None,
    replace: ReplaceOption = False,
    for_spreadsheet: Annotated[
        bool,
        typer.Option(
            "--for-spreadsheet",
            help="CSV: put a ' before texts that a spreadsheet would run as formulas.",
        ),
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say where two predict runs differ, and which of them is right.

    They are compared on the images that both have labelled. McNemar's test takes each well once,
    because images of a well are alike.

    \b
    Example:
      cellstore compare 8 12
      cellstore compare 8 12 --level well --vote soft
      cellstore compare 8 12 --format csv --output differing.csv
    """
    chosen = Format.JSON if as_json else form
    if output is not None:
        check_output(output, replace=replace)
    if output is not None and chosen is Format.TEXT:
        raise UserInputError("Text is for reading: give --format csv or json for a file.")
    with open_store(ctx, store, quiet=chosen is Format.JSON) as opened:
        found = opened.compare(
            first,
            second,
            level=level.value,
            vote=vote.value,
            limit=SHOWN if limit is None and chosen is Format.TEXT else limit,
            rules=vote_rules(min_cells, min_margin, controls),
            force=force,
            leave_out_flagged=leave_out(leave_out_flagged, qc_run),
        )
    if chosen is Format.TEXT:
        tell_compare.comparison(found)
        return
    data = chosen is Format.CSV
    text = _csv(found, for_spreadsheet=for_spreadsheet) if data else render.json_text(found)
    if output is None:
        typer.echo(text, nl=False)
    else:
        _save(text, output)


def _csv(found: Comparison, *, for_spreadsheet: bool) -> str:
    from cellstore.io.tables import disarmed_name as harmless

    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in found.differing:
        row = [str(getattr(item, name)) for name in COLUMNS]
        writer.writerow([harmless(text) for text in row] if for_spreadsheet else row)
    return target.getvalue()


def _save(text: str, output: Path) -> None:
    from cellstore.artifacts import write_atomically

    write_atomically(output, text.encode())
    say(f"written to {output}")
