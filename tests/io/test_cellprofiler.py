"""CellProfiler's tables as CSV files and in SQLite: joined, every row accounted for."""

from __future__ import annotations

import csv
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellstore.enums import Severity
from cellstore.errors import BadTableError, CellstoreError, UserInputError
from cellstore.io.cellprofiler import is_cellprofiler_folder, open_cellprofiler_folder
from cellstore.io.cellprofiler_sqlite import is_cellprofiler_sqlite, open_cellprofiler_sqlite
from cellstore.io.image_tables import FileRef, ImageRecord
from cellstore.io.objects import ObjectSource, RowIssue
from cellstore.io.tables import Refusal

IMAGE = [["ImageNumber", "Metadata_Plate", "Metadata_Well", "Metadata_Site"], [1, "P1", "A01", 1]]


def write_csv(path: Path, rows: Iterable[Sequence[object]], end: str = "\r\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator=end).writerows(rows)
    return path


def write_sqlite(path: Path, tables: dict[str, tuple[str, Sequence[Sequence[object]]]]) -> Path:
    with closing(sqlite3.connect(path)) as db:
        for name, (columns, rows) in tables.items():
            db.execute(f'CREATE TABLE "{name}" ({columns})')
            if rows:
                db.executemany(
                    f'INSERT INTO "{name}" VALUES ({",".join("?" * len(rows[0]))})', rows
                )
        db.commit()
    return path


def open_source(path: Path, plate: str | None = None) -> ObjectSource:
    open_it = open_cellprofiler_folder if path.is_dir() else open_cellprofiler_sqlite
    return open_it(path, plate)


@contextmanager
def opened(path: Path, plate: str | None = None) -> Iterator[ObjectSource]:
    source = open_source(path, plate)
    try:
        yield source
    finally:
        source.close()


def whole(source: ObjectSource) -> pa.Table:
    """All cells: image, label and features."""
    batches = [batch.values for batch in source.batches()]
    table = pa.Table.from_batches(batches, schema=source.schema)
    assert table.num_rows == len(source.object_number)
    return table.add_column(0, "number", pa.array(source.object_number)).add_column(
        0, "image", pa.array(source.image_index)
    )


def read(path: Path, plate: str | None = None) -> dict[str, list[object]]:
    with opened(path, plate) as source:
        return whole(source).to_pydict()


def refused(source: ObjectSource) -> list[RowIssue]:
    return [item for item in source.issues if item.severity is Severity.REFUSED]


def notices(source: ObjectSource) -> list[RowIssue]:
    return [item for item in source.issues if item.severity is not Severity.REFUSED]


def reasons(source: ObjectSource) -> dict[tuple[str, str], list[int | None]]:
    return {(item.file, item.reason): list(item.lines) for item in refused(source)}


def images(source: ObjectSource) -> list[ImageRecord]:
    return [content for _, content in source.images if isinstance(content, ImageRecord)]


def check_accounts(source: ObjectSource) -> None:
    """Each row of each table is a part of a cell or refused, once."""
    counted: Counter[tuple[str, int | None]] = Counter()
    for files, lines in source.origins:
        pairs = set(zip(files.tolist(), lines.tolist(), strict=True))
        counted.update((source.files[number].name, line) for number, line in pairs)
    for item in refused(source):
        counted.update((item.file, line) for line in item.lines)
    counted.update((file, content.line) for file, content in source.images)
    assert not [key for key, times in counted.items() if times > 1]
    rows = Counter(name for name, _ in counted)
    assert rows == Counter({file.name: file.rows for file in source.files if file.rows})


def three_tables(folder: Path) -> Path:
    """Two cells; Cytoplasm names its parents in another order than the numbers say."""
    write_csv(folder / "Image.csv", IMAGE)
    write_csv(
        folder / "Cells.csv",
        [["ImageNumber", "ObjectNumber", "AreaShape_Area"], [1, 1, 11], [1, 2, 12]],
    )
    write_csv(
        folder / "Nuclei.csv",
        [["ImageNumber", "ObjectNumber", "AreaShape_Area"], [1, 1, 21], [1, 2, 22], [1, 3, 23]],
    )
    write_csv(
        folder / "Cytoplasm.csv",
        [
            ["ImageNumber", "ObjectNumber", "AreaShape_Area", "Parent_Cells", "Parent_Nuclei"],
            [1, 1, 31, 2, 3],
            [1, 2, 32, 1, 2],
        ],
    )
    return folder


def test_parents_of_the_cytoplasm_decide(tmp_path: Path) -> None:
    with opened(three_tables(tmp_path)) as source:
        assert source.objects == ("Cells", "Nuclei", "Cytoplasm")
        assert whole(source).to_pydict() == {
            "image": [0, 0],
            "number": [2, 1],
            "Cells_AreaShape_Area": [12.0, 11.0],
            "Nuclei_AreaShape_Area": [23.0, 22.0],
            "Cytoplasm_AreaShape_Area": [31.0, 32.0],
        }
        assert reasons(source) == {("Nuclei.csv", "not joined"): [2]}
        check_accounts(source)


def test_without_cytoplasm_the_cells_name_their_nuclei(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    write_csv(
        tmp_path / "Cells.csv",
        [["ImageNumber", "ObjectNumber", "Parent_Nuclei", "A"], [1, 1, 2, 11], [1, 2, 9, 12]],
    )
    write_csv(
        tmp_path / "Nuclei.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 21], [1, 2, 22]]
    )
    with opened(tmp_path) as source:
        table = whole(source).to_pydict()
        assert (table["Cells_A"], table["Nuclei_A"]) == ([11.0], [22.0])
        assert reasons(source) == {
            ("Cells.csv", "no parent"): [3],
            ("Nuclei.csv", "not joined"): [2],
        }
        check_accounts(source)


def test_without_parents_equal_numbers_are_one_cell(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    for name, values in (("Cells", (11, 12)), ("Nuclei", (21, 22))):
        rows = [[1, number, value] for number, value in enumerate(values, start=1)]
        write_csv(tmp_path / f"{name}.csv", [["ImageNumber", "ObjectNumber", "A"], *rows])
    assert read(tmp_path)["Nuclei_A"] == [21.0, 22.0]


def test_two_cells_may_share_a_nucleus_and_its_row_counts_once(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    write_csv(
        tmp_path / "Cells.csv",
        [["ImageNumber", "ObjectNumber", "Parent_Nuclei", "A"], [1, 1, 1, 11], [1, 2, 1, 12]],
    )
    write_csv(tmp_path / "Nuclei.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 21]])
    with opened(tmp_path) as source:
        assert whole(source).to_pydict()["Nuclei_A"] == [21.0, 21.0]
        check_accounts(source)


def test_a_single_table_of_any_name_is_enough(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    write_csv(tmp_path / "Worms.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 5, 0.1]])
    assert read(tmp_path) == {"image": [0], "number": [5], "Worms_A": [0.1]}


def test_rows_that_cannot_be_used_are_refused_with_their_lines(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", [*IMAGE, [2, "P1", "", 1], [1, "P1", "A02", 1]])
    write_csv(
        tmp_path / "Cells.csv",
        [
            ["ImageNumber", "ObjectNumber", "A", "B"],
            [1, 1, 1, 1],
            [1, 1, 2, 2],
            [7, 1, 3, 3],
            [1, 2],
            [1, "x", 4, 4],
            [2, 1, 5, 5],
            [1, 3, 6, 6],
        ],
    )
    with opened(tmp_path) as source:
        assert whole(source).to_pydict()["number"] == [1, 3]
        assert reasons(source) == {
            ("Cells.csv", "duplicate key"): [3],
            ("Cells.csv", "image unknown"): [4, 7],
            ("Cells.csv", "wrong number of cells"): [5],
            ("Cells.csv", "no object number"): [6],
        }
        lost = [content for _, content in source.images if isinstance(content, Refusal)]
        assert [(item.line, item.reason) for item in lost] == [
            (3, "no well"),
            (4, "duplicate key"),
        ]
        check_accounts(source)


def test_a_table_that_is_no_compartment_is_left_out_and_said(tmp_path: Path) -> None:
    three_tables(tmp_path)
    write_csv(tmp_path / "PH3.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 1]])
    with opened(tmp_path) as source:
        assert "PH3" in source.notes[0]
        assert "PH3.csv" not in [file.name for file in source.files]


def test_two_segmentations_side_by_side_are_not_guessed_at(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    for name in ("Cells_One", "Cells_Two"):
        write_csv(tmp_path / f"{name}.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 1]])
    with pytest.raises(BadTableError, match="Cells_One, Cells_Two"):
        open_source(tmp_path)


def test_tables_of_many_folders_are_one_with_the_union_of_their_columns(tmp_path: Path) -> None:
    header = ["ImageNumber", "ObjectNumber"]
    for site, column, value in ((1, "A", 1), (2, "B", 2)):
        folder = tmp_path / f"P1-A01-{site}"
        write_csv(folder / "Image.csv", [["ImageNumber"], [1]])
        write_csv(folder / "Cells.csv", [[*header, column], [1, 1, value]])
    with opened(tmp_path) as source:
        table = whole(source).to_pydict()
        assert (table["Cells_A"], table["Cells_B"]) == ([1.0, None], [None, 2.0])
        records = images(source)
        assert [(item.plate, item.row, item.column, item.site) for item in records] == [
            ("P1", 1, 1, 1),
            ("P1", 1, 1, 2),
        ]
        check_accounts(source)


@pytest.mark.parametrize("text", ["nan", "NaN", "", "NA", "  nan "])
def test_missing_values_are_null(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    write_csv(
        tmp_path / "Cells.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, text], [1, 2, 3]]
    )
    with opened(tmp_path) as source:
        assert whole(source).to_pydict()["Cells_A"] == [None, 3.0]
        assert notices(source) == []


def test_a_word_among_numbers_is_null_and_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    rows = [[1, 1, "1.5"], [1, 2, "oops"], [1, 3, " 2e3 "], [1, 4, "+.5"], [1, 5, "-inf"]]
    write_csv(tmp_path / "Cells.csv", [["ImageNumber", "ObjectNumber", "A"], *rows])
    with opened(tmp_path) as source:
        assert whole(source).to_pydict()["Cells_A"] == [1.5, None, 2000.0, 0.5, -np.inf]
        (notice,) = notices(source)
        assert (notice.file, notice.lines) == ("Cells.csv", [3])


def test_a_word_after_many_rows_loses_none(tmp_path: Path) -> None:
    number = 60_000  # more than is read at once
    write_csv(tmp_path / "Image.csv", IMAGE)
    values = [*(f"{label / 7:.17g}{'0' * 200}" for label in range(number)), "oops"]
    rows = [[1, label, value] for label, value in enumerate(values)]
    write_csv(tmp_path / "Cells.csv", [["ImageNumber", "ObjectNumber", "A"], [1], *rows])
    with opened(tmp_path) as source:
        table = whole(source).to_pydict()
        assert table["number"] == list(range(number + 1))
        assert table["Cells_A"] == [*(float(value) for value in values[:-1]), None]
        assert [notice.lines for notice in notices(source)] == [[number + 3]]
        assert reasons(source) == {("Cells.csv", "wrong number of cells"): [2]}
        check_accounts(source)


def test_a_repeated_column_counts_once_and_a_difference_is_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    header = ["ImageNumber", "ObjectNumber", "A", "A", "B", "B"]
    write_csv(tmp_path / "Cells.csv", [header, [1, 1, 5, 5, 6, 7]])
    with opened(tmp_path) as source:
        table = whole(source).to_pydict()
        assert (table["Cells_A"], table["Cells_B"]) == ([5.0], [6.0])
        assert [notice.detail.split()[0] for notice in notices(source)] == ["B"]


def test_two_header_lines_are_read_as_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "image.csv", [["Image"] * 4, *IMAGE])
    write_csv(
        tmp_path / "object.csv",
        [
            ["Image", "Image", "Cells", "Nuclei", "Cells", "Cells"],
            ["ImageNumber", "ObjectNumber", "A", "A", "AreaShape_Center_X", "AreaShape_Center_Y"],
            [1, 4, 11, 21, 7.5, 3.5],
        ],
    )
    with opened(tmp_path) as source:
        assert whole(source).to_pydict() == {
            "image": [0],
            "number": [4],
            "Cells_A": [11.0],
            "Nuclei_A": [21.0],
            "Cells_AreaShape_Center_X": [7.5],
            "Cells_AreaShape_Center_Y": [3.5],
        }
        (batch,) = source.batches()
        assert batch.centres.tolist() == [[3.5, 7.5]]
        assert [lines.tolist() for _, lines in source.origins] == [[3]]
        check_accounts(source)


def test_keys_metadata_and_file_names_are_no_features(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    header = [
        "ImageNumber", "ObjectNumber", "Number_Object_Number", "Metadata_Plate", "FileName_DNA",
        "PathName_DNA", "Parent_Nuclei", "Group_Index", "Children_Spots_Count", "Texture_X",
    ]  # fmt: skip
    write_csv(tmp_path / "Cells.csv", [header, [1, 1, 1, "P1", "a.tif", "/x", 1, 1, 2, 0.5]])
    with opened(tmp_path) as source:
        names = source.schema.names
        assert names == ["Cells_Children_Spots_Count", "Cells_Texture_X"]


def test_boxes_are_half_open_rows_before_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "Image.csv", IMAGE)
    places = ["Minimum_X", "Minimum_Y", "Maximum_X", "Maximum_Y"]
    header = [f"AreaShape_BoundingBox{name}" for name in places]
    centre = ["Location_Center_X", "Location_Center_Y"]
    write_csv(
        tmp_path / "Nuclei.csv",
        [["ImageNumber", "ObjectNumber", *header, *centre], [1, 1, 10, 20, 13, 25, 11, 22]],
    )
    with opened(tmp_path) as source:
        (batch,) = source.batches()
        assert batch.boxes.tolist() == [[20, 10, 25, 13]]
        assert batch.centres.tolist() == [[22, 11]]


def test_files_without_rows_are_said(tmp_path: Path) -> None:
    three_tables(tmp_path / "P-A01-1")
    (tmp_path / "P-A01-2").mkdir()
    write_csv(tmp_path / "P-A01-2" / "Image.csv", IMAGE[:1])
    (tmp_path / "P-A01-2" / "Cells.csv").touch()
    write_csv(tmp_path / "P-A01-2" / "Nuclei.csv", [["ImageNumber", "ObjectNumber", "A"]])
    with opened(tmp_path) as source:
        reasons = {(notice.file, notice.reason) for notice in notices(source)}
        assert reasons == {
            ("P-A01-2/Cells.csv", "empty file"),
            ("P-A01-2/Nuclei.csv", "no rows"),
            ("P-A01-2/Image.csv", "no rows"),
        }
        assert len(source.object_number) == 2
        check_accounts(source)


def test_a_table_wider_than_any_database_table(tmp_path: Path) -> None:
    names = [f"F{number}" for number in range(2_500)]
    write_csv(tmp_path / "Image.csv", IMAGE)
    rows = [[1, label, *(label * 10_000 + n for n in range(2_500))] for label in (1, 2)]
    write_csv(tmp_path / "Cells.csv", [["ImageNumber", "ObjectNumber", *names], *rows])
    table = read(tmp_path)
    assert len(table) == 2_502
    assert table["Cells_F2499"] == [12_499.0, 22_499.0]


def test_what_no_table_names_needs_a_plate(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "Image.csv", [["ImageNumber", "Metadata_Well", "Metadata_Site"], [1, "A01", 1]]
    )
    write_csv(tmp_path / "Cells.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 1]])
    with pytest.raises(UserInputError, match="--plate"):
        open_source(tmp_path)
    with opened(tmp_path, "P9") as source:
        (image,) = images(source)
        assert image.plate == "P9"


def test_file_names_say_well_and_field_where_nothing_else_does(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "Image.csv",
        [
            ["ImageNumber", "FileName_DNA", "FileName_IllumDNA", "FileName_OrigOverlay"],
            [1, "r02c03f04p01-ch5sk1fk1fl1.tiff", "flat.npy", "drawn.png"],
            [2, "AS_09125_050116030001_D03f02d0.tif", "flat.npy", "drawn.png"],
            [3, "B7_01_1_3_DAPI_001.tif", "flat.npy", "drawn.png"],
        ],
    )
    write_csv(tmp_path / "Nuclei.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 1]])
    with opened(tmp_path, "P1") as source:
        records = images(source)
        assert [(item.row, item.column, item.site) for item in records] == [
            (2, 3, 4),
            (4, 3, 2),
            (2, 7, 3),
        ]
        assert [[file.channel for file in item.files] for item in records] == [["DNA"]] * 3


def test_rows_of_images_are_read_as_those_of_loaddata(tmp_path: Path) -> None:
    sizes = [f"Metadata_ImageResolution{axis}" for axis in "XY"]
    header = [*IMAGE[0], "FileName_DNA", "URL_DNA", "Frame_DNA", *sizes]
    rows = [[n, "P1", "A01", n, "a.tif", "file:///x/a.tif", n - 1, 5e-7, 5e-7] for n in (1, 2)]
    write_csv(tmp_path / "Image.csv", [header, *rows])
    write_csv(tmp_path / "Cells.csv", OBJECTS)
    with opened(tmp_path) as source:
        found = [(item.pixel_size, item.files[0]) for item in images(source)]
    names = ["a.tif#page=1", "a.tif#page=2"]
    assert found == [(0.5, FileRef("DNA", None, name, "/x")) for name in names]


def test_what_is_no_cellprofiler(tmp_path: Path) -> None:
    assert not is_cellprofiler_folder(tmp_path)
    write_csv(tmp_path / "notes.csv", [["a"], [1]])
    assert not is_cellprofiler_folder(tmp_path)
    assert not is_cellprofiler_sqlite(tmp_path / "notes.csv")
    path = write_sqlite(tmp_path / "a.sqlite", {"other": ("a", [(1,)])})
    assert not is_cellprofiler_sqlite(path)
    damaged = tmp_path / "b.sqlite"
    damaged.write_bytes(path.read_bytes()[:100] + b"\xff" * 4000)
    assert not is_cellprofiler_sqlite(damaged)
    with pytest.raises(BadTableError, match="cannot be read"):
        open_source(damaged)


TEXT = st.sampled_from(["1", "2", "3", "7", "0", "-1", "nan", "", "x", "1.5", "1e9", "é", '"'])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(TEXT, min_size=1, max_size=6), max_size=8),
    parents=st.booleans(),
    cut=st.integers(0, 60),
)
def test_no_damage_loses_a_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], parents: bool, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cp")
    write_csv(folder / "Image.csv", [*IMAGE, [2, "P1", "A02", 1]])
    header = ["ImageNumber", "ObjectNumber", "A", "Parent_Nuclei" if parents else "B"]
    path = write_csv(folder / "Cells.csv", [header, *rows])
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    write_csv(folder / "Nuclei.csv", [["ImageNumber", "ObjectNumber", "A"], [1, 1, 1], [2, 1, 1]])
    try:
        with opened(folder) as source:
            whole(source)
            check_accounts(source)
    except CellstoreError:
        pass


def counted(folder: Path, sites: dict[str, str], cells: str = "Cells") -> Path:
    """A site folder for each well, with what ``Count_`` says; two cells where it says 2."""
    for number, (well, count) in enumerate(sites.items(), start=1):
        site = folder / f"P1-{well}-1"
        header = [*IMAGE[0], f"Count_{cells}"]
        write_csv(site / "Image.csv", [header, [number, "P1", well, 1, count]])
        found = [[number, 1, 10], [number, 2, 20]] if count == "2" else []
        write_csv(
            site / f"{cells}.csv", [["ImageNumber", "ObjectNumber", "AreaShape_Area"], *found]
        )
    return folder


@pytest.mark.parametrize("cells", ["Cells", "Nuclei", "Cells_Big"])
def test_an_image_in_which_none_was_counted_is_known(tmp_path: Path, cells: str) -> None:
    sites = {"A01": "2", "A02": "0", "A03": "0.0", "A04": "nan", "A05": "", "A06": "3"}
    with opened(counted(tmp_path, sites, cells)) as source:
        wells = [record.column for record in images(source)]
        assert [wells[index] for index in source.empty] == [2, 3]
        check_accounts(source)
        # A table without rows is right where there is nothing to list.
        empty = {item.file for item in notices(source) if item.reason == "no rows"}
        assert empty == {f"P1-A0{column}-1/{cells}.csv" for column in (4, 5, 6)}


def test_nothing_counted_of_another_kind_says_nothing_of_cells(tmp_path: Path) -> None:
    folder = three_tables(tmp_path)
    write_csv(folder / "Image.csv", [[*IMAGE[0], "Count_Debris"], [*IMAGE[1], 0]])
    with opened(folder) as source:
        assert list(source.empty) == []


OBJECTS = [["ImageNumber", "ObjectNumber", "AreaShape_Area"], [1, 1, 10], [1, 2, 20]]


@pytest.mark.parametrize(
    ("file", "column", "reasons_of_rows"),
    [
        ("Image", "ImageNumber", {"no image number": 1, "image unknown": 2}),
        ("Cells", "ImageNumber", {"image unknown": 2}),
        ("Cells", "ObjectNumber", {"no object number": 2}),
    ],
)
@pytest.mark.parametrize("as_sqlite", [False, True])
def test_a_missing_key_is_named_and_every_row_is_accounted_for(
    tmp_path: Path, file: str, column: str, reasons_of_rows: dict[str, int], *, as_sqlite: bool
) -> None:
    tables = {"Image": IMAGE, "Cells": OBJECTS}
    at = tables[file][0].index(column)
    tables[file] = [[*row[:at], *row[at + 1 :]] for row in tables[file]]
    if as_sqlite:
        parts = {name: (",".join(map(str, t[0])), t[1:]) for name, t in tables.items()}
        path = write_sqlite(tmp_path / "a.sqlite", parts)
        assert is_cellprofiler_sqlite(path)
    else:
        for name, rows in tables.items():
            write_csv(tmp_path / f"{name}.csv", rows)
        path = tmp_path
        assert is_cellprofiler_folder(path)
    with opened(path) as source:
        check_accounts(source)
        (missing,) = notices(source)
        assert (missing.reason, missing.detail) == (
            "missing column",
            f"there is no column {column}",
        )
        assert file in missing.file
        found = Counter(
            content.reason for _, content in source.images if isinstance(content, Refusal)
        )
        for item in refused(source):
            found[item.reason] += len(item.lines)
        assert found == reasons_of_rows
