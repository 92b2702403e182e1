"""Two predict runs, or two hits runs, beside each other, on what both have answered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.statistics import FEWEST_WELLS, WellTest, exchange_test, well_interval
from ..config import RunName, VoteOptions
from ..enums import Stage, Status, Subset, Verdict
from ..errors import UserInputError, by_number, some_of
from ..jobs.run_names import RUN_WORDS, NamedRun, find_named_run
from ..jobs.workspace import Workspace
from ..models import Run
from ..notebooks import Shown
from ..query.cells import trainings_of_features
from ..query.engine import Questions, open_questions
from .answers import (
    SIGNIFICANT,
    Answers,
    Subject,
    class_names,
    declared_of,
    find_subject,
    first_rows,
    given,
    in_subset,
    judge,
    read_answers,
    seen_wells,
)
from .votes import SUBSETS, check_vote


@dataclass(frozen=True)
class ComparedRun:
    """One of two compared runs, on what both have answered.

    ``low`` and ``high`` bound the accuracy: 95 % interval over wells, ``None`` where these are too
    few. ``wells_seen``: how many of the compared wells it had been trained on. ``name``: its
    number, or that of a cross-validation, of which ``run_id`` is the last run.
    """

    run_id: int
    name: str
    train_run_id: int | None
    split: str
    correct: int
    accuracy: float
    low: float | None
    high: float | None
    wells_seen: int


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
class Comparison(Shown):
    """Two predict runs on the images (``level`` well: wells) that both have answered.

    ``both_right``, ``only_first``, ``only_second`` and ``both_wrong`` add up to ``n``; ``same``
    counts equal labels, right or wrong. ``difference`` is the accuracy of the first minus that of
    the second, with ``difference_low`` and ``difference_high``, ``None`` where wells are too few.
    ``not_compared`` counts the units that only one of them has answered. ``better`` is the number
    of the run that is better by the test at 5 %, or ``None``; ``conclusion`` says it in words, or
    why it cannot be said (``cannot_say``). ``test``: McNemar's exact test in which wells count as a
    whole, as their images are not independent; its p is how often the accuracies would differ by as
    much, or more, if chance decided in each well which run is which.
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
    test: WellTest
    better: int | None
    conclusion: str
    cannot_say: str | None = None
    not_compared: int = 0
    recipes: tuple[RecipeDifference, ...] = ()
    warnings: tuple[str, ...] = ()
    n_differing: int = 0
    differing: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class ComparedHits:
    """One of two compared hits runs: its profile run, and its ``hits`` among the compared.

    ``judged``: all treatments that it could judge. ``features``: the feature set of its profiles,
    ``columns`` how many numbers these have.
    """

    run_id: int
    profile_run: int | None
    features: str | None
    columns: int | None
    judged: int
    hits: int


@dataclass(frozen=True)
class ComparedTreatment:
    """A treatment by two hits runs. ``hit_of`` is first, second, both or neither.

    ``first`` and ``second`` are their verdicts, the effects are in control standard deviations.
    """

    treatment_id: int
    name: str
    cell_line: str | None
    time_point: str | None
    hit_of: str
    first: str
    second: str
    first_effect: float | None
    second_effect: float | None


@dataclass(frozen=True)
class HitsComparison(Shown):
    """Two hits runs on the ``n`` treatments that both could judge: which finds more.

    ``both``, ``only_first``, ``only_second`` and ``neither`` add up to ``n``: hits of both runs,
    and so on. A treatment with wells of two cell lines or time points counts in each.
    ``p_value``: McNemar's exact test, two-sided. ``better`` is the number of the run that finds
    more by it at 5 %, or ``None``; ``conclusion`` says it in words, or why it cannot be said
    (``cannot_say``). ``not_judged``: treatments of both runs that one or both could not
    judge; ``only_in_first`` and ``only_in_second``: those that the other run has not.
    ``warnings`` say why the two may not be comparable. ``treatments``: hits of the first alone,
    of the second alone, of both, and the others, each by their effects; with a ``limit`` so many of
    each.
    """

    n: int
    first: ComparedHits
    second: ComparedHits
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    better: int | None
    conclusion: str
    cannot_say: str | None
    not_judged: int
    only_in_first: int
    only_in_second: int
    warnings: tuple[str, ...]
    recipes: tuple[RecipeDifference, ...]
    treatments: tuple[ComparedTreatment, ...]


HIT_OF = ("first", "second", "both", "neither")
LONGEST = 60
"""Characters of an option that are shown."""

