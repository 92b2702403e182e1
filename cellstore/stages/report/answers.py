"""The answers of a run as arrays, and the scores of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...analytics import Questions
from ...ops import scores
from ...ops.intervals import bootstrap_interval
from .facts import CalibrationBin, Score

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
VOTES = {
    level: f"""
    SELECT level, vote, {COLUMNS} FROM verdicts
    WHERE run_id = ? AND level = '{level}' ORDER BY vote, unit_id
    """  # noqa: S608 - our own words
    for level in ("image", "well")
}
CELLS = f"""
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
    return pa.concat_tables([questions.ask(query, [run_id]) for query in VOTES.values()])


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
    found = (_score(key, item, scale, missing) for key, item in answers.items())
    return tuple(item for item in found if item is not None)


def scores_where(
    answers: ByKey, scale: Scale, keep: Callable[[Answers], NDArray[np.bool_]]
) -> tuple[Score, ...]:
    """Return the scores of a part; empty if that is all there is, or nothing."""
    masks = {key: keep(item) for key, item in answers.items()}
    if all(mask.all() for mask in masks.values()):
        return ()
    return scores_of({key: answers[key].where(mask) for key, mask in masks.items()}, scale)


def _score(key: tuple[str, str], every: Answers, scale: Scale, missing: str | None) -> Score | None:
    given = every.given
    if not given.unit.size:
        return None
    counts = scores.class_counts(given.truth, given.predicted, len(given.labels))
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
        balanced_accuracy=scores.balanced_of(counts),
        macro_f1=scores.macro_f1_of(counts),
        top_5=_top(given.place) if scale.top else None,
        ece=scores.expected_calibration_error(given.confidence, correct),
        ties=int(given.tie.sum()),
        log_loss=None if missing else scores.log_loss(given.probability),
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
    found = scores.calibration(given.confidence, given.correct)
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
