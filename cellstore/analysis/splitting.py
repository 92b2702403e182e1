"""Who trains and who tests: by image as published, by whole groups, or in folds.

Classes are cut to size first (:func:`enough`, :func:`balanced`, :func:`cut_by_groups`,
:func:`cut_largest`); then images are assigned (:func:`grouped_split`, :func:`named_split`,
:func:`folds`, :func:`published_split`).
Images come by ascending id. The outcome depends on the seed and on their ids, groups and labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..enums import Subset
from ..errors import UnknownNameError, UserInputError, some_of

Cut = dict[str, tuple[int, int]]
"""The number of images before and after, by class that was cut."""


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
class ExcludedClass:
    """A class that is in no subset, how many images it has, and why."""

    label: str
    images: int
    reason: str


@dataclass(frozen=True)
class Assignment:
    """The subset of each image, by ascending image id, and the classes that could not be split."""

    subsets: Mapping[int, Subset]
    excluded: tuple[ExcludedClass, ...] = ()


def draw_order(seed: int, purpose: str, key: object) -> tuple[str, str]:
    """Return a sort key that shuffles: the same for ever for the same seed, purpose and key."""
    text = json.dumps([seed, purpose, key], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest(), text


def drawn(seed: int, purpose: str, keys: Iterable[str]) -> list[str]:
    """Return ``keys`` in the order in which they are drawn."""
    return sorted(keys, key=lambda key: draw_order(seed, purpose, key))


def groups_by_label(
    pool: Sequence[SplitImage], *, by_main_label: bool = False
) -> dict[str, list[str]]:
    """Return the groups of each class, both in the order of their names.

    ``by_main_label``: a group that holds several classes is of the one that most of its images
    have; else it is among the groups of each of them.
    """
    counts = Counter((image.group, image.label) for image in pool)
    found: dict[str, list[str]] = defaultdict(list)
    if by_main_label:
        main: dict[str, str] = {}
        for (group, label), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            main.setdefault(group, label)
        counts = Counter(main.items())
    for group, label in sorted(counts):
        found[label].append(group)
    return {label: found[label] for label in sorted(found)}


def is_mixed(groups: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether a group holds several classes, as a plate does."""
    return sum(map(len, groups.values())) > len({key for keys in groups.values() for key in keys})


def excluded_classes(
    pool: Sequence[SplitImage], kept: set[str], reason: str | None = None, unit: str = "group"
) -> tuple[ExcludedClass, ...]:
    """Return the classes that are not ``kept``, each with its images and the reason.

    ``unit``: what a group is: a well, a plate, ...
    """
    counts = Counter(image.label for image in pool)
    groups = groups_by_label(pool)
    found = []
    for label in sorted(counts.keys() - kept):
        why = reason or f"its {unit}s fell in one subset; try another seed"
        if reason is None and len(groups[label]) == 1:
            why = f"has one {unit} only, and two are needed: add one to keep the class"
            if unit == "well":
                why += ", or use --group image, which trains and tests on the same well"
        found.append(ExcludedClass(label, counts[label], why))
    return tuple(found)


def enough(
    pool: Sequence[SplitImage], minimum: int
) -> tuple[Sequence[SplitImage], tuple[ExcludedClass, ...]]:
    """Return the images of classes that have ``minimum`` images or more, and the other classes.

    Raises ``UserInputError`` where fewer than two classes have enough.
    """
    counts = Counter(image.label for image in pool)
    kept = {label for label, count in counts.items() if count >= minimum}
    if len(kept) < 2:
        raise UserInputError(
            f"Of {len(counts)} classes, {len(kept)} have {minimum} images or more; a split needs "
            "two. Ask for fewer with --min-images, or choose another --field."
        )
    few = excluded_classes(pool, kept, f"has fewer than {minimum} images")
    return [image for image in pool if image.label in kept], few


