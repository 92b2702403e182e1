"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analytics import Questions
from ...artifacts import write_atomically
from ...config import VoteRules
from ...drawing.page import render
from ...errors import CellstoreError
from ...extras import need
from ...runs import Workspace
from ...settings import check_not_of_a_store
from .facts import ClassScore, GroupScore, ReportResult, by_baseline
from .rivals import HEADLINE
from .score import Evidence, gathered
from .subject import Subject

if TYPE_CHECKING:
    from .confusion import Confusion

METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"
NAMED_ROWS = 40
"""Rows of a dot plot that has room for their names."""
LISTED = 12
"""Rows of a table that are shown at once; the others unfold."""


def write_report(
    workspace: Workspace,
    run: str,
    path: Path,
    *,
    compare: str | None = None,
    rules: VoteRules | None = None,
    force: bool = False,
    leave_out_flagged: str | None = None,
    maps: Sequence[str] = (),
    redo: Callable[[int], str] | None = None,
) -> ReportResult:
    """Write the report on a predict run as one HTML file; see :func:`report` for the options.

    ``maps``: features to show on plate maps, each a column of a feature set or SET.COLUMN.
    ``redo`` tells the commands that redo a run; without it the page has those that were typed.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UnknownNameError: there is no such run or feature.
        UserInputError: there is nothing to report on.
    """
    need("report")
    with gathered(
        workspace,
        run,
        compare=compare,
        rules=rules,
        force=force,
        leave_out_flagged=leave_out_flagged,
    ) as (questions, subject, evidence):
        content = _content(workspace, questions, subject, evidence, maps)
        content["script"] = _script(redo, subject.run.id)
    check_not_of_a_store(path)
    write_atomically(path, render("cellstore.stages.report", content).encode())
    return replace(evidence.result, html=str(path))


def _content(
    workspace: Workspace,
    questions: Questions,
    subject: Subject,
    evidence: Evidence,
    wanted: Sequence[str],
) -> dict[str, Any]:
    from .pictures import pictures
    from .provenance import provenance

    result = evidence.result
    images = evidence.images.to_pylist()
    hard = [row for row in images if row["vote"] == "hard"]
    return {
        "result": result,
        "run": subject.run,
        "baseline": subject.baseline,
        **_scores(result),
        **_classes(result, hard),
        **_groups(result),
        **_plates(questions, subject, hard, wanted),
        **_training(questions, subject),
        "pictures": pictures(workspace, questions, subject.run.id, images, result.comparison),
        "from": provenance(questions, subject),
    }


def _script(redo: Callable[[int], str] | None, run_id: int) -> str | None:
    try:
        return None if redo is None else redo(run_id)
    except CellstoreError as error:
        return f"# {error}"


def _scores(result: ReportResult) -> dict[str, Any]:
    from . import figures

    best = result.score(*HEADLINE)
    unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
    return {
        "best": best,
        "unseen": unseen,
        "standing": figures.standing(result, best, unseen),
        "levels": figures.levels(result.scores, result.chance),
        "rival_rows": by_baseline(result.baselines),
        "reliability": figures.reliability(result.calibration) if result.calibration else None,
        "overconfidence": _overconfidence(result),
        "agreement": _agreement(result),
    }


def _overconfidence(result: ReportResult) -> float | None:
    """By how much the cells' confidence is above their accuracy, on average."""
    bins = [item for item in result.calibration if item.level == "cell"]
    total = sum(item.n for item in bins)
    if not total:
        return None
    return sum(item.n * (item.confidence - item.accuracy) for item in bins) / total


def _agreement(result: ReportResult) -> str | None:
    from . import figures

    found = result.comparison
    if found is None:
        return None
    first, second = (f"run {side.run_id}" for side in (found.first, found.second))
    counts = {
        "both right": found.both_right,
        f"only {first} right": found.only_first,
        f"only {second} right": found.only_second,
        "both wrong": found.both_wrong,
    }
    return figures.shares_of(first, second, counts)


