"""The demo's plates in a store, segmented by the truth: real images, no network to wait for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cellpose import dynamics, plot
from numpy.typing import NDArray

from cellstore import demo
from cellstore.analysis import segmentation
from cellstore.analysis.segmentation import SegmentationResult
from cellstore.config import IngestParams, SegmentParams
from cellstore.io.image_files import decode_tiff
from cellstore.jobs.workspace import Workspace
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.measure import measure
from cellstore.stages.segment import segment


class TruthSegmenter:
    """Knows the true masks of the rendered fields, and gives them real Cellpose flows."""

    def __init__(self, plates: demo.DemoPlates) -> None:
        self._masks: dict[str, Path] = {}
        for path in sorted(plates.truth.rglob("*.tif")):
            folder = plates.images / path.parent.name
            planes = [decode_tiff(file) for file in sorted(folder.glob(f"{path.stem}p01-*"))]
            self._masks[_digest(np.median(np.stack(planes), axis=0))] = path

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        masks = decode_tiff(self._masks[_digest(image)])
        flow = dynamics.masks_to_flows(masks)
        flows = np.zeros((*masks.shape, 4), np.uint8)
        flows[..., :3] = plot.dx_to_circ(flow)
        flows[..., 3] = np.where(masks > 0, 250, 5)
        return SegmentationResult(masks.astype(np.uint16), flows, 26.0)


def _digest(plane: NDArray[Any]) -> str:
    return hashlib.sha256(plane.astype(np.float32).tobytes()).hexdigest()


def fill(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch, **render: Any
) -> demo.DemoPlates:
    """Render the demo's plates, and ingest, segment (by the truth) and measure them."""
    plates = demo.render_plates(folder, **render)
    truth = TruthSegmenter(plates)
    monkeypatch.setattr(segmentation, "load_segmenter", lambda *_, **__: truth)
    network = folder / "truth.pt"
    network.write_bytes(b"the truth")
    ingest(workspace, plates.metadata, IngestParams(images=plates.images))
    segment(workspace, SegmentParams.of("published", model=str(network)))
    measure(workspace)
    return plates
