"""What the file names of microscopes say: plate, well, field, channel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ..enums import PROJECTION_CHANNEL
from ..errors import UserInputError
from .tables import LONGEST, RowRefusedError

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
_NUMBERS = re.compile(r"r0?([0-9]{1,2})c0?([0-9]{1,2})", re.IGNORECASE | re.ASCII)
_DIGITS = re.compile(r"0([0-9]{2})0([0-9]{2})|([0-9]{2})([0-9]{2})", re.ASCII)
_QUARTER = re.compile(r"([A-P][0-9]{1,2})\.([ab])([12])", re.IGNORECASE | re.ASCII)
"""Wells of a plate of 1536 that are named by the wells of one of 384, four in each: A01.a1."""
_PHENIX = re.compile(
    r"(?P<core>r(?P<row>[0-9]{1,3})c(?P<column>[0-9]{1,3})f(?P<field>[0-9]{1,4}))"
    r"(?:p(?P<plane>[0-9]{1,4}))?"
    r"(?:-ch(?P<channel>[0-9]{1,3})(?:sk(?P<time>[0-9]{1,5}))?[0-9a-z]*)?"
    r"(?P<suffix>\.[a-z]{3,4})?",
    re.IGNORECASE | re.ASCII,
)


@lru_cache(maxsize=4096)
def parse_well(text: str) -> tuple[int, int]:
    """Return (row, column), both from 1, of 'A01', 'A1', 'b7', 'C - 3', 'r01c01', '0101' or 'AA01'.

    'A01.b2' is one of the four wells of a 1536-well plate that lie where 384 wells have A01: B02.

    Raises:
        UserInputError: the text is no well of a plate of up to 1536 wells.
    """
    name = text.strip()
    if quarter := _QUARTER.fullmatch(name):
        row, column = parse_well(quarter[1])
        row, column = 2 * row - "ba".index(quarter[2].lower()), 2 * column - 2 + int(quarter[3])
    elif numbers := _NUMBERS.fullmatch(name) or _DIGITS.fullmatch(name):
        row, column = (int(number) for number in numbers.groups() if number is not None)
    elif letters := _LETTERS.fullmatch(name):
        row, column = 0, int(letters[2])
        for letter in letters[1].upper():
            row = row * 26 + ord(letter) - 64
    else:
        row = column = 0
    if not (1 <= row <= ROWS and 1 <= column <= COLUMNS):
        raise UserInputError(f"{text!r} is not a well. Write wells like A01, P24 or r01c01.")
    return row, column


def join_well(row: str, column: str) -> str:
    """Return the well of a row ('B' or a number) and a column: '002' and '1.0' are numbers, too."""
    row, column = (text.strip().removesuffix(".0").lstrip("0") or "0" for text in (row, column))
    return f"r{row}c{column}" if row.isdigit() else f"{row}{column}"


def written_well(well: str | None, row: str | None, column: str | None) -> tuple[int, int] | None:
    """Return the well that a row of a table names: by its name, else by row and column."""
    if well is None and row and column:
        well, row, column = join_well(row, column), None, None
    try:
        found = None if well is None else parse_well(well)
    except UserInputError as error:
        raise RowRefusedError("not a well", str(error)) from error
    if found and (row or column):
        with suppress(UserInputError):  # what is no row or column differs, too
            if parse_well(join_well(row or str(found[0]), column or str(found[1]))) == found:
                return found
        named = [f"row {row}"] * bool(row) + [f"column {column}"] * bool(column)
        detail = f"well {well}, but {' and '.join(named)}"
        raise RowRefusedError("well and row or column disagree", detail)
    return found


def format_well(row: int, column: int) -> str:
    """Return 'A01' for (1, 1) and 'AA01' for (27, 1)."""
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


MAX_PATH = 1024
"""Longer paths, and names longer than ``LONGEST``, are not matched: a person's pattern may take
very long on them."""

_MAX_NUMBER = 1_000_000
_MASK = re.compile(
    r"(?:^|[^a-z])masks?(?:[^a-z]|$)|[_-]labels?[0-9]*\.|_seg\.", re.IGNORECASE | re.ASCII
)
_THUMBNAIL = re.compile(
    r"(?:^|[^a-z])thumb(?:nail)?s?(?:[^a-z]|$|[0-9a-f]{8}-)", re.IGNORECASE | re.ASCII
)
_CORRECTION = re.compile(r"[DS]C_.+_C(?:AM|H)[0-9]+\.(?:tiff?|png)", re.IGNORECASE | re.ASCII)
"""Dark and bright fields that Yokogawa puts beside its images, like DC_sCMOS_#1_CAM1.tif."""
_DURATION = re.compile(r"([0-9]{2})d([0-9]{2})h([0-9]{2})m", re.ASCII)
_GROUPS = {
    **{name: name for name in ("plate", "well", "row", "column", "site", "channel", "stain")},
    "plane": "plane",
    "time": "time",
    "col": "column",
    "field": "site",
    "z": "plane",
}
"""The groups that a pattern may have, and what each is."""


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


