"""Plate maps: which treatment each well of a plate got, by the tables that laboratories publish.

A plate map names the sample of each well (``broad_sample``), a treatment table describes
the samples, a table of barcodes names the map of each plate. JUMP's tables of a data set describe
its plates, its CRISPR reagents and its controls.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..enums import Control, PerturbationKind
from ..errors import BadTableError, UserInputError
from .filenames import parse_well
from .tables import (
    LONGEST,
    Refusal,
    RowRefusedError,
    TextTable,
    cell_text,
    first_text,
    nearest_columns,
    open_table,
)
from .uris import writable

DMSO = "DMSO"
PREFIX = "Metadata_"
SAMPLE = "broad_sample"
TARGETS = ("gene", "target", "target_list")
LONG_NAME = "a name that cannot be stored"
"""Reason of a row with a name that no database can keep."""

T = TypeVar("T")

Position = tuple[int, int]
"""Row and column of a well, both from 1."""


@dataclass(frozen=True, slots=True)
class TreatmentRecord:
    """What was done to a well.

    ``identifier`` is the ``broad_sample`` of JUMP tables, or else their ``Metadata_JCP2022``.
    Several targets are each there once, sorted, with ``|`` between them.
    """

    kind: PerturbationKind
    pert_iname: str
    target: str | None = None
    control: Control | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None
    pubchem_cid: str | None = None

    @classmethod
    def of(
        cls,
        kind: PerturbationKind,
        name: str,
        identifier: str | None = None,
        targets: str | None = None,
        role: str | None = None,
        *chemistry: str | None,
    ) -> TreatmentRecord:
        """Return a treatment as tables write it.

        ``role`` is JUMP's ``control_type``: 'poscon_cp', 'poscon_diverse' and 'poscon_orf' are
        positive controls; DMSO is always a negative control. ``chemistry``: InChIKey, SMILES and
        PubChem number.

        Raises:
            RowRefusedError: a text is too long for a database.
        """
        text, control = (role or "").lower(), None
        if name.upper() == DMSO or text.startswith(("negcon", "negative")):
            control = Control.NEGATIVE
        elif text.startswith(("poscon", "positive")):
            control = Control.POSITIVE
        made = cls(kind, name, target_of(targets), control, identifier, *chemistry)
        keys = ("pert_iname", "identifier", "inchikey", "pubchem_cid")
        long = [key for key in keys if len(getattr(made, key) or "") > LONGEST]
        if long:
            detail = f"{' and '.join(long)} of more than {LONGEST} characters"
            raise RowRefusedError(LONG_NAME, detail)
        return made


def target_of(text: str | None) -> str | None:
    """Return a target; several, separated by ``|``, become each one once, sorted, with ``|``.

    'KCNK1' stays as it is, 'HDAC2 | HDAC1|HDAC2' is 'HDAC1|HDAC2': the order in which a table
    lists the targets of a compound does not make another label. None where it lists none.
    """
    targets = {target.strip() for target in (text or "").split("|")} - {""}
    return "|".join(sorted(targets)) or None


def normalised_name(name: str) -> str:
    """``name`` without what spellings of a compound differ in: ``ME-0328`` becomes ``me0328``."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    # A name of such signs alone would else be the same as any other of them.
    return re.sub(r"[\s_\u002d\u2010-\u2015\u2212]", "", folded) or folded


# ---- The treatment that one row names ----

_NAME = "Metadata_pert_iname"
_TARGET = ("Metadata_target", "Metadata_gene", "Metadata_target_list")
_JCP = "Metadata_JCP2022"
_IDENTIFIER = ("Metadata_broad_sample", _JCP)
_CONTROL = ("Metadata_control_type", "Metadata_pert_type")
_KIND = ("Metadata_perturbation", "Metadata_Perturbation", "Metadata_modality")
_CHEMISTRY = ("Metadata_InChIKey", "Metadata_smiles", "Metadata_pubchem_cid")
_JCP_NUMBER = re.compile(r"JCP2022_([0-9])[0-9]{5}", re.ASCII)
_JCP_KINDS = {"8": PerturbationKind.CRISPR, "9": PerturbationKind.ORF}
_JCP_NOTHING = frozenset({"JCP2022_999999", "JCP2022_UNKNOWN"})
"""How JUMP writes an empty well and one of which nothing is known."""

TREATMENT_COLUMNS = (_NAME, *_TARGET, *_IDENTIFIER, *_CONTROL, *_KIND, *_CHEMISTRY)


