"""Batches of cells as training takes them: read ahead, shuffled, on the device of the network."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..errors import ImageError, StorageError, UnknownNameError, UserInputError
from ..jobs.planes import read_image
from ..jobs.workspace import Workspace
from ..models import Image, Plate, Well
from ..query.cells import (
    CellRows,
    CellSource,
    ImageBlock,
    current_segmentation,
    read_cells,
    read_flows,
    read_masks,
)
from ..query.feature_files import ReadableSet, SetReader
from .branches import BRANCHES, FLOW, IMAGE, MASK, TABULAR
from .crops import (
    UNKNOWN_LABEL,
    CellBlock,
    CutCells,
    Pictures,
    Windows,
    crop_cells,
    cut_windows,
    no_windows,
    without_pixels,
)
from .normalising import FeatureScaler

T = TypeVar("T")
S = TypeVar("S")

_LOOK_AROUND = 0.1
"""Seconds after which a thread that cannot hand over looks whether it is still wanted."""


def read_ahead(ids: Iterable[S], read: Callable[[S], T], workers: int) -> Generator[T, None, None]:
    """Yield ``read(id)`` for all ``ids`` in their order, ``workers`` of them in the making.

    At most ``workers + 1`` results wait, or are being made, beside the one that was yielded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cellstore-read")
    waiting: deque[Future[T]] = deque()
    try:
        for one in ids:
            waiting.append(pool.submit(read, one))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _End:
    """The last thing in a queue, with the error that ended it, if one did."""

    error: BaseException | None = None


