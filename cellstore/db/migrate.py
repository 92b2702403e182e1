"""The schema of a store: bring it up to date, compare it, refuse a wrong one.

Each command compares the revision; Alembic and the classes of the tables, which load slowly, are
imported where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.resources import as_file, files
from typing import Any, NoReturn

from sqlalchemy import inspect

from ..errors import SchemaError
from .session import Database, _translated

HEAD = "0012"
"""The newest revision. Written here, because every command compares it and Alembic loads slowly."""

_TRIGGERS = "cellstore.migrations.versions.0012_the_first_schema"
"""The revision that says which triggers there are."""


def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema to ``revision``, all or nothing.

    Raises:
        SchemaError: this library does not know it, or its mark is lost.
    """
    _alembic(database, "upgrade", revision)


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to ``revision`` (``base``: no tables; all rows are lost)."""
    _alembic(database, "downgrade", revision)


def differences(database: Database) -> list[str]:
    """Return what the tables of the store have other than the models, a sentence each."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from ..models import METADATA

    with _translated(database), database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = []
        for change in compare_metadata(context, METADATA):
            if isinstance(change, list):  # of one column
                _, _, table, name, *_ = change[0]
                found.append(f"table {table}: column {name} is not as cellstore made it")
                continue
            if change[0] == "remove_table":
                continue  # others may keep tables beside ours
            (verb, _, what), thing = change[0].partition("_"), change[-1]
            whole = what == "table"
            name = thing.name if whole else f"{change[2] if what == 'column' else thing.table.name}"
            name += "" if whole else f": {what} {thing.name}"
            found.append(f"table {name} is {'gone' if verb == 'add' else 'not of cellstore'}")
        return found


def changed_triggers(database: Database) -> list[str]:
    """Return a sentence for each trigger, or view, that is not as the migration makes it.

    :func:`put_back_triggers` mends that, but for a trigger that somebody else made.
    """
    module = import_module(_TRIGGERS)
    dialect = database.engine.dialect.name
    bodies, wanted = module.functions(dialect), module.triggers(dialect)
    view = "exclusions"
    ours = {*wanted, view}
    with _translated(database), database.engine.connect() as connection:
        ask = connection.exec_driver_sql
        if database.is_sqlite:
            rows = ask("SELECT name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')")
            found: dict[str, Any] = dict(rows.all())
            right: dict[str, Any] = {**wanted, view: module.EXCLUSIONS.strip()}
        else:
            # PostgreSQL tells them in words of its own. So it is asked for those of what is as it
            # should be, made for a moment where nobody else sees it.
            query = """SELECT tgname, relname,
                    pg_get_triggerdef(t.oid, true) || tgenabled::text, prosrc
                FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = tgrelid
                JOIN pg_proc AS p ON p.oid = tgfoid
                WHERE NOT tgisinternal AND relnamespace = {}"""
            of_view = "SELECT pg_get_viewdef(to_regclass('{}exclusions'), true)"
            triggers = ask(query.format("current_schema()::regnamespace")).all()
            found = {name: (definition, body) for name, _, definition, body in triggers}
            if (definition := ask(of_view.format("")).scalar()) is not None:
                found[view] = definition
            ask(module.EXCLUSIONS.replace("CREATE VIEW", "CREATE TEMP VIEW"))
            view_now = ask(of_view.format("pg_temp.")).scalar()
            for table in {row.relname for row in triggers}:
                ask(f'CREATE TEMP TABLE "{table}" (LIKE "{table}")')
            for name in wanted.keys() & found.keys():
                ask(wanted[name])
            function = {name: sql.rpartition(" ")[2][:-2] for name, sql in wanted.items()}
            right = {
                name: (definition, f" {bodies[function[name]]} ")
                for name, _, definition, _ in ask(query.format("pg_my_temp_schema()"))
            }
            right[view] = view_now
            connection.rollback()
    changed = {name for name in ours & found.keys() if found[name] != right.get(name)}
    return [
        f"{'view' if name == view else 'trigger'} {name} {what}"
        for what, names in (
            ("is gone", ours - found.keys()),
            ("is not as cellstore made it", changed),
            ("is not of cellstore", found.keys() - ours),
        )
        for name in sorted(names)
    ]


def create_unguarded(database: Database) -> None:
    """Make the tables and the view in an empty database, without triggers: to copy rows into."""
    module = import_module(_TRIGGERS)
    engine = database.engine.execution_options(writes=True)
    with _translated(database), engine.begin() as connection:
        module.SCHEMA.create_all(connection)
        connection.exec_driver_sql(module.EXCLUSIONS)


def put_back_triggers(database: Database) -> None:
    """Make the triggers and the view of a store anew, as the migration makes them."""
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    module = import_module(_TRIGGERS)
    engine = database.engine.execution_options(writes=True)
    with (
        _translated(database),
        engine.begin() as connection,
        Operations.context(MigrationContext.configure(connection)),
    ):
        module.unguard()
        connection.exec_driver_sql("DROP VIEW IF EXISTS exclusions")
        connection.exec_driver_sql(module.EXCLUSIONS)
        module.guard()


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
    from alembic.script import ScriptDirectory

    from ..models import METADATA

    with _translated(database), database.engine.connect() as connection:
        # Tables first: another process may make tables and mark just now.
        tables = sorted(set(inspect(connection).get_table_names()) & set(METADATA.tables))
    found = database.revision()
    if found is None and tables:
        raise SchemaError(
            f"The database {database.shown} has tables ({', '.join(tables[:3])}, ...) but no "
            "record of their schema version. Restore it from a backup, or use a database "
            "without tables."
        )
    with as_file(files("cellstore.migrations")) as folder:
        known = {script.revision for script in ScriptDirectory(str(folder)).walk_revisions()}
    if found is not None and found not in known:
        raise SchemaError(
            f"The store {database.shown} has the schema {found}, which this cellstore ({HEAD}) "
            "does not know. If it is newer than this cellstore: pip install --upgrade cellstore. "
            "If it is from before the first release: make a new store with cellstore init, and "
            "ingest your data again."
        )


def _alembic(database: Database, verb: str, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    from ..models import METADATA

    _refuse_unknown(database)
    engine = database.engine.execution_options(writes=True, rebuilds=True)
    try:
        with (
            as_file(files("cellstore.migrations")) as folder,
            _translated(database),
            engine.begin() as connection,
        ):
            config = Config()
            config.set_main_option("script_location", str(folder).replace("%", "%%"))
            config.set_main_option("path_separator", "os")
            config.attributes["connection"] = connection
            config.attributes["target_metadata"] = METADATA
            getattr(command, verb)(config, revision)
            broken: Sequence[Any] = ()
            if database.is_sqlite:  # it did not mind foreign keys while tables were rebuilt
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise SchemaError(
                    f"Rows of the table {broken[0][0]} refer to rows that are not there, so the "
                    "schema was left as it is. Restore the store from a backup, then upgrade it."
                )
    finally:
        if database.is_sqlite:
            database.engine.dispose()  # its connection did not mind foreign keys: none may use it
