"""The command that teaches a segmentation network: finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import DEFAULT_MODEL, FinetuneParams, ImageInput
from cellstore.enums import Projection

from . import render
from .context import open_store, say, sentences
from .options import ChannelsOption, Device, DeviceOption, JsonOption, StoreOption, names

if TYPE_CHECKING:
    from cellstore.stages.finetune import FinetuneResult

DEFAULTS = FinetuneParams()
SHOWN_REFUSED = 10


@sentences
def finetune(
    ctx: typer.Context,
    masks: Annotated[
        list[Path],
        typer.Option(
            "--masks",
            metavar="DIR|FILE",
            help="Corrected label images (TIFF, PNG or NPY), named like their images; may be given "
            "several times.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME|FILE|run:N",
            help="The network to start from: as for 'cellstore segment'.",
        ),
    ] = DEFAULT_MODEL,
    epochs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Passes over the images.")
    ] = DEFAULTS.epochs,
    learning_rate: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="Largest step of AdamW.")
    ] = DEFAULTS.learning_rate,
    held_out: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0.0,
            max=0.9,
            help="Share of the wells that is not learned from, only judged by.",
        ),
    ] = DEFAULTS.held_out,
    channels: ChannelsOption = None,
    projection: Annotated[
        Projection, typer.Option(help="How several channels become one picture.")
    ] = Projection.MEDIAN,
    nuclei: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Channels of the nuclei, a second picture. Default: none.",
            show_default=False,
        ),
    ] = None,
    plate: Annotated[
        str | None,
        typer.Option(
            "--plate",
            metavar="BARCODE",
            help="The plate of the masks, where several have images of these names.",
            show_default=False,
        ),
    ] = None,
    binary_masks: Annotated[
        bool,
        typer.Option(
            "--binary-masks", help="Masks are black and white: each connected part is one cell."
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Same seed, same network.")
    ] = DEFAULTS.seed,
    weights_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder that holds the named networks.", show_default=False
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a Cellpose network with masks that you corrected.

    The masks are matched to images as 'cellstore ingest' matches them. Some wells are held out:
    the average precision (IoU 0.5) on them before and after says whether the new network is
    better. It is kept in the store, and 'cellstore segment --model run:N' uses it.

    \b
    Example:
      cellstore finetune --masks corrected/ --channels DNA
      cellstore finetune --masks corrected/ --model cyto3 --channels RNA --nuclei DNA
    """
    params = FinetuneParams(
        model=model,
        epochs=epochs,
        learning_rate=learning_rate,
        held_out=held_out,
        image=ImageInput(names(channels), projection),
        nuclei=ImageInput(names(nuclei), projection) if nuclei else None,
        binary=binary_masks,
        seed=seed,
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.finetune(
            masks, params, plate=plate, weights_dir=weights_dir, device=device.value
        )
    if as_json:
        render.as_json(result)
    else:
        _show(result)


def _show(result: FinetuneResult) -> None:
    if result.already_done:
        typer.echo(f"Nothing to do: run {result.run_id} learned from these masks already.")
    error = result.size_error
    render.facts(
        [
            ("run", result.run_id),
            ("started from", result.start),
            ("images learned from", f"{result.images:,}"),
            ("cells learned from", f"{result.cells:,}"),
            ("images held out", f"{result.held_out:,}"),
            ("AP before", _precision(result.before)),
            ("AP after", _precision(result.after)),
            ("diameter estimate", "none" if error is None else f"{error:.0%} off (median)"),
        ]
    )
    for item in result.refused[:SHOWN_REFUSED]:
        say(f"Not used: {item['file']}: {item['reason']}")
    if len(result.refused) > SHOWN_REFUSED:
        say(f"and {len(result.refused) - SHOWN_REFUSED} more files.")
    _advise(result)


def _precision(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _advise(result: FinetuneResult) -> None:
    if result.before is None or result.after is None:
        say("No image was held out, so nobody knows whether the new network is better.")
    elif result.after < result.before:
        say("The new network is worse on the held-out images. More masks, or fewer --epochs, help.")
    size = "" if result.size_error is not None else " --diameter PIXELS"
    say(f"Next: cellstore segment --model {result.model}{size} --preview 6")
