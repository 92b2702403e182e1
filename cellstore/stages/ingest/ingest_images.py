"""Images: a table, an index or a folder of them becomes rows, then their files are looked at.

:class:`ImageSource` yields a record per field of view, :class:`RowWriter` makes rows of them, and
:func:`look_at_files` finds and hashes the files that the rows name.
"""

from __future__ import annotations

import gc
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from ...config import IngestParams
from ...db.bulk import bulk_insert, in_lists, one_ingest_at_a_time, take_ids, wide_cache
from ...enums import PROJECTION_CHANNEL
from ...errors import UserInputError
from ...io.filenames import format_well
from ...io.folders import FolderImages, read_folder
from ...io.harmony import read_harmony
from ...io.image_tables import FileRef, ImageRecord
from ...io.layouts import Layout, read_images
from ...io.platemaps import Aliases, TreatmentRecord, flaw_of, read_annotation
from ...io.tables import LONGEST, Refusal, open_table
from ...io.uris import PathMap, is_remote, join, writable
from ...jobs.workspace import Workspace
from ...models import Image, ImageFile, Plate, Well
from .account import Account, Brought
from .find_files import KnownFile, folder_id, known_files, look_at_files
from .write_treatments import TreatmentWriter

BATCH = 10_000
"""Records that are written at a time."""

MANY_WELLS = 200_000
"""Wells whose ids are remembered; a file that goes on past them asks the database again."""

_PLATE_COLUMNS = {
    name: column
    for column, names in {
        "cell_line": ("cell_line", "Cell_Line", "CellLine", "cell_line_name"),
        "time_point": ("time_point", "Time_Point"),
    }.items()
    for name in names
}
"""Metadata columns that are columns of ``plates``."""

_WELL = ("id", "plate_id", "well_row", "well_column", "name")
_IMAGE = ("id", "well_id", "site", "plane", "time_point", "core_name", "pixel_size")
_FILE = ("image_id", "channel", "position", "name", "folder_id")

WellKey = tuple[str, int, int]
"""Barcode, row, column."""

ImageKey = tuple[int, int, int, int]
"""Well, site, plane, time point."""


class ImageSource:
    """Where records of images come from, and what is said about them elsewhere.

    ``files`` are read beside the source.

    Raises:
        BadTableError: a table of treatments cannot be read.
        UserInputError: treatments are given, but not which well got which; or no pixel size.
    """

    def __init__(self, path: Path, layout: Layout, params: IngestParams) -> None:
        self.path, self.layout, self.params = path, layout, params
        self.annotation = None
        if params.platemap is not None:
            self.annotation = read_annotation(params.platemap, params.compounds, params.barcodes)
        elif params.compounds or params.barcodes:
            raise UserInputError(
                "--compounds and --barcodes go with a plate map: give --platemap, too, or ingest "
                "the table of treatments by itself."
            )
        if params.pixel_size is not None and not 0 < params.pixel_size < float("inf"):
            raise UserInputError("--pixel-size is the micrometres per pixel, like 0.598.")
        self.aliases = Aliases.read(params.aliases) if params.aliases is not None else None
        self.files = (
            *(self.annotation.files if self.annotation else ()),
            *([params.aliases] if params.aliases else ()),
        )
        self._notes = list(self.annotation.notes if self.annotation else ())
        self._folder: FolderImages | None = None

    @property
    def notes(self) -> list[str]:
        """What a user should know of the source; complete when all records were read."""
        return [*self._notes, *(self._folder.notes if self._folder else ())]

    def records(self) -> Iterator[ImageRecord | Refusal]:
        """Return the records with their treatments, and what cannot be used, one by one.

        Raises:
            BadTableError: the source is unreadable, or turns out to be.
        """
        params, channels = self.params, dict(self.params.channels)
        rows: Iterator[ImageRecord | Refusal]
        if self.layout is Layout.HARMONY:
            rows = read_harmony(self.path, params.plate, channels=channels)
        elif self.path.is_dir():
            rows = self._folder = read_folder(
                self.path,
                self.layout.value,
                pattern=params.pattern,
                plate=params.plate,
                channels=channels,
            )
        else:
            table = open_table(self.path)
            self._notes += table.notes
            rows = read_images(table, self.layout, params.plate, channels=channels)
        # Without a detour for the million rows of a table that says all by itself.
        beside = (self.annotation, self.aliases, params.pixel_size)
        return rows if beside == (None, None, None) else self._completed(rows)

    def _completed(self, rows: Iterator[ImageRecord | Refusal]) -> Iterator[ImageRecord | Refusal]:
        for row in rows:
            if isinstance(row, Refusal):
                yield row
                continue
            treatment, metadata = row.treatment, row.metadata
            if self.annotation is not None:
                if not self.annotation.knows(row.plate):
                    detail = f"no map is named for plate {row.plate}"
                    yield Refusal(row.line, "no plate map", detail)
                    continue
                found = self.annotation.for_well(row.plate, row.row, row.column)
                treatment = found or treatment
                if more := self.annotation.metadata_of(row.plate, row.row, row.column):
                    metadata = {**(metadata or {}), **more}
            if self.aliases is not None and treatment is not None:
                treatment = self.aliases.apply(treatment)
            size = self.params.pixel_size or row.pixel_size
            yield row._replace(treatment=treatment, pixel_size=size, metadata=metadata)


