"""The shapes of plate maps: what columns mean, plate-shaped grids, doses as people write them.

A grid is turned into the table that has a row for each well, so that one reader reads all maps.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ..errors import BadTableError, MissingExtraError, UnknownNameError, UserInputError, some_of
from .filenames import format_well
from .tables import (
    MISSING,
    SPREADSHEETS,
    CellTable,
    TableRow,
    TextTable,
    first_bytes,
    open_table,
    read_sheet,
    sheet_names,
    text_cells,
)

# ---- Doses ----

MICROMOLAR = "uM"
_MOLAR = {"M": 1e6, "mM": 1e3, "uM": 1.0, "nM": 1e-3, "pM": 1e-6, "fM": 1e-9}
_SPELLINGS = {"mol/l": "M", "molar": "M"} | {
    spelling: f"{letter}M"
    for letter, word in {"m": "milli", "u": "micro", "n": "nano", "p": "pico"}.items()
    for spelling in (f"{letter}m", f"{letter}mol/l", f"{word}molar")
}
"""Units in lower case; ``nm`` of a dose is not a length."""
_UNITS = r"[fpnum]?M|[pnu]m|[pnum]?mol/[lL]|[pnum]?g/[mu]?[lL]|%|MOI|[xX]"
_NUMBER = r"\d[\d.,]*(?:[eE][+-]?\d+)?"
# A unit begins with a letter: 1:1000, 10-20 and 10^-6 are no doses.
_DOSE = re.compile(rf"({_NUMBER}|\.\d+)(?:\s*((?:[^\W\d_]|%)[^\d^]*))?")
_DOSE_AFTER_NAME = re.compile(rf"(.*\S)[\s,;@(]+({_NUMBER})\s*({_UNITS})\)?")


def plain_unit(unit: str | None) -> str | None:
    """Return a unit with a plain u for micro: the micro sign and the Greek letter look alike."""
    plain = (unit or "").strip().replace("\u00b5", "u").replace("\u03bc", "u")
    plain = re.sub(r"/([mu]?)L$", r"/\1l", plain)  # mg/mL is mg/ml
    return _SPELLINGS.get(plain.lower(), plain) or None


def normalised_dose(dose: float, unit: str | None) -> tuple[float, str | None]:
    """Return a dose and its unit: molar ones in ``uM``, all others as they are.

    ``5000 nM``, ``5 µM`` and ``0.005 mmol/L`` are all ``(5.0, "uM")``. Twelve digits are kept, so
    that one dose in two units is one number.

    Raises:
        ValueError: the dose is negative, infinite or no number.
    """
    if not math.isfinite(dose) or dose < 0:
        raise ValueError(f"{dose} is no dose")
    plain = plain_unit(unit)
    factor = _MOLAR.get(plain or "")
    if factor is None:
        return float(dose), plain
    return float(f"{dose * factor:.12g}"), MICROMOLAR


def read_dose(text: str, unit: str | None = None) -> tuple[float, str | None]:
    """Return number and unit of a dose as it is written: ``0,5``, ``10 µM``, ``1e-3``.

    A unit beside the number goes before ``unit``. A comma is a decimal comma, unless it may as
    well separate thousands.

    Raises:
        ValueError: it is no dose; the message says why.
    """
    found = _DOSE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no number")
    number = found[1]
    if "," in number:
        if "." in number or number.count(",") > 1 or re.fullmatch(r"[1-9]\d{0,2},\d{3}", number):
            raise ValueError(f"{text!r} may mean two numbers; write it without the comma")
        number = number.replace(",", ".")
    return float(number), plain_unit(found[2]) or plain_unit(unit)


def dose_in_name(text: str) -> tuple[str, str | None]:
    """Return name and dose of a cell like ``taxol 10 µM``; a dose needs a unit to be one."""
    found = _DOSE_AFTER_NAME.fullmatch(text.replace("\u00b5", "u").replace("\u03bc", "u"))
    return (text[: found.end(1)], f"{found[2]} {found[3]}") if found else (text, None)


# ---- What Excel makes of cells ----

_MONTH = "(?:Jan|Feb|Mar|M\u00e4r|Mrz|Apr|Mai|May|Jun|Jul|Aug|Sept?|Okt|Oct|Nov|Dez|Dec)\\.?"
EXCEL = {
    "an error of Excel": (
        re.compile(r"#(?:N/?[ADV]|GETTING_DATA|[^\W\d_][\w/]*[!?])|Err:\d{3}"),
        "Correct the formula and save the file again.",
    ),
    "a date in place of a name": (
        re.compile(
            rf"\d{{1,2}}(?:-|\.? ){_MONTH}(?:[- ]\d{{2,4}})?|{_MONTH}[- ](?:\d{{2}}|\d{{4}})"
            r"|\d{4}-\d\d-\d\d(?: [\d:.]+)?"
        ),
        (
            "Excel makes dates of names like MARCH2, SEPT2 and DEC1: format the cells as text, "
            "write the names again and save the file."
        ),
    ),
}
"""What a cell may be where a name should be: how it looks (``#N/A`` and ``#BEZUG!``; ``2-Mar``,
``Mar-02``, ``2. Mrz`` and ``2026-03-02``), and what to do."""


# ---- What a column is ----

_WORDS = {
    "well": "well wellposition wellid wellname wells wellpos position pos welllocation "
    "destinationwell kavitat kavitaet puits pocillo",
    "row": "row wellrow zeile reihe ligne fila",
    "column": "column col wellcol wellcolumn spalte colonne columna",
    "plate": "plate barcode platebarcode assayplatebarcode plateid platename assayplate "
    "platte plattenname plattenbarcode plaque placa",
    "map": "platemapname platemap",
    "sample": "broadsample jcp2022",
    "treatment": "pertiname compound compounds compoundname drug drugs drugname cmpd substance "
    "chemical inhibitor agent treatment treatments treatmentname perturbation name content "
    "substanz verbindung wirkstoff behandlung compose traitement compuesto tratamiento",
    "sirna": "sirna sirnaname sirnas shrna",
    "crispr": "sgrna guide grna crispr guiderna",
    "orf": "orf orfname",
    "genotype": "genotype genotyp",
    "gene": "gene genename genesymbol symbol gen",
    "dose": "mmolesperliter dose doses concentration concentrations conc finalconcentration "
    "finalconc finaldose dosis konzentration konz endkonzentration concentracion "
    "compoundconcentration compounddose drugdose "
    "drugconcentration treatmentconcentration sirnaconcentration sirnadose sirnaconc "
    "mgperml",
    "unit": "unit units doseunit doseunits concentrationunit concentrationunits concunit "
    "concunits einheit unite unidad",
    "control": "controltype control perttype role welltype assaywellrole welrole wellrole controls "
    "kontrolle kontrollen controle temoin",
    "target": "target targets targetlist targetgene zielgen cible",
    "inchikey": "inchikey",
    "smiles": "smiles",
    "pubchem_cid": "pubchemcid",
    "cell_line": "cellline celllines celltype cells celllinename zelllinie zelltyp "
    "ligneecellulaire lineacelular",
    "time_point": "time timepoint timepoints incubationtime zeit timehours zeitpunkt temps tiempo",
    "replicate": "replicate replicates rep replikat replicat replica",
    "batch": "batch",
    "kind": "perturbationtype perturbationkind modality kind",
    "solvent": "solvent",
}
"""Headers in English, German, French and Spanish, without their accents; the first goes before."""
_ROLES = {word: (role, rank) for role, t in _WORDS.items() for rank, word in enumerate(t.split())}
ROLES = tuple(role for role in _WORDS if role != "solvent")
"""What ``--map-column`` may name."""
NAMING = ("sample", "treatment", "sirna", "crispr", "orf", "genotype", "gene")
"""Columns that say what was done to a well."""

_BRACKETS = re.compile(r"(.*?)[\s_]*[\[({]\s*([^\])}]*?)\s*[\])}]\s*")
_LAST_UNIT = re.compile(rf"(.*?)(?:[\s_]+|[\s_]+in[\s_]+|\s*/\s*)({_UNITS})")
_COUNTED = re.compile(r"(.*?\D)[\s_.#-]*([1-9])|(.*\S)[\s_]+([a-d])")
_PREFIX = "metadata_"
MILLIMOLAR_NOTE = (
    "mmoles_per_liter is read as micromolar (uM): in the public Broad maps that have this "
    "column its numbers are micromolar. If yours are mM: --map-column dose=mmoles_per_liter"
)


class Header(NamedTuple):
    """What the header of a column says: its role, the number of the part, and a unit."""

    role: str
    rank: int
    number: int = 0
    unit: str | None = None


@lru_cache(2_000)
def header_of(text: str) -> Header | None:
    """Return what a header means: ``Dose 2 [nM]`` is the dose of part 2 in nM; None: unknown."""
    plain = text.strip().replace("\u00b5", "u").replace("\u03bc", "u")
    if plain.lower().startswith(_PREFIX):
        plain = plain[len(_PREFIX) :]
    unit = None
    for pattern in (_BRACKETS, _LAST_UNIT):
        if found := pattern.fullmatch(plain):
            plain, unit = found[1], found[2]
            break
    number = 0
    plain = unicodedata.normalize("NFKD", plain).lower()  # accents are signs of their own
    key = re.sub(r"[^a-z0-9]", "", plain)
    if key not in _ROLES and (found := _COUNTED.fullmatch(plain)):
        number = int(found[2]) if found[2] else ord(found[4]) - 96
        key = re.sub(r"[^a-z0-9]", "", found[1] or found[3])
    if key not in _ROLES:
        return None
    role, rank = _ROLES[key]
    if key == "mmolesperliter":
        unit = MICROMOLAR
    elif key == "mgperml":
        unit = "mg/ml"
    return Header(role, rank, number, unit or None)


class MapColumns:
    """The columns of a map by role and number of the part; all others are ``others``.

    ``numbers`` are those of the parts, in their order; ``is_map``: there is a well (``has_well``),
    and what was done to it.
    ``chosen`` are pairs of a role and a header, which go before what the headers say.

    Raises:
        UnknownNameError: a pair names a role or a column that is not there.
    """

    def __init__(self, columns: Sequence[str], chosen: Sequence[tuple[str, str]]) -> None:
        self.by_role: dict[tuple[str, int], str] = {}
        self.units: dict[str, str | None] = {}
        ranks: dict[tuple[str, int], int] = {}
        names = {column.strip().lower(): column for column in columns if column}
        taken = set()
        for wanted, header in chosen:
            found = re.fullmatch(r"(\w*?[a-z])\s*([1-9]?)", wanted.strip().lower())
            role = {"name": "treatment", "compound": "treatment", "time": "time_point"}.get(
                found[1] if found else "", found[1] if found else wanted
            )
            if role not in ROLES:
                raise UnknownNameError.of("meaning for --map-column", wanted, ROLES)
            if header.strip().lower() not in names:
                raise UnknownNameError.of("column", header, [name for name in columns if name])
            column = names[header.strip().lower()]
            key = role, int(found[2]) if found and found[2] else 0
            self.by_role[key], ranks[key] = column, -1
            meant = header_of(column)
            unit = meant.unit if meant else None
            if meant is None and (bracket := _BRACKETS.fullmatch(column)):
                unit = bracket[2]
            is_millimolar = "mmoles" in column.lower()
            self.units[column] = "mM" if is_millimolar else unit
            taken.add(column)
        for column in columns:
            meant = header_of(column) if column not in taken else None
            if meant is None:
                continue
            key = meant.role, meant.number
            if key not in ranks or meant.rank < ranks[key]:
                self.by_role[key], ranks[key] = column, meant.rank
                self.units[column] = meant.unit
        used = {column for (role, _), column in self.by_role.items() if role != "solvent"}
        self.others = [name for name in columns if name and name not in used]
        self.numbers = sorted({number for role, number in self.by_role if role in NAMING})
        roles = {role for role, number in self.by_role if number == 0}
        self.has_well = "well" in roles or {"row", "column"} <= roles
        self.is_map = self.has_well and bool(self.numbers)

    def column(self, role: str, number: int = 0) -> str | None:
        """Return the column of a role."""
        return self.by_role.get((role, number))


# ---- Grids ----

_LABEL = re.compile(r"[A-Za-z]|A[A-Fa-f]")
_SHORTEST = 3
"""Numbers in a row that make the head of a grid."""
_LOOKED_AT = 50
"""Rows in which the header of a long map is looked for."""
_TITLES = {
    role: re.compile(rf"\b({words})", re.IGNORECASE)
    for role, words in {
        "Dose": "dos[ei]|conc|konz",
        "Cell line": "cell ?lines?|cell ?types?|zelllinie|lign\u00e9e cell|l\u00ednea cel",
        "Time": "time|zeit|temps|tiempo",
        "Control": "controls?|kontrolle",
        "siRNA": "sirna",
        "Genotype": "genotype",
        "Gene": "genes?",
        "Replicate": "replicate",
        "Batch": "batch",
        "Unit": "units?",
        "Compound": "compound|treatment|drug|substan[cz]|perturbation|inhibitor|verbindung"
        "|wirkstoff|behandlung|compos\u00e9|traitement|compuesto|tratamiento",
    }.items()
}
_TITLE_UNIT = re.compile(rf"(?:^|[\s(\[])({_UNITS})(?:$|[\s)\],])")


class Block(NamedTuple):
    """A grid: line of its head, its title, the lines it covers, and (well, line, value)s."""

    line: int
    title: str
    lines: range
    values: list[tuple[tuple[int, int], int, str]]


def _whole(text: str) -> int | None:
    digits = text.strip().removesuffix(".0").lstrip("0")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 3 else None


def _row_of(text: str) -> int | None:
    label = text.strip().upper()
    if not _LABEL.fullmatch(label):
        return None
    return ord(label) - 64 if len(label) == 1 else 26 + ord(label[1]) - 64


def find_blocks(rows: Sequence[TableRow]) -> list[Block]:
    """Return the grids among rows: columns 1, 2, 3 at the head, rows A, B, C at the left."""
    blocks: list[Block] = []
    taken: set[tuple[int, int]] = set()
    for at, (line, cells) in enumerate(rows):
        for start, end in _heads(cells):
            if (at, start) in taken:  # doses of 1, 2, 3 in a grid
                continue
            values = _values(rows, at, start, end)
            lines = range(at, at + 1 + len(values) // (end - start))
            taken.update((row, column) for row in lines for column in range(start, end))
            if len(lines) > 2:
                title = _title(rows, at, start - 1, blocks)
                blocks.append(Block(line, title, lines, values))
    return blocks


def _heads(cells: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where whole numbers that go up by one begin and end, with a cell to their left."""
    end = 0
    while end < len(cells):
        start, first = end, _whole(cells[end])
        end += 1
        while first is not None and end < len(cells) and _whole(cells[end]) == first + end - start:
            end += 1
        if end - start >= _SHORTEST and start > 0:
            yield start, end


