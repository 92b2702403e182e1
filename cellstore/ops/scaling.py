"""Standardisation of the tabular features, fitted block by block on the training side.

What other tools measured has gaps. A scaler that is told so ignores them: means and deviations
are those of the values that are there, and a value that is not there becomes 0, the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError

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
