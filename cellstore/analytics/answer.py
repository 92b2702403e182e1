"""An answer that comes piece by piece, so that none is too large."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import duckdb
import pyarrow as pa

from ..errors import QueryError
from .guard import run_limited

ROWS = 65_536
T = TypeVar("T")


class Answer:
    """The batches of an answer; ``schema`` is known before the first.

    The limit is on the time that DuckDB takes, not on what is done between two pieces.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        seconds: float,
        statement: str,
        parameters: object,
    ) -> None:
        self._connection = connection
        self._seconds = seconds
        self._left = seconds
        self._reader = self._limited(lambda: self._begin(statement, parameters))
        self.schema: pa.Schema = self._reader.schema

    def _begin(self, statement: str, parameters: object) -> pa.RecordBatchReader:
        relation = self._connection.sql(statement, params=parameters)
        if relation is None:
            raise QueryError("This statement has no answer; ask with SELECT.")
        return relation.to_arrow_reader(ROWS)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yield what is left of the answer."""
        while (batch := self._limited(lambda: next(self._reader, None))) is not None:
            yield batch

    def _limited(self, work: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return run_limited(self._connection, self._left, work, allowed=self._seconds)
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - began))
