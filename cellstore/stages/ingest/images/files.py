"""Look at the image files themselves: where they are, what they hold, whether they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from ....db.bulk import in_lists, one_ingest_at_a_time
from ....db.models import Folder, Image, ImageFile, Job, Plate, Well
from ....db.statements import insert_new
from ....errors import ImageError, StorageError, UserInputError
from ....formats.files.images import ImageFolder, ImageInfo, probe
from ....formats.files.places import exists, is_remote, join, stat
from ....runs import Workspace
from ....runs.jobs import reopen
from ....terms import PROJECTION_CHANNEL, Look
from ..account import Account
from .wells import folder_id

AT_ONCE = 200
"""Images that are looked at between two transactions."""

READERS = 4
"""Files that are hashed at the same time; reading and hashing leave Python's lock alone."""


class _Expected(NamedTuple):
    """A file that the store expects, and what it knows of it."""

    id: int | None
    channel: str
    name: str
    folder: str | None
    sha256: str | None
    size_bytes: int | None
    modified_ns: int | None


class _Seen(NamedTuple):
    """A file that was looked at, and that is new or has changed."""

    expected: _Expected
    uri: str
    info: ImageInfo


@dataclass
class _Outcome:
    """What looking at the files of an image brought: news, and (reason, detail) of problems."""

    seen: list[_Seen] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Image:
    id: int
    core_name: str
    plate: str
    files: dict[str, _Expected] = field(default_factory=dict)


def look_at_files(
    workspace: Workspace,
    images: NDArray[np.int64],
    finder: Finder,
    account: Account,
) -> frozenset[int]:
    """Find and hash the files of ``images`` (ids, ascending); each batch is one transaction.

    Returns the images of which a file was seen for the first time, or was found to have changed.
    """
    changed: set[int] = set()
    workspace.progress.start("look at files", len(images))
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for some in in_lists(images.tolist(), AT_ONCE):
                with workspace.database.read() as session:
                    expected = _expected(session, some)
                found = list(pool.map(finder.look, expected))
                _tell(workspace, account, found)
                pairs = zip(expected, found, strict=True)
                seen = {image.id: outcome.seen for image, outcome in pairs if outcome.seen}
                changed |= _write(workspace, seen)
                workspace.progress.advance(len(some))
    finally:
        workspace.progress.finish()
    return frozenset(changed)


def _tell(workspace: Workspace, account: Account, outcomes: Iterable[_Outcome]) -> None:
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    for reason, detail in problems:
        account.problem(None, reason, detail)
    if problems:
        with workspace.database.begin() as session:
            account.flush(session)


class Finder:
    """Finds the files of an image: by name in ``folder``, else where the store knows them to be."""

    def __init__(self, folder: Path | None, look: Look, here: Iterable[str]) -> None:
        self._folder = ImageFolder(folder) if folder is not None else None
        self._look = look
        self._here = frozenset(here)

    @classmethod
    def of(cls, session: Session, folder: Path | None, look: Look) -> Finder:
        """Return a finder that knows which folders of the store are on this machine."""
        return cls(folder, look, _folders_here(session))

    @property
    def is_idle(self) -> bool:
        """Whether no file of the store could be found by this finder."""
        everywhere = self._look is Look.EVERYWHERE
        return self._look is Look.NOWHERE or not (self._folder or self._here or everywhere)

    def look(self, image: _Image) -> _Outcome:
        """Return the files of an image that are new or have changed, and what went wrong.

        A file named by the core file name is a projection and stands for all channels.
        """
        outcome = _Outcome()
        projection = self._projection(image, outcome)
        if projection is None:
            found = [self._file(image, expected, outcome) for expected in image.files.values()]
        else:
            found = [projection if isinstance(projection, _Seen) else None]
        outcome.seen += [seen for seen in found if seen is not None]
        return outcome

    def _projection(self, image: _Image, outcome: _Outcome) -> _Seen | _Expected | None:
        old = image.files.get(PROJECTION_CHANNEL)
        path = self._in_folder(image, None, outcome)
        if path is None and old is None:
            return None
        expected = old or _Expected(None, PROJECTION_CHANNEL, "", None, None, None, None)
        uri = str(path) if path is not None else self._known_place(expected)
        if uri is None:
            return expected if expected.sha256 else None
        return _look(expected, uri, outcome) or expected

    def _file(self, image: _Image, expected: _Expected, outcome: _Outcome) -> _Seen | None:
        path = self._in_folder(image, expected.name, outcome)
        uri = str(path) if path is not None else self._known_place(expected)
        return None if uri is None else _look(expected, uri, outcome)

    def _in_folder(self, image: _Image, name: str | None, outcome: _Outcome) -> Path | None:
        if self._folder is None:
            return None
        try:
            if name is None:
                return self._folder.find_core(image.core_name, image.plate)
            return self._folder.find(name, None, image.plate)
        except ImageError as error:
            outcome.problems.append(("file name is not unique", str(error)))
            return None

    def _known_place(self, expected: _Expected) -> str | None:
        """Return where a file should be, if it can be looked at from here."""
        if expected.folder is None:
            return None
        uri = join(expected.folder, expected.name)
        if is_remote(uri):
            return uri if self._look is Look.EVERYWHERE else None
        if expected.folder not in self._here:
            return None
        return uri if expected.sha256 or exists(uri) else None


