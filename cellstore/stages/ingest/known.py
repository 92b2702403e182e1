"""What the store knows already of the images that a batch of rows is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Image, ImageFile, Plate, Treatment, Well
from ...formats.records import ImageRecord, TreatmentRecord

WellKey = tuple[str, int, int]
ImageKey = tuple[WellKey, int, int, int]


def well_key(record: ImageRecord) -> WellKey:
    """Return what names the well of a row: barcode, row, column."""
    return record.plate, record.row, record.column


def image_key(record: ImageRecord) -> ImageKey:
    """Return what names the image of a row: well, site, plane, time point."""
    return well_key(record), record.site, record.plane, record.time_point


def identity(treatment: TreatmentRecord) -> str:
    """Return the natural identity of a treatment."""
    parts = (treatment.kind.value, treatment.pert_iname, treatment.identifier, treatment.target)
    return "|".join(part or "" for part in parts)


@dataclass
class Known:
    """Rows of the store by their natural names."""

    plates: dict[str, Plate] = field(default_factory=dict)
    wells: dict[WellKey, Well] = field(default_factory=dict)
    treatments: dict[int, Treatment] = field(default_factory=dict)
    by_identity: dict[str, Treatment] = field(default_factory=dict)
    images: dict[ImageKey, Image] = field(default_factory=dict)
    files: dict[int, dict[str, ImageFile]] = field(default_factory=lambda: defaultdict(dict))

    def treatment_of(self, key: WellKey) -> Treatment | None:
        """Return the treatment of a well, if both are known."""
        well = self.wells.get(key)
        if well is None or well.treatment_id is None:
            return None
        return self.treatments[well.treatment_id]

    def files_of(self, key: ImageKey) -> dict[str, ImageFile]:
        """Return the files of an image by channel."""
        image = self.images.get(key)
        return {} if image is None else self.files[image.id]


def load(session: Session, records: Sequence[ImageRecord]) -> Known:
    """Return what the store has of the plates, wells and images of ``records``."""
    known = Known()
    barcodes = {record.plate for record in records}
    for plate in session.scalars(select(Plate).where(Plate.barcode.in_(barcodes))):
        known.plates[plate.barcode] = plate
    _load_wells(session, known, {well_key(record) for record in records})
    _load_treatments(session, known, records)
    _load_images(session, known)
    return known


def _load_wells(session: Session, known: Known, keys: set[WellKey]) -> None:
    names = {plate.id: plate.barcode for plate in known.plates.values()}
    for well in session.scalars(select(Well).where(Well.plate_id.in_(names))):
        key = names[well.plate_id], well.row, well.column
        if key in keys:
            known.wells[key] = well


def _load_treatments(session: Session, known: Known, records: Iterable[ImageRecord]) -> None:
    ids = {well.treatment_id for well in known.wells.values()} - {None}
    named = {identity(item.treatment) for item in records if item.treatment is not None}
    query = select(Treatment).where(Treatment.id.in_(ids) | Treatment.identity.in_(named))
    for treatment in session.scalars(query):
        known.treatments[treatment.id] = treatment
        known.by_identity[treatment.identity] = treatment


def _load_images(session: Session, known: Known) -> None:
    keys = {well.id: key for key, well in known.wells.items()}
    images = session.scalars(select(Image).where(Image.well_id.in_(keys))).all()
    for image in images:
        key = keys[image.well_id], image.site, image.plane, image.time_point
        known.images[key] = image
    ids = [image.id for image in images]
    for file in session.scalars(select(ImageFile).where(ImageFile.image_id.in_(ids))):
        known.files[file.image_id][file.channel] = file
