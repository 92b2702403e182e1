"""Crops changed at random while a network learns: turned, mirrored, brighter or darker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from .branches import FLOW, IMAGE, MASK
from .crops import CROP_MEAN, CROP_STD, CellBlock

BRIGHTEST = 1.25
"""Grey values are multiplied by a factor from 1 / 1.25 to 1.25, evenly drawn on a log scale."""

Move = tuple[bool, bool, bool]
"""Whether a picture is transposed, then mirrored top-bottom, then left-right."""

MOVES: tuple[Move, ...] = tuple((t, u, m) for t, u, m in product((False, True), repeat=3))
"""The eight symmetries of a square; those that do not transpose come first."""


def augmented(cells: CellBlock, kinds: Sequence[str], entropy: Sequence[int]) -> CellBlock:
    """Return ``cells`` with their crops changed, on the device where they are.

    ``entropy`` are whole numbers of 0 or more, for example seed, epoch and step: the same numbers
    and cells give the same crops. Features, labels and ids stay.
    """
    if not kinds or not cells.crops:
        return cells
    generator = torch.Generator().manual_seed(seed_of(*entropy))
    crops = dict(cells.crops)
    usable: Sequence[int] = range(len(MOVES)) if "rotations" in kinds else range(len(MOVES) // 2)
    if "flips" not in kinds:
        # No turn, and turns by 90, 180 and 270 degrees clockwise.
        usable = (0, 5, 3, 6) if "rotations" in kinds else ()
    if usable:
        drawn = torch.randint(len(usable), (len(cells),), generator=generator)
        moves = torch.tensor(usable)[drawn]
        for name, stack in crops.items():
            crops[name] = stack.clone()
            for index, move in enumerate(MOVES):
                chosen = torch.nonzero(moves == index).flatten()
                if index and len(chosen):
                    chosen = chosen.to(stack.device)
                    crops[name][chosen] = moved(stack[chosen], move, is_flow=name == FLOW)
    for name, stack in crops.items() if "intensity" in kinds else ():
        if name in (MASK, IMAGE):
            # Grey values times a factor of the cell; of branch image times one of the channel, too.
            first = 0 if name == IMAGE else 3  # only the last channel of the mask crop has some
            grey = stack[:, first:]
            shares = torch.rand((*grey.shape[:2], 1, 1), generator=generator)
            factors = torch.exp((2 * shares - 1) * math.log(BRIGHTEST)).to(stack)
            values = (grey * CROP_STD + CROP_MEAN).mul(factors).clamp(0, 1)
            values = (values - CROP_MEAN) / CROP_STD
            crops[name] = torch.cat([stack[:, :first], values], dim=1)
    return CellBlock(crops, cells.features, cells.labels, cells.cell_ids)


def seed_of(*entropy: int) -> int:
    """A seed of 63 bits for torch, mixed from whole numbers of 0 or more."""
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def moved(stack: Tensor, move: Move, *, is_flow: bool = False) -> Tensor:
    """Crops (N, C, S, S) moved by one symmetry; of a flow crop the hues follow."""
    transposed, upside_down, mirrored = move
    turned = stack.transpose(-1, -2) if transposed else stack
    axes = [axis for axis, wanted in ((-2, upside_down), (-1, mirrored)) if wanted]
    turned = turned.flip(axes) if axes else turned
    if not is_flow:
        return turned
    colours = _flow_colours(move).to(stack)
    hues = torch.einsum("ij,njhw->nihw", colours, turned[:, :3])
    return torch.cat([hues, turned[:, 3:]], dim=1)


def _flow_colours(move: Move) -> Tensor:
    """(3, 3): what a move makes of the red, green and blue of a flow rendering.

    Cellpose (``plot.dx_to_circ``) paints a vector (dy, dx) of length 2 m and angle a (that of
    -dy, -dx) as m (1 + cos(a + k 2 pi / 3)) for k of 0, 1, 2: linear in m, m cos(a) and m sin(a).
    A move of the picture is a linear map of (dy, dx), hence of the colours. White stays white, so
    it holds for crops normalised alike in all channels, too.
    """
    transposed, upside_down, mirrored = move
    vectors = torch.eye(2, dtype=torch.float64)
    if transposed:
        vectors = vectors.flip(0)
    signs = torch.tensor([-1.0 if upside_down else 1.0, -1.0 if mirrored else 1.0])
    change = torch.eye(3, dtype=torch.float64)
    change[1:, 1:] = signs.double()[:, None] * vectors
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    paint = torch.stack([torch.ones(3, dtype=torch.float64), angles.cos(), -angles.sin()], dim=1)
    colours: Tensor = paint @ change @ torch.linalg.inv(paint)
    return colours
