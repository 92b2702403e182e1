"""Masks that other tools made: matched to images by name, kept and measured like our own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from ...analysis.regions import cells_in_pieces
from ...config import ImageInput, IngestParams
from ...enums import ArtifactKind, Stage
from ...errors import UserInputError, some_of
from ...io.image_files import encode_tiff
from ...io.mask_files import MaskFile, masks_below
from ...io.tables import RowRefusedError
from ...jobs.lookup import find_channels, find_plate, in_recipes
from ...jobs.mask_matching import FoundImage, read_masks_of
from ...jobs.planes import cell_rows, insert_cells
from ...jobs.runs import RecipeSpec, fingerprint, keep_files, register
from ...jobs.workspace import Workspace
from ...models import Artifact, Image, Recipe, Segmentation
from ...settings import need
from .account import SHOWN, Account

VERSION = 1
DEFAULT_NAME = "masks"
_LONGEST_NAME = 100
_FLUSH_EVERY = 500  # files


class _Masks(NamedTuple):
    """A file of masks that belongs to an image: what is kept of it.

    ``data`` is the label image as it is kept, with ``sha256``; ``cells`` are the rows of its
    objects; ``in_pieces`` the numbers of objects that are not connected.
    """

    file: MaskFile
    image: FoundImage
    data: bytes
    sha256: str
    diameter: float | None
    cells: Sequence[dict[str, Any]]
    in_pieces: Sequence[int]


def ingest_masks(
    workspace: Workspace,
    folder: Path,
    params: IngestParams,
    account: Account,
    *,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Keep the label images below ``folder`` as segmentations of the images they are named like.

    ``channels`` of ``params`` are those of the image that the masks are of, on which ``measure``
    looks by default. An image is one short transaction, so that what was done stays done; the
    same masks again change nothing. ``account.rows`` counts the files. Returns what the first
    files of a ``dry_run`` would become.
    """
    reader = _MaskReader(workspace, folder, params)
    plates = set()
    preview: list[dict[str, Any]] = []
    seen: dict[tuple[int, str | None], str] = {}
    workspace.progress.start("ingest masks", len(reader.files))
    try:
        for number, file in enumerate(reader.files, start=1):
            account.rows += 1
            try:
                found = reader.read(file)
                image = found.image
                plates.add(image.plate_id)
                if not dry_run:
                    before = _keep(workspace, reader, found, account.run_id)
                else:
                    with workspace.database.read() as session:
                        before = reader.present(session, found)
                    before = before or seen.get((image.id, file.kind))
                    seen[image.id, file.kind] = before or found.sha256
                _count(account, found, before)
                if dry_run and len(preview) < SHOWN:
                    preview.append(
                        {
                            "file": file.name,
                            "plate": image.plate,
                            "well": image.well,
                            "site": image.site,
                            "plane": image.plane,
                            "time_point": image.time_point,
                            "objects": file.kind,
                            "cells": len(found.cells),
                        }
                    )
            except RowRefusedError as refused:
                reason, detail = refused.args
                account.refuse(None, reason, detail, file.name)
            workspace.progress.advance()
            if not dry_run and (number % _FLUSH_EVERY == 0 or number == len(reader.files)):
                with workspace.database.begin() as session:
                    account.flush(session)
    finally:
        workspace.progress.finish()
    account.plates, account.segmentations = sorted(plates), tuple(reader.recipes.values())
    return preview


