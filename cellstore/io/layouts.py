"""Recognises a source by its content: a table of images, plate maps, features, a folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Self

from ..errors import BadTableError, UserInputError, some_of
from . import image_files
from .image_tables import FILE_PREFIX, URL_PREFIX
from .map_shapes import MapColumns, columns_below_titles, open_map
from .platemaps import map_table
from .tables import open_table
from .treatments import PREFIX

_OTHERS = (
    "A table of images (LoadData) needs FileName_Orig<channel>, Metadata_Plate, Metadata_Well and "
    "Metadata_Site, or, as a published table, FileName_OrigRNA and Metadata_pert_iname; a table of "
    "treatments broad_sample and pert_iname or gene; a table of single cells Metadata_Plate, "
    "Metadata_Well and features."
)
_XML = re.compile(rb"(\xef\xbb\xbf)?\s*<")
_TABLE_SUFFIXES = (
    *(".txt", ".csv", ".tsv", ".txt.gz", ".csv.gz", ".tsv.gz"),
    *(".xlsx", ".xls", ".ods"),
)
_LOOKED_AT = 50
_MANY = 50
"""So many columns beside those about the well are measurements, whatever their names."""


class SourceKind(StrEnum):
    """What a source brings."""

    IMAGES = "images"
    TREATMENTS = "treatments"
    FEATURES = "features"
    MASKS = "masks"


class Layout(StrEnum):
    """The shapes of sources that can be read, and what a source of each shape brings."""

    kind: SourceKind

    def __new__(cls, value: str, kind: SourceKind = SourceKind.IMAGES) -> Self:
        """Make a layout of a word and of what a source of it brings."""
        layout = str.__new__(cls, value)
        layout._value_, layout.kind = value, kind
        return layout

    PUBLISHED = "published"
    LOADDATA = "loaddata"
    HARMONY = "harmony"
    IMAGE_FOLDER = "image-folder"
    PLATEMAP = "platemap", SourceKind.TREATMENTS
    TREATMENT_TABLE = "treatment-table", SourceKind.TREATMENTS
    JUMP_PLATES = "jump-plates", SourceKind.TREATMENTS
    CELLPROFILER_CSV = "cellprofiler-csv", SourceKind.FEATURES
    CELLPROFILER_SQLITE = "cellprofiler-sqlite", SourceKind.FEATURES
    SINGLE_CELLS = "single-cells", SourceKind.FEATURES
    MASKS = "masks", SourceKind.MASKS


def detect(
    path: Path,
    kind: SourceKind | None = None,
    sheet: str | None = None,
    map_columns: Sequence[tuple[str, str]] = (),
) -> Layout:
    """Tell from its content which layout a file or folder has; ``kind`` leaves only its layouts.

    ``sheet`` and ``map_columns`` are what a user says of a plate map, which they make of a table.

    A table of images that also names treatments is a table of images, and a folder with a Harmony
    index is read through the index. Masks are never guessed: they are images like others.

    Raises:
        BadTableError: it has none of the known layouts, or holds several kinds; the message says
            what was looked for, what is there, and how to choose.
        OSError: it is not there or may not be read.
    """
    if kind is SourceKind.MASKS:
        return Layout.MASKS
    head = b""
    if path.is_dir():
        found = _of_folder(path)
    else:
        with path.open("rb") as stream:
            head = stream.read(512)
        # Each reader is imported where it may be needed: some are slow to import.
        if head.startswith(image_files.SQLITE):
            from .cellprofiler_sqlite import is_cellprofiler_sqlite

            found = [Layout.CELLPROFILER_SQLITE] if is_cellprofiler_sqlite(path) else []
        elif _XML.match(head):
            from .harmony import index_of

            found = [] if index_of(path) is None else [Layout.HARMONY]
        else:
            try:
                columns = open_table(path, whole=False).columns
            except BadTableError:
                if open_map(path) is None:
                    raise
                columns = ()  # a map begins with something else
            found, measured = table_layouts(columns)
            if any("Object" in name or "Parent" in name for name in columns):
                from .single_cells import is_single_cells

                found += [Layout.SINGLE_CELLS] if is_single_cells(path) else []
            of_treatments = all(item.kind is SourceKind.TREATMENTS for item in found)
            if measured and of_treatments and kind is not SourceKind.TREATMENTS:
                raise BadTableError(
                    f"{path.name} holds well profiles, without a row for each cell, which "
                    "cellstore does not store: ingest the table of single cells that they were "
                    "made from."
                )
            if sheet is not None or map_columns:
                map_table(path, sheet, map_columns)
                found = [Layout.PLATEMAP]
            elif not found and open_map(path) is not None:
                found = [Layout.PLATEMAP]
    chosen = [item for item in found if kind is None or item.kind is kind]
    if kind is None and any(item.kind is SourceKind.IMAGES for item in found):
        # A plate map may lie beside the images, and a table of images may name treatments.
        chosen = [item for item in chosen if item.kind is not SourceKind.TREATMENTS]
    kinds = list(dict.fromkeys(item.kind.value for item in chosen))
    if len(kinds) > 1:
        commands = (f"cellstore ingest {kind} {shlex.quote(str(path))}" for kind in kinds)
        raise BadTableError(
            f"{path.name} holds {' and '.join(kinds)}. Run: {', or: '.join(commands)}"
        )
    if chosen:
        return chosen[0]  # Harmony's index goes before the names of its images
    if found:
        named = " or ".join(f"{item.value} ({item.kind.value})" for item in found)
        raise BadTableError(f"{path} looks like {named}, not {kind}. Name another kind, or none.")
    raise _unknown(path, head)


def table_layouts(columns: Sequence[str]) -> tuple[list[Layout], bool]:
    """Return the layouts of images and treatments that a table with these columns may have.

    And whether it measures wells.
    """
    present = set(columns)
    about = (PREFIX, "Image_", FILE_PREFIX, "PathName_")
    measures = [name for name in columns if not name.startswith(about)]
    of_cells = any(name.startswith(("Cells_", "Nuclei_", "Cytoplasm_")) for name in measures)
    of_wells = present & {f"{PREFIX}Well", f"{PREFIX}well", f"{PREFIX}well_position"}
    measured = bool(of_wells) and (of_cells or len(measures) >= _MANY)
    names = {column.removeprefix(PREFIX) for column in columns}
    has_plate, has_name = f"{PREFIX}Plate" in present, f"{PREFIX}pert_iname" in present
    has_well = bool({f"{PREFIX}Well"} & present or {f"{PREFIX}Row", f"{PREFIX}Col"} <= present)
    of_images = any(column.startswith((FILE_PREFIX, URL_PREFIX)) for column in columns)
    is_published = has_name and not (has_plate and has_well)
    # Tables of images, cells or splits name samples and targets, too.
    others = {"well_position", "Well", "Plate", "Row", "Col", "Site", "ImageNumber"}
    others |= {"split", "experiment_type"}
    files = of_images or any(column.startswith("Image_FileName_") for column in columns)
    meant = MapColumns(columns, ())
    coded = bool(names & {"broad_sample", "JCP2022"})
    described = bool(names & {"pert_iname", "gene", "Symbol"}) or {"Name", "modality"} <= names
    chemistry = any((role, 0) in meant.by_role for role in ("target", "gene", "inchikey", "smiles"))
    named = not coded and ("treatment", 0) in meant.by_role and chemistry
    of_splits = {"split", "experiment_type", "Site"}
    measures_cells = bool(names & {"ImageNumber", "ObjectNumber"})
    plates = {f"{PREFIX}Plate", f"{PREFIX}Batch"}
    tests = {
        Layout.PUBLISHED: of_images and is_published,
        Layout.LOADDATA: of_images and has_well and not is_published,
        # Where it is a table of images, too, that goes first.
        Layout.PLATEMAP: (
            meant.is_map
            and not (measured or measures_cells)
            and (not files or (of_images and (has_well or is_published)))
            and (of_images or not names & of_splits)
        ),
        Layout.TREATMENT_TABLE: (
            ((coded and described) or named)
            and not meant.has_well
            and not names & others
            and not files
        ),
        Layout.JUMP_PLATES: plates <= present <= plates | {f"{PREFIX}Source", f"{PREFIX}PlateType"},
    }
    return [layout for layout, fits in tests.items() if fits], measured


def _of_folder(path: Path) -> list[Layout]:
    from .cellprofiler import is_cellprofiler_folder
    from .folders import has_image_names
    from .harmony import index_of

    found = [] if index_of(path) is None else [Layout.HARMONY]
    found += [Layout.CELLPROFILER_CSV] if is_cellprofiler_folder(path) else []
    found += [Layout.IMAGE_FOLDER] if has_image_names(path) else []
    for table in _tables_in(path):
        with suppress(UserInputError):
            layouts, _ = table_layouts(open_table(table, whole=False).columns)
            is_map = Layout.PLATEMAP in layouts
            if is_map or (not found and open_map(table) is not None):
                return [*found, Layout.PLATEMAP]
    return found


def _tables_in(folder: Path) -> list[Path]:
    try:
        names = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserInputError(f"{folder} cannot be read ({error.strerror}).") from error
    return [path for path in names if path.name.lower().endswith(_TABLE_SUFFIXES)][:_LOOKED_AT]


def _unknown(path: Path, head: bytes) -> BadTableError:
    """Return what was looked for in a file or folder that is none of the layouts."""
    if path.is_dir():
        from .folders import first_image

        if name := first_image(path):
            return BadTableError(
                f"{path.resolve().name} holds images that are not named as a known microscope "
                f"names them, like {name}. Say how they are named with --pattern, for example "
                r"'(?P<well>[A-P]\d+)_s(?P<site>\d+)_w(?P<channel>\d)'."
            )
        tables = ", ".join(table.name for table in _tables_in(path)[:3])
        inside = f"one of its files, like {tables}" if tables else "a folder or file further down"
        return BadTableError(
            f"{path.resolve().name} holds no Harmony index, no CellProfiler tables (Image.csv with "
            f"Cells.csv or Nuclei.csv), no image files and no plate maps. Give {inside}."
        )
    if head.startswith(image_files.SQLITE):
        return BadTableError(f"{path.name} is an SQLite file without the tables of CellProfiler.")
    if _XML.match(head):
        return BadTableError(f"{path.name} is XML, but not a Harmony index (Index.idx.xml).")
    columns = open_table(path, whole=False).columns
    if {"ImageNumber", "ObjectNumber"} <= set(columns):
        return BadTableError(
            f"{path.name} is one table of a CellProfiler export. Give the folder that also "
            "holds its Image.csv."
        )
    if {"Assay_Plate_Barcode", "Plate_Map_Name"} <= set(columns):
        return BadTableError(
            f"{path.name} only lists which plate uses which plate map. Give the folder of the "
            "plate maps, and this file with --barcodes."
        )
    shown = [name for name in columns if name]
    if len(shown) == 1:  # a title
        shown = columns_below_titles(path)
    return BadTableError(
        f"{path.name}: I do not recognise this table. A plate map needs a well and a treatment "
        f"column; yours has {some_of(shown, 8)}. Name them with --map-column well=NAME "
        f"--map-column treatment=NAME. {_OTHERS}"
    )
