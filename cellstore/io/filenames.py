"""What the file names of microscopes say: plate, well, field, channel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..enums import PROJECTION_CHANNEL
from ..errors import UserInputError
from .tables import LONGEST

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

_UNSAFE = re.compile(r"[/\\\0:\n\r]")
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
        row, column = 0, int(letters[2])
        for letter in letters[1].upper():
            row = row * 26 + ord(letter) - 64
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
    letters = chr(64 + row) if row <= 26 else "A" + chr(64 + row - 26)
    return f"{letters}{column:02d}"


def is_safe_name(name: str) -> bool:
    """Whether ``name`` is one file name, and no path to somewhere else."""
    return name not in {"", ".", ".."} and _UNSAFE.search(name) is None


PHENIX, CELLOMICS, WELLSITE, PATTERN = (
    "phenix-folder",
    "cellomics-folder",
    "wellsite-folder",
    "pattern-folder",
)

MAX_PATH = 1024
"""Longer paths, and names longer than ``LONGEST``, are not matched: a person's pattern may take
very long on them."""

_MAX_NUMBER = 1_000_000
_SCAN_ID = re.compile(r"(?<![0-9])[0-9]{12}(?![0-9])", re.ASCII)
_MASK = re.compile(
    r"(?:^|[^a-z])masks?(?:[^a-z]|$)|[_-]labels?[0-9]*\.|_seg\.", re.IGNORECASE | re.ASCII
)
_SUFFIX = r"(?:\.ome)?\.[a-z]{3,4}"
_CELLOMICS = re.compile(
    r"(?P<prefix>.+)_(?P<well>[A-Z]{1,2}[0-9]{2})f(?P<field>[0-9]{1,4})d(?P<channel>[0-9]{1,2})"
    + _SUFFIX,
    re.IGNORECASE | re.ASCII,
)
_WELLSITE = re.compile(
    r"(?P<well>[A-Z]{1,2}[0-9]{1,2})_-?[0-9]{1,3}_(?P<channel>[0-9]{1,3})_(?P<site>[0-9]{1,4})"
    r"(?:Z(?P<plane>[0-9]{1,4}))?_(?P<stain>[^_]{1,60})_(?P<time>[0-9]{1,5})" + _SUFFIX,
    re.IGNORECASE | re.ASCII,
)
_GROUPS = {
    "plate": "plate",
    "well": "well",
    "row": "row",
    "col": "column",
    "column": "column",
    "site": "site",
    "field": "site",
    "channel": "channel",
    "stain": "stain",
    "plane": "plane",
    "z": "plane",
    "time": "time",
}


class ImageName(NamedTuple):
    """What a file name says; None where it does not. Row and column from 1, the rest as written.

    ``channel`` is the name of the channel as found, ``number`` its number where they count from 1,
    ``core_name`` the core file name ('r01c01f01'), the same for all channels of a field.
    """

    plate: str | None
    row: int
    column: int
    site: int
    plane: int | None = None
    time_point: int | None = None
    channel: str | None = None
    number: int | None = None
    core_name: str | None = None


NameReader = Callable[[str], ImageName | None]
"""Reads a file name; None where it is not understood."""


@lru_cache(maxsize=_REMEMBERED)
def core_file_name(name: str) -> ImageName | None:
    """Read 'r01c01f01p01-ch3sk1fk1fl1.tiff' (channel 'ch3') or 'r01c01f01', with a suffix or not.

    What names no channel is a projection of all.
    """
    match = _PHENIX.fullmatch(name)
    if match is None:
        return None
    row, column = int(match["row"]), int(match["column"])
    if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
        return None
    number = None if match["channel"] is None else int(match["channel"])
    return ImageName(
        plate=None,
        row=row,
        column=column,
        site=int(match["field"]),
        plane=None if match["plane"] is None else int(match["plane"]),
        time_point=None if match["time"] is None else int(match["time"]),
        channel=PROJECTION_CHANNEL if number is None else f"ch{number}",
        number=number,
        core_name=match["core"].lower(),
    )


def phenix_name(name: str) -> ImageName | None:
    """Read the name of an image file of Phenix: as :func:`core_file_name`, but with a suffix."""
    return core_file_name(name.replace(".ome.", ".")) if "." in name else None


def cellomics_name(name: str) -> ImageName | None:
    """Read 'AS_09047_050428030001_O01f00d2.TIF': plate 050428030001, O01, field 0, channel d2.

    The plate is the number of twelve digits that a scan gets, else all before the well.
    """
    match = _CELLOMICS.fullmatch(name)
    well = _well(match["well"]) if match else None
    if match is None or well is None:
        return None
    scans = _SCAN_ID.findall(match["prefix"])
    plate = scans[-1] if scans else match["prefix"]
    return ImageName(plate, *well, int(match["field"]), channel=f"d{int(match['channel'])}")


def wellsite_name(name: str) -> ImageName | None:
    """Read 'B7_01_1_3_DAPI_001.tif': B7, first read, channel 1, site 3, DAPI, time point 1.

    A plane, where there is one, is written 'B7_01_1_3Z2_DAPI_001.tif'.
    """
    match = _WELLSITE.fullmatch(name)
    well = _well(match["well"]) if match else None
    if match is None or well is None:
        return None
    return ImageName(
        None,
        *well,
        int(match["site"]),
        plane=None if match["plane"] is None else int(match["plane"]),
        time_point=int(match["time"]),
        channel=match["stain"],
        number=int(match["channel"]) or None,
    )


READERS: Mapping[str, NameReader] = {
    PHENIX: phenix_name,
    CELLOMICS: cellomics_name,
    WELLSITE: wellsite_name,
}
"""How the names of each layout are read; those of ``pattern-folder`` need a pattern."""


class NamePattern:
    """A person's regular expression for file names, searched for in each.

    Its named groups are plate, well (or row and col), site or field, channel, stain, plane or z,
    time; upper case is the same. Without a site, there is one per well. A pattern with a '/' is
    matched against the path below the folder.

    Raises:
        UserInputError: it is no regular expression, has unknown groups, or names no well.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._expression = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserInputError(
                f"The pattern {pattern[:100]!r} is no regular expression ({error}). "
                r"Write it like (?P<well>[A-P]\d\d)_s(?P<site>\d+)_w(?P<channel>\d)."
            ) from error
        names = self._expression.groupindex
        unknown = sorted(name for name in names if name.lower() not in _GROUPS)
        if unknown:
            raise UserInputError(
                f"The pattern has the group {unknown[0]!r}. Known groups: {', '.join(_GROUPS)}."
            )
        self._groups = {number: _GROUPS[name.lower()] for name, number in names.items()}
        parts = set(self._groups.values())
        if "well" not in parts and not {"row", "column"} <= parts:
            raise UserInputError(
                f"The pattern {pattern[:100]!r} names no well. "
                r"Add a group (?P<well>...), or (?P<row>...) and (?P<col>...)."
            )

    @property
    def wants_path(self) -> bool:
        """Whether the path below the folder is matched, not the name alone."""
        return "/" in self.pattern

    def __call__(self, name: str) -> ImageName | None:
        """Read a name.

        Raises:
            UserInputError: a part of it is no well or no whole number.
        """
        if len(name) > (MAX_PATH if self.wants_path else LONGEST):
            return None
        match = self._expression.search(name)
        if match is None:
            return None
        parts = {key: match[group] for group, key in self._groups.items() if match[group]}
        well = parts.get("well")
        if well is None:
            row, column = parts.get("row", ""), parts.get("column", "")
            well = f"r{row}c{column}" if _is_number(row) else f"{row}{column}"
        channel = parts.get("channel")
        number = int(channel) if channel and _is_number(channel) else None
        found = channel if number is None else f"ch{number}"
        site = _part(parts, "site")
        return ImageName(
            parts.get("plate"),
            *parse_well(well),
            1 if site is None else site,
            _part(parts, "plane"),
            _part(parts, "time"),
            parts.get("stain") or found,
            number or None,
        )


def looks_like_a_mask(name: str) -> bool:
    """Tell masks by what their makers add to the names of images: Mask, _cp_masks, _label."""
    return "Mask" in name or _MASK.search(name) is not None


def _part(parts: Mapping[str, str], name: str) -> int | None:
    text = parts.get(name)
    if text is not None and not _is_number(text):
        raise UserInputError(f"{name} is {text[:50]!r}, not a whole number. Correct the pattern.")
    return None if text is None else int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 8 and int(text) <= _MAX_NUMBER


def _well(text: str) -> tuple[int, int] | None:
    try:
        return parse_well(text)
    except UserInputError:
        return None
