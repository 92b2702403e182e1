"""Which image of the store a file of masks belongs to, told by its name and its folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..db.models import Folder, Image, ImageFile, Plate, Well
from ..db.session import Database
from ..errors import ImageError, UnknownNameError
from ..formats.files.masks import MaskFile, black_and_white, read_labels
from ..formats.files.places import writable
from ..formats.names import core_file_name

_ENDINGS = (".tif", ".tiff", ".TIF", ".TIFF", ".png", ".PNG", ".ome.tif", ".ome.tiff")
_SHOWN = 3


class FoundImage(NamedTuple):
    """An image of the store; height and width in pixels where one of its files was seen."""

    id: int
    content_sha256: str | None
    plate_id: int
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    shape: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.plate}/{self.well}/{self.site}"


class NoMatch(NamedTuple):
    """Why a file of masks belongs to no image: a reason to count by, and its details."""

    reason: str
    detail: str


class Labelled(NamedTuple):
    """Masks (H, W) with the image of the store that they are of."""

    image: FoundImage
    labels: NDArray[np.uint32]


def read_masks_of(
    database: Database, mask: MaskFile, *, plate: str | None = None, binary: bool = False
) -> Labelled | NoMatch:
    """Find the image of a file of masks, read the file, and compare the two.

    ``plate`` limits the images, ``binary`` takes each connected part of a black and white mask
    for one object.
    """
    try:
        sha256 = sha256_of(mask.path)
        with database.read() as session:
            image = find_image(session, mask, plate)
            known = _is_an_image(session, sha256)
        if isinstance(image, NoMatch):
            return image
        if known:
            return NoMatch("this is an image", "the file is one of the images of the store")
        labels = _labels(mask, binary)
    except ImageError as error:
        return NoMatch("not a label image", writable(str(error)))
    except OSError as error:
        return NoMatch("cannot be read", str(error.strerror))
    if image.shape is not None and image.shape != labels.shape:
        shapes = f"masks of {_pixels(labels.shape)} pixels, image {image} of {_pixels(image.shape)}"
        return NoMatch("another shape than the image", shapes)
    return Labelled(image, labels)


def check_plate(session: Session, plate: str | None) -> None:
    """Refuse a barcode that no plate of the store has.

    Raises:
        UnknownNameError: with the plates that there are.
    """
    if plate is None or session.scalar(select(Plate.id).where(Plate.barcode == plate)):
        return
    known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
    raise UnknownNameError.of("plate", plate, known)


def find_image(session: Session, mask: MaskFile, plate: str | None) -> FoundImage | NoMatch:
    """Return the image of ``mask``: by the name of any of its files, else by core file name.

    Where several images have the name, the ``plate`` decides, else a folder that is named like a
    plate, else the folder of the image files.
    """
    on_plate = plate or _plate_of_folders(session, mask)
    for stem in mask.stems:
        ids = _by_file_name(session, stem, on_plate) or _by_core_name(session, stem, on_plate)
        if len(ids) > 1:
            ids = _beside(session, ids, mask) or ids
        if len(ids) == 1:
            return _image(session, ids[0])
        if ids:
            return _several(session, ids)
    where = f" on plate {on_plate}" if on_plate else ""
    return NoMatch("no such image", f"no image{where} has a file or a name like {mask.stems[0]!r}")


def _by_file_name(session: Session, stem: str, plate: str | None) -> list[int]:
    names = [stem + ending for ending in _ENDINGS]
    query = select(Image.id).join(ImageFile, ImageFile.image_id == Image.id)
    return _ids(session, query.where(ImageFile.name.in_(names)), plate)


def _by_core_name(session: Session, stem: str, plate: str | None) -> list[int]:
    parsed = core_file_name(stem)
    names = {stem, parsed.core} if parsed else {stem}
    query = select(Image.id).where(Image.core_name.in_(names))
    if parsed and parsed.plane is not None:
        query = query.where(Image.plane == parsed.plane)
    if parsed and parsed.time_point is not None:
        query = query.where(Image.time_point == parsed.time_point)
    return _ids(session, query, plate)


def _ids(session: Session, query: Select[Any], plate: str | None) -> list[int]:
    if plate is not None:
        query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        query = query.where(Plate.barcode == plate)
    # More than a few are not looked at: a name that so many images have says nothing.
    return list(session.scalars(query.distinct().order_by(Image.id).limit(5000)))


def _plate_of_folders(session: Session, mask: MaskFile) -> str | None:
    """Return the plate that the nearest folder is named like ('BR00117035__2021-05-02T...')."""
    parts = [writable(part.split("__")[0]) for part in reversed(mask.path.parent.parts)]
    known = set(session.scalars(select(Plate.barcode).where(Plate.barcode.in_(parts))))
    return next((part for part in parts if part in known), None)


def _beside(session: Session, ids: Sequence[int], mask: MaskFile) -> list[int]:
    query = (
        select(ImageFile.image_id)
        .join(Folder, Folder.id == ImageFile.folder_id)
        .where(ImageFile.image_id.in_(ids), Folder.uri == writable(str(mask.path.parent)))
    )
    return list(session.scalars(query.distinct()))


def _image(session: Session, image_id: int) -> FoundImage:
    place = (Plate.id, Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
    query = select(Image.content_sha256, *place).where(
        Image.id == image_id, Well.id == Image.well_id, Plate.id == Well.plate_id
    )
    row = session.execute(query).one()
    shapes = select(ImageFile.height, ImageFile.width).where(
        ImageFile.image_id == image_id, ImageFile.height.is_not(None)
    )
    shape = session.execute(shapes.order_by(ImageFile.position).limit(1)).first()
    found = None if shape is None else (shape.height or 0, shape.width or 0)
    return FoundImage(image_id, *row, found)


def _several(session: Session, ids: Sequence[int]) -> NoMatch:
    shown = ", ".join(str(_image(session, image_id)) for image_id in ids[:_SHOWN])
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return NoMatch(
        "several images have this name",
        f"{shown}{more}; put the masks of each plate into a folder named like it, or give --plate",
    )


def _labels(mask: MaskFile, binary: bool) -> NDArray[np.uint32]:
    from ..ops.labels import labels_in_pieces, parts

    labels = read_labels(mask.path, binary=binary)
    if binary:
        return parts(labels)
    if labels.max(initial=0) == 1 and labels_in_pieces(labels):
        raise ImageError(black_and_white(mask.path.name))
    return labels


def _is_an_image(session: Session, sha256: str) -> bool:
    query = select(ImageFile.id).where(ImageFile.sha256 == sha256).limit(1)
    return session.scalar(query) is not None


def _pixels(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
