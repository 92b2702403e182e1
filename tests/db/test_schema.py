"""The schema on both databases: migrations, models, versions."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, make_url, text

from cellstore.config import StoreSettings
from cellstore.db import migrate
from cellstore.db.models import METADATA
from cellstore.db.session import Database, connect, parse_url
from cellstore.errors import DatabaseError, SchemaError, UserInputError
from cellstore.runs import Workspace, create_workspace, open_workspace

NAMES = re.compile(r"^(pk|fk|uq|ix|ck)_[a-z0-9_]+$")


@pytest.fixture
def database(empty_database: Callable[[], str]):
    opened = connect(make_url(empty_database()))
    yield opened
    opened.close()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def set_revision(database: Database, revision: str) -> None:
    with database.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :to"), {"to": revision})


def test_there_is_a_single_head():
    with as_file(files("cellstore.migrations")) as folder:
        heads = ScriptDirectory(str(folder)).get_heads()
    assert heads == [migrate.head()]


def test_upgrade_makes_every_table_of_the_models(database):
    assert migrate.current(database) is None
    migrate.upgrade(database)
    assert migrate.current(database) == migrate.head()
    assert tables(database) == set(METADATA.tables)


def test_migrated_tables_equal_the_models(workspace):
    assert migrate.differences(workspace.database) == []


def test_a_changed_table_is_told(workspace):
    with workspace.database.begin() as session:
        session.execute(text("ALTER TABLE plates ADD COLUMN colour VARCHAR(10)"))
    assert any("colour" in line for line in migrate.differences(workspace.database))


def test_upgrade_downgrade_upgrade(database):
    migrate.upgrade(database)
    migrate.downgrade(database, "base")
    assert tables(database) == set()
    migrate.upgrade(database)
    assert tables(database) == set(METADATA.tables)
    assert migrate.differences(database) == []


def test_every_constraint_has_the_name_of_the_convention(workspace):
    found = inspect(workspace.database.engine)
    for table in METADATA.tables:
        named = [found.get_pk_constraint(table), *found.get_foreign_keys(table)]
        named += [*found.get_unique_constraints(table), *found.get_indexes(table)]
        for constraint in named:
            assert NAMES.match(str(constraint["name"])), (table, constraint)


def test_a_newer_schema_is_refused_with_the_command(workspace):
    set_revision(workspace.database, "9999")
    with pytest.raises(SchemaError, match=r"newer than this cellstore.*pip install --upgrade"):
        open_workspace(workspace.settings)


def test_an_older_schema_is_refused_with_the_command(workspace, monkeypatch):
    monkeypatch.setattr(migrate, "head", lambda: "9999")
    with pytest.raises(SchemaError, match=r"older schema 0001.*cellstore db upgrade"):
        open_workspace(workspace.settings)


def test_a_database_without_a_store_is_refused_with_the_command(empty_database, tmp_path):
    settings = StoreSettings(tmp_path, empty_database())
    with pytest.raises(SchemaError, match=r"holds no store.*cellstore init"):
        open_workspace(settings)


def test_a_store_is_made_once_and_then_kept(empty_database, tmp_path):
    url = empty_database()
    first, new = create_workspace(tmp_path / "store", url)
    first.database.close()
    again, second = create_workspace(tmp_path / "store", url)
    again.database.close()
    assert (new, second) == (True, False)


def test_a_database_out_of_reach_is_one_sentence(tmp_path):
    settings = StoreSettings(tmp_path, f"postgresql://nobody@/none?host={tmp_path}")
    with pytest.raises(DatabaseError) as caught:
        open_workspace(settings)
    assert "\n" not in str(caught.value)


def test_no_store_is_left_where_its_database_is_out_of_reach(tmp_path):
    with pytest.raises(DatabaseError):
        create_workspace(tmp_path / "store", f"postgresql://nobody@/none?host={tmp_path}")
    assert not (tmp_path / "store" / "cellstore.toml").exists()


def test_the_password_is_neither_shown_nor_kept(postgres_server, tmp_path):
    url = make_url(postgres_server.new_database()).set(password="s3cret").render_as_string(False)
    workspace, _ = create_workspace(tmp_path / "store", url)
    try:
        assert "s3cret" not in workspace.database.shown
        kept = (tmp_path / "store" / "cellstore.toml").read_text()
        assert "s3cret" not in kept
        assert "postgresql" in kept
    finally:
        workspace.database.close()


@pytest.mark.parametrize("text", ["no url", "mysql://me@host/name", ""])
def test_what_is_no_url_of_ours_is_refused(text):
    with pytest.raises(UserInputError):
        parse_url(text)


def test_sqlite_checks_what_it_is_told_to(sqlite_workspace: Workspace):
    with sqlite_workspace.database.read() as session:
        pragmas = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("foreign_keys", "journal_mode", "synchronous", "busy_timeout")
        }
    assert pragmas == {
        "foreign_keys": 1,
        "journal_mode": "wal",
        "synchronous": 1,
        "busy_timeout": 30_000,
    }


def test_a_damaged_sqlite_file_is_one_sentence(tmp_path: Path):
    workspace, _ = create_workspace(tmp_path / "store")
    workspace.database.close()
    for extra in ("-wal", "-shm"):
        (tmp_path / "store" / f"cellstore.db{extra}").unlink(missing_ok=True)
    (tmp_path / "store" / "cellstore.db").write_bytes(b"this is no database" * 500)
    with pytest.raises(DatabaseError):
        open_workspace(StoreSettings(tmp_path / "store"))
