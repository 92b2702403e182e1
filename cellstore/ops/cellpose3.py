"""Cellpose 3 behind the :class:`~cellstore.ops.segmentation.Segmenter` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cellpose.models import CellposeModel
from cellpose.resnet_torch import CPnet
from cellpose.utils import diameters

from cellstore.errors import UserInputError

from .cellpose_size import load_size_model
from .cellpose_stacks import StackSegmenter, check_diameter, read_state
from .devices import pick_device
from .segmentation import ModelFiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
