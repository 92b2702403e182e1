"""A backup is the whole store, verified; a damaged one restores nothing."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from sqlalchemy import func, select, text

from cellstore.enums import ArtifactKind, Level, Stage
from cellstore.errors import CellstoreError, StorageError, UserInputError
from cellstore.jobs.runs import keep_files
from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA, Event, Image, Plate, Well
from cellstore.store import Store

pytestmark = pytest.mark.one_database


@pytest.fixture
def screen(workspace: Workspace) -> SmallScreen:
    """A store through every stage, with one real file instead of the rows of files."""
    made = small_screen(workspace)
    stored = workspace.artifacts.write(ArtifactKind.NETWORK, b"a page", ".html")
    with workspace.database.begin() as session:
        for table in ("run_artifacts", "segmentations"):
            if table == "run_artifacts":
                session.execute(text("DELETE FROM run_artifacts"))
            else:
                session.execute(
                    text("UPDATE segmentations SET mask_artifact_id=NULL, flow_artifact_id=NULL")
                )
        session.execute(text("DELETE FROM artifacts"))
        keep_files(session, [stored])[0]
    made.factory.exclude(Level.WELL, made.images["B02"].well_id)
    (workspace.settings.root / "questions").mkdir()
    (workspace.settings.root / "questions/mine.sql").write_text("-- Mine.\nFROM wells\n")
    return made


def rows_of(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    with store.session() as session:
        for name, table in METADATA.tables.items():
            query = select(table).order_by(*table.primary_key.columns)
            found[name] = [tuple(row) for row in session.execute(query)]
    return found


@pytest.mark.each_database
def test_a_store_comes_back_as_it_was(
    workspace: Workspace,
    screen: SmallScreen,
    tmp_path: Path,
    empty_database: Callable[[], str],
) -> None:
    store = Store(workspace)
    before = rows_of(store)
    made = store.backup(tmp_path / "screen.tar")
    assert (made.artifacts, made.missing) == (1, ())
    assert made.rows == sum(map(len, before.values()))
    screen.factory.plate("later")  # not in it
    for number, database in enumerate((None, empty_database())):
        folder = tmp_path / f"restored{number}"
        Store.restore(tmp_path / "screen.tar", folder, database=database)
        with Store.open(folder) as restored:
            after = rows_of(restored)
            (event,) = after["events"][len(before["events"]) :]
            assert "screen.tar" in str(event)
            assert {**after, "events": after["events"][:-1]} == before
            assert (folder / "questions/mine.sql").is_file()
            assert restored.votes().table.num_rows == Store(workspace).votes().table.num_rows
            assert restored.verify().problems == store.verify().problems
            # What triggers guard, they guard again; new rows get new ids.
            with pytest.raises(CellstoreError), restored.workspace.database.begin() as session:
                session.execute(text("DELETE FROM split_members"))
            Factory(restored.workspace).plate("new")
            assert restored.relabel("BR1/B01", treatment="taxol", reason="r").images == 1


@pytest.mark.each_database
def test_ids_of_deleted_rows_are_not_given_again_after_a_restore(
    workspace: Workspace, tmp_path: Path, empty_database: Callable[[], str]
) -> None:
    """Events, and files of features, still name them."""
    store, table = Store(workspace), tmp_path / "t.csv"
    names = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site"
    table.write_text(f"{names}\na.tif,P1,A01,1\nb.tif,P1,A02,1\n")
    store.ingest(table)
    store.delete_plate("P1")
    store.backup(tmp_path / "screen.tar")
    Store.restore(tmp_path / "screen.tar", tmp_path / "new", database=empty_database())
    with Store.open(tmp_path / "new") as restored:
        restored.ingest(table)
        with restored.session() as session:
            for kind in (Image, Well, Plate):
                assert session.scalar(select(func.min(kind.id))) == (2 if kind is Plate else 3)


def test_a_store_that_is_not_empty_is_not_overwritten(
    workspace: Workspace, screen: SmallScreen, tmp_path: Path
) -> None:
    file = tmp_path / "screen.tar"
    Store(workspace).backup(file)
    other = Store.create(tmp_path / "other")
    Factory(other.workspace).plate("mine")
    before = rows_of(other)
    with pytest.raises(UserInputError, match="not empty"):
        Store.restore(file, tmp_path / "other")
    assert rows_of(other) == before
    other.close()
    Store.create(tmp_path / "empty").close()
    Store.restore(file, tmp_path / "empty")
    with pytest.raises(UserInputError, match="part of the store"):
        Store(workspace).backup(workspace.settings.root / "cellstore.db")
    with pytest.raises(UserInputError, match="no file"):
        Store.restore(tmp_path / "gone.tar", tmp_path / "new")


def changed(data: bytearray, old: bytes) -> None:
    at = bytes(data).rindex(old)
    data[at] ^= 1


DAMAGES: dict[str, Callable[[bytearray], None]] = {
    "a file": lambda data: changed(data, b"a page"),
    "a row": lambda data: changed(data, b"2026_03"),
    "cut": lambda data: data.__delitem__(slice(len(data) // 2, None)),
    "empty": lambda data: data.clear(),
    "no tar": lambda data: data.__setitem__(slice(None), b"hello" * 1000),
}


def test_a_damaged_backup_ends_in_a_sentence_and_restores_nothing(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    make = Factory(sqlite_workspace)
    make.plate("P1", batch="2026_03")
    stored = sqlite_workspace.artifacts.write(ArtifactKind.NETWORK, b"a page", ".html")
    with sqlite_workspace.database.begin() as session:
        keep_files(session, [stored])[0]
    file = tmp_path / "screen.tar"
    Store(sqlite_workspace).backup(file)
    whole = file.read_bytes()
    for damage in DAMAGES.values():
        data = bytearray(whole)
        damage(data)
        file.write_bytes(data)
        refuses(file, tmp_path / "new")
    assert not list(tmp_path.glob(".restore-*"))


def refuses(file: Path, root: Path) -> None:
    """No store comes of a file that is no whole backup."""
    for dry_run in (True, False):
        with pytest.raises(StorageError, match="damaged, or not a backup"):
            Store.restore(file, root, dry_run=dry_run)
    assert not root.exists()


def test_names_that_lead_out_of_the_store_are_refused(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    file, evil = tmp_path / "screen.tar", tmp_path / "evil.sql"
    Store(sqlite_workspace).backup(file)
    evil.write_text("x")
    too_long = f"questions/{'a' * 400}.sql"
    outside = ("../evil.sql", "questions/../../evil.sql", "/tmp/evil.sql", "cellstore.toml")
    for name in (*outside, too_long):
        bad = tmp_path / "bad.tar"
        bad.write_bytes(file.read_bytes())
        with tarfile.open(bad, "a") as tar:
            tar.add(evil, name)
        with pytest.raises(StorageError, match=r"does not belong|File name too long"):
            Store.restore(bad, tmp_path / "new")


NO_ROWS = b"SQLite format 3"

HOSTILE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a list": lambda _: {"manifest": b"[]"},
    "nested": lambda _: {"manifest": b"[" * 100_000},
    "a word for a number": lambda found: {**found, "artifacts": "x"},
    "a number for a list": lambda found: {**found, "missing": 5},
    "without a value": lambda found: {k: v for k, v in found.items() if k != "made_at"},
    "other rows": lambda found: {**found, "rows": 7},
    "no database": lambda found: {**found, "sha256": hashlib.sha256(NO_ROWS).hexdigest()},
}


def test_a_backup_that_cellstore_did_not_write_is_refused_before_anything_is_made(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    file, bad = tmp_path / "screen.tar", tmp_path / "bad.tar"
    Store(sqlite_workspace).backup(file)
    with tarfile.open(file) as tar:
        whole = {item.name: tar.extractfile(item).read() for item in tar}  # type: ignore[union-attr]
    for kind, change in HOSTILE.items():
        changed = change(json.loads(whole["backup.json"]))
        parts = {**whole, "backup.json": changed.get("manifest") or json.dumps(changed).encode()}
        if kind == "no database":
            parts["cellstore.db"] = NO_ROWS
        with tarfile.open(bad, "w") as tar:
            for name, data in parts.items():
                item = tarfile.TarInfo(name)
                item.size = len(data)
                tar.addfile(item, io.BytesIO(data))
        refuses(bad, tmp_path / "new")


def test_a_lost_file_is_named_and_the_rest_is_kept(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    stored = [
        sqlite_workspace.artifacts.write(ArtifactKind.NETWORK, data, ".html")
        for data in (b"one", b"two", b"three")
    ]
    with sqlite_workspace.database.begin() as session:
        for item in stored:
            keep_files(session, [item])[0]
    sqlite_workspace.artifacts.locate(stored[0].path).unlink()
    sqlite_workspace.artifacts.locate(stored[1].path).write_bytes(b"other")
    made = Store(sqlite_workspace).backup(tmp_path / "b.tar")
    assert (made.artifacts, set(made.missing)) == (1, {stored[0].path, stored[1].path})
    Store.restore(tmp_path / "b.tar", tmp_path / "new")
    assert (tmp_path / "new/artifacts" / stored[2].path).read_bytes() == b"three"


def test_links_are_kept_as_the_files_that_they_name(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    mine = sqlite_workspace.settings.root / "questions"
    mine.mkdir()
    (tmp_path / "mine.sql").write_text("-- Mine.\nFROM wells\n")
    (mine / "linked.sql").symlink_to(tmp_path / "mine.sql")
    (mine / "twice.sql").hardlink_to(tmp_path / "mine.sql")
    (mine / "broken.sql").symlink_to(tmp_path / "gone.sql")
    (mine / "again.sql").hardlink_to(tmp_path / "mine.sql")
    Store(sqlite_workspace).backup(tmp_path / "screen.tar")
    Store.restore(tmp_path / "screen.tar", tmp_path / "new")
    found = {path.name for path in (tmp_path / "new/questions").iterdir() if path.is_file()}
    assert found == {"again.sql", "linked.sql", "twice.sql"}


@pytest.mark.each_database
def test_a_backup_is_of_one_moment_while_others_write(
    workspace: Workspace, screen: SmallScreen, tmp_path: Path
) -> None:
    with workspace.database.begin() as session:
        session.execute(text("UPDATE plates SET batch = 'not yet'"))
        if not workspace.database.is_sqlite:  # SQLite would wait for whom it must not see
            session.flush()
        Store(workspace).backup(tmp_path / "b.tar")
    Store.restore(tmp_path / "b.tar", tmp_path / "new")
    with Store.open(tmp_path / "new") as restored, restored.session() as session:
        batches = session.scalars(select(METADATA.tables["plates"].c.batch)).all()
        assert batches == ["2026_03"]
        assert session.scalar(select(func.count()).select_from(Event)) == 1
        assert Stage.PREDICT in session.scalars(select(METADATA.tables["runs"].c.stage)).all()
