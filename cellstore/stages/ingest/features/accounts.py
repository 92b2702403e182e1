"""The accounts of the files of one source of features: a row may be a part of several cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from ....formats.objects.model import Cells, Integers, ObjectSource, SourceFile
from ..account import Account, FileIdentity

_AT_ONCE = 5_000

Chosen = npt.NDArray[np.bool_]


class Accounts:
    """An account per file of ``source``; who they are is found out in the background.

    ``known``: files that were looked at already.
    """

    def __init__(
        self,
        session: Session,
        run_id: int,
        source: ObjectSource,
        known: Mapping[Path, FileIdentity],
    ) -> None:
        self._session = session
        self._source = source
        self.of_files = [Account(run_id, file.name, rows=file.rows) for file in source.files]
        self.by_name = {account.file: account for account in self.of_files}
        self._first = [_first_uses(source.cells, kind) for kind in range(_kinds(source.cells))]
        self._pool = ThreadPoolExecutor(1)
        paths = {file.path for file in source.files} - set(known)
        self._known = dict(known)
        self._asked = {path: self._pool.submit(FileIdentity.of, path) for path in sorted(paths)}

    def say_all(self) -> None:
        """Refuse the rows that are no part of a cell, and say what was noticed."""
        for rows in self._source.refused:
            self._refuse_lines(self.by_name[rows.file], rows.lines, rows.reason, rows.detail)
        for notice in self._source.notices:
            account = self.by_name[notice.file]
            tell = account.suspicious if notice.suspicious else account.problem
            tell(notice.line, notice.reason, notice.detail)
            self._flush(account)

    def created(self, cells: Integers) -> None:
        """Count the rows of cells (numbers) that are new."""
        for account, rows in self._rows_of(cells):
            account.created += len(rows)

    def unchanged(self, cells: Integers) -> None:
        """Count the rows of cells (numbers) that were there already."""
        for account, rows in self._rows_of(cells):
            account.unchanged += len(rows)

    def refuse(self, cells: Integers, reason: str, detail: str) -> None:
        """Leave cells (numbers) out."""
        for account, lines in self._rows_of(cells):
            self._refuse_lines(account, lines.tolist(), reason, detail)

    def close(self, layout: str) -> None:
        """Write all that is left, and a row per file."""
        for account, file in zip(self.of_files, self._source.files, strict=True):
            account.close(self._session, layout, self._identity(file))

    def stop(self) -> None:
        """End the work in the background."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _identity(self, file: SourceFile) -> FileIdentity:
        known = self._known.get(file.path) or self._asked[file.path].result()
        return replace(known, name=file.name)

    def _rows_of(self, cells: Integers) -> list[tuple[Account, Integers]]:
        """Return the lines of the rows of cells by file; each row belongs to its first cell."""
        found: list[tuple[Account, Integers]] = []
        for origin, first in zip(self._source.cells.origins, self._first, strict=True):
            chosen = cells[first[cells]]
            files, lines = origin.file[chosen], origin.line[chosen]
            for number in np.unique(files):
                found.append((self.of_files[number], lines[files == number]))
        return found

    def _refuse_lines(
        self, account: Account, lines: Sequence[int], reason: str, detail: str
    ) -> None:
        for start in range(0, len(lines), _AT_ONCE):
            for line in lines[start : start + _AT_ONCE]:
                account.refuse(line, reason, detail)
            self._flush(account)

    def _flush(self, account: Account) -> None:
        account.flush(self._session)


def _kinds(cells: Cells) -> int:
    return len(cells.origins)


def _first_uses(cells: Cells, kind: int) -> Chosen:
    origin = cells.origins[kind]
    found = np.zeros(len(cells), bool)
    # Lines may be any numbers: those of SQLite count to 2 ** 63.
    lines, line = np.unique(origin.line, return_inverse=True)
    _, first = np.unique(origin.file * max(1, len(lines)) + line, return_index=True)
    found[first] = True
    return found
