"""The numbers of a report, each from the views and the functions of ``ops``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...analytics import Questions, open_questions
from ...config import VoteRules
from ...errors import UserInputError
from ...ops import scores
from ...runs import Workspace
from . import groups
from .answers import (
    CELLS,
    TOP,
    ByKey,
    Scale,
    answers_of,
    calibration_of,
    read_votes,
    rows_of,
    scores_of,
    scores_where,
)
from .comparison import compare_subjects
from .facts import ReportResult
from .rivals import HEADLINE, score_rivals, verdict
from .subject import (
    Subject,
    chosen_sides,
    count_flagged,
    find_subject,
    notes_on,
    unlabelled_note,
)

TRAINING = """
    SELECT l.value FROM split_members AS m JOIN labels AS l ON l.id = m.label_id
    WHERE m.split_id = ? AND m.subset = 'train'
"""
SEEN = "SELECT DISTINCT well_id FROM run_images WHERE run_id = ? AND well_in_training"
CLASSES = "SELECT count(DISTINCT label_id) FROM split_members WHERE split_id = ?"


@dataclass(frozen=True)
class Evidence:
    """A report with the answers behind it.

    ``images``: one row per image and vote of those that have an answer, with the columns of
    ``answers.VOTES`` and ``correct``. ``abstained``: the same of those that have none.
    """

    result: ReportResult
    images: pa.Table
    abstained: pa.Table


def report(
    workspace: Workspace,
    run: str = "latest",
    *,
    compare: str | None = None,
    rules: VoteRules | None = None,
    force: bool = False,
    leave_out_flagged: str | None = None,
) -> ReportResult:
    """Score a predict run (a number or ``latest``) against the labels of its split.

    Images that the network was trained on count only with ``force``, and the result says so.
    ``compare``: another predict run to put beside it, on the images that both have labelled.
    ``rules`` say which images and wells have an answer. ``leave_out_flagged``: a quality-control
    run (a number or ``latest``); what it has flagged has no vote, and the result says how much that
    is.

    Raises:
        UnknownNameError: there is no such predict run, or quality-control run.
        UserInputError: the run has labelled nothing, or only images it was trained on; no image has
            an answer by ``rules``; or the quality-control run has not looked at these images or
            cells.
    """
    with gathered(
        workspace,
        run,
        compare=compare,
        rules=rules,
        force=force,
        leave_out_flagged=leave_out_flagged,
    ) as (_, _, evidence):
        return evidence.result


@contextmanager
def gathered(
    workspace: Workspace,
    run: str = "latest",
    *,
    compare: str | None = None,
    rules: VoteRules | None = None,
    force: bool = False,
    leave_out_flagged: str | None = None,
) -> Iterator[tuple[Questions, Subject, Evidence]]:
    """Open the store for the report on a run, with the report; arguments as in :func:`report`."""
    subject = find_subject(workspace, run, leave_out_flagged, rules)
    other = None if compare is None else find_subject(workspace, compare, None, subject.rules)
    about = {item.run.id for item in (subject, other) if item is not None}
    about |= {rival.id for rivals in subject.rivals.values() for rival in rivals}
    with open_questions(workspace, rules=subject.rules, runs=about) as questions:
        evidence = scored(questions, subject, force=force)
        if other is not None:
            found = compare_subjects(questions, subject, other, force=force)
            evidence = replace(evidence, result=replace(evidence.result, comparison=found))
        yield questions, subject, evidence


def scored(questions: Questions, subject: Subject, *, force: bool) -> Evidence:
    """Return the report on ``subject``, with what it rests on."""
    votes = read_votes(questions, subject.run.id)
    counts = _images_by_side(votes)
    if not counts and subject.qc_run_id is not None:
        raise UserInputError(
            f"Quality-control run {subject.qc_run_id} has flagged all images that run "
            f"{subject.run.id} has labelled. Score them without --leave-out-flagged."
        )
    if not counts and not subject.rules.controls:
        raise UserInputError(
            f"Run {subject.run.id} has labelled no image of a treated well whose truth is known. "
            "Score it without --no-controls."
        )
    sides = chosen_sides(counts, subject.run.id, force=force)
    votes = votes.filter(pc.is_in(votes["subset"], pa.array(sides)))
    cells = questions.ask(CELLS, [subject.run.id, list(sides)])
    answers = answers_of(votes, cells)
    if not answers[HEADLINE].given.unit.size:
        raise UserInputError(
            f"No image that run {subject.run.id} has labelled has an answer by these rules. "
            "Lower --min-cells or --min-margin."
        )
    result = _result(questions, subject, answers, counts, sides)
    images = votes.filter(pc.equal(votes["level"], "image"))
    images = images.append_column("correct", pc.equal(images["predicted"], images["truth"]))
    silent = pc.is_valid(images["abstained"])
    return Evidence(result, images.filter(pc.invert(silent)), images.filter(silent))


def _result(
    questions: Questions,
    subject: Subject,
    answers: ByKey,
    counts: dict[str, int],
    sides: tuple[str, ...],
) -> ReportResult:
    """Put the report together, a part after the other."""
    classes = int(questions.ask(CLASSES, [subject.split.id])[0][0].as_py())
    training = questions.ask(TRAINING, [subject.split.id])["value"].to_pylist()
    majority = str(scores.majority_baseline(training, training)[0]) if training else None
    enough = subject.top_k is None or subject.top_k >= TOP
    scale = Scale(majority, top=classes > TOP and enough)
    images, cells = answers[HEADLINE], answers["cell", "hard"]
    flagged = count_flagged(questions, subject, sides, images.unit.size, cells.unit.size)
    run, split = subject.run, subject.split
    result = ReportResult(
        run_id=run.id,
        train_run_id=run.parent_id,
        split=split.name,
        protocol=split.protocol,
        group_level=str(split.group_level.value),
        field=str(split.field.value),
        sides=sides,
        classes=classes,
        chance=1 / max(1, classes),
        majority_label=majority,
        cells=cells.unit.size,
        images=images.unit.size,
        wells=np.unique(images.well).size,
        wells_seen=0,
        leaks=False,
        leak="",
        notes=(
            *notes_on(subject, counts, sides, flagged),
            *unlabelled_note(questions, subject, sides),
        ),
        scores=scores_of(answers, scale),
        rules=subject.rules,
        qc_run_id=subject.qc_run_id,
        images_flagged=flagged[0],
        cells_flagged=flagged[1],
    )
    known = questions.ask(SEEN, [run.id])["well_id"].to_numpy()
    result = _with_seen(result, answers, scale, known)
    result = _with_groups(questions, result, answers, known)
    return _with_rivals(questions, subject, result, answers)


def _with_seen(
    result: ReportResult, answers: ByKey, scale: Scale, known: NDArray[np.int64]
) -> ReportResult:
    """Add whether wells were seen in training, and the scores without such and without controls."""
    images = answers[HEADLINE]
    seen = np.unique(images.well[np.isin(images.well, known)]).size
    return replace(
        result,
        wells_seen=seen,
        leaks=seen > 0,
        leak=_leak(seen, result.wells),
        unseen=scores_where(answers, scale, lambda item: ~np.isin(item.well, known)),
        without_controls=scores_where(answers, scale, lambda item: ~item.control),
    )


def _with_groups(
    questions: Questions, result: ReportResult, answers: ByKey, known: NDArray[np.int64]
) -> ReportResult:
    """Add the scores by class, plate, target and well, and the calibration."""
    images = answers[HEADLINE]
    targets = groups.read_targets(questions, result.field)
    return replace(
        result,
        by_class=groups.by_class(images, targets),
        by_plate=groups.by_plate(questions, images, targets),
        by_target=groups.by_target(images, targets),
        by_well=groups.by_well(questions, images, answers["well", "hard"], known),
        calibration=calibration_of(answers),
    )


def _with_rivals(
    questions: Questions, subject: Subject, result: ReportResult, answers: ByKey
) -> ReportResult:
    """Add the baselines on the same cells, images and wells, and what is said of them."""
    units = {level: answers[level, "hard"].given.unit for level in ("cell", "image", "well")}
    ids = {level: pa.array(numbers) for level, numbers in units.items() if numbers.size}
    rivals = score_rivals(questions, subject.rivals, result.sides, ids)
    best = result.score(*HEADLINE)
    beats, against = verdict(best, rivals, subject.baseline, result.split)
    return replace(result, baselines=rivals, beats_nulls=beats, against_nulls=against)


def _images_by_side(votes: pa.Table) -> dict[str, int]:
    rows = rows_of(votes, "image", "hard")["subset"].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in rows}


def _leak(seen: int, total: int) -> str:
    if seen == 0:
        return f"None of the {total:,} wells scored here was seen in training."
    return (
        f"{seen:,} of the {total:,} wells scored here were seen in training: the network learned "
        "from other images of the same wells. These scores tell how it does on wells that it "
        "knows, not on new ones."
    )
