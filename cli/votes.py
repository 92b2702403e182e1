"""The command that shows how cells voted: votes."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import render, writing
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
from .questions import (
    FormatOption,
    OutputOption,
    ReplaceOption,
    RowsOption,
    SpreadsheetOption,
)
from .writing import Format, Wanted

if TYPE_CHECKING:
    import pyarrow as pa

    from cellstore.report.votes import VotesResult


@sentences
def votes(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Option("--run", metavar="RUN", help="The predict run, by number, or 'latest'.")
    ] = "latest",
    level: Annotated[
        Level, typer.Option("--level", help="Whether the cells of images or of wells vote.")
    ] = Level.IMAGE,
    vote: Annotated[
        Vote,
        typer.Option(
            "--vote",
            help="hard: each cell counts once, for its first choice; soft: with its "
            "probabilities; median: of the probabilities that the cells gave.",
        ),
    ] = Vote.HARD,
    min_cells: MinCellsOption = 1,
    min_margin: MinMarginOption = 0.0,
    controls: ControlsOption = True,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    ties: Annotated[bool, typer.Option("--ties", help="Show those with a draw only.")] = False,
    limit: RowsOption = None,
    form: FormatOption = Format.TABLE,
    output: OutputOption = None,
    replace: ReplaceOption = False,
    for_spreadsheet: SpreadsheetOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the label of every image by the vote of its cells.

    One row per image, or per well and side of the split. A draw goes to the label with the higher
    summed probability, then to the first in the alphabet, and is always marked. --json gives the
    summary and the rows; --format json the rows only.

    \b
    Example:
      cellstore votes --run 8
      cellstore votes --level well --vote soft --min-cells 20 --min-margin 0.1
      cellstore votes --ties --format csv --output ties.csv
    """
    how = writing.checked(
        Wanted(Format.JSON if as_json else form, output, limit, for_spreadsheet, replace)
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.votes(
            run,
            level=level.value,
            vote=vote.value,
            rules=vote_rules(min_cells, min_margin, controls),
            leave_out_flagged=leave_out(leave_out_flagged, qc_run),
        )
    rows = result.table.filter(result.table["tie"]) if ties else result.table
    if as_json and output is None:
        render.as_json({**_summary(result), "votes": rows.slice(0, how.limit).to_pylist()})
        return
    _headline(result, print_it=how.form is Format.TABLE and output is None)
    writing.write((_for_people(rows) if how.form is Format.TABLE else rows).to_reader(), how)


def _summary(result: VotesResult) -> dict[str, Any]:
    found = {item.name: getattr(result, item.name) for item in fields(result)}
    del found["table"]
    return {**found, "accuracy": result.accuracy}


def _headline(result: VotesResult, *, print_it: bool) -> None:
    tell = typer.echo if print_it else say
    noun = "image" if result.level == "image" else "well"
    counts = f"{render.count(result.units, noun)}, {render.count(result.ties, 'tie')}"
    counts += f", {render.count(result.abstained, 'abstention')}"
    lines = [f"Run {result.run_id}, {result.vote} vote: {counts}"]
    lines += [
        f"{item.subset}: {item.correct:,} of {item.n:,} right ({100 * (item.accuracy or 0):.2f} %)"
        + (" - the network was trained on these" if item.subset == "train" else "")
        for item in result.subsets
    ]
    for line in [*lines, *result.notes]:
        tell(line)
    if print_it:
        tell("")


def _for_people(rows: pa.Table) -> pa.Table:
    """Return the table without ids, which a person has no use for."""
    shown = [name for name in rows.column_names if name not in ("image_id", "well_id")]
    return rows.select(shown)
