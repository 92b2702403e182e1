"""One of two processes that train together: ``python tests/team_training.py STORE OUT``.

It is started with the environment of torchrun. What it ended with is written to OUT.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from killed_training import PARAMS

from cellstore.learn import training
from cellstore.store import Store

TOGETHER = replace(PARAMS, batch_size=4, epochs=2)


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun says to process ``rank`` of two on this host."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": 1,
    }
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def told_to(out: Path) -> Any:
    """The loop, which writes down the losses and the network that it ended with."""
    real = training.Training.run

    def run(self: training.Training, *given: Any) -> Iterator[training.EpochMetrics]:
        yield from real(self, *given)
        digest = hashlib.sha256()
        for value in self.net.state_dict().values():
            digest.update(value.numpy().tobytes())
        losses = [(e.train_loss, e.validation_loss) for e in self.epochs]
        out.write_text(json.dumps({"losses": losses, "network": digest.hexdigest()}))

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    training.Training.run = told_to(Path(sys.argv[2]))
    with Store.open(sys.argv[1]) as store:
        store.train(TOGETHER, device="cpu")
