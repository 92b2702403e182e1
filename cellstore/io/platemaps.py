"""Plate maps: which treatment each well of a plate got, by the tables that laboratories publish.

A plate map says what was done to each well, by names or by samples (``broad_sample``) that a
treatment table describes; a table of barcodes names the map of each plate. JUMP's tables of a data
set describe its plates, its CRISPR reagents and its controls.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..enums import Control, PerturbationKind
from ..errors import BadTableError, UnknownNameError, UserInputError
from .filenames import format_well, join_well, parse_well
from .map_shapes import (
    MILLIMOLAR_NOTE,
    NAMING,
    MapColumns,
    columns_below_titles,
    dose_in_name,
    header_of,
    normalised_dose,
    open_map,
    read_dose,
)
from .tables import (
    LONGEST,
    Refusal,
    RowRefusedError,
    TextTable,
    cell_text,
    first_text,
    known_text,
    nearest_columns,
    open_table,
    sheet_names,
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
    """What was done to a well: a perturbation with its dose, and ``others`` that came with it.

    ``identifier`` is the ``broad_sample`` of JUMP tables, or else their ``Metadata_JCP2022``.
    Several targets are each there once, sorted, with ``|`` between them. Molar doses are in
    ``uM``; ``dose_original`` is as written. ``treated``: a table says that it is no control.
    """

    kind: PerturbationKind
    pert_iname: str
    target: str | None = None
    control: Control | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None
    pubchem_cid: str | None = None
    dose: float | None = None
    unit: str | None = None
    dose_original: str | None = field(default=None, compare=False)
    treated: bool = field(default=False, compare=False)
    others: tuple[TreatmentRecord, ...] = ()

    @property
    def parts(self) -> tuple[TreatmentRecord, ...]:
        """Return all that was done to the well."""
        return (self, *self.others)

    @property
    def label(self) -> str:
        """Return name and dose of all parts, for people: ``taxol 0.5 uM + siNF1``."""
        doses = (
            "" if part.dose is None else f"{part.dose:.12g} {part.unit or ''}"
            for part in self.parts
        )
        texts = (f"{part.pert_iname} {dose}" for part, dose in zip(self.parts, doses, strict=True))
        return " + ".join(text.strip() for text in texts)

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

        ``role`` is what :func:`read_control` reads. DMSO is a negative control, unless ``role``
        says something else. ``chemistry``: InChIKey, SMILES and PubChem number.

        Raises:
            RowRefusedError: a text is too long for a database.
        """
        said, control = read_control(role or "")
        if not said and name.upper() == DMSO:
            control = Control.NEGATIVE
        inchikey, smiles, pubchem_cid = chemistry or (None, None, None)
        target = target_of(targets)
        made = cls(kind, name, target, control, identifier, inchikey, smiles, pubchem_cid)
        keys = ("pert_iname", "identifier", "inchikey", "pubchem_cid")
        long = [key for key in keys if len(getattr(made, key) or "") > LONGEST]
        if long:
            detail = f"{' and '.join(long)} of more than {LONGEST} characters"
            raise RowRefusedError(LONG_NAME, detail)
        return replace(made, treated=True) if said and control is None else made

    def with_dose(self, text: str | None, unit: str | None = None) -> TreatmentRecord:
        """Return the treatment at a dose as a table writes it.

        Raises:
            RowRefusedError: the text is no dose.
        """
        if text is None:
            return self
        try:
            number, written = read_dose(text, unit)
            dose, plain = normalised_dose(number, written)
        except ValueError as error:
            detail = f"{error}. Write a number, or name another column with --map-column dose=NAME"
            raise RowRefusedError("not a dose", detail) from error
        if dose == 0 and self.pert_iname.upper() == DMSO:
            return self  # tables write 0 or nothing
        original = text if written is None or written in text else f"{text} {written}"
        return replace(self, dose=dose, unit=plain, dose_original=original[:LONGEST])


_SAYS = {
    Control.NEGATIVE: re.compile(
        r"(control|ctrl|ctl)?(neg(ative|con|ctrl)|(neg|nc|vehicle(control|ctrl)?)$)"
    ),
    Control.POSITIVE: re.compile(
        r"(control|ctrl|ctl|trt)?pos(itive|con|ctrl)|(control|ctrl|ctl)?(pos|pc)$"
    ),
    None: re.compile(r"trt|(treated|treatment|test|sample|experimental)$"),
}


