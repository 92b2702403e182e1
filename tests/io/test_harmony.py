from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from realdata import real_data

from cellstore.errors import BadTableError, UnknownNameError, UserInputError
from cellstore.io.harmony import index_of, read_harmony
from cellstore.io.image_tables import ImageRecord, read_image_table
from cellstore.io.layouts import Layout, detect
from cellstore.io.tables import Refusal, open_table

V5 = "http://www.perkinelmer.com/PEHH/HarmonyV5"
V7 = "43B2A954-E3C3-47E1-B392-6635266B0DD3/HarmonyV7"


def image(
    channel: int,
    row: int = 1,
    field: int = 1,
    plane: int = 1,
    time: int = 0,
    name: str | None = "",
    **changed: str,
) -> str:
    url = f"r{row:02d}c02f{field:02d}p{plane:02d}-ch{channel}sk{time + 1}fk1fl1.tiff"
    values = {
        "id": f"{row:02d}02K{time + 1}F{field}P{plane}R{channel}",
        "State": "Ok",
        "URL": url,
        "Row": str(row),
        "Col": "2",
        "FieldID": str(field),
        "PlaneID": str(plane),
        "TimepointID": str(time),
        "ChannelID": str(channel),
        "ChannelName": f"Stain {channel}" if name == "" else name,
        "ImageSizeX": "1080",
    } | changed
    inner = "".join(f"  <{key}>{text}</{key}>\n" for key, text in values.items() if text)
    return f'<Image Version="1">\n{inner}</Image>\n'


def plate(barcode: str, tag: str = "PlateID") -> str:
    return f"<Plate><{tag}>{barcode}</{tag}><Well id='0102' /></Plate>"


def index(
    folder: Path,
    images: Sequence[str],
    plates: str = plate("BR1"),
    maps: str = "",
    namespace: str = V5,
    head: str = '<?xml version="1.0" encoding="utf-8"?>\n',
) -> Path:
    path = folder / "Index.idx.xml"
    path.write_text(
        f'{head}<EvaluationInputData Version="1" xmlns="{namespace}">\n<Plates>{plates}</Plates>'
        f"<Maps>{maps}</Maps>\n<Images>\n{''.join(images)}</Images></EvaluationInputData>",
        encoding="utf-8",
    )
    return path


def fields(path: Path, **options: object) -> list[ImageRecord]:
    items = list(read_harmony(path, **options))  # type: ignore[arg-type]
    refused = [item for item in items if isinstance(item, Refusal)]
    assert not refused
    return [item for item in items if isinstance(item, ImageRecord)]


def refusals(path: Path) -> list[tuple[str, int]]:
    return [(item.reason, item.line) for item in read_harmony(path) if isinstance(item, Refusal)]


def test_the_channels_of_a_field_are_one_record(tmp_path: Path) -> None:
    path = index(
        tmp_path, [image(1), image(2), image(1, field=2), image(1, row=3, plane=4, time=2)]
    )
    records = fields(path)
    told = [(r.plate, r.row, r.column, r.site, r.plane, r.time_point) for r in records]
    assert told == [
        ("BR1", 1, 2, 1, 1, 1),
        ("BR1", 1, 2, 2, 1, 1),
        ("BR1", 3, 2, 1, 4, 3),
    ]
    assert [record.core_name for record in records] == ["r01c02f01", "r01c02f02", "r03c02f01"]
    assert [(file.channel, file.number, file.name) for file in records[0].files] == [
        ("Stain 1", 1, "r01c02f01p01-ch1sk1fk1fl1.tiff"),
        ("Stain 2", 2, "r01c02f01p01-ch2sk1fk1fl1.tiff"),
    ]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(lines[record.line - 1].startswith("<Image ") for record in records)


def test_a_field_that_comes_back_is_a_further_record(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1), image(1, field=2), image(2)])
    found = [(record.site, [file.number for file in record.files]) for record in fields(path)]
    assert found == [(1, [1]), (2, [1]), (1, [2])]


def test_newer_versions_name_the_channels_in_a_map(tmp_path: Path) -> None:
    entries = "".join(
        f'<Map><Entry ChannelID="{number}">{inner}</Entry></Map>'
        for number, inner in [
            (1, "<FlatfieldProfile>{ChannelName: wrong}</FlatfieldProfile>"),
            (1, "<ChannelName>Alexa 488</ChannelName>"),
            (2, "<ChannelName>HOECHST 33342</ChannelName>"),
        ]
    )
    images = [image(channel, name=None) for channel in (1, 2, 3)]
    for namespace in (V7, V5, "http://www.perkinelmer.com/PEHH/HarmonyV6"):
        (record,) = fields(index(tmp_path, images, maps=entries, namespace=namespace))
        assert [file.channel for file in record.files] == ["Alexa 488", "HOECHST 33342", "ch3"]


