"""Objects that other tools measured: what the readers of their tables hand over.

An :class:`ObjectSource` knows which images and cells there are; the measurements are read batch by
batch, so that no table is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..enums import Control, PerturbationKind

LONGEST = 255
"""Characters of a name that every database and file system can keep."""


class FileRef(NamedTuple):
    """One channel of an image, as a table names it.

    ``channel`` is the name of the stain ('RNA'), ``number`` the channel number of a Phenix file
    name, ``folder`` the ``PathName_*`` of the row as written, which may be on another machine.
    """

    channel: str
    number: int | None
    name: str
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class TreatmentRecord:
    """What was done to a well.

    ``identifier`` is the ``broad_sample`` of JUMP tables, or else their ``Metadata_JCP2022``.
    Several targets are each there once, sorted, with ``|`` between them.
    """

    kind: PerturbationKind
    pert_iname: str
    target: str | None = None
    control: Control | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None
    pubchem_cid: str | None = None


class ImageRecord(NamedTuple):
    """One field of view from line ``line`` of a table; row, column, site as numbers.

    ``row`` and ``column`` count from 1; ``site``, ``plane`` and ``time_point`` are as written.
    """

    line: int
    plate: str
    batch: str | None
    row: int
    column: int
    site: int
    plane: int
    time_point: int
    core_name: str | None
    files: tuple[FileRef, ...]
    treatment: TreatmentRecord | None


class Refusal(NamedTuple):
    """A row that cannot be used: the line it starts at, a reason to count by, and its details."""

    line: int
    reason: str
    detail: str


Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

VALUES_AT_ONCE = 16_000_000
"""Numbers of one batch: 128 MB."""

MOST_ROWS = 65_536

DTYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string()}
"""The types that a feature can have."""

BOX = ("min_row", "min_col", "max_row", "max_col")
CENTRE = ("centroid_row", "centroid_col")

Place = Mapping[str, str]
"""Where box and centre of an object are: ``BOX`` and ``CENTRE`` to column names."""


class FeatureColumn(NamedTuple):
    """A measurement; ``unit`` and ``source`` are None where the table does not say."""

    name: str
    dtype: str
    unit: str | None = None
    source: str | None = None


class SourceFile(NamedTuple):
    """A table whose rows are accounted for: its name, its file, how many rows it has."""

    name: str
    path: Path
    rows: int


@dataclass(frozen=True)
class RefusedRows:
    """Rows of one table (``lines``) that are left out for one reason."""

    file: str
    lines: Sequence[int]
    reason: str
    detail: str


@dataclass(frozen=True)
class Notice:
    """Something about a table, or one row of it, that a person should know.

    ``suspicious``: all was used; else a part could not be.
    """

    file: str
    line: int | None
    reason: str
    detail: str
    suspicious: bool = False


@dataclass(frozen=True)
class ImageRow:
    """A row of an image table of ``file``: an image, or why it is none."""

    file: str
    content: ImageRecord | Refusal


@dataclass(frozen=True)
class RowOrigin:
    """Where the row of each cell is in one kind of table: which file, which line."""

    file: Integers
    line: Integers


@dataclass(frozen=True)
class Cells:
    """The cells of a source in the order in which they are read, an item each.

    ``image`` counts into ``ObjectSource.images``; ``origins`` has an item per kind of table.
    """

    image: Integers
    label: Integers
    origins: tuple[RowOrigin, ...]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class ObjectBatch:
    """Cells ``start`` to ``start + n``: (n, 4) boxes and (n, 2) centres, NaN where unknown.

    ``values`` has the features in the order of ``ObjectSource.columns``; ``excluded`` says why a
    cell does not count.
    """

    start: int
    values: pa.RecordBatch
    boxes: Floats
    centres: Floats
    excluded: Sequence[str | None] | None = None


@dataclass
class ObjectSource:
    """All of a source but the measurements, which ``batches`` streams.

    ``images``: one per image that has a row; those with refused rows are not used by any cell.
    ``own_images``: the images have rows of their own, which are accounted for.
    """

    tool: str
    objects: tuple[str, ...]
    columns: tuple[FeatureColumn, ...]
    files: tuple[SourceFile, ...]
    images: tuple[ImageRow, ...]
    own_images: bool
    cells: Cells
    batches: Callable[[], Iterator[ObjectBatch]]
    close: Callable[[], None]
    refused: list[RefusedRows] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the features."""
        return pa.schema([(column.name, DTYPES[column.dtype]) for column in self.columns])


def batch_rows(columns: int) -> int:
    """Return how many rows of that many columns are read at once."""
    return max(1, min(MOST_ROWS, VALUES_AT_ONCE // max(1, columns)))


def place_values(table: pa.RecordBatch, place: Place, names: Sequence[str]) -> Floats:
    """Return those columns of a place as (rows, names); NaN where unknown."""
    found = np.full((table.num_rows, len(names)), np.nan)
    for number, name in enumerate(names):
        if name in place:
            column: Any = table.column(table.schema.get_field_index(place[name]))
            found[:, number] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return found


def without_nan(values: pa.Array) -> pa.Array:
    """Return numbers with null for NaN: the habit of pandas, where both are 'missing'."""
    if not pa.types.is_floating(values.type):
        return values
    odd = pc.fill_null(pc.is_nan(values), False)
    return pc.if_else(odd, pa.scalar(None, values.type), values) if pc.any(odd).as_py() else values
