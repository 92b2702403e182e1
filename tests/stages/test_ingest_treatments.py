from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from factories import Factory
from realdata import real_data
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cellstore.config import IngestParams
from cellstore.enums import Control, Severity, Stage, Status, Subset
from cellstore.errors import UserInputError
from cellstore.io.layouts import Layout
from cellstore.jobs.workspace import Workspace
from cellstore.models import Base, Event, IngestIssue, Perturbation, Plate, Treatment, Well
from cellstore.stages.ingest.account import Account, Issue, issues_of
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.ingest.ingest_treatments import ingest_treatments

pytestmark = pytest.mark.one_database

COMPOUNDS = (
    "broad_sample,pert_iname,gene,control_type\n"
    "BRD-1,AMG900,AURKA,poscon_cp\n"
    "BRD-2,taxol,,\n"
    ",DMSO,,negcon\n"
)
MAP = "plate_map_name,well_position,broad_sample\nm,A1,BRD-1\nm,A2,BRD-2\nm,B1,\n"
ORF_MAP = "well_position,broad_sample\nA1,ccsb-1\nA2,\n"
ORFS = "broad_sample,gene\nccsb-1,KCNN1\n"


class Bench:
    """A store with plate P1 (wells A1 and A2), and a folder of annotations."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        self.workspace = workspace
        self.folder = folder
        self.make = Factory(workspace)
        self.plate = self.make.plate("P1")
        self.wells = [self.make.well(self.plate, 1, column) for column in (1, 2)]

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def ingest(self, source: Path, layout: Layout, params: IngestParams | None = None) -> Account:
        """Ingest, and check that every row is accounted for."""
        run = self.make.run(Stage.INGEST, status=Status.RUNNING)
        account = Account(run.id, source.name)
        with self.workspace.database.begin() as session:
            ingest_treatments(
                self.workspace,
                session,
                source,
                layout,
                params or IngestParams(),
                account,
            )
        self.plates = tuple(account.plates)
        counted = account.created + account.updated + account.unchanged + account.refused
        assert account.rows == counted
        return account

    def issues(self, account: Account) -> tuple[Issue, ...]:
        with self.workspace.database.read() as session:
            return issues_of(session, account.run_id)

    def map(self, compounds: str = COMPOUNDS, text: str = MAP, plate: str = "P1") -> Account:
        params = IngestParams(compounds=(self.file("compounds.csv", compounds),), plate=plate)
        return self.ingest(self.file("map.csv", text), Layout.PLATEMAP, params)

    def table(self, text: str, **more: Path) -> Account:
        source = self.file("table.csv", text)
        return self.ingest(source, Layout.TREATMENT_TABLE, IngestParams(**more))

    def treated(self) -> dict[str, tuple[str, str | None, Control | None]]:
        """Name, target and role of the treatment of each well that has one."""
        query = select(Plate.barcode, Well.name, Treatment, Well.control)
        query = query.join(Plate).join(Treatment)
        with self.reading() as session:
            return {
                f"{barcode} {well}": (row.name, row.target, control)
                for barcode, well, row, control in session.execute(query)
            }

    def count(self, table: type[Base]) -> int:
        with self.reading() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def changes(self) -> list[tuple[str, str | None, str | None, str | None, int | None]]:
        """Well or perturbation, old and new treatment or target, file and line."""
        with self.reading() as session:
            return [
                (
                    _name(session, row),
                    _value(row.old),
                    _value(row.new),
                    row.file,
                    row.line,
                )
                for row in session.scalars(select(Event).order_by(Event.id))
            ]

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with self.workspace.database.read() as session:
            yield session


def _name(session: Session, row: Event) -> str:
    table = Well if row.table_name == "wells" else Perturbation
    return str(session.get_one(table, row.row_id).name)


def _value(values: dict[str, Any] | None) -> str | None:
    texts = values or {}
    return texts.get("treatment", texts.get("target"))


def counts(account: Account) -> tuple[int, int, int, int]:
    """Created, updated, unchanged, refused."""
    return account.created, account.updated, account.unchanged, account.refused


@pytest.fixture
def bench(workspace: Workspace, tmp_path: Path) -> Bench:
    return Bench(workspace, tmp_path)


@pytest.mark.each_database
def test_a_map_treats_the_wells_that_are_there_and_makes_the_others(bench: Bench) -> None:
    assert counts(bench.map()) == (1, 2, 0, 0)
    assert bench.plates == (bench.plate.id,)
    assert bench.treated() == {
        "P1 A01": ("AMG900", "AURKA", Control.POSITIVE),
        "P1 A02": ("taxol", None, None),
        "P1 B01": ("DMSO", None, Control.NEGATIVE),
    }
    assert bench.changes() == [
        ("A01", None, "AMG900", "map.csv", 2),
        ("A02", None, "taxol", "map.csv", 3),
    ]


@pytest.mark.each_database
def test_other_columns_of_a_map_are_metadata_of_the_wells(bench: Bench) -> None:
    text = "well_position,broad_sample,solvent,Metadata_lot\nA1,BRD-1,DMSO,5\nB1,,water,\n"
    assert counts(bench.map(text=text)) == (1, 1, 0, 0)
    assert counts(bench.map(text=text)) == (0, 0, 2, 0)
    assert counts(bench.map(text=text.replace("water", "DMSO"))) == (0, 1, 1, 0)
    with bench.reading() as session:
        found = {well.name: well.metadata_ for well in session.scalars(select(Well))}
    assert found == {
        "A01": {"solvent": "DMSO", "lot": "5"},
        "A02": None,
        "B01": {"solvent": "DMSO"},
    }


def test_a_map_once_more_changes_nothing(bench: Bench) -> None:
    bench.map()
    assert counts(bench.map()) == (0, 0, 3, 0)
    assert (bench.count(Treatment), bench.count(Event), bench.count(Well)) == (3, 2, 3)


def test_a_corrected_annotation_is_told_from_what_was(bench: Bench) -> None:
    bench.map()
    assert counts(bench.map(COMPOUNDS.replace("AURKA", "AURKB"))) == (0, 1, 2, 0)
    assert bench.treated()["P1 A01"] == ("AMG900", "AURKB", Control.POSITIVE)
    assert bench.changes()[-1] == ("AMG900", "AURKA", "AURKB", "map.csv", 2)
    assert bench.count(Treatment) == 3


def test_labels_of_a_split_stay_as_they_were_frozen(bench: Bench) -> None:
    from cellstore.models import Label, SplitMember

    bench.map()
    image = bench.make.image(bench.wells[0])
    bench.make.split([(image, Subset.TRAIN, bench.make.label("AMG900"))])
    bench.map(COMPOUNDS.replace("AMG900", "barasertib"))
    assert bench.treated()["P1 A01"][0] == "barasertib"
    with bench.reading() as session:
        query = select(Label.value).join(SplitMember, SplitMember.label_id == Label.id)
        assert session.scalars(query).all() == ["AMG900"]


def test_rows_of_a_map_that_cannot_be_used(bench: Bench) -> None:
    account = bench.map(COMPOUNDS + "BRD-1,other,,\n", MAP + "m,A1,BRD-2\nm,Q99,\nm,C1,BRD-9\n")
    assert counts(account) == (1, 1, 0, 4)
    with bench.reading() as session:
        issues = session.execute(
            select(IngestIssue.severity, IngestIssue.file, IngestIssue.line).order_by(
                IngestIssue.id
            )
        )
        assert Counter(map(tuple, issues)) == {
            (Severity.PROBLEM, "compounds.csv", 5): 1,
            (Severity.REFUSED, "map.csv", 2): 1,
            (Severity.REFUSED, "map.csv", 5): 1,
            (Severity.REFUSED, "map.csv", 6): 1,
            (Severity.REFUSED, "map.csv", 7): 1,
        }


def test_an_empty_well_of_an_orf_map_is_not_made(bench: Bench) -> None:
    account = bench.map(ORFS, ORF_MAP)
    assert counts(account) == (0, 1, 1, 0)
    assert set(bench.treated()) == {"P1 A01"}
    assert bench.issues(account) == ()


def test_a_well_that_is_empty_on_a_later_map_keeps_its_treatment_and_that_is_said(
    bench: Bench,
) -> None:
    bench.map()
    account = bench.map(ORFS, ORF_MAP)
    (issue,) = (item for item in bench.issues(account) if item.severity is Severity.SUSPICIOUS)
    assert (issue.reason, issue.line) == ("a blank well that has a treatment", 3)
    assert "cellstore relabel P1/A02 --treatment none" in issue.detail
    assert bench.treated()["P1 A02"][0] == "taxol"


def test_barcodes_say_which_plates(bench: Bench) -> None:
    maps = bench.folder / "platemap"
    maps.mkdir()
    (maps / "cp.csv").write_text(MAP.replace("\nm,", "\ncp,"))
    (maps / "orf.csv").write_text(ORF_MAP)
    (maps / "unused.csv").write_text(ORF_MAP)
    (maps / "barcode_platemap.csv").write_text(
        "Assay_Plate_Barcode,Plate_Map_Name\nP1,cp\nP2,orf\nP3,gone\nP9,cp\n"
    )
    bench.make.plate("P2")
    bench.make.plate("P3")
    tables = (bench.file("cp.csv", COMPOUNDS), bench.file("orf.csv", ORFS))
    account = bench.ingest(maps, Layout.PLATEMAP, IngestParams(compounds=tables))
    assert counts(account) == (2, 2, 3, 0)
    assert {well: found[0] for well, found in bench.treated().items()} == {
        "P1 A01": "AMG900",
        "P1 A02": "taxol",
        "P1 B01": "DMSO",
        "P2 A01": "KCNN1",
    }
    assert bench.count(Plate) == 3  # P9 is not made
    assert [issue.reason for issue in bench.issues(account)] == ["no such plate map"]
    unknown = (
        "is blank for these wells, so their treatment is not known: A02. To say what they got: "
        "--blank DMSO or --blank untreated"
    )
    assert account.notes == [
        "1 of 4 plates are not in the store",
        "cp.csv is blank for these wells, so DMSO: B01",
        f"orf.csv {unknown}",
        "no plate of the store uses the plate map unused",
        f"unused.csv {unknown}",
    ]


def test_a_map_for_nobody(bench: Bench) -> None:
    source = bench.file("map.csv", MAP)
    params = IngestParams(compounds=(bench.file("compounds.csv", COMPOUNDS),))
    with pytest.raises(UserInputError, match="--barcodes"):
        bench.ingest(source, Layout.PLATEMAP, params)
    assert bench.treated() == {}


def test_a_map_before_its_images_makes_plate_and_wells(bench: Bench) -> None:
    account = bench.map(plate="P7")
    assert counts(account) == (3, 0, 0, 0)
    said = "new, made by this map, without images so far: plate P7."
    assert any(note.startswith(said) for note in account.notes)
    assert set(bench.treated()) == {"P7 A01", "P7 A02", "P7 B01"}


def test_a_table_of_new_treatments(bench: Bench) -> None:
    assert counts(bench.table(COMPOUNDS)) == (3, 0, 0, 0)
    assert counts(bench.table(COMPOUNDS)) == (0, 0, 3, 0)
    assert bench.count(Treatment) == 3
    assert bench.treated() == {}


def test_a_corrected_table_reaches_the_wells(bench: Bench) -> None:
    bench.map()
    corrected = COMPOUNDS.replace("AURKA", "AURKB").replace(",DMSO,,", ",DMSO,,")
    assert counts(bench.table(corrected)) == (0, 1, 2, 0)
    assert bench.treated()["P1 A01"] == ("AMG900", "AURKB", Control.POSITIVE)
    assert bench.changes()[-1] == ("AMG900", "AURKA", "AURKB", "table.csv", 2)
    assert counts(bench.table(corrected)) == (0, 0, 3, 0)


def test_a_correction_can_be_taken_back(bench: Bench) -> None:
    bench.map()
    bench.table(COMPOUNDS.replace("AURKA", "AURKB"))
    assert counts(bench.table(COMPOUNDS)) == (0, 1, 2, 0)
    assert counts(bench.table(COMPOUNDS)) == (0, 0, 3, 0)
    assert bench.treated()["P1 A01"][1] == "AURKA"
    assert [item[1:3] for item in bench.changes() if item[0] == "AMG900"] == [
        ("AURKA", "AURKB"),
        ("AURKB", "AURKA"),
    ]


def test_a_table_that_leaves_a_value_open_does_not_erase_it(bench: Bench) -> None:
    bench.map()
    assert counts(bench.table("broad_sample,pert_iname\nBRD-1,AMG900\n")) == (0, 0, 1, 0)
    assert bench.treated()["P1 A01"] == ("AMG900", "AURKA", Control.POSITIVE)


def test_a_sample_that_is_described_in_two_ways(bench: Bench) -> None:
    account = bench.table(COMPOUNDS + "BRD-1,other,,\nBRD-2,taxol,,\n")
    assert counts(account) == (3, 0, 1, 1)
    assert [issue.reason for issue in bench.issues(account)] == ["broad_sample twice"]


def test_an_alias_merges_two_spellings(bench: Bench) -> None:
    table = "broad_sample,pert_iname\nBRD-1,ME0328\nBRD-2,ME-0328\n"
    first = bench.map(table)
    (issue,) = bench.issues(first)
    assert (issue.severity, issue.line) == (Severity.SUSPICIOUS, None)
    aliases = bench.file("aliases.csv", "alias,name\nME0328,ME-0328\n")
    second = bench.table(table, aliases=aliases)
    assert counts(second) == (0, 1, 1, 0)
    assert {found[0] for found in bench.treated().values()} == {"ME-0328", "DMSO"}
    assert bench.issues(second) == ()


def test_a_long_list_of_targets(bench: Bench) -> None:
    targets = "|".join(f"GENE{number:04d}" for number in range(60))
    bench.map(f"broad_sample,pert_iname,target_list\nBRD-1,x,{targets}\nBRD-2,y,\n")
    assert bench.treated()["P1 A01"] == ("x", targets, None)


def random_table(dice: random.Random) -> str:
    """A table of samples 1 to 4 and DMSO, with random names, genes and roles, some of them open."""
    lines = ["broad_sample,pert_iname,gene,control_type"]
    for sample in ("BRD-1", "BRD-2", "BRD-1", "BRD-3", "BRD-4", ""):
        name = dice.choice(["a", "b", "NA"]) if sample else "DMSO"
        gene, role = dice.choice(["", "G1", "G2"]), dice.choice(["", "negcon", "poscon"])
        lines.append(f"{sample},{name},{gene},{role}")
    return "\n".join(lines) + "\n"


@pytest.mark.each_database
@pytest.mark.parametrize("seed", range(3))
def test_whatever_came_before_a_table_once_more_changes_nothing(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    bench.map()
    for _ in range(4):
        table = random_table(dice)
        bench.table(table)
        wells, changes = bench.treated(), bench.count(Event)
        again = bench.table(table)
        assert (again.created, again.updated) == (0, 0)
        assert (bench.treated(), bench.count(Event)) == (wells, changes)


def test_other_columns_of_plates_are_their_metadata(bench: Bench) -> None:
    head = "Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_PlateType\n"
    table = bench.file("plate.csv", f"{head}source_4,B1,P1,ORF\nsource_4,B1,P2,\n")
    assert counts(bench.ingest(table, Layout.JUMP_PLATES)) == (1, 1, 0, 0)
    assert counts(bench.ingest(table, Layout.JUMP_PLATES)) == (0, 0, 2, 0)
    with bench.reading() as session:
        found = {plate.barcode: plate.metadata_ for plate in session.scalars(select(Plate))}
    assert found == {
        "P1": {"Source": "source_4", "PlateType": "ORF"},
        "P2": {"Source": "source_4"},
    }


def test_plates_and_batches(bench: Bench) -> None:
    head = "Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_PlateType\n"
    text = f"{head}s,B1,P1,ORF\ns,B1,001,ORF\ns,B1,001,ORF\ns,B2,001,ORF\ns,B1,,ORF\n"
    account = bench.ingest(bench.file("plate.csv", text), Layout.JUMP_PLATES)
    assert counts(account) == (1, 1, 1, 2)
    assert len(bench.plates) == 2
    again = bench.ingest(
        bench.file("plate.csv", f"{head}s,B3,P1,ORF\ns,,001,ORF\n"), Layout.JUMP_PLATES
    )
    assert counts(again) == (0, 1, 1, 0)
    (issue,) = bench.issues(again)
    assert issue.detail == "P1: the batch was B1, and is B3 now"
    with bench.reading() as session:
        rows = session.execute(select(Plate.barcode, Plate.batch)).all()
    assert set(map(tuple, rows)) == {("P1", "B3"), ("001", "B1")}


def test_controls_complete_the_reagents(bench: Bench) -> None:
    reagents = bench.file(
        "crispr.csv",
        "Metadata_JCP2022,Metadata_NCBI_Gene_ID,Metadata_Symbol\nJ1,5347,PLK1\nJ2,2,A2M\n",
    )
    head = "Metadata_JCP2022,Metadata_pert_type,Metadata_Name,Metadata_modality\n"
    controls = bench.file("control.csv", f"{head}J1,poscon,PLK1,crispr\nJ9,empty,Empty,any\n")
    assert counts(bench.ingest(reagents, Layout.TREATMENT_TABLE)) == (2, 0, 0, 0)
    with bench.reading() as session:
        plk1 = session.scalars(select(Treatment).where(Treatment.name == "PLK1")).one()
    well = bench.make.well(bench.plate, 3, 3, plk1)
    assert counts(bench.ingest(controls, Layout.TREATMENT_TABLE)) == (0, 1, 1, 0)
    assert bench.treated() == {f"P1 {well.name}": ("PLK1", "PLK1", Control.POSITIVE)}
    assert counts(bench.ingest(reagents, Layout.TREATMENT_TABLE)) == (0, 0, 2, 0)
    assert counts(bench.ingest(controls, Layout.TREATMENT_TABLE)) == (0, 0, 2, 0)


MAPS = "cpjump1/metadata/platemaps/2020_11_04_CPJUMP1"
TABLES = "cpjump1/metadata/external_metadata"


@pytest.mark.real
def test_all_plates_of_cpjump1(bench: Bench) -> None:
    """Every plate of the barcode table, each with the 384 wells of its map.

    Counted from the files: wells with a treatment are all 384 of a compound map, and 380 of the
    others, which have 4 empty ones.
    """
    with (real_data(MAPS) / "barcode_platemap.csv").open(newline="") as file:
        plates = {row["Assay_Plate_Barcode"]: row["Plate_Map_Name"] for row in csv.DictReader(file)}
    for barcode in plates:
        bench.make.plate(barcode)
    kinds = ("compound", "crispr", "orf")
    tables = tuple(real_data(f"{TABLES}/JUMP-Target-1_{kind}_metadata.tsv") for kind in kinds)
    params = IngestParams(compounds=tables)
    source = real_data(f"{MAPS}/platemap")
    account = bench.ingest(source, Layout.PLATEMAP, params)
    assert counts(account) == (384 + 380 + 380, 0, 4 + 4, 0)
    wells = sum(384 if "compound" in name else 380 for name in plates.values())
    assert len(bench.treated()) == wells
    assert counts(bench.ingest(source, Layout.PLATEMAP, params)) == (0, 0, 3 * 384, 0)
    # The later edition lists all targets of a compound, up to 300 characters of them.
    later = real_data("jump_target/JUMP-Target-1_compound_metadata.tsv")
    account = bench.ingest(later, Layout.TREATMENT_TABLE)
    assert account.rows == 307
    assert (account.created, account.refused) == (0, 0)
    assert bench.treated()["BR00116991 A03"][1] == (
        "CA1|CACNA1B|CACNA1C|CACNA1D|CACNA1F|CACNA1S|CACNA2D1|CACNA2D3|CACNB1|CACNB2|SMPD1"
    )


@pytest.mark.real
def test_the_dataset_tables_of_jump(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    bench = Bench(sqlite_workspace, tmp_path)
    plates = real_data("jump_datasets/plate.csv.gz")
    assert counts(bench.ingest(plates, Layout.JUMP_PLATES)) == (2525, 0, 0, 0)
    assert counts(bench.ingest(plates, Layout.JUMP_PLATES)) == (0, 0, 2525, 0)
    reagents = real_data("jump_datasets/crispr.csv.gz")
    assert counts(bench.ingest(reagents, Layout.TREATMENT_TABLE)) == (7977, 0, 0, 0)
    # Of the 18 controls the 3 of CRISPR are reagents that are there already, and no well has them;
    # one is a well without cells.
    controls = real_data("jump_datasets/perturbation_control.csv")
    assert counts(bench.ingest(controls, Layout.TREATMENT_TABLE)) == (14, 0, 4, 0)
    assert counts(bench.ingest(reagents, Layout.TREATMENT_TABLE)) == (0, 0, 7977, 0)


@pytest.mark.real
def test_the_genotypes_of_nf1(bench: Bench) -> None:
    bench.make.plate("Plate_2_nf1_analysis")
    account = bench.ingest(real_data("nf1_platemaps"), Layout.PLATEMAP)
    # 8, 32 and 72 rows; only plate 2 is in the store
    assert counts(account) == (32, 0, 80, 0)
    assert Counter(found[:2] for found in bench.treated().values()) == {
        ("NF1 WT", "NF1"): 16,
        ("NF1 Null", "NF1"): 16,
    }


LONG = "Well,Compound,Dose (nM),Cell line,control_type\nA1,taxol,500,A549,\nA2,DMSO,,A549,negcon\n"


def parts(bench: Bench) -> dict[str, list[tuple[str, float | None, str | None, str | None]]]:
    """What was done to each well: name, dose, unit, and the dose as it was written."""
    with bench.reading() as session:
        return {
            well.name: [
                (part.perturbation.name, part.dose, part.dose_unit, part.dose_original)
                for part in well.treatment.parts
            ]
            for well in session.scalars(select(Well).order_by(Well.id))
            if well.treatment is not None
        }


def map_of(bench: Bench, text: str, **options: Any) -> Account:
    params = IngestParams(**{"plate": "P1", **options})
    return bench.ingest(bench.file("long.csv", text), Layout.PLATEMAP, params)


@pytest.mark.each_database
def test_doses_are_parts_of_treatments(bench: Bench) -> None:
    assert counts(map_of(bench, LONG)) == (0, 2, 0, 0)
    assert parts(bench) == {
        "A01": [("taxol", 0.5, "uM", "500 nM")],
        "A02": [("DMSO", None, None, None)],
    }
    assert counts(map_of(bench, LONG)) == (0, 0, 2, 0)
    with bench.reading() as session:
        assert session.scalars(select(Plate.cell_line)).one() == "A549"
        assert set(session.scalars(select(Well.metadata_))) == {None}
    # The same dose in another unit is the same treatment; another dose is another one.
    in_um = LONG.replace("(nM)", "(uM)")
    assert counts(map_of(bench, in_um.replace("500", "0.5"))) == (0, 0, 2, 0)
    assert counts(map_of(bench, in_um.replace("500", "5"))) == (0, 1, 1, 0)
    assert bench.changes()[-1][:3] == ("A01", "taxol 0.5 uM", "taxol 5 uM")
    # A table that names the compound alone takes no dose away.
    assert counts(map_of(bench, "Well,Compound\nA1,taxol\nA2,DMSO\n")) == (0, 0, 2, 0)
    assert parts(bench)["A01"] == [("taxol", 5.0, "uM", "5 uM")]


def test_combinations_are_one_treatment_in_any_order(bench: Bench) -> None:
    head = "Well,Compound 1,Dose 1 (uM),Compound 2,Dose 2 (uM)\n"
    map_of(bench, f"{head}A1,taxol,1,noco,2\nA2,noco,2,taxol,1\n")
    assert bench.count(Treatment) == 1
    assert parts(bench)["A01"] == [("noco", 2.0, "uM", "2 uM"), ("taxol", 1.0, "uM", "1 uM")]
    assert counts(map_of(bench, f"{head}A1,taxol,1,noco,2\nA2,noco,2,,\n")) == (0, 1, 1, 0)
    assert bench.treated()["P1 A02"][0] == "noco"


def test_names_with_a_plus_between_them_are_a_combination(bench: Bench) -> None:
    head = "Well,Compound,Dose (uM),Target\n"
    rows = "A1,taxol + noco,1 + 2,TUBB\nA2,noco 2 uM  + taxol 1000 nM,,\n"
    refused = map_of(bench, f"{head}{rows}A3,taxol + noco,5,\n")
    assert counts(refused) == (0, 2, 0, 1)
    assert any("does not say the dose of each" in issue.detail for issue in bench.issues(refused))
    pair = [("noco", 2.0, "uM"), ("taxol", 1.0, "uM")]
    found = {well: [part[:3] for part in some] for well, some in parts(bench).items()}
    assert found == {"A01": pair, "A02": pair}
    # The same as in two columns, and of which of them the target is nobody knows.
    columns = "Well,Compound 1,Dose 1 (uM),Compound 2,Dose 2 (uM)\nA1,taxol,1,noco,2\n"
    assert counts(map_of(bench, columns)) == (0, 0, 1, 0)
    assert (bench.count(Treatment), bench.treated()["P1 A01"][:2]) == (1, ("noco + taxol", None))
    with bench.reading() as session:
        assert session.get_one(Well, bench.wells[0].id).metadata_ == {"Target": "TUBB"}


def test_a_plus_without_spaces_is_part_of_a_name(bench: Bench) -> None:
    map_of(bench, "Well,Compound,Dose (uM)\nA1,x + DMSO,5\nA2,x + x,1 + 1\n")
    assert parts(bench)["A01"][1][:3] == ("x", 5.0, "uM")
    map_of(bench, "Well,siRNA\nA1,siTP53+siMYC\nA2,siTP53 + siMYC\n")
    assert {well: len(some) for well, some in parts(bench).items()} == {"A01": 1, "A02": 2}


def test_a_well_that_a_column_calls_treated_is_no_control(bench: Bench) -> None:
    map_of(bench, LONG)
    assert bench.treated()["P1 A02"][2] is Control.NEGATIVE
    map_of(bench, LONG.replace("negcon", "trt"))
    assert bench.treated()["P1 A02"][2] is None
    map_of(bench, LONG.replace("negcon", "trt"), controls=(("taxol", "positive"),))
    assert bench.treated()["P1 A01"][2] is Control.POSITIVE


def test_a_sample_that_a_name_gets_is_said_and_dmso_is_none(bench: Bench) -> None:
    wells = "Well,Compound\nA1,DMSO\nA2,taxol\n"
    map_of(bench, wells)
    table = bench.file("odd.csv", "broad_sample,pert_iname\nDMSO,DMSO\nBRD-7,taxol\n")
    named = map_of(bench, wells, compounds=(table,))
    assert (counts(named), [note for note in named.notes if "corrected" in note]) == (
        (0, 1, 1, 0),
        ["corrected: P1/A02 taxol, identifier none -> taxol, identifier BRD-7"],
    )
    other = bench.file("other.csv", "broad_sample,pert_iname\nBRD-8,taxol\n")
    source = bench.file("codes.csv", "well_position,broad_sample\nA2,BRD-8\n")
    params = IngestParams(plate="P1", compounds=(other,))
    found = ingest(bench.workspace, source, params, dry_run=True)
    assert [(row["well"], row["change"]) for row in found.preview if row["change"]] == [
        ("A02", "was taxol, identifier BRD-7")
    ]


def test_a_table_that_names_a_combination_keeps_its_doses(bench: Bench) -> None:
    map_of(bench, "Well,Compound,Dose (uM)\nA1,taxol + noco,5 + 1\nA2,taxol,5\n")
    text = "Compound,Target\ntaxol + noco,TUBB + TUBA\n"
    assert counts(bench.table(text)) == (0, 1, 0, 0)
    assert counts(bench.table(text)) == (0, 0, 1, 0)
    assert parts(bench) == {
        "A01": [("noco", 1.0, "uM", "1 uM"), ("taxol", 5.0, "uM", "5 uM")],
        "A02": [("taxol", 5.0, "uM", "5 uM")],
    }
    found = {well: target for well, (_, target, _) in bench.treated().items()}
    assert found == {"P1 A01": "TUBA|TUBB", "P1 A02": "TUBB"}


def test_one_map_for_several_plates(bench: Bench) -> None:
    account = map_of(bench, LONG, plate=("P1", "P2", "P3"))
    assert counts(account) == (0, 2, 0, 0)
    assert set(bench.treated()) == {
        f"P{number} A0{well}" for number in (1, 2, 3) for well in (1, 2)
    }
    said = "new, made by this map, without images so far: plate P2, P3."
    assert any(note.startswith(said) for note in account.notes)


def test_what_is_said_of_wells_with_images(bench: Bench) -> None:
    head = "Well,Compound\n"
    blank = map_of(bench, f"{head}A1,\nA2,\n").notes[-1]
    assert "known: A01, A02" in blank  # no well has images so far
    bench.make.image(bench.wells[1])
    assert "treatment is not known: A02. To say" in map_of(bench, f"{head}A1,\nA2,\n").notes[-1]
    missing = map_of(bench, f"{head}A1,taxol\nB1,\n").notes[-1]
    said = "none of the wells that long.csv treats has images (A01); the wells with images are A02."
    assert missing.startswith(said)
    # Also where they are labelled already: then the map is of another plate, or has shifted.
    assert map_of(bench, f"{head}A1,taxol\nA2,noco\nB1,\n").notes == []
    assert map_of(bench, f"{head}A1,taxol\nB1,\n").notes[-1].startswith(said)
    bench.make.image(bench.wells[0])
    third = bench.make.well(bench.plate, 2, 2)
    bench.make.image(third)
    (note,) = map_of(bench, f"{head}A1,taxol\nC1,taxol\n").notes
    assert note == (
        "long.csv: wells with images got no treatment: B02, but wells without images got one: C01. "
        "If that is not meant, has the map shifted? cellstore undo RUN takes it back"
    )


@pytest.mark.each_database
def test_a_dry_run_shows_and_writes_nothing(bench: Bench) -> None:
    map_of(bench, LONG)
    before = [bench.count(table) for table in (Event, Treatment, Well, Plate, Perturbation)]
    source = bench.file("next.csv", LONG.replace("500", "50") + "B7,noco,1,A549,\nQQ,x,1,A549,\n")
    found = ingest(bench.workspace, source, IngestParams(plate="P1"), dry_run=True)
    assert (found.rows, found.created, found.updated, found.unchanged, found.refused) == (
        *(4, 1, 1, 1),
        1,
    )
    assert [tuple(row.values()) for row in found.preview] == [
        ("P1", "A01", "taxol 0.05 uM", None, "was taxol 0.5 uM"),
        ("P1", "A02", "DMSO", Control.NEGATIVE, ""),
        ("P1", "B07", "noco 0.001 uM", None, "new"),
    ]
    assert before == [bench.count(table) for table in (Event, Treatment, Well, Plate, Perturbation)]
    table = bench.file("compounds.csv", COMPOUNDS)
    assert ingest(bench.workspace, table, dry_run=True).created == 2  # DMSO is there
    assert bench.treated()["P1 A01"][0] == "taxol"
