from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from realdata import real_data

from cellstore.enums import Control, PerturbationKind
from cellstore.errors import BadTableError, CellstoreError
from cellstore.io.layouts import table_layouts
from cellstore.io.platemaps import read_annotation
from cellstore.io.tables import MISSING, Refusal, TextTable, open_table
from cellstore.io.treatments import (
    TreatmentRecord,
    TreatmentRow,
    completed,
    jump_plates,
    read_aliases,
    treatment_of,
    treatment_rows,
    without_aliases,
)


def table(folder: Path, text: str) -> TextTable:
    path = folder / "table.csv"
    path.write_text(text)
    return open_table(path)


def records(rows: Iterable[TreatmentRow | Refusal]) -> list[TreatmentRecord | None]:
    return [row[1] for row in rows if not isinstance(row, Refusal)]


def reasons(rows: Iterable[object]) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows if isinstance(row, Refusal)]


@pytest.mark.parametrize(
    ("columns", "layouts"),
    [
        ("well_position broad_sample solvent", ["platemap"]),
        ("WellRow WellCol well_position gene_name genotype", ["platemap"]),
        ("broad_sample pert_iname smiles", ["treatment-table"]),
        ("broad_sample gene control_type", ["treatment-table"]),
        # A table of a split names samples and targets, too; it must not rename a screen.
        ("Metadata_broad_sample Metadata_target", []),
        ("Metadata_broad_sample pert_iname Metadata_split", []),
        ("broad_sample gene Metadata_Well", ["platemap"]),
        ("broad_sample gene Metadata_Well split", []),
        ("Compound Target", ["treatment-table"]),
        ("Metadata_JCP2022 Metadata_broad_sample Metadata_Symbol", ["treatment-table"]),
        ("broad_sample pert_iname FileName_OrigDNA", []),
        ("Metadata_Source Metadata_Batch Metadata_Plate Metadata_PlateType", ["jump-plates"]),
        ("Metadata_Batch Metadata_Plate Metadata_Well", []),
        ("Metadata_JCP2022 Metadata_NCBI_Gene_ID Metadata_Symbol", ["treatment-table"]),
        (
            "Metadata_JCP2022 Metadata_pert_type Metadata_Name Metadata_modality",
            ["treatment-table"],
        ),
        ("Assay_Plate_Barcode Plate_Map_Name", []),
        ("ImageNumber ObjectNumber AreaShape_Area", []),
    ],
)
def test_the_layout_is_told_from_the_columns(columns: str, layouts: list[str]) -> None:
    assert table_layouts(columns.split())[0] == layouts


def test_kinds_of_treatment_tables(tmp_path: Path) -> None:
    kinds = {
        "broad_sample,pert_iname\nx,y\n": PerturbationKind.COMPOUND,
        "broad_sample,gene,InChIKey\nx,y,K\n": PerturbationKind.COMPOUND,
        "broad_sample,gene,target_sequence\nx,y,ACGT\n": PerturbationKind.CRISPR,
        "broad_sample,gene\nx,y\n": PerturbationKind.ORF,
    }
    for text, kind in kinds.items():
        (record,) = records(treatment_rows(table(tmp_path, text)))
        assert record is not None
        assert record.kind is kind


def test_only_dmso_may_have_no_sample(tmp_path: Path) -> None:
    text = "broad_sample,pert_iname,gene\n,DMSO,\n,taxol,\n,,\nBRD-1,,AURKA\nBRD-2,,\n"
    found = list(treatment_rows(table(tmp_path, text)))
    assert reasons(found) == [(3, "no broad_sample")]
    assert records(found) == [
        TreatmentRecord(PerturbationKind.COMPOUND, "DMSO", control=Control.NEGATIVE),
        None,
        TreatmentRecord(PerturbationKind.COMPOUND, "AURKA", target="AURKA", identifier="BRD-1"),
        TreatmentRecord(PerturbationKind.COMPOUND, "BRD-2", identifier="BRD-2"),
    ]


