"""The big tables: what ended runs wrote as copies in Parquet files, the rest live."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import duckdb

from ..enums import Stage, Status
from ..errors import StorageError
from .guard import literal, without_wildcards
from .relations import COUNTS, KEPT, PREDICTIONS, RANKED, view
from .source import (
    PREDICTION_COLUMNS,
    TABLES,
    Source,
    columns_of,
    feed_ended_run,
    feed_predictions,
)

FORMAT = 4
"""Raised when the copies change, so that older ones are not read."""
BYTES_AT_ONCE = 1 << 20
ROWS_OF_GROUP = 122_880
MAKING_MB = 500
"""The memory in which a copy is made; what does not fit goes to the disk."""

WRITERS = {
    "cells": (Stage.SEGMENT, Stage.INGEST),
    "features": (Stage.MEASURE,),
    "predictions": (Stage.PREDICT,),
    PREDICTIONS: (Stage.PREDICT,),
    COUNTS: (Stage.PREDICT,),
    RANKED: (Stage.PREDICT,),
    "image_quality": (Stage.QC,),
    "cell_flags": (Stage.QC,),
}
"""The big tables, and three views kept in the same way; the stages whose runs write them."""

RANKED_COPIED = "level = 'image' AND vote <> 'median'"
"""Which of the ranked votes are kept: those that most people ask for."""

_CHAINS = {
    COUNTS: ("eligible_predictions", COUNTS),
    RANKED: ("label_counts", "label_medians", "label_votes", RANKED),
}
"""The views between the copy that a kept view is made from and itself."""

_NOTHING_OF_WELLS = """
    CREATE TABLE run_images (run_id BIGINT, image_id BIGINT, well_id BIGINT, subset VARCHAR);
    CREATE TABLE eligible_predictions (
        run_id BIGINT, image_id BIGINT, label_id BIGINT, probability DOUBLE
    );
"""
"""What the votes that are not kept would be made from."""

_NO_LATER_EXCLUSIONS = """
    CREATE TABLE later_exclusions (level VARCHAR, id BIGINT);
    CREATE TABLE excluded_images (image_id BIGINT);
