"""Saved questions: each answers, on both databases, and takes what its head says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from screens import SmallScreen, small_screen

from cellstore.enums import ImageFlagReason, Stage, Status, Verdict
from cellstore.errors import QueryError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.query.saved_queries import (
    own_folder,
    parsed,
    saved_questions,
    shipped_questions,
)
from cellstore.store import Store

NAMES = [item.name for item in shipped_questions()]


EXAMPLE = """\
-- Wells of a treatment: say here in a sentence what the question asks.
-- :treatment (text) = DMSO  Its name.
-- :plate (text) = nothing  Only this plate.
SELECT p.barcode AS plate, w.name AS well, t.target
FROM wells AS w
JOIN plates AS p ON p.id = w.plate_id
JOIN treatments AS t ON t.id = w.treatment_id
WHERE t.name = $treatment AND ($plate IS NULL OR p.barcode = $plate)
ORDER BY p.barcode, w.well_row, w.well_column
"""


def filled(workspace: Workspace) -> tuple[Store, SmallScreen, dict[str, dict[str, Any]]]:
    """A store in which every saved question has something to say, and what each needs."""
    screen = small_screen(workspace)
    make = screen.factory
    other = make.run(Stage.PREDICT, parent_id=screen.train_run.id, split_id=screen.split.id)
    for well in ("B01", "B02"):  # B01: as before DMSO; B02: DMSO, where the first said taxol
        cells = make.cells_of(screen.segmentations[well])
        make.predict(other, cells, [[(screen.labels["DMSO"], 0.9)]] * len(cells))
    qc = make.run(Stage.QC)
    make.flag_image(qc, screen.images["B01"], ImageFlagReason.OUT_OF_FOCUS)
    make.job(screen.segment_run, screen.images["B02"], Status.FAILED, error="truncated")
    hits, (dmso, taxol) = (
        make.run(Stage.HITS),
        (make.treatment("DMSO"), make.treatment("taxol", "TUBB")),
    )
    for treatment, verdict, effect in ((dmso, Verdict.NO, 0.1), (taxol, Verdict.HIT, 8.0)):
        make.score(hits, "hit", treatment, verdict=verdict, q=0.01, n_wells=4)
        make.score(hits, "effect", treatment, value=effect, low=effect - 1, high=effect + 1)
    needs = {
        "disagreements": {"runs": f"{screen.predict_run.id},{other.id}"},
        "plate-lineage": {"plate": "BR1"},
    }
    return Store(workspace), screen, needs


def test_every_question_answers_on_both_databases(workspace: Workspace) -> None:
    store, screen, needs = filled(workspace)
    first = screen.predict_run.id
    answers = {}
    for question in shipped_questions():
        given = dict(needs.get(question.name, {}))
        if any(item.kind == "predict run" for item in question.parameters):
            given["run"] = first
        answers[question.name] = store.ask(question.name, **given).to_pylist()
    wells = {name: [row.get("well") for row in rows] for name, rows in answers.items()}
    assert {(r["level"], r["vote"], r["n"], r["correct"]) for r in answers["accuracy"]} >= {
        ("image", "hard", 3, 2),  # worked out by hand in screens.VOTES
        ("image", "soft", 3, 1),
        ("cell", "hard", 7, 4),
    }
    assert [(r["well"], r["winner"]) for r in answers["votes"]] == [
        *(("B01", "DMSO"), ("B02", "taxol"), ("B03", "DMSO"), ("B04", "taxol"))
    ]
    assert wells["ties"] == ["B02", "B03"]
    assert answers["confusion"] == [{"truth": "taxol", "predicted": "DMSO", "n": 1}]
    assert [(r["label"], r["recall"]) for r in answers["class-report"]] == [
        ("taxol", 0.5),
        ("DMSO", 1.0),
    ]
    (differs,) = answers["disagreements"]
    said = [differs[name] for name in ("well", "first_says", "second_says", "right_is")]
    assert said == ["B02", "taxol", "DMSO", "first"]
    assert wells["confident-mistakes"] == ["B01", "B03"]
    assert wells["unlabelled"] == ["A01", "A02"]
    assert [(r["wells"], r["images"], r["cells"]) for r in answers["plates"]] == [(6, 6, 10)]
    assert [(r["name_with_dose"], r["images"]) for r in answers["treatments"]] == [
        ("taxol", 4),
        ("DMSO", 2),
    ]
    assert [(r["well"], r["cells"]) for r in answers["cell-counts"]][2] == ("B01", 3)
    assert len(answers["few-cells"]) == 6
    assert [(r["well"], r["reason"]) for r in answers["flagged"]] == [("B01", "out of focus")]
    assert [(r["well"], r["error"]) for r in answers["failed-jobs"]] == [("B02", "truncated")]
    assert answers["replicate-agreement"][0]["agreement"] == pytest.approx(2 / 3)
    assert wells["plate-lineage"] == ["B01", "B02", "B03", "B04"]
    assert len(answers["learning"]) == 8
    assert [(r["subset"], r["images"]) for r in answers["splits"]] == [("test", 3), ("train", 2)]
    found = [(r["treatment"], r["verdict"], r["effect"], r["n_wells"]) for r in answers["hits"]]
    assert found == [("taxol", "hit", 8.0, 4), ("DMSO", "no difference", 0.1, 4)]
    for name in ("stale", "unmeasured", "wells-without-cells", "seen-wells", "missing-files"):
        assert answers[name] == [], name


def test_what_is_wrong_with_a_screen_is_found(workspace: Workspace) -> None:
    store, screen, _ = filled(workspace)
    make = screen.factory
    plate = screen.plate
    empty = make.image(make.well(plate, 3, 1))
    make.segmentation(empty, screen.segment_run, 0)
    changed = make.image(make.well(plate, 3, 2))
    make.segmentation(changed, screen.segment_run, 2, content_sha256="0" * 64)
    make.image(make.well(plate, 3, 3), missing=True)

    def wells(name: str) -> list[str]:
        return [str(row["well"]) for row in store.ask(name).to_pylist()]

    assert wells("wells-without-cells") == ["C01"]
    assert wells("stale") == ["C02"]
    assert wells("unmeasured") == ["C02"]
    assert wells("missing-files") == ["C03"]


@pytest.mark.parametrize("name", NAMES)
def test_a_question_names_what_its_head_describes(name: str) -> None:
    question = next(item for item in shipped_questions() if item.name == name)
    used = set(re.findall(r"\$(\w+)", question.query))
    assert used == {item.name for item in question.parameters}
    assert all(len(line) <= 100 for line in question.text.splitlines())


def test_mistakes_are_sentences_with_a_hint(sqlite_workspace: Workspace) -> None:
    store, _, _ = filled(sqlite_workspace)
    with pytest.raises(UnknownNameError, match="accuracy"):
        store.ask("acuracy")
    with pytest.raises(UnknownNameError, match="Known: run"):
        store.ask("accuracy", rum=3)
    with pytest.raises(UnknownNameError, match="predict run"):
        store.ask("accuracy", run=999)
    with pytest.raises(UserInputError, match="needs --runs"):
        store.ask("disagreements")
    with pytest.raises(UserInputError, match="two different runs"):
        store.ask("disagreements", runs="latest,latest")
    with pytest.raises(UserInputError, match="whole number"):
        store.ask("few-cells", fewer_than="many")
    with pytest.raises(UserInputError, match="whole number"):
        store.ask("few-cells", fewer_than=1 << 70)
    with pytest.raises(UserInputError, match="yes or no"):
        store.ask("confusion", all="maybe")


def test_a_value_is_never_part_of_the_question(sqlite_workspace: Workspace) -> None:
    store, _, _ = filled(sqlite_workspace)
    evil = "x' OR 1=1; DROP TABLE plates; --"
    assert store.ask("votes", plate=evil).num_rows == 0
    assert store.ask("votes", run="latest", vote=evil).num_rows == 0
    assert store.sql("SELECT * FROM plates").num_rows == 1


def test_own_questions_come_from_a_folder_and_win(sqlite_workspace: Workspace) -> None:
    store, _, _ = filled(sqlite_workspace)
    folder = own_folder(sqlite_workspace)
    folder.mkdir()
    (folder / "my-wells.sql").write_text(EXAMPLE)
    assert store.ask("my-wells", treatment="taxol").num_rows == 4
    (folder / "plates.sql").write_text("-- Mine.\nSELECT 1 AS mine\n")
    assert store.ask("plates").to_pylist() == [{"mine": 1}]
    found = {item.name: item for item in store.questions()}
    assert found["plates"].path == folder / "plates.sql"
    (folder / "broken.sql").write_text("SELECT 1")
    assert "broken" not in {item.name for item in store.questions()}
    (problem,) = saved_questions(sqlite_workspace)[1]
    assert "does not say what it asks" in problem


def test_an_own_question_can_only_read_either(sqlite_workspace: Workspace) -> None:
    store, _, _ = filled(sqlite_workspace)
    own_folder(sqlite_workspace).mkdir()
    (own_folder(sqlite_workspace) / "evil.sql").write_text("-- Evil.\nDELETE FROM plates\n")
    with pytest.raises(QueryError, match="can only read"):
        store.ask("evil")


def test_names_lead_nowhere_else(sqlite_workspace: Workspace) -> None:
    store = Store(sqlite_workspace)
    (sqlite_workspace.settings.root / "secret.sql").write_text("-- Secret.\nSELECT 42")
    for name in ("../secret", "/etc/passwd", "a/b", "..", "", "A", "x\0y", "a.sql"):
        with pytest.raises(UnknownNameError):
            store.ask(name)


def test_a_link_out_of_the_folder_is_not_followed(sqlite_workspace: Workspace) -> None:
    store = Store(sqlite_workspace)
    folder = own_folder(sqlite_workspace)
    folder.mkdir()
    (folder.parent / "secret.sql").write_text("-- Secret.\nSELECT 42")
    (folder / "link.sql").symlink_to(folder.parent / "secret.sql")
    with pytest.raises(QueryError, match="leads out"):
        store.ask("link")


@pytest.mark.parametrize(
    "line",
    [
        "-- :run (predict run) =",
        "-- :run (planet) = latest  Words.",
        "-- :Run (run)  Words.",
        "-- :run (run)",
        "-- :limit (number) = 3  An option of ask itself.",
    ],
)
def test_a_head_that_is_not_understood_is_said(line: str) -> None:
    with pytest.raises(QueryError, match="describes a parameter as"):
        parsed("mine", f"-- Words.\n{line}\nSELECT 1")
