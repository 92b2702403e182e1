"""What became of the rows of a source: how many, and what could not be used."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...artifacts import CHUNK, sha256_of
from ...db.bulk import bulk_insert
from ...enums import Severity
from ...errors import UserInputError
from ...io.tables import Refusal
from ...io.uris import plain_file, writable
from ...models import IngestFile, IngestIssue

T = TypeVar("T")

SHOWN = 1_000
"""Issues, or rows of a dry run, that a result has; table ``ingest_issues`` has all issues."""

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


def issues_of(session: Session, run_id: int) -> tuple[Issue, ...]:
    """Return the first issues of a run."""
    row = IngestIssue
    query = select(row.severity, row.file, row.line, row.reason, row.detail)
    query = query.where(row.run_id == run_id).order_by(row.id).limit(SHOWN)
    return tuple(Issue(*found) for found in session.execute(query))


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
        digest, size, lines = hashlib.sha256(), 0, 0
        if not path.is_dir():
            try:
                opened = plain_file(path).open("rb")
            except OSError as error:
                raise UserInputError(
                    f"{path} cannot be read ({error.strerror}). Check the path."
                ) from error
            with opened as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
                    size += len(piece)
                    lines += piece.count(b"\n")
            return cls(writable(path.name), digest.hexdigest(), size, lines)
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                found = Path(folder) / name
                try:
                    stat = found.stat()
                    bytes_, state = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"
                    if name.lower().endswith(_TABLES) and found.is_file():
                        state = sha256_of(found)
                except OSError:  # a link to nowhere, or a file that may not be read
                    bytes_, state = 0, "unreadable"
                line = f"{found.relative_to(path)}\t{state}\n"
                digest.update(line.encode(errors="surrogateescape"))
                size, lines = size + bytes_, lines + 1
        return cls(writable(path.resolve().name), digest.hexdigest(), size, lines)


@dataclass
class Account:
    """What became of the rows of ``file``; ``rows`` counts those that were read.

    Readers count ``rows``; whoever decides about a row counts it once more, in one of ``created``,
    ``updated``, ``unchanged``, or by :meth:`refuse`. ``since``: the last event when files that say
    what wells got were read first, if they are read again: what was corrected after it stays.
    The source is about ``plates`` (ids); ``cells``, their ``feature_set`` and ``segmentations`` (of
    recipes) are what it brought beside its rows. ``moved`` counts the files that are read from
    another folder now, by the old and the new one. ``images`` are those of all records of images
    that were used, ``unchanged_images`` of those that brought nothing new.
    """

    run_id: int
    file: str
    rows: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0
    notes: list[str] = field(default_factory=list)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    pending: list[Issue] = field(default_factory=list)
    since: int | None = None
    plates: Sequence[int] = ()
    cells: int = 0
    feature_set: str | None = None
    segmentations: Sequence[int] = ()
    images: array[int] = field(default_factory=lambda: array("q"))
    unchanged_images: array[int] = field(default_factory=lambda: array("q"))

    def take(self, rows: Iterable[T | Refusal]) -> list[T]:
        """Count rows, refuse those that cannot be used, and return the others."""
        usable: list[T] = []
        for row in rows:
            self.rows += 1
            if isinstance(row, Refusal):
                self.refuse(*row)
            else:
                usable.append(row)
        return usable

    def refuse(self, line: int | None, reason: str, detail: str, file: str | None = None) -> None:
        """Leave a row out, and say why."""
        self.add(Severity.REFUSED, line, reason, detail, file)

    def problem(self, line: int | None, reason: str, detail: str, file: str | None = None) -> None:
        """Say what could not be used of a row that was used otherwise."""
        self.add(Severity.PROBLEM, line, reason, detail, file)

    def suspicious(
        self, line: int | None, reason: str, detail: str, file: str | None = None
    ) -> None:
        """Say what looks wrong, although all was used."""
        self.add(Severity.SUSPICIOUS, line, reason, detail, file)

    def add(
        self, severity: Severity, line: int | None, reason: str, detail: str, file: str | None
    ) -> None:
        """Say what is wrong; ``file`` None: the row is of the file of this account."""
        self.refused += severity is Severity.REFUSED
        self.pending.append(Issue(severity, file or self.file, line, reason, detail))

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were read, and what became of them."""
        names = ("rows", "created", "updated", "unchanged", "refused")
        return {name: getattr(self, name) for name in names}

    def flush(self, session: Session) -> None:
        """Write the issues that were added since the last time."""
        rows = [
            (self.run_id, *issue[:3], issue.reason[:_REASON_LENGTH], issue.detail)
            for issue in self.pending
        ]
        bulk_insert(session, IngestIssue, _ISSUE_COLUMNS, rows)
        self.pending.clear()

    def close(self, session: Session, layout: str, identity: FileIdentity) -> None:
        """Write what is left, and the row of the file."""
        found = self.created + self.updated + self.unchanged + self.refused
        if found != self.rows:
            raise AssertionError(f"{self.file}: {self.rows} rows were read, {found} accounted for")
        self.flush(session)
        row = IngestFile(
            run_id=self.run_id,
            name=identity.name,
            sha256=identity.sha256,
            size_bytes=identity.size_bytes,
            layout=layout,
            **{f"n_{name}": number for name, number in self.counts.items()},
        )
        session.add(row)
        session.flush()
