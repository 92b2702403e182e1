"""Masks corrected by hand in napari: a segmentation of their own, and files to learn from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..artifacts import open_atomically
from ..config import IngestParams
from ..enums import Stage
from ..errors import ImageError, UserInputError
from ..io.image_files import encode_tiff
from ..io.mask_files import MaskFile
from ..io.tables import RowRefusedError
from ..jobs.lookup import IS_CURRENT, find_image, find_recipe, name_of, readable
from ..jobs.mask_matching import match_image
from ..jobs.planes import channel_files, open_file
from ..jobs.workspace import Workspace
from ..models import Image, Recipe, Segmentation
from ..notebooks import Shown
from ..query.cells import plane_of, read_masks
from ..settings import check_not_of_a_store, need
from .ingest.ingest import ingest

NAME = "corrected"
KEY = "Shift-S"
_COLOURS = ("blue", "green", "red", "magenta", "cyan", "yellow")
_DARKEST, _BRIGHTEST = 0.5, 99.8
"""Percentiles of the pixels that are shown as black and as the full colour."""
_MOST_SETS = 100


@dataclass(frozen=True)
class CorrectedMasks(Shown):
    """What was made of the masks of an image in napari.

    ``saved``: how often they were stored; ``file`` (below ``folder``) and ``segmentation`` (the
    recipe, called ``name``) are where the last ones are.
    """

    image: str
    image_id: int
    saved: int
    folder: str
    cells: int = 0
    file: str | None = None
    name: str | None = None
    segmentation: int | None = None
    notes: tuple[str, ...] = ()


Opened = tuple[Image, Recipe | None, dict[str, NDArray[np.generic]], NDArray[np.int32]]
"""An image, the recipe of its masks, its channels, and the masks (zeros: it had none), (H, W)."""


def correct_masks(
    workspace: Workspace,
    image: str,
    *,
    segmentation: str | None = None,
    folder: Path = Path(NAME),
) -> CorrectedMasks:
    """Open an image with its masks in napari; return when its window is closed.

    ``segmentation``: whose masks, by recipe; by default the newest of the image. ``KEY`` in the
    window stores them: in a file below ``folder``, named like its image, as ``finetune`` reads it,
    and in the store as a segmentation called corrected, corrected 2, ..., the first name by which
    the image has no masks.
    """
    need("napari")
    import napari

    check_not_of_a_store(folder)
    row, recipe, planes, first = _open_field(workspace, image, segmentation)
    shown = f"{row.well.plate.barcode}/{row.well.name}/{row.site}"
    viewer = napari.Viewer(title=f"{shown} - {KEY} stores the masks")
    scale = (row.pixel_size or 1.0,) * 2
    for number, (channel, plane) in enumerate(planes.items()):
        low, high = np.percentile(plane[np.isfinite(plane)], (_DARKEST, _BRIGHTEST))
        viewer.add_image(
            plane,
            name=channel,
            scale=scale,
            colormap=_COLOURS[number % len(_COLOURS)] if len(planes) > 1 else "gray",
            contrast_limits=(float(low), max(float(high), float(low) + 1e-6)),
            blending="additive",
        )
    layer = viewer.add_labels(first.copy(), name="cells", scale=scale)
    stored = [first]
    results: list[CorrectedMasks] = []

    def store(_: Any = None) -> None:
        masks = np.asarray(layer.data).copy()
        results.append(_keep_masks(workspace, row, recipe, masks, folder))
        stored.append(masks)

    viewer.bind_key(KEY, store, overwrite=True)
    napari.run()

    if not np.array_equal(stored[-1], np.asarray(layer.data)):
        store()
    if not results:
        return CorrectedMasks(shown, row.id, 0, str(folder))
    return replace(results[-1], saved=len(results))


def _open_field(workspace: Workspace, image: str, segmentation: str | None) -> Opened:
    with workspace.database.read() as session:
        row = session.get_one(Image, find_image(session, readable(image)))
        name, files = name_of(session, "images", row.id), channel_files(session, [row.id])[row.id]
        if not files:
            raise ImageError(f"{name} has no files.")
        barcode = row.well.plate.barcode
        stems = (Path(row.files[0].name).name.split(".")[0], row.core_name)
        if not any(_is_told(session, stem, barcode, row.id) for stem in stems):
            raise UserInputError(
                f"Several images of plate {barcode} have files of the same name, so that no file "
                f"of masks can be named like {name} alone."
            )
        query = select(Segmentation, Recipe).join(Image, IS_CURRENT)
        query = query.join(Recipe, Recipe.id == Segmentation.recipe_id).where(Image.id == row.id)
        if segmentation is not None:
            recipe = find_recipe(session, Stage.SEGMENT, segmentation)
            query = query.where(Recipe.id == recipe.id)
        query = query.where(Segmentation.mask_artifact_id.is_not(None))
        newest = session.execute(query.order_by(Segmentation.id.desc()).limit(1)).first()
        planes = {file.channel: open_file(file) for file in files}
        if newest is not None:
            masks = read_masks(session, workspace.artifacts, newest[0]).astype(np.int32)
            return row, newest[1], planes, masks
        if segmentation is not None:
            raise UserInputError(f"{name} has no masks of segmentation {segmentation}.")
        return row, None, planes, np.zeros(next(iter(planes.values())).shape, dtype=np.int32)


def _is_told(session: Session, stem: str, barcode: str, image_id: int) -> bool:
    """Whether a file of masks of this name is found to be of this image."""
    file = MaskFile(Path(f"{stem}.tif"), stem, (stem,), None)
    try:
        return match_image(session, file, barcode).id == image_id
    except RowRefusedError:
        return False


def _keep_masks(
    workspace: Workspace,
    image: Image,
    before: Recipe | None,
    masks: NDArray[np.integer[Any]],
    folder: Path,
) -> CorrectedMasks:
    """Write masks to a file, and ingest it under a name by which the image has no others."""
    if masks.min(initial=0) < 0:
        raise UserInputError("Masks have whole numbers from 0; 0 is the background.")
    with workspace.database.read() as session:
        image = session.get_one(Image, image.id)
        shown, barcode = name_of(session, "images", image.id), image.well.plate.barcode
        stem = Path(image.files[0].name).name.split(".")[0]
        if not _is_told(session, stem, barcode, image.id):
            stem = image.core_name
        position = f"{image.well.name}_{image.site}"
        position += f"_z{image.plane}" if image.plane != 1 else ""
        position += f"_t{image.time_point}" if image.time_point != 1 else ""
    # In a folder of its own, so that one file is ingested and not all that were corrected.
    parts = (re.sub(r"[^\w.-]", "_", part).lstrip(".") or "_" for part in (barcode, position))
    place = folder.joinpath(*parts)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{stem}_masks.tif"
    with open_atomically(path) as file:
        file.write(encode_tiff(masks.astype(np.uint32)))
    channels = () if before is None else plane_of(before).channels
    params = IngestParams(kind="masks", plate=(barcode,), channels=tuple((c, c) for c in channels))
    for called in (NAME, *(f"{NAME} {number}" for number in range(2, _MOST_SETS))):
        done = ingest(workspace, place, replace(params, name=called))
        problems = [f"{issue.reason}: {issue.detail}" for issue in done.issues]
        if {issue.reason for issue in done.issues} != {"other masks are there"}:
            break
    if done.refused:
        raise UserInputError(
            f"The masks are in a file, but not in the store: {'; '.join(problems)}"
        )
    (recipe,) = done.segmentations or (None,)
    note = f"Segmentation {recipe} ({called}) is the last used now: measure and train take it."
    if before is not None:
        note += f" To go on with the other one: --segmentation {before.id}"
    return CorrectedMasks(
        image=shown,
        image_id=image.id,
        saved=1,
        folder=str(folder),
        cells=len(np.unique(masks[masks > 0])),
        file=str(path),
        name=called,
        segmentation=recipe,
        notes=(*problems, note),
    )
