"""The ledger: an entry in the chain of events where a run begins and where it ends.

An entry says all that the row of the run says, and has digests of the rows that the run wrote, by
table. ``stages/verify.py`` compares them with what the database has.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..enums import Stage, Status
from ..models import (
    METADATA,
    Artifact,
    CellFlag,
    FeatureFile,
    ImageFlag,
    ImagePrediction,
    IngestFile,
    IngestIssue,
    Job,
    Recipe,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Split,
)
from .events import Change, record_events

MODULUS = 1 << 256
_LONGEST = 200
"""Characters of a text that stands in an entry; of a longer one its digest does."""

BEGUN = (
    *("stage", "parent_id", "origin", "seed", "command", "query", "code_version"),
    *("host", "user_name", "started_at", "recipe", "weights_sha256", "split"),
)
"""What an entry of the ledger says of a run when it begins. The rest comes when it has ended."""

DESCRIBING = ("plates", "wells", "treatments", "treatment_parts", "perturbations")
"""Tables that ingests and corrections change; their digests stand in the entries of these."""

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
    *(
        (table.__tablename__, select(table.run_id, *columns))
        for table in (ImageFlag, CellFlag, ImagePrediction, IngestFile, IngestIssue)
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
    tables = run_digests(session, ids) if not opened else {}
    for run_id, row in run_rows(session, ids):
        if opened:
            new = {"status": "running", "row": {name: row[name] for name in BEGUN}}
        else:
            new = {"status": row["status"], "row": row}
            new["digests"] = {name: digest for (of, name), digest in tables.items() if of == run_id}
            if row["stage"] == Stage.INGEST:
                new["tables"] = table_digests(session)
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
                row[name] = f"sha256 {hashlib.sha256(_canonical(value)).hexdigest()}"
        found.append((run_id, row))
    return found


def run_digests(session: Session, ids: Collection[int] = ()) -> dict[tuple[int, str], str]:
    """Return by run and table the sum of the sha256 of the rows that a run wrote.

    A sum does not depend on the order, and rows can be taken from it.
    """
    sums: dict[tuple[int, str], int] = defaultdict(int)
    for table, query in _ROWS:
        wanted = query.where(query.selected_columns.run_id.in_(ids)) if ids else query
        rows = session.connection().execute(wanted, execution_options={"yield_per": 10_000})
        for run_id, *values in rows:
            sums[run_id, table] += int.from_bytes(hashlib.sha256(_canonical(values)).digest())
    return {key: f"{total % MODULUS:064x}" for key, total in sums.items()}


def table_digests(session: Session) -> dict[str, str]:
    """Return the sum of the sha256 of all rows of plates, wells and what was done to them."""
    found = {}
    for name in DESCRIBING:
        rows = session.connection().execute(select(METADATA.tables[name]))
        total = sum(int.from_bytes(hashlib.sha256(_canonical(list(row))).digest()) for row in rows)
        found[name] = f"{total % MODULUS:064x}"
    return found


@contextmanager
def recording_removed(session: Session) -> Iterator[None]:
    """Record what is taken from runs that have ended: their files are lost, or a plate is deleted.

    What was changed behind the back of cellstore before is not hidden by it.
    """
    before = run_digests(session)
    yield
    session.flush()
    after = run_digests(session)
    removed: dict[int, dict[str, str]] = defaultdict(dict)
    for (run_id, table), digest in before.items():
        less = int(digest, 16) - int(after.get((run_id, table), "0"), 16)
        if less:
            removed[run_id][table] = f"{less % MODULUS:064x}"
    record_events(
        session, [Change("runs", run, None, {"removed": less}) for run, less in removed.items()]
    )


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
