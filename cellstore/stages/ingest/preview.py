"""What an ingest would make of a source, without writing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ...config import ImageInput, IngestParams
from ...errors import UserInputError
from ...formats.layouts import Layout, SourceKind
from ...formats.names import format_well
from ...formats.records import ImageRecord, Refusal
from ...reading.matching import FoundImage, NoMatch
from ...runs import Workspace
from ...terms import Severity
from .account import SHOWN, Issue
from .images.stage import ImageSource
from .masks.stage import MaskPlan, plan_masks
from .stage import layout_for

MOST = 1_000_000
"""Plates, wells and images are told apart up to this many of each."""

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
    layout = layout_for(source, params)
    if layout.kind is SourceKind.IMAGES:
        return _of_images(source, layout, params)
    if layout.kind is SourceKind.MASKS:
        return _of_masks(source, params, workspace)
    raise UserInputError(
        f"{source.name} would be read as {layout.value}: {layout.kind.value}, not images or masks. "
        "A dry run shows what files become; ingest it, or leave --dry-run away."
    )


def _of_images(source: Path, layout: Layout, params: IngestParams) -> Preview:
    found = Preview(source.name, layout.value)
    images: set[tuple[str, int, int, int, int, int]] = set()
    for row in ImageSource.open(source, layout, params).records():
        found.rows += 1
        if isinstance(row, Refusal):
            _refuse(found, Issue(Severity.REFUSED, found.source, *row))
        else:
            _count(found, images, (row.plate, *row[3:8]))
            _add(found, row)
    found.images = len(images)
    return found


def _of_masks(source: Path, params: IngestParams, workspace: Workspace | None) -> Preview:
    if workspace is None:
        raise UserInputError(
            "A dry run of masks looks for their images in a store. Name it with --store."
        )
    found = Preview(source.name, Layout.MASKS.value)
    images: set[int] = set()
    plans = plan_masks(
        workspace,
        source,
        name=params.name,
        plate=params.plate,
        binary=params.binary,
        image=ImageInput(tuple(name for name, _ in params.channels)),
    )
    for plan in plans:
        found.rows += 1
        if isinstance(plan.image, NoMatch):
            _refuse(found, Issue(Severity.REFUSED, plan.file, None, *plan.image))
        else:
            _count(found, images, plan.image.id)
            _add_masks(found, plan, plan.image)
    found.images = len(images)
    return found


def _refuse(found: Preview, issue: Issue) -> None:
    found.refused += 1
    if len(found.issues) < SHOWN:
        found.issues.append(issue)


def _count(found: Preview, known: set[Key], key: Key) -> None:
    if len(known) < MOST:
        known.add(key)
    elif key not in known:
        found.at_least = True


def _add(found: Preview, row: ImageRecord) -> None:
    well = format_well(row.row, row.column)
    _count(found, found.plates, row.plate)
    _count(found, found.wells, (row.plate, well))
    found.channels.update(ref.channel for ref in row.files)
    room = SHOWN - len(found.files)
    treatment = row.treatment.pert_iname if row.treatment else None
    place = (row.plate, well, row.site, row.plane, row.time_point)
    found.files += [
        PreviewRow(ref.name, *place, ref.channel, treatment) for ref in islice(row.files, room)
    ]


def _add_masks(found: Preview, plan: MaskPlan, image: FoundImage) -> None:
    _count(found, found.plates, image.plate)
    _count(found, found.wells, (image.plate, image.well))
    if len(found.files) < SHOWN:
        place = (image.plate, image.well, image.site, image.plane, image.time_point)
        row = PreviewRow(plan.file, *place, objects=plan.kind, cells=plan.cells)
        found.files.append(row)
