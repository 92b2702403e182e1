"""Which images train a network and which test it.

Whatever is drawn here depends on the seed and on the identifiers alone, not on the order of the
input. Down-sampling and grouping order their candidates by the SHA-256 of seed and identifier,
which no version of Python or NumPy can change. The published protocol draws with scikit-learn's
``StratifiedShuffleSplit``, hence with NumPy's ``RandomState``, whose stream is frozen (NEP 19).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cellstore.errors import UserInputError
from cellstore.terms import Subset


@dataclass(frozen=True, slots=True)
class SplitImage:
    """An image to be assigned: its class, and the group (well, plate) it must stay with."""

    image_id: int
    label: str
    group: str = ""


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
    class that was cut to the size of the next largest.
    """

    subsets: Mapping[int, Subset]
    left_out: tuple[LeftOut, ...] = ()
    downsampled: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def published_split(images: Iterable[SplitImage], seed: int, test_size: float = 0.2) -> Assignment:
    """The split of the published study: by image, train and test only.

    A class that is larger than every other is down-sampled to the size of the second largest;
    then ``StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)``. Groups
    are not looked at, so images of one well are on both sides: scores are those of wells already
    seen. The study stopped early on the same 20 %, so its test side is its validation side too.

    Raises ``UserInputError`` for fewer than two classes, a class with a single image, a class
    that would have no image on one side, or a ``test_size`` not between 0 and 1.
    """
    pool = _ordered(images)
    _check_share(test_size)
    _check_classes(pool)
    kept, downsampled = _downsample(pool, seed)
    test = _stratified_test(kept, seed, test_size)
    subsets = {
        image.image_id: Subset.TEST if image.image_id in test else Subset.TRAIN for image in kept
    }
    _check_both_sides(kept, subsets)
    return Assignment(subsets, downsampled=downsampled)


def grouped_split(
    images: Iterable[SplitImage],
    seed: int,
    test_size: float = 0.2,
    validation_size: float = 0.1,
    balance: bool = True,
) -> Assignment:
    """Split whole groups (wells by default), each class apart.

    A class with g groups gives ``max(1, round(g * test_size))`` of them to the test side,
    ``max(1, round(g * validation_size))`` to the validation side if g is 3 or more and
    ``validation_size`` is not 0, and the rest, at least one, to training. A class with one group
    cannot be on both sides and is left out. With ``balance``, a class with more groups than any
    other is first down-sampled to the number of groups of the second.

    Where a group holds several classes (plates), groups are dealt without regard to classes,
    nothing is down-sampled, and classes absent from train or test are left out afterwards.

    Raises ``UserInputError`` where fewer than two classes can be split, or sizes are not usable.
    """
    pool = _ordered(images)
    _check_share(test_size)
    _check_share(test_size + validation_size, validation_size)
    groups = _groups_by_label(pool)
    mixed = sum(len(keys) for keys in groups.values()) > len({image.group for image in pool})
    downsampled: dict[str, tuple[int, int]] = {}
    if mixed:
        sides = _deal({"": _all_groups(pool)}, seed, test_size, validation_size)
    else:
        usable = {label: keys for label, keys in groups.items() if len(keys) > 1}
        chosen, downsampled = _balance(usable, pool, seed) if balance else (usable, {})
        sides = _deal(chosen, seed, test_size, validation_size)
    return _assemble(pool, sides, downsampled)


def _ordered(images: Iterable[SplitImage]) -> list[SplitImage]:
    pool = sorted(images, key=lambda image: image.image_id)
    twice = [key for key, n in Counter(image.image_id for image in pool).items() if n > 1]
    if twice:
        raise UserInputError(f"Images were given more than once: {twice[:5]}.")
    return pool


def _draw_order(seed: int, purpose: str, key: object) -> tuple[str, str]:
    """A sort key that shuffles: the same for ever for the same seed, purpose and key."""
    text = json.dumps([seed, purpose, key], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest(), text


def _check_share(share: float, *others: float) -> None:
    if not 0 < share < 1 or any(other < 0 for other in others):
        raise UserInputError("Test and validation sizes must be shares, together between 0 and 1.")


def _check_classes(pool: Sequence[SplitImage]) -> None:
    counts = Counter(image.label for image in pool)
    if len(counts) < 2:
        raise UserInputError(
            f"A split needs images of at least two classes, there are {len(counts)}. "
            "Ingest more treatments or choose another label field."
        )
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        raise UserInputError(
            "A class needs two images or more to train and to test. These have a single image: "
            f"{_some(single)}. Ingest more of them, or split by well, which leaves them out."
        )


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _downsample(
    pool: list[SplitImage], seed: int
) -> tuple[list[SplitImage], dict[str, tuple[int, int]]]:
    counts = Counter(image.label for image in pool).most_common(2)
    (label, before), (_, after) = counts
    if before == after:
        return pool, {}
    drawn = sorted(
        (image for image in pool if image.label == label),
        key=lambda image: _draw_order(seed, "downsample", image.image_id),
    )
    dropped = {image.image_id for image in drawn[after:]}
    return [i for i in pool if i.image_id not in dropped], {label: (before, after)}


def _stratified_test(pool: Sequence[SplitImage], seed: int, test_size: float) -> set[int]:
    # Here and not at the top: grouped splits and leak checks need no scikit-learn.
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = [image.label for image in pool]
    n_test = math.ceil(len(pool) * test_size)
    if min(n_test, len(pool) - n_test) < len(set(labels)):
        raise UserInputError(
            f"{len(pool)} images with a test share of {test_size:g} cannot have all of "
            f"{len(set(labels))} classes on both sides. Ingest more images or leave classes out."
        )
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)
    _, test = next(splitter.split(labels, labels))
    return {pool[position].image_id for position in test}


