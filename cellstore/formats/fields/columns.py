"""The columns of a table of images: which are channels, and what the cells of a row say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from ...errors import BadTableError
from ..records import Refusal
from ..text.tables import TextTable, cell_text, nearest_columns

FILE_PREFIX = "FileName_"
FOLDER_PREFIX = "PathName_"
FRAME_PREFIX, SERIES_PREFIX = "Frame_", "Series_"
ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

_MAX_NUMBER = 1_000_000


class RowRefusedError(Exception):
    """One row cannot be used. Never leaves this package: it becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel by the name that its files get, and the columns of its file and folder names.

    ``frame`` and ``series`` are CellProfiler's columns for the page of a file, from 0, and for
    the image of a file that holds several. ``paged``: some frame of the channel is above 0.
    """

    name: str
    file: str
    folder: str | None
    frame: str | None = None
    series: str | None = None
    paged: bool = False


@dataclass(frozen=True, slots=True)
class Cells:
    """Some cells of a row, by the name of their column; missing values are None."""

    cells: Sequence[str]
    places: Mapping[str, int]

    def get(self, *columns: str) -> str | None:
        """Return the first of the columns that is there and has a value."""
        return next((text for _, text in self._said(columns)), None)

    def whole(self, *columns: str) -> int | None:
        """Return the value as a whole number; '3.0', as pandas writes integers, is 3."""
        column, text = next(self._said(columns), ("", None))
        if text is None:
            return None
        digits = text.removesuffix(".0")
        significant = digits.lstrip("0") or "0"
        if digits.isascii() and digits.isdigit() and len(significant) <= len(str(_MAX_NUMBER)):
            number = int(significant)
            if number <= _MAX_NUMBER:
                return number
        raise RowRefusedError("not a whole number", f"{column} is {text[:50]!r}")

    def _said(self, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
        for column in columns:
            text = cell_text(self.cells, self.places.get(column))
            if text is not None:
                yield column, text


class ColumnGroup:
    """Those of ``columns`` that a table has; ``pick`` takes their cells out of a row at once."""

    def __init__(self, table: TextTable, columns: Sequence[str]) -> None:
        found = {column: table.position(column) for column in dict.fromkeys(columns)}
        present = {column: place for column, place in found.items() if place is not None}
        self.pick = _picker(tuple(present.values()))
        self._places = {column: number for number, column in enumerate(present)}

    def __len__(self) -> int:
        return len(self._places)

    def named(self, picked: tuple[str, ...]) -> Cells:
        """Return picked cells by the names of their columns."""
        return Cells(picked, self._places)


def image_channels(table: TextTable) -> tuple[Channel, ...]:
    """Return the image channels of a table in the order of its columns.

    Where there are ``FileName_Orig*`` columns, only these are images; flat fields
    (``FileName_Illum*``) never are.

    Raises:
        BadTableError: there is no such column, or two of them are one channel.
    """
    names = [column for column in table.columns if column.startswith(FILE_PREFIX)]
    original = [name for name in names if name.startswith(FILE_PREFIX + ORIGINAL)]
    chosen = original or [name for name in names if not name.startswith(FILE_PREFIX + "Illum")]
    if not chosen:
        raise BadTableError(
            f"{table.path.name} names no images: it has no column FileName_Orig<channel>. "
            f"{nearest_columns([FILE_PREFIX + 'OrigDNA'], table.columns)}"
        )
    table.require(*chosen)
    channels = tuple(_channel(table, column) for column in chosen)
    _check_distinct(table, channels)
    return _with_pages(table, channels)


def _check_distinct(table: TextTable, channels: tuple[Channel, ...]) -> None:
    names = [channel.name.lower() for channel in channels]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise BadTableError(
            f"{table.path.name} has two FileName columns for the channel {', '.join(repeated)}. "
            "Remove or rename the one that is not meant."
        )


def _channel(table: TextTable, column: str) -> Channel:
    suffix = column.removeprefix(FILE_PREFIX)
    name = suffix.removeprefix(ORIGINAL) or suffix
    beside = (prefix + suffix for prefix in (FOLDER_PREFIX, FRAME_PREFIX, SERIES_PREFIX))
    folder, frame, series = (item if item in table.columns else None for item in beside)
    return Channel(name, column, folder, frame, series)


def _with_pages(table: TextTable, channels: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """Return the channels, those ``paged`` that have a frame above 0 anywhere in the table.

    The first plane of a stack has the frame 0, as all files of one page have.
    """
    waiting = {channel.frame for channel in channels if channel.frame}
    paged: set[str | None] = set()
    group = ColumnGroup(table, [column for column in waiting if column])
    rows = (row for row in table.rows() if not isinstance(row, Refusal)) if waiting else ()
    for row in rows:
        cells = group.named(group.pick(row.cells))
        paged |= {column for column in waiting if column and _is_later(cells.get(column))}
        waiting -= paged
        if not waiting:
            break
    return tuple(replace(channel, paged=channel.frame in paged) for channel in channels)


def _is_later(frame: str | None) -> bool:
    return frame is not None and frame.strip("0.") != ""


def _picker(places: Sequence[int]) -> Callable[[Sequence[str]], tuple[str, ...]]:
    if not places:
        return lambda _cells: ()
    if len(places) == 1:
        return lambda cells: (cells[places[0]],)
    return itemgetter(*places)
