"""How good the labels of a predict run are, in numbers."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import or_, select
from sqlalchemy.orm import aliased

from ..analysis import statistics
from ..analysis.statistics import FEWEST_WELLS, WellTest, mcnemar_over_wells, well_interval
from ..config import RunName, VoteOptions
from ..db.fields import wells_relabelled
from ..enums import PERTURBATION, TREATMENT, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.run_names import find_folds, find_predict_run
from ..jobs.workspace import Workspace
from ..learn.baselines import BASELINES, NULLS
from ..models import Recipe, Run, Split
from ..notebooks import Shown
from ..query.cells import feature_leak
from ..query.engine import Questions, open_questions
from ..query.exclusions import with_flags
from ..settings import need
from .votes import SUBSETS, VOTES, stale_cells

if TYPE_CHECKING:
    from .comparison import Comparison


@dataclass(frozen=True)
class Score:
    """The scores of one kind of answer.

    ``level`` is cell, image or well; ``vote`` hard, soft or median (a cell has one answer, listed
    as hard). ``n`` counts the answers; ``abstained`` cells, images or wells more gave none, and
    ``coverage`` is the share that did. ``low`` and ``high`` bound the accuracy: 95 %
    interval over wells (:func:`..analysis.statistics.well_interval`), ``None`` for fewer than
    ``FEWEST_WELLS`` wells. ``majority`` is the accuracy of always
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
    ``p_value``: of McNemar's test over wells between the run and the baseline, as ``compare`` does
    it; ``beaten``: whether it shows, at 5 % and for this baseline alone, that the run is better;
    ``None`` where that cannot be said, and ``cannot_say`` is why. ``name``: with the feature set
    that it reads, for people.
    """

    baseline: str
    name: str
    null: bool
    run_id: int
    train_run_id: int | None
    level: str
    vote: str
    n: int
    accuracy: float
    low: float | None
    high: float | None
    p_value: float
    beaten: bool | None
    cannot_say: str | None = None


@dataclass(frozen=True)
class ClassScore:
    """How one label does, over images by hard votes.

    ``support`` counts the images of the label, ``predicted`` those that got it, ``correct`` both.
    ``recall`` is ``None`` for a label that is never true, ``precision`` for one that is never
    answered; ``f1`` is 2 ``correct`` / (``support`` + ``predicted``). ``target`` is the gene of a
    compound (several with ``|`` between), ``same_target`` counts its images that got another
    compound of the same gene. ``low`` and ``high`` bound the recall as in :class:`Score`;
    ``wells``: how many the images come from; ``abstained``: images of the label without an answer;
    ``cells`` and ``cells_correct``: its cells, and those of them that got the label alone.
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
    cells: int = 0
    cells_correct: int = 0


@dataclass(frozen=True)
class GroupScore:
    """The images of one plate, one treatment with its dose, or one target gene, by hard votes.

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

    ``predicted`` is ``None`` where the well has no answer; see :func:`once`.
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
class ReportResult(Shown):
    """The report on one predict run.

    ``subsets`` of the split are scored, ``chance`` is 1 / classes. ``wells`` counts those with an
    image that has an answer, ``wells_seen`` those of them seen in training. ``leak`` says
    whether the scored wells were seen in training; ``notes`` whatever else a reader must know.
    ``html`` is where the page was written, if one was. ``qc_run_id``: the quality-control run
    whose ``images_flagged`` (those without a cell left) and ``cells_flagged`` had no vote.
    ``baselines``: what a score has to beat, by hard votes; ``beats_nulls``: whether the run is
    shown to be better, per image, than every null baseline, ``None`` where that cannot be said;
    ``against_nulls`` says it in words.

    ``unseen`` are the same scores without the wells that were seen in training; empty if none was,
    or nothing is left. ``without_controls`` are those without control wells; empty if there are
    none, or nothing is left. ``by_class``, ``by_plate`` and ``by_target`` (empty unless the labels
    are compounds with known genes) are in order of name, ``by_dose`` (what has a dose, unless the
    labels have it) in order of name and dose, ``by_well`` in order of plate, row and column.
    ``comparison``: the run beside another, if one was named. ``vote_options`` say which images and
    wells have an answer. ``folds``: the predict runs of a cross-validation that are scored as one,
    each on the test images of its fold; ``run_id`` is then the last of them. ``name``: the number
    of the run, or what was typed for the folds.
    """

    run_id: int
    train_run_id: int | None
    split: str
    protocol: str
    group_level: str
    field: str
    subsets: tuple[str, ...]
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
    vote_options: VoteOptions
    scores: tuple[Score, ...]
    name: str = ""
    folds: tuple[int, ...] = ()
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
    by_dose: tuple[GroupScore, ...] = ()
    by_well: tuple[WellScore, ...] = ()
    calibration: tuple[CalibrationBin, ...] = ()
    comparison: Comparison | None = None

    def score(self, level: str, vote: str) -> Score:
        """Return the scores of one level and vote."""
        return next(item for item in self.scores if (item.level, item.vote) == (level, vote))


def by_baseline(found: Sequence[BaselineScore]) -> list[dict[str, BaselineScore]]:
    """Return the scores of each baseline by level: one record per baseline."""
    records: dict[str, dict[str, BaselineScore]] = {}
    for item in found:
        records.setdefault(item.name, {})[item.level] = item
    return list(records.values())


HEADLINE = ("image", "hard")
KEYS = (*(("image", vote) for vote in VOTES), *(("well", vote) for vote in VOTES), ("cell", "hard"))
"""Level and vote of all scores, in the order in which they are shown."""
FOLDS = ", or cellstore split create NAME --folds 5"
TOP = 5
SIGNIFICANT = 0.05

CLASS_NAMES = """
    SELECT value, row_number() OVER (ORDER BY value) - 1 AS code FROM (
        SELECT value FROM labels
        UNION SELECT truth FROM run_images WHERE list_contains(?, run_id) AND truth IS NOT NULL
    )
