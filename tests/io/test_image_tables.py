from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_metadata import (
    PLATE,
    compound_annotation,
    treatment_of_well,
    write_published_metadata,
)
from realdata import real_data

from cellstore.enums import Control, PerturbationKind
from cellstore.errors import BadTableError, UserInputError
from cellstore.io.filenames import format_well
from cellstore.io.image_tables import FileRef, ImageRecord, ImageRows, read_image_table
from cellstore.io.layouts import Layout, detect
from cellstore.io.tables import Refusal, open_table
from cellstore.io.treatments import TreatmentRecord

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


PHENIX = LOADDATA | {
    "FileName_OrigDNA": "r02c07f04p01-ch5sk1fk1fl1.tiff",
    "FileName_OrigMito": "r02c07f04p01-ch1sk1fk1fl1.tiff",
}


def table(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "images.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path, plate: str | None = None) -> list[ImageRecord | Refusal]:
    return list(read_image_table(open_table(path), plate))


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
    assert image.treatment == TreatmentRecord(PerturbationKind.COMPOUND, "AMG900", "AURKA")


def test_treatment_columns_of_loaddata(tmp_path: Path) -> None:
    row = LOADDATA | {
        "Metadata_pert_iname": "TC-S-7004",
        "Metadata_gene": "DYRK1A",
        "Metadata_broad_sample": "BRD-1",
        "Metadata_control_type": "poscon_diverse",
    }
    assert only_image(table(tmp_path, row)).treatment == TreatmentRecord(
        PerturbationKind.COMPOUND, "TC-S-7004", "DYRK1A", Control.POSITIVE, "BRD-1"
    )


def test_a_dose_that_is_none_leaves_the_image(tmp_path: Path) -> None:
    row = LOADDATA | {"Metadata_pert_iname": "taxol", "Metadata_dose": "much"}
    image = only_image(table(tmp_path, row))
    assert image.treatment is None
    assert image.problem is not None
    assert image.problem[0] == "not a dose"
    assert image.metadata == {"dose": "much"}
    both = {"Metadata_pert_iname": "taxol + noco", "Metadata_dose": "5 + 1"}
    image = only_image(table(tmp_path, LOADDATA | both))
    assert image.treatment is not None
    assert image.treatment.label.startswith("taxol 5 + noco 1")


def test_dmso_is_the_negative_control(tmp_path: Path) -> None:
    image = only_image(table(tmp_path, PUBLISHED | {"Metadata_pert_iname": "DMSO"}), plate="p")
    assert image.treatment is not None
    assert image.treatment.control is Control.NEGATIVE


def test_row_and_column_numbers_instead_of_a_well(tmp_path: Path) -> None:
    row = {key: value for key, value in LOADDATA.items() if key != "Metadata_Well"}
    image = only_image(table(tmp_path, row | {"Metadata_Row": "16", "Metadata_Col": "24"}))
    assert format_well(image.row, image.column) == "P24"


@pytest.mark.parametrize(
    ("row", "column"),
    [("2", "7"), ("002", "007"), ("B", "07"), ("2.0", "7.0"), ("", "7"), ("B", "")],
)
def test_a_row_and_a_column_beside_the_same_well(tmp_path: Path, row: str, column: str) -> None:
    change = {"Metadata_Row": row, "Metadata_Col": column}
    image = only_image(table(tmp_path, LOADDATA | change))
    assert format_well(image.row, image.column) == "B07"
    if row and column:
        image = only_image(table(tmp_path, LOADDATA | change | {"Metadata_Well": ""}))
        assert format_well(image.row, image.column) == "B07"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Metadata_Col": "2"}, "well B7, but column 2"),
        ({"Metadata_Column": "08"}, "well B7, but column 08"),
        ({"Metadata_Row": "C"}, "well B7, but row C"),
        ({"Metadata_Row": "7", "Metadata_Col": "2"}, "well B7, but row 7 and column 2"),
        ({"Metadata_Row": "99"}, "well B7, but row 99"),
    ],
)
def test_a_row_or_column_that_is_not_that_of_the_well(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    refusal = only_refusal(table(tmp_path, LOADDATA | change))
    assert (refusal.reason, refusal.detail) == ("well and row or column disagree", said)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("file:///data/my%20screen/a%23.tif", "/data/my screen", "a#.tif"),
        ("file:/C:/data/a.tif", "C:/data", "a.tif"),
        ("FILE:///C:\\data\\a.tif", "C:/data", "a.tif"),
        ("s3://bucket/x/a.tif", "s3://bucket/x", "a.tif"),
        ("https://me:secret@host/x/a.tif?signature=1", "https://host/x", "a.tif"),
    ],
)
def test_urls_are_a_folder_and_a_name(tmp_path: Path, url: str, folder: str, name: str) -> None:
    plain = {key: text for key, text in LOADDATA.items() if "Name" not in key}
    for row in (
        LOADDATA | {"FileName_OrigDNA": url},
        plain | {"URL_DNA": url},
        plain | {"URL_OrigDNA": url, "FileName_OrigDNA": name},
    ):
        (file,) = only_image(table(tmp_path, row)).files
        assert (file.channel, file.name, file.folder) == ("DNA", name, folder)


