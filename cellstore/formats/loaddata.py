"""CellProfiler LoadData tables, as JUMP's pe2loaddata writes them."""

from __future__ import annotations

from collections.abc import Iterator

from .imagetable import ImageTable, image_channels
from .records import ImageRecord, Refusal
from .tables import TextTable


def read_loaddata(
    table: TextTable, plate: str | None = None, batch: str | None = None
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a LoadData table, one record or refusal per data row.

    Columns: ``FileName_Orig*`` or ``FileName_*``, ``PathName_*``, ``Metadata_Plate``,
    ``Metadata_Well`` (or ``Metadata_Row`` and ``Metadata_Col``), ``Metadata_Site``; optional
    ``Metadata_Batch`` and the treatment (``Metadata_pert_iname``, ``Metadata_target`` or
    ``Metadata_gene``, ``Metadata_broad_sample``, ``Metadata_control_type``). A channel whose
    file name is empty was not taken. ``plate`` is needed only without ``Metadata_Plate``.

    Raises:
        BadTableError: a column is missing.
    """
    if plate is None:
        table.require("Metadata_Plate")
    channels = image_channels(table)
    return ImageTable(table, channels, plate, batch, needs_treatment=False).records()
