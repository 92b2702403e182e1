"""A store as Python sees it: one method per stage, each one call to the stage of its name.

>>> with Store.open("my-screen") as store:
...     store.segment()
...     store.measure()
...     store.sql("SELECT count(*) AS cells FROM cells").to_pandas()

Stages are imported when they are called, so that a store opens without torch or Cellpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .asking import Answers
from .config import (
    EVERYTHING,
    THIS_PROCESS,
    BaselineParams,
    FinetuneParams,
    IngestParams,
    MeasureParams,
    PredictParams,
    QcParams,
    Resources,
    SegmentParams,
    Selection,
    SplitParams,
    TrainParams,
    TrainSetup,
)
from .enums import PERTURBATION, GroupLevel, Subset
from .progress import Progress
from .settings import StoreSettings, find_store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .analysis.features import FeatureGroup
    from .jobs.execute import JobsResult
    from .jobs.workspace import Workspace
    from .report.segment_preview import PreviewResult
    from .stages.finetune import FinetuneResult
    from .stages.ingest.ingest import IngestResult, RefreshResult
    from .stages.manage_jobs import JobsList, RetryResult
    from .stages.measure import MeasureResult
    from .stages.predict import PredictResult
    from .stages.qc import FlaggedImage, QcResult
    from .stages.split import CheckResult, Deleted, SplitLine, SplitResult
    from .stages.train import TrainResult
    from .stages.train_baselines import BaselineResult


class Store(Answers):
    """An open store. Use it in a ``with`` block, or call :meth:`close`."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        database: str | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Open the store at ``path``, else of ``CELLSTORE_STORE``, else the nearest upwards.

        ``database`` is a URL that replaces the one written in the store.

        Raises:
            StoreNotFoundError: there is none.
            SchemaError: its schema is not the one of this library.
            DatabaseError: its database cannot be reached.

        """
        from .jobs.workspace import open_workspace

        settings = _with_database(find_store(Path(path) if path else None), database)
        return cls(open_workspace(settings, progress))

    @classmethod
    def create(cls, path: str | Path, database: str | None = None) -> Self:
        """Make a store in the folder ``path``; an existing one is opened as it is.

        Raises:
            StorageError: the folder cannot be written.
            SchemaError: the database holds a store of another version.

        """
        from .jobs.workspace import create_workspace

        return cls(create_workspace(Path(path), database)[0])

    @property
    def root(self) -> Path:
        """The folder of the store."""
        return self.workspace.settings.root

    def session(self) -> AbstractContextManager[Session]:
        """Open a database session for reading with the classes of :mod:`cellstore.models`.

        Writing goes through the other methods, which keep files, rows and lineage together.
        """
        return self.workspace.database.read()

    def close(self) -> None:
        """Give the database connections back."""
        self.workspace.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ingest(self, source: str | Path, params: IngestParams | None = None) -> IngestResult:
        """Bring a table, an index, a database or a folder in; see ``stages.ingest.ingest``."""
        from .stages.ingest.ingest import ingest

        return ingest(self.workspace, Path(source), params)

    def refresh(self, selection: Selection = EVERYTHING) -> RefreshResult:
        """Look again at the image files that are known; see ``stages.ingest.refresh``."""
        from .stages.ingest.ingest import refresh

        return refresh(self.workspace, selection)

    def segment(
        self,
        params: SegmentParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        weights_dir: str | Path | None = None,
        device: str = "auto",
        resources: Resources = THIS_PROCESS,
        dry_run: bool = False,
    ) -> JobsResult:
        """Find the cells of every image not done yet; see ``stages.segment.segment``."""
        from .stages.segment import segment

        return segment(
            self.workspace,
            params or SegmentParams(),
            selection,
            weights_dir=_path(weights_dir),
            device=device,
            resources=resources,
            dry_run=dry_run,
        )

    def preview(
        self,
        params: SegmentParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        count: int = 6,
        folder: str | Path,
        weights_dir: str | Path | None = None,
        device: str = "auto",
    ) -> PreviewResult:
        """Segment a few images and draw what is found; see ``stages.segment.preview``."""
        from .report.segment_preview import preview

        return preview(
            self.workspace,
            params or SegmentParams(),
            selection,
            count=count,
            folder=Path(folder),
            weights_dir=_path(weights_dir),
            device=device,
        )

    def measure(
        self,
        params: MeasureParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        segmentation: str | None = None,
        resources: Resources = THIS_PROCESS,
        dry_run: bool = False,
    ) -> MeasureResult:
        """Measure the cells of every image not done yet; see ``stages.measure.measure``."""
        from .stages.measure import measure

        return measure(
            self.workspace,
            params or MeasureParams(),
            selection,
            segmentation=segmentation,
            resources=resources,
            dry_run=dry_run,
        )

    @staticmethod
    def feature_groups() -> tuple[FeatureGroup, ...]:
        """Return what can be measured: every group with its features."""
        from .stages.measure import list_groups

        return list_groups()

    def qc(
        self,
        params: QcParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        segmentation: str | None = None,
        html: str | Path | None = None,
        plot: str | Path | None = None,
        resources: Resources = THIS_PROCESS,
        dry_run: bool = False,
    ) -> QcResult:
        """Flag what is odd on each plate; see ``stages.qc.qc``.

        ``html`` is a page with maps of the plates, ``plot`` a PNG with those of one plate.
        """
        from .extras import need
        from .report.qc_page import write_page, write_picture
        from .stages.qc import qc

        if html is not None or plot is not None:
            need("report")  # said before an hour of work, not after it
        result = qc(
            self.workspace,
            params,
            selection,
            segmentation=segmentation,
            resources=resources,
            dry_run=dry_run,
        )
        if html is not None:
            result = write_page(self.workspace, result, Path(html))
        if plot is not None:
            result = write_picture(self.workspace, result, Path(plot))
        return result

    def flagged_images(self, result: QcResult) -> tuple[FlaggedImage, ...]:
        """Return every flag of an image behind a result of :meth:`qc`."""
        from .stages.qc import list_flags

        return list_flags(self.workspace, result)

    def jobs(
        self,
        *,
        stage: str | None = None,
        status: str | None = None,
        recipe: str | None = None,
        limit: int = 100,
    ) -> JobsList:
        """List jobs, the newest first, and count them all; see ``stages.jobs.list_jobs``."""
        from .stages.manage_jobs import list_jobs

        return list_jobs(self.workspace, stage=stage, status=status, recipe=recipe, limit=limit)

    def retry(
        self, *, stage: str | None = None, run: str | None = None, image: str | None = None
    ) -> RetryResult:
        """Give failed jobs another try; see ``stages.jobs.retry``."""
        from .stages.manage_jobs import retry

        return retry(self.workspace, stage=stage, run=run, image=image)

    def cancel(self, run: str | None = None) -> tuple[int, ...]:
        """Ask running runs to end when what they have in hand is done; return their numbers."""
        from .stages.manage_jobs import cancel

        return cancel(self.workspace, run)

    def finetune(
        self,
        masks: Sequence[str | Path],
        params: FinetuneParams | None = None,
        *,
        plate: str | None = None,
        weights_dir: str | Path | None = None,
        device: str = "auto",
    ) -> FinetuneResult:
        """Train a segmentation network on corrected masks; see ``stages.finetune.finetune``."""
        from .stages.finetune import finetune

        return finetune(
            self.workspace,
            [Path(path) for path in masks],
            params or FinetuneParams(),
            plate=plate,
            weights_dir=_path(weights_dir),
            device=device,
        )

    def create_split(self, name: str, params: SplitParams | None = None) -> SplitResult:
        """Assign the images to train, validation and test; see ``stages.split.create_split``."""
        from .stages.split import create_split

        return create_split(self.workspace, name, params or SplitParams())

    def create_folds(self, name: str, params: SplitParams) -> tuple[SplitResult, ...]:
        """Make the splits of a cross-validation; see ``stages.split.create_folds``."""
        from .stages.split import create_folds

        return create_folds(self.workspace, name, params)

    def import_split(
        self,
        name: str,
        tables: Sequence[str | Path],
        *,
        field: str = PERTURBATION,
        group_level: GroupLevel = GroupLevel.IMAGE,
        allow_missing: bool = False,
    ) -> SplitResult:
        """Keep a split that tables of others say; see ``stages.split.import_split``."""
        from .stages.split import import_split

        paths = [Path(path) for path in tables]
        return import_split(self.workspace, name, paths, field, group_level, allow_missing)

    def list_splits(self) -> tuple[SplitLine, ...]:
        """Return all splits with their sides, the oldest first."""
        from .stages.split import list_splits

        return list_splits(self.workspace)

    def show_split(self, name: str | None = None) -> SplitResult:
        """Return a split by name, else the latest."""
        from .stages.split import show_split

        return show_split(self.workspace, name)

    def check_split(self, name: str | None = None) -> CheckResult:
        """Return every way in which a split lets the test side be seen in training."""
        from .stages.split import check_split

        return check_split(self.workspace, name)

    def deletable_split(self, name: str) -> Deleted:
        """Return which splits :meth:`delete_split` would delete, and refuse where it would."""
        from .stages.split import find_deletable

        return find_deletable(self.workspace, name)

    def delete_split(self, name: str) -> Deleted:
        """Delete a split, or all folds of a family, that no run uses."""
        from .stages.split import delete_split

        return delete_split(self.workspace, name)

    def train(
        self,
        params: TrainParams | None = None,
        *,
        split: str | None = None,
        segmentation: str | None = None,
        measurement: str | None = None,
        device: str = "auto",
        setup: TrainSetup | None = None,
        force: bool = False,
        resume: str | None = None,
    ) -> TrainResult:
        """Train a network on the training side of a split; see ``stages.train.train``."""
        from .stages.train import train

        return train(
            self.workspace,
            params or TrainParams(),
            split=split,
            segmentation=segmentation,
            measurement=measurement,
            device=device,
            setup=setup or TrainSetup(),
            force=force,
            resume=resume,
        )

    def train_baselines(
        self,
        kinds: Sequence[str],
        params: BaselineParams | None = None,
        *,
        split: str | None = None,
        segmentation: str | None = None,
        measurement: str | None = None,
        force: bool = False,
        predict: bool = True,
    ) -> tuple[BaselineResult, ...]:
        """Train baselines and label the test side; see ``stages.baselines.train_baselines``.

        Without a test side, or without ``predict``, nothing is labelled.
        """
        from .stages.train_baselines import train_baselines

        results = train_baselines(
            self.workspace,
            kinds,
            params or BaselineParams(),
            split=split,
            segmentation=segmentation,
            measurement=measurement,
            force=force,
        )
        if not predict or not self.show_split(results[0].split).counts.get(Subset.TEST):
            return results
        return tuple(
            replace(item, predict_run_id=self.predict(run=str(item.run_id), device="cpu").run_id)
            for item in results
        )

    def predict(
        self, params: PredictParams | None = None, *, run: str = "latest", device: str = "auto"
    ) -> PredictResult:
        """Label cells with a trained run; see ``stages.predict.predict``."""
        from .stages.predict import predict

        return predict(self.workspace, params or PredictParams(), run=run, device=device)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _with_database(settings: StoreSettings, database: str | None) -> StoreSettings:
    return settings if database is None else replace(settings, database=database)
