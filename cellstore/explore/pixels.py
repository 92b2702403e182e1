"""Pictures for the browser: fields in the colours of their channels, and sheets of crops of cells.

What is read once is kept in memory, up to a limit, by the sha256 of the file it is of.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
from .requests import Explorer

T = TypeVar("T")
S = TypeVar("S")

KEPT_BYTES = 96 << 20
"""Bytes of pictures and crops that are kept."""
SHOWN_AT_ONCE = 3
"""Channels of a picture unless others are asked for; more make one grey of all."""
WIDEST, SMALLEST_SIDE, LARGEST_SIDE = 4096, 8, 512
"""Pixels of a picture of a field, and of the side of a crop."""
CELLS_OF_SHEET, SHEET_COLUMNS = 400, 10
"""How many crops a sheet has at most, and how many of them are side by side."""
CONTRAST_FIELDS = 6
"""Fields that the contrast of a plate is found from."""
EMPTY = 38
"""Grey of a crop that cannot be shown."""
WITHOUT_LIGHT = ("brightfield", "bright field", "brightfield_", "bf", "phase", "dic")
"""How the names of channels begin that are not fluorescence: on others they would lie as fog."""


class _Kept:
    """What was made last, up to so many bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
        return None if found is None else found[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            if key in self._items or size > self.most // 4:
                return
            self._items[key] = value, size
            self.size += size
            while self.size > self.most:
                self.size -= self._items.popitem(last=False)[1][1]


KEPT = _Kept(KEPT_BYTES)
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


def contrast(explorer: Explorer, plate: str, channel: str) -> Limits:
    """Return the grey levels of black and white of a channel, for all pictures of a plate.

    Of fields spread over the plate: the median of their 1st percentiles, and the upper quartile
    of their 99.7th, so that one odd field does not darken all others.

    Raises:
        UnknownNameError: the plate has no such channel.
        ImageError: none of the fields can be read.
    """
    return contrasts(explorer, plate, [channel])[0]


def contrasts(explorer: Explorer, plate: str, channels: Sequence[str]) -> list[Limits]:
    """Return :func:`contrast` of several channels."""
    known = explorer.kept.setdefault("contrast", {})
    lacking = [name for name in channels if (plate, name) not in known]
    if lacking:
        # Of two requests at once, both find the same.
        for name, found in _find_contrasts(explorer, plate, lacking).items():
            known[plate, name] = found
    return [known[plate, name] for name in channels]


def _find_contrasts(explorer: Explorer, plate: str, channels: Sequence[str]) -> dict[str, Limits]:
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
    known = sorted({file.channel for some in files.values() for file in some})
    wanted = [(name, file) for name in channels for some in files.values() for file in some
              if file.channel == name]  # fmt: skip
    for name in channels:
        if name not in known:
            raise UnknownNameError.of("channel", name, known)

    def limits(item: tuple[str, ChannelFile]) -> Limits | CellstoreError:
        height = tall.get(item[1].sha256) or 0
        # An eighth of the rows, above the middle: some files are read from the top on.
        some = slice(height // 4, 3 * height // 8) if height > 256 else slice(None)
        try:
            return grey_limits(read_finite(item[1], some))
        except CellstoreError as error:
            return error

    found: dict[str, list[Limits]] = {name: [] for name in channels}
    problem: CellstoreError = ImageError(f"No image of plate {plate} has its files.")
    for (name, _), one in zip(wanted, in_threads(limits, wanted), strict=True):
        if isinstance(one, CellstoreError):
            problem = one
        else:
            found[name].append(one)
    if any(not some for some in found.values()):
        raise problem
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


def choose(files: Sequence[ChannelFile], channels: Sequence[str]) -> list[ChannelFile]:
    """Return the files of some channels of an image, by any case; those that it lacks are not."""
    names = list(channels) or usual_channels([file.channel for file in files])
    by_name = {file.channel.lower(): file for file in reversed(files)}
    return [by_name[name.lower()] for name in names if name.lower() in by_name]


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
) -> bytes:
    """Return a field as a JPEG, in the contrast of its plate.

    ``width`` in pixels: the picture is at least so wide, unless the field is not. ``channels``:
    together, each in its colour, or one in grey; see :func:`usual_channels`. ``outlines``: of the
    cells of a segmentation, the newest unless another is named.

    Raises:
        UnknownNameError: there is no such image or segmentation, or it has no such channel.
        UserInputError: ``width`` is out of range.
        ImageError: a file is gone or has changed, or the masks do not fit.
    """
    if not 16 <= width <= WIDEST:
        raise UserInputError(f"width has to be between 16 and {WIDEST} pixels, not {width}.")
    with explorer.workspace.database.read() as session:
        plate, of_image = _field(session, image_id, channels)
        mask = _mask_of(session, image_id, segmentation_id) if outlines else None
    names = [file.channel for file in of_image]
    try:
        limits = contrasts(explorer, plate, names)
    except CellstoreError:  # of the plate this image may be the only one with its files
        limits = []
    marks = [file.sha256 for file in of_image]
    key = ("field", width, mask, *names, *limits, *marks)
    if (kept := KEPT.get(key)) is not None:
        return bytes(kept)
    with AT_ONCE:
        made = _drawn(explorer, of_image, limits, mask, width)
    KEPT.put(key, made, len(made))
    return made


def _drawn(
    explorer: Explorer,
    files: Sequence[ChannelFile],
    limits: Sequence[Limits],
    mask: Mask | None,
    width: int,
) -> bytes:
    """A field as a JPEG; without ``limits`` in its own contrast."""
    planes = in_threads(read_finite, files)
    limits = limits or [grey_limits(plane) for plane in planes]
    if len({plane.shape for plane in planes}) > 1:
        raise ImageError("The channels of this image differ in size, so they cannot be mixed.")
    step = max(1, min(planes[0].shape[1] // width, planes[0].shape[0]))
    picture = coloured(
        [_reduced(plane, step) for plane in planes], limits, [file.channel for file in files]
    )
    if mask is not None:
        masks = read_mask(explorer.workspace.artifacts, mask)
        if masks.shape != planes[0].shape:
            raise ImageError("The masks of this image are of another size. Segment it again.")
        small = masks[::step, ::step][: picture.shape[0], : picture.shape[1]]
        picture[edges(small)] = np.array(OUTLINE_COLOUR, np.float32) / 255
    return jpeg(picture)


def _field(
    session: Session, image_id: int, channels: Sequence[str]
) -> tuple[str, list[ChannelFile]]:
    """The plate of an image, and the files of the channels that are asked for."""
    query = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
    query = query.join(Image, Image.well_id == Well.id).where(Image.id == image_id)
    plate = session.scalars(query).one_or_none()
    if plate is None:
        raise UnknownNameError(f"There is no image {image_id}.")
    files = channel_files(session, [image_id])[image_id]
    chosen = choose(files, channels)
    for name in channels:
        if name.lower() not in {file.channel.lower() for file in files}:
            raise UnknownNameError.of("channel", name, [file.channel for file in files])
    if not chosen:
        raise ImageError("This image has no channel to look at. Ingest its files first.")
    return plate, chosen


Mask = tuple[str, str]
"""Path and sha256 of the file of masks."""


def _mask_of(session: Session, image_id: int, segmentation_id: int | None) -> Mask | None:
    """The masks of a segmentation of an image; without a number none may be known."""
    if segmentation_id is None:
        found = usual_segmentation(session, image_id)
    else:
        found = session.get(Segmentation, segmentation_id)
        if found is None or found.image_id != image_id:
            raise UnknownNameError(f"Image {image_id} has no segmentation {segmentation_id}.")
    if found is None or found.mask is None:
        return None
    return found.mask.path, found.mask.sha256


def read_mask(artifacts: ArtifactFolder, mask: Mask) -> NDArray[Any]:
    """Return stored masks (H, W).

    Raises:
        StorageError: the file is gone or changed.
    """
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


def crop_sheet(
    explorer: Explorer,
    cell_ids: Sequence[int],
    *,
    side: int,
    channels: Sequence[str] = (),
    outlines: bool = False,
) -> bytes:
    """Return crops of cells as one JPEG; :func:`sheet_pixels` says what is where."""
    return jpeg(sheet_pixels(explorer, cell_ids, side=side, channels=channels, outlines=outlines))


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

    Raises:
        UnknownNameError: there is no such cell, or none of the images has such a channel.
        UserInputError: ``side`` is out of range, or there are too many cells.
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
    chosen = {image_id: choose(some, channels) for image_id, some in files.items()}
    known = sorted({file.channel for some in files.values() for file in some})
    for name in channels:
        if known and name.lower() not in {item.lower() for item in known}:
            raise UnknownNameError.of("channel", name, known)
    of_image: dict[int, list[_Crop]] = {}
    for crop in crops.values():
        of_image.setdefault(crop.image_id, []).append(crop)
    jobs: list[tuple[ChannelFile | Mask, list[_Crop]]] = []
    for image_id, some in of_image.items():
        jobs += [(file, some) for file in chosen[image_id]]
        if outlines and some[0].mask is not None:
            by_mask: dict[Mask, list[_Crop]] = {}
            for crop in some:
                if crop.mask is not None:
                    by_mask.setdefault(crop.mask, []).append(crop)
            jobs += list(by_mask.items())
    artifacts = explorer.workspace.artifacts
    kept = [[KEPT.get(_key(source, crop, side)) for crop in some] for source, some in jobs]
    lacking = [at for at, found in enumerate(kept) if any(piece is None for piece in found)]
    new = in_threads(lambda at: _cut(artifacts, *jobs[at], kept[at], side), lacking)
    cut: list[list[NDArray[Any]] | None] = list(kept)
    for at, found in zip(lacking, new, strict=True):
        cut[at] = found
    pieces: dict[int, dict[str | None, NDArray[Any]]] = {}
    for (source, some), found in zip(jobs, cut, strict=True):
        of = source.channel if isinstance(source, ChannelFile) else None
        for crop, piece in zip(some, found or (), strict=bool(found)):
            pieces.setdefault(crop.cell_id, {})[of] = piece
    return _laid_out(explorer, cell_ids, crops, pieces, side)


def _find_crops(session: Session, cell_ids: Sequence[int], side: int) -> dict[int, _Crop]:
    columns = (Cell.id, Segmentation.image_id, Plate.barcode, Cell.object_number, Cell.min_row)
    query = select(*columns, Cell.min_col, Cell.max_row, Cell.max_col, Cell.centroid_row)
    query = query.add_columns(Cell.centroid_col, Artifact.path, Artifact.sha256)
    query = query.join(Segmentation, Segmentation.id == Cell.segmentation_id)
    query = query.join(Image, Image.id == Segmentation.image_id)
    query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    query = query.outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
    rows: dict[int, Any] = {}
    for some in in_lists(sorted(set(cell_ids))):
        rows.update((row.id, row) for row in session.execute(query.where(Cell.id.in_(some))))
    sizes: dict[int, tuple[int, int]] = {}
    size = select(ImageFile.image_id, func.min(ImageFile.height), func.min(ImageFile.width))
    size = size.group_by(ImageFile.image_id)
    for some in in_lists(sorted({row.image_id for row in rows.values()})):
        for image_id, height, width in session.execute(size.where(ImageFile.image_id.in_(some))):
            sizes[image_id] = height or 0, width or 0
    found = {}
    for cell_id in cell_ids:
        row = rows.get(cell_id)
        if row is None:
            raise UnknownNameError(f"There is no cell {cell_id}.")
        if None not in (row.min_row, row.max_row, row.min_col, row.max_col):
            middle = (row.min_row + row.max_row) / 2, (row.min_col + row.max_col) / 2
        elif None not in (row.centroid_row, row.centroid_col):
            middle = row.centroid_row, row.centroid_col
        else:
            continue
        top, left = (
            int(at - side / 2) if length < side else min(max(0, int(at - side / 2)), length - side)
            for at, length in zip(middle, sizes.get(row.image_id, (0, 0)), strict=True)
        )
        mask = None if row.path is None else (row.path, row.sha256)
        found[cell_id] = _Crop(
            cell_id, row.image_id, row.barcode, row.object_number, top, left, mask
        )
    return found


def _key(source: ChannelFile | Mask, crop: _Crop, side: int) -> Hashable:
    sha256 = source.sha256 if isinstance(source, ChannelFile) else source[1]
    return sha256, crop.top, crop.left, side


def _cut(
    artifacts: ArtifactFolder,
    source: ChannelFile | Mask,
    crops: Sequence[_Crop],
    kept: Sequence[NDArray[Any] | None],
    side: int,
) -> list[NDArray[Any]] | None:
    """The crops (side, side) of one file, some of them ``kept``; None if it cannot be read."""
    lacking = [crop for crop, piece in zip(crops, kept, strict=True) if piece is None]
    first = max(0, min(crop.top for crop in lacking))
    last = max(0, max(crop.top for crop in lacking) + side)
    try:
        if isinstance(source, ChannelFile):
            plane = read_finite(source, slice(first, last))
        else:
            plane = read_mask(artifacts, source)[first:last]
    except CellstoreError:
        return None
    found = list[NDArray[Any]]()
    for crop, piece in zip(crops, kept, strict=True):
        if piece is not None:
            found.append(piece)
            continue
        made = np.zeros((side, side), plane.dtype)
        top, left = crop.top - first, crop.left
        there = plane[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
        down, right = max(0, -top), max(0, -left)
        made[down : down + there.shape[0], right : right + there.shape[1]] = there
        KEPT.put(_key(source, crop, side), made, made.nbytes)
        found.append(made)
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
        try:
            limits = contrasts(explorer, plate, names)
        except CellstoreError:  # none of the fields that were looked at has its files
            limits = [grey_limits(plane) for plane in planes]
        pictures = coloured(planes, limits, names)
        for at, picture in zip(places, pictures, strict=True):
            mask = pieces[cell_ids[at]].get(None)
            if mask is not None:
                own = mask == crops[cell_ids[at]].object_number
                picture[edges(own.astype(np.uint8))] = np.array(OUTLINE_COLOUR, np.float32) / 255
            sheet[at // columns, :, at % columns] = picture
    return sheet.reshape(rows * side, columns * side, 3)


def _crossed(side: int) -> NDArray[np.float32]:
    """What stands where a crop cannot be shown."""
    picture = np.full((side, side, 3), EMPTY / 255, np.float32)
    across = np.arange(side)
    picture[across, across] = picture[across, side - 1 - across] = 2.5 * EMPTY / 255
    return picture