class NamePattern:
    """A person's regular expression for file names, searched for in each.

    Its named groups are plate, well (or row and col), site or field, channel, stain, plane or z,
    time; upper case is the same. Without a site, there is one per well. A pattern with a '/' is
    matched against the path below the folder.

    Raises:
        UserInputError: it is not a regular expression, has unknown groups, or names no well.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._expression = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserInputError(
                f"The pattern {pattern[:100]!r} is not a regular expression ({error}). "
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
        """Read a name."""
        if len(name) > (MAX_PATH if self.wants_path else LONGEST):
            return None
        match = self._expression.search(name)
        if match is None:
            return None
        parts = {key: match[group] for group, key in self._groups.items() if match[group]}
        well = parts.get("well")
        if well is None:
            well = join_well(parts.get("row", ""), parts.get("column", ""))
        channel = parts.get("channel")
        number = whole_number(channel) if channel else None
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

    def explain(self, name: str) -> str:
        """Say how far the pattern matches a name that it does not match, and where it stops."""
        ends: list[tuple[int, str]] = [(0, "")]
        opened: list[str] = []
        for token in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]|[()]", self.pattern, re.DOTALL):
            if token[0] == "(":
                group = re.match(r"\(\?P<(\w+)>", self.pattern[token.start() :])
                opened.append(group[1] if group else "")
            elif token[0] == ")" and (group_name := opened.pop()):
                ends.append((token.end(), group_name))
        ends.append((len(self.pattern), ""))
        for (end, _), (next_end, group_name) in reversed(list(pairwise(ends))):
            with suppress(re.error):  # the group is inside another one
                match = re.search(self.pattern[:end], name[:MAX_PATH])
                if match is None:
                    continue
                wanted = f"{group_name or 'end'}, {self.pattern[end:next_end]}"
                if not end:
                    return f"nothing in the name matches the {wanted}"
                rest = name[match.end() :]
                on = f"the name goes on with {rest[:60]!r}" if rest else "the name ends there"
                return (
                    f"the pattern matches {match[0][-40:]!r}, where the {wanted}, should follow, "
                    f"but {on}"
                )
        return "the pattern does not match it"


_QUARTER_WELL = r"[A-P][0-9]{2}\.[ab][12]"
_WELL = f"(?P<well>{_QUARTER_WELL}|[A-Z]{{1,2}}[0-9]{{2}})"
_GUID = "[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}"
_INCELL_END = (
    r"(?: wix [0-9]+)?(?: z (?P<plane>[0-9]+))?"
    r"(?: ?-? ?time (?P<time>[0-9]+)(?: ?- ?[0-9]+ ?ms)?)?\)"
)

MICROSCOPES: Mapping[str, tuple[str, ...]] = {
    "Yokogawa CV7000, CV8000": (
        # A plate that nobody named has the name of its kind.
        (
            f"(?:AssayPlate_.+|(?P<plate>.+))_{_WELL}_T(?P<time>[0-9]{{4}})F(?P<site>[0-9]{{3,4}})"
            "L[0-9]{2,}A[0-9]{2,}Z(?P<plane>[0-9]{2,})C(?P<channel>[0-9]{2,})"
        ),
    ),
    "ImageXpress": (
        (
            f"(?:(?P<plate>.+)_)?{_WELL}(?=_[sw][0-9])(?:_s(?P<site>[0-9]{{1,4}}))?"
            f"(?:_w(?P<channel>[0-9]{{1,2}}?))?(?:_?{_GUID})?"
        ),
    ),
    "InCell": tuple(
        r"(?:(?P<plate>.+)_)?(?P<row>[A-P]) - (?P<column>[0-9]{1,3})\(fld (?P<site>[0-9]+)"
        + stain
        + _INCELL_END
        # Filters for excitation and emission; of one name, where that says all.
        for stain in (r" wv (?P<stain>[^()]+) - (?P=stain)", r"(?: wv (?P<stain>[^()]+?))?")
    ),
    "Cellomics, CellInsight": tuple(
        f"{plate}_{_WELL}f(?P<site>[0-9]{{1,4}})(?P<stain>d[0-9]{{1,2}})"
        # The number of twelve digits that a scan gets is the plate, else all before the well.
        for plate in ("(?:.+_)?(?P<plate>[0-9]{12})", "(?P<plate>.+)")
    ),
    "Cytation, Lionheart (Gen5)": (
        (
            rf"(?P<well>{_QUARTER_WELL}|[A-Z]{{1,2}}[0-9]{{1,2}})"
            r"_-?[0-9]{1,3}_(?P<channel>[0-9]{1,3})_(?P<site>[0-9]{1,4})"
            r"(?:Z(?P<plane>[0-9]{1,4}))?_(?P<stain>[^_]{1,60})_(?P<time>[0-9]{1,5})"
        ),
    ),
    "Opera": ("(?P<row>[0-9]{3})(?P<column>[0-9]{3})(?P<site>[0-9]{3})",),
    "Incucyte": (
        (
            rf"(?P<plate>.+)_(?P<well>{_QUARTER_WELL}|[A-P][0-9]{{1,2}})_(?P<site>[0-9]{{1,4}})"
            r"(?:_(?P<time>[0-9]{2}d[0-9]{2}h[0-9]{2}m))?"
        ),
    ),
}
"""How microscopes name the files of their exports, without the suffix; the first that fits counts.

