"""train --baseline: what is asked, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from foreign_cells import add_foreign_cells

from cellstore.models import Cell

pytest.importorskip("sklearn")
pytest.importorskip("torch")

WELLS = """
    SELECT count(DISTINCT well_id) AS n FROM split_members JOIN images ON images.id = image_id
    WHERE subset = 'train'
"""
SELECTED = """
    SELECT count(*) AS n FROM cp JOIN cells AS c ON c.id = cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN split_members AS m ON m.image_id = s.image_id
    WHERE m.subset = 'train' AND y > 0 AND c.excluded IS NULL
"""
SETS = ("--features", "cp")
IN = ("--store", "store")


@pytest.fixture
def with_set(cellstore, store: Path) -> Path:
    """The small screen with a split by image, and feature set ``cp``: six cells in each image."""

    def columns(cells: Sequence[Cell]) -> dict[str, list[float]]:
        # Two wells of two images for each treatment: aspirin is bright, the others are alike.
        bright = [100.0 * (24 <= i < 48) + i % 5 for i in range(len(cells))]
        return {"x": bright, "y": [float(i % 3) for i in range(len(cells))]}

    add_foreign_cells(store, 6, columns)
    words = ("--protocol", "published", "--test-size", "0.5", *IN)
    cellstore("split", "create", "main", *words)
    return store


def test_baselines_label_at_once_and_stand_in_the_report(cellstore, with_set: Path) -> None:
    said = cellstore("train", "--baseline", "position,logistic", *SETS, *IN)
    lines = [line.split() for line in said.out.splitlines()]
    rows = {
        words[0]: words for words in lines if len(words) == 5 and words[1] in ("null", "classical")
    }
    assert list(rows) == ["position", "logistic"]
    assert rows["logistic"][3] == "36"  # cells of the training subset
    wells = cellstore("sql", WELLS, *IN, "--json").json
    assert rows["position"][3] == str(wells[0]["n"])
    assert said.err.splitlines()[-1] == "Next: cellstore --store store report"
    again = cellstore("train", "--baseline", "position,logistic", *SETS, *IN, "--json").json
    assert all(item["already_done"] for item in again)
    assert [item["predict_run_id"] for item in again] == [int(x[4]) for x in rows.values()]
    told = cellstore("report", "--run", rows["logistic"][2], *IN)
    assert "per image" in told.out
    assert [line.split()[0] for line in told.out.splitlines() if line.startswith("position")]
    found = cellstore("report", "--run", rows["logistic"][4], *IN, "--json").json
    assert {item["baseline"] for item in found["baselines"]} == {"position"}
    assert found["against_nulls"] == (
        "Cannot say whether these labels are better than the null baselines: too few wells (5 "
        "wells scored by both; 6 or more are needed). Null baselines: position (100.0 %, p = 1)."
    )


def test_baselines_may_be_trained_alone(cellstore, with_set: Path) -> None:
    asked = ("train", "--baseline", "forest", "--no-predict", *SETS, *IN)
    assert cellstore(*asked).err.splitlines()[-1] == "Next: cellstore --store store predict"
    made = cellstore(*asked, "--json").json
    assert (made[0]["predict_run_id"], made[0]["feature_set"]) == (None, "cp")
    assert cellstore("predict", *IN, "--json").json["train_run_id"] == made[0]["run_id"]
    few = ("--baseline", "forest", "--max-cells", 9, "--force", *SETS, *IN, "--json")
    assert cellstore("train", *few).json[0]["rows"] == 9


def test_cells_are_selected_by_a_condition_or_a_file(cellstore, with_set: Path) -> None:
    asked = ("train", "--baseline", "logistic", "--no-predict", *SETS, *IN)
    some = cellstore(*asked, "--where", "y > 0 AND plate <> 'none'")
    (known,) = cellstore("sql", SELECTED, *IN, "--json").json
    notes = " ".join(some.err.split())
    assert f"used: {known['n']} in the train subset." in notes
    Path("few.sql").write_text("SELECT cell_id, y FROM cp WHERE y > 0;  -- and no more\n")
    by_file = cellstore(*asked, "--sql", "few.sql", "--json").json[0]
    assert by_file["rows"] == known["n"]
    Path("few.sql").unlink()
    script = cellstore("repro", by_file["run_id"], *IN).out
    assert "'--sql=SELECT cell_id, y FROM cp WHERE y > 0;  -- and no more'" in script
    both = cellstore(*asked, "--where", "y > 0", "--sql", "few.sql", code=2).err
    assert "by --where or by --sql, not by both" in both


def test_what_is_refused(cellstore, with_set: Path) -> None:
    refused = {
        ("--baseline", "tree"): "Unknown baseline 'tree'",
        ("--baseline", ","): "Name a baseline: majority",
        ("--baseline", "null", "--epochs", 3): "--baseline null does not read --epochs: remove it",
        ("--max-cells", 3): "Only --baseline reads --max-cells: remove it.",
        (
            "--baseline",
            "logistic",
            "--trees",
            3,
        ): "--baseline logistic does not read --trees",
    }
    for words, sentence in refused.items():
        assert sentence in cellstore("train", *words, *SETS, *IN, code=2).err


def test_a_metadata_column_may_be_what_is_predicted(cellstore, with_set: Path) -> None:
    moas = {"DMSO": "dull", "aspirin": "bright", "taxol": "dull"}
    wells = enumerate(["DMSO", "DMSO", "aspirin", "aspirin", "taxol", "taxol"], start=1)
    rows = [f"A{column:02d},{name},{moas[name]}" for column, name in wells]
    Path("map.csv").write_text("\n".join(["Well,Compound,MoA", *rows]))
    cellstore("ingest", "map.csv", "--plate", "P1", *IN)
    halves = ("--protocol", "published", "--test-size", "0.5", *IN)
    assert (
        "Did you mean MoA?" in cellstore("split", "create", "x", "--field", "moa", *IN, code=2).err
    )
    made = cellstore("split", "create", "moa", "--field", "Metadata_MoA", *halves, "--json").json
    assert (made["field"], made["classes"]) == ("MoA", 2)
    cellstore("train", "--baseline", "logistic", *SETS, *IN)
    assert {row["truth"] for row in cellstore("votes", *IN, "--json").json["votes"]} == {
        "bright",
        "dull",
    }
    report = cellstore("report", *IN, "--json").json
    assert (report["field"], report["scores"][0]["accuracy"]) == ("MoA", 1.0)
