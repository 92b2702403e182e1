"""Commands that ask: explore, ask, sql, schema; and export, which hands all cells out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.artifacts import part_prefix
from cellstore.config import Limits, Selection, option, option_of
from cellstore.enums import Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.store import Store

from . import output
from .app import MEASUREMENT, SEGMENTATION, Common, command
from .output import AnswerOptions, Format, say

if TYPE_CHECKING:
    from cellstore.query.describe import RelationWords
    from cellstore.stages.export import ExportedProfiles, ExportResult
    from cellstore.stages.export_crops import ExportedCrops

app = typer.Typer(add_completion=False, rich_markup_mode=None)

GRACE_SECONDS = 15.0
SLACK_MB = 1536
"""What the rest of the program may take: Arrow, the tables that are read live, new copies."""


@contextmanager
def confined(store: Store, limits: Limits) -> Iterator[None]:
    """Hold this process to ``limits``, the memory with some slack, the time with some grace.

    DuckDB does not count a text while a function makes it (``repeat('x', 4000000000)``), and does
    not stop on request while it plans. Here the operating system refuses memory, and a clock
    ends the program, which takes its part of the folder ``spill`` of the cache along.
    """
    spill = store.workspace.settings.cache / "spill"

    def end() -> None:
        say(
            f"Error: The question took longer than {limits.seconds:g} seconds and did not stop "
            "on request, so the program ends. Ask for less, or allow more time with --seconds."
        )
        for folder in spill.glob(f"{part_prefix()}*"):
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        os._exit(2)

    clock = threading.Timer(limits.seconds + GRACE_SECONDS, end)
    clock.daemon = True
    clock.start()
    try:
        with _memory(limits.memory_mb + SLACK_MB):
            yield
    finally:
        clock.cancel()


@contextmanager
def _memory(megabytes: int) -> Iterator[None]:
    if sys.platform != "linux":  # elsewhere the limit is not kept, or there is none
        yield
        return
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next((int(line.split()[1]) for line in lines if line.startswith("VmData:")), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = (taken << 10) + (megabytes << 20)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _checked(answer: AnswerOptions, common: Common) -> AnswerOptions:
    """Return the answer that is wanted; ``--json`` is the same as ``--format json``."""
    return (replace(answer, format=Format.JSON) if common.as_json else answer).checked()


@command(app, "sql")
def sql(
    answer: AnswerOptions,
    limits: Limits,
    store: Store,
    common: Common,
    query: Annotated[
        str | None, typer.Argument(metavar="[QUERY]", help="The question; '-' reads it from stdin.")
    ] = None,
    file: Path | None = option(None, "Read the question from a file."),
    param: tuple[str, ...] = option(
        (),
        "The value of $NAME in the question; may be given several times. Numbers, true, "
        "false, null and lists like [1,2] are what they look like; all else, and what is in "
        "double quotes, is text.",
        metavar="NAME=VALUE",
        repeated=True,
    ),
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
    """
    answer = _checked(answer, common)
    parameters = dict(map(_parameter, param or ()))
    question = _question(query, file)
    with confined(store, limits), store.open_questions(limits) as questions:
        output.write(questions.ask(question, parameters), answer)
    store.wrote(answer.output)


def _question(query: str | None, file: Path | None) -> str:
    from cellstore.query.guard import read_sql

    in_a_pipe = query is None and file is None and not sys.stdin.isatty()
    if (query is None) == (file is None) and not in_a_pipe:
        raise UserInputError(
            'Give one question, as QUERY or as --file. Example: cellstore sql "FROM plates". Many '
            "that you may want are there already: cellstore ask"
        )
    if file is not None:
        return read_sql(file)
    return sys.stdin.read() if query is None or query == "-" else query


def _parameter(text: str) -> tuple[str, object]:
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise UserInputError(f"--param takes NAME=VALUE, like run=3, not {text!r}.")

    def no_number(text: str) -> Any:
        raise ValueError(text)  # NaN and Infinity are texts

    try:
        return name, json.loads(value, parse_constant=no_number)
    except ValueError:
        return name, value


@command(app, "ask", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ask(
    context: typer.Context,
    answer: AnswerOptions,
    limits: Limits,
    store: Store,
    common: Common,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [--PARAMETER VALUE]...",
            help="The question, and values for what it takes. Without a name: lists all.",
        ),
    ] = None,
    show_sql: bool = option(False, "Only print the question and what it takes.", name="--sql"),
) -> None:
    """Ask a saved question, or list them.

    Each is a file of SQL that you can read, copy and change. Put your own ones into the folder of
    the store, as questions/NAME.sql. If one of yours has the name of one of cellstore, yours is
    asked.

    \b
    Example:
      cellstore ask
      cellstore ask accuracy --run 3
      cellstore ask disagreements --runs 3,5 --format csv
      cellstore ask accuracy --sql
    """
    from cellstore.query.saved_queries import find_question, open_saved

    name, given = _name_and_values([*(words or ()), *context.args])
    answer = _checked(answer, common)
    if name is None:
        _list_questions(store, common)
        return
    question = find_question(store.workspace, name)
    if show_sql:
        typer.echo(question.text.rstrip("\n"))
        return
    with confined(store, limits), open_saved(store.workspace, question, given, limits) as found:
        output.write(found, answer)
    store.wrote(answer.output)


