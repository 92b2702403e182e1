"""Names of wells and of microscope files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UserInputError

ROWS, COLUMNS = 32, 48
"""Rows and columns of a 1536-well plate, the largest there is."""

PLANE_COLUMNS = (
    "Metadata_PlaneID",
    "Metadata_Plane",
    "Metadata_Z",
    "Metadata_ZIndex",
)
TIME_COLUMNS = (
    "Metadata_TimepointID",
    "Metadata_Timepoint",
    "Metadata_T",
    "Metadata_Time",
)
"""Columns with the plane and the time point of a field, as a whole number; the first that says it
counts."""

_REMEMBERED = 32_768
"""File names kept parsed: the same names come back with every plate (384 x 9 x 5 = 17,280)."""

_LETTERS = re.compile(r"([A-Z]{1,2})[\s_-]*([0-9]{1,2})", re.IGNORECASE | re.ASCII)
_NUMBERS = re.compile(r"r([0-9]{1,2})c([0-9]{1,2})", re.IGNORECASE | re.ASCII)
_DIGITS = re.compile(r"([0-9]{2})([0-9]{2})", re.ASCII)
_PHENIX = re.compile(
    r"(?P<core>r(?P<row>[0-9]{1,2})c(?P<column>[0-9]{1,2})f(?P<field>[0-9]{1,4}))"
    r"(?:p(?P<plane>[0-9]{1,4}))?"
    r"(?:-ch(?P<channel>[0-9]{1,3})(?:sk(?P<time>[0-9]{1,5}))?[0-9a-z]*)?"
    r"(?P<suffix>\.[a-z]{3,4})?",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class PhenixName:
    """The parts of an Opera Phenix file name; None where the name does not say.

    ``core`` is the core file name ('r01c01f01'), the same for all channels of a field.
    """

    core: str
    row: int
    column: int
    field: int
    plane: int | None
    channel: int | None
    time_point: int | None


@lru_cache(maxsize=4096)
def parse_well(text: str) -> tuple[int, int]:
    """Return (row, column), both from 1, of 'A01', 'A1', 'b7', 'C - 3', 'r01c01', '0101' or 'AA01'.

    Raises:
        UserInputError: the text is no well of a plate of up to 1536 wells.
    """
    name = text.strip()
    numbers = _NUMBERS.fullmatch(name) or _DIGITS.fullmatch(name)
    letters = _LETTERS.fullmatch(name)
    if numbers:
        row, column = int(numbers[1]), int(numbers[2])
    elif letters:
        row, column = _row_number(letters[1]), int(letters[2])
    else:
        row = column = 0
    if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
        raise UserInputError(f"{text!r} is not a well. Write wells like A01, P24 or r01c01.")
    return row, column


def format_well(row: int, column: int) -> str:
    """Return 'A01' for (1, 1) and 'AA01' for (27, 1).

    Raises:
        UserInputError: the numbers are not a well of a plate of up to 1536 wells.
    """
    if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
        raise UserInputError(
            f"Row {row}, column {column} is not a well. "
            f"Rows are 1 to {ROWS}, columns 1 to {COLUMNS}."
        )
    return f"{row_letters(row)}{column:02d}"


def row_letters(row: int) -> str:
    """Return 'A' for row 1, 'Z' for row 26, 'AA' for row 27."""
    if row <= 26:
        return chr(64 + row)
    return "A" + chr(64 + row - 26)


@lru_cache(maxsize=_REMEMBERED)
def core_file_name(name: str) -> PhenixName | None:
    """Return the parts of 'r01c01f01p01-ch3sk1fk1fl1.tiff' or 'r01c01f01'; None for other names."""
    match = _PHENIX.fullmatch(name)
    if match is None:
        return None
    row, column = int(match["row"]), int(match["column"])
    if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
        return None
    return PhenixName(
        core=match["core"].lower(),
        row=row,
        column=column,
        field=int(match["field"]),
        plane=_number(match["plane"]),
        channel=_number(match["channel"]),
        time_point=_number(match["time"]),
    )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _row_number(letters: str) -> int:
    number = 0
    for letter in letters.upper():
        number = number * 26 + ord(letter) - 64
    return number
