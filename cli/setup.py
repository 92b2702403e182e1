"""Commands that make a store and look after its schema: init, db."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .context import chosen_store, say, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.jobs.workspace import Workspace

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
    from cellstore.jobs.workspace import create_workspace

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
    from cellstore.jobs.workspace import connect_workspace
    from cellstore.settings import find_store

    return connect_workspace(find_store(chosen_store(ctx, given)))
