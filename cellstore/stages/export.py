"""The export of single cells: one row a cell, in pycytominer's columns."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from sqlalchemy import Select, and_, case, func, select
from sqlalchemy.orm import Session

from ..artifacts import PART, ArtifactFolder
from ..db.bulk import in_lists
from ..db.fields import of_parts
from ..enums import FeatureStorage, Stage
from ..errors import StorageError, UnknownNameError, UserInputError
from ..extras import need
from ..io.tables import disarmed
from ..jobs.lookup import find_recipe, has_results
from ..jobs.selection import is_current
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    Perturbation,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Treatment,
    Well,
)
from ..query.cells import input_of
from ..query.feature_files import FEATURE_COLUMNS, find_feature_set

PREFIX = "Cells_"
"""Before the name of a built-in feature: pycytominer takes what begins with a compartment."""


@dataclass(frozen=True)
class Exported:
    """A segment recipe, a measure recipe, its feature set, and the plates in their order.

    ``features`` are pairs: the name in the store, the name in the export.
    """

    segment_id: int
    measure_id: int
    features: tuple[tuple[str, str], ...]
    feature_set: FeatureSet | None
    plates: tuple[Plate, ...]

    @property
    def in_files(self) -> bool:
        """Whether the values are in columnar files rather than in table ``features``."""
        return self.feature_set is not None and self.feature_set.storage is FeatureStorage.FILES


def choose(
    session: Session,
    features: str | None,
    segmentation: str | None,
    measurement: str | None,
    plates: Sequence[str],
) -> Exported:
    """Return what is to be exported; default: what was measured last, of all plates.

    Raises:
        UnknownNameError: there is no such feature set, recipe or plate.
        UserInputError: nothing has been measured, or what was asked for does not go together.
    """
    measure = _measure(session, features, segmentation, measurement)
    segment = input_of(session, measure, Stage.SEGMENT)
    if segmentation is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation)
        if asked.id != segment.id:
            raise UserInputError(
                f"These measurements are not of the cells of segment recipe {asked.id}, but of "
                f"{segment.id}. Leave --segmentation out."
            )
    found = session.scalars(
        select(FeatureSet).where(FeatureSet.recipe_id == measure.id)
    ).one_or_none()
    return Exported(segment.id, measure.id, _names(found), found, _plates(session, plates))


def _measure(
    session: Session, features: str | None, segmentation: str | None, measurement: str | None
) -> Recipe:
    if features is None and measurement is None:
        return _last_measure(session, segmentation)
    asked = find_recipe(session, Stage.MEASURE, measurement) if measurement is not None else None
    if features is None:
        assert asked is not None
        return asked
    named = session.get_one(Recipe, find_feature_set(session, features).recipe_id)
    if asked is not None and asked.id != named.id:
        raise UserInputError(
            f"Feature set {features!r} is of measure recipe {named.id}, not {asked.id}. "
            "Give only one of --features and --measurement."
        )
    return named


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


def _names(found: FeatureSet | None) -> tuple[tuple[str, str], ...]:
    if found is None or found.storage is FeatureStorage.TABLE:
        return tuple((name, f"{PREFIX}{name}") for name in FEATURE_COLUMNS)
    return tuple((column["name"], column["name"]) for column in found.columns)


def _plates(session: Session, barcodes: Sequence[str]) -> tuple[Plate, ...]:
    query = select(Plate)
    if barcodes:
        query = query.where(Plate.barcode.in_(barcodes))
    # In Python: databases sort texts each in their own way.
    found = sorted(session.scalars(query), key=lambda plate: plate.barcode)
    unknown = set(barcodes) - {plate.barcode for plate in found}
    if unknown:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
        raise UnknownNameError.of("plate", min(unknown), known)
    return tuple(found)


IMAGE_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("Metadata_Plate", pa.string()),
    ("Metadata_Batch", pa.string()),
    ("Metadata_Well", pa.string()),
    ("Metadata_Site", pa.int64()),
    ("Metadata_Plane", pa.int64()),
    ("Metadata_Timepoint", pa.int64()),
    ("Metadata_CoreName", pa.string()),
    ("Metadata_pert_type", pa.string()),
    ("Metadata_pert_iname", pa.string()),
    ("Metadata_target", pa.string()),
    ("Metadata_control_type", pa.string()),
    ("Metadata_broad_sample", pa.string()),
    ("Metadata_InChIKey", pa.string()),
    ("Metadata_smiles", pa.string()),
    ("Metadata_pubchem_cid", pa.string()),
    ("Metadata_ImageNumber", pa.int64()),
)
"""What all cells of an image share."""

CELL_COLUMNS: tuple[tuple[str, str, pa.DataType], ...] = (
    ("Metadata_ObjectNumber", "object_number", pa.int64()),
    ("Metadata_MinRow", "min_row", pa.int64()),
    ("Metadata_MinCol", "min_col", pa.int64()),
    ("Metadata_MaxRow", "max_row", pa.int64()),
    ("Metadata_MaxCol", "max_col", pa.int64()),
    ("Metadata_CentroidRow", "centroid_row", pa.float64()),
    ("Metadata_CentroidCol", "centroid_col", pa.float64()),
    ("Metadata_Excluded", "excluded", pa.string()),
)
"""Name, column of table ``cells``, type."""

_TYPES = {"int64": pa.int64(), "string": pa.string()}


def file_columns(channels: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (name, channel, what of it: ``name`` or ``folder``) of the columns of files."""
    names = [(f"Image_FileName_{channel}", channel, "name") for channel in channels]
    return names + [(f"Image_PathName_{channel}", channel, "folder") for channel in channels]


