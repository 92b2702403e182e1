"""What is fitted on the training side: scales of features, and whites of intensities.

Both may be fitted plate by plate. A plate without images on the training side, one that was left
out or came later, has its own control cells and its own images, and they are used: that takes no
label of any treated cell. It is said of it, by :func:`describe_plates`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.session import Database
from ..enums import Control, Subset
from ..errors import ImageError, UnknownNameError, UserInputError
from ..jobs.planes import read_image
from ..jobs.selection import is_current
from ..models import Image, Plate, Segmentation, SplitMember, Well
from ..query.cells import CellSource, is_unflagged_image, read_cells, stream_features
from ..query.feature_files import SetReader
from .crops import white_level

Numbers = NDArray[np.float64]


class FeatureScaler(Protocol):
    """What features are scaled by: :class:`Scaler`, or one that knows plates."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in their order."""

    @property
    def gaps(self) -> bool:
        """Whether a value that is not finite counts as not measured; else it is an error."""

    def transform(self, rows: ArrayLike, plate: str | None = None) -> NDArray[np.float32]:
        """The (N, F) ``rows`` of cells of one plate (its barcode), scaled, as float32."""

    def to_json(self) -> dict[str, Any]:
        """A record that ``json.dumps`` takes, and ``normalising.read_scaler`` reads."""


class Moments:
    """Number of values, mean and deviation of each column of rows that come in blocks.

    They are merged as in Chan, Golub and LeVeque (1983), in float64; one block is in memory.
    ``gaps``: a value that is not finite is not there; else it is an error.
    """

    def __init__(self, names: Sequence[str], *, gaps: bool = False) -> None:
        self.names, self.gaps = tuple(names), gaps
        self.count, self.mean, self._squares = (np.zeros(len(names)) for _ in range(3))

    def add(self, block: ArrayLike) -> None:
        """Add a block of rows, (N, F).

        Raises ``UserInputError`` where it is not (N, F) or, without ``gaps``, a value is not
        finite.
        """
        rows = checked_rows(self.names, block, self.gaps)
        if len(rows):
            self._merge(rows)

    def _merge(self, rows: Numbers) -> None:
        there = np.isfinite(rows)
        added = there.sum(axis=0).astype(np.float64)
        mean = np.where(there, rows, 0.0).sum(axis=0) / np.maximum(added, 1)
        squares = (np.where(there, rows - mean, 0.0) ** 2).sum(axis=0)
        total = self.count + added
        step, present = mean - self.mean, np.maximum(total, 1)
        self._squares = self._squares + squares + step**2 * (self.count * added / present)
        self.mean = self.mean + step * (added / present)
        self.count = total

    def scale(self) -> Numbers:
        """The population standard deviation of each column, or 1 where it never varies."""
        deviation = np.sqrt(self._squares / np.maximum(self.count, 1))
        # A constant column keeps rounding noise in place of an exact 0.
        varies = deviation > 10 * np.finfo(np.float64).eps * np.maximum(np.abs(self.mean), 1e-300)
        return np.where(varies, deviation, 1.0)


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale`` for each named column, as scikit-learn's ``StandardScaler``.

    ``mean`` and ``scale`` have one number per name; ``scale`` is the population standard
    deviation, or 1 for a column that never varies. ``gaps``: a value that is not finite counts
    as not measured and becomes 0 (the mean); else it is an error.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    gaps: bool = False

    @classmethod
    def fit(
        cls, names: Sequence[str], blocks: Iterable[ArrayLike], *, gaps: bool = False
    ) -> Scaler:
        """Fit to ``blocks`` of rows, each (N, F), of which one at a time is in memory.

        See :class:`Moments`. With ``gaps``, a column without a single finite value is not among
        the names of the scaler.

        Raises ``UserInputError`` where there is no row or no column with a value, a block is not
        (N, F), or, without ``gaps``, a value is not finite.
        """
        moments = Moments(names, gaps=gaps)
        for block in blocks:
            moments.add(block)
        there = moments.count > 0
        if not there.any():
            raise UserInputError("There are no cells to scale features on; measure images first.")
        mean, scale = (tuple(values[there].tolist()) for values in (moments.mean, moments.scale()))
        return cls(tuple(np.array(names)[there].tolist()), mean, scale, gaps)

    def transform(self, rows: ArrayLike, plate: str | None = None) -> NDArray[np.float32]:
        """The (N, F) ``rows`` scaled, as float32, alike on every plate; raises as :meth:`fit`."""
        values = checked_rows(self.names, rows, self.gaps)
        scaled: Numbers = (values - np.array(self.mean)) / np.array(self.scale)
        return np.nan_to_num(scaled, copy=False, nan=0.0).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Names, means and scales as plain lists."""
        lists = {"names": list(self.names), "mean": list(self.mean), "scale": list(self.scale)}
        return {**lists, "gaps": self.gaps}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Scaler:
        """The scaler that :meth:`to_json` described; raises ``UserInputError`` if it is not one."""
        try:
            names = tuple(str(name) for name in record["names"])
            mean = tuple(float(value) for value in record["mean"])
            scale = tuple(float(value) for value in record["scale"])
            gaps = bool(record.get("gaps", False))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserInputError(f"This is not a description of a scaler: {error!r}.") from error
        usable = np.isfinite([*mean, *scale]).all() and all(value > 0 for value in scale)
        if not len(names) == len(mean) == len(scale) or not usable:
            raise UserInputError("The scaler needs one finite mean and one scale above 0 per name.")
        return cls(names, mean, scale, gaps)


def checked_rows(names: Sequence[str], block: ArrayLike, gaps: bool) -> Numbers:
    """Return the rows as float64, with NaN for each value that is not there."""
    rows = np.asarray(block, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise UserInputError(
            f"Features must have the shape (cells, {len(names)}), these have {rows.shape}."
        )
    if gaps:
        return np.where(np.isfinite(rows), rows, np.nan)
    finite = np.isfinite(rows).all(axis=0)
    if not finite.all():
        bad = ", ".join(name for name, good in zip(names, finite, strict=True) if not good)
        raise UserInputError(
            f"Some cells have no finite value of {bad}; exclude them or measure them again."
        )
    return rows


NORMALISING_PLATE_CONTROLS = "plate-controls"
"""What a record's key ``kind`` says of a scaler that knows plates."""

