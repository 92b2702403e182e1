"""The diameter of the cells of an image, from the style vector of a Cellpose 3 network.

A size model is a linear regression of the logarithm of the diameter on the style vector
(Stringer et al. 2021, doi:10.1038/s41592-020-01018-x). Cellpose stores its own as a pickle;
here such a file is read by an unpickler that can make arrays and numbers, nothing else, and
ours is stored as plain arrays.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cellstore.errors import UserInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST_DIAMETER = 5.0
"""Pixels; Cellpose's own lower bound of an estimate."""


@dataclass(frozen=True)
class SizeModel:
    """``log(diameter / diam_mean) = weights @ (style - style_mean) + offset``.

    ``weights`` and ``style_mean``: (256,) float64. ``diam_mean``: pixels.
    """

    weights: NDArray[np.float64]
    style_mean: NDArray[np.float64]
    offset: float
    diam_mean: float

    def estimate(self, style: NDArray[np.floating[Any]]) -> float:
        """Diameter in pixels for a style vector (256,)."""
        logarithm = float(self.weights @ (style.astype(np.float64) - self.style_mean))
        diameter = float(np.exp(logarithm + self.offset)) * self.diam_mean
        return max(SMALLEST_DIAMETER, diameter) if np.isfinite(diameter) else self.diam_mean


def fit_size_model(
    styles: NDArray[np.floating[Any]],
    diameters: NDArray[np.floating[Any]],
    diam_mean: float,
    ridge: float = 1.0,
) -> SizeModel:
    """Ridge regression of log diameter on ``styles`` (n, 256); ``diameters`` (n,) in pixels."""
    style_mean = styles.mean(axis=0, dtype=np.float64)
    target = np.log(diameters.astype(np.float64) / diam_mean)
    centred = styles.astype(np.float64) - style_mean
    normal = centred.T @ centred + ridge * np.eye(centred.shape[1])
    weights = np.linalg.solve(normal, centred.T @ (target - target.mean()))
    return SizeModel(weights, style_mean, float(target.mean()), diam_mean)


def save_size_model(path: Path | BinaryIO, model: SizeModel) -> None:
    """Write ``model`` as an ``.npz`` of plain arrays, under the names Cellpose uses.

    ``path`` may be an open file.
    """
    np.savez(
        path,
        A=model.weights,
        smean=model.style_mean,
        ymean=np.float64(model.offset),
        diam_mean=np.float64(model.diam_mean),
    )


def load_size_model(path: Path) -> SizeModel:
    """Read an ``.npz`` of ours or an ``.npy`` of Cellpose.

    Raises UserInputError if the file is not a size model, or holds anything but numbers.
    """
    try:
        values = _read_npz(path) if path.suffix == ".npz" else _read_npy(path)
        return _size_model(values)
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, IndexError) as error:
        raise _refused(path, error) from error
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, MemoryError) as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> UserInputError:
    return UserInputError(
        f"{path} is not a Cellpose size model ({error}). Train one with the network, "
        f"or remove the file and give the diameter."
    )


def _size_model(values: Mapping[str, Any]) -> SizeModel:
    weights = np.asarray(values["A"], np.float64).ravel()
    style_mean = np.asarray(values["smean"], np.float64).ravel()
    offset, diam_mean = float(values["ymean"]), float(values["diam_mean"])
    finite = np.isfinite(weights).all() and np.isfinite(style_mean).all()
    if weights.shape != style_mean.shape or not finite or not diam_mean > 0:
        raise ValueError("its arrays do not fit together")
    return SizeModel(weights, style_mean, offset, diam_mean)


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("A", "smean", "ymean", "diam_mean")}


def _read_npy(path: Path) -> dict[str, Any]:
    """The dictionary inside Cellpose's 0-dimensional object array."""
    with path.open("rb") as file:
        _skip_header(file)
        array = _NumbersOnly(file).load()
    content = array.item()
    if not isinstance(content, dict):
        raise TypeError("it holds no dictionary")
    return content


def _skip_header(file: BinaryIO) -> None:
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    if version == (1, 0):
        np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
    else:
        np.lib.format.read_array_header_2_0(file)  # type: ignore[no-untyped-call]


def _empty_array(kind: object, shape: tuple[int, ...], _code: object) -> NDArray[Any]:
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("unexpected array type")
    return np.ndarray((0,), np.int8)


class _NumbersOnly(pickle.Unpickler):
    """Rebuilds numpy arrays, numpy numbers and plain containers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return _empty_array
            case "numpy.core.multiarray", "scalar":
                return _numpy_scalar
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a number")


def _numpy_scalar(dtype: np.dtype[Any], data: bytes = b"") -> Any:
    if dtype.hasobject or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("unexpected scalar")
    return np.frombuffer(data, dtype)[0]
