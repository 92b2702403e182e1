"""Tables with a row per cell, as Parquet and as CSV."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from realdata import real_data

from cellstore.enums import Control, PerturbationKind, Severity
from cellstore.errors import BadTableError, UserInputError
from cellstore.io.image_tables import ImageRecord
from cellstore.io.objects import ObjectSource
from cellstore.io.single_cells import is_single_cells, open_single_cells

CELLS: dict[str, list[Any]] = {
    "Metadata_Plate": ["001", "001", "001"],
    "Metadata_Well": ["A01", "A01", "B02"],
    "Metadata_Site": [1, 1, 3],
    "Metadata_ObjectNumber": [1, 2, 1],
    "Cells_Area": [10.5, None, 12.5],
}


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)
    return path


@pytest.fixture(params=["cells.parquet", "cells.csv"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The path of a table, once of each kind."""
    name: str = request.param
    return tmp_path / name


def values(source: ObjectSource) -> dict[str, list[Any]]:
    batches = [batch.values for batch in source.batches()]
    return pa.Table.from_batches(batches, schema=source.schema).to_pydict()


def records(source: ObjectSource) -> list[ImageRecord]:
    return [content for _, content in source.images if isinstance(content, ImageRecord)]


def reasons(source: ObjectSource) -> dict[str, list[int | None]]:
    return {
        item.reason: list(item.lines) for item in source.issues if item.severity is Severity.REFUSED
    }


def test_images_cells_and_features(target: Path) -> None:
    path = write(target, CELLS)
    assert is_single_cells(path)
    source = open_single_cells(path)
    assert [(r.plate, r.row, r.column, r.site) for r in records(source)] == [
        ("001", 1, 1, 1),
        ("001", 2, 2, 3),
    ]
    assert source.image_index.tolist() == [0, 0, 1]
    assert source.object_number.tolist() == [1, 2, 1]
    assert values(source) == {"Cells_Area": [10.5, None, 12.5]}
    assert source.objects == ("Cells",)
    assert source.files[0].rows == 3


def test_types_are_kept_and_nan_is_missing(tmp_path: Path) -> None:
    more = {
        "Cells_Count": [1, 2, 3],
        "Cells_Class": ["a", None, "c"],
        "Cells_Flag": [True, False, True],
    }
    path = write(tmp_path / "a.parquet", {**CELLS, **more, "Cells_X": [float("nan"), 1.0, 2.0]})
    source = open_single_cells(path)
    assert {column.name: str(column.type) for column in source.schema} == {
        "Cells_Area": "double",
        "Cells_Count": "int64",
        "Cells_Class": "string",
        "Cells_Flag": "int64",
        "Cells_X": "double",
    }
    found = values(source)
    assert found["Cells_Class"] == ["a", None, "c"]
    assert found["Cells_Flag"] == [1, 0, 1]
    assert found["Cells_X"] == [None, 1.0, 2.0]


def test_text_features_of_a_csv_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", {**CELLS, "Cells_Class": ["big", "", "1"]})
    source = open_single_cells(path)
    assert values(source)["Cells_Class"] == ["big", None, "1"]


def test_metadata_is_kept_or_named(target: Path) -> None:
    more = {
        "Metadata_Dose": ["5 uM", "5 uM", "1 uM"],
        "Metadata_Cells_Location_X": [1.5, 2.5, 1.5],
    }
    source = open_single_cells(write(target, {**CELLS, **more}))
    assert [record.metadata for record in records(source)] == [{"Dose": "5 uM"}, {"Dose": "1 uM"}]
    (note,) = source.notes
    assert note.endswith("the cells of one image have different values: Cells_Location_X")


def test_metadata_that_changes_in_a_later_batch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellstore.io.single_cells.batch_rows", lambda _: 1)
    more = {"Metadata_Dose": ["5 uM", "1 uM", "1 uM"]}
    source = open_single_cells(write(tmp_path / "cells.parquet", {**CELLS, **more}))
    assert [record.metadata for record in records(source)] == [None, None]
    assert source.notes[0].endswith(": Dose")


