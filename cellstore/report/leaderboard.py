"""The trainings on a split beside each other, the best first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Integer, Text, bindparam, text
from sqlalchemy.orm import Session

from ..enums import Subset
from ..errors import UnknownNameError
from ..jobs.run_names import Model, models_of
from ..jobs.workspace import Workspace
from ..learn.baselines import NULLS
from ..notebooks import Shown
from ..query.engine import open_questions

if TYPE_CHECKING:
    from numpy.typing import NDArray

ORDERS = ("test", "validation")

TRAINED_LAST = """
    SELECT s.id, s.name, s.family FROM runs AS r JOIN splits AS s ON s.id = r.split_id
    WHERE r.stage = 'train' ORDER BY r.id DESC LIMIT 1
"""
UNFINISHED = """
    SELECT r.id, r.split_id, r.status, r.command FROM runs AS r
    WHERE r.stage = 'train' AND r.status <> 'done' AND r.split_id IN :splits AND NOT EXISTS (
        SELECT 1 FROM runs AS other WHERE other.recipe_id = r.recipe_id
        AND other.split_id = r.split_id AND other.status = 'done'
    ) ORDER BY r.id
"""
ABOUT_RUNS = "SELECT id, command, result FROM runs WHERE id IN :runs"
WITHDRAWN = """
    SELECT parent_id, max(id) FROM runs WHERE status = 'withdrawn' AND parent_id IN :runs
    GROUP BY parent_id
"""
VALIDATED = """
    SELECT run_id, epoch, name, value FROM run_metrics
    WHERE run_id IN :runs AND name IN ('validation_loss', 'validation_accuracy')
"""
# Level, vote and subset are written out, so that DuckDB skips the others.
VOTES = """
    SELECT run_id, well_id, dense_rank() OVER (ORDER BY truth) AS truth, correct
    FROM votes
    WHERE level = 'image' AND vote = 'hard' AND subset = 'test' AND correct IS NOT NULL
