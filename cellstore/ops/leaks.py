"""What a split gives away: checks on the rows of a split, whoever made it."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cellstore.terms import Subset


class LeakKind(StrEnum):
    """What may be wrong with a split."""

    WELL = "well"
    FILE = "file"
    SPELLING = "spelling"
    CLASS = "class"


@dataclass(frozen=True, slots=True)
class Member:
    """An image of a split.

    ``well`` and ``plate`` are names; the same well name on two plates is two wells. ``digests``
    are the SHA-256 of its files, as far as known.
    """

    image_id: int
    subset: Subset
    label: str
    well: str
    plate: str
    digests: tuple[str, ...] = ()
    pert_iname: str | None = None


@dataclass(frozen=True)
class Finding:
    """One kind of leak: how many wells, files, compounds or classes, and the first few."""

    kind: LeakKind
    message: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SplitCheck:
    """All findings (none: nothing found), and how much the sides share."""

    findings: tuple[Finding, ...]
    n_images: int
    n_wells: int
    n_labels: int
    wells_on_both_sides: int
    labels_on_both_sides: int
    plates_on_both_sides: int


def leaks(members: Iterable[Member], examples: int = 5) -> SplitCheck:
    """Look for the same well, the same file or the same compound on several sides.

    "Both sides" means at least two of train, validation and test. A class that is not in both
    train and test is a finding; labels that are on both sides are counted, being wanted. A
    compound counts as spelled in several ways where names differ only in case, spaces, hyphens
    or underscores, on whichever side: two spellings are two classes to a network.
    """
    rows = list(members)
    wells = _sides(rows, lambda m: [f"{m.plate} {m.well}"])
    labels = _sides(rows, lambda m: [m.label])
    plates = _sides(rows, lambda m: [m.plate])
    found = [
        _shared(LeakKind.WELL, wells, "wells have images on both sides", examples),
        _shared(LeakKind.FILE, _files(rows), "files are in images on both sides", examples),
        _spellings(rows, examples),
        _missing(labels, examples),
    ]
    return SplitCheck(
        findings=tuple(finding for finding in found if finding.count),
        n_images=len(rows),
        n_wells=len(wells),
        n_labels=len(labels),
        wells_on_both_sides=len(_both(wells)),
        labels_on_both_sides=len(_both(labels)),
        plates_on_both_sides=len(_both(plates)),
    )


def normalised_name(name: str) -> str:
    """``name`` without what spellings of a compound differ in: ``ME-0328`` becomes ``me0328``."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_\u002d\u2010-\u2015\u2212]", "", folded)


Sides = dict[str, set[Subset]]


def _sides(rows: Sequence[Member], keys: Callable[[Member], Iterable[str]]) -> Sides:
    sides: Sides = defaultdict(set)
    for row in rows:
        for key in keys(row):
            sides[key].add(row.subset)
    return sides


def _files(rows: Sequence[Member]) -> Sides:
    return _sides(rows, lambda member: member.digests)


def _both(sides: Mapping[str, set[Subset]]) -> list[str]:
    return sorted(key for key, seen in sides.items() if len(seen) > 1)


def _finding(kind: LeakKind, message: str, found: Sequence[str], examples: int) -> Finding:
    return Finding(kind, f"{len(found)} {message}", len(found), tuple(found[:examples]))


def _shared(kind: LeakKind, sides: Sides, message: str, examples: int) -> Finding:
    return _finding(kind, f"of {len(sides)} {message}.", _both(sides), examples)


def _missing(labels: Sides, examples: int) -> Finding:
    wanted = {Subset.TRAIN, Subset.TEST}
    found = [
        f"{label}: not in {' and '.join(sorted(wanted - seen))}"
        for label, seen in sorted(labels.items())
        if wanted - seen
    ]
    message = f"of {len(labels)} classes are missing in train or test."
    return _finding(LeakKind.CLASS, message, found, examples)


def _spellings(rows: Sequence[Member], examples: int) -> Finding:
    names: dict[str, Sides] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row.pert_iname is not None:
            names[normalised_name(row.pert_iname)][row.pert_iname].add(row.subset)
    found = [
        " = ".join(f"{name!r} ({', '.join(sorted(seen))})" for name, seen in sorted(same.items()))
        for _, same in sorted(names.items())
        if len(same) > 1
    ]
    message = "compounds are spelled in more than one way."
    return _finding(LeakKind.SPELLING, message, found, examples)
