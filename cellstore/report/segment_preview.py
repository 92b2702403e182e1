"""Preview: segment a few images from all over a selection, and draw what was found."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ..artifacts import open_atomically
from ..config import EVERYTHING, SegmentParams, Selection
from ..errors import CellstoreError, UserInputError, first_line
from ..jobs.queue import Task
from ..jobs.workspace import Workspace
from ..models import Image, Plate, Well
from ..notebooks import Shown
from ..settings import track
from ..stages.segment import open_segment
from .drawing import outline_overlay

CAPTION_HEIGHT = 26
"""Pixels of the line of text above a picture."""


@dataclass(frozen=True)
class PreviewImage:
    """An image of the sample. ``file``: its picture; ``problem``: why there is none."""

    name: str
    cells: int | None
    diameter: float | None
    seconds: float
    file: str | None
    problem: str | None


@dataclass(frozen=True)
class PreviewResult(Shown):
    """What a preview showed; ``available`` counts the images of the selection with their files."""

    folder: str
    available: int
    images: tuple[PreviewImage, ...]


def preview(
    workspace: Workspace,
    params: SegmentParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    count: int = 6,
    folder: Path,
    device: str = "auto",
) -> PreviewResult:
    """Segment ``count`` images of a selection and draw them; see :meth:`cellstore.Store.preview`.

    The same selection gives the same images.
    """
    if count < 1:
        raise UserInputError("A preview needs at least one image. Give --preview 1 or more.")
    stage, selected, _ = open_segment(workspace, params or SegmentParams(), selection, device)
    with workspace.database.read() as session:
        available, sample = _sample(session, selected, count)
        tasks = [Task(image_id, "", name, {}, 0, 0) for image_id, name in sample.items()]
        inputs = stage.fetch(session, tasks)
    if sample:
        stage.load()
    images: list[PreviewImage] = []
    for image_id, name in track(workspace.progress, "preview", len(sample), sample.items()):
        started = time.perf_counter()
        try:
            if isinstance(found := inputs[image_id], CellstoreError):
                raise found
            loaded = stage.read(found)
            result = stage.compute(loaded)
        except CellstoreError as error:
            images.append(PreviewImage(name, None, None, 0.0, None, first_line(error)))
            continue
        seconds = time.perf_counter() - started
        plane = loaded if loaded.ndim == 2 else loaded[0]
        text = f"{name}: {result.count} cells, diameter {result.diameter:.1f} px"
        target = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
        with open_atomically(target) as file:
            file.write(png(captioned(outline_overlay(plane, result.masks), text)))
        images.append(PreviewImage(name, result.count, result.diameter, seconds, str(target), None))
    return PreviewResult(str(folder), available, tuple(images))


def _sample(session: Session, images: Select[int], count: int) -> tuple[int, dict[int, str]]:
    """How many images have their files, and the names of ``count`` spread over plates and wells."""
    there = images.where(Image.content_sha256.is_not(None)).subquery()
    available = session.scalar(select(func.count()).select_from(there)) or 0
    names = (
        select(Image.id, Plate.barcode, Image.core_name)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(there, there.c.id == Image.id)
        .order_by(Plate.id, Well.well_row, Well.well_column)
        .order_by(Image.site, Image.time_point, Image.plane, Image.id)
    )
    sample = {}
    for index in spread(available, count):
        image_id, barcode, core_name = session.execute(names.offset(index).limit(1)).one()
        sample[image_id] = f"{barcode}/{core_name}"
    return available, sample


def spread(length: int, count: int) -> list[int]:
    """Return ``count`` indices below ``length``, evenly apart, none at an end if there is room."""
    count = min(count, length)
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


def captioned(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """``picture`` (H, W, 3) with a line of ``text`` above it, in letters that fit."""
    from PIL import Image, ImageDraw, ImageFont

    band = Image.new("RGB", (picture.shape[1], CAPTION_HEIGHT))
    font = ImageFont.load_default(size=CAPTION_HEIGHT * 0.55)
    fits = (picture.shape[1] - 8) / max(1.0, font.getlength(text))
    if fits < 1:  # smaller letters in a narrow picture
        font = ImageFont.load_default(size=max(4.0, CAPTION_HEIGHT * 0.55 * fits))
    ImageDraw.Draw(band).text((4, CAPTION_HEIGHT // 2), text, "white", font, anchor="lm")
    return np.concatenate([np.asarray(band), picture])


def png(picture: NDArray[np.uint8]) -> bytes:
    """``picture`` as the bytes of a PNG file."""
    return bytes(imagecodecs.png_encode(picture))
