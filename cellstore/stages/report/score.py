"""The numbers of a report, each from the views and the functions of ``ops.scores``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from ...analytics import Questions, open_questions
from ...config import VoteRules
from ...db.models import Cell, Prediction, Recipe, Run, Segmentation, Split
from ...errors import UnknownNameError, UserInputError
from ...ops import scores
from ...reading.flags import (
    check_cells,
    check_plates,
    count_unseen,
    find_qc_run,
    unseen_note,
)
from ...reading.learning import leak_of
from ...runs import Workspace, run_in
from ...terms import Stage, Status, Subset
from .facts import ReportResult, Score
from .rivals import HEADLINE, find_rivals, kind_of, score_rivals, verdict

LEVELS = (
    ("image", "hard"),
    ("image", "soft"),
    ("well", "hard"),
    ("well", "soft"),
    ("cell", "hard"),
)
TOP = 5
PREFERRED = (Subset.TEST.value, "outside", Subset.VALIDATION.value)
"""Which side is scored, if the run has labelled it; the training side only by force."""

# Levels are written out, so that DuckDB leaves out the parts of the view that are not asked for.
VOTES = """
    SELECT level, vote, unit_id, well_id, subset, truth, predicted, confidence, truth_place, tie,
        correct
    FROM verdicts WHERE run_id = ? AND level IN ('image', 'well') ORDER BY level, vote, unit_id
"""
CELLS = """
    SELECT unit_id, well_id, truth, predicted, confidence, truth_place, tie
    FROM verdicts WHERE run_id = ? AND level = 'cell' AND list_contains(?, subset)
    ORDER BY unit_id
"""
TRAINING = """
    SELECT l.value FROM split_members AS m JOIN labels AS l ON l.id = m.label_id
    WHERE m.split_id = ? AND m.subset = 'train'
"""
SEEN = "SELECT DISTINCT well_id FROM run_images WHERE run_id = ? AND well_in_training"
ALL_IMAGES = """
    SELECT count(DISTINCT s.image_id) AS images, count(*) AS cells
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = s.image_id
    WHERE p.run_id = ? AND p.rank = 1 AND c.excluded IS NULL AND ri.truth IS NOT NULL
        AND list_contains(?, ri.subset)
