"""The numbers of a report, each from the views and the functions of ``ops``."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from sqlalchemy import or_, select
from sqlalchemy.orm import Session, aliased

from ..analysis import statistics
from ..analysis.statistics import bootstrap_interval
from ..config import VoteRules
from ..db.models import Recipe, Run
from ..db.split_models import Split
from ..enums import Stage, Status, Subset
from ..errors import UserInputError
from ..jobs.workspace import Workspace
from ..learn.baselines import BASELINES, NULLS
from ..learn.inputs import leak_of
from ..query.engine import Questions, open_questions
from ..query.predict_runs import flags_on, predict_run

if TYPE_CHECKING:
    from .comparison import Comparison

EVERY_VOTE = VoteRules()


@dataclass(frozen=True)
class Score:
    """The scores of one kind of answer.

    ``level`` is cell, image or well; ``vote`` hard, soft or median (a cell has one answer, listed
    as hard). ``n`` counts the answers; ``abstained`` cells, images or wells more gave none, and
    ``coverage`` is the share that did. ``low`` and ``high`` bound the accuracy: 95 % bootstrap
    interval over wells, ``None`` for a single well. ``majority`` is the accuracy of always
    answering the most frequent class of the training images. ``top_5``: the truth is among the
    first five; ``None`` where there are at most five classes, or fewer than five choices were kept.
    ``ece``: expected calibration error. ``ties`` counts draws of the vote. ``log_loss`` is the mean
    of -log(probability of the truth) in nats, ``None`` where ``log_loss_missing`` says why.
    """

    level: str
    vote: str
    n: int
    correct: int
    accuracy: float
    low: float | None
    high: float | None
    majority: float | None
    balanced_accuracy: float
    macro_f1: float
    top_5: float | None
    ece: float
    ties: int
    log_loss: float | None = None
    log_loss_missing: str | None = None
    abstained: int = 0
    coverage: float = 1.0


@dataclass(frozen=True)
class BaselineScore:
    """A baseline on the images of a report, from the newest run of it that has labelled them.

    ``n`` counts the cells, images or wells that both have labelled, ``low`` and ``high`` bound the
    accuracy as in :class:`Score`. ``null``: it knows nothing of what a treatment does to a cell.
    """

    baseline: str
    null: bool
    run_id: int
    train_run_id: int | None
    level: str
    vote: str
    n: int
    accuracy: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ClassScore:
    """How one label does, over images by hard votes.

    ``support`` counts the images of the label, ``predicted`` those that got it, ``correct`` both.
    ``recall`` is ``None`` for a label that is never true, ``precision`` for one that is never
    answered; ``f1`` is 2 ``correct`` / (``support`` + ``predicted``). ``target`` is the gene of a
    compound (several with ``|`` between), ``same_target`` counts its images that got another
    compound of the same gene. ``low`` and ``high`` bound the recall as in :class:`Score`;
    ``wells``: how many the images come from; ``abstained``: images of the label without an answer.
    """

    label: str
    target: str | None
    support: int
    predicted: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float
    same_target: int
    wells: int
    low: float | None = None
    high: float | None = None
    abstained: int = 0


@dataclass(frozen=True)
class GroupScore:
    """The images of one plate, or of the compounds of one target gene, by hard votes.

    A compound of several genes counts for each. ``same_target`` counts the images that got another
    compound of the same gene, so that the gene is right in ``correct + same_target`` of ``n``.
    ``low`` and ``high`` bound the accuracy as in :class:`Score`. ``labels`` counts the true labels
    among them.
    """

    name: str
    n: int
    correct: int
    accuracy: float
    same_target: int
    wells: int
    labels: int
    low: float | None = None
    high: float | None = None
    abstained: int = 0


@dataclass(frozen=True)
class WellScore:
    """One scored well: its images by hard votes, and what all its cells together say.

    ``predicted`` is ``None`` where the well has no answer, or two on two sides of the split.
    ``seen``: the model was trained on other images of this well.
    """

    plate: str
    well: str
    truth: str
    predicted: str | None
    n: int
    correct: int
    seen: bool


@dataclass(frozen=True)
class CalibrationBin:
    """The answers whose confidence is above ``low`` and at most ``high``; only bins that hold any.

    ``confidence`` is their mean confidence, ``accuracy`` the share of them that is right. ``level``
    and ``vote``: cell and hard, or image and soft. The expected calibration error is the mean of
    ``|confidence - accuracy|`` weighed by ``n``.
    """

    level: str
    vote: str
    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ReportResult:
    """The report on one predict run.

    ``sides`` are the sides of the split that are scored, ``chance`` is 1 / classes. ``leak`` says
    whether the scored wells were seen in training; ``notes`` whatever else a reader must know.
    ``html`` is where the page was written, if one was. ``qc_run_id``: the quality-control run
    whose ``images_flagged`` (those without a cell left) and ``cells_flagged`` had no vote.
    ``baselines``: what a score has to beat, by hard votes; ``beats_nulls``: whether the interval of
    the images is above every null baseline, ``None`` where that is not known; ``against_nulls``
    says it in words.

    ``unseen`` are the same scores without the wells that were seen in training; empty if none was,
    or nothing is left. ``without_controls`` are those without control wells; empty if there are
    none, or nothing is left. ``by_class``, ``by_plate`` and ``by_target`` (empty unless the labels
    are compounds with known genes) are in order of name, ``by_well`` in order of plate and place.
    ``comparison``: the run beside another, if one was named. ``rules`` say which images and wells
    have an answer.
    """

    run_id: int
    train_run_id: int | None
    split: str
    protocol: str
    group_level: str
    field: str
    sides: tuple[str, ...]
    classes: int
    chance: float
    majority_label: str | None
    cells: int
    images: int
    wells: int
    wells_seen: int
    leaks: bool
    leak: str
    notes: tuple[str, ...]
    scores: tuple[Score, ...]
    html: str | None = None
    qc_run_id: int | None = None
    images_flagged: int = 0
    cells_flagged: int = 0
    baselines: tuple[BaselineScore, ...] = ()
    beats_nulls: bool | None = None
    against_nulls: str = ""
    unseen: tuple[Score, ...] = ()
    without_controls: tuple[Score, ...] = ()
    by_class: tuple[ClassScore, ...] = ()
    by_plate: tuple[GroupScore, ...] = ()
    by_target: tuple[GroupScore, ...] = ()
    by_well: tuple[WellScore, ...] = ()
    calibration: tuple[CalibrationBin, ...] = ()
    comparison: Comparison | None = None
    rules: VoteRules = EVERY_VOTE

    def score(self, level: str, vote: str) -> Score:
        """Return the scores of one level and vote."""
        return next(item for item in self.scores if (item.level, item.vote) == (level, vote))


def by_baseline(found: Sequence[BaselineScore]) -> list[dict[str, BaselineScore]]:
    """Return the scores of each baseline by level: one record per baseline."""
    records: dict[str, dict[str, BaselineScore]] = {}
    for item in found:
        records.setdefault(item.baseline, {})[item.level] = item
    return list(records.values())


TOP = 5
KEYS = (
    *(("image", vote) for vote in ("hard", "soft", "median")),
    *(("well", vote) for vote in ("hard", "soft", "median")),
    ("cell", "hard"),
)
"""Level and vote of all scores, in the order in which they are told."""

COLUMNS = """unit_id, well_id, plate_id, subset, truth, predicted, confidence, truth_place,
    truth_probability, tie, control IS NOT NULL AS control, abstained"""
# Levels are written out, so that DuckDB leaves out the parts of the view that are not asked for;
# one at a time takes a fifth less than both at once, and less memory.
ANSWERS_VOTES = {
    level: f"""
    SELECT level, vote, {COLUMNS} FROM verdicts
    WHERE run_id = ? AND level = '{level}' ORDER BY vote, unit_id
    """  # noqa: S608 - our own words
    for level in ("image", "well")
}
ANSWERS_CELLS = f"""
    SELECT {COLUMNS} FROM verdicts
    WHERE run_id = ? AND level = 'cell' AND list_contains(?, subset) ORDER BY unit_id
