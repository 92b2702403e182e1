"""What a source is, told from its content: a table of images, plate maps, features, a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from ..errors import BadTableError, UserInputError
from . import image_files
from .image_tables import FILE_PREFIX, ImageRecord, read_image_table
from .tables import Refusal, TextTable, nearest_columns, read_columns

_PUBLISHED = "a published table FileName_OrigRNA and Metadata_pert_iname"
_LOADDATA = (
    "a table of images (LoadData) FileName_Orig<channel>, Metadata_Plate, Metadata_Well and "
    "Metadata_Site"
)
_OTHERS = (
    "a treatment table broad_sample and pert_iname or gene, single cells Metadata_Plate, "
    "Metadata_Well and features"
)
_WANTED = ("FileName_OrigRNA", "Metadata_pert_iname", "Metadata_Plate", "Metadata_Well")
_BOM = b"\xef\xbb\xbf"
_TABLE_SUFFIXES = (".txt", ".csv", ".tsv", ".txt.gz", ".csv.gz", ".tsv.gz")
_LOOKED_AT = 50


class SourceKind(StrEnum):
    """What a source brings."""

    IMAGES = "images"
    TREATMENTS = "treatments"
    FEATURES = "features"
    MASKS = "masks"


class Layout(StrEnum):
    """The shapes of sources that can be read."""

    PUBLISHED = "published"
    LOADDATA = "loaddata"
    HARMONY = "harmony"
    PHENIX_FOLDER = "phenix-folder"
    CELLOMICS_FOLDER = "cellomics-folder"
    WELLSITE_FOLDER = "wellsite-folder"
    PATTERN_FOLDER = "pattern-folder"
    PLATEMAP = "platemap"
    TREATMENT_TABLE = "treatment-table"
    JUMP_PLATES = "jump-plates"
    JUMP_CRISPR = "jump-crispr"
    JUMP_CONTROLS = "jump-controls"
    CELLPROFILER_CSV = "cellprofiler-csv"
    CELLPROFILER_SQLITE = "cellprofiler-sqlite"
    SINGLE_CELLS = "single-cells"
    MASKS = "masks"

    @property
    def kind(self) -> SourceKind:
        """What a source of this layout brings."""
        return _KINDS.get(self, SourceKind.IMAGES)


_KINDS = {
    Layout.PLATEMAP: SourceKind.TREATMENTS,
    Layout.TREATMENT_TABLE: SourceKind.TREATMENTS,
    Layout.JUMP_PLATES: SourceKind.TREATMENTS,
    Layout.JUMP_CRISPR: SourceKind.TREATMENTS,
    Layout.JUMP_CONTROLS: SourceKind.TREATMENTS,
    Layout.CELLPROFILER_CSV: SourceKind.FEATURES,
    Layout.CELLPROFILER_SQLITE: SourceKind.FEATURES,
    Layout.SINGLE_CELLS: SourceKind.FEATURES,
    Layout.MASKS: SourceKind.MASKS,
}


def detect(path: Path, kind: SourceKind | None = None) -> Layout:
    """Tell from its content which layout a file or folder has; ``kind`` leaves only its layouts.

    A table of images that also names treatments is a table of images, and a folder with a Harmony
    index is read through the index. Masks are never guessed: they are images like others.

    Raises:
        BadTableError: it has none of the known layouts, or several of them; the message says what
            was looked for, the nearest columns, and how to choose.
        UserInputError: it is not there or may not be read.
    """
    if kind is SourceKind.MASKS:
        return Layout.MASKS
    found = list(dict.fromkeys(_of_folder(path) if path.is_dir() else _of_file(path)))
    chosen = _preferred(found) if kind is None else [item for item in found if item.kind is kind]
    if len(chosen) == 1:
        return chosen[0]
    if found and not chosen:
        raise BadTableError(
            f"{path.name} looks like {_named(found)}, not {kind}. "
            "Name another kind or none, or force a reader with --layout."
        )
    raise _undecided(path, chosen)


def layout_of(table: TextTable) -> Layout:
    """Tell which shape an opened table of images has; one with plate and well is LoadData.

    Raises:
        BadTableError: neither shape.
    """
    layout = _of_images(table.columns)
    if layout is None:
        raise BadTableError(
            f"{table.path.name} is not a table of images that I recognise: {_LOADDATA} is needed, "
            f"or {_PUBLISHED}. {_nearest(table.columns, _WANTED)}"
        )
    return layout


def read_images(
    table: TextTable,
    layout: Layout | None = None,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a table of either shape (``layout`` None: told from the columns).

    ``channels`` gives channels other names: the key is the number in a Phenix file name, or the
    name as the columns have it. A number alone never names a stain.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
        UserInputError: a table without ``Metadata_Plate`` and no ``plate``, or another layout.
    """
    layout = layout or layout_of(table)
    if layout not in (Layout.LOADDATA, Layout.PUBLISHED):
        raise UserInputError(
            f"{table.path.name} is a text table, which cannot be read as {layout.value}. "
            "Use --layout loaddata or --layout published, or leave it away."
        )
    if plate is None and "Metadata_Plate" not in table.columns:
        raise UserInputError(
            f"{table.path.name} does not say which plate it is. Name it with --plate."
        )
    is_published = layout is Layout.PUBLISHED
    return read_image_table(table, plate, batch, channels, needs_treatment=is_published)


