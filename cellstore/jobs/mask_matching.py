"""Which image of the store a file of masks belongs to, by its name and its folders."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..analysis.regions import cells_in_pieces, connected_parts
from ..artifacts import sha256_of
from ..db.session import Database
from ..errors import ImageError
from ..io.filenames import core_file_name
from ..io.mask_files import MAX_PIXELS, MaskFile, black_and_white, read_labels
from ..io.tables import RowRefusedError
from ..io.uris import writable
from ..models import Folder, Image, ImageFile, Plate, Well

_ENDINGS = (".tif", ".tiff", ".TIF", ".TIFF", ".png", ".PNG", ".ome.tif", ".ome.tiff")
_SHOWN = 3
_FEW_PIXELS = 1 << 26


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


def read_masks_of(
    database: Database, mask: MaskFile, *, plate: str | None = None, binary: bool = False
) -> tuple[FoundImage, NDArray[np.uint32]]:
    """Find the image of a file of masks; return it with the masks (H, W), which fit it.

    ``plate`` limits the images, ``binary`` takes each connected part of a black and white mask
    for one object.

    Raises:
        RowRefusedError: the file belongs to no image, or holds no masks of it.
    """
    try:
        sha256 = sha256_of(mask.path)
        with database.read() as session:
            image = match_image(session, mask, plate)
            same = select(ImageFile.id).where(ImageFile.sha256 == sha256).limit(1)
            is_an_image = session.scalar(same) is not None
        if is_an_image:
            raise RowRefusedError("this is an image", "the file is one of the images of the store")
        # Larger than its image by far: it is not even decoded.
        most = MAX_PIXELS if image.shape is None else max(prod(image.shape), _FEW_PIXELS)
        labels = read_labels(mask.path, binary=binary, most=most)
        if binary:
            labels = connected_parts(labels)
        elif labels.max(initial=0) == 1 and cells_in_pieces(labels):
            raise ImageError(black_and_white(mask.path.name))
    except ImageError as error:
        raise RowRefusedError("not a label image", writable(str(error))) from error
    except OSError as error:
        raise RowRefusedError("cannot be read", str(error.strerror)) from error
    except MemoryError as error:
        detail = "the masks do not fit into the memory of this machine"
        raise RowRefusedError("not enough memory", detail) from error
    if image.shape is not None and image.shape != labels.shape:
        of_masks, of_image = ("x".join(map(str, shape)) for shape in (labels.shape, image.shape))
        sizes = f"masks of {of_masks} pixels, image {image} of {of_image}"
        raise RowRefusedError("another shape than the image", sizes)
    return image, labels


def match_image(session: Session, mask: MaskFile, plate: str | None) -> FoundImage:
    """Return the image of ``mask``: by the name of any of its files, else by core file name.

    Where several images have the name, the ``plate`` decides, else a folder that is named like a
    plate ('BR00117035__2021-05-02T...'), else the folder of the image files. None or several are
    a ``RowRefusedError``.
    """
    parts = [writable(part.split("__")[0]) for part in reversed(mask.path.parent.parts)]
    known = set(session.scalars(select(Plate.barcode).where(Plate.barcode.in_(parts))))
    on_plate = plate or next((part for part in parts if part in known), None)
    for stem in mask.stems:
        by_file = select(Image.id).join(ImageFile, ImageFile.image_id == Image.id)
        by_file = by_file.where(ImageFile.name.in_([stem + ending for ending in _ENDINGS]))
        ids = _ids(session, by_file, on_plate) or _ids(session, _of_core_name(stem), on_plate)
        if len(ids) > 1:
            beside = (
                select(ImageFile.image_id)
                .join(Folder, Folder.id == ImageFile.folder_id)
                .where(ImageFile.image_id.in_(ids), Folder.uri == writable(str(mask.path.parent)))
            )
            ids = session.scalars(beside.distinct()).all() or ids
        if len(ids) == 1:
            return _image(session, ids[0])
        if ids:
            shown = ", ".join(str(_image(session, image_id)) for image_id in ids[:_SHOWN])
            more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            raise RowRefusedError(
                "several images have this name",
                f"{shown}{more}; put the masks of each plate into a folder named like it, or give "
                "--plate",
            )
    where = f" on plate {on_plate}" if on_plate else ""
    detail = f"no image{where} has a file or a name like {mask.stems[0]!r}"
    raise RowRefusedError("no such image", detail)


def _of_core_name(stem: str) -> Select[Any]:
    parsed = core_file_name(stem)
    query = select(Image.id).where(
        Image.core_name.in_({stem, parsed.core_name} if parsed else {stem})
    )
    if parsed and parsed.plane is not None:
        query = query.where(Image.plane == parsed.plane)
    if parsed and parsed.time_point is not None:
        query = query.where(Image.time_point == parsed.time_point)
    return query


def _ids(session: Session, query: Select[Any], plate: str | None) -> Sequence[int]:
    if plate is not None:
        query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        query = query.where(Plate.barcode == plate)
    # More than a few are not looked at: a name that so many images have says nothing.
    return session.scalars(query.distinct().order_by(Image.id).limit(5000)).all()


def _image(session: Session, image_id: int) -> FoundImage:
    columns = (Plate.id, Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
    query = select(Image.content_sha256, *columns).where(
        Image.id == image_id, Well.id == Image.well_id, Plate.id == Well.plate_id
    )
    row = session.execute(query).one()
    shapes = select(ImageFile.height, ImageFile.width).where(
        ImageFile.image_id == image_id, ImageFile.height.is_not(None)
    )
    shape = session.execute(shapes.order_by(ImageFile.position).limit(1)).first()
    return FoundImage(image_id, *row, None if shape is None else (shape[0] or 0, shape[1] or 0))
