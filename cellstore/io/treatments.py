"""What was done to a well, as one row of a table says it, and the tables that describe treatments.

Tables of treatments describe each by its name or its sample (``broad_sample``); JUMP's tables of a
data set describe its plates, its reagents and its controls; a table of aliases gives one name to
what is written in several ways.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..enums import Control, PerturbationKind
from ..errors import BadTableError
from .map_shapes import (
    EXCEL,
    MapColumns,
    dose_in_name,
    header_of,
    normalised_dose,
    read_dose,
)
from .tables import (
    LONGEST,
    Refusal,
    RowRefusedError,
    TextTable,
    first_text,
    nearest_columns,
    open_table,
)

DMSO = "DMSO"
EMPTY = "empty"
"""How tables write a well without cells."""
PREFIX = "Metadata_"
LONG_NAME = "a name that cannot be stored"
"""Reason of a row with a name that no database can keep."""


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
        *chemistry: str | None,
    ) -> TreatmentRecord:
        """Return one perturbation as tables write it; DMSO is a negative control.

        ``chemistry``: InChIKey, SMILES and PubChem number.

        Raises:
            RowRefusedError: a text is too long for a database, or name or target is none: an
                error or a date of Excel.
        """
        for text in (name, *(targets or "").split("|")):
            for what, (looks, advice) in EXCEL.items():
                if looks.fullmatch(text.strip()):
                    raise RowRefusedError("not a name", f"{text!r} is {what}. {advice}")
        control = Control.NEGATIVE if name.upper() == DMSO else None
        inchikey, smiles, pubchem_cid = chemistry or (None, None, None)
        target = target_of(targets)
        made = cls(kind, name, target, control, identifier, inchikey, smiles, pubchem_cid)
        for key in ("pert_iname", "identifier", "inchikey", "pubchem_cid"):
            if len(getattr(made, key) or "") > LONGEST:
                raise RowRefusedError(LONG_NAME, f"{key} of more than {LONGEST} characters")
        if any("\0" in (text or "") for text in (name, identifier, targets, *chemistry)):
            raise RowRefusedError(LONG_NAME, "it has a NUL in it")
        return made

    @classmethod
    def named(
        cls,
        kind: PerturbationKind,
        text: str,
        identifier: str | None = None,
        targets: str | None = None,
        role: str | None = None,
        *chemistry: str | None,
        doses: str | None = None,
        unit: str | None = None,
    ) -> TreatmentRecord:
        """Return what a row names, ``taxol + noco`` as a combination; ``role``: :func:`combined`.

        A row with a code or a structure is of one sample, whatever its name looks like. The
        targets of a combination are written like its names: ``TUBB + PLK1``.

        Raises:
            RowRefusedError: as of :meth:`of`, or a dose or target fits no name.
        """
        pieces = split_names(text, doses, whole=identifier is not None or any(chemistry))
        of_each: list[str | None] = [targets]
        if len(pieces) > 1:
            of_each = list(re.split(r"\s+\+\s+", targets)) if targets else [None] * len(pieces)
            if len(of_each) != len(pieces):
                detail = f"{targets!r} does not say the target of each of {text!r}; write 'A + B'"
                raise RowRefusedError("not a target", detail)
        parts = []
        for (name, dose), target in zip(pieces, of_each, strict=True):
            part = cls.of(kind, name, identifier, target, *chemistry)
            parts.append(part if dose is None else part.with_dose(dose, unit))
        return parts[0] if len(parts) == 1 and role is None else combined(parts, role)

    def with_dose(self, text: str, unit: str | None = None) -> TreatmentRecord:
        """Return the treatment at a dose as a table writes it.

        Raises:
            RowRefusedError: the text is no dose.
        """
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


_CONTROL_WORD = "(controle?|ctrl|ctl|kontrolle|temoin)?"
_SAYS = {
    Control.NEGATIVE: re.compile(
        rf"{_CONTROL_WORD}(neg(ati[vf]|con|ctrl|kontr)|(neg|nc)$"
        r"|vehi[ck](le|ule|ulo|el)(control|kontrolle|dmso|treated)?$)"  # not 'vehicle + drug'
    ),
    Control.POSITIVE: re.compile(
        rf"(trt)?{_CONTROL_WORD}pos(iti[vf]|con|ctrl|kontr)|{_CONTROL_WORD}(pos|pc)$"
    ),
    None: re.compile(r"trt|(treated|treatment|test|sample|experimental|behandelt)$"),
}
"""How a text says it, in letters without accents; in German, French and Spanish, too."""


def read_control(text: str) -> tuple[bool, Control | None]:
    """Return whether a text says if a well is a control, and which: 'negcon', 'poscon_cp', 'trt'.

    'trt' says that it is none; 'compound' says nothing of it.
    """
    letters = re.sub(r"[^a-z]", "", unicodedata.normalize("NFKD", text.lower()))
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


def split_names(value: str, doses: str | None, *, whole: bool) -> list[tuple[str, str | None]]:
    """Return the names of a cell with their doses: 'taxol + noco' of '5 + 1' is a combination.

    A plus without spaces around it is a part of a name, and so is any in a ``whole`` name.

    Raises:
        RowRefusedError: there are more or fewer doses than names.
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


