"""The rows of an export, batch by batch: whole images, some 10,000 cells at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from ...artifacts import ArtifactFolder
from ...db.bulk import in_lists
from ...db.models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    Folder,
    Image,
    ImageFile,
    Plate,
    Segmentation,
    Treatment,
    Well,
)
from ...errors import StorageError
from ...runs.selection import is_current
from .choice import Exported
from .columns import CELL_COLUMNS, IMAGE_COLUMNS, feature_types, file_columns

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
        order = (Well.row, Well.column, Image.site, Image.plane, Image.time_point)
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
        *(Treatment.kind, Treatment.pert_iname, Treatment.target, Treatment.control),
        *(Treatment.identifier, Treatment.inchikey, Treatment.smiles, Treatment.pubchem_cid),
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
        .order_by(Well.row, Well.column, Image.site, Image.plane, Image.time_point, Segmentation.id)
    )


def _without_nan(values: pa.Array) -> pa.Array:
    """Put null for NaN, which one database keeps and the other does not: a gap is one thing."""
    if not pa.types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
