from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from realdata import real_data

from cellstore.errors import UnknownNameError, UserInputError
from cellstore.io import folders
from cellstore.io.filenames import (
    NamePattern,
    format_well,
    looks_like_a_mask,
    microscope_name,
)
from cellstore.io.folders import has_image_names, read_folder
from cellstore.io.image_files import encode_tiff, probe
from cellstore.io.image_tables import ImageRecord
from cellstore.io.tables import Refusal

GREY = encode_tiff(np.zeros((3, 4), np.uint16))


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GREY)


def stack(path: Path, count: int, **options: Any) -> None:
    array = np.arange(count * 12, dtype=np.uint16).reshape(count, 3, 4)
    tifffile.imwrite(path, array, photometric="minisblack", **options)


def records(folder: Path, **options: Any) -> list[ImageRecord]:
    items = list(read_folder(folder, **options))
    assert not [item for item in items if isinstance(item, Refusal)]
    return [item for item in items if isinstance(item, ImageRecord)]


def refusals(folder: Path, **options: Any) -> list[Refusal]:
    items = read_folder(folder, **options)
    return [item for item in items if isinstance(item, Refusal)]


def channels(record: ImageRecord) -> list[tuple[str, int | None]]:
    return [(file.channel, file.number) for file in record.files]


def test_a_phenix_folder(tmp_path: Path) -> None:
    folder = "BR1__2021-05-02T16_02_51-Measurement1/Images"
    names = [f"r01c02f0{field}p01-ch{n}sk2fk1fl1.tiff" for field in (1, 2) for n in (1, 10, 2)]
    make(tmp_path, *(f"{folder}/{name}" for name in names))
    first, second = records(tmp_path)
    key = (first.plate, first.row, first.column, first.site, first.plane)
    assert (*key, first.time_point, first.core_name) == ("BR1", 1, 2, 1, 1, 2, "r01c02f01")
    assert channels(first) == [("ch1", 1), ("ch2", 2), ("ch10", 10)]
    assert (second.site, second.line, first.line) == (2, 4, 1)
    assert {file.folder for file in first.files} == {str(tmp_path.resolve() / folder)}


def test_a_projection_stands_for_its_channels(tmp_path: Path) -> None:
    make(tmp_path, "P1/r01c02f01.tif")
    (record,) = records(tmp_path)
    assert channels(record) == [("projection", None)]


def test_a_cellomics_folder(tmp_path: Path) -> None:
    make(tmp_path, "x/AS_09047_050428030001_O01f00d2.TIF", "x/AS_09047_050428030001_O01f00d0.TIF")
    make(tmp_path, "x/Plate_7_A01f03d1.tif")
    one, other = records(tmp_path, channels={"d0": "DNA"})
    assert (one.plate, one.row, one.column, one.site) == ("050428030001", 15, 1, 0)
    assert channels(one) == [("DNA", None), ("d2", None)]
    assert (other.plate, other.row, other.column, other.site) == ("Plate_7", 1, 1, 3)


def test_a_folder_named_by_well_and_site(tmp_path: Path) -> None:
    make(tmp_path, "P1/B7_01_1_3_DAPI_001.tif", "P1/B7_01_2_3_GFP_001.tif")
    make(tmp_path, "P1/B7_01_1_3Z2_DAPI_004.tif", "P1/B7_-1_1_4_Bright Field_001.tif")
    found = records(tmp_path, channels={"2": "ER"})
    told = [(r.plate, r.row, r.column, r.site, r.plane, r.time_point, channels(r)) for r in found]
    assert told == [
        ("P1", 2, 7, 4, 1, 1, [("Bright Field", 1)]),
        ("P1", 2, 7, 3, 2, 4, [("DAPI", 1)]),
        ("P1", 2, 7, 3, 1, 1, [("DAPI", 1), ("ER", 2)]),
    ]


