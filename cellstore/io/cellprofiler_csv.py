"""CellProfiler's tables as CSV files in a folder and its subfolders.

Rows of several tables are joined by number, and CSV files have no way to a row by its number: their
measurements are moved once into a temporary Arrow file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from ..errors import StorageError, UserInputError, first_line
from .cellprofiler import (
    COMPARTMENTS,
    IMAGE_NUMBER,
    IMAGE_TABLE,
    TOOL,
    UNKNOWN,
    ImageIndex,
    ObjectColumns,
    TableKeys,
    add_cells,
    check_keys,
    choose_tables,
    feature_name,
    object_columns,
    table_name,
)
from .objects import (
    Integers,
    ObjectSource,
    SourceFile,
    as_numbers,
    whole_numbers,
    without_nan,
)
from .tables import TextTable, open_table

_DEEPEST = 6
_TABLES = (".csv", ".csv.gz")


class _CsvFile(NamedTuple):
    """One CSV file: ``name`` is relative to the source, ``columns`` are called as in CellProfiler.

    ``kind`` is what it is about ('Cells'), ``folder`` the index of its folder.
    """

    name: str
    kind: str
    folder: int
    table: TextTable
    columns: list[str]


def is_cellprofiler_folder(path: Path) -> bool:
    """Whether a folder has CellProfiler's ``Image.csv``, itself or in subfolders."""
    tables = _csv_files(path) if path.is_dir() else iter(())
    first = next((table for table in tables if _kind(table).lower() == IMAGE_TABLE), None)
    try:
        columns = _columns(open_table(first, empty=True)) if first else ["none"]
    except UserInputError:
        return False
    if not columns or IMAGE_NUMBER in columns:
        return True
    # Beside tables of cells it is CellProfiler's, and the reader says what it lacks.
    return first is not None and any(_kind(at) in COMPARTMENTS for at in _csv_files(path))


