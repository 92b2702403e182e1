"""The answers of predict runs beside their truth, and which of two runs is better by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import or_, select
from sqlalchemy.orm import aliased

from ..analysis.statistics import FEWEST_WELLS, WellTest, mcnemar_over_wells
from ..config import RunName, VoteOptions
from ..enums import Stage, Status
from ..errors import UnknownNameError, UserInputError
from ..jobs.run_names import find_folds, find_predict_run
from ..jobs.workspace import Workspace
from ..learn.baselines import BASELINES, NULLS
from ..models import Recipe, Run, Split
from ..query.cells import feature_leak
from ..query.engine import Questions
from ..query.exclusions import with_flags
from .votes import SUBSETS, VOTES, stale_cells

SIGNIFICANT = 0.05

CLASS_NAMES = """
    SELECT value, row_number() OVER (ORDER BY value) - 1 AS code FROM (
        SELECT value FROM labels
        UNION SELECT truth FROM run_images WHERE list_contains(?, run_id) AND truth IS NOT NULL
    )
"""
# Level and vote are written out, so that DuckDB skips the parts of the view that are not asked for;
# one level at a time takes a fifth less than all at once, and less memory. Labels are numbers in an
# answer: a text per row would be most of its memory.
ANSWERS = f"""
    SELECT list_position({list(VOTES)}, s.vote) - 1 AS vote, s.unit_id AS unit, s.well_id AS well,
        list_position({list(SUBSETS)}, s.subset) - 1 AS subset, t.code AS truth,
        p.code AS predicted, t.code = p.code AS correct,
        coalesce(s.{{confidence}}, 'nan') AS confidence, {{rank}} AS truth_rank,
        {{probability}} AS probability, s.tie, s.abstained IS NOT NULL AS abstained
    FROM {{relation}} AS s
    JOIN class_names AS t ON t.value = s.truth
    JOIN class_names AS p ON p.value = s.{{predicted}}
    WHERE s.run_id = ? AND s.level = '{{level}}' AND {{of_vote}} AND list_contains(?, s.subset)
    ORDER BY s.vote, s.unit_id, s.subset
"""  # noqa: S608 - our own words
OF_VOTES = {
    "relation": "votes",
    "predicted": "winner",
    "confidence": "share",
    "rank": "0",
    "probability": "'nan'::DOUBLE",
}
"""Without what was said of the truth where it did not win: a hundredth of the time."""
OF_SCORED = {
    "relation": "scored_predictions",
    "predicted": "predicted",
    "confidence": "confidence",
    "rank": "coalesce(s.truth_rank, 0)",
    "probability": "coalesce(s.truth_probability, 'nan')",
}
SEEN = "SELECT DISTINCT well_id FROM run_images WHERE run_id = ? AND well_in_training"
DECLARED = """
    SELECT p.parameters ->> 'declared' AS model, p.parameters ->> 'trained_on' AS trained_on
    FROM runs AS r JOIN recipes AS p ON p.id = r.recipe_id
    WHERE r.id = ? AND r.origin = 'declared'
