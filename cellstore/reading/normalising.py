"""What is fitted on the training side: scales of features, and whites of intensities.

Both may be fitted plate by plate. A plate without images on the training side, one that was left
out or came later, has its own control cells and its own images, and they are used: that takes no
label of any treated cell. It is said of it, by :func:`describe_plates`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.models import Image, Plate, Segmentation, SplitMember, Treatment, Well
from ..db.session import Database
from ..errors import ImageError, UnknownNameError, UserInputError
from ..ops.normalising import (
    FEWEST_CONTROLS,
    ControlStatistics,
    PlateScaler,
    WhiteLevels,
    white_of_plate,
)
from ..ops.scaling import FeatureScaler, Scaler
from ..ops.windows import white_level
from ..runs.selection import is_current
from ..terms import Control, Subset
from .cells import CellSource, read_cells, stream_features
from .featuresets import SetReader
from .flags import is_unflagged_image
from .planes import read_image

TRAIN, PLATE_CONTROLS = NORMALISATIONS = ("train", "plate-controls")
"""Features as the training side is spread, or first against the controls of their plate."""

IMAGE, PLATE = INTENSITIES = ("image", "plate")
"""The white of crops: that of their image, or that of their plate."""

WHITE_SAMPLE = 32
"""Images of a plate whose white levels are looked at."""


def fit_scaler(
    session: Session, source: CellSource, normalise: str = TRAIN, also: Sequence[Subset] = ()
) -> FeatureScaler:
    """Fit a scaler to all columns of ``source.features`` on the training side of its split.

    ``normalise``: one of ``NORMALISATIONS``. ``also``: other sides whose plates will be read.

    Raises:
        UnknownNameError: there is no such normalisation.
        UserInputError: there are no cells, a value is not finite, or a plate has no control cells.

    """
    if normalise not in NORMALISATIONS:
        raise UnknownNameError.of("normalisation", normalise, NORMALISATIONS)
    columns, gaps = source.features.columns, not source.features.in_table
    training = replace(source, subset=Subset.TRAIN)
    if normalise == TRAIN:
        return Scaler.fit(columns, stream_features(session, training, columns), gaps=gaps)
    plates = plates_of(session, training)
    controls = {
        barcode: _controls(session, training, barcode, columns)
        for barcode in plates
        if _has_cells(session, training, barcode)
    }
    blocks = ((b, rows) for b in controls for rows in _rows(session, training, b, columns))
    scaler = PlateScaler.fit(columns, controls, blocks, gaps=gaps)
    sides = (replace(source, subset=subset) for subset in also)
    others = {barcode for side in sides for barcode in plates_of(session, side)} - set(controls)
    return add_plates(session, source, scaler, sorted(others))


def add_plates(
    session: Session, source: CellSource, scaler: PlateScaler, plates: Sequence[str]
) -> PlateScaler:
    """Return ``scaler`` with plates that have no image on the training side.

    Their statistics are those of all their control cells, whatever a split says of them.

    Raises:
        UserInputError: a plate has no control cells.

    """
    everywhere = replace(source, split_id=None, subset=None, plates=())
    found = {
        barcode: _controls(session, everywhere, barcode, scaler.names)
        for barcode in plates
        if _has_cells(session, everywhere, barcode)
    }
    return scaler.with_own(found)


def fit_whites(
    session: Session,
    database: Database,
    source: CellSource,
    planes: Sequence[ImageInput],
    also: Sequence[Subset] = (),
) -> WhiteLevels:
    """Return the white levels of the plates of the training side, from its images.

    ``planes``: the plane that was segmented, then one for each channel of the network. The white of
    a plate is the median over at most 32 images of it, always the same ones, of the 99.9th
    percentile. Images that cannot be read are left out of it. ``also`` as for :func:`fit_scaler`.

    Raises:
        UnknownNameError: an image has no such channel.
        ImageError: no image of a plate can be read.

    """
    training = replace(source, subset=Subset.TRAIN)
    plates = plates_of(session, training)
    whites = WhiteLevels({b: _white(session, database, training, planes, b) for b in plates})
    sides = (replace(source, subset=subset) for subset in also)
    others = {barcode for side in sides for barcode in plates_of(session, side)} - set(plates)
    return add_whites(session, database, source, planes, whites, sorted(others))


def add_whites(
    session: Session,
    database: Database,
    source: CellSource,
    planes: Sequence[ImageInput],
    whites: WhiteLevels,
    plates: Sequence[str],
) -> WhiteLevels:
    """Return ``whites`` with plates that have no image on the training side, from all of theirs.

    Raises as :func:`fit_whites` does.
    """
    everywhere = replace(source, split_id=None, subset=None, plates=())
    return whites.with_own({b: _white(session, database, everywhere, planes, b) for b in plates})


def describe_plates(
    scaler: FeatureScaler, whites: WhiteLevels | None, plates: Collection[str] | None = None
) -> list[str]:
    """Return sentences on plates that are normalised by what is on themselves.

    ``plates``: of these only.
    """
    notes = []
    own = _among(scaler.own, plates) if isinstance(scaler, PlateScaler) else []
    if own:
        notes.append(
            f"Plates without images on the training side are normalised against their own negative "
            f"controls: {_some(own)}."
        )
    own = _among(whites.own, plates) if whites is not None else []
    if own:
        notes.append(
            "Plates without images on the training side have the white level of their own images: "
            f"{_some(own)}."
        )
    return notes


def _among(names: Sequence[str], plates: Collection[str] | None) -> list[str]:
    return [name for name in names if plates is None or name in plates]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def plates_of(session: Session, source: CellSource) -> list[str]:
    """Return the barcodes of the plates of a source's images that were segmented, sorted."""
    found = session.scalars(_images(source).with_only_columns(Plate.barcode).distinct())
    return sorted(found)  # in Python: databases sort texts each in their own way


