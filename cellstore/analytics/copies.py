"""The big tables: what ended runs wrote as copies in files, the rest live."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
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
WINNERS = "image_winners"

WRITERS = {
    "cells": (Stage.SEGMENT, Stage.INGEST),
    "features": (Stage.MEASURE,),
    "predictions": (Stage.PREDICT,),
    PLACED: (Stage.PREDICT,),
    COUNTS: (Stage.PREDICT,),
    WINNERS: (Stage.PREDICT,),
    "image_quality": (Stage.QC,),
    "cell_flags": (Stage.QC,),
}
"""The big tables, and three views kept in the same way; the stages whose runs write them."""

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
_WON = pa.schema(
    [
        ("run_id", pa.int64()),
        ("image_id", pa.int64()),
        ("vote", pa.string()),
        ("winner_id", pa.int64()),
        ("votes", pa.float64()),
        ("runner_up_id", pa.int64()),
        ("runner_up_votes", pa.float64()),
        ("n_cells", pa.int64()),
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
        make = {
            PLACED: self._placed,
            "predictions": self._placed,
            COUNTS: self._counted,
            WINNERS: self._won,
        }
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
        chain = _queries("ballots", COUNTS)

        def rows() -> Iterator[pa.RecordBatch]:
            return self._worked_out(chain, PLACED, self._placed(run))

        return snapshot(self.folder, COUNTS, run, _COUNTED, rows, made_by=str(chain))

    def _won(self, run: RunMark) -> Path:
        chain = _queries(WINNERS)
        labels = pa.Table.from_batches(
            list(self.source.read(TABLES["labels"])), schema=arrow_schema(TABLES["labels"])
        )
        # The alphabet decides draws, so that other labels make another copy.
        made_by = f"{chain} {_queries('ballots', COUNTS)} {labels.to_pydict()}"

        def rows() -> Iterator[pa.RecordBatch]:
            return self._worked_out(chain, COUNTS, self._counted(run), labels)

        return snapshot(self.folder, WINNERS, run, _WON, rows, made_by=made_by)

    def _worked_out(
        self, chain: dict[str, str], name: str, copy: Path, labels: pa.Table | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the last view of ``chain``, of which the first reads ``copy`` as ``name``.

        In a database of its own, which may read the copy itself: no user asks there.
        """
        spill = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.spill)
        try:
            with closing(duckdb.connect(":memory:")) as own:
                own.execute(f"SET memory_limit = '{COUNTING_MB}MB'")
                own.execute(f"SET temp_directory = {literal(spill)}")
                own.execute("SET preserve_insertion_order = false")
                file = literal(_without_wildcards(copy))
                own.execute(f"CREATE VIEW {name} AS FROM read_parquet({file})")
                if labels is not None:
                    own.register("labels", labels)
                for view, query in chain.items():
                    own.execute(f"CREATE VIEW {quoted(view)} AS {query}")
                yield from own.sql(f"FROM {[*chain][-1]}").to_arrow_reader(ROWS_AT_ONCE)
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _schema(table: str) -> pa.Schema:
    if table in (PLACED, "predictions"):
        return placed.SCHEMA
    made = {COUNTS: _COUNTED, WINNERS: _WON}
    return made[table] if table in made else arrow_schema(TABLES[table])


def _queries(*names: str) -> dict[str, str]:
    """The queries of some views, as they are without a user's rules."""
    known = {view.name: view.query for view in views()}
    return {name: known[name] for name in names}


def _without_wildcards(path: Path) -> str:
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def final_states(table: str) -> list[str]:
    """Return the states of a run after which nothing goes on with it.

    A failed predict run may be gone on with; a failed run of another stage never is.
    """
    predicts = Stage.PREDICT in WRITERS[table]
    return [Status.DONE.value] if predicts else [Status.DONE.value, Status.FAILED.value]