Names of Phenix and Operetta, the most frequent ones, come before: :func:`core_file_name`.
"""

_EXPRESSIONS = [
    NamePattern(rf"(?ai)^{pattern}(?:\.ome)?\.[a-z0-9]{{3,4}}$")
    for patterns in MICROSCOPES.values()
    for pattern in patterns
]


def microscope_name(name: str) -> ImageName | None:
    """Read a file name as the microscopes write them, with a suffix."""
    if "." not in name:
        return None
    if found := core_file_name(name.replace(".ome.", ".")):
        return found
    for read in _EXPRESSIONS:
        with suppress(UserInputError):  # Z99 is no well
            if found := read(name):
                return found
    return None


def kind_beside_images(folder: str, name: str) -> str | None:
    """Say what a file is that microscopes write beside their images; None for an image."""
    if _THUMBNAIL.search(name) or _THUMBNAIL.search(folder):
        return "thumbnails"
    return "images for correction" if _CORRECTION.fullmatch(name) else None


def looks_like_a_mask(name: str) -> bool:
    """Tell masks by what their makers add to the names of images: Mask, _cp_masks, _label."""
    return "Mask" in name or _MASK.search(name) is not None


def _part(parts: Mapping[str, str], name: str) -> int | None:
    text = parts.get(name)
    if text is not None and (duration := _DURATION.fullmatch(text)):
        days, hours, minutes = map(int, duration.groups())
        return (days * 24 + hours) * 60 + minutes
    number = None if text is None else whole_number(text)
    if text is not None and number is None:
        raise UserInputError(f"{name} is {text[:50]!r}, not a whole number. Correct the pattern.")
    return number


def whole_number(text: str) -> int | None:
    """Return a number that is written in digits, up to a million; None where it is none."""
    significant = text.lstrip("0") or text[-1:]
    if not (text.isascii() and text.isdigit() and len(significant) < 8):
        return None
    return number if (number := int(significant)) <= _MAX_NUMBER else None
