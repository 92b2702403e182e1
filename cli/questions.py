"""Commands that take any question: sql."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.errors import UserInputError

from .asked import (
    Format,
    FormatOption,
    JsonFormatOption,
    MemoryOption,
    OutputOption,
    RowsOption,
    SecondsOption,
    SpreadsheetOption,
    hand_over,
    limits_of,
    parameters,
    wanted,
)
from .context import open_store, sentences
from .options import StoreOption
from .tell_plan import plan

if TYPE_CHECKING:
    from cellstore import Store
    from cellstore.analytics import Limits


@sentences
def sql(
    ctx: typer.Context,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="[QUERY]",
            help="The question; '-' reads it from stdin. Without one: a prompt.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Read the question from this file.", show_default=False
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="The value of $NAME in the question; may be given several times. Numbers, true, "
            "false and null are such; anything in quotes is text.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
    output: OutputOption = None,
    limit: RowsOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how the answer would be worked out, instead.")
    ] = False,
    seconds: SecondsOption = 600.0,
    memory: MemoryOption = 2048,
    for_spreadsheet: SpreadsheetOption = False,
    store: StoreOption = None,
    as_json: JsonFormatOption = False,
) -> None:
    """Ask the store a question in SQL.

    All tables and views are there by their plain names: 'cellstore schema' tells what is in
    them. The dialect is DuckDB's. Questions only read: no writing, no files, no network.
    Without a question, at a terminal, this is a prompt with history and completion.

    \b
    Example:
      cellstore sql "SELECT pert_iname, count(*) FROM wells
                     JOIN treatments t ON t.id = treatment_id GROUP BY 1"
      cellstore sql "FROM wells WHERE name = $well" --param well=D14
      cellstore sql --file question.sql --format parquet --output answer.parquet
    """
    how = wanted(form, as_json, output, limit, for_spreadsheet)
    bound = parameters(param)
    limits = limits_of(seconds, memory)
    question = _question(query, file)
    with open_store(ctx, store, quiet=True) as opened:
        if question is None:
            from .prompt import converse

            converse(opened, how, limits)
        elif explain:
            plan(_plan(opened, question, bound, limits), as_json=how.form is Format.JSON)
        else:
            hand_over(opened.sql(question, bound, rows=how.fetched, limits=limits), how)


def _question(query: str | None, file: Path | None) -> str | None:
    """Return the text of the question; None where a person is to type it."""
    if query is not None and file is not None:
        raise UserInputError("Give the question or --file, not both.")
    if file is not None:
        return _text_of(file)
    if query == "-" or (query is None and not sys.stdin.isatty()):
        return sys.stdin.read()
    return query


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserInputError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"{file} is no text in UTF-8.") from error


def _plan(
    opened: Store, question: str, bound: dict[str, Any] | None, limits: Limits
) -> list[dict[str, Any]]:
    answer = opened.sql(f"EXPLAIN (FORMAT json) {question}", bound, limits=limits)
    return json.loads(answer.column("explain_value")[0].as_py())  # type: ignore[no-any-return]
