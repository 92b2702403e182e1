"""What the comparison of two runs says, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One of two compared runs, on what both have answered.

    ``low`` and ``high`` bound the accuracy: 95 % bootstrap interval over wells, ``None`` for a
    single well. ``wells_seen``: how many of the compared wells it had been trained on.
    """

    run_id: int
    train_run_id: int | None
    split: str
    correct: int
    accuracy: float
    low: float | None
    high: float | None
    wells_seen: int


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test in which wells count as a whole: their images are not independent.

    ``wells_first`` counts the wells of which the first run has more right than the second,
    ``wells_second`` the other way round. ``p_value`` is two-sided: how often the accuracies would
    differ by as much, or more, if chance decided in each well which run is which. ``how`` says it
    in words.
    """

    wells_first: int
    wells_second: int
    p_value: float
    how: str


@dataclass(frozen=True)
class Difference:
    """An image (or well) that two runs label differently.

    ``name`` is PLATE/WELL/SITE or PLATE/WELL. ``right`` is first, second or neither.
    """

    unit_id: int
    name: str
    truth: str
    first: str
    second: str
    right: str


@dataclass(frozen=True)
class RecipeDifference:
    """An option in which the recipes of two runs differ; ``None``: it has none."""

    what: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Comparison:
    """Two predict runs on the images (``level`` well: wells) that both have answered.

    ``both_right``, ``only_first``, ``only_second`` and ``both_wrong`` add up to ``n``; ``same``
    counts equal labels, right or wrong. ``difference`` is the accuracy of the first minus that of
    the second, with ``difference_low`` and ``difference_high`` by drawing whole wells.
    ``not_compared`` counts the units that only one of them has answered. ``better`` is the number
    of the run that is better by the test at 5 %, or ``None``; ``verdict`` says it in words.
    ``warnings`` say why the two may not be comparable. ``differing`` holds the first
    ``len(differing)`` of ``n_differing`` units whose labels differ.
    """

    level: str
    vote: str
    n: int
    wells: int
    first: Side
    second: Side
    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    same: int
    difference: float
    difference_low: float | None
    difference_high: float | None
    test: McNemar
    better: int | None
    verdict: str
    not_compared: int = 0
    recipes: tuple[RecipeDifference, ...] = ()
    warnings: tuple[str, ...] = ()
    n_differing: int = 0
    differing: tuple[Difference, ...] = ()
