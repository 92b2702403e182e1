"""The export of single cells: one row a cell, in pycytominer's columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from ..analysis.features import FEATURE_NAMES
from ..artifacts import open_atomically
from ..enums import FeatureStorage, Stage
from ..errors import UnknownNameError, UserInputError
from ..io.tables import disarmed
from ..jobs.lookup import find_recipe, has_results
from ..jobs.workspace import Workspace
from ..models import FeatureFile, FeatureSet, Plate, Recipe, RecipeInput, Run
from ..query.cells import input_of
from ..query.engine import open_questions
from ..query.feature_files import find_feature_set
from ..query.guard import literal, quoted
from ..settings import need

PREFIX = "Cells_"
"""Before the name of a built-in feature: pycytominer takes what begins with a compartment."""

VALUES_AT_ONCE = 2_000_000
"""About this many values of features are held at a time."""

_MOST_CELLS, _MOST_IMAGES = 10_000, 500

IMAGE_COLUMNS: dict[str, tuple[str, pa.DataType]] = {
    "Metadata_Plate": ("i.plate", pa.string()),
    "Metadata_Batch": ("i.batch", pa.string()),
    "Metadata_cell_line": ("pl.cell_line", pa.string()),
    "Metadata_time_point": ("pl.time_point", pa.string()),
    "Metadata_Well": ("i.well", pa.string()),
    "Metadata_Site": ("i.site", pa.int64()),
    "Metadata_Plane": ("i.plane", pa.int64()),
    "Metadata_Timepoint": ("i.time_point", pa.int64()),
    "Metadata_CoreName": ("i.core_name", pa.string()),
    "Metadata_pert_type": ("tp.kind", pa.string()),
    "Metadata_pert_iname": ("t.name", pa.string()),
    "Metadata_target": ("t.target", pa.string()),
    "Metadata_dose": ("i.dose", pa.float64()),
    "Metadata_dose_unit": ("i.dose_unit", pa.string()),
    "Metadata_control_type": ("w.control", pa.string()),
    "Metadata_broad_sample": ("tp.identifier", pa.string()),
    "Metadata_InChIKey": ("tp.inchikey", pa.string()),
    "Metadata_smiles": ("tp.smiles", pa.string()),
    "Metadata_pubchem_cid": ("tp.pubchem_cid", pa.string()),
    "Metadata_ImageNumber": ("row_number() OVER ({order})", pa.int64()),
}
"""What all cells of an image share: name, where it is from, type."""

CELL_COLUMNS: dict[str, tuple[str, pa.DataType]] = {
    "Metadata_ObjectNumber": ("c.object_number", pa.int64()),
    "Metadata_MinRow": ("c.min_row", pa.int64()),
    "Metadata_MinCol": ("c.min_col", pa.int64()),
    "Metadata_MaxRow": ("c.max_row", pa.int64()),
    "Metadata_MaxCol": ("c.max_col", pa.int64()),
    "Metadata_CentroidRow": ("c.centroid_row", pa.float64()),
    "Metadata_CentroidCol": ("c.centroid_col", pa.float64()),
    "Metadata_Excluded": ("coalesce(c.excluded, x.reason, n.excluded)", pa.string()),
}
"""Name, what it is in ``CELLS``, type."""

FLOAT = pa.float64()
_TYPES = {"int64": pa.int64(), "string": pa.string()}

ORDER = """
    ORDER BY i.plate, i.well_row, i.well_column, i.site, i.plane, i.time_point, s.id
"""
IMAGES = """
    FROM segmentations AS s
    JOIN images AS m ON m.id = s.image_id
    JOIN image_table AS i ON i.image_id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS pl ON pl.id = w.plate_id
    LEFT JOIN treatments AS t ON t.id = w.treatment_id
    LEFT JOIN (
        SELECT
            part.treatment_id,
            string_agg(p.kind, '|' ORDER BY part.position) AS kind,
            string_agg(p.identifier, '|' ORDER BY part.position) AS identifier,
            string_agg(p.inchikey, '|' ORDER BY part.position) AS inchikey,
            string_agg(p.smiles, '|' ORDER BY part.position) AS smiles,
            string_agg(p.pubchem_cid, '|' ORDER BY part.position) AS pubchem_cid
        FROM treatment_parts AS part
        JOIN perturbations AS p ON p.id = part.perturbation_id
        GROUP BY part.treatment_id
    ) AS tp ON tp.treatment_id = t.id
    WHERE s.recipe_id = $segment AND s.n_cells > 0 AND list_contains($plates, i.plate)
        AND (s.content_sha256 IS NULL OR s.content_sha256 = m.content_sha256)
