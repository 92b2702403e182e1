"""Plate maps: which treatment each well of a plate got, by the tables that JUMP publishes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadTableError, UserInputError
from ..terms import Control, Perturbation
from .imagetable import DMSO, control_of
from .names import parse_well
from .records import Refusal, TreatmentRecord
from .tables import TableRow, TextTable, cell_text, open_table

Wells = dict[tuple[int, int], TreatmentRecord | None]
"""Treatment by (row, column), both from 1; None: the well is empty or its sample unknown."""

_MAP_SUFFIXES = frozenset({".txt", ".csv", ".tsv"})
_BARCODES = "barcode_platemap"


@dataclass(frozen=True, slots=True)
class Issue:
    """A row of an annotation table that was not used, and the file it is in."""

    path: Path
    refusal: Refusal


@dataclass(slots=True)
class _Issues:
    """Collects what could not be used while the tables of one annotation are read."""

    found: list[Issue] = field(default_factory=list)

    def add(self, path: Path, line: int, reason: str, detail: str) -> None:
        self.found.append(Issue(path, Refusal(line, reason, detail)))


@dataclass(frozen=True, slots=True)
class PlateAnnotation:
    """The treatments of the wells of plates.

    ``maps`` is by plate map name, ``barcodes`` says which plate uses which; without barcodes
    there is one map, and every plate uses it. ``issues`` are the rows that were not used, ``files``
    the files that were read.
    """

    maps: Mapping[str, Wells]
    barcodes: Mapping[str, str] | None
    issues: tuple[Issue, ...]
    files: tuple[Path, ...]

    def knows(self, plate: str) -> bool:
        """Tell whether there is a map for this plate."""
        return self._wells(plate) is not None

    def for_well(self, plate: str, row: int, column: int) -> TreatmentRecord | None:
        """Return the treatment of a well; None where it is empty or the maps do not have it."""
        return (self._wells(plate) or {}).get((row, column))

    def _wells(self, plate: str) -> Wells | None:
        if self.barcodes is None:
            return next(iter(self.maps.values()))
        return self.maps.get(self.barcodes.get(plate, ""))


def read_annotation(
    platemap: Path, treatments: Path, barcodes: Path | None = None
) -> PlateAnnotation:
    """Join a plate map (or a folder of them) with the table of its treatments.

    The plate map has ``well_position`` and ``broad_sample`` (and ``plate_map_name`` where it holds
    several maps), the treatment table ``broad_sample`` and ``pert_iname`` or ``gene``; barcodes
    (``Assay_Plate_Barcode``, ``Plate_Map_Name``) choose the map of each plate. An empty
    ``broad_sample`` is DMSO in a compound map and an empty well in other maps. A missing value
    never joins another.

    Raises:
        BadTableError: a column is missing, or several maps and no barcodes to choose.
        UserInputError: a file is missing or unreadable.
    """
    issues = _Issues()
    table = _read_treatments(treatments, issues)
    paths = _map_files(platemap)
    maps: dict[str, Wells] = {}
    for path in paths:
        _read_map(path, table, maps, issues)
    chosen = barcodes or _barcodes_beside(platemap)
    plates = _read_barcodes(chosen, maps, issues) if chosen else None
    if plates is None and len(maps) > 1:
        raise BadTableError(
            f"{platemap} holds {len(maps)} plate maps. Say which plate uses which with a "
            "barcode_platemap.csv (Assay_Plate_Barcode, Plate_Map_Name), or give one map."
        )
    files = (treatments, *paths, *([chosen] if chosen else []))
    return PlateAnnotation(maps, plates, tuple(issues.found), files)


@dataclass(frozen=True, slots=True)
class _Treatments:
    kind: Perturbation
    by_sample: Mapping[str, TreatmentRecord]
    untreated: TreatmentRecord | None


def _read_treatments(path: Path, issues: _Issues) -> _Treatments:
    table = open_table(path)
    table.require("broad_sample")
    if not {"pert_iname", "gene"} & set(table.columns):
        table.require("pert_iname")
    kind = _kind(table)
    by_sample: dict[str, TreatmentRecord] = {}
    untreated = _dmso() if kind is Perturbation.COMPOUND else None
    for row in _good_rows(table, issues):
        record = _treatment(table, row, kind)
        if record is None:
            issues.add(path, row.line, "no treatment", "neither pert_iname nor gene nor sample")
        elif record.identifier is None and _is_dmso(record):
            untreated = record
        else:
            _keep(by_sample, record, path, row.line, issues)
    return _Treatments(kind, by_sample, untreated)


def _keep(
    by_sample: dict[str, TreatmentRecord],
    record: TreatmentRecord,
    path: Path,
    line: int,
    issues: _Issues,
) -> None:
    if record.identifier is None:
        issues.add(path, line, "no broad_sample", f"{record.pert_iname} cannot be joined")
    elif by_sample.setdefault(record.identifier, record) != record:
        detail = f"{record.identifier} was {by_sample[record.identifier].pert_iname} before"
        issues.add(path, line, "broad_sample twice", detail)


def _kind(table: TextTable) -> Perturbation:
    columns = {column.lower() for column in table.columns}
    if columns & {"pert_iname", "smiles", "inchikey", "pubchem_cid"}:
        return Perturbation.COMPOUND
    return Perturbation.CRISPR if "target_sequence" in columns else Perturbation.ORF


def _treatment(table: TextTable, row: TableRow, kind: Perturbation) -> TreatmentRecord | None:
    def get(*columns: str) -> str | None:
        found = (cell_text(row.cells, table.position(column)) for column in columns)
        return next((text for text in found if text is not None), None)

    sample, target = get("broad_sample"), get("gene", "target", "target_list")
    name = get("pert_iname") or target or sample
    if name is None:
        return None
    return TreatmentRecord(
        kind=kind,
        pert_iname=name,
        target=target,
        control=control_of(get("control_type"), name),
        identifier=sample,
        inchikey=get("InChIKey"),
        smiles=get("smiles"),
        pubchem_cid=get("pubchem_cid"),
    )


def _dmso() -> TreatmentRecord:
    return TreatmentRecord(Perturbation.COMPOUND, DMSO, control=Control.NEGATIVE)


def _is_dmso(record: TreatmentRecord) -> bool:
    return record.kind is Perturbation.COMPOUND and record.pert_iname.upper() == DMSO


def _read_map(path: Path, treatments: _Treatments, maps: dict[str, Wells], issues: _Issues) -> None:
    table = open_table(path)
    table.require("well_position", "broad_sample")
    well, sample = table.position("well_position"), table.position("broad_sample")
    name = table.position("plate_map_name")
    for row in _good_rows(table, issues):
        wells = maps.setdefault(cell_text(row.cells, name) or _stem(path), {})
        position = _position(cell_text(row.cells, well), path, row.line, issues)
        if position is None:
            continue
        if position in wells:
            issues.add(path, row.line, "well twice", f"{row.cells[well or 0]} is on the map twice")
            continue
        identifier = cell_text(row.cells, sample)
        wells[position] = treatments.by_sample.get(identifier) if identifier else None
        if identifier is None:
            wells[position] = treatments.untreated
        elif identifier not in treatments.by_sample:
            issues.add(
                path, row.line, "unknown broad_sample", f"{identifier} is in no treatment row"
            )


def _position(text: str | None, path: Path, line: int, issues: _Issues) -> tuple[int, int] | None:
    try:
        return parse_well(text or "")
    except UserInputError as error:
        issues.add(path, line, "not a well", str(error))
        return None


def _read_barcodes(path: Path, maps: Mapping[str, Wells], issues: _Issues) -> dict[str, str]:
    table = open_table(path)
    table.require("Assay_Plate_Barcode", "Plate_Map_Name")
    barcode, name = table.position("Assay_Plate_Barcode"), table.position("Plate_Map_Name")
    plates: dict[str, str] = {}
    for row in _good_rows(table, issues):
        plate, chosen = cell_text(row.cells, barcode), cell_text(row.cells, name)
        if plate is None or chosen is None:
            issues.add(path, row.line, "no barcode or map name", "both are needed")
        elif plates.setdefault(plate, chosen) != chosen:
            issues.add(path, row.line, "barcode twice", f"{plate} uses {plates[plate]} already")
        elif chosen not in maps:
            issues.add(path, row.line, "no such plate map", f"{plate} uses {chosen}")
    return plates


def _good_rows(table: TextTable, issues: _Issues) -> Iterator[TableRow]:
    for row in table.rows():
        if isinstance(row, Refusal):
            issues.found.append(Issue(table.path, row))
        else:
            yield row


def _map_files(platemap: Path) -> tuple[Path, ...]:
    if not platemap.is_dir():
        return (platemap,)
    found = sorted(path for path in platemap.iterdir() if _is_map(path))
    if not found:
        raise UserInputError(f"{platemap} has no plate map (.txt, .csv or .tsv) in it.")
    return tuple(found)


def _is_map(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    table = bool(suffixes) and suffixes[-1] in _MAP_SUFFIXES
    return table and path.is_file() and not path.name.startswith((_BARCODES, "."))


def _barcodes_beside(platemap: Path) -> Path | None:
    """Return the barcode table in the folder of maps or in the one above it, as JUMP has it."""
    if not platemap.is_dir():
        return None
    places = (platemap / f"{_BARCODES}.csv", platemap.resolve().parent / f"{_BARCODES}.csv")
    return next((path for path in places if path.is_file()), None)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix)
