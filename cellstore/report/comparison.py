"""Two predict runs beside each other, on what both have answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..analysis.statistics import (
    WellTest,
    bootstrap_interval,
    difference_interval,
    mcnemar_over_wells,
)
from ..config import VoteRules
from ..enums import Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.workspace import Workspace
from ..query.engine import Questions, open_questions
from .scoring import Subject, codes_of, find_subject, numbers_of


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


RECIPES = """
    WITH RECURSIVE above(id) AS (
        SELECT recipe_id FROM runs WHERE id = ?
        UNION SELECT input_id FROM recipe_inputs JOIN above ON recipe_inputs.recipe_id = above.id
    )
    SELECT r.id, r.stage, r.version, r.parameters, r.weights_sha256
    FROM recipes AS r JOIN above ON above.id = r.id ORDER BY r.id
"""
RUNS = """
    SELECT p.code_version AS predicted_by, t.code_version AS trained_by, t.seed, s.name AS split
    FROM runs AS p LEFT JOIN runs AS t ON t.id = p.parent_id
    LEFT JOIN splits AS s ON s.id = coalesce(p.split_id, t.split_id) WHERE p.id = ?
"""
LONGEST = 60


def recipes_apart(questions: Questions, first: int, second: int) -> tuple[RecipeDifference, ...]:
    """Return the options in which two predict runs, and all that they read from, differ.

    Options are called ``stage.option``; those of one stage with several recipes are numbered.
    """
    one, other = (_options(questions, run) for run in (first, second))
    return tuple(
        RecipeDifference(name, one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    )


def _options(questions: Questions, run: int) -> dict[str, str]:
    row = questions.ask(RUNS, [run]).to_pylist()[0]
    found = {
        "split": row["split"],
        "train.seed": row["seed"],
        "train.code": row["trained_by"],
        "predict.code": row["predicted_by"],
    }
    numbers: dict[str, int] = {}
    for recipe in questions.ask(RECIPES, [run]).to_pylist():
        numbers[recipe["stage"]] = number = numbers.get(recipe["stage"], 0) + 1
        stage = recipe["stage"] if number == 1 else f"{recipe['stage']}{number}"
        found |= dict(_apart_named(stage, recipe))
    return {name: _short(value) for name, value in found.items() if value is not None}


def _apart_named(stage: str, recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield f"{stage}.version", recipe["version"]
    yield f"{stage}.weights", (recipe["weights_sha256"] or "")[:12] or None
    parameters = recipe["parameters"]
    yield from _flat(stage, json.loads(parameters) if isinstance(parameters, str) else parameters)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


LEVELS = ("image", "well")
VOTES = ("hard", "soft", "median")
SIDES = (Subset.TEST.value, "outside", Subset.VALIDATION.value, Subset.TRAIN.value)
"""The sides of a split, what is compared first standing first."""

SIGNIFICANT = 0.05

# The level is written out, so that DuckDB leaves out the parts of the view that are not asked for.
ANSWERS = {
    level: f"""
    SELECT unit_id, well_id, subset, truth, predicted, abstained IS NOT NULL AS abstained
    FROM verdicts WHERE run_id = ? AND level = '{level}' AND vote = ? ORDER BY unit_id
    """  # noqa: S608 - our own words
    for level in LEVELS
}
SEEN = "SELECT DISTINCT well_id FROM run_images WHERE run_id = ? AND well_in_training"
SEGMENTED_BY = """
    SELECT DISTINCT s.recipe_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id WHERE p.run_id = ? AND p.rank = 1
    ORDER BY s.recipe_id
