"""The plane of an image that a stage looks at, and the masks found in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..config import ImageInput
from ..db.models import Artifact, ImageFile
from ..db.session import Database
from ..errors import ImageError, UnknownNameError
from ..formats.files.images import decode_tiff, project, read_plane
from ..formats.files.places import is_remote, local_path
from ..terms import PROJECTION_CHANNEL

DEFAULT_CHANNELS = 3
"""The published pipeline looks at the median of the first three channels."""


def read_image(database: Database, image_id: int, wanted: ImageInput) -> NDArray[np.float32]:
    """Return the plane (H, W) of an image, in the grey levels of its files.

    Raises:
        ImageError: a file is missing, damaged, or not the one that was ingested.
        UnknownNameError: a channel of ``wanted`` does not exist.
    """
    with database.read() as session:
        files = choose_files(files_of(session, image_id), wanted)
    return project([_read(file) for file in files], wanted.projection)


def check_channels(session: Session, wanted: ImageInput) -> None:
    """Refuse a channel that no image of the store has, before any work begins.

    Raises:
        UnknownNameError: with the channels that there are.
    """
    if not wanted.channels:
        return
    known = {name.lower(): name for name in session.scalars(select(ImageFile.channel).distinct())}
    for name in wanted.channels:
        if name.lower() not in known:
            raise UnknownNameError.of("channel", name, sorted(known.values()))


def files_of(session: Session, image_id: int) -> list[ImageFile]:
    """Return the files of an image in the order of their channels."""
    query = select(ImageFile).where(ImageFile.image_id == image_id)
    return list(session.scalars(query.order_by(ImageFile.position, ImageFile.channel)))


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


def _read(file: ImageFile) -> NDArray[np.generic]:
    if file.uri is None or file.sha256 is None:
        raise ImageError(
            f"{file.name} is missing. Ingest again with --images and the folder that has it."
        )
    if is_remote(file.uri):
        # What a server says of a change differs from server to server; the bytes are here anyway.
        return read_plane(file.uri, file.sha256)
    _check_unchanged(file.uri, file)
    return read_plane(file.uri)


def _check_unchanged(uri: str, file: ImageFile) -> None:
    path = local_path(uri)
    try:
        found = path.stat()
    except OSError as error:
        raise ImageError(
            f"{path} cannot be opened ({error.strerror}). Put it back, or ingest again with "
            "--images pointing to the folder that has it."
        ) from error
    if (found.st_size, found.st_mtime_ns) != (file.size_bytes, file.modified_ns):
        raise ImageError(f"{path} has changed since it was ingested. Run the ingest again.")


def read_artifact_image(
    session: Session, artifacts: ArtifactFolder, artifact_id: int
) -> NDArray[np.generic]:
    """Return the pixels of a stored mask (H, W) or flow image (H, W, 4).

    Raises:
        StorageError: the file is gone or changed.
    """
    artifact = session.get_one(Artifact, artifact_id)
    return decode_tiff(artifacts.read(artifact.path, artifact.sha256))
