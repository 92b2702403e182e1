"""A training by several processes: ``python tests/team_training.py STORE PROCESSES OUT``.

Each process writes to OUT what it ended with; Lightning runs this program again for each.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from killed_training import PARAMS

from cellstore import Store
from cellstore.config import TrainSetup
from cellstore.ops import training

if __name__ == "__main__":
    torch.set_num_threads(1)
    root, processes, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    real = training.fit

    def fit(net, *rest, fabric, **more):  # type: ignore[no-untyped-def]
        result = real(net, *rest, fabric=fabric, **more)
        digest = hashlib.sha256()
        for value in net.state_dict().values():
            digest.update(value.numpy().tobytes())
        losses = [(e.train_loss, e.validation_loss) for e in result.epochs]
        record = {"losses": losses, "parameters": digest.hexdigest()}
        (out / f"{fabric.global_rank}.json").write_text(json.dumps(record))
        return result

    training.fit = fit
    with Store.open(root) as store:
        params = replace(PARAMS, batch_size=4, epochs=2)
        store.train(params, device="cpu", setup=TrainSetup(devices=processes))
