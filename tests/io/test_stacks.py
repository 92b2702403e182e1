from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellstore.errors import ImageError
from cellstore.io.filenames import is_safe_name
from cellstore.io.image_files import ImageFolder, probe, read_plane
from cellstore.io.stacks import Stack, read_stack
from cellstore.io.uris import page_name

NAMES = ["DNA", "ER", "RNA"]


def pages(count: int) -> NDArray[np.uint16]:
    """Pages of 3x4 pixels; each has its number from 1 everywhere."""
    return np.arange(1, count + 1, dtype=np.uint16)[:, None, None] * np.ones((3, 4), np.uint16)


def most(stack: Stack) -> tuple[int, int]:
    """How many planes and time points there are."""
    return max(page[2] for page in stack.pages), max(page[3] for page in stack.pages)


def saved(path: Path, array: NDArray[np.generic], **options: Any) -> Path:
    tifffile.imwrite(path, array, photometric="minisblack", **options)
    return path


def ome_xml(order: str = "XYCZT", sizes: tuple[int, int, int] = (2, 3, 1), inner: str = "") -> str:
    told = " ".join(f'Size{axis}="{size}"' for axis, size in zip("CZT", sizes, strict=True))
    return (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels DimensionOrder="{order}" Type="uint16" SizeX="4" SizeY="3" {told}>'
        f'<Channel ID="c0" Name="DNA"/><Channel ID="c1"/>{inner}</Pixels></Image></OME>'
    )


def ome(path: Path, xml: str, count: int = 6) -> Path:
    return saved(path, pages(count), description=xml, metadata=None)


def read(path: Path) -> Stack:
    stack = read_stack(path)
    assert stack is not None
    return stack


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_pages_of_a_plain_tiff_are_planes(tmp_path: Path, bigtiff: bool, byteorder: Any) -> None:
    path = saved(tmp_path / "a.tif", pages(3), bigtiff=bigtiff, byteorder=byteorder)
    stack = read(path)
    assert stack.pages == tuple((page, 1, page, 1) for page in (1, 2, 3))
    assert (*most(stack), stack.channel_names) == (3, 1, (None,))


@pytest.mark.parametrize("bigtiff", [False, True])
def test_one_page_is_no_stack(tmp_path: Path, bigtiff: bool) -> None:
    path = saved(tmp_path / "a.tif", pages(1)[0], bigtiff=bigtiff)
    assert read_stack(path) is None


def test_channels_of_an_ome_tiff_have_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    saved(path, pages(3), ome=True, metadata={"axes": "CYX", "Channel": {"Name": NAMES}})
    stack = read(path)
    assert stack.channel_names == ("DNA", "ER", "RNA")
    assert stack.pages == tuple((page, page, 1, 1) for page in (1, 2, 3))


@pytest.mark.parametrize("axes", ["TZCYX", "TCZYX", "CZTYX", "ZCTYX"])
def test_what_is_written_by_axes_is_read_back(tmp_path: Path, axes: str) -> None:
    sizes = {"C": 2, "Z": 3, "T": 2}
    shape = tuple(sizes[axis] for axis in axes[:3])
    array = pages(12).reshape(*shape, 3, 4)
    path = saved(tmp_path / "a.ome.tiff", array, ome=True, metadata={"axes": axes})
    for page, channel, plane, time_point in read(path).pages:
        position = {"C": channel - 1, "Z": plane - 1, "T": time_point - 1}
        expected = array[tuple(position[axis] for axis in axes[:3])]
        found = read_plane(path.with_name(page_name(path.name, page)))
        np.testing.assert_array_equal(found, expected)


def test_pages_in_another_order_than_the_planes(tmp_path: Path) -> None:
    blocks = "".join(
        f'<TiffData IFD="{5 - position}" FirstC="{position % 2}" FirstZ="{position // 2}"/>'
        for position in range(6)
    )
    stack = read(ome(tmp_path / "a.ome.tiff", ome_xml(inner=blocks)))
    assert stack.pages[0] == (1, 2, 3, 1)
    assert stack.pages[5] == (6, 1, 1, 1)
    assert stack.channel_names == ("DNA", None)


