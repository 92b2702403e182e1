"""Cross-validation: splits whose test sides are all images, each once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from cellstore.errors import UserInputError
from cellstore.terms import Subset

from .images import (
    Assignment,
    LeftOut,
    SplitImage,
    drawn,
    groups_by_label,
    is_mixed,
    left_out,
    ordered,
)


def folds(
    images: Iterable[SplitImage], seed: int, count: int, validation: bool = True
) -> list[Assignment]:
    """Return ``count`` splits that share their images and whose test sides partition them.

    Groups are dealt into ``count`` parts. Split i tests part i, validates on part i + 1 (the first
    one after the last) and trains on the others; without ``validation`` it trains on that, too.

    Where each group is of one class, the groups of a class are dealt one by one to successive
    parts, going on where the class before ended; a class with fewer than three groups (two
    without validation) is left out. Else (plates) ``StratifiedGroupKFold`` deals them, groups
    that are alike in the order drawn by ``seed``. Classes that some split would test without
    having trained on them are left out of all.

    Raises ``UserInputError``: there are fewer parts than sides, fewer groups than parts, or fewer
    than two classes are left.
    """
    pool = ordered(images)
    sides = 3 if validation else 2
    if count < sides:
        raise UserInputError(
            f"{count} folds cannot be {sides} sides: ask for {sides} folds or more"
            f"{', or for none to validate with --validation-size 0' if validation else ''}."
        )
    groups = groups_by_label(pool)
    parts = (
        _stratified(pool, seed, count) if is_mixed(groups) else _dealt(groups, seed, count, sides)
    )
    _check(len(set(parts.values())), count)
    good = _trained_wherever_tested(pool, parts, count, validation)
    if len(good) < 2:
        raise UserInputError(
            f"Only {len(good)} classes have enough groups for {count} folds. Ask for fewer folds, "
            "choose another label field, or use a finer group level."
        )
    out = _left_out(pool, good, sides)
    placed = {image.image_id: parts[image.group] for image in pool if image.label in good}
    return [_split(placed, part, count, validation, out) for part in range(count)]


def _dealt(
    groups: Mapping[str, Sequence[str]], seed: int, count: int, at_least: int
) -> dict[str, int]:
    parts: dict[str, int] = {}
    start = 0
    for label, keys in groups.items():
        if len(keys) < at_least:
            continue
        for place, key in enumerate(drawn(seed, f"fold of {label}", keys), start):
            parts[key] = place % count
        start += len(keys)
    return parts


def _stratified(pool: Sequence[SplitImage], seed: int, count: int) -> dict[str, int]:
    from sklearn.model_selection import StratifiedGroupKFold

    names = drawn(seed, "fold", {image.group for image in pool})
    _check(len(names), count)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [image.label for image in pool]
    groups = [numbers[image.group] for image in pool]
    parts: dict[str, int] = {}
    with warnings.catch_warnings():
        # Of classes with fewer images than parts; they are left out by name if need be.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splitter = StratifiedGroupKFold(n_splits=count, shuffle=False)
        for part, (_, tested) in enumerate(splitter.split(labels, labels, groups)):
            parts |= {names[groups[row]]: part for row in tested}
    return parts


def _check(groups: int, count: int) -> None:
    if groups < count:
        raise UserInputError(
            f"There are {groups} groups to put into {count} folds. Ask for fewer folds, or use a "
            "finer group level."
        )


def _side(part: int, tested: int, count: int, validation: bool) -> Subset:
    if part == tested:
        return Subset.TEST
    if validation and part == (tested + 1) % count:
        return Subset.VALIDATION
    return Subset.TRAIN


def _trained_wherever_tested(
    pool: Sequence[SplitImage], parts: Mapping[str, int], count: int, validation: bool
) -> set[str]:
    held: dict[str, set[int]] = defaultdict(set)
    for image in pool:
        if image.group in parts:
            held[image.label].add(parts[image.group])
    return {
        label
        for label, mine in held.items()
        if all(
            any(_side(part, tested, count, validation) is Subset.TRAIN for part in mine)
            for tested in mine
        )
    }


def _left_out(pool: Sequence[SplitImage], good: set[str], sides: int) -> tuple[LeftOut, ...]:
    return left_out(pool, good, f"needs {sides} groups, in different folds, to be trained in each")


def _split(
    placed: Mapping[int, int], tested: int, count: int, validation: bool, out: tuple[LeftOut, ...]
) -> Assignment:
    subsets = {key: _side(part, tested, count, validation) for key, part in placed.items()}
    return Assignment(subsets, out)
