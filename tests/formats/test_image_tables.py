from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_metadata import PLATE, compound_annotation, write_published_metadata
from realdata import real_data

from cellstore.errors import BadTableError, UserInputError
from cellstore.formats.layouts import Layout, detect_layout, read_images
from cellstore.formats.loaddata import read_loaddata
from cellstore.formats.names import format_well
from cellstore.formats.published import read_published
from cellstore.formats.records import FileRef, ImageRecord, Refusal, TreatmentRecord
from cellstore.formats.tables import open_table
from cellstore.terms import Control, Perturbation

LOADDATA = {
    "Metadata_Plate": "001",
    "Metadata_Well": "B7",
    "Metadata_Site": "4",
    "FileName_OrigDNA": "dna.tif",
    "PathName_OrigDNA": "/elsewhere/images",
}
PUBLISHED = {
    "FileName_OrigRNA": "r02c07f04p01-ch3sk1fk1fl1.tiff",
    "Metadata_pert_iname": "AMG900",
    "Metadata_target": "AURKA",
}


def table(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "images.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path, plate: str | None = None) -> list[ImageRecord | Refusal]:
    return list(read_images(open_table(path), plate=plate))


def only_image(path: Path, plate: str | None = None) -> ImageRecord:
    (record,) = read(path, plate)
    assert isinstance(record, ImageRecord)
    return record


def only_refusal(path: Path, plate: str | None = None) -> Refusal:
    (record,) = read(path, plate)
    assert isinstance(record, Refusal)
    return record


def test_a_loaddata_row(tmp_path: Path) -> None:
    image = only_image(table(tmp_path, LOADDATA))
    assert (image.plate, image.row, image.column, image.site) == ("001", 2, 7, 4)
    assert (image.line, image.plane, image.time_point) == (2, 1, 1)
    assert (image.core_name, image.treatment) == (None, None)
    assert image.files == (FileRef("DNA", None, "dna.tif", "/elsewhere/images"),)


def test_a_published_row(tmp_path: Path) -> None:
    image = only_image(table(tmp_path, PUBLISHED), plate="BR1")
    assert (image.plate, image.row, image.column, image.site) == ("BR1", 2, 7, 4)
    assert image.core_name == "r02c07f04"
    assert image.files == (FileRef("RNA", 3, "r02c07f04p01-ch3sk1fk1fl1.tiff", None),)
    assert image.treatment == TreatmentRecord(Perturbation.COMPOUND, "AMG900", "AURKA")


def test_treatment_columns_of_loaddata(tmp_path: Path) -> None:
    row = LOADDATA | {
        "Metadata_pert_iname": "TC-S-7004",
        "Metadata_gene": "DYRK1A",
        "Metadata_broad_sample": "BRD-1",
        "Metadata_control_type": "poscon_diverse",
    }
    assert only_image(table(tmp_path, row)).treatment == TreatmentRecord(
        Perturbation.COMPOUND, "TC-S-7004", "DYRK1A", Control.POSITIVE, "BRD-1"
    )


def test_dmso_is_the_negative_control(tmp_path: Path) -> None:
    image = only_image(table(tmp_path, PUBLISHED | {"Metadata_pert_iname": "DMSO"}), plate="p")
    assert image.treatment is not None
    assert image.treatment.control is Control.NEGATIVE


def test_row_and_column_numbers_instead_of_a_well(tmp_path: Path) -> None:
    row = {key: value for key, value in LOADDATA.items() if key != "Metadata_Well"}
    image = only_image(table(tmp_path, row | {"Metadata_Row": "16", "Metadata_Col": "24"}))
    assert format_well(image.row, image.column) == "P24"


def test_flat_fields_are_no_channels_and_an_empty_name_is_a_channel_not_taken(
    tmp_path: Path,
) -> None:
    row = LOADDATA | {"FileName_IllumDNA": "illum.npy", "FileName_OrigER": "", "FileName_X": "x"}
    assert [file.channel for file in only_image(table(tmp_path, row)).files] == ["DNA"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Metadata_Well": "Q99"}, "not a well"),
        ({"Metadata_Well": ""}, "no well"),
        ({"Metadata_Site": "one"}, "not a whole number"),
        ({"Metadata_Site": "-1"}, "not a whole number"),
        ({"Metadata_Site": ""}, "no site"),
        ({"Metadata_Plate": "NA"}, "no plate"),
        ({"FileName_OrigDNA": ""}, "no image file"),
        ({"FileName_OrigDNA": "../../etc/passwd"}, "file name with a folder in it"),
        ({"FileName_OrigDNA": "C:\\x.tif"}, "file name with a folder in it"),
        ({"FileName_OrigDNA": ".."}, "file name with a folder in it"),
        ({"FileName_OrigDNA": "r01c01f01p01-ch1sk1fk1fl1.tiff"}, "well and file name disagree"),
    ],
)
def test_loaddata_rows_that_cannot_be_used(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    refusal = only_refusal(table(tmp_path, LOADDATA | change))
    assert (refusal.line, refusal.reason) == (2, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Metadata_pert_iname": ""}, "no treatment"),
        ({"Metadata_pert_iname": "NA"}, "no treatment"),
        ({"FileName_OrigRNA": "image.tif"}, "no well"),
    ],
)
def test_published_rows_that_cannot_be_used(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    assert only_refusal(table(tmp_path, PUBLISHED | change), plate="p").reason == reason


def test_channels_of_different_fields_are_refused(tmp_path: Path) -> None:
    row = PUBLISHED | {"FileName_OrigDNA": "r02c07f05p01-ch5sk1fk1fl1.tiff"}
    assert only_refusal(table(tmp_path, row), plate="p").reason == "files of different fields"


def test_rows_of_another_plate_than_asked_for_are_refused(tmp_path: Path) -> None:
    assert only_refusal(table(tmp_path, LOADDATA), plate="002").reason == "another plate"


def test_an_integer_written_by_pandas_is_an_integer(tmp_path: Path) -> None:
    assert only_image(table(tmp_path, LOADDATA | {"Metadata_Site": "4.0"})).site == 4


def test_layouts_are_told_from_the_columns(tmp_path: Path) -> None:
    assert detect_layout(table(tmp_path, LOADDATA)) is Layout.LOADDATA
    assert detect_layout(table(tmp_path, PUBLISHED)) is Layout.PUBLISHED
    assert detect_layout(table(tmp_path, PUBLISHED | LOADDATA)) is Layout.LOADDATA


def test_a_table_of_neither_shape_says_what_each_needs(tmp_path: Path) -> None:
    path = table(tmp_path, {"Filename_OrigRNA": "x", "Metadata_pert": "y"})
    with pytest.raises(BadTableError, match=r"FileName_OrigRNA.*LoadData.*'Filename_OrigRNA'"):
        detect_layout(path)


def test_missing_columns_and_missing_plate(tmp_path: Path) -> None:
    bare = open_table(table(tmp_path, PUBLISHED))
    with pytest.raises(UserInputError, match="--plate"):
        read_images(bare)
    with pytest.raises(BadTableError, match="'Metadata_Plate'"):
        read_loaddata(bare)
    with pytest.raises(BadTableError, match="'Metadata_pert_iname'"):
        read_published(open_table(table(tmp_path, LOADDATA)), "p")


def test_one_channel_in_two_columns(tmp_path: Path) -> None:
    path = table(tmp_path, LOADDATA | {"FileName_Origdna": "b.tif"})
    with pytest.raises(BadTableError, match="two FileName columns for the channel dna"):
        read(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "Metadata_Plate": st.sampled_from(["p", "", "NA"]),
                "Metadata_Well": st.sampled_from(["A01", "a1", "ZZ1", "", "P25"]),
                "Metadata_Site": st.sampled_from(["1", "0", "x", "", "9" * 40]),
                "FileName_OrigDNA": st.text(
                    st.characters(exclude_categories=["Cs", "Cc"]), max_size=9
                ),
            }
        ),
        min_size=1,
        max_size=9,
    )
)
def test_no_row_is_lost(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    assert [record.line for record in read(table(tmp_path, *rows))] == list(range(2, len(rows) + 2))


@pytest.mark.real
def test_the_plate_of_jump() -> None:
    path = real_data("distributed_cellprofiler/load_data_CPG_BR00117035.csv")
    records = read(path)
    images = [record for record in records if isinstance(record, ImageRecord)]
    assert len(images) == len(records) == 216
    channels = {(file.channel, file.number) for image in images for file in image.files}
    assert channels == {("Mito", 1), ("AGP", 2), ("RNA", 3), ("ER", 4), ("DNA", 5)}
    assert {image.plate for image in images} == {"BR00117035"}
    assert {image.batch for image in images} == {"2021_04_26_Batch1"}
    assert len({(image.row, image.column, image.site) for image in images}) == 216


@pytest.mark.real
def test_the_table_of_pe2loaddata() -> None:
    image = only_image(real_data("pe2loaddata/Version1/load_data_version1.csv"))
    assert (image.plate, image.core_name, image.site) == ("BR00121482", "r01c01f01", 1)
    assert [file.number for file in image.files] == [3, 4, 2, 1, 6, 5]


@pytest.mark.real
@pytest.mark.parametrize(
    ("two_spellings", "labels", "lonely"), [(True, 250, 236), (False, 249, 234)]
)
def test_the_published_study(tmp_path: Path, two_spellings: bool, labels: int, lonely: int) -> None:
    path = write_published_metadata(real_data("cpjump1"), tmp_path / "m.csv", two_spellings)
    records = read(path, plate=PLATE)
    images = [record for record in records if isinstance(record, ImageRecord)]
    assert len(images) == len(records) == 2867
    assert len({(image.row, image.column) for image in images}) == 319
    of_label = Counter(image.treatment.pert_iname for image in images if image.treatment)
    wells = {
        (image.treatment.pert_iname, image.row, image.column) for image in images if image.treatment
    }
    wells_of = Counter(name for name, _, _ in wells)
    assert (of_label["DMSO"], len(of_label)) == (509, labels)
    assert sum(count == 1 for count in wells_of.values()) == lonely
    targets = {image.treatment.target for image in images if image.treatment}
    assert len(targets - {None}) == 147


@pytest.mark.real
def test_folders_of_the_real_fields_agree_with_the_plate_map() -> None:
    annotation = compound_annotation(real_data("cpjump1"))
    dmso = annotation.for_well(PLATE, 4, 14)
    assert dmso is not None
    assert dmso.control is Control.NEGATIVE
    amg900 = annotation.for_well(PLATE, 14, 9)
    assert amg900 is not None
    assert amg900.pert_iname == "AMG900"