"""  # noqa: S608 - our own words


@dataclass(frozen=True)
class Answers:
    """N answers of one level and vote beside their truth: (N,) arrays.

    ``truth`` and ``predicted`` are places in the sorted ``labels``. ``probability`` is what was
    given to the truth, NaN where that is not known; ``place`` the place of the truth among the
    choices, counting from 1, 0 where it was not among them.
    """

    labels: tuple[str, ...]
    unit: NDArray[np.int64]
    well: NDArray[np.int64]
    plate: NDArray[np.int64]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    probability: NDArray[np.float64]
    place: NDArray[np.int64]
    tie: NDArray[np.bool_]
    control: NDArray[np.bool_]
    abstained: NDArray[np.bool_]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each answer is right, also where the vote abstained."""
        right: NDArray[np.bool_] = self.truth == self.predicted
        return right

    def where(self, mask: NDArray[np.bool_]) -> Answers:
        """Return the answers for which ``mask`` is true."""
        if mask.all():
            return self
        arrays = [item.name for item in fields(self) if item.name != "labels"]
        return replace(self, **{name: getattr(self, name)[mask] for name in arrays})

    @property
    def given(self) -> Answers:
        """Those that did not abstain."""
        return self.where(~self.abstained)


ByKey = Mapping[tuple[str, str], Answers]


