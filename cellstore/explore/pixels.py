"""Pictures for the browser: fields in the colours of their channels, and crops of cells."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..db.bulk import in_lists
from ..enums import PROJECTION_CHANNEL
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from ..io.image_files import decode_tiff
from ..jobs.lookup import IS_CURRENT
from ..jobs.planes import NUCLEAR, ChannelFile, channel_files, open_file
from ..models import Artifact, Cell, Image, ImageFile, Plate, Segmentation, Well
from ..report.drawing import OUTLINE_COLOUR, Limits, coloured, grey_limits
from ..report.drawing import outlines as edges
from .requests import Explorer, row_of

T = TypeVar("T")
S = TypeVar("S")

SHOWN_AT_ONCE = 3
"""Channels of a picture unless others are asked for; more make one grey of all."""
WIDEST, SMALLEST_SIDE, LARGEST_SIDE = 4096, 8, 512
"""Pixels of a picture of a field, and of the side of a crop."""
CELLS_OF_SHEET, SHEET_COLUMNS = 400, 10
"""How many crops a sheet has at most, and how many of them are side by side."""
CONTRAST_FIELDS = 6
"""Fields that the contrast of a plate is found from."""
AMBER = np.array(OUTLINE_COLOUR, np.float32) / 255
EMPTY = 38
"""Grey of a crop that cannot be shown."""
WITHOUT_LIGHT = ("brightfield", "bright field", "brightfield_", "bf", "phase", "dic")
"""How the names of channels begin that are not fluorescence: on others they would lie as fog."""

AT_ONCE = threading.Semaphore(4)
"""Whole fields that are made into pictures at once: each may take a hundred megabytes."""


def in_threads(work: Callable[[T], S], items: Iterable[T]) -> list[S]:
    """Return what ``work`` makes of each item, in their order, several at a time."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        return list(pool.map(work, items))


def read_finite(file: ChannelFile, rows: slice = slice(None)) -> NDArray[np.generic]:
    """Return the pixels (H, W) of a file as :func:`open_file` does; what is no number is 0."""
    plane = open_file(file, rows)
    return np.nan_to_num(plane, posinf=0, neginf=0) if plane.dtype.kind == "f" else plane


def usual_channels(names: Sequence[str]) -> list[str]:
    """Return which channels of a field are shown where none is named.

    A projection alone; else the nuclei and the first others of fluorescence, in their order.
    """
    if PROJECTION_CHANNEL in names:
        return [PROJECTION_CHANNEL]
    lit = [name for name in names if not name.lower().startswith(WITHOUT_LIGHT)] or list(names)
    first = sorted(lit, key=lambda name: NUCLEAR.search(name) is None)[:SHOWN_AT_ONCE]
    return [name for name in names if name in first]


def contrasts(explorer: Explorer, plate: str, channels: Collection[str]) -> dict[str, Limits]:
    """Return the grey levels of black and white of channels, for all pictures of a plate.

    Of fields spread over the plate: the median of their 1st percentiles, and the upper quartile
    of their 99.7th, so that one odd field does not darken all others. A channel is left out where
    none of the fields can be read.
    """
    known = explorer.kept.setdefault("contrast", {})
    lacking = [name for name in channels if (plate, name) not in known]
    if lacking:
        # Of two requests at once, both find the same.
        for name, found in _find_contrasts(explorer, plate, lacking).items():
            known[plate, name] = found
    return {name: known[plate, name] for name in channels if (plate, name) in known}


