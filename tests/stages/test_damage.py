"""verify and doctor find what somebody, or a disk, has done to the database itself."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from factories import Factory
from small_training import Opener, Trained
from sqlalchemy import select, text

from cellstore.db.events import Change, record_events
from cellstore.enums import Stage
from cellstore.errors import DatabaseError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Event
from cellstore.settings import StoreSettings
from cellstore.stages.doctor import doctor
from cellstore.stages.predict import predict
from cellstore.stages.qc import qc
from cellstore.stages.verify import verify


def change(workspace: Workspace, statement: str, table: str | None = None) -> None:
    """Change a store behind the back of the triggers that keep ``table`` as it is."""
    with workspace.database.begin() as session:
        if not workspace.database.is_sqlite:
            session.execute(text("SET LOCAL session_replication_role = replica"))
        elif table is not None:
            for verb in ("UPDATE", "DELETE"):
                session.execute(text(f"DROP TRIGGER {table}_keep_{verb}"))
        session.execute(text(statement))


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
    for table, statement in changes.items():
        change(workspace, statement, table if table == "predictions" else None)
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert all("are not what its job" in reason for reason in reasons)
    assert [reason.split()[2] for reason in reasons] == ["measure", "predict", "qc"]


def test_events_are_a_chain_that_verify_walks(workspace: Workspace) -> None:
    with workspace.database.begin() as session:
        for number in (1, 2, 3):
            record_events(session, [Change("runs", number, None, {"status": "done"})])
    assert verify(workspace).ok
    with workspace.database.read() as session:
        first, second, third = session.scalars(select(Event.id).order_by(Event.id))
    change(workspace, f"UPDATE events SET user_name = 'eve' WHERE id = {first}", "events")
    (problem,) = verify(workspace).problems
    assert problem.path == workspace.database.shown
    assert problem.reason == f"event {first} is not what was written"
    with workspace.database.begin() as session:
        if not workspace.database.is_sqlite:
            session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(text(f"DELETE FROM events WHERE id = {second}"))
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert f"before event {third} an event was taken out or changed" in reasons


def test_a_reference_that_leads_nowhere_is_found(sqlite_workspace: Workspace) -> None:
    make = Factory(sqlite_workspace)
    run = make.run(Stage.SEGMENT)
    with closing(sqlite3.connect(sqlite_workspace.settings.sqlite)) as plain:
        plain.execute("DELETE FROM recipes WHERE id = ?", [run.recipe_id])
        plain.commit()
    (problem,) = verify(sqlite_workspace).problems
    assert problem.path == sqlite_workspace.database.shown
    assert problem.reason == f"row {run.id} of runs refers to a row of recipes that is not there"
    findings = doctor(sqlite_workspace.settings).findings
    (broken,) = [item for item in findings if item.topic == "database"]
    assert (broken.state, "backup" in broken.detail) == ("broken", True)


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
