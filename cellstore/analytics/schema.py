"""The tables of a store as Arrow and DuckDB see them: every column typed, whatever is in it."""

from __future__ import annotations

import pyarrow as pa
from sqlalchemy import BigInteger, Column, Float, Integer, Table
from sqlalchemy.types import JSON

from ..db.models import METADATA
from ..db.types import UtcDateTime

TIMESTAMP = pa.timestamp("us", tz="UTC")

TABLES: dict[str, Table] = dict(METADATA.tables)
"""All tables by name."""

_DUCKDB = {
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    TIMESTAMP: "TIMESTAMP WITH TIME ZONE",
}


def is_json(column: Column[object]) -> bool:
    """Whether the column holds JSON, which comes out as text."""
    return isinstance(column.type, JSON)


def arrow_type(column: Column[object]) -> pa.DataType:
    """Return the Arrow type of a column."""
    if isinstance(column.type, UtcDateTime):
        return TIMESTAMP
    if isinstance(column.type, BigInteger):
        return pa.int64()
    if isinstance(column.type, Integer):
        return pa.int32()
    if isinstance(column.type, Float):
        return pa.float64()
    return pa.string()


def arrow_schema(table: Table) -> pa.Schema:
    """Return the Arrow schema of a table, columns in the order of the models."""
    return pa.schema([pa.field(column.name, arrow_type(column)) for column in table.columns])


def create_statement(table: Table) -> str:
    """Return the DuckDB statement that makes the empty table."""
    columns = ", ".join(
        f"{quoted(column.name)} {_DUCKDB[arrow_type(column)]}" for column in table.columns
    )
    return f"CREATE TABLE {quoted(table.name)} ({columns})"


def quoted(name: str) -> str:
    """Return an SQL identifier in quotes."""
    return '"' + name.replace('"', '""') + '"'
