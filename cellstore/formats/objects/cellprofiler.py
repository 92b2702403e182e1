"""CellProfiler's measurements of objects, as CSV files or in SQLite, joined to cells."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadTableError, UserInputError
from ..records import ImageRecord, Refusal
from . import cellprofiler_csv as csvs
from . import cellprofiler_sqlite as sqlite
from .cellprofiler_columns import (
    IMAGE_NUMBER,
    TableColumns,
    choose_tables,
    joined_headers,
    primary_of,
    table_columns,
)
from .cellprofiler_images import (
    NO_PLATE,
    channels_of,
    disagreement,
    image_record,
    plain_column,
)
from .cellprofiler_join import UNKNOWN, Joined, TableKeys, join_tables
from .model import (
    BOX,
    CENTRE,
    Cells,
    FeatureColumn,
    ImageRow,
    Integers,
    Notice,
    ObjectBatch,
    ObjectSource,
    RefusedRows,
    RowOrigin,
    SourceFile,
    batch_rows,
    place_values,
)
from .spool import read_header, union

TOOL = "CellProfiler"
_GROUP = 32
_READERS = 2

Reader = Callable[[Integers], pa.RecordBatch]
ImageKey = tuple[int, int]
"""The group (folder, or TableNumber) and the ImageNumber."""


def is_cellprofiler_folder(path: Path) -> bool:
    """Whether a folder has CellProfiler's ``Image.csv``, itself or in subfolders."""
    table = csvs.find_image_table(path) if path.is_dir() else None
    if table is None:
        return False
    try:
        header = read_header(table, joined_headers, glance=True)
    except UserInputError:
        return False
    return not header.columns or IMAGE_NUMBER in header.columns


def is_cellprofiler_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database with a table of images and tables of objects."""
    if not (path.is_file() and sqlite.is_sqlite(path)):
        return False
    try:
        tables = sqlite.tables_of(path)
    except BadTableError:
        return False
    return sqlite.image_table(tables) is not None


def open_cellprofiler(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a folder of CSV files, or an SQLite database; close the source after use.

    ``plate`` is the barcode where the tables name none.

    Raises:
        BadTableError: there is no such table, several segmentations, or damage.
        UserInputError: nothing says which plate it is.
    """
    if path.is_dir():
        return _open_folder(path, plate)
    return _open_sqlite(path, plate)


class _Images:
    """The images of all image tables, found by group and ImageNumber."""

    def __init__(self) -> None:
        self.rows: list[ImageRow] = []
        self.notices: list[Notice] = []
        self._keys: dict[ImageKey, int] = {}
        self._sorted: tuple[Integers, Integers] | None = None

    def add(
        self, file: str, line: int, key: tuple[int, int | None], content: ImageRecord | Refusal
    ) -> None:
        """Add a row, whatever it is."""
        group, number = key
        if number is not None and not 0 <= number < 1 << _GROUP:
            number = None
        if number is None and isinstance(content, ImageRecord):
            content = Refusal(line, "no image number", f"{IMAGE_NUMBER} is not a whole number")
        elif number is not None and (group, number) in self._keys:
            content = Refusal(line, "duplicate key", f"an earlier row has {IMAGE_NUMBER} {number}")
        elif number is not None and isinstance(content, ImageRecord):
            self._keys[group, number] = len(self.rows)
            self._notice(file, content)
        self.rows.append(ImageRow(file, content))

    def check_plate(self, where: str) -> None:
        """Raise what to do if no row at all says which plate it is of."""
        rows = [row.content for row in self.rows]
        if rows and all(isinstance(row, Refusal) and row.reason == NO_PLATE for row in rows):
            raise UserInputError(f"{where} does not say which plate it is. Name it with --plate.")

    def find(self, group: Integers | int, number: Integers) -> Integers:
        """Return the image of each row, ``UNKNOWN`` where there is none."""
        if self._sorted is None:
            keys = np.array([(g << _GROUP) | n for g, n in self._keys], np.int64)
            order = np.argsort(keys)
            self._sorted = keys[order], np.array(list(self._keys.values()), np.int64)[order]
        keys, images = self._sorted
        if len(keys) == 0:
            return np.full(len(number), UNKNOWN, np.int64)
        wanted = np.where((number < 0) | (number >= 1 << _GROUP), -1, (group << _GROUP) | number)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, images[place], UNKNOWN)

    def _notice(self, file: str, record: ImageRecord) -> None:
        odd = disagreement(record)
        if odd is not None:
            self.notices.append(
                Notice(file, record.line, "well and file name disagree", odd, suspicious=True)
            )


