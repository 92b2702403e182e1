"""A stand-in for Cellpose in tests: cells are what is brighter than a threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.measure import label

from cellstore.analysis import segmentation
from cellstore.analysis.segmentation import SegmentationResult


class ThresholdSegmenter:
    """Labels the 4-connected regions above ``level``; counts the images it saw.

    Of two planes it looks at the first. ``planes``: the dimensions of the last image.
    """

    def __init__(self, level: float = 100.0) -> None:
        self.level = level
        self.seen = 0
        self.planes = 0

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        self.seen += 1
        self.planes = image.ndim
        image = image[0] if image.ndim == 3 else image
        masks = label(image > self.level, connectivity=1).astype(np.uint16)
        flows = np.zeros((*image.shape, 4), np.uint8)
        flows[..., 3] = np.where(masks > 0, 255, 0)
        return SegmentationResult(masks, flows, 30.0)


def use_threshold(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[str, ThresholdSegmenter]:
    """Make every stage load the stand-in; return the model's path and the stand-in."""
    segmenter = ThresholdSegmenter()

    def load(*_: Any, **__: Any) -> ThresholdSegmenter:
        return segmenter

    monkeypatch.setattr(segmentation, "load_segmenter", load)
    network = folder / "threshold.pt"
    network.write_bytes(b"not a network: the test replaces the loader")
    return str(network), segmenter
