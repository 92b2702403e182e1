"""A Cellpose network that nobody trained, for tests that need a file of one."""

from __future__ import annotations

from pathlib import Path

import torch
from cellpose.resnet_torch import CPnet

from cellstore.analysis.segmentation import CHANNELS
from cellstore.learn.finetuning import half_precision

DIAM_MEAN = 17.0


def new_network(seed: int) -> CPnet:
    """Return an untrained network; the seed fixes it."""
    torch.manual_seed(seed)
    return CPnet(list(CHANNELS), 3, sz=3, diam_mean=DIAM_MEAN)


def save_network(net: CPnet, path: Path) -> None:
    """Write the state of ``net`` with its floats in half precision."""
    torch.save(half_precision(net), path)
