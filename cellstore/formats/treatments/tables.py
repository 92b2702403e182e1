"""Treatment tables: what the samples of plate maps are, as JUMP and others publish them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from ...errors import BadTableError
from ...terms import Control, Perturbation
from ..records import LONGEST, Refusal, TreatmentRecord
from ..text.tables import TableRow, TextTable, cell_text, nearest_columns, open_table
from .cells import DMSO, control_of, target_of

PREFIX = "Metadata_"
SAMPLE = "broad_sample"
TARGETS = ("gene", "target", "target_list")

_CHEMISTRY = frozenset({"pert_iname", "smiles", "InChIKey", "pubchem_cid"})
_NAMES = ("pert_iname", "identifier", "inchikey", "pubchem_cid")
_OPEN = tuple(
    item.name for item in fields(TreatmentRecord) if item.name not in ("kind", "pert_iname")
)


class TreatmentRow(NamedTuple):
    """A row of a table of treatments; ``record`` is None where every cell of it is empty."""

    line: int
    record: TreatmentRecord | None


class Issue(NamedTuple):
    """A row of an annotation table that was not used, and the file it is in."""

    path: Path
    refusal: Refusal


@dataclass(frozen=True)
class TreatmentTable:
    """The treatments of one table by sample; ``untreated`` is what a well without sample got."""

    path: Path
    kind: Perturbation
    by_sample: Mapping[str, TreatmentRecord]
    untreated: TreatmentRecord | None


def table_layouts(columns: Sequence[str]) -> list[str]:
    """Return the layouts of annotations that a table with these columns may have."""
    names = {column.removeprefix(PREFIX) for column in columns}
    tests = {
        "platemap": "well_position" in names and bool(names & {SAMPLE, "genotype"}),
        "treatment-table": _is_treatment_table(columns, names),
        "jump-plates": _is_jump_plates(columns),
        "jump-crispr": {"JCP2022", "NCBI_Gene_ID", "Symbol"} == names,
        "jump-controls": {"JCP2022", "pert_type", "Name", "modality"} <= names,
    }
    return [layout for layout, fits in tests.items() if fits]


def _is_treatment_table(columns: Sequence[str], names: set[str]) -> bool:
    places = {"well_position", "Well", "Plate", "Row", "Col", "Site", "ImageNumber"}
    files = any(column.startswith(("FileName_", "Image_FileName_")) for column in columns)
    places |= {"split", "experiment_type"}  # tables of splits name samples and targets, too
    described = bool(names & {"pert_iname", "gene"})
    return SAMPLE in names and described and not names & places and not files


def _is_jump_plates(columns: Sequence[str]) -> bool:
    wanted = {f"{PREFIX}Plate", f"{PREFIX}Batch"}
    allowed = wanted | {f"{PREFIX}Source", f"{PREFIX}PlateType"}
    return wanted <= set(columns) <= allowed


def treatment_rows(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield one treatment, or why it is none, per data row.

    Only DMSO of a compound table may be without ``broad_sample``.

    Raises:
        BadTableError: the table has no ``broad_sample``, or nothing to name a treatment by.
    """
    columns = _Columns.of(table)
    kind = kind_of(table)
    for row in table.rows():
        yield row if isinstance(row, Refusal) else _checked(row, columns.treatment(row, kind))


def read_treatments(path: Path, issues: list[Issue]) -> TreatmentTable:
    """Read a whole treatment table; rows that cannot be used are added to ``issues``.

    Raises:
        BadTableError: a column is missing.
        UserInputError: the file is missing or unreadable.
    """
    table = open_table(path)
    kind = kind_of(table)
    by_sample: dict[str, TreatmentRecord] = {}
    untreated = _dmso() if kind is Perturbation.COMPOUND else None
    for row in treatment_rows(table):
        if isinstance(row, Refusal):
            issues.append(Issue(path, row))
        elif row.record is not None and row.record.identifier is None:
            untreated = row.record
        elif row.record is not None:
            issues += _kept(by_sample, row.record, path, row.line)
    return TreatmentTable(path, kind, by_sample, untreated)


