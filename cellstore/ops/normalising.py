"""Normalisation plate by plate: features against control cells, intensities against a white.

Plates differ in staining, exposure and density. The negative controls of a plate went through all
of that without a treatment: what a cell differs from them in is more of biology and less of the
plate. This is ``pycytominer.normalize(samples=<controls>, method="standardize")`` plate by plate
(Serrano et al. 2025, Nature Methods 22, 677). Its ``mad_robustize`` (median and MAD) minds odd
cells less, but needs all control cells of a plate at once in memory; means and deviations do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError
from cellstore.ops.scaling import FeatureScaler, Moments, Numbers, Scaler, checked_rows

PLATE_CONTROLS = "plate-controls"
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
            "kind": PLATE_CONTROLS,
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
    if kind != PLATE_CONTROLS:
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
