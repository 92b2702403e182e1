"""Predictions of other models: what is read, refused and kept, and what reports make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from screens import small_screen
from sqlalchemy import update

from cellstore import Store
from cellstore.enums import ArtifactKind, Origin, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.runs import keep_files
from cellstore.jobs.workspace import Workspace
from cellstore.models import Event, Prediction, Run, Segmentation, Split
from cellstore.report.lineage_page import lineage_of
from cellstore.stages import own_models

TABLE = ["cell_id", "label", "probability"]
EXPORT = """
    SELECT cell_id, l.value AS label, probability
    FROM predictions AS p JOIN labels AS l ON l.id = p.label_id
    WHERE run_id = ? ORDER BY cell_id, rank
"""


@pytest.fixture
def screen(workspace: Workspace) -> tuple[Store, int]:
    """A small screen, and its predict run."""
    return Store(workspace), small_screen(workspace).predict_run.id


def rows_of(store: Store, run_id: int) -> list[tuple[Any, ...]]:
    with store.session() as session:
        found = session.query(Prediction).filter(Prediction.run_id == run_id).all()
        return sorted((p.cell_id, p.rank, p.label_id, p.probability) for p in found)


def rows_of_images(store: Store, run_id: int) -> list[tuple[Any, ...]]:
    with store.session() as session:
        found = session.get_one(Run, run_id).image_predictions
        return sorted((p.image_id, p.rank, p.label_id, p.probability) for p in found)


def test_own_predictions_brought_back_count_the_same(
    screen: tuple[Store, int], tmp_path: Path
) -> None:
    store, own = screen
    problems = set(store.verify().problems)
    table = store.sql(EXPORT, [own])
    pq.write_table(table, tmp_path / "labels.parquet")
    added = store.add_predictions(
        tmp_path / "labels.parquet", "again", trained_on=["train"], parameters={"depth": 12}
    )
    assert (added.rows, added.cells, added.images) == (table.num_rows, 8, 4)
    assert rows_of(store, added.run_id) == rows_of(store, own)
    before, after = store.report(str(own)), store.report(str(added.run_id))
    for name in ("scores", "by_class", "by_well", "calibration", "unseen"):
        assert getattr(after, name) == getattr(before, name)
    assert after.leak == f"{before.leak} So it was declared of again."
    for level in ("image", "well"):
        mine, theirs = (
            store.votes(str(added.run_id), level=level),
            store.votes(str(own), level=level),
        )
        drop = [name for name in theirs.table.column_names if name == "run_id"]
        assert mine.table.drop(drop).equals(theirs.table.drop(drop))
    assert set(store.verify().problems) <= problems  # it knows that rows were made by hand

    again = store.add_predictions(
        tmp_path / "labels.parquet", "again", trained_on=["train"], parameters={"depth": 12}
    )
    assert again.already_done
    assert again.run_id == added.run_id
    assert again.rows == 0
    with store.session() as session:
        run = session.get_one(Run, added.run_id)
        assert run.origin is run.parent.origin is Origin.DECLARED
        assert run.parent.recipe.parameters["parameters"] == {"depth": 12}
        assert session.query(Event).filter(Event.run_id == run.id).count() == 2


@pytest.mark.one_database
def test_cells_are_found_by_number_and_in_wide_tables(screen: tuple[Store, int]) -> None:
    store, own = screen
    wide = store.sql(
        """
        SELECT i.plate AS "Metadata_Plate", 'b' || right(i.well, 1) AS "Metadata_Well",
            i.site AS "Metadata_Site", c.object_number AS "ObjectNumber",
            max(p.probability) FILTER (WHERE l.value = 'DMSO') AS "DMSO",
            max(p.probability) FILTER (WHERE l.value = 'taxol') AS "p_taxol"
        FROM predictions AS p JOIN labels AS l ON l.id = p.label_id
        JOIN cells AS c ON c.id = p.cell_id
        JOIN segmentations AS s ON s.id = c.segmentation_id
        JOIN image_table AS i ON i.image_id = s.image_id
        WHERE p.run_id = ? GROUP BY ALL ORDER BY ALL
        """,
        [own],
    ).to_pandas()
    added = store.add_predictions(wide, "wide", trained_on=[])
    assert rows_of(store, added.run_id) == rows_of(store, own)
    assert "None of the" in store.report(str(added.run_id)).leak


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cell_id": 999}, "line 3: no such cell"),
        ({"cell_id": 1.5}, "line 3: no such cell"),
        ({"label": "aspirin"}, "line 3: a class that is not in the split"),
        ({"label": None}, "line 3: no class"),
        ({"probability": 1.25}, "line 3: a probability that is not from 0 to 1"),
        ({"probability": None}, "line 3: a probability that is not from 0 to 1"),
        ({"label": "DMSO"}, "the same cell and class twice"),
        ({"probability": 0.9}, "add up to more than 1"),
    ],
)
def test_one_bad_row_and_nothing_is_written(
    sqlite_workspace: Workspace, change: dict[str, Any], sentence: str
) -> None:
    own = small_screen(sqlite_workspace).predict_run.id
    store = Store(sqlite_workspace)
    table = store.sql(EXPORT, [own]).to_pandas()
    table = table.astype({"cell_id": float, "label": object})
    for name, value in change.items():
        table.loc[1, name] = value
    with store.session() as session:
        before = session.query(Run).count()
    with pytest.raises(UserInputError, match=sentence):
        store.add_predictions(table, "bad")
    with store.session() as session:
        assert session.query(Run).count() == before


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (pa.table({"cell_id": [], "label": []}), "has no rows"),
        (pa.table([[1], ["DMSO"], ["taxol"]], names=["cell_id", "label", "label"]), "more than"),
        ("cell_id,label,label\n1,DMSO,taxol\n", "'label' more than once"),
        ("cell_id,label\n1,DMSO\n2\n", "line 3: wrong number of cells"),
        (pa.table({"cell_id": [1], "label": ["DMSO"], "taxol": [1.0]}), "no predictions"),
        ([[1.0, 2.0]], "cannot be read as a table"),
        ([1, 2], "cannot be read as a table"),
    ],
)
def test_what_is_no_plain_table_is_refused(
    sqlite_workspace: Workspace, tmp_path: Path, table: Any, sentence: str
) -> None:
    small_screen(sqlite_workspace)
    store = Store(sqlite_workspace)
    if isinstance(table, str):
        (tmp_path / "odd.csv").write_text(table)
        table = tmp_path / "odd.csv"
    with pytest.raises(UserInputError, match=sentence):
        store.add_predictions(np.array(table) if isinstance(table, list) else table, "odd")


@pytest.mark.one_database
def test_what_was_not_declared_is_not_known(screen: tuple[Store, int]) -> None:
    store, own = screen
    added = store.add_predictions(store.sql(EXPORT, [own]), "unknown")
    assert any("--trained-on" in note for note in added.notes)
    result = store.report(str(added.run_id))
    assert "It is not known which wells unknown has seen in training" in result.leak
    said = f"It is not known which of these wells run {added.run_id} had seen in training"
    compared = store.compare(str(own), str(added.run_id))
    assert any(warning.startswith(said) for warning in compared.warnings)
    image = store.sql("SELECT min(image_id) AS i FROM prediction_table").to_pylist()[0]["i"]
    known = {item["run_id"]: item for item in store.audit(str(image), "image").record["labellings"]}
    assert known[own]["well_in_training"] is False
    assert known[own]["model"] is None
    assert known[added.run_id]["well_in_training"] is None
    assert known[added.run_id]["model"] == "unknown"
    with pytest.raises(UserInputError, match="a model of your own"):
        store.predict(run=str(added.train_run_id))
    assert store.sql(
        "SELECT count(*) FROM run_images WHERE run_id = ? AND well_in_training IS NOT NULL",
        [added.run_id],
    ).to_pylist() == [{"count_star()": 0}]


def test_a_model_of_whole_images_votes_once_for_each(
    screen: tuple[Store, int], tmp_path: Path
) -> None:
    store, own = screen
    table = pd.DataFrame(
        {
            "plate": "BR1",
            "well": ["B1", "B02", "B03"],
            "site": 1,
            "label": ["DMSO", "DMSO", "taxol"],
            "probability": [0.9, 0.6, 0.7],
        }
    )
    added = store.add_predictions(table, "fields", trained_on=["train"])
    assert (added.cells, added.images) == (0, 3)
    votes = store.votes(str(added.run_id)).table.to_pylist()
    assert [(v["well"], v["winner"], v["truth"], v["share"]) for v in votes] == [
        ("B01", "DMSO", "DMSO", 1.0),
        ("B02", "DMSO", "taxol", 1.0),
        ("B03", "taxol", "taxol", 1.0),
    ]
    page = tmp_path / "fields.html" if store.workspace.database.is_sqlite else None
    result = store.report(str(added.run_id), html=page)
    assert page is None or "The model labels whole images" in page.read_text()
    assert {item.level for item in result.scores} == {"image", "well"}
    assert result.score("image", "hard").accuracy == pytest.approx(2 / 3)
    compared = store.compare(str(own), str(added.run_id))
    assert compared.wells == 3
    assert any(said.endswith(f"run {added.run_id} whole images.") for said in compared.warnings)
    (digest,) = (item.second for item in compared.recipes if item.what == "predict.table")
    assert len(digest) == 12
    audit = store.audit("BR1/B01/1", "image").record["labellings"]
    assert [(item["winner"], item["n_cells"]) for item in audit] == [("DMSO", 3), ("DMSO", 1)]
    # Also where nothing has labelled its cells.
    alone = store.add_predictions(table[:1].assign(well="A01"), "one field")
    audit = store.audit("BR1/A01/1", "image")
    assert [item["run_id"] for item in audit.record["labellings"]] == [alone.run_id]
    came = {item["what"]: (item["count"], item["runs"]) for item in audit.record["downstream"]}
    assert came["labelled images"] == (1, [alone.run_id])
    assert "whole image" in lineage_of(audit).boxes[f"label {alone.run_id}"]
    assert store.exclude("image", "BR1/A01/1", reason="debris", dry_run=True).predictions == 1
    with pytest.raises(UserInputError, match="line 3: no such image"):
        store.add_predictions(table.assign(site=[1, 7, 1]), "gone")
    for wrong in ("B124", "B01 B02", "x"):
        with pytest.raises(UserInputError, match=f"no such image .*well {wrong}"):
            store.add_predictions(table.assign(well=["B1", "r02c02", wrong]), "gone")
    again = store.add_predictions(table.assign(well=["r02c01", "0202", "b 3"]), "spelt")
    assert rows_of_images(store, again.run_id) == rows_of_images(store, added.run_id)


def test_a_point_in_a_mask_names_a_cell(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    masks = np.zeros((8, 8), np.uint16)
    masks[1:4, 1:4], masks[5:7, 2:8] = 1, 3
    file = workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(masks), ".tif")
    with workspace.database.begin() as session:
        (kept,) = keep_files(session, [file])
        mine = update(Segmentation).where(Segmentation.id == screen.segmentations["B01"].id)
        session.execute(mine.values(mask_artifact_id=kept))
    store = Store(workspace)
    points = {"x": [2.4, 7.0], "y": [3.4, 5.6]}
    table = pd.DataFrame({"plate": "BR1", "well": "B01", "site": 1, "label": "taxol", **points})
    added = store.add_predictions(table, "points", trained_on=[])
    with store.session() as session:
        said = session.get_one(Run, added.run_id).predictions
        assert sorted((p.cell.object_number, p.probability) for p in said) == [(1, 1.0), (3, 1.0)]
    with pytest.raises(UserInputError, match=r"line 3: no such cell"):
        store.add_predictions(table.assign(x=[2.4, 1.0]), "beside")


def test_wrong_predictions_are_withdrawn_and_stay(screen: tuple[Store, int]) -> None:
    store, own = screen
    table = store.sql(EXPORT, [own])
    run = str(store.add_predictions(table, "wrong").run_id)
    assert str(store.report("latest").run_id) == run
    problems = set(store.verify().problems)
    assert store.withdraw_predictions(run, reason="classes mixed up") == int(run)
    assert store.report("latest").run_id == own
    notes = store.report(run).notes
    assert any("withdrawn: classes mixed up" in note for note in notes)
    assert not any("may be missing" in note for note in notes)
    assert not any("may be missing" in note for note in store.votes(run).notes)
    audit = store.audit("BR1/B01/1", "image").record["labellings"]
    assert [item["status"] for item in audit] == ["done", "withdrawn"]
    assert len(rows_of(store, int(run))) == table.num_rows
    assert set(store.verify().problems) == problems
    with pytest.raises(UserInputError, match="withdrawn"):
        store.add_predictions(table, "wrong")
    with pytest.raises(UserInputError, match="made by cellstore"):
        store.withdraw_predictions(own, reason="a try")


@pytest.mark.one_database
def test_the_mlflow_run_of_a_model_is_kept_and_linked(
    screen: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, own = screen
    table = store.sql(EXPORT, [own])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.lab/base/?token=x")
    added = store.add_predictions(table, "linked", trained_on=["train"], mlflow_run="ab12")
    at = "https://mlflow.lab/base/"
    assert added.trackers["mlflow"] == {"run": "ab12", "at": at, "link": f"{at}#/runs/ab12"}
    for run in (added.run_id, added.train_run_id):
        result = store.audit(str(run), "run").record["result"]
        assert result["trackers"] == added.trackers
    again = store.add_predictions(table, "linked", trained_on=["train"], mlflow_run="cd34")
    assert again.already_done
    assert again.trackers == added.trackers
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    alone = store.add_predictions(table, "unlinked", trained_on=["train"], mlflow_run="ab12")
    assert alone.trackers == {"mlflow": {"run": "ab12"}}
    with pytest.raises(UserInputError, match="not the id of an MLflow run"):
        store.add_predictions(table, "odd", mlflow_run="https://x/#/runs/1")


def test_the_cells_of_a_split_are_a_table(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    with workspace.database.read() as session:
        recipe = session.get_one(Run, screen.measure_run.id).recipe
    screen.factory.feature_set(recipe)
    store = Store(workspace)
    cells = store.cells("main", "test")
    table = cells.to_pandas()
    with store.session() as session:
        known = {
            (m.image.well.name, c.id, m.label.value)
            for m in session.get_one(Split, screen.split.id).members
            for s in m.image.segmentations
            for c in s.cells
            if m.subset is Subset.TEST
        }
    assert set(zip(table.well, table.cell_id, table.label, strict=True)) == known
    assert set(table.area) == {64.0}
    assert sum(batch.num_rows for batch in cells.batches()) == len(table)
    assert store.sql(cells.query).equals(cells.to_arrow())
    out = int(table.cell_id[0])
    store.exclude("cell", str(out), reason="dust")
    left = store.cells("main", features=False).to_pandas()
    assert out not in set(left.cell_id)
    assert "area" not in left
    assert {"train", "test"} == set(left.subset)
    with pytest.raises(UnknownNameError, match="subset"):
        store.cells("main", "tests")


def test_embeddings_become_a_feature_set_of_the_cells_that_are_there(
    workspace: Workspace, tmp_path: Path
) -> None:
    small_screen(workspace)
    store = Store(workspace)
    before = store.status().cells
    ids = store.sql("SELECT id FROM cells ORDER BY id DESC").column("id").to_numpy()
    vectors = np.arange(2.0 * len(ids)).reshape(-1, 2) / 8
    vectors[0, 1] = np.nan
    added = store.add_embeddings(vectors, "dinov3", cell_ids=ids, note="small")
    assert (added.cells, added.columns) == (len(ids), 2)
    rows = store.sql("FROM dinov3 ORDER BY cell_id DESC").to_pandas()
    assert rows.cell_id.tolist() == ids.tolist()
    assert np.array_equal(rows[["embedding_000", "embedding_001"]], vectors, equal_nan=True)
    assert store.status().cells == before
    again = store.add_embeddings(vectors, "dinov3", cell_ids=ids, note="small")
    assert again.already_done
    assert again.run_id == added.run_id
    with pytest.raises(UserInputError, match="with other rows"):
        store.add_embeddings(vectors + 1, "dinov3", cell_ids=ids)
    with pytest.raises(UserInputError, match=r"line 2: the same cell twice"):
        store.add_embeddings(vectors, "twice", cell_ids=[ids[0], *ids[:-1]])
    table = tmp_path / "by_name.csv"
    table.write_text("plate,well,site,ObjectNumber,e1\nBR1,B01,1,2,0.5\nBR1,B01,1,1,oops\n")
    with pytest.raises(UserInputError, match=r"line 3: no number \(.*, e1 oops\)"):
        store.add_embeddings(table, "by_name")
    table.write_text("plate,well,site,ObjectNumber,e1\nBR1,B01,1,2,0.5\nBR1,B01,1,1,\n")
    assert store.add_embeddings(table, "by_name").cells == 2
    found = store.cells("main", features="dinov3").to_pandas()
    assert {"embedding_000", "embedding_001"} <= set(found.columns)
    (file,) = store.sql(
        "SELECT path FROM artifacts AS a JOIN runs AS r ON r.id = ? JOIN feature_files AS f "
        "ON f.artifact_id = a.id AND f.run_id = r.id",
        [added.run_id],
    ).column("path")
    workspace.artifacts.locate(file.as_py()).unlink()
    assert store.add_embeddings(vectors, "dinov3", cell_ids=ids, note="small").cells == len(ids)
    assert store.sql("FROM dinov3").num_rows == len(ids)
    problems = [item.reason for item in store.verify().problems]
    assert not [reason for reason in problems if "feature" in reason]


@pytest.mark.one_database
def test_an_export_with_new_columns_finds_its_cells(workspace: Workspace, tmp_path: Path) -> None:
    small_screen(workspace)
    store, path = Store(workspace), tmp_path / "cells.parquet"
    made = store.export(path, split="main", subset="test")
    table = pd.read_parquet(path)
    assert made.cells == len(table) > 0
    with store.session() as session:
        known = {
            c.id: (s.recipe.fingerprint[:12], m.image.well.name, m.label.value)
            for m in session.query(Split).one().members
            for s in m.image.segmentations
            for c in s.cells
            if m.subset is Subset.TEST
        }
    columns = ["Metadata_Segmentation", "Metadata_Well", "Metadata_Label"]
    rows = zip(table.Metadata_CellId, table[columns].itertuples(index=False), strict=True)
    assert {cell: tuple(row) for cell, row in rows} == known
    assert set(table.Metadata_Subset) == {"test"}
    for number in range(16):
        table[f"e{number}"] = np.arange(len(table)) / 8 + number
    table.to_parquet(path)
    before = store.status().cells
    with pytest.raises(UserInputError, match=r"embeddings add \S+/cells.parquet --name NAME"):
        store.ingest(path)
    added = store.add_embeddings(path, "mine")
    assert (added.cells, added.columns) == (len(known), 16)
    assert any("not kept: Cells_area, " in note for note in added.notes)
    kept = store.sql("SELECT cell_id, e0, e15 FROM mine ORDER BY cell_id").to_pandas()
    wanted = table.sort_values("Metadata_CellId")
    assert kept.to_numpy().tolist() == wanted[["Metadata_CellId", "e0", "e15"]].to_numpy().tolist()
    assert store.status().cells == before
    assert store.add_embeddings(path, "mine").already_done
    by_number = table.drop(columns="Metadata_CellId")
    assert store.add_embeddings(by_number, "by_number").cells == len(known)
    # What the split says is never taken for a prediction.
    with pytest.raises(UserInputError, match="says no class"):
        store.add_predictions(path, "the truth")
    table["DMSO"] = 0.75
    assert store.add_predictions(table, "mine", trained_on=[]).rows == len(known)


@pytest.mark.one_database
def test_plates_are_found_by_the_name_that_they_had(workspace: Workspace, tmp_path: Path) -> None:
    own = small_screen(workspace).predict_run.id
    store = Store(workspace)
    cells = store.cells("main", "test", features=False)
    table = cells.to_pandas()[["plate", "well", "site", "object_number", "label"]]
    store.rename("plate", "BR1", "P7", reason="a slip")
    added = store.add_predictions(table, "old name", trained_on=[], query=cells)
    assert added.rows == len(table)
    assert "Plate BR1 was renamed: read as P7." in added.notes
    for run in (added.run_id, added.train_run_id):
        assert store.audit(f"run {run}", "run").record["query"] == cells.query
    assert store.audit(f"run {own}", "run").record["query"] != cells.query
    vectors = table.drop(columns="label").assign(e0=1.0)
    assert store.add_embeddings(vectors, "emb").cells == len(table)
    with pytest.raises(UserInputError, match="no such image"):
        store.add_embeddings(vectors.assign(plate="BR0"), "other")
    for export in (store.export, store.export_crops):
        with pytest.raises(UnknownNameError, match="Plate BR1 was renamed: it is P7 now"):
            export(tmp_path / "old", plates=("BR1",))


KILLED_AT = """
import sys, time
from cellstore import Store
from cellstore.stages import own_models

