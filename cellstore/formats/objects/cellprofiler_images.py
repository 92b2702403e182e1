"""Rows of CellProfiler's image tables: which plate, well and field each image is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import UserInputError
from ...terms import Perturbation
from ..fields.foldernames import cellomics_name, wellsite_name
from ..files.images import is_safe_name
from ..names import PLANE_COLUMNS, TIME_COLUMNS, PhenixName, core_file_name, format_well, parse_well
from ..records import FileRef, ImageRecord, Refusal, TreatmentRecord
from ..treatments.cells import TREATMENT_COLUMNS, treatment_of

FILE, FOLDER, METADATA = "FileName_", "PathName_", "Metadata_"
_ORIGINAL = "Orig"
_DRAWN = re.compile(r"Illum|Outline|Overlay", re.IGNORECASE)
_MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "<NA>", "None"})
_LARGEST = 1_000_000

_SITE_FOLDER = re.compile(r"(?P<plate>.+)-(?P<well>[A-Z]{1,2}[0-9]{1,2})-(?P<site>[0-9]+)")

WELLS = ("Metadata_Well", "Metadata_well")
SITES = ("Metadata_Site", "Metadata_site", "Metadata_FieldID", "Metadata_Field")
PLATES = ("Metadata_Plate", "Metadata_plate", "Metadata_Barcode", "Metadata_PlateBarcode")
ROWS, COLUMNS = ("Metadata_Row",), ("Metadata_Col", "Metadata_Column")
PLANES, TIMES = PLANE_COLUMNS, TIME_COLUMNS
BATCHES = ("Metadata_Batch",)
NEEDED = frozenset(
    {*WELLS, *SITES, *PLATES, *ROWS, *COLUMNS, *PLANES, *TIMES, *BATCHES, *TREATMENT_COLUMNS}
    | {"Metadata_CoreName"}
)
"""The columns (without ``Image_``) that say which image it is and what was done to it."""

NO_PLATE = "no plate"
"""Reason of a row that does not say which plate it is of."""

Values = Mapping[str, str | None]


class _RefusedError(Exception):
    """The row is no image; becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.refusal = (reason, detail)


@dataclass(frozen=True)
class _Said:
    """What the names of the files, or of the folder of the table, say.

    ``scan`` is a number of the instrument: the plate, if nothing else says which it is.
    """

    well: tuple[int, int] | None
    site: int | None
    phenix: PhenixName | None
    plate: str | None = None
    scan: str | None = None


def plain_column(column: str) -> str:
    """Return the name of a column of an image table without the prefix ``Image_``."""
    return column.removeprefix("Image_")


def is_needed(column: str) -> bool:
    """Whether a column (without ``Image_``) is read to know which image a row is."""
    return column in NEEDED or column.startswith((FILE, FOLDER))


