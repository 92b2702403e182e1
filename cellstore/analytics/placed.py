"""What predict runs said, each answer with the image of its cell: read from the database."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from .side_by_side import side_by_side
from .source import Source

SCHEMA = pa.schema(
    [
        ("run_id", pa.int64()),
        ("image_id", pa.int64()),
        ("cell_id", pa.int64()),
        ("excluded", pa.bool_()),
        ("rank", pa.int32()),
        ("label_id", pa.int64()),
        ("probability", pa.float64()),
    ]
)
"""The columns of ``placed_predictions``; those of table ``predictions`` are among them."""

VALUES = (
    "p.run_id",
    "s.image_id",
    "p.cell_id",
    "c.excluded IS NOT NULL AS excluded",
    "p.rank",
    "p.label_id",
    "p.probability",
)
ORIGIN = """
    predictions AS p
    {JOIN} cells AS c ON c.id = p.cell_id
    {JOIN} segmentations AS s ON s.id = c.segmentation_id
    WHERE p.run_id IN (%s)
"""
BOUNDS = """
    (SELECT
        (SELECT min(cell_id) FROM predictions WHERE run_id = %(run)d) AS low,
        (SELECT max(cell_id) FROM predictions WHERE run_id = %(run)d) AS high
    ) AS bounds
"""
CELLS_OF_READER = 250_000
"""A range of so many cell ids is worth a connection of its own."""
MOST_READERS = 8


def read_runs(source: Source, run_ids: list[int]) -> Iterator[pa.RecordBatch]:
    """Yield what these runs have said, as of the moment of ``source``."""
    numbers = ", ".join(str(int(item)) for item in run_ids)
    return source.select(SCHEMA, VALUES, ORIGIN % numbers)


def read_ended_run(source: Source, run_id: int) -> Iterator[pa.RecordBatch]:
    """Yield what an ended run said, in no certain order.

    Nobody adds to that, so several connections read it side by side, each a range of cells.
    """
    return side_by_side(
        [partial(_range, source, int(run_id), low, high) for low, high in _ranges(source, run_id)]
    )


def _range(source: Source, run_id: int, low: int, high: int) -> Iterator[pa.RecordBatch]:
    origin = f"{ORIGIN % run_id} AND p.cell_id BETWEEN {low} AND {high}"
    number, *others = SCHEMA
    with source.another() as own:
        for batch in own.select(pa.schema(others), VALUES[1:], origin):
            column = pa.repeat(pa.scalar(run_id, number.type), batch.num_rows)
            yield pa.RecordBatch.from_arrays([column, *batch.columns], schema=SCHEMA)


def _ranges(source: Source, run_id: int) -> list[tuple[int, int]]:
    schema = pa.schema([("low", pa.int64()), ("high", pa.int64())])
    (row,) = (
        row
        for batch in source.select(schema, ("low", "high"), BOUNDS % {"run": run_id})
        for row in batch.to_pylist()
    )
    if row["low"] is None:
        return []
    low, end = row["low"], row["high"] + 1
    parts = max(1, min((end - low) // CELLS_OF_READER, MOST_READERS, os.cpu_count() or 1))
    edges = [low + (end - low) * part // parts for part in range(parts + 1)]
    return [(first, last - 1) for first, last in itertools.pairwise(edges)]