@dataclass(frozen=True)
class _Opened:
    """What both kinds of sources have in common once their keys are read."""

    images: _Images
    files: list[SourceFile]
    readers: list[Reader]
    keys: list[TableKeys]
    dtypes: dict[str, str]
    close: Callable[[], None]
    refused: list[RefusedRows]
    notices: list[Notice]
    notes: list[str]


def _open_folder(path: Path, plate: str | None) -> ObjectSource:
    folder = csvs.scan(path)
    if not folder.images and not folder.objects:
        raise BadTableError(f"{path} has no Image.csv of CellProfiler, nor tables of objects.")
    images = _csv_images(folder, plate)
    images.check_plate(path.name)
    chosen, note = _choose(_csv_columns(folder), path.name)
    rows = Counter(row.file for row in images.rows)
    files = [SourceFile(file.name, file.path, rows[file.name]) for file in folder.images]
    target = Path(tempfile.mkdtemp(prefix="cellstore-"))
    try:
        opened = _spooled(folder, images, chosen, files, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    opened.notes.extend([note] if note else [])
    return _source(opened)


def _csv_images(folder: csvs.CsvFolder, plate: str | None) -> _Images:
    images = _Images()
    for row in csvs.image_rows(folder):
        name = folder.folders[row.file.folder]
        content = row.refusal or image_record(
            row.line, row.values, channels_of(row.values), plate, name
        )
        images.add(row.file.name, row.line, (row.file.folder, row.number), content)
    return images


def _csv_columns(folder: csvs.CsvFolder) -> list[TableColumns]:
    names = dict.fromkeys(file.table for file in folder.objects)
    return [
        table_columns(name, union(f.header.columns for f in folder.objects if f.table == name))
        for name in names
    ]


def _choose(tables: Sequence[TableColumns], where: str) -> tuple[list[TableColumns], str]:
    if not tables:
        return [], "there is no table of objects: only images are read"
    return choose_tables(tables, where)


def _spooled(
    folder: csvs.CsvFolder,
    images: _Images,
    chosen: Sequence[TableColumns],
    files: list[SourceFile],
    target: Path,
) -> _Opened:
    readers: list[Reader] = []
    keys: list[TableKeys] = []
    refused: list[RefusedRows] = []
    notices = list(images.notices)
    for number, columns in enumerate(chosen):
        own = [file for file in folder.objects if file.table == columns.name]
        table, found = csvs.spool_table(
            columns.name, own, target / f"{number}.arrow", images.find, len(files)
        )
        files.extend(SourceFile(f.name, f.path, table.rows[f.name]) for f in own)
        readers.append(table.spool.read)
        keys.append(found)
        refused += table.refused
        notices += table.notices
    for file in folder.empty:
        files.append(SourceFile(file.name, file.path, 0))
        notices.append(Notice(file.name, None, "empty file", "the file has 0 bytes"))
    notices += [
        Notice(file.name, None, "no rows", "the image table has a header only")
        for file in files[: len(folder.images)]
        if file.rows == 0
    ]
    return _Opened(
        images, files, readers, keys, {}, lambda: shutil.rmtree(target, ignore_errors=True),
        refused, notices, [],
    )  # fmt: skip


def _open_sqlite(path: Path, plate: str | None) -> ObjectSource:
    tables = sqlite.tables_of(path)
    image_table = sqlite.image_table(tables)
    if image_table is None:
        raise BadTableError(f"{path} has no table Image of CellProfiler with an {IMAGE_NUMBER}.")
    names = [plain_column(name) for name in tables[image_table]]
    groups: dict[str | None, int] = {}
    images = _sqlite_images(path, image_table, names, groups, plate)
    images.check_plate(path.name)
    found = sqlite.object_tables(path, tables)
    chosen, note = _choose([table.columns for table in found], path.name)
    by_name = {table.columns.name: table for table in found}
    used = [by_name[columns.name] for columns in chosen]
    files = [SourceFile(f"{path.name}:{image_table}", path, len(images.rows))]
    keys = [
        _sqlite_keys(table, groups, images, number) for number, table in enumerate(used, start=1)
    ]
    files += [
        SourceFile(f"{path.name}:{table.name}", path, len(of_table))
        for table, of_table in zip(used, keys, strict=True)
    ]
    strings = {table.columns.features[name]: "string" for table in used for name in table.texts
               if name in table.columns.features}  # fmt: skip
    return _source(
        _Opened(
            images, files, [table.read for table in used], keys, strings, lambda: None, [],
            list(images.notices), [note] if note else [],
        )
    )  # fmt: skip


def _sqlite_images(
    path: Path, table: str, columns: Sequence[str], groups: dict[str | None, int], plate: str | None
) -> _Images:
    images = _Images()
    channels = channels_of(columns)
    present = sqlite.tables_of(path)[table]
    for row in sqlite.read_images(path, table, present):
        group = groups.setdefault(row.group, len(groups))
        content = image_record(row.line, row.values, channels, plate)
        images.add(f"{path.name}:{table}", row.line, (group, row.number), content)
    return images


def _sqlite_keys(
    table: sqlite.SqliteTable, groups: dict[str | None, int], images: _Images, file: int
) -> TableKeys:
    keys = sqlite.read_keys(table)
    encoded = keys.group.dictionary_encode()
    codes = [groups.get(text, -1) for text in encoded.dictionary.to_pylist()]
    null = groups.get(None, -1)
    places = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
    group = np.array([*codes, null], np.int64)[places]
    number = _integers(keys.image)
    image = np.where(group < 0, UNKNOWN, images.find(np.maximum(group, 0), number))
    return TableKeys(
        table.columns,
        image,
        _integers(keys.number),
        {role: _integers(values) for role, values in keys.parents.items()},
        np.full(len(number), file, np.int64),
        table.rowids,
    )


def _integers(values: pa.Array) -> Integers:
    whole = pc.fill_null(values.cast(pa.int64()), UNKNOWN)
    return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)


