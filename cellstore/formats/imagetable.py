"""What the two shapes of image tables have in common: one data row is one field of view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import BadTableError, UserInputError
from ..terms import Control, Perturbation
from .images import is_safe_name
from .names import PhenixName, core_file_name, format_well, parse_well
from .records import FileRef, ImageRecord, Refusal, TreatmentRecord
from .tables import TableRow, TextTable, cell_text, nearest_columns

FILE_PREFIX = "FileName_"
FOLDER_PREFIX = "PathName_"
ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

DMSO = "DMSO"
_FIRST = 1
_MAX_NUMBER = 1_000_000
_KINDS = {kind.value: kind for kind in Perturbation}


class RowRefusedError(Exception):
    """One row cannot be used. Never leaves this package: it becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Channel:
    """The columns of one channel: its name, the place of its file name and of its folder."""

    name: str
    file: int
    folder: int | None


@dataclass(frozen=True, slots=True)
class Cells:
    """A row with its columns by name; missing values are None."""

    row: TableRow
    places: Mapping[str, int]

    def get(self, *columns: str) -> str | None:
        """Return the first of the columns that is there and has a value."""
        for column in columns:
            text = cell_text(self.row.cells, self.places.get(column))
            if text is not None:
                return text
        return None

    def whole(self, *columns: str) -> int | None:
        """Return the value as a whole number; '3.0', as pandas writes integers, is 3."""
        text = self.get(*columns)
        if text is None:
            return None
        digits = text.removesuffix(".0")
        if not (digits.isascii() and digits.isdigit() and int(digits) <= _MAX_NUMBER):
            raise RowRefusedError("not a whole number", f"{columns[0]} is {text!r}")
        return int(digits)


@dataclass(frozen=True, slots=True)
class ImageTable:
    """How to read one table of images.

    ``plate`` and ``batch`` are used where the table does not say; rows of another plate than
    ``plate`` are refused. ``needs_treatment``: a row without one is refused.
    """

    table: TextTable
    channels: tuple[Channel, ...]
    plate: str | None
    batch: str | None
    needs_treatment: bool

    def records(self) -> Iterator[ImageRecord | Refusal]:
        """Yield one record or refusal per data row, in the order of the file."""
        places = {column: place for place, column in enumerate(self.table.columns)}
        for row in self.table.rows():
            yield row if isinstance(row, Refusal) else self._read(Cells(row, places))

    def _read(self, cells: Cells) -> ImageRecord | Refusal:
        try:
            return self._record(cells)
        except RowRefusedError as refused:
            return Refusal(cells.row.line, refused.reason, refused.detail)

    def _record(self, cells: Cells) -> ImageRecord:
        files, names = _files(cells, self.channels)
        name = _common_name(names)
        row, column = _well(cells, name)
        return ImageRecord(
            line=cells.row.line,
            plate=self._plate(cells),
            batch=cells.get("Metadata_Batch") or self.batch,
            row=row,
            column=column,
            site=_site(cells, name),
            plane=_plane(cells, name),
            time_point=_time_point(cells, name),
            core_name=name.core if name else None,
            files=files,
            treatment=self._treatment(cells),
        )

    def _plate(self, cells: Cells) -> str:
        written = cells.get("Metadata_Plate")
        if written and self.plate and written != self.plate:
            raise RowRefusedError("another plate", f"plate {written}, not {self.plate}")
        plate = written or self.plate
        if plate is None:
            raise RowRefusedError("no plate", "Metadata_Plate is empty")
        return plate

    def _treatment(self, cells: Cells) -> TreatmentRecord | None:
        treatment = treatment_of(cells)
        if treatment is None and self.needs_treatment:
            raise RowRefusedError("no treatment", "Metadata_pert_iname is empty")
        return treatment


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
    channels = tuple(_channel(table, column) for column in chosen)
    _check_distinct(table, channels)
    return channels


def _check_distinct(table: TextTable, channels: tuple[Channel, ...]) -> None:
    names = [channel.name.lower() for channel in channels]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise BadTableError(
            f"{table.path.name} has two FileName columns for the channel {', '.join(repeated)}. "
            "Remove or rename the one that is not meant."
        )


def treatment_of(cells: Cells) -> TreatmentRecord | None:
    """Return the treatment that a row of an image table names, or None."""
    name = cells.get("Metadata_pert_iname")
    if name is None:
        return None
    return TreatmentRecord(
        kind=_kind(cells),
        pert_iname=name,
        target=cells.get("Metadata_target", "Metadata_gene", "Metadata_target_list"),
        control=control_of(cells.get("Metadata_control_type"), name),
        identifier=cells.get("Metadata_broad_sample"),
        inchikey=cells.get("Metadata_InChIKey"),
        smiles=cells.get("Metadata_smiles"),
        pubchem_cid=cells.get("Metadata_pubchem_cid"),
    )


