"""The views against votes worked out by hand (see ``screens.VOTES``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import Factory, sha
from screens import SmallScreen, small_screen
from sqlalchemy import text

from cellstore.analytics import open_questions
from cellstore.runs import Workspace
from cellstore.terms import GroupLevel, Stage, Subset


def ask(workspace: Workspace, sql: str) -> list[dict[str, Any]]:
    with open_questions(workspace) as questions:
        rows: list[dict[str, Any]] = questions.ask(sql).to_pylist()
    return rows


def by_well(screen: SmallScreen, rows: list[dict[str, Any]], vote: str) -> dict[str, Any]:
    """Rows of image_votes by the name of the well."""
    names = {image.id: name for name, image in screen.images.items()}
    return {names[row["image_id"]]: row for row in rows if row["vote"] == vote}


def test_hard_votes_count_cells_and_break_ties_by_probability_then_label(
    workspace: Workspace,
) -> None:
    screen = small_screen(workspace)
    hard = by_well(screen, ask(workspace, "SELECT * FROM image_votes"), "hard")
    names = ("winner", "votes", "runner_up", "runner_up_votes", "n_cells", "tie", "correct")
    assert {well: tuple(row[name] for name in names) for well, row in hard.items()} == {
        "B01": ("DMSO", 2.0, "taxol", 1.0, 3, False, True),
        "B02": ("taxol", 1.0, "DMSO", 1.0, 2, True, True),
        "B03": ("DMSO", 1.0, "taxol", 1.0, 2, True, False),
        "B04": ("taxol", 1.0, None, 0.0, 1, False, True),
    }
    assert hard["B01"]["share"] == pytest.approx(2 / 3)
    assert [hard[well]["truth_place"] for well in ("B01", "B02", "B03")] == [1, 1, 2]


def test_soft_votes_add_up_probabilities_of_every_rank(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    soft = by_well(screen, ask(workspace, "SELECT * FROM image_votes"), "soft")
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


def test_truth_is_the_split_or_else_the_treatment(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    rows = by_well(screen, ask(workspace, "SELECT * FROM image_votes"), "hard")
    found = {well: (row["subset"], row["truth"]) for well, row in rows.items()}
    assert found == {
        "B01": ("test", "DMSO"),
        "B02": ("test", "taxol"),
        "B03": ("test", "taxol"),
        "B04": ("outside", "taxol"),
    }


def test_excluded_cells_have_no_vote(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    cells = screen.factory.cells(screen.segmentations["B03"], 2, excluded="perimeter is 0")
    screen.factory.predict(screen.predict_run, cells, [[(screen.labels["taxol"], 1.0)]] * 2)
    rows = by_well(screen, ask(workspace, "SELECT * FROM image_votes"), "hard")
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
    query = "SELECT subset, winner, votes, n_cells, correct FROM well_votes WHERE vote = 'hard'"
    rows = {row.pop("subset"): tuple(row.values()) for row in ask(workspace, query)}
    assert rows == {"test": ("taxol", 2.0, 3, True), "train": ("DMSO", 5.0, 5, False)}
    seen = ask(workspace, "SELECT DISTINCT well_in_training, split FROM lineage")
    assert seen == [{"well_in_training": True, "split": "main"}]


def test_accuracy_per_level_and_vote(workspace: Workspace) -> None:
    small_screen(workspace)
    rows = ask(workspace, "SELECT * FROM accuracy WHERE subset = 'test'")
    found = {(row["level"], row["vote"]): (row["n"], row["correct"]) for row in rows}
    assert found == {
        ("cell", "hard"): (7, 4),
        ("image", "hard"): (3, 2),
        ("image", "soft"): (3, 1),
        ("well", "hard"): (3, 2),
        ("well", "soft"): (3, 1),
    }
    assert all(row["accuracy"] == pytest.approx(row["correct"] / row["n"]) for row in rows)


def test_confusion_and_class_report(workspace: Workspace) -> None:
    small_screen(workspace)
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


def test_lineage_names_every_step(workspace: Workspace) -> None:
    screen = small_screen(workspace)
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
        "user": "ada",
    }
    assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_votes_equal_plain_sql_on_the_database(workspace: Workspace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    screen = small_screen(workspace, GroupLevel.IMAGE)
    make = screen.factory
    labels = [*screen.labels.values(), make.label("zinc"), make.label("Ångström")]
    run = make.run(Stage.PREDICT, split_id=screen.split.id, parent_id=screen.train_run.id)
    for image in screen.images.values():
        source = make.run(Stage.SEGMENT)
        cells = make.cells_of(make.segmentation(image, source, int(rng.integers(1, 7))))
        answers = []
        for _ in cells:
            chosen = rng.permutation(len(labels))[:2]
            # Few distinct values, so that ties happen.
            answers.append([(labels[i], float(rng.integers(1, 4)) / 8) for i in chosen])
        make.predict(run, cells, answers)
    plain = """
        SELECT p.run_id, s.image_id, l.value,
            sum(CASE WHEN p.rank = 1 THEN 1 ELSE 0 END), sum(p.probability)
        FROM predictions p JOIN cells c ON c.id = p.cell_id
        JOIN segmentations s ON s.id = c.segmentation_id JOIN labels l ON l.id = p.label_id
        WHERE c.excluded IS NULL GROUP BY p.run_id, s.image_id, l.value
    """
    with workspace.database.read() as session:
        counts = [tuple(row) for row in session.execute(text(plain))]
    ours = ask(
        workspace, "SELECT run_id, image_id, label, cells, probability FROM image_label_votes"
    )
    assert sorted(tuple(row.values()) for row in ours) == [
        (*row[:4], pytest.approx(row[4])) for row in sorted(counts)
    ]
    for row in ask(workspace, "SELECT * FROM image_votes"):
        mine = [c for c in counts if (c[0], c[1]) == (row["run_id"], row["image_id"])]
        weight = 3 if row["vote"] == "hard" else 4
        best = sorted(mine, key=lambda c: (-round(c[weight], 9), -round(c[4], 9), c[2].encode()))
        assert row["winner"] == best[0][2]
        ties = len(best) > 1 and abs(best[0][weight] - best[1][weight]) < 1e-9
        assert row["tie"] == ties