def test_place_exclusion_files_and_treatment_of_our_own_export(target: Path) -> None:
    own = {
        "Metadata_MinRow": [1, 2, 3],
        "Metadata_MinCol": [4, 5, 6],
        "Metadata_MaxRow": [7, 8, None],
        "Metadata_MaxCol": [9, 10, None],
        "Metadata_CentroidRow": [2.5, 3.5, None],
        "Metadata_CentroidCol": [6.5, 7.5, None],
        "Metadata_Excluded": [None, "perimeter is 0", None],
        "Metadata_pert_type": ["crispr", "crispr", "compound"],
        "Metadata_pert_iname": ["AKT1_1", "AKT1_1", "DMSO"],
        "Metadata_control_type": [None, None, "negcon"],
        "Image_FileName_DNA": ["a.tif", "a.tif", "b.tif"],
        "Image_PathName_DNA": ["/x", "/x", "/x"],
        "Metadata_Plane": [2, 2, 2],
        "Metadata_Timepoint": [3, 3, 3],
        "Metadata_CoreName": ["core", "core", "other"],
    }
    source = open_single_cells(write(target, {**CELLS, **own}))
    assert source.schema.names == ["Cells_Area"]
    (batch,) = source.batches()
    assert batch.boxes[:2].tolist() == [[1, 4, 7, 9], [2, 5, 8, 10]]
    assert batch.centres[:2].tolist() == [[2.5, 6.5], [3.5, 7.5]]
    assert batch.boxes[2, :2].tolist() == [3, 6]
    assert batch.excluded is not None
    assert list(batch.excluded) == [None, "perimeter is 0", None]
    first, second = records(source)
    assert (first.plane, first.time_point, first.core_name) == (2, 3, "core")
    assert (first.files[0].channel, first.files[0].name, first.files[0].folder) == (
        "DNA",
        "a.tif",
        "/x",
    )
    assert first.treatment is not None
    assert second.treatment is not None
    assert first.treatment.kind is PerturbationKind.CRISPR
    assert second.treatment.control is Control.NEGATIVE


def test_the_names_of_cytotable_and_pycytominer(target: Path) -> None:
    columns = {
        "Image_Metadata_Plate_x": ["P", "P"],
        "Image_Metadata_Well_x": ["B7", "B7"],
        "Image_Metadata_Site_x": ["3", "3"],
        "Metadata_ImageNumber": [31, 31],
        "Metadata_Cells_Number_Object_Number": [4, 5],
        "Metadata_Cytoplasm_Parent_Cells": [4, 5],
        "Cells_Parent_Nuclei": [8, 9],
        "Cells_AreaShape_Area": [1.0, 2.0],
        "Nuclei_Texture_X": [3.0, 4.0],
        "Image_Count_Cells": [9, 9],
        "Cells_AreaShape_Center_X": [10.0, 20.0],
        "Cells_AreaShape_Center_Y": [30.0, 40.0],
    }
    source = open_single_cells(write(target, columns))
    names = source.schema.names
    assert names[:2] == ["Cells_AreaShape_Area", "Nuclei_Texture_X"]
    assert not {"Image_Count_Cells", "Cells_Parent_Nuclei"} & set(names)
    assert source.objects == ("Cells", "Nuclei")
    assert source.object_number.tolist() == [4, 5]
    (batch,) = source.batches()
    assert batch.centres.tolist() == [[30.0, 10.0], [40.0, 20.0]]


def test_rows_that_cannot_be_used_are_refused(target: Path) -> None:
    wells = ["A01", "A01", "A01", "??", "A01", None]
    path = write(
        target,
        {
            "Metadata_Plate": ["P"] * 6,
            "Metadata_Well": wells,
            "Metadata_Site": [1] * 6,
            "Metadata_ObjectNumber": [1, 2, 1, 3, None, 4],
            "Cells_Area": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    )
    source = open_single_cells(path)
    first = 1 if target.suffix == ".parquet" else 2
    assert values(source) == {"Cells_Area": [1.0, 2.0]}
    assert reasons(source) == {
        "duplicate key": [first + 2],
        "not a well": [first + 3],
        "no object number": [first + 4],
        "no well": [first + 5],
    }


def test_rows_of_an_image_need_not_be_together(target: Path) -> None:
    rows = 5_000
    path = write(
        target,
        {
            "Metadata_Plate": ["P"] * rows,
            "Metadata_Well": [f"A{1 + n % 12:02d}" for n in range(rows)],
            "Metadata_Site": [1] * rows,
            "Metadata_ObjectNumber": list(range(rows)),
            "Cells_Area": [float(n) for n in range(rows)],
        },
    )
    source = open_single_cells(path)
    assert len(source.images) == 12
    wells = [records(source)[image].column for image in source.image_index.tolist()]
    assert wells == [1 + n % 12 for n in range(rows)]
    assert values(source)["Cells_Area"] == [float(n) for n in range(rows)]


def test_a_plate_must_be_known(target: Path) -> None:
    path = write(target, {name: column for name, column in CELLS.items() if "Plate" not in name})
    with pytest.raises(UserInputError, match="--plate"):
        open_single_cells(path)
    assert {record.plate for record in records(open_single_cells(path, "P7"))} == {"P7"}


def test_what_is_no_table_of_single_cells(tmp_path: Path) -> None:
    without = {name: column for name, column in CELLS.items() if name != "Metadata_ObjectNumber"}
    path = write(tmp_path / "a.csv", without)
    assert not is_single_cells(path)
    path = write(tmp_path / "b.csv", {n: c for n, c in CELLS.items() if n != "Cells_Area"})
    assert not is_single_cells(path)
    empty = tmp_path / "c.csv"
    empty.touch()
    assert not is_single_cells(empty)


def test_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", CELLS)
    path.write_bytes(path.read_bytes()[:-20])
    assert not is_single_cells(path)
    with pytest.raises(BadTableError, match="damaged"):
        open_single_cells(path)


def test_a_header_only_has_no_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",".join(CELLS) + "\n")
    source = open_single_cells(path)
    assert (len(source.object_number), source.files[0].rows) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from(["1", "2", "", "x", "-3", "2.5", "99999999999"]), max_size=12),
    wells=st.lists(st.sampled_from(["A01", "P24", "", "Z99", "ä"]), min_size=12, max_size=12),
    cut=st.integers(0, 30),
)
def test_every_row_is_a_cell_or_refused(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], wells: list[str], cut: int
) -> None:
    path = tmp_path_factory.mktemp("sc") / "a.csv"
    lines = [f"P,{well},1,{label},0.5" for label, well in zip(labels, wells, strict=False)]
    text = "\n".join([",".join(CELLS), *lines])
    path.write_text(text[: len(text) - min(cut, len(text) - 80)] if len(text) > 80 else text)
    source = open_single_cells(path)
    refused = [line for item in source.issues for line in item.lines if line is not None]
    ((_, lines_of_cells),) = source.origins
    kept = lines_of_cells.tolist()
    assert len(values(source)["Cells_Area"]) == len(kept)
    assert sorted(kept + refused) == list(range(2, 2 + source.files[0].rows))


