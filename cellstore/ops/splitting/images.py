"""What is split, what comes out, and the order in which it is drawn."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cellstore.errors import UserInputError
from cellstore.terms import Subset


@dataclass(frozen=True, slots=True)
class SplitImage:
    """An image to be assigned: its class, and the group (well, plate) it must stay with.

    ``cells``: how many cells it has, where classes are balanced by cells.
    """

    image_id: int
    label: str
    group: str = ""
    cells: int = 0


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Images of a class that are on no side, and why."""

    label: str
    image_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Assignment:
    """The outcome of a split.

    ``subsets`` says the side of each image, by ascending image id. ``left_out`` lists classes
    that could not be split. ``downsampled`` gives the number of images before and after for each
    class that was cut.
    """

    subsets: Mapping[int, Subset]
    left_out: tuple[LeftOut, ...] = ()
    downsampled: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def ordered(images: Iterable[SplitImage]) -> list[SplitImage]:
    """Return the images by ascending id.

    Raises:
        UserInputError: one comes twice.
    """
    pool = sorted(images, key=lambda image: image.image_id)
    twice = [key for key, n in Counter(image.image_id for image in pool).items() if n > 1]
    if twice:
        raise UserInputError(f"Images were given more than once: {twice[:5]}.")
    return pool


def draw_order(seed: int, purpose: str, key: object) -> tuple[str, str]:
    """Return a sort key that shuffles: the same for ever for the same seed, purpose and key."""
    text = json.dumps([seed, purpose, key], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest(), text


def drawn(seed: int, purpose: str, keys: Iterable[str]) -> list[str]:
    """Return ``keys`` in the order in which they are drawn."""
    return sorted(keys, key=lambda key: draw_order(seed, purpose, key))


def some(names: Sequence[str], limit: int = 10) -> str:
    """Return the first few names in quotes, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def sides_by_label(pairs: Iterable[tuple[str, Subset]]) -> dict[str, set[Subset]]:
    """Return the sides on which each class is."""
    sides: dict[str, set[Subset]] = defaultdict(set)
    for label, subset in pairs:
        sides[label].add(subset)
    return sides


def groups_by_label(pool: Sequence[SplitImage]) -> dict[str, list[str]]:
    """Return the groups of each class, both in the order of their names."""
    groups: dict[str, set[str]] = defaultdict(set)
    for image in pool:
        groups[image.label].add(image.group)
    return {label: sorted(groups[label]) for label in sorted(groups)}


def is_mixed(groups: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether a group holds several classes, as a plate does."""
    return sum(map(len, groups.values())) > len({key for keys in groups.values() for key in keys})


def left_out(
    pool: Sequence[SplitImage], good: set[str], reason: str | None = None
) -> tuple[LeftOut, ...]:
    """Return the classes that are not ``good``, each with its images and why it is out."""
    images: dict[str, list[SplitImage]] = defaultdict(list)
    for image in pool:
        if image.label not in good:
            images[image.label].append(image)
    return tuple(
        LeftOut(label, ids(images[label]), reason or _reason(images[label]))
        for label in sorted(images)
    )


def ids(images: Iterable[SplitImage]) -> tuple[int, ...]:
    """Return the ids of ``images``."""
    return tuple(image.image_id for image in images)


def _reason(images: Sequence[SplitImage]) -> str:
    if len({image.group for image in images}) == 1:
        return "has one group only, which cannot be on both sides"
    return "its groups fell on one side; try another seed"
