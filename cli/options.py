"""Options and small types that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cellstore.config import Selection, VoteRules
from cellstore.errors import UserInputError

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store. Default: $CELLSTORE_STORE, else the nearest folder upwards that is one.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")
]
PlatesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plate",
        metavar="BARCODE",
        help="Only this plate; may be given several times. Default: all plates.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        metavar="N",
        help="Only the first N images, for a first try.",
        show_default=False,
    ),
]
WellsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--well",
        metavar="WELL",
        help="Only this well, like D14; may be given several times.",
        show_default=False,
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="SQL",
        help="Only images that meet this condition, over plate, batch, well, row, column, site, "
        "plane, time_point, image, image_id, perturbation, target, kind, control, identifier.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers", min=1, metavar="N", help="Processes that work at once; 1: this one alone."
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Let the workers of this Dask scheduler work, for example tcp://host:8786.",
        show_default=False,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Only say how many images there are to do, and how long."),
]
LeaveOutOption = Annotated[
    bool,
    typer.Option(
        "--leave-out-flagged",
        help="Leave out what quality control (cellstore qc) has flagged. Kept with the result.",
    ),
]
QcRunOption = Annotated[
    str | None,
    typer.Option(
        "--qc-run",
        metavar="RUN",
        help="Whose flags --leave-out-flagged means. Default: the newest finished qc run.",
        show_default=False,
    ),
]
MinCellsOption = Annotated[
    int,
    typer.Option(
        "--min-cells", min=1, metavar="N", help="An image or well of fewer cells has no answer."
    ),
]
MinMarginOption = Annotated[
    float,
    typer.Option(
        "--min-margin",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="An image or well has no answer where the first label has not SHARE (0 to 1) of the "
        "vote more than the second.",
    ),
]
ControlsOption = Annotated[
    bool, typer.Option("--controls/--no-controls", help="Whether control wells count.")
]
ChannelsOption = Annotated[
    str | None,
    typer.Option(
        "--channels",
        metavar="A,B,...",
        help="Channels to look at, by name, with commas between. Default: the first three.",
        show_default=False,
    ),
]


class Level(StrEnum):
    """Whose cells vote."""

    IMAGE = "image"
    WELL = "well"


class Vote(StrEnum):
    """How cells vote."""

    HARD = "hard"
    SOFT = "soft"
    MEDIAN = "median"


class Device(StrEnum):
    """Where a network runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where the network runs; auto takes a GPU if it can.")
]


def selection(
    plates: list[str] | None, wells: list[str] | None, where: str | None, limit: int | None
) -> Selection:
    """Return the images that the options name."""
    return Selection(tuple(plates or ()), tuple(wells or ()), where, limit)


def vote_rules(min_cells: int, min_margin: float, controls: bool) -> VoteRules:
    """Return what the options say about who has an answer."""
    return VoteRules(min_cells=min_cells, min_margin=min_margin, controls=controls)


def leave_out(wanted: bool, run: str | None) -> str | None:
    """Return the quality-control run whose flags are left out, if any.

    Raises:
        UserInputError: a run is named, and nothing is to be left out.
    """
    if run is not None and not wanted:
        raise UserInputError("--qc-run names whose flags count: give --leave-out-flagged, too.")
    return (run or "latest") if wanted else None


def names(text: str | None) -> tuple[str, ...]:
    """Return the words of ``A,B,C``."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