"""
# Levels are written out, so that DuckDB skips the parts of the view that are not asked for; one at
# a time takes a fifth less than both at once, and less memory. Labels are numbers in an answer: a
# text per row would be most of its memory.
ANSWERS = f"""
    SELECT list_position({list(VOTES)}, s.vote) - 1 AS vote, s.unit_id AS unit, s.well_id AS well,
        list_position({list(SUBSETS)}, s.subset) - 1 AS subset, t.code AS truth,
        p.code AS predicted, t.code = p.code AS correct,
        coalesce(s.confidence, 'nan') AS confidence, coalesce(s.truth_rank, 0) AS truth_rank,
        coalesce(s.truth_probability, 'nan') AS probability, s.tie,
        s.control IS NOT NULL AS control, s.abstained IS NOT NULL AS abstained
    FROM scored_predictions AS s
    JOIN class_names AS t ON t.value = s.truth
    JOIN class_names AS p ON p.value = s.predicted
    WHERE s.run_id = ? AND s.level = '{{level}}' AND list_contains(?, s.subset)
    ORDER BY s.vote, s.unit_id, s.subset
"""  # noqa: S608 - our own words
IMAGE_ANSWERS = f"""
    SELECT list_position({list(VOTES)}, s.vote) - 1 AS vote, s.unit_id AS unit, s.well_id AS well,
        list_position({list(SUBSETS)}, s.subset) - 1 AS subset, t.code AS truth,
        p.code AS predicted, t.code = p.code AS correct, coalesce(s.share, 'nan') AS confidence,
        0 AS truth_rank, 'nan'::DOUBLE AS probability, s.tie, s.control IS NOT NULL AS control,
        s.abstained IS NOT NULL AS abstained
    FROM votes AS s
    JOIN class_names AS t ON t.value = s.truth
    JOIN class_names AS p ON p.value = s.winner
    WHERE s.run_id = ? AND s.level = '{{level}}' AND list_contains(?, s.subset)
    ORDER BY s.vote, s.unit_id, s.subset
"""  # noqa: S608 - our own words
"""The same without what was said of the truth where it did not win: a hundredth of the time."""
VOTED_RIVAL_ANSWERS = f"""
    SELECT unit_id, list_position({list(SUBSETS)}, subset) - 1 AS subset, winner = truth AS correct
    FROM votes
    WHERE run_id = ? AND level = '{{level}}' AND vote = 'hard' AND list_contains(?, subset)
        AND truth IS NOT NULL
    ORDER BY unit_id
"""  # noqa: S608 - our own words
RIVAL_ANSWERS = f"""
    SELECT unit_id, list_position({list(SUBSETS)}, subset) - 1 AS subset,
        predicted = truth AS correct
    FROM scored_predictions
    WHERE run_id = ? AND level = '{{level}}' AND vote = 'hard' AND list_contains(?, subset)
    ORDER BY unit_id
"""  # noqa: S608 - our own words
ABOUT_RUN = """
    SELECT
        (SELECT count(DISTINCT label_id) FROM split_members WHERE split_id = $split) AS classes,
        (
            SELECT l.value FROM split_members AS m JOIN labels AS l ON l.id = m.label_id
            WHERE m.split_id = $split AND ($folds OR m.subset = 'train')
            GROUP BY l.value ORDER BY count(*) DESC, l.value LIMIT 1
        ) AS majority
"""
SEEN = "SELECT DISTINCT well_id FROM run_images WHERE run_id = ? AND well_in_training"
DECLARED = """
    SELECT p.parameters ->> 'declared' AS model, p.parameters ->> 'trained_on' AS trained_on
    FROM runs AS r JOIN recipes AS p ON p.id = r.recipe_id
    WHERE r.id = ? AND r.origin = 'declared'
"""
TARGETS = """
    SELECT DISTINCT name, target FROM treatments
    WHERE name IS NOT NULL AND target IS NOT NULL
"""
SEPARATOR = "|"
"""Between the genes of a compound that has several, as the readers of plate maps write it."""
WELLS = """
    SELECT w.id, w.plate_id, p.barcode AS plate, w.name, t.treatment, t.dose, t.name_with_dose
    FROM wells AS w
    JOIN plates AS p ON p.id = w.plate_id
    JOIN (SELECT unnest(?::BIGINT[]) AS id) AS asked ON asked.id = w.id
    LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
    ORDER BY p.barcode, w.well_row, w.well_column