root, url, file, place = sys.argv[1:]
real = getattr(own_models, place)

def stop_here(*given, **more):
    real(*given, **more)
    print("here", flush=True)
    time.sleep(600)

setattr(own_models, place, stop_here)
store = Store.open(root, database=url or None)
store.add_predictions(file, "killed", trained_on=["train"])
"""


def test_a_killed_call_is_completed_by_the_same_call(
    screen: tuple[Store, int], tmp_path: Path
) -> None:
    store, own = screen
    problems = set(store.verify().problems)
    pq.write_table(store.sql(EXPORT, [own]), file := tmp_path / "labels.parquet")
    settings = store.workspace.settings
    places = ["insert_predictions"]  # within the transaction
    if store.workspace.database.is_sqlite:
        places.insert(0, "_open_jobs")
    for place in places:
        words = [str(settings.root), settings.database or "", str(file), place]
        program = [sys.executable, "-c", KILLED_AT, *words]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            process.kill()
        (count,) = store.sql("SELECT count(*) FROM predictions WHERE run_id <> ?", [own])[0]
        assert count.as_py() == 0
    added = store.add_predictions(file, "killed", trained_on=["train"])
    assert rows_of(store, added.run_id) == rows_of(store, own)
    with store.session() as session:
        made = session.query(Run).filter(Run.origin == Origin.DECLARED).order_by(Run.id).all()
        finished = [(run.stage.value, run.status.value) for run in made]
    assert finished == [("train", "done"), ("predict", "done")]
    assert store.add_predictions(file, "killed", trained_on=["train"]).already_done
    assert set(store.verify().problems) <= problems


ODD: dict[str, pa.Array] = {
    "lists": pa.array([[1], [2]]),
    "structs": pa.array([{"a": 1}, {"a": 2}]),
    "maps": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "bytes": pa.array([b"\xff\x00", b"1"]),
    "times": pa.array([1, 2], pa.timestamp("us")),
}


def test_tables_with_other_types(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    small_screen(sqlite_workspace)
    store = Store(sqlite_workspace)
    some = store.cells("main", "test", features=False).to_arrow()[:2].select(["cell_id"])
    ids, names = some.column(0).combine_chunks(), pa.array(["DMSO", "taxol"])
    decimals = [pa.array(["0.5", "0.25"]).cast(pa.decimal128(5, 3))]
    plain = pa.table([ids.cast(pa.decimal128(20, 0)), names, *decimals], TABLE)
    coded = pa.table([ids.dictionary_encode(), names.dictionary_encode(), *decimals], TABLE)
    added = []
    for number, table in enumerate((plain, coded)):
        pq.write_table(table, tmp_path / f"{number}.parquet")
        for given in (table, tmp_path / f"{number}.parquet"):
            run = store.add_predictions(given, f"as {number}", trained_on=[]).run_id
            added.append([row[1:] for row in rows_of(store, run)])
    assert added == [added[0]] * 4
    assert sorted(row[2] for row in added[0]) == [0.25, 0.5]
    for what, odd in ODD.items():
        for column in TABLE:
            table = plain.set_column(TABLE.index(column), column, odd)
            pq.write_table(table, tmp_path / "odd.parquet")
            for given in (table, tmp_path / "odd.parquet"):
                with pytest.raises(UserInputError, match=r"cannot be used|cannot be read|type"):
                    store.add_predictions(given, what)
    vectors = plain.drop(["label"]).append_column("v", ODD["lists"])
    with pytest.raises(UserInputError, match=r"no number|cannot be read"):
        store.add_embeddings(vectors, "odd")
    for huge in ("1000000000000", "99999999999999999999999", "1e300", "-5", "0x10"):
        (tmp_path / "huge.csv").write_text(f"cell_id,label\n{ids[0]},DMSO\n{huge},DMSO\n")
        with pytest.raises(UserInputError, match=r"line 3: no such cell"):
            store.add_predictions(tmp_path / "huge.csv", "huge")


def test_names_and_kinds_of_columns_change_no_number(sqlite_workspace: Workspace) -> None:
    small_screen(sqlite_workspace)
    store = Store(sqlite_workspace)
    half, whole = np.array([0.5], np.float16), [2**60 + 1]
    columns = [[1], half, whole, [4.0], ["BR1"]]
    table = pa.table(columns, names=["cell_id", "line", "q\"'", "x", "plate"])
    added = store.add_embeddings(table, "odd")
    assert added.notes == ("Columns that were not kept: plate, x.",)
    assert store.sql("FROM odd").to_pylist() == [{"cell_id": 1, "line": 0.5, "q\"'": 2.0**60}]
    for twice in (["cell_id", "a", "A"], ["cell_id", "a", "Cell_ID"]):
        with pytest.raises(UserInputError, match="Rename it"):
            store.add_embeddings(pa.table([[1], [0.0], [0.0]], names=twice), "twice")
    for vectors in (np.zeros(1), np.zeros((2, 1)), np.zeros((1, 0))):
        with pytest.raises(UserInputError):
            store.add_embeddings(vectors, "vectors", cell_ids=[1])
    with pytest.raises(UserInputError, match="A parameter cannot be kept"):
        store.add_embeddings(np.zeros((1, 1)), "one", cell_ids=[1], parameters={"a": object()})
    images = store.sql("SELECT plate, well, site, 'DMSO' AS label FROM image_table")
    recipe = store.sql("SELECT min(recipe_id) AS i FROM segmentations").to_pylist()[0]["i"]
    assert store.add_predictions(images, "images", segmentation=str(recipe)).cells == 0


def test_two_that_add_the_same_at_once_make_one_run_of_predictions(
    sqlite_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = small_screen(sqlite_workspace).predict_run.id
    store = Store(sqlite_workspace)
    table = store.sql(EXPORT, [own])
    opened = own_models.running
    first = []

    def slower(*arguments: Any, **options: Any) -> Any:
        if "parent_id" in options and not first:  # our predict run, before it is there
            first.append(0)
            first[0] = store.add_predictions(table, "twin").run_id
        return opened(*arguments, **options)

    monkeypatch.setattr(own_models, "running", slower)
    with pytest.raises(UserInputError, match="Another command began the same"):
        store.add_predictions(table, "twin")
    again = store.add_predictions(table, "twin")
    assert (again.already_done, again.run_id) == (True, first[0])
    assert rows_of(store, again.run_id) == rows_of(store, own)