"""
METADATA = """
    SELECT DISTINCT unnest(
        json_keys(coalesce(w.metadata, '{{}}')) || json_keys(coalesce(pl.metadata, '{{}}'))
    ) AS name
    {images} ORDER BY name
"""
"""The names of the metadata of wells and plates that have no column of their own."""
CHANNELS = """
    SELECT DISTINCT channel FROM image_files
    WHERE image_id IN (SELECT s.image_id {images}) ORDER BY channel
"""
FILES = """
    SELECT f.image_id, f.channel, f.name, d.uri AS folder
    FROM image_files AS f
    LEFT JOIN folders AS d ON d.id = f.folder_id
    WHERE list_contains($images, f.image_id)
"""
CELLS = """
    SELECT n.number, {columns}
    FROM cells AS c
    JOIN (
        SELECT unnest($segmentations::BIGINT[]) AS segmentation_id,
            unnest($numbers::BIGINT[]) AS number, unnest($excluded::VARCHAR[]) AS excluded
    ) AS n ON n.segmentation_id = c.segmentation_id
    LEFT JOIN (
        SELECT id, min(reason) AS reason FROM later_exclusions WHERE level = 'cell' GROUP BY id
    ) AS x ON x.id = c.id
    LEFT JOIN ({features}) AS f ON f.cell_id = c.id
    ORDER BY n.number, c.object_number