def schema_of(exported: Exported, channels: Sequence[str]) -> pa.Schema:
    """Return the schema of the export.

    Raises:
        UserInputError: a feature has the name of one of the other columns.
    """
    fields = [pa.field(name, kind) for name, kind in IMAGE_COLUMNS]
    fields += [pa.field(name, kind) for name, _, kind in CELL_COLUMNS]
    fields += [pa.field(name, pa.string()) for name, _, _ in file_columns(channels)]
    taken = {field.name for field in fields}
    clash = [name for _, name in exported.features if name in taken]
    if clash:
        raise UserInputError(
            f"The feature {clash[0]!r} has the name of a column that says what a cell is. "
            "Ingest the features again with that column named otherwise."
        )
    kinds = feature_types(exported)
    return pa.schema([*fields, *(pa.field(name, kinds[key]) for key, name in exported.features)])


def feature_types(exported: Exported) -> dict[str, pa.DataType]:
    """Return the type of each feature, by its name in the store."""
    if not exported.in_files:
        return {name: pa.float64() for name, _ in exported.features}
    assert exported.feature_set is not None
    columns = exported.feature_set.columns
    return {item["name"]: _TYPES.get(str(item["dtype"]), pa.float64()) for item in columns}


VALUES_AT_ONCE = 2_000_000
"""About this many values of features are held at a time."""

_MOST_CELLS, _MOST_IMAGES = 10_000, 500
_CELL_NAMES = tuple(column for _, column, _ in CELL_COLUMNS)


