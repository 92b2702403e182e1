"""Standardisation of the tabular features, fitted block by block on the training side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale`` for each named column, as scikit-learn's ``StandardScaler``.

    ``mean`` and ``scale`` have one number per name; ``scale`` is the population standard
    deviation, or 1 for a column that never varies.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def fit(cls, names: Sequence[str], blocks: Iterable[ArrayLike]) -> Scaler:
        """Fit to ``blocks`` of rows, each (N, F), of which one at a time is in memory.

        Means and variances are merged as in Chan, Golub and LeVeque (1983), in float64.

        Raises ``UserInputError`` where there is no row at all, a block is not (N, F), or a
        value is not finite: no value is made up for one that was not measured.
        """
        count, mean, squares = 0, np.zeros(len(names)), np.zeros(len(names))
        for block in blocks:
            rows = _checked(names, block)
            if len(rows):
                count, mean, squares = _merge(count, mean, squares, rows)
        if count == 0:
            raise UserInputError("There are no cells to scale features on; measure images first.")
        deviation = np.sqrt(squares / count)
        # A constant column keeps rounding noise in place of an exact 0.
        varies = deviation > 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1e-300)
        scale = np.where(varies, deviation, 1.0)
        return cls(tuple(names), tuple(mean.tolist()), tuple(scale.tolist()))

    def transform(self, rows: ArrayLike) -> NDArray[np.float32]:
        """The (N, F) ``rows`` scaled, as float32; raises as :meth:`fit` does."""
        values = _checked(self.names, rows)
        scaled: NDArray[np.float64] = (values - np.array(self.mean)) / np.array(self.scale)
        return scaled.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Names, means and scales as plain lists."""
        return {"names": list(self.names), "mean": list(self.mean), "scale": list(self.scale)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Scaler:
        """The scaler that :meth:`to_json` described; raises ``UserInputError`` if it is not one."""
        try:
            names = tuple(str(name) for name in record["names"])
            mean = tuple(float(value) for value in record["mean"])
            scale = tuple(float(value) for value in record["scale"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserInputError(f"This is not a description of a scaler: {error!r}.") from error
        usable = np.isfinite([*mean, *scale]).all() and all(value > 0 for value in scale)
        if not len(names) == len(mean) == len(scale) or not usable:
            raise UserInputError("The scaler needs one finite mean and one scale above 0 per name.")
        return cls(names, mean, scale)


def _checked(names: Sequence[str], block: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(block, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise UserInputError(
            f"Features must have the shape (cells, {len(names)}), these have {rows.shape}."
        )
    finite = np.isfinite(rows).all(axis=0)
    if not finite.all():
        bad = ", ".join(name for name, good in zip(names, finite, strict=True) if not good)
        raise UserInputError(
            f"Some cells have no finite value of {bad}; exclude them or measure them again."
        )
    return rows


Moments = tuple[int, NDArray[np.float64], NDArray[np.float64]]


def _merge(
    count: int,
    mean: NDArray[np.float64],
    squares: NDArray[np.float64],
    rows: NDArray[np.float64],
) -> Moments:
    block_mean = rows.mean(axis=0)
    block_squares = ((rows - block_mean) ** 2).sum(axis=0)
    total = count + len(rows)
    step = block_mean - mean
    merged = squares + block_squares + step**2 * (count * len(rows) / total)
    return total, mean + step * (len(rows) / total), merged
