"""The index of an Opera Phenix or Operetta measurement, like ``Index.idx.xml``.

Harmony lists one element per file, well by well, and the channels of a field after each other.
Versions differ in their namespace and in where the names of the channels are: in each image
(to Harmony 5) or in a map before the images (from Harmony 6).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias
from xml.parsers import expat

from ..errors import BadTableError, UserInputError
from .filenames import core_file_name, format_well, is_safe_name, whole_number
from .image_files import pixel_size
from .image_tables import ChannelNames, FileRef, ImageRecord
from .tables import LONGEST, Refusal, RowRefusedError
from .uris import exists, join, writable

INDEX_NAME = re.compile(r"index(\..*)?\.xml", re.IGNORECASE)
"""Index.idx.xml, Index.xml, index.xml, Index.ref.xml: versions of Harmony differ."""

ROOT = "EvaluationInputData"

_CHUNK = 1 << 16
_MAX_TEXT = 4096
_LISTS = frozenset({("Plates", "Plate"), ("Map", "Entry"), ("Images", "Image")})
_WANTED = frozenset(
    {
        *("PlateID", "Name", "ChannelID", "ChannelName", "State", "URL"),
        *("Row", "Col", "FieldID", "PlaneID", "TimepointID"),
        *("ImageResolutionX", "ImageResolutionY"),
    }
)
_ABSOLUTE = re.compile(r"/|[a-z]:/|[a-z][a-z0-9+.-]+://", re.IGNORECASE | re.ASCII)


class _NotHarmonyError(Exception):
    """It is another document than a Harmony index, and in which way."""


_Element: TypeAlias = tuple[str, int, dict[str, str]]
"""A plate, channel or image of the index: its line, and its children's texts by name."""


def _is_index(file: Path) -> bool:
    parser = _IndexParser()
    try:
        with file.open("rb") as stream:
            parser.feed(stream.read(_CHUNK))
    except (OSError, ValueError, expat.ExpatError, _NotHarmonyError):
        return False
    return parser.is_inside


def index_of(path: Path) -> Path | None:
    """Return the index in a folder, in a subfolder (or its ``Images``), or above; or a file itself.

    Above it only where that is the index of the images in the folder. None if there is no index,
    or if several subfolders have one each.
    """
    if not path.is_dir():
        return path if _is_index(path) else None
    try:
        below = sorted(folder for folder in path.iterdir() if folder.is_dir())
    except OSError:
        return None
    if found := _index_in(path):
        return found
    deeper = [folder / "Images" for folder in below]
    indexes = [found for found in map(_index_in, below + deeper) if found]
    if len(indexes) == 1:
        return indexes[0]
    above = None if indexes else _index_in(path.resolve().parent)
    if above is not None:
        with suppress(UserInputError):  # a damaged index of others
            urls = (values.get("URL") for _, _, values in _elements(above))
            name = next((url for url in urls if url), "").replace("\\", "/").rpartition("/")[2]
            return above if name and (path / name).exists() else None
    return None


def _index_in(folder: Path) -> Path | None:
    try:
        names = [path for path in folder.iterdir() if INDEX_NAME.fullmatch(path.name)]
    except OSError:
        return None
    # Index.idx.xml is the one of the images where there are others beside it.
    names.sort(key=lambda path: ("idx" not in path.name.lower(), len(path.name), path.name))
    return next((path for path in names if path.is_file() and _is_index(path)), None)


