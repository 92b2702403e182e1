"""Plate maps as people draw them: grids, spreadsheets, headers of all kinds, doses."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from realdata import real_data

from cellstore.enums import Control, PerturbationKind
from cellstore.errors import BadTableError, UnknownNameError, UserInputError
from cellstore.io.filenames import format_well
from cellstore.io.layouts import detect
from cellstore.io.map_shapes import dose_in_name, header_of, read_dose
from cellstore.io.platemaps import (
    PlateAnnotation,
    map_table,
    notes_on_wells,
    read_annotation,
)
from cellstore.io.treatments import TreatmentRecord, read_control

Rows = Sequence[Sequence[Any]]


def write(path: Path, rows: Rows, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    lines = (delimiter.join(str(cell) for cell in row) for row in rows)
    path.write_text("\r\n".join(lines) + "\r\n", encoding=encoding)
    return path


def excel(path: Path, **sheets: Rows) -> Path:
    xlsxwriter = pytest.importorskip("xlsxwriter")
    book = xlsxwriter.Workbook(str(path))
    for name, rows in sheets.items():
        sheet = book.add_worksheet(name)
        for number, row in enumerate(rows):
            sheet.write_row(number, 0, row)
    book.close()
    return path


def ods(path: Path, rows: Rows) -> Path:
    """Write the least that LibreOffice would call a spreadsheet."""
    kinds = 'xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" '
    kinds += 'xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0" '
    kinds += 'xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"'
    kinds += ' xmlns:calcext="urn:org:documentfoundation:names:experimental:calc:xmlns:calcext:1.0"'
    text = '<table:table-cell office:value-type="string"{}><text:p>{}</text:p></table:table-cell>'
    error = ' office:string-value="" calcext:value-type="error"'
    body = "".join(
        "<table:table-row>"
        + "".join(text.format(error * (cell == "#N/A"), cell) for cell in row)
        + "</table:table-row>"
        for row in rows
    )
    text = (
        f'<?xml version="1.0"?><office:document-content {kinds}><office:body><office:spreadsheet>'
        f'<table:table table:name="map">{body}</table:table></office:spreadsheet></office:body>'
        "</office:document-content>"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("content.xml", text)
        archive.writestr(
            "META-INF/manifest.xml",
            '<?xml version="1.0"?><manifest:manifest '
            'xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"/>',
        )
    return path


def grid(cells: Rows, corner: str = "") -> list[list[Any]]:
    head = [corner, *range(1, len(cells[0]) + 1)]
    letters = [format_well(row, 1)[:-2] for row in range(1, len(cells) + 1)]
    return [head, *([letter, *row] for letter, row in zip(letters, cells, strict=True))]


def labels(found: PlateAnnotation) -> dict[str, str | None]:
    """What each well of the one map got, with doses."""
    (only,) = found.maps.values()
    return {
        format_well(*position): row.record.label if row.record else None
        for position, row in only.wells.items()
    }


def record(found: PlateAnnotation, row: int, column: int) -> TreatmentRecord:
    (only,) = found.maps.values()
    treatment = only.wells[row, column].record
    assert treatment is not None
    return treatment


COMPOUNDS = [["DMSO", "taxol", "noco"], ["taxol", "", "DMSO"]]
DOSES = [["", "0,5", "1"], ["5", "", ""]]
EXPECTED = {
    "A01": "DMSO",
    "A02": "taxol 0.5 uM",
    "A03": "noco 1 uM",
    "B01": "taxol 5 uM",
    "B02": None,
    "B03": "DMSO",
}


@pytest.mark.parametrize("kind", ["below", "beside", "in the corner"])
@pytest.mark.parametrize("ending", ["csv", "xlsx", "ods"])
def test_blocks_of_compounds_and_doses(tmp_path: Path, kind: str, ending: str) -> None:
    if kind == "below":
        rows: list[list[Any]] = [["Compound"], *grid(COMPOUNDS), [], ["Dose (µM)"], *grid(DOSES)]
        rows += [["Cell line"], *grid([["A549"] * 3] * 2)]
    elif kind == "beside":
        pairs = zip(grid(COMPOUNDS), grid(DOSES), strict=True)
        rows = [["Compound", "", "", "", "", "Dose (µM)"], *([*a, "", *b] for a, b in pairs)]
    else:
        rows = [*grid(COMPOUNDS, "Compound"), *grid(DOSES, "Conc. in uM")]
    path = tmp_path / f"map.{ending}"
    if ending == "csv":
        width = max(map(len, rows))
        write(path, [[*row, *[""] * (width - len(row))] for row in rows], ";", "latin-1")
    elif ending == "xlsx":
        excel(path, map=rows)
    else:
        ods(path, rows)
    found = read_annotation(path)
    assert labels(found) == EXPECTED
    (only,) = found.maps.values()
    cell_lines = {row.metadata["cell_line"] for row in only.wells.values() if row.metadata}
    assert cell_lines == ({"A549"} if kind == "below" else set())


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (16, 24), (32, 48)])
def test_plates_of_all_formats(tmp_path: Path, rows: int, columns: int) -> None:
    cells = [[f"c{row}x{column}" for column in range(columns)] for row in range(rows)]
    found = labels(read_annotation(write(tmp_path / "map.csv", grid(cells))))
    assert len(found) == rows * columns
    assert found[format_well(rows, columns)] == f"c{rows - 1}x{columns - 1}"


NAMES = st.sampled_from(
    ["", "DMSO", "taxol", "AMG 900", "FK-866", "0012", "NA", "empty", "a + b", "2-Mar"]
)
BLOCKS = {
    "Compound": NAMES,
    "Dose (nM)": st.sampled_from(["", "0.5", "10", "0,25", "5 + 1"]),
    "siRNA": st.sampled_from(["", "siNF1", "siCTRL"]),
    "Cell line": st.sampled_from(["", "U2OS", "A549"]),
    "Plated by": st.sampled_from(["", "Jo", "NA"]),
}


@given(st.integers(2, 4), st.integers(3, 5), st.data())
def test_a_grid_and_its_long_form_give_the_same_wells(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, data: st.DataObject
) -> None:
    titles = ["Compound", *data.draw(st.sets(st.sampled_from(list(BLOCKS)[1:])))]
    wells = [(row, column) for row in range(rows) for column in range(columns)]
    cells = {title: {well: data.draw(BLOCKS[title]) for well in wells} for title in titles}
    folder = tmp_path_factory.mktemp("maps")
    drawn_map: list[list[Any]] = []
    for title, block in cells.items():
        body = [[block[row, column] for column in range(columns)] for row in range(rows)]
        drawn_map += [[title, *[""] * columns], *grid(body)]
    long = [["Well", *titles]]
    long += [
        [format_well(well[0] + 1, well[1] + 1), *(cells[title][well] for title in titles)]
        for well in wells
    ]
    found = [
        read_annotation(write(folder / name, table, mark))
        for name, table, mark in (("map.csv", drawn_map, ";"), ("map.tsv", long, "\t"))
    ]
    (a,), (b,) = (item.maps.values() for item in found)
    said = [{at: row[2:] for at, row in item.wells.items()} for item in (a, b)]
    assert said[0] == said[1]
    refused = [sorted(issue.detail for _, issue in item.issues) for item in found]
    assert refused[0] == refused[1]
    assert len(a.wells) + len(refused[0]) == len(wells)


@pytest.mark.parametrize(
    "header",
    [
        "Well,Compound,Dose (uM)",
        "Position;Treatment;Concentration [µM]",
        "well_position\tpert_iname\tConc_uM",
        "Well,Drug name,Conc. / uM",
        "Destination Well,Compound,dose_um",
        "Well,Compound,Concentration (micromolar)",
        "Metadata_Well,Metadata_compound,Metadata_mmoles_per_liter",
        "Kavität;Substanz;Dosis [µM]",
        "Well-Position;Verbindung;Konzentration (µM)",
        "Puits;Composé;Concentration (µM)",
        "Pocillo;Compuesto;Concentración µM",
    ],
)
def test_headers_that_people_use(tmp_path: Path, header: str) -> None:
    mark = next(mark for mark in "\t;," if mark in header)
    rows = [header.split(mark), ["A1", "taxol", "0.5"], ["A2", "DMSO", ""]]
    path = write(tmp_path / "map.csv", rows, mark, "latin-1")
    assert labels(read_annotation(path)) == {"A01": "taxol 0.5 uM", "A02": "DMSO"}


def test_row_and_column_title_rows_and_a_column_of_units(tmp_path: Path) -> None:
    rows = [
        ["Screen of 12.03.2026"],
        [],
        ["Row", "Column", "Compound", "Dose", "Unit", "Control", "Time (h)", "Operator"],
        ["B", "2", "taxol", "5000", "nM", "positive control", "48", "Jo"],
        ["b", "03", "DMSO", "0", "nM", "trt", "48", "Jo"],
    ]
    found = read_annotation(write(tmp_path / "map.tsv", rows, "\t"))
    assert labels(found) == {"B02": "taxol 5 uM", "B03": "DMSO"}
    taxol, dmso = record(found, 2, 2), record(found, 2, 3)
    assert (taxol.control, taxol.dose_original) == (Control.POSITIVE, "5000 nM")
    assert (dmso.control, dmso.treated) == (None, True)
    (only,) = found.maps.values()
    assert only.wells[2, 2].metadata == {"time_point": "48 h", "Operator": "Jo"}
    assert any("Screen of 12.03.2026" in note for note in found.notes)


def test_combinations_and_genotypes_with_sirna(tmp_path: Path) -> None:
    rows = [
        ["Well", "Compound 1", "Dose 1 (uM)", "Compound 2", "Dose 2 (nM)"],
        ["A1", "taxol", "1", "noco", "50"],
        ["A2", "taxol", "2", "", ""],
    ]
    found = read_annotation(write(tmp_path / "combi.csv", rows))
    assert labels(found) == {"A01": "taxol 1 uM + noco 0.05 uM", "A02": "taxol 2 uM"}

    rows = [
        ["WellRow", "WellCol", "well_position", "gene_name", "genotype", "siRNA", "Concentration"],
        ["B", "2", "B2", "NF1", "WT", "None", "0"],
        ["B", "3", "B3", "NF1", "WT", "NF1 Target 1", "0.01"],
        ["B", "4", "B4", "NF1", "Null", "Scramble", "5"],
    ]
    path = write(tmp_path / "sirna.csv", rows)
    found = read_annotation(path)
    (only,) = found.maps.values()
    assert [
        treatment
        and (treatment.control, [(part.kind.value, part.pert_iname) for part in treatment.parts])
        for treatment in (row.record for row in only.wells.values())
    ] == [
        (Control.NEGATIVE, [("genotype", "NF1 WT")]),
        (None, [("sirna", "NF1 Target 1"), ("genotype", "NF1 WT")]),
        (None, [("sirna", "Scramble"), ("genotype", "NF1 Null")]),
    ]
    asked = read_annotation(path, controls=(("scramble", "negative"),))
    assert record(asked, 2, 4).control is Control.NEGATIVE
    assert record(asked, 2, 3).control is None


@pytest.mark.parametrize("word", ["", "-", "None", "NONE", "na", "N/a", "NULL", "NaT", "nAn"])
def test_a_blank_is_not_known_unless_it_is_said(tmp_path: Path, word: str) -> None:
    path = write(
        tmp_path / "map.csv", [["well_position", "broad_sample"], ["A1", word], ["A2", "taxol"]]
    )
    found = read_annotation(path)
    assert labels(found)["A01"] is None
    (note,) = notes_on_wells(found.maps["map"], {})
    assert note == (
        "map.csv is blank for these wells, so their treatment is not known: A01. "
        "To say what they got: --blank DMSO or --blank untreated"
    )
    for blank, kind in (("DMSO", PerturbationKind.COMPOUND), ("untreated", PerturbationKind.NONE)):
        said = record(read_annotation(path, blank=blank), 1, 1)
        assert (said.pert_iname, said.kind) == (blank, kind)
    broad = write(
        tmp_path / "broad.csv",
        [["well_position", "broad_sample", "solvent"], ["A1", word, "DMSO"], ["A2", "x1", "DMSO"]],
    )
    assert labels(read_annotation(broad))["A01"] == "DMSO"


def test_empty_is_a_well_without_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "map.csv", [["Well", "Compound"], ["A1", "empty"], ["A2", "taxol"]])
    found = read_annotation(path, blank="DMSO")
    assert labels(found) == {"A01": None, "A02": "taxol"}
    assert [row.metadata for row in found.maps["map"].wells.values()] == [{"content": "empty"}, {}]


def xls(path: Path, rows: Rows) -> Path:
    """Write the least that Excel 97 would call a workbook: one sheet of texts and numbers."""

    def item(kind: int, data: bytes = b"") -> bytes:
        return struct.pack("<HH", kind, len(data)) + data

    def begin(what: int) -> bytes:
        return item(0x809, struct.pack("<HHQI", 0x600, what, 0, 0))

    sheet = begin(0x10)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            at = struct.pack("<HHH", row, column, 0)
            if isinstance(cell, float):
                sheet += item(0x203, at + struct.pack("<d", cell))
            elif cell == "#N/A":
                sheet += item(0x205, at + b"\x2a\x01")
            else:
                sheet += item(
                    0x204, at + struct.pack("<HB", len(cell), 1) + cell.encode("utf-16-le")
                )
    offset = len(begin(5)) + 4 + 6 + 2 + 3 + 4
    book = begin(5) + item(0x85, struct.pack("<IHH", offset, 0, 3) + b"map") + item(0xA)
    stream = (book + sheet + item(0xA)).ljust(4096, b"\0")
    assert len(book) == offset
    sectors = [0xFFFFFFFD, 0xFFFFFFFE, *range(3, 10), 0xFFFFFFFE]  # the table itself, the folder
    table = struct.pack("<128I", *sectors, *[0xFFFFFFFF] * (128 - len(sectors)))
    head = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(16)
    head += struct.pack(
        "<5H6x9I", 0x3E, 3, 0xFFFE, 9, 6, 0, 1, 1, 0, 4096, 0xFFFFFFFE, 0, 0xFFFFFFFE, 0
    )
    head += struct.pack("<109I", 0, *[0xFFFFFFFF] * 108)
    folder = b""
    for name, kind, child, start in (
        ("Root Entry", 5, 1, 0xFFFFFFFE),
        ("Workbook", 2, 0xFFFFFFFF, 2),
    ):
        text = f"{name}\0".encode("utf-16-le")
        folder += text.ljust(64, b"\0")
        folder += struct.pack(
            "<HBB3I36xIQ", len(text), kind, 1, 0xFFFFFFFF, 0xFFFFFFFF, child, start, 4096
        )
    path.write_bytes(head + table + folder.ljust(512, b"\0") + stream)
    return path


def test_a_workbook_of_excel_97(tmp_path: Path) -> None:
    rows = [["Well", "Compound", "Dose (uM)"], ["A1", "taxol", 0.5], ["A2", "DMSO", ""]]
    found = read_annotation(xls(tmp_path / "map.xls", rows))
    assert labels(found) == {"A01": "taxol 0.5 uM", "A02": "DMSO"}
    with pytest.raises(BadTableError, match="an error of Excel in row 4, column 2 of a sheet"):
        read_annotation(xls(tmp_path / "map.xls", [*rows, ["A3", "#N/A"]]))


@pytest.mark.parametrize("ending", ["csv", "xlsx", "ods"])
def test_errors_and_dates_of_excel_are_no_treatments(tmp_path: Path, ending: str) -> None:
    head = ["plate_map_name", "well_position", "pert_iname", "Dose (uM)"]
    cells = ["taxol", "#N/A", "2-Mar", "02. Sep", "Dec-01", ""]
    rows = [["map", f"A{number}", cell, ""] for number, cell in enumerate(cells, 1)]
    rows += [["map", "A7", "noco", "#N/A"], ["map", "A8", "DMSO", "#N/A"]]
    path = tmp_path / f"map.{ending}"
    if ending == "ods":
        ods(path, [head, *rows])
    elif ending == "csv":
        write(path, [head, *rows])
    else:
        # As Excel writes a formula that has failed, and a name that it made a date of.
        xlsxwriter = pytest.importorskip("xlsxwriter")
        book = xlsxwriter.Workbook(str(path))
        sheet = book.add_worksheet("map")
        for at, row in enumerate([head, *rows]):
            sheet.write_row(at, 0, row)
        for at, column in ((2, 2), (7, 3), (8, 3)):
            sheet.write_formula(at, column, "=NA()", None, "#N/A")
        sheet.write_datetime(3, 2, date(2026, 3, 2), book.add_format({"num_format": "d-mmm"}))
        book.close()
    found = read_annotation(path, blank="DMSO")
    assert labels(found) == {
        "A01": "taxol",
        **dict.fromkeys(["A02", "A03", "A04", "A05"]),
        "A06": "DMSO",
        "A07": None,
        "A08": "DMSO",
    }
    dates, error, blank = sorted(notes_on_wells(found.maps["map"], {}))
    assert "is blank for these wells" in blank
    assert (
        "an error of Excel (#N/A) for these wells, so their treatment is not known: A02, A07"
        in error
    )
    assert "has a date in place of a name (" in dates
    assert "A03, A04, A05. Excel makes dates of names like MARCH2" in dates


def test_columns_that_a_user_names(tmp_path: Path) -> None:
    path = write(tmp_path / "map.csv", [["Loc", "What", "Menge [nM]"], ["A1", "taxol", "5"]], ";")
    with pytest.raises(BadTableError, match=r"I do not recognise .* yours has Loc, What, Menge"):
        read_annotation(path)
    named = (("well", "Loc"), ("treatment", "what"), ("dose", "Menge [nM]"))
    assert labels(read_annotation(path, columns=named)) == {"A01": "taxol 0.005 uM"}
    for wrong in (("well", "Lok"), ("wel", "Loc")):
        with pytest.raises(UnknownNameError, match=r"Loc|well"):
            read_annotation(path, columns=(wrong,))


def test_a_map_that_names_its_plates(tmp_path: Path) -> None:
    rows = [["Plate", "Well", "Compound"], ["P1", "A1", "taxol"], ["P2", "A1", "noco"]]
    found = read_annotation(write(tmp_path / "map.csv", rows))
    assert found.barcodes == {"P1": "P1", "P2": "P2"}
    plate_map = found.map_of("P2")
    assert plate_map is not None
    treatment = plate_map.wells[1, 1].record
    assert treatment is not None
    assert treatment.pert_iname == "noco"


def test_sheets(tmp_path: Path) -> None:
    drawn = grid(COMPOUNDS)
    path = excel(tmp_path / "map.xlsx", Notes=[["hello", "there"]], Map=drawn)
    found = read_annotation(path)
    assert labels(found)["A02"] == "taxol"
    assert "sheet 'Map' is read; 'Notes' has no plate map" in found.notes[0]
    with pytest.raises(BadTableError, match=r"recognise sheet Notes .*--sheet .Map."):
        read_annotation(path, sheet="Notes")
    with pytest.raises(UnknownNameError, match="Nope"):
        read_annotation(path, sheet="Nope")
    two = excel(tmp_path / "two.xlsx", A=drawn, B=drawn)
    with pytest.raises(BadTableError, match=r"'A' and 'B'. Choose one with --sheet"):
        read_annotation(two)
    assert labels(read_annotation(two, sheet="B"))["A02"] == "taxol"
    shifted = [["", 1, 2, 3], ["", "x", "x", "x"], ["A", "x", "x", "x"]]
    both = excel(tmp_path / "both.xlsx", Old=shifted, Map=drawn)
    with pytest.raises(BadTableError, match=r"Sheet 'Old' of both.xlsx: Line 2 .*--sheet"):
        read_annotation(both)
    text = write(tmp_path / "map.csv", drawn)
    with pytest.raises(UserInputError, match="without sheets"):
        read_annotation(text, sheet="A")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["", 1, 2, 3], ["A", "x", "x", "x"], ["B", "", "", ""], ["D", "x", "", ""]],
            "row D foll",
        ),
        ([["", 1, 2, 3, ""], ["A", "x", "x", "x", "y"], ["B", "", "", "", ""]], "Has the map shif"),
        ([["Well", "Vendor"], ["A1", "x"]], "I do not recognise .* yours has Well, Vendor"),
        (
            [["", 1, 2, 3], ["", "x", "x", "x"], ["A", "x", "x", "x"], ["B", "x", "x", "x"]],
            "Line 2 has no letter, and the row A is below it",
        ),
        (
            [["Well", "Drug"], ["A1-1", "x"], ["B1-1", "y"]],
            "All 2 rows of map.csv are refused .not a well.*line 2: 'A1-1' is not a well",
        ),
    ],
)
def test_maps_that_cannot_be_right(tmp_path: Path, rows: Rows, message: str) -> None:
    with pytest.raises(BadTableError, match=message):
        read_annotation(write(tmp_path / "map.csv", rows))


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [
        ["Well", "Row", "Column", "Compound", "Dose (uM)"],
        ["1A", "", "", "taxol", "1"],
        ["A1", "A", "2", "taxol", "1"],
        ["", "", "", "taxol", "1"],
        ["A3", "", "", "taxol", "high"],
        ["A4", "", "", "taxol", "1,000"],
        ["", "", "", "", ""],
    ]
    found = read_annotation(write(tmp_path / "map.csv", rows, ";"))
    assert [(refusal.line, refusal.reason) for _, refusal in found.issues] == [
        (2, "not a well"),
        (3, "well and row or column disagree"),
        (4, "not a well"),
        (5, "not a dose"),
        (6, "not a dose"),
    ]


def test_a_gene_table_of_jump_needs_no_new_names(tmp_path: Path) -> None:
    table = tmp_path / "orf.csv"
    table.write_text(
        "Metadata_JCP2022,Metadata_broad_sample,Metadata_Name,Metadata_Symbol,Metadata_pert_type\n"
        "JCP2022_900002,ccsbBroad304_00001,ORF1,NAT2,trt\n"
        "JCP2022_915131,ccsbBroad304_99994,ORF2,LacZ,negcon\n"
    )
    rows = [["plate_map_name", "well_position", "broad_sample"]]
    rows += [
        ["m", "A01", "ccsbBroad304_00001"],
        ["m", "A02", "ccsbBroad304_99994"],
        ["m", "A03", ""],
    ]
    found = read_annotation(write(tmp_path / "map.txt", rows, "\t"), [table])
    assert [
        treatment and (treatment.kind.value, treatment.pert_iname, treatment.control)
        for treatment in (row.record for row in found.maps["m"].wells.values())
    ] == [("orf", "NAT2", None), ("orf", "LacZ", Control.NEGATIVE), None]


@pytest.mark.parametrize(
    ("text", "unit", "dose"),
    [
        ("0,5", "uM", (0.5, "uM")),
        ("10 µM", None, (10.0, "uM")),
        ("1e-3", "M", (0.001, "M")),
        (".5", None, (0.5, None)),
        ("5 nM", "uM", (5.0, "nM")),
    ],
)
def test_doses_as_people_write_them(
    text: str, unit: str | None, dose: tuple[float, str | None]
) -> None:
    assert read_dose(text, unit) == dose


@pytest.mark.parametrize("text", ["high", "1,000", "1.000,5", "-1", ""])
def test_what_is_no_dose(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        read_dose(text)


def test_names_with_a_dose_in_them() -> None:
    assert dose_in_name("taxol 10 µM") == ("taxol", "10 uM")
    assert dose_in_name("DMSO 0.1%") == ("DMSO", "0.1 %")
    assert dose_in_name("AMG 900") == ("AMG 900", None)


def test_headers() -> None:
    dose = header_of("Dose 2 [nM]")
    assert dose is not None
    assert (dose.role, dose.number, dose.unit) == ("dose", 2, "nM")
    assert header_of("Vendor") is None
    words = {
        "well": "Kavität Well-Position Puits Pocillo",
        "treatment": "Substanz Verbindung Composé Compuesto",
        "dose": "Dosis Konzentration Concentración Dose",
        "cell_line": "Zelllinie Zelltyp",
        "plate": "Platte Plaque Placa",
        "control": "Kontrolle Contrôle Control",
        "unit": "Einheit Unité Unidad",
    }
    for role, headers in words.items():
        found = map(header_of, headers.split())
        assert {header and header.role for header in found} == {role}


@pytest.mark.real
def test_the_small_cases() -> None:
    folder = real_data("nf1_platemaps").parent.parent / "cases" / "platemaps"
    if not folder.is_dir():
        pytest.skip("no cases here")
    wells = {"B02": "DMSO", "C02": "taxol", "D02": "AMG900", "E02": "FK-866"}
    for name in ("grid.xlsx", "grid_with_title.csv", "names_only.csv"):
        found = labels(read_annotation(folder / name))
        assert {well: found[well] for well in wells} == wells
    for name in ("long.xlsx", "long_german_excel.csv"):
        found = labels(read_annotation(folder / name))
        assert (found["C02"], found["D02"]) == ("taxol 0.5 uM", "AMG900 1.25 uM")


def test_a_well_of_several_rows_is_not_the_first_of_them(tmp_path: Path) -> None:
    rows = [
        ["Destination Well", "Compound"],
        *(["A01", "DMSO"], ["A01", "taxol"], ["A02", "DMSO"], ["A02", "DMSO"]),
    ]
    found = read_annotation(write(tmp_path / "picks.csv", rows))
    assert labels(found) == {"A02": "DMSO"}
    assert [(issue.line, issue.reason) for _, issue in found.issues] == [
        *((line, "well twice") for line in (2, 3, 5)),
    ]
    assert "Compound 1 and Compound 2" in found.issues[0][1].detail


def test_a_dose_in_a_name_counts_where_the_column_of_doses_is_blank(tmp_path: Path) -> None:
    rows = [["Well", "Compound", "Dose (uM)"], ["A01", "DMSO 0.1%", ""], ["A02", "x 10 nM", ""]]
    found = read_annotation(write(tmp_path / "m.csv", rows)).maps["m"]
    records = [row.record for row in found.wells.values() if row.record]
    assert [record.label for record in records] == ["DMSO 0.1 %", "x 0.01 uM"]
    assert records[0].control is Control.NEGATIVE


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("Vehicle control", Control.NEGATIVE),
        ("control (negative)", Control.NEGATIVE),
        ("ctrl_pos", Control.POSITIVE),
        ("trt_poscon", Control.POSITIVE),
        ("Negativkontrolle", Control.NEGATIVE),
        ("témoin négatif", Control.NEGATIVE),
        ("control positivo", Control.POSITIVE),
    ],
)
def test_words_for_controls(text: str, control: Control) -> None:
    assert read_control(text) == (True, control)
    assert read_control("non-negative") == read_control("vehicle + drug") == (False, None)


def test_a_title_above_unknown_headers_is_not_taken_for_the_header(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    lines = ("Messplatte März;;", "Pozzetto;Sostanza;Quantità [µM]", "A01;taxol;0,5")
    path.write_bytes("\r\n".join(lines).encode("latin-1"))
    with pytest.raises(BadTableError, match=r"yours has Pozzetto, Sostanza, Quantità \[µM\]\."):
        detect(path)
    with pytest.raises(BadTableError, match=r"yours has Pozzetto, Sostanza, Quantità \[µM\]\."):
        map_table(path)
    names = (("well", "Pozzetto"), ("treatment", "Sostanza"), ("dose", "Quantità [µM]"))
    found = record(read_annotation(path, columns=names), 1, 1)
    assert (found.pert_iname, found.dose, found.unit) == ("taxol", 0.5, "uM")


def titled(title: str, *rows: Sequence[str]) -> list[Sequence[Any]]:
    return [[title], *grid(rows), []]


@pytest.mark.parametrize("unit", ["", " (nM)"])
def test_each_block_of_doses_is_of_its_block_of_compounds(tmp_path: Path, unit: str) -> None:
    rows = [
        *titled("Compound", ["taxol", "DMSO", "taxol"], ["", "", "taxol"]),
        *titled(f"Dose{unit}", ["1", "", "2"], ["", "", "3"]),
        *titled("Compound", ["nocodazole", "nocodazole", ""], ["", "", ""]),
        *titled(f"Dose{unit}", ["10", "20", ""], ["", "", ""]),
    ]
    found = labels(read_annotation(write(tmp_path / "m.csv", rows)))
    shown = {
        "A01": ("taxol", "1", "nocodazole", "10"),
        "A02": ("DMSO", "", "nocodazole", "20"),
        "A03": ("taxol", "2"),
        "B03": ("taxol", "3"),
    }
    for well, texts in shown.items():
        doses = [
            f"{name} {float(dose) / 1000:g} uM" if unit and dose else f"{name} {dose}".strip()
            for name, dose in zip(texts[::2], texts[1::2], strict=True)
        ]
        assert found[well] == " + ".join(doses)
    assert found["B01"] is None


def test_doses_of_a_compound_and_of_its_sirna(tmp_path: Path) -> None:
    rows = [
        *titled("Compound", ["taxol"] * 3, ["DMSO"] * 3),
        *titled("siRNA", ["siNF1"] * 3, ["siCTRL"] * 3),
        *titled("Dose (uM)", ["5"] * 3, [""] * 3),
        *titled("Dose (nM)", ["20"] * 3, ["20"] * 3),
    ]
    found = labels(read_annotation(write(tmp_path / "m.csv", rows)))
    assert found["A01"] == "taxol 5 uM + siNF1 0.02 uM"
    assert found["B01"] == "DMSO + siCTRL 0.02 uM"


@pytest.mark.parametrize("title", ["Screen of the cell line U2OS", "Plate 3 - 24 h time point"])
def test_a_title_that_tells_of_cells_hides_no_treatments(tmp_path: Path, title: str) -> None:
    rows = [*titled(title, ["taxol"] * 3, ["DMSO"] * 3), *titled("Dose uM", ["5"] * 3, ["0"] * 3)]
    found = labels(read_annotation(write(tmp_path / "m.csv", rows)))
    assert (found["A01"], found["B01"]) == ("taxol 5 uM", "DMSO")
    # Where a grid is called so, it is so.
    only = read_annotation(
        write(tmp_path / "m.csv", titled("Cell line", ["U2OS"] * 3, ["A549"] * 3))
    )
    assert only.maps["m"].wells[1, 1].metadata == {"cell_line": "U2OS"}


def test_grids_of_one_title_do_not_replace_each_other(tmp_path: Path) -> None:
    grids = [titled("Library", [name] * 3, [name] * 3) for name in ("taxol", "first", "second")]
    found = read_annotation(write(tmp_path / "m.csv", [row for grid in grids for row in grid]))
    assert labels(found)["A01"] == "taxol"
    assert set(found.maps["m"].wells[1, 1].metadata.values()) == {"first", "second"}


def test_columns_that_no_treatment_needs_are_kept(tmp_path: Path) -> None:
    header = "Well,Compound,Dose 1 (uM),Replicate 1,Target 2,Modality,Control,Gene,Target"
    cells = "A01,EGF,5,1,TUBB,protein,yes,EGFR,ERBB"
    rows = [header.split(","), cells.split(",")]
    found = read_annotation(write(tmp_path / "m.csv", rows)).maps["m"]
    assert found.wells[1, 1].metadata == {
        "Dose 1 (uM)": "5",
        "Replicate 1": "1",
        "Target 2": "TUBB",
        "Modality": "protein",
        "Control": "yes",
        "Gene": "EGFR",
    }


def test_a_dose_in_the_header_is_the_dose_of_all_but_dmso(tmp_path: Path) -> None:
    rows = [["Well", "Compound (10 \u00b5M)"], ["A01", "taxol"], ["A02", "DMSO"]]
    found = labels(read_annotation(write(tmp_path / "m.csv", rows)))
    assert found == {"A01": "taxol 10 uM", "A02": "DMSO"}


def test_rows_and_columns_as_pandas_writes_them(tmp_path: Path) -> None:
    rows = [["Row", "Column", "Compound"], ["A", "1.0", "taxol"], ["2", "12.0", "x"]]
    assert labels(read_annotation(write(tmp_path / "m.csv", rows))) == {"A01": "taxol", "B12": "x"}


def test_dmso_in_both_columns_of_a_combination_is_a_negative_control(tmp_path: Path) -> None:
    rows = [["Well", "Compound 1", "Compound 2"], ["A01", "DMSO", "DMSO"], ["A02", "x", "DMSO"]]
    found = read_annotation(write(tmp_path / "m.csv", rows))
    assert labels(found) == {"A01": "DMSO", "A02": "x + DMSO"}
    controls = [row.record and row.record.control for row in found.maps["m"].wells.values()]
    assert controls == [Control.NEGATIVE, None]
    assert not any("codes" in note for note in found.notes)


def test_what_a_table_calls_a_control_is_none_in_a_combination(tmp_path: Path) -> None:
    head = ["Well", "Compound 1", "Compound 2", "Well role"]
    rows = [["A01", "DMSO", "x", ""], ["A02", "y", "x", ""], ["A03", "y", "", ""]]
    rows += [["A04", "y", "x", "poscon"], ["A05", "DMSO", "", ""]]
    platemap = write(tmp_path / "m.csv", [head, *rows])
    described = [["pert_iname", "control_type"], ["y", "negcon"], ["DMSO", "negcon"], ["x", ""]]
    found = read_annotation(platemap, [write(tmp_path / "compounds.csv", described)])
    rows = found.maps["m"].wells.values()
    controls = [row.record and row.record.control for row in rows]
    assert controls == [None, None, Control.NEGATIVE, Control.POSITIVE, Control.NEGATIVE]


@pytest.mark.parametrize("text", ["1:1000", "10-20", "10^-6", "1 x 10-6 M", "10/20", "5 uM 2%"])
def test_what_is_no_number_with_a_unit_is_no_dose(text: str) -> None:
    with pytest.raises(ValueError, match="no number"):
        read_dose(text, "uM")


def test_a_point_beside_decimal_commas_may_separate_thousands(tmp_path: Path) -> None:
    head = ["Well", "Compound", "Dose (nM)"]
    rows = [head, ["A01", "taxol", "1.000"], ["A02", "taxol", "0,5"], ["A03", "x", "2.5"]]
    found = read_annotation(write(tmp_path / "m.csv", rows, ";"))
    assert labels(found) == {"A02": "taxol 0.0005 uM", "A03": "x 0.0025 uM"}
    assert [(issue.line, issue.reason) for _, issue in found.issues] == [(2, "not a dose")]
    grids = [
        *titled("Compound", ["x"] * 3, ["y"] * 3),
        *titled("Dose", ["1,5", "1.000", "2"], [""] * 3),
    ]
    drawn = read_annotation(write(tmp_path / "grid.csv", grids, ";"))
    assert [drawn.maps["grid"].wells.get((1, at)) is None for at in (1, 2, 3)] == [0, 1, 0]
    # Where no other has a comma it is a decimal point.
    only = read_annotation(write(tmp_path / "m.csv", rows[:2], ";"))
    assert labels(only) == {"A01": "taxol 0.001 uM"}


def test_a_grid_called_dose_with_words_in_it_is_metadata(tmp_path: Path) -> None:
    rows = [*titled("Compound", ["x"] * 3, ["y"] * 3), *titled("Dose", ["low"] * 3, ["high"] * 3)]
    found = read_annotation(write(tmp_path / "m.csv", rows))
    assert (labels(found)["A01"], found.issues) == ("x", ())
    assert found.maps["m"].wells[1, 1].metadata == {"block 2 Dose": "low"}


def test_a_grid_may_have_its_letters_on_both_sides(tmp_path: Path) -> None:
    rows = [["", "1", "2", "3", ""], ["A", "x", "y", "z", "A"], ["B", "x", "y", "z", "B"]]
    assert labels(read_annotation(write(tmp_path / "m.csv", rows)))["B03"] == "z"
    rows[2][4] = "C"
    with pytest.raises(BadTableError, match="Has the map shifted"):
        read_annotation(write(tmp_path / "m.csv", rows))
