"""Tables with a row per cell: CytoTable, pycytominer, our own export; Parquet or text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import BadTableError, UserInputError, some_of
from .cellprofiler import COMPARTMENTS, is_feature, position_columns
from .image_tables import ROWS, WELLS, ImageRecord, ImageRows, is_needed
from .objects import (
    BOX,
    CENTRE,
    DTYPES,
    LARGEST_NUMBER,
    Integers,
    ObjectBatch,
    ObjectSource,
    SourceFile,
    as_numbers,
    batch_rows,
    column_values,
    first_of_each,
    whole_numbers,
    without_nan,
)
from .tables import PARQUET, Refusal, TextTable, first_bytes, open_table, readable

EXCLUDED, CELL_ID = "Metadata_Excluded", "Metadata_CellId"
SEGMENTATION, SUBSET, LABEL = "Metadata_Segmentation", "Metadata_Subset", "Metadata_Label"
"""Columns of our own exports: why a cell does not count, its number in its store, who found it,
and what a split says of it."""
TOOL = "single cells"

_OURS = (EXCLUDED, CELL_ID, SEGMENTATION, SUBSET, LABEL)

_NUMBERS = (
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
"""Columns of the object number of a cell; the first that is there counts."""

_IMAGE_KEYS = ("Metadata_ImageNumber", "ImageNumber", "Metadata_TableNumber", "TableNumber")
_OWN_POSITION = {
    "min_row": "Metadata_MinRow",
    "min_col": "Metadata_MinCol",
    "max_row": "Metadata_MaxRow",
    "max_col": "Metadata_MaxCol",
    "centroid_row": "Metadata_CentroidRow",
    "centroid_col": "Metadata_CentroidCol",
}
_MERGED = re.compile(r"_[xy]$")
_NO_FEATURE = re.compile(
    r"Metadata_.*|Image_.*|ImageNumber|ObjectNumber|TableNumber|cell_id|"
    r"__index_level_\d+__|Unnamed: \d+|"
)
_BUFFER = 1 << 16
"""Bytes of each column that are read at once: 128 MB for 2,000 columns."""

Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Columns:
    """What the columns of a table of single cells are.

    ``image`` maps names of CellProfiler's image table to columns, ``keys`` are those that tell
    images apart; ``others`` are further columns about the image, kept as metadata.
    """

    object_number: str | None
    image: Mapping[str, str]
    keys: tuple[str, ...]
    others: tuple[str, ...]
    features: tuple[str, ...]
    positions: Mapping[str, str]
    excluded: str | None

    @property
    def of_image(self) -> list[str]:
        """All columns that say something about the image of a cell."""
        return list(dict.fromkeys([*self.keys, *self.image.values(), *self.others]))

    @classmethod
    def of(cls, columns: Sequence[str]) -> _Columns:
        present = set(columns)
        image: dict[str, str] = {}
        for column in columns:
            plain = column.removeprefix("Image_")
            # A merge of two tables leaves _x and _y at names that both have.
            for name in (column, _MERGED.sub("", column), plain, _MERGED.sub("", plain)):
                if is_needed(name):
                    image.setdefault(name, column)
        keys = [name for name in _IMAGE_KEYS if name in present]
        for prefix in ("Metadata_", "FileName_"):
            keys += [name for plain, name in image.items() if plain.startswith(prefix)]
        positions = {key: name for key, name in _OWN_POSITION.items() if name in present}
        for role in () if positions else COMPARTMENTS:
            by_measure: dict[str, str] = {}
            for prefix in (f"{role}_", f"Metadata_{role}_"):
                for name in columns:
                    if name.startswith(prefix):
                        by_measure.setdefault(name.removeprefix(prefix), name)
            positions = positions or position_columns(by_measure)
        return cls(
            next((name for name in _NUMBERS if name in present), None),
            image,
            tuple(dict.fromkeys(keys)),
            tuple(
                name
                for name in columns
                if name.startswith("Metadata_")
                and name not in {*_NUMBERS, *image.values(), *keys, *positions.values(), *_OURS}
            ),
            tuple(name for name in columns if _is_measure(name)),
            positions,
            EXCLUDED if EXCLUDED in present else None,
        )


def _is_measure(column: str) -> bool:
    if _NO_FEATURE.fullmatch(column) or not is_feature(column):
        return False
    owner, _, measure = column.partition("_")
    return owner not in COMPARTMENTS or is_feature(measure)


def is_single_cells(path: Path) -> bool:
    """Whether a file (Parquet, or text) has a row per cell: its number, its image and features."""
    try:
        columns = _Columns.of(open_table(path, whole=False).columns)
    except UserInputError:
        return False
    names_image = columns.image.keys() & {*WELLS, *ROWS} or any(
        name.startswith("FileName_") for name in columns.image
    )
    return bool(columns.object_number and columns.features and names_image)


def open_single_cells(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a table with a row per cell (:func:`is_single_cells`).

    ``plate`` is the barcode where it names none.
    """
    source = ObjectSource(TOOL, own_images=False)
    is_parquet = first_bytes(path) == PARQUET
    table: _Table = _ParquetTable(path) if is_parquet else _TextCells(path, source)
    columns = _Columns.of(table.columns)
    kept = _find_cells(source, path, table, columns, plate)
    types = {name: table.dtype(name) for name in columns.features}
    source.objects = tuple(
        role for role in COMPARTMENTS if any(name.startswith(f"{role}_") for name in types)
    )
    source.schema = pa.schema([(name, DTYPES[dtype]) for name, dtype in types.items() if dtype])
    odd = [name for name, dtype in types.items() if dtype is None]
    if odd:
        source.notes.append(
            f"columns not used, because they are neither numbers nor text: {', '.join(odd)}"
        )
    source.batches = lambda: _batches(table, columns, source.schema, kept)
    return source