def channels_of(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the channels that ``FileName_*`` columns name; flat fields and drawings are none.

    Where there are ``FileName_Orig*`` columns, only these are images.
    """
    named = [name.removeprefix(FILE) for name in columns if name.startswith(FILE)]
    images = [name for name in named if not _DRAWN.search(name)]
    original = [name for name in images if name.startswith(_ORIGINAL)]
    return tuple(original or images)


def image_record(
    line: int,
    values: Values,
    channels: Sequence[str],
    plate: str | None = None,
    folder: str | None = None,
) -> ImageRecord | Refusal:
    """Return the image of one row; ``values`` by column without ``Image_``.

    What the columns say goes before what the file names say, and that before the name of the
    ``folder`` of the table (``<plate>-<well>-<site>``).
    """
    try:
        return _record(line, values, channels, plate, folder)
    except _RefusedError as refused:
        return Refusal(line, *refused.refusal)


def _record(
    line: int, values: Values, channels: Sequence[str], plate: str | None, folder: str | None
) -> ImageRecord:
    files = tuple(_files(values, channels))
    said = _said(files, folder)
    well = _well(values, said)
    agrees = said.phenix is not None and (said.phenix.row, said.phenix.column) == well
    return ImageRecord(
        line=line,
        plate=_plate(values, said, plate),
        batch=_first(values, BATCHES),
        row=well[0],
        column=well[1],
        site=_site(values, said),
        plane=_number_or_1(values, PLANES),
        time_point=_number_or_1(values, TIMES),
        core_name=_core_name(values, said) if agrees else _first(values, ("Metadata_CoreName",)),
        files=files,
        treatment=_treatment(values),
    )


def _treatment(values: Values) -> TreatmentRecord | None:
    """Return the treatment of a row; pycytominer's ``pert_type`` may name its kind."""

    def get(*columns: str) -> str | None:
        return _first(values, columns)

    found = treatment_of(get)
    kind = (get("Metadata_pert_type") or "").lower()
    if found is None or kind not in list(Perturbation):
        return found
    return replace(found, kind=Perturbation(kind))


def disagreement(record: ImageRecord) -> str | None:
    """Return what is odd where a file name of a record says another well than its columns."""
    for file in record.files:
        name = core_file_name(file.name)
        if name is not None and (name.row, name.column) != (record.row, record.column):
            written = format_well(record.row, record.column)
            return f"well {written}, file {file.name}"
    return None


def _files(values: Values, channels: Sequence[str]) -> Iterable[FileRef]:
    for channel in channels:
        name = _first(values, (FILE + channel,))
        if name is None:
            continue
        if not is_safe_name(name):
            raise _RefusedError("file name with a folder in it", f"{channel}: {name!r}")
        phenix = core_file_name(name)
        plain = channel.removeprefix(_ORIGINAL) or channel
        number = phenix.channel if phenix else None
        yield FileRef(plain, number, name, _first(values, (FOLDER + channel,)))


def _said(files: Sequence[FileRef], folder: str | None) -> _Said:
    for file in files:
        phenix = core_file_name(file.name)
        if phenix is not None:
            return _Said((phenix.row, phenix.column), phenix.field, phenix)
    for file in files:
        name = cellomics_name(file.name) or wellsite_name(file.name)
        if name is not None:
            return _Said((name.row, name.column), name.site, None, None, name.plate)
    match = _SITE_FOLDER.fullmatch(folder or "")
    if match is not None and (well := _parsed(match["well"])):
        return _Said(well, int(match["site"]), None, match["plate"])
    return _Said(None, None, None)


def _parsed(text: str) -> tuple[int, int] | None:
    try:
        return parse_well(text)
    except UserInputError:
        return None


def _well(values: Values, said: _Said) -> tuple[int, int]:
    text = _first(values, WELLS)
    row, column = _first(values, ROWS), _first(values, COLUMNS)
    if text is None and row and column:
        text = f"r{row}c{column}" if row.isdigit() else f"{row}{column}"
    if text is None:
        if said.well is None:
            raise _RefusedError("no well", "neither a well column nor a file name with a well")
        return said.well
    found = _parsed(text)
    if found is None:
        raise _RefusedError("not a well", f"{text!r}: write wells like A01")
    return found


def _site(values: Values, said: _Said) -> int:
    site = _whole(values, SITES)
    site = said.site if site is None else site
    if site is None:
        raise _RefusedError("no site", "neither Metadata_Site nor a file name with a field")
    return site


def _plate(values: Values, said: _Said, plate: str | None) -> str:
    written = _first(values, PLATES) or said.plate
    if written and plate and written != plate:
        raise _RefusedError("another plate", f"plate {written}, not {plate}")
    found = written or plate or said.scan
    if found is None:
        raise _RefusedError(NO_PLATE, "nothing says which plate it is; name it with --plate")
    return found


def _core_name(values: Values, said: _Said) -> str | None:
    written = _first(values, ("Metadata_CoreName",))
    return written or (said.phenix.core if said.phenix else None)


def _number_or_1(values: Values, columns: Sequence[str]) -> int:
    written = _whole(values, columns)
    return 1 if written is None else written


def _first(values: Values, columns: Iterable[str]) -> str | None:
    for column in columns:
        text = (values.get(column) or "").strip()
        if text not in _MISSING:
            return text
    return None


def _whole(values: Values, columns: Iterable[str]) -> int | None:
    text = _first(values, columns)
    if text is None:
        return None
    digits = text.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and int(digits) <= _LARGEST):
        raise _RefusedError("not a whole number", f"{next(iter(columns))} is {text!r}")
    return int(digits)
