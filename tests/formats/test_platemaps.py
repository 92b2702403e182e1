from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from realdata import real_data

from cellstore.errors import BadTableError, UserInputError
from cellstore.formats.platemaps import PlateAnnotation, read_annotation
from cellstore.terms import Control, Perturbation

COMPOUNDS = (
    "broad_sample\tInChIKey\tpert_iname\tpubchem_cid\tgene\tcontrol_type\tsmiles\n"
    "BRD-1\tKEY-1\tAMG900\t11\tAURKA\tposcon_cp\tCC\n"
    "BRD-2\tKEY-2\tNAD+\tNA\tNA\t\tCO\n"
    "\tKEY-3\tDMSO\t679\t\tnegcon\tCS(=O)C\n"
)
ORFS = "broad_sample\tgene\tcontrol_type\nccsb-1\tKCNN1\t\n\tnothing\t\n"


def annotate(folder: Path, platemap: str, treatments: str = COMPOUNDS) -> PlateAnnotation:
    (folder / "map.txt").write_text("well_position\tbroad_sample\n" + platemap)
    (folder / "treatments.tsv").write_text(treatments)
    return read_annotation(folder / "map.txt", folder / "treatments.tsv")


def test_a_compound_well(tmp_path: Path) -> None:
    found = annotate(tmp_path, "A1\tBRD-1\n").for_well("any", 1, 1)
    assert found is not None
    assert (found.kind, found.pert_iname, found.target) == (
        Perturbation.COMPOUND,
        "AMG900",
        "AURKA",
    )
    assert (found.control, found.identifier) == (Control.POSITIVE, "BRD-1")
    assert (found.inchikey, found.smiles, found.pubchem_cid) == ("KEY-1", "CC", "11")


def test_na_is_missing_and_a_name_that_starts_so_is_not(tmp_path: Path) -> None:
    found = annotate(tmp_path, "A1\tBRD-2\n").for_well("any", 1, 1)
    assert found is not None
    assert (found.pert_iname, found.target, found.pubchem_cid) == ("NAD+", None, None)


@pytest.mark.parametrize("empty", ["", "NA"])
def test_an_empty_sample_is_dmso_in_a_compound_map(tmp_path: Path, empty: str) -> None:
    found = annotate(tmp_path, f"A1\t{empty}\n").for_well("any", 1, 1)
    assert found is not None
    assert (found.pert_iname, found.control, found.inchikey) == ("DMSO", Control.NEGATIVE, "KEY-3")


def test_an_empty_sample_is_dmso_also_where_the_table_has_none(tmp_path: Path) -> None:
    table = "broad_sample\tpert_iname\nBRD-1\tAMG900\n\tstray\n"
    annotation = annotate(tmp_path, "A1\t\n", table)
    found = annotation.for_well("any", 1, 1)
    assert found is not None
    assert (found.pert_iname, found.control) == ("DMSO", Control.NEGATIVE)
    assert [(i.refusal.line, i.refusal.reason) for i in annotation.issues] == [
        (3, "no broad_sample")
    ]


def test_an_empty_sample_is_an_empty_well_in_other_maps(tmp_path: Path) -> None:
    annotation = annotate(tmp_path, "A1\t\nA2\tccsb-1\n", ORFS)
    assert annotation.for_well("any", 1, 1) is None
    orf = annotation.for_well("any", 1, 2)
    assert orf is not None
    assert (orf.kind, orf.pert_iname, orf.target) == (Perturbation.ORF, "KCNN1", "KCNN1")


def test_what_cannot_be_used_is_listed_with_file_and_line(tmp_path: Path) -> None:
    again = "BRD-1\tKEY-1\tother\t11\tAURKA\t\tCC\n"
    annotation = annotate(
        tmp_path, "A1\tBRD-1\nA1\tBRD-2\nQ99\tBRD-1\nA3\tBRD-9\nA4\n", COMPOUNDS + again
    )
    assert [(i.path.name, i.refusal.line, i.refusal.reason) for i in annotation.issues] == [
        ("treatments.tsv", 5, "broad_sample twice"),
        ("map.txt", 3, "well twice"),
        ("map.txt", 4, "not a well"),
        ("map.txt", 5, "unknown broad_sample"),
        ("map.txt", 6, "wrong number of cells"),
    ]
    first = annotation.for_well("any", 1, 1)
    assert first is not None
    assert first.pert_iname == "AMG900"


