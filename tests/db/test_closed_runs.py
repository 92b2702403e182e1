"""A run that has ended is closed, whoever holds the connection."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from factories import MOMENT, Factory, sha
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from cellstore.db.bulk import bulk_insert
from cellstore.db.events import Change, record_events, record_files
from cellstore.db.migrate import changed_triggers
from cellstore.db.session import connect
from cellstore.enums import (
    ArtifactKind,
    CellFlagReason,
    FeatureStorage,
    ImageFlagReason,
    Severity,
    Stage,
    Status,
)
from cellstore.errors import StorageError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Base,
    Cell,
    CellFeatures,
    CellFlag,
    FeatureFile,
    FeatureSet,
    ImageFlag,
    ImagePrediction,
    ImageQuality,
    IngestFile,
    IngestIssue,
    Plate,
    Prediction,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    TreatmentScore,
)

ENDED = "This run has ended"


class Closing:
    """A run with two cells in one segmentation, and a row for every table that comes to it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        make = Factory(workspace, closed=True)
        plate = make.plate()
        image, other = (make.image(make.well(plate, 1, column)) for column in (1, 2))
        self.run = run = make.run(Stage.SEGMENT, status=Status.RUNNING)
        self.segmentation = make.segmentation(image, run, 1)
        cell = make.cells_of(self.segmentation)[0]
        label, file = make.label("a"), make.artifact(ArtifactKind.FEATURES)
        files = make.add(
            FeatureSet(
                name="wide",
                recipe_id=make.recipe(Stage.MEASURE).id,
                columns=[],
                storage=FeatureStorage.FILES,
            )
        )
        of_run = {"run_id": run.id}
        answer = {"rank": 1, "label_id": label.id, "probability": 0.5}
        usual = dict.fromkeys(("saturated", "maximal", "background", "median", "mean", "std"), 0.0)
        content = sha("content")
        self.rows: dict[type[Base], dict[str, Any]] = {
            Prediction: of_run | answer | {"cell_id": cell.id},
            ImagePrediction: of_run | answer | {"image_id": image.id},
            RunMetric: of_run | {"epoch": 1, "name": "loss", "value": 1.0},
            RunArtifact: of_run | {"artifact_id": file.id},
            CellFeatures: of_run | {"cell_id": cell.id, "recipe_id": run.recipe_id, "area": 1.0},
            FeatureFile: of_run
            | {"feature_set_id": files.id, "artifact_id": file.id}
            | {"n_rows": 1, "first_cell_id": cell.id, "last_cell_id": cell.id},
            ImageQuality: of_run
            | {"image_id": image.id, "recipe_id": run.recipe_id, "channel": "DNA"}
            | {"content_sha256": content, **usual},
            ImageFlag: of_run
            | {"image_id": image.id, "reason": next(iter(ImageFlagReason))}
            | {"channel": "", "value": 1.0},
            CellFlag: of_run | {"cell_id": cell.id, "reason": CellFlagReason.BORDER},
            IngestFile: of_run
            | {"name": "a.csv", "sha256": content, "size_bytes": 1, "layout": "table"}
            | dict.fromkeys(("n_rows", "n_created", "n_updated", "n_unchanged", "n_refused"), 0),
            IngestIssue: of_run
            | {"severity": Severity.PROBLEM, "file": "a.csv", "reason": "x", "detail": "y"},
            TreatmentScore: of_run
            | {"level": "target", "name": "TUBB", "plate_set": "all plates", "measure": "hit"}
            | dict.fromkeys(("n_wells", "n_controls", "n_plates"), 1),
            Segmentation: of_run
            | {"image_id": other.id, "recipe_id": run.recipe_id, "n_cells": 0}
            | {"content_sha256": content, "created_at": MOMENT},
            Cell: {"segmentation_id": self.segmentation.id, "object_number": 2},
        }

    def end(self, session: Session, status: Status) -> None:
        values = {"status": status, "ended_at": datetime.now(UTC)}
        session.execute(update(Run).where(Run.id == self.run.id).values(**values))


@pytest.fixture
def closing_run(workspace: Workspace) -> Closing:
    return Closing(workspace)