"""


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
    if format is ExportFormat.ANNDATA:
        need("anndata")
    if for_spreadsheet and format is not ExportFormat.CSV:
        raise UserInputError("Only CSV is opened in spreadsheets: give --format csv, too.")
    if out.is_dir():
        raise UserInputError(f"{out} is a folder. Give the name of a file.")
    if not out.parent.is_dir():
        raise UserInputError(f"There is no folder {out.parent}. Make it, or name another one.")
    if out.exists() and not force:
        raise UserInputError(f"{out} exists. Name another file, or replace it with --force.")
    with workspace.database.read() as session:
        segment, measure, found = _choose(session, features, segmentation, measurement)
        known = list(session.scalars(select(Plate.barcode).order_by(Plate.id)))
    if unknown := set(plates) - set(known):
        raise UnknownNameError.of("plate", min(unknown), known[:500])
    values = {"segment": segment.id, "plates": list(plates) or known}
    with open_questions(workspace) as questions:
        columns = dict(IMAGE_COLUMNS)
        for (key,) in list(questions.ask_ours(METADATA.format(images=IMAGES), values).rows()):
            if f"Metadata_{key}" not in CELL_COLUMNS:
                text = f"coalesce(w.metadata ->> {literal(key)}, pl.metadata ->> {literal(key)})"
                columns.setdefault(f"Metadata_{key}", (text, pa.string()))
        listed = ", ".join(
            f"{source.format(order=ORDER) if name in IMAGE_COLUMNS else source} AS {quoted(name)}"
            for name, (source, _) in columns.items()
        )
        images = questions.ask_ours(
            f"SELECT {listed}, i.image_id, i.excluded, s.id AS segmentation_id, s.n_cells "
            f"{IMAGES} {ORDER}",
            values,
        ).table()
        n_cells = int(pc.sum(images["n_cells"]).as_py() or 0)
        if n_cells == 0:
            where = f" on {', '.join(plates)}" if plates else ""
            raise UserInputError(
                f"There are no cells{where} to export. Name other plates, or find cells with: "
                "cellstore segment"
            )
        channels = list(questions.ask_ours(CHANNELS.format(images=IMAGES), values).rows())
        files = {
            f"Image_{kind}_{channel}": (channel, column)
            for kind, column in (("FileName", "name"), ("PathName", "folder"))
            for (channel,) in channels
        }
        measured: dict[str, tuple[str, pa.DataType]]
        if found is None or found.storage is FeatureStorage.TABLE:
            measured = {PREFIX + name: (f"f.{quoted(name)}", FLOAT) for name in FEATURE_NAMES}
            relation = f"SELECT * FROM features WHERE recipe_id = {int(measure.id)}"  # noqa: S608
        else:
            names = [name for name, _ in questions.columns(found.name)[1:]]
            measured = {
                item["name"]: (f"f.{quoted(name)}", _TYPES.get(str(item["dtype"]), FLOAT))
                for name, item in zip(names, found.columns, strict=True)
            }
            relation = f"SELECT * FROM {quoted(found.name)}"  # noqa: S608
        if clash := sorted(measured.keys() & {*columns, *CELL_COLUMNS, *files}):
            raise UserInputError(
                f"The feature {clash[0]!r} has the name of a column that identifies cells. "
                "Ingest the features again with another name for that column."
            )
        schema = pa.schema(
            [
                *((name, kind) for name, (_, kind) in [*columns.items(), *CELL_COLUMNS.items()]),
                *((name, pa.string()) for name in files),
                *((name, kind) for name, (_, kind) in measured.items()),
            ]
        )
        # A gap is one thing: not a number, which one database keeps and the other does not.
        sources = [source for source, _ in CELL_COLUMNS.values()]
        sources += [
            f"nullif({source}, 'nan')" if pa.types.is_floating(kind) else source
            for source, kind in measured.values()
        ]
        query = CELLS.format(
            columns=", ".join(f'{source} AS "{at}"' for at, source in enumerate(sources)),
            features=relation,
        )

        def batches() -> Iterator[pa.Table]:
            """Yield the cells of as many images as can be held at a time."""
            most = min(_MOST_CELLS, max(1, VALUES_AT_ONCE // max(1, len(measured))))
            counts = images["n_cells"].to_pylist()
            first = 0
            while first < len(counts):
                last, held = first + 1, counts[first]
                while last < min(len(counts), first + _MOST_IMAGES) and held + counts[last] <= most:
                    held += counts[last]
                    last += 1
                some = images.slice(first, last - first)
                first = last
                parameters = {
                    "segmentations": some["segmentation_id"].to_pylist(),
                    "numbers": list(range(some.num_rows)),
                    "excluded": some["excluded"].to_pylist(),
                }
                cells = questions.ask_ours(query, parameters).table()
                ids = some["image_id"].to_pylist()
                rows = questions.ask_ours(FILES, {"images": ids}).records()
                file_of = {(row["image_id"], row["channel"]): row for row in rows}
                names = [
                    pa.array([file_of.get((i, channel), {}).get(column) for i in ids], pa.string())
                    for channel, column in files.values()
                ]
                number, own = cells["number"], 1 + len(CELL_COLUMNS)
                arrays = [some[name].take(number) for name in columns]
                arrays += cells.columns[1:own]
                arrays += [column.take(number) for column in names]
                arrays += cells.columns[own:]
                pairs = zip(arrays, schema, strict=True)
                yield pa.table([array.cast(field.type) for array, field in pairs], schema=schema)
                workspace.progress.advance(cells.num_rows)

        workspace.progress.start("export", n_cells)
        try:
            with open_atomically(out) as file:
                if format is ExportFormat.PARQUET:  # a row group for each batch
                    with pq.ParquetWriter(file, schema, compression="zstd") as parquet:
                        for batch in batches():
                            parquet.write_table(batch)
                elif format is ExportFormat.CSV:
                    header = disarmed(schema.empty_table()).schema if for_spreadsheet else schema
                    with pc_csv.CSVWriter(file, header) as text:
                        for batch in batches():
                            text.write_table(disarmed(batch) if for_spreadsheet else batch)
                else:
                    _write_anndata(Path(file.name), schema, batches(), n_cells)
        finally:
            workspace.progress.finish()
    return ExportResult(
        path=out,
        format=format.value,
        feature_set=found.name if found else None,
        segment_recipe=segment.id,
        measure_recipe=measure.id,
        plates=len(pc.unique(images["Metadata_Plate"])),
        cells=n_cells,
        features=len(measured),
    )


def _choose(
    session: Session, features: str | None, segmentation: str | None, measurement: str | None
) -> tuple[Recipe, Recipe, FeatureSet | None]:
    """Return the segment and the measure recipe of what is exported, and its feature set.

    Default: what was measured last.

    Raises:
        UnknownNameError: there is no such feature set or recipe.
        UserInputError: nothing has been measured, or what was asked for does not go together.
    """
    asked = find_recipe(session, Stage.MEASURE, measurement) if measurement is not None else None
    if features is not None:
        measure = session.get_one(Recipe, find_feature_set(session, features).recipe_id)
        if asked is not None and asked.id != measure.id:
            raise UserInputError(
                f"Feature set {features!r} is of measure recipe {measure.id}, not {asked.id}. "
                "Give only one of --features and --measurement."
            )
    else:
        measure = asked or _last_measure(session, segmentation)
    segment = input_of(session, measure, Stage.SEGMENT)
    if segmentation is not None:
        wanted = find_recipe(session, Stage.SEGMENT, segmentation)
        if wanted.id != segment.id:
            raise UserInputError(
                f"These measurements are of the cells of segment recipe {segment.id}, not "
                f"{wanted.id}. Remove --segmentation."
            )
    found = select(FeatureSet).where(FeatureSet.recipe_id == measure.id)
    return segment, measure, session.scalars(found).one_or_none()


def _last_measure(session: Session, segmentation: str | None) -> Recipe:
    runs = (
        select(func.max(Run.id)).where(Run.recipe_id == Recipe.id, has_results()).correlate(Recipe),
        select(func.max(FeatureFile.run_id))
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.recipe_id == Recipe.id)
        .correlate(Recipe),
    )
    last = [func.coalesce(run.scalar_subquery(), 0) for run in runs]
    newest = case((last[0] > last[1], last[0]), else_=last[1])
    query = select(Recipe).where(Recipe.stage == Stage.MEASURE, newest > 0)
    of_cells = ""
    if segmentation is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation)
        inputs = select(RecipeInput.recipe_id).where(RecipeInput.input_id == asked.id)
        query = query.where(Recipe.id.in_(inputs))
        of_cells = f" of the cells of segment recipe {asked.id}"
    found = session.scalars(query.order_by(newest.desc(), Recipe.id.desc()).limit(1)).first()
    if found is None:
        raise UserInputError(
            f"Nothing{of_cells} has been measured yet. Run: cellstore measure, or ingest a table "
            "of features."
        )
    return found


def _write_anndata(path: Path, schema: pa.Schema, batches: Iterator[pa.Table], count: int) -> None:
    """Write numbers of features as ``X`` (N, F) float64, all else as ``obs``.

    AnnData holds the matrix in memory, and so does this, once.
    """
    import anndata
    import pandas as pd

    about = ("Metadata_", "Image_FileName_", "Image_PathName_")
    names = [f.name for f in schema if f.type != pa.string() and not f.name.startswith(about)]
    others = [name for name in schema.names if name not in set(names)]
    matrix, parts, row = np.empty((count, len(names))), [], 0
    for batch in batches:
        for index, name in enumerate(names):
            values = batch.column(name).cast(pa.float64())
            matrix[row : row + batch.num_rows, index] = values.to_numpy(zero_copy_only=False)
        parts.append(batch.select(others))
        row += batch.num_rows
    table = pa.concat_tables(parts)
    series: dict[str, Any] = {}
    for name in others:
        column = table.column(name)
        if not pa.types.is_string(column.type):
            series[name] = column.to_numpy()
            continue
        # h5ad has no nulls in columns of text, but categories that are none.
        encoded = column.combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy()
        categories = np.array(encoded.dictionary.to_pylist(), dtype=object)
        series[name] = pd.Categorical.from_codes(codes, pd.Index(categories, dtype=object))
    obs = pd.DataFrame(series)
    obs.index = obs.index.astype(str)
    made = anndata.AnnData(matrix[:row], obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    made.write_h5ad(path)
