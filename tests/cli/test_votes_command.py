"""``cellstore votes``: what the cells of every image said, on the screen and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from screens import SmallScreen, small_screen

from cellstore.config import VoteOptions
from cellstore.enums import Stage, Status
from cellstore.errors import UnknownNameError
from cellstore.jobs.workspace import Workspace
from cellstore.store import Store

IN = ("--store", "store")


@pytest.fixture
def screen(cellstore, tmp_path: Path) -> SmallScreen:
    """A small screen in ``store``; its votes are worked out in ``screens.VOTES``."""
    cellstore("init", "store")
    with Store.open(tmp_path / "store") as store:
        return small_screen(store.workspace)


def test_the_screen_says_who_won_and_how_often_that_is_right(
    cellstore, screen: SmallScreen
) -> None:
    lines = cellstore("votes", *IN).out.splitlines()
    assert lines[:3] == [
        f"Run {screen.predict_run.id}, hard vote: 4 images, 2 ties, 0 abstentions",
        "test: 2 of 3 right (66.67 %)",
        "outside: 1 of 1 right (100.00 %)",
    ]
    assert [line.split()[:4] for line in lines[6:]] == [
        ["BR1", "B01", "1", "DMSO"],
        ["BR1", "B02", "1", "taxol"],
        ["BR1", "B03", "1", "DMSO"],
        ["BR1", "B04", "1", "taxol"],
    ]
    assert "image_id" not in lines[4]


def test_commands_end_with_what_is_not_done_yet(cellstore, screen: SmallScreen) -> None:
    for words in (("votes",), ("report",), ("split", "show")):
        steps = [line for line in cellstore(*words, *IN).err.splitlines() if "Next:" in line]
        assert len(steps) == 1, words
        assert f"cellstore --store store {words[0]}" not in steps[0]
        assert "Next" not in cellstore(*words, *IN, "--json").err


def test_ties_wells_and_rules(cellstore, screen: SmallScreen) -> None:
    found = cellstore("votes", *IN, "--ties", "--json").json
    assert (found["units"], found["ties"], found["accuracy"]) == (4, 2, pytest.approx(2 / 3))
    assert [(row["well"], row["winner"], row["runner_up"]) for row in found["votes"]] == [
        ("B02", "taxol", "DMSO"),
        ("B03", "DMSO", "taxol"),
    ]
    ruled = cellstore(
        *("votes", *IN, "--level", "well", "--vote", "soft", "--json"),
        *("--min-cells", "2", "--min-margin", "0.1", "--no-controls"),
    ).json
    # B01 is a control. B02: (1.1 - 0.8) / 2 is more than 0.1; B03 is a draw; B04 is one cell.
    assert [(row["well"], row["abstained"]) for row in ruled["votes"]] == [
        ("B02", None),
        ("B03", "close"),
        ("B04", "few cells"),
    ]
    assert (ruled["abstained"], ruled["subsets"]) == (
        2,
        [{"subset": "test", "n": 1, "correct": 1, "accuracy": 1.0}],
    )


def test_rows_in_files_and_formats(cellstore, screen: SmallScreen, tmp_path: Path) -> None:
    rows = json.loads(cellstore("votes", *IN, "--format", "json", "--limit", "1").out)
    assert [(row["well"], row["votes"], row["image_id"]) for row in rows] == [
        ("B01", 2.0, screen.images["B01"].id)
    ]
    said = cellstore("votes", *IN, "--format", "parquet", "--output", "votes.parquet")
    assert said.out == ""
    assert "4 rows written to votes.parquet" in said.err
    table = pq.read_table(tmp_path / "votes.parquet")
    assert table["tie"].to_pylist() == [False, True, True, False]
    assert cellstore("votes", *IN, "--format", "parquet", code=2).err.startswith("Error: Parquet")


def test_formulas_in_names_are_no_formulas_in_a_spreadsheet(cellstore, screen: SmallScreen) -> None:
    make = screen.factory
    odd = make.label("=cmd|' /C calc'!A0")
    run = make.run(Stage.PREDICT, parent_id=screen.train_run.id)
    cells = make.cells_of(screen.segmentations["B04"])
    make.predict(run, cells, [[(odd, 0.9)]] * len(cells))
    plain = cellstore("votes", *IN, "--format", "csv").out
    assert '"=cmd' in plain
    safe = cellstore("votes", *IN, "--format", "csv", "--for-spreadsheet").out
    assert "'=cmd" in safe


def test_only_the_run_that_is_asked_about_is_read(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    other = make.run(Stage.PREDICT, parent_id=screen.train_run.id, status=Status.RUNNING)
    cells = make.cells_of(screen.segmentations["B04"])
    make.predict(other, cells, [[(screen.labels["DMSO"], 1.0)]] * len(cells))
    first = Store(workspace).votes(str(screen.predict_run.id))
    assert (first.units, first.accuracy) == (4, pytest.approx(2 / 3))
    made = sorted((workspace.settings.cache / "snapshots").glob("*.parquet"))
    assert [path.name.split("-")[1] for path in made] == [f"run{screen.predict_run.id}"] * 3
    going_on = Store(workspace).votes(str(other.id))
    assert (going_on.units, going_on.table["winner"].to_pylist()) == (1, ["DMSO"])
    assert going_on.notes == ("The run is running, so images may be missing here.",)


def test_words_that_are_none(sqlite_workspace: Workspace) -> None:
    small_screen(sqlite_workspace)
    with pytest.raises(UnknownNameError, match="vote 'majority'"):
        Store(sqlite_workspace).votes(vote="majority")
    with pytest.raises(UnknownNameError, match="plate"):
        Store(sqlite_workspace).votes(level="plate")
    nobody = Store(sqlite_workspace).votes(vote_options=VoteOptions(min_cells=99))
    assert (nobody.abstained, nobody.subsets, nobody.accuracy) == (4, (), None)