def _values(
    rows: Sequence[TableRow], at: int, start: int, end: int
) -> list[tuple[tuple[int, int], int, str]]:
    """Return (well, line, value) of the grid below the numbers that ``start`` to ``end`` have."""
    head, left = rows[at].cells, start - 1
    first = _whole(head[start]) or 0
    values: list[tuple[tuple[int, int], int, str]] = []
    label: int | None = None
    for below in range(at + 1, len(rows)):
        line, cells = rows[below]
        found = _row_of(cells[left]) if left < len(cells) else None
        if found is None:
            next_rows = (row.cells for row in rows[below + 1 : below + 3] if left < len(row.cells))
            if label is None and any(_row_of(cells[left]) == 1 for cells in next_rows):
                raise BadTableError(
                    f"Line {line} has no letter, and the row A is below it. The rows of a grid "
                    "begin right under its numbers; has the map shifted? Correct it."
                )
            break
        if label is not None and found != label + 1:
            raise BadTableError(
                f"Line {line}: row {cells[left]} follows row {rows[below - 1].cells[left]}. The "
                "rows of a grid must be labelled A, B, C, ... without a gap; correct the map."
            )
        label = found
        for column in range(start, end):
            text = cells[column].strip() if column < len(cells) else ""
            values.append(((label, first + column - start), line, text))
        beyond = cells[end].strip() if end < len(cells) else ""
        numbered = end < len(head) and head[end].strip()
        if beyond and not numbered and _row_of(beyond) != found:  # labels on both sides
            raise BadTableError(
                f"Line {line} has {beyond!r} to the right of column {first + end - 1 - start}, "
                "where the grid has no number. Has the map shifted? Correct it."
            )
    return values


