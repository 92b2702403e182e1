"""Feature sets as relations: each under its own name, a column per feature, a row per cell."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ..artifacts import ArtifactFolder
from ..enums import FeatureStorage
from ..errors import StorageError, UserInputError
from .feature_files import stored_file
from .guard import quoted, reading_files
from .source import VIEWS, Columns, Source

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_TYPES = {
    **{f"{sign}int{bits}": "BIGINT" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
}


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
    from ..models import METADATA  # they load slowly, and questions need no classes of tables

    if name in {*METADATA.tables, "exclusions", *VIEWS}:
        raise UserInputError(f"{name!r} is the name of a table. Give another {option}.")
    return name


@dataclass(frozen=True)
class SetRelation:
    """A feature set with the type of each column, ``cell_id`` first.

    ``in_table``: its values are rows of table ``features``, else they are in files.
    """

    id: int
    name: str
    recipe_id: int
    in_table: bool
    columns: Columns

    def query(
        self, source: Source, artifacts: ArtifactFolder, target: duckdb.DuckDBPyConnection
    ) -> str:
        """Return the SQL behind the set.

        Raises:
            StorageError: a file of it is gone.
        """
        if self.in_table:
            names = ", ".join(map(quoted, self.columns))
            # Columns of our own table and a number; nothing here comes from a user.
            return f"SELECT {names} FROM features WHERE recipe_id = {self.recipe_id}"  # noqa: S608
        condition = (
            f"JOIN feature_files AS f ON f.artifact_id = t.id AND f.feature_set_id = {self.id}"
        )
        rows = source.fetch(target, "artifacts", condition)
        return reading_set(self.columns, [stored_file(artifacts, row["path"]) for row in rows])


def reading_set(columns: Columns, paths: Sequence[Path]) -> str:
    """Return the SQL that reads columns of the files of a feature set."""
    if not paths:
        nulls = (f"CAST(NULL AS {kind}) AS {quoted(name)}" for name, kind in columns.items())
        return f"SELECT {', '.join(nulls)} LIMIT 0"
    values = (f"CAST({quoted(name)} AS {kind}) AS {quoted(name)}" for name, kind in columns.items())
    return f"SELECT {', '.join(values)} FROM {reading_files(paths)}"  # noqa: S608


def list_sets(source: Source, target: duckdb.DuckDBPyConnection) -> list[SetRelation]:
    """Return the feature sets of a store.

    Raises:
        StorageError: the columns of a set are not described as they should be.
    """
    rows = source.fetch(target, "feature_sets")
    known = source.columns["features"]
    return [_relation(row, known) for row in sorted(rows, key=lambda row: int(row["id"]))]


def _relation(row: dict[str, Any], known: Columns) -> SetRelation:
    in_table = row["storage"] == FeatureStorage.TABLE
    columns = {"cell_id": "BIGINT"}
    try:
        for item in json.loads(row["columns"]):
            if not in_table or item["name"] in known:
                columns[_unique(item["name"], columns)] = _TYPES[item["dtype"]]
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"The columns of feature set {row['name']!r} are not described as they should be "
            f"({error}). Ingest it again."
        ) from error
    return SetRelation(row["id"], row["name"], row["recipe_id"], in_table, columns)


def _unique(name: str, taken: Columns) -> str:
    """Return the name of a column as DuckDB has it, where ``Area`` and ``AREA`` are the same."""
    known = {other.lower() for other in taken}
    number, found = 0, name
    while found.lower() in known:
        number += 1
        found = f"{name}_{number}"
    return found
