"""Two predict runs beside each other, on what both have answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.statistics import well_interval
from ..config import VoteOptions
from ..enums import Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.workspace import Workspace
from ..query.engine import Questions, open_questions
from .scoring import CLASS_NAMES, SEEN, Subject, find_subject, judge
from .votes import LEVELS, SUBSETS, VOTES


@dataclass(frozen=True)
class ComparedRun:
    """One of two compared runs, on what both have answered.

    ``low`` and ``high`` bound the accuracy: 95 % interval over wells, ``None`` where these are too
    few. ``wells_seen``: how many of the compared wells it had been trained on.
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
    the second, with ``difference_low`` and ``difference_high``, ``None`` where wells are too few.
    ``not_compared`` counts the units that only one of them has answered. ``better`` is the number
    of the run that is better by the test at 5 %, or ``None``; ``conclusion`` says it in words, or
    why it cannot be said (``cannot_say``).
    ``warnings`` say why the two may not be comparable. ``differing`` holds the first
    ``len(differing)`` of ``n_differing`` units whose labels differ.
    """

    level: str
    vote: str
    n: int
    wells: int
    first: ComparedRun
    second: ComparedRun
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
    conclusion: str
    cannot_say: str | None = None
    not_compared: int = 0
    recipes: tuple[RecipeDifference, ...] = ()
    warnings: tuple[str, ...] = ()
    n_differing: int = 0
    differing: tuple[Difference, ...] = ()


LONGEST = 60
"""Characters of an option that are shown."""

# The level is written out, so that DuckDB skips the parts of the view that are not asked for.
ANSWERS = f"""
    SELECT v.unit_id, v.well_id, list_position({list(SUBSETS)}, v.subset) - 1 AS subset,
        t.code AS truth, w.code AS answer, v.abstained IS NOT NULL AS abstained
    FROM votes AS v
    JOIN class_names AS t ON t.value = v.truth
    JOIN class_names AS w ON w.value = v.winner
    WHERE v.run_id = ? AND v.level = '{{level}}' AND v.vote = ?
    ORDER BY v.unit_id, v.subset
"""  # noqa: S608 - our own words
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
    ORDER BY p.barcode, w.well_row, w.well_column, i.site, i.id
    """,
    "well": """
    SELECT w.id, p.barcode || '/' || w.name AS name FROM wells AS w
    JOIN plates AS p ON p.id = w.plate_id
    JOIN (SELECT unnest(?::BIGINT[]) AS id) AS asked ON asked.id = w.id
    ORDER BY p.barcode, w.well_row, w.well_column
    """,
}
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