def read_harmony(
    path: Path,
    plate: str | None = None,
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
    if file is None:
        raise BadTableError(
            f"{path} is not a Harmony index. Give the Index.idx.xml that lies beside the images."
        )
    names = ChannelNames(channels)
    plates: list[str] = []
    channel_names: dict[int, str] = {}
    pixel_sizes: dict[int, float] = {}
    own = file.resolve().parent
    root: str | None = None
    field: ImageRecord | None = None
    images = 0
    for name, line, values in _elements(file):
        if name == "Plate":
            written = values.get("PlateID") or values.get("Name")
            plates += [written] if written and written not in plates else []
            continue
        if name != "Image":
            text = values.get("ChannelID", "")
            if text.isascii() and text.isdigit() and len(text) < 7:
                if found := values.get("ChannelName"):
                    channel_names[int(text)] = found
                if size := _pixel_size(values):
                    pixel_sizes[int(text)] = size
            continue
        images += 1
        url = values.get("URL", "").replace("\\", "/")
        try:
            if values.get("State", "Ok").lower() != "ok":
                raise RowRefusedError("image was not taken", f"State is {values['State']!r}")
            image = url.rpartition("/")[2]
            if not is_safe_name(image) or len(image) > LONGEST:
                raise RowRefusedError("no image file", f"URL is {url[:100]!r}")
            if root is None and not _ABSOLUTE.match(url):
                # The images are beside the index, or in a folder below or beside it.
                below = sorted(folder for folder in own.iterdir() if folder.is_dir())
                folders = (own, own / "Images", own.parent / "Images", *below)
                root = next((item for item in folders if exists(str(item / url))), own).as_posix()
            row = _read_image(values, url, root or "", names, channel_names)
        except RowRefusedError as refused:
            yield Refusal(line, *refused.args)
            continue
        barcode = plate if plate is not None else plates[0] if len(plates) == 1 else None
        if barcode is None:
            several = f"several plates ({', '.join(plates[:3])})" if plates else "no plate"
            raise UserInputError(f"{file} names {several}. Name the plate with --plate.")
        (ref,) = row.files
        size = _pixel_size(values) or pixel_sizes.get(ref.number or 0)
        if field is not None and row[3:8] == field[3:8]:  # the same well, site, plane and time
            if any(ref.number == other.number for other in field.files):
                yield Refusal(line, "channel twice", f"{ref.name}: ch{ref.number}")
            else:
                field = field._replace(files=(*field.files, ref))
            continue
        if field is not None:
            yield field
        field = row._replace(line=line, plate=barcode, pixel_size=size)
    if not images:
        raise BadTableError(f"{file} lists no images. Export the measurement again.")
    if field is not None:
        yield field
    names.check_used()


def _read_image(
    values: Mapping[str, str],
    url: str,
    root: str,
    names: ChannelNames,
    channel_names: Mapping[int, str],
) -> ImageRecord:
    """Return the field of one file; what the element and the file name say must agree."""
    folder, _, file = url.rpartition("/")
    if _ABSOLUTE.match(url):
        folder = folder or "/"
    elif writable(root) != root:
        detail = f"{writable(root)}: not UTF-8, rename it"
        raise RowRefusedError("folder name not understood", detail)
    else:
        folder = posixpath.normpath(join(root, folder))
    name = core_file_name(file)
    number = _whole(values, "ChannelID", name.number if name else None)
    found = values.get("ChannelName") or channel_names.get(number) or f"ch{number}"
    channel = names.name(number, found)
    row = _whole(values, "Row", name.row if name else None)
    column = _whole(values, "Col", name.column if name else None)
    site = _whole(values, "FieldID", name.site if name else None)
    plane = _whole(values, "PlaneID", (name.plane if name else None) or 1)
    try:
        well = format_well(row, column)
    except UserInputError as error:
        raise RowRefusedError("not a well", str(error)) from error
    if name and (name.row, name.column) != (row, column):
        detail = f"{well}, {format_well(name.row, name.column)}"
        raise RowRefusedError("well and file name disagree", detail)
    if name and (name.site, name.plane or plane) != (site, plane):
        detail = f"field {site}, plane {plane}: {name.core_name}"
        raise RowRefusedError("field and file name disagree", detail)
    # TimepointID counts from 0, the file names (sk1) from 1.
    time_point = name.time_point if name else None
    if time_point is None:
        time_point = _whole(values, "TimepointID", 0) + 1
    core_name = name.core_name if name else None
    files = (FileRef(channel, number, file, folder),)
    return ImageRecord(0, "", None, row, column, site, plane, time_point, core_name, files, None)


def _pixel_size(values: Mapping[str, str]) -> float | None:
    """Return the micrometres per pixel; None where they are not given, or pixels not square."""
    names = ("ImageResolutionX", "ImageResolutionY")
    return pixel_size((values.get(name), values.get(name + "Unit", "m")) for name in names)


def _whole(values: Mapping[str, str], name: str, default: int | None) -> int:
    text = values.get(name, "")
    if not text and default is not None:
        return default
    number = whole_number(text)
    if number is None:
        raise RowRefusedError("not a whole number", f"{name} is {text[:50]!r}")
    return number


def _elements(path: Path) -> Iterator[_Element]:
    parser = _IndexParser()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield from parser.feed(chunk)
            yield from parser.feed(b"", final=True)
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error
    except expat.ExpatError as error:
        raise BadTableError(
            f"{path}, line {error.lineno}: {expat.ErrorString(error.code)}. "
            "Copy or export it again."
        ) from error
    except _NotHarmonyError as error:
        raise BadTableError(f"{path} is not a Harmony index: {error}.") from error


class _IndexParser:
    """Collects the wanted elements of an index while it is parsed, and forgets the rest.

    expat itself and not a tree: an index of a screen has millions of elements, errors need their
    line, and a DOCTYPE (whose entities can fill the memory) has to be refused.
    """

    def __init__(self) -> None:
        self.is_inside = False
        """Whether the root of the document was seen, and is that of an index."""
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
        self._parser.StartDoctypeDeclHandler = self._doctype

    def feed(self, data: bytes, *, final: bool = False) -> list[_Element]:
        """Parse on, and return the elements that have ended."""
        try:
            self._parser.Parse(data, final)
        except (LookupError, ValueError) as error:  # how an encoding is refused
            raise _NotHarmonyError(f"its encoding is not known ({error})") from error
        done, self._done = self._done, []
        return done

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition(":")[2]
        if not self._path and name != ROOT:
            raise _NotHarmonyError(f"it is a document of {name[:50]!r}")
        self.is_inside = True
        parent = self._path[-1] if self._path else None
        self._path.append(name)
        if self._open is None:
            if (parent, name) in _LISTS:
                values = {key: attributes[key] for key in attributes if key in _WANTED}
                self._open = name, self._parser.CurrentLineNumber, values
                self._depth = len(self._path) + 1
        elif len(self._path) == self._depth and name in _WANTED:
            self._text = []
            if "Unit" in attributes:
                self._open[2][name + "Unit"] = attributes["Unit"]

    def _characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data[:_MAX_TEXT])

    def _end(self, _tag: str) -> None:
        name, depth = self._path.pop(), len(self._path) + 1
        if self._open is None:
            return
        if self._text is not None and depth == self._depth:
            self._open[2][name] = "".join(self._text)[:_MAX_TEXT].strip()
            self._text = None
        elif depth < self._depth:
            self._done.append(self._open)
            self._open = None

    def _doctype(self, *_declaration: object) -> None:
        raise _NotHarmonyError("it has a DOCTYPE, which no microscope writes")