def test_blocks_of_several_planes(tmp_path: Path) -> None:
    inner = '<TiffData IFD="3" PlaneCount="3"/><TiffData IFD="0" FirstC="1" PlaneCount="3"/>'
    stack = read(ome(tmp_path / "a.ome.tiff", ome_xml("XYZCT", inner=inner)))
    assert [page[1] for page in stack.pages] == [2, 2, 2, 1, 1, 1]
    assert [page[2] for page in stack.pages] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (ome_xml(sizes=(2, 2, 1)), "6 pages, and its description tells of 2 C x 2 Z x 1 T"),
        (ome_xml(inner='<TiffData IFD="1"/>'), "6 pages"),
        (ome_xml(inner='<TiffData IFD="1" PlaneCount="6"/>'), "6 pages"),
        (ome_xml(inner='<TiffData IFD="0" PlaneCount="999999"/>' * 50), "6 pages"),
        (ome_xml("XYCCT"), "DimensionOrder"),
        (ome_xml(inner='<TiffData IFD="-1"/>'), "number '-1'"),
        (ome_xml().replace("</OME>", "<Image/></OME>"), "2 images"),
        (ome_xml().replace("</Pixels>", ""), "damaged OME-XML"),
        ('<!DOCTYPE OME [<!ENTITY a "b">]>' + ome_xml(), "DOCTYPE"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, xml: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_stack(ome(tmp_path / "a.ome.tiff", xml))


def test_channels_of_imagej_are_not_planes(tmp_path: Path) -> None:
    array = pages(6).reshape(3, 2, 3, 4)
    path = saved(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "ZCYX"})
    stack = read(path)
    assert [tuple(page) for page in stack.pages[:3]] == [(1, 1, 1, 1), (2, 2, 1, 1), (3, 1, 2, 1)]
    assert (most(stack)[0], len(stack.channel_names)) == (3, 2)
    plain = saved(tmp_path / "b.tif", pages(3), description="ImageJ=1.54f\nimages=3", metadata=None)
    assert [page[2] for page in read(plain).pages] == [1, 2, 3]


@pytest.mark.parametrize("axes", ["CYX", "ZCYX", "CZYX", "TZCYX", "QYX", "CQYX", "TCYX"])
def test_axes_that_tifffile_names_are_read(tmp_path: Path, axes: str) -> None:
    sizes = {"C": 4, "Z": 2, "T": 3, "Q": 2}
    shape = tuple(sizes[axis] for axis in axes[:-2])
    array = pages(int(np.prod(shape))).reshape(*shape, 3, 4)
    path = saved(tmp_path / "a.tif", array, metadata={"axes": axes})
    stack = read(path)
    assert len(stack.channel_names) == (4 if "C" in axes else 1)
    assert most(stack) == (2 if "Z" in axes or "Q" in axes else 1, 3 if "T" in axes else 1)
    for page, channel, plane, time_point in stack.pages:
        position = {"C": channel - 1, "Z": plane - 1, "Q": plane - 1, "T": time_point - 1}
        expected = array[tuple(position[axis] for axis in axes[:-2])]
        np.testing.assert_array_equal(read_plane(f"{path}#page={page}"), expected)


def test_channels_that_tifffile_names_have_their_names(tmp_path: Path) -> None:
    metadata = {"axes": "CYX", "Channel": {"Name": NAMES}}
    assert read(saved(tmp_path / "a.tif", pages(3), metadata=metadata)).channel_names == tuple(
        NAMES
    )


@pytest.mark.parametrize("axes", ["PQYX", "ZQYX"])
def test_axes_that_mean_nothing_here_are_refused(tmp_path: Path, axes: str) -> None:
    path = saved(tmp_path / "a.tif", pages(4).reshape(2, 2, 3, 4), metadata={"axes": axes})
    with pytest.raises(ImageError, match=f"axes '{axes}', and cellstore reads C, Z and T"):
        read_stack(path)


