"""Parquet copies of the rows that ended runs wrote.

What a run wrote that nothing goes on with never changes, so its copy is made once and found again
by its name. The copies are a cache: without them the same rows are read from the database again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Table

from ..errors import StorageError
from .schema import TABLES, arrow_schema
from .source import Source

FORMAT = 1
"""Raised when the copies change, so that older ones are not read."""


@dataclass(frozen=True)
class RunMark:
    """What tells one ended run from any other, also after a store was made anew.

    ``extent``: how much there is of what it wrote, where later runs may add to it.
    """

    id: int
    started_at: str
    ended_at: str
    extent: str = ""

    def file_name(self, table: str) -> str:
        """Return the name of the copy of what this run wrote into ``table``."""
        mark = f"{FORMAT} {self.started_at} {self.ended_at} {self.extent}".rstrip()
        text = f"{mark} {arrow_schema(TABLES[table])}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{table}-run{self.id}-{digest}.parquet"


def rows_of_runs(table: str, run_ids: Sequence[int]) -> str:
    """Return the SQL condition for the rows that these runs wrote into a big table."""
    numbers = ", ".join(str(int(item)) for item in run_ids)
    if table == "cells":
        return f"JOIN segmentations AS s ON s.id = t.segmentation_id WHERE s.run_id IN ({numbers})"
    return f"WHERE t.run_id IN ({numbers})"


def snapshot(folder: Path, source: Source, table: str, run: RunMark) -> Path:
    """Return the copy of what ``run`` wrote into ``table``, made now if there is none.

    Raises:
        StorageError: the folder cannot be written.
    """
    target = folder / run.file_name(table)
    if _whole(target):
        return target
    batches = source.read(TABLES[table], rows_of_runs(table, [run.id]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(target, TABLES[table], batches)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"The cache {folder} cannot be written: {error.strerror}. Free some space or mend "
            "the permissions, then ask again; the cache may also be deleted."
        ) from error
    return target


def _whole(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _write(target: Path, table: Table, batches: Iterator[pa.RecordBatch]) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with pq.ParquetWriter(file, arrow_schema(table), compression="zstd") as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
