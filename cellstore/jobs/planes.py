"""The planes of an image: which files make them, and their pixels; and the rows of its masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, and_, exists, func, insert, or_, select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.bulk import in_lists, take_ids
from ..db.session import Database
from ..enums import EXCLUDED_NO_PERIMETER, PROJECTION_CHANNEL
from ..errors import ImageError, UnknownNameError, UserInputError
from ..io.image_files import project, read_plane
from ..io.uris import is_remote, local_path, local_stat
from ..models import Cell, Folder, Image, ImageFile, Plate, Segmentation, Well
from .gone_files import gone_folder, gone_sentence
from .lookup import find_channels, image_name, in_recipes, recipe_channels

NUCLEAR = re.compile("dna|dapi|hoechst", re.IGNORECASE)
"""What the names of channels of nuclei have in them."""


class ChannelFile(NamedTuple):
    """A file of an image as it was ingested: where it is, and what shows that it is the same.

    ``in_recipes``: what recipes call its channel.
    """

    channel: str
    name: str
    uri: str | None
    sha256: str | None
    size_bytes: int | None
    modified_ns: int | None
    in_recipes: str


def read_image(database: Database, image_id: int, wanted: ImageInput) -> NDArray[np.float32]:
    """Return the plane (H, W) of an image, in the grey levels of its files.

    Raises:
        ImageError: a file is missing, damaged, or not the one that was ingested.
        UnknownNameError: a channel of ``wanted`` does not exist.
    """
    with database.read() as session:
        files = channel_files(session, [image_id])[image_id]
    return project([open_file(file) for file in choose_files(files, wanted)], wanted.projection)


def channel_files(session: Session, image_ids: Sequence[int]) -> dict[int, list[ChannelFile]]:
    """Return by image id the files of all its channels, in their order."""
    files: dict[int, list[ChannelFile]] = {image_id: [] for image_id in image_ids}
    named = recipe_channels(session)
    columns = (ImageFile.image_id, ImageFile.channel, ImageFile.name, Folder.uri, ImageFile.sha256)
    query = select(*columns, ImageFile.size_bytes, ImageFile.modified_ns, Well.plate_id)
    query = query.join(Image, Image.id == ImageFile.image_id).join(Well, Well.id == Image.well_id)
    query = query.outerjoin(Folder, Folder.id == ImageFile.folder_id)
    query = query.order_by(ImageFile.position, ImageFile.channel)
    for some in in_lists(image_ids):
        found = session.execute(query.where(ImageFile.image_id.in_(some)))
        for image_id, channel, name, folder, sha256, size, modified, plate in found:
            uri = None if folder is None else f"{folder.rstrip('/')}/{name}"  # as ImageFile.uri
            kept = named.get(plate, named.get(None, {})).get(channel, channel)
            files[image_id].append(ChannelFile(channel, name, uri, sha256, size, modified, kept))
    return files


def choose_files(files: Sequence[ChannelFile], wanted: ImageInput) -> list[ChannelFile]:
    """Return the files that make the plane ``wanted``."""
    if wanted.channels:
        by_name = {file.channel.lower(): file for file in reversed(files)}
        by_name |= {file.in_recipes.lower(): file for file in reversed(files)}
        for name in wanted.channels:
            if name.lower() not in by_name:
                raise UnknownNameError.of("channel", name, [file.channel for file in files])
        return [by_name[name.lower()] for name in wanted.channels]
    projected = [file for file in files if file.channel == PROJECTION_CHANNEL]
    return projected or list(files)[:3]  # as the published pipeline


def open_file(file: ChannelFile, rows: slice = slice(None)) -> NDArray[np.generic]:
    """Return the pixels (H, W) of one file of an image, or some of its rows.

    Raises as :func:`read_image` does.
    """
    if file.uri is None or file.sha256 is None:
        raise ImageError(
            f"{file.name} is missing. Ingest again with --images and the folder that has it."
        )
    if is_remote(file.uri):
        # What a server says of a change differs from server to server; the bytes are here anyway.
        return read_plane(file.uri, file.sha256, rows)
    path = local_path(file.uri)
    try:
        found = local_stat(path)
    except FileNotFoundError:
        # In the same words for all of a folder, and without a cause: to wait does not help.
        raise ImageError(gone_sentence(gone_folder(file.uri[: -len(file.name) - 1]))) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", error)
        raise ImageError(
            f"{path} cannot be opened ({why}). Make it readable and run: cellstore retry"
        ) from error
    if (found.size_bytes, found.mtime_ns) != (file.size_bytes, file.modified_ns):
        raise ImageError(f"{path} has changed since it was ingested. Run: cellstore refresh")
    return read_plane(file.uri, rows=rows)


def choose_channels(session: Session, named: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the channels that show the cells: the ``named`` ones, else that of the nuclei.

    As recipes call them.
    """
    if named is not None:
        chosen = find_channels(session, named)
    else:
        known = sorted(session.scalars(select(ImageFile.channel).distinct()))
        nuclear = [name for name in known if NUCLEAR.search(name)]
        if len(known) > 1 and len(nuclear) != 1:
            raise UserInputError(
                "Which channels show the cells? Name them with --channels. This store has: "
                f"{', '.join(known)}."
            )
        chosen = tuple(nuclear or known)
    return in_recipes(session, chosen) if recipe_channels(session) else chosen