def _look(expected: _Expected, uri: str, outcome: _Outcome) -> _Seen | None:
    try:
        if _is_known(expected, uri):
            return None
        info = probe(uri)
    except (ImageError, StorageError, UserInputError, OSError) as error:
        outcome.problems.append(("image cannot be read", str(error)))
        return None
    same = (join(expected.folder or "", expected.name), expected.sha256) == (uri, info.sha256)
    return None if same and expected.modified_ns == info.mtime_ns else _Seen(expected, uri, info)


def _is_known(expected: _Expected, uri: str) -> bool:
    """Spare the hashing of a file that has neither moved nor changed since it was seen."""
    if expected.sha256 is None or expected.folder is None or is_remote(uri):
        return False
    if join(expected.folder, expected.name) != uri:
        return False
    found = stat(uri)
    return (found.size_bytes, found.mtime_ns) == (expected.size_bytes, expected.modified_ns)


def _folders_here(session: Session) -> Iterator[str]:
    for uri in session.scalars(select(Folder.uri)):
        try:
            if not is_remote(uri) and Path(uri).is_absolute() and Path(uri).is_dir():
                yield uri
        except (OSError, ValueError):  # too long for a path, or with a NUL in it
            continue


def _expected(session: Session, ids: Sequence[int]) -> list[_Image]:
    columns = (Image.id, Image.core_name, Plate.barcode)
    joined = select(*columns).join(Well, Well.id == Image.well_id)
    query = joined.join(Plate, Plate.id == Well.plate_id).where(Image.id.in_(ids))
    images = {row[0]: _Image(*row) for row in session.execute(query.order_by(Image.id))}
    known = (ImageFile.sha256, ImageFile.size_bytes, ImageFile.modified_ns)
    files = select(
        ImageFile.image_id, ImageFile.id, ImageFile.channel, ImageFile.name, Folder.uri, *known
    ).outerjoin(Folder, Folder.id == ImageFile.folder_id)
    for row in session.execute(files.where(ImageFile.image_id.in_(ids))):
        images[row[0]].files[row[2]] = _Expected(*row[1:])
    return list(images.values())


def _write(workspace: Workspace, found: Mapping[int, list[_Seen]]) -> set[int]:
    if not found:
        return set()
    with workspace.database.begin() as session:
        one_ingest_at_a_time(session)
        folders: dict[str, int] = {}
        updates, new = [], []
        for image, files in found.items():
            for seen in files:
                values = _values(session, seen, folders)
                if seen.expected.id is None:
                    new.append({"image_id": image, "channel": PROJECTION_CHANNEL, **values})
                else:
                    updates.append({"id": seen.expected.id, **values})
        _store(session, updates, new)
        refresh_content(session, list(found))
        reopen(session, Job.image_id.in_(list(found)))  # what failed may work now
    return set(found)


def _store(
    session: Session, updates: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]
) -> None:
    if updates:
        session.execute(update(ImageFile), list(updates))
    for row in new:
        # A projection stands for the channels that were expected and never seen.
        unseen = (ImageFile.image_id == row["image_id"], ImageFile.sha256.is_(None))
        session.execute(delete(ImageFile).where(*unseen))
        insert_new(session, ImageFile, [{"position": 0, **row}])


def _values(session: Session, seen: _Seen, folders: dict[str, int]) -> dict[str, Any]:
    folder, _, name = seen.uri.rpartition("/")
    if folder not in folders:
        folders[folder] = folder_id(session, folder)
    return {
        "folder_id": folders[folder],
        "name": name,
        "sha256": seen.info.sha256,
        "size_bytes": seen.info.size_bytes,
        "modified_ns": seen.info.mtime_ns,
        "height": seen.info.height,
        "width": seen.info.width,
        "dtype": seen.info.dtype,
    }


def refresh_content(session: Session, images: Sequence[int]) -> None:
    """Say anew what the bytes of ``images`` are, all their files together."""
    query = select(ImageFile.image_id, ImageFile.channel, ImageFile.sha256)
    files: dict[int, list[tuple[str, str | None]]] = {image: [] for image in images}
    for image, channel, sha256 in session.execute(query.where(ImageFile.image_id.in_(images))):
        files[image].append((channel, sha256))
    rows = [{"id": image, "content_sha256": content_digest(all_)} for image, all_ in files.items()]
    session.execute(update(Image), rows)


def content_digest(files: Sequence[tuple[str, str | None]]) -> str | None:
    """Return the sha256 over (channel, sha256) of all files, None while one is missing."""
    if not files or any(sha256 is None for _, sha256 in files):
        return None
    text = "\n".join(f"{channel}\t{sha256}" for channel, sha256 in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
