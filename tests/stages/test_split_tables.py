"""Splits that others made, as tables: brought in, and checked with and without a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from realdata import real_data
from split_screens import BY_TREATMENT, DRUGS, fill, parts, sides
from sqlalchemy import insert, select, text, update
from unguarded import unguarded

from cellstore.analysis.leaks import LeakKind
from cellstore.config import SplitParams
from cellstore.enums import TARGET, GroupLevel, Subset
from cellstore.errors import BadTableError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Recipe, SplitMember, Treatment, Well
from cellstore.stages.split import (
    check_split,
    check_tables,
    create_split,
    import_split,
    list_splits,
    show_split,
)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_wells_and_sites_becomes_a_split(workspace: Workspace, tmp_path: Path) -> None:
    fill(workspace, "aspirin taxol DMSO", "aspirin taxol DMSO")
    table = write(
        tmp_path / "split.csv",
        "Metadata_split,Metadata_Plate,Metadata_Well,Metadata_Site",
        "train,P1,a1,1",
        "validate,P1,A01,2",
        "test,P1,A02,1",
        "training,P2,A02,",
        "test,P2,A09,1",
        "test,P9,A01,1",
        "maybe,P2,A01,1",
        "test,P2,ZZZ,1",
    )
    result = import_split(workspace, "theirs", [table])
    assert (result.protocol, result.group_level, result.leaking) == ("imported", "image", True)
    assert sides(workspace, "theirs") == {
        "P1 A01 1 aspirin": Subset.TRAIN,
        "P1 A01 2 aspirin": Subset.VALIDATION,
        "P1 A02 1 taxol": Subset.TEST,
        "P2 A02 1 taxol": Subset.TRAIN,
        "P2 A02 2 taxol": Subset.TRAIN,
    }
    assert result.excluded["rows_without_image"] == {
        "count": 2,
        "examples": ["split.csv, line 6", "split.csv, line 7"],
    }
    assert result.excluded["rows_refused"]["count"] == 2
    assert not import_split(workspace, "theirs", [table]).created
    check = check_split(workspace, "theirs")
    assert (check.leaks, check.unseen) == (1, 0)
    assert check.findings[0].kind is LeakKind.WELL
    with workspace.database.read() as session:
        assert len(session.execute(text(show_split(workspace).query)).all()) == 5
        recipe = session.scalars(select(Recipe)).one()
        assert recipe.parameters["files"].keys() == {"split.csv"}
    with pytest.raises(UserInputError, match="one subset only"):
        import_split(workspace, "kept", [table], group_level=GroupLevel.WELL)
    assert [line.name for line in list_splits(workspace)] == ["theirs"]


def test_words_that_a_program_gets_wrong_are_named(sqlite_workspace, tmp_path) -> None:
    table = write(tmp_path / "s.csv", "split,pert_iname", "train,aspirin")
    with pytest.raises(UnknownNameError, match="Unknown label field 'colour'"):
        import_split(sqlite_workspace, "s", [table], "colour")  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match="puts an image of this store"):
        import_split(sqlite_workspace, "s", [table], "target")  # type: ignore[arg-type]


def test_images_whose_bytes_are_unknown_are_told_by_the_check(sqlite_workspace) -> None:
    fill(sqlite_workspace, *["aspirin taxol"] * 3)
    with sqlite_workspace.database.begin() as session:
        session.execute(update(Image).where(Image.site == 1).values(content_sha256=None))
    create_split(sqlite_workspace, "s", SplitParams(allow_missing=True))
    assert check_split(sqlite_workspace, "s").unseen == 6


@pytest.mark.one_database
def test_a_table_of_treatments_needs_no_wells(workspace: Workspace, tmp_path: Path) -> None:
    fill(workspace, "aspirin taxol", "aspirin taxol")
    table = write(tmp_path / "s.tsv", "subset\tpert_iname", "train\taspirin", "test\ttaxol")
    result = import_split(workspace, "s", [table], group_level=GroupLevel.PERTURBATION)
    assert parts(workspace, "s", 3) == {"aspirin": {Subset.TRAIN}, "taxol": {Subset.TEST}}
    assert result.images == 8


def test_tables_are_joined_by_what_both_have(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    # As JUMP-CP does: a treatment in one cell line trains, in the other it tests.
    fill(sqlite_workspace, "aspirin taxol", "aspirin taxol")
    split = write(
        tmp_path / "split.csv",
        "Metadata_split,Metadata_broad_sample,Metadata_cell_line",
        "train,BRD-1,A549",
        "test,BRD-1,U2OS",
        "test,BRD-9,U2OS",
    )
    wells = write(
        tmp_path / "wells.csv",
        "Metadata_Plate,Metadata_Well,Metadata_broad_sample,Metadata_cell_line",
        "P1,A01,BRD-1,A549",
        "P2,A01,BRD-1,U2OS",
        "P2,A02,BRD-2,U2OS",
    )
    result = import_split(sqlite_workspace, "s", [wells, split])
    assert sides(sqlite_workspace, "s") == {
        "P1 A01 1 aspirin": Subset.TRAIN,
        "P1 A01 2 aspirin": Subset.TRAIN,
        "P2 A01 1 aspirin": Subset.TEST,
        "P2 A01 2 aspirin": Subset.TEST,
    }
    assert "no row of wells.csv" in result.excluded["rows_refused"]["examples"][0]


def test_tables_that_are_no_split(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    fill(sqlite_workspace, "aspirin taxol", "aspirin taxol")
    for lines, message in (
        (["Metadata_Plate,Metadata_Well", "P1,A01"], "no column 'split'"),
        (["split,colour", "train,red"], "does not say what it splits"),
        (["split,well", "train,A01"], "of which plate"),
        (["split,plate,well", "train,P9,A01"], "puts an image of this store"),
        (
            ["split,plate,well", "train,P1,A01", "test,P1,A01"],
            "put in two subsets: 2, first P1 A01",
        ),
        (["split,plate,well", "later,P1,A01"], "'later' is none of train"),
    ):
        with pytest.raises(UserInputError, match=message) as caught:
            import_split(sqlite_workspace, "s", [write(tmp_path / "t.csv", *lines)])
        assert isinstance(caught.value, UserInputError | BadTableError)
    assert list_splits(sqlite_workspace) == ()


def test_tables_are_checked_without_a_store(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv",
        "split,plate,well,pert_iname",
        "train,P1,A01,FK-866",
        "test,P1,A01,FK866",
        "dev,P1,A02,FK866",
        "sometimes,P1,A02,FK866",
    )
    found = check_tables([table])
    assert (found.rows, found.images, found.refused) == (3, 0, 1)
    assert {item.kind for item in found.findings if item.severity == "leak"} == {
        LeakKind.WELL,
        LeakKind.SPELLING,
    }
    with pytest.raises(UserInputError, match="has a target"):
        check_tables([table], TARGET)


def test_wells_on_both_sides_are_found_without_knowing_what_they_got(tmp_path: Path) -> None:
    lines = ["split,plate,well", "train,P1,A01", "test,P1,A01", "test,P1,A02"]
    found = check_tables([write(tmp_path / "t.csv", *lines)])
    assert [item.kind for item in found.findings if item.severity == "leak"] == [LeakKind.WELL]
    assert (found.wells, found.labels) == (2, 0)


@pytest.mark.one_database
def test_a_correction_after_the_split_is_found_by_the_check(workspace: Workspace) -> None:
    fill(workspace, f"{DRUGS} {DRUGS}")
    create_split(workspace, "s", BY_TREATMENT)
    assert check_split(workspace, "s").leaks == 0
    sides_by_name = parts(workspace, "s", 3)
    with workspace.database.begin() as session:
        ids = dict(session.execute(select(Treatment.name, Treatment.id)).all())
        one, other = (
            next(name for name, on in sides_by_name.items() if on == {side})
            for side in (Subset.TRAIN, Subset.TEST)
        )
        well = select(Well.id).where(Well.treatment_id == ids[one]).limit(1).scalar_subquery()
        session.execute(update(Well).where(Well.id == well).values(treatment_id=ids[other]))
    (leak,) = (item for item in check_split(workspace, "s").findings if item.severity == "leak")
    assert (leak.kind, leak.examples) == (LeakKind.COMPOUND, (other,))


def test_a_well_that_slipped_through_before_the_guards_is_found(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 3)
    create_split(workspace, "s")
    with unguarded(workspace) as session:
        member = session.scalars(select(SplitMember).limit(1)).one()
        well = session.get_one(Image, member.image_id).well_id
        new = Image(well_id=well, site=9, core_name="x")
        session.add(new)
        session.flush()
        side = Subset.TEST if member.subset is Subset.TRAIN else Subset.TRAIN
        values = {"split_id": member.split_id, "image_id": new.id, "subset": side}
        session.execute(insert(SplitMember).values(label_id=member.label_id, **values))
    assert check_split(workspace, "s").findings[0].kind is LeakKind.WELL


@pytest.mark.real
def test_the_splits_of_jump(sqlite_workspace: Workspace) -> None:
    folder = real_data("cpjump1") / "datasplits"
    split = folder / "representation_learning_split_example_1.csv"
    wells = folder / "cpjump1_metadata.csv.gz"
    alone = check_tables([split])
    assert (alone.rows, alone.labels, alone.labels_in_both_subsets, alone.leaks) == (
        3272,
        178,
        160,
        0,
    )
    joined = check_tables([split, wells])
    assert (joined.rows, joined.wells, joined.wells_in_both_subsets) == (14265, 14265, 0)
    (spelled,) = (item for item in joined.findings if item.kind is LeakKind.SPELLING)
    assert spelled.examples == ("'ME-0328' (test, validation) = 'ME0328' (test, validation)",)