def _title(rows: Sequence[TableRow], at: int, left: int, blocks: Sequence[Block]) -> str:
    """Return the text in the corner of a grid, else the nearest above it."""
    if corner := rows[at].cells[left].strip():
        return corner
    covered = {line for block in blocks for line in block.lines}
    for above in range(at - 1, max(-1, at - 4), -1):
        if above in covered:
            break
        cells = rows[above].cells
        # Grids may stand side by side: the title nearest to the left edge of this one.
        texts = [text.strip() for text in cells[left:] if text.strip()]
        texts = texts or [text.strip() for text in cells if text.strip()]
        if texts:
            return texts[0]
    return ""


def _is_dose(texts: Sequence[str]) -> bool:
    known = [text for text in texts if text not in MISSING]
    doses = (re.split(r"\s*\+\s*", text.strip()) for text in known)  # '5 + 1' of a combination
    number = sum(all(map(_DOSE.fullmatch, pieces)) for pieces in doses)
    return bool(known) and number * 2 > len(known)


def _column_of(block: Block) -> str | None:
    """Return the header that a block has by its title, or None."""
    texts = [text for _, _, text in block.values]
    title = block.title
    meant = header_of(title)
    if meant is not None and (meant.role != "dose" or _is_dose(texts)):
        return None if meant.role in ("well", "row", "column", "plate", "map") else title
    for name, words in _TITLES.items():
        if words.search(title) and (name != "Dose" or _is_dose(texts)):
            unit = _TITLE_UNIT.search(title.replace("\u00b5", "u").replace("\u03bc", "u"))
            return f"{name} ({unit[1]})" if unit and name == "Dose" else name
    return None