def compare(
    workspace: Workspace,
    first: str,
    second: str,
    *,
    level: str = "image",
    vote: str = "hard",
    limit: int | None = None,
    vote_options: VoteOptions | None = None,
    force: bool = False,
) -> Comparison:
    """Put two predict runs (numbers or ``latest``) side by side.

    They are compared on the images, or at ``level`` well the wells, that both have answered: those
    of the test subset; where there are none those outside of the split, else those of validation.
    Of two splits, the one may test what is outside of the other.
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
    one = find_subject(workspace, first, vote_options)
    other = find_subject(workspace, second, vote_options)
    about = {one.run.id, other.run.id}
    with open_questions(workspace, vote_options=one.vote_options, runs=about) as questions:
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
    if first.run.id == second.run.id:
        raise UserInputError(f"Both are run {first.run.id}: name another run to compare it with.")
    kinds = [subject.split.field for subject in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserInputError(
            f"Run {first.run.id} predicts {kinds[0]} and run {second.run.id} {kinds[1]}: their "
            "labels are of different kinds and cannot be compared."
        )
    run_ids = [first.run.id, second.run.id]
    questions.keep("class_names", CLASS_NAMES, [run_ids])
    names = questions.ask_ours("SELECT value FROM class_names ORDER BY code").rows()
    labels = [value for (value,) in names]
    query = ANSWERS.format(level=level)
    answers = [questions.ask_ours(query, [run_id, vote]).arrays() for run_id in run_ids]
    one_split = first.split.id == second.split.id
    pair = common_answers(*answers, one_split=one_split, force=force)
    if not pair.unit.size and pair.other_truth:
        raise UserInputError(
            f"Split {first.split.name} and split {second.split.name} have different true labels "
            f"for every {level} that both runs have labelled."
        )
    if not pair.unit.size:
        raise UserInputError(
            f"Runs {first.run.id} and {second.run.id} have answered no {level} in common that "
            "neither was trained on (--force compares them on those, too). Label the same images "
            "with both: cellstore predict --run RUN"
        )
    seen, compared = [], []
    right = (pair.truth == pair.first, pair.truth == pair.second)
    for subject, correct in zip((first, second), right, strict=True):
        known = questions.ask_ours(SEEN, [subject.run.id]).arrays()["well_id"]
        seen.append(np.intersect1d(pair.well, known.astype(np.int64)))
        low, high = well_interval(correct, pair.well) or (None, None)
        compared.append(
            ComparedRun(
                run_id=subject.run.id,
                train_run_id=subject.run.parent_id,
                split=subject.split.name,
                correct=int(correct.sum()),
                accuracy=float(correct.mean()),
                low=low,
                high=high,
                wells_seen=seen[-1].size,
            )
        )
    judged = judge(*right, pair.well, np.setxor1d(*seen).size)
    test = judged.test
    bounds = well_interval(right[0], pair.well, minus=right[1]) or (None, None)
    better = {1: first.run.id, -1: second.run.id}.get(judged.better or 0)
    wells = (
        f"run {first.run.id} has more right in {test.first:,} wells, run {second.run.id} in "
        f"{test.second:,} (McNemar's test over wells: p = {test.p_value:.2g})"
    )
    conclusion = f"Neither run is shown to be better: {wells}."
    if judged.cannot_say:
        conclusion = f"Cannot say which run is better: {judged.cannot_say}; {wells}."
    elif better is not None:
        worse = second.run.id if judged.better == 1 else first.run.id
        conclusion = f"Run {better} is better than run {worse}: {wells}."
    differs = np.flatnonzero(pair.first != pair.second)
    return Comparison(
        level=level,
        vote=vote,
        n=pair.unit.size,
        wells=np.unique(pair.well).size,
        first=compared[0],
        second=compared[1],
        both_right=int((right[0] & right[1]).sum()),
        only_first=int((right[0] & ~right[1]).sum()),
        only_second=int((~right[0] & right[1]).sum()),
        both_wrong=int((~right[0] & ~right[1]).sum()),
        same=pair.unit.size - differs.size,
        difference=judged.difference,
        difference_low=bounds[0],
        difference_high=bounds[1],
        test=McNemar(
            wells_first=test.first,
            wells_second=test.second,
            p_value=test.p_value,
            how="McNemar's exact test with whole wells: how often the accuracies differ by as much "
            "where chance decides in each well which run is which.",
        ),
        better=better,
        conclusion=conclusion,
        cannot_say=judged.cannot_say,
        not_compared=pair.not_compared,
        recipes=recipes_apart(questions, first.run.id, second.run.id),
        warnings=_warnings(questions, (first, second), seen, pair, level),
        n_differing=differs.size,
        differing=_differences(questions, pair, differs, labels, level, limit),
    )


@dataclass(frozen=True)
class CommonAnswers:
    """What two runs answered for the same N units: (N,) ids, and (N,) numbers of labels.

    ``subsets`` of a split that any of the units is in. ``not_compared`` counts the units that only
    one of them has answered or that may not be compared, ``other_truth`` those of them whose truth
    is not the same for both.
    """

    unit: NDArray[np.int64]
    well: NDArray[np.int64]
    truth: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    subsets: frozenset[str]
    not_compared: int
    other_truth: int


def common_answers(
    first: Mapping[str, NDArray[Any]],
    second: Mapping[str, NDArray[Any]],
    *,
    one_split: bool,
    force: bool,
) -> CommonAnswers:
    """Return what both have answered, of the best subset in which there is any.

    That is the test subset, else what a report would score in its place. What one split tests may
    well be outside of another one, which is as new to its run. ``first`` and ``second``: the
    columns of ``ANSWERS``.
    """
    every = np.union1d(first["unit_id"], second["unit_id"]).size
    found, keys = [], []
    for answers in (first, second):
        numbers = {name: answers[name].astype(np.int64) for name in answers}
        chosen = numbers["abstained"] == 0
        key = numbers["unit_id"]
        if one_split:  # a well in two subsets has an answer in each
            key = key * len(SUBSETS) + numbers["subset"]
        else:  # of a well with two answers it cannot be said which one is meant
            ids, counts = np.unique(key[chosen], return_counts=True)
            chosen &= np.isin(key, ids[counts == 1])
        found.append({name: values[chosen] for name, values in numbers.items()})
        keys.append(key[chosen])
    _, in_first, in_second = np.intersect1d(
        keys[0], keys[1], assume_unique=True, return_indices=True
    )
    one = {name: values[in_first] for name, values in found[0].items()}
    other = {name: values[in_second] for name, values in found[1].items()}
    chosen = one["truth"] == other["truth"]
    other_truth = int((~chosen).sum())
    if chosen.any() and not force:
        rank = np.maximum(one["subset"], other["subset"])
        if not one_split:
            rank[rank == SUBSETS.index("outside")] = SUBSETS.index(Subset.TEST.value)
        best = min(int(rank[chosen].min()), SUBSETS.index(Subset.VALIDATION.value))
        chosen &= rank == best
    # A well in several subsets counts once, by the first of SUBSETS.
    rows = np.flatnonzero(chosen)
    order = rows[np.lexsort((one["subset"][rows], one["unit_id"][rows]))]
    chosen = order[np.unique(one["unit_id"][order], return_index=True)[1]]
    unit = one["unit_id"][chosen]
    subsets = np.union1d(one["subset"][chosen], other["subset"][chosen])
    return CommonAnswers(
        unit=unit,
        well=one["well_id"][chosen],
        truth=one["truth"][chosen],
        first=one["answer"][chosen],
        second=other["answer"][chosen],
        subsets=frozenset(SUBSETS[code] for code in subsets),
        not_compared=every - unit.size,
        other_truth=other_truth,
    )


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
    """The options behind a run, each as a short text."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[name] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    (row,) = questions.ask_ours(RUNS, [run]).records()
    add("split", row["split"])
    add("train.seed", row["seed"])
    add("train.code", row["trained_by"])
    add("predict.code", row["predicted_by"])
    numbers: dict[str, int] = {}
    for recipe in questions.ask_ours(RECIPES, [run]).records():
        stage = recipe["stage"]
        numbers[stage] = number = numbers.get(stage, 0) + 1
        name = stage if number == 1 else f"{stage}{number}"
        parameters = recipe["parameters"]
        add(f"{name}.version", recipe["version"])
        add(f"{name}.weights", (recipe["weights_sha256"] or "")[:12] or None)
        add(name, json.loads(parameters) if isinstance(parameters, str) else parameters)
    return found