def test_combinations_are_the_same_in_every_table(tmp_path: Path) -> None:
    text = "Compound,Target,SMILES\ntaxol + noco,TUBB + TUBA1A,\na + b,,CC\nc + d,X,\n"
    text += "2-Mar,,\nx,1-Sep,\n"
    found = list(treatment_rows(table(tmp_path, text)))
    both, one = records(found)
    assert both is not None
    assert [(part.pert_iname, part.target) for part in both.parts] == [
        ("taxol", "TUBB"),
        ("noco", "TUBA1A"),
    ]
    assert one is not None
    assert (one.pert_iname, one.others) == ("a + b", ())  # a structure is of one sample
    assert reasons(found) == [(4, "not a target"), (5, "not a name"), (6, "not a name")]
    of_image = treatment_of({"Metadata_pert_iname": "taxol + noco", "Metadata_dose": "5 + 1"})
    assert of_image is not None
    assert of_image.label == "taxol 5 + noco 1"
    assert treatment_of({"Metadata_pert_iname": "Empty"}) is None


def test_plates_keep_their_text(tmp_path: Path) -> None:
    text = "Metadata_Plate,Metadata_Batch,Metadata_PlateType\n001,B1,ORF\n1053601756,NA,\n,B1,ORF\n"
    found = list(jump_plates(table(tmp_path, text)))
    assert found[:2] == [
        (2, ("001", "B1", {"PlateType": "ORF"})),
        (3, ("1053601756", None, {})),
    ]
    assert reasons(found) == [(4, "no plate")]


def test_reagents_without_a_gene_have_no_target(tmp_path: Path) -> None:
    text = (
        "Metadata_JCP2022,Metadata_NCBI_Gene_ID,Metadata_Symbol\n"
        "J1,,no-guide\nJ2,2,A2M\n,3,NAT1\nJ4,4,NA\n"
    )
    found = list(treatment_rows(table(tmp_path, text)))
    assert records(found) == [
        TreatmentRecord(PerturbationKind.CRISPR, "no-guide", identifier="J1"),
        TreatmentRecord(PerturbationKind.CRISPR, "A2M", target="A2M", identifier="J2"),
        TreatmentRecord(PerturbationKind.CRISPR, "J4", identifier="J4"),
    ]
    assert reasons(found) == [(4, "no JCP2022")]


def test_controls(tmp_path: Path) -> None:
    text = (
        "Metadata_JCP2022,Metadata_pert_type,Metadata_Name,Metadata_modality\n"
        "J1,poscon,PLK1,crispr\nJ2,empty,Empty,any\nJ3,poscon,x,light\n,trt,x,orf\n"
    )
    found = list(treatment_rows(table(tmp_path, text)))
    assert records(found) == [
        TreatmentRecord(PerturbationKind.CRISPR, "PLK1", control=Control.POSITIVE, identifier="J1"),
        None,  # a well without cells
    ]
    assert reasons(found) == [(4, "not a known kind"), (5, "no JCP2022")]


ME = TreatmentRecord(PerturbationKind.COMPOUND, "ME0328", target="PARP3", identifier="BRD-1")


def aliases(folder: Path, text: str) -> dict[str, str]:
    path = folder / "aliases.csv"
    path.write_text(text)
    return read_aliases(path)


def test_aliases_rename(tmp_path: Path) -> None:
    found = aliases(tmp_path, "alias,name\nME0328,ME-0328\nME 328,ME-0328\nx,x\n")
    renamed = without_aliases(ME, found)
    assert (renamed.pert_iname, renamed.target, renamed.identifier) == (
        "ME-0328",
        "PARP3",
        "BRD-1",
    )
    other = TreatmentRecord(PerturbationKind.COMPOUND, "x")
    assert without_aliases(other, found) is other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alias,other\na,b\n", "no column 'name'"),
        ("alias,name\na,b\na,c\n", "line 3: 'a' is 'b' already"),
        ("alias,name\na,\n", "line 2: both names are needed"),
        ("alias,name\na,b\nb,a\n", "'a', 'b' is an alias"),
        ("alias,name\na,b,c\n", "line 2: .*3 cells"),
    ],
)
def test_alias_tables_that_cannot_be_followed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadTableError, match=message):
        aliases(tmp_path, text)


