"""The feature set that an ingest fills: found by its name, made on its first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from ....artifacts import ArtifactFolder
from ....db.models import (
    Artifact,
    FeatureFile,
    FeatureSet,
    Recipe,
    RecipeInput,
)
from ....errors import BadTableError, StorageError, UserInputError
from ....formats.objects.model import DTYPES, FeatureColumn, ObjectSource
from ....runs import RecipeSpec, register
from ....terms import FeatureStorage, Stage

VERSION = 1
_SHOWN = 5


@dataclass(frozen=True)
class TargetSet:
    """A feature set, its recipes, and the type of each of its columns in their order."""

    id: int
    name: str
    segment_id: int
    measure_id: int
    schema: pa.Schema

    def conform(self, values: pa.RecordBatch, where: str) -> pa.RecordBatch:
        """Return ``values`` with the columns of the set, in its order and types.

        Raises:
            BadTableError: a column of whole numbers has others in this source.
        """
        arrays = []
        for column in self.schema:
            found = values.column(values.schema.get_field_index(column.name))
            try:
                arrays.append(found.cast(column.type))
            except pa.ArrowInvalid as error:
                raise BadTableError(
                    f"{where}: column {column.name} has other values than whole numbers, unlike "
                    f"in feature set {self.name!r}. Give another --name."
                ) from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def target_set(session: Session, source: ObjectSource, name: str) -> TargetSet:
    """Return the feature set ``name`` for the columns of ``source``, made if it is new.

    Raises:
        UserInputError: there is one with other columns.
    """
    found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
    if found is None:
        return _make(session, source, name)
    return _existing(session, found, source)


def check_files(session: Session, artifacts: ArtifactFolder, name: str) -> None:
    """Check that the files of the feature set ``name`` are there.

    Raises:
        StorageError: one is gone; what it held cannot be told from what the database says.
    """
    query = (
        select(Artifact.path)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.name == name)
    )
    for path in session.scalars(query):
        if not artifacts.locate(path).is_file():
            raise StorageError(
                f"The file {path} of feature set {name!r} is gone. Restore it from a backup (see "
                "cellstore verify), or ingest its source under another --name."
            )


def _existing(session: Session, found: FeatureSet, source: ObjectSource) -> TargetSet:
    old = {item["name"]: item["dtype"] for item in found.columns}
    _check_columns(found, old, {column.name: column.dtype for column in source.columns})
    inputs = select(RecipeInput.input_id).where(RecipeInput.recipe_id == found.recipe_id)
    query = select(Recipe).where(Recipe.id.in_(inputs), Recipe.stage == Stage.SEGMENT)
    segment = session.scalars(query).one()
    objects = segment.parameters.get("objects")
    if objects != list(source.objects):
        raise UserInputError(
            f"Feature set {found.name!r} is of other objects ({', '.join(objects or ['?'])}). "
            "Give another --name."
        )
    schema = pa.schema([(name, DTYPES[dtype]) for name, dtype in old.items()])
    return TargetSet(found.id, found.name, segment.id, found.recipe_id, schema)


def _check_columns(found: FeatureSet, old: dict[str, str], new: dict[str, str]) -> None:
    if found.storage is not FeatureStorage.FILES:
        raise UserInputError(f"Feature set {found.name!r} is measured here. Give another --name.")
    gone = [name for name in old if name not in new]
    more = [name for name in new if name not in old]
    text = [
        name for name in old if name in new and (old[name] == "string") != (new[name] == "string")
    ]
    parts = [("lacks", gone), ("has besides", more), ("has of another type", text)]
    said = [f"{verb} {_listed(names)}" for verb, names in parts if names]
    if said:
        raise UserInputError(
            f"Feature set {found.name!r} has other columns: this source {'; '.join(said)}. "
            "Give another --name."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _make(session: Session, source: ObjectSource, name: str) -> TargetSet:
    columns = sorted([column.name, column.dtype] for column in source.columns)
    base: dict[str, Any] = {
        "imported": source.tool, "name": name, "objects": list(source.objects),
    }  # fmt: skip
    segment = register(session, RecipeSpec(Stage.SEGMENT, VERSION, base))
    measured = {**base, "columns": columns}
    measure = register(session, RecipeSpec(Stage.MEASURE, VERSION, measured, None, (segment,)))
    row = FeatureSet(
        name=name,
        recipe_id=measure.id,
        columns=[_as_json(column) for column in source.columns],
        storage=FeatureStorage.FILES,
    )
    session.add(row)
    session.flush()
    return TargetSet(row.id, name, segment.id, measure.id, source.schema)


def _as_json(column: FeatureColumn) -> dict[str, Any]:
    return column._asdict()
