"""The cells of a split for a training loop of one's own: a data set for torch's ``DataLoader``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..config import ImageInput, Sources, TrainParams
from ..enums import Subset
from ..errors import UserInputError
from ..jobs.workspace import Workspace, open_workspace
from ..query.cells import CellSource, ImageBlock, plane_of
from ..settings import StoreSettings
from .batches import (
    Block,
    BlockShuffle,
    CellReader,
    Drawn,
    default_memory,
    prefetch,
    reading_threads,
)
from .branches import IMAGE, MASK, TABULAR, choose_branches, choose_channels
from .crops import crop_cells
from .normalising import Scaler, fit_inputs
from .trained_models import planes_of
from .training_cells import find_training_cells

AT_ONCE = 64
"""Cells whose crops are resized together."""

Item = dict[str, Any]


@dataclass(eq=False)
class CellDataset(IterableDataset[Item]):
    """Iterate over the cells of one subset of a split, in an order drawn from seed and epoch.

    An item is a dictionary that torch's default collate puts into batches:

    - ``image``: (C, S, S) float32, the crop of each channel, from -1 (black) to about 1;
    - ``mask``: (1, S, S) float32, which share of each pixel is of the cell, if it was asked for;
    - ``features``: (F,) float32, scaled by the training subset as in ``train``, if asked for;
    - ``label``: int, the position of its class in ``classes``;
    - ``cell_id``: int, for :meth:`cellstore.Store.add_predictions`.

    Crops are cut from the images when they are needed, by the box of the cell, and resized. With
    several workers, or several processes of ``torch.distributed``, each has images of its own, so
    that no cell comes twice. Call :meth:`set_epoch` before each epoch; workers that persist hear
    of it. ``len`` counts the cells of an epoch in this process. Made by
    :meth:`cellstore.Store.dataset`.
    """

    settings: StoreSettings
    source: CellSource
    plane: ImageInput
    scaler: Scaler
    blocks: tuple[ImageBlock, ...]
    classes: tuple[str, ...]
    label_ids: tuple[int, ...]
    branches: tuple[str, ...]
    channels: tuple[str, ...]
    crop: int
    sampler: str
    shuffle: bool
    seed: int
    transform: Callable[[Item], Item] | None = None
    notes: tuple[str, ...] = ()
    # Shared memory, so that workers that persist see it change.
    epoch: torch.Tensor = field(default_factory=lambda: _shared(torch.zeros((), dtype=torch.int64)))
    _opened: tuple[int, CellReader] | None = None

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns of ``features``."""
        return self.scaler.names if TABULAR in self.branches else ()

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, and the cells of a sampler, of another epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        drawn = Drawn(self._blocks, self.sampler, self.seed, int(self.epoch))
        return math.ceil(sum(drawn.counts.values()) / _team()[1])

    def __iter__(self) -> Iterator[Item]:
        (rank, world), worker = _team(), get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        threads = reading_threads() if worker is None else 1
        reader = self._reader(workers)
        cells = BlockShuffle(
            self._blocks,
            lambda ids: prefetch(ids, reader.cut, threads),
            AT_ONCE,
            self.seed,
            shuffle=self.shuffle,
            sampler=self.sampler,
            share=(rank * workers + number, world * workers),
            even=False,
        )
        for some in cells(int(self.epoch)):
            block = crop_cells(some, self.crop)
            for index in range(len(block)):
                item: Item = {"cell_id": int(block.cell_ids[index])}
                item["label"] = int(block.labels[index])
                if IMAGE in block.crops:
                    item["image"] = block.crops[IMAGE][index]
                if MASK in block.crops:
                    # Crops are from -1 to 1, as networks like them.
                    item["mask"] = (block.crops[MASK][index, :1] + 1) / 2
                if TABULAR in self.branches:
                    item["features"] = block.features[index]
                yield item if self.transform is None else self.transform(item)

    @property
    def _blocks(self) -> list[Block]:
        classes = {label_id: index for index, label_id in enumerate(self.label_ids)}
        return [Block(b.image_id, classes.get(b.label_id, -1), b.n_cells) for b in self.blocks]

    def _reader(self, workers: int) -> CellReader:
        """What reads the cells in this process: a connection does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            reader = CellReader(
                open_workspace(self.settings),
                self.source,
                self.plane,
                self.scaler,
                self.crop,
                {label_id: index for index, label_id in enumerate(self.label_ids)},
                kept_bytes=default_memory() // (workers * _team()[1]),
                branches=self.branches,
                channels=self.channels,
            )
            self._opened = (os.getpid(), reader)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _shared(number: torch.Tensor) -> torch.Tensor:
    return number.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


def _team() -> tuple[int, int]:
    """Rank and number of the processes of ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def cell_dataset(
    workspace: Workspace,
    sources: Sources,
    subset: Subset,
    *,
    channels: Sequence[str] = (),
    crop: int = 96,
    mask: bool = False,
    features: str | bool = False,
    sampler: str = "cells",
    shuffle: bool | None = None,
    seed: int = 0,
    intensity: str = "plate",
    transform: Callable[[Item], Item] | None = None,
    exclude_flagged: str | None = None,
    where: str | None = None,
    sql: str | None = None,
) -> CellDataset:
    """Return the data set of a subset of a split; see :meth:`cellstore.Store.dataset`.

    Raises:
        UnknownNameError: there is no such split, channel, recipe or feature set.
        UserInputError: there are no cells, or what was asked for is not known of all of them.
    """
    params = TrainParams(
        features=features if isinstance(features, str) else None,
        crop_size=crop,
        sampler=sampler,
        intensity=intensity,
        seed=seed,
        exclude_flagged=exclude_flagged,
        where=where,
        sql=sql,
    )
    with workspace.database.read() as session:
        cells = find_training_cells(session, workspace, sources, params, (subset,))
        if not cells.blocks[subset]:
            raise UserInputError(
                f"Split {cells.split.name} has no measured cells in its {subset.value} subset."
            )
        wanted = (*((MASK,) if mask else ()), IMAGE, *((TABULAR,) if features else ()))
        branches, _ = choose_branches(session, cells.source, wanted)
        chosen = choose_channels(session, cells.source, channels)
        planes = planes_of(cells.segment, chosen) if intensity == "plate" else ()
        scaler = fit_inputs(
            session,
            workspace.database,
            cells.source,
            "train" if features else None,
            planes,
            (subset,),
        )
    return CellDataset(
        settings=workspace.settings,
        source=cells.source,
        plane=plane_of(cells.segment),
        scaler=scaler,
        blocks=cells.blocks[subset],
        classes=tuple(cells.labels),
        label_ids=tuple(cells.labels.values()),
        branches=branches,
        channels=chosen,
        crop=crop,
        sampler=sampler,
        shuffle=subset is Subset.TRAIN if shuffle is None else shuffle,
        seed=seed,
        transform=transform,
        notes=cells.notes,
    )
