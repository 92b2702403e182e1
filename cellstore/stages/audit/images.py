"""An image: what it is, and every run that labelled it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Image, ImageFile, Plate, Treatment, Well
from ...runs import Workspace, find_image
from .downstream import came_of_images
from .facts import FileFact, ImageAudit
from .flags import image_flags
from .history import frozen_labels, treatment_of, well_history
from .labellings import labellings_of
from .runs import text_of
from .segmentations import segmentations_of


def audit_image(workspace: Workspace, text: str) -> ImageAudit:
    """Return every run that labelled the image that ``text`` names, with its evidence.

    Raises:
        UnknownNameError: no image has that name.
        UserInputError: several have it.
    """
    with workspace.database.read() as session:
        image = find_image(session, text)
        well = session.get_one(Well, image.well_id)
        plate = session.get_one(Plate, well.plate_id)
        treatment = session.get(Treatment, well.treatment_id) if well.treatment_id else None
        files = _files(session, image.id)
        segmentations = segmentations_of(session, image)
        history, now = well_history(session, well.id), treatment_of(session, well)
        return ImageAudit(
            image_id=image.id,
            plate=plate.barcode,
            well=well.name,
            site=image.site,
            plane=image.plane,
            time_point=image.time_point,
            core_name=image.core_name,
            content_sha256=image.content_sha256,
            treatment=treatment.pert_iname if treatment else None,
            target=treatment.target if treatment else None,
            control=text_of(treatment.control) if treatment else None,
            treatment_history=history,
            frozen_labels=frozen_labels(session, well.id, image.id, now, history),
            files=files,
            missing_files=sum(file.sha256 is None for file in files),
            segmentations=segmentations,
            labellings=labellings_of(session, image, treatment, segmentations),
            flags=image_flags(session, image.id),
            came=came_of_images(session, select(Image.id).where(Image.id == image.id)),
        )


def _files(session: Session, image_id: int) -> tuple[FileFact, ...]:
    query = select(ImageFile).where(ImageFile.image_id == image_id)
    return tuple(
        FileFact(file.channel, file.name, file.uri, file.sha256, file.size_bytes)
        for file in session.scalars(query.order_by(ImageFile.position, ImageFile.channel))
    )
