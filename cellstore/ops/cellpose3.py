"""Cellpose 3 behind the :class:`~cellstore.ops.segmentation.Segmenter` protocol."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cellpose.models import CellposeModel
from cellpose.resnet_torch import CPnet
from cellpose.utils import diameters

from cellstore.errors import ImageError, UserInputError

from .cellpose_size import load_size_model
from .segmentation import ModelFiles, SegmentationResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Without a handler Python prints Cellpose's warnings ("no mask pixels found") on stderr.
logging.getLogger("cellpose").addHandler(logging.NullHandler())

# The default, chosen outright: torch warns on every first use by Cellpose while it is unchosen.
torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]

GREY = [0, 0]
"""Cellpose's channel choice for one grey plane without a second, nuclear one."""

CHANNELS = [2, 32, 64, 128, 256]
"""Width of each level of the standard network; the first is its number of input planes."""


class CellposeSegmenter:
    """A Cellpose 3 network with the thresholds it is used at. Same input, same output on a CPU."""

    def __init__(
        self,
        files: ModelFiles,
        flow_threshold: float,
        cellprob_threshold: float,
        diameter: float | None,
        device: str,
    ) -> None:
        _check_diameter(files, diameter)
        self._thresholds = {
            "flow_threshold": float(flow_threshold),
            "cellprob_threshold": float(cellprob_threshold),
        }
        self._diameter = diameter
        self._size_model = None
        if diameter is None and files.size_model is not None:
            self._size_model = load_size_model(files.size_model)
        self._model = load_network(files.network, device)

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of ``image`` (H, W). Raises ImageError for unusable pixels."""
        plane = _checked_plane(image)
        diameter = self._diameter or self.estimate_diameter(plane)
        masks, flows, _ = self._model.eval(
            plane, channels=GREY, diameter=diameter, **self._thresholds
        )
        rendered = _rendered_flows(flows[0], flows[2]).reshape(*plane.shape, 4)
        return SegmentationResult(_consecutive(masks.reshape(plane.shape)), rendered, diameter)

    def estimate_diameter(self, plane: NDArray[np.float32]) -> float:
        """Cellpose's two steps: regression on the style, then the median of a first pass."""
        if self._size_model is None:
            raise UserInputError("This network has no size model. Give the diameter in pixels.")
        style = self._model.eval(plane, channels=GREY, resample=False, compute_masks=False)[-1]
        guess = self._size_model.estimate(np.asarray(style))
        masks = self._model.eval(
            plane, channels=GREY, diameter=guess, resample=False, interp=False
        )[0]
        measured = float(diameters(masks)[0]) if masks.any() else 0.0
        return measured or self._size_model.diam_mean


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


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises UserInputError for one that is not there."""
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    if device not in {"cpu", "cuda"}:
        raise UserInputError(f"Unknown device {device!r}. Use auto, cpu or cuda.")
    if device == "cuda" and not available:
        raise UserInputError("This machine has no usable CUDA device. Use cpu or auto.")
    return torch.device(device)


def _check_diameter(files: ModelFiles, diameter: float | None) -> None:
    if diameter is None and files.size_model is None:
        raise UserInputError(
            f"The network {files.name} has no size model, so the cell diameter cannot be "
            f"estimated. Give it in pixels with --diameter, or put {files.network.name}_size.npz "
            "beside the network."
        )
    if diameter is not None and not (np.isfinite(diameter) and diameter > 0):
        raise UserInputError(f"The diameter must be above 0 pixels, not {diameter}.")


def _check_network(path: Path) -> None:
    """Look at names and shapes first: Cellpose itself would load a foreign file in part."""
    state = _read_state(path)
    if "W2" in state:
        raise UserInputError(f"{path} is a Cellpose 4 network; cellstore runs Cellpose 3 ones.")
    expected = CPnet(list(CHANNELS), 3, sz=3).state_dict()
    # Networks of before Cellpose 2 do not hold their diameters.
    wanted = {k: v.shape for k, v in expected.items() if not k.startswith("diam_")}
    found = {k: getattr(v, "shape", None) for k, v in state.items() if k in wanted}
    if found != wanted:
        raise UserInputError(
            f"{path} is not a standard Cellpose 3 network with two input planes. "
            "Choose another file, or a name such as cellstore-nuclei."
        )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserInputError(
            f"{path} cannot be read as a network: the file is damaged, or it is something else."
        ) from error
    if not isinstance(state, dict):
        raise UserInputError(f"{path} holds no network weights. Choose another file.")
    return state


def _checked_plane(image: NDArray[np.float32]) -> NDArray[np.float32]:
    plane = np.ascontiguousarray(image, dtype=np.float32)
    if plane.ndim != 2 or min(plane.shape) < 2:
        raise ImageError(f"Segmentation needs one grey plane, not an array of {plane.shape}.")
    if not np.isfinite(plane).all():
        raise ImageError("The image holds values that are not finite numbers.")
    return plane


def _consecutive(masks: NDArray[Any]) -> NDArray[np.uint16] | NDArray[np.uint32]:
    # The appended 0 keeps an image that is all cells from losing its first one.
    labels: NDArray[np.int64] = np.unique(np.append(masks, 0), return_inverse=True)[1][:-1]
    labels = labels.reshape(masks.shape)
    few = labels.max() <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16) if few else labels.astype(np.uint32)


def _rendered_flows(rgb: NDArray[np.uint8], logit: NDArray[np.float32]) -> NDArray[np.uint8]:
    probability = 1.0 / (1.0 + np.exp(-np.clip(logit.astype(np.float64), -60, 60)))
    return np.concatenate(
        [rgb, np.rint(255 * probability).astype(np.uint8)[..., None]], axis=-1, dtype=np.uint8
    )
