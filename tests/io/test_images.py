from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from realdata import real_data

from cellstore.enums import Projection
from cellstore.errors import ImageError, UserInputError
from cellstore.io.filenames import is_safe_name
from cellstore.io.image_files import (
    ImageFolder,
    decode_tiff,
    encode_tiff,
    probe,
    project,
    read_plane,
)

GRADIENT = np.arange(35, dtype=np.uint16).reshape(5, 7) * 900


def saved(path: Path, array: NDArray[np.generic], compression: str | None = None) -> Path:
    tifffile.imwrite(path, array, compression=compression)
    return path


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "deflate", "packbits", "zstd"])
def test_tiffs_of_any_compression(tmp_path: Path, compression: str | None) -> None:
    path = saved(tmp_path / "a.tiff", GRADIENT, compression)
    np.testing.assert_array_equal(read_plane(path), GRADIENT)
    info = probe(path)
    assert (info.height, info.width, info.dtype) == (5, 7, "uint16")
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (info.size_bytes, info.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


ODD_TIFFS: list[dict[str, Any]] = [
    {"resolution": (4294967295, 1), "resolutionunit": "CENTIMETER"},
    {"resolution": (0, 0)},
    {"byteorder": ">"},
    {"bigtiff": True},
    {"tile": (16, 16), "compression": "lzw"},
    {"rowsperstrip": 2, "compression": "zlib", "predictor": True},
    {"description": "<xml>no description</xml>", "metadata": None},
]


@pytest.mark.parametrize("options", ODD_TIFFS)
def test_what_is_said_beside_the_pixels_does_not_change_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GRADIENT, **options)
    np.testing.assert_array_equal(read_plane(path), GRADIENT)
    assert (probe(path).height, probe(path).width) == (5, 7)


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, *ODD_TIFFS])
def test_some_rows_are_those_of_the_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    image = np.arange(37 * 35, dtype=np.uint16).reshape(37, 35)
    tifffile.imwrite(tmp_path / "a.tiff", image, **options)
    for rows in (slice(0, 5), slice(14, 35), slice(30, 90), slice(7, 7)):
        np.testing.assert_array_equal(read_plane(tmp_path / "a.tiff", rows=rows), image[rows])


def test_grey_levels_are_kept_as_they_are(tmp_path: Path) -> None:
    for plane in (GRADIENT % 256, GRADIENT % 256 * 257, GRADIENT.astype(np.float32) / 7):
        read = read_plane(saved(tmp_path / "a.tif", plane))
        assert read.dtype == plane.dtype
        np.testing.assert_array_equal(read, plane)


def test_several_planes_in_a_file_are_refused_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(GRADIENT)
        writer.write(GRADIENT[:2] + 1)
    for read in (probe, read_plane):
        with pytest.raises(ImageError, match="2 planes"):
            read(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_pngs(tmp_path: Path, dtype: type[np.generic]) -> None:
    grey = GRADIENT.astype(dtype)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(grey))
    np.testing.assert_array_equal(read_plane(path), grey)
    info = probe(path)
    assert (info.height, info.width, info.dtype) == (5, 7, np.dtype(dtype).name)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_grey_saved_as_colour_is_grey(tmp_path: Path, depth: int) -> None:
    grey = GRADIENT.astype(np.uint8)
    colour = np.stack([grey] * depth, axis=2)
    if depth != 3:
        colour[:, :, -1] = 255
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(colour))
    np.testing.assert_array_equal(read_plane(path), grey)


def test_real_colours_are_refused(tmp_path: Path) -> None:
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[1, 1, 2] = 9
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(colour))
    with pytest.raises(ImageError, match="4x4x3 and is not one grey channel"):
        read_plane(path)


