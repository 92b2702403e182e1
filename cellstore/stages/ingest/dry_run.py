"""What an ingest would make of a source, without writing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ...config import IngestParams
from ...enums import Severity
from ...errors import UserInputError
from ...io.filenames import format_well
from ...io.layouts import SourceKind
from ...io.tables import Refusal
from ...jobs.mask_matching import NoMatch
from ...jobs.workspace import Workspace
from .account import SHOWN, Issue
from .ingest import choose_layout
from .ingest_images import ImageSource
from .ingest_masks import MaskReader

MOST = 1_000_000
"""Plates, wells and images are counted up to this many of each: they are held in memory."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PreviewRow:
    """What one file would become: a channel of an image, or ``cells`` masks of an image."""

    file: str
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    channel: str | None = None
    treatment: str | None = None
    objects: str | None = None
    cells: int | None = None


@dataclass
class Preview:
    """What a source would become: ``files`` are the first of them, ``images`` counts fields.

    ``channels`` counts files by channel; ``refused`` rows would be left out, ``issues`` says why.
    ``at_least``: there are more plates, wells or images than were counted.
    """

    source: str
    layout: str
    rows: int = 0
    images: int = 0
    refused: int = 0
    at_least: bool = False
    plates: set[str] = field(default_factory=set)
    wells: set[tuple[str, str]] = field(default_factory=set)
    channels: Counter[str] = field(default_factory=Counter)
    files: list[PreviewRow] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    def refuse(self, issue: Issue) -> None:
        """Count a row that would be left out."""
        self.refused += 1
        if len(self.issues) < SHOWN:
            self.issues.append(issue)

    def count(self, known: set[Key], key: Key) -> None:
        """Count a plate, well or image once, in bounded memory."""
        if len(known) < MOST:
            known.add(key)
        elif key not in known:
            self.at_least = True

    def add(self, rows: Iterable[PreviewRow]) -> None:
        """Count the plate and well of files of one image, and show them if there is room."""
        for row in rows:
            self.count(self.plates, row.plate)
            self.count(self.wells, (row.plate, row.well))
            if row.channel is not None:
                self.channels[row.channel] += 1
            if len(self.files) < SHOWN:
                self.files.append(row)


def preview(
    source: Path, params: IngestParams | None = None, workspace: Workspace | None = None
) -> Preview:
    """Read images or masks and say what each file would become.

    Masks need the ``workspace`` that has their images; images need none.

    Raises:
        BadTableError: the source cannot be read.
        MissingExtraError: masks, and scikit-image is not installed.
        UserInputError: the source holds features or treatments, or masks and no ``workspace``.
    """
    params = params or IngestParams()
    layout = choose_layout(source, params)
    found = Preview(source.name, layout.value)
    if layout.kind is SourceKind.IMAGES:
        _preview_images(found, ImageSource(source, layout, params))
    elif layout.kind is not SourceKind.MASKS:
        raise UserInputError(
            f"{source.name} would be read as {layout.value}: {layout.kind.value}, not images or "
            "masks. A dry run shows what files become; ingest it, or leave --dry-run away."
        )
    elif workspace is None:
        raise UserInputError(
            "A dry run of masks looks for their images in a store. Name it with --store."
        )
    else:
        _preview_masks(found, MaskReader(workspace, source, params))
    return found


def _preview_images(found: Preview, source: ImageSource) -> None:
    images: set[tuple[str, int, int, int, int, int]] = set()
    for row in source.records():
        found.rows += 1
        if isinstance(row, Refusal):
            found.refuse(Issue(Severity.REFUSED, found.source, *row))
            continue
        found.count(images, (row.plate, *row[3:8]))
        where = (row.plate, format_well(row.row, row.column), row.site, row.plane, row.time_point)
        treatment = row.treatment.pert_iname if row.treatment else None
        found.add(PreviewRow(ref.name, *where, ref.channel, treatment) for ref in row.files)
    found.images = len(images)


def _preview_masks(found: Preview, reader: MaskReader) -> None:
    images: set[int] = set()
    for masks in reader.plan():
        found.rows += 1
        image, file = masks.image, masks.file
        if isinstance(image, NoMatch):
            found.refuse(Issue(Severity.REFUSED, file.name, None, *image))
            continue
        found.count(images, image.id)
        where = (image.plate, image.well, image.site, image.plane, image.time_point)
        row = PreviewRow(file.name, *where, objects=file.kind, cells=len(masks.cells))
        found.add([row])
    found.images = len(images)
