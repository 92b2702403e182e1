"""A store as Python sees it: one method per stage, each one call to the stage of its name.

>>> with Store.open("my-screen") as store:
...     store.segment()
...     store.measure()
...     store.sql("SELECT count(*) AS cells FROM cells").to_pandas()

Stages are imported when they are called, so that a store opens without torch or Cellpose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from .config import (
    EVERYTHING,
    THIS_PROCESS,
    AddedParams,
    ApplyParams,
    BaselineParams,
    CellChoice,
    FinetuneParams,
    HitsParams,
    IngestParams,
    Limits,
    MeasureParams,
    PredictParams,
    ProfileParams,
    QcParams,
    Resources,
    RunName,
    SegmentParams,
    Selection,
    Sources,
    SplitParams,
    TrainParams,
    TrainSetup,
    VoteOptions,
    checked,
    fitted,
)
from .enums import ANNOTATION, PERTURBATION, GroupLevel, Subset
from .errors import UnknownNameError, UserInputError, first_line
from .settings import Progress, find_store, need, track

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray
    from sqlalchemy.orm import Session

    from .analysis.leaks import SplitCheck
    from .analysis.well_profiles import WellProfiles
    from .jobs.execute import JobsResult
    from .jobs.workspace import Workspace
    from .learn.datasets import CellDataset
    from .notebooks import Rows
    from .query.cell_tables import CellTable
    from .query.describe import RelationWords
    from .query.engine import Questions
    from .query.saved_queries import SavedQuestion
    from .report.audit import Audit
    from .report.comparison import Comparison, HitsComparison
    from .report.event_log import EventLog
    from .report.leaderboard import Leaderboard
    from .report.redo import Check
    from .report.repro import Repro, RunOptions
    from .report.scoring import ReportResult
    from .report.segment_preview import PreviewResult
    from .report.votes import VotesResult
    from .stages.apply import ApplyResult
    from .stages.backup import Backup
    from .stages.correct_masks import CorrectedMasks
    from .stages.corrections import Correction
    from .stages.export import ExportedProfiles, ExportResult
    from .stages.export_crops import ExportedCrops
    from .stages.export_model import ExportedModel
    from .stages.finetune import FinetuneResult
    from .stages.hits import HitsResult
    from .stages.ingest.ingest import IngestResult, RefreshResult, RelocateResult
    from .stages.manage_jobs import JobsList, RetryResult
    from .stages.measure import MeasureResult
    from .stages.own_models import AddedEmbeddings, AddedPredictions
    from .stages.predict import PredictResult
    from .stages.profile import ProfileResult
    from .stages.qc import QcResult
    from .stages.split import Deleted, SplitLine, SplitResult
    from .stages.status import StatusResult
    from .stages.train import TrainResult
    from .stages.train_baselines import BaselineResult
    from .stages.verify import VerifyResult


@checked
@dataclass(frozen=True)
class Store(AbstractContextManager["Store"]):
    """An open store. Use it in a ``with`` block, or call :meth:`close`.

    All methods raise UnknownNameError where nothing has the name that was given (the message says
    what there is), MissingExtraError where an extra is not installed, and StorageError where a file
    cannot be read or written. Each names what else it raises.
    """

    workspace: Workspace = field(repr=False)  # its URL may have secrets

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def _repr_html_(self) -> str:
        from .notebooks import html_of

        found = self.status()
        names = ("database", "plates", "wells", "images", "segmented", "measured", "cells")
        counts = {name: getattr(found, name) for name in (*names, "splits", "runs", "predictions")}
        return html_of({**counts, "next": " or ".join(found.next)}, f"Store {self.root}")

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

        settings = find_store(Path(path) if path else None)
        if database is not None:
            settings = replace(settings, database=database)
        return cls(open_workspace(settings, progress))

    @classmethod
    def create(cls, path: str | Path, database: str | None = None) -> Self:
        """Make a store in the folder ``path``; an existing one is opened as it is.

        Raises:
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

    def __exit__(self, *_: object) -> None:
        self.workspace.database.close()

    def close(self) -> None:
        """Give the database connections back."""
        self.__exit__()

    def ingest(
        self, source: str | Path, params: IngestParams | None = None, *, dry_run: bool = False
    ) -> IngestResult:
        """Bring a source in: a table, an index, a database, or a folder of images, maps or masks.

        ``params`` say how to read it: the plate, the plate map, where images are. Doing it again
        changes nothing. Returns how many rows were created, updated, unchanged and refused, with
        the reasons (``issues``), and what it has brought (``plates``, ``wells``, ``images``).
        ``dry_run``: nothing is written, and the result is what would be.

        >>> store.ingest("images/", IngestParams(plate=("P1",), platemap=Path("map.xlsx")))

        Raises:
            BadTableError: the source is empty, damaged or ambiguous, or lacks columns.
            MissingExtraError: masks, and scikit-image is not installed.
            UserInputError: a file or folder is not there, or the plate is not known.
        """
        from .stages.ingest.ingest import ingest

        return ingest(self.workspace, source, params, dry_run=dry_run)

    def refresh(self, selection: Selection = EVERYTHING) -> RefreshResult:
        """Compare the image files of a selection with what is known of them.

        What was derived from bytes that have changed is stale from now on: the next run of its
        stage makes it anew. Returns how many images were looked at and have changed, with problems.

        >>> store.refresh(Selection(plates=("P1",)))
        """
        from .stages.ingest.ingest import refresh

        return refresh(self.workspace, selection)

    def relocate(
        self,
        old: str,
        new: str,
        *,
        dry_run: bool = False,
        reason: str | None = None,
    ) -> RelocateResult:
        """Say that the folders whose names begin with ``old`` begin with ``new`` from now on.

        Every file must be there, of the same size and time or else the same content. All or
        nothing; ``dry_run`` only looks. Returns the folders and how many files they hold.

        >>> store.relocate("/mnt/old", "s3://bucket/new")

        Raises:
            UserInputError: a file is not in the new folder, or is another one there.
        """
        from .stages.ingest.ingest import relocate

        return relocate(self.workspace, old, new, dry_run=dry_run, reason=reason)

    def segment(
        self,
        params: SegmentParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        device: str = "auto",
        resources: Resources = THIS_PROCESS,
    ) -> JobsResult:
        """Find the cells of the images of a selection that have their files, with Cellpose.

        What is done by the same ``params`` is left alone, so that the same call goes on after an
        interruption. ``device``: ``auto``, ``cpu`` or ``cuda``. ``resources``: processes, or a
        Dask cluster. Returns the run (``run_id``), how many images were ``done``, the ``cells``
        found, and ``failures`` as (image, reason).

        >>> store.segment(SegmentParams(channels=("DNA",), diameter=35), Selection(limit=5))

        Raises:
            UserInputError: no such model, plate, recipe or channel, or a value out of range.
        """
        from .stages.segment import segment

        return segment(
            self.workspace,
            params or SegmentParams(),
            selection,
            device=device,
            resources=resources,
        )

    def preview(
        self,
        params: SegmentParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        count: int = 6,
        folder: str | Path,
        device: str = "auto",
    ) -> PreviewResult:
        """Segment ``count`` images of a selection and draw what is found, without keeping it.

        The pictures go into ``folder``. The same selection gives the same images. Returns the
        images with their number of cells, and ``sheet``, a picture of all of them.

        >>> store.preview(SegmentParams(diameter=35), folder="preview")

        Raises:
            UserInputError, MissingExtraError: as :meth:`segment`.
        """
        from .report.segment_preview import preview

        made = preview(
            self.workspace,
            params or SegmentParams(),
            selection,
            count=count,
            folder=Path(folder),
            device=device,
        )
        self.wrote(folder)
        return made

    def measure(
        self,
        params: MeasureParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        segmentation: str | None = None,
        resources: Resources = THIS_PROCESS,
    ) -> MeasureResult:
        """Measure the cells that one segment recipe has found (default: the one used last).

        ``params``: groups of features, and the channels. What is done is left alone. Returns the
        run, the number of images ``done`` and of ``cells``, ``failures``, and the name of the
        ``feature_set``; with several groups that of the others in ``others``.

        >>> store.measure(MeasureParams(features=("basic", "texture"))).feature_set

        Raises:
            UserInputError: the masks of the cells are unknown.
        """
        from .stages.measure import measure

        return measure(
            self.workspace,
            params or MeasureParams(),
            selection,
            segmentation=segmentation,
            resources=resources,
        )

    def qc(
        self,
        params: QcParams | None = None,
        selection: Selection = EVERYTHING,
        *,
        segmentation: str | None = None,
        html: str | Path | None = None,
        resources: Resources = THIS_PROCESS,
    ) -> QcResult:
        """Flag images and cells that are odd beside the others of their plate.

        ``html`` is a page with maps of the plates. Returns the run, which other steps take as
        ``exclude_flagged``, and what was flagged on each plate (``plates``).

        >>> store.qc(html="qc.html")
        >>> store.train(TrainParams(exclude_flagged="latest"))

        Raises:
            UserInputError: a limit is out of range, or a condition cannot be read.
        """
        from .report.qc_page import write_page
        from .stages.qc import qc

        if html is not None:
            need("report")  # said before an hour of work, not after it
        result = qc(
            self.workspace,
            params,
            selection,
            segmentation=segmentation,
            resources=resources,
        )
        if html is not None:
            result = write_page(self.workspace, result, Path(html))
        self.wrote(html)
        return result

    def jobs(
        self,
        *,
        stage: str | None = None,
        status: str | None = None,
        image: str | None = None,
        limit: int = 100,
    ) -> JobsList:
        """List jobs (an image in a stage), the newest first, and count them all by recipe.

        ``status``: waiting, running, done, failed or cancelled; ``image``: a name such as
        ``PLATE/A01/1``. Returns ``counts`` and the first ``limit`` of ``jobs`` with their errors.

        >>> store.jobs(status="failed")
        """
        from .stages.manage_jobs import list_jobs

        return list_jobs(self.workspace, stage=stage, status=status, image=image, limit=limit)

    def retry(
        self, *, stage: str | None = None, run: RunName | None = None, image: str | None = None
    ) -> RetryResult:
        """Open the failed jobs of a stage, a run or an image (default: all) for another try.

        Returns how many, and the commands that do them.

        >>> store.retry(run=5)
        """
        from .stages.manage_jobs import retry

        return retry(self.workspace, stage=stage, run=run, image=image)

    def cancel(self, run: RunName | None = None) -> tuple[int, ...]:
        """Ask running runs (default: all) to end when what they have in hand is done.

        Returns their numbers. What is done is kept.

        Raises:
            UserInputError: it is over, or is of a stage that does not listen.
        """
        from .stages.manage_jobs import cancel

        return cancel(self.workspace, run)

    def finetune(
        self,
        masks: Sequence[str | Path],
        params: FinetuneParams | None = None,
        *,
        plate: str | None = None,
        device: str = "auto",
    ) -> FinetuneResult:
        """Train a segmentation network further on masks that you have corrected.

        ``masks``: files and folders of label images, which find their image by name. A part of the
        wells is held out. Returns the run, whose network is ``model="run:N"`` of
        :class:`SegmentParams`, and the score ``before`` and ``after`` on the wells held out.

        >>> made = store.finetune(["corrected/"])
        >>> store.segment(SegmentParams(model=made.model))

        Raises:
            UserInputError: no usable masks; no such model, plate or channel.
        """
        from .stages.finetune import finetune

        return finetune(
            self.workspace,
            [Path(path) for path in masks],
            params or FinetuneParams(),
            plate=plate,
            device=device,
        )

    def create_split(self, name: str, params: SplitParams | None = None) -> SplitResult:
        """Assign the images that have a treatment to train, validation and test, under a name.

        Whole wells stay together unless ``params`` say otherwise. The same images and parameters
        give the same split. Returns it: how many images and ``classes``, ``counts`` by subset, what
        is ``excluded`` and why.

        >>> store.create_split("by-well", SplitParams(test_size=0.25, seed=1))

        Raises:
            UserInputError: the name is taken by another split, or the images cannot be split so.
        """
        from .stages.split import create_split

        return create_split(self.workspace, name, params or SplitParams())

    def create_folds(self, name: str, params: SplitParams) -> tuple[SplitResult, ...]:
        """Make the splits ``NAME-1`` to ``NAME-k`` of a cross-validation, all or none.

        Each image is in the test of one of them. With ``leave_out`` each tests one plate, or one
        value of a column. :meth:`train` takes their common name. Returns the splits.

        >>> store.create_folds("cv", SplitParams(folds=5))

        Raises:
            UserInputError, UnknownNameError: as :meth:`create_split`.
        """
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
        """Keep a split that tables of others say: which images train, validate and test.

        A row names images by plate, well and site, as far as it says them, or by treatment.
        ``field``: what is predicted. ``group_level``: what the split promises to keep together
        (``well``, ``plate``), which is checked; ``image``: nothing. Returns the split.

        >>> store.import_split("theirs", ["train.csv", "test.csv"])

        Raises:
            UserInputError: the name is taken, no row has an image, or an image is in two subsets.
            BadTableError: no table says the subsets, or of what.
        """
        from .stages.split import import_split

        paths = [Path(path) for path in tables]
        return import_split(self.workspace, name, paths, field, group_level, allow_missing)

    def list_splits(self) -> Rows[SplitLine]:
        """Return all splits with their subsets, the oldest first.

        >>> pandas.DataFrame(store.list_splits())
        """
        from .notebooks import Rows
        from .stages.split import list_splits

        return Rows(list_splits(self.workspace))

    def show_split(self, name: str | None = None) -> SplitResult:
        """Return a split by name, else the latest."""
        from .stages.split import show_split

        return show_split(self.workspace, name)

    def check_split(self, name: str | None = None) -> SplitCheck:
        """Return every way in which a split lets test images be seen in training."""
        from .stages.split import check_split

        return check_split(self.workspace, name)

    def delete_split(self, name: str, *, dry_run: bool = False) -> Deleted:
        """Delete a split, or all folds of a family, that no run uses; or say what would go."""
        from .stages.split import delete_split

        return delete_split(self.workspace, name, dry_run=dry_run)

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
    ) -> TrainResult:
        """Train a network on the training images of a split, and keep its best epoch.

        ``split``: its name; default: the latest. It may be a cross-validation (also where it is the
        latest that was made): then a network is trained on each fold, one after the other, and
        labels the test images of its fold; ``report`` and ``compare`` read them under its name.
        ``segmentation``, ``measurement``: recipes, as ``status`` lists them; default: those used
        last. ``setup``: GPUs and logs. What was finished with the same recipe is returned as it is,
        unless ``force``; what was interrupted goes on by the same call. Returns the run
        (``run_id``), ``epochs``, ``metrics`` of each, the ``best_epoch``.

        >>> trained = store.train(TrainParams(epochs=20, backbone="resnet18"), split="by-well")
        >>> store.predict(run=trained.run_id)
        >>> pandas.DataFrame(trained.metrics)

        Raises:
            UserInputError: a subset has no measured cells, or another process trains it.
            RunCancelledError: :meth:`cancel` has ended it.
        """
        from .stages.split import folds_of
        from .stages.train import train

        params, setup = params or TrainParams(), setup or TrainSetup()
        made: list[TrainResult] = []
        folds = folds_of(self.workspace, split)
        if folds and (setup.devices > 1 or "LOCAL_RANK" in os.environ):  # set by launchers
            raise UserInputError(
                "Folds are trained one after the other, by one process. Train each with several: "
                f"--split {folds[0]} and so on; then all by their common name."
            )
        for name in self._each(folds) if folds else [split]:
            result = train(
                self.workspace,
                params,
                split=name,
                segmentation=segmentation,
                measurement=measurement,
                device=device,
                setup=setup,
                force=force,
            )
            if folds:
                labelled = self.predict(run=result.run_id, device=device)
                result = replace(result, predict_run_id=labelled.run_id)
            made.append(result)
        if not folds:
            return made[0]
        return replace(
            made[-1],
            split=folds[0].rpartition("-")[0],
            already_done=all(fold.already_done for fold in made),
            notes=tuple(dict.fromkeys(note for fold in made for note in fold.notes)),
            folds=tuple(made),
        )

    def _each(self, folds: Sequence[str]) -> Iterator[str]:
        """Yield the folds, and say which one it is."""
        progress = self.workspace.progress
        for number, fold in enumerate(track(progress, "fold", len(folds), folds), start=1):
            progress.note(f"fold {number} of {len(folds)}: {fold}")
            yield fold

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
        """Train baselines on the training images of a split, and label the test images.

        ``kinds``: such as ``majority``, ``logistic``, ``forest``, ``null`` (all that look at no
        cell) or ``all``. Without test images, or without ``predict``, nothing is labelled. Returns
        a result for each, of a cross-validation for each fold and baseline, with ``run_id`` and
        ``predict_run_id``.

        >>> store.train_baselines(["null", "forest"], split="by-well")

        Raises:
            UserInputError: the training images have no measured cells, or one class.
        """
        from .stages.split import folds_of
        from .stages.train_baselines import train_baselines

        folds = folds_of(self.workspace, split)
        made: list[BaselineResult] = []
        for name in self._each(folds) if folds else [split]:
            results = train_baselines(
                self.workspace,
                kinds,
                params or BaselineParams(),
                split=name,
                segmentation=segmentation,
                measurement=measurement,
                force=force,
            )
            if predict and self.show_split(results[0].split).counts.get(Subset.TEST):
                labelled = [self.predict(run=item.run_id, device="cpu") for item in results]
                results = tuple(
                    replace(item, predict_run_id=found.run_id)
                    for item, found in zip(results, labelled, strict=True)
                )
            made += results
        return tuple(made)

    def predict(
        self, params: PredictParams | None = None, *, run: RunName = "latest", device: str = "auto"
    ) -> PredictResult:
        """Label cells with the model of a training run; by default the test images of its split.

        ``run``: its number or ``latest``. Rows are appended, never changed; an interrupted call
        goes on. Returns the predict run (``run_id``), which :meth:`report` and :meth:`votes` take,
        and how many images were ``done``.

        >>> store.predict(run=5)
        >>> store.predict(PredictParams(subset=None, plates=("P7",)), run=5)

        Raises:
            UserInputError: none of the images has measured cells, or the model cannot read them.
        """
        from .stages.predict import predict

        return predict(self.workspace, params or PredictParams(), run=run, device=device)

    def profile(
        self,
        params: ProfileParams | None = None,
        *,
        segmentation: str | None = None,
        measurement: str | None = None,
        force: bool = False,
    ) -> ProfileResult:
        """Average the cells of each well, and compare wells with the controls of their plate.

        Returns how many ``wells`` and ``features`` the profiles have, and why other features went;
        :meth:`profiles` reads them. ``force``: also where they were made of the same cells before.

        >>> store.profile(ProfileParams(average="mean", positions="median-polish"))

        Raises:
            UserInputError: there is no measured cell, no control, or no feature is left.
        """
        from .stages.profile import profile

        return profile(
            self.workspace,
            params,
            segmentation=segmentation,
            measurement=measurement,
            force=force,
        )

    def profiles(self, run: RunName = "latest") -> WellProfiles:
        """Return the profiles of a profile run (its number, or ``latest``).

        ``table`` says of each well its plate, position, treatment, control and number of cells,
        ``values`` (wells, features) are its numbers, ``columns`` the names of the features.

        >>> store.profiles().to_pandas()

        Raises:
            UserInputError: it did not come to its end.
        """
        from .stages.profile import open_profiles

        return open_profiles(self.workspace, run)[1]

    def hits(
        self,
        params: HitsParams | None = None,
        *,
        html: str | Path | None = None,
        force: bool = False,
    ) -> HitsResult:
        """Say which treatments differ from the controls of their plates, how surely, and how much.

        The wells are those of a profile run; see :meth:`profile`. Returns a row for each treatment
        with its dose in ``rows``, hits first, by effect, each with its verdict and the reason;
        whether hits of one target look alike in ``targets``, and dose curves in ``doses``.
        ``html``: also a page with pictures. ``force``: compare again, even if nothing has changed.

        >>> pandas.DataFrame(store.hits(HitsParams(q=0.1)).rows)

        Raises:
            UserInputError: there is no control, nothing to compare it with, or no profile.
        """
        from .stages.hits import hits

        found = hits(self.workspace, params or HitsParams(), force=force)
        if html is not None:
            from .report.hits_page import write_hits_page

            write_hits_page(self.workspace, found.run_id, Path(html))
            found = replace(found, html=str(html))
            self.wrote(Path(html))
        return found

    def report(
        self,
        run: RunName = "latest",
        *,
        compare: RunName | None = None,
        vote_options: VoteOptions | None = None,
        html: str | Path | None = None,
        force: bool = False,
    ) -> ReportResult:
        """Score a predict run (its number, or ``latest``) against the labels of its split.

        ``compare``: another run to put beside it. ``vote_options``: which images have an answer.
        ``html``: also a page. Images that the network was trained on count only with ``force``, and
        the result says so. Returns the ``scores`` by level (cell, image, well) and vote with
        intervals over wells, those of classes, plates and wells, and what baselines reach;
        ``score(level, vote)`` gives one.

        >>> store.report(6).score("image", "hard").accuracy
        >>> pandas.DataFrame(store.report(6, html="report.html").scores)

        Raises:
            UserInputError: the run has labelled nothing, or only what it was trained on.
        """
        from .report.scoring import report

        look = None
        if html is not None:
            need("report")
            from .report.report_page import write_page

            look = partial(write_page, self.workspace, path=Path(html))
        found = report(
            self.workspace,
            run,
            compare=compare,
            vote_options=vote_options,
            force=force,
            look=look,
        )
        if html is None:
            return found
        self.wrote(Path(html))
        return replace(found, html=str(html))

    def cells(
        self,
        split: str | None = None,
        subset: str | None = None,
        *,
        features: str | bool = True,
        segmentation: str | None = None,
        measurement: str | None = None,
        exclude_flagged: str | None = None,
        where: str | None = None,
        sql: str | None = None,
    ) -> CellTable:
        """Return the cells of a split as a table: plate, well, site, label, box, features.

        ``subset``: train, validation or test; ``None``: all. ``features``: the built-in ones
        (``True``), a feature set by name, or none (``False``). Cells that are excluded are not
        among them. Centres and boxes are in pixels. ``where``: only cells that meet a condition,
        ``sql``: only those that a SELECT (or a file with one) gives as ``cell_id``, or all of the
        images that it gives as ``image_id``; see docs/training.md.

        >>> store.cells("by-well", "train").to_pandas()
        >>> store.cells("by-well", "train", where="area > 500 AND plate = 'P1'").to_pandas()

        Raises:
            UserInputError: nothing is measured yet, or the recipes do not belong together.
            QueryError: the SQL is wrong.
        """
        from .query.cell_tables import cell_table

        named = features if isinstance(features, str) else None
        return cell_table(
            self.workspace,
            Sources(split, segmentation, measurement),
            fitted("subset", Subset | None, subset),
            CellChoice(named, exclude_flagged, where, sql),
            with_features=bool(features),
        )

    def dataset(
        self,
        split: str | None = None,
        subset: str = "train",
        *,
        unit: str = "cell",
        channels: Sequence[str] = (),
        crop: int | None = None,
        mask: bool = False,
        features: str | bool = False,
        sampler: str = "cells",
        shuffle: bool | None = None,
        seed: int = 0,
        intensity: str = "plate",
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        segmentation: str | None = None,
        measurement: str | None = None,
        exclude_flagged: str | None = None,
        where: str | None = None,
        sql: str | None = None,
    ) -> CellDataset:
        """Return the cells of a subset of a split as a data set for torch's ``DataLoader``.

        ``unit="image"``: its whole images. ``channels``: those of the crops; default: all.
        ``crop``: their height and width in pixels; default: 96, of whole images what they have.
        ``mask``: also which pixels are of the cell. ``features``: also its measurements, the
        built-in ones (``True``) or a feature set by name. ``sampler``: each cell once (``cells``),
        all classes alike (``classes``), or the largest class only as often as the second
        (``capped``). ``shuffle``: default: the training subset only. ``intensity``: crops are
        divided by the scale of their plate, or of their image. ``transform`` is called with each
        item. ``where`` and ``sql`` select cells, as in :meth:`cells`. See
        ``learn.datasets.CellDataset`` for what an item holds.

        >>> from torch.utils.data import DataLoader
        >>> cells = store.dataset("by-well", "train", channels=["DNA", "RNA"])
        >>> loader = DataLoader(cells, batch_size=64, num_workers=2, persistent_workers=True)

        Raises:
            UserInputError: there are no cells, or what was asked for is not known of all of them.
        """
        need("train")
        from .learn.datasets import cell_dataset

        if unit not in ("cell", "image"):
            raise UnknownNameError.of("unit", unit, ("cell", "image"))
        asked = {"mask": mask, "image": True, "tabular": features}
        params = TrainParams(
            features=features if isinstance(features, str) else None,
            branches=tuple(name for name, wanted in asked.items() if wanted),
            channels=tuple(channels),
            crop_size=96 if crop is None else crop,
            sampler=sampler,
            intensity=intensity,
            seed=seed,
            exclude_flagged=exclude_flagged,
            where=where,
            sql=sql,
        )
        return cell_dataset(
            self.workspace,
            Sources(split, segmentation, measurement),
            fitted("subset", Subset | None, subset) or Subset.TRAIN,
            params,
            unit=unit,
            crop=params.crop_size if unit == "cell" else crop,
            shuffle=shuffle,
            transform=transform,
        )

    def show(
        self,
        what: Any = None,
        *,
        by: str | None = "treatment",
        n: int | None = None,
        channels: Sequence[str] = (),
        numbers: Sequence[str] = (),
        outlines: bool = True,
        seed: int = 0,
    ) -> NDArray[Any]:
        """Draw cells, or whole fields, beside their numbers; return matplotlib's axes.

        ``what``: nothing (cells of each treatment), ids of cells, a table with ``cell_id`` or
        ``image_id`` (of pandas or polars, or :meth:`cells`), a condition in SQL on ``cell_table``,
        names of images (``"PLATE/A01/1"``), or a ``Selection`` of images. Each line is a group:
        ``by`` names a column of ``cell_table`` (of fields: ``image_table``), or of your table;
        beside each treatment stand negative controls of the same plates. ``n``: pictures of a
        group. ``channels``: each in a colour of its own; default: the plane that was segmented,
        in grey. ``numbers``: the columns whose values are written below. All pictures of a plate
        have the same black and white, and all cells the same size of window. The same ``seed``
        draws the same cells.

        >>> axes = store.show(channels=["DNA", "ER"])
        >>> store.show("area > 900 AND plate = 'P1'", numbers=["area", "solidity"])
        >>> axes[0, 0].figure.savefig("cells.png")

        Raises:
            UserInputError: there is nothing to show.
            CellstoreError: none of the images can be read; the problem of the first.
        """
        from .report.gallery import show

        return show(
            self.workspace,
            what,
            by=by,
            n=n,
            channels=channels,
            numbers=numbers,
            outlines=outlines,
            seed=seed,
        )

    def add_predictions(
        self,
        table: Any,
        name: str,
        *,
        split: str | None = None,
        model: str | Path | None = None,
        trained_on: Sequence[str] | None = None,
        segmentation: str | None = None,
        note: str | None = None,
        mlflow_run: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        query: str | CellTable | None = None,
    ) -> AddedPredictions:
        """Keep what a model that is not of cellstore says of cells, as a run with its lineage.

        ``table``: a file, or a table of pandas, polars or Arrow, with a row for each cell and class
        (``cell_id``, ``label``, ``probability``), or a column for each class; or a row for each
        image (``plate``, ``well``, ``site``). ``trained_on``: the subsets of the split that the
        model has learned from; empty: none; ``None``: not known. ``model``: the file of its
        weights. ``parameters`` of the model are kept with the run, as are the id of an
        ``mlflow_run``, and ``query``, the table (or its SQL) that the model has learned from.
        Returns the run (``run_id``); the same table again adds nothing.

        >>> added = store.add_predictions(table, "my-vit", split="by-well", trained_on=["train"])
        >>> store.report(added.run_id)

        Raises:
            UserInputError: a row cannot be used; then nothing is written.
            BadTableError, StorageError: a file cannot be read.
        """
        from .stages.own_models import add_predictions

        named = [trained_on] if isinstance(trained_on, str) else trained_on
        params = AddedParams(
            name,
            split=split,
            trained_on=named if named is None else tuple(named),
            model=None if model is None else Path(model),
            segmentation=segmentation,
            note=note,
            mlflow_run=mlflow_run,
        )
        sql = query if query is None or isinstance(query, str) else query.query
        return add_predictions(self.workspace, _table_of(table), params, parameters, sql)

    def add_embeddings(
        self,
        table: Any,
        name: str,
        *,
        cell_ids: Sequence[int] | None = None,
        model: str | Path | None = None,
        segmentation: str | None = None,
        note: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> AddedEmbeddings:
        """Keep numbers that a model that is not of cellstore made of cells, as a feature set.

        ``table``: a file, a table of pandas, polars or Arrow with a row for each cell, or an array
        (N, D) with the ``cell_ids`` (N,) of its rows.

        >>> store.add_embeddings(vectors, "dinov3", cell_ids=frame["cell_id"])

        Raises:
            UserInputError: a row cannot be used, or the set is there already with other rows; then
                nothing is written.
            BadTableError, StorageError: a file cannot be read or written.
        """
        import numpy as np

        from .stages.own_models import add_embeddings

        if cell_ids is not None:
            vectors = enumerate(np.asarray(table).T)
            columns = {f"embedding_{index:03d}": values for index, values in vectors}
            table = {"cell_id": np.asarray(cell_ids), **columns}
        return add_embeddings(
            self.workspace,
            _table_of(table),
            name,
            model=None if model is None else Path(model),
            segmentation=segmentation,
            note=note,
            parameters=parameters,
        )

    def apply(
        self,
        function: Any,
        name: str,
        *,
        gives: str = "embedding",
        device: str = "auto",
        resources: Resources = THIS_PROCESS,
        parameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ApplyResult:
        """Let a function or a model of your own look at the cells, and keep what it returns.

        ``function``: a function, a module of torch, an estimator of scikit-learn, a file
        ``model.onnx``, or ``module:name``. A function gets a dictionary of N cells: ``image``
        (N, C, S, S) float32 from -1 (black) to about 1, ``mask`` (N, 1, S, S), ``features``
        (N, F), ``cell_id`` (N,), and returns (N, D). ``gives``: ``embedding`` or ``features``,
        kept as feature set ``name``; or ``probabilities`` of the classes of the split, kept as a
        run. ``options`` are the fields of ``config.ApplyParams``: what it is given (``channels``,
        ``crop``, ``mask``, ``features``), of which images (``split``, ``subset``, ``plates``,
        ``where``), and what is declared of it (``trained_on``, ``note``). ``parameters`` are kept
        with the run.

        >>> def light(batch):
        ...     return batch["image"].mean(axis=(2, 3))
        >>> store.apply(light, "light", channels=["DNA", "RNA"], crop=32)

        Raises:
            UserInputError: the function is not there, fails, or returns another shape.
        """
        from .stages.apply import apply

        return apply(
            self.workspace,
            function,
            ApplyParams(name=name, **{"gives": gives, **options}),
            device=device,
            resources=resources,
            parameters=parameters,
        )

    def embed(
        self,
        model: str | Path,
        name: str | None = None,
        *,
        mode: str | None = None,
        weights: Path | None = None,
        crop: int | None = None,
        device: str = "auto",
        **options: Any,
    ) -> ApplyResult:
        """Embed the cells with a published network: a feature set ``name`` of them.

        ``model``: ``timm:NAME``, ``torchvision:NAME``, ``hf:OWNER/NAME[@REVISION]``, a name of
        ``learn.embedders.KNOWN``, or a folder with ``config.json`` and ``model.safetensors``.
        ``mode``: what it sees: ``channels`` (each channel by itself in grey, and what it makes of
        them side by side), ``rgb`` (three channels as colours) or ``native`` (all as they are).
        ``weights``: a file that was fetched before. ``crop``: of its input in pixels; default: that
        of its training. ``options`` are those of :meth:`apply` that say which cells and channels.

        >>> store.embed("dinov2-small", channels=["DNA", "RNA"])
        >>> store.train_baselines(["probe"], BaselineParams(features="dinov2_small"))
        """
        need("train")
        from .learn.embedders import name_of, open_embedder

        model = str(model)
        network = open_embedder(model, mode, weights, crop)
        options["crop"] = network.size
        made = self.apply(network, name or name_of(model), device=device, **options)
        return replace(made, function=network.identity["model"])

    def withdraw_predictions(self, run: RunName, *, reason: str) -> int:
        """Mark predictions that were added as wrong; return the number of their run.

        They stay, so that whoever used them finds them; no command takes them by default any more.

        >>> store.withdraw_predictions(12, reason="the classes were mixed up")

        Raises:
            UserInputError: it was not added, or is withdrawn; the reason is empty.
        """
        from .stages.own_models import withdraw

        return withdraw(self.workspace, run, reason)

    def compare(
        self,
        first: RunName,
        second: RunName,
        *,
        level: str = "image",
        vote: str = "hard",
        limit: int | None = None,
        vote_options: VoteOptions | None = None,
        force: bool = False,
    ) -> Comparison | HitsComparison:
        """Put two predict runs, or two hits runs, side by side, on what both have answered.

        Of predict runs: on the images, or wells.
        ``level``: image or well; ``vote``: hard, soft or median; ``limit``: of the differences
        listed. Returns the accuracy of both, their ``difference`` with an interval, an exact
        McNemar test, a ``conclusion`` in words, how their recipes differ, and the images in which
        they differ (``differing``).

        Of hits runs: on the treatments that both could judge; ``limit`` is of these. Returns how
        many are hits of both, of one alone or of neither, a ``conclusion``, and the ``treatments``
        with both verdicts.

        >>> store.compare(6, 11).conclusion

        Raises:
            UserInputError: both are the same run, or they answer other questions or have nothing in
                common.
        """
        from .report.comparison import compare

        return compare(
            self.workspace,
            first,
            second,
            level=level,
            vote=vote,
            limit=limit,
            vote_options=vote_options,
            force=force,
        )

    def runs(self, split: str | None = None, *, by: str = "test") -> Leaderboard:
        """Return the models that were trained on a split, the best first.

        ``split``: default: that of the last training; also the name of a cross-validation. ``by``:
        whether the ``test`` or the ``validation`` images rank them.

        >>> pandas.DataFrame(store.runs().runs)
        """
        from .report.leaderboard import list_runs

        return list_runs(self.workspace, split, by=by)

    def votes(
        self,
        run: RunName = "latest",
        *,
        level: str = "image",
        vote: str = "hard",
        vote_options: VoteOptions | None = None,
    ) -> VotesResult:
        """Return the label of every image, or well, by the vote of its cells.

        ``level``: image or well. ``vote``: hard (each cell counts once), soft (with its
        probabilities) or median. ``table`` of the result is one of Arrow: plate, well, site,
        winner, votes, share, runner_up, margin, cells, tie, abstained, subset, truth, correct.

        >>> store.votes(6, level="well").table.to_pandas()
        """
        from .report.votes import open_votes

        with open_votes(self.workspace, run, level=level, vote=vote, vote_options=vote_options) as (
            summary,
            rows,
        ):
            return replace(summary, table=rows.table())

    def audit(self, name: RunName, kind: str | None = None) -> Audit:
        """Return what an image, a well, a cell, a run or a file comes from, and what came of it.

        ``kind``: ``image``, ``well``, ``cell``, ``run`` or ``artifact``; a number needs it. Without
        it, whatever has that name. ``record`` of the result has it all as dictionaries and lists.

        >>> store.audit("P1/B04/1").record
        >>> store.audit(5, "run")

        Raises:
            UserInputError: it is a number without a kind, or several things have that name.
        """
        from .report.audit import audit

        return audit(self.workspace, name, kind)

    def log(
        self, *, plate: str | None = None, run: RunName | None = None, limit: int = 20
    ) -> EventLog:
        """Return the last commands that changed the store, or a plate, or that a run did.

        >>> store.log(run=5).entries
        """
        from .report.event_log import read_log

        return read_log(self.workspace, plate=plate, run=run, limit=limit)

    def wrote(self, *files: str | Path | None) -> None:
        """Keep in the log that files were written outside the store; None: there is none."""
        paths = [Path(file) for file in files if file is not None]
        if not paths:
            return
        from .db.events import (
            record_files,
        )  # it loads the tables, which takes longer than a question

        if not record_files(self.workspace.database, *paths):
            self.workspace.progress.note(
                "The log of this store does not name what was written: the store can only be "
                "read here, or another command is writing to it."
            )

    def repro(self, run: RunName = "latest") -> Repro:
        """Return the commands and versions that redo a run (``script``), and what it relies on.

        >>> print(store.repro(6).script)
        """
        from .report.repro import repro

        return repro(self.workspace, run)

    def check_run(
        self,
        run: RunName = "latest",
        *,
        images: int | None = None,
        device: str = "auto",
    ) -> Check:
        """Redo a run beside the store, and compare; nothing is written to the store.

        ``images``: only so many of its images. Returns the ``outcome`` in a word, what was
        compared, and how many values ``differ``.

        >>> store.check_run(3, images=2).outcome

        Raises:
            UserInputError: the run is not finished, or its stage cannot be redone.
        """
        from .report.redo import check

        carry_out = partial(_carry_out, device=device)
        return check(self.workspace, run, carry_out, images=images)

    def sql(
        self,
        query: str,
        parameters: Sequence[object] | Mapping[str, object] | None = None,
        limits: Limits | None = None,
    ) -> pa.Table:
        """Answer a question in SQL (DuckDB, read only) as an Arrow table.

        ``parameters`` fill its ``?`` or ``$name``.

        Raises:
            QueryError: the question is wrong, would do more than read, or takes too much.

        """
        with self.open_questions(limits) as questions:
            return questions.ask(query, parameters).table()

    def open_questions(
        self, limits: Limits | None = None, *, runs: Collection[int] | None = None
    ) -> AbstractContextManager[Questions]:
        """Open the store for several questions about one moment, or for answers of any size.

        ``runs``: the only predict runs that are asked about; by default all.
        """
        from .query.engine import open_questions

        return open_questions(self.workspace, limits, runs=runs)

    def ask(self, name: str, /, **parameters: object) -> pa.Table:
        """Answer a saved question as an Arrow table; see :meth:`questions`.

        Raises:
            QueryError: it is an own question, and wrong.

        """
        from .query.saved_queries import find_question, open_saved

        question = find_question(self.workspace, name)
        with open_saved(self.workspace, question, parameters) as answer:
            return answer.table()

    def questions(self) -> list[SavedQuestion]:
        """Return the saved questions: those of cellstore, and the store's own.

        Own ones are files ``questions/NAME.sql`` in the folder of the store.
        """
        from .query.saved_queries import saved_questions

        return saved_questions(self.workspace)[0]

    def schema(self) -> list[RelationWords]:
        """Return every table, view and feature set in words, with all of their columns."""
        from .query.describe import described

        with self.open_questions() as questions:
            return described(questions)

    def export(
        self,
        out: str | Path,
        *,
        format: str = "parquet",  # noqa: A002 - as on the command line
        features: str | None = None,
        segmentation: str | None = None,
        measurement: str | None = None,
        plates: tuple[str, ...] = (),
        split: str | None = None,
        subset: str | None = None,
        include_excluded: bool = False,
        for_spreadsheet: bool = False,
        force: bool = False,
        profiles: RunName | None = None,
    ) -> ExportResult | ExportedProfiles:
        """Write the current cells of a segmentation with their measurements to a file.

        ``format``: parquet, csv, anndata and others. ``features``: a feature set, or a group of
        them; default: all. ``split``: only its cells (of one ``subset``), with what it says of
        them. ``include_excluded``: those too, with their reason. ``for_spreadsheet``: CSV whose
        texts no spreadsheet runs as formulas. ``force`` replaces ``out``. ``profiles``: instead the
        wells of a profile run (its number, or ``latest``). Returns how many cells (or wells),
        features and plates were written.

        >>> store.export("cells.parquet", split="by-well")
        >>> store.export("wells.parquet", profiles="latest")

        Raises:
            UserInputError: there is no cell, or ``out`` is there already.
        """
        from .stages.export import ExportFormat, export, export_profiles

        kind = fitted("format", ExportFormat, format)
        if profiles is not None:
            wells = export_profiles(
                self.workspace,
                Path(out),
                profiles,
                format=kind,
                for_spreadsheet=for_spreadsheet,
                force=force,
            )
            self.wrote(out)
            return wells
        made = export(
            self.workspace,
            Path(out),
            format=kind,
            features=features,
            segmentation=segmentation,
            measurement=measurement,
            plates=plates,
            split=split,
            subset=fitted("subset", Subset | None, subset),
            include_excluded=include_excluded,
            for_spreadsheet=for_spreadsheet,
            force=force,
        )
        self.wrote(out)
        return made

    def export_crops(
        self,
        out: str | Path,
        *,
        split: str | None = None,
        subset: str | None = None,
        channels: Sequence[str] = (),
        plates: Sequence[str] = (),
        segmentation: str | None = None,
        measurement: str | None = None,
    ) -> ExportedCrops:
        """Write the pixels of cells to a folder of Parquet files; its README says how to read them.

        ``split`` (and one ``subset``): default: all cells. ``channels``: default: all. The folder
        is new, and there whole or not at all.

        >>> store.export_crops("crops", split="by-well", channels=["DNA", "RNA"])
        """
        from .stages.export_crops import export_crops

        made = export_crops(
            self.workspace,
            Path(out),
            split=split,
            subset=fitted("subset", Subset | None, subset),
            channels=channels,
            plates=plates,
            segmentation=segmentation,
            measurement=measurement,
        )
        self.wrote(made.path)
        return made

    def rename(
        self,
        kind: str,
        old: str,
        new: str,
        *,
        plate: str | None = None,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> Correction:
        """Give a ``plate`` or a ``channel`` (``kind``) another name; of one ``plate``, or all.

        What was made of it stays valid. ``dry_run`` only says what would change.

        >>> store.rename("channel", "w1", "DNA")

        Raises:
            UserInputError: the new name is taken, or is none.
        """
        from .stages.corrections import rename

        return rename(self.workspace, kind, old, new, plate=plate, reason=reason, dry_run=dry_run)

    def relabel(
        self,
        well: str,
        *,
        treatment: str | None = None,
        dose: str | None = None,
        control: str | None = None,
        reason: str,
        dry_run: bool = False,
    ) -> Correction:
        """Say what a well really got; ``treatment="none"``: it is not known.

        ``control``: negative, positive or none. Returns what has changed, and what relies on it.

        >>> store.relabel("P1/B04", treatment="taxol", dose="3 uM", reason="pipetting list")

        Raises:
            UserInputError: nothing would change, or the treatment is ambiguous.
        """
        from .stages.corrections import relabel

        return relabel(
            self.workspace,
            well,
            treatment=treatment,
            dose=dose,
            control=control,
            reason=reason,
            dry_run=dry_run,
        )

    def annotate(
        self,
        kind: str,
        names: str | Sequence[str | int],
        label: str | None,
        *,
        field: str = ANNOTATION,
        user: str | None = None,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> Correction:
        """Give a label to plates, wells, images or cells (``kind``), by names or ids.

        Each person (``user``, if not the login) has a label of their own for the same thing and
        ``field``. ``label=None`` takes the last one back. ``Store.ask("annotations")`` lists what
        was said, ``Store.ask("agreement")`` says how far people agree.

        >>> store.annotate("cell", [4711, 4712], "mitotic")

        Raises:
            UserInputError: tables fill the field, a name is empty or too long, or there is nothing
                to take back.
        """
        from .stages.annotate import annotate

        more: dict[str, Any] = {"field": field, "user": user, "reason": reason}
        return annotate(self.workspace, kind, names, label, **more, dry_run=dry_run)

    def napari(
        self,
        image: str,
        *,
        segmentation: str | None = None,
        folder: str | Path = "corrected",
    ) -> CorrectedMasks:
        """Open an image with its masks in napari, to correct these; returns when it is closed.

        Shift-S in the window stores them, as a segmentation of its own and as a file below
        ``folder`` that ``finetune`` reads. What is changed and not stored is stored at the end.

        Raises:
            UserInputError: the folder is of a store.
        """
        from .stages.correct_masks import correct_masks

        return correct_masks(self.workspace, image, segmentation=segmentation, folder=Path(folder))

    def exclude(
        self, kind: str, name: str | Sequence[str | int], *, reason: str, dry_run: bool = False
    ) -> Correction:
        """Let a plate, well, image or cell (``kind``) count nowhere; it stays visible.

        Of several, by names or ids, those that are excluded already stay so.

        >>> store.exclude("well", "P1/B04", reason="air bubble")

        Raises:
            UserInputError: it is excluded already.
        """
        from .stages.annotate import set_excluded

        return set_excluded(self.workspace, kind, name, True, reason=reason, dry_run=dry_run)

    def include(
        self,
        kind: str,
        name: str | Sequence[str | int],
        *,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> Correction:
        """Let something count again that a person has excluded.

        Raises:
            UserInputError: nobody excluded it.
        """
        from .stages.annotate import set_excluded

        return set_excluded(self.workspace, kind, name, False, reason=reason, dry_run=dry_run)

    def undo(self, run: RunName, *, reason: str | None = None, dry_run: bool = False) -> Correction:
        """Take back what an ingest run brought, if nothing relies on it.

        >>> store.undo(1, reason="the wrong plate map")

        Raises:
            UserInputError: it is no ingest run, or later work relies on it: the message names that.
        """
        from .stages.corrections import undo

        return undo(self.workspace, run, reason=reason, dry_run=dry_run)

    def delete_plate(
        self, name: str, *, reason: str | None = None, dry_run: bool = False
    ) -> Correction:
        """Delete a plate with its wells, images, cells and measurements; image files stay.

        Raises:
            UserInputError: predictions or splits rely on it; the message names them.
        """
        from .stages.corrections import delete_plate

        return delete_plate(self.workspace, name, reason=reason, dry_run=dry_run)

    def backup(self, file: str | Path, *, dry_run: bool = False) -> Backup:
        """Write the whole store to one file, as it is at this moment.

        Returns how much went in, and which stored files are ``missing`` or changed.

        Raises:
            UserInputError: the file is part of a store.
        """
        from .stages.backup import backup

        made = backup(self.workspace, Path(file), dry_run=dry_run)
        self.wrote(None if dry_run else file)
        return made

    @classmethod
    def restore(
        cls,
        file: str | Path,
        path: str | Path,
        *,
        database: str | None = None,
        dry_run: bool = False,
    ) -> Backup:
        """Make a store of a backup in the folder ``path``, on another ``database`` if wanted.

        >>> Store.restore("screen.backup", "my-screen")

        Raises:
            UserInputError: there is a store with something in it, or the file is no backup.
        """
        from .stages.backup import restore

        return restore(Path(file), Path(path), database=database, dry_run=dry_run)

    def export_model(
        self, run: RunName = "latest", output: str | Path | None = None
    ) -> ExportedModel:
        """Write a folder with the model of a training run, which opens without cellstore.

        ``output``: a new folder; default: ``model-RUN`` here. Returns its ``path`` and ``files``.

        >>> store.export_model(5, "my-model").path

        Raises:
            UserInputError: the folder is not empty, or the run has no model to write.
        """
        from .stages.export_model import export_model

        made = export_model(self.workspace, run, None if output is None else Path(output))
        self.wrote(made.path)
        return made

    def explore(
        self,
        *,
        port: int = 8765,
        host: str = "127.0.0.1",
        write: bool = False,
        ready: Callable[[str], None] = print,
    ) -> None:
        """Serve the web explorer of the store until Ctrl-C; ``ready`` is told its address.

        ``port`` 0 takes a free one. Only this machine is answered; another ``host`` makes the pages
        reachable from others, which need the token in the address. ``write``: labels and
        exclusions can be given; else nothing can be changed.

        >>> store.explore(port=0)

        Raises:
            UserInputError: the port is taken, or there is no such host.
        """
        need("explore")
        from .explore.server import serve

        serve(self.workspace, port=port, host=host, write=write, ready=ready)

    def status(self) -> StatusResult:
        """Count what is in the store, what is stale, and which jobs failed and why."""
        from .stages.status import status

        return status(self.workspace)

    def verify(
        self, *, fix: bool = False, minutes: float = 10.0, against: Path | None = None
    ) -> VerifyResult:
        """Compare files, rows and the ledger with each other; ``ok`` says whether all fits.

        ``fix`` removes files that no row names (older than ``minutes``) or whose bytes have
        changed. ``against``: a file of :meth:`seal`, whose end of the ledger must still be there.

        >>> store.verify().problems

        Raises:
            UserInputError: ``against`` is no file of :meth:`seal`.
        """
        from .stages.verify import verify

        return verify(self.workspace, fix=fix, minutes=minutes, against=against)

    def seal(self, file: Path) -> dict[str, Any]:
        """Write the end of the ledger to a file, and return it; keep the file elsewhere.

        :meth:`verify` takes it as ``against``.
        """
        from .stages.verify import seal

        return seal(self.workspace, file)


def _table_of(given: Any) -> Any:
    """The path of a file, or the Arrow table of a table of pandas, polars or Arrow."""
    import pyarrow as pa

    if isinstance(given, str | Path):
        return Path(given)
    try:
        if hasattr(given, "iloc"):
            return pa.Table.from_pandas(given, preserve_index=False)
        return pa.table(given)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UserInputError(
            f"This cannot be read as a table: {first_line(error)}. Give a file, or a table of "
            "pandas, polars or Arrow with one kind of value in each column; or an array (N, D) "
            "with N cell_ids."
        ) from error


def _carry_out(
    workspace: Workspace, options: RunOptions, where: str | None, device: str
) -> tuple[int | None, tuple[tuple[str, str], ...]]:
    """Do on a store what a run was asked to do; return the new run, and which images failed."""
    store, params = Store(workspace), cast("Any", options.params)
    names = options.inputs
    sources: Any = {name: names.get(name) for name in ("split", "segmentation", "measurement")}
    match params:
        case SegmentParams():
            result: Any = store.segment(params, Selection(where=where), device=device)
        case MeasureParams():
            images = Selection(where=where)
            result = store.measure(params, images, segmentation=sources["segmentation"])
        case SplitParams():
            return store.create_folds(names["name"], params)[0].run_id, ()
        case TrainParams():
            return store.train(params, **sources, device=device, force=True).run_id, ()
        case BaselineParams():
            kinds = [names["baseline"]]
            made = store.train_baselines(kinds, params, **sources, force=True, predict=False)
            return made[0].run_id, ()
        case ProfileParams():
            sources.pop("split")
            return store.profile(params, **sources, force=True).run_id, ()
        case HitsParams():
            return store.hits(params, force=True).run_id, ()
        case _:
            result = store.predict(params, run=names["run"], device=device)
    return result.run_id, tuple(result.failures)