def open_cellprofiler_folder(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a folder of CSV files; close the source after use.

    ``plate`` is the barcode where the tables name none.
    """
    source = ObjectSource(TOOL, own_images=True)
    folders: dict[Path, int] = {}
    files: list[_CsvFile] = []
    for file_path in _csv_files(path):
        table = open_table(file_path, empty=True)
        folder = folders.setdefault(file_path.parent, len(folders))
        name = file_path.relative_to(path).as_posix()
        files.append(_CsvFile(name, _kind(file_path), folder, table, _columns(table)))
    of_images = [file for file in files if file.kind.lower() == IMAGE_TABLE and file.columns]
    kinds: dict[str, list[_CsvFile]] = {}
    for file in files:
        if object_columns(file.kind, file.columns):
            kinds.setdefault(file.kind, []).append(file)
    images = ImageIndex(source)
    folder_names = [folder.name for folder in folders]
    for file in of_images:
        images.add_table(
            SourceFile(file.name, file.table.path, 0),
            file.columns,
            file.table.rows,
            lambda _, file=file: file.folder,  # type: ignore[misc]
            plate,
            folder_names[file.folder],
        )
    source.check_plate(path.name)
    merged = [
        object_columns(kind, list(dict.fromkeys(name for file in own for name in file.columns)))
        for kind, own in kinds.items()
    ]
    chosen = choose_tables(source, [columns for columns in merged if columns], path.name)
    for file in of_images:
        check_keys(source, file.name, file.columns)
    for of_kind in chosen:
        for file in kinds[of_kind.name]:
            check_keys(source, file.name, file.columns, of_kind.object_number)
    target = Path(tempfile.mkdtemp(prefix="cellstore-"))
    source.close = lambda: shutil.rmtree(target, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(source.close)
        tables = [
            _buffered(source, columns, kinds[columns.name], target / f"{number}.arrow", images)
            for number, columns in enumerate(chosen)
        ]
        for file in files:
            if not file.columns:
                source.files.append(SourceFile(file.name, file.table.path, 0))
                source.problem(file.name, None, "empty file", "the file has 0 bytes")
        add_cells(source, images, tables)
        stack.pop_all()  # the caller closes the source
    return source


def _csv_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders.sort()
        if len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        tables = (here / name for name in sorted(names) if name.lower().endswith(_TABLES))
        yield from filter(Path.is_file, tables)  # no pipe or device


def _kind(path: Path) -> str:
    return table_name(Path(path.name.removesuffix(".gz").removesuffix(".GZ")).stem)


def _columns(table: TextTable) -> list[str]:
    """Return the columns; of two header lines (cytominer-database has them) the first has objects.

    A table of that kind says ``Cells`` and ``Area`` for what is ``Cells_Area`` elsewhere.
    """
    if len(table.headers) < 2:
        return list(table.columns)
    owners, measures = ([name.strip() for name in header] for header in table.headers)
    return [
        measure
        if owner.lower() in (IMAGE_TABLE, "object") or measure == IMAGE_NUMBER
        else feature_name(owner, measure)
        for owner, measure in zip(owners, measures, strict=True)
    ]


def _buffered(
    source: ObjectSource,
    columns: ObjectColumns,
    files: Sequence[_CsvFile],
    target: Path,
    images: ImageIndex,
) -> TableKeys:
    """Move the features of ``files`` of one kind to ``target``; return the keys of their rows."""
    schema = pa.schema([(name, pa.float64()) for name in columns.features])
    keys = {"image": IMAGE_NUMBER, "number": columns.object_number, **columns.parents}
    without = images.groups_without(columns.objects)
    parts: dict[str, list[Integers]] = {
        key: [np.empty(0, np.int64)] for key in ("file", "line", *keys)
    }
    with _arrow_file(target, schema) as writer:
        for file in files:
            rows = 0
            odd: _Odd = {}
            wanted = {*keys.values(), *columns.features}
            used = [(at, name) for at, name in enumerate(file.columns) if name in wanted]
            positions = [at for at, _ in used]
            for batch in file.table.batches(positions, numbers=positions):
                lines = np.asarray(batch.lines, np.int64)
                rows += len(lines) + len(batch.refused)
                for line, reason, detail in batch.refused:
                    source.refuse(file.name, np.array([line]), reason, detail)
                found: dict[str, pa.Array] = {}
                for (_, name), values in zip(used, batch.columns, strict=True):
                    if name not in found:
                        found[name] = values
                        continue
                    one, other = as_numbers(found[name])[0], as_numbers(values)[0]
                    what = f"{name} occurs twice with different values, the first is used"
                    _count(odd, what, lines, pc.fill_null(pc.not_equal(one, other), False))
                for key, name in keys.items():
                    nothing = np.full(len(lines), UNKNOWN, np.int64)
                    parts[key].append(whole_numbers(found[name]) if name in found else nothing)
                parts["image"][-1] = images.find(file.folder, parts["image"][-1])
                parts["file"].append(np.full(len(lines), len(source.files), np.int64))
                parts["line"].append(lines)
                arrays = []
                for name in columns.features:
                    numbers = pa.nulls(len(lines), pa.float64())
                    if name in found:
                        numbers, words = as_numbers(found[name])
                        _count(odd, f"{name} is not a number", lines, words)
                    arrays.append(numbers)
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            if rows == 0 and file.folder not in without:
                source.problem(file.name, None, "no rows", "the file has a header only")
            for what, (count, line) in odd.items():
                source.problem(file.name, line, "odd value", f"{what}: {count} rows")
            source.files.append(SourceFile(file.name, file.table.path, rows))
    whole = {key: np.concatenate(some) for key, some in parts.items()}
    parents = {role: whole[role] for role in columns.parents}
    read = partial(_read_rows, target)
    return TableKeys(
        columns, whole["image"], whole["number"], parents, whole["file"], whole["line"], read
    )


_Odd = dict[str, tuple[int, int]]
"""How many rows of a file have something odd, and the line of the first."""


def _count(odd: _Odd, what: str, lines: Integers, where: pa.Array | None) -> None:
    chosen = lines[:0] if where is None else lines[np.asarray(where).astype(bool)]
    if len(chosen):
        count, first = odd.get(what, (0, int(chosen[0])))
        odd[what] = count + len(chosen), first


@contextmanager
def _arrow_file(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Open a temporary Arrow file to write batches to."""
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield writer
    except OSError as error:
        raise StorageError(
            f"The temporary folder {path.parent.parent} cannot be written "
            f"({first_line(error)}). Free some space there, or name another in TMPDIR."
        ) from error


def _read_rows(path: Path, rows: Integers) -> pa.RecordBatch:
    """Return ``rows`` of an Arrow file (from 0), in any order, repeated or not."""
    first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        table = reader.read_all().slice(first, end - first)  # nothing is read before it is used
    if len(rows) != table.num_rows or not (np.diff(rows) == 1).all():
        table = table.take(pa.array(rows - first))
    columns = [without_nan(column.combine_chunks()) for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)