CELL = st.one_of(
    st.sampled_from(
        ["", "NA", "nan", "BRD-1", "BRD-2", "DMSO", "dmso", "A1", "b2", "AF48", "a|b|a", "x" * 300]
    ),
    st.text(max_size=5),
)
COLUMNS = st.permutations(["broad_sample", "pert_iname", "gene", "well_position", "smiles"])


@given(COLUMNS, st.lists(st.lists(CELL, min_size=4, max_size=6), min_size=1, max_size=8))
def test_any_table_is_read_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], rows: list[list[str]]
) -> None:
    """Whatever is in the cells: each row is a treatment, an empty row, or refused."""
    path = tmp_path_factory.mktemp("any") / "table.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([columns, *rows])
    try:
        opened = open_table(path)
        read = list(opened.rows())
        found = list(treatment_rows(opened))
    except CellstoreError:
        return
    assert [row[0] for row in found] == [row[0] for row in read]
    for row in found:
        record = None if isinstance(row, Refusal) else row[1]
        if record is not None:
            assert record.identifier is not None or record.pert_iname.upper() == "DMSO"
            assert completed(record, record) == record
            assert not {"", "NA", "nan"} & {record.pert_iname, record.target, record.identifier}


@given(COLUMNS, st.lists(st.lists(CELL, min_size=5, max_size=5), min_size=1, max_size=8))
def test_no_row_of_a_plate_map_is_lost(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], rows: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "map.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([columns, *rows])
    (folder / "t.csv").write_text("broad_sample,pert_iname\nBRD-1,AMG900\n")
    try:
        read = list(open_table(path).rows())
        read = [
            row
            for row in read
            if isinstance(row, Refusal) or not {cell.strip() for cell in row.cells} <= MISSING
        ]
        found = read_annotation(path, [folder / "t.csv"])
    except CellstoreError:
        return
    (wells,) = found.maps.values()
    assert len(wells.wells) + len(found.issues) == len(read)


@pytest.mark.real
def test_the_plates_of_jump() -> None:
    """2,525 rows, as many barcodes, 149 batches: `zcat plate.csv.gz | cut -d, -f2 | sort -u`."""
    found = list(jump_plates(open_table(real_data("jump_datasets/plate.csv.gz"))))
    plates = {row[1][0]: row[1][1] for row in found if not isinstance(row, Refusal)}
    assert len(found) == len(plates) == 2525
    assert len(set(plates.values())) == 149
    assert "1053601756" in plates


@pytest.mark.real
def test_the_reagents_of_jump() -> None:
    """7,977 rows, two of them without a gene number."""
    found = records(treatment_rows(open_table(real_data("jump_datasets/crispr.csv.gz"))))
    assert len(found) == len({row.identifier for row in found if row}) == 7977
    assert [row.pert_iname for row in found if row and row.target is None] == [
        "no-guide",
        "non-targeting",
    ]


@pytest.mark.real
def test_the_controls_of_jump() -> None:
    """18 rows: 1 empty; of compounds 1 and 8, of CRISPR 2 and 1, of ORF 4 and 1 controls."""
    found = records(treatment_rows(open_table(real_data("jump_datasets/perturbation_control.csv"))))
    assert Counter((row.kind.value, row.control) for row in found if row) == {
        ("compound", Control.NEGATIVE): 1,
        ("compound", Control.POSITIVE): 8,
        ("crispr", Control.NEGATIVE): 2,
        ("crispr", Control.POSITIVE): 1,
        ("orf", Control.NEGATIVE): 4,
        ("orf", Control.POSITIVE): 1,
    }
