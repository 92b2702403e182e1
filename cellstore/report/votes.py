"""The label of every image, or well, by the vote of its cells."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..config import VoteRules
from ..enums import Status, Subset
from ..errors import UnknownNameError
from ..jobs.workspace import Workspace
from ..query.engine import open_questions
from ..query.predict_runs import flags_on, predict_run

if TYPE_CHECKING:
    import pyarrow as pa

LEVELS = ("image", "well")
VOTES = ("hard", "soft", "median")
SUBSETS = (Subset.TEST.value, "outside", Subset.VALIDATION.value, Subset.TRAIN.value)
"""Subsets of a split, those that say most about new images first."""

# Level and vote are written out, so that DuckDB leaves out the others.
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


@dataclass(frozen=True)
class SubsetVotes:
    """Answers of one subset of the split: ``n`` without abstentions and with a known truth.

    ``accuracy``: ``correct / n``, None where nothing can be said.
    """

    subset: str
    n: int
    correct: int
    accuracy: float | None


@dataclass(frozen=True)
class VotesResult:
    """The votes of a predict run: one row of ``table`` per image, or well and subset of the split.

    ``units``: how many images or wells there are, ``ties`` of which with a draw and ``abstained``
    without an answer. ``subsets``: those with a known truth, the test subset first if the run has
    labelled it.
    """

    run_id: int
    level: str
    vote: str
    rules: VoteRules
    units: int
    ties: int
    abstained: int
    subsets: tuple[SubsetVotes, ...]
    notes: tuple[str, ...]
    table: pa.Table = field(repr=False, compare=False)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers on the first of ``subsets``."""
        return self.subsets[0].accuracy if self.subsets else None


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
    query = QUERY.format(level=level, vote=vote, **PARTS[level])
    kept = level == "image" and vote != "median"
    with open_questions(workspace, rules=rules, runs=[run_id], only_image_votes=kept) as questions:
        table = questions.ask_ours(query, {"run": run_id})
    correct_by_subset: dict[str, list[bool]] = {}
    for subset, correct in zip(
        table["subset"].to_pylist(), table["correct"].to_pylist(), strict=True
    ):
        if correct is not None:
            correct_by_subset.setdefault(subset, []).append(correct)
    subsets = tuple(
        SubsetVotes(subset, len(some), sum(some), sum(some) / len(some))
        for subset in SUBSETS
        if (some := correct_by_subset.get(subset))
    )
    return VotesResult(
        run_id=run_id,
        level=level,
        vote=vote,
        rules=rules,
        units=table.num_rows,
        ties=sum(table["tie"].to_pylist()),
        abstained=table.num_rows - table["abstained"].null_count,
        subsets=subsets,
        notes=notes,
        table=table,
    )