def test_elements_with_a_prefix_are_the_same(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1), image(2)])
    plain = fields(path)
    text = re.sub(r"<(/?)([A-Za-z])", r"<\1h:\2", path.read_text(encoding="utf-8"))
    path.write_text(text.replace("xmlns=", "xmlns:h="), encoding="utf-8")
    assert fields(path) == plain


def test_channels_are_renamed_by_number_or_name(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1), image(2), image(3)])
    (record,) = fields(path, channels={"1": "Mito", "stain 3": "DNA"})
    assert [file.channel for file in record.files] == ["Mito", "Stain 2", "DNA"]


def test_a_channel_to_rename_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown channel '4'\. Known: Stain 1"):
        fields(index(tmp_path, [image(1)]), channels={"4": "DNA"})


def test_two_channels_of_one_name_stay_apart(tmp_path: Path) -> None:
    images = [image(n, field=f, name="Brightfield") for f in (1, 2) for n in (6, 7)]
    for record in fields(index(tmp_path, images)):
        assert [file.channel for file in record.files] == ["Brightfield", "Brightfield (ch7)"]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([image(1), image(1, Row="x")], "not a whole number"),
        ([image(1), image(1, Row="9" * 30)], "not a whole number"),
        ([image(1), image(1, Row="33", URL="a.tiff")], "not a well"),
        ([image(1), image(1, Row="2")], "well and file name disagree"),
        ([image(1), image(1, FieldID="2")], "field and file name disagree"),
        ([image(1), image(1)], "channel twice"),
        ([image(1), image(2, URL="")], "no image file"),
        ([image(1), image(2, URL="..")], "no image file"),
        ([image(1), image(2, URL="x" * 9000)], "no image file"),
        ([image(1), image(2, State="Missing")], "image was not taken"),
        ([image(1), image(2, URL="a.tiff", ChannelID="")], "not a whole number"),
    ],
)
def test_images_that_are_refused_and_the_others_read(
    tmp_path: Path, images: list[str], reason: str
) -> None:
    path = index(tmp_path, images)
    ((found, line),) = refusals(path)
    assert found == reason
    assert line == 5 + images[0].count("\n")
    assert sum(isinstance(item, ImageRecord) for item in read_harmony(path)) == 1


def test_names_that_say_nothing_need_the_elements_only(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1, row=32, plane=3, time=4, URL="b.tiff")])
    (record,) = fields(path)
    assert (record.row, record.column, record.plane, record.time_point) == (32, 2, 3, 5)
    assert record.core_name is None


@pytest.mark.parametrize(
    ("made", "url", "folder"),
    [
        ("P1/Images/a.tiff", "a.tiff", "P1/Images"),
        ("P1/Images/sub/a.tiff", "sub/a.tiff", "P1/Images/sub"),
        ("P1/Images/Images/a.tiff", "a.tiff", "P1/Images/Images"),
        ("P1/x.tiff", "a.tiff", "P1/Images"),
        ("P1/a.tiff", r"..\a.tiff", "P1"),
    ],
)
def test_images_lie_beside_the_index_or_where_it_says(
    tmp_path: Path, made: str, url: str, folder: str
) -> None:
    (tmp_path / "P1/Images").mkdir(parents=True)
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_bytes(b"")
    (record,) = fields(index(tmp_path / "P1/Images", [image(1, URL=url)]))
    assert record.files[0].folder == str(tmp_path.resolve() / folder)


def test_images_in_a_folder_beside_that_of_the_index(tmp_path: Path) -> None:
    for name in ("Index", "Images"):
        (tmp_path / name).mkdir()
    (tmp_path / "Images/a.tiff").write_bytes(b"")
    (record,) = fields(index(tmp_path / "Index", [image(1, URL="a.tiff")]))
    assert record.files[0].folder == str(tmp_path.resolve() / "Images")


@pytest.mark.parametrize("first", [{"State": "Missing", "URL": "b.tiff"}, {"URL": ""}])
def test_an_image_that_was_not_taken_says_nothing_of_the_folder(
    tmp_path: Path, first: dict[str, str]
) -> None:
    for name in ("Index", "Images"):
        (tmp_path / name).mkdir()
    (tmp_path / "Images/a.tiff").write_bytes(b"")
    path = index(tmp_path / "Index", [image(1, **first), image(2, URL="a.tiff")])
    _, record = read_harmony(path)
    assert isinstance(record, ImageRecord)
    assert record.files[0].folder == str(tmp_path.resolve() / "Images")


