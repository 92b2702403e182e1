"""Parquet copies of the rows that ended runs wrote.

What a run wrote that nothing goes on with never changes, so its copy is made once and found again
by its name. The copies are a cache: without them the same rows are read from the database again.
The end of the name is the checksum of the file, so that a damaged copy is made anew, not believed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StorageError

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
