"""Tables with a row per cell: CytoTable, pycytominer, our own export; Parquet or CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import BadTableError, UserInputError
from .cellprofiler import (
    COMPARTMENTS,
    NO_PLATE,
    ROWS,
    WELLS,
    channels_of,
    image_record,
    is_feature,
    is_needed,
    is_repeat,
    without_repeats,
)
from .image_files import PARQUET
from .records import (
    BOX,
    CENTRE,
    DTYPES,
    Cells,
    FeatureColumn,
    ImageRecord,
    ImageRow,
    Integers,
    Notice,
    ObjectBatch,
    ObjectSource,
    Place,
    Refusal,
    RefusedRows,
    RowOrigin,
    SourceFile,
    batch_rows,
    place_values,
    without_nan,
)
from .wide_tables import CsvHeader, as_numbers, nothing_joined, read_blocks, read_header

EXCLUDED = "Metadata_Excluded"

_LABELS = (
    "Metadata_ObjectNumber",
    *(
        form.format(role)
        for role in COMPARTMENTS
        for form in (
            "Metadata_{}_Number_Object_Number",
            "{}_Number_Object_Number",
            "Metadata_{}_ObjectNumber",
            "{}_ObjectNumber",
            "Metadata_Cytoplasm_Parent_{}",
            "Cytoplasm_Parent_{}",
        )
    ),
    "ObjectNumber",
)
_IMAGE_KEYS = ("Metadata_ImageNumber", "ImageNumber", "Metadata_TableNumber", "TableNumber")
_OWN_PLACE = {
    "min_row": "Metadata_MinRow",
    "min_col": "Metadata_MinCol",
    "max_row": "Metadata_MaxRow",
    "max_col": "Metadata_MaxCol",
    "centroid_row": "Metadata_CentroidRow",
    "centroid_col": "Metadata_CentroidCol",
}
_BOX = {
    "min_row": "AreaShape_BoundingBoxMinimum_Y",
    "min_col": "AreaShape_BoundingBoxMinimum_X",
    "max_row": "AreaShape_BoundingBoxMaximum_Y",
    "max_col": "AreaShape_BoundingBoxMaximum_X",
}
_CENTRES = ("AreaShape_Center", "Location_Center")
_MERGED = re.compile(r"_[xy]$")
_NO_FEATURE = re.compile(
    r"Metadata_.*|Image_.*|ImageNumber|ObjectNumber|TableNumber|cell_id|"
    r"__index_level_\d+__|Unnamed: \d+|"
)


@dataclass(frozen=True)
class SingleCellColumns:
    """The columns of a table of single cells.

    ``image`` maps names of CellProfiler's image table to columns, ``keys`` are those that tell
    images apart.
    """

    label: str
    image: Mapping[str, str]
    keys: tuple[str, ...]
    features: tuple[str, ...]
    place: Place
    excluded: str | None

    @property
    def of_image(self) -> tuple[str, ...]:
        """All columns that say something about the image of a cell."""
        return tuple(dict.fromkeys([*self.keys, *self.image.values()]))


def looks_like_single_cells(columns: Sequence[str]) -> bool:
    """Whether a table has a label, an image and a measurement per row."""
    if _label(columns) is None or not any(_is_measure(name) for name in columns):
        return False
    said = set(_image_columns(columns))
    return bool(said & {*WELLS, *ROWS} or any(name.startswith("FileName_") for name in said))


def sort_columns(columns: Sequence[str], where: str) -> SingleCellColumns:
    """Tell what each column is.

    Raises:
        BadTableError: no column has the number of the cell, or none measures anything.
    """
    label = _label(columns)
    features = tuple(name for name in columns if _is_measure(name))
    if label is None or not features:
        what = "no column with the number of the cell (Metadata_ObjectNumber)"
        raise BadTableError(f"{where} has {what if label is None else 'no column of features'}.")
    image = _image_columns(columns)
    about = [name for plain, name in image.items() if plain.startswith("Metadata_")]
    keys = [name for name in _IMAGE_KEYS if name in columns]
    files = [name for plain, name in image.items() if plain.startswith("FileName_")]
    place = _place(set(columns))
    excluded = EXCLUDED if EXCLUDED in columns else None
    return SingleCellColumns(
        label, image, tuple(dict.fromkeys([*keys, *about, *files])), features, place, excluded
    )


def objects_of(features: Sequence[str]) -> tuple[str, ...]:
    """Return the compartments that features are named after."""
    first = {name.partition("_")[0] for name in features}
    return tuple(role for role in COMPARTMENTS if role in first)


def _label(columns: Sequence[str]) -> str | None:
    present = set(columns)
    return next((name for name in _LABELS if name in present), None)


def _is_measure(column: str) -> bool:
    if _NO_FEATURE.fullmatch(column) or not is_feature(column):
        return False
    owner, _, measure = column.partition("_")
    return owner not in COMPARTMENTS or is_feature(measure)


def _image_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return columns of images by their plain name; ``_x`` and ``_y`` are what a merge left."""
    found: dict[str, str] = {}
    for column in columns:
        for plain in (column, column.removeprefix("Image_")):
            for name in (plain, _MERGED.sub("", plain)):
                if is_needed(name):
                    found.setdefault(name, column)
    return found


