"""What the readers of images and treatments hand over, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..enums import Control, PerturbationKind

LONGEST = 255
"""Characters of a name that every database and file system can keep."""


class FileRef(NamedTuple):
    """One channel of an image, as a table names it.

    ``channel`` is the name of the stain ('RNA'), ``number`` the channel number of a Phenix file
    name, ``folder`` the ``PathName_*`` of the row as written, which may be on another machine.
    """

    channel: str
    number: int | None
    name: str
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class TreatmentRecord:
    """What was done to a well.

    ``identifier`` is the ``broad_sample`` of JUMP tables, or else their ``Metadata_JCP2022``.
    Several targets are each there once, sorted, with ``|`` between them.
    """

    kind: PerturbationKind
    pert_iname: str
    target: str | None = None
    control: Control | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None
    pubchem_cid: str | None = None


class ImageRecord(NamedTuple):
    """One field of view from line ``line`` of a table; row, column, site as numbers.

    ``row`` and ``column`` count from 1; ``site``, ``plane`` and ``time_point`` are as written.
    ``pixel_size`` is in micrometres; ``metadata`` are the columns that have no field of their own.
    """

    line: int
    plate: str
    batch: str | None
    row: int
    column: int
    site: int
    plane: int
    time_point: int
    core_name: str | None
    files: tuple[FileRef, ...]
    treatment: TreatmentRecord | None
    pixel_size: float | None = None
    metadata: Mapping[str, str] | None = None


class Refusal(NamedTuple):
    """A row that cannot be used: the line it starts at, a reason to count by, and its details."""

    line: int
    reason: str
    detail: str
