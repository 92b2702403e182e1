"""Cellpose 4 (SAM) behind the :class:`~cellstore.analysis.segmentation.Segmenter` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellpose.models import CellposeModel

from ..errors import UserInputError
from .cellpose_common import StackSegmenter, check_diameter, read_state
from .devices import pick_device
from .segmentation import ModelFiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


NATIVE_DIAMETER = 30.0
"""Pixels; at this diameter Cellpose 4 leaves an image at its own scale, which is its default."""


class CellposeSamSegmenter(StackSegmenter):
    """A Cellpose 4 network. It takes cells of any size: without a diameter nothing is scaled."""

    def __init__(
        self,
        files: ModelFiles,
        flow_threshold: float,
        cellprob_threshold: float,
        diameter: float | None,
        device: str,
    ) -> None:
        check_diameter(diameter)
        _check_network(files.network)
        self._diameter = diameter or NATIVE_DIAMETER
        chosen = pick_device(device)
        model = CellposeModel(
            pretrained_model=str(files.network),
            device=chosen,
            gpu=chosen.type != "cpu",
            # Few CPUs have arithmetic for half precision; the others would be slower with it.
            use_bfloat16=chosen.type != "cpu",
        )
        super().__init__(model, flow_threshold, cellprob_threshold, chosen)

    def diameters(self, stack: NDArray[np.float32], tiles: int) -> list[float]:
        """The diameter every image is scaled by."""
        return [self._diameter] * len(stack)


def _check_network(path: Path) -> None:
    """Cellpose 4 loads whatever names match; a foreign file would leave random weights."""
    state: dict[str, Any] = read_state(path)
    names = {name.removeprefix("module.") for name in state}
    if "W2" not in names:
        raise UserInputError(
            f"{path} is not a Cellpose 4 network, and Cellpose 4 is installed. Choose another "
            "network, such as cpsam; Cellpose 3 networks run where cellstore is installed with: "
            "pip install 'cellstore[segment]'"
        )
    if "encoder.patch_embed.proj.weight" not in names or "encoder.cls_token" in names:
        raise UserInputError(f"{path} is not a Cellpose-SAM network. Choose one such as cpsam.")