def test_a_pattern_for_the_rest(tmp_path: Path) -> None:
    make(tmp_path, "any/P7_b3_s2_w1_z4_t5.tif", "any/P7_b3_s2_w2_z4_t5.tif")
    pattern = (
        r"^(?P<Plate>[^_]+)_(?P<Well>\w\d)_s(?P<Site>\d)_w(?P<Channel>\d)_z(?P<z>\d)_t(?P<time>\d)"
    )
    (record,) = records(tmp_path, pattern=pattern, channels={"2": "DNA"})
    key = (record.plate, record.row, record.column, record.site, record.plane, record.time_point)
    assert key == ("P7", 2, 3, 2, 4, 5)
    assert channels(record) == [("ch1", 1), ("DNA", 2)]


@pytest.mark.parametrize(
    ("pattern", "well"),
    [
        (r"(?P<row>[A-H])-(?P<col>\d+)", (3, 11)),
        (r"-(?P<row>\d)(?P<column>\d)\.", (1, 1)),
        (r"(?P<well>[A-H]-\d+)", (3, 11)),
    ],
)
def test_wells_of_patterns(pattern: str, well: tuple[int, int]) -> None:
    found = NamePattern(pattern)("C-11.tif")
    assert found is not None
    assert (found.row, found.column, found.site, found.channel) == (*well, 1, None)


