"""The account of an ingest: no row is lost, all or nothing, places of files, what was read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select
from test_ingest import CHANNELS, count, dump, loaddata, write_image, write_table

from cellstore.config import IngestParams
from cellstore.enums import Look, Severity
from cellstore.errors import CellstoreError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Folder,
    Image,
    ImageFile,
    IngestFile,
    IngestIssue,
    Plate,
    Recipe,
    Run,
    Well,
)
from cellstore.stages.ingest.account import FileIdentity
from cellstore.stages.ingest.ingest import IngestResult, ingest

pytestmark = pytest.mark.one_database


def balanced(result: IngestResult) -> bool:
    """Whether every row that was read is accounted for."""
    return result.rows == result.created + result.updated + result.unchanged + result.refused


def bad_row(site: int) -> dict[str, str]:
    return {**loaddata(site), "Metadata_Well": "Z99"}


@pytest.mark.each_database
def test_every_issue_is_a_row_to_ask_for(workspace: Workspace, tmp_path: Path) -> None:
    rows = [loaddata(1), bad_row(2), loaddata(3), bad_row(4)]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.rows, result.created, result.refused) == (4, 2, 2)
    with workspace.database.read() as session:
        issues = session.scalars(select(IngestIssue).order_by(IngestIssue.line)).all()
        file = session.scalars(select(IngestFile)).one()
    assert [(item.file, item.line, item.severity) for item in issues] == [
        ("t.csv", 3, Severity.REFUSED),
        ("t.csv", 5, Severity.REFUSED),
    ]
    assert (file.n_rows, file.n_created, file.n_refused) == (4, 2, 2)
    assert file.sha256 == hashlib.sha256((tmp_path / "t.csv").read_bytes()).hexdigest()
    assert file.run_id == result.run_id


def test_a_compound_of_two_targets_is_reported(workspace: Workspace, tmp_path: Path) -> None:
    def row(well: str, target: str) -> dict[str, str]:
        phenix = {
            key: value.replace("r01c02", f"r01c{well[1:]}") for key, value in loaddata(1).items()
        }
        named = {"Metadata_pert_iname": "taxol", "Metadata_target": target}
        return phenix | named | {"Metadata_Well": well}

    rows = [row("A02", "TUBB"), row("A03", "TUBA"), row("A04", "TUBA")]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.created, result.refused) == (3, 0)
    with workspace.database.read() as session:
        issue = session.scalars(select(IngestIssue)).one()
    assert (issue.severity, issue.file, issue.line) == (Severity.SUSPICIOUS, "t.csv", 3)
    assert "TUBA here; TUBB is kept" in issue.detail
    assert result.issues[0].detail == issue.detail


def test_an_unchanged_file_says_its_refusals_again(workspace: Workspace, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), bad_row(2)])
    first = ingest(workspace, table)
    second = ingest(workspace, table)
    assert (second.rows, second.unchanged, second.refused) == (2, 1, 1)
    assert (second.reasons, second.issues) == (first.reasons, first.issues)
    with workspace.database.read() as session:
        query = select(IngestIssue.run_id, func.count()).group_by(IngestIssue.run_id)
        assert sorted(tuple(row) for row in session.execute(query)) == [
            (first.run_id, 1),
            (second.run_id, 1),
        ]


def test_a_repeated_row_is_unchanged(workspace: Workspace, tmp_path: Path) -> None:
    rows = [loaddata(1), loaddata(1), loaddata(2)]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.created, result.unchanged, balanced(result)) == (2, 1, True)
    assert count(workspace, ImageFile) == 2 * len(CHANNELS)


def test_a_later_table_adds_a_channel(workspace: Workspace, tmp_path: Path) -> None:
    ingest(workspace, write_table(tmp_path / "t.csv", [loaddata(1)]))
    more = {**loaddata(1), "FileName_OrigER": "r01c02f01p01-ch4sk1fk1fl1.tiff"}
    result = ingest(workspace, write_table(tmp_path / "u.csv", [more]))
    assert (result.updated, count(workspace, ImageFile)) == (1, 3)


def test_a_place_that_is_known_better_later_is_taken(workspace: Workspace, tmp_path: Path) -> None:
    ingest(workspace, write_table(tmp_path / "t.csv", [loaddata(1)]))
    folder = tmp_path / "images"
    for number in (1, 2):
        write_image(folder, f"r01c02f01p01-ch{number}sk1fk1fl1.tiff", number)
    table = write_table(tmp_path / "u.csv", [loaddata(1)])
    result = ingest(workspace, table, IngestParams(maps=(("/somewhere/else", str(folder)),)))
    assert (result.updated, result.missing_images) == (1, 0)
    with workspace.database.read() as session:
        files = session.scalars(select(ImageFile)).all()
        assert {file.uri for file in files} == {
            str(folder / f"r01c02f01p01-ch{number}sk1fk1fl1.tiff") for number in (1, 2)
        }
    # Where they were seen they stay, whatever the table says of another machine.
    back = ingest(workspace, write_table(tmp_path / "v.csv", [loaddata(1)]))
    assert (back.unchanged, back.missing_images) == (1, 0)


def test_folders_are_kept_once_and_without_secrets(workspace: Workspace, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), loaddata(2)])
    ingest(workspace, table)
    remote = (("/somewhere", "https://me:secret@host/bucket"),)
    ingest(workspace, table, IngestParams(maps=remote, look=Look.NOWHERE))
    with workspace.database.read() as session:
        folders = set(session.scalars(select(Folder.uri)))
        recipes = str(session.scalars(select(Recipe)).all()[-1].parameters)
    assert folders == {"/somewhere/else", "https://host/bucket/else"}
    assert "secret" not in recipes


@pytest.mark.each_database
def test_a_name_that_no_database_holds_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    rows = [loaddata(1), loaddata(2, plate="P" * 300), {**loaddata(3), "Metadata_Batch": "B" * 300}]
    rows = [{"Metadata_Batch": "", **row} for row in rows]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.rows, result.created, result.refused) == (3, 1, 2)
    assert balanced(result)


def test_two_files_for_one_field_and_channel_are_not_mixed(
    workspace: Workspace, tmp_path: Path
) -> None:
    other = {
        key: value.replace("p01", "p02") if key.startswith("FileName") else value
        for key, value in loaddata(1).items()
    }
    rows = [
        {**row, "Metadata_Depth": str(number)} for number, row in enumerate([loaddata(1), other])
    ]
    for row in rows:
        row.update({"Metadata_PlaneID": "1"})
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.created, result.refused, balanced(result)) == (1, 1, True)
    assert "same field twice" in result.issues[0].reason
    with workspace.database.read() as session:
        assert all("p01" in name for name in session.scalars(select(ImageFile.name)))


def test_a_folder_whose_tables_changed_is_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "Cells.csv"
    table.write_text("a\n1.50\n")
    before = FileIdentity.of(tmp_path / "tables")
    moment = table.stat().st_mtime_ns
    table.write_text("a\n9.50\n")
    os.utime(table, ns=(moment, moment))
    assert FileIdentity.of(tmp_path / "tables").sha256 != before.sha256


def test_a_table_beside_the_source_that_cannot_be_read(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    platemap = tmp_path / "map.csv"
    platemap.write_text("Well,Compound\nA01,taxol\n")
    os.mkfifo(tmp_path / "pipe.csv")
    for name, reason in (("none.csv", "No such file"), ("pipe.csv", "a pipe or a device")):
        path = tmp_path / name
        for params in (IngestParams(barcodes=path), IngestParams(plate="P1", aliases=path)):
            with pytest.raises(UserInputError, match=rf"{name} cannot be read \(.*{reason}"):
                ingest(sqlite_workspace, platemap, params)


def test_another_batch_of_a_plate_is_told(workspace: Workspace, tmp_path: Path) -> None:
    rows = [{**loaddata(1), "Metadata_Batch": "B1"}]
    ingest(workspace, write_table(tmp_path / "t.csv", rows))
    rows = [{**loaddata(1), "Metadata_Batch": "B2"}]
    result = ingest(workspace, write_table(tmp_path / "u.csv", rows))
    assert [item.reason for item in result.issues] == ["another batch"]


def test_a_source_of_another_kind_than_named_is_one_sentence(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1)])
    with pytest.raises(UserInputError, match="looks like loaddata"):
        ingest(sqlite_workspace, table, IngestParams(kind="features"))
    with pytest.raises(UserInputError, match="no file or folder"):
        ingest(sqlite_workspace, tmp_path / "absent.csv")
    assert count(sqlite_workspace, Run) == 0


def test_a_dry_run_says_what_each_file_would_become(workspace: Workspace, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), bad_row(2)])
    found = ingest(workspace, table, dry_run=True)
    assert (found.layout, found.rows, found.images, found.refused) == ("loaddata", 2, 1, 1)
    assert [row["channel"] for row in found.preview] == ["RNA", "DNA"]
    names = ("plate", "well", "site", "treatment")
    assert [found.preview[0][name] for name in names] == ["P1", "A02", 1, "DMSO"]
    assert [issue.line for issue in found.issues] == [3]
    tables = (Plate, Image, Folder, Run, IngestIssue)
    assert [count(workspace, table) for table in tables] == [0] * len(tables)


def test_wells_of_other_plates_are_not_touched(workspace: Workspace, tmp_path: Path) -> None:
    first = ingest(workspace, write_table(tmp_path / "t.csv", [loaddata(1, plate="P1")]))
    second = ingest(workspace, write_table(tmp_path / "u.csv", [loaddata(1, plate="P2")]))
    assert (first.plates, first.images, second.plates, second.images) == (1, 1, 1, 1)
    assert count(workspace, Well) == 2


CELLS = st.one_of(
    st.sampled_from(["", "NA", "DMSO", "NAD+", "P1", "1", "A01", "a1", "r01c02f03p01-ch1.tiff"]),
    st.text(max_size=6),
)
COLUMNS = (
    "FileName_OrigDNA",
    "PathName_OrigDNA",
    "Metadata_Plate",
    "Metadata_Well",
    "Metadata_Site",
    "Metadata_pert_iname",
    "Metadata_target",
)
NAMES = numbers()


def ingested(workspace: Workspace, table: Path) -> IngestResult | None:
    """What became of a table, None where it is of no use; that is said in one line."""
    message: CellstoreError | None = None
    try:
        return ingest(workspace, table)
    except CellstoreError as error:
        message = error
    assert "\n" not in str(message)
    return None


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_row_of_a_random_table_is_lost(
    sqlite_workspace: Workspace, tmp_path: Path, data: st.DataObject
) -> None:
    columns = data.draw(st.permutations(COLUMNS))
    rows = data.draw(
        st.lists(
            st.one_of(
                st.fixed_dictionaries(dict.fromkeys(columns, CELLS)),
                st.builds(
                    lambda site, plate: {
                        **dict.fromkeys(columns, ""),
                        "FileName_OrigDNA": f"r01c02f{site:02d}p01-ch1sk1fk1fl1.tiff",
                        "Metadata_Plate": plate,
                        "Metadata_Site": str(site),
                    },
                    st.integers(1, 3),
                    st.sampled_from(["001", "µ plate", "1053601756"]),
                ),
            ),
            min_size=1,
            max_size=6,
        )
    )
    table = write_table(tmp_path / f"{next(NAMES)}.csv", rows)
    damage = data.draw(st.one_of(st.none(), st.tuples(st.integers(0, 400), st.binary(max_size=3))))
    if damage is not None:
        content = table.read_bytes()
        position = min(damage[0], len(content))
        table.write_bytes(content[:position] + damage[1] + content[position + 1 :])
    first = ingested(sqlite_workspace, table)
    if first is None:
        return
    assert balanced(first)
    before = dump(sqlite_workspace)
    again = ingest(sqlite_workspace, table)
    assert (again.rows, again.created, again.updated) == (first.rows, 0, 0)
    assert dump(sqlite_workspace) == before
    with sqlite_workspace.database.begin() as session:
        for model in (ImageFile, Image, Well):
            session.execute(delete(model))


def test_one_file_is_one_channel(workspace: Workspace, tmp_path: Path) -> None:
    ingest(workspace, write_table(tmp_path / "t.csv", [loaddata(1)]))
    row = loaddata(1)
    renamed = {key.replace("OrigRNA", "OrigMito"): value for key, value in row.items()}
    result = ingest(workspace, write_table(tmp_path / "u.csv", [renamed]))
    assert [item.reason for item in result.issues if item.severity is Severity.SUSPICIOUS] == [
        "one file under two channels"
    ]
    assert count(workspace, ImageFile) == 2


def test_what_another_table_updated_since_stays_and_is_told(
    workspace: Workspace, tmp_path: Path
) -> None:
    first = write_table(tmp_path / "t.csv", [loaddata(1)])
    ingest(workspace, first)
    elsewhere = IngestParams(maps=(("/somewhere", "/there"),))
    moved = ingest(workspace, first, elsewhere)
    assert moved.updated == 1
    again = ingest(workspace, first)
    assert (again.unchanged, again.notes[0].split(":")[0]) == (1, "Skipped")
    assert "run 2 changed these images" in again.notes[0]
    assert "--reread" in again.notes[0]
    reread = ingest(workspace, first, IngestParams(reread=True))
    assert reread.updated == 1
    with workspace.database.read() as session:
        assert {file.uri for file in session.scalars(select(ImageFile))} == {
            f"/somewhere/else/r01c02f01p01-ch{number}sk1fk1fl1.tiff" for number in (1, 2)
        }


def test_a_plane_that_the_table_says_is_a_plane(workspace: Workspace, tmp_path: Path) -> None:
    rows = [
        {
            "FileName_OrigDNA": f"z{plane}.tif",
            "Metadata_Plate": "P1",
            "Metadata_Well": "A01",
            "Metadata_Site": "1",
            "Metadata_Z": str(plane),
        }
        for plane in (1, 2, 3)
    ]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert (result.created, result.refused) == (3, 0)


def sizes(workspace: Workspace) -> list[float | None]:
    with workspace.database.read() as session:
        return list(session.scalars(select(Image.pixel_size).order_by(Image.site)))


def test_the_size_of_a_pixel_comes_from_the_table_the_file_or_the_user(
    workspace: Workspace, tmp_path: Path
) -> None:
    resolution = {f"Metadata_ImageResolution{axis}": "" for axis in "XY"}
    rows = [loaddata(1) | dict.fromkeys(resolution, "3.25E-07"), loaddata(2) | resolution]
    table = write_table(tmp_path / "t.csv", rows)
    ingest(workspace, table)
    assert sizes(workspace) == [0.325, None]
    folder = tmp_path / "images"
    folder.mkdir()
    for site in (1, 2):
        for number in (1, 2):
            tifffile.imwrite(
                folder / f"r01c02f{site:02d}p01-ch{number}sk1fk1fl1.tiff",
                np.full((4, 5), site + number, np.uint16),
                ome=True,
                metadata={"axes": "YX", "PhysicalSizeX": 0.65, "PhysicalSizeY": 0.65},
            )
    assert ingest(workspace, table, IngestParams(images=folder)).missing_images == 0
    assert sizes(workspace) == [0.325, 0.65]
    given = ingest(workspace, table, IngestParams(pixel_size=0.65))
    assert (given.updated, given.unchanged, sizes(workspace)) == (1, 1, [0.65, 0.65])
    with pytest.raises(UserInputError, match="--pixel-size must be above 0"):
        ingest(workspace, table, IngestParams(pixel_size=-1.0))


@pytest.mark.each_database
def test_metadata_columns_are_kept_with_the_plate_or_the_well(
    workspace: Workspace, tmp_path: Path
) -> None:
    def row(well: str, site: int, passage: str, focus: str) -> dict[str, str]:
        names = {
            key: value.replace("r01c02", "r01c03") if well == "A03" else value
            for key, value in loaddata(site).items()
        }
        more = {"Source": "source_4", "cell_line": "A549", "passage": passage, "focus": focus}
        more = {f"Metadata_{key}": value for key, value in more.items()}
        return names | {"Metadata_Well": well} | more

    rows = [row("A02", 1, "7", "0.1"), row("A02", 2, "7", "0.2"), row("A03", 1, "8", "0.1")]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert [note for note in result.notes if "focus" in note] == [
        "metadata not kept, because the images of one well have different values: focus"
    ]
    more = [row("A03", 1, "9", "0.1") | {"Metadata_Source": "source_5"}]
    ingest(workspace, write_table(tmp_path / "u.csv", more))
    with workspace.database.read() as session:
        plate = session.scalars(select(Plate)).one()
        wells = session.execute(select(Well.name, Well.metadata_).order_by(Well.name)).all()
    assert (plate.cell_line, plate.metadata_) == ("A549", {"Source": "source_4"})
    assert [tuple(well) for well in wells] == [
        ("A02", {"passage": "7"}),
        ("A03", {"passage": "9", "Source": "source_5", "focus": "0.1"}),
    ]


def test_other_columns_of_a_plate_map_beside_the_images_are_kept(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    names = tmp_path / "compounds.csv"
    names.write_text("broad_sample,pert_iname\nBRD-1,taxol\n")
    wells = tmp_path / "map.csv"
    wells.write_text("well_position,broad_sample,solvent\nA02,BRD-1,water\n")
    params = IngestParams(platemap=wells, compounds=(names,))
    ingest(sqlite_workspace, write_table(tmp_path / "t.csv", [loaddata(1)]), params)
    with sqlite_workspace.database.read() as session:
        found = session.scalars(select(Well).where(Well.name == "A02")).one()
        assert (found.metadata_ or {})["solvent"] == "water"


@pytest.mark.parametrize("with_images", [True, False])
def test_a_map_with_images_and_alone_says_the_same_of_the_plate(
    workspace: Workspace, tmp_path: Path, with_images: bool
) -> None:
    rows = [
        {key: text.replace("r01c02", f"r01c0{well}") for key, text in loaddata(1).items()}
        | {"Metadata_Well": f"A0{well}"}
        for well in (2, 3, 4)
    ]
    images = write_table(tmp_path / "t.csv", rows)
    plate_map = tmp_path / "map.csv"
    # A04 is blank, and has a number of its own.
    lines = ("A2,taxol,A549,24,b7,odd,1", "A3,noco,A549,24,b7,,2", "A4,,,,,,3")
    plate_map.write_text("\n".join(("Well,Compound,Cell line,Time (h),Batch,Note,Lot", *lines)))
    ingest(workspace, images, IngestParams(platemap=plate_map if with_images else None))
    with workspace.database.read() as session:
        barcode = session.scalars(select(Plate.barcode)).one()
    params = IngestParams(plate=barcode)
    counts = [
        (found.updated, found.unchanged)
        for found in (ingest(workspace, plate_map, params) for _ in range(2))
    ]
    assert counts == [(0, 3) if with_images else (3, 0), (0, 3)]
    with workspace.database.read() as session:
        plate = session.scalars(select(Plate)).one()
        wells = session.execute(select(Well.name, Well.metadata_).order_by(Well.name)).all()
    assert (plate.cell_line, plate.time_point, plate.batch) == ("A549", "24 h", "b7")
    assert not plate.metadata_
    # A note on one well is not one on the plate.
    assert dict(map(tuple, wells)) == {
        "A02": {"Note": "odd", "Lot": "1"},
        "A03": {"Lot": "2"},
        "A04": {"Lot": "3"},
    }
    # What a corrected map says of a well that had another value replaces it.
    plate_map.write_text(plate_map.read_text().replace("noco,A549", "noco,HeLa"))
    ingest(workspace, plate_map, params)
    plate_map.write_text(plate_map.read_text().replace("noco,HeLa", "noco,A549"))
    assert ingest(workspace, plate_map, replace(params, reread=True)).updated == 1
    with workspace.database.read() as session:
        found = session.scalars(select(Well.metadata_).where(Well.name == "A03")).one()
    assert (found or {})["cell_line"] == "A549"


def test_where_the_files_lie_is_no_part_of_the_recipe(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    recipes = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        (folder / "images").mkdir(parents=True)
        maps = folder / "map.csv"
        maps.write_text("well_position,broad_sample\nA02,BRD-1\n")
        (folder / "names.csv").write_text("broad_sample,pert_iname\nBRD-1,taxol\n")
        params = IngestParams(
            images=folder / "images", platemap=maps, compounds=(folder / "names.csv",)
        )
        result = ingest(sqlite_workspace, write_table(folder / "t.csv", [loaddata(1)]), params)
        with sqlite_workspace.database.read() as session:
            recipes.append(session.get_one(Run, result.run_id).recipe)
    assert len({recipe.fingerprint for recipe in recipes}) == 1
    stored = recipes[0].parameters
    assert [file["name"] for file in stored["files"]] == ["t.csv", "names.csv", "map.csv"]
    assert str(tmp_path) not in str(stored)


@pytest.mark.parametrize(
    ("params", "option"),
    [(IngestParams(name="mine"), "--name"), (IngestParams(binary=True), "--binary-masks")],
)
def test_an_option_that_would_mean_nothing_is_refused(
    sqlite_workspace: Workspace, tmp_path: Path, params: IngestParams, option: str
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1)])
    with pytest.raises(UserInputError, match=f"does not use {option}"):
        ingest(sqlite_workspace, table, params)