"""
"""The copies of votes are for stores without any; else votes are counted anew."""


@dataclass(frozen=True)
class RunMark:
    """What tells one ended run from any other, also after a store was made anew.

    ``extent``: how much there is of what it wrote, where later runs may add to it.
    """

    id: int
    started_at: str
    ended_at: str
    extent: str = ""


def rows_of_runs(table: str, run_ids: Sequence[int]) -> str:
    """Return the SQL condition for the rows that these runs wrote into a big table."""
    numbers = ", ".join(str(int(item)) for item in run_ids) or "-1"
    if table == "cells":
        return f"JOIN segmentations AS s ON s.id = t.segmentation_id WHERE s.run_id IN ({numbers})"
    return f"WHERE t.run_id IN ({numbers})"


def final_states(table: str) -> list[str]:
    """Return the states of a run after which nothing goes on with it.

    A failed predict run may be resumed; a failed run of another stage never is.
    """
    predicts = Stage.PREDICT in WRITERS[table]
    return [Status.DONE.value] if predicts else [Status.DONE.value, Status.FAILED.value]


def reading_files(paths: Sequence[Path]) -> str:
    """Return the SQL that reads Parquet files by their plain names."""
    names = ", ".join(literal(without_wildcards(path)) for path in paths)
    return f"read_parquet([{names}])"


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

    def of_ended(
        self, target: duckdb.DuckDBPyConnection, table: str, runs: Sequence[RunMark]
    ) -> list[Path]:
        """Return the copies of what ended runs wrote into ``table``, made if there are none yet.

        Raises:
            StorageError: the folder cannot be written.
        """
        return [self._copy(table, run, target) for run in runs]

    def feed_live(
        self, target: duckdb.DuckDBPyConnection, statement: str, table: str, runs: Sequence[int]
    ) -> None:
        """Carry out ``statement`` with what these runs have written into ``table`` so far."""
        if table in (PREDICTIONS, "predictions"):
            feed_predictions(self.source, target, statement, runs)
        else:
            self.source.feed_table(target, statement, table, rows_of_runs(table, runs))

    def _copy(self, table: str, run: RunMark, target: duckdb.DuckDBPyConnection) -> Path:
        if table in (PREDICTIONS, "predictions"):
            made_from = str(PREDICTION_COLUMNS)
        elif table in KEPT:
            made_from = self._questions(table, target)
        else:
            made_from = str(columns_of(TABLES[table]))
        name = "predictions" if table == PREDICTIONS else table
        mark = f"{FORMAT} {run.started_at} {run.ended_at} {run.extent} {made_from}"
        stem = f"{name}-run{run.id}-{hashlib.sha256(mark.encode()).hexdigest()[:16]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _found(self.folder, stem) or self._written(stem, table, run)
        except (OSError, duckdb.IOException) as error:
            if isinstance(error, StorageError):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise StorageError(
                f"The cache {self.folder} cannot be written: {reason}. Free some space or mend "
                "the permissions, then ask again; the cache may also be deleted."
            ) from error

    def _questions(self, name: str, target: duckdb.DuckDBPyConnection) -> str:
        """Return all that the copy of a kept view depends on, beside the run."""
        found = "".join(view(item).query for item in _CHAINS[name])
        if name == RANKED:  # the alphabet decides ties, so that other labels make another copy
            labels = self.source.fetch(target, "labels")
            found += f"{self._questions(COUNTS, target)} {sorted(map(str, labels))}"
        return found

    def _written(self, stem: str, table: str, run: RunMark) -> Path:
        """Write the copy under a temporary name, in a database of its own: no user asks there."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        os.close(handle)
        spill = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.spill)
        path = Path(temporary)
        copy = (
            f"COPY {{rows}} TO {literal(temporary)} "
            f"(FORMAT parquet, COMPRESSION lz4, ROW_GROUP_SIZE {ROWS_OF_GROUP})"
        )
        try:
            with closing(duckdb.connect(":memory:")) as own:
                own.execute(f"SET memory_limit = '{MAKING_MB}MB'")
                own.execute(f"SET temp_directory = {literal(spill)}")
                own.execute("SET preserve_insertion_order = false")
                own.execute("SET TimeZone = 'UTC'")
                self._feed(own, copy, table, run)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return path.replace(self.folder / _name(stem, path))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(spill, ignore_errors=True)

    def _feed(
        self, own: duckdb.DuckDBPyConnection, statement: str, table: str, run: RunMark
    ) -> None:
        if table in (PREDICTIONS, "predictions"):
            feed_ended_run(self.source, own, statement, run.id)
            return
        if table not in KEPT:
            condition = rows_of_runs(table, [run.id])
            self.source.feed_table(own, statement, table, condition)
            return
        base = PREDICTIONS if table == COUNTS else COUNTS
        own.execute(f"CREATE VIEW {base} AS FROM {reading_files([self._copy(base, run, own)])}")
        own.execute(_NO_LATER_EXCLUSIONS)
        if table == RANKED:
            self.source.feed_table(own, "CREATE TABLE labels AS FROM {rows}", "labels")
            own.execute(_NOTHING_OF_WELLS)
        for name in _CHAINS[table]:
            own.execute(f"CREATE VIEW {name} AS {view(name).query}")
        condition = RANKED_COPIED if table == RANKED else "true"
        rows = f"(SELECT * FROM {table} WHERE {condition})"  # noqa: S608 - our own words
        own.execute(statement.replace("{rows}", rows))


def _found(folder: Path, stem: str) -> Path | None:
    """Return the copy, if it is as it was written; one that is not is removed."""
    for path in folder.glob(f"{glob.escape(stem)}-*.parquet"):
        if path.name == _name(stem, path):
            return path
        path.unlink(missing_ok=True)
    return None


def _name(stem: str, path: Path) -> str:
    checksum = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BYTES_AT_ONCE):
                checksum = zlib.crc32(block, checksum)
    except FileNotFoundError:  # another process has just removed it
        return ""
    return f"{stem}-{checksum:08x}.parquet"
