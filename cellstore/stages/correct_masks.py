"""Masks corrected by hand in napari: a segmentation of their own, and files to learn from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from ..artifacts import open_atomically
from ..config import IngestParams
from ..enums import Stage
from ..errors import ImageError, UserInputError
from ..io.image_files import encode_tiff
from ..io.mask_files import MaskFile
from ..jobs.lookup import IS_CURRENT, find_image, find_recipe, name_of, readable
from ..jobs.mask_matching import match_image
from ..jobs.planes import channel_files, open_file
from ..jobs.workspace import Workspace
from ..models import Image, Recipe, Segmentation
from ..notebooks import Shown
from ..query.cells import plane_of, read_masks
from ..settings import check_not_of_a_store, need
from .ingest.ingest import IngestResult, ingest

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


@dataclass(frozen=True)
class OpenedField:
    """An image with its masks (H, W), read; ``planes`` are its channels, each (H, W).

    ``before``: the recipe of these masks (none: there are none yet), and the channels that it
    looked at. ``stem`` is the name that a file of its masks has, in a folder called ``position``.
    """

    image_id: int
    name: str
    barcode: str
    position: str
    stem: str
    pixel_size: float | None
    planes: dict[str, NDArray[np.generic]]
    masks: NDArray[np.int32]
    before: int | None
    channels: tuple[str, ...]


def correct_masks(
    workspace: Workspace,
    image: str,
    *,
    segmentation: str | None = None,
    folder: Path = Path(NAME),
    name: str | None = None,
) -> CorrectedMasks:
    """Open an image with its masks in napari; return when its window is closed.

    ``segmentation``: whose masks, by recipe; by default the newest of the image. ``KEY`` in the
    window stores them: in a file below ``folder``, named like its image, as ``finetune`` reads it,
    and in the store as a segmentation called ``name`` (by default the first of corrected,
    corrected 2, ... by which the image has no masks).
    """
    need("napari")
    import napari

    check_not_of_a_store(folder)
    found = open_field(workspace, image, segmentation)
    viewer = napari.Viewer(title=f"{found.name} - {KEY} stores the masks")
    scale = (found.pixel_size or 1.0,) * 2
    for number, (channel, plane) in enumerate(found.planes.items()):
        low, high = np.percentile(plane[np.isfinite(plane)], (_DARKEST, _BRIGHTEST))
        viewer.add_image(
            plane,
            name=channel,
            scale=scale,
            colormap=_COLOURS[number % len(_COLOURS)] if len(found.planes) > 1 else "gray",
            contrast_limits=(float(low), max(float(high), float(low) + 1e-6)),
            blending="additive",
        )
    layer = viewer.add_labels(found.masks.copy(), name="cells", scale=scale)
    stored = [found.masks]
    results: list[CorrectedMasks] = []

    def store(_: Any = None) -> None:
        masks = np.asarray(layer.data).copy()
        results.append(keep_masks(workspace, found, masks, folder, name))
        stored.append(masks)

    viewer.bind_key(KEY, store, overwrite=True)
    napari.run()

    if not np.array_equal(stored[-1], np.asarray(layer.data)):
        store()
    if not results:
        return CorrectedMasks(found.name, found.image_id, 0, str(folder))
    return replace(results[-1], saved=len(results))


def open_field(workspace: Workspace, image: str, segmentation: str | None) -> OpenedField:
    """Read what :func:`correct_masks` shows."""
    with workspace.database.read() as session:
        row = session.get_one(Image, find_image(session, readable(image)))
        name, files = name_of(session, "images", row.id), channel_files(session, [row.id])[row.id]
        if not files:
            raise ImageError(f"{name} has no files.")
        query = select(Segmentation, Recipe).join(Image, IS_CURRENT)
        query = query.join(Recipe, Recipe.id == Segmentation.recipe_id).where(Image.id == row.id)
        if segmentation is not None:
            recipe = find_recipe(session, Stage.SEGMENT, segmentation)
            query = query.where(Recipe.id == recipe.id)
        query = query.where(Segmentation.mask_artifact_id.is_not(None))
        newest = session.execute(query.order_by(Segmentation.id.desc()).limit(1)).first()
        if newest is None and segmentation is not None:
            raise UserInputError(f"{name} has no masks of segmentation {segmentation}.")
        masks = None
        if newest is not None:
            masks = read_masks(session, workspace.artifacts, newest[0]).astype(np.int32)
        barcode, of_file = row.well.plate.barcode, Path(row.files[0].name).name.split(".")[0]
        parts = [row.well.name, str(row.site)]
        parts += [f"z{row.plane}"] * (row.plane != 1)
        parts += [f"t{row.time_point}"] * (row.time_point != 1)
        like_file = MaskFile(Path(f"{of_file}.tif"), of_file, (of_file,), None)
        is_told = getattr(match_image(session, like_file, barcode), "id", None) == row.id
        planes = {file.channel: open_file(file) for file in files}
        if masks is None:
            masks = np.zeros(next(iter(planes.values())).shape, dtype=np.int32)
        return OpenedField(
            image_id=row.id,
            name=name,
            barcode=barcode,
            position="_".join(parts),
            stem=of_file if is_told else row.core_name,
            pixel_size=row.pixel_size,
            planes=planes,
            masks=masks,
            before=newest and newest[1].id,
            channels=plane_of(newest[1]).channels if newest is not None else (),
        )


def keep_masks(
    workspace: Workspace,
    field: OpenedField,
    masks: NDArray[np.integer[Any]],
    folder: Path,
    name: str | None = None,
) -> CorrectedMasks:
    """Write corrected masks (H, W) to a file and ingest it; see :func:`correct_masks`."""
    if masks.min(initial=0) < 0:
        raise UserInputError("Masks have whole numbers from 0; 0 is the background.")
    # In a folder of its own, so that one file is ingested and not all that were corrected.
    barcode, position = (
        re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_" for name in (field.barcode, field.position)
    )
    place = folder / barcode / position
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{field.stem}_masks.tif"
    with open_atomically(path) as file:
        file.write(encode_tiff(masks.astype(np.uint32)))
    done, called = _ingested(workspace, field, place, name)
    (recipe,) = done.segmentations or (None,)
    note = f"Segmentation {recipe} ({called}) is the last used now: measure and train take it."
    if field.before is not None:
        note += f" To go on with the other one: --segmentation {field.before}"
    return CorrectedMasks(
        image=field.name,
        image_id=field.image_id,
        saved=1,
        folder=str(folder),
        cells=len(np.unique(masks[masks > 0])),
        file=str(path),
        name=called,
        segmentation=recipe,
        notes=(*(f"{issue.reason}: {issue.detail}" for issue in done.issues), note),
    )


def _ingested(
    workspace: Workspace, field: OpenedField, place: Path, name: str | None
) -> tuple[IngestResult, str]:
    """Ingest the masks under a name by which the image has no others; return it, too."""
    names = [name] if name else [NAME, *(f"{NAME} {number}" for number in range(2, _MOST_SETS))]
    for called in names:
        params = IngestParams(
            kind="masks",
            name=called,
            plate=(field.barcode,),
            channels=tuple((channel, channel) for channel in field.channels),
        )
        done = ingest(workspace, place, params)
        if not done.refused:
            return done, called
        if any(issue.reason != "other masks are there" for issue in done.issues):
            break
    raise UserInputError(
        "The masks are in a file, but not in the store: "
        + "; ".join(f"{issue.reason}: {issue.detail}" for issue in done.issues)
    )
