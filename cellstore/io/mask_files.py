"""Label images made by any tool: which image each belongs to, and what it holds.

A label image has one whole number for each pixel: 0 is background, each other value one object.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError, UserInputError
from .image_files import PNG_MAGIC, decode_tiff, files_below, too_large
from .uris import plain_file, writable

SUFFIXES = (".tif", ".tiff", ".png", ".npy")
MAX_PIXELS = 1 << 28
_MAX_LABEL = (1 << 31) - 1
_WHITE = (255, 65535)

_OBJECTS = {
    "nuclei": "nuclei",
    "nucleus": "nuclei",
    "nuc": "nuclei",
    "cells": "cells",
    "cell": "cells",
    "cytoplasm": "cytoplasm",
    "cyto": "cytoplasm",
}
_OBJECT = "|".join(sorted(_OBJECTS, key=len, reverse=True))
_WORD = r"masks?|labels?|lbl|labell?ed|seg|segmentation"
_MARKS = (
    re.compile(rf"(?P<stem>.+?)[-_. ]cp[-_]masks?(?:[-_.](?P<object>{_OBJECT}))?$", re.IGNORECASE),
    re.compile(rf"(?P<stem>.+?)[-_. ](?:{_WORD})[-_]?(?P<object>{_OBJECT})$", re.IGNORECASE),
    re.compile(rf"(?P<stem>.+?)[-_. ](?P<object>{_OBJECT})[-_]?(?:{_WORD})$", re.IGNORECASE),
    re.compile(rf"(?P<stem>.+?)[-_. ](?:{_WORD})$", re.IGNORECASE),
    re.compile(r"(?P<stem>.+?)[-_. ]Mask(?P<object>[A-Z][A-Za-z0-9]{1,30})$"),
    re.compile(rf"(?:{_WORD})[-_](?P<stem>.+)$", re.IGNORECASE),
)
_NOT_MASKS = re.compile(r"[-_.](?:outlines?|flows?|overlay|cp_output|probs?)$", re.IGNORECASE)


class MaskFile(NamedTuple):
    """A file of masks. ``stems``: names, without suffix, of its image, likeliest first.

    ``name`` is the path below the folder, with ``/``; ``kind`` the kind of objects ('nuclei')
    where the file name says it.
    """

    path: Path
    name: str
    stems: tuple[str, ...]
    kind: str | None


def mask_files(paths: Sequence[Path]) -> list[MaskFile]:
    """Return the files of masks that ``paths`` name: all below a folder, or a file as it is."""
    found: list[MaskFile] = []
    for path in paths:
        if path.is_dir():
            found += masks_below(path)
        elif path.suffix.lower() not in SUFFIXES:
            raise UserInputError(
                f"{path} is not a file of masks. Give label images: TIFF, PNG or NPY."
            )
        elif not path.is_file():
            raise UserInputError(f"There is no file {path}. Check the path.")
        else:
            found.append(_mask_file(path.resolve(), path.resolve().parent))
    return found


def masks_below(folder: Path) -> list[MaskFile]:
    """Return the files of masks below a folder.

    Where files are named like masks (``_cp_masks``, ``_label``, ``_MaskNuclei``, ...) only those
    are: the others are the images. Else every file is a mask, named like its image.

    Raises:
        UserInputError: there is no such folder, or no file of masks in it.
    """
    if not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder. Give the folder that has the masks.")
    root = folder.resolve()
    by_folder = list(files_below(root, SUFFIXES))
    has_marked = any(_split(_stem(path.name)) for paths in by_folder for path in paths)
    found: list[MaskFile] = []
    for paths in by_folder:
        masks = []
        for path in paths:
            stem = _stem(path.name)
            if _split(stem) if has_marked else not _NOT_MASKS.search(stem):
                masks.append(_mask_file(path, root))
        # Cellpose writes x_seg.npy beside x_cp_masks.png: the same masks once more.
        others = {mask.stems[0] for mask in masks if not _is_seg(mask)}
        found += (mask for mask in masks if not (_is_seg(mask) and mask.stems[0] in others))
    if not found:
        raise UserInputError(
            f"{folder} has no masks. Give a folder of label images: TIFF, PNG or NPY files "
            "named like the images they belong to."
        )
    return found


def _is_seg(mask: MaskFile) -> bool:
    return mask.path.name.lower().endswith("_seg.npy")


def _mask_file(path: Path, root: Path) -> MaskFile:
    stem = writable(_stem(path.name))
    stems, kind = [stem], None
    while (found := _split(stem)) is not None:
        stem, objects = found
        kind = kind or objects
        stems.insert(0, stem)
    name = writable(path.relative_to(root).as_posix())
    return MaskFile(path, name, tuple(dict.fromkeys(stems)), kind)


def _split(stem: str) -> tuple[str, str | None] | None:
    """Return the name of the image and the kind of object, of a name like those of masks."""
    for mark in _MARKS:
        if match := mark.fullmatch(stem):
            objects = (match.groupdict().get("object") or "").lower()
            return match["stem"], _OBJECTS.get(objects, objects) or None
    return None


def _stem(name: str) -> str:
    return re.sub(r"(\.ome)?\.[^.]+$", "", name, flags=re.IGNORECASE)


def read_labels(path: Path, *, binary: bool = False, most: int = MAX_PIXELS) -> NDArray[np.uint32]:
    """Return the labels (H, W) of a TIFF, PNG or NPY file of whole numbers of any type.

    ``binary``: the file says only where objects are (any value but 0); they come back as 1. A file
    of more than ``most`` pixels is not read.

    Raises:
        ImageError: it cannot be read, has colours or several planes, holds numbers that are no
            labels, or only black and white and ``binary`` is not asked for.
    """
    is_npy = path.suffix.lower() == ".npy"
    array = _read_npy(path, most) if is_npy else _read_image(path, most)
    labels = _whole_numbers(path, array)
    if binary:
        return (labels > 0).astype(np.uint32)
    values = labels[labels != 0]
    is_one_value = bool(values.size) and bool((values == values.flat[0]).all())
    if is_one_value and (labels.dtype == np.bool_ or values.flat[0] in _WHITE):
        raise ImageError(black_and_white(path.name))
    if values.size and values.max() > _MAX_LABEL:
        raise ImageError(f"{path.name} has labels above {_MAX_LABEL}. Number its objects from 1.")
    return labels.astype(np.uint32)


def black_and_white(name: str) -> str:
    """Return the sentence for a mask that does not number its objects."""
    return (
        f"{name} is black and white: it is not a label image, and touching objects look like one. "
        "Export the objects as labels, or use --binary-masks: each connected part is one object."
    )


def _read_image(path: Path, most: int) -> NDArray[Any]:
    try:
        with plain_file(path).open("rb") as stream:
            head = stream.read(26)
            data = head + stream.read() if head.startswith(PNG_MAGIC) else b""
    except OSError as error:
        raise ImageError(f"{path.name} cannot be opened ({error.strerror}).") from error
    if not data:
        return decode_tiff(path, most=most)
    width, height = struct.unpack(">II", data[16:24]) if len(data) > 24 else (0, 0)
    if width * height > most:
        raise ImageError(too_large(path.name, height, width))
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except Exception as error:  # imagecodecs has a class of its own for each codec
        raise ImageError(f"{path.name} is damaged. Copy or export it again.") from error


def _read_npy(path: Path, most: int) -> NDArray[Any]:
    try:
        # Mapped first: a header may claim any size. Pickles could run code and are never loaded.
        mapped = np.load(plain_file(path), mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ImageError(
            f"{path.name} is not a plain array. Cellpose's _seg.npy is a Python pickle, which is "
            "never opened. Save its masks as TIFF: cellpose.io.save_masks(..., tif=True)."
        ) from error
    if not isinstance(mapped, np.ndarray):  # an archive of several arrays
        raise ImageError(f"{path.name} holds several arrays. Save the masks as TIFF or one array.")
    if mapped.size > most:
        raise ImageError(too_large(path.name, *mapped.shape[:2]))
    return np.array(mapped)


def _whole_numbers(path: Path, array: NDArray[Any]) -> NDArray[Any]:
    """Return the one plane (H, W) of an array of whole numbers from 0, whatever their type."""
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    elif array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] <= 4:
        raise ImageError(
            f"{path.name} is in colour: it is a picture of masks, not a label image. "
            "Export the labels themselves, as 16-bit TIFF or PNG."
        )
    if array.ndim != 2:
        shape = "x".join(map(str, array.shape))
        raise ImageError(f"{path.name} has the shape {shape}. Export one plane of labels.")
    is_whole = array.dtype.kind in "bu"
    if array.dtype.kind in "if":
        is_whole = bool((np.isfinite(array) & (array >= 0) & (array == np.trunc(array))).all())
    if not is_whole:
        raise ImageError(
            f"{path.name} holds values that are no labels, which are whole numbers from 0. Give "
            "the label image, not an image of intensities or probabilities."
        )
    return array
