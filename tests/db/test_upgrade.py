"""A store of another schema is recognised, with what to do."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from cellstore.db import migrate
from cellstore.db.session import connect, parse_url
from cellstore.errors import SchemaError
from cellstore.jobs.workspace import Workspace, open_workspace


@pytest.mark.parametrize("revision", ["0001", "0006", "0011"])
def test_a_store_from_before_the_first_release_is_refused(
    workspace: Workspace, revision: str
) -> None:
    with workspace.database.begin() as session:
        session.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    for action in (
        lambda: open_workspace(workspace.settings),
        lambda: migrate.upgrade(workspace.database),
    ):
        with pytest.raises(SchemaError, match=r"before the first release.*cellstore init"):
            action()


def test_broken_references_are_told_and_nothing_changes(empty_database) -> None:
    database = connect(parse_url(empty_database()))
    if not database.is_sqlite:
        pytest.skip("PostgreSQL has never let a reference break")
    migrate.upgrade(database)
    with database.engine.execution_options(writes=True, rebuilds=True).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO wells (id, plate_id, well_row, well_column, name) "
                "VALUES (1, 9, 1, 1, 'A01')"
            )
        )
    database.close()
    with pytest.raises(SchemaError, match="refer to rows that are not there"):
        migrate.upgrade(database)
    assert database.revision() == "0012"
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    database.close()