def _find_contrasts(explorer: Explorer, plate: str, channels: Collection[str]) -> dict[str, Limits]:
    with explorer.workspace.database.read() as session:
        query = select(Image.id).join(Well, Well.id == Image.well_id)
        query = query.join(Plate, Plate.id == Well.plate_id).where(Plate.barcode == plate)
        query = query.where(Image.content_sha256.is_not(None)).order_by(Image.id)
        ids = list(session.scalars(query))
        spread = np.linspace(0, len(ids) - 1, min(CONTRAST_FIELDS, len(ids))).astype(int)
        chosen = [ids[at] for at in spread]
        heights = select(ImageFile.sha256, ImageFile.height).where(ImageFile.image_id.in_(chosen))
        tall = {row.sha256: row.height for row in session.execute(heights)}
        files = channel_files(session, chosen)
    wanted = [file for some in files.values() for file in some if file.channel in channels]

    def limits(file: ChannelFile) -> Limits | None:
        height = tall.get(file.sha256) or 0
        # An eighth of the rows, above the middle: some files are read from the top on.
        some = slice(height // 4, 3 * height // 8) if height > 256 else slice(None)
        try:
            return grey_limits(read_finite(file, some))
        except CellstoreError:
            return None

    found: dict[str, list[Limits]] = {}
    for file, one in zip(wanted, in_threads(limits, wanted), strict=True):
        if one is not None:
            found.setdefault(file.channel, []).append(one)
    return {
        name: (float(np.median([low for low, _ in some])),
               float(np.percentile([high for _, high in some], 75)))
        for name, some in found.items()
    }  # fmt: skip


def usual_segmentation(session: Session, image_id: int) -> Segmentation | None:
    """Return the newest segmentation of an image as it is now whose masks are known."""
    query = select(Segmentation).join(Image, IS_CURRENT).where(Image.id == image_id)
    query = query.where(Segmentation.mask_artifact_id.is_not(None))
    return session.scalars(query.order_by(Segmentation.id.desc()).limit(1)).first()


def _chosen(
    files: Mapping[int, Sequence[ChannelFile]], channels: Sequence[str]
) -> dict[int, list[ChannelFile]]:
    """The files of some channels of images, by any case; what an image lacks is left out.

    Raises UnknownNameError.
    """
    known = {file.channel.lower(): file.channel for some in files.values() for file in some}
    for name in channels:
        if known and name.lower() not in known:
            raise UnknownNameError.of("channel", name, sorted(known.values()))
    found = {}
    for image_id, some in files.items():
        by_name = {file.channel.lower(): file for file in reversed(some)}
        names = channels or usual_channels([file.channel for file in some])
        found[image_id] = [by_name[x.lower()] for x in names if x.lower() in by_name]
    return found


def jpeg(picture: NDArray[np.float32]) -> bytes:
    """Return a picture (H, W, 3) from 0 to 1 as a JPEG, its colours as sharp as its light."""
    from imagecodecs import jpeg8_encode

    whole = np.rint(picture * 255).astype(np.uint8)
    return bytes(jpeg8_encode(np.ascontiguousarray(whole), level=90, subsampling="444"))


def _reduced(plane: NDArray[Any], step: int) -> NDArray[np.float32]:
    """Return means of squares of ``step`` pixels of a plane (H, W), in the shape of every step."""
    if step == 1:
        return plane.astype(np.float32)
    rows, columns = (length // step for length in plane.shape)
    whole = plane[: rows * step, : columns * step]
    # Rows first: these are added in the order in which they lie in memory.
    summed = np.add.reduceat(whole, np.arange(0, rows * step, step), axis=0, dtype=np.float32)
    summed = summed.reshape(rows, columns, step).sum(axis=2, dtype=np.float32)
    return np.asarray(summed / (step * step), np.float32)


def field_thumbnail(
    explorer: Explorer,
    image_id: int,
    *,
    width: int,
    channels: Sequence[str] = (),
    outlines: bool = False,
    segmentation_id: int | None = None,
) -> tuple[str, Callable[[], bytes]]:
    """Return a field as a JPEG, in the contrast of its plate: its mark, and what draws it.

    ``width`` in pixels: the picture is at least so wide, unless the field is not. ``channels``:
    together, each in its colour, or one in grey; see :func:`usual_channels`. ``outlines``: of the
    cells of a segmentation, the newest unless another is named. Pictures with the same mark are
    the same.
    Raises UnknownNameError or UserInputError or ImageError.
    """
    if not 16 <= width <= WIDEST:
        raise UserInputError(f"width has to be between 16 and {WIDEST} pixels, not {width}.")
    with explorer.workspace.database.read() as session:
        plate = row_of(session, Image, image_id).well.plate.barcode
        files = _chosen(channel_files(session, [image_id]), channels)[image_id]
        mask = mask_of(session, image_id, segmentation_id) if outlines else None
    if not files:
        raise ImageError("This image has no channel to look at. Ingest its files first.")
    limits = contrasts(explorer, plate, [file.channel for file in files])
    key = (width, mask, *limits.items(), *((file.channel, file.sha256) for file in files))

    def draw() -> bytes:
        with AT_ONCE:
            planes = in_threads(read_finite, files)
            if len({plane.shape for plane in planes}) > 1:
                raise ImageError("The channels of this image differ in size.")
            step = max(1, min(planes[0].shape[1] // width, planes[0].shape[0]))
            picture = coloured(
                [_reduced(plane, step) for plane in planes],
                _limits(limits, [file.channel for file in files], planes),
                [file.channel for file in files],
            )
            if mask is not None:
                masks = read_mask(explorer.workspace.artifacts, mask)
                if masks.shape != planes[0].shape:
                    raise ImageError("The masks are of another size. Segment the image again.")
                small = masks[::step, ::step][: picture.shape[0], : picture.shape[1]]
                picture[edges(small)] = AMBER
            return jpeg(picture)

    return hashlib.sha256(repr(key).encode()).hexdigest()[:32], draw


def _limits(
    known: Mapping[str, Limits], channels: Sequence[str], planes: Sequence[NDArray[Any]]
) -> list[Limits]:
    """The contrast of the plate; of a channel without one, that of the plane itself."""
    both = zip(channels, planes, strict=True)
    return [known.get(name) or grey_limits(plane) for name, plane in both]


Mask = tuple[str, str]
"""Path and sha256 of the file of masks."""


def mask_of(session: Session, image_id: int, segmentation_id: int | None) -> Mask | None:
    """Return the masks of a segmentation, or of the usual one; None may be known of either.

    Raises UnknownNameError.
    """
    if segmentation_id is None:
        found = usual_segmentation(session, image_id)
    else:
        found = session.get(Segmentation, segmentation_id)
        if found is None or found.image_id != image_id:
            raise UnknownNameError(f"Image {image_id} has no segmentation {segmentation_id}.")
    return None if found is None or found.mask is None else (found.mask.path, found.mask.sha256)


def read_mask(artifacts: ArtifactFolder, mask: Mask) -> NDArray[Any]:
    """Return stored masks (H, W); raises StorageError if the file is gone or changed."""
    return decode_tiff(artifacts.read(*mask))


class _Crop(NamedTuple):
    """Where a cell is: ``top`` and ``left`` of its crop may lie outside of the field."""

    cell_id: int
    image_id: int
    plate: str
    object_number: int
    top: int
    left: int
    mask: Mask | None


def sheet_pixels(
    explorer: Explorer,
    cell_ids: Sequence[int],
    *,
    side: int,
    channels: Sequence[str] = (),
    outlines: bool = False,
) -> NDArray[np.float32]:
    """Return crops of cells, (rows x ``side``, columns x ``side``, 3), from 0 to 1.

    Row by row in the order of ``cell_ids``, ``SHEET_COLUMNS`` in a row (fewer, if there are
    fewer). A crop is a square of ``side`` pixels of the field around the cell, not scaled, in the
    contrast of its plate; at the rim of the field it is moved inwards, and what a field smaller
    than it lacks is black. ``outlines``: of the cell itself. A crop
    that cannot be read is grey with a cross.
    Raises UnknownNameError or UserInputError.
    """
    if not SMALLEST_SIDE <= side <= LARGEST_SIDE:
        raise UserInputError(
            f"side has to be between {SMALLEST_SIDE} and {LARGEST_SIDE} pixels, not {side}."
        )
    if not 0 < len(cell_ids) <= CELLS_OF_SHEET:
        raise UserInputError(f"A sheet has between 1 and {CELLS_OF_SHEET} cells.")
    with explorer.workspace.database.read() as session:
        crops = _find_crops(session, cell_ids, side)
        files = channel_files(session, sorted({crop.image_id for crop in crops.values()}))
    chosen = _chosen(files, channels)
    sources: dict[ChannelFile | Mask, list[_Crop]] = {}
    for crop in crops.values():
        for file in chosen[crop.image_id]:
            sources.setdefault(file, []).append(crop)
        if outlines and crop.mask is not None:
            sources.setdefault(crop.mask, []).append(crop)
    artifacts = explorer.workspace.artifacts
    cut = in_threads(lambda item: _cut(artifacts, *item, side), sources.items())
    pieces: dict[int, dict[str | None, NDArray[Any]]] = {}
    for source, found in zip(sources, cut, strict=True):
        channel = source.channel if isinstance(source, ChannelFile) else None
        for cell_id, piece in found.items():
            pieces.setdefault(cell_id, {})[channel] = piece
    return _laid_out(explorer, cell_ids, crops, pieces, side)


def _find_crops(session: Session, cell_ids: Sequence[int], side: int) -> dict[int, _Crop]:
    """Where the cells are; without those of which no place is known."""

    def smallest(length: Any) -> Any:
        of_image = ImageFile.image_id == Segmentation.image_id
        return select(func.min(length)).where(of_image).scalar_subquery()

    y = func.coalesce((Cell.min_row + Cell.max_row) / 2.0, Cell.centroid_row)
    x = func.coalesce((Cell.min_col + Cell.max_col) / 2.0, Cell.centroid_col)
    query = select(Cell.id, Segmentation.image_id, Plate.barcode, Cell.object_number)
    query = query.add_columns(Artifact.path, Artifact.sha256, y.label("y"), x.label("x"))
    query = query.add_columns(smallest(ImageFile.height).label("height"))
    query = query.add_columns(smallest(ImageFile.width).label("width"))
    query = query.join(Segmentation, Segmentation.id == Cell.segmentation_id)
    query = query.join(Image, Image.id == Segmentation.image_id)
    query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    query = query.outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
    rows: dict[int, Any] = {}
    for some in in_lists(sorted(set(cell_ids))):
        rows.update((row.id, row) for row in session.execute(query.where(Cell.id.in_(some))))
    found = {}
    for cell_id in cell_ids:
        row = rows.get(cell_id)
        if row is None:
            raise UnknownNameError(f"There is no cell {cell_id}.")
        if row.y is None or row.x is None:
            continue
        top, left = (
            int(at - side / 2) if length < side else min(max(0, int(at - side / 2)), length - side)
            for at, length in ((row.y, row.height or 0), (row.x, row.width or 0))
        )
        mask = None if row.path is None else (row.path, row.sha256)
        found[cell_id] = _Crop(
            cell_id, row.image_id, row.barcode, row.object_number, top, left, mask
        )
    return found


def _cut(
    artifacts: ArtifactFolder, source: ChannelFile | Mask, crops: Sequence[_Crop], side: int
) -> dict[int, NDArray[Any]]:
    """The crops (side, side) of one file by cell; none if it cannot be read."""
    first = max(0, min(crop.top for crop in crops))
    last = max(0, max(crop.top for crop in crops) + side)
    try:
        if isinstance(source, ChannelFile):
            plane = read_finite(source, slice(first, last))
        else:
            plane = read_mask(artifacts, source)[first:last]
    except CellstoreError:
        return {}
    found = {}
    for crop in crops:
        made = np.zeros((side, side), plane.dtype)
        top, left = crop.top - first, crop.left
        there = plane[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
        down, right = max(0, -top), max(0, -left)
        made[down : down + there.shape[0], right : right + there.shape[1]] = there
        found[crop.cell_id] = made
    return found


def _laid_out(
    explorer: Explorer,
    cell_ids: Sequence[int],
    crops: Mapping[int, _Crop],
    pieces: Mapping[int, Mapping[str | None, NDArray[Any]]],
    side: int,
) -> NDArray[np.float32]:
    """The crops side by side, those of one plate and the same channels coloured at once."""
    columns = min(len(cell_ids), SHEET_COLUMNS)
    rows = -(-len(cell_ids) // columns)
    sheet = np.zeros((rows, side, columns, side, 3), np.float32)
    alike: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for at, cell_id in enumerate(cell_ids):
        names = tuple(name for name in pieces.get(cell_id, ()) if name is not None)
        if names:
            alike.setdefault((crops[cell_id].plate, names), []).append(at)
        else:
            sheet[at // columns, :, at % columns] = _crossed(side)
    for (plate, names), places in alike.items():
        planes = [
            np.stack([pieces[cell_ids[at]][name] for at in places]).astype(np.float32)
            for name in names
        ]
        limits = _limits(contrasts(explorer, plate, names), names, planes)
        pictures = coloured(planes, limits, names)
        for at, picture in zip(places, pictures, strict=True):
            mask = pieces[cell_ids[at]].get(None)
            if mask is not None:
                own = mask == crops[cell_ids[at]].object_number
                picture[edges(own.astype(np.uint8))] = AMBER
            sheet[at // columns, :, at % columns] = picture
    return sheet.reshape(rows * side, columns * side, 3)


def _crossed(side: int) -> NDArray[np.float32]:
    """What stands where a crop cannot be shown."""
    picture = np.full((side, side, 3), EMPTY / 255, np.float32)
    across = np.arange(side)
    picture[across, across] = picture[across, side - 1 - across] = 2.5 * EMPTY / 255
    return picture