def _images(source: CellSource, barcode: str | None = None) -> Select[Any]:
    query = (
        select(Image.id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(Segmentation, is_current())
        .where(Segmentation.recipe_id == source.segment_id)
    )
    if barcode is not None:
        query = query.where(Plate.barcode == barcode)
    if source.unflagged_by is not None:
        query = query.where(is_unflagged_image(source.unflagged_by))
    if source.split_id is None:
        return query
    member = SplitMember.image_id == Image.id
    query = query.join(SplitMember, member).where(SplitMember.split_id == source.split_id)
    return query if source.subset is None else query.where(SplitMember.subset == source.subset)


def _control_images(source: CellSource, barcode: str) -> Select[Any]:
    query = _images(source, barcode).join(Treatment, Treatment.id == Well.treatment_id)
    return query.where(Treatment.control == Control.NEGATIVE)


def _rows(
    session: Session,
    source: CellSource,
    barcode: str,
    columns: Sequence[str],
    images: Select[Any] | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Yield the features of the cells of a plate, image by image."""
    reader = None if source.features.files is None else SetReader(source.features.files)
    query = _images(source, barcode) if images is None else images
    for image_id in session.scalars(query.order_by(Image.id)).all():
        yield read_cells(session, source, image_id, columns, reader).features


def _has_cells(session: Session, source: CellSource, barcode: str) -> bool:
    return any(len(rows) for rows in _rows(session, source, barcode, ()))


def _controls(
    session: Session, source: CellSource, barcode: str, columns: Sequence[str]
) -> ControlStatistics:
    blocks = _rows(session, source, barcode, columns, _control_images(source, barcode))
    found = ControlStatistics.fit(columns, blocks, gaps=not source.features.in_table)
    if found.cells < FEWEST_CONTROLS:
        side = " on the training side" if source.subset is Subset.TRAIN else ""
        raise UserInputError(
            f"Plate {barcode!r} has {found.cells} measured cells of negative controls{side}, and "
            f"needs {FEWEST_CONTROLS} or more to be normalised against them. Mark its controls as "
            "negcon in its treatment table, or train with --normalise train."
        )
    return found


def _white(
    session: Session,
    database: Database,
    source: CellSource,
    planes: Sequence[ImageInput],
    barcode: str,
) -> tuple[float, ...]:
    # By content: as good as drawn, and the same on every database.
    query = _images(source, barcode).where(Image.content_sha256.is_not(None))
    chosen = query.order_by(Image.content_sha256, Image.id).limit(WHITE_SAMPLE)
    levels, problems = [], []
    for image_id in session.scalars(chosen).all():
        try:
            levels.append([white_level(read_image(database, image_id, p)) for p in planes])
        except ImageError as error:
            problems.append(str(error))
    if not levels:
        raise ImageError(
            f"No image of plate {barcode!r} can be read for its white level. "
            f"{problems[0] if problems else 'Its files are missing: ingest them with --images.'}"
        )
    return white_of_plate(levels)