"""


@dataclass(frozen=True)
class RankedRun(Shown):
    """A model, and its images of the test subset by hard votes.

    ``name`` is what ``report`` and ``compare`` call it: its train run, or those of all folds of a
    cross-validation (``train_runs``, labelled by ``predict_runs``). ``model``: network, the name of
    a baseline, or of a model that was declared. ``rank`` in its split counts from 1, alike for
    equal scores; ``None`` where there is no score, or one on fewer test images than others have
    labelled: ``status`` says why, ``then`` what to do.
    ``low`` and ``high`` bound the accuracy: 95 % interval over wells. ``validation_loss`` and
    ``validation_accuracy`` (share of cells) are those of the epoch that was kept, of folds their
    mean; ``None`` where no image validates, or, as published, those of the test do. ``differs``:
    parameters in which it differs from others of its kind.
    """

    name: str
    model: str
    split: str
    train_runs: tuple[int, ...]
    predict_runs: tuple[int, ...] = ()
    status: str = "done"
    rank: int | None = None
    images: int = 0
    correct: int = 0
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    wells: int = 0
    best_epoch: int | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    differs: Mapping[str, str] = field(default_factory=dict)
    then: str | None = None


@dataclass(frozen=True)
class Leaderboard(Shown):
    """The models on a split or a cross-validation, the best first.

    ``by``: whether test or validation images rank them; ``notes``: what a reader has to know.
    """

    split: str
    by: str
    runs: tuple[RankedRun, ...]
    notes: tuple[str, ...]


def list_runs(workspace: Workspace, split: str | None = None, *, by: str = "test") -> Leaderboard:
    """Return the models on a split, the best first; see :meth:`cellstore.Store.runs`.

    Networks, baselines and declared models count. Of trainings that are alike the last counts.
    """
    if by not in ORDERS:
        raise UnknownNameError.of("order", by, ORDERS)
    with workspace.database.read() as session:
        name, splits = _splits(session, split)
        models = models_of(session, list(splits))
        rows = [_row(session, name, splits, model) for model in models]
        unfinished = session.execute(_in(UNFINISHED, "splits"), {"splits": list(splits)}).all()
    read_as = {run: max(row.predict_runs) for row in rows for run in row.predict_runs}
    if read_as:
        with open_questions(workspace, runs=read_as, only_image_votes=True) as questions:
            votes = questions.ask_ours(VOTES).arrays()
        rows = [_scored(row, votes) if row.predict_runs else row for row in rows]
    parameters = [model.parameters for model in models]
    rows = _ranked(_apart(_on_fewer(rows), parameters), by)
    rows += [
        RankedRun(
            str(row.id),
            "not finished",
            splits[row.split_id],
            (row.id,),
            status=row.status,
            then=None if row.status == "running" else row.command,
        )
        for row in unfinished
    ]
    notes = []
    chosen = sum(row.rank is not None and row.model not in NULLS for row in rows)
    if chosen > 1:
        if by == "test":
            better = "No other image validates here: confirm it on wells that are in no subset."
            if any(row.validation_accuracy is not None for row in rows):
                better = (
                    "Choose by validation images instead (--by validation), and report the test "
                    "score of that one."
                )
            notes.append(
                f"The best of {chosen} models by test images looks better than it is on new wells, "
                f"because these very images chose it. {better}"
            )
        elif any(item.get("where") or item.get("sql") for item in parameters):
            notes.append(
                "A model for which cells were selected (--where, --sql) validates on such cells "
                "only: its validation accuracy is of other cells than that of the others."
            )
        if len(splits) > 1:
            notes.append(
                "What validates in one fold is tested in another, so in a cross-validation either "
                "choice makes the best look too good: confirm it on wells that are in no fold."
            )
    if by == "validation" and not chosen:
        notes.append(
            "No model here has a score on validation images. Networks get one, on a split with a "
            "validation subset beside its test subset."
        )
    return Leaderboard(name, by, tuple(rows), tuple(notes))


def _in(query: str, name: str) -> Any:
    return text(query).bindparams(bindparam(name, expanding=True))


def _splits(session: Session, split: str | None) -> tuple[str, dict[int, str]]:
    """Return the name of what is listed, and its splits: one, or that of each fold."""
    last = session.execute(text(TRAINED_LAST)).first()
    if last is None:
        raise UnknownNameError("There is no training yet. Next: cellstore train")
    splits = session.execute(text("SELECT id, name, family FROM splits ORDER BY id")).all()
    name = split or last.family or last.name
    ids = {row.id: row.name for row in splits if name in (row.name, row.family)}
    if not ids:
        known = dict.fromkeys(name for row in splits for name in (row.family, row.name) if name)
        raise UnknownNameError.of("split", name, list(known))
    return name, ids


def _row(session: Session, split: str, splits: Mapping[int, str], model: Model) -> RankedRun:
    """Return a model without its scores."""
    runs = [run for run in map(model.runs.get, splits) if run is not None]
    last, several = max(runs), len(splits) > 1
    query = _in(ABOUT_RUNS, "runs").columns(id=Integer, command=Text, result=JSON)
    about = {row.id: row for row in session.execute(query, {"runs": runs})}
    results = [about[run].result or {} for run in runs]
    best = {run: result.get("best_epoch") for run, result in zip(runs, results, strict=True)}
    validated = [
        run
        for run, result in zip(runs, results, strict=True)
        if result.get("validation_subset") != Subset.TEST
    ]
    values: dict[str, list[float]] = defaultdict(list)
    for row in session.execute(_in(VALIDATED, "runs"), {"runs": validated}):
        if row.epoch == best[row.run_id] and row.value is not None:
            values[row.name].append(row.value)
    means = {name: sum(some) / len(some) for name, some in values.items()}
    found = RankedRun(
        f"{split}:{last}" if several else str(last),
        model.kind or "network",
        split,
        tuple(runs),
        best_epoch=None if several else best[last],
        validation_loss=means.get("validation_loss"),
        validation_accuracy=means.get("validation_accuracy"),
    )
    labelled = [model.labelled[run] for run in runs if run in model.labelled]
    if len(labelled) == len(splits):
        return replace(found, predict_runs=tuple(labelled))
    withdrawn = dict(session.execute(_in(WITHDRAWN, "runs"), {"runs": runs}).all())
    if withdrawn:
        return replace(found, status="withdrawn")
    if several:
        status = f"{len(labelled)} of {len(splits)} folds"
        return replace(found, status=status, then=about[last].command)
    # A declared model is not opened: the command that brought it goes on with it.
    again = about[last].command if "declared" in model.parameters else None
    then = again or f"cellstore predict --run {last}"
    return replace(found, status="not predicted yet", then=then)


def _scored(row: RankedRun, votes: Mapping[str, NDArray[Any]]) -> RankedRun:
    """Return a model with the scores of its votes."""
    import numpy as np

    from ..analysis.statistics import well_interval

    mine = votes["run_id"] == max(row.predict_runs)
    correct, wells = votes["correct"][mine].astype(bool), votes["well_id"][mine]
    if not correct.size:
        return replace(row, status="no test images")
    low, high = well_interval(correct, wells) or (None, None)
    truths = votes["truth"][mine]
    return replace(
        row,
        images=correct.size,
        correct=int(correct.sum()),
        accuracy=float(correct.mean()),
        balanced_accuracy=float(np.mean([correct[truths == x].mean() for x in np.unique(truths)])),
        low=low,
        high=high,
        wells=np.unique(wells).size,
    )


def _on_fewer(rows: Sequence[RankedRun]) -> list[RankedRun]:
    """Say of which models fewer test images are known than of others.

    Perhaps these were the easy ones, so that they get no rank.
    """
    most = max((row.images for row in rows), default=0)
    return [
        replace(row, status=f"{row.images} of {most} test images labelled")
        if 0 < row.images < most
        else row
        for row in rows
    ]


def _apart(rows: Sequence[RankedRun], parameters: Sequence[dict[str, Any]]) -> list[RankedRun]:
    """Say of each model in which parameters it differs from others of its kind."""
    found = []
    for row, own in zip(rows, parameters, strict=True):
        others = [
            other for one, other in zip(rows, parameters, strict=True) if one.model == row.model
        ]
        names = dict.fromkeys(name for other in others for name in other)
        if not all("cells" in other for other in others):  # left out where a selection says it
            names.pop("cells", None)
        differs = {
            name: _shown(own.get(name))
            for name in names
            # Which cells were selected is said by the selection.
            if len({repr(one.get(name)) for one in others if name in one or name != "cells"}) > 1
        }
        found.append(replace(row, differs=differs))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    # Digests say that something is another, in few characters as well.
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _ranked(rows: Sequence[RankedRun], by: str) -> list[RankedRun]:
    """Return the rows in order, with their ranks; those without a score last."""

    def score(row: RankedRun) -> tuple[float, ...] | None:
        if by == "test":
            known = row.accuracy is not None and row.status == "done"
            return (row.accuracy or 0.0, row.balanced_accuracy or 0.0) if known else None
        if row.validation_accuracy is None:
            return None
        return row.validation_accuracy, -(row.validation_loss or 0.0)

    scored = sorted(((s, row) for row in rows if (s := score(row))), key=lambda x: x[0])[::-1]
    scores = [found for found, _ in scored]
    ranked = [replace(row, rank=1 + scores.index(found)) for found, row in scored]
    return [*ranked, *(row for row in rows if score(row) is None)]
