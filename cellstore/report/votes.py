"""The label of every image, or well, by the vote of its cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.orm import Session

from ..config import RunName, VoteOptions
from ..enums import Status, Subset
from ..errors import UnknownNameError
from ..jobs.run_names import find_predict_run
from ..jobs.workspace import Workspace
from ..notebooks import Shown
from ..query.engine import Answer, open_questions

if TYPE_CHECKING:
    import pyarrow as pa

LEVELS = ("image", "well")
VOTES = ("hard", "soft", "median")
SUBSETS = (Subset.TEST.value, "outside", Subset.VALIDATION.value, Subset.TRAIN.value)
"""Subsets of a split, those that say most about new images first."""

# Level and vote are written out, so that DuckDB skips the others.
QUERY = """
    SELECT v.plate, v.well, {columns}, v.winner, v.votes, v.share, v.runner_up, v.margin,
        v.n_cells AS cells, v.tie, v.abstained, v.subset, v.truth, v.correct
    FROM votes AS v
    {joined}
    WHERE v.run_id = $run AND v.level = '{level}' AND v.vote = '{vote}'
    ORDER BY v.plate, w.well_row, w.well_column, {order}
"""
PARTS = {
    "image": {
        "columns": "v.site, v.image_id",
        "joined": "JOIN images AS i ON i.id = v.image_id JOIN wells AS w ON w.id = i.well_id",
        "order": "i.site, i.time_point, i.plane, v.image_id",
    },
    "well": {
        "columns": "v.well_id",
        "joined": "JOIN wells AS w ON w.id = v.well_id",
        "order": "v.subset",
    },
}
# With GROUPING SETS a row of all subsets comes along, in which a well counts once.
SUMMARY = """
    SELECT subset, count(DISTINCT {unit}) AS units, count(DISTINCT {unit}) FILTER (tie) AS ties,
        count(DISTINCT {unit}) FILTER (abstained IS NOT NULL) AS abstained,
        count(correct) AS n, count(*) FILTER (correct) AS correct
    FROM counted_votes GROUP BY GROUPING SETS ((), (subset))
"""


# SQLite joins in the order that is written with CROSS JOIN: few images have changed.
STALE = """
    SELECT count(DISTINCT s.image_id), count(*)
    FROM segmentations AS s
    CROSS JOIN images AS i CROSS JOIN cells AS c CROSS JOIN predictions AS p
    WHERE i.id = s.image_id AND s.content_sha256 IS NOT NULL
    AND (i.content_sha256 IS NULL OR i.content_sha256 <> s.content_sha256)
    AND c.segmentation_id = s.id AND p.cell_id = c.id AND p.run_id = :run AND p.rank = 1
"""


@dataclass(frozen=True)
class SubsetVotes:
    """Answers of one subset of the split: ``n`` without abstentions and with a known truth.

    ``accuracy``: ``correct / n``.
    """

    subset: str
    n: int
    correct: int
    accuracy: float


@dataclass(frozen=True)
class VotesResult(Shown):
    """The votes of a predict run; ``table`` holds their rows, where these were asked for.

    ``units``: how many images or wells there are, ``ties`` of which with a draw and ``abstained``
    without an answer; a well whose images are in several subsets has a row and an answer in each,
    and counts once. ``subsets``: those with a known truth, the test subset first if the run has
    labelled it. ``name``: the number of the run, or what was typed for the folds of a
    cross-validation, which are read as one.
    """

    run_id: int
    level: str
    vote: str
    vote_options: VoteOptions
    units: int
    ties: int
    abstained: int
    subsets: tuple[SubsetVotes, ...]
    notes: tuple[str, ...]
    name: str = ""
    table: pa.Table | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers on the first of ``subsets``."""
        return self.subsets[0].accuracy if self.subsets else None


def check_vote(level: str, vote: str) -> None:
    """Refuse a level or vote that there is not."""
    for kind, given, known in (("level", level, LEVELS), ("vote", vote, VOTES)):
        if given not in known:
            raise UnknownNameError.of(kind, given, known)


@contextmanager
def open_votes(
    workspace: Workspace,
    run: RunName = "latest",
    *,
    level: str = "image",
    vote: str = "hard",
    vote_options: VoteOptions | None = None,
    ties_only: bool = False,
) -> Iterator[tuple[VotesResult, Answer]]:
    """Let the cells of every image, or well, vote; see :meth:`cellstore.Store.votes`.

    The answer has a row for each image, or well and subset of the split; ties are broken by summed
    probability, then label. ``ties_only``: only rows with a tie; the summary is of all.
    """
    check_vote(level, vote)
    with workspace.database.read() as session:
        found = find_predict_run(session, run)
        options = vote_options or VoteOptions()
        notes: tuple[str, ...] = ()
        if options.exclude_flagged is not None:
            from ..query.exclusions import (
                with_flags,  # with the classes of the tables: slow to load
            )

            options, notes = with_flags(session, options, found)
        for fold in found.read_as:
            notes += stale_cells(session, fold)
    if found.status not in (Status.DONE, Status.WITHDRAWN):
        notes += (f"The run is {found.status.value}, so images may be missing here.",)
    with open_questions(
        workspace,
        vote_options=options,
        runs=found.read_as,
        only_image_votes=level == "image" and vote != "median",
    ) as questions:
        query = QUERY.format(level=level, vote=vote, **PARTS[level])
        questions.keep("counted_votes", query, {"run": found.id})
        counts = questions.ask_ours(SUMMARY.format(unit=f"{level}_id")).records()
        by_subset = {row["subset"]: row for row in counts if row["n"]}
        (total,) = (row for row in counts if row["subset"] is None)
        result = VotesResult(
            run_id=found.id,
            level=level,
            vote=vote,
            vote_options=options,
            units=total["units"],
            ties=total["ties"],
            abstained=total["abstained"],
            subsets=tuple(
                SubsetVotes(subset, row["n"], row["correct"], row["correct"] / row["n"])
                for subset in SUBSETS
                if (row := by_subset.get(subset))
            ),
            notes=notes,
            name=found.name or str(found.id),
        )
        yield result, questions.ask_ours(f"FROM counted_votes {'WHERE tie' if ties_only else ''}")


def stale_cells(session: Session, run_id: int) -> tuple[str, ...]:
    """Return sentences on a predict run: that it was withdrawn; that images have changed since."""
    withdrawn: tuple[str, ...] = ()
    run = session.execute(text("SELECT status, error FROM runs WHERE id = :run"), {"run": run_id})
    if (row := run.one()).status == Status.WITHDRAWN.value:
        withdrawn = (f"Run {run_id} was withdrawn: {row.error}. Do not rely on it.",)
    images, cells = session.execute(text(STALE), {"run": run_id}).one()
    if not images:
        return withdrawn
    what = f"{cells:,} cells of {images:,} images come from older bytes of these images"
    mend = "Find the cells again: cellstore segment; then measure and predict again."
    return (*withdrawn, f"Run {run_id}: {what}. {mend}")