def read_control(text: str) -> tuple[bool, Control | None]:
    """Return whether a text says if a well is a control, and which: 'negcon', 'poscon_cp', 'trt'.

    'trt' says that it is none; 'compound' says nothing of it.
    """
    letters = re.sub(r"[^a-z]", "", text.lower())
    for control, words in _SAYS.items():
        if words.match(letters):
            return True, control
    return False, None


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

_COMPONENTS, _ORIGINAL = "Metadata_components", "Metadata_dose_original"
"""Of an export: several perturbations of a well (JSON), and the dose as it once was written."""

TREATMENT_COLUMNS = (
    *(_NAME, *_TARGET, *_IDENTIFIER, *_CONTROL, *_KIND, *_CHEMISTRY, _COMPONENTS, _ORIGINAL),
)


@lru_cache(100)
def dose_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the column of the dose among ``Metadata_*`` columns, and that of its unit."""
    found: dict[str, tuple[int, str]] = {}
    for name in columns:
        meant = header_of(name) if name.startswith(PREFIX) else None
        if meant and meant.role in ("dose", "unit") and meant.number == 0:
            found.setdefault(meant.role, (meant.rank, name))
            found[meant.role] = min(found[meant.role], (meant.rank, name))
    return tuple(found[role][1] for role in ("dose", "unit") if role in found and "dose" in found)


def treatment_of(texts: Mapping[str, str]) -> TreatmentRecord | None:
    """Return the treatment of a row by its known values, of ``TREATMENT_COLUMNS``.

    Values of :func:`dose_columns` may be among them, and say the dose.

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
    record = TreatmentRecord.of(
        kind,
        name,
        first_text(texts, _IDENTIFIER),
        first_text(texts, _TARGET),
        first_text(texts, _CONTROL),
        *map(texts.get, _CHEMISTRY),
    )
    if _COMPONENTS in texts:
        try:
            first, *others = (
                TreatmentRecord(PerturbationKind(item.pop("kind")), **item)
                for item in json.loads(texts[_COMPONENTS])
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RowRefusedError("not a treatment", f"{_COMPONENTS}: {error}") from error
        return replace(first, control=record.control, treated=record.treated, others=tuple(others))
    dose, *unit = dose_columns(tuple(texts)) or (None,)
    if dose is None:
        return record
    meant = header_of(dose)
    found = record.with_dose(texts[dose], texts[unit[0]] if unit else meant and meant.unit)
    return replace(found, dose_original=texts.get(_ORIGINAL, found.dose_original))


def completed(given: TreatmentRecord, known: TreatmentRecord) -> TreatmentRecord:
    """Return ``given`` with its gaps filled from ``known``, where both are one sample.

    The result equals ``known`` where ``given`` adds nothing. One sample: the same kind and
    identifier, or the same kind and name where one of the two has no identifier.
    """
    gaps: dict[str, object] = {}
    if _one_sample(given, known):
        names = ["target", "identifier", "inchikey", "smiles", "pubchem_cid"]
        names += [] if given.treated else ["control"]
        names += ["dose", "unit", "dose_original"] if given.dose is None else []
        gaps = {name: getattr(known, name) for name in names if getattr(given, name) is None}
    if given.others and known.others:
        others = []
        for other in given.others:
            same = next((part for part in known.parts if _one_sample(other, part)), other)
            others.append(completed(other, replace(same, others=())))
        gaps["others"] = tuple(others)
    elif given.others or known.others:
        return given
    return replace(given, **gaps) if gaps else given  # type: ignore[arg-type]


def _one_sample(given: TreatmentRecord, known: TreatmentRecord) -> bool:
    by_name = known.identifier is None or given.identifier is None
    key = "pert_iname" if by_name else "identifier"
    return known.kind is given.kind and getattr(known, key) == getattr(given, key)


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
        if not any(part.pert_iname in self._names for part in record.parts):
            return record
        if record not in self._done:
            name = self._names.get(record.pert_iname, record.pert_iname)
            others = tuple(map(self.apply, record.others))
            self._done[record] = replace(record, pert_iname=name, others=others)
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

    A table without ``broad_sample`` describes treatments by their names. In one with it, only DMSO
    of a compound table may be without.

    Raises:
        BadTableError: the table has nothing to name a treatment by.
    """
    columns = MapColumns(table.columns, ())
    named = [columns.column(role) for role in ("sample", "treatment", "gene", "target")]
    sample_column, name_column, *target_columns = named
    targets = tuple(name for name in reversed(target_columns) if name)
    if PREFIX + "Symbol" in table.columns:  # JUMP calls an ORF by its gene, a reagent by Name
        name_column = None
    if name_column is None and not targets:
        nearest = nearest_columns(["pert_iname", "gene"], table.columns)
        raise BadTableError(
            f"{table.path.name} describes no treatments: it needs a column broad_sample and one of "
            f"pert_iname, gene or Symbol, or a column of names (Compound). {nearest}"
        )
    roles = [name for name in table.columns if header_of(name) and _is_role(name, "control")]
    roles.sort(key=lambda name: "control" not in name.lower())
    chemistry = [columns.column(role) for role in ("inchikey", "smiles", "pubchem_cid")]
    kind = _kind_of(table)

    def record(texts: Mapping[str, str]) -> TreatmentRecord | None:
        sample, target = texts.get(sample_column or ""), first_text(texts, targets)
        name = texts.get(name_column or "") or target_of(target) or sample
        if name is None or name.lower() == _EMPTY:
            return None
        if (sample or "").upper() == DMSO:
            sample = None  # a name, and no code, as in maps
        is_dmso = kind is PerturbationKind.COMPOUND and name.upper() == DMSO
        if sample_column and sample is None and not is_dmso:
            raise RowRefusedError(
                "no broad_sample", f"{name} cannot be matched to a well without it"
            )
        described = (texts.get(column or "") for column in chemistry)
        return TreatmentRecord.of(kind, name, sample, target, first_text(texts, roles), *described)

    read = (sample_column, name_column, *targets, *roles, *chemistry)
    return _read(table, [name for name in read if name], record)


def _is_role(column: str, role: str) -> bool:
    meant = header_of(column)
    return meant is not None and meant.role == role


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
    if names & {"target_sequence"}:
        return PerturbationKind.CRISPR
    meant = [header for column in table.columns if (header := header_of(column))]
    roles = {header.role for header in meant}
    if roles & {"inchikey", "smiles", "pubchem_cid"} or "pert_iname" in names:
        return PerturbationKind.COMPOUND
    if "treatment" in roles and not names & {"Symbol", "Transcript"}:
        return PerturbationKind.COMPOUND
    return PerturbationKind.ORF


# ---- Plate maps ----

_MAP_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".xlsx", ".xls", ".ods"})
_BARCODES = "barcode_platemap"
UNTREATED = "untreated"
_EMPTY = "empty"
"""How maps write a well without cells."""
_KIND_OF_ROLE = {
    "sirna": PerturbationKind.SIRNA,
    "crispr": PerturbationKind.CRISPR,
    "orf": PerturbationKind.ORF,
    "gene": PerturbationKind.CRISPR,
}
_METADATA_ROLES = ("cell_line", "time_point", "replicate", "batch")
_SWAPPED = re.compile(r"\d{1,2}\s*[A-Za-z]{1,2}")

Issue = tuple[Path, Refusal]
"""A row of an annotation table that was not used, and the file it is in."""


@dataclass(frozen=True)
class MapOptions:
    """What a user says of a plate map.

    ``columns``: (meaning, header); ``blank``: what a well without treatment got, DMSO or
    untreated; ``controls``: (name, negative or positive).
    """

    sheet: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    blank: str | None = None
    controls: tuple[tuple[str, str], ...] = ()


class MapRow(NamedTuple):
    """A well of a plate map. Every reader of maps yields these, whatever the shape of its table.

    ``map_name`` is the plate where the map has a column of plates. ``record`` is what the map
    says was done to the well; None: the cell is blank, or the well has no cells (``is_empty``).
    """

    map_name: str | None
    position: Position
    metadata: dict[str, str]
    record: TreatmentRecord | None
    is_empty: bool = False


@dataclass(frozen=True)
class PlateMap:
    """The treatments of one plate map by position; None: not known, or no cells.

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
    options: MapOptions = MapOptions(),
) -> PlateAnnotation:
    """Join a plate map (or a folder of them) with the tables of its treatments.

    A plate map is a grid, or has a column of wells and one of what was done to them; see
    ``docs/own-plates.md``. Treatments by name need no table. A treatment table has
    ``broad_sample``, or names; of two tables that have the same sample the first counts, and the
    second fills its gaps. Barcodes (``Assay_Plate_Barcode``, ``Plate_Map_Name``) choose the map of
    each plate.

    A blank is not known, unless ``options`` say so, or it is a compound map of the Broad Institute
    (with ``plate_map_name`` or ``solvent``), where it is DMSO. A missing value never joins another.

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
    controls = _Controls(options.controls)
    for path in paths:
        stem = Path(path.name.removesuffix(".gz")).stem
        table = map_table(path, options)
        columns = MapColumns(table.columns, options.columns)
        names_plates |= columns.column("plate") is not None
        notes += [f"{writable(path.name)}: {note}" for note in table.notes]
        by_map: dict[str, list[tuple[int, MapRow]]] = defaultdict(list)
        for row in _map_rows(table, columns):
            if isinstance(row, Refusal):
                issues.append((path, row))
            else:
                by_map[row[1].map_name or stem].append(row)
        issues += [(path, refusal) for refusal in _unclear_doses(by_map)]
        dose = columns.column("dose")
        if dose and "mmoles" in dose.lower() and columns.units[dose] != "mM":
            notes.append(f"{writable(path.name)}: {MILLIMOLAR_NOTE}")
        records = [row.record for some in by_map.values() for _, row in some if row.record]
        named = [record for record in records if record.pert_iname.upper() != DMSO]
        if not tables and named and all(map(_is_code, named)):
            notes.append(
                f"{writable(path.name)}: its treatments are codes of samples; a table with their "
                "names and targets goes with it: --compounds FILE"
            )
        if any(p.dose is not None and p.unit is None for r in records for p in r.parts):
            notes.append(
                f"{writable(path.name)}: doses without unit; write it into the header, like "
                "'Dose (uM)', or into a column 'Unit'"
            )
        is_broad = columns.column("sample") and (columns.column("map") or columns.column("solvent"))
        # A map all of whose rows are refused is a map.
        for name, rows in (by_map or {stem: []}).items():
            if name in maps:
                raise BadTableError(
                    f"{maps[name].path.name} and {path.name} both hold the plate map {name}. "
                    "Remove one of them."
                )
            maps[name] = PlateMap(name, path)
            blank = _blank(rows, tables, options.blank, bool(is_broad))
            issues += [(path, refusal) for refusal in _fill(maps[name], rows, tables, blank)]
            controls.apply(maps[name])
            notes += _notes_on_wells(maps[name], rows, blank)
    controls.check()
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


def map_table(path: Path, options: MapOptions) -> TextTable:
    """Return the plate map in a file as a table with a row for each well.

    Raises:
        BadTableError: there is none; the message says what was looked for and what is there.
        UserInputError: the file is missing or unreadable.
    """
    table = open_map(path, options.sheet, options.columns)
    if table is not None:
        return table
    if options.sheet is not None and not options.columns:
        others = ", ".join(name for name in sheet_names(path) if name != options.sheet)
        raise BadTableError(
            f"{path.name} has no plate map on the sheet {options.sheet}. Name another one with "
            f"--sheet ({others or 'there is no other'}), or its columns with --map-column."
        )
    columns = columns_below_titles(path, options.sheet)
    for meaning, header in options.columns:
        if header not in columns:
            raise UnknownNameError.of("column", f"{header} ({meaning})", columns)
    yours = f"{', '.join(columns[:8])}{', ...' if len(columns) > 8 else ''}"
    where = f"sheet {options.sheet!r} of {path.name}" if options.sheet else path.name
    raise BadTableError(
        f"I do not recognise {where} as a plate map. It needs a well and a treatment column, or a "
        f"grid with columns 1, 2, 3 and rows A, B, C; yours has {yours}. Name its columns with "
        "--map-column well=... --map-column treatment=..., or another sheet with --sheet."
    )


def _read_treatments(path: Path, issues: list[Issue]) -> _Treatments:
    """Read a whole treatment table; rows that cannot be used are added to ``issues``."""
    table = open_table(path)
    found = _Treatments({}, {}, None)
    names = {column.removeprefix(PREFIX) for column in table.columns}
    is_crispr = names == {"JCP2022", "NCBI_Gene_ID", "Symbol"}
    if not is_crispr and _kind_of(table) is PerturbationKind.COMPOUND:
        dmso = TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)
        found = found._replace(untreated=dmso)
    for row in jump_crispr(table) if is_crispr else treatment_rows(table):
        if isinstance(row, Refusal):
            issues.append((path, row))
            continue
        line, record = row
        if record is None:
            continue
        if record.pert_iname.upper() == DMSO and found.untreated is not None:
            found = found._replace(untreated=record)
        first = found.by_name.setdefault(normalised_name(record.pert_iname), record)
        if record.identifier is not None:
            first = found.by_sample.setdefault(record.identifier, record)
        elif record.pert_iname.upper() == DMSO:
            continue
        if first != record:
            name = record.identifier or record.pert_iname
            detail = f"{name} is {first.pert_iname} on an earlier line; kept"
            issues.append((path, Refusal(line, "broad_sample twice", detail)))
    return found


def _unclear_doses(maps: Mapping[str, list[tuple[int, MapRow]]]) -> Iterator[Refusal]:
    """Take out, and yield, rows with doses like 1.000 where others of the file are like 0,5."""
    doses = [
        (item, part.dose_original)
        for rows in maps.values()
        for item in rows
        for part in (item[1].record.parts if item[1].record else ())
        if part.dose_original
    ]
    if not any("," in text for _, text in doses):
        return
    thousands = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}(?![0-9])")
    unclear = {id(item): (item[0], text) for item, text in doses if thousands.match(text)}
    for rows in maps.values():
        rows[:] = [item for item in rows if id(item) not in unclear]
    for line, text in unclear.values():
        detail = f"{text!r} may mean two numbers, as others have a comma; write it without a point"
        yield Refusal(line, "not a dose", detail)


def _map_rows(table: TextTable, columns: MapColumns) -> Iterator[tuple[int, MapRow] | Refusal]:
    """Yield the wells of a table with a row per well."""
    at = {name: table.position(name) for name in columns.by_role.values()}
    others = [name for name in columns.others if name not in table.repeated]
    at |= {name: table.position(name) for name in others}
    in_names = not any(role == "dose" for role, _ in columns.by_role)
    for row in table.rows():
        if isinstance(row, Refusal):
            yield row
            continue
        cells = ((name, row.cells[index]) for name, index in at.items() if index is not None)
        texts = {name: text for name, cell in cells if (text := known_text(name, cell))}
        if not texts:  # as spreadsheets write them below the last row
            continue
        try:
            yield row.line, _map_row(texts, columns, others, in_names)
        except RowRefusedError as refused:
            yield Refusal(row.line, *refused.args)


def _map_row(
    texts: dict[str, str], columns: MapColumns, others: Sequence[str], in_names: bool
) -> MapRow:
    used: set[str | None] = set()

    def text(role: str, number: int = 0) -> str | None:
        column = columns.column(role, number)
        used.add(column)
        return texts.get(column or "")

    metadata = {name.removeprefix(PREFIX): texts[name] for name in others if name in texts}
    for role in _METADATA_ROLES:
        if value := text(role):
            unit = columns.units[columns.column(role) or ""]
            metadata[role] = f"{value} {unit}" if unit and unit not in value else value
    said, control = read_control(text("control") or "")
    kind = _read_kind(text("kind"), text("control"))
    parts: list[TreatmentRecord] = []
    is_empty = (text("control") or "").lower() == _EMPTY
    for number in columns.numbers:
        named = {role: value for role in NAMING if (value := text(role, number))}
        is_empty |= _EMPTY in {value.lower() for value in named.values()}
        gene, genotype = named.pop("gene", None), named.pop("genotype", None)
        if genotype is not None:
            # 'NF1 Null' of gene NF1.
            name = f"{gene} {genotype}" if gene else genotype
            parts.append(TreatmentRecord.of(PerturbationKind.GENOTYPE, name, targets=gene))
        elif gene is not None and not any(columns.column(r, number) for r in NAMING[:-1]):
            named["gene"] = gene
        target = text("target", number) or gene
        if gene is not None and target != gene and genotype is None:
            used.discard(columns.column("gene", number))
        doses = text("dose", number)
        dose_column = columns.column("dose", number)
        unit = text("unit", number) or columns.units.get(dose_column or "")
        sample, name_ = named.pop("sample", None), named.pop("treatment", None)
        if sample is not None and sample.upper() == DMSO:
            sample, name_ = None, name_ or sample  # a name, and no code
        if sample or name_:
            named = {"treatment": name_ or sample or "", **named}
        for role, value in named.items():
            # A code that has a name beside it is one sample, whatever its name looks like.
            pieces = _pieces(value, doses, whole=bool(sample and name_))
            doses = None  # of the first of them
            for name, dose in pieces:
                known = kind or _KIND_OF_ROLE.get(role) or _kind_of_sample(sample)
                if in_names and name.upper() != DMSO:  # 'Compound (10 uM)' is what all got
                    dose = dose or dose_in_name(columns.column(role, number) or "")[1]  # noqa: PLW2901
                is_first = role == "treatment"
                if is_first and name.lower() == UNTREATED:
                    known = PerturbationKind.NONE
                if len(pieces) > 1:  # other columns do not say of which of them they are
                    code = name if is_first and sample else None
                    part = TreatmentRecord.of(known, name, code, name if role == "gene" else None)
                    used -= {
                        columns.column(r, number) for r in ("target", "gene") if r not in named
                    }
                else:
                    part = TreatmentRecord.of(
                        known,
                        name,
                        sample if is_first else None,
                        target if is_first or role == "gene" else text("target", number),
                        None,
                        *(text(role, number) for role in ("inchikey", "smiles", "pubchem_cid")),
                    )
                parts.append(part.with_dose(dose, unit))
        if doses is not None:
            used.discard(dose_column)  # there was nothing to give it to
    record = None
    if parts and not is_empty:
        parts.sort(key=lambda part: part.kind is PerturbationKind.GENOTYPE)
        if all(part.pert_iname.upper() == DMSO for part in parts):
            parts = parts[:1]  # in each column of a map of combinations
        first, more = parts[0], tuple(parts[1:])
        # The wild type alone is a negative control, and what is called DMSO.
        wild = first.kind is PerturbationKind.GENOTYPE and first.pert_iname.split()[-1] == "WT"
        if not said and not more:
            control = Control.NEGATIVE if wild else first.control
        first = replace(first, control=control)
        record = replace(first, others=more, treated=said and control is None)
    if is_empty:
        metadata["content"] = _EMPTY
    map_name = text("plate") or text("map")
    used.update(columns.column(role) for role in ("well", "row", "column", "map"))
    if kind is None:
        used -= {columns.column("kind"), None if said else columns.column("control")}
    metadata |= {name.removeprefix(PREFIX): texts[name] for name in texts if name not in used}
    return MapRow(map_name, _position_of(texts, columns), metadata, record, is_empty)


def _pieces(value: str, doses: str | None, *, whole: bool) -> list[tuple[str, str | None]]:
    """Return the names of a cell with their doses: 'taxol + noco' of '5 + 1' is a combination.

    A plus without spaces around it is a part of a name, and so is any in a ``whole`` name.
    """
    names = [value] if whole else re.split(r"\s+\+\s+", value)
    if doses is None:
        return [dose_in_name(name) for name in names]
    given = [doses] if len(names) == 1 else re.split(r"\s*\+\s*", doses)
    dosed = [name for name in names if name.upper() != DMSO]
    if len(given) == len(dosed) < len(names):  # 'taxol + DMSO' of 5
        left = iter(given)
        return [(name, None if name.upper() == DMSO else next(left)) for name in names]
    if len(given) != len(names):
        detail = (
            f"{doses!r} does not say the dose of each of {value!r}; write '5 + 1', or all into "
            "one cell like 'taxol 5 uM + noco 1 uM'"
        )
        raise RowRefusedError("not a dose", detail)
    return list(zip(names, given, strict=True))


def _position_of(texts: Mapping[str, str], columns: MapColumns) -> Position:
    well, row, column = (texts.get(columns.column(r) or "") for r in ("well", "row", "column"))
    found = []
    by_numbers = join_well(row, column) if row and column else None
    for written in (well, by_numbers):
        if written is None:
            continue
        if _SWAPPED.fullmatch(written):
            detail = f"{written!r} is not a well: write the row's letter first, like A01"
            raise RowRefusedError("not a well", detail)
        try:
            found.append(parse_well(written))
        except UserInputError as error:
            raise RowRefusedError("not a well", str(error)) from error
    if not found:
        raise RowRefusedError("not a well", "the row names no well; have the rows shifted?")
    if len(set(found)) > 1:
        detail = f"the well is {well}, but row and column are {row} and {column}"
        raise RowRefusedError("well against row and column", detail)
    return found[0]


def _read_kind(*texts: str | None) -> PerturbationKind | None:
    for text in texts:
        if text is not None and text.lower() in list(PerturbationKind):
            return PerturbationKind(text.lower())
    return None


def _kind_of_sample(sample: str | None) -> PerturbationKind:
    """Return what a sample is by its code: JUMP's and Broad's say it."""
    number = _JCP_NUMBER.fullmatch(sample or "")
    if number:
        return _JCP_KINDS.get(number[1], PerturbationKind.COMPOUND)
    if (sample or "").startswith("ccsb"):
        return PerturbationKind.ORF
    if (sample or "").startswith("BRDN"):
        return PerturbationKind.CRISPR
    return PerturbationKind.COMPOUND


def _is_code(record: TreatmentRecord) -> bool:
    return record.pert_iname == record.identifier and any(map(str.isdigit, record.identifier))


def _blank(
    rows: Sequence[tuple[int, MapRow]],
    tables: Sequence[_Treatments],
    asked: str | None,
    is_broad: bool,
) -> TreatmentRecord | None:
    """Return what a well got whose cell is blank; None: it is not known."""
    if asked == UNTREATED:
        return TreatmentRecord(PerturbationKind.NONE, UNTREATED)
    samples = {part.identifier for _, row in rows if row.record for part in row.record.parts}
    shared = [len(samples & table.by_sample.keys()) for table in tables]
    dmso = None
    if len(tables) == 1 or max(shared, default=0):
        dmso = tables[shared.index(max(shared))].untreated
    if asked == DMSO or (is_broad and not tables and _are_compounds(rows)):
        default = TreatmentRecord(PerturbationKind.COMPOUND, DMSO, control=Control.NEGATIVE)
        return dmso or default
    return dmso if is_broad else None


def _are_compounds(rows: Sequence[tuple[int, MapRow]]) -> bool:
    records = [row.record for _, row in rows if row.record is not None]
    return bool(records) and all(record.kind is PerturbationKind.COMPOUND for record in records)


def _fill(
    plate_map: PlateMap,
    rows: Sequence[tuple[int, MapRow]],
    tables: Sequence[_Treatments],
    blank: TreatmentRecord | None,
) -> Iterator[Refusal]:
    """Add the rows to the map, joined with treatments; yield those that cannot be used."""
    done: dict[TreatmentRecord, TreatmentRecord | None] = {}
    said: dict[Position, TreatmentRecord | None] = {}
    unclear = {
        row.position for _, row in rows if said.setdefault(row.position, row.record) != row.record
    }
    for line, (_, position, metadata, record, is_empty) in rows:
        treatment = record
        if record is None and not is_empty:
            treatment = blank
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
            first = plate_map.lines[position]
            detail = f"well {format_well(*position)} is on the map already, on line {first}"
            yield Refusal(line, "well twice", detail)
        elif record is not None and treatment is None:
            samples = " and ".join(part.identifier or part.pert_iname for part in record.parts)
            yield Refusal(
                line, "unknown broad_sample", f"{samples} is in none of the tables of treatments"
            )
        else:
            plate_map.wells[position] = treatment
            plate_map.lines[position] = line
            if metadata:
                plate_map.metadata[position] = metadata


def _joined(record: TreatmentRecord, tables: Sequence[_Treatments]) -> TreatmentRecord | None:
    """Return a treatment with what tables say of its parts; None: they do not know its sample."""
    parts = []
    for part in record.parts:
        known = [found for table in tables if (found := table.find(part)) is not None]
        if not known:
            if part.identifier is not None and part.pert_iname == part.identifier:
                return None
            parts.append(replace(part, others=()))
            continue
        merged = known[0]
        for more in known[1:]:
            merged = completed(merged, more)
        own = ("target", "inchikey", "smiles", "pubchem_cid", "control")
        said = {name: value for name in own if (value := getattr(part, name)) is not None}
        if part.treated:
            said["control"] = None
        doses = {name: getattr(part, name) for name in ("dose", "unit", "dose_original", "treated")}
        parts.append(replace(merged, **said, **doses))
    return replace(parts[0], others=tuple(replace(part, control=None) for part in parts[1:]))


class _Controls:
    """Which treatments are controls, as a user says it; the names must be on a map."""

    def __init__(self, asked: Sequence[tuple[str, str]]) -> None:
        self._asked: dict[str, Control] = {}
        for name, role in asked:
            if role not in list(Control):
                raise UnknownNameError.of("control", role, list(Control))
            self._asked[normalised_name(name)] = Control(role)
        self._names = {normalised_name(name): name for name, _ in asked}
        self._seen: set[str] = set()

    def apply(self, plate_map: PlateMap) -> None:
        """Set the controls of a map. In a combination, all parts but genotypes must be named."""
        if not self._asked:
            return
        for position, record in plate_map.wells.items():
            if record is None:
                continue
            genotype = PerturbationKind.GENOTYPE
            parts = [part for part in record.parts if part.kind is not genotype] or record.parts
            self._seen.update(part.pert_iname for part in record.parts)
            roles = {self._asked.get(normalised_name(part.pert_iname)) for part in parts}
            if len(roles) == 1 and (role := roles.pop()) is not None:
                plate_map.wells[position] = replace(record, control=role, treated=False)

    def check(self) -> None:
        """Check that every name was on a map.

        Raises:
            UnknownNameError: one was not.
        """
        seen = {normalised_name(name) for name in self._seen}
        for key, name in self._names.items():
            if key not in seen:
                raise UnknownNameError.of("treatment for --control", name, sorted(self._seen))


_SHOWN_WELLS = 8
FORMATS = ((8, 12), (16, 24))


def listed_wells(positions: Sequence[Position]) -> str:
    """Return wells by name, the first of them: ``A01, A02 and 94 more``."""
    names = [format_well(*position) for position in sorted(positions)]
    more = f" and {len(names) - _SHOWN_WELLS:,} more" if len(names) > _SHOWN_WELLS else ""
    return f"{', '.join(names[:_SHOWN_WELLS])}{more}"


def _notes_on_wells(
    plate_map: PlateMap, rows: Sequence[tuple[int, MapRow]], blank: TreatmentRecord | None
) -> Iterator[str]:
    """Yield a line on the wells of a map whose cell is blank, and one on those without cells."""
    empty = {row.position for _, row in rows if row.is_empty}
    blanks = [row.position for _, row in rows if row.record is None and not row.is_empty]
    if blanks:
        one = len(blanks) == 1
        what = "1 well is" if one else f"{len(blanks):,} wells are"
        if blank is not None:
            so = f"so {blank.pert_iname}: {listed_wells(blanks)}"
        else:
            so = (
                f"so {'its' if one else 'their'} treatment is not known: {listed_wells(blanks)}. "
                f"To say what {'it' if one else 'they'} got: --blank DMSO or --blank untreated"
            )
        # One file may hold the maps of several plates.
        of = (
            ""
            if Path(plate_map.path.name.removesuffix(".gz")).stem == plate_map.name
            else (f" for {plate_map.name}")
        )
        yield f"{what} blank in {writable(plate_map.path.name)}{of}, {so}"
    for rows_of, columns_of in FORMATS:
        outside = [at for at in plate_map.wells if at[0] > rows_of or at[1] > columns_of]
        if outside and len(outside) * 20 <= len(plate_map.wells):
            yield (
                f"{plate_map.name}: {listed_wells(outside)} lies outside of a plate of "
                f"{rows_of * columns_of} wells, in which all others are. Is it a typing error?"
            )
            break
    if empty:
        yield f"{plate_map.name}: wells without cells (empty): {listed_wells(sorted(empty))}"


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
