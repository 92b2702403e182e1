"""Commands that take any question: sql."""

from __future__ import annotations

import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import render
from .context import open_store, say, sentences
from .options import StoreOption

if TYPE_CHECKING:
    import pyarrow as pa


class Format(StrEnum):
    """How the answer to a question is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


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
