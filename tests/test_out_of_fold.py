"""The folds of a cross-validation, read as one run: each image by the model that tests it."""

from __future__ import annotations

import pytest
from screens import SmallScreen, small_screen

from cellstore.enums import Origin, Stage, Status, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Run, RunMetric, Split
from cellstore.query.engine import open_questions
from cellstore.report.comparison import compare
from cellstore.report.leaderboard import list_runs
from cellstore.report.scoring import report
from cellstore.report.votes import open_votes
from cellstore.store import Store

# Cells: 3 of B01, 2 of B02, 2 of B03, 1 of B04.
TRUTH = {"B01": "DMSO", "B02": "taxol", "B03": "DMSO", "B04": "taxol"}
TESTED = [("B01", "B02"), ("B03", "B04")]


def add_folds(screen: SmallScreen) -> list[Split]:
    """Two folds, each of which trains on the wells that the other tests."""
    recipe = screen.factory.recipe(Stage.SPLIT)  # as create_folds makes them
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
            recipe_id=recipe.id,
            family="cv",
            fold=number,
        )
        for number, tested in enumerate(TESTED, start=1)
    ]


def add_model(
    screen: SmallScreen, split: Split, kind: str, says: dict[str, str], *, declared: bool = False
) -> Run:
    """A model of a fold that has labelled wells, also those that it was trained on."""
    make = screen.factory
    parameters: dict[str, object] = {"kind": kind, "split": split.fingerprint}
    if kind == "majority":
        parameters = {"baseline": kind, "split": split.fingerprint}
    declared = declared or kind == "vit"
    if declared:  # its weights are others in each fold
        known = "train" if split.fold == 2 else None
        parameters = {"declared": kind, "trained_on": known, "weights": split.name}
    recipe = make.recipe(Stage.TRAIN, parameters=parameters)
    origin = Origin.DECLARED if declared else Origin.OBSERVED
    trained = make.run(Stage.TRAIN, recipe, split_id=split.id, origin=origin)
    made = make.recipe(Stage.PREDICT, inputs=[recipe], parameters={"subset": None, "top_k": 2})
    run = make.run(Stage.PREDICT, made, parent_id=trained.id, split_id=split.id)
    for well, label in says.items():
        cells = make.cells_of(screen.segmentations[well])
        make.predict(run, cells, [[(screen.labels[label], 1.0)]] * len(cells))
    return run


def test_one_table_of_predictions_is_kept_for_each_fold(workspace: Workspace) -> None:
    add_folds(small_screen(workspace))
    store = Store(workspace)
    table = store.cells("cv-1", features=False).to_arrow().select(["cell_id", "label"])
    made = [store.add_predictions(table, "vit", split=f"cv-{fold}") for fold in (1, 2, 1)]
    assert [added.already_done for added in made] == [False, False, True]
    assert made[0].run_id != made[1].run_id
    scores = [store.report(added.run_id).score("image", "hard") for added in made[:2]]
    assert [(score.correct, score.n) for score in scores if score] == [(2, 2), (2, 2)]


