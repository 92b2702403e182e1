"""A source that was read before, byte by byte the same: its rows are there already."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import func, insert, literal, select
from sqlalchemy.orm import Session

from ...artifacts import CHUNK, sha256_of
from ...db.bulk import bulk_insert, in_lists
from ...enums import Severity, Stage, Status
from ...errors import CellstoreError
from ...io.uris import writable
from ...models import IngestFile, IngestIssue, Run, Well, WellChange

SHOWN = 1_000
"""Issues of a file that are kept in memory to be shown; table ``ingest_issues`` has them all."""

_TABLES = (".csv", ".tsv", ".txt", ".xml", ".csv.gz", ".tsv.gz", ".txt.gz")
_REASON_LENGTH = 255
_ISSUE_COLUMNS = ("run_id", "severity", "file", "line", "reason", "detail")


class Issue(NamedTuple):
    """Something that could not be used, or looks wrong; ``reason`` is short and can be counted."""

    severity: Severity
    file: str
    line: int | None
    reason: str
    detail: str


class UndoneError(CellstoreError):
    """Rows of a file were refused, and all or nothing was asked for; ``issues`` are the first."""

    issues: tuple[Issue, ...] = ()

    @classmethod
    def of(cls, account: Account) -> UndoneError:
        """The error for what ``account`` says."""
        error = cls(
            f"Nothing of {account.file} was written: {account.refused:,} of its {account.rows:,} "
            "rows were refused, and --strict allows none. Mend them, or ingest without --strict."
        )
        error.issues = tuple(account.shown)
        return error


@dataclass(frozen=True)
class FileIdentity:
    """A file that is read: what it is called, its sha256 and size, about how many lines it has.

    Of a folder: the sha256 over the names of all files below it, with the bytes of those that are
    tables and with the size and time of the others, and their number.
    """

    name: str
    sha256: str
    size_bytes: int
    lines: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Return the identity of a file or folder on this machine; one pass over its bytes."""
        return cls._of_folder(path) if path.is_dir() else cls._of_file(path)

    @classmethod
    def _of_file(cls, path: Path) -> FileIdentity:
        digest, size, lines = hashlib.sha256(), 0, 0
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                size += len(piece)
                lines += piece.count(b"\n")
        return cls(writable(path.name), digest.hexdigest(), size, lines)

    @classmethod
    def _of_folder(cls, path: Path) -> FileIdentity:
        digest, size, files = hashlib.sha256(), 0, 0
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                found = Path(folder) / name
                bytes_, state = _state(found)
                line = f"{found.relative_to(path)}\t{state}\n"
                digest.update(line.encode(errors="surrogateescape"))
                size, files = size + bytes_, files + 1
        return cls(writable(path.resolve().name), digest.hexdigest(), size, files)


def _state(path: Path) -> tuple[int, str]:
    """Return the size of a file, and what changes when its content does."""
    try:
        found = path.stat()
        if path.name.lower().endswith(_TABLES) and path.is_file():
            return found.st_size, sha256_of(path)
    except OSError:  # a link to nowhere, or a file that may not be read
        return 0, "unreadable"
    return found.st_size, f"{found.st_size} {found.st_mtime_ns}"


class Mark(NamedTuple):
    """How an account stood at one moment."""

    rows: int
    created: int
    updated: int
    unchanged: int
    refused: int
    reasons: Counter[tuple[Severity, str]]
    shown: int
    pending: int