def _classes(result: ReportResult, hard: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from . import confusion, figures

    genes = {item.label: item.target for item in result.by_class}
    pairs = [(row["truth"], row["predicted"]) for row in hard if row["correct"] is not None]
    found = confusion.confusion_of(pairs, genes)
    taken = _taken_for(found)
    by_recall = sorted(result.by_class, key=lambda item: (-(item.recall or 0), item.label))
    true = [item for item in by_recall if item.support]
    recalls = None
    if true:
        recalls = (
            figures.dots(
                "recalls",
                [_class_dot(item) for item in true],
                _recall_words(true),
                label="images found, %",
            )
            if len(true) <= NAMED_ROWS
            else figures.ranked([item.recall or 0 for item in true])
        )
    return {
        "confusion": found,
        "matrices": _matrices(found),
        "class_rows": [(item, taken.get(item.label)) for item in by_recall],
        "recalls": recalls,
        "listed": LISTED,
    }


def _matrices(found: Confusion) -> list[tuple[str, str, bool]]:
    """Return the matrices that can be read: what is to be said, the figure, if it has names."""
    from . import confusion

    number = len(found.labels)
    if number <= confusion.NAMED:
        return [("", confusion.figure_of("confusion", found), True)]
    shown: list[tuple[str, str, bool]] = []
    block = confusion.most_confused(found)
    if block:
        some = found.only(block)
        words = (
            f"The {len(block)} classes between which most mistakes are. Answers outside this "
            "block are not drawn, so a row need not be full."
        )
        shown.append((words, confusion.figure_of("most confused", some), True))
    genes = confusion.by_gene(found)
    if found.grouped and len(genes.labels) <= confusion.NAMED:
        words = "The same by target gene: the diagonal holds every image whose gene is right."
        shown.append((words, confusion.figure_of("genes", genes, what="gene of the label"), True))
    words = f"All {number} classes, those of a gene beside each other, in order of gene and name."
    shown.append((words, confusion.figure_of("confusion", found), False))
    return shown


def _taken_for(found: Confusion) -> dict[str, tuple[str, int]]:
    """Return what each class was most often mistaken for, and how often."""
    mistakes = found.counts.copy()
    mistakes[range(len(mistakes)), range(len(mistakes))] = 0
    most = mistakes.argmax(axis=1)
    return {
        label: (found.labels[place], int(mistakes[row, place]))
        for row, (label, place) in enumerate(zip(found.labels, most.tolist(), strict=True))
        if mistakes[row, place]
    }


def _class_dot(item: ClassScore) -> Any:
    from .figures import Dot

    return Dot(item.label, item.recall, item.low, item.high)


def _recall_words(rows: Sequence[ClassScore]) -> str:
    best, worst = rows[0], rows[-1]
    return (
        f"Share of the images of each class that were found, from {best.label} "
        f"({100 * (best.recall or 0):.0f} %) to {worst.label} ({100 * (worst.recall or 0):.0f} %)."
    )


def _groups(result: ReportResult) -> dict[str, Any]:
    targets = sorted(result.by_target, key=lambda item: (-item.accuracy, item.name))
    return {
        "targets": targets,
        "target_figure": _group_figure("targets", targets) if len(targets) > 1 else None,
        "plate_figure": (
            _group_figure("plates", result.by_plate) if len(result.by_plate) > 1 else None
        ),
    }


def _group_figure(name: str, rows: Sequence[GroupScore]) -> str | None:
    """Accuracy of each group, the orange mark where the gene counts as right too."""
    from . import figures

    if len(rows) > NAMED_ROWS:
        return None
    dots = [
        figures.Dot(
            item.name,
            item.accuracy,
            item.low,
            item.high,
            mark=(item.correct + item.same_target) / max(1, item.n) if item.same_target else None,
        )
        for item in rows
    ]
    said = ", ".join(f"{item.name} {100 * item.accuracy:.0f} %" for item in rows)
    return figures.dots(name, dots, f"Accuracy of images by {name[:-1]}: {said}.")


def _plates(
    questions: Questions,
    subject: Subject,
    hard: Sequence[Mapping[str, Any]],
    wanted: Sequence[str],
) -> dict[str, Any]:
    from . import maps

    plates = maps.plates_of(questions, sorted({row["well_id"] for row in hard}))
    found = maps.measures(questions, subject.run.id, hard, wanted)
    return {
        "map_groups": maps.drawn(plates, found),
        "more_plates": max(0, len(plates) - maps.SHOWN_PLATES),
        "measured": len(found) > 2,
    }


def _training(questions: Questions, subject: Subject) -> dict[str, Any]:
    from . import figures

    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in questions.ask(METRICS, [subject.run.parent_id]).to_pylist():
        if row["value"] is not None:
            metrics[row["name"]].append((row["epoch"], row["value"]))
    drawn = any(name.endswith(("_loss", "_accuracy")) for name in metrics)
    return {"curves": figures.training_curves(metrics) if drawn else None}
