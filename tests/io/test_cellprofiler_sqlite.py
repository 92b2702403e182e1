"""CellProfiler's SQLite files: cytominer-database and ExportToDatabase."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from test_cellprofiler import (
    check_accounts,
    opened,
    read,
    reasons,
    refused,
    whole,
    write_sqlite,
)

from cellstore.io.cellprofiler_sqlite import is_cellprofiler_sqlite

CELLS = '"TableNumber" TEXT, "ImageNumber" BIGINT, "ObjectNumber" BIGINT, "Cells_A" FLOAT'
IMAGES = (
    '"TableNumber" TEXT, "ImageNumber" BIGINT, "Image_Metadata_Plate" TEXT, '
    '"Image_Metadata_Well" TEXT, "Image_Metadata_Site" BIGINT'
)


def test_sqlite_tells_images_apart_by_table_number(tmp_path: Path) -> None:
    path = write_sqlite(
        tmp_path / "a.sqlite",
        {
            "Image": (IMAGES, [("x", 1, "P1", "A01", 1), ("y", 1, "P1", "A02", 1)]),
            "Cells": (
                CELLS,
                [("y", 1, 1, 0.5), ("x", 1, 1, "nan"), ("z", 1, 1, 2.0), ("x", 1, 2, 3)],
            ),
        },
    )
    assert is_cellprofiler_sqlite(path)
    with opened(path) as source:
        assert whole(source).to_pydict() == {
            "image": [1, 0, 0],
            "number": [1, 1, 2],
            "Cells_A": [0.5, None, 3.0],
        }
        assert reasons(source) == {("a.sqlite:Cells", "image unknown"): [3]}
        check_accounts(source)


def test_sqlite_texts_among_numbers(tmp_path: Path) -> None:
    values = [1.5, "nan", "inf", "-inf", None, "oops", 1e300, 7]
    path = write_sqlite(
        tmp_path / "a.sqlite",
        {
            "Image": (IMAGES, [("x", 1, "P1", "A01", 1)]),
            "Cells": (CELLS, [("x", 1, n, value) for n, value in enumerate(values)]),
        },
    )
    expected = [1.5, None, np.inf, -np.inf, None, None, 1e300, 7.0]
    assert read(path)["Cells_A"] == expected


def test_sqlite_rows_in_any_order_with_gaps(tmp_path: Path) -> None:
    number = 300
    order = np.random.default_rng(1).permutation(number).tolist()
    nuclei = '"ImageNumber" BIGINT, "ObjectNumber" BIGINT, "Nuclei_A" FLOAT, "Nuclei_Class" TEXT'
    path = write_sqlite(
        tmp_path / "a.sqlite",
        {
            "Image": ('"ImageNumber" INT, "Metadata_Plate", "Metadata_Well", "Metadata_Site"',
                      [(1, "P", "A01", 1)]),
            "Cells": (('"ImageNumber" INT, "ObjectNumber" INT, "Cells_Parent_Nuclei" INT, '
                      '"Cells_A" FLOAT'), [(1, n, number - n, n / 7) for n in order]),
            "Nuclei": (nuclei, [(1, n + 1, n / 3, f"class {n}") for n in range(number)]),
        },
    )  # fmt: skip
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE Nuclei SET rowid = rowid * 1000")
        db.commit()
    table = read(path)
    assert table["number"] == order
    assert table["Cells_A"] == [n / 7 for n in order]
    assert table["Nuclei_A"] == [(number - n - 1) / 3 for n in order]
    assert table["Nuclei_Class"] == [f"class {number - n - 1}" for n in order]


def test_sqlite_numbers_of_any_size(tmp_path: Path) -> None:
    path = write_sqlite(
        tmp_path / "a.sqlite",
        {
            "Image": (IMAGES, [("x", 1, "P1", "A01", 1), ("x", 1 << 40, "P1", "A02", 1)]),
            "Cells": (CELLS, [("x", 1, 1, 0.5), ("x", 1, 1 << 40, 1), ("x", 1 << 40, 1, 1)]),
        },
    )
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE Cells SET rowid = (1 << 62) + rowid")
        db.commit()
    with opened(path) as source:
        assert whole(source).to_pydict() == {"image": [0], "number": [1], "Cells_A": [0.5]}
        assert {item.reason for item in refused(source)} == {"no object number", "image unknown"}
        check_accounts(source)


def test_export_to_database_names(tmp_path: Path) -> None:
    path = write_sqlite(
        tmp_path / "a.db",
        {
            "MyExpt_Per_Image": (
                (
                    '"ImageNumber" INT, "Image_Metadata_Plate", "Image_Metadata_Well", '
                    '"Image_Metadata_Site"'
                ),
                [(1, "P", "B02", 1)],
            ),
            "MyExpt_Per_Object": (
                (
                    '"ImageNumber" INT, "ObjectNumber" INT, "Cells_A" FLOAT, "Nuclei_A" FLOAT, '
                    '"Cells_Number_Object_Number" INT, "Cells_Parent_Nuclei" INT'
                ),
                [(1, 1, 0.25, 0.5, 1, 1)],
            ),
        },
    )
    assert read(path) == {"image": [0], "number": [1], "Cells_A": [0.25], "Nuclei_A": [0.5]}


def test_sqlite_numbers_that_are_text(tmp_path: Path) -> None:
    about = '"ImageNumber" TEXT, "Metadata_Plate", "Metadata_Well", "Metadata_Site", "Count_Cells"'
    images = [("1", "A01", "2"), ("2.0", "A02", "0"), ("x", "A03", "0")]
    cells = [("1", "1", 0.5), ("1.0", "2.0", 1.5), ("x", "1", 2), ("1", "1.5", 3), ("1", "", 4)]
    path = write_sqlite(
        tmp_path / "a.sqlite",
        {
            "Image": (about, [(number, "P", well, "1", count) for number, well, count in images]),
            "Cells": ('"ImageNumber" TEXT, "ObjectNumber" TEXT, "Cells_A" FLOAT', cells),
        },
    )
    with opened(path) as source:
        assert whole(source).to_pydict() == {
            "image": [0, 0],
            "number": [1, 2],
            "Cells_A": [0.5, 1.5],
        }
        assert list(source.empty) == [1]
        assert reasons(source) == {
            ("a.sqlite:Cells", "image unknown"): [3],
            ("a.sqlite:Cells", "no object number"): [4, 5],
        }
        check_accounts(source)
