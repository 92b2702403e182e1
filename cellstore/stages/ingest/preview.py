"""What an ingest would make of a source, without a store and without writing anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ...config import IngestParams
from ...errors import UserInputError
from ...formats.layouts import SourceKind
from ...formats.names import format_well
from ...formats.records import ImageRecord, Refusal
from ...terms import Severity
from .account import SHOWN, Issue
from .images.stage import ImageSource
from .stage import layout_for


@dataclass(frozen=True)
class PreviewRow:
    """What one file would become."""

    file: str
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    channel: str
    treatment: str | None


@dataclass
class Preview:
    """What a source would become: ``files`` are the first of them, ``images`` counts fields.

    ``channels`` counts files by channel; ``refused`` rows would be left out, ``issues`` says why.
    """

    source: str
    layout: str
    rows: int = 0
    images: int = 0
    refused: int = 0
    plates: set[str] = field(default_factory=set)
    wells: set[tuple[str, str]] = field(default_factory=set)
    channels: Counter[str] = field(default_factory=Counter)
    files: list[PreviewRow] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)


def preview(source: Path, params: IngestParams | None = None) -> Preview:
    """Read the images of a source and say what each file would become.

    Raises:
        BadTableError: the source cannot be read.
        UserInputError: the source holds no images but features, masks or treatments.
    """
    params = params or IngestParams()
    layout = layout_for(source, params)
    if layout.kind is not SourceKind.IMAGES:
        raise UserInputError(
            f"{source.name} would be read as {layout.value}: {layout.kind.value}, not images. "
            "A dry run shows what image files become; ingest it, or leave --dry-run away."
        )
    found = Preview(source.name, layout.value)
    images: set[tuple[str, int, int, int, int, int]] = set()
    for row in ImageSource.open(source, layout, params).records():
        found.rows += 1
        if isinstance(row, Refusal):
            _refuse(found, row)
        else:
            images.add((row.plate, *row[3:8]))
            _add(found, row)
    found.images = len(images)
    return found


def _refuse(found: Preview, row: Refusal) -> None:
    found.refused += 1
    if len(found.issues) < SHOWN:
        issue = Issue(Severity.REFUSED, found.source, row.line, row.reason, row.detail)
        found.issues.append(issue)


def _add(found: Preview, row: ImageRecord) -> None:
    well = format_well(row.row, row.column)
    found.plates.add(row.plate)
    found.wells.add((row.plate, well))
    found.channels.update(ref.channel for ref in row.files)
    room = SHOWN - len(found.files)
    treatment = row.treatment.pert_iname if row.treatment else None
    place = (row.plate, well, row.site, row.plane, row.time_point)
    found.files += [
        PreviewRow(ref.name, *place, ref.channel, treatment) for ref in islice(row.files, room)
    ]
