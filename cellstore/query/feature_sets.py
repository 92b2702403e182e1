"""Feature sets as relations: each under its own name, a column per feature, a row per cell."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.dataset import Dataset, dataset

from ..artifacts import ArtifactFolder
from ..enums import FeatureStorage
from ..errors import StorageError, UserInputError
from ..models import METADATA
from .source import TABLES, Source, quoted
from .views import views

CELL_ID = pa.field("cell_id", pa.int64())
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def check_set_name(name: str, option: str = "--name") -> str:
    """Return the name of a feature set, if it can be one; ``option`` is what gives another.

    Raises:
        UserInputError: it is no plain name, or that of a table.
    """
    if not _NAME.fullmatch(name):
        raise UserInputError(
            f"{name!r} cannot name a feature set. Use small letters, digits and _ (up to 63), a "
            f"letter first: {option} nuclei_v2"
        )
    if name in METADATA.tables or name in {view.name for view in views()}:
        raise UserInputError(f"{name!r} is the name of a table. Give another {option}.")
    return name


@dataclass(frozen=True)
class SetRelation:
    """A feature set, its columns typed; ``in_table``: its values are in table ``features``."""

    id: int
    name: str
    recipe_id: int
    in_table: bool
    schema: pa.Schema

    @property
    def query(self) -> str:
        """Return the question behind a set whose values are in table ``features``."""
        columns = ", ".join(quoted(name) for name in self.schema.names)
        # Columns of our own table and a number; nothing here comes from a user.
        return f"SELECT {columns} FROM features WHERE recipe_id = {self.recipe_id}"  # noqa: S608


def list_sets(source: Source, taken: Collection[str]) -> list[SetRelation]:
    """Return the feature sets; one whose name is ``taken``, which none should have, is not shown.

    Raises:
        StorageError: the columns of a set are not described as they should be.
    """
    rows = [
        row
        for batch in source.read(TABLES["feature_sets"], "ORDER BY t.id")
        for row in batch.to_pylist()
    ]
    return [
        SetRelation(
            row["id"],
            row["name"],
            row["recipe_id"],
            row["storage"] == FeatureStorage.TABLE,
            _schema(row["name"], row["columns"], row["storage"]),
        )
        for row in rows
        if row["name"].lower() not in taken
    ]


def _schema(name: str, columns: str, storage: str) -> pa.Schema:
    known = TABLES["features"].columns
    try:
        fields = [
            pa.field(item["name"], pa.type_for_alias(item["dtype"])) for item in json.loads(columns)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"The columns of feature set {name!r} are not described as they should be ({error}). "
            "Ingest it again."
        ) from error
    if storage == FeatureStorage.TABLE:
        fields = [field for field in fields if field.name in known]
    return pa.schema([CELL_ID, *fields])


def open_files(source: Source, artifacts: ArtifactFolder, found: SetRelation) -> Dataset:
    """Return the files of a feature set; what a question does not ask for is not read.

    Raises:
        StorageError: a file is gone.
    """
    condition = f"JOIN feature_files AS f ON f.artifact_id = t.id AND f.feature_set_id = {found.id}"
    paths = [
        _there(artifacts, path)
        for batch in source.read(TABLES["artifacts"], condition)
        for path in batch.column("path").to_pylist()
    ]
    return dataset(paths, found.schema, format="parquet")


def _there(artifacts: ArtifactFolder, path: str) -> Path:
    place = artifacts.locate(path)
    if not place.is_file():
        raise StorageError(
            f"The stored file {path} is gone. See what else is affected with: cellstore verify"
        )
    return place