def test_a_pattern_with_a_slash_sees_the_path(tmp_path: Path) -> None:
    make(tmp_path, "P1/DNA/A01.tif", "P1/ER/A01.tif", "P2/DNA/A02.tif")
    pattern = r"(?P<plate>P\d)/(?P<stain>\w+)/(?P<well>\w+)\.tif"
    found = records(tmp_path, pattern=pattern)
    told = [(r.plate, r.column, [file.channel for file in r.files]) for r in found]
    # A field with a folder per channel is yielded in parts, which the store puts together.
    assert told == [("P1", 1, ["DNA"]), ("P1", 1, ["ER"]), ("P2", 2, ["DNA"])]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?P<well>", "not a regular expression"),
        ("(?P<well>a)(?P<well>b)", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(" * 5000 + "(?P<well>a)" + ")" * 5000, "not a regular expression"),
        (r"(?P<site>\d)", "names no well"),
        (r"(?P<row>\d)", "names no well"),
        (r"(?P<well>a)(?P<stian>b)", "the group 'stian'. Known groups: plate, well"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        list(read_folder(tmp_path, pattern=pattern))


def test_what_a_folder_reader_needs(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="is not a folder"):
        list(read_folder(tmp_path / "absent"))


def test_names_that_are_not_understood_are_refused_one_by_one(tmp_path: Path) -> None:
    make(tmp_path, "P/a.tif", "P/r01c01f01p01-ch1.tiff", "P/r99c01f01p01-ch1.tiff")
    found = refusals(tmp_path)
    assert [(item.line, item.reason) for item in found] == [
        (1, "name not understood"),
        (3, "name not understood"),
    ]
    pattern = r"_(?P<well>\w+)_(?P<site>\w+)\.tif"
    make(tmp_path / "Q", "x_Z99_1.tif", "x_A01_one.tif", "x_A01_\u0663.tif", "x_A01_1.tif")
    assert len(refusals(tmp_path / "Q", pattern=pattern)) == 3


def test_names_that_are_paths_elsewhere_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "P/A01:x.tif", "P/A01\\x.tif", "P/A02.tif")
    found = refusals(tmp_path, pattern=r"(?P<well>A\d\d)")
    assert [item.reason for item in found] == ["name not understood"] * 2


@pytest.mark.parametrize("name", [b"P/A01_\xff.tif", b"P\xff/A01.tif"])
def test_names_that_are_not_utf_8_are_refused_in_words_that_are(
    tmp_path: Path, name: bytes
) -> None:
    odd = tmp_path / os.fsdecode(name)
    try:
        odd.parent.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    make(tmp_path, str(odd), "P/A02.tif")
    odd.with_suffix(".t\udcff").touch()
    notes: list[str] = []
    found = read_folder(tmp_path, pattern=r"(?P<well>A\d\d)", notes=notes)
    refused, good = sorted(found, key=lambda item: isinstance(item, ImageRecord))
    assert isinstance(refused, Refusal)
    assert isinstance(good, ImageRecord)
    assert (refused.reason, good.column) == ("name not understood", 2)
    assert "?" in refused.detail
    "".join([refused.detail, *notes]).encode()


def test_a_well_is_told_before_the_next_one_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    read = folders.read_stack
    monkeypatch.setattr(
        folders, "read_stack", lambda path: (looked.append(path.name), read(path))[1]
    )
    names = [f"r01c0{column}f0{field}p01-ch1.tiff" for column in (1, 2, 3) for field in (1, 2)]
    make(tmp_path / "P", *names)
    found = read_folder(tmp_path)
    assert isinstance(next(found), ImageRecord)
    assert looked == names[:2]
    assert len(list(found)) == 5


def test_other_files_are_counted_not_refused(tmp_path: Path) -> None:
    make(tmp_path, "P/r01c01f01p01-ch1.tiff", "P/Thumbs.db", "P/Index.idx.xml", "P/b.xml")
    make(
        tmp_path, "P/.DS_Store", "P/._r01c01f01p01-ch2.tiff", ".cache/r01c01f01p01-ch3.tiff", "P/x"
    )
    notes: list[str] = []
    images = read_folder(tmp_path, notes=notes)
    assert [len(item.files) for item in images if isinstance(item, ImageRecord)] == [1]
    passed, index = notes
    assert "no images" in passed
    assert f"{tmp_path.resolve()}/P/Index.idx.xml" in index
    for part in ("2 .xml", "1 .db", "2 hidden", "1 without a suffix"):
        assert part in passed


def test_a_folder_without_images(tmp_path: Path) -> None:
    make(tmp_path, "notes.txt")
    with pytest.raises(UserInputError, match="holds no TIFF or PNG images"):
        list(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"7": "Mito"}, UnknownNameError, r"Unknown channel '7'\. Known: ch1, ch2"),
        ({"1": "Mito", "2": "mito"}, UserInputError, "a name of its own"),
        ({"1": " "}, UserInputError, "a name of its own"),
        ({"1": "ch2"}, UserInputError, "Channels 1 and 2 would both be 'ch2'"),
    ],
)
def test_names_for_channels_that_do_not_fit(
    tmp_path: Path, wanted: dict[str, str], error: type[Exception], message: str
) -> None:
    make(tmp_path, "P/r01c01f01p01-ch1.tiff", "P/r01c01f01p01-ch2.tiff")
    with pytest.raises(error, match=message):
        list(read_folder(tmp_path, channels=wanted))


def test_masks_are_no_images(tmp_path: Path) -> None:
    make(tmp_path, "P/A1_01_1_3_DAPI_001.tif", "P/A1_01_1_3_MaskNuclei_001.tif")
    assert [item.reason for item in refusals(tmp_path)] == ["looks like a mask"]
    masks = ["a_MaskCells.tiff", "a_cp_masks.png", "a_masks.tif", "a_label.tif", "mask2d.tif"]
    assert all(map(looks_like_a_mask, [*masks, "a_MASK.tif", "x_labels.tif", "a_seg.tif"]))
    images = ["r01c01f01.tif", "A1_01_1_1_Label-free_001.tif", "unmasked.tif", "segment.tif"]
    assert not any(map(looks_like_a_mask, images))