FEWEST_CONTROLS = 2
"""Control cells that a plate must have: one alone has no deviation."""


@dataclass(frozen=True)
class ControlStatistics:
    """Mean and scale of each column over ``cells`` control cells of a plate.

    NaN for a column of which no control cell of the plate has a value. ``scale`` is the
    population standard deviation, or 1 for a column in which the controls do not vary.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    cells: int

    @classmethod
    def fit(
        cls, names: Sequence[str], blocks: Iterable[ArrayLike], *, gaps: bool = False
    ) -> ControlStatistics:
        """Fit to blocks of control cells of a plate, (N, F) each, of which one is in memory.

        Raises as ``Moments.add`` does.
        """
        moments, cells = Moments(names, gaps=gaps), 0
        for block in blocks:
            rows = np.asarray(block, dtype=np.float64)
            moments.add(rows)
            cells += len(rows)
        there = moments.count > 0
        mean, scale = (np.where(there, v, np.nan) for v in (moments.mean, moments.scale()))
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), cells)

    def apply(self, rows: Numbers) -> Numbers:
        """``(x - mean) / scale``, (N, F)."""
        normalised: Numbers = (rows - np.array(self.mean)) / np.array(self.scale)
        return normalised

    def of_columns(self, there: Sequence[bool]) -> ControlStatistics:
        """The same of some columns only."""
        mean, scale = (
            tuple(v for v, wanted in zip(values, there, strict=True) if wanted)
            for values in (self.mean, self.scale)
        )
        return replace(self, mean=mean, scale=scale)

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain lists, null for NaN."""
        lists = {
            name: [None if np.isnan(v) else v for v in values]
            for name, values in (("mean", self.mean), ("scale", self.scale))
        }
        return {**lists, "cells": self.cells}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ControlStatistics:
        """What :meth:`to_json` described; raises ``ValueError`` and the like if it is not that."""
        mean, scale = (
            tuple(float("nan") if v is None else float(v) for v in record[name])
            for name in ("mean", "scale")
        )
        if any(value <= 0 for value in scale) or np.isinf([*mean, *scale]).any():
            raise ValueError("a scale is not above 0, or a number is not finite")
        return cls(mean, scale, int(record["cells"]))


