"""Features that other tools measured: images, segmentations without masks, cells, a feature set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Session

from ....analytics.sets import check_set_name
from ....formats.files.places import PathMap
from ....formats.layouts import Layout
from ....formats.objects.cellprofiler import open_cellprofiler
from ....formats.objects.model import ImageRow, Integers, ObjectSource
from ....formats.objects.singlecells import open_single_cells
from ....formats.records import ImageRecord
from ....runs import Workspace
from ..account import SHOWN, Account, FileIdentity
from ..images.rows import RowWriter
from .accounts import Accounts
from .cells import CellWriter
from .target import TargetSet, target_set

DEFAULT_NAMES = {
    Layout.CELLPROFILER_CSV: "cellprofiler",
    Layout.CELLPROFILER_SQLITE: "cellprofiler",
    Layout.SINGLE_CELLS: "single_cells",
}
_BATCH = 1_000


@dataclass(frozen=True)
class FeaturesDone:
    """What a source of features brought; ``accounts`` has one per file (closed).

    ``feature_set`` is None where the source has images only; ``segmentation`` is the id of the
    recipe that its cells belong to.
    """

    feature_set: str | None
    segmentation: int | None
    columns: int
    plates: tuple[int, ...]
    new_images: int
    cells: int
    unchanged: int
    accounts: tuple[Account, ...]
    notes: tuple[str, ...]


def ingest_features(
    workspace: Workspace,
    session: Session,
    run_id: int,
    source: Path,
    layout: Layout,
    *,
    name: str | None,
    plate: str | None,
    account: Account,
    maps: PathMap | None = None,
    identity: FileIdentity | None = None,
) -> FeaturesDone:
    """Bring the objects and features of ``source`` in, in the open transaction of ``session``.

    The rows of each file are accounted for in an account of its own; ``account`` gets the notes.
    ``name`` is the feature set (default: that of the tool), ``plate`` the barcode where the source
    names none; ``identity`` is that of a ``source`` that was looked at. Files of features are
    written at once, their rows count with the transaction.

    Raises:
        BadTableError: the source is damaged, or holds no objects that can be told apart.
        UserInputError: no plate is known, or the feature set has other columns.
        StorageError: a file cannot be written.
    """
    checked = check_set_name(name or DEFAULT_NAMES[layout])
    if layout is Layout.SINGLE_CELLS:
        opened = open_single_cells(source, plate)
    else:
        opened = open_cellprofiler(source, plate)
    try:
        known = {source: identity} if identity and source.is_file() else {}
        accounts = Accounts(session, run_id, opened, known)
        work = _Work(workspace, session, run_id, opened, maps, accounts)
        done = work.run(checked, layout)
    finally:
        opened.close()
    account.notes.extend(done.notes)
    return done


class _Work:
    """One source on its way in."""

    def __init__(
        self,
        workspace: Workspace,
        session: Session,
        run_id: int,
        source: ObjectSource,
        maps: PathMap | None,
        accounts: Accounts,
    ) -> None:
        self._workspace = workspace
        self._session = session
        self._run_id = run_id
        self._source = source
        self._scratch = Account(run_id, source.files[0].name)
        self._rows = RowWriter(session, run_id, source.files[0].name, self._scratch, maps)
        self._accounts = accounts

    def run(self, name: str, layout: Layout) -> FeaturesDone:
        self._workspace.progress.start("ingest", len(self._source.cells))
        try:
            self._accounts.say_all()
            images = self._images()
            target = self._target(name)
            cells = self._cells(images, target)
            self._accounts.close(layout.value)
        finally:
            self._workspace.progress.finish()
            self._accounts.stop()
        return self._done(target, cells)

    def _target(self, name: str) -> TargetSet | None:
        if not len(self._source.cells):
            return None  # nothing to measure: a set without cells would only be in the way
        return target_set(self._session, self._source, name)

    def _done(self, target: TargetSet | None, cells: CellWriter | None) -> FeaturesDone:
        return FeaturesDone(
            feature_set=target.name if target else None,
            segmentation=target.segment_id if target else None,
            columns=len(self._source.columns),
            plates=tuple(sorted(self._rows.plates)),
            new_images=cells.new_images if cells else 0,
            cells=cells.created if cells else 0,
            unchanged=cells.unchanged if cells else 0,
            accounts=tuple(self._accounts.of_files),
            notes=tuple(self._source.notes),
        )

    def _cells(self, images: Integers, target: TargetSet | None) -> CellWriter | None:
        if target is None:
            return None
        of_cells = images[self._source.cells.image]
        writer = CellWriter(
            self._workspace,
            self._session,
            self._run_id,
            self._source,
            target,
            of_cells,
            self._accounts,
        )
        writer.write()
        return writer

    def _images(self) -> Integers:
        """Return the id of each image, -1 where there is none for cells."""
        found: list[int] = []
        for file, rows in groupby(self._source.images, key=lambda row: row.file):
            listed = list(rows)
            for start in range(0, len(listed), _BATCH):
                found += self._batch(file, listed[start : start + _BATCH])
        return self._each_once(np.array(found, np.int64))

    def _batch(self, file: str, rows: Sequence[ImageRow]) -> list[int]:
        records = [row.content for row in rows if isinstance(row.content, ImageRecord)]
        scratch, account = self._scratch, self._accounts.by_name[file]
        scratch.file = file
        before = scratch.mark()
        ids = iter(self._rows.write(records))
        found: list[int] = []
        for row in rows:
            image = next(ids) if isinstance(row.content, ImageRecord) else None
            found.append(-1 if image is None else image)
            if self._source.own_images and not isinstance(row.content, ImageRecord):
                account.refuse(*row.content)
        if self._source.own_images:
            account.created += scratch.created - before.created
            account.updated += scratch.updated - before.updated
            account.unchanged += scratch.unchanged - before.unchanged
            account.refused += scratch.refused - before.refused
        _hand_over(scratch, account)
        scratch.flush(self._session)
        account.flush(self._session)
        return found

    def _each_once(self, ids: Integers) -> Integers:
        """Take the first of several rows that are the same field; a field has one set of cells."""
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        again &= ids != -1
        for number in np.flatnonzero(again):
            row = self._source.images[number]
            assert isinstance(row.content, ImageRecord)
            detail = "an earlier row is the same field: the cells of this one are left out"
            self._accounts.by_name[row.file].problem(row.content.line, "same field twice", detail)
        ids[again] = -1
        return ids


def _hand_over(scratch: Account, account: Account) -> None:
    """Let ``account`` say what was said of its rows."""
    account.reasons += scratch.reasons
    account.shown += scratch.shown[: SHOWN - len(account.shown)]
    scratch.reasons.clear()
    scratch.shown.clear()
