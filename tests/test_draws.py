"""Drawing cells: evenly, the same ones however they come."""

from __future__ import annotations

import numpy as np

from cellstore.analysis.draws import Lowest, even_shares, lots, splitmix64


def test_lots_are_those_of_splitmix64() -> None:
    # The first three outputs from state 0 of Vigna's splitmix64.c (prng.di.unimi.it).
    golden = 0x9E3779B97F4A7C15
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = np.array([golden * i % 2**64 for i in (1, 2, 3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == outputs
    many = lots(np.arange(20_000), 0) / 2.0**64
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(many, lots(np.arange(20_000), 1))[0, 1]) < 0.02


def test_shares_are_even_and_small_groups_give_all() -> None:
    assert even_shares({"a": 100, "b": 2, "c": 100}, 20) == {"a": 9, "b": 2, "c": 9}
    assert even_shares({"a": 3, "b": 2}, 20) == {"a": 3, "b": 2}
    assert sum(even_shares({"a": 9, "b": 9, "c": 9}, 10).values()) == 10
    assert even_shares({}, 10) == {}


def test_the_same_are_drawn_in_whichever_blocks_they_come() -> None:
    random = np.random.default_rng(0)
    ids, groups = np.arange(1, 1001), random.integers(0, 3, 1000)
    drawn = []
    for blocks in (1, 7, 50):
        order = random.permutation(1000)
        found = Lowest(30, seed=4)
        for some in np.array_split(order, blocks):
            found.add(groups[some], ids[some])
        assert found.counts == {g: int((groups == g).sum()) for g in range(3)}
        drawn.append({g: x.tolist() for g, x in found.drawn({0: 30, 1: 10, 2: 0}).items()})
    assert drawn[0] == drawn[1] == drawn[2]
    assert {g: len(x) for g, x in drawn[0].items()} == {0: 30, 1: 10}
    assert all(groups[np.array(x) - 1].tolist() == [g] * len(x) for g, x in drawn[0].items())
    other = Lowest(30, seed=5)
    other.add(groups, ids)
    assert other.drawn({0: 30})[0].tolist() != drawn[0][0]


def test_a_group_may_have_a_number_of_its_own() -> None:
    ids = np.arange(100)
    found = Lowest({0: 3, 1: 0}, seed=0)
    for some in np.array_split(ids, 7):
        found.add(some % 3, some)
    assert {g: len(x) for g, x in found.drawn({0: 9, 1: 9, 2: 9}).items()} == {0: 3, 1: 0, 2: 0}
    assert found.counts == {0: 34, 1: 33, 2: 33}
