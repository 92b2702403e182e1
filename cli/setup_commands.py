"""Commands that make a store and look after it whole: init, backup, restore, db, demo."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import option
from cellstore.store import Store

from . import output
from .app import Common, command, say_next
from .output import Bar, say

if TYPE_CHECKING:
    from cellstore.stages.backup import Backup

app = typer.Typer(add_completion=False, rich_markup_mode=None)
db = typer.Typer(
    help="Look at the schema of a store and bring it up to date.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(db, name="db")


@command(app, "init")
def init(
    common: Common,
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
        ),
    ] = None,
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
    from cellstore.stages.status import next_step

    workspace, created = create_workspace(folder or common.store or Path(), database)
    root, shown = workspace.settings.root, workspace.database.shown
    workspace.database.close()
    if common.as_json:
        output.print_json({"store": root, "database": shown, "created": created})
        return
    typer.echo(f"{'Made the store' if created else 'There is already a store:'} {root}")
    output.pairs({"database": shown})
    here = replace(common, store=folder or common.store)
    with here.open() as store, store.workspace.database.read() as session:
        say_next(next_step(session), here)


def _show_backup(result: Backup) -> None:
    output.pairs(
        {
            "backup": result.file,
            "made at": result.made_at,
            "size": f"{result.size_bytes / 1e6:,.1f} MB",
            "rows": result.rows,
            "files": result.artifacts,
        }
    )
    if result.missing:
        some = ", ".join(result.missing[:3]) + (", ..." if len(result.missing) > 3 else "")
        say(f"Not in it, because they are gone or have changed: {some}. See: cellstore verify")


@command(app, "backup")
def backup(
    store: Store,
    common: Common,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to, for example screen.tar.")],
    dry_run: bool = option(False, "Check everything and say what would go in; write no file."),
) -> None:
    """Write the whole store to one file: all rows, and all files that cellstore wrote.

    The store may be in use meanwhile. Each file is compared with its sha256; ends with 1 if
    one is gone or has changed, which is then not in the backup. Your images are not in it.

    \b
    Example:
      cellstore backup /backups/screen-2026-03-04.tar --dry-run
      cellstore backup /backups/screen-2026-03-04.tar
    """
    result = store.backup(file, dry_run=dry_run)
    common.show(result, _show_backup)
    if not (common.as_json or dry_run):
        say_next((f"cellstore restore {shlex.quote(str(file))} DIR --dry-run",), Common())
    if result.missing:
        raise typer.Exit(1)


@command(app, "restore")
def restore(
    common: Common,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The store: a new folder, or an empty store.")
    ],
    database: str | None = option(
        None, "A PostgreSQL database for it. Default: SQLite in the folder.", metavar="URL"
    ),
    dry_run: bool = option(False, "Only check that the backup is whole."),
) -> None:
    """Make a store from a backup. A store with something in it is never overwritten.

    A backup of a store on SQLite may be restored to PostgreSQL, and the other way round.

    \b
    Example:
      cellstore restore /backups/screen-2026-03-04.tar screen --dry-run
      cellstore restore /backups/screen-2026-03-04.tar screen
    """
    result = Store.restore(file, folder, database=database, dry_run=dry_run)
    common.show(result, _show_backup)
    if not common.as_json:
        say("The backup is whole.")
    if not (common.as_json or dry_run):
        say_next(("cellstore verify",), replace(common, store=folder))


@app.command("demo")
def demo(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the demo goes; a new folder.")
    ] = Path("cellstore-demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same plates.")] = 1,
) -> None:
    """Render a small screen and run every stage on it.

    Plates of drawn cells under six treatments are segmented, measured, split, learned and
    predicted, and treatments compared with controls; each command is shown before it runs. Takes
    under 5 minutes on 2 cores, and ends with the paths of two pages.

    \b
    Example:
      cellstore demo
    """
    from cellstore.demo import audit_command, commands, render_plates

    def run(words: list[str]) -> None:
        say(f"\n$ cellstore {shlex.join(words)}")
        code = context.find_root().command.main(words, "cellstore", standalone_mode=False)
        if code and words[:2] != ["split", "check"]:  # whose 1 is an answer, not a failure
            raise typer.Exit(code)

    say(f"Rendering the plates into {folder}")
    plates = render_plates(folder, seed=seed, progress=Bar() if sys.stderr.isatty() else None)
    for words in commands(plates):
        run(words)
    run(audit_command(plates))
    say("\nThe demo is done. Pages to open in a browser: what the network learned, and the hits.")
    typer.echo(plates.report)
    typer.echo(plates.hits)
    store = shlex.quote(str(plates.store))
    say(f"Look at plates, wells and cells: cellstore explore --store {store}")
    say(f"Ask it more, for example: cellstore sql 'FROM accuracy' --store {store}")


def _show_upgrade(done: dict[str, str | None]) -> None:
    before, after = done["before"], done["after"]
    say("The schema was up to date." if before == after else f"Upgraded from {before}.")
    typer.echo(after)


@command(db, "upgrade", _show_upgrade, then=True)
def db_upgrade(common: Common) -> dict[str, str | None]:
    """Bring the schema of the store up to date.

    Back the database up first. All or nothing: an upgrade that fails changes nothing.

    \b
    Example:
      cellstore db upgrade
    """
    from cellstore.jobs.workspace import open_workspace, upgrade_schema
    from cellstore.settings import find_store

    database = open_workspace(find_store(common.store), any_schema=True).database
    before, after = upgrade_schema(database)
    return {"before": before, "after": after}


def _show_differences(found: list[str]) -> None:
    from cellstore.db import migrate

    for difference in found:
        typer.echo(difference)
    if found:
        say(f"{output.count(len(found), 'difference')}. Was the database changed by hand?")
    else:
        typer.echo(f"The schema is as it should be (revision {migrate.HEAD}).")


@command(db, "check", _show_differences, bool)
def db_check(store: Store) -> list[str]:
    """Compare the tables of the store with what cellstore needs.

    Ends with 1 if they differ, and lists how.

    \b
    Example:
      cellstore db check
    """
    from cellstore.db import migrate

    return migrate.differences(store.workspace.database)
