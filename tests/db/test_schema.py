"""The schema on both databases: migrations, models, versions."""

from __future__ import annotations

import os
import re
import tomllib
import traceback
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, make_url, text

from cellstore.db import migrate
from cellstore.db.session import Database, connect, parse_url
from cellstore.errors import DatabaseError, SchemaError, StorageError, UserInputError
from cellstore.jobs.workspace import Workspace, create_workspace, open_workspace
from cellstore.models import METADATA
from cellstore.settings import StoreSettings

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
    assert heads == [migrate.HEAD]


def test_upgrade_makes_every_table_of_the_models(database):
    assert database.revision() is None
    migrate.upgrade(database)
    assert database.revision() == migrate.HEAD
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
    monkeypatch.setattr(migrate, "HEAD", "9999")
    with pytest.raises(SchemaError, match=r"older schema 0012.*cellstore db upgrade"):
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


@pytest.mark.parametrize("folder", ["", "store", "deep/store"])
def test_no_store_is_left_where_its_database_is_out_of_reach(tmp_path, folder):
    with pytest.raises(DatabaseError):
        create_workspace(tmp_path / folder, f"postgresql://nobody@/none?host={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_what_was_there_before(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(migrate, "upgrade", full)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    for folder in ("mine", "new"):
        with pytest.raises(StorageError):
            create_workspace(tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_an_error_never_takes_a_database_that_has_tables(tmp_path, monkeypatch):
    create_workspace(tmp_path)[0].database.close()
    (tmp_path / "cellstore.toml").unlink()
    monkeypatch.setattr(migrate, "HEAD", "9999")
    with pytest.raises(SchemaError):
        create_workspace(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cellstore.db"]


def test_tables_without_a_mark_are_told_and_left_alone(workspace):
    with workspace.database.begin() as session:
        session.execute(text("DELETE FROM alembic_version"))
    root = workspace.settings.root
    for action in (
        lambda: open_workspace(workspace.settings),
        lambda: migrate.upgrade(workspace.database),
        lambda: create_workspace(root),
    ):
        with pytest.raises(SchemaError, match=r"no record of their schema.*backup"):
            action()
    assert tables(workspace.database) == set(METADATA.tables)
    assert (root / "cellstore.toml").exists()


def test_upgrading_a_newer_schema_is_refused_with_the_command(workspace):
    set_revision(workspace.database, "9999")
    for action in (migrate.upgrade, lambda database: migrate.downgrade(database, "base")):
        with pytest.raises(SchemaError, match=r"newer than this cellstore.*pip install --upgrade"):
            action(workspace.database)


def test_a_folder_that_is_gone_is_one_sentence_with_what_to_check(tmp_path):
    settings = StoreSettings(tmp_path, f"sqlite:///{tmp_path}/gone/x.db")
    with pytest.raises(
        StorageError, match=r"cannot be opened: .*Check that the file and its folder exist"
    ):
        open_workspace(settings)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes all")
def test_a_store_that_cannot_be_written_is_one_sentence_with_what_to_do(tmp_path):
    workspace, _ = create_workspace(tmp_path / "store")
    workspace.database.close()
    (tmp_path / "store" / "cellstore.db").chmod(0o444)
    (tmp_path / "store").chmod(0o555)
    try:
        with pytest.raises(StorageError, match="from a copy"):
            open_workspace(workspace.settings)
    finally:
        (tmp_path / "store").chmod(0o755)


def test_a_readonly_database_is_told_what_to_do(sqlite_workspace: Workspace):
    def write() -> None:
        with sqlite_workspace.database.read() as session:
            session.execute(text("PRAGMA query_only = ON"))
            session.execute(text("DELETE FROM plates"))

    with pytest.raises(StorageError, match=r"readonly.*from a copy"):
        write()


def in_marker(root: Path) -> str:
    return (root / "cellstore.toml").read_text()


@pytest.mark.postgres
def test_an_existing_store_is_opened_through_its_marker(postgres_server, tmp_path):
    url = postgres_server.new_database()
    create_workspace(tmp_path, url)[0].database.close()
    again, new = create_workspace(tmp_path)
    again.database.close()
    assert not new
    assert again.database.engine.url.database == make_url(url).database
    assert not (tmp_path / "cellstore.db").exists()


@pytest.mark.postgres
@pytest.mark.parametrize("by_environment", [False, True])
def test_an_existing_store_does_not_move_to_another_database(
    postgres_server, tmp_path, monkeypatch, by_environment
):
    create_workspace(tmp_path)[0].database.close()
    before = in_marker(tmp_path)
    url = make_url(postgres_server.new_database()).set(password="s3cret").render_as_string(False)
    if by_environment:
        monkeypatch.setenv("CELLSTORE_DATABASE_URL", url)
    with pytest.raises(UserInputError, match=r"already a store.*sqlite.*postgresql") as caught:
        create_workspace(tmp_path, None if by_environment else url)
    assert "s3cret" not in str(caught.value)
    assert in_marker(tmp_path) == before
    untouched = connect(parse_url(url))
    assert tables(untouched) == set()
    untouched.close()


@pytest.mark.postgres
def test_the_same_database_with_its_password_is_no_other(postgres_server, tmp_path):
    url = make_url(postgres_server.new_database())
    create_workspace(tmp_path, url.render_as_string(False))[0].database.close()
    full = url.set(password="s3cret").update_query_dict({"passfile": "/s3cret"})
    again, new = create_workspace(tmp_path, full.render_as_string(False))
    again.database.close()
    assert (new, again.database.engine.url.password) == (False, "s3cret")


@pytest.mark.postgres
def test_the_environment_names_the_database_of_a_new_store(postgres_server, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLSTORE_DATABASE_URL", postgres_server.new_database())
    create_workspace(tmp_path)[0].database.close()
    assert "postgresql" in in_marker(tmp_path)
    assert not (tmp_path / "cellstore.db").exists()


def test_the_password_is_neither_shown_nor_kept(postgres_server, tmp_path):
    secret = {"password": "s3cret", "passfile": "/s3cret", "sslpassword": "s3cret"}
    url = make_url(postgres_server.new_database()).set(password="s3cret")
    full = url.update_query_dict(secret).render_as_string(hide_password=False)
    assert full.count("s3cret") == 4
    workspace, _ = create_workspace(tmp_path / "store", full)
    try:
        assert "s3cret" not in workspace.database.shown
        kept = (tmp_path / "store" / "cellstore.toml").read_text()
        assert "s3cret" not in kept
        assert "postgresql" in kept
        assert parse_url(tomllib.loads(kept)["database"]).query["host"] == url.query["host"]
    finally:
        workspace.database.close()


@pytest.mark.parametrize("text", ["no url", "mysql://me@host/name", ""])
def test_what_is_no_url_of_ours_is_refused(text):
    with pytest.raises(UserInputError):
        parse_url(text)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://bob:s3cret@host:port/x",
        "postgresql://bob:@s3cret@host/x",
        "postgresql://bob:@s3cret:s3cret/x",
        "postgresql://bob:@h/s3cret@host/x",
        "s3cret",
    ],
)
def test_a_url_that_is_refused_is_not_repeated(text):
    with pytest.raises(UserInputError) as caught:
        parse_url(text)
    assert "s3cret" not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.postgres
def test_a_parameter_that_the_driver_does_not_know_is_one_sentence(tmp_path):
    with pytest.raises(DatabaseError, match='invalid connection option "colour"'):
        create_workspace(tmp_path / "store", "postgresql://me@/x?colour=red")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["password", "PassWord", "passfile", "sslkey", "scram_client_key", "options", "x"]
)
def test_a_secret_parameter_is_not_shown_and_still_used(name):
    database = connect(parse_url(f"postgresql://bob@/cs?host=/run&{name}=s3cret&port=5433"))
    assert database.shown == "postgresql+psycopg://bob@/cs?host=%2Frun&port=5433"
    assert database.engine.url.query[name] == "s3cret"
    database.close()


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
        "busy_timeout": 300_000,
    }


def test_a_damaged_sqlite_file_is_one_sentence(tmp_path: Path):
    workspace, _ = create_workspace(tmp_path / "store")
    workspace.database.close()
    for extra in ("-wal", "-shm"):
        (tmp_path / "store" / f"cellstore.db{extra}").unlink(missing_ok=True)
    (tmp_path / "store" / "cellstore.db").write_bytes(b"this is no database" * 500)
    with pytest.raises(DatabaseError):
        open_workspace(StoreSettings(tmp_path / "store"))