def test_urls_in_tables_of_cellprofiler_are_a_folder_and_a_name() -> None:
    where = {"Metadata_Plate": "P1", "Metadata_Well": "A01", "Metadata_Site": "1"}
    row = {**where, "FileName_DNA": "file:///data/x/a.tif", "PathName_DNA": ""}
    images = ImageRows({name: at for at, name in enumerate(row)})
    image = images.read(2, list(row.values()))
    assert isinstance(image, ImageRecord)
    assert image.files == (FileRef("DNA", None, "a.tif", "/data/x"),)


def test_a_folder_beside_a_plain_name_goes_before_the_url(tmp_path: Path) -> None:
    (file,) = only_image(table(tmp_path, LOADDATA | {"URL_OrigDNA": "file:///x/b.tif"})).files
    assert (file.name, file.folder) == ("dna.tif", "/elsewhere/images")
    assert only_refusal(table(tmp_path, LOADDATA | {"FileName_OrigDNA": "file:///x/.."}))
    plain = {key: text for key, text in LOADDATA.items() if "FileName" not in key}
    (file,) = only_image(table(tmp_path, plain | {"URL_OrigDNA": "file:///x/b.tif"})).files
    assert (file.name, file.folder) == ("b.tif", "/x")


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
        ({"Metadata_Site": "9" * 5000}, "not a whole number"),
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
    def layout(*rows: dict[str, str]) -> Layout:
        return detect(table(tmp_path, *rows))

    assert layout(LOADDATA) is Layout.LOADDATA
    assert layout(PUBLISHED) is Layout.PUBLISHED
    assert layout(PUBLISHED | LOADDATA) is Layout.LOADDATA


def test_a_table_of_neither_shape_says_what_each_needs(tmp_path: Path) -> None:
    path = table(tmp_path, {"Filename_OrigRNA": "x", "Metadata_pert": "y"})
    with pytest.raises(BadTableError, match=r"yours has Filename_OrigRNA.*LoadData.*FileName"):
        detect(path)


def test_a_missing_plate(tmp_path: Path) -> None:
    bare = open_table(table(tmp_path, PUBLISHED))
    with pytest.raises(UserInputError, match="--plate"):
        list(read_image_table(bare))