def _parts_of(blocks: Sequence[Block], meant: Sequence[Header | None]) -> list[int]:
    """Return the number of the part of a treatment that each block is of: 2 for a second one.

    As many blocks of doses as of compounds belong together in their order.
    """
    found = [0] * len(blocks)
    wells = [{well for well, _, text in block.values if text} for block in blocks]
    plain = [(at, header) for at, header in enumerate(meant) if header and not header.number]
    named = [at for at, header in plain if header.role in NAMING]
    doses = [at for at, header in plain if header.role == "dose"]
    paired = len(doses) == len(named)
    for some in (named,) if paired else (named, doses):
        for order, at in enumerate(some):
            for before in some[:order]:
                alike = paired or meant[at][0] == meant[before][0]  # type: ignore[index]
                if alike and wells[at] & wells[before]:
                    found[at] = max(found[at], (found[before] or 1) + 1)
    if paired:
        for dose, of in zip(doses, named, strict=True):
            found[dose] = found[of]
    return found


def long_form(path: Path, rows: Sequence[TableRow], chosen: Mapping[str, str]) -> TextTable | None:
    """Return the grids among ``rows`` as a table with a row for each well; None: there are none.

    Each block becomes a column that is called by its title. Where no title says what was done to
    the wells, the first block does. ``chosen`` are headers by role.
    """
    blocks = find_blocks(rows)
    if not blocks:
        return None
    notes: list[str] = []
    names = [
        block.title if block.title in chosen.values() else _column_of(block) for block in blocks
    ]
    meant = [header_of(name) if name else None for name in names]
    if "treatment" not in chosen and not any(h and h.role in NAMING for h in meant):
        # A title of several words may tell of cells or times, and not of what is in the grid.
        vague = (at for at, block in enumerate(blocks) if header_of(block.title) is None)
        first = next((at for at, name in enumerate(names) if name is None), next(vague, None))
        if first is not None and not _is_dose([text for _, _, text in blocks[first].values]):
            names[first] = "Compound"
    columns: dict[str, dict[tuple[int, int], str]] = {}
    lines: dict[tuple[int, int], int] = {}
    numbers = _parts_of(blocks, [header_of(name) if name else None for name in names])
    for at, (block, name) in enumerate(zip(blocks, names, strict=True), 1):
        called = name or block.title or f"block {at}"
        if name is None and header_of(called):
            called = f"block {at} {called}"  # 'Dose', and there are words in it
        if name is None:
            notes.append(
                f"the grid at line {block.line} ({block.title or 'no title'}) is kept as metadata "
                f"{called!r}; write Compound, Dose (uM) or Cell line above it if it is that"
            )
        if numbers[at - 1]:
            role, _, _, unit = header_of(called) or Header("treatment", 0)
            called = f"{'broad_sample' if role == 'sample' else role} {numbers[at - 1]}"
            called += f" ({unit})" if unit else ""
        elif any(columns.get(called, {}).get(well) for well, _, text in block.values if text):
            called = f"{called} {at}"
        column = columns.setdefault(called, {})
        for well, line, text in block.values:
            if text or well not in column:
                column[well] = text
            lines.setdefault(well, line)
    covered = {line for block in blocks for line in block.lines}
    titles = {
        block.title
        for block, name in zip(blocks, names, strict=True)
        if name and (header_of(block.title) or any(w.search(block.title) for w in _TITLES.values()))
    }
    unused = [
        f"{' '.join(dict.fromkeys(texts))[:60]!r} (line {line})"
        for at, (line, cells) in enumerate(rows)
        if at not in covered and (texts := [text.strip() for text in cells if text.strip()])
        if not set(texts) <= titles
    ]
    if unused:
        notes.append(f"belongs to no grid and is not used: {some_of(unused)}")
    header = ("Well", *columns)
    made = [
        TableRow(line, (format_well(*well), *(column.get(well, "") for column in columns.values())))
        for well, line in sorted(lines.items(), key=lambda item: (item[1], item[0]))
    ]
    return CellTable(path, header, ",", "", tuple(notes), cells=tuple(made))


