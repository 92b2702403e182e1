"""The folds of a cross-validation, read as one run: each image by the model that tests it."""

from __future__ import annotations

import pytest
from screens import SmallScreen, small_screen

from cellstore.enums import Stage, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Run, Split
from cellstore.report.comparison import compare
from cellstore.report.scoring import report
from cellstore.report.votes import open_votes

# Cells: 3 of B01, 2 of B02, 2 of B03, 1 of B04.
TRUTH = {"B01": "DMSO", "B02": "taxol", "B03": "DMSO", "B04": "taxol"}
TESTED = [("B01", "B02"), ("B03", "B04")]


def add_folds(screen: SmallScreen) -> list[Split]:
    """Two folds, each of which trains on the wells that the other tests."""
    return [
        screen.factory.split(
            [
                (
                    screen.images[well],
                    Subset.TEST if well in tested else Subset.TRAIN,
                    screen.labels[truth],
                )
                for well, truth in TRUTH.items()
            ],
            f"cv-{number}",
            family="cv",
            fold=number,
        )
        for number, tested in enumerate(TESTED, start=1)
    ]


def add_model(screen: SmallScreen, split: Split, kind: str, says: dict[str, str]) -> Run:
    """A model of a fold that has labelled wells, also those that it was trained on."""
    make = screen.factory
    recipe = make.recipe(Stage.TRAIN, parameters={"kind": kind, "split": split.fingerprint})
    trained = make.run(Stage.TRAIN, recipe, split_id=split.id)
    made = make.recipe(Stage.PREDICT, inputs=[recipe], parameters={"subset": None, "top_k": 2})
    run = make.run(Stage.PREDICT, made, parent_id=trained.id, split_id=split.id)
    for well, label in says.items():
        cells = make.cells_of(screen.segmentations[well])
        make.predict(run, cells, [[(screen.labels[label], 1.0)]] * len(cells))
    return run


def test_folds_are_read_as_one_run(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    folds = add_folds(screen)
    runs = [
        add_model(screen, fold, "one", dict.fromkeys(TRUTH, label))
        for fold, label in zip(folds, ("DMSO", "taxol"), strict=True)
    ]
    found = report(workspace, "cv")
    # The first fold says DMSO of B01 and B02, the second taxol of B03 and B04.
    right = {item.level: (item.correct, item.n) for item in found.scores if item.vote == "hard"}
    assert right == {"image": (2, 4), "well": (2, 4), "cell": (3 + 1, 8)}
    assert (found.split, found.folds, found.wells_seen) == ("cv", tuple(r.id for r in runs), 0)
    assert any(note.startswith("Out of fold: each image is scored once") for note in found.notes)
    alone = report(workspace, str(runs[0].id))
    assert (alone.score("image", "hard").n, alone.folds) == (2, ())

    for level in ("image", "well"):
        with open_votes(workspace, "cv", level=level) as (votes, rows):
            said = {row["well"]: row["winner"] for row in rows.records()}
        assert votes.units == 4
        assert said == {"B01": "DMSO", "B02": "DMSO", "B03": "taxol", "B04": "taxol"}

    # Another model, of which nothing is asked but of its fold: right everywhere.
    wrong = {well: "DMSO" if label == "taxol" else "taxol" for well, label in TRUTH.items()}
    others = [
        add_model(screen, fold, "other", wrong | {well: TRUTH[well] for well in tested})
        for fold, tested in zip(folds, TESTED, strict=True)
    ]
    assert report(workspace, "cv").folds == tuple(run.id for run in others)  # the newest
    compared = compare(workspace, "cv", f"cv:{runs[1].parent_id}")
    assert (compared.first.correct, compared.second.correct, compared.n) == (4, 2, 4)
    assert compared.cannot_say.startswith("too few wells (4 wells")
    assert "run cv has more right in 2 wells" in compared.conclusion

    # Votes are counted anew where something was excluded later; folds stay folds.
    screen.factory.exclude("well", screen.images["B01"].well_id)
    left = report(workspace, f"cv:{runs[0].id}")
    assert (left.score("image", "hard").correct, left.score("image", "hard").n) == (1, 3)


@pytest.mark.one_database
def test_what_is_not_a_whole_cross_validation_is_refused(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    folds = add_folds(screen)
    with pytest.raises(UnknownNameError, match=r"has a model yet.*cellstore train --split cv"):
        report(workspace, "cv")
    run = add_model(screen, folds[0], "one", dict.fromkeys(TRUTH, "DMSO"))
    with pytest.raises(UnknownNameError, match=r"Fold 2 of cross-validation 'cv' has no labels"):
        report(workspace, "cv")
    add_model(screen, folds[1], "one", dict.fromkeys(TRUTH, "DMSO"))
    with pytest.raises(UserInputError, match=f"Both are run {run.id}"):
        compare(workspace, "cv", str(run.id))
    with pytest.raises(UnknownNameError, match="Unknown model of cross-validation cv 'nonsense'"):
        report(workspace, "cv:nonsense")
    with pytest.raises(UserInputError, match="or by the name of a cross-validation, not 'vc'"):
        report(workspace, "vc")
