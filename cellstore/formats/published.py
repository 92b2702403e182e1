"""The table of the published study: one projected image per row, named by core file name."""

from __future__ import annotations

from collections.abc import Iterator

from .imagetable import ImageTable, image_channels
from .records import ImageRecord, Refusal
from .tables import TextTable


def read_published(
    table: TextTable, plate: str | None = None, batch: str | None = None
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a published-style table, one record or refusal per data row.

    Columns: ``FileName_OrigRNA`` (or another ``FileName_*``), ``Metadata_pert_iname``, optional
    ``Metadata_target``. Well and site come from the core file name (``r01c01f01`` is field 1 of
    A01). A row without treatment is refused: the study has none. ``plate`` is needed only
    without ``Metadata_Plate``.

    Raises:
        BadTableError: a column is missing.
    """
    table.require("Metadata_pert_iname", *([] if plate else ["Metadata_Plate"]))
    channels = image_channels(table)
    return ImageTable(table, channels, plate, batch, needs_treatment=True).records()
