"""The index of an Opera Phenix or Operetta measurement: ``Index.idx.xml``, ``Index.xml``.

Harmony lists one element per file, well by well, and the channels of a field after each other.
Versions differ in their namespace and in where the names of the channels are: in each image
(to Harmony 5) or in a map before the images (from Harmony 6).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from ..errors import BadTableError, UserInputError
from .filenames import PhenixName, core_file_name, format_well
from .image_files import is_safe_name
from .image_tables import ChannelNames
from .records import LONGEST, FileRef, ImageRecord, Refusal
from .uris import join, writable

INDEX_NAMES = ("Index.idx.xml", "Index.xml")
ROOT = "EvaluationInputData"

_CHUNK = 1 << 16
_MAX_TEXT = 4096
_MAX_NUMBER = 1_000_000
_FIRST = 1
_LISTS = frozenset({("Plates", "Plate"), ("Map", "Entry"), ("Images", "Image")})
_WANTED = frozenset(
    {
        *("PlateID", "Name", "ChannelID", "ChannelName", "State", "URL"),
        *("Row", "Col", "FieldID", "PlaneID", "TimepointID"),
    }
)
_ABSOLUTE = re.compile(r"/|[a-z]:/|[a-z][a-z0-9+.-]+://", re.IGNORECASE | re.ASCII)


class _RefusedError(Exception):
    """One image element cannot be used; becomes a ``Refusal``."""


class _NotHarmonyError(Exception):
    """It is another document than a Harmony index, and in which way."""


@dataclass(slots=True)
class _Element:
    """A plate, channel or image of the index: its line, and its children's texts by name."""

    name: str
    line: int
    values: dict[str, str]


class _Listed(NamedTuple):
    """One file of the index, and the field it is of."""

    line: int
    key: tuple[int, int, int, int, int]
    core_name: str | None
    file: FileRef


def is_harmony(path: Path) -> bool:
    """Tell an index, or a folder that has one (itself or in ``Images``), from other things."""
    try:
        file = index_of(path)
        if file is None or not file.is_file():
            return False
        with file.open("rb") as stream:
            return _root(stream.read(_CHUNK)) == ROOT
    except (OSError, ValueError):
        return False


def index_of(path: Path) -> Path | None:
    """Return the index in a folder or in its ``Images``, or None; a file is returned as it is."""
    if not path.is_dir():
        return path
    places = (folder / name for folder in (path, path / "Images") for name in INDEX_NAMES)
    return next((place for place in places if place.is_file()), None)


def read_harmony(
    path: Path,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the fields of a Harmony index, each with all its channels, in the order of the file.

    ``plate`` is used in place of the index's own ``PlateID``, which somebody typed at the
    microscope; ``channels`` renames by channel number or name. Planes and fields are numbered as
    in the index; time points as in the file names, from 1. A field that the index comes back to
    is yielded again, with the files that are new.

    Raises:
        BadTableError: no Harmony index, not well-formed, with a DOCTYPE, or without images.
        UnknownNameError: a channel to be renamed was not there, which is known at the end.
        UserInputError: the file cannot be read, or is of several plates or none and no ``plate``.
    """
    file = index_of(path)
    if file is None or not is_harmony(file):
        raise BadTableError(
            f"{path} is no Harmony index. Give the Index.idx.xml that lies beside the images."
        )
    return _Index(file, plate, batch, ChannelNames(channels)).records()


@dataclass
class _Index:
    path: Path
    plate: str | None
    batch: str | None
    names: ChannelNames
    _plates: list[str] = field(default_factory=list)
    _channels: dict[int, str] = field(default_factory=dict)
    _folder: str | None = None

    def records(self) -> Iterator[ImageRecord | Refusal]:
        group: list[_Listed] = []
        for item in self._images():
            if isinstance(item, Refusal):
                yield item
            elif group and item.key != group[0].key:
                yield self._record(group)
                group = [item]
            elif any(item.file.number == other.file.number for other in group):
                yield Refusal(item.line, "channel twice", f"{item.file.name}: ch{item.file.number}")
            else:
                group.append(item)
        if group:
            yield self._record(group)
        self.names.check_used()

    def _record(self, group: list[_Listed]) -> ImageRecord:
        first = group[0]
        row, column, site, plane, time_point = first.key
        return ImageRecord(
            line=first.line,
            plate=self._plate(),
            batch=self.batch,
            row=row,
            column=column,
            site=site,
            plane=plane,
            time_point=time_point,
            core_name=first.core_name,
            files=tuple(listed.file for listed in group),
            treatment=None,
        )

    def _plate(self) -> str:
        if self.plate is not None:
            return self.plate
        if len(self._plates) != 1:
            found = (
                f"several plates ({', '.join(self._plates[:3])})" if self._plates else "no plate"
            )
            raise UserInputError(f"{self.path} names {found}. Name the plate with --plate.")
        return self._plates[0]

    def _images(self) -> Iterator[_Listed | Refusal]:
        images = 0
        for element in _elements(self.path):
            if element.name == "Plate":
                self._add_plate(element)
            elif element.name == "Entry":
                self._add_channel(element)
            else:
                images += 1
                yield self._listed(element)
        if not images:
            raise BadTableError(f"{self.path} lists no images. Export the measurement again.")

    def _add_plate(self, element: _Element) -> None:
        plate = element.values.get("PlateID") or element.values.get("Name")
        if plate and plate not in self._plates:
            self._plates.append(plate)

    def _add_channel(self, element: _Element) -> None:
        number, name = element.values.get("ChannelID", ""), element.values.get("ChannelName")
        if name and number.isascii() and number.isdigit() and len(number) < 7:
            self._channels[int(number)] = name

    def _listed(self, element: _Element) -> _Listed | Refusal:
        try:
            return self._read(element)
        except _RefusedError as refused:
            reason, detail = refused.args
            return Refusal(element.line, reason, detail)

    def _read(self, element: _Element) -> _Listed:
        values = element.values
        if values.get("State", "Ok").lower() != "ok":
            raise _RefusedError("image was not taken", f"State is {values['State']!r}")
        folder, file = self._place(values.get("URL", ""))
        name = core_file_name(file)
        number = _whole(values, "ChannelID", name.channel if name else None)
        found = values.get("ChannelName") or self._channels.get(number) or f"ch{number}"
        channel = self.names.name(number, found)
        ref = FileRef(channel, number, file, folder)
        return _Listed(element.line, _key(values, name), name.core if name else None, ref)

    def _place(self, url: str) -> tuple[str, str]:
        url = url.replace("\\", "/")
        folder, _, name = url.rpartition("/")
        if not is_safe_name(name) or len(name) > LONGEST:
            raise _RefusedError("no image file", f"URL is {url[:100]!r}")
        if _ABSOLUTE.match(url):
            return folder or "/", name
        if self._folder is None:
            self._folder = _images_folder(self.path, url)
        if writable(self._folder) != self._folder:
            detail = f"{writable(self._folder)}: not UTF-8, rename it"
            raise _RefusedError("folder name not understood", detail)
        return posixpath.normpath(join(self._folder, folder)), name


def _images_folder(path: Path, url: str) -> str:
    """Return the folder that the index's images are relative to: its own, or Images beside it."""
    own = path.resolve().parent
    places = (own, own / "Images", own.parent / "Images")
    found = (place for place in places if _is_file(place / url))
    return next(found, own).as_posix()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _key(values: Mapping[str, str], name: PhenixName | None) -> tuple[int, int, int, int, int]:
    """Return row, column, field, plane, time point; what element and file name say must agree."""
    row = _whole(values, "Row", name.row if name else None)
    column = _whole(values, "Col", name.column if name else None)
    site = _whole(values, "FieldID", name.field if name else None)
    plane = _whole(values, "PlaneID", _FIRST if name is None else name.plane or _FIRST)
    _check_well(row, column)
    if name and (name.row, name.column) != (row, column):
        detail = f"{format_well(row, column)}, {format_well(name.row, name.column)}"
        raise _RefusedError("well and file name disagree", detail)
    if name and (name.field, name.plane or plane) != (site, plane):
        raise _RefusedError(
            "field and file name disagree", f"field {site}, plane {plane}: {name.core}"
        )
    if name and name.time_point is not None:
        return row, column, site, plane, name.time_point
    # TimepointID counts from 0, the file names (sk1) from 1.
    return row, column, site, plane, _whole(values, "TimepointID", 0) + 1


def _check_well(row: int, column: int) -> None:
    try:
        format_well(row, column)
    except UserInputError as error:
        raise _RefusedError("not a well", str(error)) from error


def _whole(values: Mapping[str, str], name: str, default: int | None) -> int:
    text = values.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) <= _MAX_NUMBER):
        raise _RefusedError("not a whole number", f"{name} is {text[:50]!r}")
    return int(text)