def test_a_second_file_of_a_channel_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "P/B7_01_1_3_DAPI_001.tif", "P/B7_02_1_3_DAPI_001.tif")
    make(tmp_path, "P/B7_01_2_3_GFP_001.tif")
    found = list(read_folder(tmp_path))
    twice = [item for item in found if isinstance(item, Refusal)]
    assert [(item.line, item.reason) for item in twice] == [
        (1, "channel twice"),
        (3, "channel twice"),
    ]
    both = "B7_01_1_3_DAPI_001.tif and B7_02_1_3_DAPI_001.tif are both DAPI"
    assert all(both in item.detail for item in twice)
    (record,) = [item for item in found if isinstance(item, ImageRecord)]
    assert (record.line, channels(record)) == (2, [("GFP", 2)])


GUID = "E89B3F4F-0000-0000-2DE4-CBF48F635C5E"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"Week1_150607_B02_s3_w1{GUID}.tif", ("Week1_150607", 2, 2, 3, None, None, "ch1", 1)),
        (f"p_a01_s1_w2b{GUID[1:].lower()}.TIF", ("p", 1, 1, 1, None, None, "ch2", 2)),
        ("P_A01_w2.TIF", ("P", 1, 1, 1, None, None, "ch2", 2)),
        ("P_A01_s4.tiff", ("P", 1, 1, 4, None, None, None, None)),
        ("A - 01(fld 2 wv DAPI - DAPI).tif", (None, 1, 1, 2, None, None, "DAPI", None)),
        (
            "P_1_B - 4(fld 01 wv 390 - Blue z 3 - time 02 - 30 ms).tif",
            ("P_1", 2, 4, 1, 3, 2, "390 - Blue", None),
        ),
        (
            "A - 1(fld 1 wv Green - dsRed z 2 time 1 - 0 ms).tif",
            (None, 1, 1, 1, 2, 1, "Green - dsRed", None),
        ),
        ("N - 006(fld 1- time 1 - 22858 ms).tif", (None, 14, 6, 1, None, 1, None, None)),
        ("B - 03(fld 1 wv TL - Cy3 wix 2).tif", (None, 2, 3, 1, None, None, "TL - Cy3", None)),
        ("MMC_0015_B07_T0002F011L01A02Z03C04.tif", ("MMC_0015", 2, 7, 11, 3, 2, "ch4", 4)),
        ("AssayPlate_G_#655090_C02_T0001F001L01A01Z01C01.TIF", (None, 3, 2, 1, 1, 1, "ch1", 1)),
        ("MFGTMP_140206180002_A01f03d0.TIF", ("140206180002", 1, 1, 3, None, None, "d0", None)),
        ("B7_01_1_3Z2_DAPI_004.tif", (None, 2, 7, 3, 2, 4, "DAPI", 1)),
        ("002001004.tif", (None, 2, 1, 4, None, None, None, None)),
        ("P_A01.b1_s2_w3.tif", ("P", 2, 1, 2, None, None, "ch3", 3)),
        ("P_H12.a2_3.tif", ("P", 15, 24, 3, None, None, None, None)),
        ("PLATE_7_A01_2.tif", ("PLATE_7", 1, 1, 2, None, None, None, None)),
        ("MiaPaCa2-Phase_A2_1_03d06h40m.tif", ("MiaPaCa2-Phase", 1, 2, 1, None, 4720, None, None)),
        ("r01c02f03p04-ch5sk6fk1fl1.ome.tiff", (None, 1, 2, 3, 4, 6, "ch5", 5)),
    ],
)
def test_names_of_microscopes(name: str, told: tuple[Any, ...]) -> None:
    found = microscope_name(name)
    assert found is not None
    assert tuple(found)[:8] == told


@pytest.mark.parametrize(
    "name", ["x.tif", "P_Z99_s1_w1.tif", "P_A01_s1_w1", "A01.tif", "AS_O01f00.TIF"]
)
def test_other_names_are_not_taken_for_those_of_a_microscope(name: str) -> None:
    assert microscope_name(name) is None