def read_votes(questions: Questions, run_id: int) -> pa.Table:
    """Return the answers of a run for images, then for wells: the columns of ``VOTES``."""
    return pa.concat_tables([questions.ask(query, [run_id]) for query in ANSWERS_VOTES.values()])


def answers_of(votes: pa.Table, cells: pa.Table) -> ByKey:
    """Return the answers by level and vote, of rows of ``VOTES`` and ``CELLS``."""
    named = [table[name] for table in (votes, cells) for name in ("truth", "predicted")]
    known = {str(value) for column in named for value in pc.unique(column).to_pylist()}
    labels = tuple(sorted(known))
    return {
        (level, vote): _arrays(cells if level == "cell" else rows_of(votes, level, vote), labels)
        for level, vote in KEYS
    }


def rows_of(votes: pa.Table, level: str, vote: str) -> pa.Table:
    """Return the rows of one level and vote."""
    mask = pc.and_(pc.equal(votes["level"], level), pc.equal(votes["vote"], vote))
    return votes.filter(mask)


def _arrays(rows: pa.Table, labels: Sequence[str]) -> Answers:
    def whole(name: str) -> NDArray[np.int64]:
        return numbers_of(pc.fill_null(rows[name], 0))

    def share(name: str) -> NDArray[np.float64]:
        column = pc.fill_null(rows[name].cast(pa.float64()), np.nan)
        values: NDArray[np.float64] = column.to_numpy()
        return np.clip(values, 0, 1)  # sums of many shares may be a hair above 1

    return Answers(
        labels=tuple(labels),
        unit=whole("unit_id"),
        well=whole("well_id"),
        plate=whole("plate_id"),
        truth=codes_of(rows["truth"], labels),
        predicted=codes_of(rows["predicted"], labels),
        confidence=share("confidence"),
        probability=share("truth_probability"),
        place=whole("truth_place"),
        tie=rows["tie"].to_numpy(),
        control=rows["control"].to_numpy(),
        abstained=pc.is_valid(rows["abstained"]).to_numpy(),
    )