def named_pages(path: Path, *names: str) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for page, name in zip(pages(len(names)), names, strict=True):
            tag = (285, "s", 0, name, True)
            writer.write(page, photometric="minisblack", metadata=None, extratags=[tag])
    return path


@pytest.mark.parametrize(
    ("names", "channels", "told"),
    [
        (["DNA", "ER"], ("DNA", "ER"), [(1, 1, 1), (2, 1, 1)]),
        (["ER", "DNA"] * 2, ("ER", "DNA"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]),
        (["ER", "ER", "DNA", "DNA"], ("ER", "DNA"), [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1)]),
        (["Alexa 488", "Alexa 568"], ("Alexa 488", "Alexa 568"), [(1, 1, 1), (2, 1, 1)]),
        (["w1", "w2"], ("w1", "w2"), [(1, 1, 1), (2, 1, 1)]),
        (["z=0", "z=1"], (None,), [(1, 1, 1), (1, 2, 1)]),
        (["Page 1 of 2", "Page 2 of 2"], (None,), [(1, 1, 1), (1, 2, 1)]),
        (["time 1", "time 2"], (None,), [(1, 1, 1), (1, 1, 2)]),
        (["DNA", "ER", "ER"], (None,), [(1, 1, 1), (1, 2, 1), (1, 3, 1)]),
        (["DNA", "DNA"], (None,), [(1, 1, 1), (1, 2, 1)]),
    ],
)
def test_names_of_pages(
    tmp_path: Path, names: list[str], channels: tuple[str | None, ...], told: list[tuple[int, ...]]
) -> None:
    stack = read(named_pages(tmp_path / "a.tif", *names))
    assert stack.channel_names == channels
    assert [tuple(page)[1:] for page in stack.pages] == told


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("described", [False, True])
def test_samples_that_nothing_is_said_of_are_channels(
    tmp_path: Path, planar: bool, count: int, described: bool
) -> None:
    array = pages(3 * count).reshape(count, 3, 3, 4)  # plane, sample
    path = tmp_path / "a.tif"
    samples = array if planar else np.moveaxis(array, 1, -1)
    axes = ("ZCYX" if planar else "ZYXC")[2 - count :]
    tifffile.imwrite(
        path,
        samples if count > 1 else samples[0],
        photometric="minisblack",
        planarconfig="separate" if planar else "contig",
        extrasamples=["unspecified"] * 2,
        metadata={"axes": axes} if described else None,
    )
    stack = read(path)
    assert stack.channel_names == (None, None, None)
    assert len(stack.pages) == 3 * count
    for page, channel, plane, _ in stack.pages:
        expected = array[plane - 1, channel - 1]
        uri = f"{path}#page={page}"
        np.testing.assert_array_equal(read_plane(uri), expected)
    for look in (probe, read_plane):
        with pytest.raises(ImageError, match=f"holds {3 * count} planes"):
            look(path)
        with pytest.raises(ImageError, match=f"has no page {3 * count + 1}"):
            look(f"{path}#page={3 * count + 1}")


def test_samples_of_an_ome_tiff_are_channels(tmp_path: Path) -> None:
    array = np.moveaxis(pages(4).reshape(2, 2, 3, 4), 1, -1)  # channel, y, x, sample
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, array, photometric="minisblack", planarconfig="contig", metadata={"axes": "CYXS"}
    )
    assert [tuple(page) for page in read(path).pages] == [
        (1, 1, 1, 1),
        (2, 2, 1, 1),
        (3, 3, 1, 1),
        (4, 4, 1, 1),
    ]


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("channels", [1, 2])
def test_alpha_is_passed_over_and_named(tmp_path: Path, alpha: str, channels: int) -> None:
    array = np.moveaxis(pages(channels + 1), 0, -1)
    extra = ["unspecified"] * (channels - 1) + [alpha]
    path = saved(tmp_path / "a.tif", array, planarconfig="contig", extrasamples=extra)
    if channels == 1:
        assert read_stack(path) is None
        assert int(read_plane(path).max()) == 1
        assert probe(path).remarks == ("alpha channel, skipped",)
    else:
        assert [page[0] for page in read(path).pages] == [1, 2]
        assert probe(f"{path}#page=1").remarks == ("alpha channel, skipped",)
        assert probe(f"{path}#page=2").remarks == ()