def test_one_channel_in_two_columns(tmp_path: Path) -> None:
    path = table(tmp_path, LOADDATA | {"FileName_Origdna": "b.tif"})
    with pytest.raises(BadTableError, match="two channels of one name \\(dna\\)"):
        read(path)


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("KCNK1", "KCNK1"),
        ("HDAC2 | HDAC1|HDAC2", "HDAC1|HDAC2"),
        ("HDAC1|HDAC2", "HDAC1|HDAC2"),
        ("|", None),
        ("NA", None),
        ("NAE1", "NAE1"),
    ],
)
@pytest.mark.parametrize("column", ["Metadata_target", "Metadata_gene", "Metadata_target_list"])
def test_targets_by_any_of_their_columns(
    tmp_path: Path, column: str, written: str, target: str | None
) -> None:
    row = LOADDATA | {"Metadata_pert_iname": "NAD+", column: written}
    assert only_image(table(tmp_path, row)).treatment == TreatmentRecord(
        PerturbationKind.COMPOUND, "NAD+", target
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"JCP2022": "JCP2022_033924"}, ("compound", "JCP2022_033924", "JCP2022_033924", None)),
        (
            {"JCP2022": "JCP2022_805264", "pert_iname": "PLK1", "pert_type": "poscon"},
            ("crispr", "PLK1", "JCP2022_805264", Control.POSITIVE),
        ),
        ({"JCP2022": "JCP2022_915128"}, ("orf", "JCP2022_915128", "JCP2022_915128", None)),
        (
            {"JCP2022": "JCP2022_805264", "broad_sample": "BRD-1", "pert_iname": "x"},
            ("crispr", "x", "BRD-1", None),
        ),
        (
            {"modality": "orf", "pert_iname": "eGFP", "pert_type": "trt"},
            ("orf", "eGFP", None, None),
        ),
    ],
)
def test_identifiers_of_jump(
    tmp_path: Path,
    columns: dict[str, str],
    expected: tuple[str, str, str | None, Control | None],
) -> None:
    row = LOADDATA | {f"Metadata_{name}": value for name, value in columns.items()}
    found = only_image(table(tmp_path, row)).treatment
    assert found is not None
    assert (found.kind, found.pert_iname, found.identifier, found.control) == expected


@pytest.mark.parametrize("nothing", ["JCP2022_999999", "JCP2022_UNKNOWN", ""])
def test_an_empty_well_of_jump_has_no_treatment(tmp_path: Path, nothing: str) -> None:
    row = LOADDATA | {"Metadata_JCP2022": nothing}
    assert only_image(table(tmp_path, row)).treatment is None


def test_the_same_treatment_is_the_same_object(tmp_path: Path) -> None:
    row = LOADDATA | {"Metadata_pert_iname": "x", "Metadata_target": "y"}
    first, second = read(table(tmp_path, row, row | {"Metadata_Site": "5"}))
    assert isinstance(first, ImageRecord)
    assert isinstance(second, ImageRecord)
    assert first.treatment is second.treatment


@pytest.mark.parametrize("plate", ["001", "1053601756", "1e5", "0x10"])
def test_plates_that_look_like_numbers_keep_their_text(tmp_path: Path, plate: str) -> None:
    assert only_image(table(tmp_path, LOADDATA | {"Metadata_Plate": plate})).plate == plate


@pytest.mark.parametrize(
    ("written", "well"),
    [
        ("A01", (1, 1)),
        ("A1", (1, 1)),
        ("C - 3", (3, 3)),
        ("r01c01", (1, 1)),
        ("0101", (1, 1)),
        ("1624", (16, 24)),
        ("AA01", (27, 1)),
    ],
)
def test_wells_as_tables_write_them(tmp_path: Path, written: str, well: tuple[int, int]) -> None:
    image = only_image(table(tmp_path, LOADDATA | {"Metadata_Well": written}))
    assert (image.row, image.column) == well


def test_sites_counted_from_zero_keep_their_number(tmp_path: Path) -> None:
    assert only_image(table(tmp_path, LOADDATA | {"Metadata_Site": "0"})).site == 0


def test_plane_and_time_point_from_columns_or_file_name(tmp_path: Path) -> None:
    named = LOADDATA | {"FileName_OrigDNA": "r02c07f04p03-ch5sk2fk1fl1.tiff"}
    image = only_image(table(tmp_path, named))
    assert (image.plane, image.time_point) == (3, 2)
    written = {"Metadata_PlaneID": "7", "Metadata_TimepointID": "0"}
    image = only_image(table(tmp_path, named | written))
    assert (image.plane, image.time_point) == (7, 0)


@pytest.mark.parametrize(
    "column", ["Metadata_PlaneID", "Metadata_Plane", "Metadata_Z", "Metadata_ZIndex"]
)
def test_columns_of_planes(tmp_path: Path, column: str) -> None:
    rows = [LOADDATA | {column: plane} for plane in ("0", "1", "2.0")]
    found = read(table(tmp_path, *rows))
    assert [item.plane for item in found if isinstance(item, ImageRecord)] == [0, 1, 2]


