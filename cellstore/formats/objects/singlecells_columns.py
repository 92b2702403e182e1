"""Which column of a table of single cells is what, by the habits of CytoTable and pycytominer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import BadTableError
from .cellprofiler_columns import COMPARTMENTS, is_feature
from .cellprofiler_images import ROWS, WELLS, is_needed
from .model import Place

EXCLUDED = "Metadata_Excluded"

_LABELS = (
    "Metadata_ObjectNumber",
    *(
        form.format(role)
        for role in COMPARTMENTS
        for form in (
            "Metadata_{}_Number_Object_Number",
            "{}_Number_Object_Number",
            "Metadata_{}_ObjectNumber",
            "{}_ObjectNumber",
            "Metadata_Cytoplasm_Parent_{}",
            "Cytoplasm_Parent_{}",
        )
    ),
    "ObjectNumber",
)
_IMAGE_KEYS = ("Metadata_ImageNumber", "ImageNumber", "Metadata_TableNumber", "TableNumber")
_OWN_PLACE = {
    "min_row": "Metadata_MinRow",
    "min_col": "Metadata_MinCol",
    "max_row": "Metadata_MaxRow",
    "max_col": "Metadata_MaxCol",
    "centroid_row": "Metadata_CentroidRow",
    "centroid_col": "Metadata_CentroidCol",
}
_BOX = {
    "min_row": "AreaShape_BoundingBoxMinimum_Y",
    "min_col": "AreaShape_BoundingBoxMinimum_X",
    "max_row": "AreaShape_BoundingBoxMaximum_Y",
    "max_col": "AreaShape_BoundingBoxMaximum_X",
}
_CENTRES = ("AreaShape_Center", "Location_Center")
_MERGED = re.compile(r"_[xy]$")
_NO_FEATURE = re.compile(
    r"Metadata_.*|Image_.*|ImageNumber|ObjectNumber|TableNumber|cell_id|"
    r"__index_level_\d+__|Unnamed: \d+|"
)


@dataclass(frozen=True)
class SingleCellColumns:
    """The columns of a table of single cells.

    ``image`` maps names of CellProfiler's image table to columns, ``keys`` are those that tell
    images apart.
    """

    label: str
    image: Mapping[str, str]
    keys: tuple[str, ...]
    features: tuple[str, ...]
    place: Place
    excluded: str | None

    @property
    def of_image(self) -> tuple[str, ...]:
        """All columns that say something about the image of a cell."""
        return tuple(dict.fromkeys([*self.keys, *self.image.values()]))


def looks_like_single_cells(columns: Sequence[str]) -> bool:
    """Whether a table has a label, an image and a measurement per row."""
    if _label(columns) is None or not any(_is_measure(name) for name in columns):
        return False
    said = set(_image_columns(columns))
    return bool(said & {*WELLS, *ROWS} or any(name.startswith("FileName_") for name in said))


def sort_columns(columns: Sequence[str], where: str) -> SingleCellColumns:
    """Tell what each column is.

    Raises:
        BadTableError: no column has the number of the cell, or none measures anything.
    """
    label = _label(columns)
    features = tuple(name for name in columns if _is_measure(name))
    if label is None or not features:
        what = "no column with the number of the cell (Metadata_ObjectNumber)"
        raise BadTableError(f"{where} has {what if label is None else 'no column of features'}.")
    image = _image_columns(columns)
    about = [name for plain, name in image.items() if plain.startswith("Metadata_")]
    keys = [name for name in _IMAGE_KEYS if name in columns]
    files = [name for plain, name in image.items() if plain.startswith("FileName_")]
    place = _place(set(columns))
    excluded = EXCLUDED if EXCLUDED in columns else None
    return SingleCellColumns(
        label, image, tuple(dict.fromkeys([*keys, *about, *files])), features, place, excluded
    )


def objects_of(features: Sequence[str]) -> tuple[str, ...]:
    """Return the compartments that features are named after."""
    first = {name.partition("_")[0] for name in features}
    return tuple(role for role in COMPARTMENTS if role in first)


def _label(columns: Sequence[str]) -> str | None:
    present = set(columns)
    return next((name for name in _LABELS if name in present), None)


def _is_measure(column: str) -> bool:
    if _NO_FEATURE.fullmatch(column) or not is_feature(column):
        return False
    owner, _, measure = column.partition("_")
    return owner not in COMPARTMENTS or is_feature(measure)


def _image_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return columns of images by their plain name; ``_x`` and ``_y`` are what a merge left."""
    found: dict[str, str] = {}
    for column in columns:
        for plain in (column, column.removeprefix("Image_")):
            for name in (plain, _MERGED.sub("", plain)):
                if is_needed(name):
                    found.setdefault(name, column)
    return found


def _place(present: set[str]) -> Place:
    own = {key: name for key, name in _OWN_PLACE.items() if name in present}
    if own:
        return own
    for role in COMPARTMENTS:
        found = _place_of(present, role)
        if found:
            return found
    return {}


def _place_of(present: set[str], role: str) -> dict[str, str]:
    box = {key: f"{role}_{name}" for key, name in _BOX.items() if f"{role}_{name}" in present}
    found = box if len(box) == len(_BOX) else {}
    for prefix in (role, f"Metadata_{role}"):
        for centre in _CENTRES:
            names = {"centroid_row": f"{prefix}_{centre}_Y", "centroid_col": f"{prefix}_{centre}_X"}
            if present.issuperset(names.values()):
                return {**found, **names}
    return found
