"""What a split gives away: checks on the rows of a split, whoever made it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..enums import GroupLevel, Subset

_BROAD = re.compile(r"BRD-[A-Z]\d{8}(?=-|$)")
"""A Broad compound: what follows (``-001-02-4``) names its salt, batch and supplier."""


@dataclass(frozen=True, slots=True)
class Compound:
    """What tables say of a treatment; each may be unknown."""

    name: str | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None

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
        """Its structure and its name without spelling: with one in common they are the same."""
        name = (f"name {normalised_name(self.name)}",) if self.name else ()
        return (*name, *self.structure)


def normalised_name(name: str) -> str:
    """``name`` without what spellings of a compound differ in: ``ME-0328`` becomes ``me0328``."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    # A name of such signs alone would else be the same as any other of them.
    return re.sub(r"[\s_\u002d\u2010-\u2015\u2212]", "", folded) or folded


class SameCompounds:
    """Finds which compounds are the same: those that share a key, directly or by a third one."""

    def __init__(self, compounds: Iterable[Compound]) -> None:
        self._above: dict[str, str] = {}
        for compound in compounds:
            self.add(compound)

    def add(self, compound: Compound) -> None:
        """Take note of what is one compound because of ``compound``."""
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


Place = tuple[str, str]
"""Plate and well."""
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
class SplitCheck:
    """All findings (none: nothing found), worst first, and how much the subsets share."""

    findings: tuple[Finding, ...]
    n_images: int
    n_wells: int
    n_labels: int
    wells_in_both_subsets: int
    labels_in_both_subsets: int
    plates_in_both_subsets: int