def _check_both_sides(pool: Sequence[SplitImage], subsets: Mapping[int, Subset]) -> None:
    sides = _sides_by_label((image.label, subsets[image.image_id]) for image in pool)
    absent = sorted(label for label, seen in sides.items() if len(seen) < 2)
    if absent:
        raise UserInputError(
            f"Too few images to be on both sides: {_some(absent)}. "
            "Leave them out, ingest more of their images, or ask for a larger test share."
        )


def _sides_by_label(pairs: Iterable[tuple[str, Subset]]) -> dict[str, set[Subset]]:
    sides: dict[str, set[Subset]] = defaultdict(set)
    for label, subset in pairs:
        sides[label].add(subset)
    return sides


def _groups_by_label(pool: Sequence[SplitImage]) -> dict[str, list[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for image in pool:
        groups[image.label].add(image.group)
    return {label: sorted(groups[label]) for label in sorted(groups)}


def _all_groups(pool: Sequence[SplitImage]) -> list[str]:
    keys = sorted({image.group for image in pool})
    if len(keys) < 2:
        raise UserInputError(
            f"All images are in {len(keys)} group; a split needs two. Use a finer group level."
        )
    return keys


def _balance(
    groups: dict[str, list[str]], pool: Sequence[SplitImage], seed: int
) -> tuple[dict[str, list[str]], dict[str, tuple[int, int]]]:
    sizes = sorted(((len(keys), label) for label, keys in groups.items()), reverse=True)[:2]
    if len(sizes) < 2 or sizes[0][0] == sizes[1][0]:
        return groups, {}
    label, limit = sizes[0][1], sizes[1][0]
    drawn = sorted(groups[label], key=lambda key: _draw_order(seed, "downsample", key))[:limit]
    before = [image for image in pool if image.label == label]
    after = [image for image in before if image.group in set(drawn)]
    return {**groups, label: drawn}, {label: (len(before), len(after))}


def _deal(
    groups: Mapping[str, Sequence[str]], seed: int, test_size: float, validation_size: float
) -> dict[str, Subset]:
    sides: dict[str, Subset] = {}
    for label, keys in groups.items():
        drawn = sorted(keys, key=lambda key: _draw_order(seed, f"side of {label}", key))
        n_test, n_validation = _shares(len(drawn), test_size, validation_size)
        sides |= dict.fromkeys(drawn, Subset.TRAIN)
        sides |= dict.fromkeys(drawn[:n_test], Subset.TEST)
        sides |= dict.fromkeys(drawn[n_test : n_test + n_validation], Subset.VALIDATION)
    return sides


def _shares(count: int, test_size: float, validation_size: float) -> tuple[int, int]:
    """Groups for test and validation, of ``count`` of 2 or more; at least one is left to train."""
    wants_validation = count >= 3 and validation_size > 0
    n_test = max(1, min(round(count * test_size), count - 1 - wants_validation))
    if not wants_validation:
        return n_test, 0
    return n_test, max(1, min(round(count * validation_size), count - 1 - n_test))


def _assemble(
    pool: Sequence[SplitImage],
    sides: Mapping[str, Subset],
    downsampled: Mapping[str, tuple[int, int]],
) -> Assignment:
    placed = [(image, sides[image.group]) for image in pool if image.group in sides]
    seen = _sides_by_label((image.label, side) for image, side in placed)
    good = {label for label, found in seen.items() if {Subset.TRAIN, Subset.TEST} <= found}
    if len(good) < 2:
        raise UserInputError(
            f"Only {len(good)} classes have the two groups that a split needs. Ingest more "
            "replicates, choose another label field, or use a finer group level."
        )
    subsets = {image.image_id: side for image, side in placed if image.label in good}
    return Assignment(subsets, _left_out(pool, good), downsampled)


def _left_out(pool: Sequence[SplitImage], good: set[str]) -> tuple[LeftOut, ...]:
    images: dict[str, list[SplitImage]] = defaultdict(list)
    for image in pool:
        if image.label not in good:
            images[image.label].append(image)
    return tuple(
        LeftOut(label, _ids(images[label]), _reason(images[label])) for label in sorted(images)
    )


def _ids(images: Iterable[SplitImage]) -> tuple[int, ...]:
    return tuple(image.image_id for image in images)


def _reason(images: Sequence[SplitImage]) -> str:
    if len({image.group for image in images}) == 1:
        return "has one group only, which cannot be on both sides"
    return "its groups fell on one side; try another seed"
