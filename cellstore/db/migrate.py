"""The schema of a store: bring it up to date, compare it, refuse a wrong one.

Each command compares the revision; Alembic and the classes of the tables, which load slowly, are
imported where they are needed.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Connection, inspect

from ..errors import SchemaError
from .session import Database, _translated

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0011"
"""The newest revision. Written here, because every command compares it and Alembic loads slowly."""


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema to ``revision``, all or nothing.

    Raises:
        SchemaError: this library does not know it, or its mark is lost.

    """
    from alembic import command

    _refuse_unknown(database)
    _alembic(database, lambda config: command.upgrade(config, revision))


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to ``revision`` (``base``: no tables; all rows are lost).

    Raises:
        SchemaError: this library does not know it, or its mark is lost.

    """
    from alembic import command

    _refuse_unknown(database)
    _alembic(database, lambda config: command.downgrade(config, revision))


def differences(database: Database) -> list[str]:
    """Return what the tables of the store have other than the models, one line each."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from ..models import METADATA

    with _translated(database), database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(change) for change in compare_metadata(context, METADATA)]


def refuse(database: Database, found: str | None) -> NoReturn:
    """Refuse a store whose schema ``found`` is not the one of this library.

    Raises:
        SchemaError: with the command that mends it.
    """
    _refuse_unknown(database)
    if found is None:
        raise SchemaError(
            f"The database {database.shown} holds no store. Make one with: cellstore init"
        )
    raise SchemaError(
        f"The store has the older schema {found}, this cellstore needs {HEAD}. "
        "Back it up, then run: cellstore db upgrade"
    )


def _refuse_unknown(database: Database) -> None:
    tables = _tables(database)  # first: another process may make tables and mark just now
    found = database.revision()
    if found is None and tables:
        raise SchemaError(
            f"The database {database.shown} has tables ({', '.join(tables[:3])}, ...) but no mark "
            "of their schema. Restore it from a backup, or use a database without tables."
        )
    if found is not None and not _knows(found):
        raise SchemaError(
            f"The store {database.shown} has the schema {found}, which this cellstore ({HEAD}) "
            "does not know. If it is newer than this cellstore: pip install --upgrade cellstore. "
            "If it is from before the first release: make a new store with cellstore init, and "
            "ingest your data again."
        )


def _tables(database: Database) -> list[str]:
    from ..models import METADATA

    with _translated(database), database.engine.connect() as connection:
        return sorted(set(inspect(connection).get_table_names()) & set(METADATA.tables))


def _knows(revision: str) -> bool:
    from alembic.script import ScriptDirectory

    with as_file(files("cellstore.migrations")) as folder:
        scripts = ScriptDirectory(str(folder))
        return any(script.revision == revision for script in scripts.walk_revisions())


def _alembic(database: Database, action: Any) -> None:
    engine = database.engine.execution_options(writes=True, rebuilds=True)
    try:
        with (
            as_file(files("cellstore.migrations")) as folder,
            _translated(database),
            engine.begin() as connection,
        ):
            action(_config(str(folder), connection))
            _check_references(connection)
    finally:
        if database.is_sqlite:
            database.engine.dispose()  # its connection did not mind foreign keys: none may use it


def _check_references(connection: Connection) -> None:
    """Make up for the foreign keys that SQLite did not mind while tables were rebuilt."""
    if connection.dialect.name != "sqlite":
        return
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise SchemaError(
            f"Rows of the table {broken[0][0]} refer to rows that are not there, so the schema was "
            "left as it is. Restore the store from a backup, then upgrade it."
        )


def _config(folder: str, connection: Connection) -> Config:
    from alembic.config import Config

    from ..models import METADATA

    config = Config()
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["target_metadata"] = METADATA
    return config
