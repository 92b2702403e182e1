"""verify and doctor find what somebody, or a disk, has done to the database itself."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from factories import Factory
from small_training import Opener, Trained
from sqlalchemy import func, select, text, update
from test_segment_measure import Bench
from test_segment_measure import bench as bench_of_images
from unguarded import as_owner

from cellstore.config import IngestParams
from cellstore.db.events import Change, record_events
from cellstore.enums import Stage
from cellstore.errors import DatabaseError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Event, Folder, ImageFile
from cellstore.report.audit import audit
from cellstore.report.repro import repro
from cellstore.settings import Progress, StoreSettings
from cellstore.stages.doctor import doctor
from cellstore.stages.ingest.ingest import ingest, refresh, relocate
from cellstore.stages.predict import predict
from cellstore.stages.qc import qc
from cellstore.stages.segment import segment
from cellstore.stages.status import status
from cellstore.stages.verify import verify

pytestmark = pytest.mark.one_database


def change(workspace: Workspace, statement: str) -> None:
    """Change a store behind the back of the triggers."""
    with as_owner(workspace) as owner:
        owner.execute(text(statement))


@pytest.mark.heavy
def test_rows_that_are_not_what_a_job_wrote_are_found(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    predict(workspace, device="cpu")
    qc(workspace)
    found = verify(workspace)
    assert (found.problems, found.jobs) == (
        (),
        14,
    )  # six images measured and looked at, two labelled
    changes = {
        "features": "UPDATE features SET area = area + 1e-9 WHERE cell_id = 1",
        "image_quality": "UPDATE image_quality SET background = 0 WHERE image_id = 2",
        "predictions": "DELETE FROM predictions "
        "WHERE cell_id = (SELECT max(cell_id) FROM predictions)",
    }
    for statement in changes.values():
        change(workspace, statement)
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert all("are not what run" in reason for reason in reasons)
    assert sorted(reason.split()[2] for reason in reasons) == ["measure", "predict", "qc"]


@pytest.mark.each_database
def test_events_are_a_chain_that_verify_walks(workspace: Workspace) -> None:
    with workspace.database.begin() as session:
        for number in (1, 2, 3):
            record_events(session, [Change("runs", number, None, {"status": "done"})])
    assert verify(workspace).ok
    with workspace.database.read() as session:
        first, second, third = session.scalars(select(Event.id).order_by(Event.id))
    change(workspace, f"UPDATE events SET user_name = 'eve' WHERE id = {first}")
    (problem,) = verify(workspace).problems
    assert problem.path == workspace.database.shown
    assert problem.reason == f"event {first} is not what was written"
    change(workspace, f"DELETE FROM events WHERE id = {second}")
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert f"before event {third} an event was taken out or changed" in reasons


@pytest.mark.each_database
def test_a_reference_that_leads_nowhere_is_found(workspace: Workspace) -> None:
    run = Factory(workspace, closed=True).run(Stage.SEGMENT)
    with as_owner(workspace) as owner:
        owner.execute(text("DELETE FROM recipes"))
    said = f"row {run.id} of runs refers to a row of recipes that is not there. Put the store back"
    for reasons in (
        [problem.reason for problem in verify(workspace).problems],
        [item.detail for item in doctor(workspace.settings).findings if item.state == "broken"],
    ):
        assert any(reason.startswith(said) and "restore" in reason for reason in reasons)
    for command in (repro, lambda *of: audit(*of, "run")):
        with pytest.raises(DatabaseError, match=f"row {run.id} of runs refers .* cellstore verify"):
            command(workspace, str(run.id))


CHANGED = {
    "sqlite": (
        "DROP TRIGGER runs_kept_delete",
        "DROP TRIGGER predictions_keep_DELETE",
        "CREATE TRIGGER predictions_keep_DELETE BEFORE DELETE ON predictions BEGIN SELECT 1; END",
        "CREATE TRIGGER mine AFTER INSERT ON runs BEGIN SELECT 1; END",
    ),
    "postgresql": (
        "DROP TRIGGER runs_begun ON runs",
        "ALTER TABLE predictions DISABLE TRIGGER predictions_keep",
        """CREATE OR REPLACE FUNCTION runs_opened() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RETURN NULL; END'""",
        "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER mine AFTER INSERT ON runs FOR EACH ROW EXECUTE FUNCTION mine()",
    ),
}
NAMED = {
    "sqlite": {"runs_kept_delete is gone", "predictions_keep_DELETE is not as cellstore made it"},
    "postgresql": {
        "runs_begun is gone",
        "predictions_keep is not as cellstore made it",
        "runs_opened is not as cellstore made it",
    },
}


