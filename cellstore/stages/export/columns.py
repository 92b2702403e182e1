"""The columns of an export: pycytominer's names, and what each is read from."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from ...errors import UserInputError
from .choice import Exported

IMAGE_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("Metadata_Plate", pa.string()),
    ("Metadata_Batch", pa.string()),
    ("Metadata_Well", pa.string()),
    ("Metadata_Site", pa.int64()),
    ("Metadata_Plane", pa.int64()),
    ("Metadata_Timepoint", pa.int64()),
    ("Metadata_CoreName", pa.string()),
    ("Metadata_pert_type", pa.string()),
    ("Metadata_pert_iname", pa.string()),
    ("Metadata_target", pa.string()),
    ("Metadata_control_type", pa.string()),
    ("Metadata_broad_sample", pa.string()),
    ("Metadata_InChIKey", pa.string()),
    ("Metadata_smiles", pa.string()),
    ("Metadata_pubchem_cid", pa.string()),
    ("Metadata_ImageNumber", pa.int64()),
)
"""What all cells of an image share."""

CELL_COLUMNS: tuple[tuple[str, str, pa.DataType], ...] = (
    ("Metadata_ObjectNumber", "label", pa.int64()),
    ("Metadata_MinRow", "min_row", pa.int64()),
    ("Metadata_MinCol", "min_col", pa.int64()),
    ("Metadata_MaxRow", "max_row", pa.int64()),
    ("Metadata_MaxCol", "max_col", pa.int64()),
    ("Metadata_CentroidRow", "centroid_row", pa.float64()),
    ("Metadata_CentroidCol", "centroid_col", pa.float64()),
    ("Metadata_Excluded", "excluded", pa.string()),
)
"""Name, column of table ``cells``, type."""

_TYPES = {"int64": pa.int64(), "string": pa.string()}


def file_columns(channels: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (name, channel, what of it: ``name`` or ``folder``) of the columns of files."""
    names = [(f"Image_FileName_{channel}", channel, "name") for channel in channels]
    return names + [(f"Image_PathName_{channel}", channel, "folder") for channel in channels]


def schema_of(exported: Exported, channels: Sequence[str]) -> pa.Schema:
    """Return the schema of the export.

    Raises:
        UserInputError: a feature has the name of one of the other columns.
    """
    fields = [pa.field(name, kind) for name, kind in IMAGE_COLUMNS]
    fields += [pa.field(name, kind) for name, _, kind in CELL_COLUMNS]
    fields += [pa.field(name, pa.string()) for name, _, _ in file_columns(channels)]
    taken = {field.name for field in fields}
    clash = [name for _, name in exported.features if name in taken]
    if clash:
        raise UserInputError(
            f"The feature {clash[0]!r} has the name of a column that says what a cell is. "
            "Ingest the features again with that column named otherwise."
        )
    kinds = feature_types(exported)
    return pa.schema([*fields, *(pa.field(name, kinds[key]) for key, name in exported.features)])


def feature_types(exported: Exported) -> dict[str, pa.DataType]:
    """Return the type of each feature, by its name in the store."""
    if not exported.in_files:
        return {name: pa.float64() for name, _ in exported.features}
    assert exported.feature_set is not None
    columns = exported.feature_set.columns
    return {item["name"]: _TYPES.get(str(item["dtype"]), pa.float64()) for item in columns}
