"""The baselines beside a score: on the same images, from the same split."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import or_, select
from sqlalchemy.orm import Session, aliased

from ...analytics import Questions
from ...db.models import Recipe, Run, Split
from ...ops.baselines import BASELINES, NULLS
from ...ops.intervals import bootstrap_interval
from ...runs import Workspace
from ...terms import Stage, Status
from .facts import BaselineScore, Score

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
