"""Profiles and scores of treatments as relations, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import Factory
from sqlalchemy import update

from cellstore.enums import Stage, Status, Verdict
from cellstore.errors import QueryError, StorageError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Well
from cellstore.store import Store


def two_wells(make: Factory) -> list[Well]:
    plate = make.plate("P1")
    taxol = make.doses(("taxol", 2.0))
    return [make.well(plate, 1, 1, make.treatment("DMSO")), make.well(plate, 1, 2, taxol)]


def test_profiles_of_all_runs_are_one_relation(workspace: Workspace) -> None:
    make, store = Factory(workspace), Store(workspace)
    assert store.sql("FROM profiles").num_rows == 0
    wells = two_wells(make)
    first, second, copy = (make.run(Stage.PROFILE) for _ in range(3))
    failed = make.run(Stage.PROFILE, status=Status.FAILED)
    make.profiles(first, wells, {"Area": [1.0, 2.0], "plate": [3.0, None]})
    later = {"AREA": [5.0, 6.0], "x": [7.0, 8.0]}
    for run in (second, copy):  # of the same bytes: one file
        make.profiles(run, wells, later)
    make.profiles(failed, wells, {"never": [1.0, 1.0]})
    rows = store.sql("FROM profiles ORDER BY run_id, well").to_pylist()
    assert list(rows[0]) == [
        *("plate", "well", "treatment", "dose", "dose_unit", "target", "control"),
        *("run_id", "well_id", "n_cells", "n_images", "Area", "plate_1", "x"),
    ]
    assert [tuple(row.values())[:4] for row in rows[:2]] == [
        ("P1", "A01", "DMSO", None),
        ("P1", "A02", "taxol", 2.0),
    ]
    assert [tuple(row.values())[7:] for row in rows] == [
        (first.id, wells[0].id, 10, 1, 1.0, 3.0, None),
        (first.id, wells[1].id, 10, 1, 2.0, None, None),
        *(
            (run.id, well.id, 10, 1, area, None, x)
            for run in (second, copy)
            for well, area, x in zip(wells, *later.values(), strict=True)
        ),
    ]
    # Of the files of other runs nothing is read.
    with store.open_questions() as questions:
        query = f"EXPLAIN SELECT x FROM profiles WHERE run_id = {second.id}"
        ((_, plan),) = questions.ask(query).rows()
    assert plan.count("READ_PARQUET") == 1
    words = {item.name: item for item in store.schema()}["profiles"]
    assert (words.kind, words.columns[-1].name) == ("view", "x")


@pytest.mark.one_database
def test_profiles_whose_file_is_gone_or_elsewhere(workspace: Workspace, tmp_path: Path) -> None:
    make, store = Factory(workspace), Store(workspace)
    wells = two_wells(make)
    lost = make.profiles(make.run(Stage.PROFILE), wells, {"lost": [1.0, 2.0]})
    make.profiles(make.run(Stage.PROFILE), wells, {"kept": [1.0, 2.0]})
    workspace.artifacts.remove(lost.path)
    for asked in ("SELECT lost FROM profiles", "SELECT kept FROM profiles"):
        with pytest.raises(StorageError, match=r"is gone.*cellstore verify"):
            store.sql(asked)
    assert "profiles" in str(store.sql("SHOW TABLES").to_pylist())  # all else goes on
    with pytest.raises(QueryError):
        store.sql("SELECT * FROM profile")
    with workspace.database.begin() as session:
        of_it = update(Artifact).where(Artifact.path == lost.path)
        session.execute(of_it.values(path="../../elsewhere.parquet"))
    (workspace.artifacts.root.parents[1] / "elsewhere.parquet").write_bytes(b"")
    with pytest.raises(StorageError, match="out of the store"):
        Store(workspace).sql("FROM profiles")


def test_a_treatment_has_one_row_in_each_run_and_plate_set(workspace: Workspace) -> None:
    make, store = Factory(workspace), Store(workspace)
    taxol, run = make.doses(("taxol", 2.0)), make.run(Stage.HITS)
    for plates, effect in (("A549", 3.0), ("U2OS", 4.0)):
        of = {"plate_set": plates, "cell_line": plates}
        make.score(run, "effect", taxol, value=effect, low=2.0, high=5.0, q=0.5, n_wells=9, **of)
        make.score(
            run, "hit", taxol, verdict=Verdict.HIT, p=0.001, q=0.01, n_wells=3, note="why", **of
        )
    make.score(run, "consistency", value=0.5)  # of a target: another table of rows
    rows = store.sql("FROM hit_table ORDER BY plate_set").to_pylist()
    assert [(row["cell_line"], row["effect"]) for row in rows] == [("A549", 3.0), ("U2OS", 4.0)]
    shown = ("treatment", "dose", "dose_unit", "verdict", "q", "n_wells", "note", "effect_high")
    assert tuple(rows[0][name] for name in shown) == (
        *("taxol", 2.0, "uM", "hit", 0.01, 3, "why", 5.0),
    )
    assert rows[0]["activity"] is None
    assert store.ask("hits", run=run.id).num_rows == 2