def _find_cells(
    source: ObjectSource, path: Path, table: _Table, columns: _Columns, plate: str | None
) -> Chosen:
    """Add the images and cells to ``source``; return which rows of the table are cells."""
    number = str(columns.object_number)
    parts = [[np.empty(0, np.int64)] for _ in range(4)]
    own = [CELL_ID] if CELL_ID in table.columns else []
    known: dict[str, tuple[int, list[str | None]]] = {}
    """By the key of an image: its index, and what the other columns have in its first row."""
    varying: set[str] = set()
    """Columns that have no single value per image."""
    of_image = {**columns.image, **{name: name for name in columns.others}}
    rows_of = ImageRows({name: at for at, name in enumerate(of_image)}, plate)
    with readable(path):  # an image may be named by a column of an odd kind
        for batch, lines in table.batches(list(dict.fromkeys([number, *own, *columns.of_image]))):
            keys = _joined(batch, columns.keys)
            codes = keys.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            first = np.unique(codes, return_index=True)[1]
            for name in set(columns.others) - varying:
                try:
                    values = _joined(batch, [*columns.keys, name])
                except pa.ArrowNotImplementedError:  # lists
                    varying.add(name)
                    continue
                if len(values.dictionary) > len(first):
                    varying.add(name)
            found = []
            for key, row in zip(keys.dictionary.to_pylist(), first.tolist(), strict=True):
                texts = {}
                for name in columns.of_image:
                    value = batch.column(name)[row].as_py()
                    texts[name] = None if value is None else str(value)
                others = [texts[name] for name in columns.others]
                if key not in known:
                    known[key] = len(source.images), others
                    content = rows_of.read(
                        int(lines[row]), [texts[name] for name in of_image.values()]
                    )
                    source.images.append((path.name, content))
                index, before = known[key]
                # The cells of an image may begin in the batch before.
                named = zip(columns.others, others, before, strict=True)
                varying |= {name for name, text, earlier in named if text != earlier}
                found.append(index)
            parts[0].append(np.array(found, np.int64)[codes])
            parts[1].append(whole_numbers(batch.column(number)))
            parts[2].append(lines)
            parts[3] += [whole_numbers(batch.column(name)) for name in own]
    if varying:
        names = sorted(name.removeprefix("Metadata_") for name in varying)
        for at, (file, content) in enumerate(source.images):
            if isinstance(content, ImageRecord) and content.metadata:
                left = {name: text for name, text in content.metadata.items() if name not in names}
                source.images[at] = file, content._replace(metadata=left or None)
        source.notes.append(
            "metadata not kept, because the cells of one image have different values: "
            f"{some_of(names)}"
        )
    image, numbers, lines, cell_ids = (np.concatenate(some) for some in parts)
    source.check_plate(path.name)
    kept = np.ones(len(image), bool)
    for index, (_, content) in enumerate(source.images):
        if isinstance(content, Refusal):
            source.refuse(path.name, lines[image == index], content.reason, content.detail)
            kept &= image != index
    odd = kept & ((numbers < 0) | (numbers >= LARGEST_NUMBER))
    why = f"{number} is no whole number"
    source.refuse(path.name, lines[odd], "no object number", why)
    kept &= ~odd
    again = kept.copy()
    again[kept] = ~first_of_each((image[kept] << 32) | numbers[kept])
    source.refuse(path.name, lines[again], "duplicate key", "an earlier row is the same cell")
    kept &= ~again
    for line, reason, detail in table.refused:
        source.refuse(path.name, np.array([line]), reason, detail)
    rows = len(lines) + len(table.refused)
    source.files.append(SourceFile(path.name, path, rows))
    if rows == 0:
        source.problem(path.name, None, "no rows", "the file has no rows")
    source.image_index, source.object_number = image[kept], numbers[kept]
    source.cell_ids = cell_ids[kept] if own else None
    source.origins = [(np.zeros(len(source.image_index), np.int64), lines[kept])]
    return kept


def _joined(batch: pa.RecordBatch, names: Sequence[str]) -> pa.DictionaryArray:
    """Return the values of several columns of each row as one text, encoded."""
    columns = [pa.repeat(pa.scalar(""), batch.num_rows)]
    for name in names:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        columns.append(column.cast(pa.string()))
    # No name that can be stored has a NUL in it.
    return pc.binary_join_element_wise(
        *columns, "\0", null_handling="replace", null_replacement=""
    ).dictionary_encode()