def test_colours_are_refused_before_they_are_stored(tmp_path: Path) -> None:
    colour = np.zeros((3, 4, 3), np.uint8)
    grey, real = tmp_path / "grey.tif", tmp_path / "real.tif"
    for planar in ("contig", "separate"):
        shape = colour if planar == "contig" else np.moveaxis(colour, -1, 0)
        tifffile.imwrite(grey, shape, photometric="rgb", planarconfig=planar)
        assert (read_stack(grey), probe(grey).dtype) == (None, "uint8")
        shape = shape.copy()
        shape[1, 1, 1] = 9
        tifffile.imwrite(real, shape, photometric="rgb", planarconfig=planar)
        for look in (read_stack, probe, read_plane):
            with pytest.raises(ImageError, match="is not one grey channel"):
                look(real)
        with pytest.raises(ImageError, match="has colours"):
            read_plane(f"{real}#page=2")
    png = tmp_path / "a.png"
    colour[1, 1, 1] = 9
    png.write_bytes(imagecodecs.png_encode(colour))
    for look in (read_stack, probe):
        with pytest.raises(ImageError, match="is not one grey channel"):
            look(png)


def test_reduced_copies_are_passed_over_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in pages(1):
            writer.write(page, metadata=None)
            writer.write(page[::2, ::2], subfiletype=1, metadata=None)
    assert read_stack(path) is None
    assert read_plane(path).shape == (3, 4)
    assert probe(path).remarks == ("reduced copies of the image, skipped",)
    with tifffile.TiffWriter(path) as writer:
        for page in pages(2):
            writer.write(page, metadata=None)
            writer.write(page[::2, ::2], subfiletype=1, metadata=None)
    assert [tuple(page) for page in read(path).pages] == [(1, 1, 1, 1), (3, 1, 2, 1)]
    assert int(read_plane(f"{path}#page=3").max()) == 2


def test_an_image_where_zero_is_white_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pages(1)[0], photometric="miniswhite")
    assert probe(path).remarks == ("white is zero, values not inverted",)
    np.testing.assert_array_equal(read_plane(path), pages(1)[0])


def test_an_ome_tiff_of_several_files_knows_its_planes(tmp_path: Path) -> None:
    blocks = "".join(
        f'<TiffData IFD="{plane}" FirstC="{channel}" FirstZ="{plane}" PlaneCount="1">'
        f'<UUID FileName="c{channel}.ome.tif">urn:uuid:{channel}</UUID></TiffData>'
        for channel in range(2)
        for plane in range(3)
    )
    xml = ome_xml(inner=blocks)
    ome(tmp_path / "c0.ome.tif", xml, 3)
    stack = read(ome(tmp_path / "c1.ome.tif", xml, 3))
    assert [tuple(page) for page in stack.pages] == [(1, 2, 1, 1), (2, 2, 2, 1), (3, 2, 3, 1)]
    assert stack.channel_names == ("DNA", None)
    only = '<OME><BinaryOnly MetadataFile="../x/set.companion.ome" UUID="urn:uuid:0"/></OME>'
    needs = ome(tmp_path / "c1.ome.tif", only, 3)
    with pytest.raises(ImageError, match=r"described in set\.companion\.ome, which is not beside"):
        read_stack(needs)
    (tmp_path / "set.companion.ome").write_text(xml, encoding="utf-8")
    assert read(needs) == stack


