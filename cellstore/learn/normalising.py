"""What is fitted on the training subset: how features are scaled, and how intensities are.

Both may be fitted plate by plate. A plate without images in the training subset, one that was
excluded or came later, has its own control cells and its own images, and they are used: that takes
no label of any treated cell. :func:`describe_plates` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.session import Database
from ..enums import Control, Subset
from ..errors import ImageError, UserInputError
from ..jobs.lookup import IS_CURRENT
from ..jobs.planes import read_image
from ..models import Image, Plate, Segmentation, SplitMember, Well
from ..query.cells import CellSource, read_cells, stream_features
from ..query.exclusions import image_counts

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Mean and scale of each column, over so many cells; ``None`` for a column without a value."""

    mean: tuple[float | None, ...]
    scale: tuple[float | None, ...]
    cells: int

    def apply(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(x - mean) / scale``, (N, F)."""
        mean, scale = (np.array(v, dtype=np.float64) for v in (self.mean, self.scale))
        scaled: NDArray[np.float64] = (rows - mean) / scale
        return scaled


FEWEST_CONTROLS = 2
"""Control cells that a plate must have: one alone has no deviation."""


def fit_scale(names: Sequence[str], blocks: Iterable[ArrayLike], *, gaps: bool = False) -> Scale:
    """Return mean and scale of blocks of rows, (N, F) each, of which one at a time is in memory.

    As scikit-learn's ``StandardScaler``: the population standard deviation, 1 for a column that
    never varies. ``gaps``: a value that is not finite is not there; else it is an error.
    """
    # Blocks are merged as in Chan, Golub and LeVeque (1983). StandardScaler.partial_fit does the
    # same, but loses a column for good once a block has no value of it.
    count, mean, squares = (np.zeros(len(names)) for _ in range(3))
    cells = 0
    for block in blocks:
        rows = checked_rows(names, block, gaps)
        cells += len(rows)
        there = np.isfinite(rows)
        added = there.sum(axis=0)
        own_mean = np.where(there, rows, 0.0).sum(axis=0) / np.maximum(added, 1)
        own_squares = (np.where(there, rows - own_mean, 0.0) ** 2).sum(axis=0)
        total = np.maximum(count + added, 1)
        step = own_mean - mean
        squares = squares + own_squares + step**2 * (count * added / total)
        mean = mean + step * (added / total)
        count = count + added
    deviation = np.sqrt(squares / np.maximum(count, 1))
    # A constant column keeps rounding noise in place of an exact 0.
    varies = deviation > 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1e-300)
    scale = np.where(varies, deviation, 1.0)
    pairs = [
        (own_mean, own_scale) if number else (None, None)
        for number, own_mean, own_scale in zip(count, mean.tolist(), scale.tolist(), strict=True)
    ]
    return Scale(tuple(m for m, _ in pairs), tuple(s for _, s in pairs), cells)


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


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale`` for each named column, and the intensities that become 1 in crops.

    ``gaps``: a value that is not finite counts as not measured and becomes 0 (the mean); else it is
    an error. ``plates``: by barcode the scale of the control cells of a plate, by which its
    features are normalised first; ``None``: all plates are alike. ``intensities``: by barcode, in
    grey levels, that of the plane that was segmented, then that of each channel of the network;
    ``None``: each image has its own. ``own``: the plates without an image in the training subset.
    """

    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    gaps: bool = False
    plates: Mapping[str, Scale] | None = None
    intensities: Mapping[str, tuple[float, ...]] | None = None
    own: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls, names: Sequence[str], blocks: Iterable[ArrayLike], *, gaps: bool = False
    ) -> Scaler:
        """Fit to ``blocks`` of rows; see :func:`fit_scale`.

        With ``gaps``, a column without a single finite value is not among the names of the scaler.
        """
        found = fit_scale(names, blocks, gaps=gaps)
        columns = zip(names, found.mean, found.scale, strict=True)
        known = [(name, mean, scale) for name, mean, scale in columns if mean is not None]
        if not known:
            raise UserInputError("There are no cells to scale features on; measure images first.")
        kept, means, scales = zip(*known, strict=True)
        return cls(kept, means, scales, gaps)

    @classmethod
    def fit_plates(
        cls,
        names: Sequence[str],
        controls: Mapping[str, Scale],
        blocks: Iterable[tuple[str, ArrayLike]],
        *,
        gaps: bool = False,
    ) -> Scaler:
        """Fit to pairs of barcode and rows (N, F), once they are normalised by ``controls``."""
        normalised = (
            controls[plate].apply(checked_rows(names, block, gaps)) for plate, block in blocks
        )
        fitted = cls.fit(names, normalised, gaps=gaps)
        kept = np.isin(names, fitted.names)
        plates = {}
        for plate, found in controls.items():
            mean, scale = (tuple(np.array(v)[kept].tolist()) for v in (found.mean, found.scale))
            plates[plate] = Scale(mean, scale, found.cells)
        return replace(fitted, plates=plates)

    def transform(self, rows: ArrayLike, plate: str | None = None) -> NDArray[np.float32]:
        """Return the (N, F) ``rows`` of cells of one plate (its barcode), scaled, as float32."""
        values = checked_rows(self.names, rows, self.gaps)
        if self.plates is not None:
            if plate is None or plate not in self.plates:
                raise UserInputError(
                    f"There are no control cells of plate {plate!r} to normalise its features "
                    "against."
                )
            values = self.plates[plate].apply(values)
        scaled: Numbers = (values - np.array(self.mean)) / np.array(self.scale)
        return np.nan_to_num(scaled, copy=False, nan=0.0).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Return a record that ``json.dumps`` takes as it is."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Scaler:
        """Return what :meth:`to_json` described; raises ``UserInputError`` if it is not one."""
        try:
            plates, intensities = record["plates"], record["intensities"]
            if plates is not None:
                plates = {
                    plate: Scale(tuple(one["mean"]), tuple(one["scale"]), one["cells"])
                    for plate, one in plates.items()
                }
            if intensities is not None:
                intensities = {plate: tuple(values) for plate, values in intensities.items()}
            lists = {name: tuple(record[name]) for name in ("names", "mean", "scale", "own")}
            found = cls(**lists, gaps=record["gaps"], plates=plates, intensities=intensities)
            for one in (found, *(plates or {}).values()):
                numbers = np.array([one.mean, one.scale], dtype=np.float64)  # NaN of null
                odd = np.isinf(numbers) if isinstance(one, Scale) else ~np.isfinite(numbers)
                if numbers.shape[1] != len(found.names) or odd.any() or (numbers[1] <= 0).any():
                    raise ValueError("it needs one finite mean and one scale above 0 per name")
            scales = [value for values in (intensities or {}).values() for value in values]
            if not np.isfinite(scales).all():
                raise ValueError("an intensity scale is not a finite number")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserInputError(f"This is not a description of a scaler: {error!r}.") from error
        return found


