"""Which images a command is about: plates, wells, limits, and conditions in SQL."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
from factories import Factory
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from cellstore.config import Selection
from cellstore.errors import CellstoreError, UnknownNameError, UserInputError
from cellstore.jobs.conditions import COLUMNS, condition
from cellstore.jobs.lookup import find_image, images_of
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image


@pytest.fixture
def plates(workspace: Workspace) -> Workspace:
    """P1 with A01 (DMSO), A02 (taxol) and B01 (nothing known), P2 with A01; two sites each."""
    make = Factory(workspace)
    dmso, taxol = make.treatment("DMSO"), make.treatment("taxol", "TUBB")
    one, two = make.plate("P1", batch="b1"), make.plate("P'2")
    wells = [make.well(one, 1, 1, dmso), make.well(one, 1, 2, taxol), make.well(one, 2, 1)]
    wells.append(make.well(two, 1, 1, taxol))
    for well in wells:
        for site in (1, 2):
            make.image(well, site=site)
    return workspace


def chosen(workspace: Workspace, selection: Selection) -> list[int]:
    """The images by their number, from 1 in the order of the fixture."""
    with workspace.database.read() as session:
        first = session.scalars(select(Image.id).order_by(Image.id).limit(1)).one()
        query = images_of(session, selection).order_by(Image.id)
        return [image - first + 1 for image in session.scalars(query)]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Selection(plates=("P'2",)), [7, 8]),
        (Selection(wells=("a1",)), [1, 2, 7, 8]),
        (Selection(plates=("P1",), wells=("A01", "B1")), [1, 2, 5, 6]),
        (Selection(wells=("P'2/A01", "B1")), [5, 6, 7, 8]),
        (Selection(images=("P1/A02/2", "P'2/r01c01f01")), [4, 7]),
        (Selection(images=("P1/A1",), wells=("A01",), limit=1), [1]),
        (Selection(limit=3), [1, 2, 3]),
        (Selection(wells=("A02", "B01"), limit=3), [3, 4, 5]),
        (Selection(where="perturbation = 'DMSO'"), [1, 2]),
        (Selection(where="plate = 'P''2' or well_row = 2"), [5, 6, 7, 8]),
        (Selection(where="target is null and site = 2"), [2, 6]),
        (Selection(where="not (well like 'A%')"), [5, 6]),
        (Selection(where="perturbation in ('DMSO', 'x') -- and so on"), [1, 2]),
        (Selection(where="well_column between 2 and 9"), [3, 4]),
        (Selection(where="site <> 1 AND control IS NOT NULL"), [2]),
        (Selection(where="control = 'negative' and site >= -1"), [1, 2]),
        (Selection(where="batch ilike 'B_'", limit=1), [1]),
        (Selection(where="false"), []),
    ],
    ids=repr,
)
def test_images_that_meet_every_condition(plates: Workspace, selection: Selection, expected):
    assert chosen(plates, selection) == expected


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("site = 1; DROP TABLE images", "cannot be read"),
        ("site IN (SELECT 1)", "no comparison"),
        ("1 = 1) OR (1 = 1", "more than one condition"),
        ("pg_sleep(10) = 1", "name of a column"),
        ("site = randomblob(9)", "no plain value"),
        ("site", "no comparison"),
        ("'unclosed", "cannot be read"),
        (" ", "it is empty"),
        ("plate = P1", "put text in single quotes"),
        ("site = 'abc'", "takes a number"),
        ("site IN (1, 'x')", "takes a number"),
        ("plate = 5", "takes text"),
        ("well_row > 'A'", "takes a number"),
        ("site LIKE '1'", "LIKE is for columns of text"),
        ("site IS 5", "IS goes with NULL"),
        ("lower(plate) = 'a'", "name of a column"),
        ("plate = site", "put text in single quotes"),
        ("site = 99999999999999999999", "too large"),
        ("site = true", "no plain value"),
        ("images.id = 1", "name of a column"),
        ("(" * 3000 + "site = 1" + ")" * 3000, "nested too deeply"),
    ],
)
def test_anything_else_is_refused(where: str, says: str):
    with pytest.raises(UserInputError) as caught:
        condition(where)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_dose_is_compared_as_a_number(plates: Workspace) -> None:
    make = Factory(plates)
    plate = make.plate("P3")
    doses = [("taxol", 2.0)], [("taxol", 10.0)], [("taxol", 10.0), ("zinc", 1.0)]
    for column, parts in enumerate(doses, start=1):
        make.image(make.well(plate, 1, column, make.doses(*parts)))
    assert chosen(plates, Selection(where="perturbation = 'taxol' and dose >= 2.5")) == [10]
    assert chosen(plates, Selection(where="dose between 1 and 10")) == [9, 10]
    assert chosen(plates, Selection(plates=("P3",), where="dose is null")) == [11]
    assert chosen(plates, Selection(where="name_with_dose = 'taxol 10 uM'")) == [10]


def test_the_help_names_every_column_of_a_condition():
    (text,) = (f.metadata["help"] for f in dataclasses.fields(Selection) if f.name == "where")
    assert set(COLUMNS) <= set(re.findall(r"\w+", text.partition("over")[2]))


def test_unknown_names_are_told_with_those_there_are(plates: Workspace):
    with pytest.raises(UnknownNameError, match="perturbation"):
        chosen(plates, Selection(where="perturbatoin = 'DMSO'"))
    with pytest.raises(UnknownNameError, match="A01"):
        chosen(plates, Selection(wells=("A09",)))
    with pytest.raises(UnknownNameError, match="P1"):
        chosen(plates, Selection(plates=("P9",)))


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_no_text_is_more_than_a_sentence_of_refusal(text: str):
    with contextlib.suppress(CellstoreError):
        compiled = condition(text).compile()
        assert not compiled.params or "'" not in str(compiled)


@given(st.sampled_from(["plate", "image", "perturbation"]), st.text(max_size=20))
def test_a_quoted_value_is_bound_as_it_is(column: str, value: str):
    value = value.replace("\0", "").replace("\\", "")
    found = condition(f"{column} = '{value.replace(chr(39), chr(39) * 2)}'")
    assert list(found.compile().params.values()) == [value]


def test_images_are_named_as_they_are_shown(workspace: Workspace):
    make = Factory(workspace)
    well = make.well(make.plate("P1"), 2, 3)
    ids = [make.image(well, plane=plane, time_point=time).id for plane in (1, 2) for time in (1, 2)]
    names = [
        "P1/r02c03f01 plane 1",
        "P1/r02c03f01 time 2",
        "P1/B03/1 plane 2",
        "B3/1 plane 2 time 2",
    ]
    with workspace.database.read() as session:
        assert [find_image(session, name) for name in names] == ids
        with pytest.raises(
            UserInputError, match="several images: P1/r02c03f01 plane 1 time 1, P1/"
        ):
            find_image(session, "P1/B03/1")
        with pytest.raises(UnknownNameError):
            find_image(session, "P1/B03/1 plane 3")
    assert len(chosen(workspace, Selection(images=("P1/B03/1",)))) == 4
    assert chosen(workspace, Selection(images=("P1/B03/1 plane 2 time 2",))) == [4]
