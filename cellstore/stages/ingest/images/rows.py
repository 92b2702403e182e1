"""Records of images become rows of the store, some thousand at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ....db.bulk import bulk_insert, in_lists, take_ids
from ....db.models import Folder, Image, ImageFile
from ....formats.files.places import PathMap, is_remote, join
from ....formats.names import format_well
from ....formats.records import LONGEST, FileRef, ImageRecord, TreatmentRecord
from ....formats.treatments.tables import flaw_of
from ....terms import PROJECTION_CHANNEL
from ..account import Account
from ..treatments.writer import TreatmentWriter
from .wells import FolderIndex, WellIndex, WellKey

ImageKey = tuple[int, int, int, int]
"""Well, site, plane, time point."""

_IMAGE = ("id", "well_id", "site", "plane", "time_point", "core_name")
_FILE = ("image_id", "channel", "position", "name", "folder_id")


class _Present(NamedTuple):
    """A file that the store has."""

    id: int
    name: str
    folder_id: int | None
    folder: str | None
    sha256: str | None


class _Row(NamedTuple):
    """A record that can be used, its place in the batch, and its well."""

    place: int
    record: ImageRecord
    well: int

    @property
    def key(self) -> ImageKey:
        return self.well, self.record.site, self.record.plane, self.record.time_point


class RowWriter:
    """Writes the records of one file in the open transaction of ``session``.

    ``maps`` rewrites the folders that the records name. ``plates`` and ``images`` are those of all
    records that were used, ``unchanged`` of those that brought nothing new, an entry per record.
    """

    def __init__(
        self,
        session: Session,
        run_id: int,
        file: str,
        account: Account,
        maps: PathMap | None = None,
    ) -> None:
        self._session = session
        self._account = account
        self._treatments = TreatmentWriter(session, run_id, file)
        self._used: set[int] = set()
        self._run_id, self._file = run_id, file
        self._wells = WellIndex(session, account)
        self._folders = FolderIndex(session, maps or PathMap(()))
        self._said: dict[WellKey, tuple[TreatmentRecord, int]] = {}
        self._first_new: int | None = None
        self.plates: set[int] = set()
        self.images = array("q")
        self.unchanged = array("q")

    def write(self, records: Sequence[ImageRecord]) -> list[int | None]:
        """Bring records in; return the image of each, None where the record was refused.

        A record is refused that says something else of its well than an earlier one of the file.
        """
        usable = self._storable(records)
        chosen = records if len(usable) == len(records) else [records[place] for place in usable]
        wells, made = self._wells.resolve(chosen)
        rows = self._agreeing(map(_Row, usable, chosen, wells))
        treated = self._treat(rows, made)
        images, new = self._images(rows, made)
        first = self._insert(new)
        pairs = list(zip(images, rows, strict=True))
        again = [pair for pair in pairs if first.get(pair[0]) is not pair[1].record]
        changed, refused = self._complete(again)
        if refused:
            pairs = [pair for pair in pairs if pair[1].place not in refused]
        self._count(pairs, first, treated, changed)
        self.plates |= self._wells.plates_of(row.record for _, row in pairs)
        found: list[int | None] = [None] * len(records)
        for image, row in pairs:
            found[row.place] = image
        return found

    @property
    def treatments(self) -> set[int]:
        """The treatments that the file has given to wells."""
        return self._used | self._treatments.used

    def forget(self) -> None:
        """Ask the database again: what this writer wrote last was undone."""
        self._wells.forget()
        self._folders.forget()
        self._used |= self._treatments.used
        self._treatments = TreatmentWriter(self._session, self._run_id, self._file)

    def _storable(self, records: Sequence[ImageRecord]) -> Sequence[int]:
        """Return the places of records whose names a database can hold; refuse the others."""
        if _all_storable(records) and self._treatments_are_storable(records):
            return range(len(records))
        usable = []
        for place, record in enumerate(records):
            flaw = flaw_of(record.treatment) if record.treatment else None
            if flaw is not None:
                self._account.refuse(record.line, "a name that cannot be stored", flaw)
            elif _all_storable([record]):
                usable.append(place)
            else:
                detail = f"a name has more than {LONGEST} characters or a NUL in it"
                self._account.refuse(record.line, "a name that cannot be stored", detail)
        return usable

    @staticmethod
    def _treatments_are_storable(records: Sequence[ImageRecord]) -> bool:
        named = {record.treatment for record in records} - {None}
        return not any(flaw_of(treatment) for treatment in named if treatment is not None)

    def _agreeing(self, rows: Iterable[_Row]) -> list[_Row]:
        return [
            row
            for row in rows
            if row.record.treatment is None or self._agrees(row, row.record.treatment)
        ]

    def _agrees(self, row: _Row, treatment: TreatmentRecord) -> bool:
        earlier, line = self._said.setdefault(_well_key(row.record), (treatment, row.record.line))
        if earlier == treatment:
            return True
        well = format_well(row.record.row, row.record.column)
        self._account.refuse(
            row.record.line,
            "the well has another treatment",
            f"plate {row.record.plate}, well {well}: {treatment.pert_iname!r} here, "
            f"{earlier.pert_iname!r} on line {line}",
        )
        return False

    def _treat(self, rows: Sequence[_Row], made: set[int]) -> set[int]:
        """Say what the wells of ``rows`` got; return those where that is news to the store."""
        wanted: dict[int, tuple[TreatmentRecord, int | None]] = {
            row.well: self._said[_well_key(row.record)]
            for row in rows
            if row.record.treatment is not None
        }
        return self._treatments.assign(wanted, made) if wanted else set()

    def _images(
        self, rows: Sequence[_Row], made: set[int]
    ) -> tuple[list[int], dict[int, tuple[ImageKey, ImageRecord]]]:
        """Return the image of each row, and what the new ones are; wells just made have none."""
        known = self._known_images({row.well for row in rows} - made)
        keys = [row.key for row in rows]
        absent: dict[ImageKey, ImageRecord] = {}
        for key, row in zip(keys, rows, strict=True):
            if key not in known:
                absent.setdefault(key, row.record)
        ids = take_ids(self._session, Image, len(absent))
        if self._first_new is None and absent:
            self._first_new = ids[0]
        known.update(zip(absent, ids, strict=True))
        new = dict(zip(ids, absent.items(), strict=True))
        return [known[key] for key in keys], new

    def _known_images(self, wells: set[int]) -> dict[ImageKey, int]:
        found: dict[ImageKey, int] = {}
        columns = (Image.well_id, Image.site, Image.plane, Image.time_point, Image.id)
        for some in in_lists(wells):
            for row in self._session.execute(select(*columns).where(Image.well_id.in_(some))):
                found[row[0], row[1], row[2], row[3]] = row[4]
        return found

    def _insert(self, new: dict[int, tuple[ImageKey, ImageRecord]]) -> dict[int, ImageRecord]:
        """Insert images with their files; return the record that each was made of."""
        images = [
            (image, *key, record.core_name or _core_name(record))
            for image, (key, record) in new.items()
        ]
        folders = self._folders
        files = [
            (image, ref.channel, ref.number or order, ref.name, folders[ref.folder])
            for image, (_, record) in new.items()
            for order, ref in enumerate(_distinct(record.files), start=1)
        ]
        bulk_insert(self._session, Image, _IMAGE, images)
        bulk_insert(self._session, ImageFile, _FILE, files)
        return {image: record for image, (_, record) in new.items()}

    def _complete(self, again: Sequence[tuple[int, _Row]]) -> tuple[set[int], set[int]]:
        """Bring the files of images that were there up to what rows say.

        Returns the images that changed, and the places of rows that were refused.
        """
        present = self._present({image for image, _ in again})
        refused: set[int] = set()
        good: list[tuple[int, ImageRecord]] = []
        for image, row in again:
            if self._is_another_field(image, row.record, present.get(image, {})):
                refused.add(row.place)
            else:
                good.append((image, row.record))
        return self._complete_files(good, present), refused

    def _is_another_field(
        self, image: int, record: ImageRecord, files: Mapping[str, _Present]
    ) -> bool:
        """Refuse a record with other files than an earlier one of the same file for its image.

        Two planes or time points are then taken for one: better no row than one of the two.
        """
        if self._first_new is None or image < self._first_new:
            return False
        clash = [
            (ref.name, files[ref.channel].name)
            for ref in record.files
            if ref.channel in files and files[ref.channel].name != ref.name
        ]
        for name, other in clash[:1]:
            self._account.refuse(
                record.line,
                "the same field twice, with other files",
                f"{name} here, {other} before, both site {record.site}, plane {record.plane}, "
                f"time point {record.time_point} of well "
                f"{format_well(record.row, record.column)} on plate {record.plate}",
            )
        return bool(clash)

    def _complete_files(
        self,
        records: Sequence[tuple[int, ImageRecord]],
        present: dict[int, dict[str, _Present]],
    ) -> set[int]:
        changed: set[int] = set()
        new: list[tuple[Any, ...]] = []
        updates: list[dict[str, Any]] = []
        for image, record in records:
            files = present.setdefault(image, {})
            projection = files.get(PROJECTION_CHANNEL)
            if projection is not None and projection.sha256 is not None:
                continue  # it stands for the channels that the record names
            for order, ref in enumerate(_distinct(record.files), start=1):
                folder = self._folders[ref.folder]
                old = files.get(ref.channel)
                if old is None and self._is_under_another_name(record, ref, files):
                    continue
                if old is None:
                    files[ref.channel] = _Present(0, ref.name, folder, None, None)
                    new.append((image, ref.channel, ref.number or order, ref.name, folder))
                elif old.id and self._is_elsewhere(old, ref, folder):
                    updates.append(_moved(old, ref, folder))
                else:
                    continue
                changed.add(image)
        bulk_insert(self._session, ImageFile, _FILE, new)
        if updates:
            self._session.execute(update(ImageFile), updates)
        return changed

    def _is_under_another_name(
        self, record: ImageRecord, ref: FileRef, files: Mapping[str, _Present]
    ) -> bool:
        """Say that a file of an image is there as another channel; one file is one channel."""
        channel = next((name for name, old in files.items() if old.name == ref.name), None)
        if channel is None:
            return False
        self._account.suspicious(
            record.line,
            "one file under two channels",
            f"{ref.name} is channel {channel} in the store and {ref.channel} here; it stays "
            f"{channel}. Give the same names with --channels",
        )
        return True

    def _present(self, images: set[int]) -> dict[int, dict[str, _Present]]:
        found: dict[int, dict[str, _Present]] = {}
        columns = (ImageFile.id, ImageFile.name, ImageFile.folder_id, Folder.uri, ImageFile.sha256)
        query = select(ImageFile.image_id, ImageFile.channel, *columns)
        joined = query.outerjoin(Folder, Folder.id == ImageFile.folder_id)
        for some in in_lists(images):
            for row in self._session.execute(joined.where(ImageFile.image_id.in_(some))):
                found.setdefault(row[0], {})[row[1]] = _Present(*row[2:])
        return found

    def _is_elsewhere(self, old: _Present, ref: FileRef, folder: int | None) -> bool:
        """Whether a table knows a better place of a file than the store.

        A file that was seen stays where it was seen, unless it is at the new place, too.
        """
        if folder is None or (folder, ref.name) == (old.folder_id, old.name):
            return False
        if old.sha256 is None:
            return True
        said = self._folders.uri(ref.folder)
        return said is not None and not is_remote(said) and Path(join(said, ref.name)).is_file()

    def _count(
        self,
        pairs: Sequence[tuple[int, _Row]],
        first: dict[int, ImageRecord],
        treated: set[int],
        changed: set[int],
    ) -> None:
        unchanged = [
            image
            for image, row in pairs
            if first.get(image) is not row.record
            and image not in changed
            and (row.well not in treated or image in first)
        ]
        self.images.extend(image for image, _ in pairs)
        self.unchanged.extend(unchanged)
        self._account.created += len(first)
        self._account.updated += len(pairs) - len(first) - len(unchanged)
        self._account.unchanged += len(unchanged)


def _moved(old: _Present, ref: FileRef, folder: int | None) -> dict[str, Any]:
    # Without its time the file is read again before it is believed.
    return {"id": old.id, "name": ref.name, "folder_id": folder, "modified_ns": None}


def _well_key(record: ImageRecord) -> WellKey:
    return record.plate, record.row, record.column


def _core_name(record: ImageRecord) -> str:
    return f"r{record.row:02d}c{record.column:02d}f{record.site:02d}"


def _distinct(files: tuple[FileRef, ...]) -> Iterable[FileRef]:
    """Return the files by channel; of two of one channel the first."""
    channels = {ref.channel for ref in files}
    if len(channels) == len(files):
        return files
    return {ref.channel: ref for ref in reversed(files)}.values()


def _all_storable(records: Sequence[ImageRecord]) -> bool:
    texts = [ref.name for record in records for ref in record.files]
    texts += {ref.channel for record in records for ref in record.files}
    for record in records:
        texts += (record.plate, record.batch or "", record.core_name or "")
    return max(map(len, texts), default=0) <= LONGEST and "\0" not in "".join(texts)
