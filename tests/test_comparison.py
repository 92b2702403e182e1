"""Two runs side by side: which images count, and what is said where they are not alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from factories import Factory, hits_run

from cellstore.enums import TARGET, GroupLevel, Stage, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Run, Segmentation, Split
from cellstore.report.comparison import compare
from cellstore.report.scoring import report

TEST, TRAIN, VALIDATION = Subset.TEST, Subset.TRAIN, Subset.VALIDATION


class Screen:
    """Six wells of compounds a and b with an image of two cells each: ``a1`` to ``b3``."""

    def __init__(self, workspace: Workspace) -> None:
        self.make = make = Factory(workspace)
        self.labels = {name: make.label(name) for name in "abc"}
        plate = make.plate("P")
        self.images: dict[str, Image] = {}
        self.segmentations: dict[str, Segmentation] = {}
        source = make.run(Stage.SEGMENT)
        for row, compound in enumerate("ab", start=1):
            treatment = make.treatment(compound)
            for column in (1, 2, 3):
                image = make.image(make.well(plate, row, column, treatment))
                self.images[f"{compound}{column}"] = image
                self.segmentations[f"{compound}{column}"] = make.segmentation(image, source, 2)

    def split(self, name: str, sides: Mapping[str, Subset], **more: object) -> Split:
        """A split of the named images; labels are the compounds."""
        members = [(self.images[key], side, self.labels[key[0]]) for key, side in sides.items()]
        return self.make.split(members, name, GroupLevel.IMAGE, **more)

    def labelled(
        self,
        split: Split,
        says: Mapping[str, str],
        segmentations: Mapping[str, Segmentation] | None = None,
    ) -> Run:
        """A predict run whose cells say one label for each of some images."""
        make = self.make
        recipe = make.recipe(Stage.TRAIN)
        train = make.run(Stage.TRAIN, recipe, split_id=split.id)
        predict = make.recipe(Stage.PREDICT, inputs=[recipe])
        run = make.run(Stage.PREDICT, predict, parent_id=train.id, split_id=split.id)
        for key, label in says.items():
            cells = make.cells_of((segmentations or self.segmentations)[key])
            make.predict(run, cells, [[(self.labels[label], 0.75)]] * len(cells))
        return run


def sides(train: str, test: str = "", validation: str = "") -> dict[str, Subset]:
    """Images by the side of a split."""
    named = ((train, TRAIN), (test, TEST), (validation, VALIDATION))
    return {key: side for words, side in named for key in words.split()}


def says(words: str) -> dict[str, str]:
    """``a1=b`` and so on: what is said of each image."""
    return dict(word.split("=") for word in words.split())


def warned(found: Sequence[str], text: str) -> bool:
    return any(text in sentence for sentence in found)


def test_only_images_count_that_both_have_answered_and_neither_was_trained_on(
    workspace: Workspace,
) -> None:
    screen = Screen(workspace)
    one = screen.labelled(
        screen.split("one", sides("a1 b1", "a2 a3 b2 b3")), says("a1=a a2=a a3=b b2=b b3=b")
    )
    other = screen.labelled(
        screen.split("other", sides("a2 b2", "a1 a3 b1 b3")), says("a1=a a2=a a3=a b2=a b3=b")
    )
    found = compare(workspace, str(one.id), str(other.id))
    # a1 was trained on by one, a2 and b2 by the other: a3 and b3 are left.
    assert (found.n, found.not_compared) == (2, 3)
    assert (found.only_second, found.both_right) == (1, 1)
    assert warned(found.warnings, "different splits: one and other")
    forced = compare(workspace, str(one.id), str(other.id), force=True)
    assert (forced.n, forced.not_compared) == (5, 0)
    assert warned(forced.warnings, "Forced")
    assert warned(forced.warnings, f"Run {one.id} had seen 1 of these wells in training")
    assert warned(forced.warnings, f"Run {other.id} had seen 2 of these wells in training")
    back = compare(workspace, str(other.id), str(one.id))
    assert (back.n, back.only_first, back.difference) == (2, 1, -found.difference)


def test_the_test_side_stands_before_validation(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    split = screen.split("main", sides("a1 b1", "a2 b2", "a3 b3"))
    both = screen.labelled(split, says("a1=a a2=a b2=a a3=a b3=a"))
    same = screen.labelled(split, says("a2=b b2=b a3=b b3=b"))
    late = screen.labelled(split, says("a3=b b3=b"))
    found = compare(sqlite_workspace, str(both.id), str(same.id))
    assert (found.n, found.warnings) == (2, ())
    found = compare(sqlite_workspace, str(both.id), str(late.id))
    assert found.n == 2
    assert warned(found.warnings, "Validation images are compared")
    only = screen.labelled(split, says("a1=a b1=b"))
    with pytest.raises(UserInputError, match="no image in common that neither was trained on"):
        compare(sqlite_workspace, str(both.id), str(only.id))


def test_wells_known_to_one_run_favour_it(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    with sqlite_workspace.database.read() as session:
        from cellstore.models import Well

        well = session.get_one(Well, screen.images["a2"].well_id)
    screen.images["a9"] = screen.make.image(well, site=9)
    leaking = screen.split("leaking", sides("a1 b1 a9", "a2 a3 b2 b3"))
    clean = screen.split("clean", sides("a1 b1", "a2 a3 b2 b3"))
    one = screen.labelled(leaking, says("a2=a a3=a b2=b b3=b"))
    other = screen.labelled(clean, says("a2=b a3=b b2=b b3=b"))
    found = compare(sqlite_workspace, str(one.id), str(other.id))
    assert (found.first.wells_seen, found.second.wells_seen) == (1, 0)
    assert warned(found.warnings, f"the comparison favours run {one.id}")
    assert found.better is None
    assert found.conclusion.startswith(
        "Cannot say which run is better: 1 of 4 wells were seen in training by one of the two; "
    )
    assert [(item.what, item.first, item.second) for item in found.recipes] == [
        ("split", "leaking", "clean")
    ]
    again = screen.labelled(leaking, says("a2=b a3=b b2=b b3=b"))
    make = screen.make
    for run in (one, again):  # both label the training image of the well too
        cells = make.cells_of(make.segmentation(screen.images["a9"], make.run(Stage.SEGMENT), 1))
        make.predict(run, cells, [[(screen.labels["a"], 0.75)]])
    runs = str(one.id), str(again.id)
    found = compare(sqlite_workspace, *runs, level="well", force=True)
    assert (found.n, found.wells, found.only_first) == (4, 4, 2)  # a2 counts once, by what tests


def test_other_cells_are_said(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    split = screen.split("main", sides("a1 b1", "a2 b2"))
    one = screen.labelled(split, says("a2=a b2=b"))
    again = screen.make.run(Stage.SEGMENT)
    others = {key: screen.make.segmentation(screen.images[key], again, 3) for key in ("a2", "b2")}
    other = screen.labelled(split, says("a2=a b2=a"), others)
    found = compare(sqlite_workspace, str(one.id), str(other.id), level="well", vote="soft")
    assert (found.n, found.level, found.vote, found.both_right, found.only_first) == (
        *(2, "well", "soft", 1, 1),
    )
    assert warned(found.warnings, "They label different cells")
    assert found.differing[0].name == "P/B02"


def test_questions_that_differ_are_not_compared(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    main = screen.split("main", sides("a1 b1", "a2 b2"))
    one = screen.labelled(main, says("a2=a b2=b"))
    genes = screen.split("genes", sides("a1 b1", "a2 b2"), field=TARGET)
    other = screen.labelled(genes, says("a2=a b2=b"))
    with pytest.raises(UserInputError, match=r"predicts perturbation and run .* target"):
        compare(sqlite_workspace, str(one.id), str(other.id))
    with pytest.raises(UserInputError, match="name another run"):
        report(sqlite_workspace, str(one.id), compare=str(one.id))
    for words in ({"level": "plate"}, {"vote": "loud"}):
        with pytest.raises(UnknownNameError):
            compare(sqlite_workspace, str(one.id), str(other.id), **words)


def test_a_truth_that_was_corrected_is_left_out(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    one = screen.labelled(screen.split("old", sides("a1 b1", "a2 a3 b2")), says("a2=a a3=a b2=b"))
    kept = screen.labels["a"]
    screen.labels["a"] = screen.labels["c"]  # later a turns out to be c
    other = screen.labelled(screen.split("new", sides("a1 b1", "a2")), says("a2=c"))
    screen.labels["a"] = kept
    more = screen.labelled(screen.split("newer", sides("b1", "b2 b3")), says("b2=b a2=a"))
    with pytest.raises(
        UserInputError, match=r"^Split old and split new have different true labels for every image"
    ):
        compare(sqlite_workspace, str(one.id), str(other.id))
    found = compare(sqlite_workspace, str(one.id), str(more.id))
    # b2 is on both test subsets, a2 outside of the newer split, which is as good.
    assert (found.n, found.both_right, found.better) == (2, 2, None)


def test_two_hits_runs_which_finds_more(workspace: Workspace) -> None:
    make = Factory(workspace)
    alone = dict.fromkeys("cdefgh", "hit 3.0")
    one = hits_run(
        make, {"a": "hit 9", "b": "no difference 0", "i": "hit 1", "j": "hit 2", **alone}
    )
    less = dict.fromkeys(alone, "small effect 1.0")
    other = hits_run(
        make,
        {"a": "hit 7", "b": "mainly fewer cells 0.5", "i": "cannot say -", "k": "hit 2", **less},
        rule="q < 0.1", plate_sets={"all plates": ["P1", "P2"]}, feature_set="embedding",
    )  # fmt: skip
    found = compare(workspace, one.id, f"hits {other.id}")
    assert (found.n, found.both, found.only_first, found.only_second, found.neither) == (
        8, 1, 6, 0, 1,
    )  # fmt: skip
    assert (found.first.hits, found.second.hits, found.first.judged) == (7, 1, 10)
    assert (found.not_judged, found.only_in_first, found.only_in_second) == (1, 1, 1)
    assert found.p_value == 2 / 2**6  # six of six tosses of a coin
    assert found.better == one.id
    assert f"Run {one.id} finds more" in found.conclusion
    assert (found.second.features, found.second.profile_run) == ("embedding", other.parent_id)
    assert [item.name for item in found.treatments] == [*"cdefgh", "a", "b"]
    assert found.treatments[0].second == "small effect"
    assert warned(found.warnings, "Their rules differ")
    assert warned(found.warnings, f"Only run {other.id} has plate P2.")
    back = compare(workspace, str(other.id), str(one.id), limit=2)
    assert (back.only_second, back.better, len(back.treatments)) == (6, one.id, 4)
    same = hits_run(make, {"a": "hit 8", "c": "hit 1"})
    few = compare(workspace, one.id, "latest")
    assert few.second.run_id == same.id
    assert (few.n, few.better, few.warnings) == (2, None, ())
    assert "fewer than 6 treatments are a hit of one run alone" in few.conclusion
    elsewhere = hits_run(make, {"x": "hit 8"})
    with pytest.raises(UserInputError, match="about different treatments: none is in both"):
        compare(workspace, one.id, elsewhere.id)
    with pytest.raises(UserInputError, match=f"Both are run {one.id}"):
        compare(workspace, one.id, one.id)
    with pytest.raises(UserInputError, match="is a predict run, the other one a hits run"):
        compare(workspace, one.id, make.run(Stage.PREDICT).id)
    with pytest.raises(UserInputError, match="hits runs, without votes"):
        compare(workspace, one.id, other.id, vote="soft")
    with pytest.raises(UnknownNameError, match="hits run '999'"):
        compare(workspace, one.id, 999)
