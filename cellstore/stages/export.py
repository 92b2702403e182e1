"""The export of single cells: one row a cell, in pycytominer's columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from ..analysis.features import FEATURE_NAMES
from ..artifacts import open_atomically
from ..config import RunName
from ..enums import Stage, Subset
from ..errors import UserInputError
from ..io.cellprofiler import COMPARTMENTS
from ..io.objects import without_nan
from ..io.single_cells import CELL_ID, EXCLUDED, LABEL, SEGMENTATION, SUBSET
from ..io.tables import disarmed
from ..jobs.lookup import find_plate, find_recipe, find_split, has_results
from ..jobs.workspace import Workspace
from ..models import FeatureFile, FeatureSet, Plate, Recipe, Run
from ..notebooks import Shown
from ..query.cell_tables import LIMITS
from ..query.cells import choose_recipes, input_of
from ..query.engine import Questions, open_questions
from ..query.guard import literal, quoted
from ..query.source import group_of
from ..settings import check_new_file, need
from .profile import open_profiles

PREFIX, TEXT_PREFIX = "Cells_", "Text_"
"""Before the name of a feature: pycytominer takes what begins with a compartment for numbers."""

VALUES_AT_ONCE = 2_000_000
"""About this many values of features are held at a time."""

_MOST_CELLS = 10_000

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
    "Metadata_dose_original": ("tp.dose_original", pa.string()),
    "Metadata_components": ("tp.components", pa.string()),
    "Metadata_control_type": ("w.control", pa.string()),
    "Metadata_broad_sample": ("tp.identifier", pa.string()),
    "Metadata_InChIKey": ("tp.inchikey", pa.string()),
    "Metadata_smiles": ("tp.smiles", pa.string()),
    "Metadata_pubchem_cid": ("tp.pubchem_cid", pa.string()),
    "Metadata_ImageNumber": ("row_number() OVER ({order})", pa.int64()),
}
"""What all cells of an image share: name, where it is from, type."""

OF_IMAGES = (
    *("Metadata_Site", "Metadata_Plane", "Metadata_Timepoint", "Metadata_CoreName"),
    "Metadata_ImageNumber",
)
"""Those of them that the images of a well do not share."""

CELL_COLUMNS: dict[str, tuple[str, pa.DataType]] = {
    CELL_ID: ("c.id", pa.int64()),
    "Metadata_ObjectNumber": ("c.object_number", pa.int64()),
    "Metadata_MinRow": ("c.min_row", pa.int64()),
    "Metadata_MinCol": ("c.min_col", pa.int64()),
    "Metadata_MaxRow": ("c.max_row", pa.int64()),
    "Metadata_MaxCol": ("c.max_col", pa.int64()),
    "Metadata_CentroidRow": ("c.centroid_row", pa.float64()),
    "Metadata_CentroidCol": ("c.centroid_col", pa.float64()),
    EXCLUDED: ("c.reason", pa.string()),
}
"""Name, what it is in ``CELLS``, type."""

FILE_COLUMNS = ("Image_FileName_", "Image_PathName_")
"""How the names of columns of files begin."""

FLOAT = pa.float64()
_TYPES = {"int64": pa.int64(), "string": pa.string()}

ORDER = """
    ORDER BY i.plate, i.well_row, i.well_column, i.site, i.plane, i.time_point, s.id
"""
JOINS = """
    FROM segmentations AS s
    JOIN images AS m ON m.id = s.image_id
    JOIN image_table AS i ON i.image_id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS pl ON pl.id = w.plate_id
    LEFT JOIN treatments AS t ON t.id = w.treatment_id
    LEFT JOIN split_members AS sm ON sm.image_id = s.image_id AND sm.split_id = $split::BIGINT
    LEFT JOIN labels AS l ON l.id = sm.label_id
    LEFT JOIN (
        SELECT
            part.treatment_id,
            string_agg(p.kind, '|' ORDER BY part.position) AS kind,
            CASE WHEN count(*) = 1 THEN max(part.dose_original) END AS dose_original,
            CASE WHEN count(*) > 1 THEN to_json(list({
                'kind': p.kind, 'pert_iname': p.name, 'target': p.target,
                'identifier': p.identifier, 'inchikey': p.inchikey, 'smiles': p.smiles,
                'pubchem_cid': p.pubchem_cid, 'dose': part.dose, 'unit': part.dose_unit,
                'dose_original': part.dose_original
            } ORDER BY part.position))::VARCHAR END AS components,
            string_agg(p.identifier, '|' ORDER BY part.position) AS identifier,
            string_agg(p.inchikey, '|' ORDER BY part.position) AS inchikey,
            string_agg(p.smiles, '|' ORDER BY part.position) AS smiles,
            string_agg(p.pubchem_cid, '|' ORDER BY part.position) AS pubchem_cid
        FROM treatment_parts AS part
        JOIN perturbations AS p ON p.id = part.perturbation_id
        GROUP BY part.treatment_id
    ) AS tp ON tp.treatment_id = t.id
