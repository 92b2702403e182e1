"""Commands that make a store and fill it: init, ingest, db."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .context import chosen_store, open_store, say, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.runs.workspace import Workspace
    from cellstore.stages.ingest import IngestResult, Refused

db = typer.Typer(
    help="Look at the schema of a store and bring it up to date.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@sentences
def init(
    ctx: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="The folder; made if it is not there. Default: here."),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            metavar="URL",
            envvar="CELLSTORE_DATABASE_URL",
            help="A PostgreSQL database, for teams. Default: a SQLite file in the folder.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new, empty store in a folder.

    The folder gets cellstore.toml (which marks it as a store), the database and, later, the
    files that cellstore writes. Your images stay where they are. An existing store is kept.

    \b
    Example:
      cellstore init my-screen
      cellstore init my-screen --database postgresql://me@server/screen
    """
    from cellstore.runs.workspace import create_workspace

    workspace, created = create_workspace(folder or chosen_store(ctx, store) or Path(), database)
    settings, shown = workspace.settings, workspace.database.shown
    workspace.database.close()
    if as_json:
        render.as_json({"store": settings.root, "database": shown, "created": created})
        return
    typer.echo(f"{'Made the store' if created else 'There is already a store:'} {settings.root}")
    render.facts([("database", shown)])
    if created:
        say(f"Next: cellstore --store {folder or '.'} ingest METADATA.csv --images FOLDER")


@sentences
def ingest(
    ctx: typer.Context,
    metadata: Annotated[
        Path, typer.Argument(metavar="METADATA", help="The table of images, one row a field.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Folder in which image files are found by name. Without it only the paths in "
            "the table are tried; files not found are recorded as missing.",
            show_default=False,
        ),
    ] = None,
    plate: Annotated[
        str | None,
        typer.Option(
            "--plate",
            metavar="BARCODE",
            help="The plate, for tables without a Metadata_Plate column.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="NAME",
            help="'published' or 'loaddata'. Default: told from the columns.",
            show_default=False,
        ),
    ] = None,
    platemap: Annotated[
        Path | None,
        typer.Option(
            "--platemap",
            metavar="FILE",
            help="Which treatment each well got: a table, or a folder of them with --barcodes.",
            show_default=False,
        ),
    ] = None,
    compounds: Annotated[
        Path | None,
        typer.Option(
            "--compounds",
            metavar="FILE",
            help="What the treatments of the platemap are: names, targets, structures.",
            show_default=False,
        ),
    ] = None,
    barcodes: Annotated[
        Path | None,
        typer.Option(
            "--barcodes",
            metavar="FILE",
            help="Which platemap each plate has.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring plates, wells and images in from a metadata table.

    Two shapes of tables are known: the published one (FileName_OrigRNA, Metadata_pert_iname,
    Metadata_target; plate by --plate) and CellProfiler LoadData (FileName_Orig<channel>,
    PathName_Orig<channel>, Metadata_Plate, Metadata_Well, Metadata_Site). Rows that cannot be
    used are listed with their line numbers, and the command then ends with 1; the others are
    stored. Doing it again changes nothing, but for files that were missing and are there now.

    \b
    Example:
      cellstore ingest load_data.csv --images /data/plate1 --platemap map.txt \\
          --compounds compounds.tsv
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.ingest(
            metadata,
            images=images,
            plate=plate,
            layout=layout,
            platemap=platemap,
            compounds=compounds,
            barcodes=barcodes,
        )
    if as_json:
        render.as_json(result)
    else:
        _show_ingest(result)
    if result.rows and len(result.refused) == result.rows:
        say("Error: No row of the table could be used; the reasons are above.")
        raise typer.Exit(2)
    if result.refused or result.problems:
        raise typer.Exit(1)


def _show_ingest(result: IngestResult) -> None:
    for note in result.notes:
        say(note)
    render.facts(
        [
            ("layout", result.layout),
            ("rows", result.rows),
            ("new images", result.created),
            ("completed", result.completed),
            ("unchanged", result.unchanged),
            ("refused", len(result.refused)),
            ("on", f"{render.count(result.plates, 'plate')}, {render.count(result.wells, 'well')}"),
            ("images of this table", f"{result.images:,} ({result.missing_images:,} miss files)"),
        ]
    )
    if result.run_id is None:
        typer.echo("Nothing has changed: all of this was in the store already.")
    _show_problems("Rows that were refused:", result.refused)
    _show_problems("Files that could not be used (their images count as missing):", result.problems)


def _show_problems(title: str, problems: tuple[Refused, ...]) -> None:
    if problems:
        typer.echo(title)
        render.grouped([(_place(item), item.reason, item.detail) for item in problems])


def _place(item: Refused) -> str:
    return f"{item.file}, line {item.line}" if item.file else f"line {item.line}"


@db.command("upgrade")
@sentences
def db_upgrade(ctx: typer.Context, store: StoreOption = None) -> None:
    """Bring the schema of the store up to date.

    Back the database up first. All or nothing: an upgrade that fails changes nothing.

    \b
    Example:
      cellstore db upgrade
    """
    from cellstore.db import migrate

    workspace = _connected(ctx, store)
    before = migrate.current(workspace.database)
    migrate.upgrade(workspace.database)
    after = migrate.current(workspace.database)
    say("The schema was up to date." if before == after else f"Upgraded from {before}.")
    typer.echo(after)


@db.command("check")
@sentences
def db_check(ctx: typer.Context, store: StoreOption = None) -> None:
    """Compare the tables of the store with what cellstore needs.

    Ends with 1 if they differ, and lists how.

    \b
    Example:
      cellstore db check
    """
    from cellstore.db import migrate

    workspace = _connected(ctx, store)
    migrate.ensure_current(workspace.database)
    found = migrate.differences(workspace.database)
    for difference in found:
        typer.echo(difference)
    if found:
        say(f"{render.count(len(found), 'difference')}. Was the database changed by hand?")
        raise typer.Exit(1)
    typer.echo("The schema is as it should be.")


@db.command("current")
@sentences
def db_current(ctx: typer.Context, store: StoreOption = None) -> None:
    """Print the schema revision of the store and of cellstore.

    \b
    Example:
      cellstore db current
    """
    from cellstore.db import migrate

    workspace = _connected(ctx, store)
    current = migrate.current(workspace.database)
    render.facts([("store", current or "none"), ("cellstore", migrate.head())])


def _connected(ctx: typer.Context, given: Path | None) -> Workspace:
    from cellstore.config import find_store
    from cellstore.runs.workspace import connect_workspace

    return connect_workspace(find_store(chosen_store(ctx, given)))
