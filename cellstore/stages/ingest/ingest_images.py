"""Images: a table, an index or a folder of them becomes rows, then their files are looked at."""

from __future__ import annotations

import gc
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from ...config import IngestParams
from ...db.bulk import bulk_insert, in_lists, one_ingest_at_a_time, take_ids, wide_cache
from ...db.statements import insert_new
from ...enums import PROJECTION_CHANNEL, Look
from ...errors import ImageError, StorageError, UserInputError
from ...io.filenames import format_well
from ...io.folders import read_folder
from ...io.harmony import read_harmony
from ...io.image_files import ImageFolder, ImageInfo, probe
from ...io.layouts import Layout, read_images
from ...io.platemaps import Aliases, PlateAnnotation, flaw_of, read_annotation
from ...io.records import LONGEST, FileRef, ImageRecord, Refusal, TreatmentRecord
from ...io.tables import open_table
from ...io.uris import PathMap, exists, is_remote, join, shown, stat, writable
from ...jobs.queue import reopen
from ...jobs.workspace import Workspace
from ...models import Folder, Image, ImageFile, Job, Plate, Well
from .account import Account, UndoneError
from .ingest_treatments import TreatmentWriter, suspicious_spellings

WellKey = tuple[str, int, int]
"""Barcode, row, column."""

MANY_WELLS = 200_000
"""Wells whose ids are remembered; a file that goes on past them asks the database again."""

_WELL = ("id", "plate_id", "well_row", "well_column", "name")


class WellIndex:
    """The ids of wells by barcode, row and column."""

    def __init__(self, session: Session, account: Account) -> None:
        self._session = session
        self._account = account
        self._plates: dict[str, int] = {}
        self._wells: dict[WellKey, int] = {}

    def resolve(self, records: Sequence[ImageRecord]) -> tuple[list[int], set[int]]:
        """Return the well of each record, and those wells that were made for it."""
        if len(self._wells) > MANY_WELLS:
            self._wells.clear()
        known = self._wells
        keys = [(record.plate, record.row, record.column) for record in records]
        missing = {key for key in keys if key not in known}
        made: set[int] = set()
        if missing:
            batches = {record.plate: record.batch for record in records}
            self._resolve_plates({key[0]: batches[key[0]] for key in missing})
            self._load(missing)
            made = self._make([key for key in dict.fromkeys(keys) if key not in known])
        return [known[key] for key in keys], made

    def plates_of(self, records: Iterable[ImageRecord]) -> set[int]:
        """Return the plates of records that were resolved."""
        return {self._plates[barcode] for barcode in {record.plate for record in records}}

    def forget(self) -> None:
        """Ask the database again: what was made last was undone."""
        self._plates.clear()
        self._wells.clear()

    def _resolve_plates(self, batches: Mapping[str, str | None]) -> None:
        absent = [barcode for barcode in batches if barcode not in self._plates]
        for some in in_lists(absent):
            for plate in self._session.scalars(select(Plate).where(Plate.barcode.in_(some))):
                self._plates[plate.barcode] = plate.id
                self._complete_batch(plate, batches[plate.barcode])
        self._session.flush()
        new = [barcode for barcode in absent if barcode not in self._plates]
        ids = take_ids(self._session, Plate, len(new))
        rows = [(key, barcode, batches[barcode]) for key, barcode in zip(ids, new, strict=True)]
        bulk_insert(self._session, Plate, ("id", "barcode", "batch"), rows)
        self._plates.update(zip(new, ids, strict=True))

    def _complete_batch(self, plate: Plate, batch: str | None) -> None:
        plate.batch = plate.batch or batch
        if batch is not None and batch != plate.batch:
            detail = f"plate {plate.barcode} is of batch {plate.batch} in the store, {batch} here"
            self._account.problem(None, "another batch", detail)

    def _load(self, keys: Iterable[WellKey]) -> None:
        barcodes = {self._plates[key[0]]: key[0] for key in keys}
        for some in in_lists(barcodes):
            query = select(Well.plate_id, Well.well_row, Well.well_column, Well.id)
            for row in self._session.execute(query.where(Well.plate_id.in_(some))):
                self._wells[barcodes[row[0]], row[1], row[2]] = row[3]

    def _make(self, keys: Sequence[WellKey]) -> set[int]:
        ids = take_ids(self._session, Well, len(keys))
        rows = [
            (well, self._plates[barcode], row, column, format_well(row, column))
            for well, (barcode, row, column) in zip(ids, keys, strict=True)
        ]
        bulk_insert(self._session, Well, _WELL, rows)
        self._wells.update(zip(keys, ids, strict=True))
        return set(ids)


