"""Where the files of images are, and what their bytes are: looked for, hashed, kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from ...db.bulk import in_lists, insert_new, one_ingest_at_a_time
from ...enums import PROJECTION_CHANNEL, Look
from ...errors import ImageError, StorageError, UserInputError
from ...io.image_files import ImageFolder, ImageInfo, probe
from ...io.uris import exists, is_remote, join, shown, stat
from ...jobs.queue import requeue
from ...jobs.workspace import Workspace
from ...models import Folder, Image, ImageFile, Job, Plate, Well
from .account import Account

LOOKED_AT = 200
"""Images whose files are looked at between two transactions."""

READERS = 4
"""Files that are hashed at the same time; reading and hashing leave Python's lock alone."""


class KnownFile(NamedTuple):
    """A file of an image as the store knows it; ``sha256`` None: not seen yet."""

    id: int | None
    channel: str
    name: str
    folder_id: int | None = None
    folder: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None


def known_files(session: Session, images: Iterable[int]) -> dict[int, dict[str, KnownFile]]:
    """Return the files of ``images`` (ids) by channel."""
    ids = list(images)
    found: dict[int, dict[str, KnownFile]] = {image: {} for image in ids}
    query = select(
        ImageFile.image_id,
        ImageFile.id,
        ImageFile.channel,
        ImageFile.name,
        ImageFile.folder_id,
        Folder.uri,
        ImageFile.sha256,
        ImageFile.size_bytes,
        ImageFile.modified_ns,
    ).outerjoin(Folder, Folder.id == ImageFile.folder_id)
    for some in in_lists(ids):
        for row in session.execute(query.where(ImageFile.image_id.in_(some))):
            found[row[0]][row[2]] = KnownFile(*row[1:])
    return found


def folder_id(session: Session, uri: str) -> int:
    """Return the id of the folder ``uri``, made if it is new. A closing slash means nothing.

    A user, a password or a signature in it are not kept.
    """
    uri = shown(uri).rstrip("/") or "/"
    query = select(Folder.id).where(Folder.uri == uri)
    found = session.scalar(query)
    if found is None:
        insert_new(session, Folder, [{"uri": uri}])
        found = session.scalars(query).one()
    return found


class SeenFile(NamedTuple):
    """A file that was looked at, and that is new or has changed."""

    known: KnownFile
    uri: str
    info: ImageInfo


def look_at_files(
    workspace: Workspace,
    images: NDArray[np.int64],
    folder: Path | None,
    look: Look,
    account: Account,
) -> frozenset[int]:
    """Find and hash the files of ``images`` (ids, ascending); each batch is one transaction.

    Files are searched by name in ``folder``, and ``look`` says where else to look. Returns the
    images of which a file was seen for the first time, or was found to have changed.
    """
    with workspace.database.read() as session:
        finder = FileFinder(session, folder, look)
    if look is Look.NOWHERE or not finder.can_find or not len(images):
        return frozenset()
    changed: set[int] = set()
    workspace.progress.start("look at files", len(images))
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for some in in_lists(images.tolist(), LOOKED_AT):
                with workspace.database.read() as session:
                    query = select(Image.id, Image.core_name, Plate.barcode).select_from(Image)
                    query = query.join(Well, Well.id == Image.well_id)
                    query = query.join(Plate, Plate.id == Well.plate_id)
                    rows = session.execute(query.where(Image.id.in_(some)).order_by(Image.id))
                    ids, core_names, plates = zip(*rows, strict=True)
                    files = known_files(session, ids)
                looks = pool.map(finder.look, core_names, plates, files.values())
                seen: dict[int, list[SeenFile]] = {}
                for image, (news, problems) in zip(ids, list(looks), strict=True):
                    if news:
                        seen[image] = news
                    for reason, detail in problems:
                        account.problem(None, reason, detail)
                if seen or account.pending:
                    with workspace.database.begin() as session:
                        account.flush(session)
                        if seen:
                            _write_seen(session, seen)
                changed |= seen.keys()
                workspace.progress.advance(len(some))
    finally:
        workspace.progress.finish()
    return frozenset(changed)