def control_of(control_type: str | None, pert_iname: str) -> Control | None:
    """Return the role that JUMP's ``control_type`` gives; DMSO is always a negative control.

    'poscon_cp', 'poscon_diverse' and 'poscon_orf' are positive controls.
    """
    if pert_iname.upper() == DMSO:
        return Control.NEGATIVE
    text = (control_type or "").lower()
    if text.startswith("poscon"):
        return Control.POSITIVE
    return Control.NEGATIVE if text.startswith("negcon") else None


def _kind(cells: Cells) -> Perturbation:
    written = cells.get("Metadata_perturbation", "Metadata_Perturbation", "Metadata_modality")
    return _KINDS.get((written or "").lower(), Perturbation.COMPOUND)


def _channel(table: TextTable, column: str) -> Channel:
    suffix = column.removeprefix(FILE_PREFIX)
    name = suffix.removeprefix(ORIGINAL) or suffix
    file = table.columns.index(column)
    return Channel(name, file, table.position(FOLDER_PREFIX + suffix))


def _files(
    cells: Cells, channels: tuple[Channel, ...]
) -> tuple[tuple[FileRef, ...], list[PhenixName]]:
    """Return the files of a row, and what those with a Phenix name say."""
    files: list[FileRef] = []
    names: list[PhenixName] = []
    for channel in channels:
        text = cell_text(cells.row.cells, channel.file)
        if text is None:
            continue
        if not is_safe_name(text):
            raise RowRefusedError("file name with a folder in it", f"{channel.name}: {text!r}")
        name = core_file_name(text)
        names += [name] if name else []
        folder = cell_text(cells.row.cells, channel.folder)
        files.append(FileRef(channel.name, name.channel if name else None, text, folder))
    if not files:
        raise RowRefusedError("no image file", "every FileName column is empty")
    return tuple(files), names


def _common_name(names: list[PhenixName]) -> PhenixName | None:
    """Return what the Phenix names of all channels agree on; None without any such name."""
    for name in names[1:]:
        if not _is_same_field(name, names[0]):
            detail = f"{name.core} beside {names[0].core}"
            raise RowRefusedError("files of different fields", detail)
    return names[0] if names else None


def _is_same_field(one: PhenixName, other: PhenixName) -> bool:
    written = (one.core, one.plane, one.time_point) == (other.core, other.plane, other.time_point)
    return written or _field(one) == _field(other)


def _field(name: PhenixName) -> tuple[int, ...]:
    plane, time_point = _first_known(name.plane), _first_known(name.time_point)
    return name.row, name.column, name.field, plane, time_point


def _well(cells: Cells, name: PhenixName | None) -> tuple[int, int]:
    written = _written_well(cells)
    if written is None and name is None:
        raise RowRefusedError("no well", "neither a well column nor a file name like r01c01f01")
    if written and name and written != (name.row, name.column):
        detail = f"well {format_well(*written)}, file of {format_well(name.row, name.column)}"
        raise RowRefusedError("well and file name disagree", detail)
    if written is not None:
        return written
    assert name is not None
    return name.row, name.column


def _written_well(cells: Cells) -> tuple[int, int] | None:
    text = cells.get("Metadata_Well")
    row, column = cells.get("Metadata_Row"), cells.get("Metadata_Col", "Metadata_Column")
    if text is None and row and column:
        text = f"r{row}c{column}" if row.isdigit() else f"{row}{column}"
    if text is None:
        return None
    try:
        return parse_well(text)
    except UserInputError as error:
        raise RowRefusedError("not a well", str(error)) from error


def _site(cells: Cells, name: PhenixName | None) -> int:
    site = cells.whole("Metadata_Site", "Metadata_FieldID")
    if site is None and name is not None:
        return name.field
    if site is None:
        raise RowRefusedError("no site", "neither Metadata_Site nor a file name like r01c01f01")
    return site


def _plane(cells: Cells, name: PhenixName | None) -> int:
    written = cells.whole("Metadata_PlaneID", "Metadata_Plane")
    return _first_known(written, name.plane if name else None)


def _time_point(cells: Cells, name: PhenixName | None) -> int:
    written = cells.whole("Metadata_TimepointID", "Metadata_Timepoint")
    return _first_known(written, name.time_point if name else None)


def _first_known(written: int | None, named: int | None = None) -> int:
    if written is not None:
        return written
    return _FIRST if named is None else named
