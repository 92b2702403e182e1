"""Measures of treatments: by hand, against the libraries, and right where nothing happens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cellstore.analysis.activity import (
    Wells,
    activity,
    activity_by_copairs,
    cell_counts,
    consistency,
    consistency_by_copairs,
    edge_check,
    effects,
    replicate_correlation,
    replicates_needed,
    smallest_p,
    strongest_changes,
)

stats = pytest.importorskip("scipy.stats")
Numbers = NDArray[np.float64]
Codes = NDArray[np.int64]
Flags = NDArray[np.bool_]


def screen(
    treatments: int = 6,
    *,
    plates: int = 2,
    wells: int = 2,
    controls: int = 8,
    features: int = 12,
    strength: float = 0.0,
    seed: int = 0,
) -> tuple[Numbers, Codes, Flags, Codes]:
    """Values, groups, controls and plates; treatment 0 has an effect of that strength."""
    random = np.random.default_rng(seed)
    one = np.r_[np.repeat(np.arange(treatments), wells), np.full(controls, -1)]
    groups, plate = np.tile(one, plates), np.repeat(np.arange(plates), one.size)
    values = random.normal(size=(groups.size, features))
    values[groups == 0] += strength * random.normal(size=features)
    return values, groups, groups < 0, plate


def angles(*degrees: float) -> Numbers:
    turned = np.radians(degrees)
    return np.column_stack([np.cos(turned), np.sin(turned)])


def test_mean_average_precision_by_hand() -> None:
    # Similarity is by angle; 19 is of the other target. From 0: 10, 19, 40, so 1/1 and 2/3.
    # From 10: 19, 0, 40, so 1/2 and 2/3. From 40: 19, 10, 0, so again 1/2 and 2/3.
    values = angles(0, 10, 40, 19)
    targets = [frozenset({"a"})] * 3 + [frozenset({"b"})]
    found = consistency(values, targets)
    by_hand = np.mean([np.mean([1, 2 / 3]), np.mean([1 / 2, 2 / 3]), np.mean([1 / 2, 2 / 3])])
    assert found["a"].value == pytest.approx(by_hand)
    assert (found["b"].value, found["b"].p) == (None, None)
    assert found["b"].note == "One treatment only: 2 are needed."
    # Of 4 sets of 3 of these, ours is the third: the outlier's neighbours are told apart best.
    means = {}
    for three in combinations(range(4), 3):
        mine = [frozenset({"a" if i in three else "b"}) for i in range(4)]
        means[three] = consistency(values, mine, permutations=1)["a"].value
    worse = sum(value >= found["a"].value - 1e-12 for value in means.values())
    assert found["a"].p == pytest.approx(worse / 4, abs=0.12)


def test_the_same_as_copairs_on_the_same_profiles() -> None:
    pytest.importorskip("copairs")
    values, groups, controls, plates = screen(strength=2.0)
    used, off = controls | (groups == 0), np.zeros_like(values)
    for plate in (0, 1):  # as activity does, with the wells of one treatment
        here = (plates == plate) & used
        spread = values[here].std(0)
        off[here] = np.abs(values[here] - np.median(values[here], axis=0)) / spread
        values[here] = (values[here] - values[here].mean(0)) / spread
    values /= np.median(off[used], axis=0)
    ours, theirs = (
        measure(Wells(values, np.where(groups == 0, 0, -1), controls, plates))
        for measure in (activity, activity_by_copairs)
    )
    assert ours[0].value == pytest.approx(theirs[0].value, rel=1e-6)
    assert (theirs[0].n_wells, theirs[0].n_controls, theirs[0].n_plates) == (4, 16, 2)

    random = np.random.default_rng(1)
    names = [*"aaabbbccd"]
    targets = [frozenset({name, "x"} if i in (0, 4) else {name}) for i, name in enumerate(names)]
    profiles = random.normal(size=(9, 5))
    mine, published = consistency(profiles, targets), consistency_by_copairs(profiles, targets)
    assert mine.keys() == published.keys() == set("abcdx")
    for target in "abcx":
        assert mine[target].value == pytest.approx(published[target].value, rel=1e-6)
        assert published[target].q is not None
    assert published["d"].value is None


def test_copairs_leaves_nothing_at_home_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copairs = pytest.importorskip("copairs.map")
    import pandas as pd

    monkeypatch.setenv("HOME", str(tmp_path))
    values, groups, controls, plates = screen(strength=1.0)
    found = activity_by_copairs(Wells(values, groups, controls, plates), null_size=500, seed=3)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    alone = np.where(controls, np.arange(len(groups)), -1)
    meta = pd.DataFrame({"t": groups, "alone": alone, "plate": plates})
    by_hand = copairs.average_precision(
        meta, values, ["t", "alone"], [], ["plate"], ["t", "alone"], progress_bar=False
    )
    by_hand = copairs.mean_average_precision(
        by_hand[by_hand["t"] >= 0], ["t"], 500, 0.05, 3, progress_bar=False
    )
    columns = ["t", "mean_average_precision", "p_value", "corrected_p_value"]
    expected = by_hand[columns].to_numpy()
    assert [(t, s.value, s.p, s.q) for t, s in found.items()] == [tuple(r) for r in expected]


def test_p_is_the_share_of_exchanges_that_look_as_strong() -> None:
    """Each pair of 7 wells in turn as the treatment: p takes each of 1/21, 2/21, ... 1 once."""
    values, groups, controls, plates = screen(1, plates=1, wells=2, controls=5, seed=4)
    ps = []
    for pair in combinations(range(7), 2):
        exchanged = np.full(7, -1)
        exchanged[list(pair)] = 0
        found = activity(Wells(values, exchanged, exchanged < 0, plates), permutations=20_000)
        ps.append(found[0].p)
    assert np.sort(ps) == pytest.approx(np.arange(1, 22) / 21, rel=0.4)
    assert np.mean(ps) == pytest.approx(11 / 21, abs=0.04)
    assert smallest_p(Wells(values, groups, controls, plates), 10_000) == {0: 1 / 21}
    assert smallest_p(Wells(values, groups, controls, plates), 9) == {0: 0.1}


def test_q_is_that_of_benjamini_and_hochberg() -> None:
    found = activity(Wells(*screen(strength=3.0)))
    ps = [score.p for score in found.values()]
    q = [score.q for score in found.values()]
    ordered = np.argsort(ps)
    by_hand = np.array(ps)[ordered] * 6 / np.arange(1, 7)
    by_hand = np.minimum.accumulate(by_hand[::-1])[::-1]
    assert np.array(q)[ordered] == pytest.approx(np.minimum(by_hand, 1))
    assert q[0] < 0.05 < min(q[1:])
    assert activity(Wells(*screen(strength=3.0))) == found  # the same seed, the same answer


def test_effects_by_hand() -> None:
    # One feature; controls 0, 1, 2, 3 on one plate. Without each: mean, SD (n - 1).
    controls = np.array([0.0, 1, 2, 3])
    rest = [np.delete(controls, i) for i in range(4)]

    def log_distance(x: float, some: Numbers) -> float:
        return float(np.log(abs(x - some.mean()) / some.std(ddof=1)))

    own = np.array([log_distance(*pair) for pair in zip(controls, rest, strict=True)])
    wells = np.array([9.0, 11.0])
    away = np.array([np.mean([log_distance(x, some) for some in rest]) for x in wells])
    expected = (away - own.mean()) / own.std(ddof=1)
    values = np.r_[wells, controls][:, None]
    groups = np.array([0, 0, -1, -1, -1, -1])
    found, each = effects(Wells(values, groups, groups < 0, np.zeros(6, dtype=np.int64)))
    assert each == pytest.approx(np.r_[expected, (own - own.mean()) / own.std(ddof=1)])
    assert found[0].value == pytest.approx(expected.mean())
    assert found[0].low < expected.mean() < found[0].high
    assert found[0].low + found[0].high == pytest.approx(2 * expected.mean())
    assert (found[0].n_wells, found[0].n_controls, found[0].n_plates) == (2, 4, 1)


def test_cell_counts_by_hand() -> None:
    counts = np.array([50.0, 70, 30, 100, 120, 80, 90, 110])
    groups = np.array([0, 0, 0, -1, -1, -1, -1, -1])
    plates = np.zeros(8, dtype=np.int64)
    found, each = cell_counts(counts, groups, groups < 0, plates)
    spread = np.std(counts[3:] / 100, ddof=1)
    assert each == pytest.approx((counts / 100 - 1) / spread)
    # Welch: the mean of the wells, and the ratio's share of the controls' error.
    own, other = 0.04 / 3, (0.5 * spread) ** 2 / 5
    free = (own + other) ** 2 / (own**2 / 2 + other**2 / 4)
    reach = stats.t.ppf(0.975, free) * np.sqrt(own + other)
    assert found[0].value == pytest.approx(0.5)
    assert found[0].high == pytest.approx(0.5 + reach)
    assert found[0].low == pytest.approx(max(0, 0.5 - reach))
    assert found[0].p == pytest.approx(1 / 56, abs=0.01)  # the most extreme of 8 over 3
    counts[:3] = 0
    dead = cell_counts(counts, groups, groups < 0, plates)[0][0]
    assert (dead.value, dead.low) == (0, 0)
    assert dead.high is not None
    assert 0 < dead.high < 0.1


def test_plates_may_differ() -> None:
    values, groups, controls, plates = screen(strength=2.0)
    same = effects(Wells(values, groups, controls, plates))[0]
    moved = effects(Wells(values + 50.0 * plates[:, None], groups, controls, plates))[0]
    assert [s.value for s in moved.values()] == pytest.approx([s.value for s in same.values()])
    strong = activity(Wells(values + 50.0 * plates[:, None], groups, controls, plates))
    assert strong == activity(Wells(values, groups, controls, plates))


def test_replicates_are_alike_where_the_treatment_does_something() -> None:
    values, groups, controls, plates = screen(20, strength=3.0)
    found = replicate_correlation(Wells(values, groups, controls, plates))
    rows = values[groups == 0]
    pairs = [np.corrcoef(rows[i], rows[j])[0, 1] for i, j in combinations(range(4), 2)]
    assert found[0].value == pytest.approx(np.mean(pairs))
    assert found[0].q < 0.01 < min(found[other].q for other in range(1, 20))
    alone = replicate_correlation(Wells(values, np.where(groups == 0, 0, -1), controls, plates))[0]
    assert (alone.p, alone.value) == (None, found[0].value)
    assert alone.note is not None


def test_what_cannot_be_said_has_a_reason() -> None:
    values, groups, controls, plates = screen(3, plates=1, controls=6)
    values[:, 3] = np.nan
    values[:, 4] = 7.0
    values[groups == 0] = np.nan  # no cells left
    values[np.flatnonzero(groups == 1)[0]] = np.nan
    values[5, 5] = np.inf
    counts = np.arange(1.0, len(groups) + 1)
    for found in (
        activity(Wells(values, groups, controls, plates)),
        activity_by_copairs(Wells(values, groups, controls, plates)),
    ):
        assert (found[0].value, found[0].n_wells) == (None, 0)
        assert found[0].note == "2 of 2 wells have no values, or no controls beside them."
        assert (found[1].p, found[1].n_wells) == (None, 1)
        assert found[1].note == "1 of 2 wells have no values, or no controls beside them."
        assert found[2].note is None
        assert found[2].p is not None
    scores, each = effects(Wells(values, groups, controls, plates))
    assert scores[1].value is not None
    assert scores[1].low is None
    assert np.isnan(each[groups == 0]).all()
    assert cell_counts(counts, groups, controls, plates)[0][0].value is not None
    few = controls & (np.cumsum(controls) < 4)
    found = activity(Wells(values, groups, few, plates))
    assert found[2].note == "There are fewer than 4 negative controls to compare with."
    found = effects(Wells(values, groups, few, plates))[0]
    assert found[2].note == "No plate has 4 negative controls with a profile."
    none = activity(Wells(values, groups, np.zeros_like(controls), plates))
    assert none[2].note == "2 of 2 wells have no values, or no controls beside them."
    flat = effects(Wells(np.ones_like(values), groups, controls, plates))[0][2]
    assert flat.note == "All features are constant among the negative controls."
    assert activity(Wells(np.ones_like(values), groups, controls, plates))[2].p > 0.3


def test_edges_of_plates() -> None:
    values, _, controls, plates = screen(1, plates=2, controls=12)
    edge, names = np.arange(len(controls)) % 2 == 0, ("P1", "P2")
    assert edge_check(values, controls, plates, edge, names) == (False, None)
    moved = values + 2.0 * edge[:, None]
    assert edge_check(moved, controls, plates, edge, names)[0]
    # Plate 1: no controls, no wells.
    assert edge_check(moved, controls & (plates == 0), plates, edge, names) == (True, None)
    few = edge.copy()
    few[plates == 1] = np.cumsum(controls[plates == 1]) == 1
    matched, warning = edge_check(values + 2.0 * few[:, None], controls, plates, few, names)
    assert not matched
    assert "plates P2" in (warning or "")
    assert "cannot be checked" in (edge_check(values, controls, plates, controls, names)[1] or "")


def test_replicates_needed() -> None:
    """Cosines of +-1 with controls, 0.5 between wells: 0.5 sqrt(n (n - 1) / 2) >= z + z."""
    wells = angles(0, 60)
    controls = angles(0, 180, 60, 240)
    spread = np.std([1, -1, 0.5, -0.5])
    for level in (0.05, 0.001):
        n = replicates_needed(wells, controls, beside=16, level=level)
        reach = (stats.norm.isf(level) + stats.norm.ppf(0.8)) * spread / 0.5
        assert n is not None
        assert np.sqrt(n * (n - 1) / 2) >= reach > np.sqrt((n - 1) * (n - 2) / 2)
    # Alike as they may be, with one control beside each a p of 0.001 takes 10 wells: 2 ** 10.
    assert replicates_needed(angles(0, 1), controls / 1e9, beside=1, level=0.001) == 10
    for some, others in ((angles(0, 120), controls), (wells[:1], controls), (wells, controls[:3])):
        assert replicates_needed(some, others, beside=16) is None


def test_the_most_changed_features_by_hand() -> None:
    controls = np.array([[0.0, 10], [2, 10], [4, 10], [6, 10]])  # spread 2.58 and none
    values = np.vstack([controls, [[3 + 7.7, 99], [3 + 5.1, 99]], [[np.nan, np.nan]]])
    groups = np.array([-1, -1, -1, -1, 0, 0, 1])
    found = strongest_changes(Wells(values, groups, groups < 0, np.zeros(7, dtype=np.int64)))
    # 6.4 / 2.58 for the first feature; the second does not vary among controls, so says nothing.
    assert found[0] == pytest.approx(0.95 * 6.4 / np.std([0, 2, 4, 6], ddof=1))
    assert np.isnan(found[1])
