"""A store of an older schema is brought up to date, and keeps what is in it."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from cellstore.db import migrate
from cellstore.db.session import Database, connect, parse_url
from cellstore.errors import SchemaError

ROWS_0001 = """
INSERT INTO plates (id, barcode) VALUES (1, 'P1');
INSERT INTO wells (id, plate_id, "row", "column", name) VALUES (1, 1, 1, 1, 'A01');
INSERT INTO images (id, well_id, site, plane, time_point, core_name, content_sha256)
    VALUES (1, 1, 1, 1, 1, 'r01c01f01', 'c');
INSERT INTO image_files (id, image_id, channel, position, name, uri, sha256)
    VALUES (1, 1, 'DNA', 1, 'said.tiff', '/data/P1/seen.tiff', 'f');
INSERT INTO image_files (id, image_id, channel, position, name) VALUES (2, 1, 'RNA', 2, 'b.tiff');
INSERT INTO recipes (id, stage, version, parameters, fingerprint, created_at)
    VALUES (1, 'segment', 1, '{}', 'r', '2026-01-01 00:00:00+00:00');
INSERT INTO recipes (id, stage, version, parameters, fingerprint, created_at)
    VALUES (2, 'measure', 1, '{}', 'm', '2026-01-01 00:00:00+00:00');
INSERT INTO runs (id, stage, recipe_id, status, command, code_version, environment, host, "user",
    started_at)
    VALUES (1, 'segment', 1, 'done', 'x', '0', '{}', 'h', 'u', '2026-01-01 00:00:00+00:00');
INSERT INTO artifacts (id, kind, path, sha256, size_bytes, created_at)
    VALUES (1, 'mask', 'mask/a', 'a', 1, '2026-01-01 00:00:00+00:00');
INSERT INTO segmentations (id, image_id, recipe_id, content_sha256, run_id, n_cells, diameter,
    mask_artifact_id, flow_artifact_id, created_at)
    VALUES (1, 1, 1, 'c', 1, 1, 20.5, 1, 1, '2026-01-01 00:00:00+00:00');
INSERT INTO cells (id, segmentation_id, label, min_row, min_col, max_row, max_col, centroid_row,
    centroid_col) VALUES (1, 1, 7, 1, 2, 3, 4, 1.5, 2.5);
INSERT INTO labels (id, field, value) VALUES (1, 'pert_iname', 'DMSO');
INSERT INTO predictions (run_id, cell_id, rank, label_id, probability) VALUES (1, 1, 1, 1, 0.5);
INSERT INTO feature_sets (id, name, recipe_id, columns) VALUES (1, 'basic-1a', 2, '[]')
"""


@pytest.fixture
def old(empty_database) -> Database:
    database = connect(parse_url(empty_database()))
    migrate.upgrade(database, "0001")
    with database.begin() as session:
        for statement in ROWS_0001.split(";"):
            session.execute(text(statement))
    yield database
    database.close()


def rows(database: Database, query: str) -> list[tuple[object, ...]]:
    with database.read() as session:
        return [tuple(row) for row in session.execute(text(query))]


def test_a_store_of_the_first_schema_keeps_its_rows(old):
    migrate.upgrade(old)
    files = "SELECT f.name, d.uri FROM image_files f LEFT JOIN folders d ON d.id = f.folder_id"
    assert rows(old, f"{files} ORDER BY f.id") == [("seen.tiff", "/data/P1"), ("b.tiff", None)]
    assert rows(old, "SELECT label, min_row, centroid_col FROM cells") == [(7, 1, 2.5)]
    assert rows(old, "SELECT content_sha256, diameter FROM segmentations") == [("c", 20.5)]
    assert rows(old, "SELECT name, storage FROM feature_sets") == [("basic_1a", "table")]
    assert rows(old, "SELECT count(*) FROM predictions") == [(1,)]
    assert migrate.differences(old) == []


def test_back_to_the_first_schema_and_forth(old):
    migrate.upgrade(old)
    migrate.downgrade(old, "0001")
    assert rows(old, "SELECT name, uri FROM image_files ORDER BY id") == [
        ("seen.tiff", "/data/P1/seen.tiff"),
        ("b.tiff", None),
    ]
    migrate.upgrade(old)
    assert migrate.differences(old) == []


ROWS_0004 = """
INSERT INTO recipes (id, stage, version, parameters, fingerprint, created_at)
    VALUES (3, 'qc', 1, '{}', 'q', '2026-01-01 00:00:00+00:00');