@pytest.mark.parametrize("url", ["s3://bucket/P1/a.tiff", "/data/P1/a.tiff", "D:/P1/a.tiff"])
def test_images_elsewhere(tmp_path: Path, url: str) -> None:
    (record,) = fields(index(tmp_path, [image(1, URL=url)]))
    assert (record.files[0].folder, record.files[0].name) == (url[: -len("/a.tiff")], "a.tiff")


def test_the_plate_is_text_and_can_be_given(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1)], plates=plate("007"))
    assert [record.plate for record in fields(path)] == ["007"]
    assert [record.plate for record in fields(path, plate="BR9")] == ["BR9"]
    path = index(tmp_path, [image(1)], plates=plate("By name", "Name"))
    assert [record.plate for record in fields(path)] == ["By name"]


@pytest.mark.parametrize("plates", ["", plate("A") + plate("B"), plate("")])
def test_an_unclear_plate_must_be_named(tmp_path: Path, plates: str) -> None:
    path = index(tmp_path, [image(1)], plates=plates)
    with pytest.raises(UserInputError, match="--plate"):
        fields(path)
    assert [record.plate for record in fields(path, plate="P")] == ["P"]


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>\n'


def test_entities_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1, ChannelName="&b;")], head=LAUGHS)
    assert index_of(path) is None
    with pytest.raises(BadTableError, match="not a Harmony index"):
        list(read_harmony(path))


def test_a_cut_index_is_told_with_its_line(tmp_path: Path) -> None:
    path = index(tmp_path, [image(1), image(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"</Images>")])
    with pytest.raises(BadTableError, match=r"line \d+: no element found"):
        fields(path)


def test_an_index_without_images(tmp_path: Path) -> None:
    with pytest.raises(BadTableError, match="lists no images"):
        fields(index(tmp_path, []))


@pytest.mark.parametrize("text", ["", "<a/>", "FileName_OrigDNA,b\n", "\x89PNG", "<html><p>"])
def test_what_is_no_index(tmp_path: Path, text: str) -> None:
    path = tmp_path / "Index.idx.xml"
    path.write_text(text, encoding="utf-8")
    for other in (path, tmp_path, tmp_path / "absent"):
        assert index_of(other) is None
        with pytest.raises(BadTableError, match="not a Harmony index"):
            list(read_harmony(other))