def test_barcodes_choose_the_map_of_a_plate(tmp_path: Path) -> None:
    folder = tmp_path / "platemap"
    folder.mkdir()
    (folder / "one.txt").write_text("well_position\tbroad_sample\nA1\tBRD-1\n")
    (folder / "two.csv").write_text("plate_map_name,well_position,broad_sample\nsecond,A1,BRD-2\n")
    (tmp_path / "t.tsv").write_text(COMPOUNDS)
    with pytest.raises(BadTableError, match="2 plate maps"):
        read_annotation(folder, tmp_path / "t.tsv")
    (tmp_path / "barcode_platemap.csv").write_text(
        "Assay_Plate_Barcode,Plate_Map_Name\n001,one\n002,second\n003,third\n"
    )
    annotation = read_annotation(folder, tmp_path / "t.tsv")
    names = [
        found.pert_iname if (found := annotation.for_well(plate, 1, 1)) else None
        for plate in ("001", "002", "003", "004")
    ]
    assert names == ["AMG900", "NAD+", None, None]
    assert [annotation.knows(plate) for plate in ("001", "003")] == [True, False]
    assert [i.refusal.reason for i in annotation.issues] == ["no such plate map"]


def test_tables_that_are_no_annotation(tmp_path: Path) -> None:
    with pytest.raises(BadTableError, match="no column 'broad_sample'"):
        annotate(tmp_path, "A1\tBRD-1\n", "broad_id\tpert_iname\nx\ty\n")
    with pytest.raises(BadTableError, match="no column 'pert_iname'"):
        annotate(tmp_path, "A1\tBRD-1\n", "broad_sample\tname\nx\ty\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "treatments.tsv").write_text(COMPOUNDS)
    with pytest.raises(UserInputError, match="no plate map"):
        read_annotation(tmp_path / "empty", tmp_path / "treatments.tsv")


@pytest.mark.real
@pytest.mark.parametrize(
    ("kind", "roles", "issues"),
    [
        ("compound", {None: 260, Control.NEGATIVE: 64, Control.POSITIVE: 60}, 0),
        ("crispr", {None: 264, Control.NEGATIVE: 60, Control.POSITIVE: 60}, 0),
        ("orf", {None: 264, Control.NEGATIVE: 60, Control.POSITIVE: 60}, 1),
    ],
)
def test_the_target_plates_of_jump(
    kind: str, roles: dict[Control | None, int], issues: int
) -> None:
    tables = real_data("cpjump1/metadata")
    annotation = read_annotation(
        tables / f"platemaps/2020_11_04_CPJUMP1/platemap/JUMP-Target-1_{kind}_platemap.txt",
        tables / f"external_metadata/JUMP-Target-1_{kind}_metadata.tsv",
    )
    (wells,) = annotation.maps.values()
    assert len(wells) == 384
    assert Counter(well and well.control for well in wells.values()) == roles
    assert {well.kind.value for well in wells.values() if well} == {kind}
    assert len(annotation.issues) == issues
    assert annotation.for_well("BR00117006", 1, 1) is not None


@pytest.mark.real
@pytest.mark.parametrize("name", ["JUMP-Target-1_compound_metadata_targets.tsv"])
def test_other_spellings_of_the_target_column(name: str) -> None:
    tables = real_data("cpjump1/metadata")
    annotation = read_annotation(
        tables / "platemaps/2020_11_04_CPJUMP1/platemap/JUMP-Target-1_compound_platemap.txt",
        tables / "external_metadata" / name,
        tables / "platemaps/2020_11_04_CPJUMP1/barcode_platemap.csv",
    )
    well = annotation.for_well("BR00116991", 1, 1)
    assert well is not None
    assert (well.pert_iname, well.target) == ("gabapentin-enacarbil", "CACNB4")
    assert not annotation.knows("BR00117006")
    assert {issue.refusal.reason for issue in annotation.issues} == {"no such plate map"}
