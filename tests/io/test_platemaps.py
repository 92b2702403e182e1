from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from published_metadata import treatment_of_well
from realdata import real_data

from cellstore.enums import Control, PerturbationKind
from cellstore.errors import BadTableError, UserInputError
from cellstore.io.platemaps import (
    PlateAnnotation,
    notes_on_wells,
    read_annotation,
)
from cellstore.io.treatments import TreatmentRecord

COMPOUNDS = (
    "broad_sample\tInChIKey\tpert_iname\tpubchem_cid\tgene\tcontrol_type\tsmiles\n"
    "BRD-1\tKEY-1\tAMG900\t11\tAURKA\tposcon_cp\tCC\n"
    "BRD-2\tKEY-2\tNAD+\tNA\tNA\t\tCO\n"
    "\tKEY-3\tDMSO\t679\t\tnegcon\tCS(=O)C\n"
)
ORFS = "broad_sample\tgene\tcontrol_type\nccsb-1\tKCNN1\t\n\t\t\n"
HEAD = "plate_map_name\twell_position\tbroad_sample\n"
"""Of a map of the Broad Institute, where a blank is DMSO."""


def annotate(folder: Path, platemap: str, *tables: str) -> PlateAnnotation:
    rows = "".join(f"map\t{line}\n" for line in platemap.splitlines())
    (folder / "map.txt").write_text(HEAD + rows)
    paths = [folder / f"treatments{number}.tsv" for number in range(len(tables or (COMPOUNDS,)))]
    for path, text in zip(paths, tables or (COMPOUNDS,), strict=True):
        path.write_text(text)
    return read_annotation(folder / "map.txt", paths)


def well(annotation: PlateAnnotation, column: int = 1, plate: str = "any") -> TreatmentRecord:
    found = treatment_of_well(annotation, plate, 1, column)
    assert found is not None
    return found


def issues(annotation: PlateAnnotation) -> list[tuple[str, int, str]]:
    return [(path.name, refusal.line, refusal.reason) for path, refusal in annotation.issues]


def test_a_compound_well(tmp_path: Path) -> None:
    assert well(annotate(tmp_path, "A1\tBRD-1\n")) == TreatmentRecord(
        PerturbationKind.COMPOUND,
        "AMG900",
        target="AURKA",
        control=Control.POSITIVE,
        identifier="BRD-1",
        inchikey="KEY-1",
        smiles="CC",
        pubchem_cid="11",
    )


def test_na_is_missing_and_a_name_that_starts_so_is_not(tmp_path: Path) -> None:
    found = well(annotate(tmp_path, "A1\tBRD-2\n"))
    assert (found.pert_iname, found.target, found.pubchem_cid) == ("NAD+", None, None)


def test_missing_never_joins_missing(tmp_path: Path) -> None:
    table = "broad_sample\tpert_iname\nNA\tstray\nnan\tother\n\tthird\n"
    found = annotate(tmp_path, "A1\tNA\nA2\tNaN\nA3\t\n", table)
    assert {well(found, column).pert_iname for column in (1, 2, 3)} == {"DMSO"}
    assert issues(found) == [("treatments0.tsv", line, "no broad_sample") for line in (2, 3, 4)]


@pytest.mark.parametrize("empty", ["", "NA"])
def test_an_empty_sample_is_dmso_in_a_compound_map(tmp_path: Path, empty: str) -> None:
    found = well(annotate(tmp_path, f"A1\t{empty}\n"))
    assert (found.pert_iname, found.control, found.inchikey) == ("DMSO", Control.NEGATIVE, "KEY-3")


