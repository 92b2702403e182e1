"""What a split gives away, on rows that can be worked out by hand."""

from __future__ import annotations

import pytest

from cellstore.analysis.leaks import (
    Compound,
    Finding,
    LeakKind,
    LeakSeverity,
    Member,
    SameCompounds,
    SplitCheck,
    leaks,
)
from cellstore.enums import GroupLevel, Subset
from cellstore.io.treatments import normalised_name

TRAIN, VALIDATION, TEST = Subset
LEAK, WARNING, REMARK = LeakSeverity


def member(subset: Subset, well: str, label: str, plate: str = "P1", **compound: str) -> Member:
    spelling = normalised_name(compound["name"]) if "name" in compound else None
    return Member(subset, label, plate, well, Compound(**compound, spelling=spelling))


def by_kind(check: SplitCheck) -> dict[LeakKind, Finding]:
    found = {finding.kind: finding for finding in check.findings}
    assert len(found) == len(check.findings)
    return found


def test_a_clean_split_has_no_finding() -> None:
    check = leaks(
        [
            member(TRAIN, "A01", "a", name="a"),
            member(TRAIN, "A02", "b", name="b"),
            member(TEST, "A02", "a", plate="P2", name="a"),
            member(TEST, "A01", "b", plate="P2", name="b"),
        ],
        files=[("x", TRAIN), ("x", TRAIN), ("y", TEST)],
    )
    assert check.findings == ()
    assert (check.images, check.wells, check.labels) == (4, 4, 2)
    assert (check.wells_in_both_subsets, check.labels_in_both_subsets) == (0, 2)


def test_a_well_and_a_file_on_both_sides() -> None:
    rows = [member(TRAIN, "A01", "a"), member(VALIDATION, "A01", "a"), member(TEST, "A02", "a")]
    found = by_kind(leaks(rows, files=[("x", TRAIN), ("x", TEST), ("y", TEST)]))
    assert found.keys() == {LeakKind.WELL, LeakKind.FILE, LeakKind.PLATE}
    well, file = found[LeakKind.WELL], found[LeakKind.FILE]
    assert (well.severity, well.count, well.examples) == (LEAK, 1, ("P1 A01",))
    assert well.message == "1 of 2 wells is in both subsets."
    assert (file.severity, file.examples) == (LEAK, ("x",))


@pytest.mark.parametrize(
    ("level", "severity"), [(GroupLevel.WELL, REMARK), (GroupLevel.PLATE, LEAK)]
)
def test_a_shared_plate_is_a_leak_only_where_plates_are_split(level, severity) -> None:
    rows = [member(TRAIN, "A01", "a"), member(TEST, "A02", "a")]
    (finding,) = leaks(rows, group_level=level).findings
    assert (finding.severity, finding.kind, finding.examples) == (severity, LeakKind.PLATE, ("P1",))


@pytest.mark.parametrize(
    ("side", "label", "level", "severity"),
    [
        (TEST, "fk 866", GroupLevel.WELL, LEAK),  # two classes that are one, in two subsets
        (TRAIN, "fk 866", GroupLevel.WELL, WARNING),  # in one subset
        (TEST, "FK-866", GroupLevel.WELL, WARNING),  # one class
        (TEST, "FK-866", GroupLevel.PERTURBATION, LEAK),  # a compound was to be in one subset
    ],
)
def test_two_spellings_of_one_compound(side, label, level, severity) -> None:
    rows = [
        member(TRAIN, "A01", "FK-866", name="FK-866"),
        member(side, "A02", label, name="fk 866"),
    ]
    finding = by_kind(leaks(rows, group_level=level))[LeakKind.SPELLING]
    assert (finding.severity, finding.count) == (severity, 1)
    assert finding.examples == (f"'FK-866' (train) = 'fk 866' ({side})",)