def ingest_images(
    workspace: Workspace, source: ImageSource, account: Account, total: int
) -> Brought:
    """Bring the records of a source in, as one transaction, then look at their files.

    ``total``: about how many records there are.

    Raises:
        BadTableError: the source turned out unreadable; nothing of it is written.
        UndoneError: rows were refused and all or nothing was asked for; nothing is written.
    """
    workspace.progress.start("ingest", total)
    # Rows have no cycles, and the collector would walk all of them, again and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        with workspace.database.begin() as session:
            one_ingest_at_a_time(session)
            with wide_cache(session):
                writer = RowWriter(session, account, PathMap(source.params.maps))
                rows = source.records()
                while batch := list(islice(rows, BATCH)):
                    _write_batch(session, writer, batch, account)
                    workspace.progress.advance(len(batch))
                # What is known only when all records were read.
                for path, refusal in source.annotation.issues if source.annotation else ():
                    account.problem(*refusal, file=writable(path.name))
                writer.finish()
                account.notes += source.notes
                account.flush(session)
            if source.params.strict:
                account.check_strict()
    finally:
        if collects:
            gc.enable()
        workspace.progress.finish()
    images = np.unique(np.frombuffer(writer.images, dtype=np.int64))
    changed = look_at_files(workspace, images, source.params.images, source.params.look, account)
    found = int(np.isin(np.frombuffer(writer.unchanged, dtype=np.int64), list(changed)).sum())
    account.unchanged -= found
    account.updated += found
    return Brought(tuple(sorted(writer.plates)))


def _write_batch(
    session: Session,
    writer: RowWriter,
    batch: Sequence[ImageRecord | Refusal],
    account: Account,
) -> None:
    """Write records together; where the database refuses one, each by itself."""
    account.rows += len(batch)
    records: list[ImageRecord] = []
    for row in batch:
        if isinstance(row, Refusal):
            account.refuse(row.line, row.reason, row.detail)
        else:
            records.append(row)
    if not _was_written(session, writer, records, account):
        for record in records:
            if not _was_written(session, writer, [record], account):
                account.refuse(record.line, "the database refuses it", f"plate {record.plate}")
    account.flush(session)