class Ahead(Generic[T]):
    """Iterate over it to get what ``items`` yields, made by a thread up to ``depth`` items ahead.

    Beside those, one item is in the making. ``items`` is closed when it is exhausted, and when the
    taker closes the iterator, an error passes through it, or it is forgotten.
    """

    def __init__(self, items: Generator[T, None, None] | Iterator[T], depth: int = 1) -> None:
        self._items = items
        self._queue: Queue[T | _End] = Queue(depth)
        self._unwanted = Event()

    def __iter__(self) -> Generator[T, None, None]:
        """Start the thread, and yield what it makes."""
        thread = Thread(target=self._make, name="cellstore-ahead", daemon=True)
        thread.start()
        try:
            while not isinstance(found := self._queue.get(), _End):
                yield found
                del found  # it may be a gigabyte, and the next one is coming
            if found.error is not None:
                raise found.error
        finally:
            self._unwanted.set()
            self._clear()
            thread.join()

    def _clear(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            return

    def _make(self) -> None:
        end = _End()
        try:
            for item in self._items:
                if not self._hand_over(item):
                    break
                del item
        except BaseException as error:
            end = _End(error)
        finally:
            _close(self._items)
        self._hand_over(end)

    def _hand_over(self, item: T | _End) -> bool:
        while not self._unwanted.is_set():
            try:
                self._queue.put(item, timeout=_LOOK_AROUND)
            except Full:
                continue
            return True
        return False


def _close(items: Any) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()


CELLS, CLASSES, CAPPED = SAMPLERS = ("cells", "classes", "capped")
"""Each cell once; every class as often; the largest class no more often than the second."""

_DRAWING = 1
"""Keeps these numbers apart from those that shuffle blocks, which come of the same seed."""


@dataclass(frozen=True)
class Block:
    """Cells that are read together, those of an image, all of one class."""

    block_id: int
    label: int
    n_cells: int


def quotas(sampler: str, counts: Mapping[int, int]) -> dict[int, int]:
    """Return how many cells of each class an epoch has, of ``counts`` that there are.

    ``cells``: all. ``classes``: as many of each, together as many as there are, but for the
    remainder of the division; cells of small classes come several times. ``capped``: all, but of
    the class that is larger than all others only as many as the second largest has.

    Raises ``UnknownNameError`` for another sampler.
    """
    if sampler not in SAMPLERS:
        raise UnknownNameError.of("sampler", sampler, SAMPLERS)
    there = {label: count for label, count in counts.items() if count}
    if sampler == CLASSES and there:
        return dict.fromkeys(there, sum(there.values()) // len(there))
    if sampler == CAPPED and len(there) > 1:
        cap = sorted(there.values())[-2]
        return {label: min(count, cap) for label, count in there.items()}
    return there


class Drawn:
    """The cells of an epoch: ``counts`` by block id, and :meth:`of` for the cells themselves."""

    def __init__(self, blocks: Sequence[Block], sampler: str, seed: int, epoch: int) -> None:
        self._key = (seed, epoch, _DRAWING)
        self._sizes = {block.block_id: block.n_cells for block in blocks}
        self._times: dict[int, tuple[int, int]] = {}
        by_label: dict[int, list[Block]] = {}
        for block in sorted(blocks, key=lambda block: block.block_id):
            by_label.setdefault(block.label, []).append(block)
        totals = {label: sum(b.n_cells for b in some) for label, some in by_label.items()}
        for label, quota in sorted(quotas(sampler, totals).items()):
            self._deal(by_label[label], *divmod(quota, totals[label]))
        self.counts = {
            block_id: whole * self._sizes[block_id] + rest
            for block_id, (whole, rest) in self._times.items()
        }

    def _deal(self, blocks: Sequence[Block], whole: int, rest: int) -> None:
        """Each cell ``whole`` times, and ``rest`` of all cells of the class once more."""
        generator = _sampling_generator(*self._key, blocks[0].label + 1)
        sizes = [block.n_cells for block in blocks]
        shares = generator.multivariate_hypergeometric(sizes, rest, method="marginals")
        for block, share in zip(blocks, shares.tolist(), strict=True):
            self._times[block.block_id] = (whole, share)

    def of(self, block_id: int) -> NDArray[np.int64] | None:
        """The positions of the drawn cells in their block, (M,); ``None``: each cell once."""
        whole, rest = self._times.get(block_id, (0, 0))
        size = self._sizes[block_id]
        if (whole, rest) in ((1, 0), (0, size)):
            return None
        generator = _sampling_generator(*self._key, 0, block_id)
        more = np.sort(generator.choice(size, rest, replace=False, shuffle=False))
        index: NDArray[np.int64] = np.concatenate([np.tile(np.arange(size), whole), more])
        return index


def _sampling_generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


BUFFER_CELLS = 32_768
"""Cells that are mixed: those of some 200 images. 1.4 GB of windows of 70 x 70 pixels."""

BUFFER_BYTES = 2 << 30
"""More than this is not mixed, however few cells it is."""

_FIRST_BATCHES = 4
"""The buffer starts with as many batches, not to keep an epoch waiting, and grows to its size."""


class Cells(Protocol):
    """Cells that can be taken from blocks: :class:`~cellstore.learn.crops.CutCells`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def take(self, index: NDArray[np.int64]) -> Self:
        """The cells at these positions, as a copy."""
        ...

    @classmethod
    def gather(cls, parts: Sequence[tuple[Self, NDArray[np.int64]]]) -> Self:
        """The cells at some positions of each of one or more blocks, as a copy."""
        ...


C = TypeVar("C", bound=Cells)


@dataclass(frozen=True)
class _Epoch:
    """What one process reads in an epoch: the ids of its blocks, and the sizes of its batches."""

    drawn: Drawn
    order: list[int]
    sizes: list[int]


class BlockShuffle(Generic[C]):
    """Call it with an epoch to get batches of cells.

    While shuffling, the order of blocks is drawn from (seed, epoch), and batches are drawn at
    random from a buffer of ``buffer_cells`` cells (fewer if they take ``buffer_bytes``), filled up
    from the blocks that follow; it starts small and grows with each batch. Memory is bounded
    by twice the buffer, a block and a batch, however many blocks there are. Without shuffling,
    cells come in the order of ``blocks`` and epochs are alike.

    ``sampler`` says how often a cell is read in an epoch, see :mod:`cellstore.learn.batches`.

    Every batch has ``batch_size`` cells but the last, which has 2 to ``batch_size + 1``, since
    batch normalisation cannot train on one. A single cell comes alone only if there is no other.

    ``share=(rank, world)``: what the process ``rank`` of ``world`` reads. All have the same
    number of batches, of equal sizes within one cell, and no block in common; all together read
    what one would.

    Batches hold cells in the order of their blocks; ``read_all`` yields the cells of blocks in the
    order of the ids it is given.

    Raises, when called:
        UserInputError: ``share``: a process would have too few cells to fill its batches.
        ImageError: a block has not as many cells as was said.

    """

    def __init__(
        self,
        blocks: Sequence[Block],
        read_all: Callable[[Iterable[int]], Iterator[C]],
        batch_size: int = 512,
        seed: int = 0,
        *,
        shuffle: bool = True,
        sampler: str = CELLS,
        share: tuple[int, int] = (0, 1),
        buffer_cells: int = BUFFER_CELLS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        if batch_size < 2:
            raise UserInputError(f"A batch needs 2 cells or more, not {batch_size}.")
        self.blocks, self.read_all = tuple(blocks), read_all
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.sampler, self.share = sampler, share
        self.buffer_cells, self.buffer_bytes = buffer_cells, buffer_bytes

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return len(self._plan(epoch).sizes)

    def __call__(self, epoch: int = 0) -> Generator[C, None, None]:
        """The batches of an epoch; same seed, epoch and blocks, same batches."""
        plan = self._plan(epoch)
        pool: _Pool[C] = _Pool(_generator(self.seed, epoch, 1) if self.shuffle else None)
        blocks = self._read(plan)
        for number, size in enumerate(plan.sizes):
            mixed = min(self.buffer_cells, self.batch_size * (_FIRST_BATCHES + number))
            while pool.cells < size or (
                self.shuffle and pool.cells < mixed and pool.nbytes < self.buffer_bytes
            ):
                block = next(blocks, None)
                if block is None:
                    break
                pool.add(block)
            yield pool.draw(size)

    def _plan(self, epoch: int) -> _Epoch:
        drawn = Drawn(self.blocks, self.sampler, self.seed, epoch)
        ids = [block.block_id for block in self.blocks if drawn.counts.get(block.block_id)]
        if self.shuffle:
            ids = [ids[i] for i in _generator(self.seed, epoch, 0).permutation(len(ids))]
        rank, world = self.share
        shares = _dealt([(i, drawn.counts[i]) for i in ids], world)
        totals = [sum(drawn.counts[i] for i in share) for share in shares]
        sizes = _full_sizes(totals[0], self.batch_size) if world == 1 else self._equal(totals)
        return _Epoch(drawn, shares[rank], sizes)

    def _equal(self, totals: Sequence[int]) -> list[int]:
        """The sizes of the batches of this process: as many batches as all others have."""
        number = -(-max(totals) // self.batch_size)
        if min(totals) < number * (2 if self.shuffle else 1):
            raise UserInputError(
                f"There are too few images to share out to {len(totals)} processes: one would get "
                f"{min(totals)} cells, another {max(totals)}. Train with fewer devices, or with "
                "smaller batches."
            )
        size, rest = divmod(totals[self.share[0]], number)
        return [size + (i < rest) for i in range(number)]

    def _read(self, plan: _Epoch) -> Iterator[C]:
        expected = {block.block_id: block.n_cells for block in self.blocks}
        for block_id, cells in zip(plan.order, self.read_all(plan.order), strict=True):
            if len(cells) != expected[block_id]:
                raise ImageError(
                    "The cells of an image changed while the network was training. Train again."
                )
            index = plan.drawn.of(block_id)
            yield cells if index is None else cells.take(index)


class _Pool(Generic[C]):
    """Blocks of which cells are drawn; what is left of a block is copied when half is gone."""

    def __init__(self, generator: np.random.Generator | None) -> None:
        self.generator = generator
        self.blocks: list[C] = []
        self.left: list[NDArray[np.int64]] = []
        self.cells = 0
        self.nbytes = 0

    def add(self, block: C) -> None:
        self.blocks.append(block)
        self.left.append(np.arange(len(block)))
        self.cells += len(block)
        self.nbytes += block.nbytes

    def draw(self, size: int) -> C:
        """Return so many cells, at random or the first ones."""
        ends = np.cumsum([len(index) for index in self.left])
        if self.generator is None:
            chosen = np.arange(size)
        else:
            chosen = np.sort(self.generator.choice(self.cells, size, replace=False, shuffle=False))
        bounds = np.searchsorted(chosen, [0, *ends])
        parts = []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            start = ends[number] - len(self.left[number])
            parts.append(self._take(number, chosen[bounds[number] : bounds[number + 1]] - start))
        drawn = type(self.blocks[0]).gather(parts)
        self._forget()
        return drawn

    def _take(self, number: int, places: NDArray[np.int64]) -> tuple[C, NDArray[np.int64]]:
        index = self.left[number]
        there = np.zeros(len(index), dtype=bool)
        there[places] = True
        self.left[number] = index[~there]
        self.cells -= len(places)
        return self.blocks[number], index[there]

    def _forget(self) -> None:
        for number, (block, index) in enumerate(zip(self.blocks, self.left, strict=True)):
            if 0 < 2 * len(index) <= len(block):
                self.blocks[number] = block.take(index)
                self.left[number] = np.arange(len(index))
        kept = [i for i, index in enumerate(self.left) if len(index)]
        self.blocks = [self.blocks[i] for i in kept]
        self.left = [self.left[i] for i in kept]
        self.nbytes = sum(block.nbytes for block in self.blocks)


def _dealt(blocks: Sequence[tuple[int, int]], world: int) -> list[list[int]]:
    """The ids of ``blocks`` (id, cells) in their order, each to whoever has the fewest cells."""
    shares: list[list[int]] = [[] for _ in range(world)]
    totals = [0] * world
    for block_id, cells in blocks:
        least = totals.index(min(totals))
        shares[least].append(block_id)
        totals[least] += cells
    return shares


def _full_sizes(total: int, batch_size: int) -> list[int]:
    if total == 0:
        return []
    full = max(0, (total - 2) // batch_size)
    return [batch_size] * full + [total - full * batch_size]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


def mixing(batches: Sequence[NDArray[Any]], seed: int = 0) -> float:
    """Return how well ``batches`` mix groups: 1 is as well as a perfect shuffle does.

    ``batches`` are the groups (images, classes, plates) of the cells of each batch, (B,). In a
    batch there are effectively 1 / sum(p^2) groups, p the share of each (the inverse Simpson
    index; Hill 1973, order 2). What is returned is the mean over all batches, divided by the mean
    over batches of the same sizes into which the same cells were dealt at random.
    """
    everything = np.concatenate(batches)
    shuffled = everything[_generator(seed).permutation(len(everything))]
    dealt = np.split(shuffled, np.cumsum([len(batch) for batch in batches])[:-1])
    return float(np.mean([*map(_effective, batches)]) / np.mean([*map(_effective, dealt)]))


def _effective(groups: NDArray[Any]) -> float:
    shares = np.unique(groups, return_counts=True)[1] / len(groups)
    return float(1 / (shares**2).sum())


MOST = 64 << 30
"""No more than this is kept unless asked for: a plate of 384 wells as windows takes some 20 GB."""

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def default_memory() -> int:
    """Bytes of cells to keep between epochs: a quarter of what this process may have."""
    return min(memory_there() // 4, MOST)


def memory_there() -> int:
    """Bytes of memory of this machine, or of the container or job that this process is in."""
    return min([_physical(), *_limits()])


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 << 30  # a system that does not tell


def _limits() -> list[int]:
    """The limits of the control groups of this process, each within the ones before."""
    texts = [path.read_text().strip() for path in _limit_files() if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _limit_files() -> Iterator[Path]:
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for _, controllers, place in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2: one tree
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(place.lstrip("/"))
        yield from (root / part / name for part in (group, *group.parents))


Whites = Mapping[str, Sequence[float]]
"""By plate barcode the intensities that become 1: of the plane, then of each channel."""


class BlockReader:
    """Call it with an image id to get the cells of that image, ready for a network.

    Features are the columns of ``scaler``, scaled by it; ``classes`` gives the class index of a
    label id; ``branches`` are those of the network, ``channels`` what branch ``image`` looks at;
    ``whites`` are the white levels of some plates, images of others have their own. Each image is
    decoded once, and the windows of its cells are kept while all that is kept fits ``kept_bytes``
    (default: a quarter of the memory, :func:`default_memory`). Several threads may call it.

    Raises:
        UserInputError: ``scaler`` names a measurement that is not there any more.

    """

    def __init__(
        self,
        workspace: Workspace,
        source: CellSource,
        plane: ImageInput,
        scaler: FeatureScaler,
        crop_size: int,
        classes: Mapping[int, int] | None = None,
        kept_bytes: int | None = None,
        branches: Sequence[str] = BRANCHES,
        channels: Sequence[str] = (),
        whites: Whites | None = None,
    ) -> None:
        self.workspace, self.source, self.plane = workspace, source, plane
        self.scaler, self.crop_size, self.classes = scaler, crop_size, classes or {}
        self.branches, self.channels = tuple(branches), tuple(channels)
        self.whites = whites or {}
        _check_columns(scaler.names, source.features)
        self._values = SetReader(source.features.files or ())
        self._kept: dict[int, CutCells] = {}
        self._room = default_memory() if kept_bytes is None else kept_bytes
        self._lock = Lock()

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id; raises as :meth:`cut` does."""
        return crop_cells(self.cut(image_id), self.crop_size)

    def cut(self, image_id: int) -> CutCells:
        """Return the cells of an image, by cell id, whose windows are not resized yet.

        Raises:
            ImageError: its pixels or masks cannot be read or do not fit each other.

        """
        found = self._kept.get(image_id)
        if found is None:
            found = self._read(image_id)
            self._keep(image_id, found)
        return found

    def _keep(self, image_id: int, cells: CutCells) -> None:
        with self._lock:
            if image_id not in self._kept and cells.nbytes <= self._room:
                self._kept[image_id], self._room = cells, self._room - cells.nbytes

    def _read(self, image_id: int) -> CutCells:
        with self.workspace.database.read() as session:
            rows = self._rows(session, image_id)
            barcode = _barcode(session, image_id)
            windows = self._windows(session, image_id, rows, barcode)
        features = self.scaler.transform(rows.features, barcode)
        label = UNKNOWN_LABEL
        if rows.label_id is not None:
            label = self.classes.get(rows.label_id, UNKNOWN_LABEL)
        labels = np.full(len(rows), label, dtype=np.int64)
        return CutCells(windows, features, labels, rows.cell_ids)

    def _rows(self, session: Session, image_id: int) -> CellRows:
        columns = self.scaler.names
        if self.source.features.in_table:
            return read_cells(session, self.source, image_id, columns)
        with self._lock:  # its open files are for one at a time
            return read_cells(session, self.source, image_id, columns, self._values)

    def _windows(self, session: Session, image_id: int, rows: CellRows, barcode: str) -> Windows:
        if self.branches == (TABULAR,):
            return without_pixels(len(rows))
        if len(rows) == 0:
            return no_windows(self.branches, len(self.channels))
        if rows.boxes is None:
            raise ImageError(
                "The boxes of these cells are unknown, so they cannot be cut out of the image. "
                "If you have their masks, run: cellstore ingest masks DIR"
            )
        return cut_windows(self._pictures(session, image_id, barcode), rows.boxes, rows.labels)

    def _pictures(self, session: Session, image_id: int, barcode: str) -> Pictures:
        artifacts, database = self.workspace.artifacts, self.workspace.database
        found = current_segmentation(session, self.source.segment_id, image_id)
        try:
            masks = read_masks(session, artifacts, found)
            flows = read_flows(session, artifacts, found) if FLOW in self.branches else None
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error
        plane = read_image(database, image_id, self.plane) if MASK in self.branches else None
        names = self.channels if IMAGE in self.branches else ()
        channels = tuple(read_image(database, image_id, ImageInput((name,))) for name in names)
        whites = self.whites.get(barcode)
        return Pictures(masks, flows, plane, channels, None if whites is None else tuple(whites))


def _barcode(session: Session, image_id: int) -> str:
    query = (
        select(Plate.barcode)
        .join(Well, Well.plate_id == Plate.id)
        .join(Image, Image.well_id == Well.id)
    )
    return session.scalars(query.where(Image.id == image_id)).one()


def _check_columns(names: Sequence[str], features: ReadableSet) -> None:
    known = frozenset(features.columns)
    gone = [name for name in names if name not in known]
    if not gone:
        return
    some = ", ".join(gone[:5])
    if features.in_table:
        raise UserInputError(
            f"The network reads measurements that this cellstore does not make: {some}. "
            "Train again."
        )
    raise UserInputError(
        f"Feature set {features.name!r} no longer has {len(gone)} columns that the network reads: "
        f"{some}. Train again."
    )


MOST_READERS = 8


class Batches:
    """Call it with the number of an epoch, from 0, to get the batches of that epoch.

    A thread makes the next batch while this one is used. ``waited`` are the seconds that whoever
    took the batches of the latest epoch has waited for them.
    """

    def __init__(self, shuffle: BlockShuffle[CutCells], crop_size: int, device: str) -> None:
        self._shuffle, self._crop_size, self._device = shuffle, crop_size, device
        self.waited = 0.0

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return self._shuffle.count(epoch)

    def __call__(self, epoch: int) -> Generator[CellBlock, None, None]:
        """Yield the batches of an epoch; the same ones when asked again."""
        self.waited = 0.0
        batches = iter(Ahead(self._made(epoch)))
        try:
            while (batch := self._next(batches)) is not None:
                yield batch
                del batch
        finally:
            batches.close()

    def _next(self, batches: Iterator[CellBlock]) -> CellBlock | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - start
        return batch

    def _made(self, epoch: int) -> Iterator[CellBlock]:
        with _current(self._device):
            for cells in self._shuffle(epoch):
                yield crop_cells(cells, self._crop_size, self._device)


def _current(device: str) -> AbstractContextManager[Any]:
    """Make ``device`` that of this thread, which otherwise also takes memory on the first one."""
    on_cuda = torch.device(device).type == "cuda"
    return torch.cuda.device(device) if on_cuda else nullcontext()


def training_batches(
    reader: BlockReader,
    blocks: Sequence[ImageBlock],
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    sampler: str = CELLS,
    share: tuple[int, int] = (0, 1),
    device: str = "cpu",
    buffer_cells: int = BUFFER_CELLS,
) -> Batches:
    """Return the batches of the cells of ``blocks``, which ``reader`` reads.

    ``shuffle``: the training side, else cells come in the order of ``blocks``. ``sampler``,
    ``share`` and ``buffer_cells`` are those of :class:`~cellstore.learn.batches.BlockShuffle`.
    Batches are the same on any machine, with any number of threads and any memory.

    Memory: what ``reader`` keeps, twice the buffer of windows that are shuffled, three batches,
    and an image for each reading thread and one more.

    Raises, when batches are taken:
        ImageError: pixels or masks of an image cannot be read, or its cells are not those that
            ``blocks`` counted.
        UserInputError: there are too few images for a ``share``.

    """
    counted = [
        Block(block.image_id, reader.classes.get(block.label_id, -1), block.n_cells)
        for block in blocks
    ]
    threads = reading_threads()

    def read_all(image_ids: Iterable[int]) -> Iterator[CutCells]:
        return read_ahead(image_ids, reader.cut, threads)

    shuffled = BlockShuffle(
        counted,
        read_all,
        batch_size,
        seed,
        shuffle=shuffle,
        sampler=sampler,
        share=share,
        buffer_cells=buffer_cells,
    )
    return Batches(shuffled, reader.crop_size, device)


def reading_threads() -> int:
    """Threads that read images: half the cores that this process may use, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_READERS, (cores or 1) // 2))
