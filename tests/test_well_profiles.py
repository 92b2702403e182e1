"""Well profiles: the values of pycytominer and harmonypy, and sentences for bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harmonypy
import numpy as np
import pandas as pd
import pycytominer
import pytest

from cellstore.analysis.well_profiles import (
    BLOCKLIST,
    CONSTANT,
    CORRELATION,
    MISSING,
    VARIANCE,
    WELL_COLUMNS,
    WellProfiles,
    correct_batches,
    correct_positions,
    normalise,
    on_edge,
    select_features,
)
from cellstore.errors import UserInputError

CONTROL = "Metadata_control == 'negative'"


def some_profiles(
    plates: int = 2, rows: int = 4, columns: int = 6, features: int = 5, seed: int = 0
) -> WellProfiles:
    """Wells of noise, every fourth of them a control."""
    wells = [(p, r, c) for p in range(plates) for r in range(rows) for c in range(columns)]
    table = pd.DataFrame(
        {
            "well_id": range(1, len(wells) + 1),
            "plate": [f"P{p}" for p, _, _ in wells],
            "well_row": [r + 1 for _, r, _ in wells],
            "well_column": [c + 1 for _, _, c in wells],
            "batch": [f"B{p}" for p, _, _ in wells],
            "control": ["negative" if at % 4 == 0 else None for at in range(len(wells))],
        }
    ).reindex(columns=list(WELL_COLUMNS))
    values = np.random.default_rng(seed).normal(3, 2, (len(wells), features))
    return WellProfiles(table, values, tuple(f"Cells_{at}" for at in range(features)))


def as_pycytominer(profiles: WellProfiles) -> pd.DataFrame:
    """The frame that pycytominer reads."""
    frame = pd.DataFrame(profiles.values, columns=list(profiles.columns))
    about = profiles.table[["plate", "control"]].add_prefix("Metadata_")
    return pd.concat([about, frame], axis=1)


def by_hand(profiles: WellProfiles, method: str, samples: str) -> pd.DataFrame:
    """Each plate by ``pycytominer.normalize``."""
    frame = as_pycytominer(profiles)
    parts = [
        pycytominer.normalize(part, list(profiles.columns), samples=samples, method=method)
        for _, part in frame.groupby("Metadata_plate", sort=False)
    ]
    found: pd.DataFrame = pd.concat(parts)
    return found


def marked(profiles: WellProfiles, which: Any) -> WellProfiles:
    """The same with these wells (N,) as the negative controls."""
    marks = pd.Series(["negative" if mark else None for mark in which])
    return replace(profiles, table=profiles.table.assign(control=marks))


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("mad", "mad_robustize"), ("standardise", "standardize"), ("sphere", "spherize")],
)
@pytest.mark.parametrize(("against", "samples"), [("controls", CONTROL), ("all", "all")])
def test_values_are_those_of_pycytominer(
    method: str, theirs: str, against: str, samples: str
) -> None:
    profiles = some_profiles()
    if method != "sphere":
        profiles.values[3, 2] = np.nan
        profiles.values[4, 1] = np.nan  # of a control
    found = normalise(profiles, method, against)
    expected = by_hand(profiles, theirs, samples)
    assert list(found.columns) == list(profiles.columns)
    np.testing.assert_array_equal(found.values, expected[list(found.columns)].to_numpy())


def test_no_normalisation_changes_nothing() -> None:
    profiles = some_profiles()
    assert normalise(profiles, "none") is profiles


def test_profiles_are_one_table() -> None:
    profiles = replace(some_profiles(), columns=tuple("eabcd"))
    frame = profiles.to_pandas()
    assert list(frame.columns) == [*WELL_COLUMNS, *profiles.columns]
    np.testing.assert_array_equal(frame["a"], profiles.values[:, 1])
    assert "<p>48 wells, 5 features</p>" in profiles._repr_html_()
    assert "<b>" not in profiles._repr_html_()


def test_selected_features_are_those_of_pycytominer() -> None:
    profiles = some_profiles(features=8)
    values = profiles.values
    values[:, 1] = values[:, 0] + 0.01 * values[:, 2]
    values[:, 3] = 5.0
    values[:10, 4] = np.nan
    names = (*profiles.columns[:5], "Nuclei_Correlation_RWC_AGP_DNA", *profiles.columns[6:])
    profiles = replace(profiles, columns=names)
    operations = ("missing", "blocklist", "variance", "correlation")
    found = select_features(profiles, operations)
    theirs = pycytominer.feature_select(
        as_pycytominer(profiles),
        list(names),
        operation=["drop_na_columns", "blocklist", "variance_threshold", "correlation_threshold"],
    )
    assert list(found.columns) == [name for name in theirs if name in names]
    assert found.gone[MISSING] == ("Cells_4",)
    assert found.gone[BLOCKLIST] == ("Nuclei_Correlation_RWC_AGP_DNA",)
    assert found.gone[VARIANCE] == ("Cells_3",)
    assert len(found.gone[CORRELATION]) == 1
    np.testing.assert_array_equal(found.values, theirs[list(found.columns)].to_numpy())
    assert select_features(profiles, ()) is profiles


@pytest.mark.parametrize("gap", [False, True])
def test_features_that_are_alike_are_those_of_pycytominer(gap: bool) -> None:
    profiles = some_profiles(features=60)
    sources = np.random.default_rng(1).integers(0, 12, 60)
    profiles.values[:] = profiles.values[:, sources] + 0.3 * profiles.values
    profiles.values[:, 7] = -profiles.values[:, 3]
    profiles.values[:, 9] = profiles.values[:, 3]  # exactly
    if gap:
        profiles.values[4, 20] = np.nan
    found = select_features(profiles, ("correlation",))
    theirs = pycytominer.feature_select(
        as_pycytominer(profiles), list(profiles.columns), operation="correlation_threshold"
    )
    assert 10 < len(found.columns) < 50
    assert list(found.columns) == [name for name in theirs if name in profiles.columns]


def test_wells_without_cells_count_in_nothing() -> None:
    profiles = some_profiles()
    emptied = replace(profiles, values=profiles.values.copy())
    emptied.values[[0, 1, 7, 30]] = np.nan  # two controls among them
    found = select_features(normalise(emptied, "mad"), ("missing", "variance"))
    assert found.columns == profiles.columns
    assert np.isnan(found.values[[0, 1, 7, 30]]).all()
    assert not np.isnan(np.delete(found.values, [0, 1, 7, 30], axis=0)).any()


def test_a_feature_that_is_constant_in_controls_goes_and_is_named() -> None:
    profiles = some_profiles()
    profiles.values[profiles.controls, 1] = 4.0
    for method in ("mad", "standardise", "sphere"):
        found = normalise(profiles, method)
        assert found.gone == {CONSTANT: ("Cells_1",)}
        assert np.abs(found.values).max() < 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["mad", "standardise", "sphere"])
def test_features_with_gaps_are_named_and_nothing_is_said_twice(method: str) -> None:
    profiles = some_profiles(rows=8, columns=12, features=5)
    profiles.values[:, 1] = np.nan
    profiles.values[profiles.controls, 2] = np.nan
    for positions in ("none", "median-polish", "controls"):
        found = normalise(correct_positions(profiles, positions), method)
        found = select_features(found, ("missing", "variance", "correlation"))
        assert found.gone == {MISSING: ("Cells_1", "Cells_2")}
        assert np.isfinite(found.values).all()


def test_a_plate_without_enough_controls_keeps_its_wells_without_values() -> None:
    profiles = some_profiles()
    of_plate = (profiles.table["plate"] == "P1").to_numpy()
    profiles.table.loc[of_plate, "control"] = None
    profiles.table.loc[np.flatnonzero(of_plate)[:1], "control"] = "negative"
    found = normalise(profiles, "mad")
    assert np.isnan(found.values[of_plate]).all()
    assert not np.isnan(found.values[~of_plate]).any()
    (note,) = found.notes
    assert note.startswith("Fewer than 2 negative control wells with cells are on plate P1")
    assert not np.isnan(normalise(profiles, "mad", "all").values).any()


def test_what_cannot_be_normalised_is_a_sentence() -> None:
    profiles = some_profiles(plates=1)
    none = replace(profiles, table=profiles.table.assign(control=None))
    with pytest.raises(UserInputError, match=r"--control NAME=negative"):
        normalise(none, "mad")
    one = marked(profiles, np.arange(24) == 0)
    with pytest.raises(UserInputError, match="No plate has 2 negative control wells"):
        normalise(one, "mad")
    flat = replace(profiles, values=np.ones_like(profiles.values))
    with pytest.raises(UserInputError, match="None of the 5 features is left"):
        normalise(flat, "mad")
    with pytest.raises(UserInputError, match="None of the 5 features is left"):
        select_features(flat, ("variance",))
    twice = replace(profiles, values=profiles.values[:, [0, 0, 1, 2, 2]])
    with pytest.raises(UserInputError, match="Plate P0 cannot be sphered"):
        normalise(twice, "sphere", "all")


def test_edges_are_those_of_the_plate_format() -> None:
    table = some_profiles(plates=1, rows=16, columns=23).table  # the last column is empty
    edge = on_edge(table)
    assert edge.sum() == 23 * 2 + 14
    assert edge[0]
    assert not edge[22 + 23]


@pytest.mark.parametrize("method", ["median-polish", "controls"])
def test_effects_of_positions_are_taken_out(method: str) -> None:
    profiles = some_profiles(plates=1, rows=8, columns=12, features=2)
    table, noise = profiles.table, profiles.values * 0.01
    slope = 0.5 * table["well_row"] - 0.25 * table["well_column"]
    planted = np.zeros(96)
    planted[[29, 50]] = 7.0
    effect = slope.to_numpy() + 2.0 * (on_edge(table) if method == "controls" else 0)
    shifted = replace(profiles, values=noise + (effect + planted)[:, None])
    found = correct_positions(shifted, method).values
    left = found - planted[:, None]
    assert np.std(left) < 0.03
    assert np.std(shifted.values - planted[:, None]) > 1
    assert correct_positions(shifted, "none") is shifted


def test_controls_stay_as_far_from_zero_as_wells_that_nothing_was_done_to() -> None:
    ratios = []
    for seed in range(20):
        profiles = some_profiles(plates=1, rows=8, columns=12, features=40, seed=seed)
        few = profiles.controls & (np.arange(96) % 8 == 0)
        found = correct_positions(marked(profiles, few), "controls").values
        rest = found - found.mean(axis=0)
        ratios.append(np.mean(rest[few] ** 2) / np.mean(rest[~few] ** 2))
    assert 0.9 < np.mean(ratios) < 1.35


def test_positions_that_cannot_be_corrected_are_notes() -> None:
    profiles = some_profiles(plates=1)
    found = correct_positions(profiles, "controls")
    assert "Not corrected for positions" in found.notes[0]
    np.testing.assert_array_equal(found.values, profiles.values)
    filled = marked(profiles, (profiles.table["well_column"] == 1).to_numpy())
    assert "fill rows or columns" in correct_positions(filled, "median-polish").notes[0]
    assert correct_positions(profiles, "median-polish").notes == ()


def test_batches_are_corrected_by_harmony() -> None:
    profiles = some_profiles()
    profiles.values[24:] += 3.0
    profiles.values[5] = np.nan
    found = correct_batches(profiles, "plate", seed=4)
    known = profiles.known
    theirs = harmonypy.run_harmony(
        profiles.values[known], profiles.table[known], ["plate"], verbose=False, random_state=4
    )
    np.testing.assert_array_equal(found.values[known], theirs.Z_corr)
    assert np.isnan(found.values[5]).all()
    apart = np.abs(found.values[:24].mean() - found.values[24:].mean())
    assert np.isnan(apart) or apart < 1.5
    assert correct_batches(profiles, "none") is profiles


def test_what_harmony_cannot_bring_together_is_a_sentence() -> None:
    with pytest.raises(UserInputError, match="All wells are of one plate"):
        correct_batches(some_profiles(plates=1), "plate")
    profiles = some_profiles()
    profiles.table.loc[2, "batch"] = None
    with pytest.raises(UserInputError, match="Plate P0 has no batch"):
        correct_batches(profiles, "batch")
