"""Cellpose, of either generation: images in, masks, flows and diameters out.

Needs the extra ``segment`` (Cellpose 3) or ``segment-sam`` (Cellpose 4, SAM).
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import torch
from cellpose.models import CellposeModel
from cellpose.plot import dx_to_circ
from cellpose.utils import diameters as cellpose_diameters

from ..errors import ImageError, UserInputError
from .devices import pick_device
from .segmentation import ModelFiles, SegmentationResult, installed_generation

if TYPE_CHECKING:
    from numpy.typing import NDArray


IMAGES_PER_CALL = 8
"""On a GPU. On a CPU images go one by one: more would only take more memory."""

TILES = 8
"""Tiles of an image that the network sees at once: Cellpose's own ``batch_size``."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Batches:
    """Calls a network with as many images as fit into the memory of its device.

    ``images`` and ``tiles`` (per image) are what a call gets at most. A call that runs out of GPU
    memory is made again with half the images, and, at one image, with half the tiles; the sizes
    that then work are kept, so that a small card is found out once.
    """

    images: int
    tiles: int = TILES

    def run(self, items: Sequence[T], call: Callable[[Sequence[T], int], list[R]]) -> list[R]:
        """Return what ``call(some items, tiles)`` makes of all items, in their order.

        Raises:
            ImageError: an item does not fit even alone and tile by tile. The sizes stay as
                they were: it is the image that is too large, not the batch.
        """
        made: list[R] = []
        while len(made) < len(items):
            left = items[len(made) : len(made) + self.images]
            images, tiles, results = len(left), self.tiles, None
            while results is None:
                try:
                    results = call(left[:images], tiles)
                except torch.cuda.OutOfMemoryError as error:
                    if images == tiles == 1:
                        raise ImageError(
                            "The image does not fit into the memory of the GPU, even alone. "
                            "Segment it with --device cpu."
                        ) from error
                    torch.cuda.empty_cache()
                    images, tiles = (images // 2, tiles) if images > 1 else (1, tiles // 2)
            self.tiles = tiles
            if images < len(left):
                self.images = images
            made += results
        return made


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


# Without a handler Python prints Cellpose's warnings ("no mask pixels found") on stderr.
logging.getLogger("cellpose").addHandler(logging.NullHandler())

# The default, chosen outright: torch warns on every first use by Cellpose while it is unchosen.
torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]

CHANNELS = [2, 32, 64, 128, 256]
"""Width of each level of the standard network of Cellpose 3; the first is its input planes."""

NATIVE_DIAMETER = 30.0
"""Pixels; at this diameter Cellpose 4 leaves an image at its own scale, which is its default."""


