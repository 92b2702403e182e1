"""Cells and their values out of a feature set, on both databases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from factories import Factory
from sqlalchemy import update

from cellstore.enums import ArtifactKind, Stage, Subset
from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.jobs.lookup import IS_CURRENT, images_of
from cellstore.jobs.workspace import Workspace
from cellstore.learn.branches import choose_branches
from cellstore.models import Cell, FeatureFile, FeatureSet, Image, Recipe, Segmentation
from cellstore.query.cells import (
    CellSource,
    choose_recipes,
    last_with_masks,
    list_blocks,
    read_cells,
    stream_features,
)
from cellstore.query.feature_files import find_feature_set, open_set

pytestmark = pytest.mark.one_database

UNKNOWN = {"content_sha256": None, "diameter": None, "flow_artifact_id": None}


@dataclass
class Screen:
    """Two images of another tool in a split: four cells, one of them excluded, and two."""

    make: Factory
    segment: Recipe
    images: list[Image]
    cells: list[Cell]
    split_id: int

    def source(self, workspace: Workspace, name: str = "cp") -> CellSource:
        with workspace.database.read() as session:
            found = find_feature_set(session, name)
            features = open_set(session, workspace.artifacts, found.recipe_id)
        return CellSource(self.segment.id, found.recipe_id, self.split_id, features=features)


def screen_of(workspace: Workspace, **known: object) -> Screen:
    make = Factory(workspace)
    segment = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler", "name": "cp"})
    run = make.run(Stage.INGEST)
    plate = make.plate()
    images = [make.image(make.well(plate, 1, column), missing=True) for column in (1, 2)]
    values = {**UNKNOWN, "mask_artifact_id": None, **known}
    first = make.segmentation(images[0], run, 3, recipe_id=segment.id, **values)
    make.cells(first, 1, excluded="touches the rim")
    second = make.segmentation(images[1], run, 2, recipe_id=segment.id, **values)
    label = make.label("DMSO")
    sides = (Subset.TRAIN, Subset.VALIDATION)
    split = make.split([(image, side, label) for image, side in zip(images, sides, strict=True)])
    cells = make.cells_of(first) + make.cells_of(second)
    with workspace.database.begin() as session:
        session.execute(update(Cell).values(min_row=None, centroid_row=None))
    return Screen(make, segment, images, cells, split.id)


@pytest.mark.each_database
def test_an_image_gets_the_values_of_its_cells(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    columns = {
        "a": [0.0, 1.0, None, 3.0, 4.0, 5.0],
        "b": [0, 10, 20, 30, 40, 50],
        "t": list("uvwxyz"),
    }
    screen.make.feature_files("cp", screen.cells, columns, screen.segment, rows_of_file=4)
    source = screen.source(workspace)
    assert source.features.columns == ("a", "b")  # a text is no feature
    with workspace.database.read() as session:
        first, second = (read_cells(session, source, i.id, ("b", "a")) for i in screen.images)
        everything = list(stream_features(session, source, ("b", "a")))
    assert first.cell_ids.tolist() == [cell.id for cell in screen.cells[:3]]
    assert (first.labels.tolist(), first.boxes) == ([1, 2, 3], None)
    np.testing.assert_array_equal(first.features, [[0, 0], [10, 1], [20, np.nan]])
    np.testing.assert_array_equal(second.features, [[40, 4], [50, 5]])
    np.testing.assert_array_equal(
        np.concatenate(everything), np.concatenate([first.features, second.features])
    )


def test_cells_that_the_set_does_not_have_are_left_out(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    some = [screen.cells[0], screen.cells[2], screen.cells[5]]
    screen.make.feature_files("cp", some, {"a": [1.0, 2.0, 3.0]}, screen.segment, rows_of_file=1)
    source = screen.source(workspace)
    with workspace.database.read() as session:
        blocks = list_blocks(session, source)
        read = [read_cells(session, source, image.id, ("a",)) for image in screen.images]
    assert [(b.image_id, b.n_cells, b.subset) for b in blocks] == [
        (screen.images[0].id, 2, Subset.TRAIN),
        (screen.images[1].id, 1, Subset.VALIDATION),
    ]
    assert [rows.cell_ids.tolist() for rows in read] == [[c.id for c in some[:2]], [some[2].id]]


def test_a_cell_that_is_in_two_files_is_told(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    for value in (1.0, 2.0):
        screen.make.feature_files("cp", screen.cells[:1], {"a": [value]}, screen.segment)
    with (
        workspace.database.read() as session,
        pytest.raises(StorageError, match=r"more than once.*cellstore verify"),
    ):
        read_cells(session, screen.source(workspace), screen.images[0].id, ("a",))


def test_a_file_that_cannot_be_read_is_told(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    screen.make.feature_files("cp", screen.cells, {"a": [1.0] * 6}, screen.segment)
    source = screen.source(workspace)
    (file,) = source.features.files or ()
    with workspace.database.read() as session:
        with pytest.raises(StorageError, match=r"no column 'z'.*cellstore verify"):
            read_cells(session, source, screen.images[0].id, ("z",))
        file.path.write_bytes(b"PAR1 damaged PAR1")
        with pytest.raises(StorageError, match=r"cannot be read.*cellstore verify"):
            read_cells(session, source, screen.images[0].id, ("a",))
    file.path.unlink()
    with pytest.raises(StorageError, match=r"is gone.*cellstore verify"):
        screen.source(workspace)


def test_a_set_without_numbers_or_cells_is_refused(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    screen.make.feature_files("texts", screen.cells, {"t": list("uvwxyz")}, screen.segment)
    with pytest.raises(UserInputError, match="has no column of numbers"):
        screen.source(workspace, "texts")
    screen.make.feature_files("empty", screen.cells, {"a": [1.0] * 6}, screen.segment)
    with workspace.database.begin() as session:
        for file in session.query(FeatureFile):
            session.delete(file)
    with pytest.raises(UserInputError, match="holds no cells yet"):
        screen.source(workspace, "empty")
    with pytest.raises(UnknownNameError, match="texts"):
        screen.source(workspace, "tests")


def test_images_of_unknown_bytes_are_segmented(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    with workspace.database.begin() as session:
        session.get_one(Image, screen.images[1].id).content_sha256 = "a" * 64
        found = images_of(session).join(Segmentation, IS_CURRENT)
        ready = session.scalars(found.where(Segmentation.recipe_id == screen.segment.id)).all()
    assert sorted(ready) == [image.id for image in screen.images]


@pytest.mark.each_database
@pytest.mark.parametrize(
    ("known", "branches"),
    [
        ({}, ("tabular",)),
        ({"mask_artifact_id": "made"}, ("mask", "tabular")),
        ({"mask_artifact_id": "made", "flow_artifact_id": "made"}, ("mask", "flow", "tabular")),
    ],
)
def test_the_branches_are_those_that_can_be_fed(
    workspace: Workspace, known: dict[str, str], branches: tuple[str, ...]
) -> None:
    screen = screen_of(workspace)
    with workspace.database.begin() as session:
        session.execute(update(Image).values(content_sha256="a" * 64))
    if known:
        made = screen.make.segmentation(
            screen.make.image(a_well(screen)), screen.make.run(Stage.SEGMENT)
        )
        with workspace.database.begin() as session:
            session.execute(
                update(Segmentation)
                .where(Segmentation.recipe_id == screen.segment.id)
                .values({name: getattr(made, name) for name in known})
            )
    source = CellSource(screen.segment.id, 0, screen.split_id)
    with workspace.database.read() as session:
        chosen, sentence = choose_branches(session, source, None)
        assert chosen == branches
        assert (sentence is None) == (len(branches) == 3)
        assert choose_branches(session, source, ["tabular"]) == (("tabular",), None)
        if len(branches) < 3:
            assert (sentence or "").endswith(f"{', '.join(branches)}.")
            with pytest.raises(UserInputError, match=f"Use --branches {','.join(branches)}"):
                choose_branches(session, source, ["flow"])


def a_well(screen: Screen):
    return screen.make.well(screen.make.plate(), 2, 2)


def test_masks_are_of_no_use_where_the_pixels_are_not_there(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    masks = screen.make.segmentation(
        screen.make.image(a_well(screen)), screen.make.run(Stage.SEGMENT)
    ).mask_artifact_id
    with workspace.database.begin() as session:
        session.execute(update(Segmentation).values(mask_artifact_id=masks))
        source = CellSource(screen.segment.id, 0, screen.split_id)
        assert choose_branches(session, source, None)[0] == ("tabular",)


@pytest.mark.each_database
def test_a_set_names_its_recipes(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    screen.make.feature_files("cp", screen.cells, {"a": [1.0] * 6}, screen.segment)
    other = screen.make.run(Stage.SEGMENT).recipe_id
    with workspace.database.read() as session:
        segment, measure = choose_recipes(session, None, None, "cp")
        assert segment.id == screen.segment.id
        assert measure.id == session.query(FeatureSet.recipe_id).scalar()
        assert choose_recipes(session, str(segment.id), str(measure.id), "cp") == (segment, measure)
        with pytest.raises(UserInputError, match=f"segment recipe {segment.id}, not to {other}"):
            choose_recipes(session, str(other), None, "cp")


def test_the_masks_used_last_may_be_of_another_tool(workspace: Workspace) -> None:
    screen = screen_of(workspace)
    screen.make.feature_files("cp", screen.cells, {"a": [1.0] * 6}, screen.segment)
    with (
        workspace.database.read() as session,
        pytest.raises(UserInputError, match="with --features: cp"),
    ):
        choose_recipes(session, None, None)
    make = screen.make
    ours = make.run(Stage.SEGMENT)
    make.segmentation(make.image(a_well(screen)), ours)
    with workspace.database.read() as session:
        assert last_with_masks(session).id == ours.recipe_id
    theirs = make.recipe(Stage.SEGMENT, parameters={"imported": "StarDist"})
    make.segmentation(
        make.image(a_well(screen)), make.run(Stage.INGEST), recipe_id=theirs.id, **UNKNOWN
    )
    with workspace.database.read() as session:
        assert last_with_masks(session).id == theirs.id


def test_a_set_in_files_is_read_by_name_only(workspace: Workspace) -> None:
    """Whoever measures textures after the built-in features still trains on the latter."""
    screen = screen_of(
        workspace, mask_artifact_id=Factory(workspace).artifact(ArtifactKind.MASK).id
    )
    make = screen.make
    basic = make.recipe(Stage.MEASURE, inputs=[screen.segment])
    make.feature_set(basic)
    wide = make.feature_files("texture", screen.cells, {"a": [1.0] * 6}, screen.segment)
    with workspace.database.read() as session:
        texture = session.get_one(Recipe, wide.recipe_id)
        with pytest.raises(UserInputError, match="not measured yet"):
            choose_recipes(session, str(screen.segment.id), None)
    for recipe in (basic, texture):
        make.job(make.run(Stage.MEASURE, recipe), screen.images[0])
    with workspace.database.read() as session:
        assert choose_recipes(session, None, None)[1].id == basic.id
        assert choose_recipes(session, None, None, "texture")[1].id == texture.id
