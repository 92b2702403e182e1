"""Batches of cells as training takes them: read ahead, shuffled, on the device of the network.

Threads read ahead, and not torch's DataLoader: its workers are processes, to which every cell would
be copied, and which could not keep the crops of an epoch for the next one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..config import ImageInput
from ..enums import Projection
from ..errors import ImageError, StorageError, UserInputError
from ..io.image_files import decode_tiff, project
from ..jobs.execute import cores
from ..jobs.planes import ChannelFile, channel_files, choose_files, open_file
from ..jobs.workspace import Workspace
from ..models import Image, Well
from ..query.cells import (
    CellRows,
    CellSource,
    ImageBlock,
    current_segmentation,
    flow_file,
    mask_file,
    plate_of,
    read_cells,
)
from ..query.feature_files import SetReader
from .baselines import CELLCOUNT, MAJORITY, POSITION, count_rows
from .branches import BRANCHES, FLOW, IMAGE, MASK
from .crops import (
    UNKNOWN_LABEL,
    CellBlock,
    CellCrops,
    Layers,
    Pictures,
    crop_cells,
    cut_crops,
)
from .normalising import Scaler

T = TypeVar("T")
S = TypeVar("S")


def prefetch(items: Iterable[S], make: Callable[[S], T], threads: int) -> Generator[T, None, None]:
    """Yield ``make(item)`` for all ``items`` in their order, ``threads`` of them in the making.

    At most ``threads + 1`` results wait, or are being made, beside the one that was yielded.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cellstore-prefetch")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


BUFFER_CELLS = 32_768
"""Cells that are mixed: those of some 200 images. 1.4 GB of crops of 70 x 70 pixels."""

BUFFER_BYTES = 2 << 30
"""More than this is not mixed, however few cells it is."""

_BLOCKS, _CELLS = range(2)
"""Keep random numbers apart that come of the same seed and epoch."""

_SAMPLING = 1
"""As ``_CELLS``, but more numbers follow it. Another one would change every training."""


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


class Block(NamedTuple):
    """Cells that are read together, those of an image, all of one class."""

    block_id: int
    label: int
    n_cells: int


