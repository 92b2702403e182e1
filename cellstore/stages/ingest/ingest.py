"""Ingest: what a source is, whether it was read before, who reads it, what became of its rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from ...io.image_files import probe
from ...io.layouts import Layout, SourceKind, detect
from ...io.uris import exists, is_remote, join, map_folder, plain_file, shown, stat, writable
from ...jobs.lookup import images_of
from ...jobs.queue import requeue
from ...jobs.runs import RecipeSpec, register, running
from ...jobs.workspace import Workspace
from ...models import (
    Event,
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
from .account import SHOWN, Account, FileIdentity, Issue, issues_of
from .ingest_images import (
    READERS,
    ImageSource,
    ingest_images,
    look_at_files,
)

VERSION = 2
REFRESH_VERSION = 1

_OF_MAPS = ("sheet", "map_columns", "blank", "controls")
"""Options about plate maps."""
_ONLY_OF: Mapping[str, Collection[SourceKind]] = {
    "name": (SourceKind.FEATURES, SourceKind.MASKS),
    "pixel_size": (SourceKind.IMAGES,),
    "pattern": (SourceKind.IMAGES,),
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

    Of a dry run all this is what would be (``run_id`` 0), and ``preview`` has the first thousand
    files, wells or images with cells, by the names of their columns.
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
    preview: tuple[Mapping[str, Any], ...] = ()


def ingest(
    workspace: Workspace,
    source: str | Path,
    params: IngestParams | None = None,
    *,
    dry_run: bool = False,
) -> IngestResult:
    """Bring a source in: a table, an index, a database, a folder; doing it again changes nothing.

    See ``Store.ingest``.
    """
    params = params or IngestParams()
    layout, source = choose_layout(source, params), Path(source)
    kind = layout.kind
    images = ImageSource(source, layout, params) if kind is SourceKind.IMAGES else None
    if dry_run:
        return _dry_run(workspace, source, layout, params, images)
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
        if name not in ("kind", "images", "compounds", "look", "reread")
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
            result = (earlier and earlier.result) or {}
            if result.get("feature_set"):
                from .ingest_features import lacks_files  # these are slow to import

                again = lacks_files(session, workspace.artifacts, result["feature_set"])
            # A plate of it may have been deleted, or a file of features is gone.
            plates = result.get("plates", ())
            there = rows_in(session, select(Plate.id), Plate.id, plates)
            if again or len(there) < len(plates) or not result:
                earlier = None
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        labels = {file.sha256 for file in (read if kind is SourceKind.TREATMENTS else read[1:])}
        if labels and not params.reread:
            with workspace.database.read() as session:
                account.since = _first_read(session, labels)
        if earlier is not None:
            _read_again(workspace, kind, params, earlier, account)
        elif kind is SourceKind.MASKS:
            from .ingest_masks import ingest_masks

            ingest_masks(workspace, source, params, account)
        else:
            with workspace.database.begin() as session:
                one_ingest_at_a_time(session)
                with recording_new_rows(session, run.id):
                    if images is not None:
                        ingest_images(workspace, session, images, account, identity.lines)
                    else:
                        how = (source, layout, params, account, identity)
                        _write(workspace, session, *how, again=again)
            if images is not None:
                seen = np.unique(np.frombuffer(account.images, dtype=np.int64))
                changed = look_at_files(workspace, seen, params.images, params.look, account)
                unchanged = np.frombuffer(account.unchanged_images, dtype=np.int64)
                updated = int(np.isin(unchanged, list(changed)).sum())
                account.unchanged -= updated
                account.updated += updated
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
    with workspace.database.read() as session:
        return _result(session, account, layout, run.id)


def _result(
    session: Session,
    account: Account,
    layout: Layout,
    run_id: int = 0,
    preview: Sequence[Mapping[str, Any]] = (),
) -> IngestResult:
    wells = images = seen = 0
    counts = (func.count(Well.id.distinct()), func.count(Image.id))
    query = select(*counts, func.count(Image.content_sha256))
    query = query.outerjoin(Image, Image.well_id == Well.id)
    for row in rows_in(session, query, Well.plate_id, account.plates):
        wells, images, seen = wells + row[0], images + row[1], seen + row[2]
    issue, number = IngestIssue, func.count()
    reasons = select(issue.severity, issue.reason, number).where(issue.run_id == account.run_id)
    reasons = reasons.group_by(issue.severity, issue.reason)
    reasons = reasons.order_by(number.desc(), func.min(issue.id))
    return IngestResult(
        run_id=run_id,
        source=account.file,
        layout=layout.value,
        **account.counts,
        reasons=tuple((*row,) for row in session.execute(reasons)),
        issues=issues_of(session, account.run_id),
        plates=len(account.plates),
        wells=wells,
        images=images,
        missing_images=images - seen,
        cells=account.cells,
        feature_set=account.feature_set,
        segmentations=tuple(account.segmentations),
        notes=tuple(account.notes),
        preview=tuple(preview),
    )


def _write(
    workspace: Workspace,
    session: Session,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
    identity: FileIdentity | None,
    *,
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
    """Return how ``source`` is to be read: as asked for, else as its content says."""
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
    if params.pattern is not None and kind in (None, SourceKind.IMAGES):
        layout = Layout.IMAGE_FOLDER
    else:
        layout = detect(source, kind, params.sheet, params.map_columns)
    if len(params.plate) > 1 and layout is not Layout.PLATEMAP:
        raise UserInputError(
            f"{source.name} is read as {layout.value}, which is of one plate. Name it once "
            "with --plate; only a plate map may be of several."
        )
    has_map = layout is Layout.PLATEMAP or params.platemap is not None
    chosen = [item for item in options_of(params) if getattr(params, item.name)]
    wrong = [flag(item) for item in chosen if item.name in _OF_MAPS and not has_map]
    wrong += [flag(i) for i in chosen if layout.kind not in _ONLY_OF.get(i.name, SourceKind)]
    if wrong:
        raise UserInputError(
            f"{source.name} is read as {layout.value}, which does not use {' or '.join(wrong)}. "
            "Remove it, give the plate map that it is about with --platemap FILE, or say what the "
            f"source holds, for example: cellstore ingest masks {source.name}"
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

    See ``Store.refresh``. A file of the same size and time is taken as unchanged.
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
        with workspace.database.read() as session:
            number = select(func.count()).where(IngestIssue.run_id == run.id)
            problems = session.scalars(number).one()
            some = issues_of(session, run.id)
        run.result = {"images": len(images), "changed": len(changed), "problems": problems}
    some = tuple(issue for issue in some if issue.severity is Severity.PROBLEM)
    return RefreshResult(run.id, len(images), len(changed), problems, some)


@dataclass(frozen=True)
class RelocateResult(Shown):
    """Which ``folders`` (old, new, files) are elsewhere now; ``missing`` files are in neither."""

    folders: tuple[tuple[str, str, int], ...]
    files: int
    missing: int
    dry_run: bool


def relocate(
    workspace: Workspace,
    old: str,
    new: str,
    *,
    dry_run: bool = False,
    reason: str | None = None,
) -> RelocateResult:
    """Say that the folders whose names begin with ``old`` begin with ``new`` from now on.

    See ``Store.relocate``. Jobs that failed are open again.
    """
    old, new = (
        text if is_remote(text) or "\\" in text else os.path.abspath(text)  # noqa: PTH100 - no links
        for text in (old, new)
    )
    if old == new:
        raise UserInputError(f"{shown(old)} is the old and the new folder. Name another one.")
    per_folder: Counter[int] = Counter()
    missing = 0
    wrong: list[str] = []
    times: list[dict[str, int]] = []
    with workspace.database.read() as session:
        with_files = select(Folder.id, Folder.uri).where(Folder.id.in_(select(ImageFile.folder_id)))
        folders = {row.id: row.uri for row in session.execute(with_files)}
        targets = {number: map_folder(uri, [(old, new)]) for number, uri in folders.items()}
        targets = {number: uri for number, uri in targets.items() if uri != folders[number]}
        if not targets:
            raise UnknownNameError.of("folder", shown(old), map(shown, folders.values()))

        def look(row: Any) -> tuple[Any, str, int | None]:
            """Return what is wrong with a file, and its time if it is another one."""
            here, there = (join(uris[row.folder_id], row.name) for uris in (folders, targets))
            if not exists(there):
                return row, "gone" if is_remote(here) or not exists(here) else "not there", None
            at = stat(there)
            same = at.size_bytes == row.size_bytes
            if same and (is_remote(there) or at.mtime_ns == row.modified_ns):
                return row, "", None
            same = same and probe(there).sha256 == row.sha256
            return row, "" if same else "another file there", at.mtime_ns

        columns = (ImageFile.id, ImageFile.folder_id, ImageFile.name, ImageFile.sha256)
        query = select(*columns, ImageFile.size_bytes, ImageFile.modified_ns)
        query = query.where(ImageFile.folder_id.in_(targets), ImageFile.sha256.is_not(None))
        rows = session.execute(query.order_by(ImageFile.id)).partitions(1000)
        with ThreadPoolExecutor(READERS) as pool:
            looks = (one for some in rows for one in pool.map(look, some))
            for row, problem, time in track(workspace.progress, "look at files", None, looks):
                per_folder[row.folder_id] += 1
                if problem == "gone":
                    missing += 1
                elif problem:
                    wrong.append(f"{row.name} is {problem}")
                elif time is not None:
                    times.append({"id": row.id, "modified_ns": time})
    total = per_folder.total()
    if wrong or (total and missing == total):
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
            if times:
                session.execute(update(ImageFile), times)
            numbers = select(Folder.id).where(Folder.uri.in_(set(targets.values())))
            files = select(ImageFile.image_id).where(ImageFile.folder_id.in_(numbers))
            requeue(session, Job.image_id.in_(files))
            record_events(session, changes, reason=reason)
    moved = ((shown(folders[n]), shown(uri), per_folder[n]) for n, uri in targets.items())
    return RelocateResult(tuple(moved), total, missing, dry_run)


# ---- Dry run ----


def _dry_run(
    workspace: Workspace,
    source: Path,
    layout: Layout,
    params: IngestParams,
    images: ImageSource | None,
) -> IngestResult:
    """Bring a source in, say what became of it, and undo all of it. Files are not looked at."""
    account = Account(0, writable(source.name))
    preview: list[dict[str, Any]] = []
    if layout.kind is SourceKind.MASKS:
        from .ingest_masks import ingest_masks

        preview = ingest_masks(workspace, source, params, account, dry_run=True)
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
        last_well = session.scalar(select(func.max(Well.id))) or 0
        if images is not None:
            ingest_images(workspace, session, images, account, 0)
            preview = _first_images(session, account, layout.kind)
        elif layout.kind is not SourceKind.MASKS:
            _write(workspace, session, source, layout, params, account, None)
            if layout.kind is SourceKind.TREATMENTS:
                preview = _changed_wells(session, account, last_well)
            else:
                preview = _first_images(session, account, layout.kind)
        account.flush(session)
        result = _result(session, account, layout, preview=preview)
        session.rollback()
    return result


def _first_images(session: Session, account: Account, kind: SourceKind) -> list[dict[str, Any]]:
    """Return the files of the first images, or the first images that got cells."""
    names = (Plate.barcode.label("plate"), Well.name.label("well"))
    field = (Image.site, Image.plane, Image.time_point)
    query: Any
    if kind is SourceKind.FEATURES:
        query = select(*names, *field, Segmentation.n_cells.label("cells")).select_from(Image)
        query = query.join(Segmentation, Segmentation.image_id == Image.id)
        query = query.where(Segmentation.run_id == account.run_id).order_by(Segmentation.id)
    else:
        treatment = Treatment.name_with_dose.label("treatment")
        query = select(ImageFile.name.label("file"), *names, *field, ImageFile.channel, treatment)
        query = query.select_from(Image).join(ImageFile, ImageFile.image_id == Image.id)
        first = set(account.images[:SHOWN])
        query = query.where(Image.id.in_(first)).order_by(Image.id, ImageFile.id)
    query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    query = query.outerjoin(Treatment, Treatment.id == Well.treatment_id).limit(SHOWN)
    return [dict(row) for row in session.execute(query).mappings()]


def _changed_wells(session: Session, account: Account, last: int) -> list[dict[str, Any]]:
    """Return the wells of the plates, and others that changed; ``last`` of those that were there.

    ``change``: that they are new, or what they had.
    """
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
        .limit(SHOWN)
    )
    found: list[dict[str, Any]] = []
    for well, plate, name, treatment, control in session.execute(query):
        change = "new" if well > last else ""
        # A well whose metadata alone was changed has what it had.
        if not change and {"treatment_id", "control"} & changed.get(well, {}).keys():
            old = {"treatment": treatment, "control": control, **changed[well]}
            role = f" ({old['control']})" if old["control"] else ""
            role += f", identifier {old['identifier']}" if old.get("identifier") else ""
            change = f"was {old['treatment'] or 'not known'}{role}"
        row = {"plate": plate, "well": name, "treatment": treatment, "control": control}
        found.append(row | {"change": change})
    return found
