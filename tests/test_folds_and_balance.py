"""Folds, named groups and balanced classes, on small cases worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_splitting import plate, sides_of

from cellstore.analysis.splitting import (
    Assignment,
    SplitImage,
    balanced,
    cut_by_groups,
    enough,
    folds,
    grouped_split,
    named_split,
)
from cellstore.enums import Subset
from cellstore.errors import UnknownNameError, UserInputError

TRAIN, VALIDATION, TEST = Subset


def plates(*layouts: str) -> list[SplitImage]:
    """An image of each letter, by plate ``P1``, ``P2``, ..."""
    pairs = [(label, f"P{n}") for n, text in enumerate(layouts, start=1) for label in text]
    return [SplitImage(i, label, group) for i, (label, group) in enumerate(pairs)]


def groups_on(images: list[SplitImage], split: Assignment, side: Subset) -> list[str]:
    return sorted({i.group for i in images if split.subsets.get(i.image_id) is side})


@settings(deadline=None, max_examples=30)
@given(
    wells=st.dictionaries(st.sampled_from("abcdef"), st.integers(3, 9), min_size=2),
    seed=st.integers(0, 9),
    count=st.integers(3, 6),
)
def test_the_test_sides_of_folds_partition_the_images(wells, seed, count) -> None:
    images = plate(wells)
    if sum(wells.values()) < count:
        with pytest.raises(UserInputError, match=r"would test nothing|can be in"):
            folds(images, seed, count)
        return
    found = folds(images, seed, count)
    tested = Counter(key for one in found for key, side in one.subsets.items() if side is TEST)
    assert tested == Counter(image.image_id for image in images)
    for number, one in enumerate(found):
        assert one.subsets.keys() == tested.keys()
        assert {len(sides) for sides in sides_of(images, one, "group").values()} == {1}
        after = found[(number + 1) % count]
        assert groups_on(images, one, VALIDATION) == groups_on(images, after, TEST)
        labels = sides_of(images, one, "label").values()
        assert all(TRAIN in sides for sides in labels)


def test_folds_are_of_like_sizes_and_each_class_goes_round() -> None:
    images = plate({"a": 5, "b": 5, "c": 3}, sites=1)
    found = folds(images, seed=0, count=5)
    sizes = [Counter(one.subsets.values())[TEST] for one in found]
    assert sorted(sizes) == [2, 2, 3, 3, 3]
    for one in found:
        tested = [images[key].label for key, side in one.subsets.items() if side is TEST]
        assert tested.count("a") == tested.count("b") == 1


def test_folds_stay_as_they_were_first_drawn() -> None:
    # Golden: written down when folds were made; SHA-256 orders hold on every platform.
    images = plate({"a": 3, "b": 4}, sites=1)
    tested = [groups_on(images, one, TEST) for one in folds(images, seed=7, count=3)]
    assert tested == GOLDEN_FOLDS
    # The same where scikit-learn deals whole plates, from our order of those that are alike.
    several = plates("ab", "ab", "ab", "aab", "abb", "ab")
    tested = [groups_on(several, one, TEST) for one in folds(several, seed=7, count=3)]
    assert tested == GOLDEN_PLATES


# Worked out with hashlib and json alone: the groups of a, then of b, dealt to three parts in turn.
GOLDEN_FOLDS = [["a0", "b1", "b3"], ["a2", "b0"], ["a1", "b2"]]
GOLDEN_PLATES = [["P1", "P4"], ["P3", "P5"], ["P2", "P6"]]  # of scikit-learn 1.9


def test_other_seeds_give_other_folds() -> None:
    for images in (plate({"a": 6, "b": 6}), plates(*["ab"] * 6)):
        assert len({str(folds(images, seed, 3)) for seed in range(5)}) == 5


def test_classes_that_some_fold_could_not_train_are_left_out_of_all() -> None:
    images = plate({"a": 4, "b": 4, "two": 2})
    found = folds(images, seed=0, count=4)
    assert {one.excluded for one in found} == {found[0].excluded}
    assert [item.label for item in found[0].excluded] == ["two"]
    without = folds(images, seed=0, count=4, validation=False)
    assert without[0].excluded == ()
    assert VALIDATION not in without[0].subsets.values()


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (plate({"a": 3, "b": 3}), 2, "2 folds cannot be 3 subsets"),
        (plate({"a": 3, "b": 3}), 9, "3 of 9 folds would test nothing: 'a' has 3 groups"),
        (plate({"a": 9, "b": 2}), 3, "needed: 'b' has 2 groups; a class needs 3 groups or more"),
        (plate({"a": 1, "b": 2}), 3, "Of 2 classes, 0 can be .* 'a' has 1 group, 'b' has 2 groups"),
        (plates("ab", "ab"), 3, "'a' has 2 groups, 'b' has 2 groups"),
    ],
)
def test_folds_that_cannot_be(images, count, message) -> None:
    with pytest.raises(UserInputError, match=message):
        folds(images, seed=0, count=count)


def test_named_plates_are_on_their_sides() -> None:
    images = plates("aab", "ab", "abb", "ab")
    split = named_split(images, 0, ["P2"], ["P4"])
    assert groups_on(images, split, TEST) == ["P2"]
    assert groups_on(images, split, VALIDATION) == ["P4"]
    assert groups_on(images, split, TRAIN) == ["P1", "P3"]
    drawn = named_split(images, 0, ["P2"])
    assert groups_on(images, drawn, TEST) == ["P2"]
    assert len(groups_on(images, drawn, VALIDATION)) == 1
    assert groups_on(images, named_split(images, 0, ["P2"], validation_size=0), VALIDATION) == []
    # The last one trains, so that none is left to validate.
    last = named_split(images, 0, ["P1", "P2", "P3"])
    assert (groups_on(images, last, TRAIN), groups_on(images, last, VALIDATION)) == (["P4"], [])


def test_a_class_that_no_named_plate_has_is_left_out() -> None:
    split = named_split(plates("abx", "ab", "ab"), 0, ["P2"], validation_size=0)
    assert [(item.label, item.images) for item in split.excluded] == [("x", 1)]


@pytest.mark.parametrize(
    ("test", "validation", "message"),
    [
        (["P1"], ["P1"], "In two subsets at once: P1"),
        (["P9"], [], "None of the images to split is on P9. Those with images: P1, P2"),
        (["P1", "P2"], [], "No image is left to train"),
    ],
)
def test_plates_that_cannot_be_named(test, validation, message) -> None:
    with pytest.raises(UserInputError, match=message):
        named_split(plates("ab", "ab"), 0, test, validation)


def test_a_compound_with_two_targets_goes_with_the_target_of_most_of_its_images() -> None:
    groups = {"x1": "xxy", "x2": "x", "x3": "x", "y1": "y", "y2": "y", "y3": "y"}
    pairs = [(label, group) for group, labels in groups.items() for label in labels]
    images = [SplitImage(i, label, group) for i, (label, group) in enumerate(pairs)]
    for seed in range(5):
        split = grouped_split(images, seed, 0.3, 0.3, by_class=True)
        assert all(len(sides) == 1 for sides in sides_of(images, split, "group").values())
        assert Counter(len(groups_on(images, split, side)) for side in Subset) == {2: 3}


def kept(images: list[SplitImage], label: str) -> list[SplitImage]:
    return [image for image in images if image.label == label]


@pytest.mark.parametrize(
    ("limit", "left"),
    [("second-largest", 12), ("median", 9), ("7", 7), ("1", 1), ("500", 60)],
)
def test_a_class_is_cut_to_size(limit, left) -> None:
    # 60, 12, 9 and 6 images; the median of the others is 9.
    images = plate({"DMSO": 20, "a": 4, "b": 3, "c": 2})
    found, cut = balanced(images, 0, [("DMSO", limit)])
    assert len(kept(found, "DMSO")) == left
    assert len(found) == left + 27
    assert cut == ({"DMSO": (60, left)} if left < 60 else {})


def test_every_cap_is_counted_before_anything_is_cut() -> None:
    images = plate({"DMSO": 20, "a": 4, "b": 3})
    _, cut = balanced(images, 0, [("DMSO", "second-largest"), ("a", "median")])
    # Of a, the others are 60 and 9, half way between them 34: nothing to cut.
    assert cut == {"DMSO": (60, 12)}
    assert balanced(images, 0, None)[1] == {"DMSO": (60, 12)}
    assert balanced(images, 0, []) == (images, {})


def test_as_many_wells_as_possible_keep_an_image() -> None:
    images = plate({"DMSO": 20, "a": 4})
    twelve = kept(balanced(images, 0, [("DMSO", "12")])[0], "DMSO")
    assert Counter(Counter(image.group for image in twelve).values()) == {1: 12}
    thirty = kept(balanced(images, 0, [("DMSO", "30")])[0], "DMSO")
    assert Counter(Counter(image.group for image in thirty).values()) == {1: 10, 2: 10}


def test_cells_are_counted_where_that_is_asked_for() -> None:
    # 10 images of 10 cells, 5 images of 7: by image DMSO is larger, by cells too (100 and 35).
    images = [SplitImage(i, "DMSO", f"w{i}", cells=10) for i in range(10)]
    images += [SplitImage(10 + i, "a", f"v{i}", cells=7) for i in range(5)]
    found, cut = balanced(images, 0, None, by_cells=True)
    assert cut == {"DMSO": (10, 3)}  # 30 cells are not more than 35, 40 are
    assert sum(image.cells for image in kept(found, "DMSO")) == 30
    with pytest.raises(UserInputError, match="Not one image of 'DMSO' fits into 9 cells"):
        balanced(images, 0, [("DMSO", "9")], by_cells=True)


def test_what_is_kept_stays_as_it_was_first_drawn() -> None:
    images = plate({"DMSO": 6, "a": 2}, sites=2)
    found, _ = balanced(images, 3, [("DMSO", "5")])
    assert [image.image_id for image in kept(found, "DMSO")] == GOLDEN_KEPT


GOLDEN_KEPT = [3, 5, 6, 8, 10]  # worked out with hashlib and json alone


def test_caps_that_cannot_be() -> None:
    images = plate({"DMSO": 6, "a": 2})
    with pytest.raises(UnknownNameError, match=r"Unknown class 'dmso'.*DMSO"):
        balanced(images, 0, [("dmso", "5")])
    with pytest.raises(UserInputError, match="cut twice"):
        balanced(images, 0, [("a", "5"), ("a", "6")])


def test_classes_with_too_few_images_are_named() -> None:
    images = plate({"a": 3, "b": 2, "c": 1})
    found, out = enough(images, 6)
    assert {image.label for image in found} == {"a", "b"}
    assert [(item.label, item.images, item.reason) for item in out] == [
        ("c", 3, "has fewer than 6 images")
    ]
    with pytest.raises(UserInputError, match="Of 3 classes, 1 have 9 images"):
        enough(images, 9)


def test_the_largest_class_is_cut_by_whole_groups() -> None:
    images = plate({"DMSO": 10, "a": 4, "b": 3})
    found, cut = cut_by_groups(images, seed=0)
    assert cut == {"DMSO": (30, 12)}
    kept = Counter(image.group for image in found if image.label == "DMSO")
    assert list(kept.values()) == [3] * 4
    assert cut_by_groups(plates("aab", "aab"), 0)[1] == {}