@pytest.mark.real
def test_real_cytotable_output() -> None:
    path = real_data("cytodataframe/NF1_Plate_2/Plate_2_with_image_data_shrunken.parquet")
    assert is_single_cells(path)
    source = open_single_cells(path)
    assert source.object_number.tolist() == [4, 17, 5, 3, 2]
    found = [(r.plate, r.row, r.column, r.site) for r in records(source)]
    assert found == [
        ("Plate_2", 2, 7, 3),
        ("Plate_2", 8, 12, 1),
        ("Plate_2", 6, 7, 2),
        ("Plate_2", 4, 6, 2),
        ("Plate_2", 4, 7, 1),
    ]
    assert len(source.schema) == 1_729
    assert values(source)["Cells_AreaShape_BoundingBoxArea"] == [
        13_482.0, 59_150.0, 12_920.0, 48_918.0, 22_005.0
    ]  # fmt: skip
    (batch,) = source.batches()
    height, width = (batch.boxes[:, 2:] - batch.boxes[:, :2]).T
    assert (height * width).tolist() == values(source)["Cells_AreaShape_BoundingBoxArea"]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["1", "2", "x"], pa.large_string()),
        pa.array(["1", "2", None]).dictionary_encode(),
        pa.array([1.0, 2.0, float("nan")]),
    ],
)
def test_labels_of_any_type(tmp_path: Path, labels: pa.Array) -> None:
    table = pa.table({**CELLS, "Metadata_ObjectNumber": labels})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_single_cells(tmp_path / "a.parquet")
    assert source.object_number.tolist() == [1, 2]
    assert reasons(source) == {"no object number": [3]}


def test_columns_of_odd_types(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {**CELLS, "Cells_List": [[1], [2], [3]]})
    source = open_single_cells(path)
    assert "Cells_List" in source.notes[0]
    assert values(source) == {"Cells_Area": CELLS["Cells_Area"]}
    path = write(tmp_path / "b.parquet", {**CELLS, "Metadata_Well": [["A01"], ["A01"], ["A02"]]})
    with pytest.raises(BadTableError):
        open_single_cells(path)


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("latin-1", b"")]
)
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_as_laboratories_have_it(
    tmp_path: Path, encoding: str, mark: bytes, delimiter: str, packed: bool
) -> None:
    names = [*CELLS, "Metadata_pert_iname"]
    rows = [["P", "A01", "1", "1", "0.5", "µ-cide"], ["P", "A02", "1", "1", "1.5", "DMSO"]]
    text = "\r\n".join(delimiter.join(row) for row in [names, *rows])
    data = mark + text.encode(encoding)
    path = tmp_path / "a.csv"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert is_single_cells(path)
    source = open_single_cells(path)
    assert values(source)["Cells_Area"] == [0.5, 1.5]
    treatments = [record.treatment for record in records(source)]
    assert [item.pert_iname for item in treatments if item] == ["µ-cide", "DMSO"]