def test_a_companion_is_read_once_for_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = "<OME>" + "".join(
        f'<Image><Pixels SizeX="4" SizeY="3" SizeC="2" SizeZ="1" SizeT="1" DimensionOrder="XYCZT">'
        f"{block(f'f{number}.ome.tif', 0)}{block(f'f{number}.ome.tif', 1, 1)}</Pixels></Image>"
        for number in range(5)
    )
    (tmp_path / "set.companion.ome").write_text(f"{xml}</OME>", encoding="utf-8")
    only = '<OME><BinaryOnly MetadataFile="set.companion.ome" UUID="urn:uuid:0"/></OME>'
    opened = []
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **kwargs: opened.append(path) or read_text(path, **kwargs)
    )
    for number in range(5):
        stack = read(ome(tmp_path / f"f{number}.ome.tif", only, 2))
        assert [tuple(page) for page in stack.pages] == [(1, 1, 1, 1), (2, 2, 1, 1)]
    assert opened == [tmp_path / "set.companion.ome"]


def block(file: str, channel: int, page: int = 0) -> str:
    uuid = f'<UUID FileName="{file}">urn:uuid:1</UUID>'
    return f'<TiffData IFD="{page}" FirstC="{channel}" PlaneCount="1">{uuid}</TiffData>'


def test_files_of_one_page_know_their_channel(tmp_path: Path) -> None:
    xml = ome_xml(sizes=(2, 1, 1), inner=block("c0.ome.tif", 0) + block("c1.ome.tif", 1))
    stack = read(ome(tmp_path / "c1.ome.tif", xml, 1))
    assert stack.pages == ((1, 2, 1, 1),)
    assert read_stack(ome(tmp_path / "other.ome.tif", xml, 1)) is None
    with pytest.raises(ImageError, match=r"none of the files .*: c0.ome.tif, c1.ome.tif"):
        read_stack(ome(tmp_path / "other.ome.tif", xml, 2))


def test_one_file_that_was_renamed_is_read(tmp_path: Path) -> None:
    one = ome_xml(sizes=(1, 1, 1), inner=block("old.ome.tif", 0))
    assert read_stack(ome(tmp_path / "new.ome.tif", one, 1)) is None
    both = ome_xml(sizes=(2, 1, 1), inner=block("old.ome.tif", 0) + block("old.ome.tif", 1, 1))
    assert [page[1] for page in read(ome(tmp_path / "new.ome.tif", both, 2)).pages] == [1, 2]


def test_pages_must_be_grey_and_of_one_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for odd in (
        np.zeros((2, 2), np.uint16),
        np.zeros((3, 4), np.uint8),
        np.zeros((3, 4, 3), np.uint16),
    ):
        with tifffile.TiffWriter(path) as writer:
            writer.write(pages(1)[0])
            writer.write(odd, photometric="rgb" if odd.ndim == 3 else "minisblack")
        with pytest.raises(ImageError, match="not grey images of one shape"):
            read_stack(path)
    tifffile.imwrite(path, np.zeros((2, 3, 4, 3), np.uint8), photometric="rgb")
    with pytest.raises(ImageError, match="not grey images of one shape"):
        read_stack(path)


def test_a_page_is_read_and_known_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "stack.tif", pages(3), compression="lzw")
    uris = [path.with_name(page_name(path.name, page)) for page in (1, 2, 3)]
    assert [int(read_plane(uri).max()) for uri in uris] == [1, 2, 3]
    infos = [probe(uri) for uri in uris]
    assert len({info.sha256 for info in infos}) == 3
    assert {(info.height, info.width, info.size_bytes) for info in infos} == {
        (3, 4, path.stat().st_size)
    }


def test_a_changed_stack_is_another_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "stack.tif", pages(2))
    before = probe(f"{path}#page=1")
    saved(path, pages(2) + 1)
    assert probe(f"{path}#page=1").sha256 != before.sha256


