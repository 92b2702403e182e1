"""A training that kills itself: ``python tests/killed_training.py STORE EPOCHS``."""

from __future__ import annotations

import os
import signal
import sys

import torch

from cellstore.config import TrainParams
from cellstore.settings import Progress
from cellstore.store import Store

PARAMS = TrainParams.of(
    "published",
    branches=("tabular",),
    batch_size=3,
    epochs=5,
    patience=9,
    learning_rate=0.01,
    crop_size=8,
)
"""Five short epochs of a network that looks at features only."""


class Kills(Progress):
    """Ends the process at once, after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def note(self, text: str) -> None:
        self.left -= text.startswith("epoch ")
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Store.open(sys.argv[1], progress=Kills(int(sys.argv[2]))) as store:
        store.train(PARAMS, device="cpu")
