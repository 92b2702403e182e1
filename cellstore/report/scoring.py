"""How good the labels of a predict run are, in numbers."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis import statistics
from ..analysis.statistics import FEWEST_WELLS, well_interval
from ..config import RunName, VoteOptions
from ..db.fields import wells_relabelled
from ..enums import PERTURBATION, TREATMENT, Status, Subset
from ..errors import UserInputError
from ..jobs.workspace import Workspace
from ..learn.baselines import NULLS
from ..notebooks import Shown
from ..query.engine import Questions, open_questions
from .answers import (
    Answers,
    ByKey,
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
from .comparison import Comparison, compare_subjects
from .votes import SUBSETS, VOTES


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
    of -log(probability of the truth) in nats, ``None`` where a probability was not kept, and of
    hard and median votes, whose shares do not add up to 1.
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
    or nothing is left. ``by_class``, ``by_plate`` and ``by_target`` (empty unless the labels
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

ABOUT_RUN = """
    SELECT
        (SELECT count(DISTINCT label_id) FROM split_members WHERE split_id = $split) AS classes,
        (
            SELECT l.value FROM split_members AS m JOIN labels AS l ON l.id = m.label_id
            WHERE m.split_id = $split AND ($folds OR m.subset = 'train')
            GROUP BY l.value ORDER BY count(*) DESC, l.value LIMIT 1
        ) AS majority
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