@pytest.mark.parametrize(
    ("one", "other", "key"),
    [
        ({"inchikey": "AAA-B-N"}, {"inchikey": "aaa-b-n"}, "InChIKey AAA-B-N"),
        ({"smiles": "CC(=O)O"}, {"smiles": "CC(=O)O"}, "SMILES CC(=O)O"),
        (
            # Salt, batch and supplier differ: BRD-K70586315 is the compound.
            {"identifier": "BRD-K70586315-001-02-4"},
            {"identifier": "BRD-K70586315-300-01-9"},
            "identifier BRD-K70586315",
        ),
    ],
    ids=["inchikey", "smiles", "broad id"],
)
def test_two_names_of_one_structure(one, other, key) -> None:
    rows = [
        member(TRAIN, "A01", "a", name="aspirin", **one),
        member(TEST, "A02", "b", name="acetylsalicylic acid", **other),
    ]
    finding = by_kind(leaks(rows))[LeakKind.STRUCTURE]
    assert finding.severity is LEAK
    assert finding.examples == (f"'acetylsalicylic acid' (test) = 'aspirin' (train) ({key})",)


def test_other_structures_of_other_names_are_no_finding() -> None:
    rows = [
        member(TRAIN, "A01", "a", name="a", inchikey="X", identifier="BRD-K70586315-001-02-4"),
        member(TEST, "A02", "a", name="a", inchikey="X", identifier="BRD-K70586315-001-02-4"),
        member(TRAIN, "A03", "b", name="b", inchikey="Y", identifier="BRD-K70586316-001-02-4"),
        member(TEST, "A04", "b", name="b", inchikey="Y", identifier="BRD-K70586316-001-02-4"),
    ]
    assert [finding.kind for finding in leaks(rows).findings] == [LeakKind.PLATE]


def test_a_class_on_one_side_only() -> None:
    rows = [
        member(TRAIN, "A01", "a"),
        member(TEST, "A02", "a"),
        member(TEST, "A03", "b"),
        member(VALIDATION, "A04", "c"),
    ]
    finding = by_kind(leaks(rows))[LeakKind.CLASS]
    assert (finding.severity, finding.count) == (WARNING, 2)
    assert finding.examples == ("b: not in train", "c: not in test and train")


def test_a_validation_subset_of_one_class_is_a_warning() -> None:
    rows = [
        *(member(TRAIN, "A01", "a"), member(TRAIN, "A02", "b"), member(TRAIN, "A03", "c")),
        *(member(TEST, "B01", "a"), member(TEST, "B02", "b"), member(TEST, "B03", "c")),
        member(VALIDATION, "C01", "a"),
    ]
    found = by_kind(leaks(rows))[LeakKind.VALIDATION]
    assert (found.severity, found.count, found.examples) == (WARNING, 2, ("b", "c"))
    assert found.message.startswith("The validation subset has one class only (a)")
    found = by_kind(leaks([*rows, member(VALIDATION, "C02", "b")]))[LeakKind.VALIDATION]
    assert (found.severity, found.examples) == (REMARK, ("c",))
    assert found.message == "1 of 3 classes is missing in validation."


def test_compounds_on_both_sides_stand_in_for_their_target() -> None:
    rows = [
        member(TRAIN, "A01", "TUBB", name="taxol"),
        member(TEST, "A02", "TUBB", name="taxol"),
        member(TRAIN, "A03", "TUBB", name="colchicine"),
    ]
    finding = by_kind(leaks(rows))[LeakKind.COMPOUND]
    assert (finding.severity, finding.examples) == (WARNING, ("taxol",))
    assert (
        by_kind(leaks(rows, group_level=GroupLevel.PERTURBATION))[LeakKind.COMPOUND].severity
        is LEAK
    )
    # Where the class is the compound, that is what is wanted.
    named = [Member(m.subset, m.compound.name or "", m.plate, m.well, m.compound) for m in rows]
    assert LeakKind.COMPOUND not in by_kind(leaks(named))


def on_plates(*layouts: str) -> list[Member]:
    """A member of each letter: plate 1 trains, the others test; wells A01, A02, ..."""
    return [
        member(TRAIN if number == 1 else TEST, f"A{column:02d}", label, plate=f"P{number}")
        for number, layout in enumerate(layouts, start=1)
        for column, label in enumerate(layout, start=1)
        if label != "-"
    ]