def balanced(
    pool: Sequence[SplitImage],
    seed: int,
    caps: Sequence[tuple[str, str]] | None,
    by_cells: bool = False,
) -> tuple[Sequence[SplitImage], Cut]:
    """Cut classes to size; return the images kept, and images before and after by class cut.

    ``caps``: a class and what is kept of it: a number, ``second-largest`` (the size of the second
    largest class) or ``median`` (of the sizes of all other classes, rounded down). Sizes are in
    images, or with ``by_cells`` in cells; a cut class never has more than its cap. All caps are
    counted before anything is cut. ``None`` cuts the largest class to the size of the second
    largest. Whole images are dropped, in an order drawn by ``seed``, such that as many groups
    (wells) as possible keep one: first one image of each group, then a second, and so on.

    Raises ``UserInputError``: a class is named twice, is not there, or would have no image left.
    """
    sizes = Counter[str]()
    for image in pool:
        sizes[image.label] += image.cells if by_cells else 1
    ranked = sorted(sizes, key=lambda label: (-sizes[label], label))
    if caps is None:
        caps = [(ranked[0], "second-largest")] if len(ranked) > 1 else []
    limits: dict[str, int] = {}
    for label, size in caps:
        if label not in sizes:
            raise UnknownNameError.of("class", label, sizes)
        if label in limits:
            raise UserInputError(f"The class {label!r} is to be cut twice. Name it once.")
        others = [sizes[other] for other in ranked if other != label]
        if size.isdecimal():
            limits[label] = int(size)
        elif not others:
            raise UserInputError(
                f"The only class is {label!r}: there is no other to compare it with."
            )
        else:
            median = int(statistics.median(others))
            limits[label] = median if size == "median" else sizes[ranked[1]]

    dropped: set[int] = set()
    cut: Cut = {}
    for label, limit in sorted(limits.items()):
        if sizes[label] <= limit:
            continue
        mine = [image for image in pool if image.label == label]
        mine.sort(key=lambda image: draw_order(seed, "cap", image.image_id))
        turns = Counter[str]()  # how many images of a group come before
        order: dict[int, list[SplitImage]] = defaultdict(list)
        for image in mine:
            order[turns[image.group]].append(image)
            turns[image.group] += 1
        kept, total = set[int](), 0
        for image in (image for turn in order.values() for image in turn):
            total += image.cells if by_cells else 1
            if total > limit:
                break
            kept.add(image.image_id)
        if not kept:
            raise UserInputError(
                f"Not one image of {label!r} fits into {limit} "
                f"{'cells' if by_cells else 'images'}. Allow more, or exclude the class with "
                "--where."
            )
        dropped |= {image.image_id for image in mine} - kept
        cut[label] = (len(mine), len(kept))
    return [image for image in pool if image.image_id not in dropped], cut


def cut_by_groups(
    pool: Sequence[SplitImage], seed: int, by_class: bool = False
) -> tuple[Sequence[SplitImage], Cut]:
    """Cut the class with most groups to the number of groups of the second.

    Returns the images kept, and images before and after by class cut. Classes of one group do not
    count. Nothing is cut where a group holds several classes (plates), unless ``by_class``; see
    :func:`grouped_split`.
    """
    groups = groups_by_label(pool, by_main_label=by_class)
    sizes = sorted(((len(keys), label) for label, keys in groups.items() if len(keys) > 1))[-2:]
    if is_mixed(groups) or len(sizes) < 2 or sizes[0][0] == sizes[1][0]:
        return pool, {}
    (limit, _), (_, label) = sizes
    dropped = set(drawn(seed, "downsample", groups[label])[limit:])
    kept = [image for image in pool if image.group not in dropped]
    before, after = (sum(image.label == label for image in some) for some in (pool, kept))
    return kept, {label: (before, after)}


def cut_largest(pool: Sequence[SplitImage], seed: int) -> tuple[Sequence[SplitImage], Cut]:
    """Cut a class that is larger than every other to the size of the second largest, by image.

    Returns the images kept, and images before and after by class cut.
    """
    ranked = Counter(image.label for image in pool).most_common(2)
    if len(ranked) < 2 or ranked[0][1] == ranked[1][1]:
        return pool, {}
    (label, before), (_, after) = ranked
    mine = [image.image_id for image in pool if image.label == label]
    dropped = set(sorted(mine, key=lambda key: draw_order(seed, "downsample", key))[after:])
    kept = [image for image in pool if image.image_id not in dropped]
    return kept, {label: (before, after)}


def grouped_split(
    pool: Sequence[SplitImage],
    seed: int,
    test_size: float = 0.2,
    validation_size: float = 0.1,
    by_class: bool = False,
    unit: str = "group",
) -> Assignment:
    """Split whole groups (wells by default), each class apart; ``unit`` is what they are called.

    A class with g groups gives ``max(1, round(g * test_size))`` of them to the test subset,
    ``max(1, round(g * validation_size))`` to the validation subset if g is 3 or more and
    ``validation_size`` is not 0, and the rest, at least one, to training. A class with one group
    cannot be in both subsets and is excluded.

    Where a group holds several classes (plates), groups are dealt without regard to classes, and
    classes absent from train or test are excluded afterwards. ``by_class``: such a group (a
    compound with two targets) is dealt with the class of most of its images instead. The sizes
    are shares, together below 1.

    Raises ``UserInputError`` where fewer than two classes can be split.
    """
    groups = groups_by_label(pool, by_main_label=by_class)
    if is_mixed(groups):
        groups = {"": _all_groups(pool, unit)}
    subset_of: dict[str, Subset] = {}
    for label, keys in groups.items():
        count = len(keys)
        if count < 2:
            continue
        validates = count >= 3 and validation_size > 0
        n_test = max(1, min(round(count * test_size), count - 1 - validates))
        n_both = n_test
        if validates:
            n_both += max(1, min(round(count * validation_size), count - 1 - n_test))
        order = drawn(seed, f"side of {label}", keys)
        subset_of |= dict.fromkeys(order[:n_test], Subset.TEST)
        subset_of |= dict.fromkeys(order[n_test:n_both], Subset.VALIDATION)
        subset_of |= dict.fromkeys(order[n_both:], Subset.TRAIN)
    return _with_classes_in_both(pool, subset_of, unit)


