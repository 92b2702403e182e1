"""What a split gives away: checks on the rows of a split, whoever made it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..enums import GroupLevel, Subset
from ..notebooks import Shown

_BROAD = re.compile(r"BRD-[A-Z]\d{8}(?=-|$)")
"""A Broad compound: what follows (``-001-02-4``) names its salt, batch and supplier."""


@dataclass(frozen=True, slots=True)
class Compound:
    """What tables say of a treatment; each may be unknown.

    Names of equal ``spelling`` are one name, written in two ways.
    """

    name: str | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None
    spelling: str | None = None

    @property
    def structure(self) -> tuple[str, ...]:
        """What names its structure or stock: equal ones are one compound under any name."""
        broad = _BROAD.match(self.identifier or "")
        known = (
            ("identifier", broad[0] if broad else self.identifier),
            ("InChIKey", self.inchikey and self.inchikey.upper()),
            ("SMILES", self.smiles),
        )
        return tuple(f"{kind} {value}" for kind, value in known if value)

    @property
    def keys(self) -> tuple[str, ...]:
        """Its structure and the spelling of its name: with one in common they are the same."""
        name = (f"name {self.spelling}",) if self.spelling else ()
        return (*name, *self.structure)


class SameCompounds:
    """Finds which compounds are the same: those that share a key, directly or by a third one."""

    def __init__(self, compounds: Iterable[Compound]) -> None:
        self._above: dict[str, str] = {}
        for compound in compounds:
            roots = sorted({self._root(key) for key in compound.keys})
            # The first in the alphabet leads, so that the order of compounds does not matter.
            for root in roots[1:]:
                self._above[root] = roots[0]

    def group(self, compound: Compound) -> str | None:
        """Return what all that are the same as ``compound`` share; ``None``: nothing is known."""
        return self._root(compound.keys[0]) if compound.keys else None

    def _root(self, key: str) -> str:
        path = []
        while (above := self._above.setdefault(key, key)) != key:
            path.append(key)
            key = above
        for passed in path:
            self._above[passed] = key
        return key


UNKNOWN = Compound()


class LeakKind(StrEnum):
    """What may be wrong with a split."""

    WELL = "well"
    FILE = "file"
    PLATE = "plate"
    COMPOUND = "compound"
    SPELLING = "spelling"
    STRUCTURE = "structure"
    CLASS = "class"
    VALIDATION = "validation"
    CONFOUNDED_PLATE = "class and plate"
    CONFOUNDED_POSITION = "class and position"


class LeakSeverity(StrEnum):
    """How bad it is: the test subset is seen in training, scores may mislead, or worth knowing."""

    LEAK = "leak"
    WARNING = "warning"
    REMARK = "remark"


@dataclass(frozen=True, slots=True)
class Member:
    """Images of one well that are in one subset under one label.

    ``well`` and ``plate`` are names; the same well name on two plates is two wells. ``None``: not
    known, as in a table that splits compounds, or wells without saying what they got.
    """

    subset: Subset
    label: str | None
    plate: str | None = None
    well: str | None = None
    compound: Compound = UNKNOWN
    images: int = 1


@dataclass(frozen=True)
class Finding:
    """One kind of leak: how many wells, files, compounds or classes, and the first few."""

    severity: LeakSeverity
    kind: LeakKind
    message: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SplitCheck(Shown):
    """What a split gives away: all findings, worst first, and how much the subsets share.

    ``split`` is its name, or the names of the tables that were looked at: then ``rows`` counts
    their rows that were, ``refused`` the lines that could not be used, and ``images`` is 0.
    ``unseen``: images whose files the store has not seen, so that their bytes were not compared.
    ``relabelled``: wells that have another label now than the split keeps, with both.
    """

    findings: tuple[Finding, ...]
    leaks: int
    warnings: int
    images: int
    wells: int
    labels: int
    wells_in_both_subsets: int
    labels_in_both_subsets: int
    plates_in_both_subsets: int
    split: str = ""
    protocol: str = "imported"
    group_level: str = ""
    unseen: int = 0
    rows: int = 0
    refused: int = 0
    relabelled: tuple[str, ...] = ()


SubsetsOf = dict[str, set[Subset]]
Well = tuple[str, str]
"""Plate and name of the well."""
Uses = dict[Compound, set[tuple[Subset, str]]]
"""In which subset and under which label each compound is."""
BOTH = {Subset.TRAIN, Subset.TEST}


def leaks(
    members: Iterable[Member],
    files: Iterable[tuple[str, Subset]] = (),
    group_level: GroupLevel = GroupLevel.WELL,
    examples: int = 5,
) -> SplitCheck:
    """Look for what lets the test subset be seen in training, or lets a score mislead.

    ``files``: the SHA-256 and the subset of image files, at least of those that are the same.
    "Both subsets" means at least two of train, validation and test. Leaks: wells, files (and, where
    the split is by plate or by treatment, those) in both subsets; a compound in both subsets under
    two labels, because its names are spelled otherwise or have one structure (InChIKey, SMILES,
    identifier). Warnings: the same within one label or subset; a class that train or test lacks; a
    validation subset of one class (a remark: one that lacks some classes); a
    compound in both subsets where a class has several, so that compounds may be recognised in place
    of their class; a class on one plate only while others are elsewhere; a class of whose test
    wells most are predicted by their position: the training wells in that position of other plates
    are of that class more than of any other. That plates are in both subsets is a remark.

    Memory grows with wells and compounds, not with images.
    """
    images = 0
    wells: dict[Well, set[Subset]] = defaultdict(set)
    plates: SubsetsOf = defaultdict(set)
    labels: SubsetsOf = defaultdict(set)
    digests: SubsetsOf = defaultdict(set)
    wells_of: dict[str, dict[Subset, set[Well]]] = defaultdict(lambda: defaultdict(set))
    compounds: Uses = defaultdict(set)
    for member in members:
        images += member.images
        if member.label is not None:
            labels[member.label].add(member.subset)
            compounds[member.compound].add((member.subset, member.label))
        if member.plate is None:
            continue
        plates[member.plate].add(member.subset)
        if member.well is not None:
            well = (member.plate, member.well)
            wells[well].add(member.subset)
            if member.label is not None:
                wells_of[member.label][member.subset].add(well)
    for digest, subset in files:
        digests[digest].add(subset)

    findings: list[Finding] = []

    def add(severity: LeakSeverity, kind: LeakKind, found: Sequence[str], message: str) -> None:
        if found:
            shown = tuple(found[:examples])
            findings.append(Finding(severity, kind, message, len(found), shown))

    shared = [" ".join(well) for well in _in_several(wells)]
    message = f"{_of(len(shared), len(wells), 'well')} in both subsets."
    add(LeakSeverity.LEAK, LeakKind.WELL, shared, message)

    same = _in_several(digests)
    message = f"{_number(len(same), 'image file')} {_are(len(same))} in both subsets, byte by byte."
    add(LeakSeverity.LEAK, LeakKind.FILE, same, message)

    on_plates = _in_several(plates)
    severity = LeakSeverity.LEAK if group_level is GroupLevel.PLATE else LeakSeverity.REMARK
    message = f"{_of(len(on_plates), len(plates), 'plate')} in both subsets."
    add(severity, LeakKind.PLATE, on_plates, message)

    for finding in _compound_findings(compounds, group_level):
        add(*finding)

    lacking = [
        f"{label}: not in {' and '.join(sorted(BOTH - subsets))}"
        for label, subsets in sorted(labels.items())
        if BOTH - subsets
    ]
    message = f"{_of(len(lacking), len(labels), 'class', 'classes')} missing in train or test."
    add(LeakSeverity.WARNING, LeakKind.CLASS, lacking, message)

    training = sorted(label for label, subsets in labels.items() if Subset.TRAIN in subsets)
    validating = sorted(label for label, subsets in labels.items() if Subset.VALIDATION in subsets)
    absent = [label for label in training if Subset.VALIDATION not in labels[label]]
    message = f"{_of(len(absent), len(training), 'class', 'classes')} missing in validation."
    severity = LeakSeverity.REMARK
    if len(validating) == 1:
        severity = LeakSeverity.WARNING
        message = (
            f"The validation subset has one class only ({validating[0]}), so it cannot say when to "
            "stop training. Missing are:"
        )
    if validating:
        add(severity, LeakKind.VALIDATION, absent, message)

    on_one = []
    for label, by_subset in sorted(wells_of.items()):
        mine = {plate for some in by_subset.values() for plate, _ in some}
        if len(mine) == 1 and len(plates) > 1:
            on_one.append(f"{label}: {min(mine)}")
    number = _of(len(on_one), len(wells_of), "class", "classes")
    message = f"{number} on one plate only: the plate gives it away."
    add(LeakSeverity.WARNING, LeakKind.CONFOUNDED_PLATE, on_one, message)

    tested = {label: some[Subset.TEST] for label, some in wells_of.items() if Subset.TEST in some}
    trained = {label: some[Subset.TRAIN] for label, some in wells_of.items()}
    by_position = _by_position(trained, tested)
    number = _of(len(by_position), len(tested), "class", "classes")
    message = f"{number} predicted by well position alone."
    add(LeakSeverity.WARNING, LeakKind.CONFOUNDED_POSITION, by_position, message)

    ranks = list(LeakSeverity)
    severities = [finding.severity for finding in findings]
    return SplitCheck(
        findings=tuple(sorted(findings, key=lambda finding: ranks.index(finding.severity))),
        leaks=severities.count(LeakSeverity.LEAK),
        warnings=severities.count(LeakSeverity.WARNING),
        images=images,
        wells=len(wells),
        labels=len(labels),
        wells_in_both_subsets=len(shared),
        labels_in_both_subsets=len(_in_several(labels)),
        plates_in_both_subsets=len(on_plates),
        group_level=group_level.value,
    )


def _in_several(subsets_of: Mapping[Any, set[Subset]]) -> list[Any]:
    return sorted(key for key, subsets in subsets_of.items() if len(subsets) > 1)


def _number(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _of(count: int, total: int, noun: str, plural: str | None = None) -> str:
    """``3 of 8 wells are``."""
    return f"{count:,} of {_number(total, noun, plural)} {_are(count)}"


def _by_position(trained: Mapping[str, set[Well]], tested: Mapping[str, set[Well]]) -> list[str]:
    """Classes that a table of well positions would predict, made from the training wells."""
    holds: dict[str, dict[str, str]] = defaultdict(dict)
    for label, wells in trained.items():
        for plate, well in wells:
            holds[well][plate] = label

    def predicted(plate: str, well: str) -> str | None:
        """The class that a position holds most on other plates, if it is one."""
        others = (label for other, label in holds[well].items() if other != plate)
        counts = Counter(others).most_common(2)
        if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
            return None
        return counts[0][0]

    found = []
    for label, wells in sorted(tested.items()):
        right = sorted({well for plate, well in wells if predicted(plate, well) == label})
        if 2 * sum(well in right for _, well in wells) > len(wells):
            more = f" and {len(right) - 3} more" if len(right) > 3 else ""
            found.append(f"{label}: {' '.join(right[:3])}{more}")
    return found


def _compound_findings(
    compounds: Uses, level: GroupLevel
) -> Iterator[tuple[LeakSeverity, LeakKind, list[str], str]]:
    """Compounds in both subsets, spelled in several ways, or of several names."""
    same = SameCompounds(compounds)
    subsets: SubsetsOf = defaultdict(set)
    names: dict[str, str] = {}
    of_label: dict[str, set[str]] = defaultdict(set)
    by_name: dict[str, set[Compound]] = defaultdict(set)
    by_structure: dict[str, set[Compound]] = defaultdict(set)
    for compound, uses in compounds.items():
        group = same.group(compound)
        if group is None:
            continue
        title = compound.name or compound.identifier or group
        names[group] = min(title, names.get(group, title))
        subsets[group] |= {subset for subset, _ in uses}
        for _, label in uses:
            of_label[label].add(group)
        if compound.spelling is not None:
            by_name[compound.spelling].add(compound)
            for key in compound.structure:
                by_structure[key].add(compound)

    by_compound = level is GroupLevel.PERTURBATION
    if by_compound or any(len(groups) > 1 for groups in of_label.values()):
        found = sorted(names[group] for group in _in_several(subsets))
        severity = LeakSeverity.LEAK if by_compound else LeakSeverity.WARNING
        message = f"{_of(len(found), len(subsets), 'compound')} in both subsets"
        message += "." if by_compound else ", not only their class."
        yield severity, LeakKind.COMPOUND, found, message

    several_names = {
        key: equal
        for key, equal in by_structure.items()
        if len({compound.spelling for compound in equal}) > 1
    }
    for kind, groups in ((LeakKind.SPELLING, by_name), (LeakKind.STRUCTURE, several_names)):
        by_severity = {LeakSeverity.LEAK: list[str](), LeakSeverity.WARNING: list[str]()}
        for key, equal in sorted(groups.items()):
            of_name: SubsetsOf = defaultdict(set)
            for compound in equal:
                of_name[compound.name or ""] |= {subset for subset, _ in compounds[compound]}
            if len(of_name) < 2:
                continue
            used = set().union(*of_name.values())
            classes = {label for compound in equal for _, label in compounds[compound]}
            leaking = len(used) > 1 and (len(classes) > 1 or by_compound)
            named = (f"{name!r} ({', '.join(sorted(on))})" for name, on in sorted(of_name.items()))
            shown = f" ({key})" if kind is LeakKind.STRUCTURE else ""
            severity = LeakSeverity.LEAK if leaking else LeakSeverity.WARNING
            by_severity[severity].append(" = ".join(named) + shown)
        for severity, found in by_severity.items():
            count = len(found)
            how = f"{'goes' if count == 1 else 'go'} by more than one name"
            if kind is LeakKind.SPELLING:
                how = f"{_are(count)} spelled in more than one way"
            where = ", in both subsets." if severity is LeakSeverity.LEAK else "."
            yield severity, kind, found, f"{_number(count, 'compound')} {how}{where}"