def combined(parts: Sequence[TreatmentRecord], role: str | None) -> TreatmentRecord:
    """Return one treatment of all that a well got.

    ``role`` is what :func:`read_control` reads. Where it says nothing, DMSO alone and the wild
    type alone are negative controls.
    """
    read_role, control = read_control(role or "")
    if all(part.pert_iname.upper() == DMSO for part in parts):
        parts = parts[:1]  # in each column of a map of combinations
    first, *others = sorted(parts, key=lambda part: part.kind is PerturbationKind.GENOTYPE)
    if not read_role and not others:
        wild = first.kind is PerturbationKind.GENOTYPE and first.pert_iname.split()[-1] == "WT"
        control = Control.NEGATIVE if wild else first.control
    more = tuple(replace(part, control=None, treated=False) for part in others)
    return replace(first, control=control, treated=read_role and control is None, others=more)


# ---- The treatment that one row names ----

_NAME = "Metadata_pert_iname"
_TARGET = ("Metadata_target", "Metadata_gene", "Metadata_target_list")
_JCP = "Metadata_JCP2022"
_IDENTIFIER = ("Metadata_broad_sample", _JCP)
_CONTROL = ("Metadata_control_type", "Metadata_pert_type")
_KIND = ("Metadata_perturbation", "Metadata_Perturbation", "Metadata_modality")
_CHEMISTRY = ("Metadata_InChIKey", "Metadata_smiles", "Metadata_pubchem_cid")
_KIND_OF_CODE = {
    "JCP2022_8": PerturbationKind.CRISPR,
    "JCP2022_9": PerturbationKind.ORF,
    "ccsb": PerturbationKind.ORF,
    "BRDN": PerturbationKind.CRISPR,
}
"""By how the code of a sample begins, as JUMP and the Broad Institute write it."""
_CODE = re.compile("|".join(_KIND_OF_CODE))
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


def read_kind(*texts: str | None) -> PerturbationKind | None:
    """Return the kind of perturbation that the first of the texts is the word or the code of."""
    for text in texts:
        if text is not None and text.lower() in list(PerturbationKind):
            return PerturbationKind(text.lower())
        if text is not None and (found := _CODE.match(text)):
            return _KIND_OF_CODE[found[0]]
    return None


def treatment_of(texts: Mapping[str, str]) -> TreatmentRecord | None:
    """Return the treatment of a row by its known values, of ``TREATMENT_COLUMNS``.

    Values of :func:`dose_columns` may be among them, and say the dose. None: the row names
    nothing, or a well without cells (``empty``).

    A row that names no perturbation but its ``Metadata_JCP2022`` is called by that. Its kind is
    the one that is written, else that of this identifier.
    """
    name = first_text(texts, (_NAME, _JCP))
    if name is None or name in _JCP_NOTHING or name.lower() == EMPTY:
        return None
    role = first_text(texts, _CONTROL)
    # pycytominer writes the kind as Metadata_pert_type, where JUMP writes a role.
    kind = read_kind(texts.get("Metadata_pert_type"), first_text(texts, _KIND), texts.get(_JCP))
    if _COMPONENTS in texts:
        try:
            return combined(list(map(_component, json.loads(texts[_COMPONENTS]))), role)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            detail = f"{_COMPONENTS} is not as cellstore export writes it: {texts[_COMPONENTS]!r}"
            raise RowRefusedError("not a treatment", detail) from error
    dose, *unit = dose_columns(tuple(texts)) or (None,)
    meant = header_of(dose) if dose else None
    found = TreatmentRecord.named(
        kind or PerturbationKind.COMPOUND,
        name,
        first_text(texts, _IDENTIFIER),
        first_text(texts, _TARGET),
        role,
        *map(texts.get, _CHEMISTRY),
        doses=texts[dose] if dose else None,
        unit=texts[unit[0]] if unit else meant and meant.unit,
    )
    if dose is None or _ORIGINAL not in texts:
        return found
    return replace(found, dose_original=texts[_ORIGINAL])


