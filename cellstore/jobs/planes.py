"""From the masks of an image to rows: one segmentation and its cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..config import ImageInput
from ..db.bulk import in_lists
from ..db.models import Artifact, Cell, ImageFile, Segmentation
from ..db.session import Database
from ..enums import EXCLUDED_NO_PERIMETER, PROJECTION_CHANNEL, Projection
from ..errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from ..io.image_files import decode_tiff, project, read_plane
from ..io.uris import is_remote, local_path

NUCLEAR = re.compile("dna|dapi|hoechst", re.IGNORECASE)
"""What the names of channels of nuclei have in them."""

DEFAULT_CHANNELS = 3
"""The published pipeline looks at the median of the first three channels."""


@dataclass(frozen=True)
class FileOrder:
    """A file of an image as it was ingested: where it is, and what shows that it is the same."""

    name: str
    uri: str | None
    sha256: str | None
    size_bytes: int | None
    modified_ns: int | None


@dataclass(frozen=True)
class PlaneOrder:
    """All that is needed to open a plane of an image, on any machine that sees the files."""

    files: tuple[FileOrder, ...]
    projection: Projection


def read_image(database: Database, image_id: int, wanted: ImageInput) -> NDArray[np.float32]:
    """Return the plane (H, W) of an image, in the grey levels of its files.

    Raises:
        ImageError: a file is missing, damaged, or not the one that was ingested.
        UnknownNameError: a channel of ``wanted`` does not exist.
    """
    with database.read() as session:
        order = plane_orders(session, [image_id], wanted)[image_id]
    if isinstance(order, CellstoreError):
        raise order
    return open_plane(order)


def plane_orders(
    session: Session, image_ids: Sequence[int], wanted: ImageInput
) -> dict[int, PlaneOrder | CellstoreError]:
    """Return by image id what :func:`open_plane` needs, or the error: it lacks the channel."""
    found = _files_by_image(session, image_ids)
    return {image_id: _plane_order(files, wanted) for image_id, files in found.items()}


def channel_orders(
    session: Session, image_ids: Sequence[int]
) -> dict[int, tuple[tuple[str, FileOrder], ...]]:
    """Return by image id every channel with what :func:`open_file` needs, in their order."""
    found = _files_by_image(session, image_ids)
    return {
        image_id: tuple((file.channel, _file_order(file)) for file in files)
        for image_id, files in found.items()
    }


def _files_by_image(session: Session, image_ids: Sequence[int]) -> dict[int, list[ImageFile]]:
    files: dict[int, list[ImageFile]] = {image_id: [] for image_id in image_ids}
    for some in in_lists(image_ids):
        query = select(ImageFile).where(ImageFile.image_id.in_(some))
        for file in session.scalars(query.order_by(ImageFile.position, ImageFile.channel)):
            files[file.image_id].append(file)
    return files


def _plane_order(files: list[ImageFile], wanted: ImageInput) -> PlaneOrder | CellstoreError:
    try:
        chosen = choose_files(files, wanted)
    except UnknownNameError as error:
        return error
    return PlaneOrder(tuple(_file_order(file) for file in chosen), wanted.projection)


def _file_order(file: ImageFile) -> FileOrder:
    return FileOrder(file.name, file.uri, file.sha256, file.size_bytes, file.modified_ns)


def open_plane(order: PlaneOrder) -> NDArray[np.float32]:
    """Return the plane (H, W) of an order, in the grey levels of its files.

    Raises:
        ImageError: a file is missing, damaged, or not the one that was ingested.
    """
    return project([open_file(file) for file in order.files], order.projection)


def check_channels(session: Session, wanted: ImageInput) -> None:
    """Refuse a channel that no image of the store has, before any work begins.

    Raises:
        UnknownNameError: with the channels that there are.
    """
    for name in wanted.channels:
        there = select(ImageFile.id).where(func.lower(ImageFile.channel) == name.lower())
        if session.scalar(there.limit(1)) is None:
            known = session.scalars(select(ImageFile.channel).distinct())
            raise UnknownNameError.of("channel", name, sorted(known))


def choose_channels(session: Session, named: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the channels that show the cells: the ``named`` ones, else that of the nuclei.

    Raises:
        UserInputError: none is named, and not exactly one channel of the store has such a name.
    """
    if named is not None:
        return named
    known = sorted(session.scalars(select(ImageFile.channel).distinct()))
    nuclear = [name for name in known if NUCLEAR.search(name)]
    if len(known) < 2 or len(nuclear) == 1:
        return tuple(nuclear or known)
    raise UserInputError(
        "Which channels show the cells? Name them with --channels. This store has: "
        f"{', '.join(known)}."
    )


