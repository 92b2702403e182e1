"""Stores of drawn cells for benchmarks: rows and files as the stages would have written them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, insert, select

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import MeasureParams, SegmentParams, SplitParams
from cellstore.enums import ArtifactKind, PerturbationKind, Stage, Status
from cellstore.io.image_files import encode_tiff
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.runs import RecipeSpec, keep_files, register, running
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    Folder,
    Image,
    ImageFile,
    Job,
    Perturbation,
    Plate,
    Segmentation,
    Treatment,
    TreatmentPart,
    Well,
)
from cellstore.stages.ingest.write_treatments import treatment_values
from cellstore.stages.split import create_split

COMPOUND = PerturbationKind.COMPOUND
STORED = FEATURE_NAMES[:-2]
"""All but the centroid, which is in table cells."""

SITES = 9
CELL_ROWS = 20_000


@dataclass(frozen=True)
class Field:
    """An image (H, W) uint16, its masks (H, W) uint16, flows (H, W, 4) uint8 and boxes (N, 4)."""

    image: NDArray[np.uint16]
    masks: NDArray[np.uint16]
    flows: NDArray[np.uint8]
    boxes: NDArray[np.int64]


def draw_field(seed: int, cells: int = 160, size: int = 1080) -> Field:
    """Star-shaped cells on a jittered grid, boxes of 71 pixels: as in ``../shared/peers``."""
    rng = np.random.default_rng([22, seed])
    grid = int(np.ceil(cells**0.5))
    pitch = size / grid
    masks, flows = np.zeros((size, size), np.uint16), np.zeros((size, size, 4), np.uint8)
    boxes = []
    for place in range(cells):
        middle = (np.array(divmod(place, grid)) + 0.5) * pitch + rng.uniform(-3, 3, 2)
        box = _draw_cell(rng, masks, flows, place + 1, middle, pitch / 2 - 5)
        boxes.append(box)
    light = rng.gamma(4.0, 400.0, cells + 1)[masks] * (masks > 0)
    image = np.clip(light + rng.normal(600, 60, masks.shape), 0, 65535).astype(np.uint16)
    return Field(image, masks, flows, np.array(boxes))


def _draw_cell(
    rng: np.random.Generator, masks: Any, flows: Any, label: int, middle: Any, room: float
) -> list[int]:
    low = np.maximum(0, (middle - room - 4).astype(int))
    high = np.minimum(masks.shape, (middle + room + 5).astype(int))
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    down, across = y - middle[0], x - middle[1]
    angle, distance = np.arctan2(down, across), np.hypot(down, across)
    radius = room * rng.uniform(0.8, 1.05) * (1 + 0.08 * np.sin(rng.integers(3, 7) * angle))
    window = slice(low[0], high[0]), slice(low[1], high[1])
    inside = (distance < radius) & (masks[window] == 0)
    masks[window][inside] = label
    turns = [0.5 + 0.5 * np.cos(angle + k * 2.094) for k in range(3)]
    colours = np.stack([*turns, 1 - distance / (distance.max() + 1)], axis=-1) * 255
    noisy = np.clip(colours + rng.normal(0, 3, colours.shape), 0, 255).astype(np.uint8)
    flows[window][inside] = noisy[inside]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    ends = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
    return [int(end + start) for end, start in zip(ends, [*low, *low], strict=True)]


def make_store(
    root: Path, fields: Sequence[Field], images: int, treatments: int = 12, plates: int = 2
) -> None:
    """Make a store of ``images`` images, each one of ``fields``, measured and split by wells.

    Features are made up. Files of fields that come again are not written again.
    """
    folder = root.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for number, field in enumerate(fields):
        (folder / _name(number)).write_bytes(encode_tiff(field.image))
    workspace, _ = create_workspace(root)
    try:
        _insert_images(workspace, folder, len(fields), images, treatments, plates)
        _insert_cells(workspace, fields)
        create_split(workspace, "by-well", SplitParams(test_size=0.2, validation_size=0.2))
    finally:
        workspace.database.close()


def _name(number: int) -> str:
    return f"field{number:02d}.tif"


def _insert_images(
    workspace: Workspace, folder: Path, drawn: int, images: int, treatments: int, plates: int
) -> None:
    with workspace.database.begin() as session:
        kinds = [
            Treatment(
                **treatment_values([TreatmentRecord(COMPOUND, f"t{i}")]),
                parts=[
                    TreatmentPart(
                        position=1, perturbation=Perturbation(kind=COMPOUND, name=f"t{i}")
                    )
                ],
            )
            for i in range(treatments)
        ]
        place = Folder(uri=str(folder))
        some = [Plate(barcode=f"P{i}") for i in range(plates)]
        session.add_all([*kinds, place, *some])
        session.flush()
        sites = SITES if images > 384 * plates else 1
        for number in range(-(-images // sites)):
            plate, position = some[number % plates], number // plates
            row, column = divmod(position, 24 if sites == 1 else 1000)
            well = Well(
                plate_id=plate.id,
                well_row=row + 1,
                well_column=column + 1,
                name=f"{chr(65 + row)}{column + 1:02d}",
                treatment_id=kinds[(number // plates) % treatments].id,
            )
            session.add(well)
            session.flush()
            for site in range(min(sites, images - number * sites)):
                _add_image(session, well, site + 1, place, folder, (number * sites + site) % drawn)


def _add_image(session: Any, well: Well, site: int, place: Folder, path: Path, field: int) -> None:
    image = Image(
        well_id=well.id,
        site=site,
        core_name=f"{well.name}f{site:02d}",
        content_sha256=f"{well.id:056x}{site:04x}{field:04x}",
    )
    session.add(image)
    session.flush()
    name = _name(field)
    found = (path / name).stat()
    file = ImageFile(image_id=image.id, channel="DNA", position=1, name=name, sha256="0" * 64)
    file.folder, file.size_bytes, file.modified_ns = place, found.st_size, found.st_mtime_ns
    session.add(file)


def _insert_cells(workspace: Workspace, fields: Sequence[Field]) -> None:
    with workspace.database.begin() as session:
        recipe = register(
            session, RecipeSpec(Stage.SEGMENT, 1, asdict(SegmentParams.of("published")))
        )
        spec = RecipeSpec(Stage.MEASURE, 1, asdict(MeasureParams()), None, (recipe,))
        measured = register(session, spec)
    with (
        running(workspace.database, recipe) as found,
        running(workspace.database, measured) as run,
        workspace.database.begin() as session,
    ):
        artifacts = [_keep(session, workspace, field) for field in fields]
        keys = {"recipe_id": recipe.id, "run_id": found.id, "created_at": datetime.now(UTC)}
        images = session.execute(select(Image.id, Image.content_sha256).order_by(Image.id)).all()
        rows = [
            _segmentation(image_id, content, artifacts, fields) | keys
            for image_id, content in images
        ]
        session.execute(insert(Segmentation), rows)
        of_image = select(Segmentation.id, Segmentation.content_sha256)
        segmentations = session.execute(of_image.order_by(Segmentation.id)).all()
        for some in _in_parts(_cells(segmentations, fields)):
            session.execute(insert(Cell), some)
        count = session.scalar(select(func.count()).select_from(Cell))
        first = session.scalar(select(func.min(Cell.id)))
        keys = {"recipe_id": measured.id, "run_id": run.id}
        for some in _in_parts(_features(first, count)):
            session.execute(insert(CellFeatures), [{**row, **keys} for row in some])
        done = [{"image_id": i, "content_sha256": content} for i, content in images]
        session.execute(insert(Job), [{**row, **keys, "status": Status.DONE} for row in done])


def _keep(session: Any, workspace: Workspace, field: Field) -> tuple[int, int]:
    write = workspace.artifacts.write
    masks = write(ArtifactKind.MASK, encode_tiff(field.masks), ".tif")
    flows = write(ArtifactKind.FLOW, encode_tiff(field.flows), ".tif")
    return keep_files(session, [masks])[0], keep_files(session, [flows])[0]


def _field_of(content: str) -> int:
    return int(content[-4:], 16)


def _segmentation(
    image_id: int, content: str, artifacts: Sequence[tuple[int, int]], fields: Sequence[Field]
) -> dict[str, Any]:
    masks, flows = artifacts[_field_of(content)]
    return {
        "image_id": image_id,
        "content_sha256": content,
        "n_cells": len(fields[_field_of(content)].boxes),
        "diameter": 60.0,
        "mask_artifact_id": masks,
        "flow_artifact_id": flows,
    }


def _cells(segmentations: Any, fields: Sequence[Field]) -> Iterator[dict[str, Any]]:
    names = ("min_row", "min_col", "max_row", "max_col")
    for segmentation_id, content in segmentations:
        for label, box in enumerate(fields[_field_of(content)].boxes.tolist(), start=1):
            middle = {
                "centroid_row": (box[0] + box[2]) / 2,
                "centroid_col": (box[1] + box[3]) / 2,
            }
            keys = {"segmentation_id": segmentation_id, "object_number": label, "excluded": None}
            yield keys | middle | dict(zip(names, box, strict=True))


def _features(first: int, count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(3)
    for start in range(0, count, CELL_ROWS):
        number = min(CELL_ROWS, count - start)
        values = np.abs(rng.normal(50, 5, (number, len(STORED)))) + 1
        for offset, row in enumerate(values.tolist()):
            yield {
                "cell_id": first + start + offset,
                **dict(zip(STORED, row, strict=True)),
            }


def _in_parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == CELL_ROWS:
            yield part
            part = []
    if part:
        yield part
