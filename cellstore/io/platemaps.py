"""Plate maps: which treatment each well of a plate got, by the maps that laboratories draw.

A plate map says what was done to each well, by names or by samples (``broad_sample``) that a
treatment table describes; a table of barcodes names the map of each plate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..enums import Control, PerturbationKind
from ..errors import BadTableError, UnknownNameError, UserInputError, some_of
from .filenames import format_well, written_well
from .map_shapes import (
    EXCEL,
    MILLIMOLAR_NOTE,
    NAMING,
    MapColumns,
    columns_below_titles,
    dose_in_name,
    open_map,
)
from .tables import (
    Refusal,
    RowRefusedError,
    TextTable,
    known_text,
    open_table,
    sheet_names,
)
from .treatments import (
    DMSO,
    EMPTY,
    PREFIX,
    TreatmentRecord,
    combined,
    completed,
    kind_of_table,
    normalised_name,
    read_control,
    read_kind,
    split_names,
    treatment_rows,
)
from .uris import writable

Position = tuple[int, int]
"""Row and column of a well, both from 1."""

_MAP_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".xlsx", ".xls", ".ods"})
_BARCODES = "barcode_platemap"
UNTREATED = "untreated"
_KIND_OF_ROLE = {
    "sirna": PerturbationKind.SIRNA,
    "crispr": PerturbationKind.CRISPR,
    "orf": PerturbationKind.ORF,
    "gene": PerturbationKind.CRISPR,
}
_METADATA_ROLES = ("cell_line", "time_point", "replicate", "batch")
BLANK = "blank"
"""Why a well has no treatment: its cell is blank."""
NAMELESS = "a dose and no name"
_ADVICE = {why: advice for why, (_, advice) in EXCEL.items()} | {
    BLANK: "To say what they got: --blank DMSO or --blank untreated",
    NAMELESS: "Write the name of what was given, or say what blank wells got: --blank DMSO",
}

Issue = tuple[Path, Refusal]
"""A row of an annotation table that was not used, and the file it is in."""


class MapRow(NamedTuple):
    """A well of a plate map. Every reader of maps yields these, whatever the shape of its table.

    ``map_name`` is the plate where the map has a column of plates. ``record`` is what was done to
    the well; None: not known, or no cells. Where the map does not name it, ``unnamed`` says why
    (``BLANK``, ``EMPTY``, ``NAMELESS`` or what Excel made of it), and what is in the cell.
    ``metadata`` has the values of the other columns.
    """

    line: int
    map_name: str | None
    position: Position
    metadata: dict[str, str]
    record: TreatmentRecord | None
    unnamed: tuple[str, str] | None


@dataclass(frozen=True)
class PlateMap:
    """The wells of one plate map; ``blank`` is what those got whose cell is blank.

    A row with a sample that no treatment table has is not among them.
    """

    name: str
    path: Path
    blank: TreatmentRecord | None = None
    wells: dict[Position, MapRow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlateAnnotation:
    """The treatments of the wells of plates.

    ``maps`` is by plate map name, ``barcodes`` says which plate uses which; without barcodes
    there is one map, and every plate uses it. ``issues`` are the rows that were not used, ``files``
    the files that were read, ``notes`` what a user should know. ``names_plates``: the map has a
    column of plates.
    """

    maps: Mapping[str, PlateMap]
    barcodes: Mapping[str, str] | None
    issues: tuple[Issue, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    names_plates: bool = False

    def map_of(self, plate: str) -> PlateMap | None:
        """Return the map that a plate uses, or None."""
        if self.barcodes is None:
            return next(iter(self.maps.values()))
        return self.maps.get(self.barcodes.get(plate, ""))


class _Treatments(NamedTuple):
    """The treatments of one table by sample and by name; ``untreated``: DMSO of a compound map."""

    by_sample: dict[str, TreatmentRecord]
    by_name: dict[str, TreatmentRecord]
    untreated: TreatmentRecord | None

    def find(self, part: TreatmentRecord) -> TreatmentRecord | None:
        """Return what the table says of a part of a treatment: by its sample, else by name."""
        if part.identifier is not None:
            return self.by_sample.get(part.identifier)
        return self.by_name.get(normalised_name(part.pert_iname))


def read_annotation(
    platemap: Path,
    treatments: Sequence[Path] = (),
    barcodes: Path | None = None,
    *,
    sheet: str | None = None,
    columns: Sequence[tuple[str, str]] = (),
    blank: str | None = None,
    controls: Sequence[tuple[str, str]] = (),
) -> PlateAnnotation:
    """Join a plate map (or a folder of them) with the tables of its treatments.

    A plate map is a grid, or has a column of wells and one of what was done to them; see
    ``docs/own-plates.md``. Treatments by name need no table. A treatment table has
    ``broad_sample``, or names; of two tables that have the same sample the first counts, and the
    second fills its gaps. Barcodes (``Assay_Plate_Barcode``, ``Plate_Map_Name``) choose the map of
    each plate. ``columns``: (meaning, header); ``controls``: (name, negative or positive).

    A blank is not known, unless ``blank`` says DMSO or untreated, or it is a compound map of the
    Broad Institute (with ``plate_map_name`` or ``solvent``), where it is DMSO. A missing value
    never joins another.

    Raises:
        BadTableError: there is no map, two files hold one map, several maps have no barcodes to
            choose, or the barcodes choose none of the maps.
        UnknownNameError: an option names a sheet, a column or a control that is not there.
        UserInputError: a file is missing or unreadable.
    """
    if not platemap.exists():
        raise UserInputError(f"There is no plate map {platemap}. Check the path.")
    issues: list[Issue] = []
    notes: list[str] = []
    tables = [_read_treatments(path, issues) for path in treatments]
    paths = [platemap]
    if platemap.is_dir():
        paths = [
            path
            for path in sorted(platemap.iterdir())
            if Path(path.name.lower().removesuffix(".gz")).suffix in _MAP_SUFFIXES
            and path.is_file()
            and not path.name.startswith((_BARCODES, ".", "~"))
        ]
        if not paths:
            raise UserInputError(
                f"{platemap} has no plate map (.txt, .csv, .tsv, .xlsx, .xls or .ods) in it."
            )
    maps: dict[str, PlateMap] = {}
    names_plates = False
    for path in paths:
        table = map_table(path, sheet, columns)
        header = MapColumns(table.columns, columns)
        names_plates |= header.column("plate") is not None
        rows, refused = _usable_rows(path, table, header)
        issues += [(path, refusal) for refusal in refused]
        noted = (*table.notes, *_notes(rows, header, bool(tables)))
        notes += [f"{writable(path.name)}: {note}" for note in noted]
        # A map all of whose rows are refused is a map.
        by_map: dict[str, list[MapRow]] = {} if rows else {_stem(path): []}
        for row in rows:
            by_map.setdefault(row.map_name or _stem(path), []).append(row)
        is_broad = header.column("sample") and (header.column("map") or header.column("solvent"))
        for name, some in by_map.items():
            if name in maps:
                raise BadTableError(
                    f"{maps[name].path.name} and {path.name} both hold the plate map {name}. "
                    "Remove one of them."
                )
            maps[name] = PlateMap(name, path, _blank(some, tables, blank, bool(is_broad)))
            issues += [(path, refusal) for refusal in _fill(maps[name], some, tables, blank)]
    _set_controls(maps.values(), controls)
    if barcodes is None and platemap.is_dir():  # JUMP has it in the folder of maps, or above
        above = (platemap, platemap.resolve().parent)
        beside = (folder / f"{_BARCODES}.csv" for folder in above)
        barcodes = next((path for path in beside if path.is_file()), None)
    plates = _read_barcodes(barcodes, maps, issues) if barcodes else None
    if plates is None and names_plates:
        plates = {name: name for name in maps}
    if plates is None and len(maps) != 1:
        raise BadTableError(
            f"{platemap} holds {len(maps)} plate maps. Name the map of each plate in a "
            "barcode_platemap.csv (Assay_Plate_Barcode, Plate_Map_Name), or give one map."
        )
    files = (*treatments, *paths, *([barcodes] if barcodes else []))
    return PlateAnnotation(maps, plates, tuple(issues), files, tuple(notes), names_plates)


def _usable_rows(
    path: Path, table: TextTable, columns: MapColumns
) -> tuple[list[MapRow], list[Refusal]]:
    """Return the rows of a map, and those that cannot be used."""
    rows: list[MapRow] = []
    refused: list[Refusal] = []
    for item in _map_rows(table, columns):
        if isinstance(item, Refusal):
            refused.append(item)
        else:
            rows.append(item)
    if not rows and len(refused) > 1 and len({refusal.reason for refusal in refused}) == 1:
        line, reason, detail = refused[0]
        advice = " If another column has the wells: --map-column well=NAME."
        raise BadTableError(
            f"All {len(refused):,} rows of {path.name} are refused ({reason}), for example line "
            f"{line}: {detail.rstrip('.')}.{advice if reason == 'not a well' else ''}"
        )
    return rows, refused + _unclear_doses(rows)


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def map_table(
    path: Path, sheet: str | None = None, columns: Sequence[tuple[str, str]] = ()
) -> TextTable:
    """Return the plate map in a file as a table with a row for each well."""
    table = open_map(path, sheet, columns)
    if table is not None:
        return table
    found = columns_below_titles(path, sheet)
    for meaning, header in columns:
        if header not in found:
            raise UnknownNameError.of("column", f"{header} ({meaning})", found)
    where, others = path.name, ""
    if sheet is not None:
        where = f"sheet {sheet} of {path.name}"
        others = f" ({', '.join(name for name in sheet_names(path) if name != sheet)})"
    raise BadTableError(
        f"I do not recognise {where} as a plate map. It needs a well and a treatment column, or a "
        f"grid with columns 1, 2, 3 and rows A, B, C; yours has {some_of(found, 8)}. Name its "
        "columns with --map-column well=... --map-column treatment=..., or another sheet with "
        f"--sheet{others}."
    )


def _read_treatments(path: Path, issues: list[Issue]) -> _Treatments:
    """Read a whole treatment table; rows that cannot be used are added to ``issues``."""
    table = open_table(path)
    found = _Treatments({}, {}, None)
    if kind_of_table(table) is PerturbationKind.COMPOUND:
        dmso = TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)
        found = found._replace(untreated=dmso)
    for row in treatment_rows(table):
        if isinstance(row, Refusal):
            issues.append((path, row))
            continue
        line, record = row
        for part in record.parts if record else ():
            is_dmso = part.pert_iname.upper() == DMSO
            if is_dmso and found.untreated is not None:
                found = found._replace(untreated=part)
            first = found.by_name.setdefault(normalised_name(part.pert_iname), part)
            if part.identifier is not None:
                first = found.by_sample.setdefault(part.identifier, part)
            elif is_dmso:
                continue
            if first != part:
                name = part.identifier or part.pert_iname
                detail = f"{name} is {first.pert_iname} on an earlier line; kept"
                issues.append((path, Refusal(line, "broad_sample twice", detail)))
    return found


_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}(?![0-9])")


def _unclear_doses(rows: list[MapRow]) -> list[Refusal]:
    """Take out, and return, rows with doses like 1.000 where others of the file are like 0,5."""
    doses = [
        (at, part.dose_original)
        for at, row in enumerate(rows)
        for part in (row.record.parts if row.record else ())
        if part.dose_original
    ]
    if not any("," in text for _, text in doses):
        return []
    unclear = {at: text for at, text in doses if _THOUSANDS.match(text)}
    why = "may mean two numbers, as others have a comma; write it without a point"
    refused = [
        Refusal(rows[at].line, "not a dose", f"{text!r} {why}") for at, text in unclear.items()
    ]
    rows[:] = [row for at, row in enumerate(rows) if at not in unclear]
    return refused


def _notes(rows: Sequence[MapRow], columns: MapColumns, has_tables: bool) -> Iterator[str]:
    """Yield what a user should know of the codes and doses of a map."""
    dose = columns.column("dose")
    if dose and "mmoles" in dose.lower() and columns.units[dose] != "mM":
        yield MILLIMOLAR_NOTE
    records = [row.record for row in rows if row.record]
    parts = [part for record in records for part in record.parts]
    named = [record for record in records if record.pert_iname.upper() != DMSO]
    if not has_tables and named and all(map(_is_code, named)):
        yield (
            "its treatments are codes of samples; a table with their names and targets goes with "
            "it: --compounds FILE"
        )
    if any(part.dose is not None and part.unit is None for part in parts):
        yield (
            "doses without unit; write it into the header, like 'Dose (uM)', or into a column "
            "'Unit'"
        )


def _is_code(record: TreatmentRecord) -> bool:
    return record.pert_iname == record.identifier and any(map(str.isdigit, record.identifier))


def _map_rows(table: TextTable, columns: MapColumns) -> Iterator[MapRow | Refusal]:
    """Yield the wells of a table with a row per well."""
    others = [name for name in columns.others if name not in table.repeated]
    at = {name: table.position(name) for name in (*columns.by_role.values(), *others)}
    names = {name for (role, _), name in columns.by_role.items() if role in NAMING}
    doses = {name for (role, _), name in columns.by_role.items() if role == "dose"}
    for row in table.rows():
        if isinstance(row, Refusal):
            yield row
            continue
        cells = {name: row.cells[i].strip() for name, i in at.items() if i is not None}
        damaged = {
            name: what
            for name in names | doses
            for what, (looks, _) in EXCEL.items()
            if looks.fullmatch(cells[name])
        }
        texts = {
            name: text
            for name, cell in cells.items()
            if name not in damaged and (text := known_text(name, cell))
        }
        if not texts and not damaged:  # as spreadsheets write them below the last row
            continue
        try:
            read = _map_row(row.line, texts, columns, others, dose_in_header=not doses)
        except RowRefusedError as refused:
            yield Refusal(row.line, *refused.args)
            continue
        # A control needs no dose, and what looks up doses may find none for it.
        is_dmso = read.record is not None and read.record.pert_iname.upper() == DMSO
        for name in damaged if not (is_dmso and damaged.keys() <= doses) else ():
            read = read._replace(record=None, unnamed=(damaged[name], cells[name]))
        yield read


class _Row:
    """The known values of a row by role; ``used`` are the columns that were asked for."""

    def __init__(self, texts: dict[str, str], columns: MapColumns) -> None:
        self.texts, self.columns = texts, columns
        self.used: set[str | None] = set()

    def text(self, role: str, number: int = 0) -> str | None:
        column = self.columns.column(role, number)
        self.used.add(column)
        return self.texts.get(column or "")

    def keep(self, *roles: str, number: int = 0) -> None:
        """Say that columns were not used after all: they become metadata."""
        self.used -= {self.columns.column(role, number) for role in roles}


def _map_row(
    line: int,
    texts: dict[str, str],
    columns: MapColumns,
    others: Sequence[str],
    *,
    dose_in_header: bool,
) -> MapRow:
    row = _Row(texts, columns)
    metadata = {name.removeprefix(PREFIX): texts[name] for name in others if name in texts}
    for role in _METADATA_ROLES:
        if value := row.text(role):
            unit = columns.units[columns.column(role) or ""]
            metadata[role] = f"{value} {unit}" if unit and unit not in value else value
    role_text = row.text("control") or ""
    kind = read_kind(row.text("kind"), role_text)
    named = [{r: v for r in NAMING if (v := row.text(r, number))} for number in columns.numbers]
    words = {value.lower() for some in named for value in some.values()} | {role_text.lower()}
    parts = [
        part
        for number, some in zip(columns.numbers, named, strict=True)
        for part in _parts(row, number, some, kind, dose_in_header)
    ]
    if EMPTY in words:
        metadata["content"] = EMPTY
    doses = [texts.get(name, "") for (role, _), name in columns.by_role.items() if role == "dose"]
    unnamed = (BLANK, next((text for text in doses if re.search("[1-9]", text)), ""))
    if EMPTY in words:
        unnamed = (EMPTY, "")
    record = combined(parts, role_text) if parts and EMPTY not in words else None
    map_name = row.text("plate") or row.text("map")
    row.used.update(columns.column(role) for role in ("well", "row", "column", "map"))
    if kind is None:
        row.keep("kind", *([] if read_control(role_text)[0] else ["control"]))
    metadata |= {name.removeprefix(PREFIX): texts[name] for name in texts if name not in row.used}
    where = (texts.get(columns.column(role) or "") for role in ("well", "row", "column"))
    position = written_well(*where)
    if position is None:
        raise RowRefusedError("not a well", "the row names no well; have the rows shifted?")
    return MapRow(line, map_name, position, metadata, record, None if record else unnamed)


def _parts(
    row: _Row,
    number: int,
    named: dict[str, str],
    kind: PerturbationKind | None,
    dose_in_header: bool,
) -> Iterator[TreatmentRecord]:
    """Yield what the columns of one number say; ``named`` are their names by role."""
    columns = row.columns
    gene, genotype = named.pop("gene", None), named.pop("genotype", None)
    if genotype is not None:
        name = f"{gene} {genotype}" if gene else genotype  # 'NF1 Null' of gene NF1
        yield TreatmentRecord.of(PerturbationKind.GENOTYPE, name, targets=gene)
    elif gene is not None and not any(columns.column(role, number) for role in NAMING[:-1]):
        named["gene"] = gene
    target = row.text("target", number) or gene
    if gene is not None and target != gene and genotype is None:
        row.keep("gene", number=number)
    doses = row.text("dose", number)
    unit = row.text("unit", number) or columns.units.get(columns.column("dose", number) or "")
    sample, treatment = named.pop("sample", None), named.pop("treatment", None)
    if sample is not None and sample.upper() == DMSO:
        sample, treatment = None, treatment or sample  # a name, and no code
    if sample or treatment:
        named = {"treatment": treatment or sample or "", **named}
    for role, value in named.items():
        is_first = role == "treatment"
        # A code that has a name beside it is one sample, whatever its name looks like.
        pieces = split_names(value, doses, whole=bool(sample and treatment))
        doses = None  # of the first of them
        of_header = dose_in_name(columns.column(role, number) or "")[1] if dose_in_header else None
        for name, dose in pieces:
            known = kind or _KIND_OF_ROLE.get(role) or read_kind(sample)
            if is_first and name.lower() == UNTREATED:
                known = PerturbationKind.NONE
            known = known or PerturbationKind.COMPOUND
            if len(pieces) > 1:  # other columns do not say of which of them they are
                code = name if is_first and sample else None
                part = TreatmentRecord.of(known, name, code, name if role == "gene" else None)
                row.keep(*({"target", "gene"} - {role}), number=number)
            else:
                part = TreatmentRecord.of(
                    known,
                    name,
                    sample if is_first else None,
                    target if is_first or role == "gene" else row.text("target", number),
                    *(row.text(r, number) for r in ("inchikey", "smiles", "pubchem_cid")),
                )
            if name.upper() != DMSO:
                dose = dose or of_header  # noqa: PLW2901 - 'Compound (10 uM)': what all got
            yield part if dose is None else part.with_dose(dose, unit)
    if doses is not None:
        row.keep("dose", number=number)  # there was nothing to give it to


def _blank(
    rows: Sequence[MapRow],
    tables: Sequence[_Treatments],
    asked: str | None,
    is_broad: bool,
) -> TreatmentRecord | None:
    """Return what a well got whose cell is blank; None: it is not known."""
    if asked == UNTREATED:
        return TreatmentRecord(PerturbationKind.NONE, UNTREATED)
    records = [row.record for row in rows if row.record]
    samples = {part.identifier for record in records for part in record.parts}
    shared = [len(samples & table.by_sample.keys()) for table in tables]
    dmso = None
    if len(tables) == 1 or max(shared, default=0):
        dmso = tables[shared.index(max(shared))].untreated
    are_compounds = {record.kind for record in records} == {PerturbationKind.COMPOUND}
    if asked == DMSO or (is_broad and not tables and are_compounds):
        default = TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)
        return dmso or default
    return dmso if is_broad else None


def _fill(
    plate_map: PlateMap,
    rows: Sequence[MapRow],
    tables: Sequence[_Treatments],
    asked: str | None,
) -> Iterator[Refusal]:
    """Add the rows to the map, joined with treatments; yield those that cannot be used."""
    done: dict[TreatmentRecord, TreatmentRecord | None] = {}
    noted: dict[Position, TreatmentRecord | None] = {}
    unclear = {
        row.position for row in rows if noted.setdefault(row.position, row.record) != row.record
    }
    for row in rows:
        line, _, position, _, record, unnamed = row
        treatment = record
        if unnamed and unnamed[0] == BLANK:
            treatment = plate_map.blank
            if unnamed[1] and treatment is not None and asked is None:
                treatment, unnamed = None, (NAMELESS, unnamed[1])
        elif record is not None and tables:
            if record not in done:
                done[record] = _joined(record, tables)
            treatment = done[record]
        if position in unclear:
            # The first row may be the DMSO that was added to a compound.
            detail = (
                f"well {format_well(*position)} has several rows with different treatments; write "
                "all that it got into one, in the columns Compound 1 and Compound 2"
            )
            yield Refusal(line, "well twice", detail)
        elif position in plate_map.wells:
            first = plate_map.wells[position].line
            detail = f"well {format_well(*position)} is on the map already, on line {first}"
            yield Refusal(line, "well twice", detail)
        elif record is not None and treatment is None:
            samples = " and ".join(part.identifier or part.pert_iname for part in record.parts)
            yield Refusal(
                line, "unknown broad_sample", f"{samples} is in none of the tables of treatments"
            )
        else:
            plate_map.wells[position] = row._replace(record=treatment, unnamed=unnamed)


def _joined(record: TreatmentRecord, tables: Sequence[_Treatments]) -> TreatmentRecord | None:
    """Return a treatment with what tables say of its parts; None: they do not know its sample."""
    parts = []
    for part in record.parts:
        joined = replace(part, others=())
        known = [found for table in tables if (found := table.find(part)) is not None]
        if known:
            kind, name, sample = known[0].kind, known[0].pert_iname, known[0].identifier
            joined = replace(joined, kind=kind, pert_iname=name, identifier=sample)
        elif part.identifier is not None and part.pert_iname == part.identifier:
            return None
        for found in known:
            joined = completed(joined, found)
        parts.append(joined)
    if not record.others:
        return parts[0]
    # That a compound alone is a control says nothing of what it was combined with.
    first, *others = (replace(part, control=None) for part in parts)
    return replace(first, control=record.control, others=tuple(others))


def _set_controls(maps: Collection[PlateMap], asked: Sequence[tuple[str, str]]) -> None:
    """Make the treatments that a user names controls, as ``asked``: (name, role).

    Of a combination, all parts but genotypes must be named.
    """
    roles: dict[str, Control] = {}
    for name, role in asked:
        if role not in list(Control):
            raise UnknownNameError.of("control", role, list(Control))
        roles[normalised_name(name)] = Control(role)
    seen: dict[str, str] = {}
    for wells in (plate_map.wells for plate_map in maps if asked):
        for position, row in wells.items():
            record = row.record
            parts = record.parts if record else ()
            seen |= {normalised_name(part.pert_iname): part.pert_iname for part in parts}
            others = [part for part in parts if part.kind is not PerturbationKind.GENOTYPE] or parts
            found = {roles.get(normalised_name(part.pert_iname)) for part in others}
            control = found.pop() if len(found) == 1 else None
            if record is not None and control is not None:
                record = replace(record, control=control, treated=False)
                wells[position] = row._replace(record=record)
    for name, _ in asked:
        if normalised_name(name) not in seen:
            raise UnknownNameError.of("treatment for --control", name, sorted(seen.values()))


_SHOWN_WELLS = 8


def listed_wells(positions: Sequence[Position]) -> str:
    """Return wells by name, the first of them: ``A01, A02 and 94 more``."""
    names = [format_well(*position) for position in sorted(positions)]
    more = f" and {len(names) - _SHOWN_WELLS:,} more" if len(names) > _SHOWN_WELLS else ""
    return f"{', '.join(names[:_SHOWN_WELLS])}{more}"


def notes_on_wells(plate_map: PlateMap, imaged: Mapping[Position, bool]) -> Iterator[str]:
    """Yield what a user should know of the wells of a map that was read, a line each.

    ``imaged`` are the wells with images on its plates, and whether their treatment is known now;
    there may be none so far.
    """
    name = writable(plate_map.path.name)
    if _stem(plate_map.path) != plate_map.name:  # one file may hold the maps of several plates
        name += f" for {plate_map.name}"
    unnamed = {at: row.unnamed for at, row in plate_map.wells.items() if row.unnamed}
    wells: dict[str, list[Position]] = defaultdict(list)
    for at, (why, _) in unnamed.items():
        if why != BLANK or at in imaged or not imaged:
            wells[why].append(at)
    for why, some in wells.items():
        listed = listed_wells(some)
        texts = ", ".join(sorted({unnamed[at][1] for at in some})[:3])
        what = f"{name} is blank" if why == BLANK else f"{name} has {why} ({texts})"
        if why == EMPTY:
            yield f"{plate_map.name}: wells without cells (empty): {listed}"
        elif why == BLANK and plate_map.blank is not None:
            yield f"{what} for these wells, so {plate_map.blank.pert_iname}: {listed}"
        else:
            unknown = f"so their treatment is not known: {listed}"
            yield f"{what} for these wells, {unknown}. {_ADVICE[why]}"
    treated = [at for at, row in plate_map.wells.items() if row.record is not None]
    bare = [at for at in treated if at not in imaged]
    missing = [at for at, known in imaged.items() if not known and at not in unnamed]
    advice = "If that is not meant, has the map shifted? cellstore undo RUN takes it back"
    if imaged and treated and bare == treated:
        yield (
            f"none of the wells that {name} treats has images ({listed_wells(treated)}); the wells "
            f"with images are {listed_wells(list(imaged))}. {advice}"
        )
    elif missing:
        but = f", but wells without images got one: {listed_wells(bare)}" if bare else ""
        yield f"{name}: wells with images got no treatment: {listed_wells(missing)}{but}. {advice}"


def _read_barcodes(path: Path, maps: Mapping[str, PlateMap], issues: list[Issue]) -> dict[str, str]:
    table = open_table(path)
    columns = ("Assay_Plate_Barcode", "Plate_Map_Name")
    table.require(*columns)
    plates: dict[str, str] = {}

    def add(texts: Mapping[str, str]) -> None:
        plate, chosen = map(texts.get, columns)
        if plate is None or chosen is None:
            raise RowRefusedError("no barcode or map name", "both are needed")
        if plates.setdefault(plate, chosen) != chosen:
            detail = f"{plate} has the plate map {plates[plate]} on an earlier line; kept"
            raise RowRefusedError("barcode twice", detail)

    rows = table.records(columns, add)
    issues += [(path, row) for row in rows if isinstance(row, Refusal)]
    if not maps.keys() & set(plates.values()):
        named = ", ".join(sorted(set(plates.values()))[:3])
        raise BadTableError(
            f"{path.name} uses the plate maps {named or 'of no name'}, and none of them was given. "
            f"The maps here are {', '.join(sorted(maps)[:3])}: rename them, or give others."
        )
    return plates