def numbers_of(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return whole numbers as an array."""
    return np.asarray(column.to_numpy(), dtype=np.int64)


def codes_of(column: pa.ChunkedArray, labels: Sequence[str]) -> NDArray[np.int64]:
    """Return the places of texts among ``labels``."""
    values = pa.array(labels, pa.string())
    return numbers_of(pc.index_in(column.cast(pa.string()), values))


@dataclass(frozen=True)
class Scale:
    """What all scores of a report are measured with.

    ``majority``: the most frequent label of the training side, if there is one; ``top``: whether
    five choices are kept of more than five classes.
    """

    majority: str | None
    top: bool


def scores_of(answers: ByKey, scale: Scale) -> tuple[Score, ...]:
    """Return the scores of every level and vote that has an answer."""
    missing = _why_no_log_loss(answers["cell", "hard"])
    found = (_answers_score(key, item, scale, missing) for key, item in answers.items())
    return tuple(item for item in found if item is not None)


def scores_where(
    answers: ByKey, scale: Scale, keep: Callable[[Answers], NDArray[np.bool_]]
) -> tuple[Score, ...]:
    """Return the scores of a part; empty if that is all there is, or nothing."""
    masks = {key: keep(item) for key, item in answers.items()}
    if all(mask.all() for mask in masks.values()):
        return ()
    return scores_of({key: answers[key].where(mask) for key, mask in masks.items()}, scale)


def _answers_score(
    key: tuple[str, str], every: Answers, scale: Scale, missing: str | None
) -> Score | None:
    given = every.given
    if not given.unit.size:
        return None
    counts = statistics.class_counts(given.truth, given.predicted, len(given.labels))
    correct = given.correct
    interval = bootstrap_interval(correct, given.well)
    missing = missing if key[1] == "soft" or key[0] == "cell" else _no_probability(key[1])
    return Score(
        level=key[0],
        vote=key[1],
        n=correct.size,
        correct=int(correct.sum()),
        accuracy=float(correct.mean()),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        majority=_majority(given, scale.majority),
        balanced_accuracy=statistics.balanced_of(counts),
        macro_f1=statistics.macro_f1_of(counts),
        top_5=_top(given.place) if scale.top else None,
        ece=statistics.expected_calibration_error(given.confidence, correct),
        ties=int(given.tie.sum()),
        log_loss=None if missing else statistics.log_loss(given.probability),
        log_loss_missing=missing,
        abstained=int(every.abstained.sum()),
        coverage=correct.size / every.unit.size,
    )


def _majority(given: Answers, label: str | None) -> float | None:
    if label is None:
        return None
    return (
        float(np.mean(given.truth == given.labels.index(label))) if label in given.labels else 0.0
    )


def _top(place: NDArray[np.int64]) -> float:
    return float(np.mean((place >= 1) & (place <= TOP)))


def _no_probability(vote: str) -> str:
    return f"A {vote} vote gives labels no probabilities that add up to 1: see the soft vote."


def _why_no_log_loss(cells: Answers) -> str | None:
    """Say why the log loss of cells, and of soft votes, is not known, if it is not."""
    unknown = int(np.isnan(cells.probability).sum())
    if not unknown:
        return None
    return (
        f"The probability of the true label was not kept for {unknown:,} of "
        f"{cells.unit.size:,} cells: label with cellstore predict --all-probabilities; a label "
        "that was not trained has none."
    )


def calibration_of(answers: ByKey) -> tuple[CalibrationBin, ...]:
    """Return how often answers of each confidence are right: of cells, and of images (soft)."""
    return tuple(
        item for key in (("cell", "hard"), ("image", "soft")) for item in _bins(key, answers[key])
    )


def _bins(key: tuple[str, str], every: Answers) -> Iterator[CalibrationBin]:
    given = every.given
    if not given.unit.size:
        return
    found = statistics.calibration(given.confidence, given.correct)
    for place in np.flatnonzero(found.n):
        yield CalibrationBin(
            level=key[0],
            vote=key[1],
            low=float(found.edges[place]),
            high=float(found.edges[place + 1]),
            n=int(found.n[place]),
            confidence=float(found.confidence[place]),
            accuracy=float(found.accuracy[place]),
        )


HEADLINE = ("image", "hard")
LEVELS = (HEADLINE, ("well", "hard"), ("cell", "hard"))
"""What baselines are compared by."""

# Where a rule lets a baseline abstain, its answer counts all the same: it is scored on the very
# images that are scored.
VOTES = """
    SELECT level, vote, unit_id, well_id, predicted = truth AS correct FROM verdicts
    WHERE run_id = ? AND level IN ('image', 'well') AND vote = 'hard' AND list_contains(?, subset)
    ORDER BY level, unit_id
"""
CELLS = """
    SELECT level, vote, unit_id, well_id, predicted = truth AS correct FROM verdicts
    WHERE run_id = ? AND level = 'cell' AND list_contains(?, subset) ORDER BY unit_id
"""


def find_rivals(workspace: Workspace, run: Run, split: Split) -> dict[str, list[Run]]:
    """Return the finished predict runs of baselines of a split, the newest first, but ``run``."""
    with workspace.database.read() as session:
        found: dict[str, list[Run]] = {}
        for kind, rival in _labelled(session, split.id):
            if rival.id != run.id:
                found.setdefault(kind, []).append(rival)
        return {kind: found[kind] for kind in BASELINES if kind in found}


def kind_of(workspace: Workspace, run: Run) -> str | None:
    """Return the name of the baseline with which a predict run labelled, if it was one."""
    trained = select(Recipe.parameters).join(Run, Run.recipe_id == Recipe.id)
    with workspace.database.read() as session:
        parameters = session.scalar(trained.where(Run.id == run.parent_id)) or {}
        kind = parameters.get("baseline")
        return None if kind is None else str(kind)


def _labelled(session: Session, split_id: int) -> Iterator[tuple[str, Run]]:
    trained = aliased(Run)
    kind = Recipe.parameters["baseline"].as_string()
    query = (
        select(kind, Run)
        .join(trained, trained.id == Run.parent_id)
        .join(Recipe, Recipe.id == trained.recipe_id)
        .where(Run.stage == Stage.PREDICT, Run.status == Status.DONE)
        .where(trained.split_id == split_id, kind.is_not(None))
        .where(or_(Run.split_id.is_(None), Run.split_id == split_id))
        .order_by(Run.id.desc())
    )
    for name, run in session.execute(query):
        yield str(name), run


def score_rivals(
    questions: Questions,
    rivals: dict[str, list[Run]],
    sides: Sequence[str],
    units: dict[str, pa.Array],
) -> tuple[BaselineScore, ...]:
    """Score the newest run of each baseline that has labelled all images that are scored.

    ``units``: the ids of the cells, images and wells that are scored, by level. A level of which
    the run lacks some is left out.
    """
    found: list[BaselineScore] = []
    for kind, runs in rivals.items():
        for run in runs:
            scored = list(_scores(questions, kind, run, sides, units))
            if any((item.level, item.vote) == HEADLINE for item in scored):
                found += scored
                break
    return tuple(found)


def _scores(
    questions: Questions, kind: str, run: Run, sides: Sequence[str], units: dict[str, pa.Array]
) -> Iterator[BaselineScore]:
    votes = questions.ask(VOTES, [run.id, list(sides)])
    cells = questions.ask(CELLS, [run.id, list(sides)])
    for level, vote in [key for key in LEVELS if key[0] in units]:
        rows = cells if level == "cell" else votes.filter(pc.equal(votes["level"], level))
        rows = rows.filter(pc.is_in(rows["unit_id"], units[level]))
        if rows.num_rows and pc.all(pc.is_in(units[level], rows["unit_id"])).as_py():
            yield _score(kind, run, (level, vote), rows)


def _score(kind: str, run: Run, key: tuple[str, str], rows: pa.Table) -> BaselineScore:
    correct = rows["correct"].to_numpy()
    interval = bootstrap_interval(correct, rows["well_id"].to_numpy())
    return BaselineScore(
        baseline=kind,
        null=kind in NULLS,
        run_id=run.id,
        train_run_id=run.parent_id,
        level=key[0],
        vote=key[1],
        n=rows.num_rows,
        accuracy=float(correct.mean()),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
    )


def verdict(
    best: Score, rivals: Sequence[BaselineScore], own: str | None, split: str
) -> tuple[bool | None, str]:
    """Return whether a score is above every null baseline, and the sentence on it.

    It is, if its interval begins above the accuracy of each; ``None``: that is not known. ``own``:
    the baseline that is scored, if it is one.
    """
    command = f"Run: cellstore train --baseline null --split {shlex.quote(split)}"
    nulls = [item for item in rivals if item.null and (item.level, item.vote) == HEADLINE]
    missing = [kind for kind in NULLS if kind not in {item.baseline for item in nulls} | {own}]
    if own in NULLS:
        return None, f"These labels are those of a null baseline ({own}): what others have to beat."
    if not nulls:
        return None, f"No null baseline has labelled these images, so they may be easy. {command}"
    if best.low is None:
        return None, "There is one well only, so no interval to compare with the null baselines."
    low = best.low
    beating = [item for item in nulls if item.accuracy >= low]
    if beating:
        named = _named(beating)
        return False, f"The interval of these labels is not above {named} per image."
    if missing:
        rest = f"Not compared with: {', '.join(missing)}. {command}"
        return None, f"The interval of these labels is above {_named(nulls)} per image. {rest}"
    return True, f"The interval of these labels is above every null baseline: {_named(nulls)}."


def _named(found: Sequence[BaselineScore]) -> str:
    return ", ".join(f"{item.baseline} ({100 * item.accuracy:.1f} %)" for item in found)


PREFERRED = (Subset.TEST.value, "outside", Subset.VALIDATION.value)
"""Which side is scored, if the run has labelled it; the training side only by force."""

ALL_IMAGES = """
    SELECT count(DISTINCT s.image_id) AS images, count(*) AS cells
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = s.image_id
    WHERE p.run_id = ? AND p.rank = 1 AND c.excluded IS NULL AND ri.truth IS NOT NULL
        AND list_contains(?, ri.subset) AND (? OR ri.control IS NULL)
"""
UNLABELLED = """
    SELECT count(*) AS images FROM split_members AS m
    WHERE m.split_id = ? AND list_contains(?, m.subset) AND m.image_id NOT IN (
        SELECT image_id FROM placed_predictions WHERE run_id = ? AND NOT excluded
    )
"""


@dataclass(frozen=True)
class Subject:
    """The predict run that a report is about, with the split that it is measured by.

    ``rules`` say which images and cells have a vote: ``rules.exclude_flagged`` is the number of the
    quality-control run whose flagged ones have none, if any. ``baseline``: which it labelled with;
    ``rivals``: runs of baselines of its split; ``feature_leak``: that its features know labels of
    the scored side, if they do.
    """

    run: Run
    split: Split
    top_k: int | None
    rules: VoteRules = field(default_factory=VoteRules)
    qc_notes: tuple[str, ...] = ()
    baseline: str | None = None
    rivals: dict[str, list[Run]] = field(default_factory=dict)
    feature_leak: str | None = None

    @property
    def qc_run_id(self) -> int | None:
        """The quality-control run whose flagged images and cells have no vote."""
        flagged = self.rules.exclude_flagged
        return None if flagged is None else int(flagged)


def find_subject(workspace: Workspace, reference: str, rules: VoteRules | None = None) -> Subject:
    """Return the predict run of this name; a train run stands for its latest predict run."""
    subject = _subject(workspace, reference, rules)
    rivals = find_rivals(workspace, subject.run, subject.split)
    return replace(subject, baseline=kind_of(workspace, subject.run), rivals=rivals)


def _subject(workspace: Workspace, reference: str, rules: VoteRules | None) -> Subject:
    with workspace.database.read() as session:
        run = predict_run(session, reference)
        parent = session.get(Run, run.parent_id) if run.parent_id else None
        split_id = run.split_id or (parent.split_id if parent else None)
        if split_id is None:
            raise UserInputError(f"Run {run.id} belongs to no split, so there is no truth for it.")
        recipe = session.get_one(Recipe, run.recipe_id)
        rules = rules or VoteRules()
        qc, notes = flags_on(session, rules.exclude_flagged, run)
        return Subject(
            run,
            session.get_one(Split, split_id),
            recipe.parameters.get("top_k"),
            replace(rules, exclude_flagged=None if qc is None else str(qc)),
            notes,
            feature_leak=None if parent is None else leak_of(session, parent, split_id),
        )


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


def count_flagged(
    questions: Questions, subject: Subject, sides: tuple[str, ...], images: int, cells: int
) -> tuple[int, int]:
    """Return how many images, and cells, more there would be without leaving out."""
    if subject.qc_run_id is None:
        return 0, 0
    everything = questions.ask(
        ALL_IMAGES, [subject.run.id, list(sides), subject.rules.controls]
    ).to_pylist()[0]
    return everything["images"] - images, everything["cells"] - cells


def unlabelled_note(
    questions: Questions, subject: Subject, sides: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the sentence on images of the scored sides that an ended run says nothing of."""
    if subject.run.status != Status.DONE:
        return ()
    asked = [subject.split.id, list(sides), subject.run.id]
    images = questions.ask(UNLABELLED, asked)["images"][0].as_py()
    if not images:
        return ()
    said = (
        f"{images:,} images of the scored side have no label by this run, so no score counts "
        "them: no cell was found in them, or the run was not asked about them."
    )
    return (said,)


def notes_on(
    subject: Subject, counts: dict[str, int], sides: tuple[str, ...], flagged: tuple[int, int]
) -> tuple[str, ...]:
    """Return what a reader must know of the scored images, a sentence each."""
    found = [subject.feature_leak] if subject.feature_leak else []
    found += _side_notes(counts, sides)
    if subject.run.status != Status.DONE:
        status = Status(subject.run.status).value
        found.append(f"The run is {status}, so images may be missing here.")
    found += _rule_notes(subject.rules)
    if subject.qc_run_id is not None:
        found += subject.qc_notes
        found.append(
            f"Left out, because quality-control run {subject.qc_run_id} flagged them: "
            f"{flagged[0]:,} images and {flagged[1]:,} cells, those of the images included."
        )
    return tuple(found)


def _side_notes(counts: dict[str, int], sides: tuple[str, ...]) -> list[str]:
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
    return notes


def _rule_notes(rules: VoteRules) -> list[str]:
    notes = []
    if rules.min_cells > 1:
        notes.append(f"Images and wells with fewer than {rules.min_cells} cells have no answer.")
    if rules.min_margin > 0:
        notes.append(
            "Images and wells have no answer where the share of the first label is less than "
            f"{100 * rules.min_margin:g} % above that of the second."
        )
    if not rules.controls:
        notes.append("Control wells are left out.")
    return notes


TARGETS = """
    SELECT DISTINCT pert_iname, target FROM treatments
    WHERE pert_iname IS NOT NULL AND target IS NOT NULL
"""
PLATES = "SELECT id, barcode FROM plates"
WELLS = """
    SELECT w.id, p.barcode AS plate, w.name FROM wells AS w
    JOIN plates AS p ON p.id = w.plate_id
    JOIN (SELECT unnest(?::BIGINT[]) AS id) AS asked ON asked.id = w.id
    ORDER BY p.barcode, w."row", w."column"
"""
SEPARATOR = "|"
"""Between the genes of a compound that has several; see ``formats.treatments.cells``."""

Targets = Mapping[str, str]
Mask = NDArray[np.bool_]


def read_targets(questions: Questions, field: str) -> dict[str, str]:
    """Return the genes of each compound; none where labels are genes themselves."""
    if field != "pert_iname":
        return {}
    found: dict[str, set[str]] = {}
    for row in questions.ask(TARGETS).to_pylist():
        found.setdefault(row["pert_iname"], set()).update(row["target"].split(SEPARATOR))
    return {label: SEPARATOR.join(sorted(genes)) for label, genes in found.items()}


def same_target(given: Answers, targets: Targets) -> Mask:
    """Return, for each answer, whether it is another compound that shares a gene with the truth."""
    genes = [_genes(targets, label) for label in given.labels]
    classes = len(given.labels)
    pairs, place = np.unique(given.truth * classes + given.predicted, return_inverse=True)
    shared = [
        pair // classes != pair % classes and bool(genes[pair // classes] & genes[pair % classes])
        for pair in pairs.tolist()
    ]
    return np.array(shared, dtype=bool)[place]


def by_class(every: Answers, targets: Targets) -> tuple[ClassScore, ...]:
    """Return the score of every label that is true or answered, in order of label."""
    given, silent = every.given, every.where(every.abstained)
    counts = statistics.class_counts(given.truth, given.predicted, len(given.labels))
    quiet = np.bincount(silent.truth, minlength=len(given.labels))
    close = np.bincount(given.truth[same_target(given, targets)], minlength=len(given.labels))
    members = dict(_groups(given.truth))
    found = []
    for code, label in enumerate(given.labels):
        if not (counts.support[code] or counts.predicted[code] or quiet[code]):
            continue
        own = members.get(code, np.empty(0, np.int64))
        low, high, wells = _interval(given, own)
        found.append(
            ClassScore(
                label=label,
                target=targets.get(label),
                support=int(counts.support[code]),
                predicted=int(counts.predicted[code]),
                correct=int(counts.correct[code]),
                recall=_known(counts.recall[code]),
                precision=_known(counts.precision[code]),
                f1=float(np.nan_to_num(counts.f1[code])),
                same_target=int(close[code]),
                wells=wells,
                low=low,
                high=high,
                abstained=int(quiet[code]),
            )
        )
    return tuple(found)


def by_plate(questions: Questions, every: Answers, targets: Targets) -> tuple[GroupScore, ...]:
    """Return the score of every plate with scored images, in order of barcode."""
    names = {row["id"]: row["barcode"] for row in questions.ask(PLATES).to_pylist()}
    close = _close(every, targets)
    found = (_group(names[plate], every, rows, close) for plate, rows in _groups(every.plate))
    return tuple(sorted((item for item in found if item), key=lambda item: item.name))


def by_target(every: Answers, targets: Targets) -> tuple[GroupScore, ...]:
    """Return the score of the compounds of every gene, in order of gene; none without genes.

    A compound of several genes counts for each of them.
    """
    rows_of = dict(_groups(every.truth))
    of_gene: dict[str, list[NDArray[np.int64]]] = {}
    for code in rows_of:
        for gene in _genes(targets, every.labels[code]):
            of_gene.setdefault(gene, []).append(rows_of[code])
    close = _close(every, targets)
    found = (
        _group(gene, every, np.concatenate(rows), close) for gene, rows in sorted(of_gene.items())
    )
    return tuple(item for item in found if item)


def by_well(
    questions: Questions, every: Answers, wells: Answers, known: NDArray[np.int64]
) -> tuple[WellScore, ...]:
    """Return every scored well, in order of plate and place."""
    given = every.given
    ids, place = np.unique(every.well, return_inverse=True)
    truth = dict(zip(ids.tolist(), every.truth[_first(place, ids.size)].tolist(), strict=True))
    number = _per_well(given.well)
    right = _per_well(given.well[given.correct])
    said = _one_answer(wells.given)
    seen = set(known.tolist())
    return tuple(
        WellScore(
            plate=row["plate"],
            well=row["name"],
            truth=every.labels[truth[row["id"]]],
            predicted=every.labels[said[row["id"]]] if row["id"] in said else None,
            n=number.get(row["id"], 0),
            correct=right.get(row["id"], 0),
            seen=row["id"] in seen,
        )
        for row in questions.ask(WELLS, [ids.tolist()]).to_pylist()
    )


def _genes(targets: Targets, label: str) -> frozenset[str]:
    return frozenset(targets.get(label, "").split(SEPARATOR)) - {""}


def _close(every: Answers, targets: Targets) -> Mask:
    close = np.zeros(every.unit.size, dtype=bool)
    close[~every.abstained] = same_target(every.given, targets)
    return close


def _group(name: str, every: Answers, rows: NDArray[np.int64], close: Mask) -> GroupScore | None:
    """The score of some images; ``None`` where none of them has an answer."""
    given = rows[~every.abstained[rows]]
    if not given.size:
        return None
    low, high, wells = _interval(every, given)
    right = int(every.correct[given].sum())
    return GroupScore(
        name=name,
        n=given.size,
        correct=right,
        accuracy=right / given.size,
        same_target=int(close[given].sum()),
        wells=wells,
        labels=np.unique(every.truth[given]).size,
        low=low,
        high=high,
        abstained=rows.size - given.size,
    )


def _interval(answers: Answers, rows: NDArray[np.int64]) -> tuple[float | None, float | None, int]:
    """The bounds of the accuracy of some answers, and the number of their wells."""
    if not rows.size:
        return None, None, 0
    wells = answers.well[rows]
    found = bootstrap_interval(answers.correct[rows], wells)
    return (*(found or (None, None)), np.unique(wells).size)


def _groups(codes: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The places of each code."""
    order = np.argsort(codes, kind="stable")
    known, starts = np.unique(codes[order], return_index=True)
    yield from zip(known.tolist(), np.split(order, starts[1:]), strict=True)


def _first(place: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    first = np.empty(size, np.int64)
    first[place[::-1]] = np.arange(place.size)[::-1]
    return first


def _one_answer(given: Answers) -> dict[int, int]:
    """What each well says, unless it says different things on two sides of a split."""
    pairs = set(zip(given.well.tolist(), given.predicted.tolist(), strict=True))
    times = Counter(well for well, _ in pairs)
    return {well: code for well, code in pairs if times[well] == 1}


def _per_well(wells: NDArray[np.int64]) -> dict[int, int]:
    ids, counts = np.unique(wells, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _known(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


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
) -> ReportResult:
    """Score a predict run (a number or ``latest``) against the labels of its split.

    Images that the network was trained on count only with ``force``, and the result says so.
    ``compare``: another predict run to put beside it, on the images that both have labelled.
    ``rules`` say which images and wells have an answer; what a quality-control run has flagged has
    no vote if they say so, and the result says how much that is.

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
) -> Iterator[tuple[Questions, Subject, Evidence]]:
    """Open the store for the report on a run, with the report; arguments as in :func:`report`."""
    subject = find_subject(workspace, run, rules)
    other = None if compare is None else find_subject(workspace, compare, subject.rules)
    about = {item.run.id for item in (subject, other) if item is not None}
    about |= {rival.id for rivals in subject.rivals.values() for rival in rivals}
    with open_questions(workspace, rules=subject.rules, runs=about) as questions:
        evidence = scored(questions, subject, force=force)
        if other is not None:
            from .comparison import compare_subjects

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
            f"{subject.run.id} has labelled. Score them without --exclude-flagged latest."
        )
    if not counts and not subject.rules.controls:
        raise UserInputError(
            f"Run {subject.run.id} has labelled no image of a treated well whose truth is known. "
            "Score it without --no-controls."
        )
    sides = chosen_sides(counts, subject.run.id, force=force)
    votes = votes.filter(pc.is_in(votes["subset"], pa.array(sides)))
    cells = questions.ask(ANSWERS_CELLS, [subject.run.id, list(sides)])
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
    majority = str(statistics.majority_baseline(training, training)[0]) if training else None
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
    targets = read_targets(questions, result.field)
    return replace(
        result,
        by_class=by_class(images, targets),
        by_plate=by_plate(questions, images, targets),
        by_target=by_target(images, targets),
        by_well=by_well(questions, images, answers["well", "hard"], known),
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
