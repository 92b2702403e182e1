"""CellProfiler's per-object CSV files: of one folder, or of a folder per site."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadTableError
from ..records import Refusal
from .cellprofiler_columns import (
    IMAGE_NUMBER,
    TableColumns,
    is_image_table,
    is_object_table,
    is_repeat,
    joined_headers,
    table_columns,
    table_name,
    without_repeats,
)
from .cellprofiler_images import is_needed, plain_column
from .cellprofiler_join import TableKeys
from .model import Integers, Notice, RefusedRows
from .spool import (
    CsvBlock,
    CsvHeader,
    Spool,
    as_integers,
    as_numbers,
    batch_of,
    mask_lines,
    read_blocks,
    read_header,
    union,
)

_DEEPEST = 6
_SUFFIXES = (".csv", ".csv.gz")


@dataclass(frozen=True)
class CsvFile:
    """One CSV file of a folder; ``name`` is relative to the source, ``folder`` counts folders."""

    path: Path
    name: str
    table: str
    folder: int
    header: CsvHeader


@dataclass
class CsvFolder:
    """The tables that a folder and its subfolders have, by what they are."""

    root: Path
    folders: list[str] = field(default_factory=list)
    images: list[CsvFile] = field(default_factory=list)
    objects: list[CsvFile] = field(default_factory=list)
    empty: list[CsvFile] = field(default_factory=list)


@dataclass(frozen=True)
class CsvImage:
    """A row of an image table, or why it cannot be read."""

    file: CsvFile
    line: int
    number: int | None
    values: Mapping[str, str | None]
    refusal: Refusal | None = None


@dataclass
class CsvTable:
    """One kind of table ('Cells') over all files that have it."""

    columns: TableColumns
    files: list[CsvFile]
    spool: Spool
    rows: dict[str, int] = field(default_factory=dict)
    refused: list[RefusedRows] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def is_csv(path: Path) -> bool:
    """Whether a file is called like a CSV file."""
    return path.name.lower().endswith(_SUFFIXES)


def stem_of(path: Path) -> str:
    """Return the name of a CSV file without its ending."""
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    return Path(name).stem


def find_image_table(folder: Path) -> Path | None:
    """Return the first image table of a folder or its subfolders, without reading any."""
    for path in _csv_files(folder):
        if is_image_table(stem_of(path)):
            return path
    return None


def scan(root: Path) -> CsvFolder:
    """Look at the headers of all CSV files below ``root``.

    Raises:
        BadTableError: one is damaged.
        UserInputError: one cannot be read.
    """
    found = CsvFolder(root)
    numbers: dict[Path, int] = {}
    for path in _csv_files(root):
        if path.parent not in numbers:
            numbers[path.parent] = len(found.folders)
            found.folders.append(path.parent.name)
        _sort_in(found, path, numbers[path.parent])
    return found


def image_rows(folder: CsvFolder) -> Iterator[CsvImage]:
    """Yield the rows of all image tables, with the columns that say which image each is.

    Raises:
        BadTableError: a file is damaged.
    """
    for file in folder.images:
        names = without_repeats(file.header.columns)
        needed = [name for name in names if is_needed(plain_column(name))]
        bad: list[Refusal] = []
        only = [IMAGE_NUMBER, *needed]
        for block in read_blocks(file.header, names, bad.append, only):
            numbers = as_integers(block.batch.column(0)).tolist()
            plain = block.batch.rename_columns([IMAGE_NUMBER, *map(plain_column, needed)])
            rows = zip(block.lines.tolist(), numbers, plain.to_pylist(), strict=True)
            for line, number, values in rows:
                yield CsvImage(file, line, number if number >= 0 else None, values)
        for refusal in bad:
            yield CsvImage(file, refusal.line, None, {}, refusal)


def spool_table(
    name: str,
    files: Sequence[CsvFile],
    target: Path,
    image_of: Callable[[int, Integers], Integers],
    first_file: int,
) -> tuple[CsvTable, TableKeys]:
    """Move the rows of all ``files`` into ``target``; return the table and its keys.

    ``image_of(folder, image numbers)`` gives the images, ``first_file`` the number of the first
    file in ``RowOrigin.file``.

    Raises:
        BadTableError: a file is damaged.
    """
    columns = table_columns(name, _plain_union(files))
    schema = pa.schema([(column, pa.float64()) for column in columns.features])
    table = CsvTable(columns, list(files), Spool(target, schema))
    reader = _Spooler(table)
    for number, file in enumerate(files):
        reader.read(file, first_file + number, image_of)
    table.spool.finish()
    return table, reader.keys()


def _plain_union(files: Sequence[CsvFile]) -> list[str]:
    names = union(without_repeats(file.header.columns) for file in files)
    return [name for name in names if not is_repeat(name)]


class _Spooler:
    """Reads the files of one kind of table, one after the other."""

    def __init__(self, table: CsvTable) -> None:
        self._table = table
        self._parts: dict[str, list[Integers]] = {
            key: [] for key in ("image", "number", "file", "line", *table.columns.parents)
        }
        self._odd: dict[str, tuple[int, int]] = {}

    def read(
        self, file: CsvFile, number: int, image_of: Callable[[int, Integers], Integers]
    ) -> None:
        names = without_repeats(file.header.columns)
        bad: list[Refusal] = []
        rows = 0
        self._odd = {}
        for block in self._blocks(file, names, bad):
            rows += block.batch.num_rows
            self._add_keys(block, file, number, image_of)
            self._table.spool.append(self._values(block))
        self._table.rows[file.name] = rows + len(bad)
        self._refuse(file, bad)
        self._tell(file, rows + len(bad))

    def _blocks(
        self, file: CsvFile, names: Sequence[str], bad: list[Refusal]
    ) -> Iterator[CsvBlock]:
        """Read a file as numbers; from where one of them is none, go on with texts."""
        columns = self._table.columns
        known = {IMAGE_NUMBER, columns.object_number, *columns.parents.values()} | set(
            columns.features
        )
        numbers = {name for name in names if name.partition("\0")[0] in known}
        done = 0
        try:
            for block in read_blocks(file.header, names, bad.append, numbers=numbers):
                done += block.batch.num_rows
                yield block
        except BadTableError:
            bad.clear()
        else:
            return
        for block in read_blocks(file.header, names, bad.append):
            skipped = min(done, block.batch.num_rows)
            done -= skipped
            yield CsvBlock(block.batch.slice(skipped), block.lines[skipped:])

    def keys(self) -> TableKeys:
        """Return the keys of all rows read."""
        whole = {
            key: np.concatenate(parts) if parts else np.empty(0, np.int64)
            for key, parts in self._parts.items()
        }
        parents = {role: whole[role] for role in self._table.columns.parents}
        return TableKeys(
            self._table.columns,
            whole["image"],
            whole["number"],
            parents,
            whole["file"],
            whole["line"],
        )

    def _add_keys(
        self,
        block: CsvBlock,
        file: CsvFile,
        number: int,
        image_of: Callable[[int, Integers], Integers],
    ) -> None:
        columns = self._table.columns
        rows = block.batch.num_rows
        self._parts["image"].append(image_of(file.folder, _whole(block, IMAGE_NUMBER)))
        self._parts["number"].append(_whole(block, columns.object_number))
        self._parts["file"].append(np.full(rows, number, np.int64))
        self._parts["line"].append(block.lines)
        for role, column in columns.parents.items():
            self._parts[role].append(_whole(block, column))

    def _values(self, block: CsvBlock) -> pa.RecordBatch:
        found: dict[str, pa.Array] = {}
        for name, texts in zip(block.batch.schema.names, block.batch.columns, strict=True):
            if name in self._table.columns.features:
                found[name], odd = as_numbers(texts)
                if odd is not None:
                    self._note(f"{name} is not a number", mask_lines(block.lines, odd))
        for name in filter(is_repeat, block.batch.schema.names):
            self._compare(block, name)
        return batch_of(found, block.batch.num_rows)

    def _compare(self, block: CsvBlock, name: str) -> None:
        first = name.partition("\0")[0]
        places = map(block.batch.schema.get_field_index, (first, name))
        other = pc.not_equal(*(as_numbers(block.batch.column(place))[0] for place in places))
        other = pc.fill_null(other, False)
        if pc.any(other).as_py():
            self._note(f"{first} comes twice, the first is used", mask_lines(block.lines, other))

    def _note(self, what: str, lines: Integers) -> None:
        count, first = self._odd.get(what, (0, int(lines[0])))
        self._odd[what] = count + len(lines), first

    def _refuse(self, file: CsvFile, bad: Sequence[Refusal]) -> None:
        self._table.refused += [
            RefusedRows(file.name, [item.line], item.reason, item.detail) for item in bad
        ]

    def _tell(self, file: CsvFile, rows: int) -> None:
        notices = self._table.notices
        if rows == 0:
            notices.append(Notice(file.name, None, "no rows", "the file has a header only"))
        for what, (count, line) in self._odd.items():
            notices.append(Notice(file.name, line, "odd value", f"{what} in {count} rows"))


def _whole(block: CsvBlock, column: str) -> Integers:
    place = block.batch.schema.get_field_index(column)
    if place < 0:
        return np.full(block.batch.num_rows, -1, np.int64)
    return as_integers(block.batch.column(place))


def _sort_in(found: CsvFolder, path: Path, folder: int) -> None:
    header = read_header(path, joined_headers)
    name = path.relative_to(found.root).as_posix()
    file = CsvFile(path, name, table_name(stem_of(path)), folder, header)
    if not header.columns:
        found.empty.append(file)
    elif is_image_table(stem_of(path)) and IMAGE_NUMBER in header.columns:
        found.images.append(file)
    elif is_object_table(stem_of(path), header.columns):
        found.objects.append(file)


def _csv_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders.sort()
        if len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        yield from (here / name for name in sorted(names) if is_csv(here / name))