_TEXTS = ("identifier", "target", "inchikey", "smiles", "pubchem_cid")


def _component(item: Mapping[str, Any]) -> TreatmentRecord:
    """Return one part of a combination, as an export has it."""
    texts = ("pert_iname", *_TEXTS, "unit", "dose_original")
    odd = item.keys() - {"kind", "dose", *texts}
    odd |= {name for name in texts if not isinstance(item.get(name), str | None)}
    if odd:
        raise TypeError(f"{odd} are not known, or not texts")
    kind, name, dose = PerturbationKind(item["kind"]), item["pert_iname"], item.get("dose")
    part = TreatmentRecord.of(kind, name, *map(item.get, _TEXTS))
    if dose is None:
        return part
    number, plain = normalised_dose(dose, item.get("unit"))
    return replace(part, dose=number, unit=plain, dose_original=item.get("dose_original"))


def completed(given: TreatmentRecord, known: TreatmentRecord) -> TreatmentRecord:
    """Return ``given`` with its gaps filled from ``known``, part by part where both are one sample.

    The result equals ``known`` where ``given`` adds nothing, but for the order of its parts. One
    sample: the same kind and identifier, or the same kind and name where one of the two has no
    identifier. What a well got alone says nothing of a combination.
    """
    if bool(given.others) is not bool(known.others):
        return given
    parts: list[TreatmentRecord] = []
    control = known.control
    for part in given.parts:
        same = next((other for other in known.parts if _one_sample(part, other)), None)
        if same is None:
            parts.append(part)
            control = None
            continue
        names = ["target", "identifier", "inchikey", "smiles", "pubchem_cid"]
        names += ["dose", "unit", "dose_original"] if part.dose is None else []
        gaps = {name: getattr(same, name) for name in names if getattr(part, name) is None}
        parts.append(replace(part, **gaps) if gaps else part)
    if given.control is not None or given.treated:
        control = given.control
    return replace(parts[0], control=control, others=tuple(parts[1:]))


def _one_sample(given: TreatmentRecord, known: TreatmentRecord) -> bool:
    by_name = known.identifier is None or given.identifier is None
    key = "pert_iname" if by_name else "identifier"
    return known.kind is given.kind and getattr(known, key) == getattr(given, key)


def read_aliases(path: Path) -> dict[str, str]:
    """Read names by alias: a table with the columns ``alias`` and ``name``."""
    table = open_table(path)
    columns = ("alias", "name")
    table.require(*columns)
    names: dict[str, str] = {}

    def add(texts: Mapping[str, str]) -> None:
        alias, name = map(texts.get, columns)
        if alias is None or name is None:
            raise RowRefusedError("", "both names are needed")
        if len(name) > LONGEST:
            raise RowRefusedError("", f"the name has more than {LONGEST} characters")
        if names.setdefault(alias, name) != name:
            raise RowRefusedError("", f"{alias!r} is {names[alias]!r} already")

    for row in table.records(columns, add):
        if isinstance(row, Refusal):
            raise BadTableError(
                f"{path.name}, line {row.line}: {row.detail}. Correct this row of the alias table."
            )
    names = {alias: name for alias, name in names.items() if alias != name}
    if both := sorted(names.keys() & set(names.values())):
        raise BadTableError(
            f"{path.name}: {', '.join(map(repr, both))} is an alias of another name, and has an "
            "alias itself. Give each alias the name that is to stay."
        )
    return names