def _preferred(found: Sequence[Layout]) -> Sequence[Layout]:
    if Layout.HARMONY in found:
        return [item for item in found if item is not Layout.PHENIX_FOLDER]
    if Layout.LOADDATA in found or Layout.PUBLISHED in found:
        return [item for item in found if item.kind is not SourceKind.TREATMENTS]
    return found


def _of_folder(path: Path) -> Iterator[Layout]:
    from .cellprofiler_csv import is_cellprofiler_folder
    from .folders import folder_layouts
    from .harmony import is_harmony
    from .platemaps import table_layouts

    if is_harmony(path):
        yield Layout.HARMONY
    if is_cellprofiler_folder(path):
        yield Layout.CELLPROFILER_CSV
    yield from map(Layout, folder_layouts(path))
    for table in _tables_in(path):
        with suppress(UserInputError):
            if Layout.PLATEMAP.value in table_layouts(read_columns(table)):
                yield Layout.PLATEMAP


def _tables_in(folder: Path) -> list[Path]:
    try:
        names = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserInputError(f"{folder} cannot be read ({error.strerror}).") from error
    return [path for path in names if path.name.lower().endswith(_TABLE_SUFFIXES)][:_LOOKED_AT]


def _of_file(path: Path) -> Iterator[Layout]:
    head = _head(path)
    if head.startswith(image_files.SQLITE):
        from .cellprofiler_sqlite import is_cellprofiler_sqlite

        yield from [Layout.CELLPROFILER_SQLITE] if is_cellprofiler_sqlite(path) else []
        return
    if _is_xml(head):
        from .harmony import is_harmony

        yield from [Layout.HARMONY] if is_harmony(path) else []
        return
    if not head.startswith(image_files.PARQUET):
        from .platemaps import table_layouts

        columns = read_columns(path)
        images = _of_images(columns)
        yield from [images] if images else []
        yield from map(Layout, table_layouts(columns))
        if not any("Object" in column or "Parent" in column for column in columns):
            return  # no table of single cells, and Arrow is slow to import
    from .single_cells import is_single_cells

    if is_single_cells(path):
        yield Layout.SINGLE_CELLS


def _of_images(columns: Sequence[str]) -> Layout | None:
    present = set(columns)
    if not any(column.startswith(FILE_PREFIX) for column in columns):
        return None
    has_well = "Metadata_Well" in present or {"Metadata_Row", "Metadata_Col"} <= present
    if "Metadata_Plate" in present and has_well:
        return Layout.LOADDATA
    if "Metadata_pert_iname" in present:
        return Layout.PUBLISHED
    return Layout.LOADDATA if has_well else None


def _named(found: Sequence[Layout]) -> str:
    return " or ".join(f"{item.value} ({item.kind.value})" for item in found)


def _undecided(path: Path, found: Sequence[Layout]) -> BadTableError:
    if found:
        return BadTableError(f"{path.name} may be {_named(found)}. Choose with --layout.")
    if path.is_dir():
        tables = ", ".join(table.name for table in _tables_in(path)[:3])
        inside = f"one of its files, like {tables}" if tables else "a folder or file further down"
        return BadTableError(
            f"{path.name} holds no Harmony index, no CellProfiler tables (Image.csv with Cells.csv "
            "or Nuclei.csv), no image files with names of a known pattern and no plate maps. "
            f"Give --pattern or --layout, or {inside}."
        )
    head = _head(path)
    if head.startswith(image_files.SQLITE):
        return BadTableError(f"{path.name} is an SQLite file without the tables of CellProfiler.")
    if head.startswith(image_files.PARQUET):
        return BadTableError(
            f"{path.name} is Parquet, but not of single cells: it needs Metadata_Plate, "
            "Metadata_Well and features. Force it with --layout single-cells."
        )
    if _is_xml(head):
        return BadTableError(f"{path.name} is XML, but no Harmony index (Index.idx.xml).")
    return _unknown_table(path, read_columns(path))


def _unknown_table(path: Path, columns: Sequence[str]) -> BadTableError:
    if {"ImageNumber", "ObjectNumber"} <= set(columns):
        return BadTableError(
            f"{path.name} is one table of a CellProfiler export. Give the folder that also "
            "holds its Image.csv."
        )
    if {"Assay_Plate_Barcode", "Plate_Map_Name"} <= set(columns):
        return BadTableError(
            f"{path.name} only says which plate uses which plate map. Give the folder of the plate "
            "maps, and this file with --barcodes."
        )
    needs = (
        f"{path.name}: I do not recognise this table. A plate map needs a well and a treatment "
        "column (well_position and broad_sample)"
    )
    files = any(column.lower().startswith("filename") for column in columns)
    if not files and any("well" in column.lower() for column in columns):
        yours = ", ".join(name for name in columns[:8] if name)
        more = ", ..." if len(columns) > 8 else ""
        return BadTableError(
            f"{needs}; yours has {yours}{more}. Rename its columns, "
            "or choose a reader with --layout."
        )
    return BadTableError(
        f"{needs}, {_LOADDATA}, {_PUBLISHED}, {_OTHERS}. "
        f"{_nearest(columns, (*_WANTED, 'well_position', 'broad_sample'))} "
        "Or choose a reader with --layout."
    )


def _nearest(columns: Sequence[str], wanted: Sequence[str]) -> str:
    return nearest_columns([column for column in wanted if column not in columns], columns)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file or folder {path}. Check the path.") from error
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error


def _is_xml(head: bytes) -> bool:
    return head.removeprefix(_BOM).lstrip().startswith(b"<")
