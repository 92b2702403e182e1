"""Features and objects of other tools become images, cells and a feature set in files."""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from realdata import real_data
from sqlalchemy import func, select

from cellstore.config import IngestParams
from cellstore.enums import FeatureStorage, Severity, Stage
from cellstore.errors import BadTableError, StorageError, UserInputError
from cellstore.io.layouts import Layout
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Artifact,
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    IngestFile,
    IngestIssue,
    Plate,
    Recipe,
    RecipeInput,
    Segmentation,
    Treatment,
    Well,
)
from cellstore.query import feature_files
from cellstore.query.engine import open_questions
from cellstore.query.saved_queries import find_question
from cellstore.stages.ingest.account import Account, FileIdentity, Issue, issues_of
from cellstore.stages.ingest.ingest import ingest as ingest_source
from cellstore.stages.ingest.ingest_features import ingest_features
from cellstore.stages.verify import verify

pytestmark = pytest.mark.one_database

HEADER = ["ImageNumber", "ObjectNumber", "AreaShape_Area"]


@dataclass(frozen=True)
class Done:
    """What a source brought, the account of each file, and the images that got cells."""

    plates: Sequence[int]
    cells: int
    feature_set: str | None
    segmentations: Sequence[int]
    account: Account
    accounts: dict[str, tuple[int, int, int, int]]
    new: int


def ingest(
    workspace: Workspace,
    source: Path,
    layout: Layout = Layout.CELLPROFILER_CSV,
    *,
    name: str | None = None,
    plate: str | tuple[str, ...] = (),
) -> Done:
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.INGEST, 1, {"source": str(source)}))
    with running(workspace.database, recipe) as run, workspace.database.begin() as session:
        account = Account(run.id, source.name)
        params = IngestParams(name=name, plate=plate)
        identity = FileIdentity.of(source)
        ingest_features(workspace, session, source, layout, params, account, identity)
    with workspace.database.read() as session:
        rows = session.scalars(select(IngestFile).where(IngestFile.run_id == run.id))
        files = {
            row.name: (row.n_created, row.n_updated, row.n_unchanged, row.n_refused) for row in rows
        }
        made = select(func.count(Segmentation.id)).where(Segmentation.run_id == run.id)
        brought = (account.plates, account.cells, account.feature_set, account.segmentations)
        return Done(*brought, account, files, session.scalar(made) or 0)


def issues(workspace: Workspace, done: Done) -> tuple[Issue, ...]:
    with workspace.database.read() as session:
        return issues_of(session, done.account.run_id)


def site(
    root: Path,
    number: int,
    areas: Sequence[Any],
    header: Sequence[str] = HEADER,
    well: str = "A01",
) -> Path:
    """A folder of CellProfiler with one image and a cell per area."""
    folder = root / f"P1-{well}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "Image.csv", [["ImageNumber"], [1]])
    rows = [[1, label, area] for label, area in enumerate(areas, start=1)]
    _write(folder / "Cells.csv", [header, *rows])
    return root


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@dataclass(frozen=True)
class Found:
    """A cell of the store with its features."""

    well: str
    site: int
    label: int
    values: tuple[Any, ...]


def stored(workspace: Workspace, name: str = "cellprofiler") -> list[Found]:
    """All cells of a feature set, by well, site and label."""
    with workspace.database.read() as session:
        found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one()
        columns = [item["name"] for item in found.columns]
        query = (
            select(Artifact.path, Artifact.sha256, FeatureFile)
            .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
            .where(FeatureFile.feature_set_id == found.id)
        )
        values: dict[int, tuple[Any, ...]] = {}
        for path, sha256, file in session.execute(query):
            table = pq.read_table(pa.BufferReader(workspace.artifacts.read(path, sha256)))
            ids = table["cell_id"].to_pylist()
            assert table.column_names == ["cell_id", *columns]
            assert ids == sorted(set(ids))
            assert (file.n_rows, file.first_cell_id, file.last_cell_id) == (
                len(ids),
                ids[0],
                ids[-1],
            )
            rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
            values |= dict(zip(ids, rows, strict=True))
        cells = session.execute(
            select(Cell.id, Cell.object_number, Image.site, Well.name)
            .join(Segmentation, Segmentation.id == Cell.segmentation_id)
            .join(Image, Image.id == Segmentation.image_id)
            .join(Well, Well.id == Image.well_id)
            .join(RecipeInput, RecipeInput.input_id == Segmentation.recipe_id)
            .where(RecipeInput.recipe_id == found.recipe_id)
            .order_by(Well.name, Image.site, Cell.object_number)
        ).all()
        assert {cell.id for cell in cells} == set(values)
        return [Found(cell.name, cell.site, cell.object_number, values[cell.id]) for cell in cells]


