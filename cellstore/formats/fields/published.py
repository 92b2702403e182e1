"""The table of the published study: one projected image per row, named by core file name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..records import ImageRecord, Refusal
from ..text.tables import TextTable
from .table import image_table


def read_published(
    table: TextTable,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a published-style table, one record or refusal per data row.

    Columns: ``FileName_OrigRNA`` (or another ``FileName_*``), ``Metadata_pert_iname``, optional
    ``Metadata_target``. Well and site come from the core file name (``r01c01f01`` is field 1 of
    A01). A row without treatment is refused: the study has none. ``plate`` is needed only
    without ``Metadata_Plate``; ``channels`` renames, by Phenix number or by name.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
    """
    table.require("Metadata_pert_iname", *([] if plate else ["Metadata_Plate"]))
    return image_table(table, plate, batch, channels, needs_treatment=True).records()