"""
OF_CELLS = """
    WHERE s.recipe_id = $segment AND s.n_cells > 0 AND list_contains($plates, i.plate)
        AND (s.content_sha256 IS NULL OR s.content_sha256 = m.content_sha256)
        AND ($split IS NULL OR sm.subset = coalesce($subset::VARCHAR, sm.subset))
"""
IMAGES = f"{JOINS} {OF_CELLS}"
WELLS = f"""
    {JOINS}
    WHERE s.recipe_id = $segment AND list_contains($wells, i.well_id) AND $split IS NULL
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
    LEFT JOIN (
        SELECT {columns}
        FROM image_files AS f LEFT JOIN folders AS d ON d.id = f.folder_id
        WHERE f.image_id IN (SELECT s.image_id {images})
        GROUP BY f.image_id
    ) AS files ON files.image_id = s.image_id
"""
CELLS = """
    WITH chosen AS MATERIALIZED (
        SELECT c.*, n.number, coalesce(c.excluded, x.reason, n.excluded) AS reason
        FROM cells AS c
        JOIN (
            SELECT unnest($segmentations::BIGINT[]) AS segmentation_id,
                unnest($numbers::BIGINT[]) AS number, unnest($excluded::VARCHAR[]) AS excluded
        ) AS n ON n.segmentation_id = c.segmentation_id
        LEFT JOIN (
            SELECT id, min(reason) AS reason FROM later_exclusions WHERE level = 'cell' GROUP BY id
        ) AS x ON x.id = c.id
    )
    SELECT c.number, {columns}
    FROM chosen AS c {features}
    ORDER BY c.number, c.object_number
"""
FEATURES = """
    LEFT JOIN (
        SELECT f.* FROM {relation} AS f JOIN chosen ON chosen.id = f.cell_id
    ) AS {name} ON {name}.cell_id = c.id