def treatment_of(texts: Mapping[str, str]) -> TreatmentRecord | None:
    """Return the treatment of a row by its known values, of ``TREATMENT_COLUMNS``.

    A row that names no perturbation but its ``Metadata_JCP2022`` is called by that. Its kind is
    the one that is written, else that of the first digit of this identifier.

    Raises:
        RowRefusedError: a text is too long for a database.
    """
    name = first_text(texts, (_NAME, _JCP))
    if name is None or name in _JCP_NOTHING:
        return None
    number = _JCP_NUMBER.fullmatch(texts.get(_JCP, ""))
    kind = _JCP_KINDS.get(number[1] if number else "", PerturbationKind.COMPOUND)
    # pycytominer writes the kind as Metadata_pert_type, where JUMP writes a role.
    for text in (texts.get("Metadata_pert_type"), first_text(texts, _KIND)):
        if text is not None and text.lower() in list(PerturbationKind):
            kind = PerturbationKind(text.lower())
            break
    return TreatmentRecord.of(
        kind,
        name,
        first_text(texts, _IDENTIFIER),
        first_text(texts, _TARGET),
        first_text(texts, _CONTROL),
        *map(texts.get, _CHEMISTRY),
    )


def completed(given: TreatmentRecord, known: TreatmentRecord) -> TreatmentRecord:
    """Return ``given`` with its gaps filled from ``known``, where both are one sample.

    The result equals ``known`` where ``given`` adds nothing. One sample: the same kind and
    identifier, or the same kind and name where one of the two has no identifier.
    """
    by_name = known.identifier is None or given.identifier is None
    key = "pert_iname" if by_name else "identifier"
    if known.kind is not given.kind or getattr(known, key) != getattr(given, key):
        return given
    gaps = {
        item.name: getattr(known, item.name)
        for item in fields(TreatmentRecord)
        if getattr(given, item.name) is None
    }
    return replace(given, **gaps) if gaps else given


class Aliases:
    """Names by alias; a name is never itself an alias."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._done: dict[TreatmentRecord, TreatmentRecord] = {}

    @classmethod
    def read(cls, path: Path) -> Aliases:
        """Read a table with the columns ``alias`` and ``name`` (or ``from`` and ``to``).

        An alias of an alias is followed to its end.

        Raises:
            BadTableError: a column is missing, a row is incomplete, an alias has two names, or
                names go round in a circle. Nothing is guessed.
            UserInputError: the file is missing or unreadable.
        """
        table = open_table(path)
        pairs = (("alias", "name"), ("from", "to"))
        columns = next((pair for pair in pairs if set(pair) <= set(table.columns)), pairs[0])
        table.require(*columns)
        given: dict[str, str] = {}

        def add(texts: Mapping[str, str]) -> None:
            alias, name = map(texts.get, columns)
            if alias is None or name is None:
                raise RowRefusedError("", "both names are needed")
            if len(name) > LONGEST:
                raise RowRefusedError("", f"the name has more than {LONGEST} characters")
            if given.setdefault(alias, name) != name:
                raise RowRefusedError("", f"{alias!r} is {given[alias]!r} already")

        for row in _read(table, columns, add):
            if isinstance(row, Refusal):
                raise BadTableError(
                    f"{path.name}, line {row.line}: {row.detail}. Correct this row of the alias "
                    "table."
                )
        given = {alias: name for alias, name in given.items() if alias != name}
        names = {}
        for alias, name in given.items():
            seen = {alias}
            while name in given and name not in seen:
                seen.add(name)
                name = given[name]  # noqa: PLW2901 - the end of the chain
            if name in given:
                circle = ", ".join(map(repr, sorted(seen)))
                raise BadTableError(
                    f"{path.name}: {circle} are aliases of each other. Choose one name for them."
                )
            names[alias] = name
        return cls(names)

    def apply(self, record: TreatmentRecord) -> TreatmentRecord:
        """Return the treatment under its name; the same object for the same treatment.

        Only the name is changed: two samples of one compound stay two samples.
        """
        if record.pert_iname not in self._names:
            return record
        if record not in self._done:
            self._done[record] = replace(record, pert_iname=self._names[record.pert_iname])
        return self._done[record]


def _read(
    table: TextTable, names: Iterable[str], record: Callable[[dict[str, str]], T]
) -> Iterator[tuple[int, T] | Refusal]:
    """Yield the line of each row and what ``record`` makes of it, or why it is refused.

    ``record`` gets the known values by column. Each of the columns may have the prefix
    ``Metadata_`` in the table.
    """
    positions = {name: at for name in names if (at := _position(table, name)) is not None}
    for row in table.rows():
        if isinstance(row, Refusal):
            yield row
            continue
        cells = ((name, cell_text(row.cells, at)) for name, at in positions.items())
        try:
            made = record({name: text for name, text in cells if text is not None})
        except RowRefusedError as refused:
            yield Refusal(row.line, *refused.args)
            continue
        yield row.line, made


def _position(table: TextTable, name: str) -> int | None:
    plain = table.position(name)
    return table.position(PREFIX + name) if plain is None else plain


# ---- Tables of treatments and of plates ----

_ROLES = {"negcon": Control.NEGATIVE, "poscon": Control.POSITIVE, "trt": None, "empty": None}
_MODALITIES = {
    "compound": PerturbationKind.COMPOUND,
    "crispr": PerturbationKind.CRISPR,
    "orf": PerturbationKind.ORF,
    "any": PerturbationKind.NONE,
}

TreatmentRow = tuple[int, TreatmentRecord | None]
"""A line of a table and its treatment; None where every cell of the row is empty."""


class PlateRow(NamedTuple):
    """A plate, the batch it was made in, and the values of its other columns."""

    barcode: str
    batch: str | None
    metadata: dict[str, str]


def treatment_rows(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield one treatment, or why it is none, per data row.

    Only DMSO of a compound table may be without ``broad_sample``.

    Raises:
        BadTableError: the table has no ``broad_sample``, or nothing to name a treatment by.
    """
    if _position(table, SAMPLE) is None:
        table.require(SAMPLE)
    if all(_position(table, name) is None for name in ("pert_iname", *TARGETS)):
        nearest = nearest_columns(["pert_iname", "gene"], table.columns)
        raise BadTableError(f"{table.path.name} has no column 'pert_iname' or 'gene'. {nearest}")
    chemistry = ("InChIKey", "smiles", "pubchem_cid")
    kind = _kind_of(table)

    def record(texts: Mapping[str, str]) -> TreatmentRecord | None:
        sample, targets = texts.get(SAMPLE), first_text(texts, TARGETS)
        name = texts.get("pert_iname") or target_of(targets) or sample
        if name is None:
            return None
        if sample is None and not (kind is PerturbationKind.COMPOUND and name.upper() == DMSO):
            raise RowRefusedError(
                "no broad_sample", f"{name} cannot be matched to a well without it"
            )
        role = texts.get("control_type")
        return TreatmentRecord.of(kind, name, sample, targets, role, *map(texts.get, chemistry))

    return _read(table, (SAMPLE, "pert_iname", *TARGETS, "control_type", *chemistry), record)