@pytest.mark.parametrize("kind", ["tif", "png"])
@pytest.mark.parametrize("kept", [0, 3, 9, 20, 40, 0.5, 0.98])
def test_truncated_images_are_image_errors(tmp_path: Path, kind: str, kept: float) -> None:
    noise = np.random.default_rng(1).integers(0, 65535, (40, 40)).astype(np.uint16)
    whole = encode_tiff(noise) if kind == "tif" else imagecodecs.png_encode(noise)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    with pytest.raises(ImageError, match="truncated or not a TIFF"):
        read_plane(path)


def test_probe_sees_a_cut_tiff(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", GRADIENT)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ImageError, match="truncated"):
        probe(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"II*\0", b"\x89PNG\r\n\x1a\n"])
def test_probe_of_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="truncated or not a TIFF"):
        probe(path)


def test_a_missing_image(tmp_path: Path) -> None:
    for read in (probe, read_plane, decode_tiff):
        with pytest.raises(ImageError, match="cannot be opened"):
            read(tmp_path / "absent.tif")


@given(st.binary(max_size=400))
def test_damage_is_an_image_error(junk: bytes) -> None:
    whole = bytearray(encode_tiff(GRADIENT))
    whole[8 : 8 + len(junk)] = junk
    try:
        decode_tiff(bytes(whole))
    except ImageError:
        return


def test_projections_of_three_planes() -> None:
    planes = [np.full((2, 2), value, np.uint16) for value in (65535, 1, 7)]
    median = project(planes, Projection.MEDIAN)
    assert median.dtype == np.float32
    assert median.tolist() == [[7, 7], [7, 7]]
    assert project(planes, Projection.MAX).max() == 65535
    assert project(planes, Projection.MEAN)[0, 0] == pytest.approx(65543 / 3)
    assert project(planes[:1], Projection.MEDIAN).tolist() == [[65535, 65535], [65535, 65535]]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 7),
    st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64]),
    st.integers(0, 1000),
)
def test_a_median_of_planes_is_that_of_numpy(number: int, dtype: type, seed: int) -> None:
    planes = np.random.default_rng(seed).integers(0, 200, (number, 4, 5)).astype(dtype)
    planes[0] = planes[0] + dtype(0.5)
    before = planes.copy()
    for projection, function in ((Projection.MEDIAN, np.median), (Projection.MEAN, np.mean)):
        expected = function(planes.astype(np.float64), axis=0).astype(np.float32)
        assert np.array_equal(project(list(planes), projection), expected)
    assert np.array_equal(planes, before)


def test_planes_of_different_kinds_have_a_median() -> None:
    planes = [np.full((1, 1), 3, np.uint8), np.full((1, 1), 2.5, np.float32), np.eye(1) * 70000]
    assert project(planes, Projection.MEDIAN).tolist() == [[3]]
    assert project(planes[:2], Projection.MEDIAN).tolist() == [[2.75]]


def test_planes_of_different_shapes_name_both() -> None:
    with pytest.raises(ImageError, match="2x3 and 3x2"):
        project([np.zeros((2, 3)), np.zeros((3, 2))], Projection.MAX)
    with pytest.raises(ImageError, match="no channel"):
        project([], Projection.MAX)


shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 5)),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([np.uint8, np.uint16, np.uint32, np.float32]), shapes, st.data())
def test_a_written_tiff_reads_back(
    dtype: type[np.generic], shape: tuple[int, ...], data: st.DataObject
) -> None:
    array = data.draw(arrays.arrays(dtype, shape))
    encoded = encode_tiff(array)
    decoded = decode_tiff(encoded)
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)
    assert encode_tiff(array.copy(order="F")) == encoded


def test_stored_tiffs_carry_nothing_that_varies() -> None:
    with tifffile.TiffFile(io.BytesIO(encode_tiff(GRADIENT))) as tiff:
        tags = {tag.name for tag in tiff.pages.first.tags}
    assert not tags & {"Software", "DateTime", "ImageDescription", "HostComputer", "Artist"}


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_images_are_found_by_name_whatever_the_case(tmp_path: Path) -> None:
    make(tmp_path, "deep/er/R01c01F01p01-ch3sk1fk1fl1.TIFF", "notes.txt")
    folder = ImageFolder(tmp_path)
    found = folder.find("r01c01f01p01-ch3sk1fk1fl1.tiff")
    assert found == tmp_path.resolve() / "deep/er/R01c01F01p01-ch3sk1fk1fl1.TIFF"
    assert (folder.find("notes.txt"), folder.find("x.tif")) == (None, None)