def counts(workspace: Workspace) -> dict[str, int]:
    tables = (Plate, Well, Image, Segmentation, Cell, FeatureSet, FeatureFile, Artifact)
    with workspace.database.read() as session:
        return {
            table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0
            for table in tables
        }


def n_columns(workspace: Workspace) -> int:
    with workspace.database.read() as session:
        return len(session.scalars(select(FeatureSet)).one().columns)


@pytest.mark.each_database
def test_folders_become_images_cells_and_files(workspace: Workspace, tmp_path: Path) -> None:
    site(tmp_path / "cp", 1, [10, 11.5])
    site(tmp_path / "cp", 2, ["nan"])
    done = ingest(workspace, tmp_path / "cp")
    assert (done.feature_set, done.new, done.cells) == ("cellprofiler", 2, 3)
    assert n_columns(workspace) == 1
    assert stored(workspace) == [
        Found("A01", 1, 1, (10.0,)),
        Found("A01", 1, 2, (11.5,)),
        Found("A01", 2, 1, (None,)),
    ]
    assert counts(workspace) == {
        "plates": 1, "wells": 1, "images": 2, "segmentations": 2, "cells": 3,
        "feature_sets": 1, "feature_files": 1, "artifacts": 1,
    }  # fmt: skip


def test_segmentations_of_others_have_no_masks_and_unknown_bytes(
    workspace: Workspace, tmp_path: Path
) -> None:
    done = ingest(workspace, site(tmp_path, 1, [10, 11]))
    with workspace.database.read() as session:
        (found,) = session.scalars(select(Segmentation))
        assert (found.n_cells, found.content_sha256, found.mask_artifact_id) == (2, None, None)
        assert found.recipe_id == done.segmentations[0]
        (cell, _) = session.scalars(select(Cell).order_by(Cell.object_number))
        assert (cell.min_row, cell.centroid_row, cell.excluded) == (None, None, None)
        feature_set = session.scalars(select(FeatureSet)).one()
        assert feature_set.storage is FeatureStorage.FILES
        assert feature_set.columns == [
            {
                "name": "Cells_AreaShape_Area",
                "dtype": "float64",
                "unit": None,
                "source": "CellProfiler",
            }
        ]
        measure = session.get_one(Recipe, feature_set.recipe_id)
        assert measure.stage is Stage.MEASURE
        assert measure.parameters["imported"] == "CellProfiler"


@pytest.mark.each_database
def test_every_row_of_every_file_is_in_the_ledger(workspace: Workspace, tmp_path: Path) -> None:
    site(tmp_path, 1, [10, 11])
    _write(tmp_path / "P1-A01-1" / "Nuclei.csv", [HEADER, [1, 2, 5], [1, 7, 6], [9, 1, 7]])
    done = ingest(workspace, tmp_path)
    assert done.accounts == {
        "P1-A01-1/Image.csv": (1, 0, 0, 0),
        "P1-A01-1/Cells.csv": (1, 0, 0, 1),
        "P1-A01-1/Nuclei.csv": (1, 0, 0, 2),
    }
    with workspace.database.read() as session:
        files = session.scalars(select(IngestFile)).all()
        assert {file.name: file.n_rows for file in files} == {
            "P1-A01-1/Image.csv": 1,
            "P1-A01-1/Cells.csv": 2,
            "P1-A01-1/Nuclei.csv": 3,
        }
        issues = session.scalars(select(IngestIssue)).all()
        assert {(item.severity, item.file, item.line, item.reason) for item in issues} == {
            (Severity.REFUSED, "P1-A01-1/Cells.csv", 2, "no parent"),
            (Severity.REFUSED, "P1-A01-1/Nuclei.csv", 3, "not joined"),
            (Severity.REFUSED, "P1-A01-1/Nuclei.csv", 4, "image unknown"),
        }


