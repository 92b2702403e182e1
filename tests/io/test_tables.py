from __future__ import annotations

import csv
import gzip
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from realdata import real_data

from cellstore.errors import BadTableError, UserInputError
from cellstore.io import tables as tables_module
from cellstore.io.tables import QUOTED_LINES, Refusal, TableRow, known_text, open_table, sheet_names


def write(folder: Path, data: bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def cells_of(path: Path) -> list[tuple[str, ...]]:
    return [tuple(row.cells) for row in open_table(path).rows() if isinstance(row, TableRow)]


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
        gzip.compress(b"a,b\n1,2\n", mtime=0),
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
        TableRow(2, ["two\nlines", "1"]),
        Refusal(5, "wrong number of cells", "line 5: 1 cells, not 2"),
        TableRow(6, ["y", "2"]),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"a,b\n", "header but no rows"),
        (b"a,b", "header but no rows"),
        (b"\n1,2\n", "first line is blank"),
        (b"II*\0\0\0\0\0", "not a text table"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"a,b\n1,2\n" * 500, mtime=0)[:-20], "damaged gzip"),
        (b"a,b\n" + b"x" * (1 << 25), "line of more than 16 MiB"),
        (b"a,b,c\n1,2,3\nb,a,c\n4,5,6\n", "Line 3 is a header with its columns in another order"),
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
    found = [known_text("name", cell) for cell in cells]
    assert found == [None, None, "NAD+", None, "NaCl", None]


def lines_of(path: Path) -> list[tuple[int, str | Sequence[str]]]:
    """Each row as (line, cells), each refusal as (line, reason)."""
    return [
        (item.line, item.reason if isinstance(item, Refusal) else item.cells)
        for item in open_table(path).rows()
    ]


def test_the_header_of_the_next_file_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, b" a ,b\n1,2\n a ,b\n3,4\na,b\n")
    assert lines_of(path) == [
        (2, ["1", "2"]),
        (3, "header repeated"),
        (4, ["3", "4"]),
        (5, "header repeated"),
    ]


def test_the_byte_order_mark_of_the_next_file_hides_no_header(tmp_path: Path) -> None:
    part = b"\xef\xbb\xbfa,b\n1,2\n"
    assert lines_of(write(tmp_path, part + part))[1:] == [(3, "header repeated"), (4, ["1", "2"])]


def test_a_column_name_of_two_lines(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, b'"a\nx",b\n1,2\n'))
    assert table.columns == ("a\nx", "b")
    assert list(table.rows()) == [TableRow(3, ["1", "2"])]


def test_a_quote_left_open_in_the_header_swallows_no_rows(tmp_path: Path) -> None:
    assert [line for line, _ in lines_of(write(tmp_path, b'a,"b\n1,2\n3,4\n'))] == [2, 3]


def test_a_value_that_is_a_column_name_is_a_value(tmp_path: Path) -> None:
    assert lines_of(write(tmp_path, b"a,b\na,2\nb,b\n")) == [(2, ["a", "2"]), (3, ["b", "b"])]


def test_two_header_lines_of_objects_and_columns(tmp_path: Path) -> None:
    names = b"ImageNumber,ObjectNumber,AreaShape_Area,AreaShape_Area\n"
    data = b"Image,Cells,Cells,Nuclei\n" + names + b"1,2,3,4\n" + names
    table = open_table(write(tmp_path, data))
    areas = ("Cells_AreaShape_Area", "Nuclei_AreaShape_Area")
    assert table.columns == ("ImageNumber", "ObjectNumber", *areas)
    assert [row.line for row in table.rows()] == [3, 4]
    assert [type(row) for row in table.rows()] == [TableRow, Refusal]
    assert "two header lines" in table.notes[0]


def test_text_below_a_repeated_column_is_no_second_header(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, b"Metadata_Well,a,a\nA01,x,y\n"))
    assert table.columns == ("Metadata_Well", "a", "a")
    assert list(table.rows()) == [TableRow(2, ["A01", "x", "y"])]