def named_split(
    pool: Sequence[SplitImage],
    seed: int,
    test: Sequence[str],
    validation: Sequence[str] = (),
    validation_size: float = 0.1,
) -> Assignment:
    """Put the groups ``test`` and ``validation`` (plates) in those subsets; train on the others.

    Without ``validation``, ``max(1, round(g * validation_size))`` of the g groups are drawn from
    the others, unless ``validation_size`` is 0 or one group only is left to train. Classes absent
    from train or test are excluded.

    Raises ``UserInputError``: a group is in two subsets or has no images, or none is left to train.
    """
    groups = _all_groups(pool, "plate")
    named = {*test, *validation}
    twice, absent = sorted(set(test) & set(validation)), sorted(named - set(groups))
    if twice:
        raise UserInputError(f"In two subsets at once: {some_of(twice)}. Name each once.")
    if absent:
        raise UserInputError(
            f"None of the images to split is on {some_of(absent)}. Those with images: "
            f"{some_of(groups)}."
        )
    rest = drawn(seed, "side of ", set(groups) - named)
    if not rest:
        raise UserInputError("No image is left to train with. Name fewer for test and validation.")
    if not validation and validation_size and len(rest) > 1:
        validation = rest[: max(1, min(round(len(groups) * validation_size), len(rest) - 1))]
    subset_of = dict.fromkeys(groups, Subset.TRAIN)
    subset_of |= dict.fromkeys(test, Subset.TEST)
    subset_of |= dict.fromkeys(validation, Subset.VALIDATION)
    return _with_classes_in_both(pool, subset_of, "plate")


def _all_groups(pool: Sequence[SplitImage], unit: str) -> list[str]:
    keys = sorted({image.group for image in pool})
    if len(keys) < 2:
        raise UserInputError(
            f"All images are of {len(keys)} {unit}, and a split needs two. Ingest more, or use a "
            "finer group level: --group well."
        )
    return keys


def _counts(groups: Mapping[str, Sequence[str]], unit: str) -> str:
    """Return ``'a' has 1 well, 'b' has 2 wells``, those with the fewest first."""
    ranked = sorted(groups.items(), key=lambda item: (len(item[1]), item[0]))
    return some_of(
        [
            f"{label!r} has {len(keys)} {unit}{'' if len(keys) == 1 else 's'}"
            for label, keys in ranked
        ]
    )


def _with_classes_in_both(
    pool: Sequence[SplitImage], subset_of: Mapping[str, Subset], unit: str
) -> Assignment:
    """Assign images by the subset of their group; only classes that train and test."""
    subsets: dict[str, set[Subset]] = defaultdict(set)
    for image in pool:
        if image.group in subset_of:
            subsets[image.label].add(subset_of[image.group])
    kept = {label for label, found in subsets.items() if {Subset.TRAIN, Subset.TEST} <= found}
    if len(kept) < 2:
        few = {key: some for key, some in groups_by_label(pool).items() if key not in kept}
        raise UserInputError(
            f"Fewer than two classes have the two {unit}s that a split needs, one to train and one "
            f"to test: {_counts(few, unit)}. Ingest more {unit}s of them, choose another --field, "
            "or use a finer group level (--group)."
        )
    assigned = {
        image.image_id: subset_of[image.group]
        for image in pool
        if image.label in kept and image.group in subset_of
    }
    return Assignment(assigned, excluded_classes(pool, kept, unit=unit))


