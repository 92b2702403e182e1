"""Cells per second into the model: the published way of reading, one from memory, cellstore.

    python benchmarks/crops_speed.py                # about 3 minutes, 200 MB
    python benchmarks/crops_speed.py --memory       # peak memory by number of cells
    python benchmarks/crops_speed.py --wait         # share of a training that waits for cells

20 fields of 1080 x 1080 pixels with 160 cells are drawn, and a store is made of them. Crops are
those of the branches ``mask`` and ``flow``, 8 channels, in shuffled batches of 64, as float32 from
-1 to 1. One core, one torch thread.

``TIFFs per cell`` opens the mask image and the flow image of its field for every cell, as the
published data set does. ``in memory`` holds all decoded fields before the clock starts, and resizes
cell by cell. ``cellstore`` is what training gets, from the files and the database: decoding,
hashing, rows, features and shuffling are on the clock; ``again`` is its next epoch, with the cells
kept in memory. They take turns; speeds are medians of the rounds, ratios are of one round, and
the medians of all rounds are printed. Where others use the machine, look at the ratios of CPU time.

Mixing: how many images, classes and plates there effectively are in a batch, divided by what a
perfect shuffle would give (see :func:`mixing`).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from cell_store import Field, draw_field, make_store

FIELDS, CELLS = 20, 160
SIZES = (224, 64)
BATCH = 64
Speed = tuple[float, float]
"""Cells per second on the clock, and per second of CPU."""


def main() -> None:
    args = parsed()
    if args.count:
        one_count(args.work / "store", args.count)
        return
    folder = Path(tempfile.mkdtemp(prefix="crops-speed-", dir=args.work))
    try:
        chosen = memory if args.memory else wait if args.wait else speed
        chosen(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory by number of cells")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=(10_000, 250_000, 500_000), help="of --memory"
    )
    parser.add_argument("--wait", action="store_true", help="share of a training that waits")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of crops, in pixels")
    parser.add_argument("--crop", type=int, default=64, help="of --wait, in pixels")
    parser.add_argument("--batch", type=int, default=128, help="of --wait")
    parser.add_argument("--batches", type=int, default=12, help="of an epoch of --wait")
    parser.add_argument("--threads", type=int, default=2, help="of torch, with --wait")
    parser.add_argument("--work", type=Path, help="where to write (some 200 MB)")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------ speed


def speed(folder: Path, args: argparse.Namespace) -> None:
    import torch

    fields = [draw_field(number, CELLS) for number in range(FIELDS)]
    write_tiffs(folder, fields)
    make_store(folder / "store", fields, images=3 * FIELDS)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    print(f"{'':26}{'cells/s':>9}{'/ TIFFs per cell':>18}{'/ in memory':>13}{'CPU time':>16}")
    for size in args.sizes:
        rounds = [one_round(folder, fields, size) for _ in range(args.rounds)]
        for name in rounds[0]:
            print(line(f"{name}, {size} px", name, rounds))
    print("\n" + mixing_table())


def one_round(folder: Path, fields: Sequence[Field], size: int) -> dict[str, Speed]:
    found = {
        "TIFFs per cell": timed(lambda: by_loader(TiffsPerCell(folder, fields, size), 480)),
        "in memory": timed(lambda: by_loader(InMemory(folder, fields, size), 1920)),
    }
    batches = batches_of(folder / "store", size, kept_bytes=1 << 40)
    found["cellstore"] = timed(lambda: taken(batches(0)))
    found["cellstore, again"] = timed(lambda: taken(batches(1)))
    return found


def line(title: str, name: str, rounds: Sequence[dict[str, Speed]]) -> str:
    on_clock = statistics.median(r[name][0] for r in rounds)
    text = f"{title:26}{on_clock:9,.0f}"
    for part, width in ((0, 0), (1, 3)):
        for base, space in (("TIFFs per cell", 18), ("in memory", 13)):
            ratio = statistics.median(r[name][part] / r[base][part] for r in rounds)
            text += f"{ratio:{space - 2 * width}.1f}"
    return text


def timed(work: Callable[[], int]) -> Speed:
    clock, cpu = time.perf_counter(), time.process_time()
    cells = work()
    return cells / (time.perf_counter() - clock), cells / (time.process_time() - cpu)


def taken(batches: Iterator[Any]) -> int:
    cells = 0
    for batch in batches:
        cells += len(batch)
        for crops in batch.crops.values():
            float(crops[:, :, ::8, ::8].mean())
    return cells


def write_tiffs(folder: Path, fields: Sequence[Field]) -> None:
    import tifffile

    for number, field in enumerate(fields):
        rng = np.random.default_rng([5, number])
        colours = rng.integers(40, 256, (CELLS + 1, 4)).astype(np.uint8)
        colours[0] = 0
        for name, picture in (("mask", colours[field.masks]), ("flow", field.flows)):
            tifffile.imwrite(
                folder / f"{name}{number:02d}.tif",
                picture,
                compression="zlib",
                photometric="rgb",
                extrasamples=["unspecified"],
            )


class TiffsPerCell:
    """The published data set: both files are opened for every cell."""

    def __init__(self, folder: Path, fields: Sequence[Field], size: int) -> None:
        self.folder, self.size = folder, size
        boxes = enumerate(field.boxes.tolist() for field in fields)
        self.cells = [(number, box) for number, some in boxes for box in some]

    def __len__(self) -> int:
        return len(self.cells)

    def pictures(self, number: int) -> list[np.ndarray]:
        """The mask image and the flow image of a field, (H, W, 4) each."""
        import tifffile

        names = (f"{name}{number:02d}.tif" for name in ("mask", "flow"))
        return [tifffile.imread(self.folder / name) for name in names]

    def __getitem__(self, index: int) -> Any:
        import torch

        number, box = self.cells[index]
        crops = [self.crop(picture, box) for picture in self.pictures(number)]
        return torch.cat(crops), index

    def crop(self, picture: np.ndarray, box: Sequence[int]) -> Any:
        """A cell of one of the pictures, (4, size, size)."""
        import torch
        from torchvision.transforms.v2 import functional

        window = np.ascontiguousarray(picture[box[0] : box[2], box[1] : box[3]])
        pixels = torch.from_numpy(window).permute(2, 0, 1)
        small = functional.resize(pixels, [self.size, self.size], antialias=True)
        floats = functional.to_dtype(small, torch.float32, scale=True)
        return functional.normalize(floats, [0.5] * 4, [0.5] * 4)


class InMemory(TiffsPerCell):
    """All decoded fields in memory, cells resized one by one."""

    def __init__(self, folder: Path, fields: Sequence[Field], size: int) -> None:
        super().__init__(folder, fields, size)
        read = super().pictures
        self.decoded = [read(number) for number in range(len(fields))]

    def pictures(self, number: int) -> list[np.ndarray]:
        """As they were decoded before."""
        return self.decoded[number]


def by_loader(cells: Any, limit: int) -> int:
    import torch
    from torch.utils.data import DataLoader, Subset

    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(1))[:limit]
    seen = 0
    for crops, index in DataLoader(Subset(cells, order.tolist()), batch_size=BATCH):
        float(crops[:, :, ::8, ::8].mean())
        seen += len(index)
    return seen


# ------------------------------------------------------------------ the store


def batches_of(root: Path, size: int, batch: int = BATCH, sides: int = 1, **more: Any) -> Any:
    """The batches of the training side of a store (``sides=3``: of all of it)."""
    from sqlalchemy import select

    from cellstore.analysis.features import FEATURE_NAMES
    from cellstore.enums import Subset
    from cellstore.jobs.workspace import open_workspace
    from cellstore.learn.batches import Batches, CellReader
    from cellstore.learn.normalising import Scaler
    from cellstore.models import Split
    from cellstore.query.cells import (
        CellSource,
        choose_recipes,
        list_blocks,
        plane_of,
        stream_features,
    )
    from cellstore.settings import StoreSettings

    kept_bytes = more.pop("kept_bytes", None)
    workspace = open_workspace(StoreSettings(root))
    with workspace.database.read() as session:
        segment, measure = choose_recipes(session, None, None)
        split = session.scalars(select(Split)).one()
        source = CellSource(segment.id, measure.id, split.id)
        blocks = list_blocks(session, source)
        scaler = Scaler.fit(FEATURE_NAMES, stream_features(session, source))
    classes = {label: i for i, label in enumerate(sorted({b.label_id for b in blocks}))}
    reader = CellReader(
        workspace, source, plane_of(segment), scaler, size, classes, kept_bytes=kept_bytes
    )
    chosen = [b for b in blocks if sides == 3 or b.subset is Subset.TRAIN]
    reader.cut(chosen[0].image_id)  # what is imported at first use is no work
    return Batches(reader, chosen, batch_size=batch, **more)


# ------------------------------------------------------------------ mixing


def mixing_table(images: int = 2293, classes: int = 250, plates: int = 4) -> str:
    """As many images as the study trained on; they are not read, only counted."""
    lines = [f"mixing of batches of 512, {images:,} images, {classes} classes, {plates} plates"]
    lines.append(f"{'cells in the buffer':26}{'images':>9}{'classes':>9}{'plates':>9}")
    for buffer in (1_337, 8_192, 32_768):
        groups = np.concatenate([*mixed(images, buffer)])
        sizes = np.arange(512, len(groups), 512)
        kinds = (groups, groups // 9 % classes, groups * plates // images)
        found = (mixing(np.split(kind, sizes)) for kind in kinds)
        lines.append(f"{buffer:26,}" + "".join(f"{value:9.2f}" for value in found))
    return "\n".join(lines)


def mixing(batches: Sequence[np.ndarray], seed: int = 0) -> float:
    """How well ``batches`` mix groups: 1 is as well as a perfect shuffle does.

    ``batches`` are the groups (images, classes, plates) of the cells of each batch, (B,). In a
    batch there are effectively 1 / sum(p^2) groups, p the share of each (the inverse Simpson
    index; Hill 1973, order 2). What is returned is the mean over all batches, divided by the mean
    over batches of the same sizes into which the same cells were dealt at random.
    """

    def effective(groups: np.ndarray) -> float:
        shares = np.unique(groups, return_counts=True)[1] / len(groups)
        return float(1 / (shares**2).sum())

    everything = np.concatenate(batches)
    shuffled = everything[np.random.default_rng(seed).permutation(len(everything))]
    dealt = np.split(shuffled, np.cumsum([len(batch) for batch in batches])[:-1])
    return float(np.mean([*map(effective, batches)]) / np.mean([*map(effective, dealt)]))


def mixed(images: int, buffer_cells: int) -> Iterator[np.ndarray]:
    """The image of each cell, batch by batch."""
    from cellstore.learn.batches import Block, BlockShuffle
    from cellstore.learn.crops import CellCrops

    def cells(image: int) -> CellCrops:
        one = np.full(CELLS, image)
        nothing = np.zeros((CELLS, 2), np.int64)
        return CellCrops(nothing, {}, np.zeros((CELLS, 0), np.float32), one, one)

    blocks = [Block(image, 0, CELLS) for image in range(images)]
    shuffle = BlockShuffle(blocks, lambda ids: map(cells, ids), 512, buffer_cells=buffer_cells)
    return (batch.labels for batch in shuffle(0))


# ------------------------------------------------------------------ memory


def memory(folder: Path, args: argparse.Namespace) -> None:
    print("crops of 32 pixels, batches of 512, 4,096 cells mixed, 16 MB of cells kept")
    for count in args.counts:
        fields = [draw_field(number, 100, 160) for number in range(FIELDS)]
        root = folder / str(count)
        make_store(root / "store", fields, images=count // 100)
        words = [sys.executable, __file__, "--count", str(count), "--work", str(root)]
        subprocess.run(words, check=True)
        shutil.rmtree(root)


def one_count(root: Path, count: int) -> None:
    batches = batches_of(
        root, 32, batch=512, sides=3, kept_bytes=16 << 20, buffer_cells=4096, seed=1
    )
    before = peak()
    began = time.perf_counter()
    cells = taken(batches(0))
    seconds = time.perf_counter() - began
    assert cells == count, cells
    print(
        f"{cells:9,} cells: peak {peak():7.1f} MB, of which {before:7.1f} MB before the first "
        f"batch; {cells / seconds:,.0f} cells/s",
        flush=True,
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------ waiting


def wait(folder: Path, args: argparse.Namespace) -> None:
    import torch

    from cellstore.learn.networks import NetShape, build_net
    from cellstore.query.feature_files import FEATURE_NAMES

    fields = [draw_field(number, CELLS) for number in range(FIELDS)]
    make_store(folder / "store", fields, images=3 * FIELDS)
    torch.set_num_threads(args.threads)
    batches = batches_of(folder / "store", args.crop, args.batch)
    net = build_net(NetShape(12, len(FEATURE_NAMES)), None, 0).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for epoch, name in ((0, "from the files"), (1, "kept in memory")):
        began, cells = time.perf_counter(), 0
        for batch in islice(batches(epoch), args.batches):
            optimizer.zero_grad()
            scores = net(batch.crops, batch.features)
            torch.nn.functional.cross_entropy(scores, batch.labels).backward()
            optimizer.step()
            cells += len(batch)
        seconds = time.perf_counter() - began
        print(
            f"{name}: {cells:,} cells of {args.crop} px in {seconds:.0f} s on {args.threads} "
            f"threads, {100 * batches.waited / seconds:.1f} % of it waiting for cells",
            flush=True,
        )


if __name__ == "__main__":
    main()