class _MaskReader:
    """Finds the image of each file of masks, and what the store has of it already.

    ``recipes`` are the segmentations that were found or made, by kind of objects.
    """

    def __init__(self, workspace: Workspace, folder: Path, params: IngestParams) -> None:
        need("segment")
        name = DEFAULT_NAME if params.name is None else params.name.strip()
        if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
            raise UserInputError(
                f"A set of masks needs a name of 1 to {_LONGEST_NAME} printable characters "
                "(--name)."
            )
        self._workspace, self._params, self._name = workspace, params, name
        self.files = masks_below(folder)
        self.recipes: dict[str | None, int] = {}
        with workspace.database.read() as session:
            channels = find_channels(session, tuple(channel for channel, _ in params.channels))
            self._plane = ImageInput(in_recipes(session, channels))
            for plate in params.plate[:1]:
                find_plate(session, plate)

    def read(self, file: MaskFile) -> _Masks:
        """Find the image of a file, read the file, and compare the two."""
        params = self._params
        plate = next(iter(params.plate), None)
        image, labels = read_masks_of(
            self._workspace.database, file, plate=plate, binary=params.binary
        )
        small = labels.max(initial=0) <= np.iinfo(np.uint16).max
        data = encode_tiff(labels.astype(np.uint16) if small else labels)
        _, areas = np.unique(labels[labels > 0], return_counts=True)
        # Of a disc of the area of each cell.
        diameter = float(np.median(2 * np.sqrt(areas / np.pi))) if areas.size else None
        sha256 = hashlib.sha256(data).hexdigest()
        pieces = cells_in_pieces(labels)
        return _Masks(file, image, data, sha256, diameter, cell_rows(labels), pieces)

    def present(self, session: Session, found: _Masks) -> str | None:
        """Return the sha256 of the masks that the image has by this recipe, if there are any."""
        current = or_(
            Segmentation.content_sha256.is_(None),
            Image.content_sha256.is_(None),
            Segmentation.content_sha256 == Image.content_sha256,
        )
        query = (
            select(Artifact.sha256, Recipe.id)
            .join(Segmentation, Segmentation.mask_artifact_id == Artifact.id)
            .join(Recipe, Recipe.id == Segmentation.recipe_id)
            .join(Image, Image.id == Segmentation.image_id)
            .where(Recipe.stage == Stage.SEGMENT, Image.id == found.image.id, current)
            .where(Recipe.fingerprint == fingerprint(self.spec(found.file.kind)))
        )
        row = session.execute(query.order_by(Segmentation.id.desc()).limit(1)).first()
        if row is None:
            return None
        self.recipes[found.file.kind] = row.id
        return str(row.sha256)

    def spec(self, kind: str | None) -> RecipeSpec:
        """Return the recipe of the segmentations of one kind of objects."""
        parameters = {
            "imported": "masks",
            "name": self._name,
            "objects": kind,
            "binary": self._params.binary,
            **asdict(self._plane),
        }
        return RecipeSpec(Stage.SEGMENT, VERSION, parameters)


def _keep(workspace: Workspace, reader: _MaskReader, found: _Masks, run_id: int) -> str | None:
    """Write masks that are new; return the sha256 of those that were there."""
    with workspace.database.read() as session:
        before = reader.present(session, found)
    if before not in (None, found.sha256):
        return before
    # The file first, then its row: a crash between the two leaves no row without a file.
    stored = workspace.artifacts.write(ArtifactKind.MASK, found.data, ".tif")  # or it was gone
    if before is not None:
        return before
    with workspace.database.begin() as session:
        # A lock on the image: two ingests of one folder must not both find nothing.
        locked = select(Image).where(Image.id == found.image.id).with_for_update()
        image = session.scalars(locked).one()
        before = reader.present(session, found)
        if before is None:
            recipe = register(session, reader.spec(found.file.kind))
            reader.recipes[found.file.kind] = recipe.id
            row = {
                "image_id": image.id,
                "recipe_id": recipe.id,
                "content_sha256": image.content_sha256,
                "run_id": run_id,
                "n_cells": len(found.cells),
                "diameter": found.diameter,
                "mask_artifact_id": keep_files(session, [stored])[0],
                "flow_artifact_id": None,
                "created_at": datetime.now(UTC),
            }
            insert_cells(session, [(row, found.cells)])
    return before


def _count(account: Account, found: _Masks, before: str | None) -> None:
    """Say what became of masks whose image has those with the sha256 ``before``."""
    if before == found.sha256:
        account.unchanged += 1
    elif before is not None:
        detail = f"{found.image} has other masks of this name already; give these another --name"
        raise RowRefusedError("other masks are there", detail)
    else:
        account.created += 1
        account.cells += len(found.cells)
        if found.in_pieces:
            pieces = found.in_pieces
            detail = f"{len(pieces)} of {len(found.cells)} labels: {some_of(pieces)}"
            account.suspicious(None, "one label in several pieces", detail, found.file.name)