@dataclass
class _Seen:
    """What the members are, by what they may share; nothing here grows with images or cells."""

    images: int = 0
    wells: dict[Place, set[Subset]] = field(default_factory=lambda: defaultdict(set))
    plates: dict[str, set[Subset]] = field(default_factory=lambda: defaultdict(set))
    labels: dict[str, set[Subset]] = field(default_factory=lambda: defaultdict(set))
    places: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    trained: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    tested: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    compounds: dict[Compound, set[tuple[Subset, str]]] = field(
        default_factory=lambda: defaultdict(set)
    )

    def add(self, member: Member) -> None:
        self.images += member.images
        if member.label is not None:
            self.labels[member.label].add(member.subset)
            self.compounds[member.compound].add((member.subset, member.label))
        if member.plate is not None:
            self.plates[member.plate].add(member.subset)
        if member.plate is not None and member.well is not None:
            self._add_place((member.plate, member.well), member)

    def _add_place(self, place: Place, member: Member) -> None:
        self.wells[place].add(member.subset)
        if member.label is None:
            return
        self.places[member.label].add(place)
        if member.subset is Subset.TRAIN:
            self.trained[member.label].add(place)
        if member.subset is Subset.TEST:
            self.tested[member.label].add(place)


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
    compound in both subsets where a class has several, so that compounds may be recognised in place
    of their class; a class on one plate only while others are elsewhere; a class of whose test
    wells most are told by their position: the training wells in that position of other plates are
    of that class more than of any other. That plates are in both subsets is a remark.

    Memory grows with wells and compounds, not with images.
    """
    seen = _Seen()
    for member in members:
        seen.add(member)
    found = [
        _wells(seen, examples),
        _files(files, examples),
        _plates(seen, group_level, examples),
        *_compounds(seen, group_level, examples),
        _missing(seen, examples),
        _on_one_plate(seen, examples),
        _by_position(seen, examples),
    ]
    ranks = list(LeakSeverity)
    return SplitCheck(
        findings=tuple(
            sorted((f for f in found if f.count), key=lambda f: ranks.index(f.severity))
        ),
        n_images=seen.images,
        n_wells=len(seen.wells),
        n_labels=len(seen.labels),
        wells_in_both_subsets=sum(len(sides) > 1 for sides in seen.wells.values()),
        labels_in_both_subsets=sum(len(sides) > 1 for sides in seen.labels.values()),
        plates_in_both_subsets=sum(len(sides) > 1 for sides in seen.plates.values()),
    )


def _finding(
    severity: LeakSeverity, kind: LeakKind, found: Sequence[str], message: str, examples: int
) -> Finding:
    return Finding(severity, kind, message, len(found), tuple(found[:examples]))


def _number(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _wells(seen: _Seen, examples: int) -> Finding:
    found = [" ".join(place) for place, sides in sorted(seen.wells.items()) if len(sides) > 1]
    count = _number(len(seen.wells), "well")
    message = f"{len(found):,} of {count} {_are(len(found))} in both subsets."
    return _finding(LeakSeverity.LEAK, LeakKind.WELL, found, message, examples)


def _files(files: Iterable[tuple[str, Subset]], examples: int) -> Finding:
    sides: dict[str, set[Subset]] = defaultdict(set)
    for digest, subset in files:
        sides[digest].add(subset)
    found = sorted(digest for digest, on in sides.items() if len(on) > 1)
    message = (
        f"{_number(len(found), 'image file')} {_are(len(found))} in both subsets, byte by byte."
    )
    return _finding(LeakSeverity.LEAK, LeakKind.FILE, found, message, examples)


def _plates(seen: _Seen, level: GroupLevel, examples: int) -> Finding:
    found = sorted(plate for plate, sides in seen.plates.items() if len(sides) > 1)
    severity = LeakSeverity.LEAK if level is GroupLevel.PLATE else LeakSeverity.REMARK
    count = _number(len(seen.plates), "plate")
    message = f"{len(found):,} of {count} {_are(len(found))} in both subsets."
    return _finding(severity, LeakKind.PLATE, found, message, examples)


def _missing(seen: _Seen, examples: int) -> Finding:
    wanted = {Subset.TRAIN, Subset.TEST}
    found = [
        f"{label}: not in {' and '.join(sorted(wanted - sides))}"
        for label, sides in sorted(seen.labels.items())
        if wanted - sides
    ]
    count = _number(len(seen.labels), "class", "classes")
    message = f"{len(found):,} of {count} {_are(len(found))} missing in train or test."
    return _finding(LeakSeverity.WARNING, LeakKind.CLASS, found, message, examples)


def _on_one_plate(seen: _Seen, examples: int) -> Finding:
    found = []
    for label, places in sorted(seen.places.items()):
        plates = {plate for plate, _ in places}
        if len(plates) == 1 and len(seen.plates) > 1:
            found.append(f"{label}: {min(plates)}")
    message = (
        f"{len(found):,} of {_number(len(seen.places), 'class', 'classes')} {_are(len(found))} on "
        "one plate only: the plate gives it away."
    )
    return _finding(LeakSeverity.WARNING, LeakKind.CONFOUNDED_PLATE, found, message, examples)


def _by_position(seen: _Seen, examples: int) -> Finding:
    """Classes that a table of well positions would predict, made from the training wells."""
    holds: dict[str, dict[str, str]] = defaultdict(dict)
    for label, places in seen.trained.items():
        for plate, well in places:
            holds[well][plate] = label
    found = []
    for label, places in sorted(seen.tested.items()):
        told = sorted({well for plate, well in places if _held(holds[well], plate) == label})
        if 2 * sum(well in told for _, well in places) > len(places):
            more = f" and {len(told) - 3} more" if len(told) > 3 else ""
            found.append(f"{label}: {' '.join(told[:3])}{more}")
    message = (
        f"{len(found):,} of {_number(len(seen.tested), 'class', 'classes')} {_are(len(found))} "
        "predicted by well position alone."
    )
    return _finding(LeakSeverity.WARNING, LeakKind.CONFOUNDED_POSITION, found, message, examples)


def _held(labels: Mapping[str, str], plate: str) -> str | None:
    """Return the class that one position holds most on other plates, if it is one."""
    counts = Counter(label for other, label in labels.items() if other != plate).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def _compounds(seen: _Seen, level: GroupLevel, examples: int) -> Iterator[Finding]:
    same = SameCompounds(seen.compounds)
    yield _shared_compounds(seen, same, level, examples)
    by_name: dict[str, set[Compound]] = defaultdict(set)
    by_structure: dict[str, set[Compound]] = defaultdict(set)
    for compound in seen.compounds:
        if compound.name is None:
            continue
        by_name[normalised_name(compound.name)].add(compound)
        for key in compound.structure:
            by_structure[key].add(compound)
    yield from _renamed(seen, LeakKind.SPELLING, by_name, level, examples)
    otherwise = {
        key: group
        for key, group in by_structure.items()
        if len({normalised_name(compound.name or "") for compound in group}) > 1
    }
    yield from _renamed(seen, LeakKind.STRUCTURE, otherwise, level, examples)


def _shared_compounds(
    seen: _Seen, same: SameCompounds, level: GroupLevel, examples: int
) -> Finding:
    sides: dict[str, set[Subset]] = defaultdict(set)
    names: dict[str, str] = {}
    of_label: dict[str, set[str]] = defaultdict(set)
    for compound, uses in seen.compounds.items():
        group = same.group(compound)
        if group is None:
            continue
        title = compound.name or compound.identifier or group
        names[group] = min(title, names.get(group, title))
        sides[group] |= {subset for subset, _ in uses}
        for _, label in uses:
            of_label[label].add(group)
    by_treatment = level is GroupLevel.PERTURBATION
    coarser = any(len(groups) > 1 for groups in of_label.values())
    found = sorted(names[group] for group, on in sides.items() if len(on) > 1)
    found = found if by_treatment or coarser else []  # else the class is the compound
    severity = LeakSeverity.LEAK if by_treatment else LeakSeverity.WARNING
    message = (
        f"{len(found):,} of {_number(len(sides), 'compound')} {_are(len(found))} in both subsets"
        + ("." if by_treatment else ", not only their class.")
    )
    return _finding(severity, LeakKind.COMPOUND, found, message, examples)


def _renamed(
    seen: _Seen,
    kind: LeakKind,
    groups: Mapping[str, set[Compound]],
    level: GroupLevel,
    examples: int,
) -> Iterator[Finding]:
    found: dict[LeakSeverity, list[str]] = {LeakSeverity.LEAK: [], LeakSeverity.WARNING: []}
    for key, compounds in sorted(groups.items()):
        names = {compound.name for compound in compounds}
        if len(names) < 2:
            continue
        uses = set().union(*(seen.compounds[compound] for compound in compounds))
        on_sides = len({subset for subset, _ in uses}) > 1
        counts = len({label for _, label in uses}) > 1 or level is GroupLevel.PERTURBATION
        severity = LeakSeverity.LEAK if on_sides and counts else LeakSeverity.WARNING
        shown = f" ({key})" if kind is LeakKind.STRUCTURE else ""
        found[severity].append(_equal(seen, compounds) + shown)
    for severity, items in found.items():
        count = _number(len(items), "compound")
        goes = "goes" if len(items) == 1 else "go"
        how = (
            f"{_are(len(items))} spelled in more than one way"
            if kind is LeakKind.SPELLING
            else f"{goes} by more than one name"
        )
        where = ", in both subsets." if severity is LeakSeverity.LEAK else "."
        yield _finding(severity, kind, items, f"{count} {how}{where}", examples)


def _equal(seen: _Seen, compounds: Iterable[Compound]) -> str:
    sides: dict[str, set[Subset]] = defaultdict(set)
    for compound in compounds:
        sides[compound.name or ""] |= {subset for subset, _ in seen.compounds[compound]}
    return " = ".join(f"{name!r} ({', '.join(sorted(on))})" for name, on in sorted(sides.items()))
