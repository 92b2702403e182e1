"""Augmentation: the same for all crops of a cell, by its numbers alone, and flows flow right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstore.learn.augmentation import MOVES, augmented, moved
from cellstore.learn.crops import CellBlock

ALL = ("flips", "rotations", "intensity")


def cells(count: int = 64, size: int = 4) -> CellBlock:
    """Cells whose mask, flow's fourth channel and image show one random picture."""
    picture = torch.rand((count, 1, size, size), generator=torch.Generator().manual_seed(1))
    crops = {name: (2 * picture - 1).expand(-1, 4, -1, -1) for name in ("mask", "flow")}
    crops["image"] = (2 * picture - 1).expand(-1, 2, -1, -1)
    ids = torch.arange(count)
    return CellBlock(crops, torch.rand((count, 2)), ids % 3, ids)


def test_all_crops_of_a_cell_move_alike_and_features_stay() -> None:
    block = cells()
    made = augmented(block, ("flips", "rotations"), (0, 0, 0))
    mask = made.crops["mask"][:, 0]
    assert torch.equal(made.crops["flow"][:, 3], mask)
    assert torch.equal(made.crops["image"][:, 1], mask)
    assert torch.equal(made.features, block.features)
    assert torch.equal(made.cell_ids, block.cell_ids)


@pytest.mark.parametrize(
    ("kinds", "moves"),
    [(("flips",), 4), (("rotations",), 4), (("flips", "rotations"), 8), (("intensity",), 1)],
)
def test_cells_are_moved_in_each_way_and_no_other(kinds: tuple[str, ...], moves: int) -> None:
    block = cells()
    made = augmented(block, kinds, (3, 1, 4)).crops["mask"][:, :3]
    seen = set()
    for before, after in zip(block.crops["mask"][:, :3], made, strict=True):
        ways = [
            place for place, move in enumerate(MOVES) if torch.equal(moved(before, move), after)
        ]
        assert len(ways) == 1
        seen.add(ways[0])
    assert len(seen) == moves
    if kinds == ("rotations",):
        turned = [torch.rot90(block.crops["mask"][0], k, (-2, -1)) for k in range(4)]
        ways = [torch.stack([moved(block.crops["mask"][0], MOVES[place])]) for place in seen]
        assert all(any(torch.equal(way[0], turn) for turn in turned) for way in ways)


def test_the_same_numbers_give_the_same_crops_and_others_others() -> None:
    block = cells()
    first = augmented(block, ALL, (1, 2, 3))
    torch.manual_seed(9)  # the caller's random numbers do not matter
    again, other = augmented(block, ALL, (1, 2, 3)), augmented(block, ALL, (1, 2, 4))
    for name in block.crops:
        assert torch.equal(first.crops[name], again.crops[name])
        assert not torch.equal(first.crops[name], other.crops[name])


def test_grey_values_are_multiplied_and_nothing_else_is() -> None:
    block = cells()
    made = augmented(block, ("intensity",), (0, 0, 0))
    assert torch.equal(made.crops["flow"], block.crops["flow"])
    assert torch.equal(made.crops["mask"][:, :3], block.crops["mask"][:, :3])
    for name, first in (("mask", 3), ("image", 0)):
        before, after = ((b.crops[name][:, first:] + 1) / 2 for b in (block, made))
        inside = after < 1 - 1e-6
        factors = torch.where(inside, after / before, torch.nan).flatten(2)
        lowest = torch.where(factors.isnan(), torch.inf, factors).amin(2)
        highest = torch.where(factors.isnan(), -torch.inf, factors).amax(2)
        there = inside.flatten(2).any(2)
        torch.testing.assert_close(lowest[there], highest[there], rtol=1e-3, atol=1e-4)
        assert 1 / 1.25 - 1e-3 <= float(lowest[there].min()) < 0.9
        assert 1.1 < float(highest[there].max()) <= 1.25 + 1e-3
    image = made.crops["image"]
    assert not torch.equal(image[:, 0], image[:, 1])  # each channel by its own factor


def painted(field: np.ndarray) -> torch.Tensor:
    """A flow crop (1, 3, H, W) of vectors (2, H, W): ``plot.dx_to_circ`` of Cellpose 3.1.1 in full
    precision, normalised."""
    length = np.clip(np.sqrt((field**2).sum(axis=0)), 0, 1) / 2
    angles = np.arctan2(field[1], field[0]) + np.pi
    colours = [length * (np.cos(angles + 2 * k * np.pi / 3) + 1) for k in range(3)]
    return torch.from_numpy(np.stack(colours))[None] * 2 - 1


@pytest.mark.parametrize("move", MOVES)
def test_hues_follow_the_directions_that_they_show(move: tuple[bool, bool, bool]) -> None:
    """The painting of the moved field is the moved painting of the field."""
    field = np.random.default_rng(0).normal(0, 0.5, size=(2, 8, 8))
    transposed, upside_down, mirrored = move
    turned = field[::-1].transpose(0, 2, 1) if transposed else field
    if upside_down:
        turned = turned[:, ::-1] * np.array([-1, 1])[:, None, None]
    if mirrored:
        turned = turned[:, :, ::-1] * np.array([1, -1])[:, None, None]
    torch.testing.assert_close(moved(painted(field), move, is_flow=True), painted(turned))