INSERT INTO recipe_inputs (recipe_id, input_id) VALUES (3, 1), (2, 1);
INSERT INTO runs (id, stage, recipe_id, status, command, code_version, environment, host, "user",
    started_at)
    VALUES (2, 'qc', 3, 'done', 'x', '0', '{}', 'h', 'u', '2026-01-01 00:00:00+00:00');
INSERT INTO jobs (id, recipe_id, image_id, content_sha256, run_id, status, attempts, deaths)
    VALUES (1, 3, 1, 'c', 2, 'done', 1, 0);
INSERT INTO image_quality (image_id, recipe_id, content_sha256, channel, run_id, saturated,
    maximal, background, median, mean, std) VALUES (1, 3, 'c', 'DNA', 2, 0, 0, 1, 2, 3, 4);
INSERT INTO image_flags (run_id, image_id, reason, channel, value)
    VALUES (2, 1, 'no cells', '', 0);
INSERT INTO cell_flags (run_id, cell_id, reason) VALUES (2, 1, 'area')
"""


def test_quality_control_is_forgotten_where_older_code_could_not_read_it(old):
    migrate.upgrade(old)
    with old.begin() as session:
        for statement in ROWS_0004.split(";"):
            session.execute(text(statement))
    migrate.downgrade(old, "0003")
    assert rows(old, "SELECT stage FROM recipes ORDER BY id") == [("segment",), ("measure",)]
    assert rows(old, "SELECT stage FROM runs") == [("segment",)]
    assert rows(old, "SELECT recipe_id, input_id FROM recipe_inputs") == [(2, 1)]
    assert rows(old, "SELECT count(*) FROM cells") == [(1,)]
    migrate.upgrade(old)
    assert migrate.differences(old) == []


ROWS_0005 = """
INSERT INTO recipes (id, stage, version, parameters, fingerprint, created_at)
    VALUES (3, 'contrast', 1, '{}', 'c', '2026-01-01 00:00:00+00:00');
INSERT INTO recipe_inputs (recipe_id, input_id) VALUES (3, 1);
INSERT INTO runs (id, stage, recipe_id, status, command, code_version, environment, host, "user",
    started_at)
    VALUES (2, 'contrast', 3, 'done', 'x', '0', '{}', 'h', 'u', '2026-01-01 00:00:00+00:00')
"""


def test_contrasts_are_forgotten_where_older_code_could_not_read_them(old):
    migrate.upgrade(old)
    with old.begin() as session:
        for statement in ROWS_0005.split(";"):
            session.execute(text(statement))
    migrate.downgrade(old, "0004")
    assert rows(old, "SELECT stage FROM recipes ORDER BY id") == [("segment",), ("measure",)]
    assert rows(old, "SELECT stage FROM runs") == [("segment",)]
    migrate.upgrade(old)
    assert migrate.differences(old) == []


def test_images_and_tables_that_were_there_are_found_by_the_new_indexes(old):
    migrate.upgrade(old, "0005")
    with old.begin() as session:
        session.execute(
            text(
                "INSERT INTO ingest_files (id, run_id, name, sha256, size_bytes, layout, n_rows, "
                "n_created, n_updated, n_unchanged, n_refused) "
                "VALUES (1, 1, 'map.csv', 'd', 1, 'x', 0, 0, 0, 0, 0)"
            )
        )
    migrate.upgrade(old)
    assert rows(old, "SELECT id FROM images WHERE content_sha256 >= 'c'") == [(1,)]
    assert rows(old, "SELECT id FROM ingest_files WHERE name = 'map.csv'") == [(1,)]
    migrate.downgrade(old, "0005")
    assert rows(old, "SELECT count(*) FROM images") == [(1,)]
    migrate.upgrade(old)
    assert migrate.differences(old) == []


def test_new_folders_go_on_counting_after_the_old_ones(old):
    migrate.upgrade(old)
    with old.begin() as session:
        session.execute(text("INSERT INTO folders (uri) VALUES ('/new')"))
    assert rows(old, "SELECT count(*) FROM folders") == [(2,)]


def test_predictions_are_still_append_only(old):
    migrate.upgrade(old)
    with pytest.raises(Exception, match="append-only"), old.begin() as session:
        session.execute(text("DELETE FROM predictions"))


def test_broken_references_are_told_and_nothing_changes(old):
    if not old.is_sqlite:
        pytest.skip("PostgreSQL has never let a reference break")
    with old.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
    with old.engine.execution_options(writes=True, rebuilds=True).begin() as connection:
        connection.execute(text("DELETE FROM images"))
    with pytest.raises(SchemaError, match="refer to rows that are not there"):
        migrate.upgrade(old)
    assert migrate.current(old) == "0001"
    with old.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
