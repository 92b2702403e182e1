"""The big tables: what ended runs wrote as copies in files, the rest live."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import Dataset, dataset

from ..enums import Stage, Status
from ..errors import StorageError
from . import source as source_module
from .source import TABLES, Source, arrow_schema, literal, quoted
from .views import views

FORMAT = 3
"""Raised when the copies change, so that older ones are not read."""
BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class RunMark:
    """What tells one ended run from any other, also after a store was made anew.

    ``extent``: how much there is of what it wrote, where later runs may add to it.
    """

    id: int
    started_at: str
    ended_at: str
    extent: str = ""

    def stem(self, table: str, kind: str) -> str:
        """Return how the name of the copy of what this run wrote into ``table`` begins.

        ``kind``: what else tells it from other copies.
        """
        mark = f"{FORMAT} {self.started_at} {self.ended_at} {self.extent}".rstrip()
        text = f"{mark} {kind}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{table}-run{self.id}-{digest}"


def rows_of_runs(table: str, run_ids: Sequence[int]) -> str:
    """Return the SQL condition for the rows that these runs wrote into a big table."""
    numbers = ", ".join(str(int(item)) for item in run_ids)
    if table == "cells":
        return f"JOIN segmentations AS s ON s.id = t.segmentation_id WHERE s.run_id IN ({numbers})"
    return f"WHERE t.run_id IN ({numbers})"


def snapshot(
    folder: Path,
    table: str,
    run: RunMark,
    schema: pa.Schema,
    rows: Callable[[], Iterator[pa.RecordBatch]],
    made_by: str = "",
) -> Path:
    """Return the copy of what ``run`` wrote into ``table``; if there is none, ``rows`` are kept.

    ``made_by``: the question that the rows answer, where they are not those of the database.

    Raises:
        StorageError: the folder cannot be written.
    """
    stem = run.stem(table, f"{schema}{made_by}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _found(folder, stem) or _written(folder, stem, schema, rows())
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"The cache {folder} cannot be written: {error.strerror}. Free some space or mend "
            "the permissions, then ask again; the cache may also be deleted."
        ) from error


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


def _written(folder: Path, stem: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Path:
    handle, name = tempfile.mkstemp(dir=folder, prefix=".part-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with pq.ParquetWriter(file, schema, **_encoding(schema)) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(folder / _name(stem, temporary))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Cells come in the order of their ids; numbers that hardly repeat need no dictionary."""
    ascending = [name for name in ("cell_id",) if name in schema.names]
    measured = {field.name for field in schema if pa.types.is_floating(field.type)}
    return {
        "compression": "lz4",
        "use_dictionary": [name for name in schema.names if name not in {*ascending, *measured}],
        "column_encoding": dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
    }


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
            batches = source_module.read_runs(self.source, list(runs)) if runs else iter(())
        else:
            batches = self.source.read(TABLES[table], rows_of_runs(table, runs or [-1]))
        return pa.Table.from_batches(list(batches), schema=_schema(table))

    def _plain(self, table: str, run: RunMark) -> Path:
        def rows() -> Iterator[pa.RecordBatch]:
            return self.source.read(TABLES[table], rows_of_runs(table, [run.id]))

        return snapshot(self.folder, table, run, _schema(table), rows)

    def _placed(self, run: RunMark) -> Path:
        rows = partial(source_module.read_ended_run, self.source, run.id)
        return snapshot(self.folder, "predictions", run, source_module.SCHEMA, rows)

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
        return source_module.SCHEMA
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
