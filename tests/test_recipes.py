"""Fingerprints: the same recipe is the same number, whoever writes it down and when."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from cellstore.config import SegmentParams
from cellstore.enums import Stage
from cellstore.errors import UserInputError
from cellstore.jobs.runs import RecipeSpec, fingerprint, register
from cellstore.jobs.workspace import Workspace
from cellstore.models import Recipe, RecipeInput

SPEC = RecipeSpec(Stage.SEGMENT, 1, {"model": "m", "diameter": None}, "a" * 64)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_the_fingerprint_is_the_sha256_of_canonical_json():
    text = (
        '{"inputs":[],"parameters":{"diameter":null,"model":"m"},"stage":"segment","version":1,'
        f'"weights":"{"a" * 64}"}}'
    )
    assert fingerprint(SPEC) == hashlib.sha256(text.encode()).hexdigest()


def test_the_published_segmentation_keeps_its_fingerprint():
    # Golden: computed once with sha256 over the canonical JSON. A change here makes every store
    # compute everything again: raise the stage's version instead if its output has changed.
    parameters = asdict(SegmentParams.of("published"))
    spec = RecipeSpec(Stage.SEGMENT, 1, parameters, "0" * 64)
    assert fingerprint(spec) == "c456810621ce4b261e7912e3c9a8584e5ff9df1fea50e676f3dd414bef9dfe20"


@pytest.mark.parametrize("change", [{"nuclei": ("DNA",)}, {"diameter": 30.0}])
def test_every_option_is_in_the_fingerprint(change):
    plain = asdict(SegmentParams.of("published"))
    used = asdict(SegmentParams.of("published", **change))
    assert set(used) == set(plain)
    assert fingerprint(replace(SPEC, parameters=used)) != fingerprint(
        replace(SPEC, parameters=plain)
    )


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(parameters, random):
    keys = list(parameters)
    random.shuffle(keys)
    shuffled = {key: parameters[key] for key in keys}
    assert fingerprint(replace(SPEC, parameters=parameters)) == fingerprint(
        replace(SPEC, parameters=shuffled)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"stage": Stage.MEASURE},
        {"version": 2},
        {"parameters": {"model": "m", "diameter": 30.0}},
        {"weights_sha256": "b" * 64},
        {"weights_sha256": None},
        {"inputs": (Recipe(fingerprint="c" * 64),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_the_result_counts(change):
    assert fingerprint(replace(SPEC, **change)) != fingerprint(SPEC)


def test_the_order_of_inputs_does_not_matter():
    inputs = (Recipe(fingerprint="c" * 64), Recipe(fingerprint="d" * 64))
    assert fingerprint(replace(SPEC, inputs=inputs)) == fingerprint(
        replace(SPEC, inputs=inputs[::-1])
    )


def test_a_number_that_is_none_is_refused():
    with pytest.raises(UserInputError, match="not a finite number"):
        fingerprint(replace(SPEC, parameters={"diameter": float("nan")}))


def test_a_recipe_is_registered_once(workspace: Workspace):
    with workspace.database.begin() as session:
        source = register(session, SPEC)
        spec = RecipeSpec(Stage.MEASURE, 1, {}, inputs=(source,))
        first = register(session, spec).id
    with workspace.database.begin() as session:
        assert register(session, spec).id == first
        assert session.scalar(select(func.count()).select_from(Recipe)) == 2
        assert session.scalars(select(RecipeInput.input_id)).all() == [source.id]
