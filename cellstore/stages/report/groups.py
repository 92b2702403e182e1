"""The images of a report by class, plate, target gene and well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ...analytics import Questions
from ...ops import scores
from ...ops.intervals import bootstrap_interval
from .answers import Answers
from .facts import ClassScore, GroupScore, WellScore

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
    counts = scores.class_counts(given.truth, given.predicted, len(given.labels))
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
