"""Files that are whole or not there: Parquet, CSV, and AnnData's h5ad."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from ...artifacts import PART
from ...errors import StorageError
from ...formats.text.spreadsheets import disarmed

Batches = Iterable[pa.Table]


def write_parquet(path: Path, schema: pa.Schema, batches: Batches) -> None:
    """Write a row group for each batch."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(batch)


def write_csv(
    path: Path, schema: pa.Schema, batches: Batches, *, for_spreadsheet: bool = False
) -> None:
    """Write texts in quotes where they need them; nothing between two commas is null.

    ``for_spreadsheet`` puts a ' before texts that a spreadsheet would run as a formula.
    """
    if for_spreadsheet:
        schema = disarmed(schema.empty_table()).schema
    with pc_csv.CSVWriter(path, schema) as writer:
        for batch in batches:
            writer.write_table(disarmed(batch) if for_spreadsheet else batch)


def write_anndata(path: Path, schema: pa.Schema, batches: Batches, count: int) -> None:
    """Write numbers of features as ``X`` (N, F) float64, all else as ``obs``.

    AnnData holds the matrix in memory, and so does this, once.
    """
    import anndata
    import pandas as pd

    names = [f.name for f in schema if not _is_metadata(f.name) and not pa.types.is_string(f.type)]
    others = [name for name in schema.names if name not in set(names)]
    matrix, facts, row = np.empty((count, len(names))), [], 0
    for batch in batches:
        for index, name in enumerate(names):
            values = batch.column(name).cast(pa.float64())
            matrix[row : row + batch.num_rows, index] = values.to_numpy(zero_copy_only=False)
        facts.append(batch.select(others))
        row += batch.num_rows
    table = pa.concat_tables(facts)
    obs = pd.DataFrame({name: _series(table.column(name)) for name in others})
    obs.index = obs.index.astype(str)
    made = anndata.AnnData(matrix[:row], obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    made.write_h5ad(path)


def _is_metadata(name: str) -> bool:
    return name.startswith(("Metadata_", "Image_FileName_", "Image_PathName_"))


def _series(column: pa.ChunkedArray) -> Any:
    import pandas as pd

    if not pa.types.is_string(column.type):
        return column.to_numpy()
    # h5ad has no nulls in columns of text, but categories that are none.
    encoded = column.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    categories = np.array(encoded.dictionary.to_pylist(), dtype=object)
    return pd.Categorical.from_codes(codes, pd.Index(categories, dtype=object))


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``target``, which then takes its place.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    temporary = target.parent / f"{PART}{uuid.uuid4().hex}{target.suffix}"
    with _explained(target), _removed(temporary):
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


@contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}. Free some space or mend the "
            "permissions, then run the same command again; nothing half-written is left."
        ) from error
