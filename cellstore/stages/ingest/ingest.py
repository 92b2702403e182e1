"""Ingest: what a source is, whether it was read before, who reads it, what became of its rows."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import delete, func, insert, literal, select, update
from sqlalchemy.orm import Session

from ...config import EVERYTHING, IngestParams, Selection, flag, options_of
from ...db.bulk import in_lists, one_ingest_at_a_time, rows_in
from ...db.events import Change, record_events, recording_new_rows
from ...db.fields import wells_changed
from ...enums import Look, Severity, Stage, Status
from ...errors import UnknownNameError, UserInputError
from ...io.filenames import format_well
from ...io.image_files import probe
from ...io.layouts import Layout, SourceKind, detect
from ...io.platemaps import MapOptions
from ...io.tables import Refusal
from ...io.uris import exists, is_remote, join, map_folder, plain_file, shown, stat, writable
from ...jobs.lookup import images_of, renamed_channels, renamed_plates
from ...jobs.queue import requeue
from ...jobs.runs import RecipeSpec, register, running
from ...jobs.workspace import Workspace
from ...models import (
    Event,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    IngestIssue,
    Job,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Treatment,
    Well,
)
from ...notebooks import Shown
from ...settings import track
from .account import SHOWN, Account, FileIdentity, Issue, UndoneError
from .ingest_images import (
    READERS,
    ImageSource,
    ingest_images,
    look_at_files,
    rename_channels,
)

VERSION = 2
REFRESH_VERSION = 1

_OF_MAPS = ("sheet", "map_columns", "blank", "controls")
"""Options about plate maps."""
_ONLY_OF: Mapping[str, Collection[SourceKind]] = {
    "name": (SourceKind.FEATURES, SourceKind.MASKS),
    "pixel_size": (SourceKind.IMAGES,),
    "binary": (SourceKind.MASKS,),
}
"""Options that other kinds of sources do not have."""


@dataclass(frozen=True)
class IngestResult(Shown):
    """What a source brought. ``rows = created + updated + unchanged + refused``.

    ``updated`` rows were there and gained or changed something: a file, a treatment. ``reasons``
    counts issues by (severity, reason); ``issues`` are the first thousand of them, table
    ``ingest_issues`` has all. ``plates``, ``wells``, ``images`` and ``missing_images`` are what the
    plates of the source have now. ``cells`` were brought, ``feature_set`` is where their
    features are, ``segmentations`` the recipes that they belong to.
    """

    run_id: int
    source: str
    layout: str
    rows: int
    created: int
    updated: int
    unchanged: int
    refused: int
    reasons: tuple[tuple[Severity, str, int], ...]
    issues: tuple[Issue, ...]
    plates: int
    wells: int
    images: int
    missing_images: int
    cells: int = 0
    feature_set: str | None = None
    segmentations: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, severity: Severity) -> tuple[Issue, ...]:
        """Return the issues of one severity."""
        return tuple(issue for issue in self.issues if issue.severity is severity)


def ingest(
    workspace: Workspace, source: str | Path, params: IngestParams | None = None
) -> IngestResult:
    """Bring a source in: a table, an index, a database, a folder; doing it again changes nothing.

    Raises:
        BadTableError: the source is empty, damaged, ambiguous, or lacks columns. Nothing is
            written.
        UndoneError: rows were refused under ``strict``. Nothing of the source is written.
        UserInputError: a file or folder is not there, or the plate is not known.
    """
    params = params or IngestParams()
    layout, source = choose_layout(source, params), Path(source)
    kind = layout.kind
    images = ImageSource(source, layout, params) if kind is SourceKind.IMAGES else None
    beside: Sequence[Path] = images.files if images else ()
    if kind is SourceKind.TREATMENTS:
        files = (*params.compounds, params.barcodes, params.aliases)
        beside = [path for path in files if path is not None]
    identity = FileIdentity.of(source)
    # The recipe says which bytes are read in which way. Where they lie means nothing: of a table
    # beside the source the option keeps its name, and "files" its bytes; of a folder nothing.
    options = {
        name: writable(value.name) if isinstance(value, Path) and value.is_file() else value
        for name, value in asdict(params).items()
        if name not in ("kind", "layout", "images", "compounds", "look", "strict", "reread")
        and not (isinstance(value, Path) and value.is_dir())
    }
    options["maps"] = [[old, shown(new)] for old, new in params.maps]
    read = [identity, *map(FileIdentity.of, beside)]
    named = [{"name": file.name, "sha256": file.sha256} for file in read]
    parameters = {"layout": layout.value, "files": named, "options": options}
    earlier, again = None, False
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.INGEST, VERSION, parameters))
        # A map may be for plates that came since, and masks are looked at one by one anyway.
        if kind in (SourceKind.IMAGES, SourceKind.FEATURES) and not params.reread:
            # The last run that read the very same files in the very same way. What has been
            # corrected since stays corrected: an old table that is ingested again, by habit or by
            # a clock, must not undo it.
            runs = select(Run).where(Run.recipe_id == recipe.id, Run.status == Status.DONE)
            earlier = session.scalars(runs.order_by(Run.id.desc()).limit(1)).first()
            result = None if earlier is None else earlier.result
            plates = result["plates"] if result else []
            if result and result.get("feature_set"):
                from .ingest_features import lacks_files  # these are slow to import

                again = lacks_files(session, workspace.artifacts, result["feature_set"])
            # A plate of it may have been deleted, or a file of features is gone.
            there = rows_in(session, select(Plate.id), Plate.id, plates)
            lost = again or len(there) < len(plates)
            if lost or not result or (params.strict and result["refused"]):
                earlier = None
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        labels = {file.sha256 for file in (read if kind is SourceKind.TREATMENTS else read[1:])}
        if labels and not params.reread:
            with workspace.database.read() as session:
                account.since = _first_read(session, labels)
        try:
            if earlier is not None:
                _read_again(workspace, kind, params, earlier, account)
            elif images is not None:
                ingest_images(workspace, images, account, identity.lines)
            elif kind is SourceKind.MASKS:
                from .ingest_masks import ingest_masks

                ingest_masks(workspace, source, params, account)
            else:
                with workspace.database.begin() as session:
                    one_ingest_at_a_time(session)
                    with recording_new_rows(session, run.id):
                        _write(workspace, session, source, layout, params, account, identity, again)
                    if params.strict:
                        account.check_strict()
        except UndoneError:
            # The rows are undone; the reasons stay, to be asked for.
            account.pending = list(account.shown)
            with workspace.database.begin() as session:
                account.flush(session)
            raise
        # Each file of a source of features has an account of its own.
        if kind is not SourceKind.FEATURES or earlier is not None:
            with workspace.database.begin() as session:
                account.close(session, layout.value, identity)
        kept = {
            name: value
            for name in ("plates", "cells", "feature_set", "segmentations")
            if (value := getattr(account, name))
        }
        run.result = {"plates": [], **account.counts, **kept}
    for (old, new), number in account.moved.items():
        files_are = "1 file is" if number == 1 else f"{number:,} files are"
        account.notes.append(f"{files_are} now read from {shown(new)}, no longer from {shown(old)}")
    wells = fields = seen = 0
    with workspace.database.read() as session:
        counts = (func.count(Well.id.distinct()), func.count(Image.id))
        query = select(*counts, func.count(Image.content_sha256))
        query = query.outerjoin(Image, Image.well_id == Well.id)
        for row in rows_in(session, query, Well.plate_id, account.plates):
            wells, fields, seen = wells + row[0], fields + row[1], seen + row[2]
    return IngestResult(
        run_id=run.id,
        source=account.file,
        layout=layout.value,
        **account.counts,
        reasons=tuple((*key, number) for key, number in account.reasons.most_common()),
        issues=tuple(account.shown),
        plates=len(account.plates),
        wells=wells,
        images=fields,
        missing_images=fields - seen,
        cells=account.cells,
        feature_set=account.feature_set,
        segmentations=tuple(account.segmentations),
        notes=tuple(account.notes),
    )


def _write(
    workspace: Workspace,
    session: Session,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
    identity: FileIdentity | None,
    again: bool = False,
) -> None:
    """Write treatments or features. Without the ``identity`` of the source it is a dry run."""
    if layout.kind is SourceKind.TREATMENTS:
        from .ingest_treatments import ingest_treatments  # these are slow to import

        ingest_treatments(workspace, session, source, layout, params, account)
    else:
        from .ingest_features import ingest_features

        how = (workspace, session, source, layout, params, account, identity)
        ingest_features(*how, again=again)


def _first_read(session: Session, digests: set[str]) -> int | None:
    """Return the last event of the first run that read files of these bytes; none: none has."""
    runs = select(Run.id, Recipe.parameters).join(Recipe, Recipe.id == Run.recipe_id)
    runs = runs.where(Run.stage == Stage.INGEST, Run.status == Status.DONE).order_by(Run.id)
    for run_id, parameters in session.execute(runs):
        if digests <= {file["sha256"] for file in parameters.get("files", ())}:
            last = select(func.max(Event.id)).where(Event.run_id == run_id)
            return session.scalar(last) or None
    return None


def choose_layout(source: str | Path, params: IngestParams) -> Layout:
    """Return how ``source`` is to be read: as asked for, else as its content says.

    Raises:
        BadTableError: it is none of the known layouts, or more than one.
        UserInputError: there is no such file, or it is of another kind than asked for.
    """
    if is_remote(str(source)):
        raise UserInputError(
            f"{shown(str(source))} is not on this machine. Copy the table or index here; its "
            "images may stay where they are."
        )
    source = Path(source)
    map_folder("/", params.maps)  # before anything is read, an error in --map
    try:
        if not source.is_dir():
            plain_file(source).open("rb").close()
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file or folder {source}. Check the path.") from error
    except OSError as error:
        raise UserInputError(f"{source} cannot be read ({error.strerror}).") from error
    kind = SourceKind(params.kind) if params.kind else None
    if params.layout is not None and params.layout not in list(Layout):
        raise UnknownNameError.of("layout", params.layout, [item.value for item in Layout])
    if params.layout is not None:
        layout = Layout(params.layout)
    elif params.pattern is not None:
        layout = Layout.IMAGE_FOLDER
    else:
        layout = detect(source, kind, MapOptions(params.sheet, params.map_columns))
    if kind is not None and layout.kind is not kind:
        raise UserInputError(
            f"The layout {layout.value} is for {layout.kind.value}, not for {kind.value}. "
            f"Remove the word {kind.value!r} or --layout."
        )
    chosen = [item for item in options_of(params) if getattr(params, item.name)]
    lost = [flag(item) for item in chosen if item.name in _OF_MAPS]
    if lost and layout is not Layout.PLATEMAP and params.platemap is None:
        raise UserInputError(
            f"{' and '.join(lost)} say something of a plate map, and {source.name} is read as "
            f"{layout.value}. Give the map with --platemap FILE, or ingest it by itself."
        )
    if len(params.plate) > 1 and layout is not Layout.PLATEMAP:
        raise UserInputError(
            f"{source.name} is read as {layout.value}, which is of one plate. Name it once "
            "with --plate; only a plate map may be of several."
        )
    wrong = [flag(i) for i in chosen if layout.kind not in _ONLY_OF.get(i.name, SourceKind)]
    if wrong:
        raise UserInputError(
            f"{source.name} is read as {layout.value}, which does not use {' or '.join(wrong)}. "
            f"Remove it, or name the content: cellstore ingest masks {source.name}"
        )
    return layout


def _read_again(
    workspace: Workspace, kind: SourceKind, params: IngestParams, earlier: Run, account: Account
) -> None:
    """Account for a source that was read whole before: only files of images can have changed."""
    result = earlier.result or {}
    account.rows, account.refused = result["rows"], result["refused"]
    account.plates = plates = result["plates"]
    issue = IngestIssue
    columns = (issue.severity, issue.file, issue.line, issue.reason, issue.detail)
    of_rows = (issue.run_id == earlier.id, issue.line.is_not(None))
    with workspace.database.begin() as session:
        # What the earlier run found wrong with the rows is true of this run, too.
        first = session.execute(select(*columns).where(*of_rows).order_by(issue.id).limit(SHOWN))
        account.shown += [Issue(*row) for row in first]
        counts = select(issue.severity, issue.reason, func.count()).where(*of_rows)
        for severity, reason, number in session.execute(
            counts.group_by(issue.severity, issue.reason)
        ):
            account.reasons[Severity(severity), reason] += number
        copied = select(literal(account.run_id), *columns).where(*of_rows).order_by(issue.id)
        names = ["run_id", *(column.key for column in columns)]
        session.execute(insert(issue).from_select(names, copied))
        if kind is SourceKind.FEATURES:
            account.unchanged = account.rows - account.refused
            account.feature_set = result.get("feature_set")
            account.segmentations = result.get("segmentations", ())
            return
        # Wells that have got another treatment since, and the last run that read another source
        # since and updated rows of these plates.
        changes = wells_changed(Event.run_id > earlier.id).subquery()
        wells_since = select(func.count(Well.id)).where(Well.id.in_(select(changes.c.well_id)))
        corrected = 0
        ids: list[int] = []
        for some in in_lists(plates):
            corrected += session.scalar(wells_since.where(Well.plate_id.in_(some))) or 0
            query = select(Image.id).join(Well, Well.id == Image.well_id)
            ids += session.scalars(query.where(Well.plate_id.in_(some)))
        later = None
        runs_since = select(Run.id, Run.result).where(
            Run.stage == Stage.INGEST,
            Run.status == Status.DONE,
            Run.id > earlier.id,
            Run.recipe_id != earlier.recipe_id,
        )
        for run_id, found in session.execute(runs_since.order_by(Run.id)):
            if found and found.get("updated") and set(plates) & set(found.get("plates", ())):
                later = run_id
    images = np.sort(np.array(ids, np.int64))
    changed = look_at_files(workspace, images, params.images, params.look, account)
    account.updated = min(len(changed), account.rows - account.refused)
    account.unchanged = account.rows - account.refused - account.updated
    if later:
        account.notes.append(
            f"Skipped: run {later} changed these images after you first read {account.file}. "
            f"To use the version of {account.file}, add --reread."
        )
    if corrected:
        wells = "1 well has" if corrected == 1 else f"{corrected:,} wells have"
        account.notes.append(
            f"{wells} a newer label from another table; kept. To see what a well had: "
            "cellstore audit well PLATE/A01. To use the labels of this table, add --reread."
        )


@dataclass(frozen=True)
class RefreshResult(Shown):
    """What a look at the files brought. ``changed`` images have other bytes, or a file more.

    ``problems`` are the first thousand files that could not be read, ``n_problems`` all.
    """

    run_id: int
    images: int
    changed: int
    n_problems: int
    problems: tuple[Issue, ...]


def refresh(workspace: Workspace, selection: Selection = EVERYTHING) -> RefreshResult:
    """Compare the files of the images of a selection with what is known of them.

    A file of the same size and time is taken as unchanged; others are hashed. What was derived
    from bytes that have changed is stale from now on: the next run of its stage makes it anew.

    Raises:
        UnknownNameError: there is no such plate, well or column.
    """
    with workspace.database.begin() as session:
        query = images_of(session, selection)
        spec = RecipeSpec(Stage.INGEST, REFRESH_VERSION, {"again": asdict(selection)})
        recipe = register(session, spec)
        ids = session.scalars(select(Image.id).where(Image.id.in_(query)).order_by(Image.id))
        images = np.fromiter(ids, dtype=np.int64)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, "known files")
        changed = look_at_files(workspace, images, None, Look.HERE, account)
        problems = sum(account.reasons.values())
        run.result = {"images": len(images), "changed": len(changed), "problems": problems}
    some = tuple(issue for issue in account.shown if issue.severity is Severity.PROBLEM)
    return RefreshResult(run.id, len(images), len(changed), problems, some)


@dataclass(frozen=True)
class RelocateResult(Shown):
    """Which ``folders`` (old, new, files) are elsewhere now.

    ``hashed`` of the files have another time there, or all were to be read: their sha256 was
    compared. ``missing`` are in neither place.
    """

    folders: tuple[tuple[str, str, int], ...]
    files: int
    hashed: int
    missing: int
    dry_run: bool


def relocate(
    workspace: Workspace,
    old: str,
    new: str,
    *,
    check: bool = False,
    dry_run: bool = False,
    reason: str | None = None,
) -> RelocateResult:
    """Say that the folders whose names begin with ``old`` begin with ``new`` from now on.

    Every file that the store has seen must be there with its size and time; one of another time is
    read, and must have its sha256. ``check`` reads all. All or nothing, and undone by relocating
    back. Jobs that failed are open again.

    Raises:
        UnknownNameError: the store knows no folder of this name.
        UserInputError: a file is not in the new folder, or is another one there.
    """
    old, new = (
        text if is_remote(text) or "\\" in text else os.path.abspath(text)  # noqa: PTH100 - no links
        for text in (old, new)
    )
    if old == new:
        raise UserInputError(f"{shown(old)} is the old and the new folder. Name another one.")
    found: Counter[str] = Counter()
    per_folder: Counter[int] = Counter()
    wrong: list[str] = []
    times = array("q")  # id and time of files with another time
    with workspace.database.read() as session:
        with_files = select(Folder.id, Folder.uri).where(Folder.id.in_(select(ImageFile.folder_id)))
        folders = {row.id: row.uri for row in session.execute(with_files)}
        targets = {number: map_folder(uri, [(old, new)]) for number, uri in folders.items()}
        targets = {number: uri for number, uri in targets.items() if uri != folders[number]}
        if not targets:
            raise UnknownNameError.of("folder", shown(old), map(shown, folders.values()))

        def look(row: Any) -> tuple[Any, str, int | None]:
            here, there = (join(uris[row.folder_id], row.name) for uris in (folders, targets))
            if not exists(there):
                return row, "gone" if is_remote(here) or not exists(here) else "not there", None
            at = stat(there)
            same = at.size_bytes == row.size_bytes
            if same and not check and (is_remote(there) or at.mtime_ns == row.modified_ns):
                return row, "same", None
            same = same and probe(there).sha256 == row.sha256
            return row, "hashed" if same else "another file there", at.mtime_ns

        columns = (ImageFile.id, ImageFile.folder_id, ImageFile.name, ImageFile.sha256)
        query = select(*columns, ImageFile.size_bytes, ImageFile.modified_ns)
        query = query.where(ImageFile.folder_id.in_(targets), ImageFile.sha256.is_not(None))
        rows = session.execute(query.order_by(ImageFile.id)).partitions(1000)
        with ThreadPoolExecutor(READERS) as pool:
            looks = (one for some in rows for one in pool.map(look, some))
            for row, became, time in track(workspace.progress, "look at files", None, looks):
                found[became] += 1
                per_folder[row.folder_id] += 1
                if became not in ("same", "hashed", "gone"):
                    wrong.append(f"{row.name} is {became}")
                elif time is not None and time != row.modified_ns:
                    times.extend((row.id, time))
    total = found.total()
    if wrong or (total and found["gone"] == total):
        some = f"{len(wrong):,} of them, for example {wrong[0]}" if wrong else "none of them is"
        raise UserInputError(
            f"The {total:,} files of {shown(old)} are not all in {shown(new)}: {some}. "
            "Nothing was changed. Name the folder that has them, or copy what is missing."
        )
    if not dry_run:
        with workspace.database.begin() as session:
            one_ingest_at_a_time(session)
            changes = []
            # A folder gets its new name before another one gets the old name of it.
            deeper = len(new) > len(old)
            order = sorted(targets.items(), key=lambda item: len(item[1]), reverse=deeper)
            for number, uri in order:
                taken = session.scalar(select(Folder.id).where(Folder.uri == uri))
                before, after = {"uri": folders[number]}, {"uri": uri}
                changes.append(Change("folders", taken or number, before, after))
                if taken is None:
                    session.execute(update(Folder).where(Folder.id == number).values(uri=uri))
                else:
                    mine = update(ImageFile).where(ImageFile.folder_id == number)
                    session.execute(mine.values(folder_id=taken))
                    session.execute(delete(Folder).where(Folder.id == number))
            pairs = zip(times[::2], times[1::2], strict=True)
            for changed in in_lists([{"id": n, "modified_ns": time} for n, time in pairs]):
                session.execute(update(ImageFile), changed)
            numbers = select(Folder.id).where(Folder.uri.in_(set(targets.values())))
            files = select(ImageFile.image_id).where(ImageFile.folder_id.in_(numbers))
            requeue(session, Job.image_id.in_(files))
            record_events(session, changes, reason=reason)
    return RelocateResult(
        tuple((shown(folders[n]), shown(uri), per_folder[n]) for n, uri in targets.items()),
        total,
        found["hashed"],
        found["gone"],
        dry_run,
    )


# ---- Dry run ----

MOST = 1_000_000
"""Plates, wells and images are counted up to this many of each: they are held in memory."""


@dataclass(frozen=True)
class PreviewRow:
    """What one file would become: a channel of an image, or ``cells`` of an image."""

    file: str
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    channel: str | None = None
    treatment: str | None = None
    objects: str | None = None
    cells: int | None = None


@dataclass(frozen=True)
class PreviewWell:
    """What a well would have after treatments were ingested; ``change``: new, or what it has."""

    plate: str
    well: str
    treatment: str | None
    control: str | None
    change: str


@dataclass
class Preview:
    """What a source would become: ``files`` are the first of them, ``images`` counts fields.

    Of treatments, ``treated`` are the first wells. Of features, ``files`` and ``images`` are the
    images that would get cells: each a segmentation, ``new_images`` of them images that the store
    does not have, and ``cells`` in all; ``columns`` counts those of ``feature_set`` by what their
    names begin with. Of both, ``created``, ``updated`` and ``unchanged`` count rows as an ingest
    does.
    ``channels`` counts files by channel; ``refused`` rows would be left out, ``issues`` says why.
    ``at_least``: there are more plates, wells or images than were counted.
    """

    source: str
    layout: str
    rows: int = 0
    images: int = 0
    refused: int = 0
    at_least: bool = False
    plates: set[str] = field(default_factory=set)
    wells: set[tuple[str, str]] = field(default_factory=set)
    channels: Counter[str] = field(default_factory=Counter)
    files: list[PreviewRow] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    treated: list[PreviewWell] = field(default_factory=list)
    feature_set: str | None = None
    columns: Counter[str] = field(default_factory=Counter)
    cells: int = 0
    new_images: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, known: set[Any], key: Hashable, rows: Sequence[PreviewRow]) -> None:
        """Count the files of one image (``key``), and show them if there is room.

        ``known`` are the images so far: each is counted once, as plates and wells are, in bounded
        memory.
        """
        plates = [(self.plates, row.plate) for row in rows]
        wells = [(self.wells, (row.plate, row.well)) for row in rows]
        for counted, item in ((known, key), *plates, *wells):
            if len(counted) < MOST:
                counted.add(item)
            elif item not in counted:
                self.at_least = True
        self.channels.update(row.channel for row in rows if row.channel is not None)
        self.files += rows[: max(0, SHOWN - len(self.files))]
        self.images = len(known)


def _rehearse(
    workspace: Workspace,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
    found: Preview,
) -> None:
    """Ingest treatments or features, keep what became of them in ``found``, and undo all of it."""
    with workspace.database.begin() as session:
        one_ingest_at_a_time(session)
        recipe = register(session, RecipeSpec(Stage.INGEST, VERSION, {"dry run": source.name}))
        run = Run(
            stage=Stage.INGEST,
            recipe_id=recipe.id,
            status=Status.RUNNING,
            command="",
            code_version="",
            environment={},
            host="",
            user_name="",
            started_at=datetime.now(UTC),
        )
        session.add(run)
        session.flush()
        account.run_id = run.id
        of_features = layout.kind is SourceKind.FEATURES
        last = session.scalar(select(func.max(Image.id if of_features else Well.id))) or 0
        _write(workspace, session, source, layout, params, account, None)
        show = _show_features if of_features else _show_wells
        show(session, account, last, found)
        session.rollback()


def _show_features(session: Session, account: Account, last: int, found: Preview) -> None:
    found.feature_set, found.cells = account.feature_set, account.cells
    columns = session.scalar(
        select(FeatureSet.columns).where(FeatureSet.name == account.feature_set)
    )
    names = [column["name"].split("_") for column in columns or ()]
    found.columns.update("_".join(name[: min(2, len(name) - 1)] or name) for name in names)
    found.plates.update(
        row.barcode for row in rows_in(session, select(Plate.barcode), Plate.id, account.plates)
    )
    query = (
        select(Segmentation.n_cells, Plate.barcode, Well.name, Image)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Segmentation.run_id == account.run_id)
        .order_by(Segmentation.id)
    )
    images: set[Any] = set()
    for cells, plate, well, image in session.execute(query.execution_options(yield_per=1000)):
        where = (plate, well, image.site, image.plane, image.time_point)
        found.add(images, image.id, [PreviewRow(found.source, *where, cells=cells)])
        found.new_images += image.id > last


def _show_wells(session: Session, account: Account, last: int, found: Preview) -> None:
    events = select(Event.row_id, Event.old).where(
        Event.run_id == account.run_id, Event.table_name == "wells"
    )
    changed = {well: old or {} for well, old in session.execute(events)}
    query = (
        select(Well.id, Plate.barcode, Well.name, Treatment.name_with_dose, Well.control)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(Well.plate_id.in_(account.plates) | Well.id.in_(list(changed)[:SHOWN]))
        .order_by(Plate.barcode, Well.well_row, Well.well_column)
    )
    for well, barcode, name, treatment, control in session.execute(query):
        found.plates.add(barcode)
        found.wells.add((barcode, name))
        change = "new" if well > last else ""
        # A well whose metadata alone was changed has what it had.
        if not change and {"treatment_id", "control"} & changed.get(well, {}).keys():
            old = {"treatment": treatment, "control": control, **changed[well]}
            role = f" ({old['control']})" if old["control"] else ""
            role += f", identifier {old['identifier']}" if old.get("identifier") else ""
            change = f"was {old['treatment'] or 'not known'}{role}"
        if len(found.treated) < SHOWN:
            found.treated.append(PreviewWell(barcode, name, treatment, control, change))


def preview(
    source: str | Path, params: IngestParams | None = None, workspace: Workspace | None = None
) -> Preview:
    """Read a source and say what would become of it; nothing is written.

    All needs the ``workspace`` that it is for; of images only the names of channels depend on it.

    Raises:
        BadTableError: the source cannot be read.
        MissingExtraError: masks, and scikit-image is not installed.
        UserInputError: there is no ``workspace`` that it needs, or features do not fit what it has.
    """
    params = params or IngestParams()
    layout, source = choose_layout(source, params), Path(source)
    found = Preview(source.name, layout.value)
    account = Account(0, writable(source.name))
    images: set[Any] = set()
    if layout.kind is SourceKind.IMAGES:
        records = ImageSource(source, layout, params)
        account.notes = records.notes
        now: dict[str, Mapping[str, str]] = {}
        """What channels are called in the store, by plate."""
        for row in records.records():
            account.rows += 1
            account.pending.clear()  # nothing is written
            if isinstance(row, Refusal):
                account.refuse(*row)
            else:
                well = format_well(row.row, row.column)
                where = (row.plate, well, row.site, row.plane, row.time_point)
                treatment = row.treatment.label if row.treatment else None
                if workspace is not None and row.plate not in now:
                    with workspace.database.read() as session:
                        plate = session.scalar(select(Plate.id).where(Plate.barcode == row.plate))
                        if plate is None:
                            plate, _ = renamed_plates(session, [row.plate]).get(row.plate, (0, ""))
                        now[row.plate] = renamed_channels(session, {plate}).get(plate, {})
                row = rename_channels(row, now.get(row.plate, {}), account.notes)  # noqa: PLW2901
                files = [PreviewRow(ref.name, *where, ref.channel, treatment) for ref in row.files]
                found.add(images, where, files)
                if row.problem is not None:
                    account.problem(row.line, *row.problem)
    elif workspace is None:
        raise UserInputError(
            f"A dry run of {layout.kind.value} needs the store that they are for. Name it with "
            "--store."
        )
    elif layout.kind is not SourceKind.MASKS:
        _rehearse(workspace, source, layout, params, account, found)
    else:
        from .ingest_masks import MaskReader

        for masks in MaskReader(workspace, source, params).plan(account):
            image, file = masks.image, masks.file
            where = (image.plate, image.well, image.site, image.plane, image.time_point)
            cells = len(masks.cells)
            masks_row = PreviewRow(file.name, *where, objects=file.kind, cells=cells)
            found.add(images, image.id, [masks_row])
    found.issues, found.notes = account.shown, account.notes
    for name, number in account.counts.items():
        setattr(found, name, number)
    return found
