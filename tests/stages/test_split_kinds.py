"""Splits of every kind as rows: treatments, named plates, folds, conditions."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from factories import Factory
from split_screens import BY_TREATMENT, DRUGS, fill, parts, sides
from sqlalchemy import select, text, update

from cellstore.analysis.leaks import LeakSeverity
from cellstore.config import SplitParams
from cellstore.enums import TARGET, GroupLevel, Stage, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Image,
    Label,
    Recipe,
    Run,
    Split,
    SplitGroup,
    SplitMember,
    Treatment,
    Well,
)
from cellstore.stages.split import (
    check_split,
    create_folds,
    create_split,
    delete_split,
    list_splits,
)

pytestmark = pytest.mark.one_database


@pytest.mark.each_database
def test_a_compound_is_on_one_side_under_all_its_names(workspace: Workspace) -> None:
    one = {"aspirin": "BSYNRYMUTXBXSQ-UHFFFAOYSA-N", "ASA": "BSYNRYMUTXBXSQ-UHFFFAOYSA-N"}
    fill(workspace, f"{DRUGS} ASA Taxol", f"{DRUGS} ASA Taxol", names=one)
    with workspace.database.begin() as session:
        for name, target in (("ASA", "PTGS1"), ("Taxol", "TUBB")):
            session.execute(update(Treatment).where(Treatment.name == name).values(target=target))
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
        create_split(sqlite_workspace, "s", SplitParams(group_level=GroupLevel.PERTURBATION))


GENES = {"taxol": "TUBB", "vinblastine": "TUBB", "zinc": "MT1A", "cadmium": "MT1A"}


def test_each_dose_is_a_class_or_all_doses_are_one(workspace: Workspace) -> None:
    make = Factory(workspace)
    for name, gene in GENES.items():
        make.treatment(name, gene)
    parts = [(name, dose) for name in GENES for dose in (1.0, 10.0)]
    treatments = [make.doses(part) for part in parts]
    plate = make.plate("P1")
    for row in range(1, 6):
        for column, treatment in enumerate(treatments, start=1):
            make.image(make.well(plate, row, column, treatment))
    assert create_split(workspace, "doses", SplitParams(field="treatment")).classes == 8
    assert create_split(workspace, "drugs", SplitParams()).classes == 4
    params = SplitParams(field=TARGET, group_level=GroupLevel.PERTURBATION, validation_size=0)
    assert create_split(workspace, "genes", params).classes == 2
    labels = select(Label.value).join(SplitMember).join(Split).where(Split.name == "doses")
    together = (
        select(SplitMember.image_id, SplitMember.subset, Treatment.name)
        .join(Image, Image.id == SplitMember.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Treatment, Treatment.id == Well.treatment_id)
        .join(Split, Split.id == SplitMember.split_id)
        .where(Split.name == "genes")
    )
    with workspace.database.read() as session:
        assert set(session.scalars(labels)) == {f"{name} {dose:g} uM" for name, dose in parts}
        subsets = {(row.name, row.subset) for row in session.execute(together)}
    assert len(subsets) == len({name for name, _ in subsets})  # all doses of a compound together
    with pytest.raises(UserInputError, match="Predict something coarser"):
        SplitParams(field="treatment", group_level=GroupLevel.PERTURBATION)


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


@pytest.mark.each_database
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


@pytest.mark.each_database
def test_a_condition_chooses_the_images_and_is_kept(workspace: Workspace) -> None:
    fill(workspace, "aspirin taxol DMSO", "aspirin taxol DMSO", "aspirin taxol DMSO")
    condition = "batch = 'B1' AND perturbation <> 'DMSO' OR plate = 'P3' AND well_column <= 2"
    result = create_split(workspace, "s", SplitParams(where=condition, validation_size=0))
    assert {image.split()[3] for image in sides(workspace, "s")} == {"aspirin", "taxol"}
    assert result.images == 12
    with workspace.database.read() as session:
        assert len(session.execute(text(result.query)).all()) == 12
        recipe = session.scalars(select(Recipe).where(Recipe.stage == Stage.SPLIT)).one()
        assert recipe.parameters["where"] == condition
    with pytest.raises(UserInputError, match="No image meets the condition"):
        create_split(workspace, "none", SplitParams(where="plate = 'P9'"))


@pytest.mark.each_database
def test_a_pattern_chooses_the_same_images_on_both_databases(workspace: Workspace) -> None:
    fill(workspace, *["Taxol taxol taxotere aspirin"] * 2)
    params = SplitParams(where="perturbation LIKE 'tax%'", validation_size=0)
    create_split(workspace, "s", params)
    assert parts(workspace, "s", 3).keys() == {"taxol", "taxotere"}
    create_split(
        workspace, "any", SplitParams(where="perturbation ILIKE 'tax%'", validation_size=0)
    )
    assert parts(workspace, "any", 3).keys() == {"Taxol", "taxol", "taxotere"}


def test_the_recipe_of_a_split_holds_every_parameter(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, *["aspirin taxol"] * 3)
    create_split(sqlite_workspace, "s", SplitParams())
    with sqlite_workspace.database.read() as session:
        (recipe,) = session.scalars(select(Recipe))
    assert recipe.parameters.keys() >= {item.name for item in fields(SplitParams)} - {
        "exclude_flagged"
    }
    assert len(recipe.parameters["images"]) == 64


@pytest.mark.each_database
def test_the_same_on_both_databases_and_for_ever(workspace: Workspace) -> None:
    # Golden: written down when these kinds of splits were made.
    fill(workspace, *[f"{DRUGS} DMSO DMSO DMSO"] * 5)
    cut = (("DMSO", "second-largest"),)
    kinds = {
        "well": SplitParams(seed=1),
        "cut": SplitParams(seed=1, downsample=cut),
        "plate": SplitParams(seed=1, group_level=GroupLevel.PLATE),
        "treatment": SplitParams(seed=1, group_level=GroupLevel.PERTURBATION, field=TARGET),
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
    "well": "fd139a402586",
    "cut": "b18bf5fd15db",
    "plate": "c912554d5255",
    "treatment": "6e2b3aa4f431",
    "published": "435ee8fb3781",
    "cv well-1": "365202a76f92",
    "cv well-2": "8e7c74124ec6",
    "cv well-3": "cc531fcbf4e3",
    "cv plate-1": "7a9a614bdbf0",
    "cv plate-2": "17f6bb711486",
    "cv plate-3": "8264ec4d7510",
}


def test_classes_are_cut_and_left_out(workspace: Workspace) -> None:
    fill(workspace, "DMSO DMSO DMSO DMSO DMSO aspirin aspirin aspirin taxol taxol taxol colchicine")
    cut = (("DMSO", "median"), ("taxol", "5"))
    params = SplitParams(downsample=cut, min_images=4)
    result = create_split(workspace, "s", params)
    # 10, 6, 6 images; the median of 6 and 6; as many wells as possible keep one.
    assert result.excluded["downsampled"] == {
        "DMSO": {"before": 10, "after": 6},
        "taxol": {"before": 6, "after": 5},
    }
    assert [item["label"] for item in result.excluded["classes"]] == ["colchicine"]
    wells = Counter(image.split()[1] for image in sides(workspace, "s") if "DMSO" in image)
    assert sorted(wells.values()) == [1, 1, 1, 1, 2]


@pytest.mark.each_database
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
    after = result.excluded["downsampled"]["DMSO"]["after"]
    assert after in (3, 4)  # 8 cells at most
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, session.scalars(select(Split.recipe_id)).one())
        assert recipe.parameters["downsample_by"] == "cell"


@pytest.mark.each_database
def test_one_plate_or_one_replicate_is_left_out_in_each_fold(workspace: Workspace) -> None:
    fill(workspace, *["aspirin aspirin taxol taxol"] * 3)
    made = create_folds(workspace, "plates", SplitParams(leave_out="plate"))
    assert [item.group_level for item in made] == ["plate"] * 3
    for number, item in enumerate(made, start=1):
        on = parts(workspace, item.name, 0)
        assert on[f"P{number}"] == {Subset.TEST}
        assert Counter(side for (side,) in on.values()) == dict.fromkeys(Subset, 1)
    again = create_folds(workspace, "plates", SplitParams(leave_out="plate"))
    assert not any(item.created for item in again)

    # Columns that tables have of wells: the first and the second well of each treatment.
    with workspace.database.begin() as session:
        for well in session.scalars(select(Well)):
            well.metadata_ = {"replicate": str(2 - well.well_column % 2)}
    params = SplitParams(leave_out="Metadata_replicate", validation_size=0)
    first, second = create_folds(workspace, "replicates", params)
    assert parts(workspace, first.name, 1) == {
        "A01": {Subset.TEST},
        "A02": {Subset.TRAIN},
        "A03": {Subset.TEST},
        "A04": {Subset.TRAIN},
    }
    assert (second.counts["test"], second.counts["validation"]) == (12, 0)
    with workspace.database.begin() as session:
        session.execute(update(Well).where(Well.name == "A01").values(metadata_=None))
    with pytest.raises(UserInputError, match="6 of 24 images have no replicate"):
        create_folds(workspace, "rest", params)


def test_a_fold_that_would_test_nothing_is_refused(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, "aspirin taxol", "aspirin taxol", "zinc zinc")
    with pytest.raises(UserInputError, match=r"1 of 3 folds would test nothing.*'zinc' has 1 plat"):
        create_folds(sqlite_workspace, "p", SplitParams(leave_out="plate", validation_size=0))
    two = SplitParams(leave_out="plate", where="plate <> 'P3'")
    with pytest.raises(UserInputError, match=r"two plates: one would test.*--validation-size 0"):
        create_folds(sqlite_workspace, "p", two)
    assert len(create_folds(sqlite_workspace, "p", replace(two, validation_size=0))) == 2
    with pytest.raises(UserInputError, match="All images have the same plate"):
        create_folds(sqlite_workspace, "one", replace(two, plates=("P1",)))


def test_what_contradicts_itself_is_one_sentence(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, "aspirin aspirin taxol taxol")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"downsample": (("DMSO", "few"),)}, "Cut 'DMSO' to 'few'"),
        ({"downsample": (("DMSO", "0"),)}, "Cut 'DMSO' to '0'"),
        ({"downsample_by": "pixel"}, "Unknown downsample by 'pixel'"),
        ({"protocol": "published", "folds": 3}, "without --folds"),
        ({"protocol": "published", "downsample": ()}, "without --downsample"),
        ({"test_plates": ("P1",)}, "--group plate"),
        ({"validation_plates": ("P1",), "group_level": "plate"}, "plates that test, too"),
        (
            {"test_plates": ("P1",), "group_level": "plate", "folds": 3},
            "every plate is tested",
        ),
        ({"folds": 3}, "create_folds"),
        ({"folds": 3, "leave_out": "plate"}, "a fold for each value"),
        ({"leave_out": "batch", "group_level": "image"}, "leave --group out"),
        ({"protocol": "published", "leave_out": "plate"}, "without --leave-out"),
        ({"where": "colour = 'red'"}, "Unknown column 'colour'"),
        ({"min_images": 99}, "have 99 images or more"),
    ]
    for params, message in wrong:
        with pytest.raises(UserInputError, match=message):
            create_split(sqlite_workspace, "s", SplitParams(**params))
    with sqlite_workspace.database.read() as session:
        assert session.scalars(select(Run.id)).all() == []


@pytest.mark.each_database
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
    with pytest.raises(UserInputError, match=rf"'used' stays: it is used by run {run.id},"):
        delete_split(workspace, "used", dry_run=True)
    assert delete_split(workspace, "unused", dry_run=True).names == ("unused",)
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


def test_a_split_and_a_cross_validation_have_no_name_in_common(workspace: Workspace) -> None:
    fill(workspace, *["aspirin taxol"] * 3)
    create_folds(workspace, "cv", SplitParams(folds=3))
    create_split(workspace, "one")
    with pytest.raises(UserInputError, match="There is a cross-validation 'cv' already"):
        create_split(workspace, "cv")
    with pytest.raises(UserInputError, match="There is a split 'one' already"):
        create_folds(workspace, "one", SplitParams(folds=3))
    assert [line.name for line in list_splits(workspace)] == ["cv-1", "cv-2", "cv-3", "one"]
