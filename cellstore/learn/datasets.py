"""The cells, or the images, of a split for a training loop of one's own: torch's data sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from sqlalchemy import select
from torch.utils.data import IterableDataset, get_worker_info

from ..config import ImageInput, Sources, TrainParams
from ..enums import Subset
from ..errors import ImageError, StorageError, UserInputError
from ..jobs.planes import read_image
from ..jobs.workspace import Workspace, open_workspace
from ..models import SplitMember
from ..query.cells import (
    CellSource,
    ImageBlock,
    current_segmentation,
    name_images,
    plane_of,
    plate_of,
    read_masks,
)
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
from .crops import UNKNOWN_LABEL, CellCrops, Pictures, crop_cells, cut_crops
from .normalising import Scaler, fit_inputs
from .trained_models import planes_of
from .training_cells import find_training_cells

DRAWN, AT_ONCE = 256, 64
"""Cells that are drawn together, which takes as long as drawing few, and that are resized together,
so that they stay in the cache of the processor."""

FIELDS_MIXED = {"buffer_cells": 32, "buffer_bytes": 256 << 20}
"""Whole fields that are mixed: enough where a sampler reads some of them several times."""

OBJECTS = "objects"
"""Layer of the object numbers of a whole field."""

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
    that no cell comes twice.

    Of ``unit="image"`` an item is a whole field, on the same scale of intensities: ``image``
    (C, H, W) float32, or (C, S, S) with a ``crop``; ``mask`` (H, W) int64, the object numbers, 0
    between the cells; ``label``; ``image_id``, ``subset``, and ``plate``, ``well``, ``site``,
    ``plane``, ``time_point``, by which :meth:`cellstore.Store.add_predictions` finds it again.

    Call :meth:`set_epoch` before each epoch; workers that persist hear
    of it. ``len`` counts the cells of an epoch in this process. Made by
    :meth:`cellstore.Store.dataset`.
    """

    workspace: Workspace = field(repr=False)
    source: CellSource
    plane: ImageInput
    scaler: Scaler
    blocks: tuple[ImageBlock, ...]
    classes: tuple[str, ...]
    label_ids: tuple[int, ...]
    branches: tuple[str, ...]
    channels: tuple[str, ...]
    crop: int | None
    sampler: str
    shuffle: bool
    seed: int
    transform: Callable[[Item], Item] | None = None
    notes: tuple[str, ...] = ()
    image_names: Mapping[int, Item] | None = None
    """By image: what an item says of it, where items are images."""
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
            DRAWN if self.image_names is None else 2,
            self.seed,
            shuffle=self.shuffle,
            sampler=self.sampler,
            share=(rank * workers + number, world * workers),
            even=False,
            **({} if self.image_names is None else FIELDS_MIXED),
        )
        make = self._cell_items if self.image_names is None else self._image_items
        for some in cells(int(self.epoch)):
            for item in make(some):
                yield item if self.transform is None else self.transform(item)

    def _cell_items(self, cells: CellCrops) -> Iterator[Item]:
        assert self.crop is not None
        for first in range(0, len(cells), AT_ONCE):
            block = crop_cells(cells.part(first, first + AT_ONCE), self.crop)
            columns: Item = {"cell_id": block.cell_ids.tolist(), "label": block.labels.tolist()}
            if IMAGE in block.crops:
                columns["image"] = block.crops[IMAGE].unbind()
            if MASK in block.crops:
                # Crops are from -1 to 1, as networks like them.
                columns["mask"] = ((block.crops[MASK][:, :1] + 1) / 2).unbind()
            if TABULAR in self.branches:
                columns["features"] = block.features.unbind()
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _image_items(self, images: CellCrops) -> Iterator[Item]:
        assert self.image_names is not None
        crops = None if self.crop is None else crop_cells(images, self.crop).crops[IMAGE]
        for index, (start, end) in enumerate(images.spans.tolist()):
            image_id, shape = int(images.cell_ids[index]), tuple(images.sizes[index].tolist())
            if crops is not None:
                picture = crops[index]
            else:
                flat = torch.from_numpy(images.layers[IMAGE][:, start:end])
                picture = (flat * 2 - 1).reshape(-1, *shape)  # as crops
            item: Item = {"image_id": image_id, **self.image_names[image_id]}
            item |= {"label": int(images.labels[index]), "image": picture}
            if OBJECTS in images.layers:
                numbers = images.layers[OBJECTS][0, start:end].reshape(shape)
                if self.crop is not None:  # the nearest pixel: numbers have no mean
                    at = (np.arange(self.crop) + 0.5) / self.crop
                    rows, columns = ((at * length).astype(np.int64) for length in shape)
                    numbers = numbers[np.ix_(rows, columns)]
                item["mask"] = torch.from_numpy(numbers)
            yield item

    @property
    def _blocks(self) -> list[Block]:
        classes = {label_id: index for index, label_id in enumerate(self.label_ids)}
        return [Block(b.image_id, classes.get(b.label_id, -1), b.n_cells) for b in self.blocks]

    def _reader(self, workers: int) -> CellReader:
        """What reads the cells in this process: a connection does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            reader = (CellReader if self.image_names is None else FieldReader)(
                open_workspace(self.workspace.settings),
                self.source,
                self.plane,
                self.scaler,
                self.crop or 1,
                {label_id: index for index, label_id in enumerate(self.label_ids)},
                kept_bytes=default_memory() // (workers * _team()[1]),
                branches=self.branches,
                channels=self.channels,
            )
            self._opened = (os.getpid(), reader)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class FieldReader(CellReader):
    """Reads whole fields: each is one "cell" with the id of the image."""

    def read(self, image_id: int) -> CellCrops:
        """Return an image; its masks are layer ``OBJECTS``."""
        database, view = self.workspace.database, self.view
        channels = tuple(read_image(database, image_id, ImageInput((c,))) for c in view.channels)
        with database.read() as session:
            member = (
                SplitMember.split_id == self.source.split_id,
                SplitMember.image_id == image_id,
            )
            label_id = session.scalar(select(SplitMember.label_id).where(*member))
            plate = plate_of(session, image_id)
            masks = np.zeros(channels[0].shape, np.uint8)
            if MASK in view.branches:
                try:
                    found = current_segmentation(session, self.source.segment_id, image_id)
                    masks = read_masks(session, self.workspace.artifacts, found)
                except StorageError as error:
                    raise ImageError(str(error)) from error
        scales = (self.scaler.intensities or {}).get(plate)
        nothing = np.zeros_like(masks)  # the field as the one cell of itself, number 0
        pictures = Pictures(nothing, None, None, channels, scales)
        sizes, layers = cut_crops(pictures, np.array([[0, 0, *masks.shape]]), np.zeros(1))
        if MASK in view.branches:
            layers = {**layers, OBJECTS: masks.astype(np.int64).reshape(1, -1)}
        label = np.array([self.classes.get(label_id or UNKNOWN_LABEL, UNKNOWN_LABEL)])
        return CellCrops(sizes, layers, np.zeros((1, 0), np.float32), label, np.array([image_id]))


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
    params: TrainParams,
    *,
    unit: str = "cell",
    crop: int | None = None,
    shuffle: bool | None = None,
    transform: Callable[[Item], Item] | None = None,
) -> CellDataset:
    """Return the data set of a subset of a split; see :meth:`cellstore.Store.dataset`.

    ``params``: its branches are what an item has (``mask``, ``image``, ``tabular``).
    """
    wanted = params.branches or ()
    if unit == "image" and TABULAR in wanted:
        raise UserInputError("Features are of cells: leave them out, or ask for unit='cell'.")
    with workspace.database.read() as session:
        cells = find_training_cells(session, workspace, sources, params, (subset,))
        blocks = cells.blocks[subset]
        if not blocks:
            kind = "measured" if cells.selection is None else "selected"
            raise UserInputError(
                f"Split {cells.split.name} has no {kind} cells in its {subset.value} subset."
            )
        choose_branches(session, cells.source, wanted)
        chosen = choose_channels(session, cells.source, params.channels)
        planes = planes_of(cells.segment, chosen) if params.intensity == "plate" else ()
        scaler = fit_inputs(
            session,
            workspace.database,
            cells.source,
            "train" if TABULAR in wanted else None,
            planes,
            (subset,),
        )
        image_names = None
        if unit == "image":
            image_names = name_images(session, replace(cells.source, subset=subset))
            blocks = tuple(replace(block, n_cells=1) for block in blocks)
    return CellDataset(
        workspace=workspace,
        source=cells.source,
        plane=plane_of(cells.segment),
        scaler=scaler,
        blocks=blocks,
        classes=tuple(cells.labels),
        label_ids=tuple(cells.labels.values()),
        branches=wanted,
        channels=chosen,
        crop=crop,
        sampler=params.sampler,
        shuffle=subset is Subset.TRAIN if shuffle is None else shuffle,
        seed=params.seed,
        transform=transform,
        notes=cells.notes,
        image_names=image_names,
    )