def test_thumbnails_are_passed_over_and_counted(tmp_path: Path) -> None:
    make(tmp_path, f"P/a_A01_s1_w1_thumb{GUID}.tif", f"P/a_A01_s1_w1B{GUID[1:]}.tif")
    make(tmp_path, "P/a_A01_s1_w2_thumb.tif", "P/a_A01_s1_w2.tif", "P/Thumbs/a_A01_s1_w2.tif")
    make(tmp_path, "P/thumbnail_a_A02_s1_w1.tif")
    for pattern in (None, r"(?P<well>[A-P]\d\d)_s(?P<site>\d+)_w(?P<channel>\d)"):
        notes: list[str] = []
        (record,) = records(tmp_path, pattern=pattern, notes=notes)
        assert channels(record) == [("ch1", 1), ("ch2", 2)]
        assert notes == ["thumbnails, skipped: 4"]


def test_folders_of_time_points_and_planes(tmp_path: Path) -> None:
    names = [
        f"TimePoint_{time}/ZStep_{plane}/x_A01_s1_w1.tif" for time in (1, 2) for plane in (1, 2)
    ]
    make(tmp_path, *(f"38030/{name}" for name in names), "38030/TimePoint_3/x_A01_s1_w1_.tif")
    found = read_folder(tmp_path)
    told = [(r.time_point, r.plane) for r in found if isinstance(r, ImageRecord)]
    assert told == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("folder", ["A01", "B02", "r02c03", "AA01", "TimePoint_1", "Images"])
def test_a_folder_named_like_a_well_is_no_plate(tmp_path: Path, folder: str) -> None:
    make(tmp_path, f"BR7/{folder}/r02c03f01p01-ch1.tiff")
    assert records(tmp_path / "BR7" / folder)[0].plate == "BR7"


def test_what_lies_beside_the_images_of_yokogawa(tmp_path: Path) -> None:
    make(tmp_path, "P/BR7_A01_T0001F001L01A01Z01C01.tif", "P/DC_sCMOS_#1_CAM1.tif")
    make(tmp_path, "P/SC_BP445-45_40x_M10_CH01.tif")
    records_of = '<bts:MeasurementRecord bts:Type="IMG"/>' + '<x bts:Type="ERR"/>' * 3
    (tmp_path / "P/MeasurementData.mlf").write_text(records_of, encoding="utf-8")
    notes: list[str] = []
    assert len(records(tmp_path, notes=notes)) == 1
    assert notes[:2] == [
        "images that could not be taken (.mlf), skipped: 3",
        "images for correction, skipped: 2",
    ]
    sizes = 'bts:HorizontalPixelDimension="0.325" bts:VerticalPixelDimension="0.325"'
    detail = tmp_path / "P/MeasurementDetail.mrf"
    detail.write_text(f'<bts:MeasurementChannel bts:Ch="1" {sizes} />' * 2, encoding="utf-8")
    assert records(tmp_path)[0].pixel_size == 0.325
    detail.write_text(sizes.replace("0.325", "0.65", 1), encoding="utf-8")
    assert records(tmp_path)[0].pixel_size is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "P1_A01_s1.tif",
            (
                r"matches 'P1_A01_s1', where the channel, _w(?P<channel>\d), should follow, but "
                "the name goes on with '.tif'"
            ),
        ),
        (
            "P1_A1_s1_w1.tif",
            (
                r"matches 'P1', where the well, _(?P<well>[A-P]\d\d), should follow, but the name "
                "goes on with '_A1_s1_w1"
            ),
        ),
        ("P1_A01_s1_w2.png", r"where the end, \.tif, should follow, but the name goes on with '.p"),
        ("_.tif", "nothing in the name matches the plate, ^(?P<plate>[^_]+)"),
    ],
)
def test_a_pattern_says_which_part_does_not_fit(tmp_path: Path, name: str, message: str) -> None:
    make(tmp_path, name)
    pattern = r"^(?P<plate>[^_]+)_(?P<well>[A-P]\d\d)_s(?P<site>\d+)_w(?P<channel>\d)\.tif"
    (found,) = refusals(tmp_path, pattern=pattern)
    assert message in found.detail