"""


@dataclass(frozen=True)
class Subject:
    """The predict run that a report is about, with the split that it is measured by.

    ``vote_options`` say which images and cells have a vote. ``baseline``: which it labelled with,
    if any; ``rivals``: finished runs of the baselines of its split by kind and name, the newest
    first. ``notes``: that its features know labels of the scored images, if they do, and what
    quality control has not looked at; ``stale``: that images have changed since.
    ``folds``: the predict runs of a cross-validation that are read as one, ``run`` the last of
    them; empty for a single run. ``name``: the number of the run, or what was typed for the folds.
    ``read_as`` and ``rivals_read_as``: under which number each run is read. ``splits``: all by
    which images are scored, ``split_name``: the split, or the cross-validation.
    """

    run: Run
    split: Split
    top_k: int | None
    vote_options: VoteOptions
    baseline: str | None
    rivals: dict[tuple[str, str], list[Run]]
    notes: tuple[str, ...]
    stale: tuple[str, ...]
    folds: tuple[Run, ...]
    name: str
    read_as: dict[int, int]
    rivals_read_as: dict[int, int]
    splits: list[int]
    split_name: str


def find_subject(
    workspace: Workspace, reference: RunName, vote_options: VoteOptions | None = None
) -> Subject:
    """Return the predict run of this name; a train run stands for its latest predict run."""
    with workspace.database.read() as session:
        found = find_predict_run(session, reference)
        run = session.get_one(Run, found.id)
        split_id = run.split_id or (run.parent.split_id if run.parent else None)
        if split_id is None:
            raise UserInputError(f"Run {run.id} belongs to no split, so there is no truth for it.")
        split = session.get_one(Split, split_id)
        folds = [session.get_one(Run, fold) for fold in found.folds]
        taught = None if run.parent is None else run.parent.recipe
        options, notes = vote_options or VoteOptions(), tuple[str, ...]()
        if options.exclude_flagged is not None:
            options, notes = with_flags(session, options, found)
        rivals: dict[tuple[str, str], list[Run]] = defaultdict(list)
        read_as: dict[int, int] = {}
        if folds:
            for kind in BASELINES:
                with suppress(UnknownNameError):
                    rival = find_folds(session, f"{split.family}:{kind}")
                    if rival is None or rival.folds == found.folds:
                        continue
                    last = session.get_one(Run, rival.id)
                    if last.parent and last.parent.recipe.parameters.get("baseline") == kind:
                        rivals[kind, kind].append(last)
                        read_as |= rival.read_as
        else:
            trained = aliased(Run)
            baseline = Recipe.parameters["baseline"].as_string()
            query = (
                select(baseline, trained.result["feature_set"].as_string(), Run)
                .join(trained, trained.id == Run.parent_id)
                .join(Recipe, Recipe.id == trained.recipe_id)
                .where(Run.stage == Stage.PREDICT, Run.status == Status.DONE, Run.id != run.id)
                .where(trained.split_id == split_id, baseline.is_not(None))
                .where(or_(Run.split_id.is_(None), Run.split_id == split_id))
                .order_by(Run.id.desc())
            )
            for kind, features, one in session.execute(query):
                # One on another feature set is another baseline, unless it should know nothing.
                shown = f"{kind} ({features})" if features and kind not in NULLS else kind
                if kind in BASELINES:
                    rivals[kind, shown].append(one)
                    read_as[one.id] = one.id
        splits = [one.split_id or split_id for one in folds] or [split_id]
        leaks = [feature_leak(session, taught, one) for one in splits if taught is not None]
        return Subject(
            run,
            split,
            run.recipe.parameters.get("top_k"),
            options,
            baseline=None if taught is None else taught.parameters.get("baseline"),
            rivals=dict(sorted(rivals.items(), key=lambda item: BASELINES.index(item[0][0]))),
            notes=(*[note for note in leaks if note][:1], *notes),
            stale=tuple(note for one in found.read_as for note in stale_cells(session, one)),
            folds=tuple(folds),
            name=found.name or str(run.id),
            read_as=found.read_as,
            rivals_read_as=read_as,
            splits=splits,
            split_name=str(split.family if folds else split.name),
        )


Answers = Any
"""N answers of one level and vote beside their truth: (N,) records of ``ANSWERS``.

