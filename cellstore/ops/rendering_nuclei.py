"""Made-up fluorescence fields, as varied as nuclei are: what the shipped network learns from.

Each field draws its own cell size, crowding, shape, texture, focus, background, contrast and
noise. The ranges are wide guesses about microscopes, not fitted to any data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .rendering_cells import CellMap, Population, blurred, lay_cells, smooth_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST, LARGEST = 9.0, 64.0
"""Range of the median cell diameter of a field, pixels."""


@dataclass(frozen=True)
class TrainingField:
    """``image``: (H, W) float32, any scale. ``masks``: (H, W) uint16. ``diameter``: pixels."""

    image: NDArray[np.float32]
    masks: NDArray[np.uint16]
    diameter: float


def render_nuclei(
    rng: np.random.Generator, shape: tuple[int, int], diameter: float | None = None
) -> TrainingField:
    """One field of ``shape`` (H, W) of cells with the given or a random median diameter."""
    if diameter is None:
        diameter = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
    cells = lay_cells(rng, shape, _population(rng, shape, diameter))
    light = _cell_light(rng, cells, diameter)
    light = _surroundings(rng, light, diameter)
    image = _camera(rng, light, diameter)
    return TrainingField(image, cells.masks, diameter)


def _population(rng: np.random.Generator, shape: tuple[int, int], diameter: float) -> Population:
    # A share of the area, skewed to sparse fields; the most crowded ones are confluent.
    covered = 0.03 + 0.6 * rng.beta(1.2, 1.8)
    count = int(np.clip(covered * shape[0] * shape[1] / (0.785 * diameter**2), 3, 600))
    return Population(
        count=count,
        diameter=diameter,
        spread=rng.uniform(0.05, 0.35),
        elongation=rng.uniform(1.0, 1.7),
        irregularity=rng.choice([0.02, 0.05, 0.1, 0.16], p=[0.3, 0.4, 0.2, 0.1]),
        crowding=rng.choice([0.1, 0.5, 0.85]),
        overlap=rng.choice([0.1, 0.25, 0.35]),
    )


def _cell_light(rng: np.random.Generator, cells: CellMap, diameter: float) -> NDArray[np.float32]:
    """Light of the cells alone, about 1 in a typical one, 0 outside."""
    brightness = np.exp(rng.uniform(0.05, 0.75) * rng.standard_normal(cells.count + 1))
    special = rng.random(cells.count + 1) < 0.03
    brightness[special] *= rng.uniform(2.0, 4.0)
    brightness[0] = 0
    light: NDArray[np.float32] = brightness[cells.masks].astype(np.float32)
    light *= _profile(rng, cells.height)
    light *= 1 + rng.uniform(0, 0.8) * cells.behind
    light *= _texture(rng, cells.masks.shape, diameter)
    return light


def _profile(rng: np.random.Generator, height: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flat, domed or hollow across the cell."""
    kind = rng.random()
    if kind < 0.2:
        return np.ones_like(height)
    if kind < 0.85:
        return np.maximum(height, 0.02) ** np.float32(rng.uniform(0.05, 0.7))
    return 1 - np.float32(rng.uniform(0.1, 0.6)) * height


def _texture(
    rng: np.random.Generator, shape: tuple[int, ...], diameter: float
) -> NDArray[np.float32]:
    fine = smooth_noise(rng, shape, max(0.6, diameter * rng.uniform(0.02, 0.07)))
    coarse = smooth_noise(rng, shape, max(0.8, diameter * rng.uniform(0.1, 0.3)))
    grain = 1 + rng.uniform(0, 0.3) * fine + rng.uniform(0, 0.3) * coarse
    spots = smooth_noise(rng, shape, max(0.7, diameter * rng.uniform(0.05, 0.1)))
    grain[spots > 1.5] *= rng.choice([1.0, rng.uniform(0.3, 0.9), rng.uniform(1.1, 2.0)])
    return np.clip(grain, 0.15, 3.0)


def _surroundings(
    rng: np.random.Generator, light: NDArray[np.float32], diameter: float
) -> NDArray[np.float32]:
    """Add what is not a cell: glow, uneven background, blobs out of focus, debris."""
    typical = float(np.median(light[light > 0])) if light.any() else 1.0
    light = light + rng.choice([0.0, rng.uniform(0, 0.5)]) * blurred(
        light, diameter * rng.uniform(0.3, 1.5)
    )
    background = typical * np.exp(rng.uniform(np.log(0.01), np.log(0.6)))
    waves = smooth_noise(rng, light.shape, min(light.shape) * rng.uniform(0.15, 0.6))
    light += background * np.maximum(0.1, 1 + rng.uniform(0, 0.5) * waves)
    if rng.random() < 0.25:
        light += _blobs(rng, light.shape, diameter) * typical * rng.uniform(0.1, 0.35)
    if rng.random() < 0.35:
        _add_debris(rng, light, typical, diameter)
    return _shaded(rng, light)


def _blobs(
    rng: np.random.Generator, shape: tuple[int, ...], diameter: float
) -> NDArray[np.float32]:
    """Cells far out of focus: light without an outline, which is nobody's mask."""
    population = Population(int(rng.integers(1, 6)), diameter * 1.2, crowding=0.0)
    blob = (lay_cells(rng, (shape[0], shape[1]), population).masks > 0).astype(np.float32)
    return blurred(blob, diameter * rng.uniform(0.35, 0.6))


def _add_debris(
    rng: np.random.Generator, light: NDArray[np.float32], typical: float, diameter: float
) -> None:
    count = int(rng.integers(1, 25))
    specks = np.zeros_like(light)
    rows, columns = (rng.integers(0, side, count) for side in light.shape)
    sigma = max(0.5, diameter * rng.uniform(0.02, 0.06))
    specks[rows, columns] = typical * rng.uniform(0.3, 2.0, count) * 6.3 * sigma**2
    light += blurred(specks, sigma)


def _shaded(rng: np.random.Generator, light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Uneven illumination: a smooth gain over the field."""
    if rng.random() < 0.5:
        return light
    waves = smooth_noise(rng, light.shape, min(light.shape) * rng.uniform(0.4, 1.0))
    return light * np.clip(1 + rng.uniform(0.05, 0.3) * waves, 0.3, 2.0)


def _camera(
    rng: np.random.Generator, light: NDArray[np.float32], diameter: float
) -> NDArray[np.float32]:
    """Focus, photons, read noise, saturation, gamma, 8-bit steps."""
    focus = rng.uniform(0.4, 1.2) + diameter * rng.choice([0.0, rng.uniform(0.0, 0.07)])
    light = blurred(light, focus)
    scale = max(float(np.percentile(light, 99)), 1e-6)
    photons = np.exp(rng.uniform(np.log(15), np.log(3000)))
    photo = rng.poisson(np.maximum(light / scale, 0) * photons).astype(np.float32) / photons
    image: NDArray[np.float32] = photo.astype(np.float32)
    image += rng.uniform(0, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.15:
        image = np.minimum(image, rng.uniform(0.5, 1.0))
    if rng.random() < 0.3:
        image = np.maximum(image, 0) ** np.float32(rng.uniform(0.5, 1.4))
    if rng.random() < 0.5:
        image = np.rint(np.clip(image / image.max(), 0, 1) * 255)
    return image.astype(np.float32)
