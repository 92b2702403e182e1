"""``cellstore measure``: groups of features, and the tables they become."""

from __future__ import annotations

import pandas as pd
import pytest
from test_journey import draw_cells
from threshold import use_threshold

from cellstore.analysis.features import GROUPS

INTENSITIES = len(GROUPS["intensity"].features)
TEXTURES = len(GROUPS["texture"].features)


@pytest.fixture
def drawn(screen):
    draw_cells(screen.parent / "images")


@pytest.fixture
def segmented(drawn, cellstore, tmp_path, monkeypatch, store):
    """A store of 12 images of one channel, segmented: 192 cells."""
    model, _ = use_threshold(monkeypatch, tmp_path)
    cellstore("segment", "--model", model, "--store", store)
    return store


def test_the_registry_is_a_table_and_json(cellstore):
    said = cellstore("measure", "--list").out
    lines = [line.split() for line in said.splitlines()]
    listed = [words[0] for words in lines if words]
    for group in GROUPS.values():
        assert f"{group.name}: {group.description}" in said
        ending = "_*" if group.per_channel else ""
        assert {f"{item.name}{ending}" for item in group.features} <= set(listed)
    as_json = cellstore("measure", "--list", "--json").json
    assert [group["name"] for group in as_json] == list(GROUPS)
    perimeter = next(item for item in as_json[0]["features"] if item["name"] == "perimeter")
    assert perimeter["source"] == "skimage.measure.regionprops: perimeter"
    assert perimeter["unit"] == "pixel"


def test_a_group_is_a_table_to_sql_and_columns_of_an_export(cellstore, segmented, tmp_path):
    at = ("--store", segmented)
    made = cellstore("measure", "--features", "basic, intensity", *at, "--json").json
    (intensity,) = made["others"]
    assert (made["group"], made["cells"], intensity["cells"]) == ("basic", 192, 192)
    name = intensity["feature_set"]
    query = (
        "SELECT max(abs(f.mean_intensity - i.mean_intensity_DNA)) AS apart, count(*) AS n "
        f"FROM features f JOIN {name} i USING (cell_id)"
    )
    (row,) = cellstore("sql", query, "--json", *at).json
    assert row["n"] == 192
    assert row["apart"] == pytest.approx(0, abs=1e-9)
    target = tmp_path / "cells.parquet"
    cellstore("export", target, "--features", name, *at)
    exported = pd.read_parquet(target)
    assert len(exported) == 192
    expected = [item.name for item in GROUPS["intensity"].columns(["DNA"])]
    assert list(exported.columns[-INTENSITIES:]) == [f"Cells_{item}" for item in expected]
    assert exported["Cells_mean_intensity_DNA"].notna().all()
    assert cellstore("verify", *at, "--json").json["problems"] == []
    status = cellstore("status", *at, "--json").json
    sets = {item["name"]: item for item in status["feature_sets"]}
    assert (sets[name]["columns"], sets[name]["cells"]) == (INTENSITIES, 192)
    assert status["measured"] == 12


def test_several_groups_are_told_one_by_one(cellstore, segmented):
    at = ("--store", segmented)
    words = ("measure", "--features", "intensity", "--features", "texture", *at)
    said = cellstore(*words).out
    for group in ("intensity", "texture"):
        assert f"{group}: feature set {group}_" in said
    assert said.count("images measured  12") == 2
    assert cellstore(*words).out.count("Nothing to do: 12 images measured already") == 2


def test_images_of_which_only_a_wide_group_is_measured_count_as_measured(cellstore, segmented):
    at = ("--store", segmented)
    cellstore("measure", "--features", "texture", "--limit", 5, *at)
    status = cellstore("status", *at, "--json").json
    assert status["measured"] == 5
    (texture,) = status["feature_sets"]
    assert (texture["columns"], texture["cells"]) == (TEXTURES, 80)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--features", "textur"),
            (
                "Unknown group of features 'textur'. Known: basic, intensity, texture. "
                "Did you mean texture?"
            ),
        ),
        (
            ("--features", "texture", "--channels", "DMA"),
            "Unknown channel 'DMA'. Known: DNA. Did you mean DNA?",
        ),
    ],
)
def test_an_unknown_name_is_one_sentence(cellstore, segmented, words, sentence):
    said = cellstore("measure", *words, "--store", segmented, code=2)
    assert said.err.strip() == f"Error: {sentence}"