class FileFinder:
    """Finds the files of an image: by name in ``folder``, else where the store knows them to be.

    ``can_find`` is False where no file of the store could be found.
    """

    def __init__(self, session: Session, folder: Path | None, look: Look) -> None:
        self._folder = ImageFolder(folder) if folder is not None else None
        self._look = look
        self._here: set[str] = set()
        """Folders of the store that are on this machine."""
        for uri in session.scalars(select(Folder.uri)):
            try:
                if not is_remote(uri) and Path(uri).is_absolute() and Path(uri).is_dir():
                    self._here.add(uri)
            except (OSError, ValueError):  # too long for a path, or with a NUL in it
                continue
        self.can_find = bool(self._folder or self._here or look is Look.EVERYWHERE)

    def look(
        self, core_name: str, plate: str, files: Mapping[str, KnownFile]
    ) -> tuple[list[SeenFile], list[tuple[str, str]]]:
        """Return the files of an image that are new or have changed; and errors: reason, detail.

        A file named by the core file name is a projection and stands for all channels.
        """
        problems: list[tuple[str, str]] = []
        projection = files.get(PROJECTION_CHANNEL) or KnownFile(None, PROJECTION_CHANNEL, "")
        uri, is_known = self._locate(projection, plate, problems, core_name)
        wanted = [(projection, uri, is_known)]
        if uri is None and projection.sha256 is None:
            wanted = [(file, *self._locate(file, plate, problems)) for file in files.values()]
        seen: list[SeenFile] = []
        for file, uri, is_known in wanted:
            if uri is None:
                continue
            try:
                if is_known and file.sha256 is not None and not is_remote(uri):
                    # The same size and time spare the hashing.
                    found = stat(uri)
                    if (found.size_bytes, found.mtime_ns) == (file.size_bytes, file.modified_ns):
                        continue
                info = probe(uri)
            except (ImageError, StorageError, UserInputError, OSError) as error:
                problems.append(("image cannot be read", str(error)))
                continue
            if not is_known or (info.sha256, info.mtime_ns) != (file.sha256, file.modified_ns):
                seen.append(SeenFile(file, uri, info))
        return seen, problems

    def _locate(
        self,
        file: KnownFile,
        plate: str,
        problems: list[tuple[str, str]],
        core_name: str | None = None,
    ) -> tuple[str | None, bool]:
        """Return where a file is, or the projection of ``core_name``; None: we cannot look there.

        And whether that is where the store knows it to be.
        """
        known = None if file.folder is None else join(file.folder, file.name)
        if self._folder is not None:
            try:
                if core_name is None:
                    path = self._folder.find(file.name, plate)
                else:
                    path = self._folder.find_projection(core_name, plate)
                if path is not None:
                    return str(path), str(path) == known
            except ImageError as error:
                problems.append(("file name is not unique", str(error)))
        if known is None:
            return None, False
        if is_remote(known):
            return known if self._look is Look.EVERYWHERE else None, True
        is_here = file.folder in self._here and (file.sha256 is not None or exists(known))
        return known if is_here else None, True


def _write_seen(session: Session, seen: Mapping[int, Sequence[SeenFile]]) -> None:
    """Write what files are now, by image; what was derived from other bytes is stale from now."""
    one_ingest_at_a_time(session)
    folders: dict[str, int] = {}
    updates: list[dict[str, Any]] = []
    sizes: dict[int, float] = {}
    for image, files in seen.items():
        for file in files:
            folder, _, name = file.uri.rpartition("/")
            if folder not in folders:
                folders[folder] = folder_id(session, folder)
            values = {
                "folder_id": folders[folder],
                "name": name,
                "sha256": file.info.sha256,
                "size_bytes": file.info.size_bytes,
                "modified_ns": file.info.mtime_ns,
                "height": file.info.height,
                "width": file.info.width,
                "dtype": file.info.dtype,
            }
            if file.info.pixel_size is not None:
                sizes[image] = file.info.pixel_size
            if file.known.id is not None:
                updates.append({"id": file.known.id, **values})
                continue
            # A projection stands for the channels that were expected and never seen.
            unseen = (ImageFile.image_id == image, ImageFile.sha256.is_(None))
            session.execute(delete(ImageFile).where(*unseen))
            row = {"image_id": image, "channel": PROJECTION_CHANNEL, "position": 0, **values}
            insert_new(session, ImageFile, [row])
    if updates:
        session.execute(update(ImageFile), updates)
    # The content of an image is the sha256 over all its files, unknown while one is missing.
    digests: list[dict[str, Any]] = []
    for image, known in known_files(session, seen).items():
        content = sorted((file.channel, file.sha256 or "") for file in known.values())
        text = "\n".join(f"{channel}\t{sha256}" for channel, sha256 in content)
        complete = content and all(sha256 for _, sha256 in content)
        digest = hashlib.sha256(text.encode()).hexdigest() if complete else None
        digests.append({"id": image, "content_sha256": digest})
    session.execute(update(Image), digests)
    # What a table or a person has said of the size of a pixel goes before what files say.
    unknown = select(Image.id).where(Image.id.in_(sizes), Image.pixel_size.is_(None))
    rows = [{"id": image, "pixel_size": sizes[image]} for image in session.scalars(unknown)]
    if rows:
        session.execute(update(Image), rows)
    requeue(session, Job.image_id.in_(list(seen)))  # what failed may work now