def jump_crispr(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield the reagents of ``crispr.csv``; one without a gene number has no target.

    Raises:
        BadTableError: a column is missing.
    """

    def record(texts: Mapping[str, str]) -> TreatmentRecord:
        identifier, symbol = texts.get("JCP2022"), texts.get("Symbol")
        if identifier is None or symbol is None:
            detail = "Metadata_JCP2022 or Metadata_Symbol is empty"
            raise RowRefusedError("no treatment", detail)
        target = symbol if "NCBI_Gene_ID" in texts else None
        return TreatmentRecord.of(PerturbationKind.CRISPR, symbol, identifier, target)

    columns = ("JCP2022", "NCBI_Gene_ID", "Symbol")
    table.require(*(PREFIX + name for name in columns))
    return _read(table, columns, record)


def jump_controls(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield the controls of ``perturbation_control.csv``; 'empty' is a well without treatment.

    Raises:
        BadTableError: a column is missing.
    """

    def record(texts: Mapping[str, str]) -> TreatmentRecord:
        identifier, name = texts.get("JCP2022"), texts.get("Name")
        role, modality = (texts.get(name, "").lower() for name in ("pert_type", "modality"))
        if identifier is None or name is None:
            detail = "Metadata_JCP2022 or Metadata_Name is empty"
            raise RowRefusedError("no treatment", detail)
        if role not in _ROLES or modality not in _MODALITIES:
            detail = f"pert_type {role!r} and modality {modality!r} of {identifier}"
            raise RowRefusedError("not a known control", detail)
        kind = PerturbationKind.NONE if role == "empty" else _MODALITIES[modality]
        return replace(TreatmentRecord.of(kind, name, identifier), control=_ROLES[role])

    columns = ("JCP2022", "pert_type", "Name", "modality")
    table.require(*(PREFIX + name for name in columns))
    return _read(table, columns, record)


def jump_plates(table: TextTable) -> Iterator[tuple[int, PlateRow] | Refusal]:
    """Yield the plates of ``plate.csv``; their source and their type are metadata.

    Raises:
        BadTableError: a column is missing.
    """

    def record(texts: dict[str, str]) -> PlateRow:
        barcode, batch = texts.pop("Plate", None), texts.pop("Batch", None)
        if barcode is None:
            raise RowRefusedError("no plate", "Metadata_Plate is empty")
        if max(len(barcode), len(batch or "")) > LONGEST:
            raise RowRefusedError(LONG_NAME, f"more than {LONGEST} characters")
        return PlateRow(barcode, batch, texts)

    table.require(*(PREFIX + name for name in ("Plate", "Batch")))
    return _read(table, ("Plate", "Batch", "Source", "PlateType"), record)


def _kind_of(table: TextTable) -> PerturbationKind:
    """Return what the treatments of a table are, by its columns."""
    names = {column.removeprefix(PREFIX) for column in table.columns}
    if names & {"pert_iname", "smiles", "InChIKey", "pubchem_cid"}:
        return PerturbationKind.COMPOUND
    return PerturbationKind.CRISPR if "target_sequence" in names else PerturbationKind.ORF


# ---- Plate maps ----

_MAP_SUFFIXES = frozenset({".txt", ".csv", ".tsv"})
_BARCODES = "barcode_platemap"
_MAP_COLUMNS = ("plate_map_name", "well_position", SAMPLE, "gene_name", "genotype")
_POSITION_AGAIN = ("WellRow", "WellCol")
"""Columns that say nothing that ``well_position`` does not; all others are metadata of the well."""

Issue = tuple[Path, Refusal]
"""A row of an annotation table that was not used, and the file it is in."""


class MapRow(NamedTuple):
    """A well of a plate map. Every reader of maps yields these, whatever the shape of its table.

    ``sample`` is what treatment tables are joined by; ``record`` is the treatment where the map
    itself names it. A row with neither is an empty well.
    """

    map_name: str | None
    position: Position
    metadata: dict[str, str]
    sample: str | None
    record: TreatmentRecord | None


@dataclass(frozen=True)
class PlateMap:
    """The treatments of one plate map by position; None: the well is empty.

    ``lines`` has the line of ``path``, ``metadata`` the values of the other columns.
    A row with a sample that no treatment table has is in none of them.
    """

    name: str
    path: Path
    wells: dict[Position, TreatmentRecord | None] = field(default_factory=dict)
    lines: dict[Position, int] = field(default_factory=dict)
    metadata: dict[Position, dict[str, str]] = field(default_factory=dict)


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

    def map_of(self, plate: str) -> PlateMap | None:
        """Return the map that a plate uses, or None."""
        if self.barcodes is None:
            return next(iter(self.maps.values()))
        return self.maps.get(self.barcodes.get(plate, ""))


class _Treatments(NamedTuple):
    """The treatments of one table by sample; ``untreated`` is what a well without sample got."""

    by_sample: dict[str, TreatmentRecord]
    untreated: TreatmentRecord | None


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
    notes: list[str] = []
    tables = [_read_treatments(path, issues) for path in treatments]
    paths = [platemap]
    if platemap.is_dir():
        paths = [
            path
            for path in sorted(platemap.iterdir())
            if Path(path.name.lower().removesuffix(".gz")).suffix in _MAP_SUFFIXES
            and path.is_file()
            and not path.name.startswith((_BARCODES, "."))
        ]
        if not paths:
            raise UserInputError(f"{platemap} has no plate map (.txt, .csv or .tsv) in it.")
    maps: dict[str, PlateMap] = {}
    for path in paths:
        stem = Path(path.name.removesuffix(".gz")).stem
        by_map: dict[str, list[tuple[int, MapRow]]] = defaultdict(list)
        for row in _map_rows(path, bool(tables), notes):
            if isinstance(row, Refusal):
                issues.append((path, row))
            else:
                by_map[row[1].map_name or stem].append(row)
        # A map all of whose rows are refused is a map.
        for name, rows in (by_map or {stem: []}).items():
            if name in maps:
                raise BadTableError(
                    f"{maps[name].path.name} and {path.name} both hold the plate map {name}. "
                    "Remove one of them."
                )
            maps[name] = PlateMap(name, path)
            issues += [(path, refusal) for refusal in _fill(maps[name], rows, tables)]
    if barcodes is None and platemap.is_dir():  # JUMP has it in the folder of maps, or above
        above = (platemap, platemap.resolve().parent)
        beside = (folder / f"{_BARCODES}.csv" for folder in above)
        barcodes = next((path for path in beside if path.is_file()), None)
    plates = _read_barcodes(barcodes, maps, issues) if barcodes else None
    if plates is None and len(maps) != 1:
        raise BadTableError(
            f"{platemap} holds {len(maps)} plate maps. Name the map of each plate in a "
            "barcode_platemap.csv (Assay_Plate_Barcode, Plate_Map_Name), or give one map."
        )
    files = (*treatments, *paths, *([barcodes] if barcodes else []))
    return PlateAnnotation(maps, plates, tuple(issues), files, tuple(notes))


def _read_treatments(path: Path, issues: list[Issue]) -> _Treatments:
    """Read a whole treatment table; rows that cannot be used are added to ``issues``."""
    table = open_table(path)
    by_sample: dict[str, TreatmentRecord] = {}
    untreated = None
    if _kind_of(table) is PerturbationKind.COMPOUND:
        untreated = TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)
    for row in treatment_rows(table):
        if isinstance(row, Refusal):
            issues.append((path, row))
            continue
        line, record = row
        if record is not None and record.identifier is None:
            untreated = record
        elif record is not None:
            first = by_sample.setdefault(str(record.identifier), record)
            if first != record:
                detail = f"{record.identifier} is {first.pert_iname} on an earlier line; kept"
                issues.append((path, Refusal(line, "broad_sample twice", detail)))
    return _Treatments(by_sample, untreated)


