"""Cellpose 3 behind the :class:`~cellstore.analysis.segmentation.Segmenter` protocol."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from cellpose.models import CellposeModel
from cellpose.resnet_torch import CPnet
from cellpose.utils import diameters

from ..errors import UserInputError
from .cellpose_common import StackSegmenter, check_diameter, read_state
from .devices import pick_device
from .segmentation import ModelFiles

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


CHANNELS = [2, 32, 64, 128, 256]
"""Width of each level of the standard network; the first is its number of input planes."""


class CellposeSegmenter(StackSegmenter):
    """A Cellpose 3 network with the thresholds it is used at. Same input, same output on a CPU.

    Several images of one size go through the network together where they are scaled alike: with
    a fixed diameter, and for the first look at an estimated one.
    """

    planes = CHANNELS[0]

    def __init__(
        self,
        files: ModelFiles,
        flow_threshold: float,
        cellprob_threshold: float,
        diameter: float | None,
        device: str,
        sizes_given: bool = False,
    ) -> None:
        if not sizes_given:
            _check_size_model(files, diameter)
        check_diameter(diameter)
        self._diameter = diameter
        self._size_model = None
        if diameter is None and files.size_model is not None:
            self._size_model = load_size_model(files.size_model)
        model = load_network(files.network, device)
        super().__init__(model, flow_threshold, cellprob_threshold, model.device)

    def diameters(self, stack: NDArray[np.float32], tiles: int) -> list[float]:
        """The given diameter, or Cellpose's two steps for each image of ``stack``."""
        if self._diameter is not None:
            return [self._diameter] * len(stack)
        if self._size_model is None:
            raise UserInputError("This network has no size model. Give the diameter in pixels.")
        size = self._size_model
        styles = self._model.eval(
            stack,
            channel_axis=3,
            resample=False,
            compute_masks=False,
            batch_size=tiles * len(stack),
        )[-1].reshape(len(stack), -1)
        guesses = [size.estimate(np.asarray(style)) for style in styles]
        return [
            self._measured(plane, guess, tiles) or size.diam_mean
            for plane, guess in zip(stack, guesses, strict=True)
        ]

    def _measured(self, plane: NDArray[np.float32], guess: float, tiles: int) -> float:
        """The median diameter of the cells found at a first ``guess``; 0 without cells."""
        masks = self._model.eval(
            plane[None],
            channel_axis=3,
            diameter=guess,
            resample=False,
            interp=False,
            batch_size=tiles,
        )[0]
        return float(diameters(masks)[0]) if masks.any() else 0.0


def load_network(path: Path, device: str = "auto") -> CellposeModel:
    """The network in ``path`` on ``device`` (``auto``, ``cpu``, ``cuda``).

    Raises UserInputError if the file is not a standard Cellpose 3 network.
    """
    _check_network(path)
    chosen = pick_device(device)
    # Without mkldnn: plain torch uses oneDNN by itself, and does not convert the network per call.
    return CellposeModel(
        pretrained_model=str(path), device=chosen, gpu=chosen.type != "cpu", mkldnn=False
    )


def _check_size_model(files: ModelFiles, diameter: float | None) -> None:
    if diameter is None and files.size_model is None:
        raise UserInputError(
            f"The network {files.name} has no size model, so the cell diameter cannot be "
            f"estimated. Give it in pixels with --diameter, or put {files.network.name}_size.npz "
            "beside the network."
        )


def _check_network(path: Path) -> None:
    """Look at names and shapes first: Cellpose itself would load a foreign file in part."""
    state = read_state(path)
    if "W2" in state:
        raise UserInputError(
            f"{path} is a Cellpose 4 network, and Cellpose 3 is installed. Choose another network, "
            "or use it where cellstore is installed with: pip install 'cellstore[segment-sam]'"
        )
    expected = CPnet(list(CHANNELS), 3, sz=3).state_dict()
    # Networks of before Cellpose 2 do not hold their diameters.
    wanted = {k: v.shape for k, v in expected.items() if not k.startswith("diam_")}
    found = {k: getattr(v, "shape", None) for k, v in state.items() if k in wanted}
    if found != wanted:
        raise UserInputError(
            f"{path} is not a standard Cellpose 3 network with two input planes. "
            "Choose another file, or a name such as cellstore-nuclei."
        )
