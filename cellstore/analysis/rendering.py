"""A made-up plate set with truth masks, for the demo and the tests.

Each treatment changes shape, size, texture, brightness and number of the cells a little; wells
and plates differ besides, as real ones do. A field depends on nothing but the design's seed and
its own plate, well and site, so fields can be rendered in any order and on any machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

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
        if cells.count < population.count:
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
    radius = diameter / 2
    if cells.centres and rng.random() < population.crowding:  # beside another cell
        y, x, other = cells.centres[rng.integers(cells.count)]
        angle, distance = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.8, 1.15)
        y, x = y + distance * np.sin(angle), x + distance * np.cos(angle)
    else:
        height, width = cells.masks.shape
        y = rng.uniform(-radius / 2, height + radius / 2)
        x = rng.uniform(-radius / 2, width + radius / 2)
    box, rho = _normalised_radius(rng, cells.masks.shape, (y, x), diameter, population)
    inside = rho < 1
    taken = inside & (cells.masks[box] > 0)
    if taken.sum() > population.overlap * inside.sum():
        return
    visible = inside
    if taken.any():
        visible = inside & ~taken
        pieces, count = ndimage.label(visible)
        if count > 1:  # only the largest piece is seen
            visible = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    if visible.sum() < SMALLEST_AREA:
        return
    cells.centres.append((y, x, diameter / 2))
    cells.masks[box][visible] = cells.count
    cells.height[box][visible] = 1 - rho[visible] ** 2
    cells.behind[box][taken] += 1


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
    angle = np.arctan2(across, along)
    edge = np.ones_like(angle)
    for harmonic, size, shift in zip(HARMONICS, amplitude, phase, strict=True):
        edge += np.float32(size) * np.cos(angle * np.float32(harmonic) + np.float32(shift))
    rho = np.hypot(along, across) / np.maximum(edge, 0.3)
    return (box[0], box[1]), rho.astype(np.float32)


@dataclass(frozen=True)
class Effect:
    """What a treatment multiplies, against cells left alone."""

    diameter: float = 1.0
    count: float = 1.0
    elongation: float = 1.0
    irregularity: float = 1.0
    brightness: float = 1.0
    grain: float = 1.0
    """Strength of the texture."""
    coarseness: float = 1.0
    """Size of the texture's granules."""
    dome: float = 1.0
    """How much brighter the centre is than the edge."""

    def scaled(self, strength: float) -> Effect:
        """Every factor to the power ``strength``: 0 is no effect, 1 the full one."""
        return Effect(**{f.name: float(getattr(self, f.name) ** strength) for f in fields(self)})


@dataclass(frozen=True)
class Treatment:
    """A made-up compound: its name, its made-up target (a real gene symbol), its effect."""

    pert_iname: str
    target: str
    effect: Effect = Effect()


CONTROL = Treatment("DMSO", "")
"""The negative control, without target and effect."""

TREATMENTS = (
    CONTROL,
    Treatment("demotaxel", "TUBB", Effect(diameter=1.2, irregularity=4.0, count=0.8, grain=1.2)),
    Treatment("demolimus", "MTOR", Effect(diameter=0.8, brightness=0.75, dome=1.3, grain=0.6)),
    Treatment(
        "demostatin", "HDAC1", Effect(diameter=1.3, dome=0.35, grain=0.5, coarseness=1.5, count=0.8)
    ),
    Treatment(
        "demorubicin", "TOP2A", Effect(count=0.6, brightness=1.35, grain=2.2, coarseness=2.0)
    ),
    Treatment(
        "demozomib", "PSMB5", Effect(elongation=1.9, diameter=0.92, grain=1.5, coarseness=0.6)
    ),
    Treatment("demostaurin", "PRKCA", Effect(count=0.5, elongation=1.5, brightness=1.5, dome=1.5)),
    Treatment("demofetinib", "EGFR", Effect(dome=2.2, brightness=0.6, coarseness=0.7)),
    Treatment("demotrunculin", "ACTB", Effect(irregularity=6.0, elongation=1.5, brightness=0.8)),
    Treatment("demoquine", "ATP6V1A", Effect(grain=2.8, coarseness=3.0, diameter=1.15)),
    Treatment("demonolide", "HSP90AA1", Effect(diameter=0.7, count=1.3, grain=1.6, dome=0.6)),
    Treatment("democlosporin", "PPP3CA", Effect(brightness=2.0, dome=0.6, grain=0.5)),
)
"""What a rendered screen tests: names are invented, ends and targets follow the real classes."""

