from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellstore.errors import BadTableError, UserInputError
from cellstore.formats.records import Refusal
from cellstore.formats.tables import TableRow, cell_text, open_table


def write(folder: Path, data: bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def cells_of(path: Path) -> list[tuple[str, ...]]:
    return [row.cells for row in open_table(path).rows() if isinstance(row, TableRow)]


@pytest.mark.parametrize(
    "data",
    [
        b"a,b\n1,2\n",
        b"a,b\n1,2",
        b"a,b\r\n1,2\r\n",
        b"a\tb\n1\t2\n",
        b"a;b\n1;2\n",
        b"\xef\xbb\xbfa,b\n1,2\n",
        b'"a","b"\n"1","2"\n',
        b" a ,b\n1,2\n\n",
        gzip.compress(b"a,b\n1,2\n"),
    ],
)
def test_the_same_table_in_many_dresses(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    assert open_table(path).columns == ("a", "b")
    assert cells_of(path) == [("1", "2")]


def test_a_comma_in_a_tab_table_is_no_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, b"name, long\tb\nx,y\t2\n")
    assert cells_of(path) == [("x,y", "2")]


def test_latin_1_only_where_utf_8_fails_and_said(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, "a,b\n5 µM,é\n".encode("latin-1")))
    assert table.encoding == "latin-1"
    assert "Latin-1" in table.notes[0]
    utf8 = open_table(write(tmp_path, "a,b\n5 µM,é\n".encode()))
    assert utf8.notes == ()
    assert cells_of(utf8.path) == [("5 µM", "é")]


def test_line_numbers_count_quoted_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'a,b\n"two\nlines",1\n\nx\ny,2\n')
    assert list(open_table(path).rows()) == [
        TableRow(2, ("two\nlines", "1")),
        Refusal(5, "wrong number of cells", "line 5: 1 cells, not 2"),
        TableRow(6, ("y", "2")),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"a,b\n", "header but no rows"),
        (b"a,b", "header but no rows"),
        (b"\n1,2\n", "first line is blank"),
        (b"a,b,a\n1,2,3\n", "column 'a' more than once"),
        (b"II*\0\0\0\0\0", "not a text table"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"a,b\n1,2\n" * 500)[:-20], "damaged gzip"),
        (b'a,b\n"' + b"x" * 200_000, "quote is probably left open"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BadTableError, match=message):
        list(open_table(write(tmp_path, data)).rows())


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="There is no file"):
        open_table(tmp_path / "absent.csv")
    with pytest.raises(UserInputError, match="is a folder"):
        open_table(tmp_path)


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, b"metadata_well,Site\nA01,1\n"))
    with pytest.raises(BadTableError, match=r"'Metadata_Well'.*nearest.*'metadata_well'"):
        table.require("Metadata_Well")
    with pytest.raises(BadTableError, match="Its columns are 'metadata_well', 'Site'"):
        table.require("zzz")


def test_missing_values_are_whole_cells_only() -> None:
    cells = ("NA", " ", "NAD+", "nan", "NaCl", "N/A")
    found = [cell_text(cells, place) for place in range(len(cells))]
    assert found == [None, None, "NAD+", None, "NaCl", None]
    assert cell_text(cells, None) is None


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t,;\"'"), max_size=12
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=8),
    st.sampled_from([",", "\t", ";"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_writes_reads_back(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(("first", "second"))
    writer.writerows(rows)
    path = write(tmp_path, stream.getvalue().encode())
    assert cells_of(path) == rows


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_shows_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    whole = b'a,b,c\n1,"x, y",3\n4,5,6\n7,8,9\n' * 3
    start = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=6))
    path = write(tmp_path, whole[:start] + junk + whole[start + data.draw(st.integers(0, 9)) :])
    try:
        table = open_table(path)
        found = list(table.rows())
    except UserInputError:
        return
    lines = [row.line for row in found]
    assert lines == sorted(set(lines))
    assert all(len(row.cells) == len(table.columns) for row in found if isinstance(row, TableRow))
