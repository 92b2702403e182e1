"""Screens of a word for each well, and the sides of their images, for the tests of splits."""

from __future__ import annotations

import hashlib

from factories import treatment
from sqlalchemy import select

from cellstore.config import SplitParams
from cellstore.enums import TARGET, GroupLevel, Subset
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Plate, Split, SplitMember, Treatment, Well

TARGETS = {"aspirin": "PTGS1", "ibuprofen": "PTGS1", "naproxen": "PTGS1"}
TARGETS |= {"taxol": "TUBB", "colchicine": "TUBB", "vinblastine": "TUBB"}


def fill(workspace: Workspace, *layouts: str, names: dict[str, str] | None = None) -> None:
    """A plate P1, P2, ... for each layout: a well of two images for each word."""
    with workspace.database.begin() as session:
        ids: dict[str, int] = {}
        for name in sorted({name for layout in layouts for name in layout.split()}):
            made = treatment(
                session, name, target=TARGETS.get(name), inchikey=(names or {}).get(name)
            )
            ids[name] = made.id
        for number, layout in enumerate(layouts, start=1):
            plate = Plate(barcode=f"P{number}", batch=f"B{(number + 1) // 2}")
            session.add(plate)
            session.flush()
            for column, name in enumerate(layout.split(), start=1):
                place = {"well_row": 1, "well_column": column, "name": f"A{column:02d}"}
                well = Well(plate_id=plate.id, treatment_id=ids[name], **place)
                session.add(well)
                session.flush()
                for site in (1, 2):
                    digest = hashlib.sha256(f"{number} {column} {site}".encode()).hexdigest()
                    image = Image(well_id=well.id, site=site, core_name="x", content_sha256=digest)
                    session.add(image)


def sides(workspace: Workspace, name: str) -> dict[str, Subset]:
    """The side of each image, named ``P1 A01 1 aspirin``."""
    query = (
        select(Plate.barcode, Well.name, Image.site, Treatment.name, SplitMember.subset)
        .join(Image, Image.id == SplitMember.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(Treatment, Treatment.id == Well.treatment_id)
        .join(Split, Split.id == SplitMember.split_id)
        .where(Split.name == name)
    )
    with workspace.database.read() as session:
        return {" ".join(map(str, row[:4])): row[4] for row in session.execute(query)}


def parts(workspace: Workspace, name: str, word: int) -> dict[str, set[Subset]]:
    found: dict[str, set[Subset]] = {}
    for image, side in sides(workspace, name).items():
        found.setdefault(image.split()[word], set()).add(side)
    return found


DRUGS = "aspirin ibuprofen naproxen taxol colchicine vinblastine"
BY_TREATMENT = SplitParams(group_level=GroupLevel.PERTURBATION, field=TARGET)