@pytest.mark.each_database
def test_what_guards_the_rows_is_looked_at_and_made_again(workspace: Workspace) -> None:
    database = workspace.database
    kind = database.engine.dialect.name
    assert verify(workspace).ok
    with database.engine.begin() as owner:
        for statement in (*CHANGED[kind], "DROP VIEW exclusions"):
            owner.execute(text(statement))
        owner.execute(text("CREATE VIEW exclusions AS SELECT id, 'cell' AS level FROM cells"))
    ours = {f"trigger {said}" for said in NAMED[kind]}
    ours.add("view exclusions is not as cellstore made it")
    theirs = "trigger mine is not of cellstore, and may change rows. Drop it"
    wanted = {f"{said}. Make it again with: cellstore verify --fix" for said in ours}
    assert {problem.reason for problem in verify(workspace).problems} == {*wanted, theirs}
    found = doctor(workspace.settings).findings
    assert {item.detail for item in found if item.topic == "database"} == {*wanted, theirs}
    fixed = {problem.reason for problem in verify(workspace, fix=True).problems}
    assert fixed == {*(f"{said}. It was made again" for said in ours), theirs}
    with database.engine.begin() as owner:
        owner.execute(text(f"DROP TRIGGER mine{'' if database.is_sqlite else ' ON runs'}"))
    assert verify(workspace).ok
    with database.engine.begin() as owner:
        owner.execute(text("ALTER TABLE run_metrics DROP COLUMN value"))
    (problem,) = verify(workspace).problems
    assert problem.reason.startswith("table run_metrics: column value is gone. Put the store back")


