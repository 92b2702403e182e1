"""Annotations alone: plate maps and tables of treatments or plates, without any image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from ....config import IngestParams
from ....errors import UserInputError
from ....formats.layouts import Layout
from ....formats.records import Refusal
from ....formats.text.tables import TextTable, open_table
from ....formats.treatments.aliases import Aliases
from ....formats.treatments.jump import jump_controls, jump_crispr, jump_plates
from ....formats.treatments.tables import TreatmentRow, treatment_rows
from ....runs import Workspace
from ..account import Account
from .corrections import Corrections
from .mapped import MappedWells
from .plates import write_plates
from .writer import suspicious_spellings

BATCH = 2_000
"""Rows that are written at a time."""

T = TypeVar("T")

_READERS: Mapping[Layout, Callable[[TextTable], Iterator[TreatmentRow | Refusal]]] = {
    Layout.TREATMENT_TABLE: treatment_rows,
    Layout.JUMP_CRISPR: jump_crispr,
    Layout.JUMP_CONTROLS: jump_controls,
}


def ingest_treatments(
    workspace: Workspace,
    session: Session,
    run_id: int,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
) -> tuple[int, ...]:
    """Bring an annotation into the caller's transaction; return the plates (ids) it speaks of.

    * Plate maps point the wells of plates that the store has to their treatments, and make wells
      that were not there. An empty well, and a map that no plate uses, are unchanged rows.
    * A treatment table makes the treatments that are new, and points wells to those that it
      corrects: the same ``broad_sample`` (or JCP2022), and other or more values. A value that
      the table leaves open stays as it is.
    * JUMP's table of plates makes plates, and sets the batch of those that are there.

    Raises:
        BadTableError: a table lacks columns, or tables do not fit each other.
        UserInputError: it is not said which plates a map is for, or none of them is in the store.
    """
    with _progress(workspace):
        if layout is Layout.PLATEMAP:
            mapped = MappedWells(session, run_id, params, account)
            plates = mapped.ingest(source)
            _note_spellings(session, mapped.treatments, account)
            return plates
        table = open_table(source)
        account.notes += table.notes
        if layout is Layout.JUMP_PLATES:
            return _plates(workspace, session, table, account)
        _treatments(workspace, session, run_id, table, layout, params, account)
    return ()


@contextmanager
def _progress(workspace: Workspace) -> Iterator[None]:
    workspace.progress.start("ingest", 0)
    try:
        yield
    finally:
        workspace.progress.finish()


def _plates(
    workspace: Workspace, session: Session, table: TextTable, account: Account
) -> tuple[int, ...]:
    found: list[int] = []
    seen: dict[str, str | None] = {}
    for batch in _batches(jump_plates(table)):
        rows = list(_usable(batch, account))
        found += write_plates(session, rows, seen, account)
        _advance(workspace, session, account, len(batch))
    return tuple(found)


def _treatments(
    workspace: Workspace,
    session: Session,
    run_id: int,
    table: TextTable,
    layout: Layout,
    params: IngestParams,
    account: Account,
) -> None:
    if layout not in _READERS:
        raise UserInputError(f"{layout.value} is no layout of treatments. Choose another --layout.")
    aliases = Aliases.read(params.aliases) if params.aliases else None
    corrections = Corrections(session, run_id, account, aliases)
    for batch in _batches(_READERS[layout](table)):
        corrections.write(list(_usable(batch, account)))
        _advance(workspace, session, account, len(batch))
    _note_spellings(session, corrections.treatments, account)


def _usable(batch: Sequence[T | Refusal], account: Account) -> Iterator[T]:
    """Yield the rows that can be used; count all of them, and refuse the others."""
    account.rows += len(batch)
    for row in batch:
        if isinstance(row, Refusal):
            account.refuse(row.line, row.reason, row.detail)
        else:
            yield row


def _advance(workspace: Workspace, session: Session, account: Account, rows: int) -> None:
    # Under --strict the whole file is undone, and its issues are written anew.
    account.flush(session)
    workspace.progress.advance(rows)


def _note_spellings(session: Session, treatments: set[int], account: Account) -> None:
    for spelling in suspicious_spellings(session, treatments):
        account.suspicious(None, spelling.reason, spelling.detail)
    account.flush(session)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
