"""Cells as a network sees them: crops of the mask image, of the flow image and of channels.

The mask image has four channels: the cell itself, its outline, the other cells, and the
projected intensity inside the cell. It is derived here and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ImageError, UserInputError
from .branches import FLOW, IMAGE, MASK

LIGHT = "light"
"""Layer of intensities inside the cell. The codes of branch ``mask`` are layer ``mask``."""

EDGE_BIT, OWN_BIT = 1, 2
"""Bits of a code: a pixel of the outline of a cell, of the cell of this crop; bit 0: of any."""

Layers = Mapping[str, NDArray[Any]]
"""(K, P) by name, those that the branches need: the crops of N cells as they were cut, each of its
own size, end to end, P pixels in all. ``mask`` uint8 codes, ``light`` float32 from 0 to 1, ``flow``
uint8 (K = 4), ``image`` float32 from 0 to 1 (K channels)."""


def empty_layers(
    sizes: NDArray[np.int64], branches: Sequence[str], n_channels: int = 0
) -> dict[str, NDArray[Any]]:
    """Return room for crops of ``sizes`` (N, 2): rows and columns; in one piece of memory."""
    pixels = int(sizes.prod(axis=1).sum())
    kinds: list[tuple[str, str, int, Any]] = [  # the widest numbers first
        (IMAGE, IMAGE, n_channels, np.float32),
        (MASK, LIGHT, 1, np.float32),
        (FLOW, FLOW, 4, np.uint8),
        (MASK, MASK, 1, np.uint8),
    ]
    kinds = [kind for kind in kinds if kind[0] in branches]
    lengths = [channels * pixels * np.dtype(kind).itemsize for *_, channels, kind in kinds]
    pieces = np.split(np.empty(sum(lengths), np.uint8), np.cumsum(lengths)[:-1])
    return {
        name: piece.view(kind).reshape(channels, pixels)
        for piece, (_, name, channels, kind) in zip(pieces, kinds, strict=False)
    }


def spans_of(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N, 2): the first pixel of each cell, and the one after its last."""
    pixels = sizes.prod(axis=1)
    ends = np.cumsum(pixels)
    return np.stack([ends - pixels, ends], axis=1)


