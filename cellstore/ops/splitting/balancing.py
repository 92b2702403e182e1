"""Classes that have too many images are cut, those that have too few are left out."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cellstore.errors import UnknownNameError, UserInputError

from .images import LeftOut, SplitImage, draw_order, left_out, ordered

SECOND_LARGEST = "second-largest"
MEDIAN = "median"


@dataclass(frozen=True)
class Cap:
    """How much of a class is kept: a number, or that of other classes.

    ``limit``: a number, ``second-largest`` (the size of the second largest class) or ``median``
    (of the sizes of all other classes, rounded down).
    """

    label: str
    limit: int | str


def enough(
    images: Iterable[SplitImage], minimum: int
) -> tuple[list[SplitImage], tuple[LeftOut, ...]]:
    """Return the images of classes that have ``minimum`` images or more, and those left out.

    Raises ``UserInputError`` where fewer than two classes have enough.
    """
    pool = ordered(images)
    counts = Counter(image.label for image in pool)
    good = {label for label, count in counts.items() if count >= minimum}
    if len(good) < 2:
        raise UserInputError(
            f"Of {len(counts)} classes, {len(good)} have {minimum} images or more; a split needs "
            "two. Ask for fewer with --min-images, or choose another --field."
        )
    kept = [image for image in pool if image.label in good]
    return kept, left_out(pool, good, f"has fewer than {minimum} images")


def balanced(
    images: Iterable[SplitImage], seed: int, caps: Sequence[Cap] | None, by_cells: bool = False
) -> tuple[list[SplitImage], dict[str, tuple[int, int]]]:
    """Cut classes to size; return the images kept, and images before and after by class cut.

    Sizes are in images, or with ``by_cells`` in cells; a cut class never has more than its cap.
    All caps are counted before anything is cut. ``None`` cuts the largest class to the size of
    the second largest. Whole images are dropped, in an order drawn by ``seed``, such that as many
    groups (wells) as possible keep one: first one image of each group, then a second, and so on.

    Raises ``UserInputError``: a class is named twice, is not there, or would have no image left.
    """
    pool = ordered(images)
    sizes = _sizes(pool, by_cells)
    limits = _limits(sizes, _default(sizes) if caps is None else caps)
    dropped: set[int] = set()
    cut: dict[str, tuple[int, int]] = {}
    for label, limit in sorted(limits.items()):
        if sizes[label] <= limit:
            continue
        mine = [image for image in pool if image.label == label]
        kept = _kept(mine, seed, limit, by_cells)
        dropped |= {image.image_id for image in mine} - kept
        cut[label] = (len(mine), len(kept))
    return [image for image in pool if image.image_id not in dropped], cut


def _sizes(pool: Sequence[SplitImage], by_cells: bool) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for image in pool:
        sizes[image.label] += image.cells if by_cells else 1
    return dict(sizes)


def _default(sizes: Mapping[str, int]) -> list[Cap]:
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:2]
    return [Cap(ranked[0][0], ranked[1][1])] if len(ranked) == 2 else []


def _limits(sizes: Mapping[str, int], caps: Sequence[Cap]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for cap in caps:
        if cap.label not in sizes:
            raise UnknownNameError.of("class", cap.label, sizes)
        if cap.label in limits:
            raise UserInputError(f"The class {cap.label!r} is to be cut twice. Say it once.")
        limits[cap.label] = _limit(sizes, cap)
    return limits


def _limit(sizes: Mapping[str, int], cap: Cap) -> int:
    others = [size for label, size in sizes.items() if label != cap.label]
    if isinstance(cap.limit, int):
        return cap.limit
    if not others:
        raise UserInputError(f"There is no other class than {cap.label!r} to compare it with.")
    if cap.limit == SECOND_LARGEST:
        return sorted(sizes.values())[-2]
    return int(statistics.median(others))


def _kept(images: Sequence[SplitImage], seed: int, limit: int, by_cells: bool) -> set[int]:
    kept: set[int] = set()
    total = 0
    for image in _one_of_each_group_first(images, seed):
        total += image.cells if by_cells else 1
        if total > limit:
            break
        kept.add(image.image_id)
    if not kept:
        raise UserInputError(
            f"Not one image of {images[0].label!r} fits into {limit} "
            f"{'cells' if by_cells else 'images'}. Allow more, or leave the class out with --where."
        )
    return kept


def _one_of_each_group_first(images: Sequence[SplitImage], seed: int) -> list[SplitImage]:
    keys = {image.image_id: draw_order(seed, "cap", image.image_id) for image in images}
    turns: dict[str, int] = defaultdict(int)
    placed = []
    for image in sorted(images, key=lambda image: keys[image.image_id]):
        placed.append((turns[image.group], keys[image.image_id], image))
        turns[image.group] += 1
    return [image for _, _, image in sorted(placed, key=lambda item: item[:2])]
