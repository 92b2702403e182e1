"""How many images, and how many tiles of them, go into one call of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from cellstore.errors import ImageError

IMAGES_PER_CALL = 8
"""On a GPU. On a CPU images go one by one: more would only take more memory."""

TILES = 8
"""Tiles of an image that the network sees at once: Cellpose's own ``batch_size``."""

T = TypeVar("T")
R = TypeVar("R")


class Batches:
    """Calls a network with as many images as fit into the memory of its device.

    ``images`` and ``tiles`` (per image) are what a call gets at most. A call that runs out of GPU
    memory is made again with half the images, and, at one image, with half the tiles; the sizes
    that then work are kept, so that a small card is found out once.
    """

    def __init__(self, images: int, tiles: int = TILES) -> None:
        self.images = images
        self.tiles = tiles

    def run(self, items: Sequence[T], call: Callable[[Sequence[T], int], list[R]]) -> list[R]:
        """Return what ``call(some items, tiles)`` makes of all items, in their order.

        Raises:
            ImageError: an item does not fit even alone and tile by tile. The sizes stay as
                they were: it is the image that is too large, not the batch.
        """
        made: list[R] = []
        while len(made) < len(items):
            made += self._some(items[len(made) : len(made) + self.images], call)
        return made

    def _some(self, items: Sequence[T], call: Callable[[Sequence[T], int], list[R]]) -> list[R]:
        """What ``call`` makes of the first of ``items``, as many as fit."""
        images, tiles = len(items), self.tiles
        while True:
            try:
                made = call(items[:images], tiles)
            except torch.cuda.OutOfMemoryError as error:
                if images == tiles == 1:
                    raise ImageError(
                        "The image does not fit into the memory of the GPU, even alone. "
                        "Segment it with --device cpu."
                    ) from error
            else:
                self._keep(images, tiles, tried=len(items))
                return made
            torch.cuda.empty_cache()
            images, tiles = (images // 2, tiles) if images > 1 else (1, tiles // 2)

    def _keep(self, images: int, tiles: int, tried: int) -> None:
        self.tiles = tiles
        if images < tried:
            self.images = images
