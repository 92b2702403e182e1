"""Commands that answer questions: report, audit, sql."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import render, tell
from .context import open_store, say, sentences
from .options import JsonOption, LeaveOutOption, QcRunOption, StoreOption, leave_out

if TYPE_CHECKING:
    import pyarrow as pa

audit = typer.Typer(
    help="Show where a label comes from: for an image, a cell, or a run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


R = TypeVar("R")


class Format(StrEnum):
    """How the answer to a question is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@sentences
def report(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Option(metavar="RUN", help="The predict run, by number, or 'latest'.")
    ] = "latest",
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with pictures: one file that needs nothing else.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also score images that the network was trained on; marked."),
    ] = False,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a predict run: majority votes against the truth.

    The cells of an image vote; the winner is compared with the treatment of its well.

    \b
    Example:
      cellstore report
      cellstore report --run 8 --html report.html
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.report(
            run, html=html, force=force, leave_out_flagged=leave_out(leave_out_flagged, qc_run)
        )
    _show(result, tell.report, as_json=as_json)


@audit.command("image")
@sentences
def audit_image(
    ctx: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="r01c01f01, PLATE/r01c01f01, PLATE/A01/1, a file name, or an id."
        ),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every run that labelled an image, and from what.

    When, by whom, by which code and network, whether its well was in training, which
    segmentation, how many cells, the votes, the winner, the truth.

    \b
    Example:
      cellstore audit image r01c01f01
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_image(image)
    _show(result, tell.image, as_json=as_json)


@audit.command("well")
@sentences
def audit_well(
    ctx: typer.Context,
    well: Annotated[str, typer.Argument(metavar="WELL", help="PLATE/A01.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was done to a well, when that was corrected, and what its images show.

    \b
    Example:
      cellstore audit well BR00116991/D14
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_well(well)
    _show(result, tell.well, as_json=as_json)


@audit.command("cell")
@sentences
def audit_cell(
    ctx: typer.Context,
    cell: Annotated[int, typer.Argument(metavar="CELL", min=1, help="The id in the table cells.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a cell comes from and what was predicted.

    \b
    Example:
      cellstore audit cell 4711
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_cell(cell)
    _show(result, tell.cell, as_json=as_json)


@audit.command("run")
@sentences
def audit_run(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The run, by number, or 'latest'.")
    ] = "latest",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run was made from, and what it made.

    \b
    Example:
      cellstore audit run 3
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.audit_run(run)
    _show(result, tell.run, as_json=as_json)


def _show(result: R, told: Callable[[R], None], *, as_json: bool) -> None:
    if as_json:
        render.as_json(result)
    else:
        told(result)


@sentences
def sql(
    ctx: typer.Context,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="The question; '-' reads it from stdin.")
    ],
    form: Annotated[
        Format, typer.Option("--format", help="How the answer is written.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write the answer to a file. Needed for parquet.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Ask the store a question in SQL.

    All tables and views are there by their plain names (list them with SHOW TABLES). The
    dialect is DuckDB's. Questions only read: no writing, no files, no network.

    \b
    Example:
      cellstore sql "SELECT pert_iname, count(*) FROM wells
                     JOIN treatments t ON t.id = treatment_id GROUP BY 1"
      cellstore sql "SELECT * FROM features" --format parquet --output features.parquet
    """
    chosen = Format.JSON if as_json else form
    if chosen is Format.PARQUET and output is None:
        say("Error: Parquet is no text to print. Say where it goes with --output FILE.")
        raise typer.Exit(2)
    question = sys.stdin.read() if query == "-" else query
    with open_store(ctx, store, quiet=True) as opened:
        answer = opened.sql(question)
    if output is not None:
        _save(answer, chosen, output)
        say(f"{render.count(answer.num_rows, 'row')} written to {output}")
    elif chosen is Format.TABLE:
        render.table(answer.column_names, _rows(answer))
    else:
        typer.echo(_encoded(answer, chosen), nl=False)


def _rows(answer: pa.Table) -> list[list[Any]]:
    return [list(row.values()) for row in _records(answer)]


def _records(answer: pa.Table) -> list[dict[str, Any]]:
    # Not to_pylist(): two columns of the same name are two columns.
    names = _unique(answer.column_names)
    return answer.rename_columns(names).to_pylist()  # type: ignore[no-any-return]


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _save(answer: pa.Table, chosen: Format, output: Path) -> None:
    from cellstore.artifacts import write_atomically

    data = _table_text(answer) if chosen is Format.TABLE else _encoded(answer, chosen)
    write_atomically(output, data)


def _table_text(answer: pa.Table) -> bytes:
    return render.table_text(answer.column_names, _rows(answer)).encode()


def _encoded(answer: pa.Table, chosen: Format) -> bytes:
    if chosen is Format.JSON:
        text = json.dumps(render.plain(_records(answer)), indent=2, ensure_ascii=False)
        return (text + "\n").encode()
    target = io.BytesIO()
    if chosen is Format.CSV:
        import pyarrow.csv

        pyarrow.csv.write_csv(answer, target)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(answer, target, compression="zstd")
    return target.getvalue()
