"""The export of single cells: one row a cell, in pycytominer's columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import pyarrow as pa

from ...errors import UserInputError
from ...extras import need
from ...runs import Workspace
from .choice import Exported, choose
from .columns import schema_of
from .read import Reader
from .write import Batches, write_anndata, write_csv, write_parquet, write_whole


class ExportFormat(StrEnum):
    """What an export is written as."""

    PARQUET = "parquet"
    CSV = "csv"
    ANNDATA = "anndata"


@dataclass(frozen=True)
class ExportResult:
    """What was written: ``cells`` rows with ``features`` columns of measurements each.

    ``feature_set`` is null for built-in measurements that no set names.
    """

    path: Path
    format: str
    feature_set: str | None
    segment_recipe: int
    measure_recipe: int
    plates: int
    cells: int
    features: int


def export(
    workspace: Workspace,
    out: Path,
    *,
    format: ExportFormat = ExportFormat.PARQUET,  # noqa: A002 - the word of the command line
    features: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    plates: Sequence[str] = (),
    for_spreadsheet: bool = False,
    force: bool = False,
) -> ExportResult:
    """Write every current cell of a segmentation with its measurements; see the README.

    ``features`` names a feature set; default: what was measured last. Excluded cells are rows
    like others, with their reason in ``Metadata_Excluded``. ``for_spreadsheet`` (CSV) disarms
    texts that a spreadsheet would run as formulas; such a table no longer reads back as it was.
    Memory does not grow with the number of cells, but for AnnData, which holds its matrix.

    Raises:
        MissingExtraError: AnnData is asked for and not installed.
        UnknownNameError: there is no such feature set, recipe or plate.
        UserInputError: there is no cell, or ``out`` exists and ``force`` is not given.
        StorageError: the file cannot be written; nothing is left of it.
    """
    _check(out, format, for_spreadsheet=for_spreadsheet, force=force)
    with workspace.database.read() as session:
        exported = choose(session, features, segmentation, measurement, plates)
        reader = Reader(session, workspace.artifacts, exported)
        cells = reader.count()
        if cells == 0:
            raise UserInputError(_nothing(plates))
        channels = reader.channels()
        schema = schema_of(exported, channels)
        rows = _told(workspace, reader.batches(schema, channels), cells)
        write = partial(_write, format, schema, rows, cells, for_spreadsheet)
        write_whole(out, write)
        return _result(out, format, exported, cells, reader.count_plates())


def _check(out: Path, form: ExportFormat, *, for_spreadsheet: bool, force: bool) -> None:
    if form is ExportFormat.ANNDATA:
        need("anndata")
    if for_spreadsheet and form is not ExportFormat.CSV:
        raise UserInputError("Only CSV is opened in spreadsheets: give --format csv, too.")
    if out.is_dir():
        raise UserInputError(f"{out} is a folder. Give the name of a file.")
    if not out.parent.is_dir():
        raise UserInputError(f"There is no folder {out.parent}. Make it, or name another place.")
    if out.exists() and not force:
        raise UserInputError(f"{out} exists. Name another file, or replace it with --force.")


def _nothing(plates: Sequence[str]) -> str:
    where = f" on {', '.join(plates)}" if plates else ""
    return (
        f"There are no cells{where} to export. Name other plates, or find cells with: "
        "cellstore segment"
    )


def _told(workspace: Workspace, batches: Batches, cells: int) -> Iterator[pa.Table]:
    workspace.progress.start("export", cells)
    try:
        for batch in batches:
            yield batch
            workspace.progress.advance(batch.num_rows)
    finally:
        workspace.progress.finish()


def _write(
    form: ExportFormat,
    schema: pa.Schema,
    batches: Batches,
    cells: int,
    for_spreadsheet: bool,
    path: Path,
) -> None:
    if form is ExportFormat.PARQUET:
        write_parquet(path, schema, batches)
    elif form is ExportFormat.CSV:
        write_csv(path, schema, batches, for_spreadsheet=for_spreadsheet)
    else:
        write_anndata(path, schema, batches, cells)


def _result(
    out: Path, form: ExportFormat, exported: Exported, cells: int, plates: int
) -> ExportResult:
    return ExportResult(
        path=out,
        format=form.value,
        feature_set=exported.feature_set.name if exported.feature_set else None,
        segment_recipe=exported.segment_id,
        measure_recipe=exported.measure_id,
        plates=plates,
        cells=cells,
        features=len(exported.features),
    )
