"""Feature sets are relations under their own names, wherever their values are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
from factories import Factory
from screens import small_screen
from sqlalchemy import select, update

from cellstore.enums import ArtifactKind, Stage
from cellstore.errors import QueryError, StorageError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Cell, FeatureFile, Image, Recipe, Segmentation
from cellstore.query.engine import open_questions

pytestmark = pytest.mark.one_database

NOT_KNOWN = {"content_sha256": None, "mask_artifact_id": None, "flow_artifact_id": None}


@dataclass
class Imported:
    """An image whose five cells another tool found."""

    make: Factory
    segment: Recipe
    image: Image
    segmentation: Segmentation
    cells: list[Cell]


@pytest.fixture
def imported(workspace: Workspace) -> Imported:
    make = Factory(workspace)
    segment = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler", "name": "cp"})
    ingest = make.run(Stage.INGEST)
    image = make.image(make.well(make.plate("P1"), 1, 1), missing=True)
    found = make.segmentation(image, ingest, 5, recipe_id=segment.id, diameter=None, **NOT_KNOWN)
    return Imported(make, segment, image, found, make.cells_of(found))


def ask(workspace: Workspace, sql: str, parameters: Any = None) -> list[dict[str, Any]]:
    with open_questions(workspace) as questions:
        rows: list[dict[str, Any]] = questions.ask(sql, parameters).records()
    return rows


@pytest.mark.each_database
def test_a_set_in_files_is_asked_by_its_name(workspace: Workspace, imported: Imported) -> None:
    columns = {
        "Area": [1.0, 2.0, None, 4.0, 5.0],
        "Neighbors": [0, 1, 2, 3, 4],
        "Parent": ["a", None, "b", "b", "c"],
    }
    imported.make.feature_files("cp", imported.cells, columns, imported.segment, rows_of_file=2)
    rows = ask(
        workspace,
        "SELECT c.object_number, f.* EXCLUDE (cell_id) FROM cp AS f "
        "JOIN cells AS c ON c.id = f.cell_id ORDER BY c.object_number",
    )
    assert [row["object_number"] for row in rows] == [1, 2, 3, 4, 5]
    assert {name: [row[name] for row in rows] for name in columns} == columns
    with open_questions(workspace) as questions:
        assert questions.columns("cp") == [
            ("cell_id", "BIGINT"),
            ("Area", "DOUBLE"),
            ("Neighbors", "BIGINT"),
            ("Parent", "VARCHAR"),
        ]


def test_a_set_is_asked_with_parameters(workspace: Workspace, imported: Imported) -> None:
    imported.make.feature_files("cp", imported.cells, {"x": [1, 2, 3, 4, 5]}, imported.segment)
    rows = ask(workspace, "SELECT count(*) AS n FROM cp WHERE x > ?", [3])
    assert rows == [{"n": 2}]
    with pytest.raises(QueryError, match="nothing"):
        ask(workspace, "SELECT nothing FROM cp")


def test_the_built_in_set_of_a_recipe_is_its_rows_only(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    cells = make.cells_of(screen.segmentations["B01"])
    other = make.run(Stage.MEASURE)
    make.features(cells, other, area=7.0)
    with workspace.database.read() as session:
        first = session.get_one(Recipe, screen.measure_run.recipe_id)
        second = session.get_one(Recipe, other.recipe_id)
    make.feature_set(first, "basic_0a")
    make.feature_set(second, "basic_0b")
    rows = ask(workspace, "SELECT cell_id, area FROM basic_0b ORDER BY cell_id")
    assert rows == [{"cell_id": cell.id, "area": 7.0} for cell in cells]
    assert ask(workspace, "SELECT DISTINCT area FROM basic_0a") == [{"area": 64.0}]


def test_a_set_wider_than_any_database_table_is_asked(
    workspace: Workspace, imported: Imported
) -> None:
    columns = {f"Cells_{number}": [float(number)] * 5 for number in range(2057)}
    imported.make.feature_files("wide", imported.cells, columns, imported.segment)
    (row,) = ask(workspace, 'SELECT sum("Cells_2056") AS last, count(*) AS n FROM wide')
    assert row == {"last": 5 * 2056.0, "n": 5}
    (whole,) = ask(workspace, "SELECT * FROM wide LIMIT 1")
    assert len(whole) == 2058


def test_names_that_differ_in_case_only_can_both_be_asked(
    workspace: Workspace, imported: Imported
) -> None:
    columns = {"Area": [1.0] * 5, "AREA": [2.0] * 5}
    imported.make.feature_files("cp", imported.cells, columns, imported.segment)
    rows = ask(workspace, "SELECT DISTINCT Area, AREA_1 FROM cp")
    assert [tuple(row.values()) for row in rows] == [(1.0, 2.0)]


def test_a_file_that_is_gone_is_told_when_its_set_is_asked(
    workspace: Workspace, imported: Imported
) -> None:
    imported.make.feature_files("cp", imported.cells, {"x": [1] * 5}, imported.segment)
    imported.make.feature_files("other", imported.cells, {"y": [2] * 5}, imported.segment)
    with workspace.database.read() as session:
        path = session.scalars(
            select(Artifact.path)
            .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
            .order_by(Artifact.id)
        ).first()
    workspace.artifacts.locate(path or "").unlink()
    assert ask(workspace, "SELECT count(*) AS n FROM other") == [{"n": 5}]
    with pytest.raises(StorageError, match=r"is gone.*cellstore verify"):
        ask(workspace, "SELECT * FROM cp")


def test_a_path_out_of_the_store_is_not_read(workspace: Workspace, imported: Imported) -> None:
    imported.make.feature_files("cp", imported.cells, {"x": [1] * 5}, imported.segment)
    with workspace.database.begin() as session:
        session.execute(
            update(Artifact)
            .where(Artifact.kind == ArtifactKind.FEATURES)
            .values(path="../../../etc/passwd")
        )
    with pytest.raises(StorageError, match="leads out of the store"):
        ask(workspace, "SELECT * FROM cp")


def test_a_set_without_files_has_no_rows(workspace: Workspace, imported: Imported) -> None:
    found = imported.make.feature_files("cp", imported.cells[:1], {"x": [1]}, imported.segment)
    with workspace.database.begin() as session:
        for file in session.scalars(select(FeatureFile)):
            assert file.feature_set_id == found.id
            session.delete(file)
    with open_questions(workspace) as questions:
        answer = questions.ask("SELECT * FROM cp").table()
    assert (answer.num_rows, answer.schema.types) == (0, [pa.int64(), pa.int64()])


@pytest.mark.each_database
def test_cells_of_other_tools_are_among_the_cells(workspace: Workspace, imported: Imported) -> None:
    assert ask(workspace, "SELECT count(*) AS n FROM cells") == [{"n": 5}]
    assert ask(workspace, "SELECT count(*) AS n FROM cells") == [{"n": 5}]  # from the copy
    make = imported.make
    second = make.image(make.well(make.plate("P2"), 1, 1))
    make.segmentation(
        second, imported.make.run(Stage.INGEST), 2, recipe_id=imported.segment.id, **NOT_KNOWN
    )
    assert ask(workspace, "SELECT count(*) AS n FROM cells") == [{"n": 7}]


def test_a_segmentation_of_unknown_bytes_is_current(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    with workspace.database.begin() as session:
        for well, content in (("B01", None), ("B02", "0" * 64)):
            session.get_one(Segmentation, screen.segmentations[well].id).content_sha256 = content
    rows = ask(workspace, "SELECT well, current FROM lineage WHERE well LIKE 'B0%'")
    assert {row["well"]: row["current"] for row in rows} == {
        "B01": True,
        "B02": False,
        "B03": True,
        "B04": True,
    }


@pytest.mark.each_database
def test_where_the_files_of_images_are(workspace: Workspace, imported: Imported) -> None:
    make = imported.make
    seen = make.image(make.well(make.plate("P2"), 1, 1))
    rows = ask(workspace, "SELECT image_id, uri, seen FROM image_locations ORDER BY image_id")
    assert rows == [
        {"image_id": imported.image.id, "uri": None, "seen": False},
        {"image_id": seen.id, "uri": f"/images/{seen.core_name}-DNA.tiff", "seen": True},
    ]