def quotas(sampler: str, counts: Mapping[int, int]) -> dict[int, int]:
    """Return how many cells of each class an epoch has, of ``counts`` that there are.

    ``cells``: all. ``classes``: as many of each, together as many as there are, but for the
    remainder of the division; cells of small classes come several times. ``capped``: all, but of
    the class that is larger than all others only as many as the second largest has.
    """
    there = {label: count for label, count in counts.items() if count}
    if sampler == "classes" and there:
        return dict.fromkeys(there, sum(there.values()) // len(there))
    if sampler == "capped" and len(there) > 1:
        cap = sorted(there.values())[-2]
        return {label: min(count, cap) for label, count in there.items()}
    return there


class Drawn:
    """The cells of an epoch: ``counts`` by block id, and :meth:`of` for the cells themselves."""

    def __init__(self, blocks: Sequence[Block], sampler: str, seed: int, epoch: int) -> None:
        self._key = (seed, epoch, _SAMPLING)
        self._sizes = {block.block_id: block.n_cells for block in blocks}
        self._times: dict[int, tuple[int, int]] = {}
        by_label: dict[int, list[Block]] = {}
        for block in sorted(blocks, key=lambda block: block.block_id):
            by_label.setdefault(block.label, []).append(block)
        totals = {label: sum(b.n_cells for b in some) for label, some in by_label.items()}
        for label, quota in sorted(quotas(sampler, totals).items()):
            # Each cell ``whole`` times, and ``rest`` of all cells of the class once more.
            whole, rest = divmod(quota, totals[label])
            sizes = [block.n_cells for block in by_label[label]]
            generator = _generator(*self._key, label + 1)
            more = generator.multivariate_hypergeometric(sizes, rest, method="marginals")
            for block, count in zip(by_label[label], more.tolist(), strict=True):
                self._times[block.block_id] = (whole, count)
        self.counts = {
            block_id: whole * self._sizes[block_id] + rest
            for block_id, (whole, rest) in self._times.items()
        }

    def of(self, block_id: int) -> NDArray[np.int64] | None:
        """The positions of the drawn cells in their block, (M,); ``None``: each cell once."""
        whole, rest = self._times.get(block_id, (0, 0))
        size = self._sizes[block_id]
        if (whole, rest) in ((1, 0), (0, size)):
            return None
        generator = _generator(*self._key, 0, block_id)
        more = np.sort(generator.choice(size, rest, replace=False, shuffle=False))
        index: NDArray[np.int64] = np.concatenate([np.tile(np.arange(size), whole), more])
        return index


class BlockShuffle:
    """Call it with an epoch to get batches of cells.

    While shuffling, the order of blocks is drawn from (seed, epoch), and batches are drawn at
    random from a buffer of ``buffer_cells`` cells (fewer if they take ``buffer_bytes``), filled up
    from the blocks that follow; it starts small and grows with each batch. Memory is bounded
    by twice the buffer, a block and a batch, however many blocks there are. Without shuffling,
    cells come in the order of ``blocks`` and epochs are alike.

    ``sampler`` says how often a cell is read in an epoch, see :func:`quotas`.

    Every batch has ``batch_size`` cells but the last, which has 2 to ``batch_size + 1``, since
    batch normalisation cannot train on one. A single cell comes alone only if there is no other.

    ``share=(rank, world)``: what the process ``rank`` of ``world`` reads. All have the same
    number of batches, of equal sizes within one cell, and no block in common; all together read
    what one would. ``even=False``: batches are full instead, and some may have more of them.

    Batches hold cells in the order of their blocks; ``read_all`` yields the cells of blocks in the
    order of the ids it is given.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        read_all: Callable[[Iterable[int]], Iterator[CellCrops]],
        batch_size: int = 512,
        seed: int = 0,
        *,
        shuffle: bool = True,
        sampler: str = "cells",
        share: tuple[int, int] = (0, 1),
        even: bool = True,
        buffer_cells: int = BUFFER_CELLS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        if batch_size < 2:
            raise UserInputError(f"A batch needs 2 cells or more, not {batch_size}.")
        self.blocks, self.read_all = tuple(blocks), read_all
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.sampler, self.share, self.even = sampler, share, even
        self.buffer_cells, self.buffer_bytes = buffer_cells, buffer_bytes

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return len(self._plan(epoch)[2])

    def __call__(self, epoch: int = 0) -> Generator[CellCrops, None, None]:
        """The batches of an epoch; same seed, epoch and blocks, same batches."""
        drawn, ids, batch_sizes = self._plan(epoch)
        pool = _Pool(_generator(self.seed, epoch, _CELLS) if self.shuffle else None)
        blocks = self._read(drawn, ids)
        for number, size in enumerate(batch_sizes):
            # It starts with 4 batches, not to keep an epoch waiting, and grows to its size.
            mixed = min(self.buffer_cells, self.batch_size * (4 + number))
            while pool.cells < size or (
                self.shuffle and pool.cells < mixed and pool.nbytes < self.buffer_bytes
            ):
                block = next(blocks, None)
                if block is None:
                    break
                pool.add(block)
            yield pool.draw(size)

    def _plan(self, epoch: int) -> tuple[Drawn, list[int], list[int]]:
        """The cells of an epoch; for this process the ids of blocks and the sizes of batches."""
        drawn = Drawn(self.blocks, self.sampler, self.seed, epoch)
        ids = [block.block_id for block in self.blocks if drawn.counts.get(block.block_id)]
        if self.shuffle:
            ids = [ids[i] for i in _generator(self.seed, epoch, _BLOCKS).permutation(len(ids))]
        rank, world = self.share
        shares: list[list[int]] = [[] for _ in range(world)]
        totals = [0] * world
        for block_id in ids:  # to whichever process has the fewest cells
            least = totals.index(min(totals))
            shares[least].append(block_id)
            totals[least] += drawn.counts[block_id]
        total, batch_size = totals[rank], self.batch_size
        if world > 1 and self.even:  # as many batches as all others have
            number = -(-max(totals) // batch_size)
            if min(totals) < number * (2 if self.shuffle else 1):
                raise UserInputError(
                    f"There are too few images to share out to {world} processes: one would get "
                    f"{min(totals)} cells, another {max(totals)}. Train with fewer devices, or "
                    "with smaller batches."
                )
            size, rest = divmod(total, number)
            sizes = [size + (i < rest) for i in range(number)]
        elif total == 0:
            sizes = []
        else:
            full = max(0, (total - 2) // batch_size)
            sizes = [batch_size] * full + [total - full * batch_size]
        return drawn, shares[rank], sizes

    def _read(self, drawn: Drawn, ids: Sequence[int]) -> Iterator[CellCrops]:
        expected = {block.block_id: block.n_cells for block in self.blocks}
        for block_id, cells in zip(ids, self.read_all(ids), strict=True):
            if len(cells) != expected[block_id]:
                raise ImageError(
                    "The cells of an image changed while the network was training. Train again."
                )
            index = drawn.of(block_id)
            yield cells if index is None else cells.take(index)


class _Pool:
    """Blocks of which cells are drawn; what is left of a block is copied when half is gone."""

    def __init__(self, generator: np.random.Generator | None) -> None:
        self.generator = generator
        self.blocks: list[CellCrops] = []
        self.left: list[NDArray[np.int64]] = []
        self.cells = 0
        self.nbytes = 0

    def add(self, block: CellCrops) -> None:
        self.blocks.append(block)
        self.left.append(np.arange(len(block)))
        self.cells += len(block)
        self.nbytes += block.nbytes

    def draw(self, size: int) -> CellCrops:
        """Return so many cells, at random or the first ones."""
        ends = np.cumsum([len(index) for index in self.left])
        if self.generator is None:
            chosen = np.arange(size)
        else:
            chosen = np.sort(self.generator.choice(self.cells, size, replace=False, shuffle=False))
        bounds = np.searchsorted(chosen, [0, *ends])
        parts = []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            index = self.left[number]
            start = ends[number] - len(index)
            taken = np.zeros(len(index), dtype=bool)
            taken[chosen[bounds[number] : bounds[number + 1]] - start] = True
            self.left[number] = index[~taken]
            parts.append((self.blocks[number], index[taken]))
        self.cells -= size
        drawn = CellCrops.gather(parts)
        kept: list[tuple[CellCrops, NDArray[np.int64]]] = []
        for block, index in zip(self.blocks, self.left, strict=True):
            if 0 < 2 * len(index) <= len(block):
                kept.append((block.take(index), np.arange(len(index))))
            elif len(index):
                kept.append((block, index))
        self.blocks, self.left = [block for block, _ in kept], [index for _, index in kept]
        self.nbytes = sum(block.nbytes for block in self.blocks)
        return drawn


GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def default_memory() -> int:
    """Bytes of cells to keep between epochs: a quarter of what this process may have.

    At most 64 GB: the crops of a plate of 384 wells take some 20.
    """
    return min(available_memory() // 4, 64 << 30)


def available_memory() -> int:
    """Bytes of memory of this machine, or of the container or job that this process is in."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        found = [4 << 30]  # a system that does not tell
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for _, controllers, folder in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2: one tree
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(folder.lstrip("/"))
        for part in (group, *group.parents):  # each is within the ones above
            path = root / part / name
            text = path.read_text().strip() if path.is_file() else "max"
            found += [int(text)] if text.isdigit() else []
    return min(found)


@dataclass(frozen=True)
class FoundCells:
    """The cells of an image, and the files of it that are looked at.

    ``masks`` and ``flows``: path and sha256. ``plane``: the files of the plane that was segmented.
    Without masks nothing is to be cut.
    """

    plate: str
    rows: CellRows
    masks: tuple[str, str] | None = None
    flows: tuple[str, str] | None = None
    plane: tuple[ChannelFile, ...] = ()
    channels: tuple[ChannelFile, ...] = ()


@dataclass(frozen=True)
class CellView:
    """Which ``branches`` look at the cells: ``channels`` are what branch ``image`` is shown.

    ``plane``: the intensities of branch ``mask``; ``None``: there are none. What :meth:`find`
    returns may be sent to another process, in which :meth:`cut` opens the files.
    """

    branches: tuple[str, ...]
    channels: tuple[str, ...] = ()
    plane: ImageInput | None = None

    def find(
        self,
        session: Session,
        source: CellSource,
        image_id: int,
        columns: Sequence[str],
        reader: SetReader,
    ) -> FoundCells:
        """Return the cells of an image with their measurements, and the files of the image."""
        rows = read_cells(session, source, image_id, columns, reader)
        plate = plate_of(session, image_id)
        if not len(rows.cell_ids) or {MASK, FLOW, IMAGE}.isdisjoint(self.branches):
            return FoundCells(plate, rows)
        now = current_segmentation(session, source.segment_id, image_id)
        masks = mask_file(session, now)
        if rows.boxes is None:
            raise ImageError(
                "The boxes of these cells are unknown, so they cannot be cut out of the image. "
                "If you have their masks, run: cellstore ingest masks DIR"
            )
        flows = flow_file(session, now) if FLOW in self.branches else None
        files = channel_files(session, [image_id])[image_id]
        plane = choose_files(files, self.plane) if self.plane and MASK in self.branches else []
        channels = choose_files(files, ImageInput(self.channels)) if self.channels else []
        return FoundCells(plate, rows, masks, flows, tuple(plane), tuple(channels))

    def open(
        self, artifacts: ArtifactFolder, found: FoundCells, scales: Sequence[float] | None = None
    ) -> Pictures:
        """Read the files of an image whose masks are known."""
        assert found.masks is not None
        try:
            masks = decode_tiff(artifacts.read(*found.masks))
            flows = None if found.flows is None else decode_tiff(artifacts.read(*found.flows))
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error
        plane: Any = np.zeros(masks.shape, np.uint8) if MASK in self.branches else None
        if found.plane and self.plane is not None:
            plane = project([open_file(file) for file in found.plane], self.plane.projection)
        channels = [project([open_file(file)], Projection.MEDIAN) for file in found.channels]
        return Pictures(
            masks, flows, plane, tuple(channels), None if scales is None else tuple(scales)
        )

    def cut(
        self, artifacts: ArtifactFolder, found: FoundCells, scales: Sequence[float] | None
    ) -> tuple[NDArray[np.int64], Layers]:
        """Cut the cells out; return sizes and layers, see :func:`.crops.cut_crops`.

        ``scales``: the intensities that become 1, of the plane and of each channel; default: those
        of the image.
        """
        assert found.rows.boxes is not None
        pictures = self.open(artifacts, found, scales)
        return cut_crops(pictures, found.rows.boxes, found.rows.labels)


class CellReader:
    """Call it with an image id to get the cells of that image, ready for a network.

    Features are the columns of ``scaler``, scaled by it; ``classes`` gives the class index of a
    label id; ``branches`` are those of the network, ``channels`` what branch ``image`` looks at.
    Images of plates whose intensities the scaler does not know have their own. Each image is
    decoded once, and the crops of its cells are kept while all that is kept fits ``kept_bytes``
    (default: a quarter of the memory, :func:`default_memory`). Several threads may call it. Crops
    come on ``device``. ``model``: ``None`` for a network; a baseline that looks at no cell reads
    what is the same for all cells of an image.
    """

    def __init__(
        self,
        workspace: Workspace,
        source: CellSource,
        plane: ImageInput,
        scaler: Scaler,
        crop_size: int,
        classes: Mapping[int, int] | None = None,
        *,
        kept_bytes: int | None = None,
        branches: Sequence[str] = BRANCHES,
        channels: Sequence[str] = (),
        device: str = "cpu",
        model: str | None = None,
    ) -> None:
        self.workspace, self.source, self.device = workspace, source, device
        self.scaler, self.crop_size, self.classes = scaler, crop_size, classes or {}
        self.view = CellView(tuple(branches), tuple(channels), plane)
        self.of_image = model if model in (MAJORITY, CELLCOUNT, POSITION) else None
        features = source.features
        read = () if self.of_image else scaler.names
        gone = [name for name in read if name not in set(features.columns)]
        if gone:
            raise UserInputError(
                f"Feature set {features.name!r} no longer has {len(gone)} columns that the network "
                f"reads: {', '.join(gone[:5])}. Train again."
            )
        self._values = source.reader()
        self._kept: dict[int, CellCrops] = {}
        self._room = default_memory() if kept_bytes is None else kept_bytes
        self._lock = Lock()

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id; raises as :meth:`cut` does."""
        return crop_cells(self.cut(image_id), self.crop_size, self.device)

    def cut(self, image_id: int) -> CellCrops:
        """Return the cells of an image, by cell id, whose crops are not resized yet."""
        found = self._kept.get(image_id)
        if found is None:
            found = self.read(image_id)
            with self._lock:
                if self._room and image_id not in self._kept and found.nbytes <= self._room:
                    self._kept[image_id], self._room = found, self._room - found.nbytes
        return found

    def read(self, image_id: int) -> CellCrops:
        """Do what :meth:`cut` does; nothing is kept."""
        columns = () if self.of_image else self.scaler.names
        with self.workspace.database.read() as session:
            found = self.view.find(session, self.source, image_id, columns, self._values)
            rows, values, count = found.rows, found.rows.features, len(found.rows.cell_ids)
            if self.of_image == CELLCOUNT:
                values = np.repeat(count_rows([count]), count, axis=0)
            elif self.of_image == POSITION:
                query = select(Well.well_row, Well.well_column)
                query = query.join(Image, Image.well_id == Well.id).where(Image.id == image_id)
                values = np.repeat([tuple(session.execute(query).one())], count, axis=0)
        sizes, layers = np.zeros((count, 2), np.int64), {}  # type: Any, Layers
        if found.masks is not None:
            scales = (self.scaler.intensities or {}).get(found.plate)
            sizes, layers = self.view.cut(self.workspace.artifacts, found, scales)
        label = self.classes.get(rows.label_id or UNKNOWN_LABEL, UNKNOWN_LABEL)
        labels = np.full(count, label, dtype=np.int64)
        scaled = self.scaler.transform(values, found.plate)
        return CellCrops(sizes, layers, scaled, labels, rows.cell_ids)


def reading_threads() -> int:
    """Threads that read images: half the cores that this process may use, 1 to 8."""
    return max(1, min(8, cores() // 2))


class Batches:
    """Call it with the number of an epoch, from 0, to get the batches of that epoch.

    They are the cells of ``blocks``, which ``reader`` reads; ``more`` is that of
    :class:`BlockShuffle`. A thread makes the next batch while this one is used. ``waited`` are the
    seconds that whoever took the batches of the latest epoch has waited for them. Batches are the
    same on any machine, with any number of threads and any memory.
    """

    def __init__(self, reader: CellReader, blocks: Sequence[ImageBlock], **more: Any) -> None:
        counted = [
            Block(block.image_id, reader.classes.get(block.label_id, -1), block.n_cells)
            for block in blocks
        ]
        threads = reading_threads()
        self.shuffle = BlockShuffle(counted, lambda ids: prefetch(ids, reader.cut, threads), **more)
        self.reader, self.waited = reader, 0.0

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return self.shuffle.count(epoch)

    def __call__(self, epoch: int) -> Generator[CellBlock, None, None]:
        """Yield the batches of an epoch; the same ones when asked again."""
        self.waited = 0.0
        device, cells = self.reader.device, self.shuffle(epoch)
        # Else the thread would take memory on the first GPU, too.
        current = torch.cuda.device(device) if device.startswith("cuda") else nullcontext()

        def make(_: None) -> CellBlock | None:
            with current:
                some = next(cells, None)
                return None if some is None else crop_cells(some, self.reader.crop_size, device)

        batches = prefetch(repeat(None), make, 1)
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
                del batch  # it may be a gigabyte, and the next one is coming
        finally:
            batches.close()
            cells.close()