def _warnings(
    questions: Questions,
    subjects: tuple[Subject, Subject],
    seen: list[NDArray[np.int64]],
    pair: CommonAnswers,
    level: str,
) -> tuple[str, ...]:
    """Say why the runs may not be comparable."""
    runs = [subject.run.id for subject in subjects]
    found = [sentence for subject in subjects for sentence in subject.stale]
    for own, other in ((0, 1), (1, 0)):
        alone = np.setdiff1d(seen[own], seen[other]).size
        if alone:
            found.append(
                f"Run {runs[own]} had seen {alone:,} of these wells in training, and run "
                f"{runs[other]} had not: the comparison favours run {runs[own]}."
            )
    both = np.intersect1d(seen[0], seen[1]).size
    if both:
        found.append(f"Both runs had seen {both:,} of these wells in training.")
    used = [list(questions.ask_ours(SEGMENTED_BY, [run]).rows()) for run in runs]
    if used[0] != used[1]:
        one, other_ids = (" and ".join(str(recipe) for (recipe,) in rows) for rows in used)
        found.append(
            f"They label different cells: run {runs[0]} those of segmentation recipe {one}, run "
            f"{runs[1]} those of {other_ids}."
        )
    names = [subject.split.name for subject in subjects]
    if names[0] != names[1]:
        wells = ", so a well may have other images in each" if level == "well" else ""
        found.append(f"They learned from different splits: {names[0]} and {names[1]}{wells}.")
    if Subset.TRAIN.value in pair.subsets:
        found.append("Forced: images that a run was trained on are among those compared.")
    if Subset.VALIDATION.value in pair.subsets:
        found.append("Validation images are compared, and they decided when a training stopped.")
    if pair.other_truth:
        found.append(
            f"Excluded: {pair.other_truth:,} {level}s whose true label is not the same in both "
            "splits."
        )
    return tuple(found)


def _differences(
    questions: Questions,
    pair: CommonAnswers,
    differs: NDArray[np.int64],
    labels: Sequence[str],
    level: str,
    limit: int | None,
) -> tuple[Difference, ...]:
    """Return the units in which the labels differ, in order of plate, row and column."""
    index_of = dict(zip(pair.unit[differs].tolist(), differs.tolist(), strict=True))
    rows = questions.ask_ours(NAMES[level], [list(index_of)]).records() if index_of else []
    found = []
    for row in rows[:limit]:
        index = index_of[row["id"]]
        truth, first, second = (
            labels[int(codes[index])] for codes in (pair.truth, pair.first, pair.second)
        )
        right = "first" if first == truth else "second" if second == truth else "neither"
        found.append(Difference(row["id"], row["name"], truth, first, second, right))
    return tuple(found)