@pytest.mark.parametrize(("name", "page"), [("stack.tif", 4), ("one.tif", 2), ("one.png", 2)])
def test_a_page_that_is_not_there(tmp_path: Path, name: str, page: int) -> None:
    saved(tmp_path / "stack.tif", pages(3))
    saved(tmp_path / "one.tif", pages(1)[0])
    (tmp_path / "one.png").write_bytes(imagecodecs.png_encode(pages(1)[0]))
    for look in (probe, read_plane):
        with pytest.raises(ImageError, match=f"no page {page}"):
            look(tmp_path / page_name(name, page))
    assert read_plane(tmp_path / page_name("one.png", 1)).max() == 1


@pytest.mark.parametrize("imagej", [True, False])
def test_planes_hidden_behind_one_page_are_refused(tmp_path: Path, imagej: bool) -> None:
    path = saved(tmp_path / "a.tif", pages(3), imagej=imagej, truncate=True)
    assert read_stack(path) is None
    for look in (probe, read_plane):
        with pytest.raises(ImageError, match="3x3x4 pixels behind one page"):
            look(path)


def test_pages_are_found_in_folders(tmp_path: Path) -> None:
    path = saved(tmp_path / "Stack.TIF", pages(2)).resolve()
    name = "stack.tif#page=2"
    assert is_safe_name(name)
    found = ImageFolder(tmp_path).find(name)
    assert found == path.with_name("Stack.TIF#page=2")
    assert int(read_plane(found).max()) == 2


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(bytes(19) + b"\x01\x81", 162)  # the second page lies at a place that is none
@given(st.binary(min_size=1, max_size=80), st.integers(0, 900))
def test_a_damaged_stack_is_an_image_error(tmp_path: Path, junk: bytes, start: int) -> None:
    path = ome(tmp_path / "a.ome.tiff", ome_xml())
    whole = bytearray(path.read_bytes())
    whole[start : start + len(junk)] = junk
    path.write_bytes(whole)
    try:
        stack = read_stack(path)
    except ImageError:
        return
    assert stack is None or len(stack.pages) > 1


def test_cut_headers_are_no_stacks(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.tif", pages(2)).read_bytes()
    for size in (0, 1, 3, 5, 9, 12):
        path = tmp_path / "cut.tif"
        path.write_bytes(whole[:size])
        assert read_stack(path) is None


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ('PhysicalSizeX="0.5979760809567617" PhysicalSizeY="0.5979760809567617"', 0.597976081),
        ('PhysicalSizeX="325" PhysicalSizeXUnit="nm" PhysicalSizeY="0.325"', 0.325),
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.7"', None),
        ('PhysicalSizeX="0.5"', None),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"', None),
        ('PhysicalSizeX="-1" PhysicalSizeY="-1"', None),
        ("", None),
    ],
)
def test_the_size_of_a_pixel_is_read_from_ome_xml(
    tmp_path: Path, written: str, size: float | None
) -> None:
    xml = ome_xml().replace("<Pixels ", f"<Pixels {written} ")
    stack = ome(tmp_path / "a.ome.tiff", xml)
    assert probe(stack.with_name(page_name(stack.name, 2))).pixel_size == size
    assert probe(ome(tmp_path / "b.ome.tiff", xml, count=1)).pixel_size == size


def test_a_damaged_ome_xml_leaves_the_size_of_a_pixel_unknown(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", ome_xml().replace("</Pixels>", ""), count=1)
    assert probe(path).pixel_size is None


@pytest.mark.parametrize("bigtiff", [False, True])
def test_a_file_of_many_pages_is_read_once_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bigtiff: bool
) -> None:
    path, hashed = saved(tmp_path / "a.tif", pages(30), bigtiff=bigtiff), []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.append(name)
        return digest(file, name)

    monkeypatch.setattr("cellstore.io.image_files.hashlib.file_digest", counted)
    # Asking how many pages there are goes through all of them.
    monkeypatch.delattr(tifffile.TiffPages, "__len__")
    for page in range(1, 31):
        uri = page_name(str(path), page)
        probe(uri)
        plane = read_plane(uri)
        assert (plane == page).all()
        assert plane.shape == (3, 4)
    assert len(hashed) == 1
    with pytest.raises(ImageError, match="no page 31, only 30"):
        read_plane(page_name(str(path), 31))