"""
ALL_IMAGES = """
    SELECT count(DISTINCT p.image_id) AS images, count(p.cell_id) AS cells
    FROM predictions_with_image AS p
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
    WHERE p.run_id = ? AND p.rank = 1 AND NOT p.excluded AND ri.truth IS NOT NULL
        AND list_contains(?, ri.subset) AND (? OR ri.control IS NULL)
        AND NOT EXISTS (
            FROM excluded_images AS e WHERE e.image_id = p.image_id AND e.source = 'annotation'
        )
        AND NOT EXISTS (
            FROM later_exclusions AS e
            WHERE e.level = 'cell' AND e.id = p.cell_id AND e.source = 'annotation'
        )
"""
ANNOTATED = """
    SELECT level, count(DISTINCT id) AS n FROM later_exclusions WHERE source = 'annotation'
    GROUP BY level ORDER BY level
"""
UNLABELLED = """
    SELECT count(*) AS images FROM split_members AS m
    WHERE list_contains(?, m.split_id) AND list_contains(?, m.subset) AND m.image_id NOT IN (
        SELECT image_id FROM predictions_with_image WHERE run_id = ? AND NOT excluded
    )
"""
UNVOTED = """
    SELECT count(*) AS images FROM split_members AS m
    WHERE list_contains(?, m.split_id) AND list_contains(?, m.subset) AND m.image_id NOT IN (
        SELECT unit_id FROM votes WHERE run_id = ? AND level = 'image' AND vote = 'hard'
    )