# ---- Finding the map in a file ----


def _head_of(rows: Sequence[TableRow], chosen: Sequence[tuple[str, str]]) -> int | None:
    """Return which row is the header of a long map."""
    for at, (_, cells) in enumerate(rows[:_LOOKED_AT]):
        names = {cell.strip().lower() for cell in cells}
        some = [pair for pair in chosen if pair[1].strip().lower() in names]
        if len(some) == len(chosen) and MapColumns(tuple(cells), some).is_map:
            return at
    return None


def open_map(
    path: Path, sheet: str | None = None, chosen: Sequence[tuple[str, str]] = ()
) -> TextTable | None:
    """Return the plate map in a file as a table with a row for each well; None: there is none."""
    if first_bytes(path) not in SPREADSHEETS:
        if sheet is not None:
            raise UserInputError(f"{path.name} is a text table without sheets. Remove --sheet.")
        text = text_cells(path)
        at = _head_of(text.cells, chosen)
        if at is None:
            return long_form(path, text.cells, dict(chosen))
        header = text.cells[at]
        notes = (*text.notes, *_title_notes(text.cells[:at]))
        columns = tuple(name.strip() for name in header.cells)
        return TextTable(
            path, columns, text.delimiter, text.encoding, notes, (tuple(header.cells),), header.line
        ).with_repeated()
    names = sheet_names(path)
    if sheet is not None and sheet not in names:
        raise UnknownNameError.of("sheet", sheet, names)
    found: list[tuple[str, TextTable]] = []
    for name in [sheet] if sheet is not None else names:
        rows = read_sheet(path, name)
        at = _head_of(rows, chosen)
        table = None
        if at is None:
            try:
                table = long_form(path, rows, dict(chosen))
            except BadTableError as error:
                other = " Or name another sheet with --sheet." if len(names) > 1 else ""
                message = f"Sheet {name!r} of {path.name}: {error}{other}"
                raise BadTableError(message) from error
        else:
            columns = tuple(cell.strip() for cell in rows[at].cells)
            body = tuple(row for row in rows[at + 1 :] if any(map(str.strip, row.cells)))
            notes = tuple(_title_notes(rows[:at]))
            table = CellTable(path, columns, ",", "", notes, cells=body).with_repeated()
        if table is not None:
            found.append((name, table))
    if len(found) > 1:
        sheets = " and ".join(repr(name) for name, _ in found)
        raise BadTableError(
            f"{path.name} has plate maps on the sheets {sheets}. Choose one with --sheet NAME."
        )
    if not found:
        return None
    name, table = found[0]
    if len(names) > 1 and sheet is None:
        others = ", ".join(repr(other) for other in names if other != name)
        note = f"sheet {name!r} is read; {others} has no plate map"
        table = replace(table, notes=(note, *table.notes))
    return table


