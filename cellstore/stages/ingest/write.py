"""One batch of rows becomes rows of the store, in one transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from ...db.models import Image, ImageFile, Plate, Treatment, Well
from ...db.statements import insert_new
from ...formats.images import ImageInfo
from ...formats.names import format_well
from ...formats.records import ImageRecord, TreatmentRecord
from ...terms import PROJECTION_CHANNEL
from .known import ImageKey, Known, identity, image_key, load, well_key


@dataclass(frozen=True)
class FoundFile:
    """One expected file of an image; ``info`` is None where it was not found."""

    channel: str
    position: int
    name: str
    uri: str | None = None
    info: ImageInfo | None = None


@dataclass(frozen=True)
class Prepared:
    """A row with the files it names, looked up and hashed before any transaction."""

    record: ImageRecord
    core_name: str
    files: tuple[FoundFile, ...]


def write_batch(session: Session, rows: Sequence[Prepared]) -> set[ImageKey]:
    """Insert what is new of ``rows``; return the images that were already there and changed."""
    records = [row.record for row in rows]
    _insert_wells(session, records)
    known = load(session, records)
    existing = set(known.images)
    changed = _update_treatments(session, known, records)
    _insert_images(session, known, rows)
    known = load(session, records)
    changed |= _write_files(session, known, rows)
    _refresh_content(session, known, rows)
    return changed & existing


def _insert_wells(session: Session, records: Sequence[ImageRecord]) -> None:
    plates = {record.plate: record.batch for record in records}
    insert_new(session, Plate, [{"barcode": k, "batch": v} for k, v in plates.items()])
    given = [record.treatment for record in records if record.treatment is not None]
    treatments = {identity(treatment): _treatment_row(treatment) for treatment in given}
    insert_new(session, Treatment, list(treatments.values()))
    found = load(session, records)
    wells = {well_key(r): _well_row(found, r) for r in records if well_key(r) not in found.wells}
    insert_new(session, Well, list(wells.values()))


def _treatment_row(treatment: TreatmentRecord) -> dict[str, Any]:
    return {
        "identity": identity(treatment),
        "kind": treatment.kind,
        "pert_iname": treatment.pert_iname,
        "target": treatment.target,
        "control": treatment.control,
        "identifier": treatment.identifier,
        "inchikey": treatment.inchikey,
        "smiles": treatment.smiles,
        "pubchem_cid": treatment.pubchem_cid,
    }


def _well_row(known: Known, record: ImageRecord) -> dict[str, Any]:
    return {
        "plate_id": known.plates[record.plate].id,
        "row": record.row,
        "column": record.column,
        "name": format_well(record.row, record.column),
        "treatment_id": None,
    }


def _update_treatments(
    session: Session, known: Known, records: Sequence[ImageRecord]
) -> set[ImageKey]:
    changed = set()
    updates: dict[int, int] = {}
    for record in records:
        if record.treatment is None:
            continue
        well = known.wells[well_key(record)]
        wanted = known.by_identity[identity(record.treatment)]
        if well.treatment_id != wanted.id and adds(known.treatment_of(well_key(record)), record):
            updates[well.id] = wanted.id
            changed.add(image_key(record))
    _update(session, Well, [{"id": k, "treatment_id": v} for k, v in updates.items()])
    return changed


def adds(present: Treatment | None, record: ImageRecord) -> bool:
    """Whether the treatment of a row says more than the one the well has."""
    if present is None or record.treatment is None:
        return present is None
    more = (record.treatment.identifier, record.treatment.target)
    return any(
        new is not None and old is None
        for new, old in zip(more, (present.identifier, present.target), strict=True)
    )


def contradicts(present: Treatment | None, treatment: TreatmentRecord | None) -> bool:
    """Whether a row says something else about a well than the store does."""
    if present is None or treatment is None:
        return False
    if (present.kind, present.pert_iname) != (treatment.kind, treatment.pert_iname):
        return True
    pairs = (
        (present.identifier, treatment.identifier),
        (present.target, treatment.target),
    )
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def _insert_images(session: Session, known: Known, rows: Sequence[Prepared]) -> None:
    new = {image_key(row.record): row for row in rows if image_key(row.record) not in known.images}
    insert_new(session, Image, [_image_row(known, row) for row in new.values()])


def _image_row(known: Known, row: Prepared) -> dict[str, Any]:
    return {
        "well_id": known.wells[well_key(row.record)].id,
        "site": row.record.site,
        "plane": row.record.plane,
        "time_point": row.record.time_point,
        "core_name": row.core_name,
        "content_sha256": None,
    }


def _write_files(session: Session, known: Known, rows: Sequence[Prepared]) -> set[ImageKey]:
    changed: set[ImageKey] = set()
    new: list[dict[str, Any]] = []
    updates: list[dict[str, Any]] = []
    for row in rows:
        key = image_key(row.record)
        present = known.files_of(key)
        _drop_expectations(session, present, row)
        for file in row.files:
            values = _file_row(known.images[key].id, file)
            old = present.get(file.channel)
            if old is None:
                new.append(values)
            elif file.info is not None and differs(old, file):
                updates.append({"id": old.id, **values})
            else:
                continue
            changed.add(key)
    insert_new(session, ImageFile, new)
    _update(session, ImageFile, updates)
    return changed


def _drop_expectations(session: Session, present: Mapping[str, ImageFile], row: Prepared) -> None:
    """A projection stands for the channels that were expected and never seen."""
    if not any(file.channel == PROJECTION_CHANNEL and file.info for file in row.files):
        return
    unseen = [file.id for file in present.values() if file.sha256 is None]
    session.execute(delete(ImageFile).where(ImageFile.id.in_(unseen)))


def _file_row(image_id: int, file: FoundFile) -> dict[str, Any]:
    info = file.info
    return {
        "image_id": image_id,
        "channel": file.channel,
        "position": file.position,
        "name": file.name,
        "uri": file.uri if info else None,
        "sha256": info.sha256 if info else None,
        "size_bytes": info.size_bytes if info else None,
        "modified_ns": info.mtime_ns if info else None,
        "height": info.height if info else None,
        "width": info.width if info else None,
        "dtype": info.dtype if info else None,
    }


def differs(old: ImageFile, file: FoundFile) -> bool:
    """Whether a file that was found is not the one that the store knows."""
    assert file.info is not None
    seen = (old.uri, old.sha256, old.modified_ns)
    return seen != (file.uri, file.info.sha256, file.info.mtime_ns)


def _refresh_content(session: Session, known: Known, rows: Sequence[Prepared]) -> None:
    ids = [known.images[image_key(row.record)].id for row in rows]
    query = select(ImageFile.image_id, ImageFile.channel, ImageFile.sha256)
    files: dict[int, list[tuple[str, str | None]]] = {image_id: [] for image_id in ids}
    for image_id, channel, sha256 in session.execute(query.where(ImageFile.image_id.in_(ids))):
        files[image_id].append((channel, sha256))
    updates = [{"id": k, "content_sha256": content_digest(v)} for k, v in files.items()]
    _update(session, Image, updates)


def content_digest(files: Sequence[tuple[str, str | None]]) -> str | None:
    """Return the sha256 over (channel, sha256) of all files, None while one is missing."""
    if not files or any(sha256 is None for _, sha256 in files):
        return None
    text = "\n".join(f"{channel}\t{sha256}" for channel, sha256 in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def _update(session: Session, table: type[Any], rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        session.execute(update(table), list(rows))
