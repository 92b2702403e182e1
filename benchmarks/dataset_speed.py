"""Cells per second: ``Store.dataset`` in torch's DataLoader beside the loader of ``train``.

    python benchmarks/dataset_speed.py              # about 1 minute, 200 MB

20 fields of 1080 x 1080 pixels with 160 cells each are drawn, and a store is made of them. All
three give shuffled batches of 64 crops of one channel. ``train`` is what ``cellstore train`` reads,
``dataset`` the data set in a DataLoader; both decode the images in the first epoch, and have kept
the cells for the second. ``plain`` is a data set that holds the decoded images and resizes cell by
cell. They take turns; printed are medians, and medians of the ratios of one round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cell_store import draw_field, make_store
from crops_speed import BATCH, FIELDS, Speed, taken, timed

from cellstore.store import Store


def main() -> None:
    import torch
    from torch.utils.data import DataLoader

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=(96, 224), help="of crops")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoaders")
    parser.add_argument("--work", type=Path, help="where to write (some 200 MB)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dataset-speed-", dir=args.work))
    if args.workers == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    try:
        make_store(folder / "store", [draw_field(number) for number in range(FIELDS)], 3 * FIELDS)
        print(f"{'':28}{'cells/s':>9}{'/ train':>9}{'CPU':>7}{'/ plain':>9}{'CPU':>7}")
        with Store.open(folder / "store") as store:
            for size in args.sizes:
                rounds = [
                    one_round(store, size, args.workers, DataLoader) for _ in range(args.rounds)
                ]
                for name in rounds[0]:
                    show(f"{name}, {size} px", name, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(title: str, name: str, rounds: list[dict[str, Speed]]) -> None:
    text = f"{title:28}{statistics.median(r[name][0] for r in rounds):9,.0f}"
    epoch = name.partition(", ")[2] or "epoch 1"
    for base in (f"train, {epoch}", "plain"):
        for part, width in ((0, 9), (1, 7)):
            ratio = statistics.median(r[name][part] / r[base][part] for r in rounds)
            text += f"{ratio:{width}.2f}"
    print(text, flush=True)


def one_round(
    store: Store, size: int, workers: int, loader: Callable[..., Any]
) -> dict[str, Speed]:
    from cellstore.jobs.workspace import open_workspace
    from cellstore.learn.batches import Batches, CellReader

    data = store.dataset(crop=size)
    classes = {label: index for index, label in enumerate(data.label_ids)}
    reader = CellReader(
        open_workspace(data.settings),
        data.source,
        data.plane,
        data.scaler,
        size,
        classes,
        branches=data.branches,
        channels=data.channels,
    )
    batches = Batches(reader, data.blocks, batch_size=BATCH)
    plain = InMemory(store, size)
    more = {"persistent_workers": True} if workers else {}
    loaded = loader(data, batch_size=BATCH, num_workers=workers, **more)
    found = {}
    for epoch in (0, 1):
        data.set_epoch(epoch)
        found[f"train, epoch {epoch + 1}"] = timed(lambda: taken(batches(epoch)))  # noqa: B023
        found[f"dataset, epoch {epoch + 1}"] = timed(lambda: seen(loaded))
    found["plain"] = timed(
        lambda: seen(loader(plain, batch_size=BATCH, shuffle=True, num_workers=workers))
    )
    return found


def seen(batches: Any) -> int:
    cells = 0
    for batch in batches:
        cells += len(batch["image"])
        float(batch["image"][:, :, ::8, ::8].mean())
    return cells


class InMemory:
    """The cells of the training subset, cut from decoded images that are held in memory."""

    def __init__(self, store: Store, size: int) -> None:
        self.size = size
        fields = store.dataset(unit="image", shuffle=False)
        self.images = {(i["plate"], i["well"], i["site"]): i["image"] for i in fields}
        self.cells = store.cells(subset="train", features=False).to_pandas().to_dict("records")
        self.classes = {name: index for index, name in enumerate(fields.classes)}

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from torch.nn.functional import interpolate

        cell = self.cells[index]
        image = self.images[cell["plate"], cell["well"], cell["site"]]
        crop = image[None, :, cell["min_row"] : cell["max_row"], cell["min_col"] : cell["max_col"]]
        small = interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)[0]
        label = self.classes[cell["label"]]
        return {"image": small, "label": label, "cell_id": cell["cell_id"]}


if __name__ == "__main__":
    main()