def test_a_repeated_column_is_said_and_an_error_when_it_is_needed(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, b"a,b,a\n1,2,3\n"))
    assert "more than once, not used: 'a'" in table.notes[0]
    assert table.position("b") == 1
    with pytest.raises(BadTableError, match="column 'a' more than once"):
        table.position("a")
    with pytest.raises(BadTableError, match="column 'a' more than once"):
        table.require("b", "a")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'1,"2,3\n4,5,6\n7,8,9\n', {2: "quote left open", 3: "456", 4: "789"}),
        (b'1,"2,3\n4,"5,6\n7,8,9\n', {2: "quote left open", 3: "quote left open", 4: "789"}),
        (b'1,"2,3\n4,5,6\n7,8",9\n', {2: "quote left open", 3: "456", 4: '78"9'}),
        (b'1,"2,3\n4,5,6\n"7",8,9\n', {2: "quote left open", 3: "456", 4: "789"}),
        (b'1,"2\n3",4\n7,8,9\n', {2: "12\n34", 4: "789"}),
        (b'1,2,"a ""b"""\n7,8,9\n', {2: '12a "b"', 3: "789"}),
        (b'1,2 "inch,3\n7,8,9\n', {2: '12 "inch3', 3: "789"}),
    ],
)
def test_an_open_quote_costs_its_own_line_only(
    tmp_path: Path, body: bytes, expected: dict[int, str]
) -> None:
    found = lines_of(write(tmp_path, b"a,b,c\n" + body))
    assert {line: "".join(what) for line, what in found} == expected


def test_a_line_with_a_nul_byte_is_no_text(tmp_path: Path) -> None:
    found = lines_of(write(tmp_path, b"a,b\n" + b"1,2\n" * 2000 + b"3,\0\n4,5\n"))
    assert found[-2:] == [(2002, "not text"), (2003, ["4", "5"])]


def test_a_quote_left_open_says_from_which_line_to_which(tmp_path: Path) -> None:
    path = write(tmp_path, b'a,b,c\n1,"2,3\n4,5,6\n7,8,9\n')
    refusal = next(open_table(path).rows())
    assert isinstance(refusal, Refusal)
    assert "lines 2 to 4" in refusal.detail


def test_rows_after_a_quote_left_open_far_from_the_end_are_read(tmp_path: Path) -> None:
    rows = 3 * QUOTED_LINES
    found = lines_of(write(tmp_path, b'a,b\n"1,2\n' + b"3,4\n" * rows))
    assert found[0] == (2, "quote left open")
    assert found[1:] == [(line, ["3", "4"]) for line in range(3, rows + 3)]


def test_a_cell_of_very_many_lines_is_taken_for_a_quote_left_open(tmp_path: Path) -> None:
    path = write(tmp_path, b'a,b\n"1\n' + b"x\n" * 2 * QUOTED_LINES + b'y",2\n3,4\n')
    first, *_, last = open_table(path).rows()
    assert isinstance(first, Refusal)
    assert f"lines 2 to {QUOTED_LINES + 2}" in first.detail
    assert last == TableRow(2 * QUOTED_LINES + 4, ["3", "4"])


def test_a_nul_byte_inside_a_cell_of_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b"a,b\n" + b"1,2\n" * 2000 + b'"3\n\0",4\n5,6\n')
    assert lines_of(path)[2000:] == [
        (2002, "quote left open"),
        (2003, "not text"),
        (2004, ["5", "6"]),
    ]


def test_a_row_cut_at_the_end_of_the_file(tmp_path: Path) -> None:
    *_, last = open_table(write(tmp_path, b"a,b,c\n1,2,3\n4,5")).rows()
    assert isinstance(last, Refusal)
    assert (last.line, last.reason) == (3, "wrong number of cells")
    assert "the file ends inside of this row" in last.detail


def test_columns_are_known_without_reading_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffa\tµ\r\n".encode())
    assert open_table(path, whole=False).columns == ("a", "µ")
    packed = write(tmp_path, gzip.compress(b"a;b\n1;2\n", mtime=0))
    assert open_table(packed, whole=False).columns == ("a", "b")


