"""The big tables: what ended runs wrote as copies in files, the rest live."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
from pyarrow.dataset import Dataset, dataset

from ..terms import Stage, Status
from . import placed
from .guard import literal
from .schema import TABLES, arrow_schema, quoted
from .snapshots import RunMark, rows_of_runs, snapshot
from .source import Source
from .views import views

PLACED = "placed_predictions"
COUNTS = "image_label_counts"

WRITERS = {
    "cells": (Stage.SEGMENT, Stage.INGEST),
    "features": (Stage.MEASURE,),
    "predictions": (Stage.PREDICT,),
    PLACED: (Stage.PREDICT,),
    COUNTS: (Stage.PREDICT,),
    "image_quality": (Stage.QC,),
    "cell_flags": (Stage.QC,),
}
"""The big tables and two views that are kept in the same way; the stages whose runs write them."""

_COUNTED = pa.schema(
    [
        ("run_id", pa.int64()),
        ("image_id", pa.int64()),
        ("label_id", pa.int64()),
        ("cells", pa.int64()),
        ("named", pa.int64()),
        ("probability", pa.float64()),
    ]
)
COUNTING_MB = 500
ROWS_AT_ONCE = 122_880


@dataclass(frozen=True)
class Copies:
    """Where the copies are, and what they are made from.

    ``predict_runs``: the predict runs to be looked at, if not all.
    """

    source: Source
    folder: Path
    spill: Path
    predict_runs: Collection[int] | None = None

    def looked_at(self, table: str, run: int) -> bool:
        """Whether what this run wrote into ``table`` is to be seen."""
        chosen = self.predict_runs
        return Stage.PREDICT not in WRITERS[table] or chosen is None or run in chosen

    def of_ended(self, table: str, runs: Sequence[RunMark]) -> Dataset:
        """Return what ended runs wrote into ``table``, copied if it is not yet."""
        make = {PLACED: self._placed, "predictions": self._placed, COUNTS: self._counted}
        files = [make.get(table, partial(self._plain, table))(run) for run in runs]
        return dataset(files, _schema(table), format="parquet")

    def live(self, table: str, runs: Sequence[int]) -> pa.Table:
        """Return what these runs have written into ``table`` so far."""
        if table in (PLACED, "predictions"):
            batches = placed.read_runs(self.source, list(runs)) if runs else iter(())
        else:
            batches = self.source.read(TABLES[table], rows_of_runs(table, runs or [-1]))
        return pa.Table.from_batches(list(batches), schema=_schema(table))

    def _plain(self, table: str, run: RunMark) -> Path:
        def rows() -> Iterator[pa.RecordBatch]:
            return self.source.read(TABLES[table], rows_of_runs(table, [run.id]))

        return snapshot(self.folder, table, run, _schema(table), rows)

    def _placed(self, run: RunMark) -> Path:
        rows = partial(placed.read_ended_run, self.source, run.id)
        return snapshot(self.folder, "predictions", run, placed.SCHEMA, rows)

    def _counted(self, run: RunMark) -> Path:
        chain = _counting()
        rows: Callable[[], Iterator[pa.RecordBatch]] = lambda: self._count(run, chain)  # noqa: E731
        return snapshot(self.folder, COUNTS, run, _COUNTED, rows, made_by=str(chain))

    def _count(self, run: RunMark, chain: dict[str, str]) -> Iterator[pa.RecordBatch]:
        """Count in a database of its own, which may read the copy itself: no user asks there."""
        spill = tempfile.mkdtemp(dir=self.spill)
        try:
            with closing(duckdb.connect(":memory:")) as own:
                own.execute(f"SET memory_limit = '{COUNTING_MB}MB'")
                own.execute(f"SET temp_directory = {literal(spill)}")
                own.execute("SET preserve_insertion_order = false")
                file = literal(_without_wildcards(self._placed(run)))
                own.execute(f"CREATE VIEW {PLACED} AS FROM read_parquet({file})")
                for name, query in chain.items():
                    own.execute(f"CREATE VIEW {quoted(name)} AS {query}")
                yield from own.sql(f"FROM {COUNTS}").to_arrow_reader(ROWS_AT_ONCE)
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _schema(table: str) -> pa.Schema:
    if table in (PLACED, "predictions"):
        return placed.SCHEMA
    return _COUNTED if table == COUNTS else arrow_schema(TABLES[table])


def _counting() -> dict[str, str]:
    """The views from what was said to what is counted, as they are without a user's rules."""
    known = {view.name: view.query for view in views()}
    return {name: known[name] for name in ("ballots", COUNTS)}


def _without_wildcards(path: Path) -> str:
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def final_states(table: str) -> list[str]:
    """Return the states of a run after which nothing goes on with it.

    A failed predict run may be gone on with; a failed run of another stage never is.
    """
    predicts = Stage.PREDICT in WRITERS[table]
    return [Status.DONE.value] if predicts else [Status.DONE.value, Status.FAILED.value]