def damaged(workspace: Workspace, pages: slice) -> StoreSettings:
    """Overwrite some pages of the database file."""
    path = workspace.settings.sqlite
    with closing(sqlite3.connect(path)) as plain:
        plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = plain.execute("PRAGMA page_size").fetchone()[0]
    workspace.database.close()
    data = bytearray(path.read_bytes())
    for page in range(*pages.indices(len(data) // size)):
        data[page * size : (page + 1) * size] = b"\xa5" * size
    path.write_bytes(bytes(data))
    return workspace.settings


def test_an_overwritten_page_is_found(sqlite_workspace: Workspace) -> None:
    Factory(sqlite_workspace).run(Stage.SEGMENT)
    with sqlite_workspace.database.read() as session:
        root = session.scalar(
            text("SELECT rootpage FROM sqlite_master WHERE name = 'ix_runs_parent_id'")
        )
    settings = damaged(sqlite_workspace, slice(root - 1, root))
    problems = verify(sqlite_workspace).problems
    assert {item.path for item in problems} == {sqlite_workspace.database.shown}
    findings = doctor(settings).findings
    assert [item.state for item in findings if item.topic == "database"]


def test_a_file_that_cannot_be_read_ends_in_a_sentence(sqlite_workspace: Workspace) -> None:
    settings = damaged(sqlite_workspace, slice(1, None))
    with pytest.raises(DatabaseError, match=r"is damaged.*Put it back from a backup"):
        verify(sqlite_workspace)
    assert not doctor(settings).ok


@pytest.mark.parametrize("text_of", ["mea\xff", "mea#ure"])
def test_damage_within_a_text_is_one_sentence(sqlite_workspace: Workspace, text_of: str) -> None:
    """A byte of a stage that is no UTF-8, and one that makes it another word."""
    Factory(sqlite_workspace).recipe(Stage.MEASURE)
    with closing(sqlite3.connect(sqlite_workspace.settings.sqlite)) as plain:
        plain.execute("UPDATE recipes SET stage = CAST(? AS TEXT)", [text_of.encode("latin-1")])
        plain.commit()
    with pytest.raises(DatabaseError, match=r"is damaged.*cellstore restore"):
        verify(sqlite_workspace)


# --- image files that are gone -------------------------------------------------------------------

bench = bench_of_images
"""The fixture, of three images with two files each."""


def test_a_folder_is_relocated_to_the_old_name_of_one_within_it(bench: Bench) -> None:
    workspace, inner = bench.workspace, bench.images / "b"
    inner.mkdir()
    for file in sorted(bench.images.glob("r01c02f02*")):
        file.rename(inner / file.name)
    with workspace.database.begin() as session:
        of_inner = ImageFile.name.startswith("r01c02f02")
        number = session.scalar(select(func.max(Folder.id))) or 0
        session.add(Folder(id=number + 1, uri=str(inner)))
        session.flush()
        session.execute(update(ImageFile).where(of_inner).values(folder_id=number + 1))
    assert not verify(workspace).gone
    deepest = inner / "b"
    deepest.mkdir()
    down, back = (
        ((inner, deepest), (bench.images, inner)),
        ((inner, bench.images), (deepest, inner)),
    )
    for moves, old, new in ((down, bench.images, inner), (back, inner, bench.images)):
        for source, target in moves:
            for file in [path for path in source.iterdir() if path.is_file()]:
                file.rename(target / file.name)
        assert relocate(workspace, str(old), str(new)).files == 6
        assert not verify(workspace).gone
    # Where the folder is known already, it takes the files, and the empty one is forgotten.
    for file in inner.glob("*.tif*"):
        file.rename(bench.images / file.name)
    assert relocate(workspace, str(inner), str(bench.images)).files == 2
    with pytest.raises(UnknownNameError, match=r"folder '.*b'"):
        relocate(workspace, str(inner), str(bench.images))


@pytest.mark.each_database
def test_files_that_were_moved_are_noticed_and_relocated(bench: Bench, tmp_path: Path) -> None:
    workspace = bench.workspace
    segment(workspace, bench.params)
    assert (status(workspace).gone, verify(workspace).gone) == ((), ())
    moved = tmp_path / "elsewhere"
    bench.images.rename(moved)
    for gone in (status(workspace).gone, verify(workspace).gone):
        assert [(item.folder, item.files) for item in gone] == [(str(bench.images), 6)]
        assert f"6 files are gone from {bench.images}." in gone[0].sentence
        assert f"cellstore relocate {bench.images} NEW" in gone[0].sentence
    assert not verify(workspace).ok
    looked = refresh(workspace)
    assert [issue.detail for issue in looked.problems] == [gone[0].sentence]

    with pytest.raises(UserInputError, match="none of them is"):
        relocate(workspace, str(bench.images), str(tmp_path / "nowhere"))
    tried = relocate(workspace, str(bench.images), str(moved), dry_run=True)
    assert tried.folders == ((str(bench.images), str(moved), 6),)
    assert status(workspace).gone
    assert relocate(workspace, str(bench.images), str(moved), reason="new disk").files == 6
    assert (status(workspace).gone, verify(workspace).ok) == ((), True)
    with workspace.database.read() as session:
        event = session.scalars(select(Event).order_by(Event.id.desc()).limit(1)).one()
    assert (event.table_name, event.reason) == ("folders", "new disk")
    assert (event.old, event.new) == ({"uri": str(bench.images)}, {"uri": str(moved)})
    assert (refresh(workspace).changed, segment(workspace, bench.params).done) == (0, 0)
    # And back.
    moved.rename(bench.images)
    relocate(workspace, str(moved), str(bench.images))
    assert status(workspace).gone == ()


def test_a_folder_with_other_files_is_not_taken(bench: Bench, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bench.images, copy, copy_function=shutil.copyfile)  # other times, same bytes
    name = bench.file(2, 1).name
    pixels = (copy / name).read_bytes()
    old, new = str(bench.images), str(copy)
    (copy / name).unlink()
    with pytest.raises(UserInputError, match=f"1 of them, for example {name} is not there"):
        relocate(bench.workspace, old, new)
    (copy / name).write_bytes(pixels[:-1] + bytes([pixels[-1] ^ 1]))
    with pytest.raises(UserInputError, match=r"another file there\. Nothing was changed"):
        relocate(bench.workspace, old, new)
    (copy / name).write_bytes(pixels)
    assert relocate(bench.workspace, old, new).files == 6
    assert segment(bench.workspace, bench.params).done == 3  # their times are known


def test_ingesting_from_the_new_folder_is_a_repair(bench: Bench, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    bench.images.rename(moved)
    assert len(segment(bench.workspace, bench.params).failures) == 3
    found = ingest(bench.workspace, bench.table, IngestParams(images=moved))
    assert f"6 files are now read from {moved}, no longer from {bench.images}" in found.notes
    assert status(bench.workspace).gone == ()
    assert segment(bench.workspace, bench.params).done == 3  # what failed is open again


def test_a_stage_says_once_that_a_folder_is_gone(bench: Bench) -> None:
    class Heard(Progress):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    shutil.rmtree(bench.images)
    started = time.monotonic()
    found = segment(replace(bench.workspace, progress=Heard()), bench.params)
    assert time.monotonic() - started < 1  # nothing is tried again
    assert Heard.notes == [status(bench.workspace).gone[0].sentence]
    assert [name for name, _ in found.failures] == [f"P1/r01c02f0{site}" for site in (1, 2, 3)]
    assert len({reason for _, reason in found.failures}) == 1


def test_a_file_that_is_gone_from_its_folder_is_named(bench: Bench) -> None:
    bench.file(3, 2).unlink()
    (gone,) = status(bench.workspace).gone
    assert (gone.files, gone.first) == (1, bench.file(3, 2).name)


@pytest.mark.each_database
def test_folders_in_one_that_is_gone_are_one_line(workspace: Workspace, tmp_path: Path) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate(), 1, 1))
    with workspace.database.begin() as session:
        folders = [Folder(uri=str(tmp_path / "disk" / name)) for name in ("P1/a", "P1/b")]
        session.add_all(folders)
        session.flush()
        session.execute(update(ImageFile).values(folder_id=folders[0].id))
        values = {"image_id": image.id, "channel": "RNA", "position": 2, "name": "b.tif"}
        session.add(ImageFile(**values, folder_id=folders[1].id, sha256="0" * 64))
    (gone,) = status(workspace).gone
    assert (gone.folder, gone.files) == (str(tmp_path / "disk"), 2)
