"""The label of every image, or well, by the vote of its cells."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from ..config import VoteRules
from ..enums import Status, Subset
from ..errors import UnknownNameError
from ..jobs.workspace import Workspace
from ..query.engine import open_questions
from ..query.predict_runs import flags_on, predict_run

LEVELS = ("image", "well")
VOTES = ("hard", "soft", "median")
SIDES = (Subset.TEST.value, "outside", Subset.VALIDATION.value, Subset.TRAIN.value)
"""Sides of a split, those that say most about new images first."""

# The vote is written out, so that DuckDB leaves out the other two.
QUERY = """
    SELECT p.barcode AS plate, w.name AS well, {place}, v.winner, v.votes, v.share, v.runner_up,
        v.margin, v.n_cells AS cells, v.tie, v.abstained, v.subset, v.truth, v.correct
    FROM {view} AS v
    {images}
    JOIN wells AS w ON w.id = v.well_id
    JOIN plates AS p ON p.id = w.plate_id
    LEFT JOIN treatments AS t ON t.id = w.treatment_id
    WHERE v.run_id = $run AND v.vote = '{vote}' AND ($controls OR t.control IS NULL)
    ORDER BY p.barcode, w."row", w."column", {order}
"""
PARTS = {
    "image": {
        "place": "i.site, v.image_id",
        "images": "JOIN images AS i ON i.id = v.image_id",
        "order": "i.site, i.time_point, i.plane, v.image_id",
    },
    "well": {"place": "v.well_id", "images": "", "order": "v.subset"},
}


@dataclass(frozen=True)
class SideVotes:
    """Answers of one side of the split: ``n`` without abstentions and with a known truth.

    ``accuracy``: ``correct / n``, None where nothing can be said.
    """

    subset: str
    n: int
    correct: int
    accuracy: float | None


@dataclass(frozen=True)
class VotesResult:
    """The votes of a predict run: one row of ``table`` per image, or well and side of the split.

    ``units``: how many images or wells there are, ``ties`` of which with a draw and ``abstained``
    without an answer. ``subset``, ``n``, ``correct`` and ``accuracy`` are of the first of
    ``sides``, None where no truth is known: the test side, if the run has labelled it.
    """

    run_id: int
    level: str
    vote: str
    rules: VoteRules
    units: int
    ties: int
    abstained: int
    sides: tuple[SideVotes, ...]
    notes: tuple[str, ...]
    table: pa.Table = field(repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers on the first of ``sides``."""
        return self.sides[0].accuracy if self.sides else None


def count_votes(
    workspace: Workspace,
    run: str = "latest",
    *,
    level: str = "image",
    vote: str = "hard",
    rules: VoteRules | None = None,
) -> VotesResult:
    """Let the cells of every image, or well, vote, as a predict run has labelled them.

    ``vote``: hard (each cell counts once, for its first choice), soft (with its probabilities) or
    median (of the probabilities that the cells gave). Columns of the table: plate, well, site and
    image_id (or well_id), winner, votes (cells, summed probability, or the median), share (of the
    cells), runner_up, margin (share above the runner-up's), cells, tie, abstained (few cells,
    close, or null), subset, truth, correct. Ties are broken by summed probability, then label.

    Raises:
        UnknownNameError: there is no such predict run, level, vote, or quality-control run.
        UserInputError: the quality-control run has not looked at these images or cells.
    """
    for kind, given, known in (("level", level, LEVELS), ("vote", vote, VOTES)):
        if given not in known:
            raise UnknownNameError.of(kind, given, known)
    rules = rules or VoteRules()
    with workspace.database.read() as session:
        found = predict_run(session, run)
        run_id, status = found.id, Status(found.status)
        flags, notes = flags_on(session, rules.exclude_flagged, found)
    if flags is not None:
        rules = replace(rules, exclude_flagged=str(flags))
    if status != Status.DONE:
        notes += (f"The run is {status.value}, so images may be missing here.",)
    short = level == "image" and vote != "median"  # nothing of single labels is asked for
    view = "image_answers" if short else f"{level}_votes"
    query = QUERY.format(view=view, vote=vote, **PARTS[level])
    with open_questions(workspace, rules=rules, runs=[run_id]) as questions:
        table = questions.ask_ours(query, {"run": run_id, "controls": rules.controls})
    return _result(run_id, level, vote, rules, notes, table)


def _result(
    run_id: int, level: str, vote: str, rules: VoteRules, notes: tuple[str, ...], table: pa.Table
) -> VotesResult:
    return VotesResult(
        run_id=run_id,
        level=level,
        vote=vote,
        rules=rules,
        units=table.num_rows,
        ties=_count(table["tie"]),
        abstained=table.num_rows - table["abstained"].null_count,
        sides=_sides(table),
        notes=notes,
        table=table,
    )


def _sides(table: pa.Table) -> tuple[SideVotes, ...]:
    found = []
    for side in SIDES:
        correct = table.filter(pc.equal(table["subset"], side))["correct"]
        n, right = len(correct) - correct.null_count, _count(correct)
        if n:
            found.append(SideVotes(side, n, right, right / n))
    return tuple(found)


def _count(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)