"""
"""Only the rows of these cells are read: the ids of an inner join bound those of the files."""


class ExportFormat(StrEnum):
    """What an export is written as."""

    PARQUET = "parquet"
    CSV = "csv"
    ANNDATA = "anndata"


@dataclass(frozen=True)
class ExportedProfiles(Shown):
    """What was written of the profiles of ``run_id``: ``wells`` rows with ``features`` each."""

    path: Path
    format: str
    run_id: int
    plates: int
    wells: int
    features: int


@dataclass(frozen=True)
class ExportResult(Shown):
    """What was written: ``cells`` rows with ``features`` columns of measurements each.

    ``excluded`` cells were left out.
    """

    path: Path
    format: str
    feature_sets: tuple[str, ...]
    segment_recipe: int
    measure_recipes: tuple[int, ...]
    plates: int
    cells: int
    excluded: int
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
    split: str | None = None,
    subset: Subset | None = None,
    include_excluded: bool = False,
    for_spreadsheet: bool = False,
    force: bool = False,
) -> ExportResult:
    """Write the current cells of a segmentation with their measurements; see the README.

    ``features`` names a feature set or a group of them; default: all sets of the segmentation
    that was measured last, of each group the set measured last. ``split``: the cells of a split
    (or one ``subset`` of it), with what it says of them. ``include_excluded``: excluded
    cells are rows, too, with their reason in ``Metadata_Excluded``. ``for_spreadsheet`` disarms
    texts that a spreadsheet would run as formulas; such a table no longer reads back as it was.
    Memory does not grow with the number of cells, but for AnnData, which holds its matrix.
    """
    _check(out, format, for_spreadsheet=for_spreadsheet, force=force)
    with workspace.database.read() as session:
        segment, measures = _choose(session, features, segmentation, measurement)
        sets = [(measure, measure.feature_set) for measure in measures]
        known = list(session.scalars(select(Plate.barcode).order_by(Plate.id)))
        for barcode in plates:
            find_plate(session, barcode)
        found_split = None if split is None and subset is None else find_split(session, split).id
    values = {"segment": segment.id, "plates": list(plates) or known}
    values |= {"split": found_split, "subset": subset and subset.value}
    with open_questions(workspace, LIMITS) as questions:
        columns = dict(IMAGE_COLUMNS)
        for name, what in _metadata_columns(questions, IMAGES, values).items():
            if name not in CELL_COLUMNS:
                columns.setdefault(name, what)
        fingerprint = literal(segment.fingerprint[:12])
        columns[SEGMENTATION] = (fingerprint, pa.string())
        if found_split is not None:
            columns |= {SUBSET: ("sm.subset", pa.string()), LABEL: ("l.value", pa.string())}
        listed = [
            f"{source.format(order=ORDER) if name in IMAGE_COLUMNS else source} AS {quoted(name)}"
            for name, (source, _) in columns.items()
        ]
        channels = list(questions.ask_ours(CHANNELS.format(images=IMAGES), values).rows())
        files = {
            f"{begin}{channel}": f"max({of}) FILTER (WHERE f.channel = {literal(channel)})"
            for begin, of in zip(FILE_COLUMNS, ("f.name", "d.uri"), strict=True)
            for (channel,) in channels
        }
        # By number: names of channels may differ in upper and lower case alone.
        listed += [f"files.file{at}" for at in range(len(files))]
        of_files = ["f.image_id", *(f"{of} AS file{at}" for at, of in enumerate(files.values()))]
        joined = FILES.format(columns=", ".join(of_files), images=IMAGES)
        images = questions.ask_ours(
            f"SELECT {', '.join(listed)}, i.excluded, s.id AS segmentation_id, s.n_cells "
            f"{JOINS} {joined} {OF_CELLS} {ORDER}",
            values,
        ).table()
        n_cells = int(pc.sum(images["n_cells"]).as_py() or 0)
        if n_cells == 0:
            where = f" on {', '.join(plates)}" if plates else ""
            raise UserInputError(
                f"There are no cells{where} to export. Name other plates, or find cells with: "
                "cellstore segment"
            )
        measured: dict[str, tuple[str, pa.DataType]] = {}
        joins: list[str] = []
        for at, (measure, found) in enumerate(sets):
            if found is None:
                of_set = [(name, name, FLOAT) for name in FEATURE_NAMES]
                relation = f"(SELECT * FROM features WHERE recipe_id = {int(measure.id)})"  # noqa: S608
            else:
                names = [name for name, _ in questions.columns(found.name)[1:]]
                of_set = [
                    (name, str(item["name"]), _TYPES.get(str(item["dtype"]), FLOAT))
                    for name, item in zip(names, found.columns, strict=True)
                ]
                relation = quoted(found.name)
            joins.append(FEATURES.format(relation=relation, name=f"f{at}"))
            for name, original, kind in of_set:
                column = column_name(original, kind)
                if column in measured and found is not None:
                    column = column_name(original, kind, f"{found.name}_")
                measured[column] = f"f{at}.{quoted(name)}", kind
        schema = pa.schema(
            [
                *((name, kind) for name, (_, kind) in [*columns.items(), *CELL_COLUMNS.items()]),
                *((name, pa.string()) for name in files),
                *((name, kind) for name, (_, kind) in measured.items()),
            ]
        )
        sources = [source for source, _ in (*CELL_COLUMNS.values(), *measured.values())]
        query = CELLS.format(
            columns=", ".join(f'{source} AS "{at}"' for at, source in enumerate(sources)),
            features="".join(joins),
        )

        written: list[int] = []
        not_counted: list[int] = []

        def batches() -> Iterator[pa.Table]:
            """Yield the cells of as many images as can be held at a time."""
            most = min(_MOST_CELLS, max(1, VALUES_AT_ONCE // max(1, len(measured))))
            batch_of_image = (np.cumsum(images["n_cells"].to_numpy()) - 1) // most
            starts = np.flatnonzero(np.diff(batch_of_image, prepend=-1)).tolist()
            for first, last in pairwise([*starts, images.num_rows]):
                some = images.slice(first, last - first)
                parameters = {
                    "segmentations": some["segmentation_id"].to_pylist(),
                    "numbers": list(range(some.num_rows)),
                    "excluded": some["excluded"].to_pylist(),
                }
                cells = questions.ask_ours(query, parameters).table()
                if not include_excluded:
                    counts_not = pc.is_valid(cells[str(list(CELL_COLUMNS).index(EXCLUDED))])
                    not_counted.append(pc.sum(counts_not).as_py() or 0)
                    cells = cells.filter(pc.invert(counts_not))
                number, own = cells["number"], 1 + len(CELL_COLUMNS)
                arrays = [some[name].take(number) for name in columns]
                arrays += cells.columns[1:own]
                arrays += [some[f"file{at}"].take(number) for at in range(len(files))]
                # A gap is one thing: not a number, which one database keeps and the other does not.
                arrays += [without_nan(column) for column in cells.columns[own:]]
                pairs = zip(arrays, schema, strict=True)
                table = pa.table([array.cast(field.type) for array, field in pairs], schema=schema)
                written.append(table.num_rows)
                yield table
                workspace.progress.advance(pc.sum(some["n_cells"]).as_py())

        workspace.progress.start("export", n_cells)
        try:
            with open_atomically(out) as file:
                _write(file, format, schema, batches(), n_cells, for_spreadsheet=for_spreadsheet)
                if not any(written):
                    raise UserInputError(
                        f"All {n_cells:,} cells are excluded. To write them with the reason: "
                        "--include-excluded"
                    )
        finally:
            workspace.progress.finish()
    return ExportResult(
        path=out,
        format=format.value,
        feature_sets=tuple(found.name for _, found in sets if found),
        segment_recipe=segment.id,
        measure_recipes=tuple(measure.id for measure in measures),
        plates=len(pc.unique(images["Metadata_Plate"])),
        cells=sum(written),
        excluded=sum(not_counted),
        features=len(measured),
    )


def export_profiles(
    workspace: Workspace,
    out: Path,
    run: RunName = "latest",
    *,
    format: ExportFormat = ExportFormat.PARQUET,  # noqa: A002 - the word of the command line
    for_spreadsheet: bool = False,
    force: bool = False,
) -> ExportedProfiles:
    """Write the profiles of a profile run, a row for each well, in the columns of pycytominer."""
    _check(out, format, for_spreadsheet=for_spreadsheet, force=force)
    run_id, profiles = open_profiles(workspace, run)
    with workspace.database.read() as session:
        segment = input_of(session.get_one(Run, run_id).recipe, Stage.SEGMENT).id
    ids = profiles.table["well_id"].tolist()
    values = {"segment": segment, "wells": ids, "split": None}
    columns = {name: what for name, what in IMAGE_COLUMNS.items() if name not in OF_IMAGES}
    with open_questions(workspace) as questions:
        for name, what in _metadata_columns(questions, WELLS, values).items():
            columns.setdefault(name, what)
        listed = ", ".join(f"{source} AS {quoted(name)}" for name, (source, _) in columns.items())
        question = f"SELECT DISTINCT i.well_id, {listed} {WELLS}"
        found = questions.ask_ours(question, values).table()
    row_of = {well_id: row for row, well_id in enumerate(found["well_id"].to_pylist())}
    about = found.take(pa.array([row_of[well_id] for well_id in ids], pa.int64()))
    arrays = {name: about[name].cast(kind) for name, (_, kind) in columns.items()}
    counts = {"Metadata_Object_Count": "n_cells", "Metadata_Site_Count": "n_images"}
    arrays |= {name: pa.array(profiles.table[of]) for name, of in counts.items()}
    names = [column_name(name, FLOAT) for name in profiles.columns]
    for name, column in zip(names, profiles.values.T, strict=True):
        arrays[name] = pa.array(column, FLOAT, from_pandas=True)
    table = pa.table(arrays)
    with open_atomically(out) as file:
        _write(file, format, table.schema, iter([table]), len(ids), for_spreadsheet=for_spreadsheet)
    plates = profiles.table["plate"].nunique()
    return ExportedProfiles(out, format.value, run_id, plates, len(ids), len(names))


def _metadata_columns(
    questions: Questions, images: str, values: dict[str, Any]
) -> dict[str, tuple[str, pa.DataType]]:
    """What plates and wells have in ``metadata``: name, where it is from, type."""
    found = {}
    for (key,) in list(questions.ask_ours(METADATA.format(images=images), values).rows()):
        text = f"coalesce(w.metadata ->> {literal(key)}, pl.metadata ->> {literal(key)})"
        found[f"Metadata_{key}"] = (text, pa.string())
    return found


def _check(out: Path, format: ExportFormat, *, for_spreadsheet: bool, force: bool) -> None:  # noqa: A002
    if format is ExportFormat.ANNDATA:
        need("anndata")
    if for_spreadsheet and format is not ExportFormat.CSV:
        raise UserInputError("Only CSV is opened in spreadsheets: give --format csv, too.")
    check_new_file(out, replace=force, option="--force")


def _write(
    file: BinaryIO,
    format: ExportFormat,  # noqa: A002
    schema: pa.Schema,
    batches: Iterator[pa.Table],
    rows: int,
    *,
    for_spreadsheet: bool,
) -> None:
    """Write tables, at most so many ``rows`` together, one after the other."""
    if format is ExportFormat.PARQUET:  # a row group for each batch
        with pq.ParquetWriter(file, schema, compression="zstd") as parquet:
            for batch in batches:
                parquet.write_table(batch)
    elif format is ExportFormat.CSV:
        header = disarmed(schema.empty_table()).schema if for_spreadsheet else schema
        with pc_csv.CSVWriter(file, header) as text:
            for batch in batches:
                text.write_table(disarmed(batch) if for_spreadsheet else batch)
    else:
        _write_anndata(Path(file.name), schema, batches, rows)


def exported_columns(sets: Iterable[FeatureSet]) -> set[str]:
    """Return what the columns of measurements of ``sets``, and the built-in ones, are called."""
    found = {column_name(name, FLOAT) for name in FEATURE_NAMES}
    for item in sets:
        for column in item.columns:
            kind = _TYPES.get(str(column["dtype"]), FLOAT)
            found |= {column_name(str(column["name"]), kind, x) for x in ("", f"{item.name}_")}
    return found


def column_name(name: str, kind: pa.DataType, of_set: str = "") -> str:
    """Return the column of a feature: one of a compartment where it is a number, else of none."""
    if kind != pa.string():
        kept = not of_set and name.startswith(tuple(f"{role}_" for role in COMPARTMENTS))
        return name if kept else f"{PREFIX}{of_set}{name}"
    return name if not of_set and name.startswith(TEXT_PREFIX) else f"{TEXT_PREFIX}{of_set}{name}"


def _choose(
    session: Session, features: str | None, segmentation: str | None, measurement: str | None
) -> tuple[Recipe, list[Recipe]]:
    """Return the segment recipe and the measure recipes of what is exported.

    Default: all that was measured on the cells that were measured last, of each group of features
    what was measured last.
    """
    if features is not None or measurement is not None:
        segment, measure = choose_recipes(session, segmentation, measurement, features)
        return segment, [measure]
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
    if segmentation is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation)
        query = query.where(Recipe.id.in_([reading.id for reading in asked.used_by]))
    measures = session.scalars(query.order_by(newest.desc(), Recipe.id.desc())).all()
    if not measures:
        raise UserInputError(
            "Nothing has been measured on these cells. Run: cellstore measure, or ingest a table "
            "of features."
        )
    segment = input_of(measures[0], Stage.SEGMENT)
    chosen: dict[str, Recipe] = {}
    for measure in measures:
        if input_of(measure, Stage.SEGMENT).id == segment.id:
            name = measure.feature_set.name if measure.feature_set else "basic"
            chosen.setdefault(group_of(name) or name, measure)
    return segment, sorted(chosen.values(), key=lambda measure: measure.id)


def _write_anndata(path: Path, schema: pa.Schema, batches: Iterator[pa.Table], count: int) -> None:
    """Write numbers of features as ``X`` (N, F) float64, all else as ``obs``.

    AnnData holds the matrix in memory, and so does this, once.
    """
    import anndata
    import pandas as pd

    about = ("Metadata_", *FILE_COLUMNS)
    names = [f.name for f in schema if f.type != pa.string() and not f.name.startswith(about)]
    others = [name for name in schema.names if name not in set(names)]
    matrix, parts, row = np.empty((count, len(names))), [], 0
    for batch in batches:
        for index, name in enumerate(names):
            values = batch.column(name).cast(pa.float64())
            matrix[row : row + batch.num_rows, index] = values.to_numpy(zero_copy_only=False)
        parts.append(batch.select(others))
        row += batch.num_rows
    # Categories, since h5ad has no nulls in texts; of objects, since it takes no texts of pandas 3.
    obs = pa.concat_tables(parts).to_pandas(strings_to_categorical=True)
    for name, column in obs.select_dtypes("category").items():
        obs[name] = column.cat.rename_categories(column.cat.categories.astype(object))
    obs.index = pd.Index(list(map(str, range(row))), dtype=object)
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    made = anndata.AnnData(matrix[:row], obs=obs, var=var)
    made.write_h5ad(path)