def _was_written(
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


class RowWriter:
    """Writes the records of one file in the open transaction of ``session``.

    ``maps`` rewrites the folders that the records name. ``plates`` and ``images`` are those of all
    records that were used, ``unchanged`` the images of those that brought nothing new.
    """

    def __init__(
        self,
        session: Session,
        account: Account,
        maps: PathMap | None = None,
    ) -> None:
        self._session, self._account, self._maps = session, account, maps or PathMap(())
        self._treatments = TreatmentWriter(session, account)
        self._plate_ids: dict[str, int] = {}
        self._well_ids: dict[WellKey, int] = {}
        self._folder_ids: dict[str | None, int | None] = {None: None}
        self._treatment_of: dict[WellKey, tuple[TreatmentRecord, int]] = {}
        self._metadata: dict[int, Mapping[str, str]] = {}
        self._differing: set[str] = set()
        """Metadata columns that differ between images of one well."""
        self._first_new: int | None = None
        self.plates: set[int] = set()
        self.images = array("q")
        self.unchanged = array("q")

    def write(self, records: Sequence[ImageRecord]) -> list[int | None]:
        """Bring records in; return the image of each, None where the record was refused.

        A record is refused that says something else of its well than an earlier one of the file.
        """
        records_given, records = records, self._keep_storable(records)
        all_wells, new_wells = self._find_wells(records)
        records, wells = self._keep_agreeing(records, all_wells)
        treated = self._assign_treatments(records, wells, new_wells)
        for folder in {ref.folder for record in records for ref in record.files}:
            if folder is not None and folder not in self._folder_ids:
                self._folder_ids[folder] = folder_id(self._session, self._maps.apply(folder))
        images, made_of = self._find_images(records, wells, new_wells)
        known = [
            (image, record, well)
            for image, record, well in zip(images, records, wells, strict=True)
            if made_of.get(image) is not record
        ]
        changed, refused = self._complete([(image, record) for image, record, _ in known])
        changed |= self._resize(
            {image: record for image, record, _ in known if id(record) not in refused}
        )
        self._account.created += len(made_of)
        for image, record, well in known:
            if id(record) in refused:
                continue
            if image in changed or (well in treated and image not in made_of):
                self._account.updated += 1
            else:
                self._account.unchanged += 1
                self.unchanged.append(image)
        # From here on nothing is undone: what is remembered is of rows that are there.
        self._collect_metadata(records, wells)
        self.plates |= {self._plate_ids[barcode] for barcode in {r.plate for r in records}}
        self.images.extend(images)
        of_record = dict(zip(map(id, records), images, strict=True))
        return [
            None if id(record) in refused else of_record.get(id(record)) for record in records_given
        ]

    def forget(self) -> None:
        """Ask the database again: what this writer wrote last was undone."""
        self._plate_ids.clear()
        self._well_ids.clear()
        self._folder_ids = {None: None}
        self._treatments.forget()

    def finish(self) -> None:
        """Keep the metadata of the records, and report what looks wrong with their treatments."""
        self._write_metadata()
        self._treatments.report()

    def _keep_storable(self, records: Sequence[ImageRecord]) -> Sequence[ImageRecord]:
        """Return the records whose names a database can hold; refuse the others."""
        treatments = {record.treatment for record in records}
        flawed = {found for found in treatments if found is not None and flaw_of(found)}
        if not flawed and _are_storable(records):
            return records
        kept = []
        for record in records:
            flaw = flaw_of(record.treatment) if record.treatment in flawed else None
            if flaw is None and not _are_storable([record]):
                flaw = f"a name has more than {LONGEST} characters or a NUL in it"
            if flaw is None:
                kept.append(record)
            else:
                self._account.refuse(record.line, "a name that cannot be stored", flaw)
        return kept

    def _find_wells(self, records: Sequence[ImageRecord]) -> tuple[list[int], set[int]]:
        """Return the well of each record, and those wells that were made for it."""
        if len(self._well_ids) > MANY_WELLS:
            self._well_ids.clear()
        known = self._well_ids
        keys = [(record.plate, record.row, record.column) for record in records]
        missing = {key for key in keys if key not in known}
        if not missing:
            return [known[key] for key in keys], set()
        batches = {record.plate: record.batch for record in records}
        self._find_plates({barcode: batches[barcode] for barcode, _, _ in missing})
        barcodes = {self._plate_ids[barcode]: barcode for barcode, _, _ in missing}
        query = select(Well.plate_id, Well.well_row, Well.well_column, Well.id)
        for some in in_lists(barcodes):
            for plate, row, column, well in self._session.execute(
                query.where(Well.plate_id.in_(some))
            ):
                known[barcodes[plate], row, column] = well
        new = [key for key in dict.fromkeys(keys) if key not in known]
        ids = take_ids(self._session, Well, len(new))
        rows = [
            (well, self._plate_ids[barcode], row, column, format_well(row, column))
            for well, (barcode, row, column) in zip(ids, new, strict=True)
        ]
        bulk_insert(self._session, Well, _WELL, rows)
        known.update(zip(new, ids, strict=True))
        return [known[key] for key in keys], set(ids)

    def _find_plates(self, batches: Mapping[str, str | None]) -> None:
        """Find or make plates; ``batches`` is the batch of each, which a plate may lack so far."""
        absent = [barcode for barcode in batches if barcode not in self._plate_ids]
        for some in in_lists(absent):
            for plate in self._session.scalars(select(Plate).where(Plate.barcode.in_(some))):
                self._plate_ids[plate.barcode] = plate.id
                batch = batches[plate.barcode]
                plate.batch = plate.batch or batch
                if batch is not None and batch != plate.batch:
                    detail = f"plate {plate.barcode} has batch {plate.batch}, {batch} here; kept"
                    self._account.problem(None, "another batch", detail)
        self._session.flush()
        new = [barcode for barcode in absent if barcode not in self._plate_ids]
        ids = take_ids(self._session, Plate, len(new))
        rows = [(plate, barcode, batches[barcode]) for plate, barcode in zip(ids, new, strict=True)]
        bulk_insert(self._session, Plate, ("id", "barcode", "batch"), rows)
        self._plate_ids.update(zip(new, ids, strict=True))

    def _keep_agreeing(
        self, records: Sequence[ImageRecord], wells: Sequence[int]
    ) -> tuple[Sequence[ImageRecord], Sequence[int]]:
        """Refuse records that give a well another treatment than an earlier one of the file."""
        refused: set[int] = set()
        for record in records:
            treatment = record.treatment
            if treatment is None:
                continue
            key = (record.plate, record.row, record.column)
            earlier, line = self._treatment_of.setdefault(key, (treatment, record.line))
            # By object first: readers hand the same treatment out again and again.
            if earlier is not treatment and earlier != treatment:
                refused.add(id(record))
                self._account.refuse(
                    record.line,
                    "the well has another treatment",
                    f"plate {record.plate}, well {format_well(record.row, record.column)}: "
                    f"{treatment.pert_iname!r} here, {earlier.pert_iname!r} on line {line}",
                )
        if not refused:
            return records, wells
        pairs = zip(records, wells, strict=True)
        kept = [pair for pair in pairs if id(pair[0]) not in refused]
        return [record for record, _ in kept], [well for _, well in kept]

    def _assign_treatments(
        self, records: Sequence[ImageRecord], wells: Sequence[int], new_wells: set[int]
    ) -> set[int]:
        """Give the wells their treatments; return those where that is news to the store."""
        wanted: dict[int, tuple[TreatmentRecord, int | None]] = {
            well: self._treatment_of[record.plate, record.row, record.column]
            for record, well in zip(records, wells, strict=True)
            if record.treatment is not None
        }
        return self._treatments.assign(wanted, new_wells) if wanted else set()

    def _find_images(
        self, records: Sequence[ImageRecord], wells: Sequence[int], new_wells: set[int]
    ) -> tuple[list[int], dict[int, ImageRecord]]:
        """Return the image of each record, and of the new ones the record that it was made of."""
        known: dict[ImageKey, int] = {}
        columns = (Image.well_id, Image.site, Image.plane, Image.time_point, Image.id)
        for some in in_lists(set(wells) - new_wells):
            for row in self._session.execute(select(*columns).where(Image.well_id.in_(some))):
                known[row[0], row[1], row[2], row[3]] = row[4]
        keys = [
            (well, record.site, record.plane, record.time_point)
            for record, well in zip(records, wells, strict=True)
        ]
        new: dict[ImageKey, ImageRecord] = {}
        for key, record in zip(keys, records, strict=True):
            if key not in known:
                new.setdefault(key, record)
        ids = take_ids(self._session, Image, len(new))
        if self._first_new is None and new:
            self._first_new = ids[0]
        known.update(zip(new, ids, strict=True))
        made_of = dict(zip(ids, new.values(), strict=True))
        images: list[tuple[Any, ...]] = []
        for image, (key, record) in zip(ids, new.items(), strict=True):
            core_name = f"r{record.row:02d}c{record.column:02d}f{record.site:02d}"
            images.append((image, *key, record.core_name or core_name, record.pixel_size))
        folders = self._folder_ids
        files = [
            (image, ref.channel, ref.number or order, ref.name, folders[ref.folder])
            for image, record in made_of.items()
            for order, ref in enumerate(_distinct(record.files), start=1)
        ]
        bulk_insert(self._session, Image, _IMAGE, images)
        bulk_insert(self._session, ImageFile, _FILE, files)
        return [known[key] for key in keys], made_of

    def _complete(self, known: Sequence[tuple[int, ImageRecord]]) -> tuple[set[int], set[int]]:
        """Bring the files of images that were there up to what their records say.

        Returns the images that changed, and the ``id()`` of records that were refused.
        """
        present = known_files(self._session, {image for image, _ in known})
        changed: set[int] = set()
        refused: set[int] = set()
        new: list[tuple[Any, ...]] = []
        moved: list[dict[str, Any]] = []
        for image, record in known:
            files = present[image]
            if self._is_another_field(image, record, files):
                refused.add(id(record))
                continue
            projection = files.get(PROJECTION_CHANNEL)
            if projection is not None and projection.sha256 is not None:
                continue  # it stands for the channels that the record names
            for order, ref in enumerate(_distinct(record.files), start=1):
                folder = self._folder_ids[ref.folder]
                old = files.get(ref.channel)
                if old is None:
                    if self._has_another_channel(record, ref, files):
                        continue
                    files[ref.channel] = KnownFile(None, ref.channel, ref.name, folder)
                    new.append((image, ref.channel, ref.number or order, ref.name, folder))
                elif old.id is not None and self._is_elsewhere(old, ref, folder):
                    # Without its time the file is read again before it is believed.
                    row = {"name": ref.name, "folder_id": folder, "modified_ns": None}
                    moved.append({"id": old.id, **row})
                else:
                    continue
                changed.add(image)
        bulk_insert(self._session, ImageFile, _FILE, new)
        if moved:
            self._session.execute(update(ImageFile), moved)
        return changed, refused

    def _resize(self, known: Mapping[int, ImageRecord]) -> set[int]:
        """Give images that were there the pixel size of their records; return the changed."""
        sizes = {image: r.pixel_size for image, r in known.items() if r.pixel_size is not None}
        changed: set[int] = set()
        for some in in_lists(sizes):
            query = select(Image.id, Image.pixel_size).where(Image.id.in_(some))
            for image, size in self._session.execute(query):
                if size != sizes[image]:
                    changed.add(image)
        if changed:
            rows = [{"id": image, "pixel_size": sizes[image]} for image in sorted(changed)]
            self._session.execute(update(Image), rows)
        return changed

    def _collect_metadata(self, records: Sequence[ImageRecord], wells: Sequence[int]) -> None:
        if len(self._metadata) > MANY_WELLS:
            self._write_metadata()
        for record, well in zip(records, wells, strict=True):
            found = record.metadata
            if found is None:
                continue
            known = self._metadata.setdefault(well, found)
            # By object first: readers hand the same columns out again and again.
            if known is not found and known != found:
                self._metadata[well] = both = {**found, **known}
                self._differing |= {key for key, text in found.items() if both[key] != text}

    def _write_metadata(self) -> None:
        """Keep the metadata columns of the records: with the plate what its wells share.

        A plate keeps the value that it has; what wells say otherwise is kept with them. What
        differs between the images of one well cannot be kept, and a note says so.
        """
        plates: dict[int, list[int]] = defaultdict(list)
        for some in in_lists(self._metadata):
            query = select(Well.plate_id, Well.id).where(Well.id.in_(some))
            for plate_id, well in self._session.execute(query):
                plates[plate_id].append(well)
        of_wells: dict[int, dict[str, str]] = {}
        for some in in_lists(plates):
            for plate in self._session.scalars(select(Plate).where(Plate.id.in_(some))):
                wells = {well: self._metadata[well] for well in plates[plate.id]}
                common = self._complete_plate(plate, list(wells.values()))
                for well, found in wells.items():
                    own = {
                        key: text
                        for key, text in found.items()
                        if key not in self._differing and common.get(key) != text
                    }
                    if own:
                        of_wells[well] = own
        self._session.flush()
        n_changed = 0
        for some in in_lists(of_wells):
            rows = []
            query_wells = select(Well.id, Well.metadata_).where(Well.id.in_(some))
            for well, before in self._session.execute(query_wells).all():
                after = {**(before or {}), **of_wells[well]}
                if after != before:
                    rows.append({"id": well, "metadata_": after})
                    n_changed += before is not None
            if rows:
                self._session.execute(update(Well), rows)
        if n_changed:
            self._account.notes.append(f"wells that have other metadata now: {n_changed:,}")
        if self._differing:
            names = ", ".join(sorted(self._differing)[:5])
            more = ", ..." if len(self._differing) > 5 else ""
            self._account.notes.append(
                f"not kept, because they differ between the images of a well: {names}{more}"
            )
        self._metadata.clear()

    def _complete_plate(self, plate: Plate, wells: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Give a plate what its wells share and it lacks; return what holds for it now."""
        columns = {key: getattr(plate, column) for key, column in _PLATE_COLUMNS.items()}
        common = {**(plate.metadata_ or {}), **columns}
        new: dict[str, str] = {}
        for key in sorted({key for found in wells for key in found} - self._differing):
            texts = {found.get(key) for found in wells}
            text = next(iter(texts))
            # Of one well alone nothing tells that the others are like it.
            if len(texts) > 1 or len(wells) == 1 or text is None or common.get(key):
                continue
            common[key] = text
            if key in _PLATE_COLUMNS:
                setattr(plate, _PLATE_COLUMNS[key], text)
            else:
                new[key] = text
        if new:
            plate.metadata_ = {**(plate.metadata_ or {}), **new}
        return common

    def _is_another_field(
        self, image: int, record: ImageRecord, files: Mapping[str, KnownFile]
    ) -> bool:
        """Refuse a record with other files than an earlier one of the same source for its image.

        Two planes or time points are then taken for one: better no row than one of the two.
        """
        if self._first_new is None or image < self._first_new:
            return False
        for ref in record.files:
            old = files.get(ref.channel)
            if old is not None and old.name != ref.name:
                self._account.refuse(
                    record.line,
                    "the same field twice, with other files",
                    f"{ref.name} here, {old.name} before, both site {record.site}, plane "
                    f"{record.plane}, time point {record.time_point} of well "
                    f"{format_well(record.row, record.column)} on plate {record.plate}",
                )
                return True
        return False

    def _has_another_channel(
        self, record: ImageRecord, ref: FileRef, files: Mapping[str, KnownFile]
    ) -> bool:
        """Say that a file of an image is there as another channel; one file is one channel."""
        channel = next((name for name, old in files.items() if old.name == ref.name), None)
        if channel is None:
            return False
        self._account.suspicious(
            record.line,
            "one file under two channels",
            f"{ref.name}: {ref.channel} here. Stored as {channel}. To use one name for both: "
            f"--channels {ref.channel}={channel}",
        )
        return True

    def _is_elsewhere(self, old: KnownFile, ref: FileRef, folder: int | None) -> bool:
        """Whether a record knows better than the store where a file is.

        A file that was seen stays where it was seen, unless it is in the new folder, too.
        """
        if folder is None or (folder, ref.name) == (old.folder_id, old.name):
            return False
        if old.sha256 is None:
            return True
        uri = self._maps.apply(ref.folder or "")
        return not is_remote(uri) and Path(join(uri, ref.name)).is_file()


def _distinct(files: tuple[FileRef, ...]) -> Iterable[FileRef]:
    """Return the files by channel; of two of one channel the first."""
    if len({ref.channel for ref in files}) == len(files):
        return files
    return {ref.channel: ref for ref in reversed(files)}.values()


def _are_storable(records: Sequence[ImageRecord]) -> bool:
    texts = [ref.name for record in records for ref in record.files]
    texts += {ref.channel for record in records for ref in record.files}
    for record in records:
        texts += (record.plate, record.batch or "", record.core_name or "")
    return max(map(len, texts), default=0) <= LONGEST and "\0" not in "".join(texts)
