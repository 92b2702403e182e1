"""train on a feature set of another tool: what is asked, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import Factory
from sqlalchemy import select

from cellstore.config import StoreSettings
from cellstore.db.models import Image
from cellstore.runs import open_workspace
from cellstore.terms import Stage

SMALL = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", "--store", "store")


@pytest.fixture
def with_set(cellstore, store: Path) -> Path:
    """The small screen with a split and feature set ``cp``: two cells in each image, no masks."""
    workspace = open_workspace(StoreSettings(store.resolve()))
    make = Factory(workspace)
    recipe = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler"})
    run = make.run(Stage.INGEST)
    unknown = dict.fromkeys(("content_sha256", "mask_artifact_id", "flow_artifact_id"))
    with workspace.database.read() as session:
        images = session.scalars(select(Image).order_by(Image.id)).all()
    found = [make.segmentation(i, run, 2, recipe_id=recipe.id, **unknown) for i in images]
    cells = [cell for item in found for cell in make.cells_of(item)]
    make.feature_files("cp", cells, {"x": [float(c.id) for c in cells]}, recipe)
    workspace.database.close()
    words = ("--protocol", "published", "--test-size", "0.5", "--store", store)
    cellstore("split", "create", "main", *words)
    return store


@pytest.mark.heavy
def test_a_network_without_pictures_is_said_to_be_one(cellstore, with_set: Path):
    pytest.importorskip("torch")
    said = cellstore("train", "--features", "cp", *SMALL)
    facts = dict(line.split(None, 1) for line in said.out.splitlines() if line.startswith("branch"))
    assert facts == {"branches": "tabular"}
    assert "So the network looks at: tabular." in said.err
    again = cellstore("train", "--features", "cp", "--branches", "tabular", "--json", *SMALL)
    assert again.json["already_done"]
    assert (again.json["feature_set"], again.json["branches"]) == ("cp", ["tabular"])
    assert cellstore("predict", "--device", "cpu", "--json", "--store", "store").json["cells"] == 12


def test_what_cannot_be_read_is_told_before_anything_is_done(cellstore, with_set: Path):
    pytest.importorskip("torch")
    said = cellstore("train", "--features", "cp", "--branches", "mask, tabular", *SMALL, code=2)
    assert "Use --branches tabular" in said.err
    said = cellstore("train", "--features", "cq", *SMALL, code=2)
    assert "Unknown feature set 'cq'" in said.err
    said = cellstore("train", *SMALL, code=2)
    assert "--features: cp" in said.err