"""


@dataclass(frozen=True)
class Subject:
    """The predict run that a report is about, with the split that it is measured by.

    ``vote_options`` say which images and cells have a vote, ``qc_run_id`` the quality-control run
    whose flagged ones have none. ``baseline``: which it labelled with, if any; ``rivals``: finished
    runs of the baselines of its split by kind and name, the newest first; ``feature_leak``: that
    its features know labels of the scored images, if they do; ``stale``: that images have changed
    since.
    ``folds``: the predict runs of a cross-validation that are read as one, ``run`` the last of
    them; empty for a single run. ``name``: the number of the run, or what was typed for the folds.
    ``read_as`` and ``rivals_read_as``: under which number each run is read. ``splits``: all by
    which images are scored, ``split_name``: the split, or the cross-validation.
    """

    run: Run
    split: Split
    top_k: int | None
    vote_options: VoteOptions
    qc_run_id: int | None
    qc_notes: tuple[str, ...]
    baseline: str | None
    rivals: dict[tuple[str, str], list[Run]]
    feature_leak: str | None
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
        options, notes = with_flags(session, vote_options or VoteOptions(), found)
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
            None if options.exclude_flagged is None else int(options.exclude_flagged),
            notes,
            baseline=None if taught is None else taught.parameters.get("baseline"),
            rivals=dict(sorted(rivals.items(), key=lambda item: BASELINES.index(item[0][0]))),
            feature_leak=next(filter(None, leaks), None),
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


def class_names(questions: Questions, runs: Sequence[int]) -> list[str]:
    """Return the labels that runs are asked for, sorted; keep them for ``ask_answers``."""
    questions.keep("class_names", CLASS_NAMES, [runs])
    names = questions.ask_ours("SELECT value FROM class_names ORDER BY code").rows()
    return [value for (value,) in names]


def ask_answers(questions: Questions, query: str, values: Sequence[object]) -> Answers:
    """Return the rows of a query as (N,) records."""
    found = questions.ask_ours(query, values).arrays()
    kinds = [(name, column.dtype) for name, column in found.items()]
    return np.rec.fromarrays(list(found.values()), dtype=kinds)


def read_answers(
    questions: Questions, run_id: int, level: str, subsets: Sequence[str], query: str = ANSWERS
) -> dict[tuple[str, str], Answers]:
    """Return the answers of a run at one level, by level and vote, in order of unit."""
    every = ask_answers(questions, query.format(level=level), [run_id, list(subsets)])
    for name in ("confidence", "probability"):  # sums of many shares may be a hair above 1
        every[name] = np.clip(every[name], 0, 1)
    return {key: every[every.vote == VOTES.index(key[1])] for key in KEYS if key[0] == level}


def given(answers: Answers) -> Answers:
    """Return those that did not abstain."""
    return answers[~answers.abstained]


def once(answers: Answers) -> Answers:
    """Return one answer for each unit.

    A well whose images are in several subsets has an answer in each: that of the first of
    ``SUBSETS`` counts.
    """
    order = np.lexsort((answers.subset, answers.unit))
    _, first = np.unique(answers.unit[order], return_index=True)
    return answers[np.sort(order[first])]


def report(
    workspace: Workspace,
    run: RunName = "latest",
    *,
    compare: RunName | None = None,
    vote_options: VoteOptions | None = None,
    force: bool = False,
    html: Path | None = None,
    maps: Sequence[str] = (),
    only_images: bool = False,
    look: Callable[[Questions, Subject, ReportResult], object] | None = None,
) -> ReportResult:
    """Score a predict run (a number or ``latest``) against the labels of its split.

    Images that the network was trained on count only with ``force``, and the result says so.
    ``compare``: another predict run to put beside it, on the images that both have labelled.
    ``vote_options`` say which images and wells have an answer; what a quality-control run has
    flagged has no vote if they say so, and the result says how much that is. ``html``: the file of
    a page to write as well; ``maps``: features to show on its plate maps, each a column of a
    feature set or SET.COLUMN. ``only_images``: wells and single cells are not scored, nor the
    ranks of labels that did not win, so that millions of cells take a second. ``look`` is called
    with what the result was read from.

    Raises:
        UnknownNameError: there is no such predict run, quality-control run, or feature.
        UserInputError: the run has labelled nothing, or only images it was trained on; no image has
            an answer by ``vote_options``; or the quality-control run has not looked at these images
            or cells.
        MissingExtraError: matplotlib or Jinja2, which a page needs, is not installed.
        StorageError: the page cannot be written.
    """
    if html is not None:
        need("report")
    subject = find_subject(workspace, run, vote_options)
    other = None if compare is None else find_subject(workspace, compare, subject.vote_options)
    run_id, options = subject.run.id, subject.vote_options
    about = subject.rivals_read_as | subject.read_as
    if other is not None:
        if any(about.get(one, number) != number for one, number in other.read_as.items()):
            raise UserInputError(
                f"Of {subject.name} and {other.name} one is a single fold and one all folds as "
                "one. Report on two of a kind, or compare these with: cellstore compare "
                f"{shlex.quote(subject.name)} {shlex.quote(other.name)}"
            )
        about |= other.read_as
    with open_questions(
        workspace, vote_options=options, runs=about, only_image_votes=only_images
    ) as questions:
        labels = class_names(questions, sorted(set(about.values())))
        if only_images:
            votes = read_answers(questions, run_id, "image", SUBSETS, IMAGE_ANSWERS)
            votes = {key: votes.get(key, votes[HEADLINE][:0]) for key in KEYS}
        else:
            votes = read_answers(questions, run_id, "image", SUBSETS)
            votes |= read_answers(questions, run_id, "well", SUBSETS)
        images = np.bincount(votes[HEADLINE].subset, minlength=len(SUBSETS))
        counts = {name: int(n) for name, n in zip(SUBSETS, images, strict=True) if n}
        if not counts:
            narrowed = [] if subject.qc_run_id is None else ["--exclude-flagged"]
            narrowed += [] if options.controls else ["--no-controls"]
            again = f"Score it without {' and '.join(narrowed)}, or label more"
            raise UserInputError(
                f"Run {subject.name} has labelled no image that counts and whose truth is known. "
                f"{again if narrowed else 'Label some'} with: cellstore predict"
            )
        new = [name for name in SUBSETS if name in counts and name != Subset.TRAIN]
        if not new and not force:
            raise UserInputError(
                f"Run {run_id} has only labelled the {counts[Subset.TRAIN.value]} images that its "
                "network was trained on; their score tells nothing about new images. Label the "
                "test images with cellstore predict, or score these anyway with --force."
            )
        subsets = tuple(sorted(counts)) if force else (new[0],)
        scored = [SUBSETS.index(name) for name in subsets]
        answers = {key: once(x[np.isin(x.subset, scored)]) for key, x in votes.items()}
        if not only_images:
            answers |= read_answers(questions, run_id, "cell", subsets)
        if not given(answers[HEADLINE]).size:
            raise UserInputError(
                f"No image that run {subject.name} has labelled gets a label with these options. "
                "Lower --min-cells or --min-margin."
            )
        result = score_answers(questions, subject, answers, labels, counts, subsets)
        if other is not None:
            from .comparison import compare_subjects

            compared = compare_subjects(questions, subject, other, force=force)
            result = replace(result, comparison=compared)
        if html is not None:
            from .report_page import write_page

            write_page(workspace, questions, subject, result, html, maps)
            result = replace(result, html=str(html))
        if look is not None:
            look(questions, subject, result)
    return result


def score_answers(
    questions: Questions,
    subject: Subject,
    answers: ByKey,
    labels: Sequence[str],
    counts: Mapping[str, int],
    subsets: tuple[str, ...],
) -> ReportResult:
    """Return the report on ``answers``; ``counts``: labelled images by subset, of all subsets."""
    run, split, options = subject.run, subject.split, subject.vote_options
    images, cells = answers[HEADLINE], answers["cell", "hard"]
    answering = given(images)
    values: Any = {"split": split.id, "folds": bool(subject.folds)}
    (about,) = questions.ask_ours(ABOUT_RUN, values).records()
    classes, majority = int(about["classes"]), about["majority"]
    top = classes > TOP and (subject.top_k is None or subject.top_k >= TOP)
    known = questions.ask_ours(SEEN, [run.id]).arrays()["well_id"].astype(np.int64)
    answered = np.unique(answering.well)
    seen = int(np.isin(answered, known).sum())
    leak = f"None of the {answered.size:,} wells scored here was seen in training."
    if seen:
        leak = (
            f"{seen:,} of the {answered.size:,} wells scored here were seen in training: the "
            "network learned from other images of the same wells. These scores are for wells that "
            "it knows, not for new ones."
        )
    declared = declared_of(questions, subject)
    if declared:
        leak += f" So it was declared of {declared['model']}."
        if declared["trained_on"] is None:
            leak = (
                f"It is not known which wells {declared['model']} has seen in training: nobody "
                "declared it. The scores may be for wells that it knows. See: cellstore "
                "predictions add --help, option --trained-on"
            )
    flagged = (0, 0)
    if subject.qc_run_id is not None:
        values = [run.id, list(subsets), options.controls]
        (row,) = questions.ask_ours(ALL_IMAGES, values).records()
        flagged = (row["images"] - images.size, row["cells"] - cells.size)
    parts: list[tuple[Score, ...]] = []
    for part in (
        {key: item[~np.isin(item.well, known)] for key, item in answers.items()},
        {key: item[~item.control] for key, item in answers.items()},
    ):
        every = all(part[key].size == item.size for key, item in answers.items())
        # Of all answers it would say nothing new.
        parts.append(() if every else scores_of(part, labels, majority, top=top))
    baselines = score_rivals(questions, subject, subsets, answers)
    beats, against = against_nulls(baselines, subject.baseline, subject.split_name)

    # The genes of each label, if labels are compounds; close: the answer is another compound of a
    # gene of the truth.
    targets: dict[str, set[str]] = defaultdict(set)
    if split.field == PERTURBATION:
        for name, target in questions.ask_ours(TARGETS).rows():
            targets[name] |= set(target.split(SEPARATOR)) - {""}
    genes = [frozenset(targets.get(label, ())) for label in labels]
    pairs, pair_of = np.unique(images.truth * len(labels) + images.predicted, return_inverse=True)
    shared = [
        truth != predicted and not genes[truth].isdisjoint(genes[predicted])
        for truth, predicted in (divmod(pair, len(labels)) for pair in pairs.tolist())
    ]
    close = np.array(shared, dtype=bool)[pair_of] & ~images.abstained

    of_class = statistics.class_counts(answering.truth, answering.predicted, len(labels))
    of_cells = np.bincount(cells.truth, minlength=len(labels))
    right_cells = np.bincount(cells.truth[cells.correct], minlength=len(labels))
    by_class = []
    for code, label in enumerate(labels):
        group = score_group(label, images, close, images.truth == code)
        predicted = int(of_class.predicted[code])
        if group.n or predicted or group.abstained:
            right = group.correct
            by_class.append(
                ClassScore(
                    label=label,
                    target=SEPARATOR.join(sorted(genes[code])) or None,
                    support=group.n,
                    predicted=predicted,
                    correct=right,
                    recall=right / group.n if group.n else None,
                    precision=right / predicted if predicted else None,
                    f1=float(np.nan_to_num(of_class.f1[code])),
                    same_target=group.same_target,
                    wells=group.wells,
                    low=group.low,
                    high=group.high,
                    abstained=group.abstained,
                    cells=int(of_cells[code]),
                    cells_correct=int(right_cells[code]),
                )
            )
    wells = np.unique(images.well)  # also those without an answer
    positions = questions.ask_ours(WELLS, [wells.tolist()]).records()
    plates: dict[str, list[int]] = defaultdict(list)
    for row in positions:
        plates[row["plate"]].append(row["id"])
    dosed = [row for row in positions if row["name_with_dose"] != row["treatment"]]
    if split.field == TREATMENT:
        dosed = []  # by class it is the same
    dosed.sort(key=lambda row: (row["treatment"], row["dose"] or 0, row["name_with_dose"]))
    doses: dict[str, list[int]] = defaultdict(list)
    for row in dosed:
        doses[row["name_with_dose"]].append(row["id"])
    codes: dict[str, list[int]] = defaultdict(list)  # a compound of several genes counts for each
    for code in np.unique(images.truth).tolist():
        for gene in genes[code]:
            codes[gene].append(code)
    by_plate, by_target, by_dose = (
        tuple(
            group
            for name, some in groups
            if (group := score_group(name, images, close, np.isin(images[column], some))).n
        )
        for column, groups in (
            ("well", plates.items()),
            ("truth", sorted(codes.items())),
            ("well", doses.items()),
        )
    )

    truths = dict(zip(images.well.tolist(), images.truth.tolist(), strict=True))
    scored = Counter(answering.well.tolist())
    right_ones = Counter(answering.well[answering.correct].tolist())
    votes = given(answers["well", "hard"])
    of_well = dict(zip(votes.well.tolist(), votes.predicted.tolist(), strict=True))
    seen_wells = set(known.tolist())
    by_well = tuple(
        WellScore(
            plate=row["plate"],
            well=row["name"],
            truth=labels[truths[row["id"]]],
            predicted=labels[of_well[row["id"]]] if row["id"] in of_well else None,
            n=scored[row["id"]],
            correct=right_ones[row["id"]],
            seen=row["id"] in seen_wells,
        )
        for row in positions
    )

    tested = [item for item in by_class if item.wells]
    few = [item for item in tested if item.low is None]
    too_few = []
    if few:
        single = [item.label for item in few if item.wells == 1]
        some_of = f"{', '.join(single[:TOP])}{', ...' if len(single) > TOP else ''}"
        lonely = f", {len(single):,} of them one well only ({some_of})" if single else ""
        too_few.append(
            f"{len(few):,} of {len(tested):,} classes have fewer than {FEWEST_WELLS} wells here"
            f"{lonely}: too few for an interval, so their numbers hold for these wells only. To "
            f"test more wells: ingest more replicates{'' if subject.folds else FOLDS}."
        )

    with questions.workspace.database.read() as session:
        others = {row.id: row for row in wells_relabelled(session, split.id) if row.id in truths}
    relabelled = []
    if others:
        named = [f"{row.name} ({row.frozen} -> {row.now or 'none'})" for row in others.values()]
        wrong = answering.well[~answering.correct]
        there = int(np.isin(wrong, list(others)).sum())
        relabelled.append(
            f"Relabelled since split {subject.split_name} was made, and scored by its label all "
            f"the same: {', '.join(named[:TOP])}{', ...' if len(named) > TOP else ''}. {there:,} "
            f"of the {wrong.size:,} wrong images are of such wells: there the label may be wrong, "
            "not the network. A new split takes the new labels."
        )

    calibration = []
    for level, vote in (("cell", "hard"), ("image", "soft")):
        some = given(answers[level, vote])
        if some.size:
            bins = statistics.calibration(some.confidence, some.correct)
            calibration += [
                CalibrationBin(
                    level,
                    vote,
                    low=float(bins.edges[i]),
                    high=float(bins.edges[i + 1]),
                    n=int(bins.n[i]),
                    confidence=float(bins.confidence[i]),
                    accuracy=float(bins.accuracy[i]),
                )
                for i in np.flatnonzero(bins.n)
            ]
    return ReportResult(
        run_id=run.id,
        train_run_id=run.parent_id,
        split=subject.split_name,
        protocol=split.protocol,
        group_level=str(split.group_level.value),
        field=str(split.field),
        subsets=subsets,
        classes=classes,
        chance=1 / max(1, classes),
        majority_label=majority,
        cells=cells.size,
        images=images.size,
        wells=answered.size,
        wells_seen=seen,
        leaks=seen > 0,
        leak=leak,
        notes=(*notes_on(questions, subject, counts, subsets, flagged), *too_few, *relabelled),
        scores=scores_of(answers, labels, majority, top=top),
        qc_run_id=subject.qc_run_id,
        images_flagged=flagged[0],
        cells_flagged=flagged[1],
        baselines=baselines,
        beats_nulls=beats,
        against_nulls=against,
        unseen=parts[0],
        without_controls=parts[1],
        by_class=tuple(by_class),
        by_plate=by_plate,
        by_target=by_target,
        by_dose=by_dose,
        by_well=by_well,
        calibration=tuple(calibration),
        vote_options=options,
        name=subject.name,
        folds=tuple(fold.id for fold in subject.folds),
    )


def declared_of(questions: Questions, subject: Subject) -> dict[str, Any] | None:
    """Return what was declared of the model, of several folds first where nothing was."""
    parents = [one.parent_id for one in subject.folds or (subject.run,)]
    found = [row for run in parents for row in questions.ask_ours(DECLARED, [run]).records()]
    return min(found, key=lambda row: row["trained_on"] is not None, default=None)


def score_group(
    name: str, every: Answers, close: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> GroupScore:
    """Return the score of a part of the images; ``close``: another compound of the same gene."""
    answering = mask & ~every.abstained
    some = every[answering]
    low, high = (well_interval(some.correct, some.well) if some.size else None) or (None, None)
    return GroupScore(
        name=name,
        n=some.size,
        correct=int(some.correct.sum()),
        accuracy=int(some.correct.sum()) / max(1, some.size),
        same_target=int(close[answering].sum()),
        wells=np.unique(some.well).size,
        labels=np.unique(some.truth).size,
        low=low,
        high=high,
        abstained=int(mask.sum()) - some.size,
    )


def scores_of(
    answers: ByKey, labels: Sequence[str], majority: str | None, *, top: bool
) -> tuple[Score, ...]:
    """Return the scores of every level and vote that has an answer.

    ``majority``: the most frequent label of the training images, if there is one; ``top``: whether
    five choices are kept of more than five classes.
    """
    cells = answers["cell", "hard"]
    unknown = int(np.isnan(cells.probability).sum())
    no_loss = None if cells.size else "The probability of the true label was not read."
    if unknown:
        no_loss = (
            f"The probability of the true label was not kept for {unknown:,} of "
            f"{cells.size:,} cells: label with cellstore predict --all-probabilities; a label "
            "that was not trained has none."
        )
    found = []
    for (level, vote), every in answers.items():
        some = given(every)
        if not some.size:
            continue
        counts = statistics.class_counts(some.truth, some.predicted, len(labels))
        low, high = well_interval(some.correct, some.well) or (None, None)
        always = None
        if majority is not None:
            code = labels.index(majority) if majority in labels else -1
            always = float(np.mean(some.truth == code))
        missing = no_loss
        top_known = top and bool(some.truth_rank.any())
        if level != "cell" and vote != "soft":
            missing = (
                f"A {vote} vote gives labels no probabilities that add up to 1: see the soft vote."
            )
        in_top = (some.truth_rank >= 1) & (some.truth_rank <= TOP)
        found.append(
            Score(
                level=level,
                vote=vote,
                n=some.size,
                correct=int(some.correct.sum()),
                accuracy=float(some.correct.mean()),
                low=low,
                high=high,
                majority=always,
                balanced_accuracy=counts.balanced_accuracy,
                macro_f1=counts.macro_f1,
                top_5=float(np.mean(in_top)) if top_known else None,
                ece=statistics.calibration(some.confidence, some.correct).error,
                ties=int(some.tie.sum()),
                log_loss=None if missing else statistics.log_loss(some.probability),
                log_loss_missing=missing,
                abstained=int(every.abstained.sum()),
                coverage=some.size / every.size,
            )
        )
    return tuple(found)


# Baselines


@dataclass(frozen=True)
class PairedComparison:
    """Which of two runs is better.

    ``difference`` of their accuracies, first minus second; ``test``: McNemar's test over wells;
    ``better`` by it, at 5 %: 1 the first, -1 the second, 0 neither, ``None`` where that cannot be
    said, and ``cannot_say`` is why.
    """

    difference: float
    test: WellTest
    better: int | None
    cannot_say: str | None


def judge(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    wells: NDArray[np.int64],
    seen_by_one: int = 0,
) -> PairedComparison:
    """Compare two runs on the same N units, as ``report`` and ``compare`` both do it.

    ``first`` and ``second`` are (N,): whether each is right; ``wells`` (N,): the well of each.
    ``seen_by_one``: how many of the wells one of the two has seen in training, and the other not.
    """
    gain = float(first.mean() - second.mean())
    test = mcnemar_over_wells(first, second, wells)
    reason = None
    if seen_by_one:
        reason = f"{seen_by_one:,} of {test.wells:,} wells were seen in training by one of the two"
    elif test.wells < FEWEST_WELLS:
        some = f"{test.wells} well{'' if test.wells == 1 else 's'}"
        reason = f"too few wells ({some} scored by both; {FEWEST_WELLS} or more are needed)"
    better = 0 if test.p_value >= SIGNIFICANT else 1 if gain > 0 else -1
    return PairedComparison(gain, test, None if reason else better, reason)


def score_rivals(
    questions: Questions, subject: Subject, subsets: Sequence[str], answers: ByKey
) -> tuple[BaselineScore, ...]:
    """Score the newest run of each baseline that has labelled all images that are scored.

    A level of which it lacks some is skipped. Where an option lets a baseline abstain, its answer
    counts all the same: it is scored on the very images that are scored.
    """
    found: list[BaselineScore] = []
    for (kind, name), runs in subject.rivals.items():
        for run in runs:
            scores = []
            for level in ("image", "well", "cell"):
                own = given(answers[level, "hard"])
                if not own.size:
                    continue
                query = RIVAL_ANSWERS if level == "cell" else VOTED_RIVAL_ANSWERS
                query = query.format(level=level)
                rows = questions.ask_ours(query, [run.id, list(subsets)]).arrays()
                keys, own_keys = (
                    unit * len(SUBSETS) + subset
                    for unit, subset in ((rows["unit_id"], rows["subset"]), (own.unit, own.subset))
                )
                common = np.isin(keys, own_keys)
                right = rows["correct"][common].astype(bool)
                if not own.size or not np.array_equal(rows["unit_id"][common], own.unit):
                    if level == "image":
                        break
                    continue
                low, high = well_interval(right, own.well) or (None, None)
                # Both learned from the training subset of one split.
                judged = judge(own.correct, right, own.well)
                scores.append(
                    BaselineScore(
                        baseline=kind,
                        name=name,
                        null=kind in NULLS,
                        run_id=run.id,
                        train_run_id=run.parent_id,
                        level=level,
                        vote="hard",
                        n=right.size,
                        accuracy=float(right.mean()),
                        low=low,
                        high=high,
                        p_value=judged.test.p_value,
                        beaten=None if judged.better is None else judged.better == 1,
                        cannot_say=judged.cannot_say,
                    )
                )
            if scores:
                found += scores
                break
    return tuple(found)


def against_nulls(
    rivals: Sequence[BaselineScore], own: str | None, split: str
) -> tuple[bool | None, str]:
    """Return whether a run is shown to be better than every null baseline, and the words on it.

    Of a network, they say too whether it is better than the other baselines of its split.

    ``None``: that cannot be said. ``own``: the baseline that is scored, if it is one. It is better
    than all where it is better than each by :func:`judge`: the largest p counts, so that however
    many baselines there are, an equally good run is called better in at most 5 % of cases (an
    intersection-union test: Berger, Technometrics 24, 1982).
    """
    command = f"Run: cellstore train --baseline null --split {shlex.quote(split)}"
    every = [item for item in rivals if (item.level, item.vote) == HEADLINE]
    nulls = [item for item in every if item.null]
    missing = [kind for kind in NULLS if kind not in {item.baseline for item in nulls} | {own}]

    def named(some: Sequence[BaselineScore]) -> str:
        texts = (f"{i.name} ({100 * i.accuracy:.1f} %, p = {i.p_value:.2g})" for i in some)
        return ", ".join(texts)

    test = "McNemar's test over wells"
    others, also = [] if own else [item for item in every if not item.null], ""
    if unbeaten := [item for item in others if not item.beaten]:
        also = f" Not shown to be better than these simple models: {named(unbeaten)}."
    elif others:
        also = f" Better than the simple models, too: {named(others)}."
    if own in NULLS:
        return None, f"These labels are those of a null baseline ({own}): what others have to beat."
    if not nulls:
        return (
            None,
            f"No null baseline has labelled these images, so they may be easy.{also} {command}",
        )
    if reasons := [item.cannot_say for item in nulls if item.cannot_say]:
        return None, (
            "Cannot say whether these labels are better than the null baselines: "
            f"{reasons[0]}. Null baselines: {named(nulls)}.{also}"
        )
    unbeaten = [item for item in nulls if not item.beaten]
    if unbeaten:
        return False, f"Not shown to be better per image than {named(unbeaten)}; {test}.{also}"
    if missing:
        rest = f"Not compared with: {', '.join(missing)}. {command}"
        return None, f"Better per image than {named(nulls)}; {test}.{also} {rest}"
    return True, f"Better per image than every null baseline: {named(nulls)}; {test}.{also}"


def notes_on(
    questions: Questions,
    subject: Subject,
    counts: Mapping[str, int],
    subsets: tuple[str, ...],
    flagged: tuple[int, int],
) -> tuple[str, ...]:
    """Return what a reader must know of the scored images, a sentence each."""
    run, options = subject.run, subject.vote_options
    notes = [*([subject.feature_leak] if subject.feature_leak else []), *subject.stale]
    trained_on = counts.get(Subset.TRAIN.value, 0)
    if subject.folds:
        numbers = ", ".join(str(fold.id) for fold in subject.folds)
        notes.append(
            f"Out of fold: each image is scored once, by the model of the one of "
            f"{len(subject.folds)} folds that tests it (predict runs {numbers}). So this is the "
            "score of training in this way, not of one network."
        )
    elif subject.split.family is not None:
        everything = shlex.quote(f"{subject.split.family}:{run.parent_id}")
        notes.append(
            f"Fold {subject.split.fold} of cross-validation {subject.split.family} alone. "
            f"All folds as one: cellstore report --run {everything}"
        )
    trained = run.parent.result if run.parent else None
    if trained and trained.get("validation_subset", "") is None:
        notes.append(
            "No image validated the network: nothing stopped its training, and the number of "
            f"epochs ({trained['best_epoch']}) was given."
        )
    if Subset.TRAIN.value in subsets:
        notes.append(f"Forced: {trained_on:,} of these images were used to train the network.")
    elif trained_on:
        notes.append(f"{trained_on:,} labelled training images are excluded (--force adds them).")
    if Subset.VALIDATION.value in subsets:
        notes.append("Validation images are scored, and they decided when training stopped.")
    if "outside" in subsets:
        notes.append("Images that the split does not name are scored by their treatment.")
    if run.status not in (Status.DONE, Status.WITHDRAWN):
        notes.append(f"The run is {Status(run.status).value}, so images may be missing here.")
    if options.min_cells > 1:
        notes.append(f"Images and wells with fewer than {options.min_cells} cells have no answer.")
    if options.min_margin > 0:
        notes.append(
            "Images and wells have no answer where the share of the first label is less than "
            f"{100 * options.min_margin:g} % above that of the second."
        )
    if not options.controls:
        notes.append("Control wells are excluded.")
    if subject.qc_run_id is not None:
        notes += subject.qc_notes
        notes.append(
            f"Excluded, because quality-control run {subject.qc_run_id} flagged them: "
            f"{flagged[0]:,} images and {flagged[1]:,} cells, those of the images included."
        )
    if annotated := questions.ask_ours(ANNOTATED).records():
        named = ", ".join(f"{row['n']:,} {row['level']}{'s'[: row['n'] != 1]}" for row in annotated)
        notes.append(f"Excluded by annotations, so that their cells have no vote: {named}.")
    if run.status == Status.DONE:
        values = [subject.splits, list(subsets), run.id]
        query = UNVOTED if questions.only_image_votes else UNLABELLED
        ((unlabelled,),) = questions.ask_ours(query, values).rows()
        if unlabelled:
            notes.append(
                f"{unlabelled:,} images of the scored subset have no label by this run, so no "
                "score counts them: no cell was found in them, or the run was not asked to label "
                "them."
            )
    return tuple(notes)