DEMO_TREATMENTS = TREATMENTS[:6]
"""Those of the demo."""


@dataclass(frozen=True)
class Channel:
    """How a dye shows a cell: share of light from the body, its rim, its nucleus; texture."""

    name: str
    body: float
    rim: float
    nucleus: float
    grain: float
    granule: float
    """Size of the granules, as a share of the diameter."""


CHANNELS = (
    Channel("Mito", body=0.9, rim=0.0, nucleus=-0.25, grain=0.30, granule=0.05),
    Channel("AGP", body=0.7, rim=0.35, nucleus=0.0, grain=0.15, granule=0.09),
    Channel("RNA", body=0.7, rim=0.0, nucleus=0.45, grain=0.20, granule=0.07),
    Channel("ER", body=0.9, rim=0.0, nucleus=-0.15, grain=0.20, granule=0.06),
    Channel("DNA", body=0.05, rim=0.0, nucleus=1.0, grain=0.25, granule=0.08),
)
"""In the order of the Cell Painting assay; ``ch1`` is the first."""


@dataclass(frozen=True)
class FieldSpec:
    """One field of view of a design. ``row``, ``column`` and ``site`` count from 1."""

    plate: str
    row: int
    column: int
    site: int
    treatment: Treatment

    @property
    def well(self) -> str:
        """For example ``B02``."""
        return f"{chr(ord('A') + self.row - 1)}{self.column:02d}"

    @property
    def core_name(self) -> str:
        """Core file name as an Opera Phenix writes it, for example ``r02c02f01``."""
        return f"r{self.row:02d}c{self.column:02d}f{self.site:02d}"

    def file_name(self, channel: int) -> str:
        """Phenix file name of a channel counted from 1."""
        return f"{self.core_name}p01-ch{channel}sk1fk1fl1.tiff"