def _name_and_values(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
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


def _list_questions(store: Store, common: Common) -> None:
    from cellstore.query.saved_queries import saved_questions

    found, problems = saved_questions(store.workspace)
    if common.as_json:
        output.print_json(found)
    else:
        rows = []
        for item in found:
            mark = "" if item.path is None else " (yours)"
            rows.append((item.name, _first_sentence(item.words) + mark))
        output.pairs(rows, output.GAP)
        typer.echo("\nAsk one: cellstore ask accuracy. Read one: cellstore ask accuracy --sql")
    for problem in problems:
        say(f"Not listed: {problem}")


def _first_sentence(words: str) -> str:
    head, mark, _ = words.partition(". ")
    return f"{head}." if mark else head


@command(app, "schema")
def schema(
    store: Store,
    common: Common,
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]", help="A table, view or feature set. Default: an overview of all."
        ),
    ] = None,
) -> None:
    """Explain every table, view and column.

    \b
    Example:
      cellstore schema
      cellstore schema cells
    """
    every = store.schema()
    chosen = [item for item in every if table is None or item.name.lower() == table.lower()]
    if not chosen:
        raise UnknownNameError.of("table", table, [item.name for item in every])
    if common.as_json:
        output.print_json(chosen)
    elif table is None:
        titles = {
            "table": "Tables",
            "view": "Views",
            "feature set": "Feature sets",
            "step": "What the views are made of: exclusions, and the steps of the vote",
        }
        for kind, title in titles.items():
            found = [item for item in every if item.kind == kind]
            if found:
                typer.echo(f"{title}:")
                output.pairs([(i.name, _first_sentence(i.words)) for i in found], output.GAP)
                typer.echo("")
        typer.echo("The columns of one of them: cellstore schema NAME")
    else:
        _show_relation(chosen[0], every)


def _show_relation(item: RelationWords, every: Sequence[RelationWords]) -> None:
    """Print one table, view or feature set with its columns."""
    typer.echo(f"{output.cell(item.name)} ({item.kind})")
    output.wrapped(item.words, output.GAP)
    typer.echo("")
    rows = []
    for column in item.columns:
        marks = [{"TIMESTAMP WITH TIME ZONE": "TIMESTAMPTZ"}.get(column.type, column.type)]
        marks += ["key"] if column.key else []
        marks += [f"refers to {column.refers_to}"] if column.refers_to else []
        rows.append((column.name, f"{column.words} [{', '.join(marks)}]"))
    output.pairs(rows, output.GAP)
    others = [
        f"{other.name}.{column.name}"
        for other in every
        if other.kind == "table"
        for column in other.columns
        if column.refers_to == f"{item.name}.id"
    ]
    if others:
        typer.echo("\nReferred to by:")
        output.wrapped(", ".join(others), output.GAP)


ENDINGS = {".csv": "csv", ".h5ad": "anndata", ".parquet": "parquet", ".pq": "parquet"}


def _show_export(result: ExportResult | ExportedProfiles | ExportedCrops) -> None:
    from cellstore.stages.export import ExportedProfiles
    from cellstore.stages.export_crops import ExportedCrops

    shown: dict[str, Any] = {"written": result.path}
    if isinstance(result, ExportedProfiles):
        shown["profiles"] = f"run {result.run_id}"
        shown["wells"] = f"{result.wells:,} on {output.count(result.plates, 'plate')}"
        shown["features"] = result.features
    elif isinstance(result, ExportedCrops):
        shown["cells"] = f"{result.cells:,} of {result.images:,} images"
        shown["channels"] = ", ".join(result.channels)
        shown["files"] = f"{result.files} ({result.bytes / 1e6:,.1f} MB), and README.md"
        shown["recipe"] = f"segment {result.segment_recipe}"
    else:
        shown["cells"] = result.cells
        shown["excluded"] = f"{result.excluded:,} cells left out"
        sets = ", ".join(result.feature_sets) or "basic"
        shown["features"] = f"{result.features:,} of {sets}"
        measures = ", ".join(map(str, result.measure_recipes))
        shown["recipes"] = f"segment {result.segment_recipe}, measure {measures}"
        shown["plates"] = result.plates
    output.pairs(shown)


