"""Masks that other tools made: matched to images by name, kept and measured like our own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from ...artifacts import StoredFile
from ...config import ImageInput, as_parameters
from ...db.models import Artifact, Image, Recipe, Segmentation
from ...enums import ArtifactKind, Stage
from ...errors import UserInputError
from ...extras import need
from ...io.image_files import encode_tiff
from ...io.mask_files import MaskFile, MaskFolder
from ...jobs.lookup import FoundImage, Labelled, NoMatch, check_plate, read_masks_of
from ...jobs.planes import cell_rows, check_channels, insert_cells
from ...jobs.recipes import RecipeSpec, fingerprint, register
from ...jobs.runs import keep_file
from ...jobs.workspace import Workspace
from .account import Account, UndoneError

VERSION = 1
DEFAULT_NAME = "masks"
_LONGEST_NAME = 100
_SHOWN_LABELS = 5
_FLUSH_EVERY = 500  # files


@dataclass(frozen=True)
class MasksResult:
    """What a folder of masks brought.

    ``recipe_ids`` are the segmentations, one for each kind of objects; ``cells`` are those written;
    ``plates`` are the ids of the plates of all images that a file belongs to, ascending.
    """

    recipe_ids: tuple[int, ...]
    cells: int
    plates: tuple[int, ...]


class MaskPlan(NamedTuple):
    """What a file of masks would become: ``cells`` objects of an image, or why not.

    ``kind`` is the kind of the objects where the file name says it.
    """

    file: str
    kind: str | None
    image: FoundImage | NoMatch
    cells: int = 0


def ingest_masks(
    workspace: Workspace,
    run_id: int,
    folder: Path,
    *,
    account: Account,
    name: str | None = None,
    plate: str | None = None,
    binary: bool = False,
    image: ImageInput | None = None,
    strict: bool = False,
) -> MasksResult:
    """Keep the label images below ``folder`` as segmentations of the images they are named like.

    ``name`` tells several sets of masks apart, ``plate`` limits the images, ``binary`` takes each
    connected part of a black and white mask for one object, ``image`` is the plane that the masks
    are of, on which ``measure`` looks by default. An image is one short transaction, so that what
    was done stays done; the same masks again change nothing. With ``strict`` nothing is written
    where a file is refused. ``account.rows`` counts the files.

    Raises:
        MissingExtraError: scikit-image is not installed.
        UndoneError: (``strict``) some files cannot be used.
        UserInputError: no folder, no masks in it, no such plate or channel.
    """
    work = _Work(workspace, run_id, folder, account, name, plate, binary, image)
    if strict:
        work.check()
    return work.run()


def plan_masks(
    workspace: Workspace,
    folder: Path,
    *,
    name: str | None = None,
    plate: str | None = None,
    binary: bool = False,
    image: ImageInput | None = None,
) -> Iterator[MaskPlan]:
    """Yield what each file below ``folder`` would become; nothing is written.

    Raises:
        as :func:`ingest_masks`.
    """
    work = _Work(workspace, 0, folder, Account(0, folder.name), name, plate, binary, image)
    for mask, found in work.plan():
        if isinstance(found, NoMatch):
            yield MaskPlan(mask.name, mask.kind, found)
        else:
            yield MaskPlan(mask.name, mask.kind, found.image, len(found.cells))


@dataclass(frozen=True)
class _Looked:
    """Masks with the image they are of, ready to be written."""

    image: FoundImage
    data: bytes
    diameter: float | None
    cells: list[dict[str, Any]]
    in_pieces: list[int]


class _Work:
    """One folder of masks on its way into the store."""

    def __init__(
        self,
        workspace: Workspace,
        run_id: int,
        folder: Path,
        account: Account,
        name: str | None,
        plate: str | None,
        binary: bool,
        plane: ImageInput | None,
    ) -> None:
        need("segment")
        self._workspace = workspace
        self._run_id = run_id
        self._folder = folder
        self._account = account
        self._name = _checked_name(name)
        self._plate = plate
        self._binary = binary
        self._plane = plane or ImageInput()
        self._recipes: dict[str | None, int] = {}
        self._cells = 0
        self._plates: set[int] = set()
        self.masks = MaskFolder(folder)
        with workspace.database.read() as session:
            check_channels(session, self._plane)
            check_plate(session, plate)

    def check(self) -> None:
        """Look at every file before any is written.

        Raises:
            UndoneError: some cannot be used; the account says which.
        """
        self._account.rows += len(self.masks)
        for mask, found in self.plan():
            if isinstance(found, NoMatch):
                self._account.refuse(None, found.reason, found.detail, mask.name)
        if self._account.refused:
            raise UndoneError.of(self._account)
        self._account.rows -= len(self.masks)

    def plan(self) -> Iterator[tuple[MaskFile, _Looked | NoMatch]]:
        """Yield each file with what it would become; nothing is written."""
        seen: dict[tuple[int, str | None], str] = {}
        for mask in self.masks:
            yield mask, self._checked(mask, seen)

    def run(self) -> MasksResult:
        """Write every file that can be used."""
        progress = self._workspace.progress
        progress.start("ingest masks", len(self.masks))
        try:
            for number, mask in enumerate(self.masks, start=1):
                self._one(mask)
                progress.advance()
                if number % _FLUSH_EVERY == 0:
                    self._flush()
            self._flush()
        finally:
            progress.finish()
        plates = tuple(sorted(self._plates))
        return MasksResult(tuple(self._recipes.values()), self._cells, plates)

    def look(self, mask: MaskFile) -> _Looked | NoMatch:
        """Find the image of a file, read the file, and compare the two."""
        found = read_masks_of(
            self._workspace.database, mask, plate=self._plate, binary=self._binary
        )
        return found if isinstance(found, NoMatch) else _looked(found)

    def _checked(
        self, mask: MaskFile, seen: dict[tuple[int, str | None], str]
    ) -> _Looked | NoMatch:
        found = self.look(mask)
        if isinstance(found, NoMatch):
            return found
        with self._workspace.database.read() as session:
            before = self._present(session, mask, found.image.id)
        sha256 = hashlib.sha256(found.data).hexdigest()
        before = seen.setdefault((found.image.id, mask.kind), before or sha256)
        return found if before == sha256 else _clash(found.image)

    def _one(self, mask: MaskFile) -> None:
        self._account.rows += 1
        found = self.look(mask)
        if isinstance(found, NoMatch):
            self._account.refuse(None, found.reason, found.detail, mask.name)
        else:
            self._plates.add(found.image.plate_id)
            self._keep(mask, found)

    def _flush(self) -> None:
        with self._workspace.database.begin() as session:
            self._account.flush(session)

    def _keep(self, mask: MaskFile, found: _Looked) -> None:
        sha256 = hashlib.sha256(found.data).hexdigest()
        with self._workspace.database.read() as session:
            before = self._present(session, mask, found.image.id)
        if before is None:
            # The file first, then its row: a crash between the two leaves no row without a file.
            stored = self._workspace.artifacts.write(ArtifactKind.MASK, found.data, ".tif")
            with self._workspace.database.begin() as session:
                before = self._insert(session, mask, found, stored)
        if before is None:
            self._account.created += 1
            self._cells += len(found.cells)
            self._notice(mask, found)
        elif before == sha256:
            self._account.unchanged += 1
        else:
            self._account.refuse(None, *_clash(found.image), mask.name)

    def _insert(
        self, session: Session, mask: MaskFile, found: _Looked, stored: StoredFile
    ) -> str | None:
        """Write masks and cells, or return the sha256 of what somebody else wrote meanwhile."""
        # A lock on the image: two ingests of one folder must not both find nothing.
        image = session.scalars(
            select(Image).where(Image.id == found.image.id).with_for_update()
        ).one()
        before = self._present(session, mask, image.id)
        if before is not None:
            return before
        row = Segmentation(
            image_id=image.id,
            recipe_id=self._recipe(session, mask.kind),
            content_sha256=image.content_sha256,
            run_id=self._run_id,
            n_cells=len(found.cells),
            diameter=found.diameter,
            mask_artifact_id=keep_file(session, stored),
            flow_artifact_id=None,
            created_at=datetime.now(UTC),
        )
        insert_cells(session, row, found.cells)
        return None

    def _notice(self, mask: MaskFile, found: _Looked) -> None:
        if found.in_pieces:
            shown = ", ".join(map(str, found.in_pieces[:_SHOWN_LABELS]))
            more = ", ..." if len(found.in_pieces) > _SHOWN_LABELS else ""
            detail = f"{len(found.in_pieces)} of {len(found.cells)} labels: {shown}{more}"
            self._account.suspicious(None, "one label in several pieces", detail, mask.name)

    def _present(self, session: Session, mask: MaskFile, image_id: int) -> str | None:
        """Return the sha256 of the current masks of an image of this recipe, if there are any."""
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
            .where(Recipe.stage == Stage.SEGMENT, Image.id == image_id, current)
            .where(Recipe.fingerprint == fingerprint(self._spec(mask.kind)))
        )
        found = session.execute(query.order_by(Segmentation.id.desc()).limit(1)).first()
        if found is None:
            return None
        self._recipes[mask.kind] = found.id
        return str(found.sha256)

    def _recipe(self, session: Session, kind: str | None) -> int:
        recipe = register(session, self._spec(kind))
        self._recipes[kind] = recipe.id
        return recipe.id

    def _spec(self, kind: str | None) -> RecipeSpec:
        parameters = {
            "imported": "masks",
            "name": self._name,
            "objects": kind,
            "binary": self._binary,
            **as_parameters(self._plane),
        }
        return RecipeSpec(Stage.SEGMENT, VERSION, parameters)


def _looked(found: Labelled) -> _Looked:
    from ...analysis.label_images import labels_in_pieces, median_diameter

    labels = found.labels
    small = labels.max(initial=0) <= np.iinfo(np.uint16).max
    data = encode_tiff(labels.astype(np.uint16) if small else labels)
    pieces = labels_in_pieces(labels)
    return _Looked(found.image, data, median_diameter(labels), cell_rows(labels), pieces)


def _clash(image: FoundImage) -> NoMatch:
    detail = f"other masks of {image} are there already under this name; give another with --name"
    return NoMatch("other masks are there", detail)


def _checked_name(name: str | None) -> str:
    name = DEFAULT_NAME if name is None else name.strip()
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise UserInputError(
            f"A set of masks needs a name of 1 to {_LONGEST_NAME} printable characters (--name)."
        )
    return name
