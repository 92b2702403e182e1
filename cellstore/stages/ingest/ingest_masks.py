"""Masks that other tools made: matched to images by name, kept and measured like our own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from ...analysis.regions import cells_in_pieces
from ...config import ImageInput, IngestParams
from ...enums import ArtifactKind, Stage
from ...errors import UserInputError
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
from .account import Account

VERSION = 1
DEFAULT_NAME = "masks"
_LONGEST_NAME = 100
_SHOWN_OBJECTS = 5
_FLUSH_EVERY = 500  # files


@dataclass(frozen=True)
class FoundMasks:
    """A file of masks, the image that it is of, and what it holds.

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
    workspace: Workspace, folder: Path, params: IngestParams, account: Account
) -> None:
    """Keep the label images below ``folder`` as segmentations of the images they are named like.

    ``name`` tells several sets of masks apart, ``plate`` limits the images, ``binary`` takes each
    connected part of a black and white mask for one object, ``channels`` are those of the image
    that the masks are of, on which ``measure`` looks by default. An image is one short
    transaction, so that what was done stays done; the same masks again change nothing. With
    ``strict`` nothing is written where a file is refused. ``account.rows`` counts the files.

    Raises:
        MissingExtraError: scikit-image is not installed.
        UndoneError: (``strict``) some files cannot be used.
        UserInputError: no folder, no masks in it, no such plate or channel.
    """
    reader = MaskReader(workspace, folder, params)
    if params.strict:
        for _ in reader.plan(account):
            pass
        account.check_strict()
        account.rows = 0
    plates = set()
    workspace.progress.start("ingest masks", len(reader.files))
    try:
        for number, file in enumerate(reader.files, start=1):
            account.rows += 1
            try:
                found = reader.read(file)
                plates.add(found.image.plate_id)
                _keep(workspace, reader, found, account)
            except RowRefusedError as refused:
                reason, detail = refused.args
                account.refuse(None, reason, detail, file.name)
            workspace.progress.advance()
            if number % _FLUSH_EVERY == 0 or number == len(reader.files):
                with workspace.database.begin() as session:
                    account.flush(session)
    finally:
        workspace.progress.finish()
    account.plates, account.segmentations = sorted(plates), tuple(reader.recipes.values())


class MaskReader:
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
        self._plane = ImageInput(tuple(channel for channel, _ in params.channels))
        self.files = masks_below(folder)
        self.recipes: dict[str | None, int] = {}
        with workspace.database.read() as session:
            named = in_recipes(session, find_channels(session, self._plane.channels))
            self._plane = ImageInput(named)
            for plate in params.plate[:1]:
                find_plate(session, plate)

    def read(self, file: MaskFile) -> FoundMasks:
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
        return FoundMasks(
            file,
            image,
            data,
            hashlib.sha256(data).hexdigest(),
            diameter,
            cell_rows(labels),
            cells_in_pieces(labels),
        )

    def plan(self, account: Account) -> Iterator[FoundMasks]:
        """Yield the files that would be kept; of two for one image the first counts."""
        seen: dict[tuple[int, str | None], str] = {}
        for file in self.files:
            account.rows += 1
            try:
                found = self.read(file)
                with self._workspace.database.read() as session:
                    before = self.present(session, found)
                before = seen.setdefault((found.image.id, file.kind), before or found.sha256)
                if before != found.sha256:
                    raise other_masks(found.image)
            except RowRefusedError as refused:
                reason, detail = refused.args
                account.refuse(None, reason, detail, file.name)
            else:
                yield found

    def present(self, session: Session, found: FoundMasks) -> str | None:
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


def other_masks(image: FoundImage) -> RowRefusedError:
    """Return why masks are refused of an image that has others by the same recipe."""
    detail = f"{image} has other masks of this name already; give these another name with --name"
    return RowRefusedError("other masks are there", detail)


def _keep(workspace: Workspace, reader: MaskReader, found: FoundMasks, account: Account) -> None:
    """Write masks that are new."""
    with workspace.database.read() as session:
        before = reader.present(session, found)
    if before is None:
        # The file first, then its row: a crash between the two leaves no row without a file.
        stored = workspace.artifacts.write(ArtifactKind.MASK, found.data, ".tif")
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
                    "run_id": account.run_id,
                    "n_cells": len(found.cells),
                    "diameter": found.diameter,
                    "mask_artifact_id": keep_files(session, [stored])[0],
                    "flow_artifact_id": None,
                    "created_at": datetime.now(UTC),
                }
                insert_cells(session, [(row, found.cells)])
    if before == found.sha256:
        workspace.artifacts.write(ArtifactKind.MASK, found.data, ".tif")  # if it was gone
        account.unchanged += 1
    elif before is not None:
        raise other_masks(found.image)
    else:
        account.created += 1
        account.cells += len(found.cells)
        if found.in_pieces:
            some = ", ".join(map(str, found.in_pieces[:_SHOWN_OBJECTS]))
            more = ", ..." if len(found.in_pieces) > _SHOWN_OBJECTS else ""
            detail = f"{len(found.in_pieces)} of {len(found.cells)} labels: {some}{more}"
            account.suspicious(None, "one label in several pieces", detail, found.file.name)
