"""Profiles and scores in the life of a store: verified, backed up, undone, out of date."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import Factory
from sqlalchemy import select, text
from unguarded import as_owner

from cellstore.config import IngestParams, ProfileParams
from cellstore.enums import Stage, Verdict
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Recipe, Treatment, TreatmentScore
from cellstore.store import Store

PLAIN = ProfileParams(features="cp", select=())
MAP = "Well,Compound,Dose,Unit\nA01,DMSO,,\nA02,DMSO,,\nA03,taxol,2,uM\nA04,taxol,2,uM\n"


@pytest.fixture
def store(workspace: Workspace, tmp_path: Path) -> Store:
    """A plate of four wells with a map, a profile run and a hits run that says one thing."""
    make, store = Factory(workspace), Store(workspace)
    segment_run, plate = make.run(Stage.SEGMENT), make.plate("P1")
    cells = []
    for column in range(1, 5):
        image = make.image(make.well(plate, 1, column))
        found = make.segmentation(
            image, segment_run, 3, mask_artifact_id=None, flow_artifact_id=None
        )
        cells += make.cells_of(found)
    with workspace.database.read() as session:
        segment = session.get_one(Recipe, segment_run.recipe_id)
    values = {"area": [float(n % 5) for n in range(12)], "x": [float(n % 7) for n in range(12)]}
    make.feature_files("cp", cells, values, segment)
    (tmp_path / "map.csv").write_text(MAP)
    store.ingest(tmp_path / "map.csv", IngestParams(plate="P1"))
    made = store.profile(PLAIN)
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.HITS, 1, {}))
        taxol = session.scalars(select(Treatment).where(Treatment.name == "taxol")).one()
    score = {"treatment_id": taxol.id, "verdict": Verdict.HIT, "q": 0.01}
    score |= {"level": "treatment", "name": "taxol 2 uM", "plate_set": "all plates"}
    score |= dict.fromkeys(("n_wells", "n_controls", "n_plates"), 1)
    with running(workspace.database, recipe, parent_id=made.run_id) as run:
        score |= {"run_id": run.id, "measure": "hit"}
        run.at_end.append(lambda session: session.add(TreatmentScore(**score)))
    return store


def problems(store: Store, start: str = "profiles/") -> list[str]:
    found = [f"{item.path}: {item.reason}" for item in store.verify().problems]
    return [text for text in found if text.startswith(start)]


def test_a_lost_or_damaged_profile_is_named_and_made_again(store: Store) -> None:
    (row,) = store.sql("FROM artifacts WHERE kind = 'profiles'").to_pylist()
    path = store.workspace.artifacts.locate(row["path"])
    whole = path.read_bytes()
    assert problems(store) == []
    assert store.profile(PLAIN).already_done
    path.write_bytes(whole[:-1])
    assert problems(store) == [f"{row['path']}: the file is not what was written (sha256 differs)"]
    found = store.verify(fix=True)
    assert not path.exists()
    (command,) = store.sql("SELECT command FROM runs WHERE stage = 'profile'").to_pylist()
    assert found.commands == (command["command"],)
    assert problems(store) == [f"{row['path']}: the file is gone"]
    assert not store.profile(PLAIN).already_done
    assert path.read_bytes() == whole
    assert problems(store) == []
    assert store.profile(PLAIN).already_done


def test_a_score_that_was_changed_is_found(store: Store) -> None:
    run = store.sql("SELECT max(id) AS id FROM runs").to_pylist()[0]["id"]
    for change in ("UPDATE treatment_scores SET q = 0.5", "DELETE FROM treatment_scores"):
        with as_owner(store.workspace) as owner:
            if owner.dialect.name == "sqlite":
                for verb in ("UPDATE", "DELETE"):
                    owner.execute(text(f"DROP TRIGGER IF EXISTS treatment_scores_keep_{verb}"))
            owner.execute(text(change))
        assert f"run {run}: table treatment_scores: its rows are not what the run wrote" in str(
            problems(store, "run ")
        )


def test_a_backup_has_profiles_and_scores(store: Store, tmp_path: Path) -> None:
    asked = [f"FROM {name} ORDER BY ALL" for name in ("profiles", "hit_table", "treatment_scores")]
    before = [store.sql(query).to_pylist() for query in asked]
    assert [len(rows) for rows in before] == [4, 1, 1]
    assert store.backup(tmp_path / "b.tar").missing == ()
    Store.restore(tmp_path / "b.tar", tmp_path / "restored")
    with Store.open(tmp_path / "restored") as restored:
        assert [restored.sql(query).to_pylist() for query in asked] == before
        assert restored.profile(PLAIN).already_done


def test_a_run_says_that_wells_were_changed_since(store: Store) -> None:
    for kind in ("latest profile", "latest hits"):
        assert store.audit(kind, "run").record["notes"] == []
    store.exclude("well", "P1/A04", reason="bubble")
    store.relabel("P1/A02", control="none", reason="a mistake")
    for kind in ("latest profile", "latest hits"):
        (note,) = store.audit(kind, "run").record["notes"]
        assert note.startswith("2 wells were relabelled, excluded or included since run")
    (came,) = store.audit("latest hits", "run").record["downstream"]
    assert (came["what"], came["count"]) == ("scores of treatments", 1)


def test_a_treatment_with_scores_stays_when_its_map_is_undone(store: Store) -> None:
    run = store.sql("SELECT max(id) AS id FROM runs WHERE stage = 'ingest'").to_pylist()[0]["id"]
    store.undo(run)
    (row,) = store.sql("FROM hit_table").to_pylist()
    assert (row["treatment"], row["verdict"]) == ("taxol", "hit")
    left = store.sql("SELECT treatment FROM well_table WHERE treatment IS NOT NULL").num_rows
    assert left == 0