"""
NAMES = {
    "image": """
    SELECT i.id, p.barcode || '/' || w.name || '/' || i.site AS name FROM images AS i
    JOIN wells AS w ON w.id = i.well_id JOIN plates AS p ON p.id = w.plate_id
    JOIN (SELECT unnest(?::BIGINT[]) AS id) AS asked ON asked.id = i.id
    ORDER BY p.barcode, w."row", w."column", i.site, i.id
    """,
    "well": """
    SELECT w.id, p.barcode || '/' || w.name AS name FROM wells AS w
    JOIN plates AS p ON p.id = w.plate_id
    JOIN (SELECT unnest(?::BIGINT[]) AS id) AS asked ON asked.id = w.id
    ORDER BY p.barcode, w."row", w."column"
    """,
}

Ids = NDArray[np.int64]


def compare(
    workspace: Workspace,
    first: str,
    second: str,
    *,
    level: str = "image",
    vote: str = "hard",
    limit: int | None = None,
    rules: VoteRules | None = None,
    force: bool = False,
) -> Comparison:
    """Put two predict runs (numbers or ``latest``) side by side.

    They are compared on the images, or at ``level`` well the wells, that both have answered: those
    of the test side; where there are none those outside of the split, else the validation side. Of
    two splits, the one may test what is outside of the other.
    Images that one of them was trained on count only with ``force``. ``vote`` is hard, soft or
    median. The first ``limit`` units in which their labels differ are listed, all by default.

    Raises:
        UnknownNameError: there is no such predict run, level or vote.
        UserInputError: both are the same run; they have answered nothing in common; or they answer
            other questions (compounds and genes).
    """
    if level not in LEVELS:
        raise UnknownNameError.of("level", level, LEVELS)
    if vote not in VOTES:
        raise UnknownNameError.of("vote", vote, VOTES)
    one = find_subject(workspace, first, rules)
    other = find_subject(workspace, second, rules)
    about = {one.run.id, other.run.id}
    with open_questions(workspace, rules=one.rules, runs=about) as questions:
        return compare_subjects(
            questions, one, other, level=level, vote=vote, limit=limit, force=force
        )


def compare_subjects(
    questions: Questions,
    first: Subject,
    second: Subject,
    *,
    level: str = "image",
    vote: str = "hard",
    limit: int | None = None,
    force: bool,
) -> Comparison:
    """Compare two predict runs; see :func:`compare`."""
    _check_comparable(first, second)
    answers = [questions.ask(ANSWERS[level], [item.run.id, vote]) for item in (first, second)]
    pair = _pair(*answers, one_split=first.split.id == second.split.id, force=force)
    if not pair.unit.size and pair.other_truth:
        raise UserInputError(
            f"The true label of each {level} that both runs have answered is another one in split "
            f"{first.split.name} than in {second.split.name}."
        )
    if not pair.unit.size:
        raise UserInputError(
            f"Runs {first.run.id} and {second.run.id} have answered no {level} in common that "
            "neither was trained on (--force compares them on those, too). Label the same images "
            "with both: cellstore predict --run RUN"
        )
    seen = (_seen(questions, first, pair.well), _seen(questions, second, pair.well))
    differing = np.flatnonzero(pair.first != pair.second)
    right = (pair.truth == pair.first, pair.truth == pair.second)
    test = mcnemar_over_wells(right[0], right[1], pair.well)
    bounds = difference_interval(right[0], right[1], pair.well) or (None, None)
    gain = float(right[0].mean() - right[1].mean())
    better, words = _verdict(first.run.id, second.run.id, gain, test)
    return Comparison(
        level=level,
        vote=vote,
        n=pair.unit.size,
        wells=np.unique(pair.well).size,
        first=_side(first, right[0], pair.well, seen[0]),
        second=_side(second, right[1], pair.well, seen[1]),
        both_right=int((right[0] & right[1]).sum()),
        only_first=int((right[0] & ~right[1]).sum()),
        only_second=int((~right[0] & right[1]).sum()),
        both_wrong=int((~right[0] & ~right[1]).sum()),
        same=pair.unit.size - differing.size,
        difference=gain,
        difference_low=bounds[0],
        difference_high=bounds[1],
        test=_test(test),
        better=better,
        verdict=words,
        not_compared=pair.left_out,
        recipes=recipes_apart(questions, first.run.id, second.run.id),
        warnings=_warnings(questions, (first, second), seen, pair, level),
        n_differing=differing.size,
        differing=_named(questions, pair, differing, level, limit),
    )


def _check_comparable(first: Subject, second: Subject) -> None:
    if first.run.id == second.run.id:
        raise UserInputError(f"Both are run {first.run.id}: name another run to compare it with.")
    fields = [subject.split.field.value for subject in (first, second)]
    if fields[0] != fields[1]:
        raise UserInputError(
            f"Run {first.run.id} says {fields[0]} and run {second.run.id} {fields[1]}: they answer "
            "other questions, so neither can be right more often."
        )


@dataclass(frozen=True)
class Pair:
    """What two runs said of the same N units: (N,) arrays of ids and of class numbers.

    ``sides`` are the sides of a split that any of them is on. ``left_out`` counts the units that
    are not compared, ``other_truth`` those of them whose truth is not the same for both.
    """

    labels: tuple[str, ...]
    unit: Ids
    well: Ids
    truth: Ids
    first: Ids
    second: Ids
    sides: frozenset[str]
    left_out: int
    other_truth: int


def _pair(first: pa.Table, second: pa.Table, *, one_split: bool, force: bool) -> Pair:
    """Return the units that both have answered, on the best side of which there are any."""
    every = np.union1d(first["unit_id"].to_numpy(), second["unit_id"].to_numpy()).size
    one, other = _common(first, second, one_split=one_split)
    same = pc.equal(one["truth"], other["truth"])
    changed = one.num_rows - int(pc.sum(same.cast(pa.int64())).as_py() or 0)
    one, other = one.filter(same), other.filter(same)
    mask = pa.array(_comparable(one, other, one_split=one_split, force=force))
    return _coded(one.filter(mask), other.filter(mask), every, changed)


def _common(first: pa.Table, second: pa.Table, *, one_split: bool) -> tuple[pa.Table, pa.Table]:
    """Return the rows of what both have answered, in the same order."""
    first, second = (rows.filter(pc.invert(rows["abstained"])) for rows in (first, second))
    if not one_split:
        first, second = _with_one_answer(first), _with_one_answer(second)
    one, other = (_keys(rows, by_side=one_split) for rows in (first, second))
    _, places, others = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    return first.take(places), second.take(others)


def _keys(rows: pa.Table, *, by_side: bool) -> Ids:
    """A number per unit; of a well that is on two sides of a split, one per side."""
    units = numbers_of(rows["unit_id"])
    return units * len(SIDES) + codes_of(rows["subset"], SIDES) if by_side else units


def _with_one_answer(rows: pa.Table) -> pa.Table:
    ids, counts = np.unique(rows["unit_id"].to_numpy(), return_counts=True)
    return rows.filter(pc.is_in(rows["unit_id"], pa.array(ids[counts == 1])))


def _comparable(
    first: pa.Table, second: pa.Table, *, one_split: bool, force: bool
) -> NDArray[np.bool_]:
    """Whether each unit is compared: the test side, else what a report would score in its place.

    What one split tests may well be outside of another one, which is as new to its run.
    """
    rank = np.maximum(*(codes_of(rows["subset"], SIDES) for rows in (first, second)))
    if not one_split:
        rank[rank == SIDES.index("outside")] = SIDES.index(Subset.TEST.value)
    if force or not rank.size:
        return np.ones(rank.size, dtype=bool)
    best = min(int(rank.min()), SIDES.index(Subset.VALIDATION.value))
    chosen: NDArray[np.bool_] = rank == best
    return chosen


def _coded(first: pa.Table, second: pa.Table, every: int, changed: int) -> Pair:
    columns = (first["truth"], first["predicted"], second["predicted"])
    labels = sorted({str(value) for column in columns for value in pc.unique(column).to_pylist()})
    truth, one, other = (codes_of(column, labels) for column in columns)
    unit = numbers_of(first["unit_id"])
    return Pair(
        labels=tuple(labels),
        unit=unit,
        well=numbers_of(first["well_id"]),
        truth=truth,
        first=one,
        second=other,
        sides=frozenset(
            side for rows in (first, second) for side in pc.unique(rows["subset"]).to_pylist()
        ),
        left_out=every - np.unique(unit).size,
        other_truth=changed,
    )


def _seen(questions: Questions, subject: Subject, wells: Ids) -> Ids:
    """Return those of the wells on which the model was trained."""
    known = questions.ask(SEEN, [subject.run.id])["well_id"]
    return np.intersect1d(wells, numbers_of(known))


def _side(subject: Subject, right: NDArray[np.bool_], wells: Ids, seen: Ids) -> Side:
    low, high = bootstrap_interval(right, wells) or (None, None)
    return Side(
        run_id=subject.run.id,
        train_run_id=subject.run.parent_id,
        split=subject.split.name,
        correct=int(right.sum()),
        accuracy=float(right.mean()),
        low=low,
        high=high,
        wells_seen=seen.size,
    )


def _test(found: WellTest) -> McNemar:
    return McNemar(
        wells_first=found.first,
        wells_second=found.second,
        p_value=found.p_value,
        how="McNemar's exact test with whole wells: how often the accuracies differ by as much "
        "where chance decides in each well which run is which.",
    )


def _verdict(first: int, second: int, gain: float, test: WellTest) -> tuple[int | None, str]:
    """Return which run is better, and the sentence on it."""
    wells = (
        f"run {first} has more right in {test.first:,} wells, run {second} in "
        f"{test.second:,} (McNemar's test over wells: p = {test.p_value:.2g})"
    )
    if test.p_value >= SIGNIFICANT:
        return None, f"Neither run is shown to be better: {wells}."
    better, worse = (first, second) if gain > 0 else (second, first)
    return better, f"Run {better} is better than run {worse}: {wells}."


def _warnings(
    questions: Questions,
    subjects: tuple[Subject, Subject],
    seen: tuple[Ids, Ids],
    pair: Pair,
    level: str,
) -> tuple[str, ...]:
    """Say why the runs may not be comparable."""
    runs = (subjects[0].run.id, subjects[1].run.id)
    found = _seen_warnings(runs, seen)
    used = [questions.ask(SEGMENTED_BY, [run])["recipe_id"].to_pylist() for run in runs]
    if used[0] != used[1]:
        one, other = (" and ".join(map(str, ids)) for ids in used)
        found.append(
            f"They judge different cells: run {runs[0]} those of segmentation recipe {one}, run "
            f"{runs[1]} those of {other}."
        )
    names = [subject.split.name for subject in subjects]
    if names[0] != names[1]:
        wells = ", so a well may have other images in each" if level == "well" else ""
        found.append(f"They learned from different splits: {names[0]} and {names[1]}{wells}.")
    found += _side_warnings(pair)
    if pair.other_truth:
        found.append(
            f"Left out: {pair.other_truth:,} {level}s whose true label is another one in each "
            "split."
        )
    return tuple(found)


def _side_warnings(pair: Pair) -> list[str]:
    found = []
    if Subset.TRAIN.value in pair.sides:
        found.append("Forced: images that a run was trained on are among those compared.")
    if Subset.VALIDATION.value in pair.sides:
        found.append("Validation images are compared, and they decided when a training stopped.")
    return found


def _seen_warnings(runs: tuple[int, int], seen: tuple[Ids, Ids]) -> list[str]:
    found = []
    for place, run in enumerate(runs):
        alone = np.setdiff1d(seen[place], seen[1 - place]).size
        if alone:
            found.append(
                f"Run {run} had seen {alone:,} of these wells in training, and run "
                f"{runs[1 - place]} had not: the comparison favours run {run}."
            )
    both = np.intersect1d(seen[0], seen[1]).size
    if both:
        found.append(f"Both runs had seen {both:,} of these wells in training.")
    return found


def _named(
    questions: Questions, pair: Pair, places: Ids, level: str, limit: int | None
) -> tuple[Difference, ...]:
    """Return the units in which the labels differ, in order of plate and place."""
    place_of: Mapping[int, int] = dict(
        zip(pair.unit[places].tolist(), places.tolist(), strict=True)
    )
    rows = questions.ask(NAMES[level], [list(place_of)]).to_pylist() if place_of else []
    return tuple(_difference(pair, place_of[row["id"]], row["name"]) for row in rows[:limit])


def _difference(pair: Pair, place: int, name: str) -> Difference:
    truth, first, second = (int(codes[place]) for codes in (pair.truth, pair.first, pair.second))
    right = "first" if first == truth else "second" if second == truth else "neither"
    return Difference(
        unit_id=int(pair.unit[place]),
        name=name,
        truth=pair.labels[truth],
        first=pair.labels[first],
        second=pair.labels[second],
        right=right,
    )
