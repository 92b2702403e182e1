"""Parquet files of features: written in a stream, named by their sha256 at the end."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy.orm import Session

from ..artifacts import PART, ArtifactFolder, StoredFile, sync_folder
from ..db.models import FeatureFile
from ..errors import StorageError
from ..formats.objects.model import Integers, batch_rows
from ..runs import attach, keep_file
from ..terms import ArtifactKind

CELL_ID = "cell_id"
ROWS_OF_FILE = 50_000
"""Cells after which a file ends."""

ROW_GROUP = 2_000
"""Cells of a row group: training reads the groups that the cells of an image are in."""


class WrittenFile(NamedTuple):
    """A file of features and its range of cells."""

    stored: StoredFile
    rows: int
    first_cell_id: int
    last_cell_id: int


def register_files(
    session: Session,
    artifacts: ArtifactFolder,
    feature_set_id: int,
    run_id: int,
    files: Sequence[WrittenFile],
) -> None:
    """Insert the rows of files that are written.

    Raises:
        StorageError: one is gone again.
    """
    for file in files:
        if not artifacts.locate(file.stored.path).is_file():
            raise StorageError(
                f"The file {file.stored.path} was removed while it was written. Run the same "
                "command again."
            )
        artifact = keep_file(session, file.stored)
        attach(session, run_id, artifact)
        row = FeatureFile(
            feature_set_id=feature_set_id,
            artifact_id=artifact,
            run_id=run_id,
            n_rows=file.rows,
            first_cell_id=file.first_cell_id,
            last_cell_id=file.last_cell_id,
        )
        session.add(row)
    session.flush()


@dataclass
class FeatureWriter:
    """Writes rows by ascending cell id into as many files as they need.

    ``files`` are those that are finished; what is not finished is removed by :meth:`abandon`.
    """

    artifacts: ArtifactFolder
    schema: pa.Schema
    files: list[WrittenFile] = field(default_factory=list)
    _part: _Part | None = None

    def write(self, cell_ids: Integers, values: pa.RecordBatch) -> None:
        """Append the features of some cells.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        arrays = [pa.array(cell_ids), *values.columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=_with_ids(self.schema))
        with _explained(self.artifacts.root):
            if self._part is None:
                self._part = _Part(self.artifacts.root, batch.schema)
            self._part.write(batch, cell_ids)
            if self._part.rows >= ROWS_OF_FILE:
                self.finish()

    def finish(self) -> None:
        """End the file that is being written.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        part, self._part = self._part, None
        if part is not None:
            with _explained(self.artifacts.root):
                self.files.append(part.keep())

    def abandon(self) -> None:
        """Remove what is not finished."""
        if self._part is not None:
            self._part.remove()
            self._part = None


class _Part:
    """A file that is not whole yet, under a temporary name."""

    def __init__(self, root: Path, schema: pa.Schema) -> None:
        self._root = root
        self._folder = root / ArtifactKind.FEATURES.value
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{PART}{uuid.uuid4().hex}"
        self._sink = _HashingFile(self._path)
        try:
            self._writer = pq.ParquetWriter(
                self._sink, schema, compression="snappy", use_dictionary=_texts(schema),
                write_statistics=[CELL_ID],
            )  # fmt: skip
        except BaseException:
            self.remove()
            raise
        self._row_group = min(ROW_GROUP, batch_rows(len(schema)))
        self.rows = 0
        self._first = self._last = 0

    def write(self, batch: pa.RecordBatch, cell_ids: Integers) -> None:
        """Append a batch as row groups of its own."""
        try:
            self._writer.write_batch(batch, row_group_size=self._row_group)
        except BaseException:
            self.remove()
            raise
        self._first = self._first if self.rows else int(cell_ids[0])
        self._last = int(cell_ids[-1])
        self.rows += len(cell_ids)

    def keep(self) -> WrittenFile:
        """Give the file the name of its content, durably."""
        try:
            self._writer.close()
            sha256, size = self._sink.finish()
            place = f"{ArtifactKind.FEATURES.value}/{sha256[:2]}/{sha256}.parquet"
            target = self._root / place
            target.parent.mkdir(exist_ok=True)
            self._path.replace(target)
            sync_folder(target.parent)
        except BaseException:
            self.remove()
            raise
        stored = StoredFile(ArtifactKind.FEATURES, place, sha256, size)
        return WrittenFile(stored, self.rows, self._first, self._last)

    def remove(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError, ValueError, AttributeError, pa.ArrowException):
            self._writer.close()
        with suppress(AttributeError):
            self._writer.is_open = False  # or it would try again when it is collected
        with suppress(OSError, ValueError):
            self._sink.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


class _HashingFile(io.RawIOBase):
    """A new file that knows the sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        # "x" and the umask give the file the rights that the user's other files have.
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        """Whether it can be written: yes."""
        return True

    def write(self, data: Any) -> int:
        """Append all of ``data``."""
        left = memoryview(data)
        self._digest.update(left)
        self._size += left.nbytes
        while left.nbytes:
            left = left[self._file.write(left) :]
        return len(data)

    def finish(self) -> tuple[str, int]:
        """Make it durable; return sha256 and size."""
        os.fsync(self._file.fileno())
        self.close()
        return self._digest.hexdigest(), self._size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def stored_values(
    paths: Sequence[Path], columns: Sequence[str], cell_ids: Integers
) -> tuple[Integers, pa.Table | None]:
    """Return which of the ascending ``cell_ids`` have a row in the files, and the rows of these.

    Raises:
        StorageError: a file is gone or damaged.
    """
    found: list[Integers] = []
    tables: list[pa.Table] = []
    for path in paths:
        with _readable(path), pq.ParquetFile(path) as file:
            for group in _groups(file, cell_ids):
                table = file.read_row_group(group, columns=[CELL_ID, *columns])
                ids = table.column(0).to_numpy()
                chosen = np.isin(ids, cell_ids)
                found.append(ids[chosen])
                part = table.select(list(columns))
                tables.append(part if chosen.all() else part.filter(pa.array(chosen)))
    if not found:
        return np.empty(0, np.int64), None
    return np.concatenate(found), pa.concat_tables(tables)


def _groups(file: pq.ParquetFile, cell_ids: Integers) -> Iterator[int]:
    for number in range(file.metadata.num_row_groups):
        known = file.metadata.row_group(number).column(0).statistics
        start = int(np.searchsorted(cell_ids, known.min)) if known is not None else 0
        if known is None or (start < len(cell_ids) and cell_ids[start] <= known.max):
            yield number


def _with_ids(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(CELL_ID, pa.int64(), nullable=False), *schema])


def _texts(schema: pa.Schema) -> list[str] | bool:
    # Measurements rarely repeat: a dictionary of them is work for nothing.
    return [item.name for item in schema if pa.types.is_string(item.type)] or False


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{root} cannot be written: {error.strerror or error}. Free some space or mend the "
            "permissions, then run the same command again."
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"The feature file {path.name} cannot be read ({str(error).splitlines()[0]}). "
            "See what is wrong with: cellstore verify"
        ) from error
