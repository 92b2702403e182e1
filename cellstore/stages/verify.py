"""Whether a store is whole: its database, the rows that jobs wrote, and all files."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import func, select, true
from sqlalchemy.orm import Session, aliased

from ..analysis.features import BASIC_GROUP
from ..analysis.quality import PlaneQuality
from ..artifacts import ArtifactFolder, open_atomically, sha256_of, sweep
from ..config import Limits
from ..db import migrate
from ..db.bulk import rows_in
from ..db.events import (
    BEGUN,
    MODULUS,
    Change,
    broken_events,
    record_events,
    run_digests,
    run_rows,
    table_digests,
)
from ..db.session import DANGLING, Database
from ..enums import FeatureStorage, Stage, Status
from ..errors import ImageError, StorageError, UserInputError
from ..io.image_files import decode_tiff
from ..jobs.execute import cores
from ..jobs.gone_files import GoneFiles, find_gone, lost_files
from ..jobs.queue import close_dead_runs
from ..jobs.runs import LOCAL, RecipeSpec, digest, digest_of_numbers, fingerprint
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    Event,
    FeatureFile,
    FeatureSet,
    Image,
    ImageQuality,
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
from ..notebooks import Shown
from ..query.feature_files import stream_ids
from ..query.guard import locked_connection
from ..query.source import PREDICTIONS, Source
from ..settings import track
from .split import fingerprint_of_split

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True)
class Problem:
    """What is not as it should be: a file, or the database (its address), or an image of it.

    ``path`` of a file is relative to the artifacts folder.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class VerifyResult(Shown):
    """What was found. ``orphans`` are files that no row names; ``young`` may still get a row.

    ``segmentations`` are those whose masks are known, ``feature_files`` the files of feature sets,
    ``jobs`` those whose rows were compared with their digest. ``gone``: folders from which image
    files are gone. ``commands`` make stored files again that are gone.
    """

    files: int
    segmentations: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    young: int
    removed: int
    feature_files: int = 0
    jobs: int = 0
    gone: tuple[GoneFiles, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (orphans that were removed are not)."""
        return not (self.problems or self.gone) and len(self.orphans) == self.removed


BATCH = 200
"""Rows that are looked at together."""

ROWS_AT_ONCE = 200_000
"""Predictions that are looked at together."""

FROM_BACKUP = "Put the store back from a backup: cellstore restore FILE"
CHANGED = "the file is not what was written (sha256 differs)"
MADE_AGAIN = ("mask/", "flow/", "features/", "profiles/")
"""How the paths begin of files that a command can make again."""


def verify(
    workspace: Workspace,
    *,
    fix: bool = False,
    minutes: float = 10.0,
    against: Path | None = None,
) -> VerifyResult:
    """Look at the database, and compare rows and files with their digests; look for orphans.

    Masks and features are compared with their cells, runs, splits and recipes with the ledger,
    which must be the chain it was, and image files be where they were seen.

    ``fix`` removes orphans: files left by a crash between writing a file and its row. Those
    younger than ``minutes`` are left alone, as a running command may be about to name them. It also
    removes masks, flows, features and profiles whose bytes have changed: then a command makes them
    again. It makes triggers again that are gone or changed.
    """
    head = None if against is None else read_seal(against)
    database, folder = workspace.database, workspace.artifacts
    broken = schema_problems(database)
    reading: Future[tuple[int, list[Problem]]] = Future()
    with ThreadPoolExecutor(1) as pool:  # the database looks at itself while we read its rows
        looking = pool.submit(database.damage, quick=False)
        try:
            reading.set_result(check_rows(workspace, looking))
        except Exception as error:  # of a damaged database anything can be wrong
            reading.set_exception(error)
    damage = looking.result()
    # What is read of such a database may be anything.
    hopeless = any(DANGLING not in reason for reason in damage)
    hopeless |= any(FROM_BACKUP in reason and ": index" not in reason for reason in broken)
    if fix and broken and not hopeless:
        broken = schema_problems(database, fix=True)
    broken += [f"{reason}. {FROM_BACKUP}" for reason in damage]
    of_database = [Problem(database.shown, reason) for reason in broken]
    if hopeless:
        return VerifyResult(0, 0, tuple(of_database), (), 0, 0)
    jobs, changed = reading.result()
    # The folder is listed before the rows are read: what a running command adds is no orphan.
    before = min(time.time() - 60 * minutes, _oldest_running(workspace))
    if fix:  # what is not whole, and whose command was killed, gets no row
        for at in (folder.root, workspace.settings.cache, workspace.settings.cache / "spill"):
            sweep(at)
    there = list(folder.walk())
    files, masks, found = check_files(workspace)
    # Some were forgotten meanwhile: a training replaces its state.
    forgotten = set(_unnamed(workspace, [problem.path for problem in found]))
    problems = [problem for problem in found if problem.path not in forgotten]
    features, odd = check_features(workspace, {problem.path for problem in problems})
    ledger = check_ledger(workspace, head)
    unnamed, old = _unnamed(workspace, there), []
    for path in unnamed:
        with suppress(FileNotFoundError):
            if (folder.root / path).lstat().st_mtime <= before:
                old.append(path)
    if fix:
        odd_files = [p.path for p in problems if p.reason == CHANGED]
        made = [path for path in odd_files if path.startswith(MADE_AGAIN)]
        # Not those whose own name says that they are right: their row was changed.
        made = [path for path in made if sha256_of(folder.locate(path)) != Path(path).stem]
        _remove(workspace, [*old, *made])
    with database.read() as session:
        gone, commands = tuple(find_gone(session)), lost_files(session, folder)[1]
    return VerifyResult(
        files=files,
        segmentations=masks,
        problems=(*of_database, *problems, *odd, *changed, *ledger),
        orphans=tuple(old),
        young=len(unnamed) - len(old),
        removed=len(old) if fix else 0,
        feature_files=features,
        jobs=jobs,
        gone=gone,
        commands=commands,
    )


def _remove(workspace: Workspace, paths: Sequence[str]) -> None:
    for path in paths:
        try:
            # Not resolved: of a link, the link is removed, never what it points to.
            (workspace.artifacts.root / path).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be removed: {error.strerror}. Correct the permissions of the "
                "store, then run the same command again."
            ) from error
    with workspace.database.begin() as session:
        record_events(session, [Change("artifacts", None, {"path": path}, None) for path in paths])


def schema_problems(database: Database, *, fix: bool = False) -> list[str]:
    """Say which tables, triggers and views are not as cellstore made them, and what to do.

    ``fix`` makes triggers and views again.
    """
    found = [f"{reason}. {FROM_BACKUP}" for reason in migrate.differences(database)]
    changed = migrate.changed_triggers(database)
    ours = [reason for reason in changed if not reason.endswith("of cellstore")]
    if fix and ours:
        migrate.put_back_triggers(database)
        with database.begin() as session:
            record_events(session, [Change("store", None, {"changed": ours}, None)])
    way = "It was made again" if fix else "Make it again with: cellstore verify --fix"
    found += [f"{reason}. {way}" for reason in ours]
    found += [f"{reason}, and may change rows. Drop it" for reason in changed if reason not in ours]
    return found


def seal(workspace: Workspace, file: Path) -> dict[str, Any]:
    """Write the end of the ledger to a file, to be kept where the owner cannot change it."""
    with workspace.database.read() as session:
        last = select(Event.id, Event.sha256).order_by(Event.id.desc()).limit(1)
        row = session.execute(last).one()
        runs = session.scalar(select(func.count()).select_from(Run)) or 0
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"event": row.id, "sha256": row.sha256, "runs": runs, "made_at": made_at}
    with open_atomically(file) as out:
        out.write(json.dumps({"cellstore seal": 1, **head}, indent=1).encode() + b"\n")
    return head


def read_seal(file: Path) -> dict[str, Any]:
    """Return what :func:`seal` wrote."""
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
        return {name: head[name] for name in ("event", "sha256", "made_at")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserInputError(
            f"{file} was not written by cellstore seal. Check the path."
        ) from error


def _oldest_running(workspace: Workspace) -> float:
    """Return when the oldest run began that may still be about to name its files.

    A run of more than a day ago was killed: nothing closed it.
    """
    now = datetime.now(UTC)
    query = select(func.min(Run.started_at)).where(
        Run.status == Status.RUNNING, Run.started_at > now - timedelta(days=1)
    )
    with workspace.database.begin() as session:
        close_dead_runs(session)
        found = session.scalar(query)
    return (found or now).timestamp()


def _unnamed(workspace: Workspace, there: Sequence[str]) -> list[str]:
    with workspace.database.read() as session:
        rows = rows_in(session, select(Artifact.path), Artifact.path, there)
    named = {row.path for row in rows}
    return [path for path in there if path not in named]


# --- files ----------------------------------------------------------------------------------------

_Masks: TypeAlias = list[tuple[str, list[int]]]
"""Of each segmentation that a file is the mask of: its image, and the numbers of its cells."""


def check_files(workspace: Workspace) -> tuple[int, int, list[Problem]]:
    """Count the stored files and the segmentations with masks, and say what is wrong with them."""
    files = select(Artifact.id, Artifact.path, Artifact.sha256).order_by(Artifact.id).limit(BATCH)
    cells_of_masks = (
        select(Segmentation.mask_artifact_id, Segmentation.id, Plate.barcode, Image.core_name)
        .add_columns(Cell.object_number)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
        .order_by(Segmentation.id, Cell.object_number)
    )
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(Artifact)) or 0
        masks = session.scalar(select(func.count(Segmentation.mask_artifact_id))) or 0
    problems: list[Problem] = []
    cells: dict[int | None, _Masks] = {}

    def look(file: Any) -> list[Problem]:
        return _check(workspace.artifacts, file.path, file.sha256, cells.get(file.id, []))

    last, found = 0, list[Any]([None])
    workspace.progress.start("verify files", total)
    try:
        # Reading, hashing and unpacking leave Python's lock alone, so threads share the work.
        with ThreadPoolExecutor(max(2, cores())) as pool:
            while found:
                with workspace.database.read() as session:
                    found = list(session.execute(files.where(Artifact.id > last)))
                    of_files = Segmentation.mask_artifact_id.in_([file.id for file in found])
                    rows = session.execute(cells_of_masks.where(of_files)).all()
                cells.clear()
                for (mask, _, barcode, core), group in groupby(rows, key=lambda row: row[:4]):
                    numbers = [row.object_number for row in group if row.object_number is not None]
                    cells.setdefault(mask, []).append((f"{barcode}/{core}", numbers))
                for reasons in pool.map(look, found):
                    problems += reasons
                    workspace.progress.advance()
                last = found[-1].id if found else last
    finally:
        workspace.progress.finish()
    return total, masks, problems


def _check(folder: ArtifactFolder, path: str, sha256: str, cells: _Masks) -> list[Problem]:
    """Say what is wrong with a file: its bytes, or the ``cells`` in a mask."""
    try:
        if not cells:
            return [] if sha256_of(folder.locate(path)) == sha256 else [Problem(path, CHANGED)]
        data = folder.locate(path).read_bytes()
    except FileNotFoundError:
        return [Problem(path, "the file is gone")]
    except StorageError as error:
        return [Problem(path, str(error))]
    except OSError as error:
        return [Problem(path, f"the file cannot be read ({error.strerror})")]
    if hashlib.sha256(data).hexdigest() != sha256:
        return [Problem(path, CHANGED)]
    try:
        masks = decode_tiff(data)
    except ImageError as error:
        return [Problem(path, f"{image}: {error}") for image, _ in cells]
    small = masks.dtype.kind == "u" and masks.dtype.itemsize <= 2  # counting is faster there
    inside = np.flatnonzero(np.bincount(masks.ravel())) if small else np.unique(masks)
    inside = inside[inside != 0]
    return [
        Problem(
            path,
            f"{image}: the mask has {len(inside)} cells, the database {len(numbers)}, "
            "or other labels",
        )
        for image, numbers in cells
        if not np.array_equal(inside, numbers)
    ]


_CELLS_OF_SET = """
    cells AS c JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN recipe_inputs AS i ON i.input_id = s.recipe_id WHERE i.recipe_id = {recipe}
"""
_FEATURE_FILES = """
    SELECT file, count(*), min(cell_id), max(cell_id), count(*) FILTER (nth > 1),
        count(*) FILTER (home IS NULL AND (until IS NULL OR until < cell_id))
    FROM (
        SELECT ids.*, homes.id AS home, deleted.until,
            row_number() OVER (PARTITION BY cell_id ORDER BY file) AS nth
        FROM ids
        LEFT JOIN homes ON homes.id = ids.cell_id
        ASOF LEFT JOIN deleted ON ids.cell_id >= deleted.since
    )
    GROUP BY file
"""
"""Of each file its rows, first and last cell; cells of a file before it; cells that are nowhere."""


def check_features(workspace: Workspace, broken: set[str]) -> tuple[int, list[Problem]]:
    """Count the files of feature sets, and say which do not fit their cells."""
    query = (
        select(Artifact.path, FeatureSet.name, FeatureSet.recipe_id)
        .add_columns(FeatureFile.n_rows, FeatureFile.first_cell_id, FeatureFile.last_cell_id)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .order_by(FeatureSet.recipe_id, FeatureFile.first_cell_id, Artifact.path)
    )
    with workspace.database.read() as session:
        files = session.execute(query).all()
        of_cells = (Event.table_name == "cells", Event.new.is_(None))
        gone = [row["ids"] for row in session.scalars(select(Event.old).where(*of_cells))]
    problems = []
    listed = track(workspace.progress, "verify features", len(files), files)
    spill = workspace.settings.make_cache("spill")
    with closing(Source(workspace.database)) as source, locked_connection(Limits(), spill) as duck:
        # Files keep the cells of a plate that was deleted.
        duck.execute("CREATE TABLE deleted (since BIGINT, until BIGINT)")
        for ids in chain.from_iterable(gone):
            duck.execute("INSERT INTO deleted VALUES (?, ?)", ids)
        for recipe_id, group in groupby(listed, key=attrgetter("recipe_id")):
            duck.execute("CREATE OR REPLACE TABLE ids (file BIGINT, cell_id BIGINT)")
            of_set = [file for file in group if file.path not in broken]
            unread = set[int]()
            for number, file in enumerate(of_set):
                try:
                    for ids in stream_ids(workspace.artifacts.locate(file.path)):
                        duck.register("block", pa.table({"cell_id": ids}))
                        duck.execute("INSERT INTO ids SELECT ?, cell_id FROM block", [number])
                except StorageError as error:
                    unread.add(number)
                    problems.append(Problem(file.path, f"feature set {file.name}: {error}"))
            create, of_recipe = "CREATE OR REPLACE TABLE homes AS FROM {rows}", {"id": "BIGINT"}
            cells = _CELLS_OF_SET.format(recipe=int(recipe_id))
            source.feed(duck, create, of_recipe, ["c.id"], [cells])
            found = {number: values for number, *values in duck.execute(_FEATURE_FILES).fetchall()}
            for number, file in enumerate(of_set):
                reason = _features_reason(file, found.get(number, [0] * 5))
                if reason is not None and number not in unread:
                    problems.append(Problem(file.path, f"feature set {file.name}: {reason}"))
    return len(files), problems


def _features_reason(file: Any, found: Sequence[int]) -> str | None:
    *content, twice, homeless = found
    recorded = [file.n_rows, file.first_cell_id, file.last_cell_id]
    if content != recorded:
        words = ("{} rows of cells {} to {}".format(*some) for some in (content, recorded))
        return "the file has {}, the database {}".format(*words)
    if twice:
        return f"{twice} of its cells are in another file of the set, too"
    return f"{homeless} of its cells are not in the database" if homeless else None


# --- the ledger ----------------------------------------------------------------------------------


def check_ledger(workspace: Workspace, head: dict[str, Any] | None = None) -> list[Problem]:
    """Compare runs, splits, recipes and treatments with the entries of the ledger.

    ``head``: the end of the chain as it was sealed once; it must be in the chain still.
    """
    shown = workspace.database.shown
    with workspace.database.read(steady=True) as session:  # commands may run meanwhile
        problems = [Problem(shown, reason) for reason in broken_events(session)]
        if head is not None:
            kept = session.scalar(select(Event.sha256).where(Event.id == head["event"]))
            if kept != head["sha256"]:
                what = "gone" if kept is None else "another one now"
                problems.append(
                    Problem(
                        shown,
                        f"event {head['event']}, the last one when the ledger was sealed at "
                        f"{head['made_at']}, is {what}: what was done before was changed since",
                    )
                )
        for odd in (_odd_runs, _odd_recipes, _odd_splits, _odd_treatments):
            problems += [Problem(name, reason) for name, reason in odd(session)]
    return problems


def _odd_runs(session: Session) -> Iterator[tuple[str, str]]:
    """Yield the runs that are not what the ledger says, with the reason."""
    entries: dict[int, dict[str, Any]] = {}
    query = select(Event.row_id, Event.new).where(Event.table_name == "runs").order_by(Event.id)
    for run_id, new in session.execute(query):
        if "row" in (new or {}):
            entries[run_id] = new
        elif "removed" in (new or {}) and "digests" in entries.get(run_id, {}):
            digests = entries[run_id]["digests"]
            for table, less in new["removed"].items():
                left = (int(digests.get(table, "0"), 16) - int(less, 16)) % MODULUS
                digests[table] = f"{left:064x}"
    wrote: dict[int, dict[str, str]] = defaultdict(dict)
    for (run_id, table), found in run_digests(session).items():
        wrote[run_id][table] = found
    for run_id, row in run_rows(session):
        entry, name = entries.pop(run_id, None), f"run {run_id}"
        if entry is None:
            yield (
                f"run {run_id}",
                "table runs: the ledger knows no such run; it was not made by cellstore",
            )
            continue
        begins = row["ended_at"] is None
        for column in BEGUN if begins else row:
            was = entry["row"].get(column)
            if row[column] != was:
                yield name, f"table runs: {column} is {row[column]}, and was {was}"
        if begins:
            continue
        nothing, digests = "0" * 64, entry.get("digests", {})  # none: it was not ended by cellstore
        for table in sorted({*wrote[run_id], *digests}):
            now, then = wrote[run_id].get(table, nothing), digests.get(table, nothing)
            if now != then:
                yield name, f"table {table}: its rows are not what the run wrote"
    for run_id in entries:
        yield f"run {run_id}", "table runs: the run is gone"
    of_weights = (
        select(Run.id, Recipe.weights_sha256, Run.parent_id)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.weights_sha256.is_not(None), Run.parent_id.is_not(None))
    )
    for run_id, sha256, parent_id in session.execute(of_weights).all():
        written = select(Artifact.sha256).join(RunArtifact).where(RunArtifact.run_id == parent_id)
        if sha256 not in session.scalars(written).all():
            yield (
                f"run {run_id}",
                f"table artifacts: its network is no file of run {parent_id} any more",
            )


def _odd_recipes(session: Session) -> Iterator[tuple[str, str]]:
    """Yield the recipes whose fingerprint is not that of their rows."""
    inputs: dict[int, list[Recipe]] = defaultdict(list)
    recipes = {item.id: item for item in session.scalars(select(Recipe).order_by(Recipe.id))}
    for link in session.scalars(select(RecipeInput)):
        inputs[link.recipe_id].append(recipes[link.input_id])
    for number, item in recipes.items():
        for local in ((), LOCAL):
            values = {k: v for k, v in item.parameters.items() if k not in local}
            read = tuple(inputs[number])
            spec = RecipeSpec(item.stage, item.version, values, item.weights_sha256, read)
            if fingerprint(spec) == item.fingerprint:
                break
        else:
            yield f"recipe {number}", "table recipes: its fingerprint is not that of its parameters"


def _odd_splits(session: Session) -> Iterator[tuple[str, str]]:
    """Yield the splits whose fingerprint is not that of their members and labels."""
    renamed = select(Event.row_id, Event.created_at, Event.old).order_by(Event.id.desc())
    renamed = renamed.where(Event.table_name == "plates", Event.old.is_not(None))
    names = [row for row in session.execute(renamed) if row.row_id and "barcode" in row.old]
    for split in session.scalars(select(Split).order_by(Split.id)).all():
        barcodes: dict[int, str] = dict(session.execute(select(Plate.id, Plate.barcode)).all())
        for plate_id, at, old in names:  # the name that it had then
            if at > split.created_at and plate_id in barcodes:
                barcodes[plate_id] = old["barcode"]
        query = (
            select(Well.plate_id, Well.well_row, Well.well_column, Image.site, Image.plane)
            .add_columns(Image.time_point, Label.value, SplitMember.subset)
            .join(Image, Image.well_id == Well.id)
            .join(SplitMember, SplitMember.image_id == Image.id)
            .join(Label, Label.id == SplitMember.label_id)
            .where(SplitMember.split_id == split.id)
        )
        members = sorted(
            ((barcodes[plate], *key), label, subset.value)
            for plate, *key, label, subset in session.execute(query)
        )
        if fingerprint_of_split(split, members) != split.fingerprint:
            yield (
                f"split {split.name}",
                "table split_members or labels: they are not what was written (fingerprint)",
            )


def _odd_treatments(session: Session) -> Iterator[tuple[str, str]]:
    """Yield the treatments that are not what their parts say, and tables that were changed."""
    from .ingest.write_treatments import records_of, treatment_values

    known = records_of(session, true())
    for row in session.scalars(select(Treatment).order_by(Treatment.id)):
        parts = known[row.id].parts if row.id in known else ()
        for name, value in treatment_values(parts).items():
            if getattr(row, name) != value:
                found = getattr(row, name)
                yield (
                    f"treatment {row.name_with_dose}",
                    f"table treatments: {name} is {found}, and its parts say {value}",
                )
    busy = select(Run.id).where(Run.stage == Stage.INGEST, Run.ended_at.is_(None))
    if session.scalar(busy.limit(1)) is not None:
        return
    last: dict[str, Any] = {}
    about = select(Event.new).where(Event.table_name.in_(("runs", "store")))
    for new in session.scalars(about.order_by(Event.id)):
        for table, made in ((new or {}).get("tables") or {}).items():
            last[table] = {**last.get(table, {}), **made} if isinstance(made, dict) else made
    left = "are not what the last ingest or correction left"
    barcodes = dict(session.execute(select(Plate.id, Plate.barcode)).all())
    for table, now in table_digests(session).items():
        if not isinstance(now, dict):
            if now != last.get(table, now):
                yield f"table {table}", f"its rows {left}"
            continue
        for plate, made in now.items():
            if table in last and made != last[table].get(plate):
                yield f"plate {barcodes[int(plate)]}", f"table {table}: its rows {left}"


# --- rows -----------------------------------------------------------------------------------------


def check_rows(workspace: Workspace, looking: Future[Any]) -> tuple[int, list[Problem]]:
    """Count the jobs whose rows are in the database, and say whose are not what the job wrote.

    Predictions are read when ``looking`` is done: another SQLite library reads them. As it opens
    the database it truncates the index of the write-ahead log, and a connection that uses that
    index in another thread would crash (SIGBUS).

    What a job wrote into files is not looked at here: files have digests of their own.
    """
    in_files = select(FeatureSet.recipe_id).where(FeatureSet.storage == FeatureStorage.FILES)
    query = (
        select(Job.id, Job.image_id, Job.recipe_id, Job.run_id, Job.content_sha256, Job.digest)
        .add_columns(Recipe.stage)
        .join(Recipe, Recipe.id == Job.recipe_id)
        .where(Job.status == Status.DONE, Job.digest.is_not(None), Job.recipe_id.not_in(in_files))
        .order_by(Job.id)
    )
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    workspace.progress.start("verify rows", total)
    try:
        odd = set[tuple[int, int]]()
        of_others = query.where(Recipe.stage != Stage.PREDICT).limit(BATCH)
        last, jobs = 0, list[Any]([None])
        while jobs:
            with workspace.database.read() as session:
                jobs = list(session.execute(of_others.where(Job.id > last)))
                odd |= {
                    (job.run_id, job.image_id)
                    for job in jobs
                    if _digest_of_rows(session, job) != job.digest
                }
            last = jobs[-1].id if jobs else last
            workspace.progress.advance(len(jobs))
        wait([looking])
        odd |= set(_odd_predictions(workspace, query))
    finally:
        workspace.progress.finish()
    name = select(Plate.barcode, Image.core_name, Run.stage, Run.recipe_id).select_from(Run)
    name = name.join(Image, true()).join(Well, Well.id == Image.well_id)
    name = name.join(Plate, Plate.id == Well.plate_id)
    problems = []
    with workspace.database.read() as session:
        for run_id, image_id in sorted(odd):
            of_both = name.where(Run.id == run_id, Image.id == image_id)
            for barcode, core, stage, recipe_id in session.execute(of_both):
                reason = (
                    f"rows of {stage.value} recipe {recipe_id} are not what run {run_id} wrote "
                    "(digest differs)"
                )
                problems.append(Problem(f"{barcode}/{core}", reason))
    return total, problems


def _odd_predictions(workspace: Workspace, jobs: Any) -> Iterator[tuple[int, int]]:
    """Yield run and image of predictions that are not what a job wrote.

    ``jobs``: the query of those looked at. DuckDB sorts the rows: the databases take long for it.
    """
    jobs = jobs.where(Recipe.stage == Stage.PREDICT).order_by(None)
    jobs = jobs.join(Run, Run.id == Job.run_id)
    with workspace.database.read() as session:
        of_runs = jobs.with_only_columns(Job.run_id, Run.ended_at).distinct()
        runs = session.execute(of_runs).all()
    if not runs:
        return
    spill = workspace.settings.make_cache("spill")
    nothing = digest_of_numbers(np.empty((0, 4)))
    with locked_connection(Limits(), spill) as duck:
        for run_id, ended_at in runs:
            with workspace.database.read() as session:
                rows = session.execute(jobs.where(Job.run_id == run_id))
                digests = {row.image_id: row.digest for row in rows}
            create = "CREATE OR REPLACE TABLE p AS FROM {rows}"
            with closing(Source(workspace.database)) as source:
                source.feed_runs(
                    duck, create, PREDICTIONS, [run_id], have_ended=ended_at is not None
                )
            found = {
                image: digest_of_numbers(*(piece for _, piece in pieces))
                for image, pieces in groupby(_by_image(duck), itemgetter(0))
            }
            # A run that goes on may have written more images since.
            for image in {*digests, *(found if ended_at else ())}:
                if digests.get(image) != found.get(image, nothing):
                    yield run_id, image
            workspace.progress.advance(len(digests))


def _by_image(duck: DuckDBPyConnection) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield table ``p`` in pieces: an image, and cell, rank, label, probability (N, 4) of it.

    Those of an image come one after the other, by cell and rank.
    """
    query = "SELECT image_id, cell_id, rank, label_id, probability FROM p"
    query += " WHERE cell_id IS NOT NULL ORDER BY image_id, cell_id, rank"
    for batch in duck.sql(query).to_arrow_reader(ROWS_AT_ONCE):
        images, *columns = (column.to_numpy() for column in batch.columns)
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        tables = np.split(np.column_stack(columns), starts[1:])
        yield from zip(images[starts].tolist(), tables, strict=True)


def _digest_of_rows(session: Session, job: Any) -> str:
    """The digest of a job's rows as they are now, made as ``digest`` of its stage makes it."""
    cells = (
        select(Cell.id)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .where(Segmentation.image_id == job.image_id)
        .where(func.coalesce(Segmentation.content_sha256, job.content_sha256) == job.content_sha256)
    )  # null: another tool found the cells, and does not say in which bytes
    match job.stage:
        case Stage.SEGMENT:
            mask, flow = aliased(Artifact), aliased(Artifact)
            found = session.execute(
                select(Segmentation.id, mask.sha256, flow.sha256, Segmentation.diameter)
                .outerjoin(mask, mask.id == Segmentation.mask_artifact_id)
                .outerjoin(flow, flow.id == Segmentation.flow_artifact_id)
                .where(Segmentation.image_id == job.image_id)
                .where(Segmentation.recipe_id == job.recipe_id)
                .where(Segmentation.content_sha256 == job.content_sha256)
            ).one_or_none()
            if found is None:
                return ""
            keys = ("id", "segmentation_id")
            names = [c.name for c in Cell.__table__.columns if c.name not in keys]
            rows = session.execute(
                select(*(getattr(Cell, name) for name in names))
                .where(Cell.segmentation_id == found.id)
                .order_by(Cell.object_number)
            )
            return digest([*found[1:], [dict(zip(names, row, strict=True)) for row in rows]])
        case Stage.MEASURE:
            columns = [getattr(CellFeatures, feature.name) for feature in BASIC_GROUP.features]
            values = session.execute(
                select(CellFeatures.cell_id, *columns)
                .where(CellFeatures.recipe_id == job.recipe_id, CellFeatures.cell_id.in_(cells))
                .order_by(CellFeatures.cell_id)
            )
            table = np.array([tuple(row) for row in values], dtype=np.float64)
            table = table.reshape(-1, 1 + len(columns)).T
            return digest_of_numbers(table[0], table[1:])
        case _:
            names = [field.name for field in fields(PlaneQuality)]
            measured = session.execute(
                select(ImageQuality.channel, *(getattr(ImageQuality, name) for name in names))
                .where(ImageQuality.image_id == job.image_id)
                .where(ImageQuality.recipe_id == job.recipe_id)
                .where(ImageQuality.content_sha256 == job.content_sha256)
            )
            return digest(sorted(list(row) for row in measured))
