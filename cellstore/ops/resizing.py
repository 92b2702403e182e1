"""Windows of cells made crops of one size, on the CPU or on an accelerator.

Resizing is that of torchvision's ``Resize`` (bilinear, with antialiasing where it shrinks): a
weight matrix for the rows and one for the columns of a cell, and two matrix products. That is as
fast as torch's own resizing on a CPU, where cells take turns, and lets an accelerator resize cells
of all sizes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellstore.errors import UserInputError
from cellstore.ops.branches import FLOW, IMAGE, MASK
from cellstore.ops.windows import EDGE_BIT, LIGHT, OWN_BIT, Windows

CROP_MEAN = 0.5
CROP_STD = 0.5
"""Normalisation of every channel in the published study: 0..1 becomes -1..1."""

_PIXELS_AT_ONCE = 1 << 15
"""Pixels that are made floats at once on a CPU: about what its cache holds."""

_PADDED_AT_ONCE = 1 << 26
"""Numbers of windows that are padded to one size at once on an accelerator: 256 MB."""

_COLUMNS, _ROWS = 32, 56
"""New pixels of a band; with fewer, calls cost more than what they save."""

Spans = list[tuple[int, int]]


def resized(windows: Windows, size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return crops by image branch, (N, C, size, size) float32 from -1 to 1, on ``device``.

    The aspect ratio is not kept. Channels of ``mask`` are the cell, its outline, the other cells
    and the intensity inside the cell; of ``flow`` those of the flows; of ``image`` those asked for.

    Raises ``UserInputError`` for a size below 1.
    """
    if size < 1:
        raise UserInputError(f"The size of a crop must be 1 pixel or more, not {size}.")
    if torch.device(device).type == "cpu":
        return _in_turn(windows, size)
    return resized_at_once(windows, size, device)


def resized_at_once(windows: Windows, size: int, device: torch.device | str) -> dict[str, Tensor]:
    """As :func:`resized`, with cells of like sizes padded to one size, for accelerators."""
    channels = _channels(windows.layers)
    shape = (len(windows), size, size)
    made = {
        name: torch.empty((shape[0], len(own), *shape[1:]), device=device)
        for name, own in channels.items()
    }
    if not channels:
        return made
    flat = _floats({name: _sent(layer, device) for name, layer in windows.layers.items()})
    sizes, starts = (_sent(part, device) for part in (windows.sizes, windows.starts))
    for group in _of_like_sizes(windows.sizes, len(flat)):
        index = _sent(group, device)
        lengths, (rows, columns) = sizes[index], windows.sizes[group].max(axis=0).tolist()
        places = _places(starts[index], lengths[:, 1], rows, columns)
        # Beyond a window are pixels of other cells; their weights are 0.
        padded = flat[:, places.clamp_(max=flat.shape[1] - 1)].transpose(0, 1)
        widened = padded @ _weights(lengths[:, 1], columns, size).mT[:, None]
        crops = _weights(lengths[:, 0], rows, size)[:, None] @ widened
        for name, own in channels.items():
            made[name][index] = crops[:, own.start : own.stop]
    return made


def _in_turn(windows: Windows, size: int) -> dict[str, Tensor]:
    channels = _channels(windows.layers)
    # numpy asks for huge pages, torch does not: a third of the time goes with fresh memory.
    made = {
        name: torch.from_numpy(np.empty((len(windows), len(own), size, size), np.float32))
        for name, own in channels.items()
    }
    spans = list(zip(windows.starts.tolist(), windows.ends.tolist(), strict=True))
    sizes = windows.sizes.tolist()
    for first, last in _runs(spans) if channels else ():
        start, end = spans[first][0], spans[last - 1][1]
        flat = _floats({n: torch.from_numpy(x[:, start:end]) for n, x in windows.layers.items()})
        for cell in range(first, last):
            (rows, columns), (a, b) = sizes[cell], spans[cell]
            lines = flat[:, a - start : b - start].reshape(-1, columns)
            widened = _widened(lines, size).view(-1, rows, size)
            for name, own in channels.items():
                _heightened(widened[own.start : own.stop], made[name][cell])
    return made


def _widened(lines: Tensor, size: int) -> Tensor:
    """(L, size) from ``lines`` (L, columns)."""
    widened = torch.empty((len(lines), size))
    for band in _bands(lines.shape[1], size, _COLUMNS):
        torch.mm(lines[:, band.old], band.weights.mT, out=widened[:, band.new])
    return widened


def _heightened(channels: Tensor, out: Tensor) -> None:
    """Resize ``channels`` (C, rows, size) to (C, size, size)."""
    for band in _bands(channels.shape[1], out.shape[1], _ROWS):
        weights = band.weights.expand(len(channels), -1, -1)
        torch.bmm(weights, channels[:, band.old], out=out[:, band.new])


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
    weights = _weights(torch.tensor([length]), length, size)[0]
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


def _runs(spans: Spans) -> Iterator[tuple[int, int]]:
    """First cell and the one after the last of runs of at most ``_PIXELS_AT_ONCE`` pixels."""
    first = 0
    for last in range(1, len(spans) + 1):
        if last == len(spans) or spans[last][1] - spans[first][0] > _PIXELS_AT_ONCE:
            yield first, last
            first = last


def _of_like_sizes(sizes: NDArray[np.int64], channels: int) -> Iterator[NDArray[np.int64]]:
    """Positions of the cells in groups that take up little more when padded to one size."""
    order = np.argsort(sizes.max(axis=1), kind="stable")
    first = 0
    for last in range(1, len(order) + 1):
        rows, columns = sizes[order[first : last + 1]].max(axis=0).tolist()
        if last == len(order) or (last + 1 - first) * channels * rows * columns > _PADDED_AT_ONCE:
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
            _fill_mask(layers[MASK][0], layers[LIGHT][0], part)
        else:
            torch.mul(layers[name], 1 / (CROP_STD * (255 if name == FLOW else 1)), out=part)
    return flat.sub_(CROP_MEAN / CROP_STD)


def _fill_mask(codes: Tensor, light: Tensor, channels: Tensor) -> None:
    own = (codes >> OWN_BIT) & 1
    outline = (codes >> EDGE_BIT) & own
    others = (codes & 1) ^ own
    for channel, values in zip(channels, (own, outline, others, light), strict=True):
        torch.mul(values, 1 / CROP_STD, out=channel)


def _sent(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _places(starts: Tensor, widths: Tensor, rows: int, columns: int) -> Tensor:
    """(N, rows, columns): where the pixels of each window are in (P,)."""
    down = torch.arange(rows, device=starts.device)[:, None]
    across = torch.arange(columns, device=starts.device)
    return starts[:, None, None] + down * widths[:, None, None] + across


def _weights(lengths: Tensor, longest: int, size: int) -> Tensor:
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