def without_aliases(record: TreatmentRecord, names: Mapping[str, str]) -> TreatmentRecord:
    """Return the treatment under its ``names`` by alias: two samples of one stay two samples."""
    if not any(part.pert_iname in names for part in record.parts):
        return record
    name = names.get(record.pert_iname, record.pert_iname)
    others = tuple(without_aliases(other, names) for other in record.others)
    return replace(record, pert_iname=name, others=others)


# ---- Tables of treatments and of plates ----

TreatmentRow = tuple[int, TreatmentRecord | None]
"""A line of a table and its treatment; None where every cell of the row is empty."""


PlateRow = tuple[str, str | None, dict[str, str]]
"""A plate, the batch it was made in, and the values of its other columns."""


def treatment_rows(table: TextTable) -> Iterator[TreatmentRow | Refusal]:
    """Yield one treatment, or why it is none, per data row.

    A table without codes (``broad_sample``, ``JCP2022``) describes treatments by their names. In
    one with them, only DMSO of a compound table may be without.
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
    meant = {name: header_of(name) for name in table.columns}
    roles = [name for name, header in meant.items() if header and header.role == "control"]
    roles.sort(key=lambda name: "control" not in name.lower())
    kind_column = columns.column("kind")
    chemistry = [columns.column(role) for role in ("inchikey", "smiles", "pubchem_cid")]
    number_column = f"{PREFIX}NCBI_Gene_ID"
    kind = kind_of_table(table)

    def record(texts: Mapping[str, str]) -> TreatmentRecord | None:
        sample, target = texts.get(sample_column or ""), first_text(texts, targets)
        name = texts.get(name_column or "") or target_of(target) or sample
        if name is None or name.lower() == EMPTY:
            return None
        if (sample or "").upper() == DMSO:
            sample = None  # a name, and no code, as in maps
        is_dmso = kind is PerturbationKind.COMPOUND and name.upper() == DMSO
        if sample_column and sample is None and not is_dmso:
            detail = f"{name} cannot be matched to a well without it"
            raise RowRefusedError(f"no {sample_column.removeprefix(PREFIX)}", detail)
        if number_column in table.columns and number_column not in texts:
            target = None  # a guide against no gene
        described = (texts.get(column or "") for column in chemistry)
        written = texts.get(kind_column or "")
        of_row = read_kind(written) or kind
        if written and read_kind(written) is None:
            kinds = ", ".join(PerturbationKind)
            raise RowRefusedError("not a known kind", f"{written!r} is none of {kinds}")
        role = first_text(texts, roles)
        return TreatmentRecord.named(of_row, name, sample, target, role, *described)

    read = (sample_column, name_column, *targets, *roles, *chemistry, kind_column, number_column)
    return table.records([name for name in read if name], record)


def jump_plates(table: TextTable) -> Iterator[tuple[int, PlateRow] | Refusal]:
    """Yield the plates of ``plate.csv``; their source and their type are metadata."""
    columns = [PREFIX + name for name in ("Plate", "Batch", "Source", "PlateType")]

    def record(texts: Mapping[str, str]) -> PlateRow:
        barcode, batch = map(texts.get, columns[:2])
        if barcode is None:
            raise RowRefusedError("no plate", "Metadata_Plate is empty")
        if max(len(barcode), len(batch or "")) > LONGEST:
            raise RowRefusedError(LONG_NAME, f"more than {LONGEST} characters")
        others = {name.removeprefix(PREFIX): texts[name] for name in columns[2:] if name in texts}
        return barcode, batch, others

    return table.records(columns, record)


def kind_of_table(table: TextTable) -> PerturbationKind:
    """Return what the treatments of a table are, by its columns."""
    names = {column.removeprefix(PREFIX) for column in table.columns}
    if "target_sequence" in names or names == {"JCP2022", "NCBI_Gene_ID", "Symbol"}:
        return PerturbationKind.CRISPR
    roles = {header.role for column in table.columns if (header := header_of(column))}
    named = "treatment" in roles and not names & {"Symbol", "Transcript"}
    if named or "pert_iname" in names or roles & {"inchikey", "smiles", "pubchem_cid"}:
        return PerturbationKind.COMPOUND
    return PerturbationKind.ORF