def lacking_channels(
    session: Session, images: Select[int], planes: Sequence[ImageInput]
) -> tuple[Select[int], tuple[tuple[str, str], ...]]:
    """Return those of ``images`` that have the channels of ``planes``, and the others by name.

    Of each of the others it is said which channel it lacks.
    """
    selected, others = images, list[tuple[str, str]]()
    named = recipe_channels(session)
    for name in dict.fromkeys(name for plane in planes for name in plane.channels):
        has = exists().where(ImageFile.image_id == Image.id)
        means = func.lower(ImageFile.channel) == name.lower()
        plates_by_name: dict[tuple[str, ...], list[int | None]] = {}
        for plate, names in named.items():
            now = tuple(key for key, kept in names.items() if kept.lower() == name.lower())
            plates_by_name.setdefault(now, []).append(plate)
        for now, plates in plates_by_name.items():
            on = Well.plate_id.in_(plates)
            later = Well.plate_id.not_in([key for key in named if key])
            there = select(Well.id).where(or_(on, later) if None in plates else on)
            mine = and_(Image.well_id.in_(there), ImageFile.channel.in_(now))
            means = or_(means, mine) if now else means
        has = has.where(means)
        lack = select(Plate.barcode, Image.core_name, Image.plane, Image.time_point)
        lack = lack.select_from(Image).join(Well, Well.id == Image.well_id).join(Plate)
        rows = session.execute(lack.where(Image.id.in_(images), ~has).order_by(Image.id)).all()
        others += [(image_name(*row), f"no channel {name}") for row in rows]
        if rows:
            images = images.where(has)
        if rows and session.scalar(images.limit(1)) is None:
            known = select(ImageFile.channel).where(ImageFile.image_id.in_(selected)).distinct()
            raise UnknownNameError.of(
                "channel of the selected images", name, sorted(session.scalars(known))
            )
    return images, tuple(others)


def cell_rows(masks: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Return one row of table ``cells`` for each cell of ``masks`` (H, W), by object number.

    A cell whose outline has no length is too small to count.
    """
    from ..analysis.regions import find_regions, perimeters

    regions = find_regions(masks)
    names = ("min_row", "min_col", "max_row", "max_col", "centroid_row", "centroid_col")
    columns = [regions.object_numbers, *(getattr(regions, name) for name in names)]
    excluded = [EXCLUDED_NO_PERIMETER if p == 0 else None for p in perimeters(regions).tolist()]
    rows = zip(*(column.tolist() for column in columns), excluded, strict=True)
    return [dict(zip(("object_number", *names, "excluded"), row, strict=True)) for row in rows]


def insert_cells(
    session: Session, found: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]
) -> None:
    """Insert new segmentations, each with its cells, as :func:`cell_rows` returns them."""
    if not found:
        return
    ids = take_ids(session, Segmentation, len(found))
    segmentations = [{"id": key, **row} for key, (row, _) in zip(ids, found, strict=True)]
    session.execute(insert(Segmentation), segmentations)
    cells = [
        {"segmentation_id": key, **cell}
        for key, (_, of_image) in zip(ids, found, strict=True)
        for cell in of_image
    ]
    if cells:
        keys = take_ids(session, Cell, len(cells))
        rows = [{"id": key, **cell} for key, cell in zip(keys, cells, strict=True)]
        session.execute(insert(Cell), rows)
