"""Images: a table, an index or a folder of them becomes rows, then their files are looked at."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from ....config import IngestParams
from ....db.bulk import in_lists, one_ingest_at_a_time, wide_cache
from ....db.models import Image, Well
from ....errors import UserInputError
from ....formats.fields.folders import read_folder
from ....formats.fields.harmony import read_harmony
from ....formats.files.places import PathMap, writable
from ....formats.layouts import Layout, read_images
from ....formats.records import ImageRecord, Refusal
from ....formats.text.tables import open_table
from ....formats.treatments.aliases import Aliases
from ....formats.treatments.platemaps import PlateAnnotation, read_annotation
from ....runs import Workspace
from ..account import Account, UndoneError
from ..treatments.writer import suspicious_spellings
from .files import Finder, look_at_files
from .rows import RowWriter

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
