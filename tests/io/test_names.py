from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellstore.errors import UserInputError
from cellstore.io.filenames import (
    COLUMNS,
    ROWS,
    ImageName,
    core_file_name,
    format_well,
    parse_well,
)

rows = st.integers(1, ROWS)
columns = st.integers(1, COLUMNS)


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("A01", (1, 1)),
        ("A1", (1, 1)),
        ("b7", (2, 7)),
        ("C - 3", (3, 3)),
        (" P24 ", (16, 24)),
        ("r01c01", (1, 1)),
        ("R14C07", (14, 7)),
        ("Z48", (26, 48)),
        ("AA01", (27, 1)),
        ("AF48", (32, 48)),
        ("0101", (1, 1)),
        ("3248", (32, 48)),
        ("002001", (2, 1)),
        ("r032c048", (32, 48)),
        ("A01.a1", (1, 1)),
        ("a1.B2", (2, 2)),
        ("P24.b1", (32, 47)),
    ],
)
def test_wells_as_people_write_them(text: str, well: tuple[int, int]) -> None:
    assert parse_well(text) == well


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "A00",
        "A49",
        "AG01",
        "01",
        "A001",
        "r00c01",
        "0001",
        "0149",
        "010",
        "01011",
        "A1B",
        "A01.c1",
        "Q01.a1",
        "A01.a3",
        "102001",
        "Ä1",
        "A²",
    ],
)
def test_what_is_no_well_is_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="is not a well"):
        parse_well(text)


@given(rows, columns)
def test_a_written_well_reads_back(row: int, column: int) -> None:
    text = format_well(row, column)
    assert parse_well(text) == (row, column)
    assert parse_well(text.lower()) == (row, column)


@given(st.text(max_size=8))
def test_any_text_is_a_well_or_refused(text: str) -> None:
    try:
        row, column = parse_well(text)
    except UserInputError:
        return
    assert parse_well(format_well(row, column)) == (row, column)


@pytest.mark.parametrize(("row", "column"), [(0, 1), (1, 0), (33, 1), (1, 49)])
def test_wells_off_the_plate_have_no_name(row: int, column: int) -> None:
    with pytest.raises(UserInputError, match="is not a well"):
        format_well(row, column)


def test_phenix_name_of_the_published_study() -> None:
    assert core_file_name("r01c02f03p04-ch5sk6fk1fl1.tiff") == ImageName(
        None, 1, 2, 3, 4, 6, "ch5", 5, "r01c02f03"
    )


@pytest.mark.parametrize("name", ["r14c07f05", "r14c07f05.tif", "R14C07F05.PNG"])
def test_core_file_name_alone(name: str) -> None:
    projection = ImageName(None, 14, 7, 5, channel="projection", core_name="r14c07f05")
    assert core_file_name(name) == projection


@pytest.mark.parametrize(
    "name", ["", "AS_09047_O01f00d2.TIF", "r01c01", "xr01c01f01.tif", "r99c01f01.tif"]
)
def test_other_names_are_not_taken_for_phenix(name: str) -> None:
    assert core_file_name(name) is None