@pytest.mark.parametrize(
    "column", ["Metadata_TimepointID", "Metadata_Timepoint", "Metadata_T", "Metadata_Time"]
)
def test_columns_of_time_points(tmp_path: Path, column: str) -> None:
    found = read(table(tmp_path, LOADDATA | {column: "3"}, LOADDATA | {column: "4"}))
    assert [item.time_point for item in found if isinstance(item, ImageRecord)] == [3, 4]
    refused = only_refusal(table(tmp_path, LOADDATA | {column: "48h"}))
    assert (refused.reason, refused.detail) == ("not a whole number", f"{column} is '48h'")


def test_columns_without_a_field_of_their_own_are_handed_on(tmp_path: Path) -> None:
    row = LOADDATA | {"Metadata_Source": "source_4", "Metadata_empty": "NA", "Note": "x"}
    sizes = {f"Metadata_ImageResolution{axis}": "5.979760809567617E-07" for axis in "XY"}
    image = only_image(table(tmp_path, row | sizes))
    assert (image.pixel_size, image.metadata) == (0.597976081, {"Source": "source_4"})
    assert only_image(table(tmp_path, LOADDATA)).metadata is None
    first, second = read(table(tmp_path, row, row | {"Metadata_Site": "5"}))
    assert isinstance(first, ImageRecord)
    assert isinstance(second, ImageRecord)
    assert first.metadata is second.metadata


names = st.text(st.characters(categories=["L", "Nd", "Pc", "Zs"]), min_size=1, max_size=8).map(
    lambda text: f"x{text}x"
)


@st.composite
def image_rows(draw: st.DrawFn) -> list[dict[str, str]]:
    """Rows of one table that are all good, with their columns in any order."""
    channels = draw(st.lists(st.sampled_from(["DNA", "RNA", "AGP"]), min_size=1, unique=True))
    columns = {
        "Metadata_Plate": names,
        "Metadata_Well": st.builds(format_well, st.integers(1, 32), st.integers(1, 48)),
        "Metadata_Site": st.integers(0, 99).map(str),
        "Metadata_pert_iname": names | st.just(""),
        "Metadata_target": names | st.just("NA"),
        "µ, note": names,
    } | {f"FileName_Orig{channel}": names.map(lambda name: f"{name}.tif") for channel in channels}
    order = draw(st.permutations(sorted(columns)))
    return draw(
        st.lists(st.fixed_dictionaries({name: columns[name] for name in order}), min_size=1)
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image_rows(), st.sampled_from([",", ";", "\t"]), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_random_tables_come_back_row_by_row(
    tmp_path: Path, rows: list[dict[str, str]], delimiter: str, encoding: str
) -> None:
    path = tmp_path / "images.txt"
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    found = read(path)
    assert [record.line for record in found] == list(range(2, len(rows) + 2))
    for row, image in zip(rows, found, strict=True):
        assert isinstance(image, ImageRecord)
        assert image.plate == row["Metadata_Plate"].strip()
        assert format_well(image.row, image.column) == row["Metadata_Well"]
        assert image.site == int(row["Metadata_Site"])
        treatment = image.treatment.pert_iname if image.treatment else ""
        assert treatment == row["Metadata_pert_iname"]
        assert {f"FileName_Orig{file.channel}": file.name for file in image.files} == {
            column: name for column, name in row.items() if column.startswith("FileName_")
        }


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_loses_no_row(tmp_path: Path, data: st.DataObject) -> None:
    rows = [PHENIX | {"Metadata_Site": "4", "PathName_OrigDNA": 'a "b", c'}] * 4
    path = table(tmp_path, *rows)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=6))
    path.write_bytes(whole[:start] + junk + whole[start + data.draw(st.integers(0, 9)) :])
    try:
        opened = open_table(path)
        lines = [row.line for row in opened.rows()]
        records = list(read_image_table(opened))
    except UserInputError:
        return
    assert [record.line for record in records] == lines


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    dmso = treatment_of_well(annotation, PLATE, 4, 14)
    assert dmso is not None
    assert dmso.control is Control.NEGATIVE
    amg900 = treatment_of_well(annotation, PLATE, 14, 9)
    assert amg900 is not None
    assert amg900.pert_iname == "AMG900"