@pytest.mark.each_database
def test_the_same_again_creates_nothing(workspace: Workspace, tmp_path: Path) -> None:
    source = site(site(tmp_path, 1, [10, "nan", 12]), 2, [13])
    ingest(workspace, source)
    before = counts(workspace)
    done = ingest(workspace, source)
    assert counts(workspace) == before
    assert done.cells == 0
    assert done.accounts == {
        "P1-A01-1/Image.csv": (0, 0, 1, 0),
        "P1-A01-2/Image.csv": (0, 0, 1, 0),
        "P1-A01-1/Cells.csv": (0, 0, 3, 0),
        "P1-A01-2/Cells.csv": (0, 0, 1, 0),
    }


@pytest.mark.parametrize("row_group", [2_000, 1])
def test_a_file_of_features_that_is_gone_comes_again_with_its_table(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    first, second = site(tmp_path / "first", 1, [10, "nan"]), site(tmp_path / "second", 2, [13])
    for source in (first, second):
        ingest_source(workspace, source)
    before, many = stored(workspace), counts(workspace)
    files = list(workspace.artifacts.root.glob("features/*/*"))
    for file in files:
        file.unlink()
    monkeypatch.setattr(feature_files, "ROW_GROUP", row_group)  # 1: other bytes, same values
    done = ingest_source(workspace, first)
    assert (done.cells, done.refused) == (0, 0)
    assert "still lacks files" in done.notes[-1]
    assert verify(workspace).commands
    assert ingest_source(workspace, second).notes == ()
    assert (stored(workspace), counts(workspace)) == (before, many)
    assert all(file.exists() for file in files) == (row_group > 1)
    assert verify(workspace).problems == ()
    assert ingest_source(workspace, first).notes == ()


def test_other_values_for_an_image_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    ingest(workspace, site(tmp_path, 1, [10, 11]))
    before = stored(workspace)
    wrong: tuple[list[Any], ...] = ([10, 99], [10, "nan"], [10, 11, 12])
    for number, areas in enumerate(wrong):
        done = ingest(workspace, site(tmp_path, 1, areas))
        (counted,) = [item for name, item in done.accounts.items() if name.endswith("Cells.csv")]
        assert (counted[0], counted[3]) == (0, 1)
        (issue,) = issues(workspace, done)
        assert (issue.line, issue.reason) == (1 + len(areas), "other values than before")
        assert "--name" in issue.detail
        assert stored(workspace) == before
        other = ingest(workspace, tmp_path, name=f"other{number}")
        assert other.cells == len(areas)
        assert stored(workspace) == before


def test_new_images_come_in_further_files(workspace: Workspace, tmp_path: Path) -> None:
    ingest(workspace, site(tmp_path, 1, [10]))
    done = ingest(workspace, site(tmp_path, 2, [20]))
    assert (done.new, done.cells, done.account.unchanged) == (1, 1, 2)
    assert [(item.site, item.values) for item in stored(workspace)] == [(1, (10.0,)), (2, (20.0,))]
    assert counts(workspace)["feature_files"] == 2


def test_other_columns_under_the_same_name_are_refused(
    workspace: Workspace, tmp_path: Path
) -> None:
    ingest(workspace, site(tmp_path / "a", 1, [10]))
    before = counts(workspace)
    with pytest.raises(UserInputError, match=r"lacks Cells_AreaShape_Area; also has Cells_Other"):
        ingest(workspace, site(tmp_path / "b", 2, [10], [*HEADER[:2], "Other"]))
    assert counts(workspace) == before


def test_the_order_of_columns_does_not_matter(workspace: Workspace, tmp_path: Path) -> None:
    for number, header, row in ((1, ["A", "B"], [1, 2]), (2, ["B", "A"], [4, 3])):
        folder = tmp_path / str(number) / f"P1-A01-{number}"
        folder.mkdir(parents=True)
        _write(folder / "Image.csv", [["ImageNumber"], [1]])
        _write(folder / "Cells.csv", [[*HEADER[:2], *header], [1, 1, *row]])
        ingest(workspace, folder.parent)
    assert [item.values for item in stored(workspace)] == [(1.0, 2.0), (3.0, 4.0)]


def test_names_that_cannot_be(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    source = site(tmp_path, 1, [1])
    for name in ("Cells", "1st", "a b", "cells", "features", "x" * 64):
        with pytest.raises(UserInputError, match="--name"):
            ingest(sqlite_workspace, source, name=name)
        assert counts(sqlite_workspace)["images"] == 0
    assert ingest(sqlite_workspace, source, name="").feature_set == "cellprofiler"


def test_two_rows_of_one_field_have_one_set_of_cells(workspace: Workspace, tmp_path: Path) -> None:
    columns = ["ImageNumber", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    _write(tmp_path / "Image.csv", [columns, [1, "P", "A01", 1], [2, "P", "A01", 1]])
    _write(tmp_path / "Cells.csv", [HEADER, [1, 1, 5], [2, 1, 6], [2, 2, 7]])
    done = ingest(workspace, tmp_path)
    assert done.accounts == {"Image.csv": (1, 0, 1, 0), "Cells.csv": (1, 0, 0, 2)}
    assert [item.values for item in stored(workspace)] == [(5.0,)]


def test_other_metadata_of_images_is_kept_with_their_wells(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    folder = tmp_path / "P1-C05-3"
    folder.mkdir()
    _write(folder / "Image.csv", [["ImageNumber", "Metadata_Solvent"], [1, "DMSO"]])
    ingest(sqlite_workspace, tmp_path)
    with sqlite_workspace.database.read() as session:
        assert session.scalars(select(Well)).one().metadata_ == {"Solvent": "DMSO"}


def test_images_without_objects_are_still_images(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "P1-C05-3"
    folder.mkdir()
    _write(folder / "Image.csv", [["ImageNumber"], [1]])
    done = ingest(workspace, tmp_path)
    assert (done.feature_set, done.cells) == (None, 0)
    assert counts(workspace)["images"] == 1
    assert counts(workspace)["feature_sets"] == 0


def sqlite_source(path: Path, cells: int, images: int = 2) -> Path:
    """Cells and nuclei; ``Cells_A`` of label n in image i is i + n / 1000."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "CREATE TABLE Image (ImageNumber INT, Image_Metadata_Plate TEXT, "
            "Image_Metadata_Well TEXT, Image_Metadata_Site INT)"
        )
        for table, more in (("Cells", ", Cells_Parent_Nuclei INT"), ("Nuclei", "")):
            db.execute(
                f"CREATE TABLE {table} (ImageNumber INT, ObjectNumber INT, {table}_A FLOAT{more})"
            )
        wells = [(i, "P1", f"B{i:02d}", 1) for i in range(1, images + 1)]
        db.executemany("INSERT INTO Image VALUES (?, ?, ?, ?)", wells)
        keys = [(i, n) for i in range(1, images + 1) for n in range(1, cells + 1)]
        rows = [(i, n, i + n / 1000, cells + 1 - n) for i, n in keys]
        db.executemany("INSERT INTO Cells VALUES (?, ?, ?, ?)", rows)
        db.executemany("INSERT INTO Nuclei VALUES (?, ?, ?)", [(i, n, -n) for i, n in keys])
        db.commit()
    return path


@pytest.mark.each_database
def test_many_batches_and_files(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellstore.io.cellprofiler.batch_rows", lambda _: 7)
    monkeypatch.setattr(feature_files, "ROWS_OF_FILE", 20)
    path = sqlite_source(tmp_path / "a.sqlite", 25)
    done = ingest(workspace, path, Layout.CELLPROFILER_SQLITE)
    assert (done.cells, done.new) == (50, 2)
    assert [(item.well, item.label, item.values) for item in stored(workspace)] == [
        (f"B0{i}", n, (i + n / 1000, float(n - 26))) for i in (1, 2) for n in range(1, 26)
    ]
    assert counts(workspace)["feature_files"] == 3  # 21 + 21 + 8
    again = ingest(workspace, path, Layout.CELLPROFILER_SQLITE)
    assert (again.cells, again.accounts["a.sqlite:Cells"][2]) == (0, 50)


def test_csv_and_sqlite_of_the_same_cells_are_the_same(
    workspace: Workspace, tmp_path: Path
) -> None:
    path = sqlite_source(tmp_path / "a.sqlite", 4)
    ingest(workspace, path, Layout.CELLPROFILER_SQLITE)
    folder = tmp_path / "csv"
    folder.mkdir()
    with closing(sqlite3.connect(path)) as db:
        for table in ("Image", "Cells", "Nuclei"):
            found = db.execute(f"SELECT * FROM {table}")
            names = [item[0].removeprefix(f"{table}_") for item in found.description]
            _write(folder / f"{table}.csv", [names, *found])
    done = ingest(workspace, folder)
    assert (done.cells, done.accounts["Cells.csv"]) == (0, (0, 0, 8, 0))


def test_a_full_disk_leaves_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **_more: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files.pq.ParquetWriter, "write_batch", full)
    with pytest.raises(StorageError, match="No space left"):
        ingest(workspace, site(tmp_path, 1, [1]))
    assert set(counts(workspace).values()) == {0}
    assert list(workspace.artifacts.walk()) == []


@pytest.mark.each_database
def test_a_source_that_breaks_in_the_middle_leaves_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sqlite_source(tmp_path / "a.sqlite", 3)
    monkeypatch.setattr("cellstore.io.cellprofiler.batch_rows", lambda _: 2)
    from cellstore.io.cellprofiler_sqlite import SqliteTable

    read = SqliteTable.read

    def broken(self: SqliteTable, rows: Any) -> pa.RecordBatch:
        if rows[0] > 2:
            raise BadTableError("cut")
        return read(self, rows)

    monkeypatch.setattr(SqliteTable, "read", broken)
    with pytest.raises(BadTableError, match="cut"):
        ingest(workspace, path, Layout.CELLPROFILER_SQLITE)
    assert set(counts(workspace).values()) == {0}
    assert list(workspace.artifacts.walk()) == []


def test_single_cells_bring_treatments_boxes_and_exclusions(
    workspace: Workspace, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "Metadata_Plate": ["P1", "P1"],
            "Metadata_Well": ["A01", "A02"],
            "Metadata_Site": [1, 1],
            "Metadata_pert_iname": ["taxol", "DMSO"],
            "Metadata_ObjectNumber": [3, 4],
            "Metadata_MinRow": [1, None],
            "Metadata_MinCol": [2, None],
            "Metadata_MaxRow": [5, None],
            "Metadata_MaxCol": [6, None],
            "Metadata_CentroidRow": [2.5, None],
            "Metadata_CentroidCol": [3.5, None],
            "Metadata_Excluded": [None, "perimeter is 0"],
            "Cells_Count": [7, 8],
            "Cells_Class": ["big", None],
        }
    )
    path = tmp_path / "cells.parquet"
    pq.write_table(table, path)
    done = ingest(workspace, path, Layout.SINGLE_CELLS)
    assert done.accounts == {"cells.parquet": (2, 0, 0, 0)}
    assert stored(workspace, "single_cells") == [
        Found("A01", 1, 3, (7, "big")),
        Found("A02", 1, 4, (8, None)),
    ]
    with workspace.database.read() as session:
        first, second = session.scalars(select(Cell).order_by(Cell.object_number))
        box = (first.min_row, first.min_col, first.max_row, first.max_col)
        assert (box, first.centroid_row, first.centroid_col) == ((1, 2, 5, 6), 2.5, 3.5)
        assert (first.excluded, second.excluded) == (None, "perimeter is 0")
        assert second.min_row is None
        names = session.scalars(
            select(Treatment.name).join(Well, Well.treatment_id == Treatment.id)
        )
        assert set(names) == {"taxol", "DMSO"}
    again = ingest(workspace, path, Layout.SINGLE_CELLS)
    assert again.accounts == {"cells.parquet": (0, 0, 2, 0)}


def test_fractions_do_not_fit_a_set_of_whole_numbers(workspace: Workspace, tmp_path: Path) -> None:
    def table(well: str, values: list[float]) -> Path:
        path = tmp_path / f"{well}.parquet"
        columns = {
            "Metadata_Plate": ["P"],
            "Metadata_Well": [well],
            "Metadata_Site": [1],
            "Metadata_ObjectNumber": [1],
            "Cells_Count": values,
        }
        pq.write_table(pa.table(columns), path)
        return path

    ingest(workspace, table("A01", [3]), Layout.SINGLE_CELLS)
    ingest(workspace, table("A02", [4.0]), Layout.SINGLE_CELLS)
    with pytest.raises(BadTableError, match="Cells_Count"):
        ingest(workspace, table("A03", [4.5]), Layout.SINGLE_CELLS)
    assert [item.values for item in stored(workspace, "single_cells")] == [(3,), (4,)]


@pytest.mark.real
def test_deliberate_defects_of_real_tables(workspace: Workspace) -> None:
    done = ingest(workspace, real_data("cytotable/data_b"))
    assert (done.cells, n_columns(workspace), done.new) == (30, 1_741, 3)
    assert counts(workspace)["images"] == 5
    assert done.account.refused == 43
    with workspace.database.read() as session:
        rows = session.scalar(select(func.sum(IngestFile.n_rows)))
    # 5 images; Cells 41, Nuclei 41, Cytoplasm 51
    assert rows == 138


@pytest.mark.real
def test_the_field_of_the_study(workspace: Workspace) -> None:
    done = ingest(workspace, real_data("cytotable/BR00116991-A01-1"))
    assert (done.cells, n_columns(workspace)) == (92, 2_048)
    with workspace.database.read() as session:
        cell = session.scalars(select(Cell).where(Cell.object_number == 1)).one()
        box = (cell.min_row, cell.min_col, cell.max_row, cell.max_col)
        image = session.scalars(select(Image)).one()
    assert box == (7, 208, 98, 275)
    assert image.core_name == "r01c01f01"


def counted(folder: Path, well: str, count: str, areas: Sequence[Any] = ()) -> Path:
    """A folder of CellProfiler with one image, in which ``count`` cells were counted."""
    site(folder, 1, areas, well=well)
    _write(folder / f"P1-{well}-1" / "Image.csv", [["ImageNumber", "Count_Cells"], [1, count]])
    return folder


def segmented(workspace: Workspace) -> dict[str, int]:
    """The number of cells of each segmentation by well."""
    query = select(Well.name, Segmentation.n_cells).join(Image, Image.well_id == Well.id)
    with workspace.database.read() as session:
        found = session.execute(query.join(Segmentation, Segmentation.image_id == Image.id))
        return {row[0]: row[1] for row in found}


def test_a_field_without_cells_is_a_segmentation_of_none(
    workspace: Workspace, tmp_path: Path
) -> None:
    for well, count, areas in (("A01", "1", [10]), ("A02", "0", []), ("A03", "nan", [])):
        counted(tmp_path / "cp", well, count, areas)
    ingest(workspace, tmp_path / "cp")
    assert segmented(workspace) == {"A01": 1, "A02": 0}
    with open_questions(workspace) as questions:
        sql = find_question(workspace, "wells-without-cells").query
        assert [row[1] for row in questions.ask(sql).rows()] == ["A02"]
    again = ingest(workspace, tmp_path / "cp")
    assert (again.new, again.account.created) == (0, 0)
    assert segmented(workspace) == {"A01": 1, "A02": 0}


def test_a_plate_without_any_cell_is_segmented(workspace: Workspace, tmp_path: Path) -> None:
    done = ingest(workspace, counted(tmp_path, "A02", "0"))
    assert (done.cells, segmented(workspace)) == (0, {"A02": 0})


def test_cells_and_none_of_one_field_contradict_each_other(
    workspace: Workspace, tmp_path: Path
) -> None:
    ingest(workspace, counted(tmp_path / "one", "A01", "2", [10, 11]))
    done = ingest(workspace, counted(tmp_path / "two", "A01", "0"))
    assert [issue.reason for issue in issues(workspace, done)] == ["other values than before"]
    done = ingest(workspace, counted(tmp_path / "three", "A01", "0", [10, 11]))  # rows count
    assert "other values than before" not in [issue.reason for issue in issues(workspace, done)]
    assert segmented(workspace) == {"A01": 2}