def _batches(
    table: _Table, columns: _Columns, schema: pa.Schema, kept: Chosen
) -> Iterator[ObjectBatch]:
    dtypes = dict.fromkeys(columns.positions.values(), "float64")
    dtypes |= {name: dtype for name in schema.names if (dtype := table.dtype(name))}
    if columns.excluded:
        dtypes[columns.excluded] = "string"
    row = start = 0
    for batch, _ in table.batches(list(dtypes), dtypes):
        here = kept[row : row + batch.num_rows]
        row += batch.num_rows
        chosen = batch if here.all() else batch.filter(pa.array(here))
        if chosen.num_rows:
            yield ObjectBatch(
                start,
                chosen.select(schema.names),
                column_values(chosen, columns.positions, BOX),
                column_values(chosen, columns.positions, CENTRE),
                chosen.column(columns.excluded).to_pylist() if columns.excluded else None,
            )
        start += chosen.num_rows


class _ParquetTable:
    """A table of single cells that can be read again and again.

    ``batches`` yields some columns of all rows with their lines, in the types of ``dtypes`` where
    these are given; ``refused`` are the rows that the last reading could not use.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.refused: list[Refusal] = []
        with readable(path):
            self._schema = pq.read_schema(path)
        self.columns: Sequence[str] = self._schema.names
        repeated = {name for name in self.columns if self.columns.count(name) > 1}
        if repeated:
            raise BadTableError(f"{path.name} has the column {min(repeated)!r} more than once.")

    def dtype(self, column: str) -> str | None:
        """Return the type of a feature, None where it can be none."""
        kind = self._schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            return "int64"
        if pa.types.is_floating(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
            return "float64"
        return "string" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None

    def batches(
        self, columns: Sequence[str], dtypes: Mapping[str, str] | None = None
    ) -> Iterator[tuple[pa.RecordBatch, Integers]]:
        line = 1
        # Others write tables of any length as one row group: read it piece by piece.
        options = {"pre_buffer": False, "buffer_size": _BUFFER}
        with readable(self._path), pq.ParquetFile(self._path, **options) as file:
            for batch in file.iter_batches(batch_rows(len(columns)), columns=list(columns)):
                arrays = [batch.column(name) for name in columns]
                if dtypes:
                    kinds = [DTYPES[dtypes[name]] for name in columns]
                    pairs = zip(arrays, kinds, strict=True)
                    arrays = [without_nan(column.cast(kind)) for column, kind in pairs]
                lines = np.arange(line, line + batch.num_rows)
                line += batch.num_rows
                yield pa.RecordBatch.from_arrays(arrays, names=list(columns)), lines


class _TextCells:
    """As :class:`_ParquetTable`, of a text file; what is odd becomes an issue of ``source``."""

    def __init__(self, path: Path, source: ObjectSource) -> None:
        self._table: TextTable = open_table(path, empty=True)
        self._source = source
        self.refused: list[Refusal] = []
        self.columns: Sequence[str] = list(dict.fromkeys(self._table.columns))
        for name in sorted(self._table.repeated):
            why = f"{name} comes again: the first is used"
            source.problem(path.name, 1, "repeated column", why)
        self._texts: set[str] | None = None
        self._odd: set[str] = set()

    def dtype(self, column: str) -> str | None:
        if self._texts is None:  # by the first rows
            self._texts = set()
            for batch, _ in self.batches(self.columns):
                pairs = zip(self.columns, batch.slice(0, 1000).columns, strict=True)
                self._texts = {name for name, texts in pairs if as_numbers(texts)[1] is not None}
                break
        return "string" if column in self._texts else "float64"

    def batches(
        self, columns: Sequence[str], dtypes: Mapping[str, str] | None = None
    ) -> Iterator[tuple[pa.RecordBatch, Integers]]:
        self.refused = []
        positions = [self._table.columns.index(name) for name in columns]
        pairs = zip(columns, positions, strict=True)
        numbers = [at for name, at in pairs if dtypes and dtypes[name] != "string"]
        step = batch_rows(len(columns))
        for part in self._table.batches(positions, numbers):
            self.refused += part.refused
            arrays = part.columns
            if dtypes:
                pairs_of_texts = zip(columns, arrays, strict=True)
                arrays = [self._typed(name, texts, dtypes) for name, texts in pairs_of_texts]
            batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
            lines = np.asarray(part.lines, np.int64)
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step), lines[start : start + step]

    def _typed(self, name: str, texts: pa.Array, dtypes: Mapping[str, str]) -> pa.Array:
        if dtypes[name] == "string":
            return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        numbers, odd = as_numbers(texts)
        if odd is not None and name not in self._odd:
            self._odd.add(name)
            why = f"{name} has text among its numbers: these values are empty in the store"
            self._source.problem(self._table.path.name, None, "odd value", why)
        return numbers


_Table = _ParquetTable | _TextCells