def fit_inputs(
    session: Session,
    database: Database,
    source: CellSource,
    normalise: str | None,
    planes: Sequence[ImageInput] = (),
    also: Sequence[Subset] = (),
) -> Scaler:
    """Fit a scaler on the training subset of the split of ``source``.

    ``normalise``: all columns of ``source.features``, as the training subset is spread (``train``),
    or first against the negative controls of their plate (``plate-controls``); ``None``: no
    column. ``planes``: the plane that was segmented, then one for each channel of the network,
    whose intensities are scaled plate by plate; none: they are not. ``also``: other subsets whose
    plates will be read.

    The intensity of a plate is the median over at most 32 images of it, always the same ones, of
    the 99.9th percentile. Images that cannot be read do not count.
    """
    columns, gaps = source.features.columns, source.features.has_gaps
    training, scaler = replace(source, subset=Subset.TRAIN), Scaler()
    by_plate = normalise == "plate-controls" or bool(planes)
    plates = plates_of(session, training) if by_plate else []
    if normalise == "train":
        scaler = Scaler.fit(columns, stream_features(session, training, columns), gaps=gaps)
    elif normalise is not None:
        # How a plate looks is said by all of its controls, whichever cells are learned from.
        controls = _controls(session, replace(training, chosen=None), plates, columns)
        blocks = ((b, rows) for b in controls for rows in _features(session, training, b, columns))
        scaler = Scaler.fit_plates(columns, controls, blocks, gaps=gaps)
    if planes:
        known = {b: _intensities(session, database, training, planes, b) for b in plates}
        scaler = replace(scaler, intensities=known)
    if not by_plate:
        return scaler
    others = {b for subset in also for b in plates_of(session, replace(source, subset=subset))}
    return add_plates(session, database, source, planes, scaler, sorted(others - set(plates)))