def test_the_folder_of_the_plate_decides_between_equal_names(tmp_path: Path) -> None:
    make(tmp_path, "P1/a.tif", "P2__2021-05-02/Images/a.tif", "P22/a.tif")
    folder = ImageFolder(tmp_path)
    assert folder.find("a.tif", plate="P1") == tmp_path.resolve() / "P1/a.tif"
    assert folder.find("a.tif", plate="P2") == tmp_path.resolve() / "P2__2021-05-02/Images/a.tif"
    for plate in (None, "P3"):
        with pytest.raises(ImageError, match="is in several folders"):
            folder.find("a.tif", plate=plate)


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "outside/secret.tif", "inside/real.tif")
    (tmp_path / "inside/leak.tif").symlink_to(tmp_path / "outside/secret.tif")
    (tmp_path / "inside/all").symlink_to(tmp_path / "outside")
    (tmp_path / "inside/alias.tif").symlink_to(tmp_path / "inside/real.tif")
    folder = ImageFolder(tmp_path / "inside")
    found = [folder.find(name) is not None for name in ("real.tif", "alias.tif", "leak.tif")]
    assert found == [True, True, False]
    assert folder.find("secret.tif") is None


def test_the_image_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="is not a folder"):
        ImageFolder(tmp_path / "absent")


def test_names_that_are_paths_are_not_safe() -> None:
    assert is_safe_name("r01c01f01p01-ch3sk1fk1fl1.tiff")
    assert is_safe_name("a..b.tif")
    for name in ("", ".", "..", "../a.tif", "/a.tif", "b\\a.tif", "C:a.tif", "a\0.tif"):
        assert not is_safe_name(name)


@pytest.mark.real
def test_a_real_phenix_field() -> None:
    path = real_data("cpjump1/images/DMSO/r04c14f05p01-ch5sk1fk1fl1.tiff")
    info = probe(path)
    plane = read_plane(path)
    assert (info.height, info.width, info.dtype) == (1080, 1080, "uint16")
    assert info.size_bytes == 2157067
    assert (plane.min(), plane.max()) == (213, 65535)


@pytest.mark.real
def test_real_png_and_tiffs_of_other_microscopes() -> None:
    for path in sorted(real_data("dsb2018/images").glob("*.png")):
        plane, info = read_plane(path), probe(path)
        assert plane.shape == (info.height, info.width)
        assert plane.max() > 0
    tiffs = [*real_data("cellprofiler_examples").rglob("*.TIF")]
    for path in [*tiffs[:2], real_data("stardist/img2d.tif")]:
        assert read_plane(path).shape == (probe(path).height, probe(path).width)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "levels", "lowest", "highest"),
    [
        ("cytodataframe/NF1_Plate_2/Plate_2_images/B7_01_1_3_DAPI_001.tif", 246, 2570, 65535),
        ("stardist/img2d.tif", 234, 0, 235),
    ],
)
def test_real_sixteen_bit_files_of_eight_bit_data(
    name: str, levels: int, lowest: int, highest: int
) -> None:
    plane = read_plane(real_data(name))
    assert plane.dtype == np.uint16
    assert (len(np.unique(plane)), plane.min(), plane.max()) == (levels, lowest, highest)


@pytest.mark.real
def test_a_real_grey_saved_as_colour() -> None:
    path = sorted(real_data("dsb2018/images").glob("*.png"))[0]
    colours = imagecodecs.png_decode(path.read_bytes())
    assert colours.shape[2] == 4
    np.testing.assert_array_equal(read_plane(path), colours[:, :, 1])
