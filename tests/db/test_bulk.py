"""Rows by the million: both databases take and refuse the same."""

from __future__ import annotations

import pytest
from factories import Factory
from sqlalchemy import select
from sqlalchemy.exc import DataError, IntegrityError

from cellstore.db.bulk import bulk_insert, in_lists, take_ids, wide_cache
from cellstore.jobs.workspace import Workspace
from cellstore.models import Folder, Plate, Well

COLUMNS = ("id", "plate_id", "well_row", "well_column", "name")


def test_rows_come_out_as_they_went_in(workspace: Workspace) -> None:
    names = ["a\tb", "back\\slash", "new\nline", "µ", "'; DROP TABLE folders; --", "\\N"]
    with workspace.database.begin() as session, wide_cache(session):
        ids = take_ids(session, Folder, len(names))
        bulk_insert(session, Folder, ("id", "uri"), list(zip(ids, names, strict=True)))
    with workspace.database.read() as session:
        assert session.scalars(select(Folder.uri).order_by(Folder.id)).all() == names


def test_ids_that_were_taken_are_not_given_again(workspace: Workspace) -> None:
    plate = Factory(workspace).plate()
    with workspace.database.begin() as session:
        ids = take_ids(session, Plate, 2)
        rows = [(key, f"B{key}", None) for key in ids]
        bulk_insert(session, Plate, ("id", "barcode", "batch"), rows)
    later = Factory(workspace).plate()
    assert len({plate.id, *ids, later.id}) == 4


def test_a_row_that_leads_nowhere_or_is_there_is_refused(workspace: Workspace) -> None:
    plate = Factory(workspace).plate("P1")
    for wrong in (9_999, None):
        rows = [(1, plate.id, 1, 1, "A01"), (2, wrong, 1, 2, "A02")]
        with pytest.raises(IntegrityError), workspace.database.begin() as session:
            bulk_insert(session, Well, COLUMNS, rows)
        with workspace.database.read() as session:
            assert session.scalars(select(Well.id)).all() == []
    with pytest.raises(IntegrityError), workspace.database.begin() as session:
        bulk_insert(session, Plate, ("id", "barcode"), [(plate.id + 1, "P1")])


@pytest.mark.postgres
def test_a_name_that_is_too_long_is_an_error_of_the_data(postgres_workspace: Workspace) -> None:
    with pytest.raises(DataError), postgres_workspace.database.begin() as session:
        bulk_insert(session, Plate, ("id", "barcode"), [(1, "P" * 300)])


def test_lists_come_in_pieces() -> None:
    assert list(in_lists(range(5), 2)) == [[0, 1], [2, 3], [4]]
