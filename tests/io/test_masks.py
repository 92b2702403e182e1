"""Label images of any tool: which image each is of, and what it may hold."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from realdata import real_data

from cellstore.errors import ImageError, UserInputError
from cellstore.io.mask_files import masks_below, read_labels

LABELS = np.array([[0, 1, 1, 0], [7, 7, 0, 0], [0, 0, 0, 300]], np.uint16)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def save(path: Path, array: NDArray[Any]) -> Path:
    tifffile.imwrite(path, array)
    return path


@pytest.mark.parametrize(
    ("name", "stem", "kind"),
    [
        ("A01_1_cp_masks.png", "A01_1", None),
        ("A01_1_cp_masks.tif", "A01_1", None),
        ("A01_1_masks.tif", "A01_1", None),
        ("A01_1_mask.tif", "A01_1", None),
        ("A01_1-mask.TIF", "A01_1", None),
        ("A01_1_label.tif", "A01_1", None),
        ("A01_1_labels.png", "A01_1", None),
        ("A01_1-labels.tif", "A01_1", None),
        ("A01_1_seg.npy", "A01_1", None),
        ("mask_A01_1.tif", "A01_1", None),
        ("A01_1.ome_cp_masks.tif", "A01_1.ome", None),
        ("B7_01_1_3_DAPI_001_MaskNuclei.tiff", "B7_01_1_3_DAPI_001", "nuclei"),
        ("B7_01_3_3_RFP_001_MaskCells.tiff", "B7_01_3_3_RFP_001", "cells"),
        ("B7_01_3_3_RFP_001_MaskCytoplasm.tiff", "B7_01_3_3_RFP_001", "cytoplasm"),
        ("A01_1_nuclei_masks.tif", "A01_1", "nuclei"),
        ("A01_1_cp_masks_nuclei.tif", "A01_1", "nuclei"),
        ("A01_1_MaskMitochondria.tif", "A01_1", "mitochondria"),
    ],
)
def test_names_of_masks(tmp_path: Path, name: str, stem: str, kind: str | None) -> None:
    (mask,) = masks_below(touch(tmp_path, name))
    assert (mask.stems[0], mask.kind, mask.name) == (stem, kind, name)


def test_a_name_that_ends_twice_like_masks_may_be_of_either_image(tmp_path: Path) -> None:
    (mask,) = masks_below(touch(tmp_path, "a_mask_cp_masks.png"))
    assert mask.stems == ("a", "a_mask", "a_mask_cp_masks")


def test_among_images_only_what_is_named_like_masks_is(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif", "a_cp_masks.png", "a_flows.tif", "a_seg.npy", "notes.txt")
    assert [mask.name for mask in masks_below(tmp_path)] == ["a_cp_masks.png"]


def test_in_a_folder_of_their_own_masks_are_named_like_their_images(tmp_path: Path) -> None:
    touch(tmp_path, "P1/a.tif", "P1/a_outlines.png", "P2/a.ome.tif", "P2/notes.txt")
    found = [(mask.name, mask.stems[0]) for mask in masks_below(tmp_path)]
    assert found == [("P1/a.tif", "a"), ("P2/a.ome.tif", "a")]


def test_folders_of_images_beside_folders_of_masks_are_left_alone(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.tif", "labels/a_label.tif", "labels/b_seg.npy")
    found = [mask.name for mask in masks_below(tmp_path)]
    assert found == ["labels/a_label.tif", "labels/b_seg.npy"]


def test_a_folder_without_masks(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no masks"):
        masks_below(touch(tmp_path, "notes.txt"))
    with pytest.raises(UserInputError, match="not a folder"):
        masks_below(tmp_path / "absent")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.tif", LABELS)
    folder = touch(tmp_path / "masks", "a_mask.tif")
    (folder / "b_mask.tif").symlink_to(secret)
    assert [mask.name for mask in masks_below(folder)] == ["a_mask.tif"]


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "int16", "int32", "int64", "float32", "float64"]
)
def test_labels_of_any_type_come_back_as_they_are(tmp_path: Path, dtype: str) -> None:
    labels = np.minimum(LABELS, 200).astype(dtype)
    for path in (save(tmp_path / "a.tif", labels), tmp_path / "a.npy"):
        if path.suffix == ".npy":
            np.save(path, labels)
        found = read_labels(path)
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_8_and_16_bit(tmp_path: Path, dtype: Any) -> None:
    labels = np.minimum(LABELS, np.iinfo(dtype).max - 1).astype(dtype)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(labels))
    np.testing.assert_array_equal(read_labels(path), labels)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 4, 3), 9, np.uint8), "in colour"),
        (np.full((3, 4), -1, np.int16), "whole numbers from 0"),
        (np.full((3, 4), 0.5, np.float32), "whole numbers from 0"),
        (np.full((3, 4), np.nan, np.float32), "whole numbers from 0"),
        (np.full((3, 4), 1 << 31, np.uint32), "above 2147483647"),
        (np.array([[0, 255], [255, 0]], np.uint8), "black and white.*--binary-masks"),
        (np.array([[0, 65535], [65535, 0]], np.uint16), "black and white"),
    ],
)
def test_what_is_no_label_image_is_refused(
    tmp_path: Path, array: NDArray[Any], message: str
) -> None:
    photometric = "rgb" if array.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric)
    with pytest.raises(ImageError, match=message):
        read_labels(tmp_path / "a.tif")


def test_several_planes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="planes"):
        read_labels(save(tmp_path / "a.tif", np.zeros((7, 30, 40), np.uint16)))
    np.save(tmp_path / "a.npy", np.zeros((7, 30, 40), np.uint16))
    with pytest.raises(ImageError, match="7x30x40"):
        read_labels(tmp_path / "a.npy")


def test_black_and_white_on_demand(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[0, 255], [255, 0]], np.uint8))
    assert read_labels(path, binary=True).tolist() == [[0, 1], [1, 0]]


def test_a_single_object_of_label_255_among_others_is_a_label(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[0, 255], [254, 0]], np.uint8))
    assert read_labels(path).tolist() == [[0, 255], [254, 0]]


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "a_seg.npy"
    with path.open("wb") as file:
        np.save(file, np.array({"masks": Trap(trace)}, dtype=object), allow_pickle=True)
    raw = tmp_path / "b_seg.npy"
    raw.write_bytes(pickle.dumps(Trap(trace)))
    for item in (path, raw):
        with pytest.raises(ImageError, match=r"save_masks"):
            read_labels(item)
    assert not trace.exists()


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, masks=LABELS)
    with pytest.raises(ImageError, match="several arrays"):
        read_labels(tmp_path / "a.npy")


def test_a_png_that_claims_a_giant_size_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    whole = bytearray(imagecodecs.png_encode(LABELS))
    whole[16:24] = struct.pack(">II", 1 << 30, 1 << 30)
    (tmp_path / "a.png").write_bytes(bytes(whole))
    with pytest.raises(ImageError, match="claims"):
        read_labels(tmp_path / "a.png")


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".tif", ".png", ".npy"]))
def test_damage_is_a_sentence(data: bytes, suffix: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"a{suffix}"
    head = {".png": b"\x89PNG\r\n\x1a\n", ".tif": b"II*\0", ".npy": b"\x93NUMPY\x01\0"}[suffix]
    path.write_bytes(head + data)
    with pytest.raises(ImageError):
        read_labels(path)


@given(cut=st.integers(20, 2000))
def test_a_file_cut_short_is_a_sentence(cut: int, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("cut")
    rng = np.random.default_rng(1)
    labels = rng.integers(1, 60_000, (40, 40)).astype(np.uint16)
    tifffile.imwrite(folder / "a.tif", labels)
    np.save(folder / "a.npy", labels)
    (folder / "a.png").write_bytes(imagecodecs.png_encode(labels))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: -1 - cut])
        with pytest.raises(ImageError):
            read_labels(path)


@pytest.mark.real
def test_real_labels_of_stardist_are_not_consecutive() -> None:
    labels = read_labels(real_data("stardist/mask2d.tif"))
    assert (labels.shape, labels.max()) == ((512, 512), 183)
    assert len(np.unique(labels)) - 1 == 125


@pytest.mark.real
def test_real_masks_of_cellprofiler_are_black_and_white() -> None:
    folder = real_data("cytodataframe/NF1_Plate_2/Plate_2_masks")
    found = masks_below(folder)
    assert sorted(mask.kind or "" for mask in found) == [
        *("cells", "cells", "cytoplasm", "cytoplasm", "nuclei", "nuclei")
    ]
    for mask in found:
        with pytest.raises(ImageError, match="--binary-masks"):
            read_labels(mask.path)


@pytest.mark.real
def test_real_labels_of_the_data_science_bowl() -> None:
    folder = real_data("dsb2018/labels")
    images = {path.stem for path in (folder.parent / "images").iterdir()}
    found = masks_below(folder)
    assert len(found) == 10
    assert {mask.stems[0] for mask in found} == images
    assert min(int(read_labels(mask.path).max()) for mask in found) >= 8