@dataclass(frozen=True)
class PlateScaler:
    """Features against the control cells of their plate, then standardised as a whole.

    ``plates`` by barcode have one number per name of ``after``, which scales what comes out.
    ``own`` are those of them that have no image on the training side: their statistics are those
    of their own control cells.
    """

    plates: Mapping[str, ControlStatistics]
    after: Scaler
    own: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in their order."""
        return self.after.names

    @property
    def gaps(self) -> bool:
        """Whether a value that is not finite counts as not measured; else it is an error."""
        return self.after.gaps

    @classmethod
    def fit(
        cls,
        names: Sequence[str],
        controls: Mapping[str, ControlStatistics],
        blocks: Iterable[tuple[str, ArrayLike]],
        *,
        gaps: bool = False,
    ) -> PlateScaler:
        """Fit to pairs of barcode and rows (N, F) of the training side, one in memory at a time.

        ``controls`` are the statistics of its plates, columns as in ``names``. Raises as
        ``Scaler.fit`` does.
        """

        def normalised() -> Iterable[Numbers]:
            for plate, block in blocks:
                yield controls[plate].apply(checked_rows(names, block, gaps))

        after = Scaler.fit(names, normalised(), gaps=gaps)
        there = [name in set(after.names) for name in names]
        return cls({plate: found.of_columns(there) for plate, found in controls.items()}, after)

    def with_own(self, plates: Mapping[str, ControlStatistics]) -> PlateScaler:
        """The same with plates that are not on the training side."""
        own = tuple(sorted({*self.own, *plates}))
        return replace(self, plates={**self.plates, **plates}, own=own)

    def transform(self, rows: ArrayLike, plate: str | None = None) -> NDArray[np.float32]:
        """The (N, F) ``rows`` of cells of the plate ``plate``, normalised, as float32.

        Raises ``UserInputError`` for a plate without statistics, and as ``Scaler.transform`` does.
        """
        values = checked_rows(self.names, rows, self.gaps)
        if plate is None or plate not in self.plates:
            raise UserInputError(
                f"There are no control cells of plate {plate!r} to normalise its features against."
            )
        return self.after.transform(self.plates[plate].apply(values))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers by barcode."""
        plates = {barcode: found.to_json() for barcode, found in self.plates.items()}
        return {
            "kind": NORMALISING_PLATE_CONTROLS,
            "after": self.after.to_json(),
            "plates": plates,
            "own": list(self.own),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PlateScaler:
        """The scaler that :meth:`to_json` described; raises ``UserInputError`` if it is not one."""
        try:
            after = Scaler.from_json(record["after"])
            plates = {
                str(barcode): ControlStatistics.from_json(found)
                for barcode, found in record["plates"].items()
            }
            own = tuple(str(barcode) for barcode in record["own"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserInputError(f"This is not a description of a scaler: {error!r}.") from error
        if any(
            len(item.mean) != len(after.names) or len(item.scale) != len(after.names)
            for item in plates.values()
        ):
            raise UserInputError("The scaler needs one mean and one scale per plate and name.")
        return cls(plates, after, own)


def read_scaler(record: Mapping[str, Any]) -> FeatureScaler:
    """The scaler of ``to_json``'s record, of the kind that it names; raises ``UserInputError``."""
    kind = record.get("kind") if isinstance(record, Mapping) else None
    if kind is None:
        return Scaler.from_json(record)
    if kind != NORMALISING_PLATE_CONTROLS:
        raise UserInputError(f"This cellstore knows no scaler of kind {kind!r}.")
    return PlateScaler.from_json(record)


@dataclass(frozen=True)
class WhiteLevels:
    """The intensities that become 1 in crops, by barcode.

    ``plates``: the white of the plane that was segmented, then that of each channel of the network,
    in grey levels. ``own`` are those of the plates that have no image on the training side.
    """

    plates: Mapping[str, tuple[float, ...]]
    own: tuple[str, ...] = ()

    def with_own(self, plates: Mapping[str, tuple[float, ...]]) -> WhiteLevels:
        """The same with plates that are not on the training side."""
        own = tuple(sorted({*self.own, *plates}))
        return WhiteLevels({**self.plates, **plates}, own)

    def to_json(self) -> dict[str, Any]:
        """Plain lists by barcode."""
        plates = {barcode: list(levels) for barcode, levels in self.plates.items()}
        return {"plates": plates, "own": list(self.own)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> WhiteLevels:
        """What :meth:`to_json` described; raises ``UserInputError`` if it is not that."""
        try:
            plates = {
                str(barcode): tuple(float(level) for level in levels)
                for barcode, levels in record["plates"].items()
            }
            own = tuple(str(barcode) for barcode in record["own"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserInputError(f"This does not describe white levels: {error!r}.") from error
        if not np.isfinite([level for levels in plates.values() for level in levels]).all():
            raise UserInputError("A white level is not a finite number.")
        return cls(plates, own)


def white_of_plate(levels: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The median over images (M) of the white levels (P) of their planes, (M, P) to (P,)."""
    return tuple(np.median(np.asarray(levels, dtype=np.float64), axis=0).tolist())


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
    return _images(source, barcode).where(Well.control == Control.NEGATIVE)


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