def _elements(path: Path) -> Iterator[_Element]:
    collector = _Collector()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield from collector.feed(chunk)
            yield from collector.feed(b"", final=True)
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error
    except expat.ExpatError as error:
        raise BadTableError(
            f"{path}, line {error.lineno}: {expat.ErrorString(error.code)}. "
            "Copy or export it again."
        ) from error
    except _NotHarmonyError as error:
        raise BadTableError(f"{path} is no Harmony index: {error}.") from error


def _root(head: bytes) -> str | None:
    collector = _Collector()
    try:
        collector.feed(head)
    except (expat.ExpatError, _NotHarmonyError):
        return None
    return collector.root


class _Collector:
    """Collects the wanted elements of an index while it is parsed, and forgets the rest."""

    def __init__(self) -> None:
        self.root: str | None = None
        self._done: list[_Element] = []
        self._path: list[str] = []
        self._open: _Element | None = None
        self._depth = 0
        self._text: list[str] | None = None
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.StartDoctypeDeclHandler = _refuse_doctype

    def feed(self, data: bytes, *, final: bool = False) -> Iterable[_Element]:
        """Parse on, and return the elements that have ended."""
        try:
            self._parser.Parse(data, final)
        except (LookupError, ValueError) as error:  # how an encoding is refused
            raise _NotHarmonyError(f"its encoding is not known ({error})") from error
        done, self._done = self._done, []
        return done

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition(":")[2]
        parent = self._path[-1] if self._path else None
        if parent is None:
            self._check_root(name)
        self._path.append(name)
        if self._open is None:
            if (parent, name) in _LISTS:
                values = {key: attributes[key] for key in attributes if key in _WANTED}
                self._open = _Element(name, self._parser.CurrentLineNumber, values)
                self._depth = len(self._path) + 1
        elif len(self._path) == self._depth and name in _WANTED:
            self._text = []

    def _check_root(self, name: str) -> None:
        if name != ROOT:
            raise _NotHarmonyError(f"it is a document of {name[:50]!r}")
        self.root = name

    def _characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data[:_MAX_TEXT])

    def _end(self, _tag: str) -> None:
        name, depth = self._path.pop(), len(self._path) + 1
        if self._open is None:
            return
        if self._text is not None and depth == self._depth:
            self._open.values[name] = "".join(self._text)[:_MAX_TEXT].strip()
            self._text = None
        elif depth < self._depth:
            self._done.append(self._open)
            self._open = None


def _refuse_doctype(*_declaration: object) -> None:
    raise _NotHarmonyError("it has a DOCTYPE, which no microscope writes")