def test_a_mark_of_utf_8_before_latin_1_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    table = open_table(write(tmp_path, b"\xef\xbb\xbfa,b\n5 \xb5M,2\n"))
    assert (table.columns, table.encoding) == (("a", "b"), "latin-1")
    assert list(table.rows()) == [TableRow(2, ["5 µM", "2"])]


@pytest.mark.real
def test_the_damaged_tables_of_cytominer() -> None:
    cut = list(open_table(real_data("cytotable/data_b/J21-2/Cells.csv")).rows())
    assert cut == [Refusal(2, "wrong number of cells", "line 2: 564 cells, not 586")]
    with pytest.raises(BadTableError, match="is empty"):
        open_table(real_data("cytotable/data_b/E17-4/Cells.csv"))
    with pytest.raises(BadTableError, match="header but no rows"):
        open_table(real_data("cytotable/data_b/N23-5/Image.csv"))


line_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t,;\"'"), max_size=9
)
cell_texts = line_text | st.tuples(line_text, line_text).map("\n".join)
"""At most two lines: a third inside a cell may look like a row swallowed by an open quote."""


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Distinct column names and rows of as many cells, none of them the header again."""
    name = st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=6)
    columns = draw(st.lists(name, min_size=2, max_size=5, unique=True))
    row = st.lists(cell_texts, min_size=len(columns), max_size=len(columns))
    rows = draw(st.lists(row, min_size=1, max_size=8))
    headers = {tuple(sorted(columns))}
    return columns, [row for row in rows if tuple(sorted(map(str.strip, row))) not in headers]


def as_text(
    columns: list[str], rows: list[list[str]], delimiter: str, end: str, quoting: Literal[0, 1]
) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([columns, *rows])
    return stream.getvalue()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables(),
    st.sampled_from([",", "\t", ";"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
    st.booleans(),
)
def test_what_csv_writes_reads_back(
    tmp_path: Path,
    table: tuple[list[str], list[list[str]]],
    delimiter: str,
    end: str,
    quoting: Literal[0, 1],
    encoding: str,
    packed: bool,
) -> None:
    columns, rows = table
    assume(rows)
    data = as_text(columns, rows, delimiter, end, quoting).encode(encoding)
    found = open_table(write(tmp_path, gzip.compress(data, mtime=0) if packed else data))
    assert found.columns == tuple(columns)
    assert [list(row.cells) for row in found.rows() if isinstance(row, TableRow)] == rows


def physical_lines(data: bytes) -> list[str]:
    """The lines of a file by all three line ends; its last one only if something is in it."""
    text = data.decode("utf-8-sig", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def covered(item: TableRow | Refusal) -> int:
    """How many lines of the file a row or a refusal stands for."""
    if isinstance(item, Refusal):
        return 1
    return 1 + sum(len(re.findall("\r\n|\r|\n", cell)) for cell in item.cells)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), st.sampled_from([0, 1]), st.data())
def test_damage_loses_no_line_and_shows_no_traceback(
    tmp_path: Path,
    table: tuple[list[str], list[list[str]]],
    quoting: Literal[0, 1],
    data: st.DataObject,
) -> None:
    whole = as_text(*table, ",", "\n", quoting).encode()
    start = data.draw(st.integers(0, len(whole)))
    end = start + data.draw(st.integers(0, 9))
    damaged = whole[:start] + data.draw(st.binary(max_size=6)) + whole[end:]
    path = write(tmp_path, damaged)
    try:
        found = open_table(path)
        items = list(found.rows())
    except UserInputError:
        return
    lines = physical_lines(damaged)
    accounted = {
        line for item in items for line in range(item.line, item.line + covered(item))
    } | set(range(1, found.header_lines + 1))
    expected = {number for number, line in enumerate(lines, start=1) if line}
    assert sum(map(covered, items)) == len(accounted) - found.header_lines
    assert expected <= accounted <= set(range(1, len(lines) + 1))
    assert all(len(row.cells) == len(found.columns) for row in items if isinstance(row, TableRow))


def pieces(path: Path, block: int) -> list[tuple[int, str | Sequence[str]]]:
    """What :func:`lines_of` gives, read in pieces of some ``block`` letters as Arrow."""
    found: list[tuple[int, str | Sequence[str]]] = []
    table = open_table(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_module, "BLOCK", block)
        for batch in table.batches(range(len(table.columns))):
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            found += zip(batch.lines, map(list, rows), strict=True)
            found += [(refusal.line, refusal.reason) for refusal in batch.refused]
    return sorted(found, key=lambda item: item[0])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tables(), st.sampled_from([0, 1]), st.integers(1, 40), st.data())
def test_pieces_have_the_rows_of_the_whole_table(
    tmp_path: Path,
    table: tuple[list[str], list[list[str]]],
    quoting: Literal[0, 1],
    block: int,
    data: st.DataObject,
) -> None:
    whole = as_text(*table, ",", data.draw(st.sampled_from(["\n", "\r\n"])), quoting).encode()
    start = data.draw(st.integers(0, len(whole)))
    damage = data.draw(st.sampled_from([b"", b"", b'"', b"\n", b"\0", b",", b"\xff", whole]))
    path = write(tmp_path, whole[:start] + damage + whole[start:])
    try:
        expected = lines_of(path)
    except UserInputError as error:
        with pytest.raises(type(error)):
            pieces(path, block)
        return
    assert pieces(path, block) == expected


def test_numbers_of_pieces_and_words_among_them(tmp_path: Path) -> None:
    path = write(tmp_path, b"a,b,c\n1,x,2.5\n,y,nan\n\n3,z,NA\nw,z,1\n4,z,1e3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_module, "BLOCK", 10)
        first, second, last = open_table(path).batches([0, 2], numbers=[0, 2])
    assert [column.to_pylist() for column in first.columns] == [[1, None], [2.5, None]]
    assert [column.to_pylist() for column in second.columns] == [["3", "w"], ["NA", "1"]]
    assert [column.to_pylist() for column in last.columns] == [["4"], ["1e3"]]
    assert [list(batch.lines) for batch in (first, second, last)] == [[2, 3], [5, 6], [7]]


def test_a_small_table_is_read_without_arrow(tmp_path: Path) -> None:
    path = write(tmp_path, b"a,b\n1,2\n")
    code = (
        "import sys; from pathlib import Path; from cellstore.io.tables import open_table;"
        f"rows = list(open_table(Path({str(path)!r})).rows());"
        "assert len(rows) == 1 and 'pyarrow' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_parquet_file_is_read_as_the_csv_file_with_its_rows(tmp_path: Path) -> None:
    columns = {
        "a,b": ['x"y', "two\nlines", None, "µ"],
        "whole": pa.array([1, None, 3, 4], pa.int32()),
        "number": [0.5, float("nan"), 1e-7, 3.0],
        "kind": pa.array(["p", "q", "p", "p"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = open_table(tmp_path / "t.parquet")
    assert table.columns == tuple(columns)
    assert open_table(tmp_path / "t.parquet", whole=False).columns == table.columns
    rows = [row.cells for row in table.rows() if isinstance(row, TableRow)]
    assert [[known_text("name", cell) for cell in row[:4]] for row in rows] == [
        ['x"y', "1", "0.5", "p"],
        ["two\nlines", None, None, "q"],
        [None, "3", "1e-7", "p"],
        ["µ", "4", "3", "p"],
    ]


def test_a_parquet_file_that_is_no_table_of_texts_and_numbers_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [[1, 2]], "b": ["x"]}), tmp_path / "lists.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "lists.parquet").read_bytes()[:40])
    for name in ("lists.parquet", "cut.parquet"):
        with pytest.raises(
            BadTableError, match=r"is damaged, or has values that are neither text nor"
        ):
            open_table(tmp_path / name)


def test_a_workbook_with_a_cell_far_away_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "far.xlsx"
    cells = '<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"/></row>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet>{cells}</worksheet>")
    with pytest.raises(BadTableError, match=r"1,048,576 rows and 16,384 columns.*save it as CSV"):
        sheet_names(path)
