"""Plate maps: which treatment each well of a plate got, by the tables that laboratories publish."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from ..enums import Control, PerturbationKind
from ..errors import BadTableError, UserInputError
from .filenames import parse_well
from .records import LONGEST, Refusal, TreatmentRecord
from .tables import TableRow, TextTable, cell_text, nearest_columns, open_table
from .uris import writable

_COLUMNS = (("alias", "name"), ("from", "to"))


@dataclass(frozen=True)
class Aliases:
    """Names by alias; a name is never itself an alias."""

    names: Mapping[str, str]
    _done: dict[TreatmentRecord, TreatmentRecord] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> Aliases:
        """Read a table with the columns ``alias`` and ``name`` (or ``from`` and ``to``).

        An alias of an alias is followed to its end.

        Raises:
            BadTableError: a column is missing, a row is incomplete, an alias has two names, or
                names go round in a circle. Nothing is guessed.
            UserInputError: the file is missing or unreadable.
        """
        given = _read(open_table(path))
        return cls({alias: _followed(path, given, alias) for alias in given})

    def apply(self, record: TreatmentRecord) -> TreatmentRecord:
        """Return the treatment under its name; the same object for the same treatment.

        Only ``pert_iname`` is renamed: two samples of one compound stay two samples.
        """
        if record.pert_iname not in self.names:
            return record
        if record not in self._done:
            self._done[record] = replace(record, pert_iname=self.names[record.pert_iname])
        return self._done[record]


def _read(table: TextTable) -> dict[str, str]:
    columns = next((pair for pair in _COLUMNS if set(pair) <= set(table.columns)), _COLUMNS[0])
    table.require(*columns)
    old, new = (table.position(column) for column in columns)
    given: dict[str, str] = {}
    for row in table.rows():
        if isinstance(row, Refusal):
            raise _bad(table.path, row.line, row.detail)
        alias, name = cell_text(row.cells, old), cell_text(row.cells, new)
        if alias is None or name is None:
            raise _bad(table.path, row.line, "both names are needed")
        if given.setdefault(alias, name) != name:
            raise _bad(table.path, row.line, f"{alias!r} is {given[alias]!r} already")
    return {alias: name for alias, name in given.items() if alias != name}


def _followed(path: Path, given: Mapping[str, str], alias: str) -> str:
    name, seen = given[alias], {alias}
    while name in given:
        if name in seen:
            circle = ", ".join(repr(item) for item in sorted(seen))
            raise BadTableError(
                f"{path.name}: {circle} are aliases of each other. Choose one name for them."
            )
        seen.add(name)
        name = given[name]
    return name


def _bad(path: Path, line: int, detail: str) -> BadTableError:
    return BadTableError(f"{path.name}, line {line}: {detail}. Mend this row of the alias table.")


DMSO = "DMSO"

_NAME = "Metadata_pert_iname"
_TARGET = ("Metadata_target", "Metadata_gene", "Metadata_target_list")
_JCP = "Metadata_JCP2022"
_IDENTIFIER = ("Metadata_broad_sample", _JCP)
_CONTROL = ("Metadata_control_type", "Metadata_pert_type")
_KIND = ("Metadata_perturbation", "Metadata_Perturbation", "Metadata_modality")
_CELLS_CHEMISTRY = ("Metadata_InChIKey", "Metadata_smiles", "Metadata_pubchem_cid")
_CELLS_KINDS = {kind.value: kind for kind in PerturbationKind}
_JCP_NUMBER = re.compile(r"JCP2022_([0-9])[0-9]{5}", re.ASCII)
_JCP_KINDS = {"8": PerturbationKind.CRISPR, "9": PerturbationKind.ORF}
_JCP_NOTHING = frozenset({"JCP2022_999999", "JCP2022_UNKNOWN"})
"""How JUMP writes an empty well and one of which nothing is known."""

TREATMENT_COLUMNS = (_NAME, *_TARGET, *_IDENTIFIER, *_CONTROL, *_KIND, *_CELLS_CHEMISTRY)


def treatment_of(get: Callable[..., str | None]) -> TreatmentRecord | None:
    """Return the treatment of a row; ``get`` gives the first known value of some columns.

    A row that names no perturbation but its ``Metadata_JCP2022`` is called by that.
    """
    name = get(_NAME, _JCP)
    if name is None or name in _JCP_NOTHING:
        return None
    inchikey, smiles, pubchem_cid = (get(column) for column in _CELLS_CHEMISTRY)
    target = get(*_TARGET)
    return TreatmentRecord(
        kind=_kind(get(*_KIND), get(_JCP)),
        pert_iname=name,
        target=None if target is None else target_of(target),
        control=control_of(get(*_CONTROL), name),
        identifier=get(*_IDENTIFIER),
        inchikey=inchikey,
        smiles=smiles,
        pubchem_cid=pubchem_cid,
    )


def target_of(text: str) -> str | None:
    """Return a target; several, separated by ``|``, become each one once, sorted, with ``|``.

    'KCNK1' stays as it is, 'HDAC2 | HDAC1|HDAC2' is 'HDAC1|HDAC2': the order in which a table
    lists the targets of a compound does not make another label. None where it lists none.
    """
    targets = {target.strip() for target in text.split("|")} - {""}
    return "|".join(sorted(targets)) or None


def _kind(written: str | None, jcp: str | None) -> PerturbationKind:
    """Return the kind as written, else by the first digit of a JUMP identifier."""
    number = _JCP_NUMBER.fullmatch(jcp or "")
    known = _JCP_KINDS.get(number[1] if number else "", PerturbationKind.COMPOUND)
    return _CELLS_KINDS.get((written or "").lower(), known)


def control_of(control_type: str | None, pert_iname: str) -> Control | None:
    """Return the role that JUMP's ``control_type`` gives; DMSO is always a negative control.

    'poscon_cp', 'poscon_diverse' and 'poscon_orf' are positive controls, as is 'positive'.
    """
    if pert_iname.upper() == DMSO:
        return Control.NEGATIVE
    text = (control_type or "").lower()
    if text.startswith(("poscon", "positive")):
        return Control.POSITIVE
    return Control.NEGATIVE if text.startswith(("negcon", "negative")) else None


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
    kind: PerturbationKind
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
    untreated = _dmso() if kind is PerturbationKind.COMPOUND else None
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


def kind_of(table: TextTable) -> PerturbationKind:
    """Return what the treatments of a table are, by its columns."""
    names = {column.removeprefix(PREFIX) for column in table.columns}
    if names & _CHEMISTRY:
        return PerturbationKind.COMPOUND
    return PerturbationKind.CRISPR if "target_sequence" in names else PerturbationKind.ORF


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

    def treatment(self, row: TableRow, kind: PerturbationKind) -> TreatmentRecord | None:
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
    return TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)


def _is_dmso(record: TreatmentRecord) -> bool:
    return record.kind is PerturbationKind.COMPOUND and record.pert_iname.upper() == DMSO


_ROLES = {"negcon": Control.NEGATIVE, "poscon": Control.POSITIVE, "trt": None, "empty": None}
_KINDS = {
    "compound": PerturbationKind.COMPOUND,
    "crispr": PerturbationKind.CRISPR,
    "orf": PerturbationKind.ORF,
    "any": PerturbationKind.NONE,
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
        TreatmentRecord(PerturbationKind.CRISPR, symbol, target=target, identifier=identifier),
    )


def _control(line: int, get: Get) -> TreatmentRow | Refusal:
    identifier, name = get("JCP2022"), get("Name")
    role, modality = (get("pert_type") or "").lower(), (get("modality") or "").lower()
    if identifier is None or name is None:
        return Refusal(line, "no treatment", "Metadata_JCP2022 or Metadata_Name is empty")
    if role not in _ROLES or modality not in _KINDS:
        detail = f"pert_type {role!r} and modality {modality!r} of {identifier}"
        return Refusal(line, "not a known control", detail)
    kind = PerturbationKind.NONE if role == "empty" else _KINDS[modality]
    record = TreatmentRecord(kind, name, control=_ROLES[role], identifier=identifier)
    return _storable(line, record)


def _storable(line: int, record: TreatmentRecord) -> TreatmentRow | Refusal:
    flaw = flaw_of(record)
    if flaw is not None:
        return Refusal(line, "a name that cannot be stored", flaw)
    return TreatmentRow(line, record)


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
    return TreatmentRecord(PerturbationKind.GENOTYPE, name, target=gene, control=control)


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