@pytest.mark.parametrize(
    ("layouts", "confounded"),
    [
        (("abc", "abc"), ["a: A01", "b: A02", "c: A03"]),
        (("abc", "bca"), []),
        (("abc", "acb"), ["a: A01"]),
        (("aabb", "aabb"), ["a: A01 A02", "b: A03 A04"]),
        (("aab", "a-b"), ["a: A01", "b: A03"]),
        (("ab-", "--b"), []),  # b is tested where no training well is
        (("ab", "ba", "ab"), []),  # P1 trains: half of each class is told, not most
    ],
)
def test_classes_that_their_position_gives_away(layouts, confounded) -> None:
    found = by_kind(leaks(on_plates(*layouts))).get(LeakKind.CONFOUNDED_POSITION)
    assert list(found.examples if found else ()) == confounded
    assert found is None or found.severity is WARNING


def test_the_position_that_most_training_plates_have_counts() -> None:
    layouts = [("P1", TRAIN, "ab"), ("P2", TRAIN, "ab"), ("P3", TRAIN, "bb"), ("P4", TEST, "ab")]
    rows = [
        member(side, f"A{column:02d}", label, plate=plate)
        for plate, side, layout in layouts
        for column, label in enumerate(layout, start=1)
    ]
    assert by_kind(leaks(rows))[LeakKind.CONFOUNDED_POSITION].examples == ("a: A01", "b: A02")
    # One plate of each layout: the position says nothing.
    drawn = by_kind(leaks([row for row in rows if row.plate != "P1"]))
    assert drawn[LeakKind.CONFOUNDED_POSITION].examples == ("b: A02",)


def test_the_same_well_in_train_and_test_is_no_matter_of_its_position() -> None:
    rows = [member(side, "A01", "a") for side in (TRAIN, TEST)]
    assert LeakKind.CONFOUNDED_POSITION not in by_kind(leaks(rows))


@pytest.mark.parametrize(
    ("layouts", "confounded"),
    [
        (("ab", "ab"), []),
        (("aabb", "-bb"), ["a: P1"]),
        (("aabb",), []),
        (("a", "b"), ["a: P1", "b: P2"]),
    ],
)
def test_classes_that_their_plate_gives_away(layouts, confounded) -> None:
    found = by_kind(leaks(on_plates(*layouts))).get(LeakKind.CONFOUNDED_PLATE)
    assert list(found.examples if found else ()) == confounded


def test_the_worst_comes_first_examples_are_few_and_counts_are_whole() -> None:
    rows = [member(side, f"A{i:02}", "a") for i in range(9) for side in (TRAIN, TEST)]
    first, second = leaks(rows, examples=3).findings
    assert (first.severity, second.severity) == (LEAK, REMARK)
    assert (first.count, first.examples) == (9, ("P1 A00", "P1 A01", "P1 A02"))


def test_rows_without_wells_are_checked_for_their_compounds_alone() -> None:
    compound = Compound(identifier="BRD-K70586315-001-02-4")
    rows = [Member(TRAIN, "KCNN1", compound=compound), Member(TEST, "KCNN1", compound=compound)]
    check = leaks(rows, group_level=GroupLevel.PERTURBATION)
    assert [finding.kind for finding in check.findings] == [LeakKind.COMPOUND]
    assert check.findings[0].examples == ("BRD-K70586315-001-02-4",)
    assert (check.wells, check.plates_in_both_subsets) == (0, 0)


@pytest.mark.parametrize("name", ["ME-0328", "ME0328", "me 0328", "ME_0328", "ME‐0328"])  # noqa: RUF001
def test_spellings_of_one_compound_are_one(name: str) -> None:
    assert normalised_name(name) == "me0328"


def test_different_compounds_stay_different() -> None:
    assert len({normalised_name(n) for n in ("AZ-7", "AZ-77", "(R)-AZ7", "(S)-AZ7", "-", "_")}) == 6


def test_the_same_through_a_third_is_the_same_in_any_order() -> None:
    chain = [
        Compound("a", inchikey="X", spelling="a"),
        Compound("b", inchikey="X", smiles="C", spelling="b"),
        Compound("c", smiles="C", spelling="c"),
        Compound("d", smiles="D", spelling="d"),
    ]
    for order in (chain, chain[::-1]):
        same = SameCompounds(order)
        assert [same.group(compound) for compound in chain] == ["InChIKey X"] * 3 + ["SMILES D"]
    assert SameCompounds([]).group(Compound()) is None
