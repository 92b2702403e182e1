"""Baselines beside a score: on the same images, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import Factory
from screens import SmallScreen, small_screen

from cellstore.config import VoteOptions
from cellstore.enums import Stage, Status, Subset
from cellstore.errors import UserInputError
from cellstore.jobs.lookup import find_run
from cellstore.jobs.workspace import Workspace
from cellstore.models import Recipe, Run
from cellstore.report.comparison import compare
from cellstore.report.scoring import BaselineScore, against_nulls, report
from cellstore.store import Store

DMSO_EVERYWHERE = {"B01": "DMSO", "B02": "DMSO", "B03": "DMSO"}


def add_baseline(
    screen: SmallScreen,
    kind: str,
    says: dict[str, str],
    status: Status = Status.DONE,
    features: str | None = None,
) -> Run:
    """A baseline that was trained on the split and has labelled some wells."""
    make = screen.factory
    recipe = make.recipe(Stage.TRAIN, parameters={"baseline": kind, "n": [kind, features]})
    result = {"feature_set": features}
    trained = make.run(Stage.TRAIN, recipe, split_id=screen.split.id, result=result)
    run = make.run(
        Stage.PREDICT,
        make.recipe(Stage.PREDICT, inputs=[recipe]),
        parent_id=trained.id,
        split_id=screen.split.id,
        status=status,
    )
    for well, label in says.items():
        cells = make.cells_of(screen.segmentations[well])
        make.predict(run, cells, [[(screen.labels[label], 1.0)]] * len(cells))
    return run


def test_the_probes_of_each_feature_set_stand_beside_a_network(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    right = {"B01": "DMSO", "B02": "taxol", "B03": "taxol"}
    for features in ("basic", "vit"):
        add_baseline(screen, "logistic", right, features=features)
    add_baseline(screen, "knn", DMSO_EVERYWHERE, features="vit")
    newest = add_baseline(screen, "knn", right, features="vit")
    found = report(workspace)
    names = [item.name for item in found.baselines if item.level == "image"]
    assert names == ["logistic (vit)", "logistic (basic)", "knn (vit)"]
    assert newest.id in {item.run_id for item in found.baselines}
    assert "Not shown to be better than these simple models: logistic (vit) (" in (
        found.against_nulls
    )


@pytest.mark.one_database
def test_a_baseline_is_scored_on_the_images_of_the_run(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    before = report(workspace)
    assert (before.baselines, before.beats_nulls) == ((), None)
    assert before.against_nulls.endswith("Run: cellstore train --baseline null --split main")
    # B04 is not in the split: it is not scored, so it is not compared either
    run = add_baseline(screen, "majority", {**DMSO_EVERYWHERE, "B04": "taxol"})
    found = report(workspace)
    assert found.run_id == screen.predict_run.id  # the newest run, but that is a baseline's
    assert found.scores == before.scores
    by_level = {item.level: item for item in found.baselines}
    assert {(i.baseline, i.run_id, i.null) for i in found.baselines} == {("majority", run.id, True)}
    assert (by_level["image"].n, by_level["image"].accuracy) == (3, pytest.approx(1 / 3))
    assert (by_level["well"].n, by_level["well"].accuracy) == (3, pytest.approx(1 / 3))
    # 3 cells of DMSO, 4 of taxol
    assert (by_level["cell"].n, by_level["cell"].accuracy) == (7, pytest.approx(3 / 7))
    # The run is right in B01 and B02, the baseline in B01: one well that differs says nothing.
    assert (by_level["image"].p_value, by_level["image"].beaten) == (1.0, None)
    assert found.beats_nulls is None
    assert found.against_nulls.startswith(
        "Cannot say whether these labels are better than the null baselines: too few wells (3 wells"
    )
    compared = compare(workspace, str(screen.predict_run.id), str(run.id))
    assert compared.better is None
    assert compared.cannot_say == by_level["image"].cannot_say
    assert compared.conclusion.startswith("Cannot say which run is better: too few wells (3 wells")
    assert "majority (33.3 %, p = 1)" in found.against_nulls


def test_a_baseline_that_has_labelled_a_part_is_not_compared(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    add_baseline(screen, "position", {"B01": "DMSO", "B02": "DMSO"})
    assert report(sqlite_workspace).baselines == ()
    whole = add_baseline(screen, "position", DMSO_EVERYWHERE)
    add_baseline(screen, "position", {"B02": "DMSO"})  # wrong, so it would be easy to beat
    add_baseline(screen, "position", {"A01": "DMSO"})  # of the training subset only
    add_baseline(screen, "position", DMSO_EVERYWHERE, Status.RUNNING)
    found = [item for item in report(sqlite_workspace).baselines if item.level == "image"]
    assert [(i.run_id, i.n) for i in found] == [(whole.id, 3)]


def test_a_baseline_that_would_abstain_is_scored_all_the_same(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    make = screen.factory
    run = add_baseline(screen, "position", {})
    said = zip((*screen.labels.values(), make.label("zinc")), (0.9, 0.8, 0.7), strict=True)
    cells = make.cells_of(screen.segmentations["B01"])
    make.predict(run, cells, [[choice] for choice in said])
    # The run answers B01 alone, by 2 to 1 cells. The baseline is divided, 1 to 1 to 1: DMSO by
    # probability, which is right.
    found = report(sqlite_workspace, vote_options=VoteOptions(min_margin=0.2))
    assert (found.score("image", "hard").n, found.score("image", "hard").abstained) == (1, 2)
    assert [(i.n, i.accuracy) for i in found.baselines if i.level == "image"] == [(1, 1.0)]
    with pytest.raises(UserInputError, match="Lower --min-cells or --min-margin"):
        report(sqlite_workspace, vote_options=VoteOptions(min_margin=0.5))


def test_a_report_on_a_baseline_does_not_compare_it_with_itself(
    sqlite_workspace: Workspace,
) -> None:
    screen = small_screen(sqlite_workspace)
    majority = add_baseline(screen, "majority", DMSO_EVERYWHERE)
    logistic = add_baseline(screen, "logistic", {"B01": "DMSO", "B02": "taxol", "B03": "taxol"})
    found = report(sqlite_workspace, str(majority.id))
    assert {item.baseline for item in found.baselines} == {"logistic"}
    assert "null baseline (majority)" in found.against_nulls
    found = report(sqlite_workspace, str(logistic.parent_id))
    assert (found.run_id, found.score("image", "hard").accuracy) == (logistic.id, 1.0)
    assert {item.baseline for item in found.baselines} == {"majority"}
    assert found.beats_nulls is None  # three wells are too few, even without an error


def test_a_run_beats_a_baseline_by_the_test_with_which_runs_are_compared(
    sqlite_workspace: Workspace,
) -> None:
    """Eight wells: the run is right in all, one baseline in the first, another in all but one."""
    make = Factory(sqlite_workspace)
    label, other = make.label("a"), make.label("b")
    plate, source = make.plate(), make.run(Stage.SEGMENT)
    images = [make.image(make.well(plate, 1, c, make.treatment("a"))) for c in range(1, 9)]
    cells = [make.cells_of(make.segmentation(image, source, 1)) for image in images]
    split = make.split([(image, Subset.TEST, label) for image in images])

    def labelled(train: Run, right: set[int]) -> Run:
        run = make.run(Stage.PREDICT, parent_id=train.id, split_id=split.id)
        for well, some in enumerate(cells):
            make.predict(run, some, [[(label if well in right else other, 0.9)]])
        return run

    run = labelled(make.run(Stage.TRAIN, split_id=split.id), set(range(8)))
    rivals = {}
    for kind, right in (("majority", {0}), ("position", set(range(7)))):
        recipe = make.recipe(Stage.TRAIN, parameters={"baseline": kind, "n": kind})
        rivals[kind] = labelled(make.run(Stage.TRAIN, recipe, split_id=split.id), right)
    found = report(sqlite_workspace, str(run.id))
    by_kind = {item.baseline: item for item in found.baselines if item.level == "image"}
    # Seven wells that differ, all for the run: 2 / 2**7; one: 1.
    assert (by_kind["majority"].p_value, by_kind["majority"].beaten) == (2 / 2**7, True)
    assert (by_kind["position"].p_value, by_kind["position"].beaten) == (1.0, False)
    assert found.beats_nulls is False
    assert found.against_nulls.startswith("Not shown to be better per image than position (87.5 %")
    for kind, rival in rivals.items():
        compared = compare(sqlite_workspace, str(run.id), str(rival.id))
        assert compared.test.p_value == by_kind[kind].p_value
        assert (compared.better == run.id) is by_kind[kind].beaten


@pytest.mark.one_database
def test_the_latest_run_is_that_of_a_network(workspace: Workspace) -> None:
    make = Factory(workspace)
    baseline = make.run(Stage.TRAIN, baseline_recipe(make))
    labelled = make.run(Stage.PREDICT, parent_id=baseline.id)

    def latest() -> list[int]:
        with workspace.database.read() as session:
            return [find_run(session, "latest", kind).id for kind in (Stage.TRAIN, Stage.PREDICT)]

    assert latest() == [baseline.id, labelled.id]  # there is nothing else
    network = make.run(Stage.TRAIN)
    by_network = make.run(Stage.PREDICT, parent_id=network.id)
    later = make.run(Stage.TRAIN, baseline_recipe(make))
    make.run(Stage.PREDICT, parent_id=later.id)
    assert latest() == [network.id, by_network.id]


def baseline_recipe(make: Factory) -> Recipe:
    return make.recipe(Stage.TRAIN, parameters={"baseline": "majority"})


def null(
    name: str, accuracy: float, level: str = "image", *, beaten: bool | None = True, why: str = ""
) -> BaselineScore:
    p = 0.01 if beaten else 0.3
    scores = (7, 6, level, "hard", 50, accuracy, 0.0, 0.9, p, beaten, why or None)
    return BaselineScore(name, name, name != "forest", *scores)


def test_the_sentence_on_null_baselines() -> None:
    names = ("majority", "shuffled", "cellcount", "position")
    four = [null(name, 0.3) for name in names]
    good, sentence = against_nulls([*four, null("forest", 0.9, beaten=False)], None, "main")
    assert good is True
    assert sentence.startswith(
        "Better per image than every null baseline: majority (30.0 %, p = 0.01), shuffled"
    )
    assert sentence.endswith(
        "Not shown to be better than these simple models: forest (90.0 %, p = 0.3)."
    )
    weak = against_nulls([*four, null("forest", 0.2)], None, "main")[1]
    assert weak.endswith("Better than the simple models, too: forest (20.0 %, p = 0.01).")
    # A report on a simple model does not say so of another one.
    assert "simple" not in against_nulls([*four, null("forest", 0.2)], "logistic", "main")[1]
    # One that is not beaten is enough; other levels do not count.
    level = null("position", 0.1, "well", beaten=False)
    assert against_nulls([*four, level], None, "main")[0] is True
    bad = [*four[:3], null("position", 0.45, beaten=False)]
    good, sentence = against_nulls(bad, None, "main")
    assert good is False
    assert sentence.startswith("Not shown to be better per image than position (45.0 %, p = 0.3);")
    assert against_nulls([null("position", 0.4, beaten=False)], None, "main")[0] is False
    some = against_nulls(four[:2], None, "my split")
    assert some[0] is None
    assert some[1].endswith(
        "cellcount, position. Run: cellstore train --baseline null --split 'my split'"
    )
    some = against_nulls([*four[:3], null("position", 0.1, beaten=None, why="no luck")], None, "s")
    assert some[0] is None
    assert some[1].startswith(
        "Cannot say whether these labels are better than the null baselines: no luck. Null"
    )


def test_the_page_shows_what_a_score_has_to_beat(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    screen = small_screen(sqlite_workspace)
    add_baseline(screen, "majority", DMSO_EVERYWHERE)
    page = tmp_path / "page.html"
    Store(sqlite_workspace).report(html=page)
    text = page.read_text()
    assert "What a score has to beat" in text
    assert "Cannot say whether these labels are better than the null baselines" in text
    assert f">run {screen.predict_run.id}<" in text
    assert "<td>majority</td>" in text