TREATMENTS = """
    WITH scored AS (
        SELECT run_id, treatment_id, cell_line, time_point, any_value(name) AS name,
            max(verdict) FILTER (measure = 'hit') AS verdict,
            max(value) FILTER (measure = 'effect') AS effect
        FROM treatment_scores
        WHERE level = 'treatment' AND measure IN ('hit', 'effect')
        GROUP BY run_id, treatment_id, cell_line, time_point
    )
    SELECT coalesce(a.treatment_id, b.treatment_id) AS treatment_id,
        coalesce(a.name, b.name) AS name, coalesce(a.cell_line, b.cell_line) AS cell_line,
        coalesce(a.time_point, b.time_point) AS time_point,
        CASE WHEN a.verdict = 'hit' AND b.verdict = 'hit' THEN 'both'
            WHEN a.verdict = 'hit' THEN 'first' WHEN b.verdict = 'hit' THEN 'second'
            ELSE 'neither' END AS hit_of,
        a.verdict AS first, b.verdict AS second, a.effect AS first_effect,
        b.effect AS second_effect
    FROM (FROM scored WHERE run_id = $first) AS a
    FULL JOIN (FROM scored WHERE run_id = $second) AS b ON a.treatment_id = b.treatment_id
        AND a.cell_line IS NOT DISTINCT FROM b.cell_line
        AND a.time_point IS NOT DISTINCT FROM b.time_point
"""
SEGMENTED_BY = """
    SELECT DISTINCT s.recipe_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id WHERE p.run_id = ? AND p.rank = 1
    ORDER BY s.recipe_id
"""
SEGMENTED_BY_RECIPE = """
    SELECT DISTINCT s.id FROM runs AS r JOIN recipe_inputs AS i ON i.recipe_id = r.recipe_id
    JOIN recipes AS s ON s.id = i.input_id WHERE r.id = ? AND s.stage = 'segment' ORDER BY s.id
"""
"""The same as the recipe of a run says it, without a look at its millions of predictions."""
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
RECIPES_BEHIND = """
    WITH RECURSIVE above(id) AS (
        SELECT recipe_id FROM runs WHERE id = ?
        UNION SELECT input_id FROM recipe_inputs JOIN above ON recipe_inputs.recipe_id = above.id
    )
    SELECT recipes.* FROM recipes JOIN above ON above.id = recipes.id ORDER BY recipes.id
"""
RUNS = """
    SELECT p.stage, p.code_version AS made_by, t.stage AS before, t.code_version AS made_before,
        t.seed, s.name AS split
    FROM runs AS p LEFT JOIN runs AS t ON t.id = p.parent_id
    LEFT JOIN splits AS s ON s.id = coalesce(p.split_id, t.split_id) WHERE p.id = ?
"""