"""
CLASSES = "SELECT count(DISTINCT label_id) FROM split_members WHERE split_id = ?"


@dataclass(frozen=True)
class Subject:
    """The predict run that a report is about, with the split that it is measured by.

    ``qc_run_id``: the quality-control run whose flagged images and cells have no vote, if any.
    ``baseline``: which it labelled with, if with one; ``rivals``: runs of baselines of its split;
    ``feature_leak``: that its features know labels of the scored side, if they do.
    """

    run: Run
    split: Split
    top_k: int | None
    qc_run_id: int | None = None
    qc_notes: tuple[str, ...] = ()
    baseline: str | None = None
    rivals: dict[str, list[Run]] = field(default_factory=dict)
    feature_leak: str | None = None


@dataclass(frozen=True)
class Evidence:
    """A report with the answers behind it: one row of the view ``verdicts`` per image and vote."""

    result: ReportResult
    images: pa.Table


def report(
    workspace: Workspace,
    run: str = "latest",
    *,
    force: bool = False,
    leave_out_flagged: str | None = None,
) -> ReportResult:
    """Score a predict run (a number or ``latest``) against the labels of its split.

    Images that the network was trained on count only with ``force``, and the result says so.
    ``leave_out_flagged``: a quality-control run (a number or ``latest``); what it has flagged has
    no vote, and the result says how much that is.

    Raises:
        UnknownNameError: there is no such predict run, or quality-control run.
        UserInputError: the run has labelled nothing, or only images it was trained on; or the
            quality-control run has not looked at these images or cells.
    """
    subject = find_subject(workspace, run, leave_out_flagged)
    with open_questions(workspace, rules=VoteRules(unflagged_by=subject.qc_run_id)) as questions:
        return scored(questions, subject, force=force).result


def find_subject(
    workspace: Workspace, reference: str, leave_out_flagged: str | None = None
) -> Subject:
    """Return the predict run of this name; a train run stands for its latest predict run."""
    subject = _subject(workspace, reference, leave_out_flagged)
    rivals = find_rivals(workspace, subject.run, subject.split)
    return replace(subject, baseline=kind_of(workspace, subject.run), rivals=rivals)


def _subject(workspace: Workspace, reference: str, leave_out_flagged: str | None) -> Subject:
    with workspace.database.read() as session:
        named = reference not in ("latest", "last")
        run = run_in(session, reference, () if named else (Stage.PREDICT,))
        if run.stage == Stage.TRAIN:
            later = select(Run).where(Run.parent_id == run.id, Run.stage == Stage.PREDICT)
            done = later.where(Run.status == Status.DONE).order_by(Run.id.desc()).limit(1)
            run = session.scalars(done).first() or run
        if run.stage != Stage.PREDICT:
            raise UnknownNameError(
                f"Run {run.id} ({Stage(run.stage).value}) has no predictions to report on. "
                "Label images with a trained run first: cellstore predict"
            )
        parent = session.get(Run, run.parent_id) if run.parent_id else None
        split_id = run.split_id or (parent.split_id if parent else None)
        if split_id is None:
            raise UserInputError(f"Run {run.id} belongs to no split, so there is no truth for it.")
        recipe = session.get_one(Recipe, run.recipe_id)
        qc, notes = _qc_run(session, leave_out_flagged, run)
        leak = None if parent is None else leak_of(session, parent, split_id)
        split = session.get_one(Split, split_id)
        return Subject(run, split, recipe.parameters.get("top_k"), qc, notes, feature_leak=leak)


def _qc_run(
    session: Session, reference: str | None, run: Run
) -> tuple[int | None, tuple[str, ...]]:
    """The quality-control run whose flags count, and what must be said of it."""
    if reference is None:
        return None, ()
    qc = find_qc_run(session, reference)
    said = and_(Prediction.run_id == run.id, Prediction.rank == 1)
    seen = select(Segmentation).join(Cell, Cell.segmentation_id == Segmentation.id)
    seen = seen.join(Prediction, Prediction.cell_id == Cell.id).where(said)
    images = seen.with_only_columns(Segmentation.image_id)
    check_plates(session, qc, images)
    for segment_id in session.scalars(seen.with_only_columns(Segmentation.recipe_id).distinct()):
        check_cells(session, qc, segment_id)
    unseen = count_unseen(session, qc, images)
    return qc.id, (unseen_note(qc, unseen),) if unseen else ()


def scored(questions: Questions, subject: Subject, *, force: bool) -> Evidence:
    """Return the report on ``subject``, with what it rests on."""
    run, split = subject.run, subject.split
    votes = questions.ask(VOTES, [run.id])
    counts = _images_by_side(votes)
    if not counts and subject.qc_run_id is not None:
        raise UserInputError(
            f"Quality-control run {subject.qc_run_id} has flagged all images that run {run.id} has "
            "labelled. Score them without --leave-out-flagged."
        )
    sides = chosen_sides(counts, run.id, force=force)
    votes = votes.filter(pc.is_in(votes["subset"], pa.array(sides)))
    cells = questions.ask(CELLS, [run.id, list(sides)])
    classes = int(questions.ask(CLASSES, [split.id])[0][0].as_py())
    training = questions.ask(TRAINING, [split.id])["value"].to_pylist()
    top = classes > TOP and (subject.top_k is None or subject.top_k >= TOP)
    found = [
        _score(
            level, vote, cells if level == "cell" else _of(votes, level, vote), training, top=top
        )
        for level, vote in LEVELS
    ]
    images = _of(votes, "image", "hard")
    wells = set(images["well_id"].to_pylist())
    seen = len(wells & set(questions.ask(SEEN, [run.id])["well_id"].to_pylist()))
    flagged = _flagged(questions, subject, sides, images.num_rows, cells.num_rows)
    units = {"cell": cells, "image": images, "well": _of(votes, "well", "hard")}
    ids = {level: rows["unit_id"].combine_chunks() for level, rows in units.items()}
    rivals = score_rivals(questions, subject.rivals, sides, ids)
    best = next(item for item in found if (item.level, item.vote) == HEADLINE)
    beats, against = verdict(best, rivals, subject.baseline, split.name)
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
        majority_label=_majority(training),
        cells=cells.num_rows,
        images=images.num_rows,
        wells=len(wells),
        wells_seen=seen,
        leaks=seen > 0,
        leak=_leak(seen, len(wells)),
        notes=(*_leak_notes(subject), *_notes(counts, sides, run), *_flag_notes(subject, flagged)),
        scores=tuple(found),
        qc_run_id=subject.qc_run_id,
        images_flagged=flagged[0],
        cells_flagged=flagged[1],
        baselines=rivals,
        beats_nulls=beats,
        against_nulls=against,
    )
    return Evidence(result, votes.filter(pc.equal(votes["level"], "image")))


def _flagged(
    questions: Questions, subject: Subject, sides: tuple[str, ...], images: int, cells: int
) -> tuple[int, int]:
    """How many images, and cells, more there would be without leaving out."""
    if subject.qc_run_id is None:
        return 0, 0
    everything = questions.ask(ALL_IMAGES, [subject.run.id, list(sides)]).to_pylist()[0]
    return everything["images"] - images, everything["cells"] - cells


def _leak_notes(subject: Subject) -> tuple[str, ...]:
    return (subject.feature_leak,) if subject.feature_leak else ()


def _flag_notes(subject: Subject, flagged: tuple[int, int]) -> tuple[str, ...]:
    if subject.qc_run_id is None:
        return ()
    note = (
        f"Left out, because quality-control run {subject.qc_run_id} flagged them: {flagged[0]:,} "
        f"images and {flagged[1]:,} cells, those of the images included."
    )
    return (*subject.qc_notes, note)


def _of(votes: pa.Table, level: str, vote: str) -> pa.Table:
    mask = pc.and_(pc.equal(votes["level"], level), pc.equal(votes["vote"], vote))
    return votes.filter(mask)


def _images_by_side(votes: pa.Table) -> dict[str, int]:
    rows = _of(votes, "image", "hard")["subset"].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in rows}


def chosen_sides(counts: dict[str, int], run_id: int, *, force: bool) -> tuple[str, ...]:
    """Return the sides of the split to score, of those that have labelled images.

    Raises:
        UserInputError: there are none, or only training images and ``force`` is off.
    """
    if not counts:
        raise UserInputError(
            f"Run {run_id} has labelled no image whose truth is known. "
            "Label some with: cellstore predict"
        )
    if force:
        return tuple(sorted(counts))
    for side in PREFERRED:
        if side in counts:
            return (side,)
    raise UserInputError(
        f"Run {run_id} has only labelled the {counts[Subset.TRAIN.value]} images that its network "
        "was trained on; their score says nothing about new images. Label the test side with "
        "cellstore predict, or score them anyway with --force."
    )


def _score(level: str, vote: str, rows: pa.Table, training: list[str], *, top: bool) -> Score:
    labels = sorted(set(pc.unique(rows["truth"]).to_pylist()) | set(_unique(rows["predicted"])))
    values = pa.array(labels, pa.string())
    truth = pc.index_in(rows["truth"], values).to_numpy()
    predicted = pc.index_in(rows["predicted"], values).to_numpy()
    correct = truth == predicted
    confidence = np.clip(rows["confidence"].to_numpy(), 0, 1)
    interval = scores.bootstrap_interval(correct, rows["well_id"].to_numpy())
    place = pc.fill_null(rows["truth_place"], TOP + 1).to_numpy()
    return Score(
        level=level,
        vote=vote,
        n=rows.num_rows,
        correct=int(correct.sum()),
        accuracy=scores.accuracy(truth, predicted),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        majority=_majority_accuracy(training, rows["truth"]),
        balanced_accuracy=scores.balanced_accuracy(truth, predicted),
        macro_f1=scores.macro_f1(truth, predicted),
        top_5=float(np.mean(place <= TOP)) if top else None,
        ece=scores.expected_calibration_error(confidence, correct),
        ties=int(pc.sum(rows["tie"].cast(pa.int64())).as_py() or 0),
    )


def _unique(values: pa.ChunkedArray) -> list[str]:
    return [str(item) for item in pc.unique(values).to_pylist()]


def _majority_accuracy(training: list[str], truth: pa.ChunkedArray) -> float | None:
    if not training:
        return None
    return scores.majority_baseline(training, truth.to_pylist())[1]


def _majority(training: list[str]) -> str | None:
    return str(scores.majority_baseline(training, training)[0]) if training else None


def _leak(seen: int, total: int) -> str:
    if seen == 0:
        return f"None of the {total:,} wells scored here was seen in training."
    return (
        f"{seen:,} of the {total:,} wells scored here were seen in training: the network learned "
        "from other images of the same wells. These scores tell how it does on wells that it "
        "knows, not on new ones."
    )


def _notes(counts: dict[str, int], sides: tuple[str, ...], run: Run) -> tuple[str, ...]:
    notes = []
    trained_on = counts.get(Subset.TRAIN.value, 0)
    if Subset.TRAIN.value in sides:
        notes.append(f"Forced: {trained_on:,} of these images were used to train the network.")
    elif trained_on:
        notes.append(f"{trained_on:,} labelled training images are left out (--force adds them).")
    if Subset.VALIDATION.value in sides:
        notes.append("Validation images are scored, and they decided when training stopped.")
    if "outside" in sides:
        notes.append("Images that the split does not name are scored by their treatment.")
    if run.status != Status.DONE:
        notes.append(f"The run is {Status(run.status).value}, so images may be missing here.")
    return tuple(notes)
