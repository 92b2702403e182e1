"""The demo: a rendered plate set on disk, and the commands that a user would type on it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import write_atomically
from .errors import UserInputError
from .extras import need
from .io.image_files import encode_tiff
from .progress import Progress, track
from .store import Store

if TYPE_CHECKING:
    from .analysis.rendering import FieldSpec, PlateDesign

METADATA = "metadata.csv"
CROP_SIZE = 40
BATCH_SIZE = 32
EPOCHS = 6
LEARNING_RATE = 1e-3
SPLIT = "by-well"


@dataclass(frozen=True)
class DemoPlates:
    """Where the rendered plates lie. ``truth`` holds the true masks, one per field."""

    folder: Path
    metadata: Path
    images: Path
    truth: Path
    store: Path
    report: Path
    fields: int


def render_plates(
    folder: Path,
    *,
    seed: int = 1,
    effect: float = 1.0,
    classes: int | None = None,
    design: PlateDesign | None = None,
    progress: Progress | None = None,
) -> DemoPlates:
    """Render the demo's plates into ``folder``: images, LoadData table, true masks.

    ``effect`` scales what the treatments do; at 0 they do nothing. ``classes`` takes only the
    first so many treatments. ``design``: another plate set than the demo's. The same arguments
    give the same bytes; what is there already is left alone.

    Raises:
        MissingExtraError: scipy is not installed.
        UserInputError: ``folder`` holds something else.
        StorageError: the folder cannot be written.
    """
    need("segment")
    from .analysis.rendering import DEMO_TREATMENTS, PlateDesign

    treatments = DEMO_TREATMENTS[:classes]
    design = design or PlateDesign(seed=seed, effect=effect, treatments=treatments)
    plates = _layout(folder, len(design))
    table = _table(design, plates).encode()
    if plates.metadata.exists() and plates.metadata.read_bytes() != table:
        raise UserInputError(
            f"{folder} holds a demo with other settings. Name another folder, or remove it."
        )
    for spec in track(progress or Progress(), "render", len(design), design.fields()):
        _write_field(design, spec, plates)
    _write_if_new(plates.metadata, table)
    return plates


def commands(plates: DemoPlates) -> list[list[str]]:
    """Return what a user would type, one list of words for each command, without the program."""
    store = ["--store", str(plates.store)]
    return [
        ["init", str(plates.store)],
        ["ingest", str(plates.metadata), "--images", str(plates.images), *store],
        ["segment", "--preset", "published", *store],
        ["measure", *store],
        ["split", "create", SPLIT, "--validation-size", "0.25", "--test-size", "0.25", *store],
        ["split", "check", SPLIT, *store],
        ["train", "--split", SPLIT, "--preset", "published", *_training(), *store],
        ["predict", *store],
        ["train", "--split", SPLIT, "--baseline", "null", *store],
        ["report", "--html", str(plates.report), *store],
    ]


def audit_command(plates: DemoPlates) -> list[str]:
    """Return the audit of the first image that was labelled; the store knows which that is."""
    with Store.open(plates.store) as store:
        found = store.sql(
            "SELECT concat_ws('/', plate, well, site) AS image FROM lineage "
            "ORDER BY image_id LIMIT 1"
        )
    return ["audit", "image", str(found["image"][0]), "--store", str(plates.store)]


def _training() -> list[str]:
    return [
        *("--crop-size", str(CROP_SIZE)),
        *("--batch-size", str(BATCH_SIZE)),
        *("--epochs", str(EPOCHS)),
        *("--learning-rate", str(LEARNING_RATE)),
    ]


def _layout(folder: Path, fields: int) -> DemoPlates:
    folder = folder.resolve()
    return DemoPlates(
        folder=folder,
        metadata=folder / METADATA,
        images=folder / "images",
        truth=folder / "truth",
        store=folder / "store",
        report=folder / "report.html",
        fields=fields,
    )


def _table(design: PlateDesign, plates: DemoPlates) -> str:
    """Return the LoadData table of all plates."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    channels = design.channel_names
    writer.writerow(
        [
            *(f"FileName_Orig{name}" for name in channels),
            *(f"PathName_Orig{name}" for name in channels),
            *("Metadata_Plate", "Metadata_Well", "Metadata_Site"),
            *("Metadata_pert_iname", "Metadata_target", "Metadata_control_type"),
        ]
    )
    for spec in design.fields():
        writer.writerow(_row(design, spec, plates))
    return text.getvalue()


def _row(design: PlateDesign, spec: FieldSpec, plates: DemoPlates) -> Iterator[str]:
    count = len(design.channel_names)
    yield from (spec.file_name(channel) for channel in range(1, count + 1))
    yield from [f"{plates.images.name}/{spec.plate}"] * count
    yield from (spec.plate, spec.well, str(spec.site))
    control = "negcon" if not spec.treatment.target else ""
    yield from (spec.treatment.pert_iname, spec.treatment.target, control)


def _write_field(design: PlateDesign, spec: FieldSpec, plates: DemoPlates) -> None:
    targets = [
        plates.images / spec.plate / spec.file_name(channel)
        for channel in range(1, design.n_channels + 1)
    ]
    truth = plates.truth / spec.plate / f"{spec.core_name}.tif"
    if all(path.exists() for path in (*targets, truth)):
        return
    from .analysis.rendering import render_field

    field = render_field(design, spec)
    for path, plane in zip(targets, field.channels, strict=True):
        _write_if_new(path, encode_tiff(plane))
    _write_if_new(truth, encode_tiff(field.masks))


def _write_if_new(path: Path, data: bytes) -> None:
    if not path.exists():
        write_atomically(path, data)
