"""Real files of CellProfiler: what is in them, counted by hand or by other means."""

from __future__ import annotations

import csv
import sqlite3
from contextlib import closing

import pytest
from realdata import real_data
from test_cellprofiler import check_accounts, notices, opened, reasons, refused, whole

from cellstore.io.cellprofiler import is_cellprofiler_folder
from cellstore.io.cellprofiler_sqlite import is_cellprofiler_sqlite


@pytest.mark.real
def test_example_human() -> None:
    path = real_data("cytotable/ExampleHuman")
    assert is_cellprofiler_folder(path)
    with opened(path, "P1") as source:
        assert len(source.object_number) == 289
        assert refused(source) == []
        area = whole(source)["Cells_AreaShape_Area"].to_pylist()
        with (path / "Cells.csv").open(newline="") as file:
            assert area == [float(row["AreaShape_Area"]) for row in csv.DictReader(file)]


@pytest.mark.real
def test_the_plate_of_the_study_is_wider_than_a_table() -> None:
    with opened(real_data("cytotable/BR00116991-A01-1")) as source:
        # 2,057 columns; four come twice, and five are keys
        assert len(source.schema) == 2_048
        assert len(source.object_number) == 92
        check_accounts(source)
        for batch in source.batches():
            inside = (batch.boxes[:, :2] <= batch.centres) & (batch.centres < batch.boxes[:, 2:])
            assert inside.all()


@pytest.mark.real
def test_deliberate_defects() -> None:
    with opened(real_data("cytotable/data_b")) as source:
        assert len(source.object_number) == 30
        check_accounts(source)
        assert {key: len(lines) for key, lines in reasons(source).items()} == {
            ("J21-2/Cells.csv", "wrong number of cells"): 1,
            ("J21-2/Cytoplasm.csv", "no parent"): 1,
            ("J21-2/Nuclei.csv", "not joined"): 1,
            ("E17-4/Cytoplasm.csv", "no parent"): 10,
            ("N23-5/Cells.csv", "image unknown"): 10,
            ("N23-5/Cytoplasm.csv", "image unknown"): 10,
            ("N23-5/Nuclei.csv", "image unknown"): 10,
        }
        assert {notice.file for notice in notices(source)} == {
            "E17-4/Cells.csv",
            "E17-4/Nuclei.csv",
            "N23-5/Image.csv",
        }


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "images", "cells"),
    [("data_b_sqlite/data_b.sqlite", 4, 40), ("Cell-Health/test-SQ00014613.sqlite", 2, 12)],
)
def test_real_sqlite_has_the_values_of_a_plain_join(name: str, images: int, cells: int) -> None:
    path = real_data(f"cytotable/{name}")
    assert is_cellprofiler_sqlite(path)
    with opened(path) as source:
        check_accounts(source)
        table = whole(source)
        assert (len(source.images), table.num_rows) == (images, cells)
    joined = (
        "FROM Cytoplasm y JOIN Cells c ON c.TableNumber = y.TableNumber "
        "AND c.ImageNumber = y.ImageNumber AND c.ObjectNumber = y.Cytoplasm_Parent_Cells "
        "JOIN Nuclei n ON n.TableNumber = y.TableNumber AND n.ImageNumber = y.ImageNumber "
        "AND n.ObjectNumber = y.Cytoplasm_Parent_Nuclei ORDER BY y.rowid"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        for column in table.column_names[2:]:
            values = [row[0] for row in db.execute(f'SELECT "{column}" {joined}')]
            expected = [None if value in (None, "nan") else float(value) for value in values]
            assert table[column].to_pylist() == expected


@pytest.mark.real
def test_a_folder_with_images_only() -> None:
    with opened(real_data("pycytominer")) as source:
        assert len(source.images) == 2
        assert source.schema.names == []
        assert "only images" in source.notes[0]