class CellposeSegmenter:
    """A Cellpose network with the thresholds it is used at. Same input, same output on a CPU.

    Several images of one size go through the network together where they are scaled alike: with
    a fixed diameter, and for the first look at an estimated one. Cellpose 4 takes cells of any
    size: without a diameter nothing is scaled.
    """

    def __init__(
        self,
        files: ModelFiles,
        flow_threshold: float,
        cellprob_threshold: float,
        diameter: float | None,
        device: str,
        sizes_given: bool = False,
    ) -> None:
        if diameter is not None and not (np.isfinite(diameter) and diameter > 0):
            raise UserInputError(f"The diameter must be above 0 pixels, not {diameter}.")
        self._size_model: SizeModel | None = None
        if installed_generation() == 4:
            self._planes = 1
            self._diameter: float | None = diameter or NATIVE_DIAMETER
            self._model = load_sam_network(files.network, device)
        else:
            self._planes, self._diameter = CHANNELS[0], diameter
            if diameter is None and files.size_model is not None:
                self._size_model = load_size_model(files.size_model)
            elif diameter is None and not sizes_given:
                raise UserInputError(
                    f"The network {files.name} has no size model, so the cell diameter cannot be "
                    "estimated. Give it in pixels with --diameter, or put "
                    f"{files.network.name}_size.npz beside the network."
                )
            self._model = load_network(files.network, device)
        self._thresholds = {
            "flow_threshold": float(flow_threshold),
            "cellprob_threshold": float(cellprob_threshold),
        }
        self.batches = Batches(IMAGES_PER_CALL if self._model.device.type == "cuda" else 1)

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of ``image``, (H, W) or (2, H, W). Raises ImageError for bad pixels."""
        return self.segment_batch([image])[0]

    def segment_batch(
        self, images: Sequence[NDArray[np.float32]], diameters: Sequence[float] | None = None
    ) -> list[SegmentationResult]:
        """Find the cells of each image; see :class:`~.segmentation.Segmenter`."""
        planes = [checked_planes(image, self._planes) for image in images]
        given: Sequence[float | None] = diameters or [None] * len(planes)
        items = list(zip(planes, given, strict=True))
        return [
            result
            for _, alike in groupby(items, key=lambda item: item[0].shape)
            for result in self.batches.run(list(alike), self._segment_alike)
        ]

    def _segment_alike(
        self, items: Sequence[tuple[NDArray[np.float32], float | None]], tiles: int
    ) -> list[SegmentationResult]:
        stack = np.stack([planes for planes, _ in items])
        given = [diameter for _, diameter in items if diameter is not None]
        diameters = given or self.diameters(stack, tiles)
        # Images that are scaled alike go through the network together, others one by one.
        alike = len(set(diameters)) == 1
        results = []
        for part, diameter in zip([stack] if alike else stack[:, None], diameters, strict=False):
            count, shape = len(part), part.shape[1:3]
            masks, (colours, flow, logit), _ = self._model.eval(
                part,
                channel_axis=3,
                diameter=diameter,
                batch_size=tiles * count,
                **self._thresholds,
            )
            masks, logit = masks.reshape(count, *shape), logit.reshape(count, *shape)
            flow = flow.reshape(2, count, *shape)
            for index in range(count):
                # Cellpose scales the colours of a stack as one picture; alone each has its own
                # scale.
                rgb = colours.reshape(*shape, 3) if count == 1 else dx_to_circ(flow[:, index])
                bounded = np.clip(logit[index].astype(np.float64), -60, 60)
                probability = np.rint(255 * (1.0 / (1.0 + np.exp(-bounded)))).astype(np.uint8)
                flows = np.concatenate([rgb, probability[..., None]], axis=-1, dtype=np.uint8)
                results.append(SegmentationResult(consecutive(masks[index]), flows, diameter))
        return results

    def diameters(self, stack: NDArray[np.float32], tiles: int) -> list[float]:
        """Return the cell diameter in pixels of each image of ``stack`` (n, H, W, planes).

        The given one, or Cellpose's two steps: by the style vector, then by the cells found so.
        """
        if self._diameter is not None:
            return [self._diameter] * len(stack)
        if self._size_model is None:
            raise UserInputError("This network has no size model. Give the diameter in pixels.")
        styles = self._model.eval(
            stack,
            channel_axis=3,
            resample=False,
            compute_masks=False,
            batch_size=tiles * len(stack),
        )[-1].reshape(len(stack), -1)
        found = []
        for plane, style in zip(stack, styles, strict=True):
            masks = self._model.eval(
                plane[None],
                channel_axis=3,
                diameter=self._size_model.estimate(np.asarray(style)),
                resample=False,
                interp=False,
                batch_size=tiles,
            )[0]
            measured = float(cellpose_diameters(masks)[0]) if masks.any() else 0.0
            found.append(measured or self._size_model.diam_mean)
        return found


def load_network(path: Path, device: str = "auto") -> CellposeModel:
    """The network in ``path`` on ``device`` (``auto``, ``cpu``, ``cuda``).

    Raises UserInputError if the file is not a standard Cellpose 3 network.
    """
    from cellpose.resnet_torch import CPnet  # not in Cellpose 4

    # Names and shapes first: Cellpose itself would load a foreign file in part.
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
    chosen = pick_device(device)
    # Without mkldnn: plain torch uses oneDNN by itself, and does not convert the network per call.
    return CellposeModel(
        pretrained_model=str(path), device=chosen, gpu=chosen.type != "cpu", mkldnn=False
    )


def load_sam_network(path: Path, device: str = "auto") -> CellposeModel:
    """The Cellpose 4 network in ``path`` on ``device``.

    Raises UserInputError if the file is something else.
    """
    # Cellpose 4 loads whatever names match; a foreign file would leave random weights.
    names = {name.removeprefix("module.") for name in read_state(path)}
    if "W2" not in names:
        raise UserInputError(
            f"{path} is not a Cellpose 4 network, and Cellpose 4 is installed. Choose another "
            "network, such as cpsam; Cellpose 3 networks run where cellstore is installed with: "
            "pip install 'cellstore[segment]'"
        )
    if "encoder.patch_embed.proj.weight" not in names or "encoder.cls_token" in names:
        raise UserInputError(f"{path} is not a Cellpose-SAM network. Choose one such as cpsam.")
    chosen = pick_device(device)
    return CellposeModel(
        pretrained_model=str(path),
        device=chosen,
        gpu=chosen.type != "cpu",
        # Few CPUs have arithmetic for half precision; the others would be slower with it.
        use_bfloat16=chosen.type != "cpu",
    )


def checked_planes(image: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
    """``image``, (H, W) or (2, H, W), as (H, W, 1 or 2), float32, finite.

    Planes of zeros follow its own, up to ``planes`` of them.

    Raises:
        ImageError: it is something else.
    """
    given = np.asarray(image, dtype=np.float32)
    stacked = given[None] if given.ndim == 2 else given
    if stacked.ndim != 3 or len(stacked) > 2 or min(stacked.shape[1:]) < 2:
        raise ImageError(f"Segmentation needs one or two grey planes, not {given.shape} values.")
    if given.ndim == 3 and len(given) != 2:
        raise ImageError(f"Two planes are (2, H, W), not {given.shape}.")
    if not np.isfinite(given).all():
        raise ImageError("The image holds values that are not finite numbers.")
    padding = [(0, 0), (0, 0), (0, max(0, planes - len(stacked)))]
    return np.pad(np.moveaxis(stacked, 0, -1), padding)


def consecutive(masks: NDArray[Any]) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """``masks`` (H, W) with labels 1..n, uint16 if they fit."""
    # The appended 0 keeps an image that is all cells from losing its first one.
    labels: NDArray[np.int64] = np.unique(np.append(masks, 0), return_inverse=True)[1][:-1]
    labels = labels.reshape(masks.shape)
    few = labels.max() <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16) if few else labels.astype(np.uint32)


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a network file, by name, read without running any code in it.

    Raises:
        UserInputError: the file is damaged or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserInputError(
            f"{path} cannot be read as a network: the file is damaged, or it is something else."
        ) from error
    if not isinstance(state, dict):
        raise UserInputError(f"{path} holds no network weights. Choose another file.")
    return state
