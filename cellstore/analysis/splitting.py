"""One split: by image as published, or whole groups."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..enums import Subset
from ..errors import UnknownNameError, UserInputError


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
    """Images of a class that are in no subset, and why."""

    label: str
    image_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Assignment:
    """The outcome of a split.

    ``subsets`` says the subset of each image, by ascending image id. ``excluded`` lists classes
    that could not be split. ``downsampled`` gives the number of images before and after for each
    class that was cut.
    """

    subsets: Mapping[int, Subset]
    excluded: tuple[ExcludedClass, ...] = ()
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
) -> tuple[ExcludedClass, ...]:
    """Return the classes that are not ``good``, each with its images and why it is out."""
    images: dict[str, list[SplitImage]] = defaultdict(list)
    for image in pool:
        if image.label not in good:
            images[image.label].append(image)
    return tuple(
        ExcludedClass(label, ids(images[label]), reason or _reason(images[label]))
        for label in sorted(images)
    )


def ids(images: Iterable[SplitImage]) -> tuple[int, ...]:
    """Return the ids of ``images``."""
    return tuple(image.image_id for image in images)


def _reason(images: Sequence[SplitImage]) -> str:
    if len({image.group for image in images}) == 1:
        return "has one group only, which cannot be in both subsets"
    return "its groups fell in one subset; try another seed"


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
) -> tuple[list[SplitImage], tuple[ExcludedClass, ...]]:
    """Return the images of classes that have ``minimum`` images or more, and those excluded.

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
            f"{'cells' if by_cells else 'images'}. Allow more, or exclude the class with --where."
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


def folds(
    images: Iterable[SplitImage], seed: int, count: int, validation: bool = True
) -> list[Assignment]:
    """Return ``count`` splits that share their images and whose test subsets partition them.

    Groups are dealt into ``count`` parts. Split i tests part i, validates on part i + 1 (the first
    one after the last) and trains on the others; without ``validation`` it trains on that, too.

    Where each group is of one class, the groups of a class are dealt one by one to successive
    parts, going on where the class before ended; a class with fewer than three groups (two
    without validation) is excluded. Else (plates) ``StratifiedGroupKFold`` deals them, groups
    that are alike in the order drawn by ``seed``. Classes that some split would test without
    having trained on them are excluded from all.

    Raises ``UserInputError``: there are fewer parts than subsets, fewer groups than parts, or fewer
    than two classes are left.
    """
    pool = ordered(images)
    sides = 3 if validation else 2
    if count < sides:
        raise UserInputError(
            f"{count} folds cannot be {sides} subsets: ask for {sides} folds or more"
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
        # Of classes with fewer images than parts; they are excluded by name if need be.
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


def _left_out(pool: Sequence[SplitImage], good: set[str], sides: int) -> tuple[ExcludedClass, ...]:
    return left_out(pool, good, f"needs {sides} groups, in different folds, to be trained in each")


def _split(
    placed: Mapping[int, int],
    tested: int,
    count: int,
    validation: bool,
    out: tuple[ExcludedClass, ...],
) -> Assignment:
    subsets = {key: _side(part, tested, count, validation) for key, part in placed.items()}
    return Assignment(subsets, out)


def published_split(images: Iterable[SplitImage], seed: int, test_size: float = 0.2) -> Assignment:
    """The split of the published study: by image, train and test only.

    A class that is larger than every other is down-sampled to the size of the second largest;
    then ``StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)``. Groups
    are not looked at, so images of one well are in both subsets: scores are those of wells already
    seen. The study stopped early on the same 20 %, so its test subset is its validation subset too.

    Raises ``UserInputError`` for fewer than two classes, a class with a single image, a class
    that would have no image in train or test, or a ``test_size`` not between 0 and 1.
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

    A class with g groups gives ``max(1, round(g * test_size))`` of them to the test subset,
    ``max(1, round(g * validation_size))`` to the validation subset if g is 3 or more and
    ``validation_size`` is not 0, and the rest, at least one, to training. A class with one group
    cannot be in both subsets and is excluded. With ``balance``, a class with more groups than any
    other is first down-sampled to the number of groups of the second.

    Where a group holds several classes (plates), groups are dealt without regard to classes,
    nothing is down-sampled, and classes absent from train or test are excluded afterwards.
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
    """Put the groups ``test`` and ``validation`` (plates) in those subsets; train on the others.

    Without ``validation``, ``max(1, round(g * validation_size))`` of the g groups are drawn from
    the others, unless ``validation_size`` is 0 or one group only is left to train. Classes absent
    from train or test are excluded.

    Raises ``UserInputError``: a group is in two subsets or has no images, or none is left to train.
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
        raise UserInputError(f"In two subsets at once: {some(twice)}. Name each once.")
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
            f"{some(single)}. Ingest more of them, or split by well, which excludes them."
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
            f"{len(set(labels))} classes in both subsets. Ingest more images or exclude classes."
        )
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=test_size, random_state=seed)
    _, test = next(splitter.split(labels, labels))
    return {pool[position].image_id for position in test}


def _check_both_sides(pool: Sequence[SplitImage], subsets: Mapping[int, Subset]) -> None:
    sides = sides_by_label((image.label, subsets[image.image_id]) for image in pool)
    absent = sorted(label for label, seen in sides.items() if len(seen) < 2)
    if absent:
        raise UserInputError(
            f"Too few images to be in both subsets: {some(absent)}. "
            "Exclude them with --min-images, ingest more of them, or ask for a larger test share."
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