@dataclass(frozen=True)
class CellCrops:
    """N cells whose crops are not resized yet, as numpy arrays.

    ``sizes`` (N, 2) int64 are rows and columns of each crop, ``layers`` their pixels;
    ``features`` (N, F) float32, ``labels`` (N,) int64 class indices, ``cell_ids`` (N,) int64.
    """

    sizes: NDArray[np.int64]
    layers: Layers
    features: NDArray[Any]
    labels: NDArray[np.int64]
    cell_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cell_ids)

    @cached_property
    def spans(self) -> NDArray[np.int64]:
        """(N, 2) the first pixel of each cell, and the one after its last."""
        return spans_of(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays but the sizes."""
        arrays = (*self.layers.values(), self.features, self.labels, self.cell_ids)
        return sum(array.nbytes for array in arrays)

    def take(self, index: NDArray[np.int64]) -> CellCrops:
        """The cells at the positions ``index``, (M,), as a copy."""
        return CellCrops.gather([(self, index)])

    def part(self, first: int, last: int) -> CellCrops:
        """The cells from ``first`` to before ``last``, not copied."""
        some = slice(first, last)
        start, end = self.spans[some][0, 0], self.spans[some][-1, 1]
        return CellCrops(
            self.sizes[some],
            {name: layer[:, start:end] for name, layer in self.layers.items()},
            self.features[some],
            self.labels[some],
            self.cell_ids[some],
        )

    @classmethod
    def gather(cls, parts: Sequence[tuple[CellCrops, NDArray[np.int64]]]) -> CellCrops:
        """The cells at some positions, (M,), of each of one or more blocks, as a copy."""
        chosen = [
            (cells.layers, start, end)
            for cells, index in parts
            for start, end in cells.spans[index].tolist()
        ]
        layers = {
            name: np.concatenate([empty[:, :0], *(some[name][:, a:b] for some, a, b in chosen)], 1)
            for name, empty in parts[0][0].layers.items()
        }
        return cls(
            np.concatenate([cells.sizes[index] for cells, index in parts]),
            layers,
            np.concatenate([cells.features[index] for cells, index in parts]),
            np.concatenate([cells.labels[index] for cells, index in parts]),
            np.concatenate([cells.cell_ids[index] for cells, index in parts]),
        )


@dataclass(frozen=True)
class Pictures:
    """What the cells of an image are cut from; ``None``: no branch looks at it.

    ``masks`` (H, W) integers, 0 is background; ``flows`` (H, W, 4) uint8, the three channels of
    Cellpose's flow rendering and the cell probability; ``plane`` (H, W) intensities; ``channels``
    (H, W) intensities each. ``intensity_scale``: the intensities that become 1, of the plane and of
    each channel; without it, the 99.9th percentile of each.

    Raises:
        ImageError: the arrays do not fit each other, or hold values that are not finite.
    """

    masks: NDArray[Any]
    flows: NDArray[Any] | None = None
    plane: NDArray[Any] | None = None
    channels: tuple[NDArray[Any], ...] = ()
    intensity_scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        masks, flows = self.masks, self.flows
        for plane in (self.plane, *self.channels):
            if plane is None:
                continue
            if masks.ndim != 2 or np.shape(plane) != masks.shape:
                raise ImageError(
                    f"Masks {masks.shape} and image {np.shape(plane)} do not fit each other; "
                    "segment this image again, or ingest masks that belong to it."
                )
            if not np.isfinite(plane).all():
                raise ImageError("The image holds values that are not finite numbers.")
        if flows is not None and flows.shape != (*masks.shape, 4):
            raise ImageError(
                f"Masks {masks.shape} and flows {flows.shape} do not fit each other; segment this "
                "image again."
            )
        if flows is not None and flows.dtype != np.uint8:
            raise ImageError(
                f"Flows must be uint8, these are {flows.dtype}; segment this image again."
            )


def cut_crops(
    pictures: Pictures, boxes: NDArray[Any], object_numbers: NDArray[Any]
) -> tuple[NDArray[np.int64], Layers]:
    """Cut the cells of one image out by their bounding boxes; return sizes and layers.

    ``boxes`` (N, 4) are integers: ``min_row``, ``min_col``, ``max_row``, ``max_col``, half open;
    ``object_numbers`` (N,) the value of each cell in the masks. Without a plane of intensities
    there is no branch ``mask``.

    Raises:
        ImageError: a box is empty or reaches out of the image, or does not hold its cell.
    """
    masks, plane, channels = pictures.masks, pictures.plane, pictures.channels
    boxes = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= masks.shape).all()
    if not inside or (boxes[:, :2] >= boxes[:, 2:]).any():
        raise ImageError(
            f"A box is empty or reaches out of the image of {masks.shape[0]} x {masks.shape[1]} "
            "pixels; segment this image again."
        )
    scales = pictures.intensity_scale
    if scales is None:
        scales = tuple(0.0 if p is None else image_scale(p) for p in (plane, *channels))
    looked_at = ((MASK, plane), (FLOW, pictures.flows), (IMAGE, channels or None))
    branches = [name for name, given in looked_at if given is not None]
    sizes = boxes[:, 2:] - boxes[:, :2]
    layers = empty_layers(sizes, branches, len(channels))
    codes = _cells_and_edges(masks)
    spans = zip(boxes.tolist(), spans_of(sizes).tolist(), object_numbers, strict=True)
    for (top, left, bottom, right), (start, end), number in spans:
        box = np.s_[top:bottom, left:right]
        own = masks[box] == number
        if not own.any():
            raise ImageError(f"Cell {number} is not in its box; segment this image again.")
        shape = (-1, *own.shape)
        out = {name: layer[:, start:end].reshape(shape) for name, layer in layers.items()}
        if plane is not None:
            np.left_shift(own, OWN_BIT, out=out[MASK][0], dtype=np.uint8, casting="unsafe")
            out[MASK][0] |= codes[box]
            _scale(plane[box], scales[0], out[LIGHT][0])
            out[LIGHT][0] *= own
        if pictures.flows is not None:
            out[FLOW][...] = pictures.flows[box].transpose(2, 0, 1)
        for channel, scale, target in zip(channels, scales[1:], out.get(IMAGE, ()), strict=True):
            _scale(channel[box], scale, target)
    return sizes, layers


def _scale(intensities: NDArray[Any], scale: float, out: NDArray[np.float32]) -> None:
    if scale <= 0:
        out[...] = 0
        return
    np.divide(intensities, scale, out=out, casting="unsafe")
    np.minimum(out, 1, out=out)
    np.maximum(out, 0, out=out)


def image_scale(intensities: NDArray[Any]) -> float:
    """The intensity that becomes 1: the 99.9th percentile, or the maximum if that is 0.

    What is brighter, a few hot pixels, becomes 1 too. As ``numpy.percentile`` (linear
    interpolation), but only the brightest pixels are sorted.
    """
    flat = np.ravel(intensities)
    position = 99.9 / 100 * (flat.size - 1)
    needed = flat.size - int(position)
    # The 99th percentile of a few pixels is nearly always below the one that is wanted.
    brightest = flat[flat >= np.percentile(flat[::61], 99)]
    if len(brightest) < needed:
        brightest = flat
    brightest = np.sort(brightest)
    low, high = float(brightest[-needed]), float(brightest[min(1 - needed, -1)])
    return low + (high - low) * (position - int(position)) or float(brightest[-1])


def _cells_and_edges(masks: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W): bit 0 in cells, ``EDGE_BIT`` where a 4-neighbour has another value.

    Edges equal ``skimage.segmentation.find_boundaries(masks, connectivity=1, mode="inner")``; the
    rim of the image is no boundary.
    """
    edge: NDArray[np.bool_] = np.zeros(masks.shape, dtype=bool)
    other = np.empty(masks.shape, dtype=bool)  # the only one besides: fresh memory takes time
    rows = np.not_equal(masks[1:], masks[:-1], out=other[1:])
    edge[1:] |= rows
    edge[:-1] |= rows
    columns = np.not_equal(masks[:, 1:], masks[:, :-1], out=other[:, 1:])
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    cells = np.not_equal(masks, 0, out=other)
    edge &= cells
    codes: NDArray[np.uint8] = edge.view(np.uint8)
    codes <<= np.uint8(EDGE_BIT)
    codes |= cells.view(np.uint8)
    return codes


CROP_MEAN = 0.5
CROP_STD = 0.5
"""Normalisation of every channel in the published study: 0..1 becomes -1..1."""

PIXELS_AT_ONCE = 1 << 15
"""Pixels that are made floats at once on a CPU: about what its cache holds."""

PADDED_AT_ONCE = 1 << 26
"""Numbers of crops that are padded to one size at once on an accelerator: 256 MB."""

_COLUMNS, _ROWS = 32, 56
"""New pixels of a band; with fewer, calls cost more than what they save."""


def resized(cells: CellCrops, size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return crops by image branch, (N, C, size, size) float32 from -1 to 1, on ``device``.

    The aspect ratio is not kept. Channels of ``mask`` are the cell, its outline, the other cells
    and the intensity inside the cell; of ``flow`` those of the flows; of ``image`` those asked for.
    """
    if size < 1:
        raise UserInputError(f"The size of a crop must be 1 pixel or more, not {size}.")
    if torch.device(device).type != "cpu":
        return resized_at_once(cells, size, device)
    channels = _channels(cells.layers)
    # numpy asks for huge pages, torch does not: a third of the time goes with fresh memory.
    made = {
        name: torch.from_numpy(np.empty((len(cells), len(own), size, size), np.float32))
        for name, own in channels.items()
    }
    spans, sizes = cells.spans.tolist(), cells.sizes.tolist()
    for first, last in _runs(spans) if channels else ():
        start, end = spans[first][0], spans[last - 1][1]
        flat = _floats({n: torch.from_numpy(x[:, start:end]) for n, x in cells.layers.items()})
        for cell in range(first, last):
            (rows, columns), (a, b) = sizes[cell], spans[cell]
            lines = flat[:, a - start : b - start].reshape(-1, columns)
            widened = torch.empty((len(lines), size))
            for band in _bands(columns, size, _COLUMNS):
                torch.mm(lines[:, band.old], band.weights.mT, out=widened[:, band.new])
            widened = widened.view(-1, rows, size)
            for name, own in channels.items():
                part, crop = widened[own.start : own.stop], made[name][cell]
                for band in _bands(rows, size, _ROWS):
                    weights = band.weights.expand(len(own), -1, -1)
                    torch.bmm(weights, part[:, band.old], out=crop[:, band.new])
    return made


def resized_at_once(cells: CellCrops, size: int, device: torch.device | str) -> dict[str, Tensor]:
    """As :func:`resized`, with cells of like sizes padded to one size, for accelerators."""
    channels = _channels(cells.layers)
    shape = (len(cells), size, size)
    made = {
        name: torch.empty((shape[0], len(own), *shape[1:]), device=device)
        for name, own in channels.items()
    }
    if not channels:
        return made
    flat = _floats({name: _sent(layer, device) for name, layer in cells.layers.items()})
    sizes, starts = (_sent(part, device) for part in (cells.sizes, cells.spans[:, 0].copy()))
    for group in _of_like_sizes(cells.sizes, len(flat)):
        index = _sent(group, device)
        lengths, (rows, columns) = sizes[index], cells.sizes[group].max(axis=0).tolist()
        # (N, rows, columns): where the pixels of each crop are in (P,).
        down = torch.arange(rows, device=starts.device)[:, None] * lengths[:, 1, None, None]
        across = torch.arange(columns, device=starts.device)
        positions = starts[index][:, None, None] + down + across
        # Beyond a crop are pixels of other cells; their weights are 0.
        padded = flat[:, positions.clamp_(max=flat.shape[1] - 1)].transpose(0, 1)
        widened = padded @ resize_weights(lengths[:, 1], columns, size).mT[:, None]
        crops = resize_weights(lengths[:, 0], rows, size)[:, None] @ widened
        for name, own in channels.items():
            made[name][index] = crops[:, own.start : own.stop]
    return made


@dataclass(frozen=True)
class _Band:
    """A range of new pixels, the old pixels that they are made of, and their weights (new, old).

    Weights far from the diagonal are 0, so that a few products of bands are less work than one.
    """

    new: slice
    old: slice
    weights: Tensor


@lru_cache(maxsize=2048)
def _bands(length: int, size: int, width: int) -> list[_Band]:
    weights = resize_weights(torch.tensor([length]), length, size)[0]
    bands = []
    for rows in torch.arange(size).tensor_split(max(1, size // width)):
        there = weights[rows].sum(dim=0).nonzero()
        new = slice(int(rows[0]), int(rows[-1]) + 1)
        old = slice(int(there[0]), int(there[-1]) + 1)
        bands.append(_Band(new, old, weights[new, old].contiguous()))
    return bands


def _channels(layers: Mapping[str, Sized]) -> dict[str, range]:
    """By image branch its channels among all."""
    found: dict[str, range] = {}
    first = 0
    for name in (MASK, FLOW, IMAGE):
        if name in layers:
            found[name] = range(first, first := first + (4 if name == MASK else len(layers[name])))
    return found


def _runs(spans: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """First cell and the one after the last of runs of at most ``PIXELS_AT_ONCE`` pixels."""
    first = 0
    for last in range(1, len(spans) + 1):
        if last == len(spans) or spans[last][1] - spans[first][0] > PIXELS_AT_ONCE:
            yield first, last
            first = last


def _of_like_sizes(sizes: NDArray[np.int64], channels: int) -> Iterator[NDArray[np.int64]]:
    """Positions of the cells in groups that take up little more when padded to one size."""
    order = np.argsort(sizes.max(axis=1), kind="stable")
    first = 0
    for last in range(1, len(order) + 1):
        rows, columns = sizes[order[first : last + 1]].max(axis=0).tolist()
        if last == len(order) or (last + 1 - first) * channels * rows * columns > PADDED_AT_ONCE:
            yield order[first:last]
            first = last


def _floats(layers: Mapping[str, Tensor]) -> Tensor:
    """All channels (C, P) float32, normalised: from -1 to 1.

    Weights add to 1, so that normalising the few pixels before is normalising the many after.
    """
    channels = _channels(layers)
    some = next(iter(layers.values()))
    flat = torch.empty(
        (max(own.stop for own in channels.values()), some.shape[1]), device=some.device
    )
    for name, own in channels.items():
        part = flat[own.start : own.stop]
        if name == MASK:
            codes = layers[MASK][0]
            cell = (codes >> OWN_BIT) & 1
            outline = (codes >> EDGE_BIT) & cell
            others = (codes & 1) ^ cell
            seen = (cell, outline, others, layers[LIGHT][0])
            for channel, values in zip(part, seen, strict=True):
                torch.mul(values, 1 / CROP_STD, out=channel)
        else:
            torch.mul(layers[name], 1 / (CROP_STD * (255 if name == FLOW else 1)), out=part)
    return flat.sub_(CROP_MEAN / CROP_STD)


def _sent(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def resize_weights(lengths: Tensor, longest: int, size: int) -> Tensor:
    """(N, size, longest): the share of each of ``lengths`` (N,) pixels in each of ``size`` pixels.

    As torch computes them, in float32: a triangle around the middle of the new pixel, one old
    pixel wide to each side, or one new pixel where it shrinks.
    """
    scale = (lengths.float() / size)[:, None, None]
    middles = scale * (torch.arange(size, device=lengths.device) + 0.5)[:, None]
    pixels = torch.arange(longest, device=lengths.device)
    distances = (pixels - middles + 0.5) / scale.clamp(min=1.0)
    weights = (1 - distances.abs()).clamp_(min=0)
    weights.masked_fill_(pixels >= lengths[:, None, None], 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


UNKNOWN_LABEL = -1
"""Class index of a cell whose class is not known, or not among those of the network."""


@dataclass(frozen=True)
class CellBlock:
    """N cells: those of one image, or one batch.

    ``crops`` are (N, C, S, S) float32 by image branch, only those that the network looks at;
    ``features`` (N, F) float32, ``labels`` (N,) int64 class indices and ``cell_ids`` (N,) int64.
    """

    crops: Mapping[str, Tensor]
    features: Tensor
    labels: Tensor
    cell_ids: Tensor

    def __len__(self) -> int:
        return int(self.cell_ids.shape[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> CellBlock:
        """The cells with ``change`` made to each of their tensors."""
        return CellBlock(
            {name: change(crops) for name, crops in self.crops.items()},
            change(self.features),
            change(self.labels),
            change(self.cell_ids),
        )

    def to(self, device: torch.device | str) -> CellBlock:
        """The same cells on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def take(self, index: Tensor) -> CellBlock:
        """The cells at the positions ``index``, (M,) int64."""
        return self.map(lambda tensor: tensor[index])


def crop_cells(cells: CellCrops, size: int, device: torch.device | str = "cpu") -> CellBlock:
    """Resize the crops of ``cells`` to ``size`` pixels, on ``device``."""
    few = (torch.from_numpy(part) for part in (cells.features, cells.labels, cells.cell_ids))
    crops = resized(cells, size, device) if cells.layers else {}
    return CellBlock(crops, *(part.to(device, non_blocking=True) for part in few))
