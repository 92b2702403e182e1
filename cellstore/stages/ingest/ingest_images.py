"""Images: a table, an index or a folder of them becomes rows, then their files are looked at.

:class:`ImageSource` yields a record per field of view, :class:`RowWriter` makes rows of them, and
:func:`look_at_files` finds and hashes the files that the rows name.
"""

from __future__ import annotations

import gc
import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from ...config import IngestParams
from ...db.bulk import (
    in_lists,
    insert_new,
    insert_numbered,
    one_ingest_at_a_time,
    rows_in,
    wide_cache,
)
from ...db.events import Change, is_new, record_events
from ...enums import PROJECTION_CHANNEL, Look
from ...errors import ImageError, StorageError, UserInputError, some_of
from ...io.filenames import format_well
from ...io.folders import read_folder
from ...io.harmony import read_harmony
from ...io.image_files import SUFFIXES, ImageFolder, ImageInfo, probe
from ...io.image_tables import ImageRecord, read_image_table
from ...io.layouts import Layout
from ...io.platemaps import PlateAnnotation, Position, notes_on_wells, read_annotation
from ...io.tables import LONGEST, Refusal, open_table
from ...io.treatments import TreatmentRecord, read_aliases, without_aliases
from ...io.uris import FileStat, exists, is_remote, join, map_folder, shown, stat, writable
from ...jobs.gone_files import gone_folder, gone_sentence
from ...jobs.lookup import renamed_channels, renamed_plates
from ...jobs.queue import requeue
from ...jobs.workspace import Workspace
from ...models import Folder, Image, ImageFile, Job, Plate, Well
from .account import Account
from .write_treatments import TreatmentWriter

BATCH = 10_000
"""Records that are written at a time."""

LOOKED_AT = 200
"""Images whose files are looked at between two transactions."""

READERS = 4
"""Files that are hashed at the same time; reading and hashing leave Python's lock alone."""

GONE = "files are gone"
"""What is wrong with files that were seen before."""

_LONGEST_FOLDER = 2_000
"""What the index of a database can hold."""

PLATE_COLUMNS = {
    name: column
    for column, names in {
        "cell_line": ("cell_line", "Cell_Line", "CellLine", "cell_line_name"),
        "time_point": ("time_point", "Time_Point"),
        "batch": ("batch",),
    }.items()
    for name in names
}
"""Metadata columns that are columns of ``plates``."""

WELL = ("plate_id", "well_row", "well_column", "name")
_IMAGE = ("well_id", "site", "plane", "time_point", "core_name", "pixel_size")
_FILE = ("image_id", "channel", "position", "name", "folder_id")

WellKey = tuple[str, int, int]
"""Barcode, row, column."""

ImageKey = tuple[int, int, int, int]
"""Well, site, plane, time point."""


def read_maps(platemap: Path, params: IngestParams) -> PlateAnnotation:
    """Read a plate map, or a folder of them, with the tables and options that go with it."""
    return read_annotation(
        platemap,
        params.compounds,
        params.barcodes,
        sheet=params.sheet,
        columns=params.map_columns,
        blank=params.blank,
        controls=params.controls,
    )