def _map_rows(
    path: Path, has_tables: bool, notes: list[str]
) -> Iterator[tuple[int, MapRow] | Refusal]:
    """Yield the wells of a table with a row per well."""
    table = open_table(path)
    notes += [f"{writable(path.name)}: {note}" for note in table.notes]
    table.require("well_position")
    genotypes = SAMPLE not in table.columns and "genotype" in table.columns
    if not genotypes:
        table.require(SAMPLE)
    if not genotypes and not has_tables:
        raise BadTableError(
            f"{path.name} has sample codes only; add --compounds FILE with broad_sample and "
            "pert_iname."
        )
    known = {*_MAP_COLUMNS, *_POSITION_AGAIN, *(PREFIX + name for name in _MAP_COLUMNS)}
    others = [name for name in table.columns if name and name not in known | table.repeated]

    def record(texts: dict[str, str]) -> MapRow:
        try:
            position = parse_well(texts.get("well_position", ""))
        except UserInputError as error:
            raise RowRefusedError("not a well", str(error)) from error
        treatment = None
        genotype, gene = texts.get("genotype"), texts.get("gene_name")
        if genotypes and genotype is not None:
            # 'NF1 Null' of gene NF1; the wild type is the negative control.
            name = f"{gene} {genotype}" if gene else genotype
            role = "negative" if genotype.upper() == "WT" else None
            kind = PerturbationKind.GENOTYPE
            treatment = TreatmentRecord.of(kind, name, targets=gene, role=role)
        metadata = {name.removeprefix(PREFIX): texts[name] for name in others if name in texts}
        sample = None if genotypes else texts.get(SAMPLE)
        return MapRow(texts.get("plate_map_name"), position, metadata, sample, treatment)

    return _read(table, (*_MAP_COLUMNS, *others), record)


