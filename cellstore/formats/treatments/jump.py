"""The tables of the JUMP data sets: their plates, their CRISPR reagents, their controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...terms import Control, Perturbation
from ..records import LONGEST, Refusal, TreatmentRecord
from ..text.tables import TableRow, TextTable, cell_text
from .tables import TreatmentRow, flaw_of

_ROLES = {"negcon": Control.NEGATIVE, "poscon": Control.POSITIVE, "trt": None, "empty": None}
_KINDS = {
    "compound": Perturbation.COMPOUND,
    "crispr": Perturbation.CRISPR,
    "orf": Perturbation.ORF,
    "any": Perturbation.NONE,
}

Get = Callable[[str], str | None]
"""Gives the value of a column of one row."""


class PlateRow(NamedTuple):
    """A plate and the batch it was made in."""

    line: int
    barcode: str
    batch: str | None


def jump_plates(table: TextTable) -> Iterator[PlateRow | Refusal]:
    """Yield the plates of ``plate.csv``; their source and their type are not kept.

    Raises:
        BadTableError: a column is missing.
    """
    table.require("Metadata_Plate", "Metadata_Batch")
    for row in table.rows():
        yield row if isinstance(row, Refusal) else _plate(row.line, _getter(table, row))


def jump_crispr(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield the reagents of ``crispr.csv``; one without a gene number has no target.

    Raises:
        BadTableError: a column is missing.
    """
    table.require("Metadata_JCP2022", "Metadata_NCBI_Gene_ID", "Metadata_Symbol")
    for row in table.rows():
        yield row if isinstance(row, Refusal) else _crispr(row.line, _getter(table, row))


def jump_controls(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield the controls of ``perturbation_control.csv``; 'empty' is a well without treatment.

    Raises:
        BadTableError: a column is missing.
    """
    columns = ("JCP2022", "pert_type", "Name", "modality")
    table.require(*(f"Metadata_{name}" for name in columns))
    for row in table.rows():
        yield row if isinstance(row, Refusal) else _control(row.line, _getter(table, row))


def _getter(table: TextTable, row: TableRow) -> Get:
    return lambda name: cell_text(row.cells, table.position(f"Metadata_{name}"))


def _plate(line: int, get: Get) -> PlateRow | Refusal:
    barcode, batch = get("Plate"), get("Batch")
    if barcode is None:
        return Refusal(line, "no plate", "Metadata_Plate is empty")
    if max(len(barcode), len(batch or "")) > LONGEST:
        return Refusal(line, "a name that cannot be stored", f"more than {LONGEST} characters")
    return PlateRow(line, barcode, batch)


def _crispr(line: int, get: Get) -> TreatmentRow | Refusal:
    identifier, symbol = get("JCP2022"), get("Symbol")
    if identifier is None or symbol is None:
        return Refusal(line, "no treatment", "Metadata_JCP2022 or Metadata_Symbol is empty")
    target = symbol if get("NCBI_Gene_ID") else None
    return _storable(
        line,
        TreatmentRecord(Perturbation.CRISPR, symbol, target=target, identifier=identifier),
    )


def _control(line: int, get: Get) -> TreatmentRow | Refusal:
    identifier, name = get("JCP2022"), get("Name")
    role, modality = (get("pert_type") or "").lower(), (get("modality") or "").lower()
    if identifier is None or name is None:
        return Refusal(line, "no treatment", "Metadata_JCP2022 or Metadata_Name is empty")
    if role not in _ROLES or modality not in _KINDS:
        detail = f"pert_type {role!r} and modality {modality!r} of {identifier}"
        return Refusal(line, "not a known control", detail)
    kind = Perturbation.NONE if role == "empty" else _KINDS[modality]
    record = TreatmentRecord(kind, name, control=_ROLES[role], identifier=identifier)
    return _storable(line, record)


def _storable(line: int, record: TreatmentRecord) -> TreatmentRow | Refusal:
    flaw = flaw_of(record)
    if flaw is not None:
        return Refusal(line, "a name that cannot be stored", flaw)
    return TreatmentRow(line, record)
