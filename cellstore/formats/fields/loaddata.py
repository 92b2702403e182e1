"""CellProfiler LoadData tables, as JUMP's pe2loaddata writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..records import ImageRecord, Refusal
from ..text.tables import TextTable
from .table import image_table


def read_loaddata(
    table: TextTable,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a LoadData table, one record or refusal per data row.

    Columns: ``FileName_Orig*`` or ``FileName_*``, ``PathName_*``, ``Metadata_Plate``,
    ``Metadata_Well`` (or ``Metadata_Row`` and ``Metadata_Col``), ``Metadata_Site``; optional
    ``Metadata_Batch`` and the treatment (``Metadata_pert_iname``, ``Metadata_target`` or
    ``Metadata_gene``, ``Metadata_broad_sample``, ``Metadata_control_type``). A channel whose
    file name is empty was not taken. Plane and time point are read from the first of
    ``names.PLANE_COLUMNS`` and ``names.TIME_COLUMNS`` that says it. ``Frame_*``: the page of a
    file, from 0; rows with a ``Series_*`` above 0 are refused. ``plate`` is needed only
    without ``Metadata_Plate``; ``channels`` gives a channel, by its Phenix number or its name
    here, another name.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
    """
    if plate is None:
        table.require("Metadata_Plate")
    return image_table(table, plate, batch, channels, needs_treatment=False).records()
