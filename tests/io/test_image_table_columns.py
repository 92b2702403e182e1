from __future__ import annotations

from pathlib import Path

import pytest
from test_image_tables import LOADDATA, PHENIX, only_image, only_refusal, read, table

from cellstore.errors import BadTableError, UserInputError
from cellstore.io.image_tables import ImageRecord, read_image_table
from cellstore.io.tables import Refusal, open_table


def named_files(path: Path) -> list[list[str]]:
    found = read(path)
    assert not [item for item in found if isinstance(item, Refusal)]
    return [[file.name for file in item.files] for item in found if isinstance(item, ImageRecord)]


def test_frames_of_cellprofiler_are_pages(tmp_path: Path) -> None:
    row = LOADDATA | {"FileName_OrigER": "dna.tif", "Frame_OrigDNA": "0", "Frame_OrigER": "1"}
    assert named_files(table(tmp_path, row)) == [["dna.tif#page=1", "dna.tif#page=2"]]


def test_the_first_plane_of_a_stack_is_its_first_page(tmp_path: Path) -> None:
    rows = [LOADDATA | {"Frame_OrigDNA": frame, "Metadata_Z": frame} for frame in ("0", "1.0")]
    assert named_files(table(tmp_path, *rows)) == [["dna.tif#page=1"], ["dna.tif#page=2"]]


def test_frames_of_files_of_one_page_change_no_name(tmp_path: Path) -> None:
    more = {"FileName_OrigER": "er.tif", "Frame_OrigER": "", "Series_OrigER": "0"}
    rows = [LOADDATA | more | {"Frame_OrigDNA": frame} for frame in ("0", "0.0", "")]
    assert named_files(table(tmp_path, *rows)) == [["dna.tif", "er.tif"]] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Frame_OrigDNA": "-1"}, "not a whole number"),
        ({"Frame_OrigDNA": "one"}, "not a whole number"),
        ({"Frame_OrigDNA": "1000000"}, "no such page"),
        ({"Series_OrigDNA": "1"}, "another series of a file"),
    ],
)
def test_frames_and_series_that_cannot_be_used(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    assert only_refusal(table(tmp_path, LOADDATA | change)).reason == reason


def test_a_repeated_column_matters_only_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    header, values = ",".join(LOADDATA), ",".join(LOADDATA.values())
    path.write_text(f"{header},note,note\n{values},x,y\n")
    assert only_image(path).plate == "001"
    path.write_text(f"{header},Metadata_Site\n{values},9\n")
    with pytest.raises(BadTableError, match="'Metadata_Site' more than once"):
        read(path)


def test_two_header_lines_before_the_images(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    objects = ",".join("Image" for _ in LOADDATA)
    path.write_text(f"{objects}\n{','.join(LOADDATA)}\n{','.join(LOADDATA.values())}\n")
    assert only_image(path) == only_image(table(tmp_path, LOADDATA))._replace(line=3)


def test_tables_put_together_repeat_their_header(tmp_path: Path) -> None:
    path = table(tmp_path, LOADDATA)
    path.write_bytes(path.read_bytes() * 2)
    first, repeated, last = read(path)
    assert isinstance(first, ImageRecord)
    assert repeated == Refusal(3, "header repeated", "line 3 is the header of line 1 again")
    assert last == first._replace(line=4)


@pytest.mark.parametrize(
    ("channels", "names"),
    [
        (None, ["DNA", "Mito"]),
        ({"1": "TOM20", "5": "Hoechst"}, ["Hoechst", "TOM20"]),
        ({"mito": "TOM20"}, ["DNA", "TOM20"]),
        ({"DNA": "Mito", "Mito": "DNA"}, ["Mito", "DNA"]),
    ],
)
def test_channels_get_the_names_that_are_wanted(
    tmp_path: Path, channels: dict[str, str] | None, names: list[str]
) -> None:
    (image,) = read_image_table(open_table(table(tmp_path, PHENIX)), channels=channels)
    assert isinstance(image, ImageRecord)
    assert [file.channel for file in image.files] == names
    assert [file.number for file in image.files] == [5, 1]


@pytest.mark.parametrize("key", ["2", "RNA"])
def test_a_channel_that_is_not_there_cannot_be_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserInputError, match=rf"channel '{key}'\. Known: DNA"):
        list(read_image_table(open_table(table(tmp_path, PHENIX)), channels={key: "x"}))


def test_two_channels_cannot_get_one_name(tmp_path: Path) -> None:
    opened = open_table(table(tmp_path, PHENIX))
    with pytest.raises(UserInputError, match="two channels of one name"):
        list(read_image_table(opened, channels={"Mito": "dna"}))
    (row,) = read_image_table(opened, channels={"1": "DNA"})
    assert isinstance(row, Refusal)
    assert row.reason == "two files of one channel"


def test_a_channel_number_of_a_late_row_is_known(tmp_path: Path) -> None:
    late = PHENIX | {"FileName_OrigMito": "r02c07f04p01-ch6sk1fk1fl1.tiff"}
    path = table(tmp_path, *[PHENIX] * 30, late)
    *_, last = read_image_table(open_table(path), channels={"6": "Brightfield"})
    assert isinstance(last, ImageRecord)
    assert [file.channel for file in last.files] == ["DNA", "Brightfield"]
