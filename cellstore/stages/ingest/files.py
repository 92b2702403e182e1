"""Where the files of a row are, and what they hold; everything that touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...db.models import ImageFile
from ...errors import ImageError
from ...formats.images import ImageFolder, ImageInfo, probe, recorded_path
from ...formats.records import FileRef, ImageRecord
from ...terms import PROJECTION_CHANNEL
from .write import FoundFile

PROJECTION_POSITION = 0


class FileFinder:
    """Finds files by name in ``images``, else where the row's ``PathName_*`` says they are."""

    def __init__(self, images: Path | None) -> None:
        self._folder = ImageFolder(images) if images is not None else None
        self._is_here: dict[str, bool] = {}
        self.problems: list[tuple[int, str, str]] = []

    def find(self, record: ImageRecord, present: Mapping[str, ImageFile]) -> tuple[FoundFile, ...]:
        """Return the files that a row names, each with what was found of it.

        A file named by the core file name is a projection and stands for all channels.
        """
        projection = self._projection(record, present)
        if projection is not None:
            return (projection,)
        return tuple(
            self._channel(record, ref, order, present.get(ref.channel))
            for order, ref in enumerate(record.files, start=1)
        )

    def _projection(
        self, record: ImageRecord, present: Mapping[str, ImageFile]
    ) -> FoundFile | None:
        old = present.get(PROJECTION_CHANNEL)
        path = self._in_folder(record, record.core_name, core=True)
        if path is None and old is None:
            return None
        name = path.name if path is not None else old.name if old is not None else ""
        expected = FoundFile(PROJECTION_CHANNEL, PROJECTION_POSITION, name)
        return self._look(record, expected, path, old)

    def _channel(
        self, record: ImageRecord, ref: FileRef, order: int, old: ImageFile | None
    ) -> FoundFile:
        expected = FoundFile(ref.channel, ref.number or order, ref.name)
        path = self._in_folder(record, ref.name) or self._named_place(ref)
        return self._look(record, expected, path, old)

    def _in_folder(
        self, record: ImageRecord, name: str | None, *, core: bool = False
    ) -> Path | None:
        if self._folder is None or name is None:
            return None
        try:
            if core:
                return self._folder.find_core(name, record.plate)
            return self._folder.find(name, None, record.plate)
        except ImageError as error:
            self.problems.append((record.line, "file name is not unique", str(error)))
            return None

    def _named_place(self, ref: FileRef) -> Path | None:
        """Return the file where the table says it is, if that folder is on this machine."""
        if ref.folder is None:
            return None
        if ref.folder not in self._is_here:
            self._is_here[ref.folder] = _is_folder(ref.folder)
        return recorded_path(ref.folder, ref.name) if self._is_here[ref.folder] else None

    def _look(
        self, record: ImageRecord, expected: FoundFile, path: Path | None, old: ImageFile | None
    ) -> FoundFile:
        if path is None:
            return expected
        try:
            return replace(expected, uri=str(path), info=_known(path, old) or probe(path))
        except (ImageError, OSError) as error:
            self.problems.append((record.line, "image cannot be read", str(error)))
            return expected


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_absolute() and Path(text).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return False


def _known(path: Path, old: ImageFile | None) -> ImageInfo | None:
    """Spare the hashing of a file that has neither moved nor changed since it was ingested."""
    if old is None or old.sha256 is None or old.uri != str(path):
        return None
    found = path.stat()
    if (found.st_size, found.st_mtime_ns) != (old.size_bytes, old.modified_ns):
        return None
    return ImageInfo(
        old.sha256,
        found.st_size,
        found.st_mtime_ns,
        old.height or 0,
        old.width or 0,
        old.dtype or "",
    )
