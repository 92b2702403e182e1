"""Splits of every kind as rows: treatments, named plates, folds, conditions, tables of others."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from factories import Factory, unguarded
from realdata import real_data
from sqlalchemy import insert, select, text, update

from cellstore.config import SplitParams
from cellstore.db.models import (
    Image,
    Plate,
    Recipe,
    Run,
    Split,
    SplitGroup,
    SplitMember,
    Treatment,
    Well,
)
from cellstore.errors import BadTableError, UnknownNameError, UserInputError
from cellstore.ops.leaks import LeakKind, LeakSeverity
from cellstore.runs import Workspace
from cellstore.stages.split import (
    check_split,
    check_tables,
    create_folds,
    create_split,
    delete_split,
    import_split,
    list_splits,
    show_split,
)
from cellstore.terms import GroupLevel, LabelField, Perturbation, Stage, Subset

TARGETS = {"aspirin": "PTGS1", "ibuprofen": "PTGS1", "naproxen": "PTGS1"}
TARGETS |= {"taxol": "TUBB", "colchicine": "TUBB", "vinblastine": "TUBB"}


def fill(workspace: Workspace, *layouts: str, names: dict[str, str] | None = None) -> None:
    """A plate P1, P2, ... for each layout: a well of two images for each word."""
    with workspace.database.begin() as session:
        ids: dict[str, int] = {}
        for name in sorted({name for layout in layouts for name in layout.split()}):
            treatment = Treatment(
                identity=name,
                kind=Perturbation.COMPOUND,
                pert_iname=name,
                target=TARGETS.get(name),
                inchikey=(names or {}).get(name),
            )
            session.add(treatment)
            session.flush()
            ids[name] = treatment.id
        for number, layout in enumerate(layouts, start=1):
            plate = Plate(barcode=f"P{number}", batch=f"B{(number + 1) // 2}")
            session.add(plate)
            session.flush()
            for column, name in enumerate(layout.split(), start=1):
                place = {"row": 1, "column": column, "name": f"A{column:02d}"}
                well = Well(plate_id=plate.id, treatment_id=ids[name], **place)
                session.add(well)
                session.flush()
                for site in (1, 2):
                    digest = hashlib.sha256(f"{number} {column} {site}".encode()).hexdigest()
                    image = Image(well_id=well.id, site=site, core_name="x", content_sha256=digest)
                    session.add(image)


def sides(workspace: Workspace, name: str) -> dict[str, Subset]:
    """The side of each image, named ``P1 A01 1 aspirin``."""
    query = (
        select(Plate.barcode, Well.name, Image.site, Treatment.pert_iname, SplitMember.subset)
        .join(Image, Image.id == SplitMember.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(Treatment, Treatment.id == Well.treatment_id)
        .join(Split, Split.id == SplitMember.split_id)
        .where(Split.name == name)
    )
    with workspace.database.read() as session:
        return {" ".join(map(str, row[:4])): row[4] for row in session.execute(query)}


def parts(workspace: Workspace, name: str, word: int) -> dict[str, set[Subset]]:
    found: dict[str, set[Subset]] = {}
    for image, side in sides(workspace, name).items():
        found.setdefault(image.split()[word], set()).add(side)
    return found


DRUGS = "aspirin ibuprofen naproxen taxol colchicine vinblastine"
BY_TREATMENT = SplitParams(group_level=GroupLevel.TREATMENT, field=LabelField.TARGET)


def test_a_compound_is_on_one_side_under_all_its_names(workspace: Workspace) -> None:
    one = {"aspirin": "BSYNRYMUTXBXSQ-UHFFFAOYSA-N", "ASA": "BSYNRYMUTXBXSQ-UHFFFAOYSA-N"}
    fill(workspace, f"{DRUGS} ASA Taxol", f"{DRUGS} ASA Taxol", names=one)
    with workspace.database.begin() as session:
        for name, target in (("ASA", "PTGS1"), ("Taxol", "TUBB")):
            session.execute(
                update(Treatment).where(Treatment.pert_iname == name).values(target=target)
            )
    for seed in range(4):
        name = f"drugs {seed}"
        create_split(workspace, name, SplitParams(**{**vars(BY_TREATMENT), "seed": seed}))
        found = parts(workspace, name, 3)
        assert {len(on) for on in found.values()} == {1}
        assert found["aspirin"] == found["ASA"]
        assert found["taxol"] == found["Taxol"]
        assert Counter(min(on) for on in found.values()).keys() == set(Subset)
        findings = check_split(workspace, name).findings
        assert LeakSeverity.LEAK not in {item.severity for item in findings}


def test_by_treatment_the_class_must_be_coarser(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, DRUGS)
    with pytest.raises(UserInputError, match="--field target"):
        create_split(sqlite_workspace, "s", SplitParams(group_level=GroupLevel.TREATMENT))


def test_plates_are_named(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 4)
    params = SplitParams(
        group_level=GroupLevel.PLATE, test_plates=("P2", "P4"), validation_plates=("P1",)
    )
    create_split(workspace, "s", params)
    assert parts(workspace, "s", 0) == {
        "P1": {Subset.VALIDATION},
        "P2": {Subset.TEST},
        "P3": {Subset.TRAIN},
        "P4": {Subset.TEST},
    }


def test_folds_are_a_family_all_or_none(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 4)
    params = SplitParams(folds=4)
    made = create_folds(workspace, "cv", params)
    assert [item.name for item in made] == ["cv-1", "cv-2", "cv-3", "cv-4"]
    assert [(item.family, item.fold) for item in made] == [("cv", n) for n in (1, 2, 3, 4)]
    assert {item.run_id for item in made} == {made[0].run_id}
    tested = Counter(
        image
        for item in made
        for image, side in sides(workspace, item.name).items()
        if side is Subset.TEST
    )
    assert (len(tested), set(tested.values())) == (16, {1})
    again = create_folds(workspace, "cv", params)
    assert not any(item.created for item in again)
    assert [item.fingerprint for item in again] == [item.fingerprint for item in made]
    with workspace.database.read() as session:
        assert len(session.scalars(select(Run.id)).all()) == 1
    # A name that is taken stops all of them.
    create_split(workspace, "other-3", SplitParams())
    with pytest.raises(UserInputError, match="another split 'other-3'"):
        create_folds(workspace, "other", params)
    assert {line.family for line in list_splits(workspace)} == {"cv", None}
    assert len(list_splits(workspace)) == 5


def test_a_condition_chooses_the_images_and_is_kept(workspace: Workspace) -> None:
    fill(workspace, "aspirin taxol DMSO", "aspirin taxol DMSO", "aspirin taxol DMSO")
    condition = "batch = 'B1' AND pert_iname <> 'DMSO' OR plate = 'P3' AND column <= 2"
    result = create_split(workspace, "s", SplitParams(where=condition, validation_size=0))
    assert {image.split()[3] for image in sides(workspace, "s")} == {"aspirin", "taxol"}
    assert result.images == 12
    with workspace.database.read() as session:
        assert len(session.execute(text(result.query)).all()) == 12
        recipe = session.scalars(select(Recipe).where(Recipe.stage == Stage.SPLIT)).one()
        assert recipe.parameters["where"] == condition
    with pytest.raises(UserInputError, match="No image meets the condition"):
        create_split(workspace, "none", SplitParams(where="plate = 'P9'"))


def test_a_pattern_chooses_the_same_images_on_both_databases(workspace: Workspace) -> None:
    fill(workspace, *["Taxol taxol taxotere aspirin"] * 2)
    params = SplitParams(where="pert_iname LIKE 'tax%'", validation_size=0)
    create_split(workspace, "s", params)
    assert parts(workspace, "s", 3).keys() == {"taxol", "taxotere"}
    create_split(workspace, "any", SplitParams(where="pert_iname ILIKE 'tax%'", validation_size=0))
    assert parts(workspace, "any", 3).keys() == {"Taxol", "taxol", "taxotere"}


def test_what_an_old_split_was_drawn_from_has_the_same_fingerprint(
    sqlite_workspace: Workspace,
) -> None:
    fill(sqlite_workspace, *["aspirin taxol"] * 3)
    create_split(sqlite_workspace, "s", SplitParams())
    with sqlite_workspace.database.read() as session:
        (recipe,) = session.scalars(select(Recipe))
    assert recipe.parameters.keys() == {
        *("protocol", "field", "group_level", "test_size", "validation_size", "seed", "plates"),
        *("allow_missing", "images"),
    }


def test_the_same_on_both_databases_and_for_ever(workspace: Workspace) -> None:
    # Golden: written down when these kinds of splits were made.
    fill(workspace, *[f"{DRUGS} DMSO DMSO DMSO"] * 5)
    cut = (("DMSO", "second-largest"),)
    kinds = {
        "well": SplitParams(seed=1),
        "cut": SplitParams(seed=1, downsample=cut),
        "plate": SplitParams(seed=1, group_level=GroupLevel.PLATE),
        "treatment": SplitParams(seed=1, group_level=GroupLevel.TREATMENT, field=LabelField.TARGET),
        "published": SplitParams(seed=1, protocol="published"),
    }
    found = {
        name: create_split(workspace, name, params).fingerprint[:12]
        for name, params in kinds.items()
    }
    for level in (GroupLevel.WELL, GroupLevel.PLATE):
        made = create_folds(workspace, f"cv {level}", SplitParams(folds=3, group_level=level))
        found |= {item.name: item.fingerprint[:12] for item in made}
    assert found == GOLDEN


GOLDEN = {
    # The first three are also what cellstore drew before there were the others.
    "well": "274ed9b834d5",
    "plate": "e4377caf2f2e",
    "published": "9bf3bec9299b",
    "cut": "53252bd10007",
    "treatment": "1fdaec73868a",
    "cv well-1": "823f6c6caa45",
    "cv well-2": "7d2251e1a458",
    "cv well-3": "375a66dd9965",
    "cv plate-1": "f94ad4ca5aeb",
    "cv plate-2": "6cb28dbf741b",
    "cv plate-3": "f0278a5147be",
}


def test_classes_are_cut_and_left_out(workspace: Workspace) -> None:
    fill(workspace, "DMSO DMSO DMSO DMSO DMSO aspirin aspirin aspirin taxol taxol taxol colchicine")
    cut = (("DMSO", "median"), ("taxol", "5"))
    params = SplitParams(downsample=cut, min_images=4)
    result = create_split(workspace, "s", params)
    # 10, 6, 6 images; the median of 6 and 6; as many wells as possible keep one.
    assert result.left_out["downsampled"] == {
        "DMSO": {"before": 10, "after": 6},
        "taxol": {"before": 6, "after": 5},
    }
    assert [item["label"] for item in result.left_out["classes"]] == ["colchicine"]
    wells = Counter(image.split()[1] for image in sides(workspace, "s") if "DMSO" in image)
    assert sorted(wells.values()) == [1, 1, 1, 1, 2]


def test_cells_are_counted_from_the_last_segmentation(workspace: Workspace) -> None:
    fill(workspace, "DMSO DMSO DMSO DMSO aspirin aspirin taxol taxol")
    params = SplitParams(downsample_by="cell", validation_size=0)
    with pytest.raises(UnknownNameError, match="cellstore segment"):
        create_split(workspace, "s", params)
    make = Factory(workspace)
    run = make.run(Stage.SEGMENT)
    with workspace.database.read() as session:
        images = session.scalars(select(Image).order_by(Image.id)).all()
    for image in images[:-1]:
        make.segmentation(image, run, n_cells=3 if image.well_id == images[0].well_id else 2)
    with pytest.raises(UserInputError, match="1 of 16 images have no cells"):
        create_split(workspace, "s", params)
    make.segmentation(images[-1], run, n_cells=2)
    # DMSO has 3+3 and six times 2 cells, aspirin and taxol 8.
    result = create_split(workspace, "s", params)
    after = result.left_out["downsampled"]["DMSO"]["after"]
    assert after in (3, 4)  # 8 cells at most
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, session.scalars(select(Split.recipe_id)).one())
        assert recipe.parameters["downsample_by"] == "cell"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"downsample": (("DMSO", "few"),)}, "Cut 'DMSO' to 'few'"),
        ({"downsample": (("DMSO", "0"),)}, "Cut 'DMSO' to '0'"),
        ({"downsample_by": "pixel"}, "Unknown unit of --downsample-by 'pixel'"),
        ({"protocol": "published", "folds": 3}, "without --folds"),
        ({"protocol": "published", "downsample": ()}, "without --downsample"),
        ({"test_plates": ("P1",)}, "--group plate"),
        ({"validation_plates": ("P1",), "group_level": "plate"}, "plates that test, too"),
        ({"test_plates": ("P1",), "group_level": "plate", "folds": 3}, "each plate tests in turn"),
        ({"folds": 3}, "create_folds"),
        ({"where": "colour = 'red'"}, "Unknown column 'colour'"),
        ({"min_images": 99}, "have 99 images or more"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_one_sentence(sqlite_workspace, params, message) -> None:
    fill(sqlite_workspace, "aspirin aspirin taxol taxol")
    with pytest.raises(UserInputError, match=message):
        create_split(sqlite_workspace, "s", SplitParams(**params))
    with sqlite_workspace.database.read() as session:
        assert session.scalars(select(Run.id)).all() == []


def test_splits_are_listed_and_those_unused_deleted(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 3)
    create_split(workspace, "used")
    create_split(workspace, "unused", SplitParams(seed=1))
    create_folds(workspace, "cv", SplitParams(folds=3))
    with workspace.database.read() as session:
        used = session.scalars(select(Split).where(Split.name == "used")).one()
    make = Factory(workspace)
    run = make.run(Stage.TRAIN, split_id=used.id)
    first = list_splits(workspace)[0]
    assert (first.name, first.train, first.validation, first.test) == ("used", 4, 4, 4)
    assert (first.runs, first.frozen) == (1, True)
    with pytest.raises(UserInputError, match=rf"'used' stays: run {run.id} relies on it"):
        delete_split(workspace, "used")
    assert delete_split(workspace, "unused").names == ("unused",)
    with workspace.database.read() as session:
        fold = session.scalars(select(Split).where(Split.name == "cv-2")).one()
    make.run(Stage.TRAIN, split_id=fold.id)
    with pytest.raises(UserInputError, match="'cv-2' stays"):
        delete_split(workspace, "cv")
    assert [line.name for line in list_splits(workspace)] == ["used", "cv-1", "cv-2", "cv-3"]
    with pytest.raises(UnknownNameError, match="Unknown split 'unused'"):
        delete_split(workspace, "unused")


def test_all_folds_of_a_family_go_at_once(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 3)
    create_folds(workspace, "cv", SplitParams(folds=3))
    assert delete_split(workspace, "cv").names == ("cv-1", "cv-2", "cv-3")
    assert list_splits(workspace) == ()
    with workspace.database.read() as session:
        assert session.scalars(select(SplitGroup)).all() == []
    assert all(item.created for item in create_folds(workspace, "cv", SplitParams(folds=3)))


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
    assert result.left_out["rows_without_image"] == {
        "count": 2,
        "examples": ["split.csv, line 6", "split.csv, line 7"],
    }
    assert result.left_out["rows_refused"]["count"] == 2
    assert not import_split(workspace, "theirs", [table]).created
    check = check_split(workspace, "theirs")
    assert (check.leaks, check.unseen) == (1, 0)
    assert check.findings[0].kind is LeakKind.WELL
    with workspace.database.read() as session:
        assert len(session.execute(text(show_split(workspace).query)).all()) == 5
        recipe = session.scalars(select(Recipe)).one()
        assert recipe.parameters["files"].keys() == {"split.csv"}
    with pytest.raises(UserInputError, match="one side only"):
        import_split(workspace, "kept", [table], group_level=GroupLevel.WELL)
    assert [line.name for line in list_splits(workspace)] == ["theirs"]


def test_words_that_a_program_gets_wrong_are_named(sqlite_workspace, tmp_path) -> None:
    table = write(tmp_path / "s.csv", "split,pert_iname", "train,aspirin")
    with pytest.raises(UnknownNameError, match="Unknown label field 'colour'"):
        import_split(sqlite_workspace, "s", [table], "colour")  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match="names an image of this store"):
        import_split(sqlite_workspace, "s", [table], "target")  # type: ignore[arg-type]


def test_images_whose_bytes_are_unknown_are_told_by_the_check(sqlite_workspace) -> None:
    fill(sqlite_workspace, *["aspirin taxol"] * 3)
    with sqlite_workspace.database.begin() as session:
        session.execute(update(Image).where(Image.site == 1).values(content_sha256=None))
    create_split(sqlite_workspace, "s", SplitParams(allow_missing=True))
    assert check_split(sqlite_workspace, "s").unseen == 6


def test_a_table_of_treatments_needs_no_wells(workspace: Workspace, tmp_path: Path) -> None:
    fill(workspace, "aspirin taxol", "aspirin taxol")
    table = write(tmp_path / "s.tsv", "subset\tpert_iname", "train\taspirin", "test\ttaxol")
    result = import_split(workspace, "s", [table], group_level=GroupLevel.TREATMENT)
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
    assert "no row of wells.csv" in result.left_out["rows_refused"]["examples"][0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Metadata_Plate,Metadata_Well", "P1,A01"], "no column 'split'"),
        (["split,colour", "train,red"], "does not say what it splits"),
        (["split,well", "train,A01"], "of which plate"),
        (["split,plate,well", "train,P9,A01"], "names an image of this store"),
        (["split,plate,well", "train,P1,A01", "test,P1,A01"], "put on two sides, first P1 A01"),
        (["split,plate,well", "later,P1,A01"], "'later' is not train"),
    ],
    ids=range(6),
)
def test_tables_that_are_no_split(sqlite_workspace, tmp_path, lines, message) -> None:
    fill(sqlite_workspace, "aspirin taxol", "aspirin taxol")
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
        check_tables([table], LabelField.TARGET)


def test_wells_on_both_sides_are_found_without_knowing_what_they_got(tmp_path: Path) -> None:
    lines = ["split,plate,well", "train,P1,A01", "test,P1,A01", "test,P1,A02"]
    found = check_tables([write(tmp_path / "t.csv", *lines)])
    assert [item.kind for item in found.findings if item.severity == "leak"] == [LeakKind.WELL]
    assert (found.wells, found.labels) == (2, 0)


def test_a_correction_after_the_split_is_found_by_the_check(workspace: Workspace) -> None:
    fill(workspace, f"{DRUGS} {DRUGS}")
    create_split(workspace, "s", BY_TREATMENT)
    assert check_split(workspace, "s").leaks == 0
    sides_by_name = parts(workspace, "s", 3)
    with workspace.database.begin() as session:
        ids = dict(session.execute(select(Treatment.pert_iname, Treatment.id)).all())
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
    assert (alone.rows, alone.labels, alone.labels_on_both_sides, alone.leaks) == (
        3272,
        178,
        160,
        0,
    )
    joined = check_tables([split, wells])
    assert (joined.rows, joined.wells, joined.wells_on_both_sides) == (14265, 14265, 0)
    (spelled,) = (item for item in joined.findings if item.kind is LeakKind.SPELLING)
    assert spelled.examples == ("'ME-0328' (test, validation) = 'ME0328' (test, validation)",)