def add_plates(
    session: Session,
    database: Database,
    source: CellSource,
    planes: Sequence[ImageInput],
    scaler: Scaler,
    plates: Sequence[str],
) -> Scaler:
    """Return ``scaler`` with plates that have no image in the training subset.

    Their statistics are those of all their control cells, and of all their images, whatever a split
    says of them. Raises as :func:`fit_inputs` does.
    """
    everywhere = replace(source, split_id=None, subset=None, plates=(), chosen=None)
    controls, intensities, own = scaler.plates, scaler.intensities, set(scaler.own)
    if controls is not None:
        new = [plate for plate in plates if plate not in controls]
        found = _controls(session, everywhere, new, scaler.names)
        controls, own = {**controls, **found}, own | found.keys()
    if intensities is not None:
        new = [plate for plate in plates if plate not in intensities]
        bright = {b: _intensities(session, database, everywhere, planes, b) for b in new}
        intensities, own = {**intensities, **bright}, own | bright.keys()
    return replace(scaler, plates=controls, intensities=intensities, own=tuple(sorted(own)))


def describe_plates(scaler: Scaler, plates: Collection[str] | None = None) -> list[str]:
    """Return sentences on plates that are normalised by what is on themselves.

    ``plates``: of these only.
    """
    notes = []
    for known, what in (
        (scaler.plates, "are normalised against their own negative controls"),
        (scaler.intensities, "have the intensity scale of their own images"),
    ):
        there = set(known or ()) if plates is None else set(known or ()) & set(plates)
        own = [name for name in scaler.own if name in there]
        if own:
            more = f" and {len(own) - 5} more" if len(own) > 5 else ""
            some = ", ".join(own[:5]) + more
            notes.append(f"Plates without images in the training subset {what}: {some}.")
    return notes


def plates_of(session: Session, source: CellSource) -> list[str]:
    """Return the barcodes of the plates of a source's images that were segmented, sorted."""
    found = session.scalars(_images(source).with_only_columns(Plate.barcode).distinct())
    return sorted(found)  # in Python: databases sort texts each in their own way


def _images(source: CellSource, barcode: str | None = None) -> Select[Any]:
    query = (
        select(Image.id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(Segmentation, IS_CURRENT)
        .where(Segmentation.recipe_id == source.segment_id, image_counts(source.unflagged_by))
    )
    if barcode is not None:
        query = query.where(Plate.barcode == barcode)
    if source.split_id is not None:
        member = SplitMember.image_id == Image.id
        query = query.join(SplitMember, member).where(SplitMember.split_id == source.split_id)
        if source.subset is not None:
            query = query.where(SplitMember.subset == source.subset)
    return query


def _features(
    session: Session,
    source: CellSource,
    barcode: str,
    columns: Sequence[str],
    *,
    controls: bool = False,
) -> Iterator[Numbers]:
    """Yield the features of the cells of a plate, or of its negative controls, image by image."""
    query, reader = _images(source, barcode), source.reader()
    if controls:
        query = query.where(Well.control == Control.NEGATIVE)
    for image_id in session.scalars(query.order_by(Image.id)).all():
        yield read_cells(session, source, image_id, columns, reader).features


def _controls(
    session: Session, source: CellSource, plates: Sequence[str], columns: Sequence[str]
) -> dict[str, Scale]:
    """The scale of the control cells of each plate that has cells."""
    found: dict[str, Scale] = {}
    for plate in plates:
        if not any(len(rows) for rows in _features(session, source, plate, ())):
            continue
        blocks = _features(session, source, plate, columns, controls=True)
        found[plate] = fit_scale(columns, blocks, gaps=source.features.has_gaps)
        cells = found[plate].cells
        if cells < FEWEST_CONTROLS:
            where = " in the training subset" if source.subset is Subset.TRAIN else ""
            raise UserInputError(
                f"Plate {plate!r} has {cells} measured cells of negative controls{where}, and "
                f"needs {FEWEST_CONTROLS} or more to be normalised against them. Mark its controls "
                "as negcon in its treatment table, or train with --normalise train."
            )
    return found


def _intensities(
    session: Session,
    database: Database,
    source: CellSource,
    planes: Sequence[ImageInput],
    barcode: str,
) -> tuple[float, ...]:
    # By content: as good as drawn, and the same on every database.
    query = _images(source, barcode).where(Image.content_sha256.is_not(None))
    chosen = query.order_by(Image.content_sha256, Image.id).limit(32)
    from .crops import image_scale  # torch loads slowly

    of_images, problems = [], []
    for image_id in session.scalars(chosen).all():
        try:
            of_images.append([image_scale(read_image(database, image_id, p)) for p in planes])
        except ImageError as error:
            problems.append(str(error))
    if not of_images:
        raise ImageError(
            f"No image of plate {barcode!r} can be read for its intensity scale. "
            f"{problems[0] if problems else 'Its files are missing: ingest them with --images.'}"
        )
    return tuple(np.median(np.array(of_images), axis=0).tolist())
