"""Outlines of made-up cells, and the smooth random fields that give them a texture.

A cell is a star-shaped curve: an ellipse whose radius is modulated by a few harmonics of the
angle. Cells are laid down one after another; a later one that overlaps an earlier one lies
behind it, which gives the touching, cut outlines of a crowded field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

HARMONICS = np.arange(2, 7)
"""Bumps around the outline: 2 gives a bean, 6 a cog."""

SMALLEST_AREA = 20
"""Pixels; what is left of a cell behind others or beyond the border may not be less."""


@dataclass(frozen=True)
class Population:
    """How the cells of one field look and lie, before light falls on them.

    ``diameter``: median, pixels. ``spread``: standard deviation of its logarithm.
    ``elongation``: median ratio of the axes. ``irregularity``: amplitude of the harmonics,
    as a share of the radius. ``crowding``: probability that a cell is put beside another one.
    ``overlap``: largest share of a cell that may lie behind others.
    """

    count: int
    diameter: float
    spread: float = 0.12
    elongation: float = 1.25
    irregularity: float = 0.05
    crowding: float = 0.3
    overlap: float = 0.25


@dataclass
class CellMap:
    """What :func:`lay_cells` returns; every array is (H, W).

    ``masks``: uint16, labels 1..count. ``height``: float32, 0 at a cell's edge, 1 at its centre.
    ``behind``: float32, number of further cells that lie behind this pixel.
    """

    masks: NDArray[np.uint16]
    height: NDArray[np.float32]
    behind: NDArray[np.float32]
    centres: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of cells."""
        return len(self.centres)


def lay_cells(rng: np.random.Generator, shape: tuple[int, int], population: Population) -> CellMap:
    """Lay up to ``population.count`` cells into a field of ``shape`` (H, W).

    Fewer where they do not fit: each gets a few attempts, as many as there are cells in all.
    """
    cells = CellMap(
        np.zeros(shape, np.uint16), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    )
    for _ in range(3 * population.count):
        if cells.count >= population.count:
            break
        _try_cell(rng, cells, population)
    return cells


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], scale: float
) -> NDArray[np.float32]:
    """Random field (H, W) of mean 0 and deviation 1, correlated over about ``scale`` pixels."""
    step = max(1, int(scale / 2))
    coarse = tuple(int(np.ceil(side / step)) + 2 for side in shape)
    noise = rng.standard_normal(coarse, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, scale / step, mode="wrap")
    if step > 1:
        noise = ndimage.zoom(noise, step, order=1)
    noise = noise[: shape[0], : shape[1]]
    even: NDArray[np.float32] = (noise - noise.mean()) / max(float(noise.std()), 1e-6)
    return even


def blurred(image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Gaussian blur; a wide one is made on a coarser grid, where it costs less."""
    step = max(1, int(sigma / 3))
    soft: NDArray[np.float32]
    if step == 1:
        soft = ndimage.gaussian_filter(image, sigma)
        return soft
    small = ndimage.gaussian_filter(image[::step, ::step], sigma / step)
    wide = np.pad(small, ((0, 1), (0, 1)), mode="edge")
    soft = ndimage.zoom(wide, step, order=1)[: image.shape[0], : image.shape[1]]
    return soft


def _try_cell(rng: np.random.Generator, cells: CellMap, population: Population) -> None:
    diameter = population.diameter * np.exp(population.spread * rng.standard_normal())
    y, x = _position(rng, cells, population.crowding, diameter / 2)
    box, rho = _normalised_radius(rng, cells.masks.shape, (y, x), diameter, population)
    inside = rho < 1
    taken = inside & (cells.masks[box] > 0)
    if taken.sum() > population.overlap * inside.sum():
        return
    visible = _one_piece(inside & ~taken) if taken.any() else inside
    if visible.sum() < SMALLEST_AREA:
        return
    cells.centres.append((y, x, diameter / 2))
    cells.masks[box][visible] = cells.count
    cells.height[box][visible] = 1 - rho[visible] ** 2
    cells.behind[box][taken] += 1


def _position(
    rng: np.random.Generator, cells: CellMap, crowding: float, radius: float
) -> tuple[float, float]:
    if cells.centres and rng.random() < crowding:
        y, x, other = cells.centres[rng.integers(cells.count)]
        angle, distance = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.8, 1.15)
        return y + distance * np.sin(angle), x + distance * np.cos(angle)
    height, width = cells.masks.shape
    margin = radius / 2
    return rng.uniform(-margin, height + margin), rng.uniform(-margin, width + margin)


def _normalised_radius(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    centre: tuple[float, float],
    diameter: float,
    population: Population,
) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
    """The box around a cell, and in it the distance from the centre in units of the edge's."""
    ratio = max(1.0, population.elongation * np.exp(0.15 * rng.standard_normal()))
    tilt = rng.uniform(0, np.pi)
    amplitude = population.irregularity * rng.standard_normal(len(HARMONICS)) / HARMONICS * 2
    phase = rng.uniform(0, 2 * np.pi, len(HARMONICS))
    reach = diameter / 2 * np.sqrt(ratio) * (1 + np.abs(amplitude).sum())
    box = tuple(
        slice(*np.clip([int(c - reach) - 1, int(c + reach) + 2], 0, side))
        for c, side in zip(centre, shape, strict=True)
    )
    rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) for s in box)
    dy, dx = rows[:, None] - np.float32(centre[0]), columns[None] - np.float32(centre[1])
    along = (dx * np.cos(tilt) + dy * np.sin(tilt)) / (diameter / 2 * np.sqrt(ratio))
    across = (dy * np.cos(tilt) - dx * np.sin(tilt)) / (diameter / 2 / np.sqrt(ratio))
    edge = _outline(np.arctan2(across, along), amplitude, phase)
    rho = np.hypot(along, across) / np.maximum(edge, 0.3)
    return (box[0], box[1]), rho.astype(np.float32)


def _outline(
    angle: NDArray[np.float32], amplitude: NDArray[Any], phase: NDArray[Any]
) -> NDArray[np.float32]:
    edge = np.ones_like(angle)
    for harmonic, size, shift in zip(HARMONICS, amplitude, phase, strict=True):
        edge += np.float32(size) * np.cos(angle * np.float32(harmonic) + np.float32(shift))
    return edge


def _one_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected piece of ``mask``."""
    pieces, count = ndimage.label(mask)
    if count <= 1:
        return mask
    largest: NDArray[np.bool_] = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    return largest
