"""Selections of cells by SQL: what is learned from them, and what is said of the others."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_training import TINY, Opener, StopsAfter, build

from cellstore import Store
from cellstore.config import BaselineParams, SplitParams
from cellstore.errors import QueryError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Run
from cellstore.stages.split import create_split

LARGE = "area > 40 AND plate = 'P1'"
"""Three of the four cells of each image."""

TWO_OF_A_WELL = """-- at most two cells of each well
SELECT cell_id, well FROM cell_table
QUALIFY row_number() OVER (PARTITION BY well_id ORDER BY area DESC) <= 2;  -- the largest
"""


def learned(store: Store, **selection: str | None):
    (made,) = store.train_baselines(["logistic"], BaselineParams(**selection), predict=False)
    return made


def by_hand(store: Store, condition: str) -> set[int]:
    """Ids of cells, without the code under test."""
    query = f"""
        SELECT c.id FROM cells AS c JOIN features AS f ON f.cell_id = c.id
        JOIN segmentations AS g ON g.id = c.segmentation_id
        JOIN split_members AS m ON m.image_id = g.image_id
        WHERE c.excluded IS NULL AND {condition}
    """
    return set(store.sql(query)["id"].to_pylist())


def test_a_selection_narrows_what_is_learned_from_and_nothing_else(
    postgres_workspace: Workspace, tmp_path: Path
) -> None:
    """On PostgreSQL; the other tests of this file are on SQLite."""
    workspace = postgres_workspace
    build(workspace, tmp_path)
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    store = Store(workspace)
    file = tmp_path / "select.sql"
    file.write_text(TWO_OF_A_WELL)
    (tmp_path / "of_images.sql").write_text("FROM images SELECT id AS image_id")

    # Of 2 images with 4 cells each.
    everything, large, two, images = (
        learned(store),
        learned(store, where=LARGE),
        learned(store, sql=str(file)),
        learned(store, sql=str(tmp_path / "of_images.sql")),
    )
    assert [made.rows for made in (everything, large, two, images)] == [8, 6, 4, 8]
    assert large.notes[0] == "18 cells are selected, and used: 6 in the train subset."
    assert not everything.notes

    # It is a part of the recipe: text, and which cells, by what is the same in every store.
    with store.session() as session:
        asked = [session.get_one(Run, made.run_id) for made in (everything, large, two)]
        texts = [
            (run.recipe.parameters.get("where"), run.recipe.parameters.get("sql")) for run in asked
        ]
        assert texts == [(None, None), (LARGE, None), (None, TWO_OF_A_WELL.strip())]
        assert f"-- {LARGE}" in asked[1].query.splitlines()
    assert learned(store, where=LARGE).already_done
    assert learned(store, sql=TWO_OF_A_WELL).run_id == two.run_id
    gone = min(by_hand(store, "m.subset = 'train' AND f.area > 40"))
    store.exclude("cell", str(gone), reason="dust")
    assert learned(store, where=LARGE).rows == 5
    assert len(by_hand(store, "m.subset = 'test'")) == store.predict(run=str(large.run_id)).cells

    # The same cells as a table.
    wanted = by_hand(store, f"m.subset = 'test' AND f.area > 40 AND c.id <> {gone}")
    table = store.cells("by-well", "test", where=LARGE, features=False).to_pandas()
    assert set(table.cell_id) == wanted
    assert len(wanted) == 6
    assert len(store.cells("by-well", sql=file).to_pandas()) == 12
    with pytest.raises(UserInputError, match="where must be a text"):
        store.cells("by-well", where=["area > 40"])

    # A condition over a feature set in files; here of each cell its id.
    ids = np.array(sorted(by_hand(store, "true")))
    store.add_embeddings(ids[:, None].astype(float), "of_ids", cell_ids=ids.tolist())
    first = min(by_hand(store, "m.subset = 'train'"))
    made = learned(store, features="of_ids", where=f"embedding_000 > {first}")
    assert made.rows == len(by_hand(store, f"m.subset = 'train' AND c.id NOT IN ({first}, {gone})"))


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        ({"where": "area > 0", "sql": "SELECT 1 AS cell_id"}, "--where or by --sql"),
        ({"where": "are > 0"}, "area"),
        ({"where": " "}, "condition is empty"),
        ({"where": "true) ; DELETE FROM cells; --"}, "cannot be answered"),
        ({"sql": "SELECT area FROM cell_table"}, "gives area. It needs a column cell_id"),
        ({"sql": "SELECT 'x' AS cell_id"}, "whole numbers"),
        ({"sql": "WITH x AS (DELETE FROM cells RETURNING id) FROM x"}, "cannot be|only read"),
        ({"sql": "SELECT cell_id FROM read_csv('/etc/passwd')"}, "cannot read"),
        ({"sql": "no-such.sql"}, "no-such.sql cannot be read"),
        ({"where": "area > 1000"}, "None of the 2 images in the training subset"),
        ({"where": "treatment = 'drug'"}, "one class only, drug"),
        ({"sql": "SELECT 9000000000000000000 AS cell_id"}, "None of the 2 images"),
        ({"sql": "SELECT CAST(2 AS HUGEINT) ** 100 AS cell_id"}, "whole numbers"),
        ({"sql": "SELECT CAST('1' || repeat('0', 30) AS HUGEINT) AS Cell_ID"}, "None of the 2"),
        ({"sql": "SELECT [cell_id] AS cell_id FROM cell_table"}, "whole numbers"),
        ({"sql": "SELECT INTERVAL 1 DAY AS cell_id"}, "whole numbers"),
        ({"sql": " "}, "SQL is empty"),
    ],
)
def test_what_selects_nothing_useful_is_refused(
    built: Path, opened: Opener, selection: dict[str, str], sentence: str
) -> None:
    store = Store(opened(built))
    runs = store.sql("FROM runs").num_rows
    with pytest.raises((UserInputError, QueryError), match=sentence):
        learned(store, **selection)
    assert store.sql("FROM runs").num_rows == runs


def test_a_network_stops_by_the_same_kind_of_cells_and_is_resumed(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    params = replace(TINY, where=LARGE, branches=("tabular",))
    stopping = Store(replace(workspace, progress=StopsAfter(1)))
    with pytest.raises(KeyboardInterrupt):
        stopping.train(params, device="cpu")
    store = Store(workspace)
    done = store.train(params, device="cpu")
    assert done.resumed_after == 1
    assert done.cells == {"train": 6, "validation": 6}
    assert done.notes[0].startswith("18 cells are selected, and used: 6 in the train subset, 6 in")
    assert store.train(params, device="cpu").already_done
    assert store.check_run(str(done.run_id), device="cpu").outcome == "identical"
    two = learned(store, sql=TWO_OF_A_WELL).run_id
    assert f"--sql={TWO_OF_A_WELL.strip()}" in store.repro(str(two)).steps[-1].words
    check = store.check_run(str(two))
    assert (check.outcome, check.same_recipe) == ("identical", True)
    assert store.audit(str(two), "run").record["recipe"]["parameters"]["sql"] in TWO_OF_A_WELL

    # A file may hold what no command would take for SQL.
    file = built.parent / "pivot.sql"
    file.write_text("PIVOT (FROM cell_table) ON well USING count(*) GROUP BY cell_id")
    assert store.check_run(learned(store, sql=str(file)).run_id).outcome == "identical"

    trained = store.cells("by-well", "train").to_pandas().well.unique()
    elsewhere = replace(params, where=f"well IN ('{trained[0]}', '{trained[1]}')")
    with pytest.raises(UserInputError, match="None of the 2 images in the validation subset"):
        store.train(elsewhere, device="cpu")


def test_a_data_set_has_the_selected_cells(built: Path, opened: Opener) -> None:
    store = Store(opened(built))
    items = store.dataset("by-well", "test", crop=8, where=LARGE)
    wanted = by_hand(store, "m.subset = 'test' AND f.area > 40")
    assert {item["cell_id"] for item in pickle.loads(pickle.dumps(items))} == wanted
    assert len(items) == len(wanted) == 6
    (note,) = items.notes
    assert note == "18 cells are selected, and used: 6 in the test subset."


def test_what_a_selection_reads_is_told_where_it_may_leak(built: Path, opened: Opener) -> None:
    store = Store(opened(built))
    run = learned(store).run_id
    store.predict(run=str(run))
    says = learned(store, sql="SELECT c.cell_id FROM cell_table c ANTI JOIN votes USING (image_id)")
    assert any("reads predictions of models (votes). If one" in note for note in says.notes)
    assert not any("reads labels" in note or "split_members" in note for note in says.notes)
    redone = store.check_run(says.run_id)  # without the predictions
    assert not redone.same_recipe
    assert redone.reasons[0].startswith("its cells are selected by SQL, which may read what is not")
    assert f"# Note: {redone.reasons[0]}" in store.repro(says.run_id).script
    of_split = "SELECT image_id FROM split_members WHERE subset = 'train'"
    # A condition may ask other relations, too.
    nested = f"image_id IN ({of_split} UNION SELECT image_id FROM votes)"
    for selection in ({"sql": of_split}, {"where": nested}):
        notes = learned(store, **selection).notes
        assert any(note.startswith("The selection reads split_members") for note in notes)
    assert any("reads predictions of models (votes). If one" in note for note in notes)
    plain = learned(store, where=LARGE).notes
    assert not any("The selection reads" in note for note in plain)
