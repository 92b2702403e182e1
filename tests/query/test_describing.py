"""The schema in words: complete, nothing left over, true to the tables."""

from __future__ import annotations

from screens import small_screen

from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA
from cellstore.query.describe import RelationWords, written_words
from cellstore.query.source import VIEWS
from cellstore.store import Store


def named(relations: list[RelationWords], name: str) -> RelationWords:
    return next(item for item in relations if item.name == name)


def test_every_column_has_words_and_all_words_have_a_column(sqlite_workspace: Workspace) -> None:
    words = written_words()
    relations = Store(sqlite_workspace).schema()  # KeyError: a column without words
    used_shared = set()
    for item in relations:
        own = words.get(item.name, {})
        assert set(own) - {"about"} <= {column.name for column in item.columns}, item.name
        others = set(own) | (set(words["features"]) if item.name == "cell_table" else set())
        used_shared |= {column.name for column in item.columns} - others
    assert used_shared == set(words["shared"])
    assert set(words) - {"shared"} <= {item.name for item in relations}
    assert {item.name for item in relations} == {*METADATA.tables, "exclusions", *VIEWS}
    for item in relations:
        for text in (item.words, *(column.words for column in item.columns)):
            assert text.strip() == text != ""


def test_keys_and_references_are_those_of_the_database(workspace: Workspace) -> None:
    relations = Store(workspace).schema()
    cells = named(relations, "cells")
    by_name = {column.name: column for column in cells.columns}
    assert by_name["id"].key
    assert by_name["segmentation_id"].refers_to == "segmentations.id"
    assert by_name["excluded"].refers_to is None
    votes = {column.name: column for column in named(relations, "votes").columns}
    assert votes["image_id"].refers_to == "images.id"


def test_a_feature_set_says_what_was_measured(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    cells = make.cells_of(screen.segmentations["B01"])
    recipe = make.recipe(screen.segment_run.stage)
    make.feature_files("nuclei", cells, {"area": [1.0, 2.0, 3.0]}, recipe)
    found = named(Store(workspace).schema(), "nuclei")
    assert found.kind == "feature set"
    assert [column.name for column in found.columns] == ["cell_id", "area"]
    assert found.columns[0].refers_to == "cells.id"