def compare(
    workspace: Workspace,
    first: RunName,
    second: RunName,
    *,
    level: str = "image",
    vote: str = "hard",
    limit: int | None = None,
    vote_options: VoteOptions | None = None,
    force: bool = False,
) -> Comparison | HitsComparison:
    """Put two predict runs, or two hits runs, side by side; see :meth:`cellstore.Store.compare`.

    Predict runs are compared on the test subset; where there is nothing of that, on what is outside
    of the split, else on validation. Of two splits, the one may test what is outside of the other.
    Images that one of them was trained on count only with ``force``.
    """
    check_vote(level, vote)
    pair = _hits_runs(workspace, first, second)
    if pair is not None:
        if (level, vote, force) != ("image", "hard", False) or vote_options not in (
            None,
            VoteOptions(),
        ):
            raise UserInputError(
                "These are hits runs, without votes: level, vote, force and the options of votes "
                "are for predict runs."
            )
        return compare_hits(workspace, *pair, limit=limit)
    one = find_subject(workspace, first, vote_options)
    other = find_subject(workspace, second, vote_options)
    about = one.read_as | other.read_as
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
    if both := first.read_as.keys() & second.read_as.keys():
        raise UserInputError(f"Both are run {max(both)}: name another run to compare it with.")
    kinds = [subject.split.field for subject in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserInputError(
            f"Run {first.name} predicts {kinds[0]} and run {second.name} {kinds[1]}: their "
            "labels are of different kinds and cannot be compared."
        )
    run_ids = [first.run.id, second.run.id]
    labels = class_names(questions, run_ids)
    answers = [read_answers(questions, run_id, level, (vote,))[level, vote] for run_id in run_ids]
    one_split = first.split.id == second.split.id
    pair, n_other_truth = common_answers(*answers, one_split=one_split, force=force)
    one, other = pair
    if not one.size and n_other_truth:
        raise UserInputError(
            f"Split {first.split_name} and split {second.split_name} have different true labels "
            f"for every {level} that both runs have labelled."
        )
    if not one.size:
        raise UserInputError(
            f"Runs {first.name} and {second.name} have answered no {level} in common that "
            "neither was trained on (--force compares them on those, too). Label the same images "
            "with both: cellstore predict --run RUN"
        )
    seen, compared = [], []
    right = one.correct, other.correct
    for subject, correct in zip((first, second), right, strict=True):
        seen.append(np.intersect1d(one.well, seen_wells(questions, subject.run.id)))
        low, high = well_interval(correct, one.well) or (None, None)
        compared.append(
            ComparedRun(
                run_id=subject.run.id,
                name=subject.name,
                train_run_id=None if subject.folds else subject.run.parent_id,
                split=subject.split_name,
                correct=int(correct.sum()),
                accuracy=float(correct.mean()),
                low=low,
                high=high,
                wells_seen=seen[-1].size,
            )
        )
    test, which, cannot_say = judge(*right, one.well, np.setxor1d(*seen).size)
    bounds = well_interval(right[0], one.well, minus=right[1]) or (None, None)
    better = {1: first, -1: second}.get(which or 0)
    wells = (
        f"wells in which more is right: {test.wells_first:,} with run {first.name}, "
        f"{test.wells_second:,} "
        f"with run {second.name} (McNemar's test over wells: p = {test.p_value:.2g})"
    )
    conclusion = f"Neither run is shown to be better: {wells}."
    if cannot_say:
        conclusion = f"Cannot say which run is better: {cannot_say}; {wells}."
    elif better is not None:
        worse = second if better is first else first
        conclusion = f"Run {better.name} is better than run {worse.name}: {wells}."
    differs = one.predicted != other.predicted
    return Comparison(
        level=level,
        vote=vote,
        n=one.size,
        wells=np.unique(one.well).size,
        first=compared[0],
        second=compared[1],
        both_right=int((right[0] & right[1]).sum()),
        only_first=int((right[0] & ~right[1]).sum()),
        only_second=int((~right[0] & right[1]).sum()),
        both_wrong=int((~right[0] & ~right[1]).sum()),
        same=one.size - int(differs.sum()),
        difference=float(right[0].mean() - right[1].mean()),
        difference_low=bounds[0],
        difference_high=bounds[1],
        test=test,
        better=None if better is None else better.run.id,
        conclusion=conclusion,
        cannot_say=cannot_say,
        not_compared=np.union1d(answers[0].unit, answers[1].unit).size - one.size,
        recipes=recipes_apart(questions, first.run.id, second.run.id),
        warnings=_warnings(questions, (first, second), seen, pair, n_other_truth, level),
        n_differing=int(differs.sum()),
        differing=_differences(questions, one[differs], other[differs], labels, level, limit),
    )


def _hits_runs(workspace: Workspace, first: RunName, second: RunName) -> tuple[int, int] | None:
    """Return the numbers of both if one is named as a hits run; ``latest`` is then one, too."""
    names = [str(name).strip().lower() for name in (first, second)]
    with workspace.database.read() as session:
        found = list[NamedRun | None]()
        for name in names:
            try:
                found.append(None if name in RUN_WORDS else find_named_run(session, name))
            except UserInputError:  # no run at all, or a cross-validation
                found.append(None)
        if not any(run and run.stage is Stage.HITS for run in found):
            return None
        for run in found:
            if run and run.stage is not Stage.HITS:
                raise UserInputError(
                    f"Run {run.id} is a {run.stage.value} run, the other one a hits run: only "
                    "runs of one kind can be compared."
                )
        one, other = (find_named_run(session, name, [Stage.HITS]).id for name in names)
    return one, other


def compare_hits(
    workspace: Workspace, first: int, second: int, *, limit: int | None = None
) -> HitsComparison:
    """Compare two hits runs by their numbers; see :class:`HitsComparison`.

    Hits are those by the rule of each run, so both hold the same false discovery rate where their
    rules are the same.
    """
    if first == second:
        raise UserInputError(f"Both are run {first}: name another run to compare it with.")
    with open_questions(workspace) as questions:
        asked = {"first": first, "second": second}
        rows = questions.ask_ours(TREATMENTS, asked).records()
        recipes_differ = recipes_apart(questions, first, second)
    every = [ComparedTreatment(**row) for row in rows]
    in_both = [item for item in every if item.first and item.second]
    if not in_both:
        raise UserInputError(
            f"Runs {first} and {second} are about different treatments: none is in both. Compare "
            "runs of cellstore hits on the same plates."
        )
    treatments = [item for item in in_both if Verdict.UNKNOWN not in (item.first, item.second)]
    treatments.sort(
        key=lambda item: (
            HIT_OF.index(item.hit_of),
            -max(item.first_effect or 0.0, item.second_effect or 0.0),
            by_number(item.name),
        )
    )
    judged = [
        sum(verdict not in (None, Verdict.UNKNOWN) for verdict in verdicts)
        for verdicts in zip(*((item.first, item.second) for item in every), strict=True)
    ]
    counts = {name: sum(item.hit_of == name for item in treatments) for name in HIT_OF}
    alone, others = counts["first"], counts["second"]
    p = exchange_test([1] * alone + [-1] * others) if treatments else 1.0
    words = (
        f"hits of run {first} alone: {alone:,}, of run {second} alone: {others:,}, of both: "
        f"{counts['both']:,} (McNemar's exact test: p = {p:.2g})"
    )
    cannot_say, better = None, None
    if not treatments:
        cannot_say = "there is no treatment that both could judge"
    elif alone + others < FEWEST_WELLS:
        cannot_say = (
            f"fewer than {FEWEST_WELLS} treatments are a hit of one run alone, too few to rule out "
            "chance"
        )
    elif p < SIGNIFICANT:
        better = first if alone > others else second
    conclusion = f"Neither run is shown to find more treatments: {words}."
    if cannot_say:
        conclusion = f"Cannot say which run finds more treatments: {cannot_say}; {words}."
    elif better:
        worse = second if better == first else first
        conclusion = f"Run {better} finds more treatments than run {worse}: {words}."
    with workspace.database.read() as session:
        runs = [session.get_one(Run, run_id) for run_id in (first, second)]
        compared = [
            ComparedHits(
                run_id=run.id,
                profile_run=run.parent_id,
                features=(run.result or {}).get("feature_set"),
                columns=(run.result or {}).get("columns"),
                judged=number,
                hits=counts["both"] + counts[name],
            )
            for run, number, name in zip(runs, judged, HIT_OF, strict=False)
        ]
        warnings = _hits_warnings(runs)
        for run in runs:
            recipes = [run.recipe, *run.recipe.inputs]
            training = next(
                (t for one in recipes for t in trainings_of_features(session, one)), None
            )
            if training is not None:
                warnings.append(
                    f"The features of run {run.id} are an embedding by training run {training.id}, "
                    "which learned what wells got: on wells of its split it finds too much."
                )
    return HitsComparison(
        n=len(treatments),
        first=compared[0],
        second=compared[1],
        both=counts["both"],
        only_first=alone,
        only_second=others,
        neither=counts["neither"],
        p_value=p,
        better=better,
        conclusion=conclusion,
        cannot_say=cannot_say,
        not_judged=len(in_both) - len(treatments),
        only_in_first=sum(item.second is None for item in every),
        only_in_second=sum(item.first is None for item in every),
        warnings=tuple(warnings),
        recipes=recipes_differ,
        treatments=tuple(
            item
            for name in HIT_OF
            for item in [item for item in treatments if item.hit_of == name][:limit]
        ),
    )


def _hits_warnings(runs: Sequence[Run]) -> list[str]:
    """Say where two hits runs have other rules or plates."""
    one, other = (run.result or {} for run in runs)
    found = []
    for run in runs:
        if run.status is not Status.DONE:
            found.append(f"Run {run.id} is {run.status.value}: it may lack treatments.")
    if one.get("rule") != other.get("rule"):
        rules = "; ".join(f"run {run.id}: {(run.result or {}).get('rule')}" for run in runs)
        found.append(f"Their rules differ, so not at the same false discovery rate: {rules}")
    if one.get("control") != other.get("control"):
        found.append(
            f"They compare with other controls: {one.get('control')} and {other.get('control')}."
        )
    plates = [
        {plate for some in result.get("plate_sets", {}).values() for plate in some}
        for result in (one, other)
    ]
    for run, alone in zip(runs, (plates[0] - plates[1], plates[1] - plates[0]), strict=True):
        if alone:
            found.append(f"Only run {run.id} has plate {some_of(sorted(alone))}.")
    return found


def common_answers(
    first: Answers, second: Answers, *, one_split: bool, force: bool
) -> tuple[tuple[Answers, Answers], int]:
    """Return what both have answered of the same N units, (N,) records of ``ANSWERS`` of each.

    They are of the best subset in which there is any: the test subset, else what a report would
    score in its place. What one split tests may well be outside of another one, which is as new to
    its run. The number counts the units whose truth is not the same for both.
    """
    found, keys = [], []
    for answers in (first, second):
        some = given(answers)
        if not one_split:  # of a well with two answers it cannot be said which one is meant
            ids, counts = np.unique(some.unit, return_counts=True)
            some = some[np.isin(some.unit, ids[counts == 1])]
        found.append(some)
        keys.append(in_subset(some) if one_split else some.unit)
    _, in_first, in_second = np.intersect1d(
        keys[0], keys[1], assume_unique=True, return_indices=True
    )
    one, other = found[0][in_first], found[1][in_second]
    chosen = one.truth == other.truth
    other_truth = int((~chosen).sum())
    if chosen.any() and not force:
        rank = np.maximum(one.subset, other.subset)
        if not one_split:
            rank[rank == SUBSETS.index("outside")] = SUBSETS.index(Subset.TEST.value)
        best = min(int(rank[chosen].min()), SUBSETS.index(Subset.VALIDATION.value))
        chosen &= rank == best
    rows = np.flatnonzero(chosen)
    rows = rows[first_rows(one[rows])]
    return (one[rows], other[rows]), other_truth


def recipes_apart(questions: Questions, first: int, second: int) -> tuple[RecipeDifference, ...]:
    """Return the options in which two runs, and all that they read from, differ.

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
            text = re.sub(r"\b[0-9a-f]{64}\b", lambda digest: digest[0][:12], text)
            found[name] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    (row,) = questions.ask_ours(RUNS, [run]).records()
    add("split", row["split"])
    add(f"{row['before']}.seed", row["seed"])
    add(f"{row['before']}.code", row["made_before"])
    add(f"{row['stage']}.code", row["made_by"])
    numbers: dict[str, int] = {}
    for recipe in questions.ask_ours(RECIPES_BEHIND, [run]).records():
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
    pair: tuple[Answers, Answers],
    other_truth: int,
    level: str,
) -> tuple[str, ...]:
    """Say why the runs may not be comparable."""
    runs = [subject.name for subject in subjects]
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
    for subject in subjects:
        declared = declared_of(questions, subject)
        if declared and declared["trained_on"] is None:
            found.append(
                f"It is not known which of these wells run {subject.name} had seen in "
                "training: nobody declared it."
            )
    query = SEGMENTED_BY_RECIPE if questions.only_image_votes else SEGMENTED_BY
    used = [list(questions.ask_ours(query, [item.run.id]).rows()) for item in subjects]
    if used[0] != used[1]:
        labelled = [
            f"those of segmentation recipe {' and '.join(str(recipe) for (recipe,) in rows)}"
            if rows
            else "whole images"
            for rows in used
        ]
        found.append(
            f"They label different cells: run {runs[0]} {labelled[0]}, run {runs[1]} {labelled[1]}."
        )
    names = [subject.split_name for subject in subjects]
    if names[0] != names[1]:
        wells = ", so a well may have other images in each" if level == "well" else ""
        found.append(f"They learned from different splits: {names[0]} and {names[1]}{wells}.")
    subsets = {SUBSETS[code] for answers in pair for code in np.unique(answers.subset)}
    if Subset.TRAIN.value in subsets:
        found.append("Forced: images that a run was trained on are among those compared.")
    if Subset.VALIDATION.value in subsets:
        found.append("Validation images are compared, and they decided when a training stopped.")
    if other_truth:
        found.append(
            f"Excluded: {other_truth:,} {level}s whose true label is not the same in both splits."
        )
    return tuple(found)


def _differences(
    questions: Questions,
    one: Answers,
    other: Answers,
    labels: Sequence[str],
    level: str,
    limit: int | None,
) -> tuple[Difference, ...]:
    """Return the units in which the labels differ, in order of plate, row and column."""
    index_of = {unit: index for index, unit in enumerate(one.unit.tolist())}
    rows = questions.ask_ours(NAMES[level], [list(index_of)]).records() if index_of else []
    found = []
    for row in rows[:limit]:
        index = index_of[row["id"]]
        truth, first, second = (
            labels[codes[index]] for codes in (one.truth, one.predicted, other.predicted)
        )
        right = "first" if first == truth else "second" if second == truth else "neither"
        found.append(Difference(row["id"], row["name"], truth, first, second, right))
    return tuple(found)
