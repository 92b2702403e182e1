"""Events: who changed what, from what to what; the ledger of runs. No trigger lets them change."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import shlex
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, Text, cast, func, insert, literal, select, text
from sqlalchemy.orm import Session

from ..enums import Stage, Status
from ..errors import DatabaseError, StorageError
from ..models import (
    METADATA,
    Artifact,
    Base,
    Cell,
    CellFlag,
    Event,
    FeatureFile,
    Image,
    ImageFile,
    ImageFlag,
    ImagePrediction,
    IngestFile,
    IngestIssue,
    Job,
    Perturbation,
    Plate,
    Recipe,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Split,
    Treatment,
    TreatmentScore,
    Well,
)
from .bulk import in_lists
from .session import HARMLESS, Database

_CHAIN_LOCK = 0xE7E4757
"""Names the lock under which events are appended on PostgreSQL; SQLite has one writer anyway."""

WAIT_MS = 2_000
"""How long a command waits to record what it wrote elsewhere."""

_WAITING = "events"
"""Where a session keeps the events of a long transaction until its end."""

_NEW_AFTER = "new_after"
"""Where a session keeps the last id of each table before the run that is recorded."""


@dataclass(frozen=True, slots=True)
class Change:
    """A row that changes: the columns that do, before and after, and their ``line``.

    Without ``row_id``: what is no row. Of several rows: the last id, and the first in ``first_id``
    of ``new`` (they were added) or ``old`` (they were deleted).
    """

    table_name: str
    row_id: int | None
    old: dict[str, Any] | None
    new: dict[str, Any] | None
    line: int | None = None


def record_events(
    session: Session,
    changes: Iterable[Change],
    *,
    run_id: int | None = None,
    reason: str | None = None,
    file: str | None = None,
) -> None:
    """Append an event for each of ``changes``, in the caller's transaction.

    Who made them and with which command is that of the run, if ``run_id`` names one, else of this
    process. Each event has the digest of the one before it in its own, so that none can be changed
    or taken out without notice. On PostgreSQL others wait with theirs until the transaction ends,
    so events come last in it; :func:`recording_new_rows` sees to that in a long one.
    """
    found = list(changes)
    if not found:
        return
    if (waiting := session.info.get(_WAITING)) is not None:
        waiting.append((found, {"run_id": run_id, "reason": reason, "file": file}))
        return
    role = _lock_chain(session)
    (user_name, command), host = caller(), socket.gethostname()
    if run_id is not None:
        run = session.get_one(Run, run_id)
        user_name, command, host = run.user_name, run.command, run.host
    now = datetime.now(UTC)
    previous = session.scalar(select(Event.sha256).order_by(Event.id.desc()).limit(1))
    rows = []
    for change in found:
        row: dict[str, Any] = {
            "created_at": now,
            "user_name": user_name,
            "host": host[:255],
            "role": role,
            "command": command,
            "run_id": run_id,
            "reason": reason,
            "file": file,
            "line": change.line,
            "table_name": change.table_name,
            "row_id": change.row_id,
            "old": change.old,
            "new": change.new,
        }
        previous, before = event_digest(row, previous), previous
        rows.append({**row, "previous_sha256": before, "sha256": previous})
    session.execute(insert(Event), rows)


def _lock_chain(session: Session) -> str | None:
    """Let no other add events until the transaction ends; return the role of the database."""
    if session.get_bind().dialect.name == "sqlite":
        return None
    lock = text("SELECT pg_advisory_xact_lock(:key), current_user")
    return str(session.execute(lock, {"key": _CHAIN_LOCK}).one()[1])


def record_files(database: Database, *paths: Path) -> bool:
    """Append an event for files that a command wrote outside the store; whether that went well.

    Nothing is recorded where the database can only be read, or others write to it for long: the
    files are written all the same.
    """
    changes = [Change("files", None, None, {"path": str(path.resolve())}) for path in paths]
    try:
        with database.begin(WAIT_MS) as session:
            record_events(session, changes)
    except (DatabaseError, StorageError):
        return False
    return True


# --- the ledger: an entry where a run begins, and one where it ends ------------------------------

_JSON = json.JSONEncoder(sort_keys=True, default=str)

MODULUS = 1 << 256
_LONGEST = 200
"""Characters of a text that stands in an entry; of a longer one its digest does."""

BEGUN = (
    *("stage", "parent_id", "origin", "seed", "command", "query", "code_version"),
    *("host", "user_name", "started_at", "recipe", "weights_sha256", "split"),
)
"""What an entry of the ledger says of a run when it begins. The rest comes when it has ended."""

DESCRIBING = ("plates", "treatments", "treatment_parts", "perturbations", "annotations")
"""Tables that ingests and corrections change; their digests stand in the entries of these."""

_OF_PLATES: dict[str, Any] = {
    "wells": select(Well.plate_id, Well.id, Well.well_row, Well.well_column, Well.name).add_columns(
        Well.treatment_id, cast(Well.control, Text), cast(Well.metadata_, Text)
    ),
    "images": select(Well.plate_id, Image.id, Image.well_id, Image.site, Image.plane)
    .add_columns(Image.time_point, Image.core_name, Image.content_sha256)
    .join(Image, Image.well_id == Well.id),
    "image_files": select(Well.plate_id, ImageFile.image_id, ImageFile.channel, ImageFile.name)
    .add_columns(ImageFile.sha256)
    .join(Image, Image.well_id == Well.id)
    .join(ImageFile, ImageFile.image_id == Image.id)
    .where(Image.content_sha256.is_not(None)),  # nothing was made of an image that lacks a file
}
"""Larger ones: with the plate first, since a digest for each is made anew where it is changed."""

_WRITTEN_ONCE = (ImageFlag, CellFlag, ImagePrediction, IngestFile, IngestIssue, TreatmentScore)
_MASK = METADATA.tables["artifacts"].alias()
_ROWS: tuple[tuple[str, Any], ...] = (
    (
        "jobs",
        select(Job.run_id, Job.recipe_id, Job.image_id, Job.content_sha256, Job.digest).where(
            Job.status == Status.DONE
        ),
    ),
    ("run_metrics", select(RunMetric.run_id, RunMetric.epoch, RunMetric.name, RunMetric.value)),
    (
        "run_artifacts",
        select(RunArtifact.run_id, Artifact.kind, Artifact.sha256).join(
            Artifact, Artifact.id == RunArtifact.artifact_id
        ),
    ),
    (
        "feature_files",
        select(FeatureFile.run_id, FeatureFile.n_rows, FeatureFile.first_cell_id, Artifact.sha256)
        .add_columns(FeatureFile.last_cell_id)
        .join(Artifact, Artifact.id == FeatureFile.artifact_id),
    ),
    (
        "segmentations",  # that have no job
        select(Segmentation.run_id, Segmentation.image_id, Segmentation.content_sha256)
        .add_columns(Segmentation.n_cells, Segmentation.diameter, _MASK.c.sha256)
        .join(Run, Run.id == Segmentation.run_id)
        .outerjoin(_MASK, _MASK.c.id == Segmentation.mask_artifact_id)
        .where(Run.stage == Stage.INGEST),
    ),
    (
        "cells",  # of these
        select(Segmentation.run_id, Segmentation.image_id)
        .add_columns(*(c for c in Cell.__table__.c if c.name not in ("id", "segmentation_id")))
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(Run, Run.id == Segmentation.run_id)
        .where(Run.stage == Stage.INGEST),
    ),
    *(
        (table.__tablename__, select(table.run_id, *columns))
        for table in _WRITTEN_ONCE
        for columns in ([c for c in table.__table__.columns if c.name not in ("id", "run_id")],)
    ),
)
"""What a run wrote, with its number first. What stands in ``jobs.digest`` is not said again."""


def record_runs(session: Session, ids: Collection[int], *, opened: bool = False) -> None:
    """Append an entry of the ledger for each run: its row, and digests of what it wrote.

    An entry is an event, so it is in the chain. ``opened``: the runs begin, or begin again.
    """
    if not ids:
        return
    written = {} if opened else run_digests(session, ids)
    for run_id, row in run_rows(session, ids):
        if opened:
            new = {"status": "running", "row": {name: row[name] for name in BEGUN}}
        else:
            new = {"status": row["status"], "row": row}
            new["digests"] = {table: made for (of, table), made in written.items() if of == run_id}
            if row["stage"] == Stage.INGEST:
                _lock_chain(session)  # else an ingest that ends meanwhile could be said first
                result = session.scalar(select(Run.result).where(Run.id == run_id)) or {}
                new["tables"] = table_digests(session, result.get("plates"))
        record_events(session, [Change("runs", run_id, None, new)], run_id=run_id)


def run_rows(session: Session, ids: Collection[int] = ()) -> list[tuple[int, dict[str, Any]]]:
    """Return what the ledger says of runs (none named: of all), with the number of each.

    Recipe and split stand there by their fingerprints, long texts and records by their digests.
    """
    runs = METADATA.tables["runs"].c
    columns = [runs[name] for name in BEGUN if name in runs]
    columns += [runs[name] for name in ("status", "ended_at", "environment", "result", "error")]
    query = (
        select(runs.id, *columns, Recipe.fingerprint.label("recipe"), Recipe.weights_sha256)
        .add_columns(Split.fingerprint.label("split"))
        .join(Recipe, Recipe.id == runs.recipe_id)
        .outerjoin(Split, Split.id == runs.split_id)
        .order_by(runs.id)
    )
    if ids:
        query = query.where(runs.id.in_(ids))
    found = []
    for run_id, *values in session.execute(query):
        names = [*(column.name for column in columns), "recipe", "weights_sha256", "split"]
        row = dict(zip(names, values, strict=True))
        for name, value in row.items():
            if isinstance(value, datetime):
                row[name] = value.isoformat()
            elif isinstance(value, dict) or (isinstance(value, str) and len(value) > _LONGEST):
                row[name] = f"sha256 {hashlib.sha256(_JSON.encode(value).encode()).hexdigest()}"
        found.append((run_id, row))
    return found


def run_digests(
    session: Session, ids: Collection[int] = (), images: Iterable[Any] | None = None
) -> dict[tuple[int, str], str]:
    """Return by run and table the sum of the sha256 of the rows that the run wrote.

    A sum does not depend on the order, and rows can be taken from it. ``images``: lists or queries
    of ids; of rows that are about an image, only those about these.
    """
    found: dict[tuple[int, str], str] = {}
    for table, query in _ROWS:
        columns = query.selected_columns
        wanted = [query.where(columns.run_id.in_(ids)) if ids else query]
        if images is not None and "image_id" in columns:
            wanted = [wanted[0].where(columns.image_id.in_(some)) for some in images]
        elif images is not None and "cell_id" in columns:
            of = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
            wanted = [
                wanted[0].where(columns.cell_id.in_(of.where(Segmentation.image_id.in_(some))))
                for some in images
            ]
        sums = _sums(session, wanted)
        found |= {(run_id, table): digest for run_id, digest in sums.items()}
    return found


def table_digests(session: Session, plates: Collection[int] | None = None) -> dict[str, Any]:
    """Return by table the sum of the sha256 of all rows; of large tables a sum for each plate.

    ``plates``: only the sums of these.
    """
    found: dict[str, Any] = {}
    for name in DESCRIBING:
        rows = select(literal(0), METADATA.tables[name])
        found[name] = _sums(session, [rows], {0: 0})[0]
    of = session.scalars(select(Plate.id)).all() if plates is None else plates
    for name, query in _OF_PLATES.items():
        wanted = [query]
        if plates is not None:
            wanted = [query.where(Well.plate_id.in_(some)) for some in in_lists(plates)]
        # Of numbers and texts alone: written in half the time, and an ingest waits for it.
        sums = _sums(session, wanted, dict.fromkeys(of, 0), repr)
        found[name] = {str(plate): digest for plate, digest in sums.items()}
    return found


def grown_digest(session: Session, after: int) -> dict[str, str]:
    """Return the digest of table ``annotations`` to which rows were added after the id ``after``.

    It is that of the last entry plus those of the new rows: the work is that of the new rows, and
    what was changed before without cellstore is not hidden by it.
    """
    rows = METADATA.tables["annotations"]
    entries = select(Event.new).where(Event.table_name.in_(("runs", "store")))
    with session.execute(entries.order_by(Event.id.desc()).execution_options(yield_per=10)) as new:
        digests = (((row[0] or {}).get("tables") or {}).get(rows.name) for row in new)
        before = next((digest for digest in digests if digest), None)
    added = select(literal(0), rows).where(rows.c.id > (after if before else 0))
    return {rows.name: _sums(session, [added], {0: int(before or "0", 16)})[0]}


def _sums(
    session: Session,
    queries: Iterable[Select[Any]],
    known: Mapping[Any, int] | None = None,
    as_text: Callable[[list[Any]], str] = _JSON.encode,
) -> dict[Any, str]:
    """By the first column of some queries the sum of the sha256 of their other columns.

    ``known``: sums to which these are added.
    """
    sums: dict[Any, int] = defaultdict(int, known or {})
    for query in queries:
        # As tuples: objects take longer.
        rows = session.connection().execute(query, execution_options={"yield_per": 10_000})
        for key, *values in rows:
            sums[key] += int.from_bytes(hashlib.sha256(as_text(values).encode()).digest())
    return {key: f"{total % MODULUS:064x}" for key, total in sums.items()}


@contextmanager
def recording_removed(session: Session, images: Collection[Any]) -> Iterator[None]:
    """Record what is taken from runs that have ended: their files are lost, or a plate is deleted.

    ``images``: lists or queries of the ids of all images whose rows go. What was changed without
    cellstore before is not hidden by it.
    """
    before = run_digests(session, images=images)
    yield
    session.flush()
    after = run_digests(session, images=images)
    removed: dict[int, dict[str, str]] = defaultdict(dict)
    for (run_id, table), digest in before.items():
        less = int(digest, 16) - int(after.get((run_id, table), "0"), 16)
        if less:
            removed[run_id][table] = f"{less % MODULUS:064x}"
    record_events(
        session, [Change("runs", run, None, {"removed": less}) for run, less in removed.items()]
    )


# --- rows that are new ------------------------------------------------------------


@contextmanager
def recording_new_rows(session: Session, run_id: int) -> Iterator[None]:
    """Record which rows a run adds in a transaction, and what it changes of plates.

    An event for each table, with the first and the last of the new ids: only one ingest writes at
    a time, and an id is never given twice (see ``take_ids``).
    """
    tables: tuple[type[Base], ...] = (Plate, Well, Image, ImageFile, Treatment, Perturbation)
    last_ids = {table: select(func.max(table.__table__.c.id)) for table in tables}
    last = {table: session.scalar(query) or 0 for table, query in last_ids.items()}
    session.info[_NEW_AFTER] = {table.__tablename__: number for table, number in last.items()}
    session.info[_WAITING] = waiting = list[Any]()
    plates = select(METADATA.tables["plates"])
    were = {row["id"]: row for row in session.execute(plates).mappings()}
    try:
        yield
        session.flush()
    finally:
        session.info.pop(_NEW_AFTER)
        session.info.pop(_WAITING)
    changes: list[Change] = []
    for row in session.execute(plates).mappings():
        was = were.get(row["id"], row)
        if changed := [name for name in row if row[name] != was[name]]:
            old, new = ({name: of[name] for name in changed} for of in (was, row))
            changes.append(Change("plates", row["id"], old, new))
    for table, before in last.items():
        after = session.scalar(last_ids[table]) or 0
        if after > before:
            new = {"first_id": before + 1, "last_id": after}
            # Their ids may be given again, and what is said of one row is looked up by its id.
            row_id = None if table in (Treatment, Perturbation) else after
            changes.append(Change(table.__tablename__, row_id, None, new))
    for some, options in waiting:
        record_events(session, some, **options)
    record_events(session, changes, run_id=run_id)


def is_new(session: Session, table: str, row_id: int) -> bool:
    """Whether the run that is recorded in this session has added a row."""
    return bool(row_id > session.info.get(_NEW_AFTER, {}).get(table, row_id))


def event_digest(row: dict[str, Any], previous: str | None) -> str:
    """Return the digest of an event and of ``previous``, the digest of the one before it."""
    content = {name: row[name] for name in row if name not in ("id", "created_at", "sha256")}
    content |= {"created_at": row["created_at"].isoformat(), "previous_sha256": previous}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def broken_events(session: Session) -> Iterator[str]:
    """Yield a sentence for each event that is not what was written, or misses the one before."""
    previous = None
    columns = Event.__table__.columns
    query = select(*columns).order_by(Event.id).execution_options(yield_per=10_000)
    for row in session.execute(query).mappings():
        if row["previous_sha256"] != previous:
            yield f"before event {row['id']} an event was taken out or changed"
        if event_digest(dict(row), row["previous_sha256"]) != row["sha256"]:
            yield f"event {row['id']} is not what was written"
        previous = row["sha256"]


def caller() -> tuple[str, str]:
    """Return who runs this process, and the typed command without the passwords of its URLs."""
    try:
        user_name = getpass.getuser()
    except (KeyError, OSError):
        user_name = "unknown"
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    return user_name, shlex.join(without_passwords(word) for word in words)


def without_passwords(word: str) -> str:
    """Return a typed word with the passwords of every URL in it replaced by ``***``.

    In a word that is a URL (or ``--option=URL``) a password may hold spaces and quotes.
    """
    # In a URL inside a longer text (an SQL question), spaces and quotes end the password.
    inner = "" if re.match(r"(-[\w-]+=)?[\w+.-]+://", word) else r"\s'\""
    masked = re.sub(
        rf"([\w+.-]+://[^:/{inner}]*):[^{inner}\0]*@", r"\1:***@", word, flags=re.DOTALL
    )
    masked = re.sub(rf"(?:postgres|sqlite)[\w+.-]*://[^{inner}\0]+", _without_parameters, masked)
    return re.sub(
        rf"([?&][^?&=\s]*(?:pass|pwd|secret|scram|token|key|signature)[^?&=\s]*=)[^&{inner}\0]+",
        r"\1***",
        masked,
        flags=re.IGNORECASE,
    )


def _without_parameters(url: re.Match[str]) -> str:
    """A URL of a database with the values of its parameters hidden, but for harmless ones."""
    return re.sub(
        r"([?&])([^?&=]*)=([^&]+)",
        lambda part: part[0] if part[2].lower() in HARMLESS else f"{part[1]}{part[2]}=***",
        url[0],
    )