def test_what_is_of_a_run_comes_while_it_runs_and_never_later(closing_run: Closing):
    """Of every table, as the ORM, a bare statement and a bulk insert write it."""
    database = closing_run.workspace.database
    with database.begin() as session:
        for table, row in closing_run.rows.items():
            session.execute(insert(table), [row])
        session.rollback()
    with database.begin() as session:
        closing_run.end(session, Status.FAILED)
    for table, row in closing_run.rows.items():
        with pytest.raises(UserInputError, match=ENDED), database.begin() as session:
            session.add(table(**row))
        with pytest.raises(DBAPIError, match="run has ended"), database.engine.begin() as bare:
            bare.execute(insert(table), [row])
    cell = closing_run.rows[Prediction]
    with pytest.raises(UserInputError, match=ENDED), database.begin() as session:
        bulk_insert(session, Prediction, list(cell), [tuple(cell.values())])
    if database.is_sqlite:
        path = str(database.engine.url.database)
        with closing(sqlite3.connect(path)) as bare, pytest.raises(sqlite3.Error, match="ended"):
            bare.execute("INSERT INTO run_metrics VALUES (?, 1, 'loss', 1)", (closing_run.run.id,))


def test_a_run_is_opened_by_an_event_only_and_never_deleted(closing_run: Closing):
    database, run = closing_run.workspace.database, closing_run.run
    again = update(Run).where(Run.id == run.id).values(ended_at=None)
    with database.begin() as session:
        closing_run.end(session, Status.DONE)
    with pytest.raises(UserInputError, match="stays as it is"), database.begin() as session:
        session.execute(again)
    with database.begin() as session:
        record_events(session, [Change("runs", run.id, {}, {"status": "running"})])
        session.execute(again)
        session.execute(insert(RunMetric), [closing_run.rows[RunMetric]])
        closing_run.end(session, Status.DONE)
    with pytest.raises(UserInputError, match="never deleted"), database.begin() as session:
        session.execute(delete(Run))
    with pytest.raises(SQLAlchemyError), database.engine.begin() as bare:
        bare.execute(text("DELETE FROM runs"))


def test_a_trigger_that_closes_runs_is_missed_when_it_is_gone(sqlite_workspace: Workspace):
    with sqlite_workspace.database.engine.begin() as owner:
        owner.execute(text("DROP TRIGGER cells_closed"))
    (reason,) = changed_triggers(sqlite_workspace.database)
    assert reason.startswith("trigger cells_closed is gone")


@pytest.mark.postgres
def test_no_table_that_the_ledger_knows_is_emptied_at_once(postgres_workspace: Workspace):
    tables = {table.__tablename__ for table in Closing(postgres_workspace).rows}
    for name in {*tables, "runs", "jobs", "events", "annotations"}:
        with (
            pytest.raises(SQLAlchemyError, match=r"append-only|never emptied"),
            postgres_workspace.database.engine.begin() as bare,
        ):
            bare.execute(text(f"TRUNCATE {name} CASCADE"))


@pytest.mark.parametrize("name", ["user_name", "host", "started_at", "command"])
def test_who_began_a_run_when_and_where_stays(closing_run: Closing, name: str):
    database = closing_run.workspace.database
    value: Any = datetime.now(UTC) if name == "started_at" else "eve"
    with pytest.raises(UserInputError, match="stays as it is"), database.begin() as session:
        session.execute(update(Run).values({name: value}))
    with database.read() as session:
        kept = session.scalars(select(getattr(Run, name))).one()
    assert re.match("eve", str(kept)) is None


@pytest.mark.postgres
def test_who_may_only_read_gets_a_sentence_and_can_write_files(postgres_workspace: Workspace):
    owner = postgres_workspace.database.engine
    with owner.begin() as connection:
        connection.execute(text("CREATE ROLE only_reads LOGIN"))
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO only_reads"))
    reader = connect(owner.url.set(username="only_reads"))
    with pytest.raises(StorageError, match="permission denied"), reader.begin() as session:
        session.add(Plate(barcode="P1"))
    assert not record_files(reader, Path("report.html"))
    reader.close()
