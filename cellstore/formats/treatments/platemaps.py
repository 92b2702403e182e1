"""Plate maps: which treatment each well of a plate got, by the tables that laboratories publish."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...errors import BadTableError, UserInputError
from ...terms import Control, Perturbation
from ..files.places import writable
from ..names import parse_well
from ..records import Refusal, TreatmentRecord
from ..text.tables import TableRow, TextTable, cell_text, open_table
from .tables import (
    SAMPLE,
    Issue,
    TreatmentTable,
    column_of,
    completed,
    flaw_of,
    read_treatments,
)

__all__ = ["Issue", "PlateAnnotation", "PlateMap", "Position", "read_annotation"]

Position = tuple[int, int]
"""Row and column, both from 1."""

_MAP_SUFFIXES = frozenset({".txt", ".csv", ".tsv"})
_BARCODES = "barcode_platemap"
_WILD_TYPE = "WT"


@dataclass(frozen=True)
class PlateMap:
    """The treatments of one plate map by position; None: the well is empty.

    ``lines``: the line of ``path`` that says so. A row with a sample that no treatment table has
    is in neither.
    """

    name: str
    path: Path
    wells: dict[Position, TreatmentRecord | None] = field(default_factory=dict)
    lines: dict[Position, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlateAnnotation:
    """The treatments of the wells of plates.

    ``maps`` is by plate map name, ``barcodes`` says which plate uses which; without barcodes
    there is one map, and every plate uses it. ``issues`` are the rows that were not used, ``files``
    the files that were read, ``notes`` what a user should know.
    """

    maps: Mapping[str, PlateMap]
    barcodes: Mapping[str, str] | None
    issues: tuple[Issue, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def knows(self, plate: str) -> bool:
        """Tell whether there is a map for this plate."""
        return self.map_of(plate) is not None

    def for_well(self, plate: str, row: int, column: int) -> TreatmentRecord | None:
        """Return the treatment of a well; None where it is empty or the maps do not have it."""
        found = self.map_of(plate)
        return None if found is None else found.wells.get((row, column))

    def map_of(self, plate: str) -> PlateMap | None:
        """Return the map that a plate uses, or None."""
        if self.barcodes is None:
            return next(iter(self.maps.values()))
        return self.maps.get(self.barcodes.get(plate, ""))


def read_annotation(
    platemap: Path, treatments: Sequence[Path] = (), barcodes: Path | None = None
) -> PlateAnnotation:
    """Join a plate map (or a folder of them) with the tables of its treatments.

    A plate map has ``well_position`` and ``broad_sample`` (and ``plate_map_name`` where a file
    holds several maps), or ``genotype`` and ``gene_name``, and then needs no treatment table. A
    treatment table has ``broad_sample`` and ``pert_iname`` or ``gene``; of two tables that have
    the same sample the first counts, and the second fills its gaps. Barcodes
    (``Assay_Plate_Barcode``, ``Plate_Map_Name``) choose the map of each plate.

    A map is of the kind of the table that has most of its samples. An empty ``broad_sample`` is
    DMSO in a compound map and an empty well in other maps. A missing value never joins another.

    Raises:
        BadTableError: a column is missing, samples have no treatment table, two files hold one
            map, several maps have no barcodes to choose, or the barcodes choose none of the maps.
        UserInputError: a file is missing or unreadable.
    """
    issues: list[Issue] = []
    tables = [read_treatments(path, issues) for path in treatments]
    maps: dict[str, PlateMap] = {}
    notes: list[str] = []
    paths = _map_files(platemap)
    for path in paths:
        _read_maps(path, tables, maps, issues, notes)
    chosen = barcodes or _barcodes_beside(platemap)
    plates = _read_barcodes(chosen, maps, issues) if chosen else None
    if plates is None and len(maps) != 1:
        raise BadTableError(
            f"{platemap} holds {len(maps)} plate maps. Say which plate uses which with a "
            "barcode_platemap.csv (Assay_Plate_Barcode, Plate_Map_Name), or give one map."
        )
    files = (*treatments, *paths, *([chosen] if chosen else []))
    return PlateAnnotation(maps, plates, tuple(issues), files, tuple(notes))


class _MapRow(NamedTuple):
    """A usable row of a plate map: its well, and either its sample or its treatment."""

    line: int
    position: Position
    sample: str | None
    record: TreatmentRecord | None


def _read_maps(
    path: Path,
    tables: Sequence[TreatmentTable],
    maps: dict[str, PlateMap],
    issues: list[Issue],
    notes: list[str],
) -> None:
    table = open_table(path)
    notes += [f"{writable(path.name)}: {note}" for note in table.notes]
    genotypes = _check_columns(table, tables)
    if "seed_density" in table.columns:
        notes.append(f"{writable(path.name)}: seed_density is not kept")
    by_map: dict[str, list[_MapRow]] = defaultdict(list)
    for name, row in _rows(table, genotypes, issues):
        by_map[name or _stem(path)].append(row)
    if not by_map:
        by_map[_stem(path)] = []  # a map all of whose rows are refused is a map
    for name, rows in by_map.items():
        if name in maps:
            raise BadTableError(
                f"{maps[name].path.name} and {path.name} both hold the plate map {name}. "
                "Remove the one that is not meant."
            )
        maps[name] = found = PlateMap(name, path)
        _fill(found, rows, None if genotypes else _chosen(rows, tables), tables, issues)


def _check_columns(table: TextTable, tables: Sequence[TreatmentTable]) -> bool:
    """Return whether a plate map names genotypes rather than samples."""
    table.require("well_position")
    if SAMPLE not in table.columns and "genotype" in table.columns:
        return True
    table.require(SAMPLE)
    if not tables:
        raise BadTableError(
            f"{table.path.name} names samples and not what they are. Give the table of their "
            "names with --compounds."
        )
    return False


def _rows(
    table: TextTable, genotypes: bool, issues: list[Issue]
) -> Iterator[tuple[str | None, _MapRow]]:
    name, sample = table.position("plate_map_name"), column_of(table, SAMPLE)
    for row in table.rows():
        found = row if isinstance(row, Refusal) else _map_row(table, row, sample, genotypes)
        if isinstance(found, Refusal):
            issues.append(Issue(table.path, found))
        elif isinstance(row, TableRow):
            yield cell_text(row.cells, name), found


def _map_row(
    table: TextTable, row: TableRow, sample: int | None, genotypes: bool
) -> _MapRow | Refusal:
    try:
        position = parse_well(cell_text(row.cells, table.position("well_position")) or "")
    except UserInputError as error:
        return Refusal(row.line, "not a well", str(error))
    if not genotypes:
        return _MapRow(row.line, position, cell_text(row.cells, sample), None)
    record = _genotype(table, row)
    flaw = flaw_of(record) if record else None
    if flaw:
        return Refusal(row.line, "a name that cannot be stored", flaw)
    return _MapRow(row.line, position, None, record)


def _genotype(table: TextTable, row: TableRow) -> TreatmentRecord | None:
    """Return 'NF1 Null' of gene NF1; the wild type is the negative control."""
    gene = cell_text(row.cells, table.position("gene_name"))
    genotype = cell_text(row.cells, table.position("genotype"))
    if genotype is None:
        return None
    control = Control.NEGATIVE if genotype.upper() == _WILD_TYPE else None
    name = f"{gene} {genotype}" if gene else genotype
    return TreatmentRecord(Perturbation.GENOTYPE, name, target=gene, control=control)


def _chosen(rows: Sequence[_MapRow], tables: Sequence[TreatmentTable]) -> TreatmentTable | None:
    """Return the table that has most samples of a map; None where several have none of them."""
    if len(tables) == 1:
        return tables[0]
    samples = {row.sample for row in rows if row.sample is not None}
    counts = [len(samples & table.by_sample.keys()) for table in tables]
    return tables[counts.index(max(counts))] if max(counts, default=0) else None


def _fill(
    found: PlateMap,
    rows: Sequence[_MapRow],
    table: TreatmentTable | None,
    tables: Sequence[TreatmentTable],
    issues: list[Issue],
) -> None:
    for row in rows:
        record = row.record
        if row.sample is None and record is None:
            record = table.untreated if table else None
        elif row.sample is not None:
            record = _lookup(row.sample, tables)
        reason = _why_not(found, row, record)
        if reason is None:
            found.wells[row.position] = record
            found.lines[row.position] = row.line
        else:
            issues.append(Issue(found.path, Refusal(row.line, *reason)))


def _lookup(sample: str, tables: Sequence[TreatmentTable]) -> TreatmentRecord | None:
    record = None
    for table in tables:
        more = table.by_sample.get(sample)
        if more is not None:
            record = more if record is None else completed(record, more)
    return record


def _why_not(
    found: PlateMap, row: _MapRow, record: TreatmentRecord | None
) -> tuple[str, str] | None:
    if row.position in found.wells:
        first = found.lines[row.position]
        return "well twice", f"this well is on the map already, on line {first}"
    if row.sample is not None and record is None:
        return "unknown broad_sample", f"{row.sample} is in no treatment row"
    return None


def _read_barcodes(path: Path, maps: Mapping[str, PlateMap], issues: list[Issue]) -> dict[str, str]:
    table = open_table(path)
    table.require("Assay_Plate_Barcode", "Plate_Map_Name")
    barcode, name = table.position("Assay_Plate_Barcode"), table.position("Plate_Map_Name")
    plates: dict[str, str] = {}
    for row in table.rows():
        refusal = row if isinstance(row, Refusal) else _barcode(plates, row, barcode, name)
        if refusal is not None:
            issues.append(Issue(path, refusal))
    if not maps.keys() & set(plates.values()):
        named = ", ".join(sorted(set(plates.values()))[:3])
        raise BadTableError(
            f"{path.name} uses the plate maps {named or 'of no name'}, and none of them was given. "
            f"The maps here are {', '.join(sorted(maps)[:3])}: rename them, or give others."
        )
    return plates


def _barcode(
    plates: dict[str, str], row: TableRow, barcode: int | None, name: int | None
) -> Refusal | None:
    plate, chosen = cell_text(row.cells, barcode), cell_text(row.cells, name)
    if plate is None or chosen is None:
        return Refusal(row.line, "no barcode or map name", "both are needed")
    if plates.setdefault(plate, chosen) != chosen:
        return Refusal(row.line, "barcode twice", f"{plate} uses {plates[plate]} already")
    return None


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
