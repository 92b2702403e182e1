"""Options and small types that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
ChannelsOption = Annotated[
    str | None,
    typer.Option(
        "--channels",
        metavar="A,B,...",
        help="Channels to look at, by name, with commas between. Default: the first three.",
        show_default=False,
    ),
]


class Device(StrEnum):
    """Where a network runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where the network runs; auto takes a GPU if it can.")
]


def names(text: str | None) -> tuple[str, ...]:
    """Return the words of ``A,B,C``."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
