"""Splits become rows: all those of one call in one transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ...config import SplitParams
from ...db.models import Label, Recipe, Split, SplitMember
from ...db.statements import insert_new
from ...errors import UserInputError
from ...runs import RecipeSpec, Workspace, register, running
from ...terms import Subset
from .candidates import Candidate
from .facts import SplitResult
from .show import result_of


@dataclass(frozen=True)
class Drawn:
    """A split before it is written, its members in the order of their keys."""

    name: str
    params: SplitParams
    query: str
    members: tuple[tuple[Candidate, Subset], ...]
    left_out: dict[str, Any]
    family: str | None = None
    fold: int | None = None

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of what the split is: its members, their sides and labels."""
        params = self.params
        digest = hashlib.sha256(repr((params.protocol, params.field.value, params.seed)).encode())
        digest.update(params.group_level.value.encode())
        for item, side in self.members:
            digest.update(repr((item.key, item.label, side.value)).encode())
        return digest.hexdigest()


def keep(workspace: Workspace, drawn: Sequence[Drawn], spec: RecipeSpec) -> tuple[SplitResult, ...]:
    """Write the splits in one run, all or none; those that are there already stay as they are.

    Raises:
        UserInputError: a name is taken by another split, or the database refuses a split that
            has a group on two sides.
    """
    with workspace.database.begin() as session:
        there = {item.name: _existing(session, item) for item in drawn}
        _check_family(session, drawn[0])
        missing = [item for item in drawn if there[item.name] is None]
        if not missing:
            return tuple(result_of(session, split) for split in there.values() if split)
        recipe = register(session, spec)
    with running(
        workspace.database, recipe, seed=drawn[0].params.seed, query=drawn[0].query
    ) as run:
        _insert(workspace, missing, recipe)
        run.result = _told(missing)
    new = {item.name for item in missing}
    with workspace.database.read() as session:
        found = select(Split).where(Split.name.in_([item.name for item in drawn]))
        splits = {split.name: split for split in session.scalars(found)}
        results = [result_of(session, splits[item.name]) for item in drawn]
    return tuple(
        replace(item, created=True, run_id=run.id) if item.name in new else item for item in results
    )


def _told(drawn: Sequence[Drawn]) -> dict[str, Any]:
    if len(drawn) == 1 and drawn[0].family is None:
        return {"split": drawn[0].name, "images": len(drawn[0].members)}
    return {"splits": [item.name for item in drawn], "images": len(drawn[0].members)}


def _existing(session: Session, drawn: Drawn) -> Split | None:
    found = session.scalars(select(Split).where(Split.name == drawn.name)).one_or_none()
    if found is not None and (found.fingerprint, found.family) != (drawn.fingerprint, drawn.family):
        raise UserInputError(
            f"There is another split {drawn.name!r} already, and a split never changes. "
            "Choose another name."
        )
    return found


def _check_family(session: Session, drawn: Drawn) -> None:
    """Keep a cross-validation and a split from having one name: each is used by it."""
    taken = Split.family == drawn.name if drawn.family is None else Split.name == drawn.family
    if session.scalar(select(Split.id).where(taken).limit(1)) is not None:
        what = "a cross-validation" if drawn.family is None else "a split"
        raise UserInputError(
            f"There is {what} {drawn.family or drawn.name!r} already. Choose another name."
        )


def _insert(workspace: Workspace, drawn: Iterable[Drawn], recipe: Recipe) -> None:
    try:
        with workspace.database.begin() as session:
            for item in drawn:
                split = _new_split(item, recipe)
                session.add(split)
                session.flush()
                _insert_members(session, split.id, item)
    except IntegrityError as error:
        raise UserInputError(
            "Another program made a split of this name at this moment. Choose another name."
        ) from error


def _new_split(drawn: Drawn, recipe: Recipe) -> Split:
    return Split(
        name=drawn.name,
        recipe_id=recipe.id,
        protocol=drawn.params.protocol,
        field=drawn.params.field,
        group_level=drawn.params.group_level,
        seed=drawn.params.seed,
        query=drawn.query,
        fingerprint=drawn.fingerprint,
        left_out=drawn.left_out,
        created_at=datetime.now(UTC),
        frozen_at=None,
        family=drawn.family,
        fold=drawn.fold,
    )


def _insert_members(session: Session, split_id: int, drawn: Drawn) -> None:
    field = drawn.params.field
    values = sorted({item.label for item, _ in drawn.members})
    insert_new(session, Label, [{"field": field, "value": value} for value in values])
    known = select(Label.value, Label.id).where(Label.field == field)
    ids = dict(session.execute(known).all())
    rows = [
        {
            "split_id": split_id,
            "image_id": item.image_id,
            "subset": side,
            "label_id": ids[item.label],
        }
        for item, side in drawn.members
    ]
    insert_new(session, SplitMember, rows)