``subset`` is an index of ``SUBSETS``; ``truth`` and ``predicted`` are indices of the sorted labels.
``probability`` is what was given to the truth, NaN where that is not known; ``truth_rank`` the rank
of the truth among the choices, counting from 1, 0 where it was not among them. ``correct``:
whether each answer is right, also where the vote abstained.
"""
ByKey = Mapping[tuple[str, str], Answers]
"""Answers by level and vote."""


def class_names(questions: Questions, runs: Sequence[int]) -> list[str]:
    """Return the labels that runs are asked for, sorted; keep them for :func:`read_answers`."""
    questions.keep("class_names", CLASS_NAMES, [runs])
    names = questions.ask_ours("SELECT value FROM class_names ORDER BY code").rows()
    return [value for (value,) in names]


def read_answers(
    questions: Questions,
    run_id: int,
    level: str,
    votes: Sequence[str] = VOTES,
    *,
    subsets: Sequence[str] = SUBSETS,
    ranks: bool = False,
) -> dict[tuple[str, str], Answers]:
    """Return the answers of a run at one level, by level and vote, in order of unit.

    ``ranks``: with ``truth_rank`` and ``probability``.
    """
    relation = OF_SCORED if level == "cell" or ranks else OF_VOTES
    of_vote = " OR ".join(f"s.vote = '{vote}'" for vote in votes)
    query = ANSWERS.format(level=level, of_vote=f"({of_vote})", **relation)
    found = questions.ask_ours(query, [run_id, list(subsets)]).arrays()
    for name in ("confidence", "probability"):  # sums of many shares may be a hair above 1
        found[name] = np.clip(found[name], 0, 1)
    kinds = [(name, column.dtype) for name, column in found.items()]
    every = np.rec.fromarrays(list(found.values()), dtype=kinds)
    return {(level, vote): every[every.vote == VOTES.index(vote)] for vote in votes}


def given(answers: Answers) -> Answers:
    """Return those that did not abstain."""
    return answers[~answers.abstained]


def in_subset(answers: Answers) -> NDArray[np.int64]:
    """Return (N,) numbers of units, others in each subset: a well in two has an answer in each."""
    return np.asarray(answers.unit * len(SUBSETS) + answers.subset)


def first_rows(answers: Answers) -> NDArray[np.int64]:
    """Return the row of one answer for each unit, in order of unit.

    A well whose images are in several subsets has an answer in each: that of the first of
    ``SUBSETS`` counts.
    """
    order = np.lexsort((answers.subset, answers.unit))
    return np.asarray(order[np.unique(answers.unit[order], return_index=True)[1]])


def seen_wells(questions: Questions, run_id: int) -> NDArray[np.int64]:
    """Return the ids of the wells that the model of a run was trained on."""
    found = questions.ask_ours(SEEN, [run_id]).arrays()["well_id"]
    return np.asarray(found, dtype=np.int64)


def declared_of(questions: Questions, subject: Subject) -> dict[str, Any] | None:
    """Return what was declared of the model, of several folds first where nothing was."""
    parents = [one.parent_id for one in subject.folds or (subject.run,)]
    found = [row for run in parents for row in questions.ask_ours(DECLARED, [run]).records()]
    return min(found, key=lambda row: row["trained_on"] is not None, default=None)


def judge(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    wells: NDArray[np.int64],
    seen_by_one: int = 0,
) -> tuple[WellTest, int | None, str | None]:
    """Compare two runs on the same N units, as ``report`` and ``compare`` both do it.

    ``first`` and ``second`` are (N,): whether each is right; ``wells`` (N,): the well of each.
    ``seen_by_one``: how many of the wells one of the two has seen in training, and the other not.
    Returns McNemar's test over wells, and which is better by it, at 5 %: 1 the first, -1 the
    second, 0 neither, ``None`` where that cannot be said, and last why.
    """
    test = mcnemar_over_wells(first, second, wells)
    reason = None
    if seen_by_one:
        reason = f"{seen_by_one:,} of {test.wells:,} wells were seen in training by one of the two"
    elif test.wells < FEWEST_WELLS:
        some = f"{test.wells} well{'' if test.wells == 1 else 's'}"
        reason = f"too few wells ({some} scored by both; {FEWEST_WELLS} or more are needed)"
    better = 0 if test.p_value >= SIGNIFICANT else 1 if first.sum() > second.sum() else -1
    return test, None if reason else better, reason