@command(app, "export", _show_export, then=True)
def export(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file, or with --crops the folder, to write.")
    ],
    store: Store,
    crops: bool = option(
        False, "Write the pixels of the cells: a folder of Parquet files with a README."
    ),
    channels: tuple[str, ...] = option((), "Of --crops: default: all.", metavar="A,B"),
    form: str | None = option(
        None,
        "Default: by the ending of OUT: .csv, .h5ad (AnnData), .parquet.",
        name="--format",
        choices=("parquet", "csv", "anndata"),
    ),
    features: str | None = option(
        None,
        "One feature set: its name, or a group as texture (the set measured last). Default: all "
        "sets of the cells that were measured last.",
    ),
    segmentation: str | None = SEGMENTATION,
    measurement: str | None = MEASUREMENT,
    plates: tuple[str, ...] = option_of(Selection, "plates"),
    split: str | None = option(
        None, "The cells of a split only, with its subset and label of each."
    ),
    subset: str | None = option(
        None, "One subset of the split only.", choices=tuple(item.value for item in Subset)
    ),
    include_excluded: bool = option(
        False, "Write excluded cells, too, with the reason in Metadata_Excluded."
    ),
    profiles: str | None = option(
        None, "The profiles of wells of this profile run, instead of cells.", metavar="RUN|latest"
    ),
    for_spreadsheet: bool = option(
        False,
        "CSV: put a ' before texts that a spreadsheet would run as formulas. Such a "
        "table no longer reads back as it was.",
    ),
    force: bool = option(False, "Replace OUT if it is there."),
) -> ExportResult | ExportedProfiles | ExportedCrops:
    """Write a table with a row per cell, for pycytominer and other tools; or the crops of cells.

    Columns are those of pycytominer: Metadata_Plate, Metadata_Well, Metadata_Site, ..., then
    the features as Cells_area and so on. Excluded cells do not count and are left out. Ingesting
    the table into another store gives the same cells. In this one, Metadata_CellId leads back to
    them: add columns to the table, and bring these with cellstore embeddings add.

    \b
    Example:
      cellstore export cells.parquet
      cellstore export cells.csv --plate BR00117035 --features texture
      cellstore export wells.parquet --profiles latest
      cellstore export crops --crops --split by-well --channels DNA,RNA
    """
    of_cells = (features, segmentation, measurement, plates, split, subset, include_excluded)
    if profiles is not None and (crops or channels or any(of_cells)):
        raise UserInputError(
            "Profiles are of the cells and plates that their run has read: besides --profiles only "
            "--format, --for-spreadsheet and --force can be given."
        )
    if crops:
        if form or features or include_excluded or for_spreadsheet or force:
            raise UserInputError(
                "--format, --features, --include-excluded, --for-spreadsheet and --force are of "
                "tables: remove them, or --crops."
            )
        return store.export_crops(
            out,
            split=split,
            subset=subset,
            channels=channels,
            plates=plates,
            segmentation=segmentation,
            measurement=measurement,
        )
    if channels:
        raise UserInputError("A table has no channels: add --crops, or remove --channels.")
    written = form or ENDINGS.get(out.suffix.lower())
    if written is None:
        raise UserInputError(
            f"The ending of {out.name} is not one of {', '.join(ENDINGS)}. Choose a format with "
            "--format."
        )
    return store.export(
        out,
        format=written,
        features=features,
        segmentation=segmentation,
        measurement=measurement,
        plates=plates,
        split=split,
        subset=subset,
        include_excluded=include_excluded,
        for_spreadsheet=for_spreadsheet,
        force=force,
        profiles=profiles,
    )


@command(app, "explore")
def explore(
    common: Common,
    store: Store,
    port: int = option(8765, "The port of the pages; 0 takes a free one.", min=0, max=65535),
    host: str = option(
        "127.0.0.1",
        "The address to listen at. Other machines reach 0.0.0.0; they need the link printed here.",
    ),
    write: bool = option(False, "Let people label cells and exclude what is wrong."),
    no_browser: bool = option(False, "Print the address only; open no browser."),
) -> None:
    """Look at plates, wells, cells and runs in a browser.

    The pages are served by this machine for this machine and load nothing from elsewhere. They only
    read, unless --write is given. Press Ctrl-C to end.

    \b
    Example:
      cellstore explore
      cellstore explore --write --port 9000
    """

    def ready(address: str) -> None:
        if common.as_json:
            output.print_json({"address": address, "write": write})
        else:
            say(f"The store is at {address} until you press Ctrl-C.")
        if not no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    store.explore(port=port, host=host, write=write, ready=ready)