def test_an_empty_sample_with_a_dose_is_not_guessed_to_be_dmso(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    head = HEAD.replace("\n", "\tmmoles_per_liter\n")
    path.write_text(f"{head}map\tA1\t\t5\nmap\tA2\t\t0\nmap\tA3\tBRD-1\t5\n")
    found = read_annotation(path)
    assert treatment_of_well(found, "any", 1, 1) is None
    assert well(found, 2).control is Control.NEGATIVE
    note, _ = notes_on_wells(found.maps["map"], {})  # and that A02 is DMSO
    assert note.startswith("map.txt has a dose and no name (5) for these wells")
    asked = read_annotation(path, blank="DMSO")
    assert well(asked).control is Control.NEGATIVE


def test_an_empty_sample_is_an_empty_well_in_other_maps(tmp_path: Path) -> None:
    annotation = annotate(tmp_path, "A1\t\nA2\tccsb-1\n", ORFS)
    assert treatment_of_well(annotation, "any", 1, 1) is None
    orf = well(annotation, 2)
    assert (orf.kind, orf.pert_iname, orf.target) == (PerturbationKind.ORF, "KCNN1", "KCNN1")
    assert annotation.issues == ()


def mixed(folder: Path) -> Path:
    maps = folder / "platemap"
    maps.mkdir()
    (maps / "cp.txt").write_text(HEAD + "cp\tA1\tBRD-1\ncp\tA2\t\n")
    (maps / "orf.txt").write_text(HEAD + "orf\tA1\tccsb-1\norf\tA2\t\n")
    (folder / "barcode_platemap.csv").write_text(
        "Assay_Plate_Barcode,Plate_Map_Name\n001,cp\n1053601756,orf\n"
    )
    (folder / "cp.tsv").write_text(COMPOUNDS)
    (folder / "orf.tsv").write_text(ORFS)
    return maps


@pytest.mark.parametrize("order", [("cp.tsv", "orf.tsv"), ("orf.tsv", "cp.tsv")])
def test_each_map_of_a_mixed_folder_has_its_own_kind(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    found = read_annotation(mixed(tmp_path), [tmp_path / name for name in order])
    assert well(found, 1, "001").kind is PerturbationKind.COMPOUND
    assert well(found, 2, "001").pert_iname == "DMSO"
    assert well(found, 1, "1053601756").kind is PerturbationKind.ORF
    assert treatment_of_well(found, "1053601756", 1, 2) is None
    assert found.issues == ()


def test_a_map_of_empty_wells_alone_is_not_guessed_to_be_dmso(tmp_path: Path) -> None:
    annotation = annotate(tmp_path, "A1\t\n", COMPOUNDS, ORFS)
    assert treatment_of_well(annotation, "any", 1, 1) is None


def test_of_two_tables_the_first_counts_and_the_second_fills_its_gaps(tmp_path: Path) -> None:
    more = "broad_sample\tpert_iname\ttarget\tsmiles\nBRD-1\tAMG\tAURKB\tO\nBRD-2\tx\tT\t\n"
    found = annotate(tmp_path, "A1\tBRD-1\nA2\tBRD-2\n", COMPOUNDS, more)
    assert (well(found, 1).target, well(found, 1).smiles) == ("AURKA", "CC")
    assert (well(found, 2).pert_iname, well(found, 2).target) == ("NAD+", "T")


@pytest.mark.parametrize(
    ("header", "value", "target"),
    [
        ("gene", "AURKA", "AURKA"),
        ("target", "AURKA", "AURKA"),
        ("Metadata_target", "AURKA", "AURKA"),
        ("target_list", "ESR2|AKR1C1|ESR1|ESR2", "AKR1C1|ESR1|ESR2"),
        ("target_list", "NA", None),
    ],
)
def test_the_columns_of_targets(
    tmp_path: Path, header: str, value: str, target: str | None
) -> None:
    table = f"broad_sample\tpert_iname\t{header}\nBRD-1\tx\t{value}\n"
    assert well(annotate(tmp_path, "A1\tBRD-1\n", table)).target == target


def test_a_map_of_genotypes_needs_no_treatment_table(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text(
        "WellRow,WellCol,well_position,gene_name,genotype,seed_density\n"
        "C,6,C6,NF1,WT,500\nC,7,C7,NF1,Null,500\nC,8,C8,NF1,,500\n"
    )
    found = read_annotation(path)
    assert [treatment_of_well(found, "any", 3, column) for column in (6, 7, 8)] == [
        TreatmentRecord(
            PerturbationKind.GENOTYPE, "NF1 WT", target="NF1", control=Control.NEGATIVE
        ),
        TreatmentRecord(PerturbationKind.GENOTYPE, "NF1 Null", target="NF1"),
        None,
    ]
    (read,) = found.maps.values()
    metadata = {at: row.metadata for at, row in read.wells.items() if row.metadata}
    assert metadata == {(3, column): {"seed_density": "500"} for column in (6, 7, 8)}


def test_what_cannot_be_used_is_listed_with_file_and_line(tmp_path: Path) -> None:
    again = "BRD-1\tKEY-1\tother\t11\tAURKA\t\tCC\n"
    long = f"BRD-3\t\t{'x' * 256}\t\t\t\t\n"
    annotation = annotate(
        tmp_path, "A1\tBRD-1\nA1\tBRD-1\nQ99\tBRD-1\nA3\tBRD-9\nA4\n", COMPOUNDS + again + long
    )
    assert sorted(issues(annotation)) == [
        ("map.txt", 3, "well twice"),
        ("map.txt", 4, "not a well"),
        ("map.txt", 5, "unknown broad_sample"),
        ("map.txt", 6, "wrong number of cells"),
        ("treatments0.tsv", 5, "broad_sample twice"),
        ("treatments0.tsv", 6, "a name that cannot be stored"),
    ]
    assert well(annotation).pert_iname == "AMG900"
    (found,) = annotation.maps.values()
    assert {at: row.line for at, row in found.wells.items()} == {(1, 1): 2}


def test_barcodes_choose_the_map_of_a_plate(tmp_path: Path) -> None:
    folder = tmp_path / "platemap"
    folder.mkdir()
    (folder / "one.txt").write_text(HEAD + "one\tA1\tBRD-1\n")
    (folder / "two.csv").write_text("plate_map_name,well_position,broad_sample\nsecond,A1,BRD-2\n")
    (tmp_path / "t.tsv").write_text(COMPOUNDS)
    with pytest.raises(BadTableError, match="2 plate maps"):
        read_annotation(folder, [tmp_path / "t.tsv"])
    barcodes = tmp_path / "barcode_platemap.csv"
    barcodes.write_text("Assay_Plate_Barcode,Plate_Map_Name\n001,one\n002,second\n003,third\n")
    annotation = read_annotation(folder, [tmp_path / "t.tsv"])
    names = [
        found.pert_iname if (found := treatment_of_well(annotation, plate, 1, 1)) else None
        for plate in ("001", "002", "003", "004", "1")
    ]
    assert names == ["AMG900", "NAD+", None, None, None]
    assert [annotation.map_of(plate) is not None for plate in ("001", "003")] == [True, False]
    assert annotation.issues == ()
    assert barcodes in annotation.files


def test_barcodes_that_use_other_maps(tmp_path: Path) -> None:
    maps = mixed(tmp_path)
    (tmp_path / "other.csv").write_text("Assay_Plate_Barcode,Plate_Map_Name\n001,elsewhere\n")
    tables = [tmp_path / "cp.tsv", tmp_path / "orf.tsv"]
    with pytest.raises(BadTableError, match=r"elsewhere.*The maps here are cp, orf"):
        read_annotation(maps, tables, tmp_path / "other.csv")


def test_rows_of_barcodes_that_cannot_be_used(tmp_path: Path) -> None:
    maps = mixed(tmp_path)
    barcodes = tmp_path / "barcode_platemap.csv"
    barcodes.write_text(barcodes.read_text() + "001,orf\n,cp\n002,\n")
    found = read_annotation(maps, [tmp_path / "cp.tsv", tmp_path / "orf.tsv"])
    assert issues(found) == [
        ("barcode_platemap.csv", 4, "barcode twice"),
        ("barcode_platemap.csv", 5, "no barcode or map name"),
        ("barcode_platemap.csv", 6, "no barcode or map name"),
    ]
    assert well(found, 1, "001").kind is PerturbationKind.COMPOUND


def test_tables_that_are_no_annotation(tmp_path: Path) -> None:
    with pytest.raises(BadTableError, match="broad_sample and one of pert_iname, gene"):
        annotate(tmp_path, "A1\tBRD-1\n", "broad_sample\tvendor\nx\ty\n")
    with pytest.raises(UserInputError, match=r"There is no plate map .*nowhere"):
        read_annotation(tmp_path / "nowhere.txt")
    (tmp_path / "treatments0.tsv").write_text(COMPOUNDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserInputError, match="no plate map"):
        read_annotation(tmp_path / "empty", [tmp_path / "treatments0.tsv"])
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "map.txt").write_text("well_position\tbroad_sample\nA1\tBRD-1\n")
    (twice / "map.csv").write_text("well_position,broad_sample\nA1,BRD-1\n")
    with pytest.raises(BadTableError, match="both hold the plate map"):
        read_annotation(twice, [tmp_path / "treatments0.tsv"])


MAPS = "cpjump1/metadata/platemaps/2020_11_04_CPJUMP1"
TABLES = "cpjump1/metadata/external_metadata"


@pytest.mark.real
def test_the_target_plates_of_jump() -> None:
    """All maps and tables of CPJUMP1 at once; each map has 384 wells.

    Counted in the files with pandas: 64 compound wells without sample, 4 ORF and 4 CRISPR wells
    without; the control types of the samples that are in the others.
    """
    kinds = ("compound", "crispr", "orf")
    tables = [real_data(f"{TABLES}/JUMP-Target-1_{kind}_metadata.tsv") for kind in kinds]
    annotation = read_annotation(real_data(f"{MAPS}/platemap"), tables)
    roles = {
        name: Counter(
            row.record and (row.record.kind.value, row.record.control)
            for row in item.wells.values()
        )
        for name, item in annotation.maps.items()
    }
    negative, positive = Control.NEGATIVE, Control.POSITIVE
    assert roles == {
        "JUMP-Target-1_compound_platemap": {
            ("compound", None): 260,
            ("compound", negative): 64,
            ("compound", positive): 60,
        },
        "JUMP-Target-1_crispr_platemap": {
            None: 4,
            ("crispr", None): 260,
            ("crispr", negative): 60,
            ("crispr", positive): 60,
        },
        "JUMP-Target-1_orf_platemap": {
            None: 4,
            ("orf", None): 260,
            ("orf", negative): 60,
            ("orf", positive): 60,
        },
    }
    assert annotation.issues == ()
    assert annotation.barcodes is not None
    assert Counter(annotation.barcodes.values()) == _counted(real_data(MAPS))


def _counted(folder: Path) -> Counter[str]:
    with (folder / "barcode_platemap.csv").open(newline="") as file:
        return Counter(row["Plate_Map_Name"] for row in csv.DictReader(file))


@pytest.mark.real
@pytest.mark.parametrize(
    ("table", "target"),
    [
        (f"{TABLES}/JUMP-Target-1_compound_metadata.tsv", "CACNA2D3"),
        (f"{TABLES}/JUMP-Target-1_compound_metadata_targets.tsv", "CACNA2D3"),
        (
            "jump_target/JUMP-Target-1_compound_metadata.tsv",
            "CA1|CACNA1B|CACNA1C|CACNA1D|CACNA1F|CACNA1S|CACNA2D1|CACNA2D3|CACNB1|CACNB2|SMPD1",
        ),
    ],
)
def test_the_spellings_of_the_target_column(table: str, target: str) -> None:
    platemap = real_data(f"{MAPS}/platemap/JUMP-Target-1_compound_platemap.txt")
    barcodes = real_data(f"{MAPS}/barcode_platemap.csv")
    annotation = read_annotation(platemap, [real_data(table)], barcodes)
    found = treatment_of_well(annotation, "BR00116991", 1, 3)
    assert found is not None
    assert (found.pert_iname, found.target) == ("amlodipine", target)
    assert annotation.map_of("BR00117006") is None  # an ORF plate
    dmso = treatment_of_well(annotation, "BR00116991", 1, 2)
    assert dmso is not None
    assert (dmso.pert_iname, dmso.target, dmso.pubchem_cid) == ("DMSO", None, "679")
    assert annotation.issues == ()


@pytest.mark.real
def test_the_orf_table_of_a_later_edition() -> None:
    annotation = read_annotation(
        real_data(f"{MAPS}/platemap/JUMP-Target-1_orf_platemap.txt"),
        [real_data("jump_target/JUMP-Target-1_orf_metadata.tsv")],
    )
    rows = annotation.maps.popitem()[1].wells.values()
    found = Counter(row.record and row.record.kind for row in rows)
    assert found == {None: 4, PerturbationKind.ORF: 380}


@pytest.mark.real
def test_a_production_map_that_shares_few_samples_with_the_table() -> None:
    """OAA01.02.03.04.A has 384 wells: 18 empty, and few of its 347 samples are in JUMP-Target-1."""
    table = real_data("jump_target/JUMP-Target-1_orf_metadata.tsv")
    path = real_data("cpg0016_orf/2021_04_26_Batch1")
    with table.open(newline="") as file:
        known = {row["broad_sample"] for row in csv.DictReader(file, delimiter="\t")}
    with (path / "platemap/OAA01.02.03.04.A.txt").open(newline="") as file:
        samples = [row["broad_sample"] for row in csv.DictReader(file, delimiter="\t")]
    annotation = read_annotation(path / "platemap", [table])
    (found,) = annotation.maps.values()
    unknown = sum(sample != "" and sample not in known for sample in samples)
    assert Counter(refusal.reason for _, refusal in annotation.issues) == {
        "unknown broad_sample": unknown
    }
    assert len(found.wells) + unknown == len(samples) == 384
    assert sum(row.record is None for row in found.wells.values()) == samples.count("") == 18
    assert annotation.map_of("BR00117035") is not None


@pytest.mark.real
@pytest.mark.parametrize(
    ("plate", "wells"),
    [
        # counted in the files: 4 + 4, 16 + 16, and 24 of each of three genotypes
        ("Plate_1_nf1_analysis", {"NF1 WT": 4, "NF1 Null": 4}),
        ("Plate_2_nf1_analysis", {"NF1 WT": 16, "NF1 Null": 16}),
        ("Plate_3_prime_nf1_analysis", {"NF1 WT": 24, "NF1 HET": 24, "NF1 Null": 24}),
    ],
)
def test_the_genotypes_of_nf1(plate: str, wells: dict[str, int]) -> None:
    annotation = read_annotation(real_data("nf1_platemaps"))
    found = annotation.map_of(plate)
    assert found is not None
    records = [row.record for row in found.wells.values() if row.record]
    assert Counter(item.pert_iname for item in records) == wells
    assert {item.control for item in records if item.pert_iname == "NF1 WT"} == {Control.NEGATIVE}
    assert annotation.map_of("Plate_5_nf1_analysis") is None