def _fill(
    plate_map: PlateMap, rows: Sequence[tuple[int, MapRow]], tables: Sequence[_Treatments]
) -> Iterator[Refusal]:
    """Add the rows to the map, joined with treatments; yield those that cannot be used."""
    samples = {row.sample for _, row in rows if row.sample is not None}
    shared = [len(samples & table.by_sample.keys()) for table in tables]
    untreated = None
    if len(tables) == 1 or max(shared, default=0):
        untreated = tables[shared.index(max(shared))].untreated
    for line, (_, position, metadata, sample, record) in rows:
        treatment = record or untreated
        if sample is not None:
            known = [t.by_sample[sample] for t in tables if sample in t.by_sample]
            treatment = known[0] if known else None
            for more in known[1:]:
                treatment = completed(treatment, more) if treatment else more
        if position in plate_map.wells:
            first = plate_map.lines[position]
            detail = f"this well is on the map already, on line {first}"
            yield Refusal(line, "well twice", detail)
        elif sample is not None and treatment is None:
            yield Refusal(
                line, "unknown broad_sample", f"{sample} is in none of the tables of treatments"
            )
        else:
            plate_map.wells[position] = treatment
            plate_map.lines[position] = line
            if metadata:
                plate_map.metadata[position] = metadata


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

    rows = _read(table, columns, add)
    issues += [(path, row) for row in rows if isinstance(row, Refusal)]
    if not maps.keys() & set(plates.values()):
        named = ", ".join(sorted(set(plates.values()))[:3])
        raise BadTableError(
            f"{path.name} uses the plate maps {named or 'of no name'}, and none of them was given. "
            f"The maps here are {', '.join(sorted(maps)[:3])}: rename them, or give others."
        )
    return plates
