"""Ctrl-C while an ingest writes: it ends at once, undone, and the next one works."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import event, select

from cellstore.enums import Status
from cellstore.jobs.workspace import Workspace
from cellstore.models import Plate, Run
from cellstore.stages.ingest.ingest import ingest

HEADER = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site\n"


def test_a_stop_inside_a_statement_undoes_the_table_and_closes_the_run(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(HEADER + "a.tif,P1,A01,1\n")
    engine = sqlite_workspace.database.engine

    def stop(_connection, _cursor, statement, *_rest):
        if "image_files" in statement and statement.startswith("INSERT"):
            raise KeyboardInterrupt

    event.listen(engine, "before_cursor_execute", stop)
    with pytest.raises(KeyboardInterrupt):
        ingest(sqlite_workspace, table)
    event.remove(engine, "before_cursor_execute", stop)
    with sqlite_workspace.database.read() as session:
        assert session.scalars(select(Run.status)).all() == [Status.CANCELLED]
        assert session.scalars(select(Plate.id)).all() == []
    assert ingest(sqlite_workspace, table).created == 1