class ImageFacts(NamedTuple):
    """An image with cells: what the columns of all its rows say, and where its cells are."""

    image_id: int
    segmentation_id: int
    n_cells: int
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Reader:
    """Reads what was chosen, in the order of plates, wells, sites and labels."""

    session: Session
    artifacts: ArtifactFolder
    exported: Exported

    def channels(self) -> list[str]:
        """Return the channels of all images that are exported, by name."""
        query = (
            select(ImageFile.channel)
            .join(Image, Image.id == ImageFile.image_id)
            .join(Segmentation, is_current())
            .join(Well, Well.id == Image.well_id)
            .where(Segmentation.recipe_id == self.exported.segment_id)
            .where(Well.plate_id.in_([plate.id for plate in self.exported.plates]))
        )
        return sorted(self.session.scalars(query.distinct()))

    def count(self) -> int:
        """Return how many cells there are."""
        query = _images(self.exported, self.exported.plates).subquery()
        return self.session.scalar(select(func.sum(query.c.n_cells))) or 0

    def count_plates(self) -> int:
        """Return how many plates have cells."""
        query = _images(self.exported, self.exported.plates)
        plates = query.with_only_columns(func.count(Well.plate_id.distinct())).order_by(None)
        return self.session.scalar(plates) or 0

    def batches(self, schema: pa.Schema, channels: Sequence[str]) -> Iterator[pa.Table]:
        """Yield all rows, in tables of ``schema``."""
        for images in self._groups():
            yield self._table(images, schema, channels)

    def _groups(self) -> Iterator[list[ImageFacts]]:
        wide = max(1, VALUES_AT_ONCE // max(1, len(self.exported.features)))
        most, group, cells = min(_MOST_CELLS, wide), list[ImageFacts](), 0
        for image in self._all_images():
            if group and (cells + image.n_cells > most or len(group) == _MOST_IMAGES):
                yield group
                group, cells = [], 0
            group.append(image)
            cells += image.n_cells
        if group:
            yield group

    def _all_images(self) -> Iterator[ImageFacts]:
        number = 0
        for plate in self.exported.plates:
            # The images of one plate are few enough to be held, so that no cursor stays open.
            for row in self._images_of(plate):
                number += 1
                image_id, segmentation_id, n_cells, *values = row
                facts = (plate.barcode, plate.batch, *map(_plain, values), number)
                yield ImageFacts(image_id, segmentation_id, n_cells, facts)

    def _images_of(self, plate: Plate) -> Iterator[Any]:
        # By image, so that a plate costs its own images and not all segmentations of the recipe.
        order = (Well.well_row, Well.well_column, Image.site, Image.plane, Image.time_point)
        ids = select(Image.id).join(Well, Well.id == Image.well_id).where(Well.plate_id == plate.id)
        query = _images(self.exported, [plate])
        for some in in_lists(self.session.scalars(ids.order_by(*order)).all()):
            yield from self.session.execute(query.where(Image.id.in_(some))).all()

    def _table(
        self, images: Sequence[ImageFacts], schema: pa.Schema, channels: Sequence[str]
    ) -> pa.Table:
        rows, place = self._cells(images)
        image = pa.array(place, pa.int64())
        arrays = [
            pa.array([facts.values[i] for facts in images], kind).take(image)
            for i, (_, kind) in enumerate(IMAGE_COLUMNS)
        ]
        arrays += [
            pa.array([row[2 + i] for row in rows], kind)
            for i, (_, _, kind) in enumerate(CELL_COLUMNS)
        ]
        arrays += [column.take(image) for column in self._files(images, channels)]
        arrays += map(_without_nan, self._features(rows))
        return pa.Table.from_arrays(arrays, schema=schema)

    def _cells(self, images: Sequence[ImageFacts]) -> tuple[list[Any], list[int]]:
        """Return the cells as (id, segmentation, columns, features of the table), and the image."""
        order = {facts.segmentation_id: place for place, facts in enumerate(images)}
        columns = [getattr(Cell, name) for name in _CELL_NAMES]
        query = select(Cell.id, Cell.segmentation_id, *columns)
        if not self.exported.in_files:
            measured = and_(
                CellFeatures.cell_id == Cell.id, CellFeatures.recipe_id == self.exported.measure_id
            )
            features = [getattr(CellFeatures, name) for name, _ in self.exported.features]
            query = query.add_columns(*features).outerjoin(CellFeatures, measured)
        found = self.session.execute(query.where(Cell.segmentation_id.in_(list(order))))
        rows = sorted(found, key=lambda row: (order[row[1]], row[2]))
        return rows, [order[row[1]] for row in rows]

    def _files(self, images: Sequence[ImageFacts], channels: Sequence[str]) -> list[pa.Array]:
        query = (
            select(ImageFile.image_id, ImageFile.channel, ImageFile.name, Folder.uri)
            .outerjoin(Folder, Folder.id == ImageFile.folder_id)
            .where(ImageFile.image_id.in_([facts.image_id for facts in images]))
        )
        files = {
            (row[0], row[1]): {"name": row[2], "folder": row[3]}
            for row in self.session.execute(query)
        }
        return [
            pa.array([files.get((f.image_id, channel), {}).get(what) for f in images], pa.string())
            for _, channel, what in file_columns(channels)
        ]

    def _features(self, rows: Sequence[Any]) -> list[pa.Array]:
        kinds = feature_types(self.exported)
        if not self.exported.in_files:
            first = 2 + len(CELL_COLUMNS)
            return [
                pa.array([row[first + i] for row in rows], kinds[name])
                for i, (name, _) in enumerate(self.exported.features)
            ]
        names = [name for name, _ in self.exported.features]
        ids = np.array([row[0] for row in rows], np.int64)
        return self._from_files(ids, names, [kinds[name] for name in names])

    def _from_files(
        self, ids: np.ndarray[Any, Any], names: Sequence[str], kinds: Sequence[pa.DataType]
    ) -> list[pa.Array]:
        schema = pa.schema([("cell_id", pa.int64()), *zip(names, kinds, strict=True)])
        parts = [schema.empty_table()]
        if len(ids):
            parts += [
                _rows_of(self.artifacts, path, schema, np.sort(ids))
                for path in self.session.scalars(self._paths(int(ids.min()), int(ids.max())))
            ]
        found = pa.concat_tables(parts).combine_chunks()
        places = pc.index_in(pa.array(ids), value_set=found.column("cell_id"))
        return [found.column(name).take(places).combine_chunks() for name in names]

    def _paths(self, first: int, last: int) -> Select[Any]:
        assert self.exported.feature_set is not None
        return (
            select(Artifact.path)
            .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
            .where(FeatureFile.feature_set_id == self.exported.feature_set.id)
            .where(FeatureFile.first_cell_id <= last, FeatureFile.last_cell_id >= first)
            .order_by(FeatureFile.first_cell_id)
        )


def _rows_of(
    artifacts: ArtifactFolder, path: str, schema: pa.Schema, ids: np.ndarray[Any, Any]
) -> pa.Table:
    """Return the rows of some cells (ascending) of a file; only the row groups that have some."""
    try:
        with pq.ParquetFile(artifacts.locate(path)) as file:
            groups = [i for i in range(file.num_row_groups) if _meets(file.metadata, i, ids)]
            table = file.read_row_groups(groups, columns=schema.names)
        table = table.select(schema.names).cast(schema)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StorageError(
            f"The stored file {path} cannot be read ({str(error).splitlines()[0]}). "
            "See what else is affected with: cellstore verify"
        ) from error
    return table.filter(pc.is_in(table.column("cell_id"), value_set=pa.array(ids)))


def _meets(metadata: Any, group: int, ids: np.ndarray[Any, Any]) -> bool:
    known = metadata.row_group(group).column(0).statistics
    if known is None or not known.has_min_max:
        return True
    start = int(np.searchsorted(ids, known.min))
    return start < len(ids) and bool(ids[start] <= known.max)


def _images(exported: Exported, plates: Sequence[Plate]) -> Select[Any]:
    """Return the query of the images on ``plates`` that have cells, in their order."""
    treatment = (
        *(of_parts(Perturbation.kind), Treatment.name, Treatment.target, Well.control),
        *map(of_parts, (Perturbation.identifier, Perturbation.inchikey)),
        *map(of_parts, (Perturbation.smiles, Perturbation.pubchem_cid)),
    )
    return (
        select(Image.id, Segmentation.id.label("segmentation_id"), Segmentation.n_cells)
        .add_columns(Well.name, Image.site, Image.plane, Image.time_point, Image.core_name)
        .add_columns(*treatment)
        .select_from(Image)
        .join(Segmentation, is_current())
        .join(Well, Well.id == Image.well_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(Segmentation.recipe_id == exported.segment_id, Segmentation.n_cells > 0)
        .where(Well.plate_id.in_([plate.id for plate in plates]))
        .order_by(Well.well_row, Well.well_column)
        .order_by(Image.site, Image.plane, Image.time_point, Segmentation.id)
    )


def _without_nan(values: pa.Array) -> pa.Array:
    """Put null for NaN, which one database keeps and the other does not: a gap is one thing."""
    if not pa.types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


Batches = Iterable[pa.Table]


def write_parquet(path: Path, schema: pa.Schema, batches: Batches) -> None:
    """Write a row group for each batch."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(batch)


def write_csv(
    path: Path, schema: pa.Schema, batches: Batches, *, for_spreadsheet: bool = False
) -> None:
    """Write texts in quotes where they need them; nothing between two commas is null.

    ``for_spreadsheet`` puts a ' before texts that a spreadsheet would run as a formula.
    """
    if for_spreadsheet:
        schema = disarmed(schema.empty_table()).schema
    with pc_csv.CSVWriter(path, schema) as writer:
        for batch in batches:
            writer.write_table(disarmed(batch) if for_spreadsheet else batch)


def write_anndata(path: Path, schema: pa.Schema, batches: Batches, count: int) -> None:
    """Write numbers of features as ``X`` (N, F) float64, all else as ``obs``.

    AnnData holds the matrix in memory, and so does this, once.
    """
    import anndata
    import pandas as pd

    names = [f.name for f in schema if not _is_metadata(f.name) and not pa.types.is_string(f.type)]
    others = [name for name in schema.names if name not in set(names)]
    matrix, facts, row = np.empty((count, len(names))), [], 0
    for batch in batches:
        for index, name in enumerate(names):
            values = batch.column(name).cast(pa.float64())
            matrix[row : row + batch.num_rows, index] = values.to_numpy(zero_copy_only=False)
        facts.append(batch.select(others))
        row += batch.num_rows
    table = pa.concat_tables(facts)
    obs = pd.DataFrame({name: _series(table.column(name)) for name in others})
    obs.index = obs.index.astype(str)
    made = anndata.AnnData(matrix[:row], obs=obs, var=pd.DataFrame(index=pd.Index(names)))
    made.write_h5ad(path)


def _is_metadata(name: str) -> bool:
    return name.startswith(("Metadata_", "Image_FileName_", "Image_PathName_"))


def _series(column: pa.ChunkedArray) -> Any:
    import pandas as pd

    if not pa.types.is_string(column.type):
        return column.to_numpy()
    # h5ad has no nulls in columns of text, but categories that are none.
    encoded = column.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    categories = np.array(encoded.dictionary.to_pylist(), dtype=object)
    return pd.Categorical.from_codes(codes, pd.Index(categories, dtype=object))


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``target``, which then takes its place.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    temporary = target.parent / f"{PART}{uuid.uuid4().hex}{target.suffix}"
    with _explained(target), _removed(temporary):
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


@contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}. Free some space or mend the "
            "permissions, then run the same command again; nothing half-written is left."
        ) from error


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
