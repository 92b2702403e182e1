"""OME-Zarr plates (HCS layout of the versions 0.4 and 0.5): wells, fields, channels, planes.

A plate is a folder with one folder for each well, in it one for each field, in it an array for each
resolution. Only the JSON files that describe them are read here; pixels by
:mod:`cellstore.io.image_files`, one plane at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UserInputError
from .filenames import is_safe_name, join_well, parse_well
from .image_files import pixel_size
from .image_tables import ChannelNames, FileRef, ImageRecord
from .tables import Refusal, RowRefusedError
from .uris import page_name, writable

_LARGEST_JSON = 1 << 26
_AXES = "tczyx"
_MOST_PLANES = 999_999


def is_ome_zarr(folder: Path) -> bool:
    """Whether a folder is an OME-Zarr plate."""
    return "plate" in _attributes(folder)


def read_ome_zarr(
    folder: Path, plate: str | None, names: ChannelNames, line: int = 0
) -> Iterator[ImageRecord | Refusal]:
    """Yield the fields of a plate at each plane and time point, with all channels.

    The plate is ``plate``, else the name that the metadata give, else that of the folder. Sites
    have the number of their folder, planes and time points are counted from 1. A channel has the
    label that ``omero`` gives, else ``C1``. Files are planes of the array of the best resolution,
    named like '0#page=3'. Lines count fields, from ``line`` + 1.

    Raises:
        MissingExtraError: zarr is not installed.
        UserInputError: two channels got one name.
    """
    try:
        import_module("zarr")
    except ImportError:
        raise MissingExtraError.of("zarr", "zarr") from None
    root = folder.resolve()
    described = _attributes(root).get("plate")
    described = described if isinstance(described, dict) else {}
    name = described.get("name")
    stem = root.name.removesuffix(".zarr").removesuffix(".ome")
    barcode = plate or writable(name if isinstance(name, str) and name.strip() else stem)
    for well in _items(described.get("wells")):
        path = str(well.get("path", ""))
        try:
            row, column = path.strip("/").split("/")
            position = parse_well(join_well(row, column))
            well_folder = _inside(root, path)
        except (RowRefusedError, UserInputError, ValueError) as error:
            line += 1
            yield Refusal(
                line, "not a well", f"{root}: the path of a well is {path[:50]!r} ({error})"
            )
            continue
        about_well = _attributes(well_folder).get("well")
        images = _items(about_well.get("images")) if isinstance(about_well, dict) else []
        if not images:
            line += 1
            yield Refusal(line, "well without images", writable(str(well_folder)))
        for number, image in enumerate(images, start=1):
            line += 1
            field = str(image.get("path", ""))
            site = int(field) if field.isascii() and field.isdigit() and len(field) < 7 else number
            try:
                yield from _read_field(
                    _inside(well_folder, field), line, (barcode, *position, site), names
                )
            except RowRefusedError as refused:
                reason, detail = refused.args
                yield Refusal(line, reason, writable(detail))


def _read_field(
    folder: Path, line: int, where: tuple[str, int, int, int], names: ChannelNames
) -> Iterator[ImageRecord]:
    attributes = _attributes(folder)
    multiscales = _items(attributes.get("multiscales"))
    levels = _items(multiscales[0].get("datasets")) if multiscales else []
    if not levels:
        raise RowRefusedError("image cannot be read", f"{folder}: no multiscales in its metadata")
    array = _inside(folder, str(levels[0].get("path", "")))
    shape = (_json(array / "zarr.json") or _json(array / ".zarray")).get("shape")
    axes = [str(axis.get("name", "")).lower() for axis in _items(multiscales[0].get("axes"))]
    if (
        not isinstance(shape, list)
        or not all(isinstance(size, int) and size > 0 for size in shape)
        or (len(shape), axes[-2:]) != (len(axes), ["y", "x"])
        or prod(shape[:-2]) > _MOST_PLANES
    ):
        raise RowRefusedError(
            "image cannot be read", f"{array}: no array with the axes {', '.join(axes) or 'y, x'}"
        )
    if len(set(axes)) < len(axes) or not set(axes) <= set(_AXES):
        detail = f"{folder}: its axes are {', '.join(axes)}; cellstore knows t, c, z, y and x"
        raise RowRefusedError("image cannot be read", detail)
    omero = attributes.get("omero")
    channels = _items(omero.get("channels")) if isinstance(omero, dict) else []
    labels = [writable(str(channel.get("label") or "")).strip() for channel in channels]
    sizes = dict(zip(axes, shape, strict=True))
    if sizes.get("c", 1) != len(labels):
        labels = [""] * sizes.get("c", 1)
    pixel_size = _pixel_size(axes, multiscales[0], levels[0])
    counted = [range(sizes.get(axis, 1)) for axis in "tz"]
    for time_point, plane in product(*counted):
        files = []
        for channel, label in enumerate(labels):
            index = {"t": time_point, "c": channel, "z": plane}
            page = 0  # the planes of the array, the last axis fastest
            for axis in axes[:-2]:
                page = page * sizes[axis] + index[axis]
            found = names.name(channel + 1, label or f"C{channel + 1}")
            file = page_name(array.name, page + 1) if axes[:-2] else array.name
            files.append(FileRef(found, channel + 1, file, str(array.parent)))
        yield ImageRecord(
            line, where[0], None, *where[1:], plane + 1, time_point + 1, None, tuple(files), None,
            pixel_size,
        )  # fmt: skip


def _pixel_size(
    axes: Sequence[str], multiscale: Mapping[str, Any], level: Mapping[str, Any]
) -> float | None:
    """Return the micrometres per pixel; None where they are not given, or pixels not square."""
    scales = [
        step["scale"]
        for some in (multiscale, level)
        for step in _items(some.get("coordinateTransformations"))
        if step.get("type") == "scale" and isinstance(step.get("scale"), list)
    ]
    sizes: list[tuple[str, str]] = []
    for number, axis in enumerate(_items(multiscale.get("axes"))):
        if axes[number] in "yx":
            try:
                size = prod(float(scale[number]) for scale in scales) if scales else None
            except (IndexError, TypeError, ValueError):
                size = None
            sizes.append((str(size or ""), str(axis.get("unit", ""))))
    return pixel_size(sizes)


def _attributes(folder: Path) -> dict[str, Any]:
    """Return what OME says of a group: in ``.zattrs`` (0.4), or in ``zarr.json`` (0.5)."""
    described = _json(folder / "zarr.json")
    if described:
        found = described.get("attributes")
        found = found.get("ome") if isinstance(found, dict) else None
    else:
        found = _json(folder / ".zattrs")
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _items(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _inside(folder: Path, path: str) -> Path:
    """Return a folder below another one."""
    parts = path.strip("/").split("/")
    if not all(map(is_safe_name, parts)):
        raise RowRefusedError("image cannot be read", f"{folder}: it names the path {path[:100]!r}")
    return folder.joinpath(*parts)
