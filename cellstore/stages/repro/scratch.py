"""A store for one redo: the rows that a run needs, in a folder that is thrown away.

Rows keep their ids. Files are read where they are; what the redo writes goes to the new folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.orm import Session

from ...artifacts import BorrowingFolder
from ...db.bulk import in_lists
from ...db.models import (
    METADATA,
    Artifact,
    Cell,
    CellFeatures,
    CellFlag,
    FeatureFile,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    ImageFlag,
    Job,
    Label,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    Well,
)
from ...db.session import connect, sqlite_url
from ...db.types import Base
from ...runs import Workspace
from ...settings import StoreSettings
from ...terms import Status

ROWS = 5_000
"""Rows that are copied at once."""

IMAGES = 500


@dataclass(frozen=True)
class Wanted:
    """What a redo needs beside the small tables, which are copied whole.

    ``images`` by id; ``segmented``: recipes whose segmentations come along, ``with_cells`` those
    of them whose cells do; ``measured``: recipes whose measurements do; ``files_of``: runs whose
    files do; ``qc``: the run whose flags count; ``splits``: whether splits are there already.
    """

    images: Sequence[int]
    segmented: Collection[int] = ()
    with_cells: Collection[int] = ()
    measured: Collection[int] = ()
    files_of: Collection[int] = ()
    qc: int | None = None
    splits: bool = True


@contextmanager
def scratch_store(workspace: Workspace, wanted: Wanted) -> Iterator[Workspace]:
    """Yield a store of its own with copies of the rows; nothing is written to ``workspace``."""
    with tempfile.TemporaryDirectory(prefix="cellstore-redo-", ignore_cleanup_errors=True) as name:
        settings = StoreSettings(Path(name).resolve())
        database = connect(sqlite_url(settings.sqlite))
        try:
            # Without the triggers, which guard what people do: rows come as is easiest to copy.
            METADATA.create_all(database.engine)
            folder = BorrowingFolder(settings.artifacts, workspace.artifacts)
            opened = Workspace(settings, database, folder, workspace.progress)
            _fill(workspace, opened, wanted)
            yield opened
        finally:
            database.close()


def _fill(source: Workspace, target: Workspace, wanted: Wanted) -> None:
    with source.database.read() as reader, target.database.begin() as writer:
        copier = _Copier(reader, writer)
        copier.small_tables(wanted)
        for some in in_lists(list(wanted.images), IMAGES):
            copier.images(some, wanted)
        copier.files(wanted)


@dataclass(frozen=True)
class _Copier:
    reader: Session
    writer: Session

    def small_tables(self, wanted: Wanted) -> None:
        """Copy what does not grow with the images, and the wells."""
        tables: list[type[Base]] = [Folder, Plate, Treatment, Well, Recipe, RecipeInput, Label]
        tables.append(Split)
        for table in tables:
            self.copy(table, select(table.__table__))
        self.copy(Run, select(Run.__table__).order_by(Run.id))  # parents before children
        self.copy(FeatureSet, select(FeatureSet.__table__))
        if not wanted.splits:
            self.writer.execute(update(Run).values(split_id=None))
            self.writer.execute(delete(Split))

    def images(self, some: Sequence[int], wanted: Wanted) -> None:
        """Copy some images and what was found in them."""
        self.copy(Image, select(Image.__table__).where(Image.id.in_(some)))
        self.copy(ImageFile, select(ImageFile.__table__).where(ImageFile.image_id.in_(some)))
        if wanted.splits:
            members = select(SplitMember.__table__).where(SplitMember.image_id.in_(some))
            self.copy(SplitMember, members)
        found = select(Segmentation.__table__).where(
            Segmentation.image_id.in_(some), Segmentation.recipe_id.in_(wanted.segmented)
        )
        for column in (Segmentation.mask_artifact_id, Segmentation.flow_artifact_id):
            self.artifacts(found.with_only_columns(column).where(column.is_not(None)))
        self.copy(Segmentation, found)
        cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        cells = cells.where(Segmentation.image_id.in_(some))
        cells = cells.where(Segmentation.recipe_id.in_(wanted.with_cells))
        self.copy(Cell, select(Cell.__table__).where(Cell.id.in_(cells)))
        self._measurements(some, cells, wanted)

    def _measurements(self, some: Sequence[int], cells: Select[Any], wanted: Wanted) -> None:
        values = select(CellFeatures.__table__).where(CellFeatures.cell_id.in_(cells))
        self.copy(CellFeatures, values.where(CellFeatures.recipe_id.in_(wanted.measured)))
        jobs = select(Job.__table__).where(Job.image_id.in_(some))
        self.copy(Job, jobs.where(Job.recipe_id.in_(wanted.measured), Job.status == Status.DONE))
        if wanted.qc is not None:
            of_cells = select(CellFlag.__table__).where(CellFlag.cell_id.in_(cells))
            self.copy(CellFlag, of_cells.where(CellFlag.run_id == wanted.qc))
            of_images = select(ImageFlag.__table__).where(ImageFlag.image_id.in_(some))
            self.copy(ImageFlag, of_images.where(ImageFlag.run_id == wanted.qc))

    def files(self, wanted: Wanted) -> None:
        """Copy the rows of the files of runs, and of feature sets."""
        of_runs = select(RunArtifact.__table__).where(RunArtifact.run_id.in_(wanted.files_of))
        self.artifacts(of_runs.with_only_columns(RunArtifact.artifact_id))
        self.copy(RunArtifact, of_runs)
        sets = select(FeatureSet.id).where(FeatureSet.recipe_id.in_(wanted.measured))
        files = select(FeatureFile.__table__).where(FeatureFile.feature_set_id.in_(sets))
        self.artifacts(files.with_only_columns(FeatureFile.artifact_id))
        self.copy(FeatureFile, files)

    def artifacts(self, ids: Select[Any]) -> None:
        """Copy rows of files that are not there yet."""
        rows = self.reader.execute(select(Artifact.__table__).where(Artifact.id.in_(ids)))
        there = set(self.writer.scalars(select(Artifact.id)))
        new = [dict(row) for row in rows.mappings() if row["id"] not in there]
        if new:
            self.writer.execute(insert(_rows(Artifact)), new)

    def copy(self, table: type[Base], query: Select[Any]) -> None:
        """Copy the rows of a query, a piece at a time."""
        result = self.reader.execute(query.execution_options(yield_per=ROWS))
        for part in result.mappings().partitions(ROWS):
            self.writer.execute(insert(_rows(table)), [dict(row) for row in part])


def _rows(table: type[Base]) -> Any:
    """The table itself: rows of it need not be made objects."""
    return table.__table__
