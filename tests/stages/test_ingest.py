"""Ingest: every row accounted for, twice is once, missing files are filled in later."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from published_metadata import PLATE, write_published_metadata
from realdata import real_data
from sqlalchemy import ColumnElement, func, select

from cellstore.config import IngestParams
from cellstore.enums import Severity, Status
from cellstore.errors import BadTableError, UserInputError
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.lookup import find_image
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Event,
    Folder,
    Image,
    ImageFile,
    IngestFile,
    Plate,
    Run,
    Treatment,
    Well,
)
from cellstore.stages.ingest.ingest import ingest

pytestmark = pytest.mark.one_database

CHANNELS = ("RNA", "DNA")


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def loaddata(site: int, treatment: str = "DMSO", plate: str = "P1") -> dict[str, str]:
    names = {
        f"FileName_Orig{name}": f"r01c02f{site:02d}p01-ch{number}sk1fk1fl1.tiff"
        for number, name in enumerate(CHANNELS, start=1)
    }
    folders = {f"PathName_Orig{name}": "/somewhere/else" for name in CHANNELS}
    where = {"Metadata_Plate": plate, "Metadata_Well": "A02", "Metadata_Site": str(site)}
    return {**names, **folders, **where, "Metadata_pert_iname": treatment, "Metadata_target": ""}


def write_image(folder: Path, name: str, value: int, shape: tuple[int, int] = (4, 5)) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(encode_tiff(np.full(shape, value, np.uint16)))
    return path


def count(workspace: Workspace, table: type, *where: ColumnElement[bool]) -> int:
    with workspace.database.read() as session:
        return session.scalar(select(func.count()).select_from(table).where(*where)) or 0


def dump(workspace: Workspace) -> dict[str, list[tuple[object, ...]]]:
    """All that an ingest writes but for its own account, by natural names instead of ids."""
    wells = select(Plate.barcode, Well.name, Treatment.name, Treatment.target)
    of_plate = wells.join(Well, Well.plate_id == Plate.id)
    images = select(
        Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point, Image.core_name
    ).add_columns(Image.content_sha256, ImageFile.channel, ImageFile.position, ImageFile.name)
    files = images.add_columns(ImageFile.sha256, Folder.uri).select_from(ImageFile)
    joined = files.join(Image, Image.id == ImageFile.image_id).join(Well).join(Plate)
    queries = {
        "wells": of_plate.outerjoin(Treatment, Treatment.id == Well.treatment_id),
        "files": joined.outerjoin(Folder, Folder.id == ImageFile.folder_id),
    }
    with workspace.database.read() as session:
        return {
            name: sorted((tuple(row) for row in session.execute(query)), key=repr)
            for name, query in queries.items()
        }


@pytest.mark.each_database
def test_rows_become_plates_wells_treatments_images_files(
    workspace: Workspace, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), loaddata(2)])
    result = ingest(workspace, table)
    assert (result.rows, result.created, result.missing_images) == (2, 2, 2)
    tables = (Plate, Well, Treatment, Image, ImageFile)
    assert [count(workspace, item) for item in tables] == [1, 1, 1, 2, 4]
    with workspace.database.read() as session:
        image = session.get_one(Image, find_image(session, "r01c02f02"))
        assert (image.site, image.content_sha256) == (2, None)
        assert find_image(session, "P1/A2/2") == image.id
        assert find_image(session, "r01c02f02p01-ch2sk1fk1fl1.tiff") == image.id


@pytest.mark.each_database
def test_a_second_ingest_changes_nothing_and_is_recorded(
    workspace: Workspace, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), loaddata(2)])
    ingest(workspace, table)
    before = dump(workspace)
    second = ingest(workspace, table)
    assert (second.created, second.updated, second.unchanged) == (0, 0, 2)
    assert dump(workspace) == before
    assert count(workspace, Run) == count(workspace, IngestFile) == 2


def test_the_same_rows_in_another_file_change_nothing(workspace: Workspace, tmp_path: Path) -> None:
    rows = [loaddata(1), loaddata(2)]
    ingest(workspace, write_table(tmp_path / "t.csv", rows))
    before = dump(workspace)
    second = ingest(workspace, write_table(tmp_path / "u.csv", rows[::-1]))
    assert (second.rows, second.unchanged) == (2, 2)
    assert dump(workspace) == before


def test_missing_files_are_filled_in_by_a_later_ingest(
    workspace: Workspace, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1), loaddata(2)])
    ingest(workspace, table)
    folder = tmp_path / "images"
    for number in (1, 2):
        write_image(folder, f"r01c02f01p01-ch{number}sk1fk1fl1.tiff", number)
    write_image(folder, "r01c02f02p01-ch1sk1fk1fl1.tiff", 3)
    result = ingest(workspace, table, IngestParams(images=folder))
    assert (result.created, result.updated, result.missing_images) == (0, 2, 1)
    again = ingest(workspace, table, IngestParams(images=folder))
    assert (again.updated, again.unchanged) == (0, 2)
    without = ingest(workspace, table)
    assert (without.unchanged, without.missing_images) == (2, 1)


@pytest.mark.each_database
def test_changed_bytes_are_noticed(workspace: Workspace, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1)])
    folder = tmp_path / "images"
    for number in (1, 2):
        write_image(folder, f"r01c02f01p01-ch{number}sk1fk1fl1.tiff", number)
    ingest(workspace, table, IngestParams(images=folder))
    with workspace.database.read() as session:
        before = session.get_one(Image, find_image(session, "r01c02f01")).content_sha256
    write_image(folder, "r01c02f01p01-ch1sk1fk1fl1.tiff", 77, (8, 5))
    assert ingest(workspace, table, IngestParams(images=folder)).updated == 1
    with workspace.database.read() as session:
        assert session.get_one(Image, find_image(session, "r01c02f01")).content_sha256 not in (
            None,
            before,
        )


def test_a_projection_stands_for_the_channels_that_were_expected(
    workspace: Workspace, tmp_path: Path
) -> None:
    row = {
        "FileName_OrigRNA": "r01c02f01p01-ch3sk1fk1fl1.tiff",
        "Metadata_pert_iname": "DMSO",
        "Metadata_target": "",
    }
    table = write_table(tmp_path / "t.csv", [row])
    ingest(workspace, table, IngestParams(plate="P1"))
    write_image(tmp_path / "images", "r01c02f01.tif", 5)
    result = ingest(workspace, table, IngestParams(plate="P1", images=tmp_path / "images"))
    assert (result.updated, result.missing_images) == (1, 0)
    with workspace.database.read() as session:
        files = session.scalars(select(ImageFile)).all()
        assert [(file.channel, file.name) for file in files] == [("projection", "r01c02f01.tif")]
    assert ingest(workspace, table, IngestParams(plate="P1")).unchanged == 1


def test_a_row_that_contradicts_an_earlier_one_is_refused_with_its_line(
    workspace: Workspace, tmp_path: Path
) -> None:
    rows = [loaddata(1), loaddata(2, treatment="aloxistatin"), loaddata(3)]
    result = ingest(workspace, write_table(tmp_path / "t.csv", rows))
    assert result.created == 2
    assert [(item.line, item.reason) for item in result.issues if item.severity == "refused"] == [
        (3, "the well has another treatment")
    ]


@pytest.mark.each_database
def test_a_corrected_table_changes_the_treatment_and_says_what_changed(
    workspace: Workspace, tmp_path: Path
) -> None:
    ingest(workspace, write_table(tmp_path / "t.csv", [loaddata(1), loaddata(2)]))
    table = write_table(tmp_path / "u.csv", [loaddata(1, treatment="aloxistatin")])
    later = ingest(workspace, table)
    assert (later.rows, later.updated, later.refused) == (1, 1, 0)
    with workspace.database.read() as session:
        change = session.scalars(
            select(Event).where(Event.table_name == "wells", Event.old.is_not(None))
        ).one()
        well = session.scalars(select(Well)).one()
        assert change.old == {"treatment_id": 1, "treatment": "DMSO", "control": "negative"}
        assert change.new == {
            "treatment_id": well.treatment_id,
            "treatment": "aloxistatin",
            "control": None,
        }
    assert (change.table_name, change.row_id) == ("wells", well.id)
    assert (change.file, change.line, change.run_id) == ("u.csv", 2, later.run_id)
    # The first table, byte by byte the same, does not undo the correction.
    back = ingest(workspace, tmp_path / "t.csv")
    assert back.unchanged == 2
    assert count(workspace, Event, Event.table_name == "wells", Event.old.is_not(None)) == 1
    assert "1 well has a newer label from another table; kept" in " ".join(back.notes)


def test_an_unreadable_image_stays_missing_and_is_named(
    workspace: Workspace, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [loaddata(1)])
    folder = tmp_path / "images"
    write_image(folder, "r01c02f01p01-ch1sk1fk1fl1.tiff", 1)
    (folder / "r01c02f01p01-ch2sk1fk1fl1.tiff").write_bytes(b"II*\0rubbish")
    result = ingest(workspace, table, IngestParams(images=folder))
    assert (result.created, result.missing_images) == (1, 1)
    (problem,) = (item for item in result.issues if item.severity is Severity.PROBLEM)
    assert problem.reason == "image cannot be read"
    assert "ch2" in problem.detail


def test_a_useless_table_is_one_sentence_and_writes_nothing(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    for content, words in (
        ("", "is empty"),
        ("a,b\n1,2\n", "FileName_Orig"),
        ("FileName_OrigRNA,Metadata_pert_iname\n", "no rows"),
    ):
        table.write_text(content)
        with pytest.raises(BadTableError, match=words):
            ingest(sqlite_workspace, table, IngestParams(plate="P"))
    for path, words in (
        (tmp_path / "absent", "There is no file or folder"),
        (Path("/dev/null"), "cannot be read"),
    ):
        with pytest.raises(UserInputError, match=words):
            ingest(sqlite_workspace, path)
    assert count(sqlite_workspace, Plate) == count(sqlite_workspace, IngestFile) == 0
    with sqlite_workspace.database.read() as session:
        assert set(session.scalars(select(Run.status))) <= {Status.FAILED}


def test_the_published_shape_needs_a_plate(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    row = {"FileName_OrigRNA": "r01c01f01p01-ch3sk1fk1fl1.tiff", "Metadata_pert_iname": "DMSO"}
    with pytest.raises(UserInputError, match="--plate"):
        ingest(sqlite_workspace, write_table(tmp_path / "t.csv", [row]))


@pytest.mark.real
def test_the_published_table_of_2867_rows(workspace: Workspace, tmp_path: Path) -> None:
    table = write_published_metadata(real_data("cpjump1"), tmp_path / "m.csv")
    result = ingest(workspace, table, IngestParams(plate=PLATE))
    assert (result.rows, result.created, result.refused) == (2867, 2867, 0)
    assert (result.wells, result.images) == (319, 2867)
    with workspace.database.read() as session:
        joined = select(func.count()).select_from(Image).join(Well).join(Treatment)
        assert session.scalar(joined.where(Treatment.name == "DMSO")) == 509
        assert session.scalar(select(func.count(Treatment.name.distinct()))) == 250


@pytest.mark.real
def test_a_real_loaddata_table(sqlite_workspace: Workspace) -> None:
    table = real_data("distributed_cellprofiler") / "load_data_CPG_BR00117035.csv"
    result = ingest(sqlite_workspace, table)
    assert (result.layout, result.rows, result.created, result.wells) == ("loaddata", 216, 216, 24)
    assert count(sqlite_workspace, ImageFile) == 216 * 5


@pytest.mark.real
def test_a_plate_map_says_what_was_done_to_the_wells(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    tables = real_data("cpjump1") / "metadata"
    row = {key: value for key, value in loaddata(5).items() if "pert" not in key}
    row |= {"Metadata_Well": "D14"} | {
        key: value.replace("r01c02", "r04c14") for key, value in row.items() if "FileName" in key
    }
    maps = tables / "platemaps/2020_11_04_CPJUMP1/platemap"
    params = IngestParams(
        platemap=maps / "JUMP-Target-1_compound_platemap.txt",
        compounds=(tables / "external_metadata/JUMP-Target-1_compound_metadata.tsv",),
    )
    result = ingest(sqlite_workspace, write_table(tmp_path / "t.csv", [row]), params)
    assert result.created == 1
    with sqlite_workspace.database.read() as session:
        well = session.scalars(select(Well)).one()
        assert well.treatment is not None
        assert (well.treatment.name, well.control) == ("DMSO", "negative")


def test_a_dry_run_says_what_is_passed_over(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    write_image(tmp_path / "P", "x_A01_s1_w1.tif", 1)
    write_image(tmp_path / "P", "x_A01_s1_w1_thumb.tif", 1)
    found = ingest(sqlite_workspace, tmp_path / "P", dry_run=True)
    assert (found.rows, found.notes) == (1, ("thumbnails, skipped: 1",))


@pytest.mark.parametrize("folders", [("a", "b"), ("b", "a")])
def test_files_of_one_name_in_two_folders_are_not_one_image(
    workspace: Workspace, tmp_path: Path, folders: tuple[str, str]
) -> None:
    for value, folder in enumerate(folders):
        (tmp_path / "P" / folder).mkdir(parents=True)
        write_image(tmp_path / "P" / folder, "A01_s1.tif", value)
    params = IngestParams(pattern=r"(?P<well>[A-H]\d\d)_s(?P<site>\d)", plate="P")
    result = ingest(workspace, tmp_path / "P", params)
    assert (result.created, result.refused) == (1, 1)
    assert result.reasons == ((Severity.REFUSED, "the same field twice, with other files", 1),)
    assert all(f"P/{folder}/A01_s1.tif" in result.issues[0].detail for folder in folders)


def test_what_was_passed_over_in_a_file_is_said_by_ingest(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    grey = np.full((4, 5), 7, np.uint8)
    (tmp_path / "P").mkdir()
    tifffile.imwrite(tmp_path / "P/A01.tif", grey, photometric="miniswhite")
    tifffile.imwrite(
        tmp_path / "P/A02.tif",
        np.stack([grey, grey], axis=-1),
        photometric="minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"],
    )
    colour = np.stack([grey, grey + 1, grey], axis=-1)
    tifffile.imwrite(tmp_path / "P/A03.tif", colour, photometric="rgb")
    result = ingest(sqlite_workspace, tmp_path / "P", IngestParams(pattern=r"(?P<well>A\d\d)"))
    assert (result.created, result.refused, result.missing_images) == (2, 1, 0)
    assert set(result.reasons) == {
        (Severity.REFUSED, "image cannot be read", 1),
        (Severity.SUSPICIOUS, "white is zero, values not inverted", 1),
        (Severity.SUSPICIOUS, "alpha channel, skipped", 1),
    }
    # In a table, too, colours are refused before anything is computed.
    table = write_table(
        tmp_path / "t.csv",
        [{**loaddata(1), "FileName_OrigDNA": "A03.tif", "PathName_OrigDNA": str(tmp_path / "P")}],
    )
    (issue,) = ingest(sqlite_workspace, table).issues
    assert (issue.severity, issue.reason) == (Severity.PROBLEM, "image cannot be read")


def test_blank_wells_are_named_where_they_have_images(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    rows = [f"{name}.tif,P1,{name},1" for name in ("A01", "A02", "A03")]
    table = tmp_path / "t.csv"
    header = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site"
    table.write_text("\n".join([header, *rows]))
    platemap = tmp_path / "map.csv"
    platemap.write_text("Well,Compound\nA1,taxol\nA2,\nA4,\nA5,noco\n")
    params = IngestParams(platemap=platemap)
    blank, missing = ingest(sqlite_workspace, table, params, dry_run=True).notes
    assert "so their treatment is not known: A02. To" in blank
    assert "wells with images got no treatment: A03, but wells without images" in missing
    platemap.write_text("Well,Compound\nA1,taxol\nA2,\nA3,x\nA4,\n")
    (note,) = ingest(sqlite_workspace, table, params, dry_run=True).notes
    assert note.startswith("map.csv is blank")