class ImageSource:
    """Where records of images come from, and what is said about them elsewhere.

    ``files`` are read beside the source. ``notes`` is what a user should know of it, complete when
    all records were read.
    """

    def __init__(self, path: Path, layout: Layout, params: IngestParams) -> None:
        self.path, self.layout, self.params = path, layout, params
        self.annotation = None
        self.files: list[Path] = []
        self.notes: list[str] = []
        if params.platemap is not None:
            self.annotation = read_maps(params.platemap, params)
            self.files += self.annotation.files
            self.notes += self.annotation.notes
        elif params.compounds or params.barcodes:
            raise UserInputError(
                "--compounds and --barcodes go with a plate map: give --platemap, too, or ingest "
                "the table of treatments by itself."
            )
        self._aliases: Mapping[str, str] = {}
        if params.aliases is not None:
            self._aliases = read_aliases(params.aliases)
            self.files.append(params.aliases)

    def records(self) -> Iterator[ImageRecord | Refusal]:
        """Yield the records with their treatments, and what cannot be used, one by one."""
        plate, channels = next(iter(self.params.plate), None), dict(self.params.channels)
        rows: Iterator[ImageRecord | Refusal]
        if self.layout is Layout.HARMONY:
            rows = read_harmony(self.path, plate, channels)
        elif self.path.is_dir():
            rows = read_folder(
                self.path,
                pattern=self.params.pattern,
                plate=plate,
                channels=channels,
                notes=self.notes,
            )
        elif self.layout in (Layout.LOADDATA, Layout.PUBLISHED):
            table = open_table(self.path)
            self.notes += table.notes
            rows = read_image_table(table, plate, channels)
        else:
            raise UserInputError(
                f"{self.path.name} is a file, and --pattern is for a folder of images. Remove it."
            )
        if not (self.annotation or self._aliases or self.params.pixel_size):
            yield from rows  # as they are: a table may have millions
            return
        imaged: dict[str, dict[Position, bool]] = {}
        for row in rows:
            if isinstance(row, Refusal):
                yield row
                continue
            treatment, metadata = row.treatment, row.metadata
            if self.annotation is not None:
                plate_map = self.annotation.map_of(row.plate)
                if plate_map is None:
                    detail = f"the barcodes name no plate map for plate {row.plate}"
                    yield Refusal(row.line, "no plate map", detail)
                    continue
                well = row.row, row.column
                on_map = plate_map.wells.get(well)
                treatment = (on_map and on_map.record) or treatment
                # A well of which the map says nothing is one that does not share it.
                metadata = {**(metadata or {}), **(on_map.metadata if on_map else {})}
                imaged.setdefault(plate_map.name, {})[well] = treatment is not None
            if treatment is not None:
                treatment = without_aliases(treatment, self._aliases)
            size = self.params.pixel_size or row.pixel_size
            yield row._replace(treatment=treatment, pixel_size=size, metadata=metadata)
        for plate_map in self.annotation.maps.values() if self.annotation else ():
            if plate_map.name in imaged:
                self.notes += notes_on_wells(plate_map, imaged[plate_map.name])


def ingest_images(
    workspace: Workspace, session: Session, source: ImageSource, account: Account, total: int
) -> None:
    """Bring the records of a source in, in the open transaction of ``session``.

    ``total``: about how many records there are. ``account`` gets their plates and images.
    """
    workspace.progress.start("ingest", total)
    # Rows have no cycles, and the collector would walk all of them, again and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        with wide_cache(session):
            writer = RowWriter(session, account, source.params.maps)
            rows = source.records()
            while batch := list(islice(rows, BATCH)):
                writer.write(account.take(batch))
                account.flush(session)
                workspace.progress.advance(len(batch))
            # What is known only when all records were read.
            for path, refusal in source.annotation.issues if source.annotation else ():
                account.problem(*refusal, file=writable(path.name))
            writer.finish()
            account.notes += source.notes
            account.flush(session)
    finally:
        if collects:
            gc.enable()
        workspace.progress.finish()
    account.plates = sorted(writer.plates)


