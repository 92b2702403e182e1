"""Commands that take any question: sql, and schema, which says what can be asked."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cellstore.errors import UserInputError

from . import render, tell_schema, writing
from .context import open_store, sentences
from .options import StoreOption
from .writing import Format, Wanted

FormatOption = Annotated[Format, typer.Option("--format", help="How the answer is written.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the answer to a file. Needed for parquet.",
        show_default=False,
    ),
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Replace the file of --output if it is there.")
]
RowsOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=0,
        metavar="N",
        help="Only the first N rows. Default: 1,000 of a table, all in other formats.",
        show_default=False,
    ),
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", min=0.1, metavar="S", help="Stop a question after this time.")
]
MemoryOption = Annotated[
    int,
    typer.Option(
        "--memory", min=64, metavar="MB", help="What a question may take; more goes to the disk."
    ),
]
SpreadsheetOption = Annotated[
    bool,
    typer.Option(
        "--for-spreadsheet",
        help="CSV: put a ' before texts that a spreadsheet would run as formulas.",
    ),
]
AnswerJsonOption = Annotated[bool, typer.Option("--json", help="Same as --format json.")]


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
            "--file", metavar="FILE", help="Read the question from a file.", show_default=False
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="The value of $NAME in the question; may be given several times. Numbers, true, "
            "false, null and [1,2] are such; all else, and what stands in double quotes, is text.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
    output: OutputOption = None,
    replace: ReplaceOption = False,
    limit: RowsOption = None,
    for_spreadsheet: SpreadsheetOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how the question would be answered, only.")
    ] = False,
    seconds: SecondsOption = 600.0,
    memory: MemoryOption = 2048,
    store: StoreOption = None,
    as_json: AnswerJsonOption = False,
) -> None:
    """Ask the store a question in SQL.

    All tables and views are there by their plain names (in words: cellstore schema). The
    dialect is DuckDB's. Questions only read: no writing, no files, no network.

    \b
    Example:
      cellstore sql "SELECT t.name, count(*) FROM wells
                     JOIN treatments t ON t.id = treatment_id GROUP BY 1"
      cellstore sql 'SELECT * FROM wells WHERE name = $well' --param well=D14
      cellstore sql --file big.sql --format parquet --output answer.parquet
      cellstore sql
    """
    from cellstore.query.guard import Limits

    from .confined import confined

    form = Format.JSON if as_json else form
    wanted = writing.checked(Wanted(form, output, limit, for_spreadsheet, replace))
    parameters = dict(map(_parameter, param or ()))
    limits = Limits(seconds=seconds, memory_mb=memory)
    with open_store(ctx, store, quiet=True) as opened:
        spill = opened.workspace.settings.cache / "spill"
        question = _question(query, file)
        if question is None:
            from .prompt import talk

            talk(opened, limits, spill)
            return
        with confined(limits, spill), opened.open_questions(limits) as questions:
            if explain:
                typer.echo(questions.plan(question, parameters))
            else:
                writing.write(questions.stream(question, parameters), wanted)


def _question(query: str | None, file: Path | None) -> str | None:
    """Return the question from where it is; None: a person is to be asked for it."""
    if file is not None:
        if query is not None:
            raise UserInputError("The question is given twice: as QUERY and as --file.")
        if str(file) != "-":
            return _read(file)
    elif query is None and sys.stdin.isatty():
        return None
    return sys.stdin.read() if query in (None, "-") else query


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserInputError(f"{file} cannot be read: {reason}.") from error


def _parameter(text: str) -> tuple[str, object]:
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise UserInputError(f"--param takes NAME=VALUE, like run=3, not {text!r}.")
    try:
        return name, json.loads(value, parse_constant=_no_number)
    except ValueError:
        return name, value


def _no_number(text: str) -> Any:
    raise ValueError(text)


class SchemaFormat(StrEnum):
    """How the schema is written."""

    TEXT = "text"
    JSON = "json"
    MERMAID = "mermaid"


@sentences
def schema(
    ctx: typer.Context,
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]",
            help="A table, view or feature set. Default: an overview of all.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        SchemaFormat,
        typer.Option("--format", help="mermaid: a diagram of the tables and what refers to what."),
    ] = SchemaFormat.TEXT,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Say what every table, view and column is, in words.

    \b
    Example:
      cellstore schema
      cellstore schema cells
      cellstore schema --format mermaid
    """
    with open_store(ctx, store, quiet=True) as opened:
        relations = opened.schema()
    if table is not None and (as_json or form is not SchemaFormat.TEXT):
        relations = [tell_schema.named(relations, table)]
    if as_json or form is SchemaFormat.JSON:
        render.as_json(relations)
    elif form is SchemaFormat.MERMAID:
        from cellstore.query.describe import diagram

        typer.echo(diagram(relations))
    elif table is None:
        tell_schema.overview(relations)
    else:
        tell_schema.relation(relations, table)