def test_models_are_ranked(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    folds = add_folds(screen)
    one, other = (
        [add_model(screen, fold, kind, says) for fold, says in zip(folds, answers, strict=True)]
        for kind, answers in {
            "one": (dict.fromkeys(TRUTH, "DMSO"), dict.fromkeys(TRUTH, "taxol")),
            "other": (TRUTH, TRUTH),
        }.items()
    )
    stopped = make.run(
        Stage.TRAIN, split_id=folds[0].id, status=Status.FAILED, command="cellstore train --split x"
    )
    found = list_runs(workspace)
    assert (found.split, found.by) == ("cv", "test")
    best, second, unfinished = found.runs
    assert (best.name, best.rank) == (f"cv:{other[1].parent_id}", 1)
    assert (best.correct, best.images, best.wells, best.low) == (4, 4, 4, None)
    assert best.predict_runs == tuple(run.id for run in other)
    assert (second.rank, second.accuracy, second.balanced_accuracy) == (2, 0.5, 0.5)
    assert second.correct == report(workspace, second.name).score("image", "hard").correct
    assert (best.differs, second.differs) == ({"kind": "other"}, {"kind": "one"})
    assert (unfinished.name, unfinished.rank) == (str(stopped.id), None)
    assert (unfinished.status, unfinished.then) == ("failed", "cellstore train --split x")
    assert found.notes[0].startswith("The best of 2 models by test images looks better")
    assert "No other image validates here" in found.notes[0]
    # A fold by itself; models that have labelled nothing, and what was withdrawn.
    alone = list_runs(workspace, "cv-1")
    assert [(row.name, row.accuracy) for row in alone.runs][:2] == [
        (str(other[0].parent_id), 1.0),
        (str(one[0].parent_id), 0.5),
    ]
    declared = make.recipe(Stage.TRAIN, parameters={"declared": "vit"})
    trained = make.run(Stage.TRAIN, declared, split_id=screen.split.id)
    make.run(Stage.PREDICT, parent_id=trained.id, status=Status.WITHDRAWN)
    make.run(Stage.TRAIN, split_id=screen.split.id)
    (main,) = {row.split for row in list_runs(workspace).runs}
    assert main == "main"
    rows = {row.model + row.name: row for row in list_runs(workspace, by="validation").runs}
    assert rows[f"vit{trained.id}"].status == "withdrawn"
    last = rows[f"network{trained.id + 2}"]
    assert (last.status, last.then) == ("not predicted yet", f"cellstore predict --run {last.name}")
    with pytest.raises(UnknownNameError, match=r"Unknown split 'vc'.* Did you mean cv"):
        list_runs(workspace, "vc")

    # The same as a table: one row for each training.
    with open_questions(workspace) as questions:
        table = questions.ask(
            "SELECT run_id, family, fold, model, predict_run_id, images, accuracy, "
            "parameters ->> 'kind' AS kind FROM training_runs WHERE family = 'cv' AND "
            "status = 'done' ORDER BY run_id"
        ).records()
        values = questions.ask(
            "SELECT run_id, value FROM run_parameters WHERE name = 'kind' ORDER BY run_id"
        ).rows()
        assert [(row["run_id"], row["kind"]) for row in table] == list(values)
    runs = [one[0], one[1], other[0], other[1]]
    assert [row["predict_run_id"] for row in table] == [run.id for run in runs]
    assert [(row["fold"], row["images"], row["accuracy"]) for row in table] == [
        (1, 2, 0.5),
        (2, 2, 0.5),
        (1, 2, 1.0),
        (2, 2, 1.0),
    ]

    # Who has labelled the easy image alone is not the best.
    few = add_model(screen, folds[0], "few", {"B01": "DMSO"})
    (row,) = (row for row in list_runs(workspace, "cv-1").runs if few.id in row.predict_runs)
    assert (row.accuracy, row.rank, row.status) == (1.0, None, "1 of 2 test images labelled")


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
    hint = f"All folds as one: cellstore report --run cv:{runs[0].parent_id}"
    assert any(note.startswith("Fold 1 of") and note.endswith(hint) for note in alone.notes)

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
    assert "2 with run cv, 0 with run cv:" in compared.conclusion

    # One run is not read as itself and as a fold at once: it would be missing in one of them.
    for fold in folds:
        add_model(screen, fold, "majority", TRUTH)
    found = report(workspace, others[0].id)
    assert {item.baseline for item in found.baselines} == {"majority"}
    assert {item.baseline for item in report(workspace, "cv").baselines} == {"majority"}
    # A model from elsewhere may have the name of a baseline, and is none.
    one = [item.run_id for item in report(workspace, "cv").baselines]
    for fold in folds:
        for kind in ("majority", "position"):
            add_model(screen, fold, kind, wrong, declared=True)
    assert [item.run_id for item in report(workspace, "cv").baselines] == one
    with pytest.raises(UserInputError, match=r"one is a single fold.*compare \d+ cv:majority"):
        report(workspace, others[0].id, compare="cv:majority")

    # A model from elsewhere, of which nobody said what it has seen in the first fold.
    for fold in folds:
        add_model(screen, fold, "vit", TRUTH)
    declared = report(workspace, "cv:vit")
    assert declared.score("image", "hard").correct == 4
    assert declared.leak.startswith("It is not known which wells vit has seen in training")

    # Votes are counted anew where something was excluded later; folds stay folds.
    screen.factory.exclude("well", screen.images["B01"].well_id)
    left = report(workspace, f"cv:{runs[0].id}")
    assert (left.score("image", "hard").correct, left.score("image", "hard").n) == (1, 3)


@pytest.mark.one_database
def test_models_are_ranked_by_validation_images(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory

    def trained(split: Split, epochs: list[float], **more: str) -> Run:
        recipe = make.recipe(Stage.TRAIN, parameters={"kind": str(epochs), **more})
        subset = "test" if split.protocol == "published" else "validation"
        result = {"best_epoch": 1, "validation_subset": subset}
        run = make.run(Stage.TRAIN, recipe, split_id=split.id, result=result)
        for epoch, value in enumerate(epochs, start=1):
            make.add(RunMetric(run_id=run.id, epoch=epoch, name="validation_accuracy", value=value))
        return run

    low, high = trained(screen.split, [0.5, 0.9]), trained(screen.split, [0.6])
    found = list_runs(workspace, "main", by="validation")
    ranked = [(row.name, row.rank, row.validation_accuracy) for row in found.runs if row.rank]
    assert ranked == [(str(high.id), 1, 0.6), (str(low.id), 2, 0.5)]
    assert found.notes == ()
    easy = trained(screen.split, [0.8], where="area > 500")
    found = list_runs(workspace, "main", by="validation")
    assert found.runs[0].name == str(easy.id)
    assert found.notes[0].startswith("A model for which cells were selected (--where, --sql)")

    # As published, test images validate: to choose by them is to choose by test images.
    members = [(image, Subset.TEST, screen.labels["DMSO"]) for image in screen.images.values()]
    trained(make.split(members, "published", protocol="published"), [0.7])
    found = list_runs(workspace, "published", by="validation")
    assert [(row.rank, row.validation_accuracy) for row in found.runs] == [(None, None)]
    assert found.notes[0].startswith("No model here has a score on validation images")


@pytest.mark.one_database
def test_what_is_not_a_whole_cross_validation_is_refused(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    folds = add_folds(screen)
    with pytest.raises(UnknownNameError, match=r"has a model yet.*cellstore train --split cv"):
        report(workspace, "cv")
    run = add_model(screen, folds[0], "one", dict.fromkeys(TRUTH, "DMSO"))
    with pytest.raises(UnknownNameError, match=r"Fold 2 of cross-validation 'cv' has no labels"):
        report(workspace, "cv")
    add_model(screen, folds[0], "vit", TRUTH)
    with pytest.raises(UnknownNameError, match=r"Fold 2 .* began it: cellstore predictions add"):
        report(workspace, "cv:vit")
    add_model(screen, folds[1], "one", dict.fromkeys(TRUTH, "DMSO"))
    with pytest.raises(UserInputError, match=f"Both are run {run.id}"):
        compare(workspace, "cv", str(run.id))
    with pytest.raises(UnknownNameError, match="Unknown model of cross-validation cv 'nonsense'"):
        report(workspace, "cv:nonsense")
    assert report(workspace, "predict", force=True).run_id == report(workspace, "latest").run_id
    with pytest.raises(UserInputError, match=r"A run is named by its number, .* not 'vc'"):
        report(workspace, "vc")