class RowWriter:
    """Writes the records of the file of ``account`` in the open transaction of ``session``.

    ``maps`` rewrites the beginnings of the folders that the records name. ``plates`` are those of
    all records that were used.
    """

    def __init__(
        self, session: Session, account: Account, maps: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.session, self.account, self._maps = session, account, maps
        self._treatments = TreatmentWriter(session, account)
        self._plate_ids: dict[str, int] = {}
        self._channels: dict[str, Mapping[str, str]] = {}
        """What channels are called now, by plate and earlier name; both as records name them."""
        self._well_ids: dict[WellKey, int] = {}
        self._folder_ids: dict[str | None, int | None] = {None: None}
        self._treatment_of: dict[WellKey, tuple[TreatmentRecord, int]] = {}
        self._metadata: dict[int, Mapping[str, str]] = {}
        self._differing: set[str] = set()
        """Metadata columns that differ between images of one well."""
        self._first_new: int | None = None
        self.plates: set[int] = set()

    def write(self, records: Sequence[ImageRecord]) -> list[int | None]:
        """Bring records in; return the image of each, None where the record was refused.

        A record is refused that says something else of its well than an earlier one of the file.
        """
        given = usable = self._usable(records)
        wells, new_wells = self._find_wells(usable)
        if self._channels:
            usable = [
                rename_channels(record, self._channels.get(record.plate, {}), self.account.notes)
                for record in usable
            ]
        wanted: dict[int, tuple[TreatmentRecord, int | None]] = {
            well: self._treatment_of[record.plate, record.row, record.column]
            for record, well in zip(usable, wells, strict=True)
            if record.treatment is not None
        }
        treated = self._treatments.assign(wanted, new_wells) if wanted else set()
        for folder in {ref.folder for record in usable for ref in record.files}:
            if folder is not None and folder not in self._folder_ids:
                uri = map_folder(folder, self._maps)
                self._folder_ids[folder] = folder_id(self.session, uri)

        query = select(Image.well_id, Image.site, Image.plane, Image.time_point, Image.id)
        rows_of = rows_in(self.session, query, Image.well_id, set(wells) - new_wells)
        known: dict[ImageKey, int] = {tuple(key): image for *key, image in rows_of}
        keys = [
            (well, record.site, record.plane, record.time_point)
            for record, well in zip(usable, wells, strict=True)
        ]
        new: dict[ImageKey, ImageRecord] = {}
        for key, record in zip(keys, usable, strict=True):
            if key not in known:
                new.setdefault(key, record)
        rows: list[tuple[Any, ...]] = []
        for key, record in new.items():
            core_name = f"r{record.row:02d}c{record.column:02d}f{record.site:02d}"
            rows.append((*key, record.core_name or core_name, record.pixel_size))
        ids = insert_numbered(self.session, Image, _IMAGE, rows)
        if self._first_new is None and new:
            self._first_new = ids[0]
        known.update(zip(new, ids, strict=True))
        made_of = dict(zip(ids, new.values(), strict=True))
        folders = self._folder_ids
        files = [
            (image, ref.channel, ref.number or order, ref.name, folders[ref.folder])
            for image, record in made_of.items()
            for order, ref in enumerate(record.files, start=1)
        ]
        insert_numbered(self.session, ImageFile, _FILE, files)
        images = [known[key] for key in keys]
        earlier = [
            (image, record)
            for image, record in zip(images, usable, strict=True)
            if made_of.get(image) is not record
        ]
        changed, refused = self._complete(earlier) if earlier else (set(), set())
        self.account.created += len(made_of)
        for image, record, well in zip(images, usable, wells, strict=True):
            if made_of.get(image) is record or id(record) in refused:
                continue
            if image in changed or (well in treated and image not in made_of):
                self.account.updated += 1
            else:
                self.account.unchanged += 1
                self.account.unchanged_images.append(image)
        for record, well in zip(usable, wells, strict=True):
            found = record.metadata
            if found is None:
                continue
            before = self._metadata.setdefault(well, found)
            # By object first: readers hand the same columns out again and again.
            if before is not found and before != found:
                self._metadata[well] = both = {**found, **before}
                self._differing |= {key for key, text in found.items() if both[key] != text}
        self.plates |= {self._plate_ids[barcode] for barcode in {r.plate for r in usable}}
        self.account.images.extend(images)
        of_record = {
            id(record): None if id(used) in refused else image
            for record, used, image in zip(given, usable, images, strict=True)
        }
        return [of_record.get(id(record)) for record in records]

    def finish(self) -> None:
        """Keep the metadata of the records, and report what looks wrong with their treatments."""
        if self._metadata:
            self._write_metadata()
        self._treatments.report()

    def _usable(self, records: Sequence[ImageRecord]) -> Sequence[ImageRecord]:
        """Refuse records that cannot be stored or contradict the file; return the others.

        A record contradicts the file that gives a well another treatment than an earlier one.
        """
        refused: set[int] = set()
        texts = {ref.name for record in records for ref in record.files}
        texts |= {ref.channel for record in records for ref in record.files}
        folders = {ref.folder or "" for record in records for ref in record.files}
        for record in records:
            texts.update((record.plate, record.batch or "", record.core_name or ""))
        wrong = {text for text in texts if len(text) > LONGEST or "\0" in text}
        wrong |= {text for text in folders if len(text) > _LONGEST_FOLDER or "\0" in text}
        for record in records if wrong else ():
            own = {text for ref in record.files for text in (ref.name, ref.channel, ref.folder)}
            own.update((record.plate, record.batch, record.core_name))
            if found := next((text for text in own if text in wrong), None):
                refused.add(id(record))
                detail = f"{found[:40]!r}... has {len(found):,} characters, or a NUL in it"
                self.account.refuse(record.line, "a name that cannot be stored", detail)
        for record in records:
            treatment = record.treatment
            if id(record) in refused:
                continue
            if record.problem is not None:
                self.account.problem(record.line, *record.problem)
            if treatment is None:
                continue
            key = (record.plate, record.row, record.column)
            earlier, line = self._treatment_of.setdefault(key, (treatment, record.line))
            # By object first: readers hand the same treatment out again and again.
            if earlier is not treatment and earlier != treatment:
                refused.add(id(record))
                self.account.refuse(
                    record.line,
                    "the well has another treatment",
                    f"plate {record.plate}, well {format_well(record.row, record.column)}: "
                    f"{treatment.label!r} here, {earlier.label!r} on line {line}",
                )
        return [record for record in records if id(record) not in refused] if refused else records

    def _find_wells(self, records: Sequence[ImageRecord]) -> tuple[list[int], set[int]]:
        """Return the well of each record, and those wells that were made for it."""
        known = self._well_ids
        keys = [(record.plate, record.row, record.column) for record in records]
        missing = {key for key in keys if key not in known}
        if not missing:
            return [known[key] for key in keys], set()

        batches = {record.plate: record.batch for record in records}
        absent = {barcode for barcode, _, _ in missing if barcode not in self._plate_ids}
        for (plate,) in rows_in(self.session, select(Plate), Plate.barcode, absent):
            self._plate_ids[plate.barcode] = plate.id
            batch = batches[plate.barcode]
            plate.batch = plate.batch or batch
            if batch is not None and batch != plate.batch:
                detail = f"plate {plate.barcode}: {plate.batch} in the store, {batch} here; kept"
                self.account.problem(None, "another batch", detail)
        self.session.flush()
        barcodes = [b for b in batches if b in absent and b not in self._plate_ids]
        for old, (plate_id, now) in renamed_plates(self.session, barcodes).items():
            self._plate_ids[old] = plate_id
            self.account.notes.append(f"plate {old} was renamed: read as {now}")
        if here := {b: self._plate_ids[b] for b in absent if b in self._plate_ids}:
            names = renamed_channels(self.session, set(here.values()))
            self._channels |= {b: names[plate] for b, plate in here.items() if plate in names}
        barcodes = [b for b in barcodes if b not in self._plate_ids]
        plates = [(barcode, batches[barcode]) for barcode in barcodes]
        ids = insert_numbered(self.session, Plate, ("barcode", "batch"), plates)
        self._plate_ids.update(zip(barcodes, ids, strict=True))

        barcode_of = {self._plate_ids[barcode]: barcode for barcode, _, _ in missing}
        query = select(Well.plate_id, Well.well_row, Well.well_column, Well.id)
        for plate_id, row, column, well in rows_in(self.session, query, Well.plate_id, barcode_of):
            known[barcode_of[plate_id], row, column] = well
        new = [key for key in dict.fromkeys(keys) if key not in known]
        wells = [
            (self._plate_ids[barcode], row, column, format_well(row, column))
            for barcode, row, column in new
        ]
        ids = insert_numbered(self.session, Well, WELL, wells)
        known.update(zip(new, ids, strict=True))
        return [known[key] for key in keys], set(ids)

    def _complete(self, known: Sequence[tuple[int, ImageRecord]]) -> tuple[set[int], set[int]]:
        """Bring the files and pixel sizes of images that were there up to what records say.

        Returns the images that changed, and the ``id()`` of records that were refused.
        """
        present = known_files(self.session, {image for image, _ in known})
        changed: set[int] = set()
        refused: set[int] = set()
        sizes: dict[int, float] = {}
        new: list[tuple[Any, ...]] = []
        moved: list[dict[str, Any]] = []
        for image, record in known:
            files = present[image]
            if self._first_new is not None and image >= self._first_new:
                # Of this very source, too: two planes or time points are taken for one, and no row
                # is better than one of the two.
                others = [
                    (ref.name, old.name)
                    if ref.name != old.name
                    else (f"{ref.folder}/{ref.name}", f"{old.folder}/{old.name}")
                    for ref in record.files
                    if (old := files.get(ref.channel))
                    and (old.name, old.folder_id) != (ref.name, self._folder_ids[ref.folder])
                ]
                if others:
                    refused.add(id(record))
                    here, before = others[0]
                    self.account.refuse(
                        record.line,
                        "the same field twice, with other files",
                        f"{here} here, {before} before, both site {record.site}, plane "
                        f"{record.plane}, time point {record.time_point} of well "
                        f"{format_well(record.row, record.column)} on plate {record.plate}",
                    )
                    continue
            if record.pixel_size is not None:
                sizes[image] = record.pixel_size
            projection = files.get(PROJECTION_CHANNEL)
            if projection is not None and projection.sha256 is not None:
                continue  # it stands for the channels that the record names
            for order, ref in enumerate(record.files, start=1):
                folder = self._folder_ids[ref.folder]
                old = files.get(ref.channel)
                if old is None:
                    same = next((key for key, file in files.items() if file.name == ref.name), None)
                    if same is not None:  # one file is one channel
                        self.account.suspicious(
                            record.line,
                            "one file under two channels",
                            f"{ref.name}: {ref.channel} here. Stored as {same}. To use one name "
                            f"for both: --channels {ref.channel}={same}",
                        )
                        continue
                    files[ref.channel] = KnownFile(None, ref.channel, ref.name, folder)
                    new.append((image, ref.channel, ref.number or order, ref.name, folder))
                    changed.add(image)
                    continue
                if old.id is None or folder is None:
                    continue
                if (folder, ref.name) == (old.folder_id, old.name):
                    continue
                # A file that was seen stays where it was seen, unless it is in the new folder, too.
                uri = join(map_folder(ref.folder or "", self._maps), ref.name)
                if old.sha256 is None or (not is_remote(uri) and exists(uri)):
                    # Without its time the file is read again before it is believed.
                    values = {"name": ref.name, "folder_id": folder, "modified_ns": None}
                    if old.sha256 is not None and folder != old.folder_id:
                        self.account.moved[old.folder or "", uri.rpartition("/")[0]] += 1
                    moved.append({"id": old.id, **values})
                    changed.add(image)
        insert_numbered(self.session, ImageFile, _FILE, new)
        if moved:
            self.session.execute(update(ImageFile), moved)
        resized: list[dict[str, Any]] = []
        same_change: dict[tuple[float | None, float], list[int]] = {}
        query = select(Image.id, Image.pixel_size).order_by(Image.id)
        for image, size in rows_in(self.session, query, Image.id, sizes):
            if size != sizes[image]:
                resized.append({"id": image, "pixel_size": sizes[image]})
                if not is_new(self.session, "images", image):
                    same_change.setdefault((size, sizes[image]), []).append(image)
        if resized:
            self.session.execute(update(Image), resized)
        changes = [
            Change("images", None, {"pixel_size": old, "ids": ids}, {"pixel_size": new})
            for (old, new), ids in same_change.items()
        ]
        record_events(self.session, changes, run_id=self.account.run_id)
        return changed | {row["id"] for row in resized}, refused

    def _write_metadata(self) -> None:
        """Keep the metadata columns of the records: with the plate what its wells share.

        A plate keeps the value that it has; what wells say otherwise is kept with them. What
        differs between the images of one well cannot be kept, and a note says so.
        """
        plates: dict[int, list[int]] = defaultdict(list)
        query = select(Well.plate_id, Well.id)
        for plate_id, well in rows_in(self.session, query, Well.id, self._metadata):
            plates[plate_id].append(well)
        of_wells: dict[int, dict[str, str]] = {}
        common: dict[int, dict[str, Any]] = {}
        for (plate,) in rows_in(self.session, select(Plate), Plate.id, plates):
            wells = {well: self._metadata[well] for well in plates[plate.id]}
            common[plate.id] = complete_plate(
                plate, list(wells.values()), self._differing, self.account
            )
            for well, found in wells.items():
                if kept := {key: found[key] for key in found.keys() - self._differing}:
                    of_wells[well] = kept
        self.session.flush()
        keep_well_metadata(self.session, of_wells, common, self.account.run_id)
        if self._differing:
            self.account.notes.append(
                "metadata not kept, because the images of one well have different values: "
                f"{some_of(sorted(self._differing))}"
            )


def rename_channels(record: ImageRecord, now: Mapping[str, str], notes: list[str]) -> ImageRecord:
    """Return a record with the names that channels have ``now``; what was renamed is noted."""
    names = [now.get(ref.channel, ref.channel) for ref in record.files]
    written = [ref.channel for ref in record.files]
    # With an earlier and the present name of one channel, the names mean something else.
    if names == written or len(set(names)) < len(names):
        return record
    for old, name in zip(written, names, strict=True):
        note = f"channel {old} was renamed: read as {name}"
        if old != name and note not in notes:
            notes.append(note)
    pairs = zip(record.files, names, strict=True)
    return record._replace(files=tuple(ref._replace(channel=name) for ref, name in pairs))


def complete_plate(
    plate: Plate, wells: Sequence[Mapping[str, str]], differing: set[str], account: Account
) -> dict[str, Any]:
    """Give a plate the metadata that its wells share and it lacks; return what holds for it now.

    A cell line, time or batch is shared when all wells that have one have the same: a map leaves
    it open where nothing was done. All else must be said of every well; what is ``differing``
    never is shared.
    """
    columns = {key: getattr(plate, column) for key, column in PLATE_COLUMNS.items()}
    common = {**(plate.metadata_ or {}), **columns}
    new: dict[str, str] = {}
    for key in sorted({key for found in wells for key in found} - differing):
        texts = [text for found in wells if (text := found.get(key)) is not None]
        # Of one well alone nothing tells that the others are like it.
        if len(set(texts)) != 1 or len(wells) == 1:
            continue
        text = texts[0]
        if key not in PLATE_COLUMNS:
            if len(texts) == len(wells) and not common.get(key):
                common[key] = new[key] = text
        elif not common[key] and len(text) <= LONGEST:
            common[key] = text
            setattr(plate, PLATE_COLUMNS[key], text)
        elif common[key] not in (None, text):
            difference = f"plate {plate.barcode}: {key} is {common[key]} in the store, {text} here"
            account.suspicious(None, "the plate says otherwise", f"{difference}; kept with wells")
    if new:
        plate.metadata_ = {**(plate.metadata_ or {}), **new}
    return common


def keep_well_metadata(
    session: Session,
    metadata: Mapping[int, Mapping[str, str]],
    common: Mapping[int, Mapping[str, Any]],
    run_id: int,
) -> set[int]:
    """Add what a table says of wells (ids) beyond our columns.

    What holds for the whole plate (``common``, by its id) is not said again of a well, unless
    the well has a value of its own.

    Returns the wells of which it is news.
    """
    changed: set[int] = set()
    for some in in_lists(metadata):
        rows = []
        changes = []
        query = select(Well.id, Well.plate_id, Well.metadata_).where(Well.id.in_(some))
        for well, plate, before in session.execute(query).all():
            after = dict(before or {})
            of_plate = common[plate]
            for key, text in metadata[well].items():
                if key in after or of_plate.get(key) != text:
                    after[key] = text
            if after != (before or {}):
                rows.append({"id": well, "metadata_": after})
                if not is_new(session, "wells", well):
                    old, new = {"metadata": before}, {"metadata": after}
                    changes.append(Change("wells", well, old, new))
                changed.add(well)
        if rows:
            session.execute(update(Well), rows)
        record_events(session, changes, run_id=run_id)
    return changed


# ---- Files ----


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
    for row in rows_in(session, query, ImageFile.image_id, ids):
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


SeenFile = tuple[KnownFile, str, ImageInfo]
"""A file that was looked at, and that is new or has changed; where it is; and what it is now."""


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
    here: set[str] = set()
    gone: dict[str, list[str]] = {}
    with workspace.database.read() as session:
        any_seen = session.scalar(
            select(ImageFile.id).where(ImageFile.sha256.is_not(None)).limit(1)
        )
        for uri in session.scalars(select(Folder.uri)):
            try:
                if not is_remote(uri) and Path(uri).is_absolute() and Path(uri).is_dir():
                    here.add(uri)
            except (OSError, ValueError):  # too long for a path, or with a NUL in it
                continue
    can_find = folder is not None or here or any_seen or look is Look.EVERYWHERE
    if look is Look.NOWHERE or not can_find or not len(images):
        return frozenset()
    find = partial(_look, None if folder is None else ImageFolder(folder), look, here)
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
                looks = pool.map(find, core_names, plates, files.values())
                seen: dict[int, list[SeenFile]] = {}
                for image, (news, problems) in zip(ids, list(looks), strict=True):
                    if news:
                        seen[image] = news
                    for known, uri, info in news:
                        old, new = known.folder, uri.rpartition("/")[0]
                        if known.sha256 is not None and old is not None and old != new:
                            account.moved[old, new] += 1
                        for remark in info.remarks:
                            account.suspicious(None, remark, uri)
                    for reason, detail in problems:
                        if reason == GONE:
                            where, _, name = detail.rpartition("/")
                            gone.setdefault(gone_folder(where), []).append(name)
                        else:
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
    for where, names in gone.items():
        account.problem(None, GONE, gone_sentence(where, len(names), names[0]))
    with workspace.database.begin() as session:
        account.flush(session)
    return frozenset(changed)


def _look(
    folder: ImageFolder | None,
    where: Look,
    here: Collection[str],
    core_name: str,
    plate: str,
    files: Mapping[str, KnownFile],
) -> tuple[list[SeenFile], list[tuple[str, str]]]:
    """Find the files of an image: by name in ``folder``, else where the store knows them to be.

    ``here`` are the folders of the store that are on this machine. Returns the files that are new
    or have changed; and errors: reason, detail. Of a file that is ``GONE``, the detail is its URI.
    """
    seen: list[SeenFile] = []
    problems: list[tuple[str, str]] = []
    projection = files.get(PROJECTION_CHANNEL) or KnownFile(None, PROJECTION_CHANNEL, "")
    for number, file in enumerate((projection, *files.values())):
        known = None if file.folder is None else join(file.folder, file.name)
        path = None
        if folder is not None:
            try:
                names = (
                    [core_name + end for end in sorted(SUFFIXES)] if number == 0 else [file.name]
                )
                path = next(filter(None, (folder.find(name, plate) for name in names)), None)
            except ImageError as error:
                problems.append(("file name is not unique", str(error)))
        uri = None
        if path is not None:
            uri = str(path)
        elif known is not None and is_remote(known):
            uri = known if where is Look.EVERYWHERE else None
        elif known is not None and file.folder in here:
            uri = known if file.sha256 is not None or exists(known) else None
        elif known is not None and file.sha256 is not None:
            problems.append((GONE, known))
        if uri is not None:
            try:
                # The same size and time spare the hashing.
                same = uri == known and file.sha256 is not None and not is_remote(uri)
                if not same or stat(uri) != FileStat(file.size_bytes or 0, file.modified_ns):
                    info = probe(uri)
                    content = file.sha256, file.modified_ns
                    if uri != known or (info.sha256, info.mtime_ns) != content:
                        seen.append((file, uri, info))
            except (ImageError, StorageError, UserInputError, OSError) as error:
                if uri == known and not is_remote(uri) and not exists(uri):
                    problems.append((GONE, uri))
                else:
                    problems.append(("image cannot be read", str(error)))
        # A file named by the core file name is a projection and stands for all channels.
        if number == 0 and (uri is not None or file.sha256 is not None):
            break
    return seen, problems


def _write_seen(session: Session, seen: Mapping[int, Sequence[SeenFile]]) -> None:
    """Write what files are now, by image; what was derived from other bytes is stale from now."""
    one_ingest_at_a_time(session)
    folders: dict[str, int] = {}
    updates: list[dict[str, Any]] = []
    sizes: dict[int, float] = {}
    for image, files in seen.items():
        for known, uri, info in files:
            folder, _, name = uri.rpartition("/")
            if folder not in folders:
                folders[folder] = folder_id(session, folder)
            values = {
                "folder_id": folders[folder],
                "name": name,
                "sha256": info.sha256,
                "size_bytes": info.size_bytes,
                "modified_ns": info.mtime_ns,
                "height": info.height,
                "width": info.width,
                "dtype": info.dtype,
            }
            if info.pixel_size is not None:
                sizes[image] = info.pixel_size
            if known.id is not None:
                updates.append({"id": known.id, **values})
                continue
            # A projection stands for the channels that were expected and never seen.
            unseen = (ImageFile.image_id == image, ImageFile.sha256.is_(None))
            session.execute(delete(ImageFile).where(*unseen))
            row = {"image_id": image, "channel": PROJECTION_CHANNEL, "position": 0, **values}
            insert_new(session, ImageFile, [row])
    if updates:
        session.execute(update(ImageFile), updates)
    # A file that is only elsewhere, or has another time, leaves the content as it is.
    other = [
        image
        for image, files in seen.items()
        if any(known.sha256 != info.sha256 for known, _, info in files)
    ]
    write_contents(session, other)
    # What a table or a person has said of the size of a pixel goes before what files say.
    unknown = select(Image.id).where(Image.id.in_(sizes), Image.pixel_size.is_(None))
    rows = [{"id": image, "pixel_size": sizes[image]} for image in session.scalars(unknown)]
    if rows:
        session.execute(update(Image), rows)
    requeue(session, Job.image_id.in_(list(seen)))  # what failed may work now


def write_contents(session: Session, images: Collection[int]) -> None:
    """Say what the content of images (ids) is: the sha256 over all files, null while one misses."""
    digests: list[dict[str, Any]] = []
    for image, known in known_files(session, images).items():
        content = sorted((file.channel, file.sha256 or "") for file in known.values())
        text = "\n".join(f"{channel}\t{sha256}" for channel, sha256 in content)
        complete = content and all(sha256 for _, sha256 in content)
        digest = hashlib.sha256(text.encode()).hexdigest() if complete else None
        digests.append({"id": image, "content_sha256": digest})
    if digests:
        session.execute(update(Image), digests)