def completed(said: TreatmentRecord, known: TreatmentRecord) -> TreatmentRecord:
    """Return ``said`` with what it leaves open taken from ``known``, where both are one sample.

    Where the result equals ``known``, ``said`` says nothing new. One sample: the same kind and
    identifier, or the same kind and name where one of the two has no identifier.
    """
    if not _one_sample(known, said):
        return said
    gaps = {name: getattr(known, name) for name in _OPEN if getattr(said, name) is None}
    return replace(said, **gaps) if gaps else said


def kind_of(table: TextTable) -> Perturbation:
    """Return what the treatments of a table are, by its columns."""
    names = {column.removeprefix(PREFIX) for column in table.columns}
    if names & _CHEMISTRY:
        return Perturbation.COMPOUND
    return Perturbation.CRISPR if "target_sequence" in names else Perturbation.ORF


def flaw_of(record: TreatmentRecord) -> str | None:
    """Return why no database can keep a treatment, or None where it can."""
    long = [name for name in _NAMES if len(getattr(record, name) or "") > LONGEST]
    if long:
        return f"{' and '.join(long)} of more than {LONGEST} characters"
    return None


def _one_sample(one: TreatmentRecord, other: TreatmentRecord) -> bool:
    if one.kind is not other.kind:
        return False
    if one.identifier is None or other.identifier is None:
        return one.pert_iname == other.pert_iname
    return one.identifier == other.identifier


@dataclass(frozen=True)
class _Columns:
    """Where the columns of a treatment table are; each may have the prefix ``Metadata_``."""

    places: Mapping[str, int]

    @classmethod
    def of(cls, table: TextTable) -> _Columns:
        names = (SAMPLE, "pert_iname", *TARGETS, "control_type", "InChIKey", "smiles")
        found = {name: column_of(table, name) for name in (*names, "pubchem_cid")}
        places = {name: place for name, place in found.items() if place is not None}
        if SAMPLE not in places:
            table.require(SAMPLE)
        if not places.keys() & {"pert_iname", *TARGETS}:
            nearest = nearest_columns(["pert_iname", "gene"], table.columns)
            raise BadTableError(
                f"{table.path.name} has no column 'pert_iname' or 'gene'. {nearest}"
            )
        return cls(places)

    def treatment(self, row: TableRow, kind: Perturbation) -> TreatmentRecord | None:
        sample, target = self._get(row, SAMPLE), self._get(row, *TARGETS)
        target = None if target is None else target_of(target)
        name = self._get(row, "pert_iname") or target or sample
        if name is None:
            return None
        return TreatmentRecord(
            kind=kind,
            pert_iname=name,
            target=target,
            control=control_of(self._get(row, "control_type"), name),
            identifier=sample,
            inchikey=self._get(row, "InChIKey"),
            smiles=self._get(row, "smiles"),
            pubchem_cid=self._get(row, "pubchem_cid"),
        )

    def _get(self, row: TableRow, *names: str) -> str | None:
        found = (cell_text(row.cells, self.places.get(name)) for name in names)
        return next((text for text in found if text is not None), None)


def column_of(table: TextTable, name: str) -> int | None:
    """Return the place of a column, with or without the prefix ``Metadata_``."""
    plain = table.position(name)
    return table.position(PREFIX + name) if plain is None else plain


def _checked(row: TableRow, record: TreatmentRecord | None) -> TreatmentRow | Refusal:
    if record is None:
        return TreatmentRow(row.line, None)
    if record.identifier is None and not _is_dmso(record):
        return Refusal(row.line, "no broad_sample", f"{record.pert_iname} cannot be joined")
    flaw = flaw_of(record)
    if flaw is not None:
        return Refusal(row.line, "a name that cannot be stored", flaw)
    return TreatmentRow(row.line, record)


def _kept(
    by_sample: dict[str, TreatmentRecord], record: TreatmentRecord, path: Path, line: int
) -> list[Issue]:
    sample = record.identifier or ""
    first = by_sample.setdefault(sample, record)
    if first == record:
        return []
    detail = f"{sample} was {first.pert_iname} before"
    return [Issue(path, Refusal(line, "broad_sample twice", detail))]


def _dmso() -> TreatmentRecord:
    return TreatmentRecord(Perturbation.COMPOUND, DMSO, control=Control.NEGATIVE)


def _is_dmso(record: TreatmentRecord) -> bool:
    return record.kind is Perturbation.COMPOUND and record.pert_iname.upper() == DMSO
