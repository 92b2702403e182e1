"""Rendered fields of nuclei with truth masks: what the shipped network was trained on.

Star-shaped cells of any size and crowding, under a microscope that is never the same twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellstore.analysis.rendering import CellMap, Population, blurred, lay_cells, smooth_noise

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
    # A share of the area, skewed to sparse fields; the most crowded ones are confluent.
    covered = 0.03 + 0.6 * rng.beta(1.2, 1.8)
    count = int(np.clip(covered * shape[0] * shape[1] / (0.785 * diameter**2), 3, 600))
    population = Population(
        count=count,
        diameter=diameter,
        spread=rng.uniform(0.05, 0.35),
        elongation=rng.uniform(1.0, 1.7),
        irregularity=rng.choice([0.02, 0.05, 0.1, 0.16], p=[0.3, 0.4, 0.2, 0.1]),
        crowding=rng.choice([0.1, 0.5, 0.85]),
        overlap=rng.choice([0.1, 0.25, 0.35]),
    )
    cells = lay_cells(rng, shape, population)
    light = _cell_light(rng, cells, diameter)
    light = _surroundings(rng, light, diameter)
    image = _microscope(rng, light, diameter)
    return TrainingField(image, cells.masks, diameter)


def _cell_light(rng: np.random.Generator, cells: CellMap, diameter: float) -> NDArray[np.float32]:
    """Light of the cells alone, about 1 in a typical one, 0 outside."""
    brightness = np.exp(rng.uniform(0.05, 0.75) * rng.standard_normal(cells.count + 1))
    special = rng.random(cells.count + 1) < 0.03
    brightness[special] *= rng.uniform(2.0, 4.0)
    brightness[0] = 0
    light: NDArray[np.float32] = brightness[cells.masks].astype(np.float32)
    kind = rng.random()  # flat, domed or hollow across the cell
    if 0.2 <= kind < 0.85:
        light *= np.maximum(cells.height, 0.02) ** np.float32(rng.uniform(0.05, 0.7))
    elif kind >= 0.85:
        light *= 1 - np.float32(rng.uniform(0.1, 0.6)) * cells.height
    light *= 1 + rng.uniform(0, 0.8) * cells.behind
    shape = cells.masks.shape
    fine = smooth_noise(rng, shape, max(0.6, diameter * rng.uniform(0.02, 0.07)))
    coarse = smooth_noise(rng, shape, max(0.8, diameter * rng.uniform(0.1, 0.3)))
    grain = 1 + rng.uniform(0, 0.3) * fine + rng.uniform(0, 0.3) * coarse
    spots = smooth_noise(rng, shape, max(0.7, diameter * rng.uniform(0.05, 0.1)))
    grain[spots > 1.5] *= rng.choice([1.0, rng.uniform(0.3, 0.9), rng.uniform(1.1, 2.0)])
    light *= np.clip(grain, 0.15, 3.0)
    return light


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
        # Cells far out of focus: light without an outline, which is nobody's mask.
        lost = Population(int(rng.integers(1, 6)), diameter * 1.2, crowding=0.0)
        height, width = light.shape
        blob = (lay_cells(rng, (height, width), lost).masks > 0).astype(np.float32)
        blob = blurred(blob, diameter * rng.uniform(0.35, 0.6))
        light += blob * typical * rng.uniform(0.1, 0.35)
    if rng.random() < 0.35:  # debris
        count = int(rng.integers(1, 25))
        specks = np.zeros_like(light)
        rows, columns = (rng.integers(0, side, count) for side in light.shape)
        sigma = max(0.5, diameter * rng.uniform(0.02, 0.06))
        specks[rows, columns] = typical * rng.uniform(0.3, 2.0, count) * 6.3 * sigma**2
        light += blurred(specks, sigma)
    if rng.random() >= 0.5:  # uneven illumination: a smooth gain over the field
        waves = smooth_noise(rng, light.shape, min(light.shape) * rng.uniform(0.4, 1.0))
        light = light * np.clip(1 + rng.uniform(0.05, 0.3) * waves, 0.3, 2.0)
    return light


def _microscope(
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