class FolderIndex(dict[str | None, int | None]):
    """The ids of folders by what a table calls them, made where new; ``maps`` says where they are.

    A dictionary, because it is asked for every file.
    """

    def __init__(self, session: Session, maps: PathMap) -> None:
        super().__init__({None: None})
        self._session = session
        self._maps = maps

    def __missing__(self, written: str | None) -> int | None:
        """Find or make a folder that was not asked for before."""
        assert written is not None
        self[written] = found = folder_id(self._session, self._maps.apply(written))
        return found

    def uri(self, written: str | None) -> str | None:
        """Return where a folder is here."""
        return None if written is None else self._maps.apply(written)

    def forget(self) -> None:
        """Ask the database again: what was made last was undone."""
        self.clear()
        self[None] = None


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
                changed |= _files_write(workspace, seen)
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


def _files_write(workspace: Workspace, found: Mapping[int, list[_Seen]]) -> set[int]:
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


BATCH = 10_000
"""Records that are written at a time."""

Records = Iterator[ImageRecord | Refusal]
T = TypeVar("T")


@dataclass(frozen=True)
class ImagesDone:
    """The plates of a source, how many wells and images they have, and how many files miss."""

    plates: tuple[int, ...]
    wells: int
    images: int
    missing: int


@dataclass(frozen=True)
class ImageSource:
    """Where records of images come from, and what is said about them elsewhere."""

    path: Path
    layout: Layout
    params: IngestParams
    annotation: PlateAnnotation | None
    aliases: Aliases | None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, layout: Layout, params: IngestParams) -> ImageSource:
        """Open what goes with the images of ``path``.

        Raises:
            BadTableError: a table of treatments cannot be read.
        """
        annotation = None
        if params.platemap is None and (params.compounds or params.barcodes):
            raise UserInputError(
                "--compounds and --barcodes go with a platemap: give --platemap, too, or ingest "
                "the table of treatments by itself."
            )
        if params.platemap is not None:
            annotation = read_annotation(params.platemap, params.compounds, params.barcodes)
        aliases = Aliases.read(params.aliases) if params.aliases is not None else None
        return cls(path, layout, params, annotation, aliases)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read beside the source."""
        said = self.annotation.files if self.annotation else ()
        return (*said, *([self.params.aliases] if self.params.aliases else []))

    def records(self) -> Records:
        """Yield the records with their treatments, and what cannot be used."""
        rows = self._read()
        if self.annotation is not None:
            rows = _annotated(rows, self.annotation)
        return rows if self.aliases is None else _renamed(rows, self.aliases)

    def _read(self) -> Records:
        params, channels = self.params, dict(self.params.channels)
        if self.layout is Layout.HARMONY:
            return read_harmony(self.path, params.plate, channels=channels)
        if self.path.is_dir():
            return self._read_folder()
        table = open_table(self.path)
        self.notes.extend(table.notes)
        return read_images(table, self.layout, params.plate, channels=channels)

    def _read_folder(self) -> Records:
        params = self.params
        reader = read_folder(
            self.path,
            self.layout.value,
            pattern=params.pattern,
            plate=params.plate,
            channels=dict(params.channels),
        )
        yield from reader
        self.notes.extend(reader.notes)  # complete only now


def ingest_images(
    workspace: Workspace, run_id: int, source: ImageSource, account: Account, total: int
) -> ImagesDone:
    """Bring the records of a source in, as one transaction, then look at their files.

    ``total``: about how many records there are.

    Raises:
        BadTableError: the source turned out unreadable; nothing of it is written.
        UndoneError: rows were refused and all or nothing was asked for; nothing is written.
    """
    workspace.progress.start("ingest", total)
    try:
        with workspace.database.begin() as session, _no_collector():
            writer = _write(workspace, session, run_id, source, account)
            plates = tuple(sorted(writer.plates))
    finally:
        workspace.progress.finish()
    images = np.unique(np.frombuffer(writer.images, dtype=np.int64))
    changed = look_again(workspace, images, source.params, account)
    found = np.isin(np.frombuffer(writer.unchanged, dtype=np.int64), list(changed)).sum()
    account.unchanged -= int(found)
    account.updated += int(found)
    return summary(workspace, plates)


def look_again(
    workspace: Workspace, images: NDArray[np.int64], params: IngestParams, account: Account
) -> frozenset[int]:
    """Look at the files of ``images``; return the images that gained or changed one."""
    with workspace.database.read() as session:
        finder = Finder.of(session, params.images, params.look)
    if finder.is_idle or not len(images):
        return frozenset()
    return look_at_files(workspace, images, finder, account)


def images_of_plates(session: Session, plates: Sequence[int]) -> NDArray[np.int64]:
    """Return the ids of all images of ``plates`` (ids), ascending."""
    found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for some in in_lists(plates):
        query = select(Image.id).join(Well, Well.id == Image.well_id)
        ids = session.scalars(query.where(Well.plate_id.in_(some)))
        found.append(np.fromiter(ids, dtype=np.int64))
    return np.sort(np.concatenate(found))


def summary(workspace: Workspace, plates: Sequence[int]) -> ImagesDone:
    """Count what ``plates`` (ids) have."""
    wells = images = seen = 0
    with workspace.database.read() as session:
        for some in in_lists(plates):
            query = select(
                func.count(Well.id.distinct()),
                func.count(Image.id),
                func.count(Image.content_sha256),
            ).outerjoin(Image, Image.well_id == Well.id)
            row = session.execute(query.where(Well.plate_id.in_(some))).one()
            wells, images, seen = wells + row[0], images + row[1], seen + row[2]
    return ImagesDone(tuple(plates), wells, images, images - seen)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Do without the search for cycles: rows have none, and it would walk all of them, again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _write(
    workspace: Workspace, session: Session, run_id: int, source: ImageSource, account: Account
) -> RowWriter:
    one_ingest_at_a_time(session)
    with wide_cache(session):
        return _write_all(workspace, session, run_id, source, account)


def _write_all(
    workspace: Workspace, session: Session, run_id: int, source: ImageSource, account: Account
) -> RowWriter:
    maps = PathMap(source.params.maps)
    writer = RowWriter(session, run_id, account.file, account, maps)
    for batch in _batches(source.records(), BATCH):
        _take(session, writer, batch, account)
        workspace.progress.advance(len(batch))
    for issue in source.annotation.issues if source.annotation else ():
        refusal = issue.refusal
        account.problem(refusal.line, refusal.reason, refusal.detail, writable(issue.path.name))
    for spelling in suspicious_spellings(session, writer.treatments):
        account.suspicious(None, spelling.reason, spelling.detail)
    account.notes += source.notes
    account.notes += source.annotation.notes if source.annotation else ()
    account.flush(session)
    if source.params.strict and account.refused:
        raise UndoneError.of(account)
    return writer


def _take(
    session: Session,
    writer: RowWriter,
    batch: Sequence[ImageRecord | Refusal],
    account: Account,
) -> None:
    account.rows += len(batch)
    records: list[ImageRecord] = []
    for row in batch:
        if isinstance(row, Refusal):
            account.refuse(row.line, row.reason, row.detail)
        else:
            records.append(row)
    if not _written(session, writer, records, account):
        for record in records:
            if not _written(session, writer, [record], account):
                account.refuse(record.line, "the database refuses it", f"plate {record.plate}")
    account.flush(session)


def _written(
    session: Session, writer: RowWriter, records: Sequence[ImageRecord], account: Account
) -> bool:
    """Write records behind a savepoint; False where the database refuses and all is as before."""
    before = account.mark()
    try:
        with session.begin_nested():
            writer.write(records)
    except (DataError, IntegrityError):
        account.return_to(before)
        writer.forget()
        return False
    return True


def _annotated(rows: Iterable[ImageRecord | Refusal], annotation: PlateAnnotation) -> Records:
    for row in rows:
        if isinstance(row, Refusal):
            yield row
        elif not annotation.knows(row.plate):
            yield Refusal(row.line, "no plate map", f"no map is named for plate {row.plate}")
        else:
            found = annotation.for_well(row.plate, row.row, row.column)
            yield row._replace(treatment=found or row.treatment)


def _renamed(rows: Iterable[ImageRecord | Refusal], aliases: Aliases) -> Records:
    for row in rows:
        if isinstance(row, Refusal) or row.treatment is None:
            yield row
        else:
            yield row._replace(treatment=aliases.apply(row.treatment))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
