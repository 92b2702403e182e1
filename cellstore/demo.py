"""The demo: a rendered plate set on disk, and the commands that a user would type on it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import open_atomically
from .errors import UserInputError
from .io.image_files import encode_tiff
from .settings import Progress, need, track
from .store import Store

if TYPE_CHECKING:
    from .analysis.rendering import PlateDesign

METADATA = "metadata.csv"
SPLIT = "by-well"


@dataclass(frozen=True)
class DemoPlates:
    """Where the rendered plates lie. ``truth`` holds the true masks, one per field."""

    metadata: Path
    images: Path
    truth: Path
    store: Path
    report: Path
    hits: Path


def render_plates(
    folder: Path,
    *,
    seed: int = 1,
    design: PlateDesign | None = None,
    progress: Progress | None = None,
) -> DemoPlates:
    """Render the demo's plates into ``folder``: images, LoadData table, true masks.

    ``design``: another plate set than the demo's. The same arguments give the same bytes; what is
    there already is left alone.

    Raises:
        MissingExtraError: scipy is not installed.
        UserInputError: ``folder`` holds something else.
        StorageError: the folder cannot be written.
    """
    need("segment")
    from .analysis.rendering import PlateDesign, render_field

    design = design or PlateDesign(seed=seed)
    folder = folder.resolve()
    plates = DemoPlates(
        metadata=folder / METADATA,
        images=folder / "images",
        truth=folder / "truth",
        store=folder / "store",
        report=folder / "report.html",
        hits=folder / "hits.html",
    )
    table = _table(design, plates.images.name).encode()
    if plates.metadata.exists() and plates.metadata.read_bytes() != table:
        raise UserInputError(
            f"{folder} holds a demo with other settings. Name another folder, or remove it."
        )
    for spec in track(progress or Progress(), "render", len(design), design.fields()):
        files = [spec.file_name(channel) for channel in range(1, design.n_channels + 1)]
        targets = [plates.images / spec.plate / name for name in files]
        targets.append(plates.truth / spec.plate / f"{spec.core_name}.tif")
        if all(path.exists() for path in targets):
            continue
        field = render_field(design, spec)
        for path, plane in zip(targets, (*field.channels, field.masks), strict=True):
            if not path.exists():
                with open_atomically(path) as file:
                    file.write(encode_tiff(plane))
    if not plates.metadata.exists():
        with open_atomically(plates.metadata) as file:
            file.write(table)
    return plates


def commands(plates: DemoPlates) -> list[list[str]]:
    """Return what a user would type, one list of words for each command, without the program."""
    store = ["--store", str(plates.store)]
    training = ["--crop-size", "40", "--batch-size", "32", "--epochs", "6"]
    training += ["--learning-rate", "0.001"]
    return [
        ["init", str(plates.store)],
        ["ingest", str(plates.metadata), "--images", str(plates.images), *store],
        ["segment", "--preset", "published", *store],
        ["measure", *store],
        ["split", "create", SPLIT, "--validation-size", "0.25", "--test-size", "0.25", *store],
        ["split", "check", SPLIT, *store],
        ["train", "--split", SPLIT, "--preset", "published", *training, *store],
        ["predict", *store],
        ["train", "--split", SPLIT, "--baseline", "null", *store],
        ["report", "--html", str(plates.report), *store],
        ["profile", *store],
        ["hits", "--html", str(plates.hits), *store],
    ]


def audit_command(plates: DemoPlates) -> list[str]:
    """Return the audit of the first image that was labelled; the store knows which that is."""
    with Store.open(plates.store) as store:
        found = store.sql(
            "SELECT concat_ws('/', plate, well, site) AS image FROM lineage "
            "ORDER BY image_id LIMIT 1"
        )
    return ["audit", "image", str(found["image"][0]), "--store", str(plates.store)]


def _table(design: PlateDesign, images: str) -> str:
    """Return the LoadData table of all plates, whose files are in the folder ``images``."""
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
        writer.writerow(
            [
                *(spec.file_name(channel) for channel in range(1, len(channels) + 1)),
                *[f"{images}/{spec.plate}"] * len(channels),
                *(spec.plate, spec.well, spec.site),
                *(spec.treatment.pert_iname, spec.treatment.target),
                "" if spec.treatment.target else "negcon",
            ]
        )
    return text.getvalue()