@dataclass(frozen=True)
class PlateDesign:
    """A plate set: who sits where is shuffled per plate by ``seed``.

    ``effect`` scales every treatment's effect; 0 renders, for the same layout, plates on which
    the treatments do nothing. ``size``: side of a field in pixels; 208 is one tile of Cellpose.
    """

    seed: int = 1
    plates: tuple[str, ...] = ("DEMO0001", "DEMO0002")
    treatments: tuple[Treatment, ...] = DEMO_TREATMENTS
    control_wells: int = 6
    """DMSO wells per plate."""
    treated_wells: int = 2
    """Wells per plate of each other treatment."""
    sites: int = 2
    size: int = 208
    n_channels: int = 3
    effect: float = 1.0
    well_effect: float = 1.0
    """Scales what wells and plates do to their cells, whatever the treatment."""

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Dyes, ``ch1`` first."""
        return tuple(channel.name for channel in CHANNELS[: self.n_channels])

    def wells(self, plate: str) -> list[tuple[int, int, Treatment]]:
        """(row, column, treatment) of each well of ``plate``, in plate order, border left free."""
        content = [
            treatment
            for treatment in self.treatments
            for _ in range(self.control_wells if treatment == CONTROL else self.treated_wells)
        ]
        across = max(2, int(np.ceil(np.sqrt(len(content)))))
        positions = [(2 + i // across, 2 + i % across) for i in range(len(content))]
        order = _rng(self.seed, plate, "layout").permutation(len(content))
        return [(*position, content[i]) for position, i in zip(positions, order, strict=True)]

    def fields(self) -> Iterator[FieldSpec]:
        """Every field, in the order plate, row, column, site."""
        for plate in self.plates:
            for row, column, treatment in self.wells(plate):
                for site in range(1, self.sites + 1):
                    yield FieldSpec(plate, row, column, site, treatment)

    def __len__(self) -> int:
        return sum(1 for _ in self.fields())


@dataclass(frozen=True)
class RenderedField:
    """``channels``: (C, H, W) uint16. ``masks``: (H, W) uint16, the truth, labels 1..n."""

    channels: NDArray[np.uint16]
    masks: NDArray[np.uint16]


OFFSET, FULL = 300.0, 6000.0
"""Camera counts of no light, and of a typical cell above that."""

CELLS = 30
"""Untreated cells per field of 208 pixels."""

DIAMETER = 26.0
"""Median diameter of an untreated cell, pixels."""


def render_field(design: PlateDesign, spec: FieldSpec) -> RenderedField:
    """Render one field; equal arguments give equal pixels."""
    rng = _rng(design.seed, spec.plate, spec.row, spec.column, spec.site)
    effect = spec.treatment.effect.scaled(design.effect)
    # What the plate and the well do to every cell in it, treatment or not.
    of_plate = _rng(design.seed, spec.plate, "plate").standard_normal(5)
    of_well = _rng(design.seed, spec.plate, spec.row, spec.column).standard_normal(5)
    spread = design.well_effect * np.array([0.02, 0.08, 0.10, 0.20, 0.10])
    factors = np.exp(spread * (of_plate + of_well)).tolist()
    diameter, count, light, background, focus = factors
    room = (design.size / 208) ** 2
    population = Population(
        count=max(3, round(CELLS * room * effect.count * count)),
        diameter=DIAMETER * effect.diameter * diameter,
        elongation=1.2 * effect.elongation,
        irregularity=0.035 * effect.irregularity,
        crowding=0.4,
        overlap=0.2,
    )
    cells = lay_cells(rng, (design.size, design.size), population)
    brightness = np.exp(0.2 * rng.standard_normal(cells.count + 1)).astype(np.float32)
    brightness *= effect.brightness * light
    brightness[0] = 0
    lit = brightness[cells.masks] * (1 + 0.3 * cells.behind)
    vignette = 1 + 0.08 * smooth_noise(rng, lit.shape, 0.5 * design.size)
    planes = [
        _camera(
            rng, lit * _dye(rng, cells, channel, effect) * vignette, 0.08 * background, 0.8 * focus
        )
        for channel in CHANNELS[: design.n_channels]
    ]
    return RenderedField(np.stack(planes), cells.masks)


def _dye(
    rng: np.random.Generator, cells: CellMap, channel: Channel, effect: Effect
) -> NDArray[np.float32]:
    """Light of one dye per pixel of a cell of brightness 1."""
    height = cells.height
    dome = np.maximum(height, 0.02) ** np.float32(0.3 * effect.dome)
    nucleus = 1 / (1 + np.exp(-(height - 0.6) / 0.05))
    rim = np.exp(-height / 0.15)
    granule = max(0.7, DIAMETER * channel.granule * effect.coarseness)
    grain = 1 + channel.grain * effect.grain * smooth_noise(rng, height.shape, granule)
    shape = channel.body * dome + channel.rim * rim + channel.nucleus * nucleus
    light: NDArray[np.float32] = np.clip(shape, 0.05, None) * np.clip(grain, 0.2, 3.0)
    return light.astype(np.float32)


def _camera(
    rng: np.random.Generator, light: NDArray[np.float32], background: float, focus: float
) -> NDArray[np.uint16]:
    """Background, haze, focus, photons, read noise, camera counts."""
    waves = smooth_noise(rng, light.shape, 0.3 * light.shape[0])
    light = light + 0.12 * blurred(light, DIAMETER * 0.6)
    light = light + background * np.clip(1 + 0.2 * waves, 0.2, None)
    light = blurred(light.astype(np.float32), focus)
    photons = 250.0
    counted = rng.poisson(np.maximum(light, 0) * photons) / photons
    counts = OFFSET + FULL * counted + 30 * rng.standard_normal(light.shape)
    whole: NDArray[np.uint16] = np.rint(np.clip(counts, 0, 65535)).astype(np.uint16)
    return whole


def _rng(seed: int, plate: str, *position: int | str) -> np.random.Generator:
    """A generator of its own for each position, whatever was rendered before."""
    key = "/".join(str(part) for part in (seed, plate, *position))
    return np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
