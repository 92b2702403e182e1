"""Which shape a table of images has, told from its columns."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from ..errors import BadTableError, UserInputError
from .imagetable import FILE_PREFIX
from .loaddata import read_loaddata
from .published import read_published
from .records import ImageRecord, Refusal
from .tables import TextTable, nearest_columns, open_table

_NEEDS = (
    "A published table has FileName_OrigRNA and Metadata_pert_iname; a LoadData table has "
    "FileName_Orig<channel>, Metadata_Plate, Metadata_Well and Metadata_Site."
)


class Layout(StrEnum):
    """The shapes of image tables that can be read."""

    PUBLISHED = "published"
    LOADDATA = "loaddata"


def detect_layout(path: Path) -> Layout:
    """Tell which shape the table at ``path`` has.

    Raises:
        BadTableError: neither shape; the message says what each needs.
        UserInputError: the file cannot be read.
    """
    return layout_of(open_table(path))


def layout_of(table: TextTable) -> Layout:
    """Tell which shape an opened table has; a table with plate and well is LoadData.

    Raises:
        BadTableError: neither shape.
    """
    columns = set(table.columns)
    has_files = any(column.startswith(FILE_PREFIX) for column in columns)
    has_well = "Metadata_Well" in columns or {"Metadata_Row", "Metadata_Col"} <= columns
    if has_files and "Metadata_Plate" in columns and has_well:
        return Layout.LOADDATA
    if has_files and "Metadata_pert_iname" in columns:
        return Layout.PUBLISHED
    if has_files and has_well:
        return Layout.LOADDATA
    wanted = ["FileName_OrigRNA", "Metadata_pert_iname", "Metadata_Plate", "Metadata_Well"]
    absent = [column for column in wanted if column not in columns]
    raise BadTableError(
        f"{table.path.name} is no table of images that can be read. {_NEEDS} "
        f"{nearest_columns(absent, table.columns)}"
    )


def read_images(
    table: TextTable,
    layout: Layout | None = None,
    plate: str | None = None,
    batch: str | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a table of either shape (``layout`` None: told from the columns).

    Raises:
        BadTableError: a column is missing.
        UserInputError: a table without ``Metadata_Plate`` and no ``plate``.
    """
    layout = layout or layout_of(table)
    if plate is None and "Metadata_Plate" not in table.columns:
        raise UserInputError(
            f"{table.path.name} does not say which plate it is. Name it with --plate."
        )
    if layout is Layout.LOADDATA:
        return read_loaddata(table, plate, batch)
    return read_published(table, plate, batch)