def test_rows_and_columns_of_three_digits(tmp_path: Path) -> None:
    make(tmp_path, "P/002001004.tif")
    for pattern in (
        r"^(?P<row>\d{3})(?P<col>\d{3})(?P<site>\d{3})",
        r"^(?P<well>\d{6})(?P<site>\d{3})",
        None,
    ):
        (record,) = records(tmp_path, pattern=pattern)
        assert (record.row, record.column, record.site) == (2, 1, 4)


def test_the_plate_is_given_or_said_or_the_folder(tmp_path: Path) -> None:
    make(tmp_path, "001/Images/r01c01f01p01-ch1.tiff", "Q/AS_050428030001_O01f00d2.TIF")
    assert records(tmp_path / "001")[0].plate == "001"
    assert records(tmp_path / "001/Images")[0].plate == "001"
    assert records(tmp_path / "001", plate="X")[0].plate == "X"
    assert records(tmp_path / "Q", plate="X")[0].plate == "X"


def test_channels_of_an_ome_tiff_become_files(tmp_path: Path) -> None:
    folder = tmp_path / "P1"
    folder.mkdir()
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA", "ER", "ER"]}}
    stack(folder / "r01c01f01.ome.tiff", 3, ome=True, metadata=metadata)
    (record,) = records(tmp_path, channels={"1": "Nuclei"})
    assert channels(record) == [("Nuclei", 1), ("ER", 2), ("ER (ch3)", 3)]
    assert [file.name for file in record.files] == [
        f"r01c01f01.ome.tiff#page={page}" for page in (1, 2, 3)
    ]
    infos = [probe(Path(str(file.folder)) / file.name) for file in record.files]
    assert len({info.sha256 for info in infos}) == 3


def test_a_damaged_file_without_pages_keeps_its_place(tmp_path: Path) -> None:
    make(tmp_path, "P/r01c01f01p01-ch1.tiff")
    (tmp_path / "P/r01c01f01p01-ch2.tiff").write_bytes(b"II*\0junk")
    (record,) = records(tmp_path)
    assert channels(record) == [("ch1", 1), ("ch2", 2)]


def test_pages_that_are_planes_become_images(tmp_path: Path) -> None:
    folder = tmp_path / "P1"
    folder.mkdir()
    for channel in (1, 2):
        stack(folder / f"r01c01f01p01-ch{channel}sk3.tiff", 2)
    found = records(tmp_path)
    assert [(r.plane, r.time_point, channels(r)) for r in found] == [
        (1, 3, [("ch1", 1), ("ch2", 2)]),
        (2, 3, [("ch1", 1), ("ch2", 2)]),
    ]
    assert found[1].files[1].name == "r01c01f01p01-ch2sk3.tiff#page=2"


def test_channels_planes_and_times_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "P1"
    folder.mkdir()
    array = np.zeros((2, 3, 2, 3, 4), np.uint16)
    path = folder / "A01.ome.tif"
    tifffile.imwrite(path, array, ome=True, photometric="minisblack", metadata={"axes": "TZCYX"})
    found = records(tmp_path, pattern=r"^(?P<well>[A-H]\d\d)\.")
    assert [(r.time_point, r.plane) for r in found] == [
        (time, plane) for time in (1, 2) for plane in (1, 2, 3)
    ]
    assert {tuple(channels(r)) for r in found} == {(("C1", 1), ("C2", 2))}
    assert len({file.name for r in found for file in r.files}) == 12


def test_channels_of_a_file_are_of_the_plane_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "P1/r01c01f01p04.ome.tiff"
    path.parent.mkdir()
    stack(path, 2, ome=True, metadata={"axes": "CYX"})
    (record,) = records(tmp_path)
    assert (record.plane, channels(record)) == (4, [("C1", 1), ("C2", 2)])