@pytest.mark.parametrize("encoding", ["nonsense", "utf-7", "shift_jis", "utf-16"])
def test_an_encoding_that_is_not_the_files(tmp_path: Path, encoding: str) -> None:
    head = f'<?xml version="1.0" encoding="{encoding}"?>\n'
    path = index(tmp_path, [image(1)], head=head)
    assert index_of(path) is None
    with pytest.raises(BadTableError, match="not a Harmony index"):
        list(read_harmony(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_that_are_the_files(tmp_path: Path, encoding: str) -> None:
    declared = encoding.removesuffix("-sig")
    head = f'<?xml version="1.0" encoding="{declared}"?>\n'
    path = index(tmp_path, [image(1, name="\u00b5Tracker")], head=head)
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    (record,) = fields(path)
    assert record.files[0].channel == "\u00b5Tracker"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([b"", b"<?xml ", b"<EvaluationInputData"]))
def test_any_bytes_are_told_from_an_index(tmp_path: Path, junk: bytes, head: bytes) -> None:
    path = tmp_path / "Index.idx.xml"
    path.write_bytes(head + junk)
    if index_of(path) is None:
        with pytest.raises(BadTableError):
            list(read_harmony(path))


@pytest.mark.parametrize("version", [5, 7])
def test_the_size_of_a_pixel_is_read(tmp_path: Path, version: int) -> None:
    sizes = "".join(
        f'<ImageResolution{axis} Unit="m">5.979760809567617E-07</ImageResolution{axis}>'
        for axis in "XY"
    )
    images, maps = [image(1), image(2)], ""
    if version == 5:
        images = [text.replace("<Row>", f"{sizes}<Row>") for text in images]
    else:
        maps = f'<Map><Entry ChannelID="1">{sizes}</Entry></Map>'
    (field,) = fields(index(tmp_path, images, maps=maps))
    assert field.pixel_size == 0.597976081
    narrow = index(tmp_path, [text.replace("ResolutionY", "ResolutionZ") for text in images])
    assert [field.pixel_size for field in fields(narrow)] == [None]


def test_a_folder_with_an_index_is_as_good_as_the_index(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    path = index(tmp_path / "Images", [image(1)])
    assert index_of(tmp_path) == index_of(tmp_path / "Images") == path
    assert fields(tmp_path) == fields(path)
    top = tmp_path / "BR1__2021-05-02T16_02_51-Measurement 1"
    top.mkdir()
    (tmp_path / "Images").rename(top / "Images")
    assert index_of(tmp_path) == top / "Images" / path.name


@pytest.mark.parametrize("name", ["index.xml", "Index.idx.xml", "INDEX.XML", "Index.ref.xml"])
@pytest.mark.parametrize("folder", ["B03", "B03/Images", "B03/raw"])
def test_an_index_of_any_spelling_above_or_beside_the_images(
    tmp_path: Path, name: str, folder: str
) -> None:
    """Found from the folder of the images and from the one above; the index names the plate."""
    (tmp_path / folder).mkdir(parents=True)
    for channel in (1, 2):
        (tmp_path / folder / f"r01c02f01p01-ch{channel}sk1fk1fl1.tiff").write_bytes(b"")
    for place in {"B03", folder}:
        path = index(tmp_path / place, [image(1), image(2)]).rename(tmp_path / place / name)
        for given_folder in {tmp_path / "B03", tmp_path / folder}:
            assert detect(given_folder) is Layout.HARMONY
            (record,) = fields(given_folder)
            assert (record.plate, len(record.files)) == ("BR1", 2)
            assert {file.folder for file in record.files} == {str((tmp_path / folder).resolve())}
        path.unlink()


def test_the_index_of_other_images_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images/r05c05f01p01-ch1sk1fk1fl1.tiff").write_bytes(b"")
    path = index(tmp_path, [image(1)])
    assert index_of(tmp_path / "Images") is None
    path.write_text(path.read_text(encoding="utf-8")[:300], encoding="utf-8")
    assert index_of(tmp_path / "Images") is None
    for plate_folder in ("P1", "P2"):
        (tmp_path / "screen" / plate_folder).mkdir(parents=True)
        index(tmp_path / "screen" / plate_folder, [image(1)])
    assert index_of(tmp_path / "screen") is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 2000))
def test_damage_is_told_and_never_a_traceback(tmp_path: Path, junk: bytes, start: int) -> None:
    path = index(tmp_path, [image(1), image(2), image(1, field=2)])
    whole = bytearray(path.read_bytes())
    whole[start : start + len(junk)] = junk
    path.write_bytes(whole)
    try:
        items = list(read_harmony(path))
    except UserInputError:
        return
    assert items


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
odd = st.one_of(texts, st.integers(-5, 50).map(str))


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["URL", "Row", "Col", "FieldID", "PlaneID", "TimepointID", "ChannelID"]
            ),
            odd.map(escaped),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_image_is_in_a_record_or_refused(
    tmp_path: Path, changes: list[dict[str, str]]
) -> None:
    path = index(tmp_path, [image(1, **change) for change in changes])
    items = list(read_harmony(path))
    counts = [len(item.files) if isinstance(item, ImageRecord) else 1 for item in items]
    assert sum(counts) == len(changes)


def test_a_folder_whose_name_is_not_utf_8_is_refused_in_words_that_are(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    (refused,) = read_harmony(index(folder, [image(1)]))
    assert isinstance(refused, Refusal)
    assert refused.reason == "folder name not understood"
    assert refused.detail.encode()


@pytest.mark.real
def test_the_real_index_says_what_the_real_table_says() -> None:
    folder = real_data("pe2loaddata/Version1")
    (record,) = fields(folder / "Index.idx.xml")
    (row,) = read_image_table(open_table(folder / "load_data_version1.csv"))
    assert isinstance(row, ImageRecord)
    for of in (record, row):
        key = (of.plate, of.row, of.column, of.site, of.plane, of.time_point, of.core_name)
        assert key == ("BR00121482", 1, 1, 1, 1, 1, "r01c01f01")
    by_number = [sorted((file.number, file.name) for file in of.files) for of in (record, row)]
    assert by_number[0] == by_number[1]
    assert record.pixel_size == row.pixel_size == 0.597976081
    assert [number for number, _ in by_number[0]] == [1, 2, 3, 4, 5, 6]
    assert {file.number: file.channel for file in record.files}[5] == "HOECHST 33342"
    jump = {"1": "Mito", "2": "AGP", "3": "RNA", "4": "ER", "5": "DNA"}
    (renamed,) = fields(folder, channels=jump)
    assert {f.channel for f in renamed.files} == {f.channel for f in row.files}
