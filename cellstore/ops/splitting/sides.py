"""One split: by image as published, or whole groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cellstore.errors import UserInputError
from cellstore.terms import Subset

from .images import (
    Assignment,
    SplitImage,
    draw_order,
    drawn,
    groups_by_label,
    is_mixed,
    left_out,
    ordered,
    sides_by_label,
    some,
)


def published_split(images: Iterable[SplitImage], seed: int, test_size: float = 0.2) -> Assignment:
    """The split of the published study: by image, train and test only.

    A class that is larger than every other is down-sampled to the size of the second largest;
    then ``StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)``. Groups
    are not looked at, so images of one well are on both sides: scores are those of wells already
    seen. The study stopped early on the same 20 %, so its test side is its validation side too.

    Raises ``UserInputError`` for fewer than two classes, a class with a single image, a class
    that would have no image on one side, or a ``test_size`` not between 0 and 1.
    """
    pool = ordered(images)
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
    by_class: bool = False,
) -> Assignment:
    """Split whole groups (wells by default), each class apart.

    A class with g groups gives ``max(1, round(g * test_size))`` of them to the test side,
    ``max(1, round(g * validation_size))`` to the validation side if g is 3 or more and
    ``validation_size`` is not 0, and the rest, at least one, to training. A class with one group
    cannot be on both sides and is left out. With ``balance``, a class with more groups than any
    other is first down-sampled to the number of groups of the second.

    Where a group holds several classes (plates), groups are dealt without regard to classes,
    nothing is down-sampled, and classes absent from train or test are left out afterwards.
    ``by_class``: such a group (a compound with two targets) is dealt with the class of most of
    its images instead.

    Raises ``UserInputError`` where fewer than two classes can be split, or sizes are not usable.
    """
    pool = ordered(images)
    _check_share(test_size)
    _check_share(test_size + validation_size, validation_size)
    groups = groups_by_label(pool)
    downsampled: dict[str, tuple[int, int]] = {}
    if is_mixed(groups) and not by_class:
        sides = _deal({"": _all_groups(pool)}, seed, test_size, validation_size)
    else:
        groups = _groups_by_main_label(pool) if is_mixed(groups) else groups
        usable = {label: keys for label, keys in groups.items() if len(keys) > 1}
        chosen, downsampled = _balance(usable, pool, seed) if balance else (usable, {})
        sides = _deal(chosen, seed, test_size, validation_size)
    return _assemble(pool, sides, downsampled)


def named_split(
    images: Iterable[SplitImage],
    seed: int,
    test: Sequence[str],
    validation: Sequence[str] = (),
    validation_size: float = 0.1,
) -> Assignment:
    """Put the groups ``test`` and ``validation`` (plates) on those sides, and train on the others.

    Without ``validation``, ``max(1, round(g * validation_size))`` of the g groups are drawn from
    the others, unless ``validation_size`` is 0 or one group only is left to train. Classes absent
    from train or test are left out.

    Raises ``UserInputError``: a group is on two sides or has no images, or none is left to train.
    """
    pool = ordered(images)
    groups = _all_groups(pool)
    _check_named(groups, test, validation)
    rest = drawn(seed, "side of ", set(groups) - {*test, *validation})
    if not validation and validation_size and len(rest) > 1:
        wanted = max(1, min(round(len(groups) * validation_size), len(rest) - 1))
        validation = rest[:wanted]
    sides = dict.fromkeys(groups, Subset.TRAIN)
    sides |= dict.fromkeys(test, Subset.TEST)
    sides |= dict.fromkeys(validation, Subset.VALIDATION)
    return _assemble(pool, sides, {})


def cut_by_groups(
    images: Iterable[SplitImage], seed: int
) -> tuple[list[SplitImage], dict[str, tuple[int, int]]]:
    """Cut the class with most groups to the number of groups of the second, as one split does.

    Returns the images kept, and images before and after by class cut. Nothing is cut where a
    group holds several classes (plates).
    """
    pool = ordered(images)
    groups = groups_by_label(pool)
    if is_mixed(groups):
        return pool, {}
    usable = {label: keys for label, keys in groups.items() if len(keys) > 1}
    chosen, cut = _balance(usable, pool, seed)
    kept = {key for label in groups for key in chosen.get(label, groups[label])}
    return [image for image in pool if image.group in kept], cut


def _check_named(groups: Sequence[str], test: Sequence[str], validation: Sequence[str]) -> None:
    twice = sorted(set(test) & set(validation))
    if twice:
        raise UserInputError(f"On two sides at once: {some(twice)}. Name each on one side.")
    absent = sorted({*test, *validation} - set(groups))
    if absent:
        raise UserInputError(
            f"None of the images to split is on {some(absent)}. Those with images: {some(groups)}."
        )
    if not set(groups) - {*test, *validation}:
        raise UserInputError("None is left to train. Name fewer for test and validation.")


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
            f"{some(single)}. Ingest more of them, or split by well, which leaves them out."
        )


def _downsample(
    pool: list[SplitImage], seed: int
) -> tuple[list[SplitImage], dict[str, tuple[int, int]]]:
    counts = Counter(image.label for image in pool).most_common(2)
    (label, before), (_, after) = counts
    if before == after:
        return pool, {}
    order = sorted(
        (image for image in pool if image.label == label),
        key=lambda image: draw_order(seed, "downsample", image.image_id),
    )
    dropped = {image.image_id for image in order[after:]}
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
    sides = sides_by_label((image.label, subsets[image.image_id]) for image in pool)
    absent = sorted(label for label, seen in sides.items() if len(seen) < 2)
    if absent:
        raise UserInputError(
            f"Too few images to be on both sides: {some(absent)}. "
            "Leave them out with --min-images, ingest more of them, or ask for a larger test share."
        )


def _all_groups(pool: Sequence[SplitImage]) -> list[str]:
    keys = sorted({image.group for image in pool})
    if len(keys) < 2:
        raise UserInputError(
            f"All images are in {len(keys)} group; a split needs two. Use a finer group level."
        )
    return keys


def _groups_by_main_label(pool: Sequence[SplitImage]) -> dict[str, list[str]]:
    counts = Counter((image.group, image.label) for image in pool)
    main: dict[str, str] = {}
    for (group, label), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        main.setdefault(group, label)
    groups: dict[str, list[str]] = {label: [] for label in sorted(set(main.values()))}
    for group in sorted(main):
        groups[main[group]].append(group)
    return groups


def _balance(
    groups: dict[str, list[str]], pool: Sequence[SplitImage], seed: int
) -> tuple[dict[str, list[str]], dict[str, tuple[int, int]]]:
    sizes = sorted(((len(keys), label) for label, keys in groups.items()), reverse=True)[:2]
    if len(sizes) < 2 or sizes[0][0] == sizes[1][0]:
        return groups, {}
    label, limit = sizes[0][1], sizes[1][0]
    chosen = drawn(seed, "downsample", groups[label])[:limit]
    before = [image for image in pool if image.label == label]
    after = [image for image in before if image.group in set(chosen)]
    return {**groups, label: chosen}, {label: (len(before), len(after))}


def _deal(
    groups: Mapping[str, Sequence[str]], seed: int, test_size: float, validation_size: float
) -> dict[str, Subset]:
    sides: dict[str, Subset] = {}
    for label, keys in groups.items():
        order = drawn(seed, f"side of {label}", keys)
        n_test, n_validation = _shares(len(order), test_size, validation_size)
        sides |= dict.fromkeys(order, Subset.TRAIN)
        sides |= dict.fromkeys(order[:n_test], Subset.TEST)
        sides |= dict.fromkeys(order[n_test : n_test + n_validation], Subset.VALIDATION)
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
    seen = sides_by_label((image.label, side) for image, side in placed)
    good = {label for label, found in seen.items() if {Subset.TRAIN, Subset.TEST} <= found}
    if len(good) < 2:
        raise UserInputError(
            f"Only {len(good)} classes have the two groups that a split needs. Ingest more "
            "replicates, choose another label field, or use a finer group level."
        )
    subsets = {image.image_id: side for image, side in placed if image.label in good}
    return Assignment(subsets, left_out(pool, good), downsampled)
