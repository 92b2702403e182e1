"""The views against votes worked out by hand (see ``screens.VOTES``)."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from factories import Factory, sha
from screens import SmallScreen, small_screen

from cellstore.config import VoteOptions
from cellstore.enums import GroupLevel, Stage, Subset
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Recipe
from cellstore.query import source
from cellstore.query.engine import open_questions
from cellstore.report.audit import audit
from cellstore.store import Store

pytestmark = pytest.mark.one_database  # test_plain_views asks each view on both

VOTES = "SELECT * FROM votes WHERE level = 'image'"


def ask(workspace: Workspace, sql: str) -> list[dict[str, Any]]:
    with open_questions(workspace) as questions:
        rows: list[dict[str, Any]] = questions.ask(sql).records()
    return rows


def by_well(screen: SmallScreen, rows: list[dict[str, Any]], vote: str) -> dict[str, Any]:
    """Rows of votes by the name of the well."""
    names = {image.id: name for name, image in screen.images.items()}
    return {names[row["image_id"]]: row for row in rows if row["vote"] == vote}


def test_hard_votes_count_cells_and_break_ties_by_probability_then_label(
    read_screen: SmallScreen,
) -> None:
    screen, workspace = read_screen, read_screen.workspace
    hard = by_well(screen, ask(workspace, VOTES), "hard")
    names = ("winner", "votes", "runner_up", "runner_up_votes", "n_cells", "tie", "correct")
    assert {well: tuple(row[name] for name in names) for well, row in hard.items()} == {
        "B01": ("DMSO", 2.0, "taxol", 1.0, 3, False, True),
        "B02": ("taxol", 1.0, "DMSO", 1.0, 2, True, True),
        "B03": ("DMSO", 1.0, "taxol", 1.0, 2, True, False),
        "B04": ("taxol", 1.0, None, 0.0, 1, False, True),
    }
    assert hard["B01"]["share"] == pytest.approx(2 / 3)
    query = "SELECT * FROM scored_predictions WHERE level = 'image'"
    scored = by_well(screen, ask(workspace, query), "hard")
    assert [scored[well]["truth_rank"] for well in ("B01", "B02", "B03")] == [1, 1, 2]


def test_soft_votes_add_up_probabilities_of_every_rank(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    soft = by_well(screen, ask(workspace, VOTES), "soft")
    found = {well: (row["winner"], row["tie"]) for well, row in soft.items()}
    assert found == {
        "B01": ("taxol", False),
        "B02": ("taxol", False),
        "B03": ("DMSO", True),
        "B04": ("taxol", False),
    }
    assert soft["B01"]["votes"] == pytest.approx(1.6)
    assert soft["B01"]["runner_up_votes"] == pytest.approx(1.2)
    assert soft["B02"]["share"] == pytest.approx(1.1 / 2)


def test_median_votes_count_a_choice_that_was_not_stored_as_none(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    found = by_well(screen, ask(workspace, VOTES), "median")
    names = ("winner", "votes", "runner_up_votes", "tie")
    assert {well: tuple(row[name] for name in names) for well, row in found.items()} == {
        "B01": ("DMSO", 0.5, 0.4, False),  # of 0.1 0.5 0.6, and of 0.3 0.4 0.9
        "B02": ("taxol", 0.55, 0.4, False),  # of 0.3 0.8, and of 0.2 0.6
        "B03": ("DMSO", 0.35, 0.35, True),  # of 0.2 0.5 both
        "B04": ("taxol", 0.75, 0.25, False),
    }
    make, dmso, taxol = screen.factory, screen.labels["DMSO"], screen.labels["taxol"]
    run = make.run(Stage.PREDICT, split_id=screen.split.id, parent_id=screen.train_run.id)
    choices = [[(taxol, 0.8)], [(dmso, 0.6)], [(taxol, 0.6)]]
    make.predict(run, make.cells_of(screen.segmentations["B01"]), choices)
    query = """
        SELECT label, votes FROM label_votes
        WHERE run_id = ? AND level = 'image' AND vote = 'median' ORDER BY label
    """
    with open_questions(workspace) as questions:
        rows = questions.ask(query, [run.id]).records()
    # of 0, 0, 0.6 and of 0, 0.6, 0.8
    assert [(row["label"], row["votes"]) for row in rows] == [("DMSO", 0.0), ("taxol", 0.6)]


def test_truth_is_the_split_or_else_the_treatment(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    rows = by_well(screen, ask(workspace, VOTES), "hard")
    found = {well: (row["subset"], row["truth"]) for well, row in rows.items()}
    assert found == {
        "B01": ("test", "DMSO"),
        "B02": ("test", "taxol"),
        "B03": ("test", "taxol"),
        "B04": ("outside", "taxol"),
    }


def test_an_image_abstains_with_few_cells_or_a_close_vote(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    query = VOTES
    with open_questions(
        workspace, vote_options=VoteOptions(min_cells=2, min_margin=0.3)
    ) as questions:
        rows = questions.ask(query).records()
        scores = questions.ask("FROM accuracy WHERE level = 'image' AND subset = 'test'").table()
    hard = by_well(screen, rows, "hard")
    names = ("winner", "margin", "abstained", "correct")
    assert {well: tuple(row[name] for name in names) for well, row in hard.items()} == {
        "B01": ("DMSO", pytest.approx(1 / 3), None, True),
        "B02": ("taxol", 0.0, "close", None),
        "B03": ("DMSO", 0.0, "close", None),
        "B04": ("taxol", 1.0, "few cells", None),
    }
    found = {
        row["vote"]: (row["n"], row["correct"], row["abstained"]) for row in scores.to_pylist()
    }
    assert found["hard"] == (1, 1, 2)


def test_controls_are_left_out_of_the_scores(workspace: Workspace) -> None:
    make = Factory(workspace)
    plate, labels = make.plate(), {name: make.label(name) for name in ("DMSO", "taxol")}
    dmso = make.treatment("DMSO")
    wells = [make.well(plate, 1, 1, dmso), make.well(plate, 1, 2, make.treatment("taxol"))]
    images = [make.image(well) for well in wells]
    truths = list(labels.values())
    split = make.split(list(zip(images, [Subset.TEST] * 2, truths, strict=True)))
    run = make.run(Stage.PREDICT, split_id=split.id)
    for image in images:
        found = make.segmentation(image, make.run(Stage.SEGMENT), 1)
        make.predict(run, make.cells_of(found), [[(labels["taxol"], 1.0)]])
    query = (
        "SELECT control, correct FROM scored_predictions WHERE level = 'image' AND vote = 'hard'"
    )
    assert sorted(row["correct"] for row in ask(workspace, query)) == [False, True]
    with open_questions(workspace, vote_options=VoteOptions(controls=False)) as questions:
        rows = questions.ask(query).records()
        assert rows == [{"control": None, "correct": True}]
        assert questions.ask("SELECT DISTINCT control FROM run_images").table().num_rows == 2


def test_areas_are_in_square_micrometres_where_the_pixel_size_is_known(
    workspace: Workspace,
) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    with workspace.database.read() as session:
        segment = session.get_one(Recipe, screen.segmentations["B01"].recipe_id)
    run = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=(segment,)))
    for well in ("B01", "B02"):
        make.features(make.cells_of(screen.segmentations[well])[:1], run, area=200.0)
    with workspace.database.begin() as session:
        session.get_one(Image, screen.images["B01"].id).pixel_size = 0.5
    found = ask(workspace, "SELECT well, area, area_um2 FROM cell_table WHERE area > 0 ORDER BY 1")
    assert [(*row.values(),) for row in found] == [("B01", 200.0, 50.0), ("B02", 200.0, None)]


def test_two_runs_are_held_against_each_other(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    other = make.run(Stage.PREDICT, split_id=screen.split.id, parent_id=screen.train_run.id)
    for well in ("B01", "B02"):
        cells = make.cells_of(screen.segmentations[well])
        make.predict(other, cells, [[(screen.labels["taxol"], 1.0)]] * len(cells))
    rows = ask(workspace, "FROM disagreements WHERE level = 'image' AND vote = 'hard'")
    names = {image.id: name for name, image in screen.images.items()}
    assert {
        names[row["unit_id"]]: (row["winner"], row["other_winner"], row["correct"], row["differ"])
        for row in rows
    } == {"B01": ("DMSO", "taxol", True, True), "B02": ("taxol", "taxol", True, False)}
    assert {(row["run_id"], row["other_run_id"]) for row in rows} == {
        (screen.predict_run.id, other.id)
    }


def test_excluded_cells_have_no_vote(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    cells = screen.factory.cells(screen.segmentations["B03"], 2, excluded="perimeter is 0")
    screen.factory.predict(screen.predict_run, cells, [[(screen.labels["taxol"], 1.0)]] * 2)
    rows = by_well(screen, ask(workspace, VOTES), "hard")
    assert (rows["B03"]["winner"], rows["B03"]["n_cells"]) == ("DMSO", 2)
    assert ask(workspace, "SELECT n FROM accuracy WHERE level = 'cell' AND subset = 'test'") == [
        {"n": 7}
    ]


def test_well_votes_join_the_cells_of_all_images_of_a_side(workspace: Workspace) -> None:
    make = Factory(workspace)
    dmso, taxol = make.label("DMSO"), make.label("taxol")
    well = make.well(make.plate(), 1, 1, make.treatment("taxol"))
    images = [make.image(well, site) for site in (1, 2, 3)]
    sides = (Subset.TEST, Subset.TEST, Subset.TRAIN)
    members = list(zip(images, sides, [taxol] * 3, strict=True))
    split = make.split(members, group_level=GroupLevel.IMAGE)
    train = make.run(Stage.TRAIN, split_id=split.id)
    run = make.run(Stage.PREDICT, parent_id=train.id)  # the split is that of the train run
    source = make.run(Stage.SEGMENT)
    for image, votes in zip(images, ([dmso], [taxol, taxol], [dmso] * 5), strict=True):
        cells = make.cells_of(make.segmentation(image, source, len(votes)))
        make.predict(run, cells, [[(label, 0.9)] for label in votes])
    columns = "subset, winner, votes, n_cells, correct"
    query = f"SELECT {columns} FROM votes WHERE level = 'well' AND vote = 'hard'"
    rows = {row.pop("subset"): tuple(row.values()) for row in ask(workspace, query)}
    assert rows == {"test": ("taxol", 2.0, 3, True), "train": ("DMSO", 5.0, 5, False)}
    seen = ask(workspace, "SELECT DISTINCT well_in_training, split FROM lineage")
    assert seen == [{"well_in_training": True, "split": "main"}]


def test_accuracy_per_level_and_vote(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    rows = ask(workspace, "SELECT * FROM accuracy WHERE subset = 'test'")
    found = {(row["level"], row["vote"]): (row["n"], row["correct"]) for row in rows}
    assert found == {
        ("cell", "hard"): (7, 4),
        ("image", "hard"): (3, 2),
        ("image", "soft"): (3, 1),
        ("image", "median"): (3, 2),
        ("well", "hard"): (3, 2),
        ("well", "soft"): (3, 1),
        ("well", "median"): (3, 2),
    }
    assert all(row["accuracy"] == pytest.approx(row["correct"] / row["n"]) for row in rows)


def test_confusion_and_class_report(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    where = "WHERE subset = 'test' AND level = 'cell'"
    rows = ask(workspace, f"SELECT truth, predicted, n FROM confusion {where} ORDER BY ALL")
    assert [tuple(row.values()) for row in rows] == [
        ("DMSO", "DMSO", 2),
        ("DMSO", "taxol", 1),
        ("taxol", "DMSO", 2),
        ("taxol", "taxol", 2),
    ]
    columns = "label, support, predicted, correct, recall, precision, f1"
    rows = ask(workspace, f"SELECT {columns} FROM class_report {where} ORDER BY label")
    assert [tuple(row.values()) for row in rows] == [
        ("DMSO", 3, 4, 2, pytest.approx(2 / 3), 0.5, pytest.approx(4 / 7)),
        ("taxol", 4, 3, 2, 0.5, pytest.approx(2 / 3), pytest.approx(4 / 7)),
    ]


def test_a_class_never_true_has_no_recall(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    screen.factory.predict(
        screen.factory.run(Stage.PREDICT, parent_id=screen.train_run.id, split_id=screen.split.id),
        screen.factory.cells_of(screen.segmentations["B01"]),
        [[(screen.factory.label("new"), 0.5)]] * 3,
    )
    query = "SELECT recall, precision FROM class_report WHERE label = 'new' AND level = 'image'"
    assert ask(workspace, f"{query} AND vote = 'hard'") == [{"recall": None, "precision": 0.0}]


def test_lineage_names_every_step(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    rows = ask(workspace, "SELECT * FROM lineage ORDER BY image_id")
    assert len(rows) == 4
    row = rows[0]
    expected = {
        "run_id": screen.predict_run.id,
        "train_run_id": screen.train_run.id,
        "plate": "BR1",
        "well": "B01",
        "split": "main",
        "subset": "test",
        "well_in_training": False,
        "weights_sha256": sha("cellpose weights"),
        "checkpoint_sha256": sha("model"),
        "n_cells": 3,
        "current": True,
        "user_name": "ada",
    }
    assert {key: row[key] for key in expected} == expected


def test_kept_votes_are_those_that_are_counted_anew(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    vote_options = VoteOptions(min_cells=2, min_margin=0.3)
    for rule in (VoteOptions(), vote_options):
        with open_questions(workspace, vote_options=rule, only_image_votes=True) as questions:
            kept = questions.ask(f"{VOTES} AND vote <> 'median' ORDER BY ALL").records()
            assert questions.ask("SELECT * FROM votes WHERE level = 'well'").table().num_rows == 0
        with open_questions(workspace, vote_options=rule) as questions:
            query = f"{VOTES} AND vote <> 'median' ORDER BY ALL"
            assert kept == questions.ask(query).records()
            assert len(kept) == 8


def test_a_well_on_two_sides_is_held_against_the_same_side(workspace: Workspace) -> None:
    make = Factory(workspace)
    taxol = make.label("taxol")
    well = make.well(make.plate(), 1, 1, make.treatment("taxol"))
    images = [make.image(well, site) for site in (1, 2)]
    members = list(zip(images, (Subset.TEST, Subset.TRAIN), [taxol] * 2, strict=True))
    split = make.split(members, group_level=GroupLevel.IMAGE)
    runs = [make.run(Stage.PREDICT, split_id=split.id) for _ in range(2)]
    for image in images:
        cells = make.cells_of(make.segmentation(image, make.run(Stage.SEGMENT), 1))
        for run in runs:
            make.predict(run, cells, [[(taxol, 1.0)]])
    rows = ask(workspace, "FROM disagreements WHERE level = 'well' AND vote = 'hard'")
    assert len(rows) == 2


def test_an_audit_ranks_the_votes_of_an_image_as_votes_does(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    run = make.run(Stage.PREDICT, split_id=screen.split.id)
    names = [make.label("zebra"), screen.labels["DMSO"], make.label("antelope")]
    cells = make.cells_of(screen.segmentations["B01"])[:3]
    make.predict(run, cells, [[(label, 0.5)] for label in names])  # a cell each: a tie
    query = """
        SELECT h.run_id, h.winner, s.winner, h.tie, h.n_cells, h.subset, h.truth, h.correct
        FROM votes AS h JOIN votes AS s USING (run_id, level, unit_id)
        WHERE level = 'image' AND h.vote = 'hard' AND s.vote = 'soft' AND unit_id = ?
        ORDER BY run_id
    """
    keys = ["run_id", "winner", "soft_winner", "tie", "n_cells", "subset", "truth", "correct"]
    ties = 0
    with open_questions(workspace) as questions:
        among_all = {
            i.id: list(questions.ask(query, [i.id]).rows()) for i in screen.images.values()
        }
    for image, wanted in among_all.items():
        found = audit(workspace, str(image), "image").record["labellings"]
        assert [tuple(item[key] for key in keys) for item in found] == wanted
        ties += sum(item["tie"] for item in found)
    assert ties >= 3


def test_predictions_that_are_read_side_by_side_are_the_same(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_screen(workspace)
    query = "SELECT * FROM predictions ORDER BY run_id, cell_id, rank"
    counts = "SELECT * FROM image_label_counts ORDER BY ALL"
    with open_questions(workspace) as questions:
        one = questions.ask(query).records(), questions.ask(counts).records()
    assert one[0]
    shutil.rmtree(workspace.settings.cache)
    monkeypatch.setattr(source, "CELLS_OF_READER", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with open_questions(workspace) as questions:
        assert (questions.ask(query).records(), questions.ask(counts).records()) == one


def test_cells_of_older_bytes_are_named(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make, old = screen.factory, screen.predict_run.id
    new = make.run(Stage.PREDICT, split_id=screen.split.id)
    for name in ("B01", "B02", "B03"):
        cells = make.cells_of(screen.segmentations[name])
        make.predict(new, cells, [[(screen.labels["DMSO"], 1.0)]] * len(cells))
    store = Store(workspace)

    def told() -> list[list[str]]:
        answers = (store.votes(str(new.id)).notes, store.report(str(new.id)).notes)
        notes = (*answers, store.compare(str(old), str(new.id)).warnings)
        return [[line for line in some if "older bytes" in line] for some in notes]

    assert told() == [[], [], []]
    with workspace.database.begin() as session:
        for name in ("B01", "B03", "A01"):
            session.get_one(Image, screen.images[name].id).content_sha256 = sha("other")
    line = (
        "Run {}: 5 cells of 2 images come from older bytes of these images. Find the cells again: "
        "cellstore segment; then measure and predict again."
    )
    assert told() == [
        [line.format(new.id)],
        [line.format(new.id)],
        list(map(line.format, (old, new.id))),
    ]