def columns_below_titles(path: Path, sheet: str | None = None) -> list[str]:
    """Return the columns of a table that is not understood, for its message.

    Where the first line has one cell it is a title: then the header is the longest line below it.
    """
    columns = [name for name in open_table(path, sheet=sheet, empty=True).columns if name]
    if len(columns) != 1:
        return columns
    sheets = first_bytes(path) in SPREADSHEETS
    rows = read_sheet(path, sheet or sheet_names(path)[0]) if sheets else text_cells(path).cells
    lines = ([cell.strip() for cell in row.cells if cell.strip()] for row in rows[:_LOOKED_AT])
    return max(lines, key=len, default=columns)


def _title_notes(rows: Sequence[TableRow]) -> Iterator[str]:
    texts = [" ".join(dict.fromkeys(filter(None, map(str.strip, row.cells)))) for row in rows]
    shown = [f"{text[:60]!r}" for text in texts if text]
    if shown:
        yield f"above the header, not used: {some_of(shown)}"


_TEMPLATE = (
    *("Well", "Compound", "Dose", "Unit", "Control", "Target", "Cell line", "Time (h)"),
    *("Replicate", "Batch"),
)


def write_template(path: Path) -> None:
    """Write an empty plate map of 96 wells as .xlsx.

    Raises:
        MissingExtraError: xlsxwriter is not installed.
        UserInputError: the file is there already, has another ending, or cannot be written.
    """
    if path.suffix.lower() != ".xlsx":
        raise UserInputError(f"A template ends with .xlsx, not {path.name}.")
    if path.exists():
        raise UserInputError(f"{path} is there already. Choose another name.")
    try:
        xlsxwriter = import_module("xlsxwriter")
    except ImportError as error:
        raise MissingExtraError.of("xlsxwriter", "excel") from error
    try:
        book = xlsxwriter.Workbook(str(path))
        sheet = book.add_worksheet("plate map")
        sheet.write_row(0, 0, _TEMPLATE)
        sheet.write_column(1, 0, [format_well(r, c) for r in range(1, 9) for c in range(1, 13)])
        book.close()
    except (OSError, xlsxwriter.exceptions.FileCreateError) as error:
        raise UserInputError(f"{path} cannot be written. Choose another folder.") from error
