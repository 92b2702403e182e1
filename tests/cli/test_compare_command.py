"""report and compare as they are typed: what is said, in 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import Factory, hits_run
from screens import SmallScreen, small_screen

from cellstore.enums import Stage
from cellstore.models import Run
from cellstore.store import Store

IN = ("--store", "store")
HOSTILE = "=cmd|' /C calc'!A0,\"<b>\""


@pytest.fixture
def runs(cellstore, tmp_path: Path) -> tuple[int, int]:
    """A small screen in ``store``, labelled by two runs."""
    cellstore("init", "store")
    with Store.open(tmp_path / "store") as store:
        screen = small_screen(store.workspace)
        return screen.predict_run.id, labelled(screen, "DMSO").id


def labelled(screen: SmallScreen, label: str) -> Run:
    """Another run on the test images, which always says the same, and once something odd."""
    make = screen.factory
    recipe = make.recipe(Stage.TRAIN, parameters={"epochs": 3})
    train = make.run(Stage.TRAIN, recipe, split_id=screen.split.id)
    run = make.run(Stage.PREDICT, make.recipe(Stage.PREDICT, inputs=[recipe]), parent_id=train.id)
    odd = make.label(HOSTILE)
    for well in ("B01", "B02", "B03"):
        cells = make.cells_of(screen.segmentations[well])
        said = odd if well == "B02" else screen.labels[label]
        make.predict(run, cells, [[(said, 0.9)]] * len(cells))
    return run


def test_two_runs_side_by_side(cellstore, runs: tuple[int, int]) -> None:
    first, second = runs
    said = cellstore("compare", first, second, *IN).out
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("3 images of 3 wells that both have labelled")
    found = cellstore("compare", first, second, *IN, "--json").json
    # B01: both DMSO. B02: taxol, and something odd. B03 (taxol): both DMSO.
    names = ("n", "both_right", "only_first", "both_wrong")
    assert [found[name] for name in names] == [3, 1, 1, 1]
    assert [(item["name"], item["right"]) for item in found["differing"]] == [
        ("BR1/B02/1", "first")
    ]
    assert (found["test"]["wells_first"], found["test"]["p_value"]) == (1, 1.0)
    assert "Cannot say which run is better: too few wells (3 wells" in " ".join(said.split())
    assert "too few wells for an interval" in said


def test_the_report_fits_80_columns_and_shows_the_other_run(
    cellstore, runs: tuple[int, int]
) -> None:
    first, second = runs
    said = cellstore("report", "--run", first, "--compare", second, *IN).out
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("66.7 % of 3 images are right (3 wells: too few for an interval)")
    assert f"Beside run {second}:" in said
    found = cellstore("report", "--run", first, "--compare", second, *IN, "--json").json
    assert found["comparison"] == cellstore("compare", first, second, *IN, "--json").json
    few = cellstore("report", "--run", first, "--min-cells", 3, "--no-controls", *IN, code=None)
    assert few.code == 2
    assert "Lower --min-cells or --min-margin" in few.err  # the image of three cells is a control
    found = cellstore("report", "--run", first, "--min-cells", 3, *IN, "--json").json
    assert [(i["n"], i["abstained"]) for i in found["scores"] if i["level"] == "image"] == [
        (1, 2)
    ] * 3
    assert found["vote_options"] == {
        "min_cells": 3,
        "min_margin": 0.0,
        "controls": True,
        "exclude_flagged": None,
    }


def test_two_hits_runs_side_by_side(cellstore, tmp_path: Path) -> None:
    cellstore("init", "store")
    others = {f"treatment {i}": "hit 2.5" for i in range(30)}
    with Store.open(tmp_path / "store") as store:
        make = Factory(store.workspace)
        first = hits_run(make, {"taxol": "hit 9.25", HOSTILE: "no difference -0.5", **others}).id
        less = dict.fromkeys(others, "mainly fewer cells 1.25")
        second = hits_run(make, {"taxol": "hit 7", HOSTILE: "hit 3", **less}, rule="q < 0.1").id
    said = cellstore("compare", first, second, *IN).out
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("32 treatments that both could judge")
    words = " ".join(said.split())
    assert (
        f"Run {first} finds more treatments than run {second}: hits of run {first} alone: " in words
    )
    assert "Careful: Their rules differ" in words
    assert "Hits of both: taxol" in words
    assert "and 10 more (all with --json)" in words
    found = cellstore("compare", first, second, *IN, "--json").json
    assert (found["both"], found["only_first"], found["only_second"]) == (1, 30, 1)
    rows = {row["name"]: row for row in found["treatments"]}
    assert len(rows) == 32
    assert (rows["taxol"]["hit_of"], rows["taxol"]["first_effect"]) == ("both", 9.25)
    assert rows[HOSTILE]["second"] == "hit"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{0}", "{0}"), "name another run"),
        (("{0}", "99"), "99"),
        (("{0}", "1"), "has no predictions to report on"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    cellstore, runs: tuple[int, int], words: tuple[str, ...], message: str
) -> None:
    said = cellstore("compare", *(word.format(*runs) for word in words), *IN, code=2)
    assert message in said.err
    assert said.out == ""