def _source(opened: _Opened) -> ObjectSource:
    nothing = np.empty(0, np.int64)
    source = ObjectSource(
        tool=TOOL,
        objects=(),
        columns=(),
        files=tuple(opened.files),
        images=tuple(opened.images.rows),
        own_images=True,
        cells=Cells(nothing, nothing, ()),
        batches=_no_batches,
        close=opened.close,
        refused=opened.refused,
        notices=opened.notices,
        notes=opened.notes,
    )
    return replace(source, **_joined_parts(opened)) if opened.keys else source


def _joined_parts(opened: _Opened) -> dict[str, Any]:
    joined = join_tables(opened.keys)
    origins = tuple(
        RowOrigin(table.file[rows], table.line[rows])
        for table, rows in zip(joined.tables, joined.rows, strict=True)
    )
    columns = _feature_columns(joined.tables, opened.dtypes)
    return {
        "objects": tuple(table.columns.name for table in joined.tables),
        "columns": columns,
        "cells": Cells(joined.image, joined.label, origins),
        "batches": _Batches(joined, opened.readers, columns),
        "refused": [*opened.refused, *_left_out(joined, opened.files)],
    }


def _no_batches() -> Iterator[ObjectBatch]:
    return iter(())


def _feature_columns(
    tables: Sequence[TableKeys], dtypes: dict[str, str]
) -> tuple[FeatureColumn, ...]:
    names = [name for table in tables for name in table.columns.features.values()]
    return tuple(FeatureColumn(name, dtypes.get(name, "float64"), None, TOOL) for name in names)


def _left_out(joined: Joined, files: Sequence[SourceFile]) -> list[RefusedRows]:
    found = []
    for item in joined.left_out:
        of_file = item.table.file[item.rows]
        for number in np.unique(of_file):
            lines = item.table.line[item.rows[of_file == number]]
            found.append(RefusedRows(files[number].name, lines.tolist(), item.reason, item.detail))
    return found


class _Batches:
    """Reads the tables side by side: what comes next is read while the last is being used."""

    def __init__(
        self, joined: Joined, readers: Sequence[Reader], columns: Sequence[FeatureColumn]
    ) -> None:
        self._joined = joined
        self._readers = readers
        self._names = [column.name for column in columns]
        tables = [table.columns for table in joined.tables]
        primary = primary_of(tables)
        self._primary = tables.index(primary)
        self._place = primary.place()

    def __call__(self) -> Iterator[ObjectBatch]:
        step = batch_rows(len(self._names))
        starts = range(0, len(self._joined.label), step)
        with ThreadPoolExecutor(_READERS) as pool:
            waiting: deque[tuple[int, list[Future[pa.RecordBatch]]]] = deque()
            for start in starts:
                waiting.append((start, self._ask(pool, start, start + step)))
                if len(waiting) > 1:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())

    def _ask(self, pool: ThreadPoolExecutor, start: int, end: int) -> list[Future[pa.RecordBatch]]:
        pairs = zip(self._readers, self._joined.rows, strict=True)
        return [pool.submit(reader, rows[start:end]) for reader, rows in pairs]

    def _batch(self, start: int, asked: Sequence[Future[pa.RecordBatch]]) -> ObjectBatch:
        parts = [future.result() for future in asked]
        arrays = [array for part in parts for array in part.columns]
        primary = parts[self._primary]
        return ObjectBatch(
            start,
            pa.RecordBatch.from_arrays(arrays, names=self._names),
            place_values(primary, self._place, BOX),
            place_values(primary, self._place, CENTRE),
        )
