"""What an ingest would make of a source, without writing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import select

from ...config import EVERYTHING, ImageInput, IngestParams, Selection
from ...db.bulk import one_ingest_at_a_time
from ...enums import Look, Severity, Stage
from ...errors import UnknownNameError, UserInputError
from ...io.filenames import format_well
from ...io.layouts import Layout, SourceKind, detect
from ...io.records import ImageRecord, Refusal
from ...io.uris import PathMap, shown, writable
from ...jobs.lookup import FoundImage, NoMatch
from ...jobs.recipes import RecipeSpec, register
from ...jobs.runs import RunHandle, running
from ...jobs.selection import images_of
from ...jobs.workspace import Workspace
from ...models import Image, Recipe
from .account import (
    SHOWN,
    Account,
    Earlier,
    FileIdentity,
    Issue,
    UndoneError,
    corrected_since,
    find_earlier,
    repeat_issues,
    updated_since,
)
from .ingest_images import (
    Finder,
    ImagesDone,
    ImageSource,
    images_of_plates,
    ingest_images,
    look_again,
    look_at_files,
    summary,
)
from .ingest_masks import MaskPlan, plan_masks

REFRESH_VERSION = 1


@dataclass(frozen=True)
class RefreshResult:
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
        recipe = register(
            session, RecipeSpec(Stage.INGEST, REFRESH_VERSION, {"again": asdict(selection)})
        )
        finder = Finder.of(session, None, Look.HERE)
        ids = session.scalars(select(Image.id).where(Image.id.in_(query)).order_by(Image.id))
        images = np.fromiter(ids, dtype=np.int64)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, "known files")
        changed = look_at_files(workspace, images, finder, account)
        with workspace.database.begin() as session:
            account.flush(session)
        problems = sum(account.reasons.values())
        run.result = {"images": len(images), "changed": len(changed), "problems": problems}
    shown = tuple(issue for issue in account.shown if issue.severity is Severity.PROBLEM)
    return RefreshResult(run.id, len(images), len(changed), problems, shown)


VERSION = 2


@dataclass(frozen=True)
class IngestResult:
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


def ingest(workspace: Workspace, source: Path, params: IngestParams | None = None) -> IngestResult:
    """Bring a source in: a table, an index, a database, a folder; doing it again changes nothing.

    Raises:
        BadTableError: the source is empty, damaged, ambiguous, or lacks columns. Nothing is
            written.
        UndoneError: rows were refused under ``strict``. Nothing of the source is written.
        UserInputError: a file or folder is not there, or the plate is not known.
    """
    params = params or IngestParams()
    layout = layout_for(source, params)
    if layout.kind is SourceKind.IMAGES:
        return _images(workspace, ImageSource.open(source, layout, params))
    if layout.kind is SourceKind.MASKS:
        return _masks(workspace, source, params)
    if layout.kind is SourceKind.FEATURES:
        return _features(workspace, source, layout, params)
    return _treatments(workspace, source, layout, params)


def layout_for(source: Path, params: IngestParams) -> Layout:
    """Return how ``source`` is to be read: as asked for, else as its content says.

    Raises:
        BadTableError: it is none of the known layouts, or more than one.
        UserInputError: there is no such file, or it is of another kind than asked for.
    """
    if not source.exists():
        raise UserInputError(f"There is no file or folder {source}. Check the path.")
    found = _layout_for(source, params)
    _check_options(source, found, params)
    return found


def _check_options(source: Path, layout: Layout, params: IngestParams) -> None:
    named = layout.kind in (SourceKind.FEATURES, SourceKind.MASKS)
    wrong = [
        *(["--name"] if params.name is not None and not named else []),
        *(["--binary-masks"] if params.binary and layout.kind is not SourceKind.MASKS else []),
    ]
    if wrong:
        raise UserInputError(
            f"{source.name} is read as {layout.value}, and {' and '.join(wrong)} would mean "
            "nothing there. Leave it away, or say what the source holds with a word before it."
        )


def _layout_for(source: Path, params: IngestParams) -> Layout:
    kind = SourceKind(params.kind) if params.kind else None
    if params.layout is None and params.pattern is None:
        return detect(source, kind)
    forced = _named(params.layout) if params.layout else Layout.PATTERN_FOLDER
    if kind is not None and forced.kind is not kind:
        raise UserInputError(
            f"The layout {forced.value} is read as {forced.kind.value}, not as {kind.value}. "
            f"Leave the word {kind.value!r} or the layout away."
        )
    return forced


def _named(layout: str) -> Layout:
    if layout not in list(Layout):
        known = ", ".join(item.value for item in Layout)
        raise UnknownNameError(f"Unknown layout {layout!r}. Known: {known}.")
    return Layout(layout)


def _images(workspace: Workspace, source: ImageSource) -> IngestResult:
    identity = FileIdentity.of(source.path)
    recipe = _recipe(
        workspace, source.layout, source.params, [identity, *map(FileIdentity.of, source.files)]
    )
    earlier = _earlier(workspace, recipe, source.params)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        if earlier is not None:
            done = _again(workspace, source.params, earlier, account)
        else:
            with _undone_told(workspace, account):
                done = ingest_images(workspace, run.id, source, account, identity.lines)
        with workspace.database.begin() as session:
            account.close(session, source.layout.value, identity)
        run.result = {**_counts(account), "plates": list(done.plates)}
    return _result(run, source.layout, account, done)


def _earlier(workspace: Workspace, recipe: Recipe, params: IngestParams) -> Earlier | None:
    """Return the run that read the very same source before, if that is enough now."""
    if params.reread:
        return None
    with workspace.database.read() as session:
        earlier = find_earlier(session, recipe.id)
    less_strict = earlier is not None and params.strict and earlier.refused
    return None if less_strict else earlier


def _again(
    workspace: Workspace, params: IngestParams, earlier: Earlier, account: Account
) -> ImagesDone:
    """Account for a source that was read whole before: only its files can have changed."""
    with workspace.database.begin() as session:
        repeat_issues(session, earlier, account)
        corrected = corrected_since(session, earlier)
        later = updated_since(session, earlier)
        images = images_of_plates(session, earlier.plates)
    changed = look_again(workspace, images, params, account)
    account.rows, account.refused = earlier.rows, earlier.refused
    account.updated = min(len(changed), earlier.rows - earlier.refused)
    account.unchanged = earlier.rows - earlier.refused - account.updated
    if later:
        account.notes.append(
            f"Run {later} has updated images of these plates since this source was read first; "
            "that stays. To let this source have the last word: --reread"
        )
    if corrected:
        account.notes.append(
            f"Wells corrected since this table was read first: {corrected:,}. They stay so. "
            "What a well had: cellstore audit well PLATE/A01. To undo corrections: --reread"
        )
    return summary(workspace, earlier.plates)


def _treatments(
    workspace: Workspace, source: Path, layout: Layout, params: IngestParams
) -> IngestResult:
    from .ingest_treatments import ingest_treatments

    identity = FileIdentity.of(source)
    beside = [path for path in (*params.compounds, params.barcodes, params.aliases) if path]
    recipe = _recipe(workspace, layout, params, [identity, *map(FileIdentity.of, beside)])
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        with _undone_told(workspace, account), workspace.database.begin() as session:
            one_ingest_at_a_time(session)
            plates = ingest_treatments(workspace, session, run.id, source, layout, params, account)
            _refuse_if_strict(params, account)
            account.close(session, layout.value, identity)
        run.result = {**_counts(account), "plates": list(plates)}
    return _result(run, layout, account, summary(workspace, plates))


def _features(
    workspace: Workspace, source: Path, layout: Layout, params: IngestParams
) -> IngestResult:
    from .ingest_features import ingest_features  # Arrow is slow to import

    identity = FileIdentity.of(source)
    recipe = _recipe(workspace, layout, params, [identity])
    earlier = _earlier(workspace, recipe, params)
    if earlier is not None:
        return _features_again(workspace, recipe, earlier, identity, layout)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        with _undone_told(workspace, account), workspace.database.begin() as session:
            one_ingest_at_a_time(session)
            done = ingest_features(
                workspace,
                session,
                run.id,
                source,
                layout,
                name=params.name,
                plate=params.plate,
                account=account,
                maps=PathMap(params.maps),
                identity=identity,
            )
            account.gather(done.accounts)
            _refuse_if_strict(params, account)
        found = {"feature_set": done.feature_set, "segmentation": done.segmentation}
        run.result = {**_counts(account), **found, "plates": list(done.plates)}
    result = _of_features(workspace, run, layout, account)
    return replace(result, cells=done.cells)


def _features_again(
    workspace: Workspace,
    recipe: Recipe,
    earlier: Earlier,
    identity: FileIdentity,
    layout: Layout,
) -> IngestResult:
    """Account for features that were read before: a feature set never changes."""
    from .ingest_features import check_files

    name = earlier.result["feature_set"]
    if name is not None:
        with workspace.database.read() as session:
            check_files(session, workspace.artifacts, name)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        with workspace.database.begin() as session:
            repeat_issues(session, earlier, account)
            account.rows, account.refused = earlier.rows, earlier.refused
            account.unchanged = earlier.rows - earlier.refused
            account.close(session, layout.value, identity)
        run.result = {**earlier.result, **_counts(account)}
    return _of_features(workspace, run, layout, account)


def _of_features(
    workspace: Workspace, run: RunHandle, layout: Layout, account: Account
) -> IngestResult:
    segmentation = run.result["segmentation"]
    return replace(
        _result(run, layout, account, summary(workspace, run.result["plates"])),
        feature_set=run.result["feature_set"],
        segmentations=(segmentation,) if segmentation else (),
    )


def _masks(workspace: Workspace, source: Path, params: IngestParams) -> IngestResult:
    from .ingest_masks import ingest_masks

    identity = FileIdentity.of(source)
    recipe = _recipe(workspace, Layout.MASKS, params, [identity])
    with running(workspace.database, recipe) as run:
        account = Account(run.id, identity.name)
        with _undone_told(workspace, account):
            done = ingest_masks(
                workspace,
                run.id,
                source,
                account=account,
                name=params.name,
                plate=params.plate,
                binary=params.binary,
                image=ImageInput(tuple(name for name, _ in params.channels)),
                strict=params.strict,
            )
        with workspace.database.begin() as session:
            account.close(session, Layout.MASKS.value, identity)
        run.result = {**_counts(account), "cells": done.cells, "plates": list(done.plates)}
    result = _result(run, Layout.MASKS, account, summary(workspace, done.plates))
    return replace(result, cells=done.cells, segmentations=done.recipe_ids)


@contextmanager
def _undone_told(workspace: Workspace, account: Account) -> Iterator[None]:
    """Keep the issues of rows that are undone because some were refused."""
    try:
        yield
    except UndoneError:
        account.forget_written()
        with workspace.database.begin() as session:
            account.flush(session)
        raise


def _refuse_if_strict(params: IngestParams, account: Account) -> None:
    if params.strict and account.refused:
        raise UndoneError.of(account)


def _recipe(
    workspace: Workspace, layout: Layout, params: IngestParams, files: Sequence[FileIdentity]
) -> Recipe:
    named = [{"name": file.name, "sha256": file.sha256} for file in files]
    options = {
        name: writable(str(value)) if isinstance(value, Path) else value
        for name, value in asdict(params).items()
        if name not in ("kind", "layout", "compounds", "look", "strict", "reread") and value
    }
    options["maps"] = [[old, shown(new)] for old, new in params.maps]
    parameters = {"layout": layout.value, "files": named, "options": options}
    with workspace.database.begin() as session:
        return register(session, RecipeSpec(Stage.INGEST, VERSION, parameters))


def _counts(account: Account) -> dict[str, Any]:
    return {
        "rows": account.rows,
        "created": account.created,
        "updated": account.updated,
        "unchanged": account.unchanged,
        "refused": account.refused,
    }


def _result(run: RunHandle, layout: Layout, account: Account, done: ImagesDone) -> IngestResult:
    return IngestResult(
        run_id=run.id,
        source=account.file,
        layout=layout.value,
        **_counts(account),
        reasons=reasons_of(account.reasons),
        issues=tuple(account.shown),
        plates=len(done.plates),
        wells=done.wells,
        images=done.images,
        missing_images=done.missing,
        notes=tuple(account.notes),
    )


def reasons_of(reasons: Counter[tuple[Severity, str]]) -> tuple[tuple[Severity, str, int], ...]:
    """Return (severity, reason, number), the most frequent first."""
    return tuple((*key, number) for key, number in reasons.most_common())


MOST = 1_000_000
"""Plates, wells and images are told apart up to this many of each."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PreviewRow:
    """What one file would become: a channel of an image, or ``cells`` masks of an image."""

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