def folds(
    pool: Sequence[SplitImage],
    seed: int,
    count: int,
    validation: bool = True,
    unit: str = "group",
) -> list[Assignment]:
    """Return ``count`` splits that share their images and whose test subsets partition them.

    Groups are dealt into ``count`` parts. Split i tests part i, validates on part i + 1 (the first
    one after the last) and trains on the others; without ``validation`` it trains on that, too.

    Where each group is of one class, the groups of a class are dealt one by one to successive
    parts, going on where the class before ended; a class with fewer than three groups (two
    without validation) is excluded. Else (plates) ``StratifiedGroupKFold`` deals them, groups
    that are alike in the order drawn by ``seed``. Classes that some split would test without
    having trained on them are excluded from all.

    Raises ``UserInputError``: there are fewer parts than subsets, a part without images, or fewer
    than two classes are left. It names the classes and their groups, called by ``unit``.
    """
    n_subsets = 3 if validation else 2
    if count < n_subsets:
        raise UserInputError(
            f"{count} folds cannot be {n_subsets} subsets: ask for {n_subsets} folds or more"
            f"{', or for none to validate with --validation-size 0' if validation else ''}."
        )
    groups = groups_by_label(pool)
    parts: dict[str, int] = {}
    if is_mixed(groups):
        names = {image.group for image in pool}
        if len(names) >= count:
            parts = _stratified_parts(pool, seed, count)
    else:
        for label, keys in groups.items():
            if len(keys) >= n_subsets:
                start = len(parts)
                for position, key in enumerate(drawn(seed, f"fold of {label}", keys), start):
                    parts[key] = position % count

    def subset(part: int, tested: int) -> Subset:
        if part == tested:
            return Subset.TEST
        validates = validation and part == (tested + 1) % count
        return Subset.VALIDATION if validates else Subset.TRAIN

    held: dict[str, set[int]] = defaultdict(set)
    for image in pool:
        if image.group in parts:
            held[image.label].add(parts[image.group])
    kept = {
        label
        for label, mine in held.items()
        if all(any(subset(part, tested) is Subset.TRAIN for part in mine) for tested in mine)
    }
    other = f"Ingest more {unit}s, choose another --field, or use a finer group level (--group)."
    if len(kept) < 2:
        few = {key: some for key, some in groups.items() if key not in kept}
        raise UserInputError(
            f"Of {len(groups)} classes, {len(kept)} can be in {count} folds, and two are needed: "
            f"{_counts(few, unit)}; a class needs {n_subsets} {unit}s or more, in different folds. "
            f"{other}"
        )
    out = excluded_classes(
        pool, kept, f"needs {n_subsets} {unit}s or more, in different folds, to train in each"
    )
    part_of = {image.image_id: parts[image.group] for image in pool if image.label in kept}
    if idle := count - len(set(part_of.values())):
        raise UserInputError(
            f"{idle} of {count} folds would test nothing: {_counts(groups, unit)}. Ask for fewer "
            f"folds. {other}"
        )
    return [
        Assignment({key: subset(part, tested) for key, part in part_of.items()}, out)
        for tested in range(count)
    ]


def _stratified_parts(pool: Sequence[SplitImage], seed: int, count: int) -> dict[str, int]:
    # Here and not at the top: grouped splits and leak checks need no scikit-learn.
    from sklearn.model_selection import StratifiedGroupKFold

    names = drawn(seed, "fold", {image.group for image in pool})
    numbers = {name: number for number, name in enumerate(names)}
    labels = [image.label for image in pool]
    groups = [numbers[image.group] for image in pool]
    parts: dict[str, int] = {}
    with warnings.catch_warnings():
        # Of classes with fewer images than parts; they are excluded by name if need be.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splitter = StratifiedGroupKFold(n_splits=count, shuffle=False)
        for part, (_, tested) in enumerate(splitter.split(labels, labels, groups)):
            parts |= {names[groups[row]]: part for row in tested}
    return parts


def published_split(pool: Sequence[SplitImage], seed: int, test_size: float = 0.2) -> Assignment:
    """The split of the published study, after :func:`cut_largest`: by image, train and test only.

    ``StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)``. Groups are not
    looked at, so images of one well are in both subsets: scores are those of wells already seen.
    The study stopped early on the same 20 %, so its test subset is its validation subset too.

    Raises ``UserInputError`` for fewer than two classes, or a class that would have no image in
    train or in test.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    counts = Counter(image.label for image in pool)
    if len(counts) < 2:
        raise UserInputError(
            f"A split needs images of at least two classes, there are {len(counts)}. "
            "Ingest more treatments or choose another label field."
        )
    n_test = math.ceil(len(pool) * test_size)
    subsets = {image.image_id: Subset.TRAIN for image in pool}
    absent = sorted(label for label, count in counts.items() if count < 2)
    if not absent and min(n_test, len(pool) - n_test) < len(counts):
        absent = sorted(counts)
    if not absent:
        labels = [image.label for image in pool]
        splitter = StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)
        _, tested = next(splitter.split(labels, labels))
        subsets |= {pool[position].image_id: Subset.TEST for position in tested}
        in_test = Counter(labels[position] for position in tested)
        absent = sorted(label for label in counts if in_test[label] in (0, counts[label]))
    if absent:
        raise UserInputError(
            f"Too few images to be in both subsets: {some_of(absent)}. Exclude them with "
            "--min-images, ingest more of them, ask for a larger test share, or split by well, "
            "which excludes classes with a single one."
        )
    return Assignment(subsets)