@dataclass
class Account:
    """What became of the rows of ``file``; ``rows`` counts those that were read.

    Readers count ``rows``; whoever decides about a row counts it once more, in one of ``created``,
    ``updated``, ``unchanged``, or by :meth:`refuse`.
    """

    run_id: int
    file: str
    rows: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0
    reasons: Counter[tuple[Severity, str]] = field(default_factory=Counter)
    shown: list[Issue] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _pending: list[Issue] = field(default_factory=list)

    def refuse(self, line: int | None, reason: str, detail: str, file: str | None = None) -> None:
        """Leave a row out, and say why."""
        self.refused += 1
        self._add(Issue(Severity.REFUSED, file or self.file, line, reason, detail))

    def problem(self, line: int | None, reason: str, detail: str, file: str | None = None) -> None:
        """Say what could not be used of a row that was used otherwise."""
        self._add(Issue(Severity.PROBLEM, file or self.file, line, reason, detail))

    def suspicious(
        self, line: int | None, reason: str, detail: str, file: str | None = None
    ) -> None:
        """Say what looks wrong, although all was used."""
        self._add(Issue(Severity.SUSPICIOUS, file or self.file, line, reason, detail))

    def flush(self, session: Session) -> None:
        """Write the issues that were added since the last time."""
        rows = [(self.run_id, *issue[:3], *_short(issue)) for issue in self._pending]
        bulk_insert(session, IngestIssue, _ISSUE_COLUMNS, rows)
        self._pending.clear()

    def gather(self, others: Iterable[Account]) -> None:
        """Add what the accounts of several files of one source say."""
        for other in others:
            self.rows += other.rows
            self.created += other.created
            self.updated += other.updated
            self.unchanged += other.unchanged
            self.refused += other.refused
            self.reasons.update(other.reasons)
            self.shown += other.shown[: SHOWN - len(self.shown)]

    def mark(self) -> Mark:
        """Return how the account stands, to return to."""
        counts = (self.rows, self.created, self.updated, self.unchanged, self.refused)
        return Mark(*counts, self.reasons.copy(), len(self.shown), len(self._pending))

    def return_to(self, mark: Mark) -> None:
        """Forget what was counted since ``mark``; no issue may have been written meanwhile."""
        self.rows, self.created, self.updated, self.unchanged, self.refused = mark[:5]
        self.reasons = mark.reasons
        del self.shown[mark.shown :], self._pending[mark.pending :]

    def forget_written(self) -> None:
        """Make the shown issues pending again: what was written of this file was undone."""
        self._pending = list(self.shown)

    def close(self, session: Session, layout: str, identity: FileIdentity) -> None:
        """Write what is left, and the row of the file.

        Raises:
            AssertionError: a row was lost or counted twice, which is an error of ours.
        """
        found = self.created + self.updated + self.unchanged + self.refused
        if found != self.rows:
            raise AssertionError(f"{self.file}: {self.rows} rows were read, {found} accounted for")
        self.flush(session)
        session.add(IngestFile(**self._file_row(layout, identity)))
        session.flush()

    def _file_row(self, layout: str, identity: FileIdentity) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "name": identity.name,
            "sha256": identity.sha256,
            "size_bytes": identity.size_bytes,
            "layout": layout,
            "n_rows": self.rows,
            "n_created": self.created,
            "n_updated": self.updated,
            "n_unchanged": self.unchanged,
            "n_refused": self.refused,
        }

    def _add(self, issue: Issue) -> None:
        self.reasons[issue.severity, issue.reason] += 1
        self._pending.append(issue)
        if len(self.shown) < SHOWN:
            self.shown.append(issue)


def _short(issue: Issue) -> tuple[str, str]:
    return issue.reason[:_REASON_LENGTH], issue.detail


@dataclass(frozen=True)
class Earlier:
    """The run that read the source, and what it said of it."""

    run_id: int
    recipe_id: int
    result: dict[str, Any]

    @property
    def rows(self) -> int:
        """How many rows the source has."""
        return int(self.result["rows"])

    @property
    def refused(self) -> int:
        """How many of them cannot be used."""
        return int(self.result["refused"])

    @property
    def plates(self) -> tuple[int, ...]:
        """The plates (ids) that it is about."""
        return tuple(self.result["plates"])


def find_earlier(session: Session, recipe_id: int) -> Earlier | None:
    """Return the last run that read the very same files in the very same way.

    What has been corrected since stays corrected: an old table that is ingested again, by habit or
    by a clock, must not undo it.
    """
    query = select(Run).where(
        Run.recipe_id == recipe_id, Run.stage == Stage.INGEST, Run.status == Status.DONE
    )
    run = session.scalars(query.order_by(Run.id.desc()).limit(1)).first()
    if run is None or run.result is None:
        return None
    return Earlier(run.id, run.recipe_id, run.result)


def corrected_since(session: Session, earlier: Earlier) -> int:
    """Return how many wells of its plates have got another treatment since."""
    query = select(func.count(WellChange.well_id.distinct())).join(Well)
    later = query.where(WellChange.run_id > earlier.run_id)
    return sum(
        session.scalar(later.where(Well.plate_id.in_(some))) or 0
        for some in in_lists(earlier.plates)
    )


def updated_since(session: Session, earlier: Earlier) -> int | None:
    """Return the last run that updated rows of its plates since, by reading another source."""
    query = select(Run.id, Run.result).where(
        Run.stage == Stage.INGEST,
        Run.status == Status.DONE,
        Run.id > earlier.run_id,
        Run.recipe_id != earlier.recipe_id,
    )
    plates = set(earlier.plates)
    found = None
    for run_id, result in session.execute(query.order_by(Run.id)):
        if result and result.get("updated") and plates.intersection(result.get("plates", ())):
            found = run_id
    return found


def repeat_issues(session: Session, earlier: Earlier, account: Account) -> None:
    """Say of this run, too, what was said of the rows of the earlier one."""
    columns = (
        IngestIssue.severity,
        IngestIssue.file,
        IngestIssue.line,
        IngestIssue.reason,
        IngestIssue.detail,
    )
    of_rows = (IngestIssue.run_id == earlier.run_id, IngestIssue.line.is_not(None))
    names = ["run_id", *(column.key for column in columns)]
    copied = select(literal(account.run_id), *columns).where(*of_rows).order_by(IngestIssue.id)
    shown = session.execute(select(*columns).where(*of_rows).order_by(IngestIssue.id).limit(SHOWN))
    account.shown += [Issue(*row) for row in shown]
    counts = select(IngestIssue.severity, IngestIssue.reason, func.count()).where(*of_rows)
    for severity, reason, number in session.execute(
        counts.group_by(IngestIssue.severity, IngestIssue.reason)
    ):
        account.reasons[Severity(severity), reason] += number
    session.execute(insert(IngestIssue).from_select(names, copied))