@dataclass
class Preview:
    """What a source would become: ``files`` are the first of them, ``images`` counts fields.

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


def preview(
    source: Path, params: IngestParams | None = None, workspace: Workspace | None = None
) -> Preview:
    """Read images or masks and say what each file would become.

    Masks need the ``workspace`` that has their images; images need none.

    Raises:
        BadTableError: the source cannot be read.
        MissingExtraError: masks, and scikit-image is not installed.
        UserInputError: the source holds features or treatments, or masks and no ``workspace``.
    """
    params = params or IngestParams()
    layout = layout_for(source, params)
    if layout.kind is SourceKind.IMAGES:
        return _of_images(source, layout, params)
    if layout.kind is SourceKind.MASKS:
        return _of_masks(source, params, workspace)
    raise UserInputError(
        f"{source.name} would be read as {layout.value}: {layout.kind.value}, not images or masks. "
        "A dry run shows what files become; ingest it, or leave --dry-run away."
    )


def _of_images(source: Path, layout: Layout, params: IngestParams) -> Preview:
    found = Preview(source.name, layout.value)
    images: set[tuple[str, int, int, int, int, int]] = set()
    for row in ImageSource.open(source, layout, params).records():
        found.rows += 1
        if isinstance(row, Refusal):
            _refuse(found, Issue(Severity.REFUSED, found.source, *row))
        else:
            _count(found, images, (row.plate, *row[3:8]))
            _add(found, row)
    found.images = len(images)
    return found


def _of_masks(source: Path, params: IngestParams, workspace: Workspace | None) -> Preview:
    if workspace is None:
        raise UserInputError(
            "A dry run of masks looks for their images in a store. Name it with --store."
        )
    found = Preview(source.name, Layout.MASKS.value)
    images: set[int] = set()
    plans = plan_masks(
        workspace,
        source,
        name=params.name,
        plate=params.plate,
        binary=params.binary,
        image=ImageInput(tuple(name for name, _ in params.channels)),
    )
    for plan in plans:
        found.rows += 1
        if isinstance(plan.image, NoMatch):
            _refuse(found, Issue(Severity.REFUSED, plan.file, None, *plan.image))
        else:
            _count(found, images, plan.image.id)
            _add_masks(found, plan, plan.image)
    found.images = len(images)
    return found


def _refuse(found: Preview, issue: Issue) -> None:
    found.refused += 1
    if len(found.issues) < SHOWN:
        found.issues.append(issue)


def _count(found: Preview, known: set[Key], key: Key) -> None:
    if len(known) < MOST:
        known.add(key)
    elif key not in known:
        found.at_least = True


def _add(found: Preview, row: ImageRecord) -> None:
    well = format_well(row.row, row.column)
    _count(found, found.plates, row.plate)
    _count(found, found.wells, (row.plate, well))
    found.channels.update(ref.channel for ref in row.files)
    room = SHOWN - len(found.files)
    treatment = row.treatment.pert_iname if row.treatment else None
    place = (row.plate, well, row.site, row.plane, row.time_point)
    found.files += [
        PreviewRow(ref.name, *place, ref.channel, treatment) for ref in islice(row.files, room)
    ]


def _add_masks(found: Preview, plan: MaskPlan, image: FoundImage) -> None:
    _count(found, found.plates, image.plate)
    _count(found, found.wells, (image.plate, image.well))
    if len(found.files) < SHOWN:
        place = (image.plate, image.well, image.site, image.plane, image.time_point)
        row = PreviewRow(plan.file, *place, objects=plan.kind, cells=plan.cells)
        found.files.append(row)