def _place(present: set[str]) -> Place:
    own = {key: name for key, name in _OWN_PLACE.items() if name in present}
    if own:
        return own
    for role in COMPARTMENTS:
        found = _place_of(present, role)
        if found:
            return found
    return {}


def _place_of(present: set[str], role: str) -> dict[str, str]:
    box = {key: f"{role}_{name}" for key, name in _BOX.items() if f"{role}_{name}" in present}
    found = box if len(box) == len(_BOX) else {}
    for prefix in (role, f"Metadata_{role}"):
        for centre in _CENTRES:
            names = {"centroid_row": f"{prefix}_{centre}_Y", "centroid_col": f"{prefix}_{centre}_X"}
            if present.issuperset(names.values()):
                return {**found, **names}
    return found


TOOL = "single cells"
_LARGEST = 1 << 31
_BUFFER = 1 << 16
"""Bytes of each column that are read at once: 128 MB for 2,000 columns."""


def is_single_cells(path: Path) -> bool:
    """Whether a file (Parquet, or CSV) has a row per cell with features."""
    if not path.is_file():
        return False
    try:
        return looks_like_single_cells(_columns(path))
    except UserInputError:
        return False


def open_single_cells(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a table with a row per cell; ``plate`` is the barcode where it names none.

    Raises:
        BadTableError: it has no cells, no features, or is damaged.
        UserInputError: nothing says which plate it is, or it cannot be read.
    """
    table = _table(path)
    columns = sort_columns(table.columns, path.name)
    index = _Index(path.name, columns, plate)
    with _reading(path):
        for block in table.blocks(list(dict.fromkeys([columns.label, *columns.of_image]))):
            index.add(block)
    rows = [row.content for row in index.images]
    if rows and all(isinstance(row, Refusal) and row.reason == NO_PLATE for row in rows):
        raise UserInputError(f"{path.name} does not say which plate it is. Name it with --plate.")
    return _source(path, table, columns, index)


@dataclass(frozen=True)
class _Block:
    """Some rows with some columns, and the line of each."""

    batch: pa.RecordBatch
    lines: Integers


class _Table(Protocol):
    """A table of single cells that can be read again and again."""

    columns: Sequence[str]
    bad: list[Refusal]
    notices: list[Notice]

    def dtype(self, column: str) -> str | None:
        """Return the type of a feature, None where it can be none."""

    def blocks(
        self, columns: Sequence[str], dtypes: Mapping[str, str] | None = None
    ) -> Iterator[_Block]:
        """Yield all rows with some columns; in ``dtypes`` where these are given."""


class _ParquetTable:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.bad: list[Refusal] = []
        self.notices: list[Notice] = []
        with _reading(path):
            self._schema = pq.read_schema(path)
        self.columns: Sequence[str] = self._schema.names
        repeated = {name for name in self.columns if self.columns.count(name) > 1}
        if repeated:
            raise BadTableError(f"{path.name} has the column {min(repeated)!r} more than once.")

    def dtype(self, column: str) -> str | None:
        kind = self._schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            return "int64"
        if pa.types.is_floating(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
            return "float64"
        return "string" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None

    def blocks(
        self, columns: Sequence[str], dtypes: Mapping[str, str] | None = None
    ) -> Iterator[_Block]:
        line = 1
        # Others write tables of any length as one row group: read it piece by piece.
        options = {"pre_buffer": False, "buffer_size": _BUFFER}
        with _reading(self._path), pq.ParquetFile(self._path, **options) as file:
            for batch in file.iter_batches(batch_rows(len(columns)), columns=list(columns)):
                # The order of a Parquet file is its own, not the one that was asked for.
                chosen = batch.select(list(columns))
                lines = np.arange(line, line + batch.num_rows)
                line += batch.num_rows
                yield _Block(_cast(chosen, dtypes) if dtypes else chosen, lines)


class _CsvTable:
    def __init__(self, path: Path) -> None:
        self._header: CsvHeader = read_header(path, nothing_joined)
        if not self._header.columns:
            raise BadTableError(f"{path} is empty. Export it again, or give another file.")
        self._names = without_repeats(self._header.columns)
        self.columns: Sequence[str] = [name for name in self._names if not is_repeat(name)]
        self.bad: list[Refusal] = []
        self.notices = [
            Notice(path.name, 1, "repeated column", f"{name} comes again: the first is used")
            for name in dict.fromkeys(n.partition("\0")[0] for n in self._names if is_repeat(n))
        ]
        self._texts: set[str] | None = None
        self._odd: set[str] = set()

    def dtype(self, column: str) -> str | None:
        if self._texts is None:
            self._texts = self._find_texts()
        return "string" if column in self._texts else "float64"

    def blocks(
        self, columns: Sequence[str], dtypes: Mapping[str, str] | None = None
    ) -> Iterator[_Block]:
        self.bad = []
        blocks = read_blocks(self._header, self._names, self.bad.append, list(columns))
        for block in blocks:
            step = batch_rows(len(columns))
            for start in range(0, block.batch.num_rows, step):
                part = block.batch.slice(start, step)
                typed = self._typed(part, dtypes) if dtypes else part
                yield _Block(typed, block.lines[start : start + step])

    def _find_texts(self) -> set[str]:
        """Return the columns that hold text, told from the first rows."""
        for block in read_blocks(self._header, self._names, lambda _: None):
            head = block.batch.slice(0, 1000)
            pairs = zip(head.schema.names, head.columns, strict=True)
            return {name for name, texts in pairs if as_numbers(texts)[1] is not None}
        return set()

    def _typed(self, batch: pa.RecordBatch, dtypes: Mapping[str, str]) -> pa.RecordBatch:
        arrays = []
        for name, texts in zip(batch.schema.names, batch.columns, strict=True):
            if dtypes.get(name) == "string":
                arrays.append(pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts))
                continue
            numbers, odd = as_numbers(texts)
            arrays.append(numbers)
            if odd is not None and name not in self._odd:
                self._odd.add(name)
                detail = f"{name} has texts among its numbers: they are left out"
                self.notices.append(Notice(self._header.path.name, None, "odd value", detail))
        return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


@dataclass
class _Index:
    """The images and labels of all rows."""

    file: str
    columns: SingleCellColumns
    plate: str | None
    images: list[ImageRow] = field(default_factory=list)
    refused: list[RefusedRows] = field(default_factory=list)
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _image: list[Integers] = field(default_factory=list)
    _label: list[Integers] = field(default_factory=list)
    _lines: list[Integers] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        """Add the rows of a block."""
        self._image.append(self._find(block))
        self._label.append(_labels(block.batch.column(self.columns.label)))
        self._lines.append(block.lines)

    def usable(self) -> tuple[Integers, Integers, Integers, npt.NDArray[np.bool_]]:
        """Return image, label and line of the cells, and which rows are cells."""
        image, label, lines = (_joined(parts) for parts in (self._image, self._label, self._lines))
        good = np.array([isinstance(row.content, ImageRecord) for row in self.images], bool)
        kept = good[image] if len(self.images) else np.zeros(len(image), bool)
        self._refuse_images(image, lines, ~kept)
        odd = kept & (label < 0)
        self._refuse(lines[odd], "no object number", f"{self.columns.label} is no whole number")
        kept &= ~odd
        again = kept & _repeated((image << 32) | label, kept)
        self._refuse(lines[again], "duplicate key", "an earlier row is the same cell")
        kept &= ~again
        return image[kept], label[kept], lines[kept], kept

    def _refuse_images(self, image: Integers, lines: Integers, lost: npt.NDArray[np.bool_]) -> None:
        for number in np.unique(image[lost]):
            content = self.images[number].content
            assert isinstance(content, Refusal)
            self._refuse(lines[lost & (image == number)], content.reason, content.detail)

    def _refuse(self, lines: Integers, reason: str, detail: str) -> None:
        if len(lines):
            self.refused.append(RefusedRows(self.file, lines.tolist(), reason, detail))

    def _find(self, block: _Block) -> Integers:
        """Return the image of each row; rows of one image say the same of it."""
        code = np.zeros(block.batch.num_rows, np.int64)
        for name in self.columns.keys:
            encoded = pc.fill_null(_plain(block.batch.column(name)), "").dictionary_encode()
            own = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            _, code = np.unique(code * (len(encoded.dictionary) + 1) + own, return_inverse=True)
        codes, first, place = np.unique(code, return_index=True, return_inverse=True)
        found = np.empty(len(codes), np.int64)
        for number, row in enumerate(first.tolist()):
            found[number] = self._image_of(block, row)
        return found[place]

    def _image_of(self, block: _Block, row: int) -> int:
        values = {name: _text(block.batch.column(name)[row]) for name in self.columns.of_image}
        key = tuple(values[name] for name in self.columns.keys)
        if key not in self._known:
            self._known[key] = len(self.images)
            plain = {plain: values[name] for plain, name in self.columns.image.items()}
            line = int(block.lines[row])
            content = image_record(line, plain, channels_of(plain), self.plate)
            self.images.append(ImageRow(self.file, content))
        return self._known[key]


def _source(path: Path, table: _Table, columns: SingleCellColumns, index: _Index) -> ObjectSource:
    image, label, lines, kept = index.usable()
    index.refused += [RefusedRows(path.name, [b.line], b.reason, b.detail) for b in table.bad]
    total = len(kept) + len(table.bad)
    types = {name: table.dtype(name) for name in columns.features}
    features = tuple(
        FeatureColumn(name, dtype, None, None) for name, dtype in types.items() if dtype
    )
    odd = [name for name, dtype in types.items() if dtype is None]
    origin = RowOrigin(np.zeros(len(image), np.int64), lines)
    return ObjectSource(
        tool=TOOL,
        objects=objects_of(columns.features),
        columns=features,
        files=(SourceFile(path.name, path, total),),
        images=tuple(index.images),
        own_images=False,
        cells=Cells(image, label, (origin,)),
        batches=_batches(table, columns, features, kept),
        close=lambda: None,
        refused=index.refused,
        notices=[*table.notices, *_no_rows(path, total)],
        notes=[f"left out, as they are neither numbers nor text: {', '.join(odd)}"] if odd else [],
    )


def _no_rows(path: Path, rows: int) -> list[Notice]:
    return [] if rows else [Notice(path.name, None, "no rows", "the file has no rows")]


def _batches(
    table: _Table,
    columns: SingleCellColumns,
    features: Sequence[FeatureColumn],
    kept: npt.NDArray[np.bool_],
) -> Callable[[], Iterator[ObjectBatch]]:
    names = [column.name for column in features]
    dtypes = {column.name: column.dtype for column in features}
    extra = [name for name in columns.place.values() if name not in dtypes]
    dtypes |= dict.fromkeys(extra, "float64")
    if columns.excluded:
        extra.append(columns.excluded)
        dtypes[columns.excluded] = "string"

    def stream() -> Iterator[ObjectBatch]:
        row = start = 0
        for block in table.blocks([*names, *extra], dtypes):
            here = kept[row : row + block.batch.num_rows]
            chosen = block.batch if here.all() else block.batch.filter(pa.array(here))
            row += block.batch.num_rows
            if chosen.num_rows:
                yield _batch(chosen, start, columns, names)
            start += chosen.num_rows

    return stream


def _batch(
    batch: pa.RecordBatch, start: int, columns: SingleCellColumns, names: Sequence[str]
) -> ObjectBatch:
    excluded = batch.column(columns.excluded).to_pylist() if columns.excluded else None
    return ObjectBatch(
        start,
        batch.select(list(names)),
        place_values(batch, columns.place, BOX),
        place_values(batch, columns.place, CENTRE),
        excluded,
    )


def _table(path: Path) -> _Table:
    return _ParquetTable(path) if _is_parquet(path) else _CsvTable(path)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET)) == PARQUET
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error


def _columns(path: Path) -> Sequence[str]:
    if _is_parquet(path):
        return _ParquetTable(path).columns
    return read_header(path, nothing_joined, glance=True).columns


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadTableError(
            f"{path} is damaged, or has values of an odd kind ({reason}). Export it again."
        ) from error


def _cast(batch: pa.RecordBatch, dtypes: Mapping[str, str]) -> pa.RecordBatch:
    arrays = [
        without_nan(column.cast(DTYPES[dtypes[name]]))
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _labels(column: pa.Array) -> Integers:
    kind = column.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)
    values: Any = column if plain else as_numbers(_plain(column))[0]
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    whole = np.isfinite(numbers) & (np.floor(numbers) == numbers)
    usable = whole & (numbers >= 0) & (numbers < _LARGEST)
    return np.where(usable, numbers, -1).astype(np.int64)


def _plain(column: pa.Array) -> pa.Array:
    kind = column.type
    column = column.dictionary_decode() if pa.types.is_dictionary(kind) else column
    return column.cast(pa.string())


def _text(value: Any) -> str | None:
    found = value.as_py()
    return None if found is None else str(found)


def _joined(parts: Sequence[Integers]) -> Integers:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _repeated(keys: Integers, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which of the keys come again, looking only at the rows ``among``."""
    rows = np.flatnonzero(among)
    _, first = np.unique(keys[rows], return_index=True)
    again = np.zeros(len(keys), bool)
    again[rows] = True
    again[rows[first]] = False
    return again
