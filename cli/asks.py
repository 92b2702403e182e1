"""The command that asks saved questions: ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.errors import UserInputError

from . import render, tell_schema, writing
from .context import open_store, say, sentences
from .options import StoreOption
from .questions import (
    AnswerJsonOption,
    FormatOption,
    MemoryOption,
    OutputOption,
    ReplaceOption,
    RowsOption,
    SecondsOption,
    SpreadsheetOption,
)
from .writing import Format, Wanted

if TYPE_CHECKING:
    from cellstore.store import Store

OWN = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of the command: options that it does not know are parameters of the question."""


@sentences
def ask(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [--PARAMETER VALUE]...",
            help="The question, and values for what it takes. Without a name: lists all.",
            show_default=False,
        ),
    ] = None,
    show_sql: Annotated[
        bool, typer.Option("--sql", help="Print the question and what it takes; do not ask it.")
    ] = False,
    new: Annotated[
        str | None,
        typer.Option(
            "--new",
            metavar="NAME",
            help="Begin an own question: write questions/NAME.sql into the store's folder.",
            show_default=False,
        ),
    ] = None,
    beginning: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="With --new: a copy of this question instead of an example.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
    output: OutputOption = None,
    replace: ReplaceOption = False,
    limit: RowsOption = None,
    for_spreadsheet: SpreadsheetOption = False,
    seconds: SecondsOption = 600.0,
    memory: MemoryOption = 2048,
    store: StoreOption = None,
    as_json: AnswerJsonOption = False,
) -> None:
    """Ask a saved question, or list them.

    Each is a file of SQL that can be read, copied and changed. Your own ones are files
    questions/NAME.sql in the folder of the store; one that has the name of a question of
    cellstore is asked in its place.

    \b
    Example:
      cellstore ask
      cellstore ask accuracy --run 3
      cellstore ask disagreements --runs 3,5 --format csv
      cellstore ask accuracy --sql
      cellstore ask --new my-plates --from plates
    """
    from cellstore.query.guard import Limits

    name, given = _parsed([*(words or ()), *ctx.args])
    wanted = writing.checked(
        Wanted(Format.JSON if as_json else form, output, limit, for_spreadsheet, replace)
    )
    with open_store(ctx, store, quiet=True) as opened:
        if new is not None:
            say(f"Written: {opened.new_question(new, beginning)}")
        elif name is None:
            _list(opened, as_json=as_json)
        elif show_sql:
            _show(opened, name)
        else:
            _ask(opened, name, given, Limits(seconds=seconds, memory_mb=memory), wanted)


def _parsed(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the name of a question and its parameters; one without a value means yes."""
    names: list[str] = []
    given: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            names.append(word)
            continue
        key, mark, value = word[2:].partition("=")
        if not mark:
            value = left.pop(0) if left and not left[0].startswith("--") else "yes"
        given[key.replace("-", "_")] = value
    if len(names) > 1:
        raise UserInputError(
            f"One question at a time: {names[0]!r} or {names[1]!r}? Values follow their "
            "parameter: --run 3."
        )
    if given and not names:
        raise UserInputError(f"--{next(iter(given))} of which question? List them: cellstore ask")
    return (names[0] if names else None), given


def _list(opened: Store, *, as_json: bool) -> None:
    found = opened.questions()
    if as_json:
        render.as_json(found)
    else:
        tell_schema.questions(found)
    for problem in opened.question_problems():
        say(f"Left out: {problem}")


def _show(opened: Store, name: str) -> None:
    question = opened.question(name)
    typer.echo(question.text.rstrip("\n"))


def _ask(opened: Store, name: str, given: dict[str, str], limits: object, wanted: Wanted) -> None:
    from cellstore.query.guard import Limits

    from .confined import confined

    assert isinstance(limits, Limits)
    question = opened.question(name)
    if question.replaces:
        say(f"Asking your own {question.path}, in place of the one of cellstore.")
    values = opened.question_values(question, given)
    spill = opened.workspace.settings.cache / "spill"
    with confined(limits, spill), opened.open_questions(limits) as questions:
        writing.write(questions.stream(question.query, values), wanted)