def test_stacks_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    folder = tmp_path / "P1"
    folder.mkdir()
    with tifffile.TiffWriter(folder / "r01c01f01p01-ch1.tiff") as writer:
        writer.write(np.zeros((3, 4), np.uint16))
        writer.write(np.zeros((2, 2), np.uint16))
    make(folder, "r01c01f02p02-ch1.tiff")
    stack(folder / "r01c01f02p03-ch1.tiff", 3)
    found = refusals(tmp_path)
    reasons = ["image cannot be read", "channel twice", "channel twice"]
    assert [item.reason for item in found] == reasons
    assert not [item for item in read_folder(tmp_path) if isinstance(item, ImageRecord)]


@pytest.mark.parametrize("marker", [".zgroup", "zarr.json"])
def test_ome_zarr_says_what_to_do(tmp_path: Path, marker: str) -> None:
    make(tmp_path, f"P1.zarr/{marker}", "P1.zarr/0/0/0.tif", "P1/r01c01f01p01-ch1.tiff")
    (found,) = refusals(tmp_path)
    assert found.reason == "Zarr that is no plate of OME-Zarr"
    assert "export it to OME-TIFF" in found.detail


def test_links_that_leave_the_folder_are_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "out/r01c01f01p01-ch1.tiff", "in/P/r01c01f01p01-ch2.tiff")
    (tmp_path / "in/P/r01c01f01p01-ch1.tiff").symlink_to(tmp_path / "out/r01c01f01p01-ch1.tiff")
    (tmp_path / "in/all").symlink_to(tmp_path / "out")
    (record,) = records(tmp_path / "in")
    assert channels(record) == [("ch2", 2)]


def test_a_folder_that_may_not_be_entered_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "P/r01c01f01p01-ch1.tiff", "closed/r01c01f01p01-ch1.tiff")
    scandir = os.scandir

    def guarded(folder: Path) -> Any:
        if getattr(folder, "name", "") == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(folders.os, "scandir", guarded)
    first, second = read_folder(tmp_path)
    assert isinstance(first, ImageRecord)
    assert isinstance(second, Refusal)
    assert (second.line, second.reason) == (2, "folder cannot be opened")


def test_layouts_are_told_from_names(tmp_path: Path) -> None:
    make(tmp_path, "a/r01c01f01p01-ch1.tiff", "b/AS_050428030001_O01f00d2.TIF", "c/x.tif")
    make(tmp_path, "d/B7_01_1_3_DAPI_001.tif", "d/B7_01_1_3_MaskNuclei_001.tif", "e/a_label.tif")
    known = {name for name in "abcde" if has_image_names(tmp_path / name)}
    assert known == {"a", "b", "d"}


rows, columns = st.integers(1, 32), st.integers(1, 48)


@given(rows, columns, st.integers(0, 9999), st.integers(0, 9999), st.integers(1, 999))
def test_phenix_names_are_read_back(r: int, c: int, f: int, p: int, channel: int) -> None:
    found = microscope_name(f"r{r:02d}c{c:02d}f{f:02d}p{p:02d}-ch{channel}sk7fk1fl1.tiff")
    assert found is not None
    key = (found.row, found.column, found.site, found.plane, found.time_point)
    assert key == (r, c, f, p, 7)
    assert (found.channel, found.number) == (f"ch{channel}", channel)


@given(rows, columns, st.integers(0, 9999), st.integers(0, 99), st.integers(0, 10**12 - 1))
def test_cellomics_names_are_read_back(r: int, c: int, f: int, d: int, scan: int) -> None:
    found = microscope_name(f"MFGTMP_{scan:012d}_{format_well(r, c)}f{f:02d}d{d}.TIF")
    assert found is not None
    assert (found.plate, found.row, found.column, found.site) == (f"{scan:012d}", r, c, f)
    assert found.channel == f"d{d}"


stains = st.text(st.characters(exclude_characters="_/\0"), min_size=1, max_size=20)


