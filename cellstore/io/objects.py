"""Objects that other tools measured: what the readers of their tables hand over, as Arrow.

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

from ..enums import Severity
from ..errors import UserInputError
from .image_tables import NO_PLATE, ImageRecord
from .tables import MISSING_NUMBERS, Refusal

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

VALUES_AT_ONCE = 16_000_000
"""Numbers of one batch: 128 MB."""

MOST_ROWS = 65_536
LARGEST_NUMBER = 1 << 31
"""Object numbers are smaller."""

DTYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string()}
"""The types that a feature can have."""

BOX = ("min_row", "min_col", "max_row", "max_col")
CENTRE = ("centroid_row", "centroid_col")

_NUMBER = r"(?i)^\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?)\s*$"


class SourceFile(NamedTuple):
    """A table whose rows are accounted for: its name, its file, how many rows it has."""

    name: str
    path: Path
    rows: int


class RowIssue(NamedTuple):
    """What is wrong with rows of a table: they are refused, or something about them is odd.

    ``lines`` has None where it is about the table.
    """

    severity: Severity
    file: str
    lines: Sequence[int | None]
    reason: str
    detail: str


class ObjectBatch(NamedTuple):
    """Cells ``start`` to ``start + n``: (n, 4) boxes and (n, 2) centres, NaN where unknown.

    ``values`` has the features in the order of ``ObjectSource.schema``; ``excluded`` says why a
    cell does not count.
    """

    start: int
    values: pa.RecordBatch
    boxes: Floats
    centres: Floats
    excluded: Sequence[str | None] | None = None


def _nothing() -> Integers:
    return np.empty(0, np.int64)


@dataclass
class ObjectSource:
    """All of a source but the measurements, which ``batches`` streams.

    ``images`` has the file and the content of each row that is an image (or none);
    ``own_images``: these rows are of image tables, and accounted for. ``empty``: the
    images (indices) in which no object was found. The cells, in the order in
    which they are read, have an item each in ``image_index`` (into ``images``), in
    ``object_number``, and in ``origins``: per kind of table the index of the file and the line.
    ``cell_ids``: the number that each had in the store that exported it.
    """

    tool: str
    own_images: bool
    objects: tuple[str, ...] = ()
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    files: list[SourceFile] = field(default_factory=list)
    images: list[tuple[str, ImageRecord | Refusal]] = field(default_factory=list)
    empty: Sequence[int] = ()
    image_index: Integers = field(default_factory=_nothing)
    object_number: Integers = field(default_factory=_nothing)
    origins: list[tuple[Integers, Integers]] = field(default_factory=list)
    cell_ids: Integers | None = None
    batches: Callable[[], Iterator[ObjectBatch]] = lambda: iter(())
    close: Callable[[], None] = lambda: None
    issues: list[RowIssue] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, file: str, lines: Integers, reason: str, detail: str) -> None:
        """Note rows that become no cells."""
        if len(lines):
            issue = RowIssue(Severity.REFUSED, file, lines.tolist(), reason, detail)
            self.issues.append(issue)

    def problem(self, file: str, line: int | None, reason: str, detail: str) -> None:
        """Note what could not be used of a row, or of a whole table."""
        self.issues.append(RowIssue(Severity.PROBLEM, file, [line], reason, detail))

    def check_plate(self, name: str) -> None:
        """Check that some row names its plate."""
        rows = [content for _, content in self.images]
        if rows and all(isinstance(row, Refusal) and row.reason == NO_PLATE for row in rows):
            raise UserInputError(f"{name} does not name its plate. Name it with --plate.")


def batch_rows(columns: int) -> int:
    """Return how many rows of that many columns are read at once."""
    return max(1, min(MOST_ROWS, VALUES_AT_ONCE // max(1, columns)))


def column_values(
    table: pa.RecordBatch, columns: Mapping[str, str], names: Sequence[str]
) -> Floats:
    """Return a (rows, names) array of the columns that ``columns`` has for names; else NaN."""
    found = np.full((table.num_rows, len(names)), np.nan)
    for number, name in enumerate(names):
        if name in columns:
            column: Any = table.column(table.schema.get_field_index(columns[name]))
            found[:, number] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return found


def without_nan(values: pa.Array) -> pa.Array:
    """Return numbers with null for NaN: the habit of pandas, where both are 'missing'."""
    if not pa.types.is_floating(values.type):
        return values
    odd = pc.fill_null(pc.is_nan(values), False)
    return pc.if_else(odd, pa.scalar(None, values.type), values) if pc.any(odd).as_py() else values


def as_numbers(texts: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Return texts as float64, missing ones null, and a mask of those that are no number.

    Numbers stay what they are.
    """
    if pa.types.is_floating(texts.type):
        return texts, None
    nothing = pa.scalar(None, pa.string())
    missing = pa.array(MISSING_NUMBERS)
    plain = pc.if_else(pc.is_in(texts, value_set=missing), nothing, texts)
    try:
        return plain.cast(pa.float64()), None
    except pa.ArrowInvalid:
        pass
    usable = pc.fill_null(pc.match_substring_regex(plain, _NUMBER), False)
    trimmed = pc.utf8_trim_whitespace(pc.if_else(usable, plain, nothing))
    empty = pc.is_in(pc.utf8_trim_whitespace(texts), value_set=missing)
    odd = pc.and_(pc.invert(usable), pc.invert(empty))
    plus = pc.replace_substring_regex(trimmed, r"^\+", "")
    return plus.cast(pa.float64()), odd if pc.any(odd).as_py() else None


def whole_numbers(values: pa.Array) -> Integers:
    """Return numbers, or texts of numbers, as whole numbers from 0; -1 where they are none."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type):
        whole = pc.fill_null(values.cast(pa.int64(), safe=False), -1)
        return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)
    if not pa.types.is_floating(values.type):
        values = as_numbers(values.cast(pa.string()))[0]
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    whole = np.isfinite(numbers) & (np.floor(numbers) == numbers) & (np.abs(numbers) < 1 << 53)
    return np.where(whole & (numbers >= 0), numbers, -1).astype(np.int64)


def first_of_each(keys: Integers) -> npt.NDArray[np.bool_]:
    """Return which of the keys come for the first time."""
    found = np.zeros(len(keys), bool)
    found[np.unique(keys, return_index=True)[1]] = True
    return found