def report(
    workspace: Workspace,
    run: RunName = "latest",
    *,
    compare: RunName | None = None,
    vote_options: VoteOptions | None = None,
    force: bool = False,
    only_images: bool = False,
    look: Callable[[Questions, Subject, ReportResult], object] | None = None,
) -> ReportResult:
    """Score a predict run; see :meth:`cellstore.Store.report`.

    ``only_images``: wells and single cells are not scored, nor the ranks of labels that did not
    win, so that millions of cells take a second. ``look`` is called with what the result was read
    from, and the result.
    """
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
        votes = read_answers(questions, run_id, "image", ranks=not only_images)
        if not only_images:
            votes |= read_answers(questions, run_id, "well", ranks=True)
        images = np.bincount(votes[HEADLINE].subset, minlength=len(SUBSETS))
        counts = {name: int(n) for name, n in zip(SUBSETS, images, strict=True) if n}
        if not counts:
            narrowed = [] if options.exclude_flagged is None else ["--exclude-flagged"]
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
        votes = {key: x[np.isin(x.subset, scored)] for key, x in votes.items()}
        answers = {key: x[first_rows(x)] for key, x in votes.items()}
        if only_images:
            answers = {key: answers.get(key, answers[HEADLINE][:0]) for key in KEYS}
        else:
            answers |= read_answers(questions, run_id, "cell", ("hard",), subsets=subsets)
        if not given(answers[HEADLINE]).size:
            raise UserInputError(
                f"No image that run {subject.name} has labelled gets a label with these options. "
                "Lower --min-cells or --min-margin."
            )
        result = score_answers(questions, subject, answers, labels, counts, subsets)
        if other is not None:
            compared = compare_subjects(questions, subject, other, force=force)
            result = replace(result, comparison=compared)
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
    ((classes, majority),) = questions.ask_ours(ABOUT_RUN, values).rows()
    top = classes > TOP and (subject.top_k is None or subject.top_k >= TOP)
    known = seen_wells(questions, run.id)
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
    if options.exclude_flagged is not None:
        values = [run.id, list(subsets), options.controls]
        ((every_image, every_cell),) = questions.ask_ours(ALL_IMAGES, values).rows()
        flagged = (every_image - images.size, every_cell - cells.size)
    unseen: tuple[Score, ...] = ()
    if seen:  # else it would say nothing new
        others = {key: item[~np.isin(item.well, known)] for key, item in answers.items()}
        unseen = scores_of(others, labels, majority, top=top)
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

    f1, _, _ = statistics.class_f1(answering.truth, answering.predicted, len(labels))
    times_predicted = np.bincount(answering.predicted, minlength=len(labels))
    of_cells = np.bincount(cells.truth, minlength=len(labels))
    right_cells = np.bincount(cells.truth[cells.correct], minlength=len(labels))
    by_class = []
    for code, label in enumerate(labels):
        group = score_group(label, images, close, images.truth == code)
        predicted = int(times_predicted[code])
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
                    f1=float(np.nan_to_num(f1[code])),
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
    seen_in_training = set(known.tolist())
    by_well = tuple(
        WellScore(
            plate=row["plate"],
            well=row["name"],
            truth=labels[truths[row["id"]]],
            predicted=labels[of_well[row["id"]]] if row["id"] in of_well else None,
            n=scored[row["id"]],
            correct=right_ones[row["id"]],
            seen=row["id"] in seen_in_training,
        )
        for row in positions
    )

    tested = [item for item in by_class if item.wells]
    few = [item for item in tested if item.low is None]
    missing = []
    if few:
        single = [item.label for item in few if item.wells == 1]
        some_of = f"{', '.join(single[:TOP])}{', ...' if len(single) > TOP else ''}"
        lonely = f", {len(single):,} of them one well only ({some_of})" if single else ""
        missing.append(
            f"{len(few):,} of {len(tested):,} classes have fewer than {FEWEST_WELLS} wells here"
            f"{lonely}: too few for an interval, so their numbers hold for these wells only. To "
            f"test more wells: ingest more replicates{'' if subject.folds else FOLDS}."
        )

    unknown = int(np.isnan(cells.probability).sum())
    if unknown:
        missing.append(
            f"No log loss: the probability of the true label was not kept for {unknown:,} of "
            f"{cells.size:,} cells. To keep it: cellstore predict --all-probabilities"
        )

    with questions.workspace.database.read() as session:
        now = {row.id: row for row in wells_relabelled(session, split.id) if row.id in truths}
    relabelled = []
    if now:
        named = [f"{row.name} ({row.frozen} -> {row.now or 'none'})" for row in now.values()]
        wrong = answering.well[~answering.correct]
        there = int(np.isin(wrong, list(now)).sum())
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
            bins, _ = statistics.calibration(some.confidence, some.correct)
            calibration += [CalibrationBin(level, vote, *row) for row in bins]
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
        notes=(*notes_on(questions, subject, counts, subsets, flagged), *missing, *relabelled),
        scores=scores_of(answers, labels, majority, top=top),
        qc_run_id=None if options.exclude_flagged is None else int(options.exclude_flagged),
        images_flagged=flagged[0],
        cells_flagged=flagged[1],
        baselines=baselines,
        beats_nulls=beats,
        against_nulls=against,
        unseen=unseen,
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
    of_cells = answers["cell", "hard"].probability
    whole = of_cells.size > 0 and not np.isnan(of_cells).any()
    found = []
    for (level, vote), every in answers.items():
        some = given(every)
        if not some.size:
            continue
        _, balanced, macro_f1 = statistics.class_f1(some.truth, some.predicted, len(labels))
        low, high = well_interval(some.correct, some.well) or (None, None)
        always = None
        if majority is not None:
            code = labels.index(majority) if majority in labels else -1
            always = float(np.mean(some.truth == code))
        top_known = top and bool(some.truth_rank.any())
        known = whole and (level == "cell" or vote == "soft")
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
                balanced_accuracy=balanced,
                macro_f1=macro_f1,
                top_5=float(np.mean(in_top)) if top_known else None,
                ece=statistics.calibration(some.confidence, some.correct)[1],
                ties=int(some.tie.sum()),
                log_loss=statistics.log_loss(some.probability) if known else None,
                abstained=int(every.abstained.sum()),
                coverage=some.size / every.size,
            )
        )
    return tuple(found)


# Baselines


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
                theirs = read_answers(questions, run.id, level, ("hard",), subsets=subsets)
                theirs = theirs[level, "hard"]
                theirs = theirs[np.isin(in_subset(theirs), in_subset(own))]
                if not np.array_equal(theirs.unit, own.unit):
                    if level == "image":
                        break
                    continue
                right = theirs.correct.astype(bool)
                low, high = well_interval(right, own.well) or (None, None)
                # Both learned from the training subset of one split.
                test, better, cannot_say = judge(own.correct, right, own.well)
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
                        p_value=test.p_value,
                        beaten=None if better is None else better == 1,
                        cannot_say=cannot_say,
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
    notes = [*subject.notes, *subject.stale]
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
    if options.exclude_flagged is not None:
        notes.append(
            f"Excluded, because quality-control run {options.exclude_flagged} flagged them: "
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