@given(rows, columns, st.integers(0, 999), st.integers(0, 9999), stains, st.integers(0, 999))
def test_well_and_site_names_are_read_back(
    r: int, c: int, number: int, site: int, stain: str, time: int
) -> None:
    found = microscope_name(f"{format_well(r, c)}_01_{number}_{site}_{stain}_{time:03d}.tif")
    assert found is not None
    assert (found.row, found.column, found.site, found.time_point) == (r, c, site, time)
    assert (found.channel, found.number) == (stain, number or None)


names = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"r\d{1,3}c\d{1,3}f\d{1,5}(p\d+)?-ch\d+\.tiff", fullmatch=True),
    st.from_regex(r".{0,9}_[A-Z]{1,3}\d{1,3}f\d+d\d+\.TIF", fullmatch=True),
    st.from_regex(r"[A-Z]{1,3}\d{1,3}_\d+_\d+_\d+_.{0,9}_\d+\.tif", fullmatch=True),
)
WILD = NamePattern(r"(?P<well>.*?)_(?P<site>.*?)_(?P<channel>.*?)_(?P<time>.*)")


@given(names)
def test_any_name_is_read_or_refused(name: str) -> None:
    looks_like_a_mask(name)
    found = microscope_name(name)
    assert found is None or (1 <= found.row <= 32 and 1 <= found.column <= 48)
    WILD.explain(name)
    try:
        WILD(name)
    except UserInputError:
        return


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["r01c01f01", "r02c03f04", "x", "B7_01_1_3_DAPI_001"]), min_size=1))
def test_every_file_is_in_a_record_or_refused(
    tmp_path_factory: pytest.TempPathFactory, stems: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("P")
    made = {f"{stem}p01-ch{number % 3}.tiff" for number, stem in enumerate(stems)}
    make(folder, *made)
    items = list(read_folder(folder))
    counts = [len(item.files) if isinstance(item, ImageRecord) else 1 for item in items]
    assert sum(counts) == len(made)


def test_a_long_name_is_not_given_to_a_pattern() -> None:
    pattern = NamePattern(r"(?P<well>A01)")
    assert pattern("A01" + "x" * 252) is not None
    assert pattern("A01" + "x" * 253) is None
    assert NamePattern(r"/(?P<well>A01)")("/A01" + "x" * 600) is not None


@pytest.mark.real
def test_real_phenix_fields() -> None:
    found = records(real_data("cpjump1/images"))
    assert [(r.plate, r.core_name, len(r.files)) for r in found] == [
        ("AMG900", "r14c09f05", 1),
        ("DMSO", "r04c14f05", 5),
        ("FK-866", "r04c08f05", 1),
    ]
    assert format_well(found[1].row, found[1].column) == "D14"


@pytest.mark.real
def test_real_cellomics_fields() -> None:
    found = records(real_data("cellprofiler_examples"))
    assert [(r.plate, r.row, r.column, r.site) for r in found] == [
        ("050428030001", 15, column, site) for column in (1, 2, 3) for site in (0, 1)
    ]
    (human,) = records(real_data("cytotable/ExampleHuman"))
    assert (human.plate, human.row, human.column) == ("050116030001", 4, 3)
    assert [file.channel for file in human.files] == ["d0", "d1", "d2"]


@pytest.mark.real
def test_real_fields_named_by_well_and_site() -> None:
    folder = real_data("cytodataframe/NF1_Plate_2")
    assert has_image_names(folder)
    found = records(folder / "Plate_2_images", plate="Plate_2")
    assert [(r.plate, r.row, r.column, r.site) for r in found] == [
        ("Plate_2", 2, 7, 3),
        ("Plate_2", 4, 6, 2),
    ]
    for record in found:
        assert channels(record) == [("DAPI", 1), ("GFP", 2), ("RFP", 3)]
    masks = refusals(folder)
    assert [item.reason for item in masks] == ["looks like a mask"] * 6