def choose_files(files: Sequence[ImageFile], wanted: ImageInput) -> list[ImageFile]:
    """Return the files that make the plane ``wanted``."""
    by_channel = {file.channel: file for file in files}
    if wanted.channels:
        return [_channel(by_channel, name) for name in wanted.channels]
    if PROJECTION_CHANNEL in by_channel:
        return [by_channel[PROJECTION_CHANNEL]]
    return list(files)[:DEFAULT_CHANNELS]


def _channel(by_channel: dict[str, ImageFile], name: str) -> ImageFile:
    for channel, file in by_channel.items():
        if channel.lower() == name.lower():
            return file
    raise UnknownNameError.of("channel", name, by_channel)


def open_file(file: FileOrder) -> NDArray[np.generic]:
    """Return the pixels (H, W) of one file of an image; raises as :func:`open_plane` does."""
    if file.uri is None or file.sha256 is None:
        raise ImageError(
            f"{file.name} is missing. Ingest again with --images and the folder that has it."
        )
    if is_remote(file.uri):
        # What a server says of a change differs from server to server; the bytes are here anyway.
        return read_plane(file.uri, file.sha256)
    _check_unchanged(file.uri, file)
    return read_plane(file.uri)


def _check_unchanged(uri: str, file: FileOrder) -> None:
    path = local_path(uri)
    try:
        found = path.stat()
    except OSError as error:
        raise ImageError(
            f"{path} cannot be opened ({error.strerror}). Put it back and run: cellstore retry, or "
            "ingest again with --images and the folder that has it."
        ) from error
    if (found.st_size, found.st_mtime_ns) != (file.size_bytes, file.modified_ns):
        raise ImageError(f"{path} has changed since it was ingested. Run: cellstore refresh")


def read_artifact_image(
    session: Session, artifacts: ArtifactFolder, artifact_id: int
) -> NDArray[np.generic]:
    """Return the pixels of a stored mask (H, W) or flow image (H, W, 4).

    Raises:
        StorageError: the file is gone or changed.
    """
    artifact = session.get_one(Artifact, artifact_id)
    return decode_tiff(artifacts.read(artifact.path, artifact.sha256))


def cell_rows(masks: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Return one row of table ``cells`` for each label of ``masks`` (H, W)."""
    from ..analysis.features import cell_boxes

    boxes = cell_boxes(masks)
    perimeters = boxes.pop("perimeter")
    names = list(boxes)
    rows = zip(*(boxes[name].tolist() for name in names), perimeters.tolist(), strict=True)
    return [
        {**dict(zip(names, values, strict=False)), "excluded": _excluded(values[-1])}
        for values in rows
    ]


def insert_cells(
    session: Session, segmentation: Segmentation, cells: Sequence[dict[str, Any]]
) -> None:
    """Insert a new segmentation and its ``cells``, as :func:`cell_rows` returns them."""
    session.add(segmentation)
    session.flush()
    if cells:
        rows = [{"segmentation_id": segmentation.id, **cell} for cell in cells]
        session.execute(insert(Cell), rows)


def _excluded(perimeter: float) -> str | None:
    return EXCLUDED_NO_PERIMETER if perimeter == 0 else None
