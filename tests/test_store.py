"""The Python API: thin, light, and found as git finds a repository."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

import cellstore
from cellstore.errors import QueryError, StoreNotFoundError, UserInputError
from cellstore.settings import StoreSettings, find_store
from cellstore.store import Store


def test_a_store_is_made_opened_and_asked(tmp_path):
    with Store.create(tmp_path / "store") as made:
        assert made.root == tmp_path / "store"
    with Store.open(tmp_path / "store") as store:
        assert store.status().images == 0
        assert store.sql("SELECT count(*) AS n FROM wells").to_pylist() == [{"n": 0}]
        assert store.sql("SELECT $1 AS x", [3]).to_pylist() == [{"x": 3}]
        with pytest.raises(QueryError):
            store.sql("DELETE FROM wells")
        assert store.verify().ok


def test_a_store_that_is_printed_keeps_its_secrets(tmp_path):
    settings = StoreSettings(tmp_path, "postgresql://me:s3cret@localhost/x?sslpassword=s3cret")
    assert "s3cret" not in repr(settings)
    with Store.create(tmp_path) as store:
        workspace = replace(store.workspace, settings=settings)
        assert "workspace" not in repr(Store(workspace))


def test_making_a_store_twice_keeps_it(tmp_path):
    with Store.create(tmp_path) as first:
        first.workspace.artifacts.root.mkdir()
    with Store.create(tmp_path) as second:
        assert second.workspace.artifacts.root.is_dir()


def test_the_nearest_store_upwards_is_found(tmp_path, monkeypatch):
    Store.create(tmp_path / "outer").close()
    Store.create(tmp_path / "outer" / "inner").close()
    (tmp_path / "outer" / "inner" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "outer" / "inner" / "deep")
    with Store.open() as store:
        assert store.root == tmp_path / "outer" / "inner"


def test_no_store_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreNotFoundError, match="cellstore init"):
        Store.open()
    with pytest.raises(StoreNotFoundError, match="is not a store"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotFoundError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(UserInputError, match="is a file"):
        Store.create(tmp_path / "file")
    (tmp_path / "cellstore.toml").write_text("=")
    with pytest.raises(UserInputError, match="from a backup"):
        Store.open(tmp_path)


@pytest.mark.postgres
def test_a_url_replaces_the_one_in_the_store(tmp_path, postgres_server, monkeypatch):
    Store.create(tmp_path).close()
    url = postgres_server.migrated_database()
    with Store.open(tmp_path, database=url) as store:
        assert not store.workspace.database.is_sqlite
        assert store.sql("SELECT count(*) AS n FROM wells").to_pylist() == [{"n": 0}]
    monkeypatch.setenv("CELLSTORE_DATABASE_URL", url)
    assert find_store(tmp_path) == StoreSettings(tmp_path, url)


def test_every_stage_has_a_method():
    methods = {name for name, _ in inspect.getmembers(Store, inspect.isfunction)}
    assert {
        *("ingest", "segment", "measure", "create_split", "show_split", "check_split", "train"),
        *("predict", "report", "audit", "sql", "status"),
        *("verify", "close"),
    } <= methods


def test_the_package_says_what_it_offers():
    assert cellstore.__version__.startswith("0.")
    with pytest.raises(AttributeError):
        _ = cellstore.nothing
